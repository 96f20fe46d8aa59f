"""Preprocessing as timm, transformers, torchvision and open_clip state it, for a name or inside a module.

A library's own pipeline is read into a `Preprocessing`. For processors of transformers, whose classes may do anything,
the result is tried on two pictures against the processor itself; what cannot be reproduced is unknown, not guessed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitrail.errors import ModelError, UsageError
from vitrail.models.preprocessing import Preprocessing, UnknownPreprocessing
from vitrail.tap.clone import clone_sharing, first_weight, image_channels, images_accepted

__all__ = [
    "module_preprocessing",
    "module_size",
    "open_clip_preprocessing",
    "processor_preprocessing",
    "read_preprocessing",
    "timm_preprocessing",
    "torchvision_preprocessing",
    "torchvision_weights_preprocessing",
    "transformers_preprocessing",
]

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

_ONE_GREY_LEVEL = 1.01
"""Largest difference, of 255, that counts as the library's own picture: resamplers round differently by one."""

_WARPED_SIDE = 384
"""From this side on, ConvNeXt-style processors resize both sides and crop nothing (transformers' own number)."""

_USUAL_SIZE = (224, 224)
"""Pixels, for a module that states no image size: what most vision transformers take."""

_UNUSABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What libraries raise on a configuration that they cannot use."""


def read_preprocessing(settings: Any) -> Preprocessing:
    """The preprocessing that a user hands over.

    Args:
        settings: a `Preprocessing`, its `as_dict`, timm's data configuration, the transforms of torchvision's weights
            or an image processor of transformers.

    Returns:
        The preprocessing.

    Raises:
        UsageError: it is none of them, or one that Vitrail cannot reproduce.
    """
    if isinstance(settings, Preprocessing):
        return settings
    if isinstance(settings, Mapping):
        return (
            timm_preprocessing(settings, "given: timm's data configuration")
            if "input_size" in settings
            else Preprocessing.from_dict(settings)
        )
    if hasattr(settings, "resize_size") and hasattr(settings, "crop_size"):
        return torchvision_preprocessing(settings, "given: transforms of torchvision")
    if hasattr(settings, "to_dict") and hasattr(settings, "preprocess"):
        preprocessing = processor_preprocessing(settings, f"given: {type(settings).__name__} of transformers")
        if isinstance(preprocessing, Preprocessing):
            return preprocessing
        raise UsageError(f"preprocessing= cannot be taken over: {preprocessing}. Give a vitrail.Preprocessing.")
    raise UsageError(
        f"preprocessing= takes a Preprocessing, timm's data configuration, the transforms() of torchvision's weights "
        f"or an image processor of transformers, not {type(settings).__name__}."
    )


# --- libraries -------------------------------------------------------------------------------------------------------


def timm_preprocessing(config: Mapping[str, Any], source: str) -> Preprocessing:
    """From timm's data configuration.

    Args:
        config: what `timm.data.resolve_model_data_config` gives.
        source: where it comes from, in words.

    Returns:
        The preprocessing.
    """
    from timm.data.constants import DEFAULT_CROP_PCT

    mean = tuple(map(float, config["mean"]))
    return Preprocessing(
        (int(config["input_size"][1]), int(config["input_size"][2])),
        mean,
        tuple(map(float, config["std"])),
        str(config["interpolation"]),
        float(config.get("crop_pct") or DEFAULT_CROP_PCT),
        str(config.get("crop_mode") or "center"),
        fill=_three([round(255 * value) for value in mean]),
        source=source,
    )


def _three(values: Sequence[int]) -> tuple[int, int, int]:
    first, second, third = (*values, *values, *values)[:3]
    return first, second, third


def torchvision_preprocessing(transforms: Any, source: str) -> Preprocessing:
    """From the transforms of torchvision's weights.

    Args:
        transforms: `weights.transforms()`.
        source: where it comes from, in words.

    Returns:
        The preprocessing.
    """
    crop, short = transforms.crop_size, transforms.resize_size
    return Preprocessing(
        (int(crop[0]), int(crop[-1])),
        tuple(transforms.mean),
        tuple(transforms.std),
        transforms.interpolation.value,
        resize=(int(short[0]), int(short[-1])),
        source=source,
    )


def open_clip_preprocessing(config: Mapping[str, Any], source: str) -> Preprocessing:
    """From open_clip's `preprocess_cfg`.

    Args:
        config: with size, mean, std, interpolation, resize_mode and fill_color.
        source: where it comes from, in words.

    Returns:
        The preprocessing.
    """
    size = config["size"]
    sides = (int(size[0]), int(size[-1])) if isinstance(size, (tuple, list)) else (int(size), int(size))
    means, stds = (
        tuple(map(float, value)) if isinstance(value, (tuple, list)) else (float(value),) * 3
        for value in (config["mean"], config["std"])
    )
    mode = {"squash": "squash", "longest": "border"}.get(config.get("resize_mode") or "shortest", "center")
    bilinear = config.get("interpolation") == "bilinear" and not (mode == "center" and sides[0] != sides[1])
    fill = int(config.get("fill_color") or 0)
    return Preprocessing(
        sides, means, stds, "bilinear" if bilinear else "bicubic", crop_mode=mode, fill=(fill,) * 3, source=source
    )


def transformers_preprocessing(
    transformers: Any, name: str, size: tuple[int, int]
) -> Preprocessing | UnknownPreprocessing:
    """From the image processor beside a model's weights.

    Args:
        transformers: the library.
        name: a folder or a name on the hub.
        size: (rows, columns) in pixels, of the answer where there is no processor.

    Returns:
        The preprocessing; `UnknownPreprocessing` where there is no processor.

    Raises:
        ModelError: there is a processor's file, and it is broken.
    """
    source = f"image processor of {name}"
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except _UNUSABLE as error:
        file = _processor_file(transformers, name)
        if file is None:
            return UnknownPreprocessing(size, f"{name} has no preprocessor_config.json")
        raise ModelError(_broken(file, error)) from error
    try:
        preprocessing = processor_preprocessing(processor, source)
    except (UsageError, *_UNUSABLE) as error:
        raise ModelError(_broken(_processor_file(transformers, name) or name, error)) from error
    return preprocessing if isinstance(preprocessing, Preprocessing) else UnknownPreprocessing(size, preprocessing)


def _processor_file(transformers: Any, name: str) -> str | None:
    """The file that holds the processor, in a folder or on the hub; None where there is none."""
    for file in PROCESSOR_FILES:
        if Path(name).is_dir():
            if (Path(name) / file).is_file():
                return str(Path(name) / file)
            continue
        path = transformers.utils.cached_file(
            name,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is not None:
            return str(path)
    return None


def _broken(file: str, error: Exception) -> str:
    return (
        f"{file} is no usable image processor ({type(error).__name__}: {' '.join(str(error).split())[:300]}), so how "
        "photographs are prepared is not known. Repair the file, or give preprocessing= or mean= and std= (--mean, "
        "--std)."
    )


def processor_preprocessing(processor: Any, source: str) -> Preprocessing | str:
    """From an image processor of transformers.

    Args:
        processor: of either backend.
        source: where it comes from, in words.

    Returns:
        The preprocessing, or the reason why Vitrail cannot state what the processor does.

    Raises:
        UsageError: the settings contradict each other, such as a crop larger than the resized picture.
    """
    settings = processor.to_dict()
    kind = type(processor).__name__
    if not settings.get("do_resize", True):
        return f"{kind} does not resize (do_resize: false), so photographs reach the model in sizes of their own"
    shape = _processor_resize(settings, warps=hasattr(processor, "crop_pct"))
    if shape is None:
        return f"{kind} resizes in a way that Vitrail cannot state (size: {settings.get('size')})"
    size, resize, mode = shape
    if size is None:
        return f"{kind} resizes the short side and crops nothing, so photographs reach the model in sizes of their own"
    mean, std = _processor_scale(settings)
    torch_resampler = getattr(processor, "backend", "pil") == "torchvision"
    preprocessing = Preprocessing(
        size,
        mean,
        std,
        Image.Resampling(int(settings.get("resample", Image.Resampling.BILINEAR))).name.lower(),
        size[0] / resize[0],
        mode,
        resize,
        "torchvision" if torch_resampler else "pillow",
        "down",
        source=source,
    )
    difference = _difference(processor, preprocessing)
    if difference is None:
        return f"{kind} gives no pixel_values of shape [image, 3, {size[0]}, {size[1]}]"
    if not difference <= _ONE_GREY_LEVEL:
        return f"{kind} does more than resize, crop and normalise (it differs by {difference:.0f} of 255 grey levels)"
    return preprocessing


_Resize = tuple[tuple[int, int] | None, tuple[int, int], str]
"""(rows, columns) of the result or None where it varies; (rows, columns) to resize towards; crop mode"""


def _processor_resize(settings: Mapping[str, Any], *, warps: bool) -> _Resize | None:
    sides = {key: int(value) for key, value in dict(settings.get("size") or {}).items() if value is not None}
    crop = dict(settings.get("crop_size") or {}) if settings.get("do_center_crop") else None
    crop_sides = (int(crop["height"]), int(crop["width"])) if crop else None
    if sides.keys() >= {"height", "width"}:
        both = (sides["height"], sides["width"])
        return crop_sides or both, both, "squash"
    short = sides.get("shortest_edge")
    if short is None:
        return None
    if warps and crop is None:
        if short >= _WARPED_SIDE:
            return (short, short), (short, short), "squash"
        larger = int(short / (settings.get("crop_pct") or 1.0))
        return (short, short), (larger, larger), "center"
    return crop_sides, (short, short), "center"


def _processor_scale(settings: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """mean and std on values 0..1 that do what do_rescale, rescale_factor and do_normalize do on values 0..255."""
    factor = 255 * float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 255.0
    factor = 1.0 if abs(factor - 1) < 1e-9 else factor  # 1/255 written as a decimal
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    if settings.get("do_normalize", True):
        mean, std = tuple(map(float, settings["image_mean"])), tuple(map(float, settings["image_std"]))
    return tuple(value / factor for value in mean), tuple(value / factor for value in std)


def _difference(processor: Any, preprocessing: Preprocessing) -> float | None:
    """Largest difference from the processor's own result, in grey levels of 255; None for another shape."""
    images = [_picture(233, 150), _picture(150, 233)]
    ours = preprocessing.tensor(images)
    std = torch.tensor(preprocessing.std).view(1, -1, 1, 1)
    differences = []
    for image, tensor in zip(images, ours, strict=True):
        theirs = processor(images=image, return_tensors="pt").get("pixel_values")
        if not isinstance(theirs, Tensor) or theirs.shape != (1, *tensor.shape):
            return None
        differences.append(float(((theirs - tensor) * std).abs().max()) * 255)
    return max(differences)


