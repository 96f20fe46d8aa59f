"""A WinT as a folder: config.json and model.safetensors, which `open_vit` opens like any other model."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vitrail.errors import UnknownModel, WeightsMismatch
from vitrail.vit.preprocessing import Preprocessing
from vitrail.vit.sources import Found, Request
from vitrail.wint.model import Shape, WinT, attach

__all__ = [
    "ARCHITECTURE",
    "as_text",
    "described",
    "fitted",
    "found_in",
    "open_model",
    "save",
    "shape_of",
    "weights_of",
    "written",
]

ARCHITECTURE = "vitrail_wint"
HALF = (0.5, 0.5, 0.5)


def save(
    model: nn.Module,
    folder: str | Path,
    class_names: Sequence[str] | None = None,
    timm_model: Mapping[str, Any] | None = None,
    mean: Sequence[float] = HALF,
    std: Sequence[float] = HALF,
) -> Path:
    """Writes a WinT, or a timm ViT with window heads, so that `open_vit(folder)` gives equal logits.

    `timm_model`: for the latter what made it, {"name": .., "args": {..}, "start": [..]}. `mean`, `std`: how its
    images are normalised. Each file is replaced whole or not at all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(described(model, class_names, timm_model, mean, std), indent=2) + "\n"
    written(folder / "config.json", lambda path: as_text(path, text))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    written(folder / "model.safetensors", lambda path: save_file(state, path))
    return folder


def described(
    model: nn.Module,
    class_names: Sequence[str] | None,
    timm_model: Mapping[str, Any] | None = None,
    mean: Sequence[float] = HALF,
    std: Sequence[float] = HALF,
) -> dict[str, Any]:
    """What config.json says. Raises `UnknownModel` for a model that it cannot describe."""
    named: dict[str, Any] = {"mean": list(mean), "std": list(std)}
    named |= {"label_names": list(class_names)} if class_names else {}
    if isinstance(model, WinT):
        return {"architecture": ARCHITECTURE, "shape": asdict(model.shape), **named}
    if timm_model is None:
        raise UnknownModel(
            f"A {type(model).__name__} was to be saved as WinT; say which timm model it is, as "
            'timm_model={"name": "vit_tiny_patch16_224", "args": {}, "start": FULL}.'
        )
    return {"architecture": ARCHITECTURE, "timm": dict(timm_model), **named}


def written(path: Path, write: Callable[[Path], None]) -> None:
    """Writes beside the file, then takes its place: a reader, or a killed run, finds the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def as_text(path: Path, text: str) -> None:
    """What `written` is handed to write a text."""
    path.write_text(text)


def open_model(folder: str | Path) -> nn.Module:
    """The model of a folder as it was saved, in evaluation mode."""
    folder = Path(folder)
    return found_in(folder, _config(folder), Request()).module


def shape_of(folder: str | Path) -> Shape:
    """The shape of a saved WinT. Raises `UnknownModel` for a folder that holds none."""
    folder = Path(folder)
    config = _config(folder)
    if "shape" not in config:
        raise UnknownModel(f"{folder / 'config.json'} describes no WinT of ours; it has {', '.join(config)}.")
    return _shape(folder, config["shape"])


def found_in(folder: Path, config: Mapping[str, Any], request: Request) -> Found:
    """What `open_vit` makes a `Vit` of: `config` is the folder's config.json, already read."""
    size = request.image_size
    if "timm" in config:
        module: nn.Module = _timm_module(config["timm"], request)
        image_px: Any = getattr(module, "patch_embed").img_size  # noqa: B009 - a timm model has it, nn.Module has not
    else:
        shape = _shape(folder, config.get("shape", {}))
        image_px = (size, size) if isinstance(size, int) else tuple(size) if size else shape.image_px
        classes = shape.n_classes if request.n_classes is None else request.n_classes
        module = WinT(replace(shape, image_px=image_px, n_classes=classes))
    if request.pretrained:
        module.load_state_dict(fitted(weights_of(folder), module, new_head=request.n_classes is not None))
    module.eval()
    preprocessing = Preprocessing(
        tuple(image_px),
        tuple(config.get("mean", HALF)),
        tuple(config.get("std", HALF)),
        str(config.get("interpolation", "bicubic")),
        float(config.get("crop_pct", 1.0)),
    )
    names = config.get("label_names")
    fits = lambda state: fitted(state, module)  # noqa: E731
    n_classes = int(getattr(module, "num_classes", 0)) or None
    return Found("", module, preprocessing, n_classes, tuple(names) if names else None, fits)


