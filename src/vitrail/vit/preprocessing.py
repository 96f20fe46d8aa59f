"""From a photograph to the tensor the model was trained on, stated so that a study can be repeated."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitrail.errors import UsageError

__all__ = ["Preprocessing"]


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalisation, in timm's terms (which the other libraries' settings are translated to).

    size: (rows, columns) of the crop in pixels. crop_pct: crop side / side after resizing. crop_mode: "center" resizes
    the short side, "squash" resizes both, "border" pads. mean, std: per channel, on values 0..1.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    @classmethod
    def from_timm(cls, config: dict[str, Any]) -> "Preprocessing":
        """From what `timm.data.resolve_model_data_config` gives."""
        return cls(
            (int(config["input_size"][1]), int(config["input_size"][2])),
            tuple(map(float, config["mean"])),
            tuple(map(float, config["std"])),
            str(config["interpolation"]),
            float(config["crop_pct"] or 1.0),
            str(config.get("crop_mode") or "center"),
        )

    def resized(self, size: int | tuple[int, int]) -> "Preprocessing":
        """The same for another image size in pixels."""
        rows, columns = (size, size) if isinstance(size, int) else size
        if rows < 1 or columns < 1:
            raise UsageError(f"An image size of {rows} x {columns} pixels has no meaning.")
        return replace(self, size=(int(rows), int(columns)))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a plan."""
        return asdict(self)

    def view(self, image: Image.Image) -> Image.Image:
        """What the model sees of a photograph: resized and cropped, not normalised."""
        cropped = self._geometry(image.convert("RGB"))
        assert isinstance(cropped, Image.Image)
        return cropped

    def tensor(self, images: Sequence[Image.Image]) -> Float[Tensor, "image channel row column"]:
        """Photographs as the model's input, float32."""
        from torchvision.transforms.functional import pil_to_tensor

        pixels = torch.stack([pil_to_tensor(self.view(image)) for image in images]).float().div_(255)
        return pixels.sub_(self._column(self.mean)).div_(self._column(self.std))

    def pixels(self, images: Float[Tensor, "image channel row column"]) -> Float[Tensor, "image channel row column"]:
        """The inverse of the normalisation: values 0..1."""
        return (images * self._column(self.std).to(images) + self._column(self.mean).to(images)).clamp(0, 1)

    @cached_property
    def _geometry(self) -> Any:
        from timm.data import create_transform
        from torchvision.transforms import Compose

        whole = create_transform(
            (3, *self.size),
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            normalize=False,
        )
        return Compose([step for step in whole.transforms if "Tensor" not in type(step).__name__])

    @staticmethod
    def _column(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values).view(1, -1, 1, 1)