def _picture(width: int, height: int) -> Image.Image:
    """Waves with hard edges, different in each channel and in each direction."""
    row, column = np.mgrid[:height, :width]
    waves = [
        np.sin(column / 9) + (row > height / 3),
        np.cos(row / 13) - column / width,
        np.sin((row - 2 * column) / 31),
    ]
    pixels = np.stack([(wave - wave.min()) / (wave.max() - wave.min()) * 255 for wave in waves], -1)
    return Image.fromarray(pixels.round().astype(np.uint8))


# --- inside a module -------------------------------------------------------------------------------------------------


def module_preprocessing(module: nn.Module, image_size: tuple[int, int] | None) -> Preprocessing | UnknownPreprocessing:
    """The preprocessing of a module of the user's own: of the library's model that it is or wraps.

    A model inside a wrapper counts only if the wrapper's images reach it as they are.

    Args:
        module: any module.
        image_size: (rows, columns) in pixels; None for the size that the model states.

    Returns:
        The preprocessing; `UnknownPreprocessing` where none is stated, or several that differ.

    Raises:
        ModelError: the image processor beside the model's weights is broken.
        Unsupported: the module cannot be run on images of this size.
    """
    statements: list[Preprocessing] = []
    reasons: list[str] = []
    for path, inner in _models_inside(module):
        preprocessing = _library_preprocessing(inner)
        if not isinstance(preprocessing, Preprocessing):
            reasons.append(preprocessing)
            continue
        preprocessing = preprocessing.with_size(image_size) if image_size else preprocessing
        channels = image_channels(inner)
        if len(preprocessing.mean) != channels:
            reasons.append(
                f"{type(inner).__name__} takes {channels} channel{'s' * (channels != 1)}, and "
                f"{preprocessing.source} is of {len(preprocessing.mean)}"
            )
            continue
        if path and not _reads_the_image(module, path, preprocessing.size):
            reasons.append(f"{type(module).__name__} changes the images before its {path} ({type(inner).__name__})")
            continue
        statements.append(
            replace(preprocessing, source=f"{preprocessing.source}, its {path}") if path else preprocessing
        )
    if statements and all(other == statements[0] for other in statements):
        return statements[0]
    if statements:
        reasons.insert(0, f"the models inside state different ones ({'; '.join(each.source for each in statements)})")
    reason = reasons[0] if reasons else f"{type(module).__name__} states none, nor does a model inside it"
    return UnknownPreprocessing(image_size or module_size(module) or _USUAL_SIZE, reason)


