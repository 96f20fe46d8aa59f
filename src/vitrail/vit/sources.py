"""Where models come from: timm, transformers, torchvision, open_clip, a folder. Nothing is ever unpickled.

Each source gives a `Found`: the module, how its images are prepared, how many classes it tells apart.
"""

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import UnknownModel, Unsupported, UsageError, WeightsMismatch
from vitrail.vit.preprocessing import Preprocessing

__all__ = ["Found", "Request", "WithOptions", "find"]

HALF = (0.5, 0.5, 0.5)

BUILT_ELSEWHERE = {"vitrail_wint": "vitrail.wint.folder"}
"""Architectures of config.json that a module of ours builds by its `found_in(folder, config, request)`: named, not
imported, because it lies above this layer."""


@dataclass(frozen=True)
class Request:
    """What the user asked for. `weights`: None for the library's own, "random", or a file."""

    image_size: int | tuple[int, int] | None = None
    weights: str | Path | None = None
    n_classes: int | None = None

    @property
    def pretrained(self) -> bool:
        """The library's own weights are wanted."""
        return self.weights is None

    @property
    def file(self) -> Path | None:
        """A weights file, if one was named."""
        return None if self.weights in (None, "random") else Path(str(self.weights))


@dataclass
class Found:
    """A model as its library gives it. `n_classes` is None where it has no classifier."""

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    n_classes: int | None
    class_names: tuple[str, ...] | None = None
    fits: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None


def find(name: str, request: Request) -> Found:
    """The model a name leads to, with its weights. Raises `UnknownModel`, `WeightsMismatch`, `Unsupported`."""
    source, _, rest = name.partition(":")
    if source in _SOURCES and rest:
        found = _SOURCES[source](rest, request)
    elif name == "vitrail:photos" or (Path(name).is_dir() and (Path(name) / "config.json").is_file()):
        found = _from_folder(name, request)
    else:
        raise UnknownModel(_nowhere(name))
    found.name = name
    if request.file is not None:
        _load(found, request.file)
    return found


def _nowhere(name: str) -> str:
    path = Path(name)
    if path.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        return (
            f"{name} holds weights, not an architecture. Name the architecture and give the file apart, for example: "
            f"timm:vit_tiny_patch16_224 --weights {name}"
        )
    if path.is_dir():
        return f"The folder {name} has no config.json that says what model it holds (timm's or transformers' own form)."
    return (
        f"{name!r} leads to no model. Write timm:NAME, hf:NAME, tv:NAME, openclip:NAME, a folder with a config.json, "
        "or vitrail:photos for the small model that comes with Vitrail; for example timm:deit_tiny_patch16_224."
    )


def _library(module: str, extra: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnknownModel(
            f"{name} needs the library {module}, which is not installed here: pip install 'vitrail[{extra}]'"
        ) from error


# --- timm ------------------------------------------------------------------------------------------------------------


def _from_timm(name: str, request: Request) -> Found:
    import timm

    bare = name.partition(".")[0]
    if not name.startswith(("hf-hub:", "hf_hub:")) and not timm.is_model(bare):
        raise UnknownModel(f"timm has no model {bare!r}.{_similar(bare, timm.list_models())}")
    options: dict[str, Any] = {}
    if request.image_size is not None:
        options["img_size"] = request.image_size
    if request.n_classes is not None:
        options["num_classes"] = request.n_classes
    module = _made(lambda: timm.create_model(name, pretrained=request.pretrained, **options), f"timm:{name}", request)
    return _timm_found(module, request)


def _timm_found(module: nn.Module, request: Request) -> Found:
    from timm.data import resolve_model_data_config

    preprocessing = Preprocessing.from_timm(resolve_model_data_config(module))
    if request.image_size is not None:
        preprocessing = preprocessing.resized(request.image_size)
    names = getattr(module, "pretrained_cfg", {}).get("label_names")
    classes = int(getattr(module, "num_classes", 0)) or None
    code = sys.modules[type(module).__module__]
    fits = getattr(code, "checkpoint_filter_fn", None)
    adapt = (lambda state: fits(state, module)) if fits else None
    return Found("", module, preprocessing, classes, tuple(names) if names else None, adapt)


def _similar(name: str, names: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, 3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _made(make: Callable[[], Any], name: str, request: Request) -> nn.Module:
    """Runs a library's constructor; what it says about downloads, arguments or names becomes one sentence."""
    try:
        module = make()
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError, AssertionError) as error:
        said = " ".join(str(error).split())[:300]
        advice = (
            "If its weights cannot be downloaded here, give a file with --weights FILE, or --weights random for an "
            "untrained model."
            if request.pretrained
            else "Check the name and the options."
        )
        raise UnknownModel(f"{name} could not be made ({type(error).__name__}: {said}). {advice}") from error
    assert isinstance(module, nn.Module)
    return module


# --- transformers ----------------------------------------------------------------------------------------------------

_TOWERS = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "vit_mae": "ViTMAEModel",
}