def weights_of(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a folder's model.safetensors. Raises `WeightsMismatch` where they cannot be read."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise WeightsMismatch(f"{folder} has no model.safetensors.")
    return dict(load_file(path))


def fitted(
    state: Mapping[str, Tensor], module: nn.Module, *, new_head: bool = False, new_windows: bool = False
) -> dict[str, Tensor]:
    """A state that the module can load: positions resampled to its grid; the classifier and the window heads kept as
    the module drew them, where `new_head` (and its class count differs) or `new_windows` says so.

    Raises `WeightsMismatch` if the rest does not fit.
    """
    own = module.state_dict()
    state = {name: _resampled(tensor, own.get(name), name, module) for name, tensor in state.items()}
    if new_windows:
        state = {name: tensor for name, tensor in state.items() if ".windows." not in name}
        state |= {name: tensor for name, tensor in own.items() if ".windows." in name}
    if new_head:
        state = {
            name: own[name] if name.startswith("head.") and name in own and own[name].shape != tensor.shape else tensor
            for name, tensor in state.items()
            if not name.startswith("head.") or name in own
        }
    wrong = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise WeightsMismatch(
            f"The weights do not fit this {type(module).__name__}: {', '.join(wrong[:4])}"
            f"{' ...' if len(wrong) > 4 else ''} are missing, unknown or of another shape."
        )
    return state


def _resampled(tensor: Tensor, own: Tensor | None, name: str, module: nn.Module) -> Float[Tensor, "..."]:
    if name not in ("positions", "pos_embed") or own is None or own.shape == tensor.shape:
        return tensor
    if isinstance(module, WinT):
        prefix, grid = int(module.shape.class_token), module.shape.grid
    else:
        prefix, grid = module.num_prefix_tokens, module.patch_embed.grid_size  # type: ignore[assignment, union-attr]
    if tensor.shape[-1] != own.shape[-1]:
        return tensor
    resampled: Tensor = resample_abs_pos_embed(tensor, list(grid), num_prefix_tokens=prefix)
    return resampled


def _timm_module(made_of: Mapping[str, Any], request: Request) -> nn.Module:
    import timm

    options = dict(made_of.get("args", {}))
    if request.image_size is not None:
        options["img_size"] = request.image_size
    if request.n_classes is not None:
        options["num_classes"] = request.n_classes
    try:
        module: nn.Module = attach(
            timm.create_model(made_of["name"], **options), made_of["start"], made_of.get("edges", 0.0)
        )
    except (KeyError, RuntimeError, TypeError) as error:
        raise UnknownModel(f"config.json describes a timm model that cannot be made: {error}.") from error
    return module


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UnknownModel(f"{folder / 'config.json'} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict) or config.get("architecture") != ARCHITECTURE:
        raise UnknownModel(f"{folder} holds no WinT: its config.json does not name the architecture {ARCHITECTURE!r}.")
    return config


def _shape(folder: Path, described: Mapping[str, Any]) -> Shape:
    known = {field.name for field in fields(Shape)}
    if set(described) - known:
        raise UnknownModel(f"{folder / 'config.json'} has unknown keys {sorted(set(described) - known)} in its shape.")
    tuples = {key: tuple(value) for key, value in described.items() if key == "image_px"}
    start = {"start": tuple(tuple(sides) for sides in described["start"])} if "start" in described else {}
    return Shape(**{**described, **tuples, **start})
