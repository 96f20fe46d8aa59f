"""Opening a vision transformer: `open_vit` finds it, describes it and gives a `Vit`."""

import hashlib
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from vitrail.errors import UsageError
from vitrail.vit.anatomy import Anatomy, discover
from vitrail.vit.choose import classifies, feature_or_logits
from vitrail.vit.clone import clone_sharing, images_accepted, uncompiled
from vitrail.vit.preprocessing import Preprocessing
from vitrail.vit.sources import HALF, Found, Request, find
from vitrail.vit.tap import Tap

__all__ = ["PRECISIONS", "Vit", "open_vit"]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Vit:
    """An opened vision transformer: the model as it is, its anatomy, and a tap per thread.

    Attributes:
        name: what it was opened with, such as "timm:deit_tiny_patch16_224".
        model: the user's own module, never edited (of a compiled one, the module inside).
        anatomy: blocks, heads, grid, prefix tokens, as found by tracing.
        preprocessing: from a photograph to the model's input.
        n_classes: classes it tells apart; None for a model whose output is a feature vector.
        class_names: one per class, or None.
        device, precision: where and in which type it runs.
        opened_with: the arguments of `open_vit` that open the same model again, as plain data; None for an own module.
    """

    def __init__(self, found: Found, device: str, precision: str, class_names: Sequence[str] | None) -> None:
        self.name = found.name
        self.model = found.module
        self.preprocessing = found.preprocessing
        self.n_classes = found.n_classes
        self.device, self.precision = device, precision
        self.class_names = _fitting_names(class_names, found)
        self.opened_with: dict[str, Any] | None = None
        self._taps = threading.local()

    @cached_property
    def anatomy(self) -> Anatomy:
        """Found by tracing the model once, when first asked for."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn((3, 3, *self.preprocessing.size), generator=generator)
        return discover(self.model, images.to(self.device, PRECISIONS[self.precision]))

    @property
    def n_layers(self) -> int:
        """Number of blocks with attention."""
        return len(self.anatomy.blocks)

    @property
    def n_heads(self) -> tuple[int, ...]:
        """Heads of each layer."""
        return tuple(block.heads for block in self.anatomy.blocks)

    @cached_property
    def weight_digest(self) -> str:
        """SHA-256 over names, shapes and bytes of parameters and buffers, as hex."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def prepare(self, images: Sequence[Image.Image]) -> Float[Tensor, "image channel row column"]:
        """Photographs as the model's input, on its device and in its precision."""
        return self.preprocessing.tensor(images).to(self.device, PRECISIONS[self.precision])

    def view(self, image: Image.Image) -> Image.Image:
        """What the model sees of a photograph: resized and cropped, not normalised."""
        return self.preprocessing.view(image)

    def tap(self) -> Tap:
        """This thread's tap, made on first use."""
        if not hasattr(self._taps, "tap"):
            self._taps.tap = Tap(self.model, self.anatomy, feature_or_logits)
        tap: Tap = self._taps.tap
        return tap

    @torch.no_grad()
    def logits(self, images: Float[Tensor, "image channel row column"]) -> Float[Tensor, "image class"]:
        """The model's own answer, untapped: logits, or the pooled feature of a model without classifier."""
        return feature_or_logits(self._plain(images))

    @cached_property
    def _plain(self) -> nn.Module:
        """An untapped clone in evaluation mode: the user's module keeps its own mode."""
        return clone_sharing(self.model)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.preprocessing.size))
        heads = sorted(set(self.n_heads))
        return (
            f"Vit({self.name}: {self.n_layers} layers, {'/'.join(map(str, heads))} heads, {size} px, "
            f"{self.n_classes or 'no'} classes, {self.precision} on {self.device})"
        )