def _from_transformers(name: str, request: Request) -> Found:
    transformers = _library("transformers", "hf", f"hf:{name}")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UnknownModel(
            f"transformers finds no model {name!r} ({' '.join(str(error).split())[:300]}). "
            "Give a folder that holds config.json and model.safetensors, or check the name and the network."
        ) from error
    kind = _transformers_class(transformers, config, request)
    if request.pretrained:
        module = _made(lambda: kind.from_pretrained(name, use_safetensors=True), f"hf:{name}", request)
    else:
        module = _made(lambda: kind(getattr(config, "vision_config", config)), f"hf:{name}", request)
    if getattr(module, "main_input_name", "pixel_values") != "pixel_values":
        raise Unsupported(
            f"hf:{name} reads {module.main_input_name}, not images: it is no vision model. Vitrail looks at images."
        )
    found = _transformers_found(transformers, name, module, request)
    found.module = _asked_for(module, request)
    if found.module is not module:
        found.fits = lambda state: {f"model.{key}": value for key, value in state.items()}
    return found


class WithOptions(nn.Module):
    """A transformers model called with options that its configuration cannot hold.

    every_patch: ViT-MAE gets every patch in its place; by itself it drops three quarters and shuffles what is left,
    and shuffles even where its configuration says to drop none.
    """

    def __init__(self, model: nn.Module, *, every_patch: bool = False, **options: Any) -> None:
        super().__init__()
        self.model, self.options, self.every_patch = model, options, every_patch
        config: Any = model.config
        if every_patch:
            config.mask_ratio = 0.0
        self.config = config

    def forward(self, images: Tensor) -> Any:
        """What the model returns for [image, channel, row, column]."""
        options = dict(self.options)
        if self.every_patch:
            patch = self.config.patch_size
            order = torch.arange(images.shape[-2] // patch * (images.shape[-1] // patch), device=images.device)
            options["noise"] = order.float().expand(len(images), -1)
        return self.model(images, **options)


def _asked_for(module: nn.Module, request: Request) -> nn.Module:
    """The model, called with options where ViT-MAE or another image size needs them."""
    options: dict[str, Any] = {}
    own: Any = getattr(module.config, "image_size", None)
    other_size = request.image_size is not None and own is not None and _sides(request.image_size) != _sides(own)
    if other_size and "interpolate_pos_encoding" in inspect.signature(module.forward).parameters:
        options["interpolate_pos_encoding"] = True
    every_patch = getattr(module.config, "model_type", "") == "vit_mae"
    return WithOptions(module, every_patch=every_patch, **options) if options or every_patch else module


def _sides(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _transformers_class(transformers: ModuleType, config: Any, request: Request) -> Any:
    if config.model_type in _TOWERS:
        return getattr(transformers, _TOWERS[config.model_type])
    stated = (getattr(config, "architectures", None) or [""])[0]
    if stated and hasattr(transformers, stated) and request.n_classes != 0:
        return getattr(transformers, stated)
    known = transformers.AutoModel._model_mapping
    if type(config) not in known:
        raise Unsupported(f"transformers has no model class for {config.model_type!r}.")
    return known[type(config)]


def _transformers_found(transformers: ModuleType, name: str, module: nn.Module, request: Request) -> Found:
    config: Any = module.config
    size: Any = request.image_size or getattr(config, "image_size", 224)
    preprocessing = _processor(transformers, name, size if isinstance(size, int) else tuple(size))
    labels = getattr(config, "id2label", None) or {}
    has_classifier = isinstance(getattr(module, "classifier", None), nn.Linear) or hasattr(module, "cls_classifier")
    classes = len(labels) if has_classifier else None
    names = tuple(str(labels[index]) for index in sorted(labels)) if classes else None
    if names and names[0] == "LABEL_0":
        names = None
    return Found("", module, preprocessing, classes, names)


def _processor(transformers: ModuleType, name: str, size: int | tuple[int, int]) -> Preprocessing:
    """The image processor's settings; without one, squash to the model's size with mean = std = 0.5."""
    try:
        settings = transformers.AutoImageProcessor.from_pretrained(name, use_fast=False).to_dict()
    except (OSError, ValueError, ImportError):
        settings = {}
    base = Preprocessing((1, 1), HALF, HALF, crop_mode="squash").resized(size)
    if not settings:
        return base
    shown = settings.get("size") or {}
    short = shown.get("shortest_edge")
    return Preprocessing(
        base.size,
        tuple(settings.get("image_mean") or HALF),
        tuple(settings.get("image_std") or HALF),
        {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(settings.get("resample", 3), "bicubic"),
        base.size[0] / short if short and settings.get("do_center_crop") else 1.0,
        "center" if short else "squash",
    )


# --- torchvision, open_clip, folders ---------------------------------------------------------------------------------


def _from_torchvision(name: str, request: Request) -> Found:
    models = _library("torchvision.models", "all", f"tv:{name}")
    if name not in models.list_models(module=models):
        raise UnknownModel(f"torchvision has no classification model {name!r}.{_similar(name, models.list_models())}")
    options: dict[str, Any] = {}
    if isinstance(request.image_size, int) and name.startswith("vit"):
        options["image_size"] = request.image_size
    if request.n_classes is not None:
        options["num_classes"] = request.n_classes
    weights = models.get_model_weights(name).DEFAULT
    module = _made(
        lambda: models.get_model(name, weights=weights if request.pretrained else None, **options),
        f"tv:{name}",
        request,
    )
    shown = weights.transforms()
    size = request.image_size or shown.crop_size[0]
    preprocessing = Preprocessing(
        (1, 1),
        tuple(shown.mean),
        tuple(shown.std),
        shown.interpolation.value,
        shown.crop_size[0] / shown.resize_size[0],
    ).resized(size)
    classes = request.n_classes or len(weights.meta["categories"])
    names = tuple(weights.meta["categories"]) if request.n_classes is None else None
    return Found("", module, preprocessing, classes, names)


def _from_open_clip(name: str, request: Request) -> Found:
    open_clip = _library("open_clip", "openclip", f"openclip:{name}")
    architecture, _, tag = name.partition("/")
    if architecture not in open_clip.list_models():
        raise UnknownModel(f"open_clip has no model {architecture!r}.{_similar(architecture, open_clip.list_models())}")
    if request.pretrained and not tag:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise UsageError(f"Say which weights: openclip:{architecture}/TAG with TAG one of {', '.join(tags[:6])}.")
    whole = _made(
        lambda: open_clip.create_model(
            architecture, pretrained=tag if request.pretrained else None, force_image_size=request.image_size
        ),
        f"openclip:{name}",
        request,
    )
    tower: Any = whole.visual
    shown = getattr(tower, "preprocess_cfg", {})
    size = tower.image_size
    preprocessing = Preprocessing(
        (1, 1),
        tuple(shown.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        tuple(shown.get("std") or open_clip.OPENAI_DATASET_STD),
        str(shown.get("interpolation") or "bicubic"),
        crop_mode="squash" if shown.get("resize_mode") == "squash" else "center",
    ).resized(tuple(size) if isinstance(size, (tuple, list)) else size)
    assert isinstance(tower, nn.Module)
    return Found("", tower, preprocessing, None)


def _from_folder(name: str, request: Request) -> Found:
    import timm

    folder = Path(__file__).parents[1] / "embedded" if name == "vitrail:photos" else Path(name)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UnknownModel(f"{folder / 'config.json'} cannot be read as JSON: {error}.") from error
    if "pruned" in config:
        return _from_pruned_folder(folder, config, request)
    if "model_type" in config:
        return _from_transformers(str(folder), request)
    if config.get("architecture") in BUILT_ELSEWHERE:
        build = importlib.import_module(BUILT_ELSEWHERE[config["architecture"]])
        built: Found = build.found_in(folder, config, request)
        return built
    if "architecture" not in config:
        raise UnknownModel(f"{folder / 'config.json'} names neither a timm 'architecture' nor a 'model_type'.")
    options = {"num_classes": request.n_classes} if request.n_classes is not None else {}
    if request.image_size is not None:
        options["img_size"] = request.image_size  # type: ignore[assignment]
    if request.pretrained and not (folder / "model.safetensors").is_file():
        raise WeightsMismatch(f"{folder} has no model.safetensors; other weight files would have to be unpickled.")
    module = _made(
        lambda: timm.create_model(f"local-dir:{folder}", pretrained=request.pretrained, **options), name, request
    )
    found = _timm_found(module, request)
    names = config.get("label_names")
    found.class_names = tuple(map(str, names)) if names else found.class_names
    return found


def _from_pruned_folder(folder: Path, config: dict[str, Any], request: Request) -> Found:
    """A model that `vitrail prune` wrote, opened by the loader that lies beside it."""
    from vitrail.vit.pruned import load

    if request.image_size is not None or request.n_classes is not None:
        raise UsageError(
            f"{folder} holds a model with heads removed, which opens as it was written: leave out --image-size and "
            "--classes."
        )
    module = _made(lambda: load(folder, weights=request.pretrained), str(folder), request)
    if "model_type" in config:
        return _transformers_found(_library("transformers", "hf", str(folder)), str(folder), module, request)
    found = _timm_found(module, request)
    names = config.get("label_names")
    found.class_names = tuple(map(str, names)) if names else found.class_names
    return found


_SOURCES: dict[str, Callable[[str, Request], Found]] = {
    "timm": _from_timm,
    "hf": _from_transformers,
    "tv": _from_torchvision,
    "openclip": _from_open_clip,
}


# --- weights files ---------------------------------------------------------------------------------------------------


def _load(found: Found, path: Path) -> None:
    """Puts a file's tensors into the model; names and shapes must fit."""
    state = _read(path)
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    state = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    own = found.module.state_dict()
    if found.fits is not None and any(name not in own or own[name].shape != state[name].shape for name in state):
        try:
            state = found.fits(state)
        except (KeyError, RuntimeError, ValueError, AttributeError) as error:
            raise WeightsMismatch(_mismatch(path, found, own, state)) from error
    if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
        raise WeightsMismatch(_mismatch(path, found, own, state))
    found.module.load_state_dict(state)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsMismatch(f"There is no weights file {path}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise WeightsMismatch(
            f"{path} cannot be read as weights ({type(error).__name__}: {' '.join(str(error).split())[:200]}). "
            "Vitrail reads safetensors and plain tensor files, and never unpickles."
        ) from error


def _mismatch(path: Path, found: Found, own: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    shapes = [
        f"{name} is {list(state[name].shape)}, not {list(own[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    parts = [
        f"{len(items)} {what}: {', '.join(items[:3])}{' ...' if len(items) > 3 else ''}"
        for items, what in ((missing, "missing"), (extra, "not in the model"), (shapes, "of another shape"))
        if items
    ]
    advice = "Check the architecture, --classes and --image-size."
    return f"{path} does not fit {found.name}: {'; '.join(parts)}. {advice}"
