"""From a photograph to the tensor the model was trained on, stated so that a study can be repeated."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitrail.arguments import whole_number, whole_numbers
from vitrail.data import PhotographLike, as_photograph
from vitrail.data.channels import channels_of
from vitrail.data.geometry import (
    CROP_MODES,
    INTERPOLATIONS,
    crop_center,
    resize_and_crop,
    resize_target,
    resized_sides,
)
from vitrail.errors import UsageError

__all__ = ["HALF", "ImageSize", "Preprocessing", "UnknownPreprocessing", "override", "photographs_of", "read_sides"]

HALF = (0.5, 0.5, 0.5)

ImageSize = SupportsIndex | Iterable[SupportsIndex]
"""One number of pixels, or rows and columns."""

_MODES = {1: "L", 3: "RGB"}
"""Pillow's modes of photographs, by number of channels."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalisation: timm's terms, and what the other libraries do otherwise.

    Attributes:
        size: (rows, columns) of the crop, in pixels: what the model takes.
        mean: per channel, on values 0..1.
        std: per channel, on values 0..1.
        interpolation: "nearest", "box", "bilinear", "hamming", "bicubic" or "lanczos".
        crop_pct: side of the crop / side after resizing, rounded down as timm does; not used where `resize` is given.
        crop_mode: "center" resizes the short side and crops, "squash" resizes both sides and crops, "border" resizes
            the long side and adds a border.
        resize: (rows, columns) to resize towards, in pixels, where a library states them.
        resampler: "pillow", or "torchvision" for processors of transformers that resize tensors of bytes.
        crop_rounding: where the crop begins if the rest is odd: "even" as torchvision, "down" as transformers.
        fill: colour of the border, 0..255.
        source: where these settings come from, in words. Not compared.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    resize: tuple[int, int] | None = None
    resampler: str = "pillow"
    crop_rounding: str = "even"
    fill: tuple[int, int, int] = (0, 0, 0)
    source: str = field(default="given", compare=False)

    def __post_init__(self) -> None:
        resize = None if self.resize is None else read_sides(_without_points(self.resize), "resize")
        self._set_plain("size", read_sides(_without_points(self.size), "size"))
        self._set_plain("resize", resize)
        self._set_plain("fill", whole_numbers("fill", _without_points(self.fill), 3))
        self._set_plain("mean", _per_channel("mean", self.mean))
        self._set_plain("std", _per_channel("std", self.std))
        _check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        _check_choice("crop mode", self.crop_mode, CROP_MODES)
        _check_choice("resampler", self.resampler, ("pillow", "torchvision"))
        _check_choice("crop rounding", self.crop_rounding, ("even", "down"))
        for name, sides in (("image size", self.size), ("size to resize to", self.resize or self.size)):
            if min(sides) < 1:
                raise UsageError(f"An {name} of {sides[0]} x {sides[1]} pixels has no meaning.")
        numbers = (*self.mean, *self.std)
        if len(self.mean) != len(self.std) or not all(map(math.isfinite, numbers)) or not all(self.std):
            raise UsageError(
                f"mean {self.mean} and std {self.std} have no meaning together: give one number for each channel, no "
                "std of 0, on values 0..1."
            )
        self._set_plain("crop_pct", float(self.crop_pct))
        if not self.crop_pct > 0:
            raise UsageError(f"A crop of {self.crop_pct} of the resized picture has no meaning; write 0.875 or so.")
        rows, columns = resize_target(self.as_dict())
        if self.crop_mode != "border" and (self.size[0] > rows or self.size[1] > columns):
            raise UsageError(
                f"The crop of {self.size[0]} x {self.size[1]} pixels is larger than the picture, which is resized to "
                f"{rows} x {columns} ({self.source}): the model would see a photograph in a black frame. Give "
                "preprocessing=, or crop= (--crop), such as 1.0."
            )

    def _set_plain(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # a plan holds numbers of Python alone

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Preprocessing":
        """The preprocessing that a plan or a config.json holds.

        Args:
            settings: from `as_dict`, also of an earlier version and after JSON.

        Returns:
            The preprocessing.

        Raises:
            UsageError: the settings have no meaning.
        """
        pairs: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
        }
        try:
            return cls(**pairs)
        except (TypeError, ValueError) as error:
            raise UsageError(f"This is no preprocessing ({error}): {dict(settings)}.") from error

    def with_size(self, size: ImageSize) -> "Preprocessing":
        """The same for another image size: the sides before the crop grow as the crop does.

        Args:
            size: pixels, one number or (rows, columns).

        Returns:
            The preprocessing for that size.

        Raises:
            UsageError: a size without pixels.
        """
        rows, columns = read_sides(size)
        if (rows, columns) == self.size:
            return self
        if rows < 1 or columns < 1:
            raise UsageError(f"An image size of {rows} x {columns} pixels has no meaning.")
        resize = None
        if self.resize is not None:
            resize = (round(self.resize[0] * rows / self.size[0]), round(self.resize[1] * columns / self.size[1]))
        return replace(self, size=(rows, columns), resize=resize)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain data for a plan.

        Returns:
            Settings by name, which `from_dict` takes.
        """
        return asdict(self)

    def view(self, image: PhotographLike) -> Image.Image:
        """The part of a photograph that the model sees: resized and cropped, not normalised.

        Args:
            image: a photograph of any size and colour mode, as `vitrail.data.as_photograph` takes it.

        Returns:
            An RGB image of `size`.

        Raises:
            UsageError: it is no photograph.
            BadImage: its black and white are not defined, or it is too narrow.
        """
        image, settings = as_photograph(image), self.as_dict()
        if self.resampler == "pillow" or self.interpolation == "nearest" or channels_of(image) is not None:
            return resize_and_crop(image, settings)
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image

        columns, rows = resized_sides(image.width, image.height, settings)
        pixels = pil_to_tensor(image)
        mode = InterpolationMode(self.interpolation)
        with_size = to_pil_image(resize(pixels, [rows, columns], interpolation=mode, antialias=True))
        return crop_center(with_size, settings)

    def normalize(self, views: Sequence[Image.Image]) -> Float[Tensor, "image channel row column"]:
        """Views as the model's input.

        Args:
            views: images from `view`.

        Returns:
            float32, [image, channel, row, column]; one channel is their brightness.

        Raises:
            UsageError: the model takes neither one channel nor three, or there is no view.
        """
        if not views:
            raise UsageError("No photograph was given; give one or more.")
        pixels = torch.stack([self._pixels_of(view) for view in views])
        return pixels.sub_(self._column(self.mean)).div_(self._column(self.std))

    def _pixels_of(self, view: Image.Image) -> Float[Tensor, "channel row column"]:
        """Values of a view on 0..1, of as many channels as the model takes."""
        from torchvision.transforms.functional import pil_to_tensor

        n_channels, values = len(self.mean), channels_of(view)
        if values is not None and values.shape[-1] != n_channels:
            raise UsageError(
                f"This model takes images of {n_channels} channel{'s' * (n_channels != 1)}, and one has "
                f"{values.shape[-1]}. Select the channels it was trained with."
            )
        if values is not None:
            return torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, -1, 0)))
        if n_channels not in _MODES:
            raise UsageError(
                f"This model takes images of {n_channels} channels and photographs have 3. Give arrays (.npy) or TIFF "
                "files of as many channels, or tensors to vit.tap() and vit.logits()."
            )
        pixels: Tensor = pil_to_tensor(view.convert(_MODES[n_channels])).float().div_(255)
        return pixels

    def tensor(self, images: Iterable[PhotographLike] | PhotographLike) -> Float[Tensor, "image channel row column"]:
        """Photographs as the model's input.

        Args:
            images: photographs of any size and colour mode, as `vitrail.data.as_photograph` takes them; or one.

        Returns:
            float32, [image, channel, row, column].

        Raises:
            UsageError: they are no photographs, there is none, or the model takes neither one channel nor three.
            BadImage: one is broken, too narrow, or its black and white are not defined.
        """
        return self.normalize([self.view(image) for image in photographs_of(images)])

    def pixels(self, images: Float[Tensor, "image channel row column"]) -> Float[Tensor, "image channel row column"]:
        """The inverse of the normalisation.

        Args:
            images: [image, channel, row, column], as the model takes them.

        Returns:
            Values 0..1 of the same shape.
        """
        return (images * self._column(self.std).to(images) + self._column(self.mean).to(images)).clamp(0, 1)

    @staticmethod
    def _column(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


@dataclass(frozen=True)
class UnknownPreprocessing:
    """The image size of a model whose preprocessing nobody stated, and why it is not known.

    Attributes:
        size: (rows, columns) that the model takes, in pixels.
        reason: why the preprocessing is not known, as a sentence without its full stop.
    """

    size: tuple[int, int]
    reason: str

    def with_size(self, size: ImageSize) -> "UnknownPreprocessing":
        """The same for another image size.

        Args:
            size: pixels, one number or (rows, columns).

        Returns:
            The statement for that size.
        """
        return replace(self, size=read_sides(size))


def override(
    preprocessing: Preprocessing | UnknownPreprocessing,
    *,
    mean: SupportsFloat | Iterable[SupportsFloat] | None = None,
    std: SupportsFloat | Iterable[SupportsFloat] | None = None,
    interpolation: str | None = None,
    crop: float | str | None = None,
) -> Preprocessing | UnknownPreprocessing:
    """The preprocessing with what the user gives in its place.

    Args:
        preprocessing: what the model states.
        mean: one number, or one per channel, on values 0..1.
        std: one number, or one per channel, on values 0..1.
        interpolation: a name of `Preprocessing.interpolation`.
        crop: "center", "squash" or "border", a share such as 0.875, or both: "squash:0.875".

    Returns:
        Unknown, still, unless mean and std are both given where nothing else states them.

    Raises:
        UsageError: a value has no meaning.
    """
    changes: dict[str, Any] = {}
    if mean is not None:
        changes["mean"] = _per_channel("mean", mean)
    if std is not None:
        changes["std"] = _per_channel("std", std)
    if interpolation is not None:
        changes["interpolation"] = interpolation
    if crop is not None:
        mode, share = _read_crop(crop)
        changes |= {"crop_mode": mode, "crop_pct": share, "resize": None}
    if not changes:
        return preprocessing
    words = [
        name
        for name, value in (("mean", mean), ("std", std), ("interpolation", interpolation), ("crop", crop))
        if value is not None
    ]
    if isinstance(preprocessing, UnknownPreprocessing):
        if mean is None or std is None:
            return preprocessing
        plain = Preprocessing(preprocessing.size, HALF, HALF)
        assumed = [
            words_of
            for name, words_of in (("interpolation", "bicubic"), ("crop", "the short side resized, then a centre crop"))
            if name not in words
        ]
        rest = f"; assumed: {', '.join(assumed)}" if assumed else ""
        return replace(plain, **changes, source=f"given: {', '.join(words)}{rest}")
    return replace(preprocessing, **changes, source=f"given: {', '.join(words)}; the rest: {preprocessing.source}")


def photographs_of(images: Any) -> Iterator[Any]:
    """One photograph, or each of several: arrays of one axis hold several, as a column of paths does.

    Args:
        images: One, or several.

    Returns:
        Each of them, as it was given.

    Raises:
        UsageError: It is neither.
    """
    is_one = isinstance(images, (Image.Image, str, Path, bytes, bytearray, memoryview))
    try:
        return iter([images] if is_one or getattr(images, "ndim", None) in (2, 3) else images)
    except TypeError as error:
        raise UsageError(
            f"A {type(images).__name__} is no photograph and holds none; give one, or several in a list."
        ) from error


def _without_points(numbers: Any) -> Any:
    """Whole numbers that were written as 224.0, as some writers of JSON do, are whole numbers."""
    if isinstance(numbers, float) and numbers.is_integer():
        return int(numbers)
    return type(numbers)(map(_without_points, numbers)) if isinstance(numbers, (list, tuple)) else numbers


def _per_channel(name: str, values: Any) -> tuple[float, ...]:
    try:
        return (float(values),) * 3 if np.ndim(values) == 0 else tuple(map(float, values))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} {values!r} has no meaning; write one number, or one per channel.") from error


def _read_crop(crop: float | str) -> tuple[str, float]:
    """(crop mode, crop_pct)"""
    mode, _, share = str(crop).partition(":")
    if mode not in CROP_MODES:
        mode, share = "center", share or mode
    try:
        return mode, float(share or 1.0)
    except ValueError as error:
        raise UsageError(
            f"crop {crop!r} has no meaning; write {', '.join(CROP_MODES)}, a share such as 0.875, or both, as "
            "squash:0.875."
        ) from error


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"There is no {name} {value!r}; choose from {', '.join(choices)}.")


def read_sides(size: Any, name: str = "The image size") -> tuple[int, int]:
    """The sides of an image size.

    Args:
        size: One number, or (rows, columns), of Python or NumPy.
        name: What it is, for the refusal.

    Returns:
        (rows, columns).

    Raises:
        UsageError: It is neither.
    """
    if np.ndim(size) == 0:
        side = whole_number(name, size)
        return side, side
    rows, columns = whole_numbers(name, size, 2)
    return rows, columns