def open_vit(
    model: str | Path | nn.Module,
    *,
    image_size: int | tuple[int, int] | None = None,
    weights: str | Path | None = None,
    device: str = "cpu",
    precision: str = "float32",
    n_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
) -> Vit:
    """Opens a vision transformer, unedited.

    Args:
        model: "timm:NAME", "hf:NAME", "tv:NAME", "openclip:NAME/TAG", a folder with a config.json (timm's or
            transformers' form), "vitrail:photos" (the small model that comes with Vitrail), or any `nn.Module` that
            takes [image, 3, row, column].
        image_size: pixels, one number or (rows, columns), where it is not the model's own.
        weights: a safetensors file (or a file of plain tensors); "random" for an untrained model; None for the
            library's own.
        device: as torch names it. precision: "float32", "bfloat16", "float16" or "float64".
        n_classes: of a new or own classifier; 0: none, the output is a feature vector.
        class_names: one per class.
        preprocessing: overrides how photographs are prepared.

    Raises:
        UnknownModel, WeightsMismatch: the name leads nowhere; the file does not fit.
        NoAttention, Unsupported: it is no vision transformer, or one that cannot be followed.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"There is no precision {precision!r}; choose from {', '.join(PRECISIONS)}.")
    if isinstance(model, nn.Module):
        found = _own_module(uncompiled(model), image_size, n_classes)
    else:
        found = find(str(model), Request(image_size, weights, n_classes))
    if preprocessing is not None:
        found.preprocessing = preprocessing
    _placed(found, device, precision, own=isinstance(model, nn.Module))
    vit = Vit(found, device, precision, class_names)
    if not isinstance(model, nn.Module):
        vit.opened_with = {
            "model": str(model),
            "image_size": image_size,
            "weights": str(weights if weights in (None, "random") else Path(weights).absolute()) if weights else None,
            "precision": precision,
            "n_classes": n_classes,
        }
    _ = vit.anatomy  # a model that cannot be followed is refused here, not in the middle of a study
    return vit


def _own_module(module: nn.Module, image_size: int | tuple[int, int] | None, n_classes: int | None) -> Found:
    """Preparation and class count from the module's own configuration, where it has one."""
    if hasattr(module, "pretrained_cfg"):
        from vitrail.vit.sources import _timm_found

        found = _timm_found(module, Request(image_size))
        own_size = getattr(getattr(module, "patch_embed", None), "img_size", None)
        if image_size is None and own_size:
            found.preprocessing = found.preprocessing.resized(tuple(own_size))
    else:
        size = image_size or _stated_size(module)
        found = Found("", module, Preprocessing((1, 1), HALF, HALF).resized(size), None)
        found.n_classes = _count_classes(module, found.preprocessing.size)
    found.name = f"module:{type(module).__name__}"
    if n_classes is not None:
        found.n_classes = n_classes or None
    return found


def _stated_size(module: nn.Module) -> int | tuple[int, int]:
    for holder in (module, getattr(module, "config", None), getattr(module, "patch_embed", None)):
        for name in ("image_size", "img_size"):
            size = getattr(holder, name, None)
            if isinstance(size, int):
                return size
            if isinstance(size, (tuple, list)) and len(size) == 2:
                return int(size[0]), int(size[1])
    return 224


@torch.no_grad()
def _count_classes(module: nn.Module, size: tuple[int, int]) -> int | None:
    """What the output looks like: named logits, or a plain [image, class] tensor of a model of one's own."""
    weight = next(module.parameters())
    images = torch.zeros((1, 3, *size), device=weight.device, dtype=weight.dtype)
    with images_accepted(module, images.shape):
        output: Any = clone_sharing(module)(images)
    if classifies(output) or (isinstance(output, Tensor) and output.ndim == 2):
        return int(feature_or_logits(output).shape[1])
    return None


def _placed(found: Found, device: str, precision: str, *, own: bool) -> None:
    """On the device and in the precision asked for; a module of the user's own is copied first if it must change."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"There is no device {device!r} here ({str(error).splitlines()[0]}).") from error
    wanted = PRECISIONS[precision]
    weights = [weight for weight in found.module.parameters() if weight.is_floating_point()]
    if all(weight.dtype == wanted and weight.device.type == place.type for weight in weights):
        return
    if own:
        import copy

        found.module = copy.deepcopy(found.module)
    found.module.to(place, wanted)


def _fitting_names(class_names: Sequence[str] | None, found: Found) -> tuple[str, ...] | None:
    names = tuple(class_names) if class_names is not None else found.class_names
    if names is None or found.n_classes is None:
        return None
    if len(names) != found.n_classes:
        if class_names is None:
            return None
        raise UsageError(f"{len(names)} class names were given for a model of {found.n_classes} classes.")
    return names