def module_size(module: nn.Module) -> tuple[int, int] | None:
    """(rows, columns) in pixels that a module, its configuration or a module inside states; None if none does.

    Args:
        module: any module.

    Returns:
        (rows, columns), or None.
    """
    for _, inner in _by_depth(module):
        config = getattr(inner, "config", None)
        for holder in (inner, config, getattr(config, "vision_config", None), getattr(inner, "patch_embed", None)):
            for name in ("image_size", "img_size"):
                size = getattr(holder, name, None)
                if isinstance(size, int) and not isinstance(size, bool):
                    return size, size
                if isinstance(size, (tuple, list)) and len(size) == 2:
                    return int(size[0]), int(size[1])
    return None


def _by_depth(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and modules, the outermost first."""
    return sorted(module.named_modules(), key=lambda item: item[0].count(".") + bool(item[0]))


def _models_inside(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are a library's model, by path; those inside one that states its preprocessing are left out."""
    stated: list[str] = []
    configurations: list[Any] = []
    for path, inner in _by_depth(module):
        if any(path.startswith(f"{outer}.") or not outer for outer in stated):
            continue
        config = getattr(inner, "config", None)
        if _states_itself(inner) or _torchvision_prefix(inner):
            stated.append(path)
            yield path, inner
        elif hasattr(config, "to_json_string") and not any(config is other for other in configurations):
            configurations.append(config)  # the parts of a transformers model share its configuration
            if _origin(inner):
                stated.append(path)
            yield path, inner


def _states_itself(module: nn.Module) -> bool:
    return any(_complete(getattr(module, name, None)) for name in ("pretrained_cfg", "preprocess_cfg"))


def _complete(config: Any) -> bool:
    return hasattr(config, "get") and config.get("mean") is not None and config.get("std") is not None


def _library_preprocessing(module: nn.Module) -> Preprocessing | str:
    """What a library's model states, or the reason why it is not known."""
    if _complete(getattr(module, "pretrained_cfg", None)):
        return _of_timm_module(module)
    if _complete(getattr(module, "preprocess_cfg", None)):
        return _of_open_clip_module(module)
    if _torchvision_prefix(module):
        return _of_torchvision_module(module)
    return _of_transformers_module(module)


def _of_timm_module(module: Any) -> Preprocessing:
    from timm.data import resolve_model_data_config

    config = module.pretrained_cfg
    tag = ".".join(str(config[key]) for key in ("architecture", "tag") if config.get(key)) or type(module).__name__
    preprocessing = timm_preprocessing(resolve_model_data_config(module), f"timm's pretrained_cfg of {tag}")
    size = getattr(getattr(module, "patch_embed", None), "img_size", None)
    return preprocessing.with_size(tuple(size)) if size else preprocessing


def _of_open_clip_module(module: Any) -> Preprocessing:
    config = {**module.preprocess_cfg, "size": getattr(module, "image_size", None) or module.preprocess_cfg["size"]}
    return open_clip_preprocessing(config, f"open_clip's preprocess_cfg of {type(module).__name__}")


def _origin(module: Any) -> str:
    """The folder or the name that a transformers model was loaded from, or nothing."""
    return str(getattr(module.config, "name_or_path", "") or "")


def _of_transformers_module(module: Any) -> Preprocessing | str:
    import transformers

    name = _origin(module)
    if not name:
        return f"{type(module).__name__} does not say which folder or name it was loaded from"
    preprocessing = transformers_preprocessing(transformers, name, _USUAL_SIZE)
    return preprocessing if isinstance(preprocessing, Preprocessing) else preprocessing.reason


_TORCHVISION = {"VisionTransformer": "vit_", "SwinTransformer": "swin_", "MaxVit": "maxvit_"}
"""Classes of torchvision's transformers, and how the names of their architectures begin."""


def _torchvision_prefix(module: nn.Module) -> str | None:
    of_torchvision = type(module).__module__.startswith("torchvision.models")
    return _TORCHVISION.get(type(module).__name__) if of_torchvision else None


def _of_torchvision_module(module: nn.Module) -> Preprocessing | str:
    """That of torchvision's weights for the module's architecture and image size, if all of them agree."""
    from torchvision import models

    shapes = _shapes(module)
    prefix = str(_torchvision_prefix(module))
    for name in (name for name in models.list_models(module=models) if name.startswith(prefix)):
        with torch.device("meta"):
            other = _shapes(models.get_model(name, weights=None))
        if other == shapes:
            return torchvision_weights_preprocessing(name, module_size(module))
    return f"no weights of torchvision are of the architecture of this {type(module).__name__}"


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Of all weights but the classifier's and the position embedding, which depend on classes and image size."""
    return {
        name: weight.shape
        for name, weight in module.named_parameters()
        if not name.startswith(("head", "classifier")) and "pos_embedding" not in name
    }


def torchvision_weights_preprocessing(name: str, size: tuple[int, int] | None) -> Preprocessing | str:
    """The preprocessing on which all of torchvision's weights of one architecture and image size agree.

    Args:
        name: of the architecture.
        size: (rows, columns) in pixels; None for any.

    Returns:
        The preprocessing, or the reason why it is not known, with the weights among which to choose.
    """
    from torchvision import models

    by_weights = {
        str(weights): torchvision_preprocessing(weights.transforms(), f"transforms of torchvision's {weights}")
        for weights in models.get_model_weights(name)
    }
    fitting = {key: each for key, each in by_weights.items() if size in (None, each.size)} or by_weights
    first = next(iter(fitting.values()))
    if any(other != first for other in fitting.values()):
        return (
            f"the weights of torchvision's {name} were trained with different ones; choose with "
            f"preprocessing=torchvision.models.{next(iter(fitting))}.transforms(), or {', '.join(list(fitting)[1:])}"
        )
    return first.with_size(size) if size else first


@torch.no_grad()
def _reads_the_image(module: nn.Module, path: str, size: tuple[int, int]) -> bool:
    """A module at this path, or one inside it, is given the images that the whole module is given, unchanged."""
    clone = clone_sharing(module)
    weight = first_weight(module)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((2, image_channels(module), *size), generator=generator).to(weight)
    read = False

    def compare(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal read
        tensors = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
        read = read or any(value.shape == images.shape and torch.equal(value, images) for value in tensors)

    for inner in clone.get_submodule(path).modules():
        inner.register_forward_pre_hook(compare, with_kwargs=True)
    with images_accepted(module, images.shape):
        clone(images)
    return read
