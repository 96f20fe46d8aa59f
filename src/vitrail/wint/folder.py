"""A WinT as a folder: config.json and model.safetensors, which `open_vit` opens like any other model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vitrail.errors import UnknownModel, UsageError, WeightsMismatch
from vitrail.grid import Grid
from vitrail.models.checkpoint import write_tensors
from vitrail.models.preprocessing import Preprocessing
from vitrail.models.sources import LoadedModel, Request
from vitrail.outputs import local_folder, write_atomically
from vitrail.wint.model import Shape, WinT, attach

__all__ = [
    "ARCHITECTURE",
    "fit_state",
    "load_folder",
    "open_model",
    "read_shape",
    "read_weights",
    "save",
]

ARCHITECTURE = "vitrail_wint"
HALF = (0.5, 0.5, 0.5)

OPTIONS = frozenset(
    [
        "class_token",
        "depth",
        "drop_path_rate",
        "dynamic_img_size",
        "embed_dim",
        "fc_norm",
        "final_norm",
        "global_pool",
        "img_size",
        "in_chans",
        "init_values",
        "mlp_ratio",
        "no_embed_class",
        "num_classes",
        "num_heads",
        "patch_size",
        "pool_include_prefix",
        "pos_embed",
        "pre_norm",
        "proj_bias",
        "qk_norm",
        "qkv_bias",
        "reg_tokens",
        "scale_attn_norm",
        "scale_mlp_norm",
    ]
)
"""Arguments of timm's ViTs that a folder may give: its shape, nothing that names a file, an address or a class."""


def save(
    model: nn.Module,
    folder: str | Path,
    class_names: Sequence[str] | None = None,
    timm_model: Mapping[str, Any] | None = None,
    mean: Sequence[float] = HALF,
    std: Sequence[float] = HALF,
) -> Path:
    """Writes a WinT, or a timm ViT with window heads, so that `open_vit(folder)` gives equal logits.

    Each file is replaced whole or not at all.

    Args:
        model: The model.
        folder: Where to; created if need be.
        class_names: In the order of the logits.
        timm_model: For a timm ViT what made it, {"name": .., "args": {..}, "start": [..]}, or instead of a start
            "windows": "none" where it has no window heads.
        mean: By which its images are normalised, of values 0..1.
        std: The same.

    Returns:
        The folder.

    Raises:
        UsageError: The folder holds another model, which is not overwritten.
        UnknownModel: The model is a timm ViT and `timm_model` is missing.

    Example:
        save(model, "runs/mine", class_names=["cat", "dog"])
    """
    folder = local_folder(folder)
    _refuse_other_model(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_describe(model, class_names, timm_model, mean, std), indent=2) + "\n"
    write_atomically(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(folder / "model.safetensors", lambda path: write_tensors(path, state))
    return folder


def _refuse_other_model(folder: Path) -> None:
    files = [name for name in ("config.json", "model.safetensors") if (folder / name).exists()]
    if not files:
        return
    try:
        _config(folder)
    except UnknownModel as error:
        raise UsageError(
            f"A WinT was to be written to {folder}, which holds another model ({', '.join(files)}); name a new folder."
        ) from error


def _describe(
    model: nn.Module,
    class_names: Sequence[str] | None,
    timm_model: Mapping[str, Any] | None = None,
    mean: Sequence[float] = HALF,
    std: Sequence[float] = HALF,
) -> dict[str, Any]:
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


def open_model(folder: str | Path) -> nn.Module:
    """Opens the model of a folder as it was saved.

    Args:
        folder: As `save` wrote it.

    Returns:
        The module, in evaluation mode.

    Raises:
        UnknownModel: The folder holds no WinT.
        WeightsMismatch: Its weights do not fit.
    """
    folder = Path(folder)
    return load_folder(folder, _config(folder), Request()).module


def read_shape(folder: str | Path) -> Shape:
    """Reads the shape of a saved WinT.

    Args:
        folder: As `save` wrote it.

    Returns:
        The shape.

    Raises:
        UnknownModel: The folder holds no WinT of ours.
    """
    folder = Path(folder)
    config = _config(folder)
    if "shape" not in config:
        raise UnknownModel(f"{folder / 'config.json'} describes no WinT of ours; it has {', '.join(config)}.")
    return _shape(folder, config["shape"])


def load_folder(folder: Path, config: Mapping[str, Any], request: Request) -> LoadedModel:
    """Builds the model of a folder for `open_vit`.

    Args:
        folder: As `save` wrote it.
        config: Its config.json, already read.
        request: Image size, weights and classes that were asked for.

    Returns:
        The module with its preprocessing and class names.

    Raises:
        UnknownModel: The folder describes no model that can be built.
        WeightsMismatch: Its weights do not fit.
    """
    size = request.image_size
    if "timm" in config:
        module: nn.Module = _timm_module(config["timm"], request)
        grid = _timm_grid(config["timm"], module)
        image_px: Any = getattr(module, "patch_embed").img_size  # noqa: B009 - a timm model has it, nn.Module has not
    else:
        shape = _shape(folder, config.get("shape", {}))
        grid = shape.grid
        image_px = (size, size) if isinstance(size, int) else tuple(size) if size else shape.image_px
        classes = shape.n_classes if request.n_classes is None else request.n_classes
        module = WinT(replace(shape, image_px=image_px, n_classes=classes))
    if request.pretrained:
        new_head = request.n_classes is not None
        module.load_state_dict(fit_state(read_weights(folder), module, new_head=new_head, grid=grid))
    module.eval()
    preprocessing = Preprocessing(
        tuple(image_px),
        tuple(config.get("mean", HALF)),
        tuple(config.get("std", HALF)),
        str(config.get("interpolation", "bicubic")),
        float(config.get("crop_pct", 1.0)),
        source=f"config.json of {folder.name}",
    )
    names = config.get("label_names")
    fits = partial(fit_state, module=module, grid=grid)
    n_classes = int(getattr(module, "num_classes", 0)) or None
    return LoadedModel("", module, preprocessing, n_classes, tuple(names) if names else None, fits)


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a folder's model.safetensors.

    Args:
        folder: As `save` wrote it.

    Returns:
        Tensors by name.

    Raises:
        WeightsMismatch: There is no such file.
    """
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise WeightsMismatch(f"{folder} has no model.safetensors.")
    return dict(load_file(path))


def fit_state(
    state: Mapping[str, Tensor],
    module: nn.Module,
    *,
    new_head: bool = False,
    new_windows: bool = False,
    grid: Grid | None = None,
) -> dict[str, Tensor]:
    """Makes a state that a module can load; positions are resampled to its grid.

    Args:
        state: Tensors by name, of a model like it.
        module: What is to load them.
        new_head: Keep the module's own classifier if its class count differs.
        new_windows: Keep the module's own window heads.
        grid: Rows and columns of patches that the state is for, as far as they are known. Positions of another number
            are taken for the module's grid, or else for a square one.

    Returns:
        Tensors for all names of the module.

    Raises:
        WeightsMismatch: The rest does not fit.
    """
    own = module.state_dict()
    state = {name: _resample(tensor, own.get(name), name, module, grid) for name, tensor in state.items()}
    if new_windows:
        state = {name: tensor for name, tensor in state.items() if ".windows." not in name}
        state |= {name: tensor for name, tensor in own.items() if ".windows." in name}
    if new_head:
        state = {
            name: own[name] if name.startswith("head.") and name in own and own[name].shape != tensor.shape else tensor
            for name, tensor in state.items()
            if not name.startswith("head.") or name in own
        }
    misfits = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
    if misfits:
        raise WeightsMismatch(
            f"The weights do not fit this {type(module).__name__}: {', '.join(misfits[:4])}"
            f"{' ...' if len(misfits) > 4 else ''} are missing, unknown or of another shape."
        )
    return state


def _resample(
    tensor: Tensor, own: Tensor | None, name: str, module: nn.Module, saved: Grid | None
) -> Float[Tensor, "..."]:
    """Positions on the module's grid; what is no table of positions, or of another width, as it is."""
    if name not in ("positions", "pos_embed") or own is None or tensor.shape[-1] != own.shape[-1]:
        return tensor
    grid = module.shape.grid if isinstance(module, WinT) else module.patch_embed.grid_size  # type: ignore[union-attr]
    rows, columns = grid  # type: ignore[misc]
    prefix = own.shape[1] - rows * columns
    n_saved = tensor.shape[1] - prefix
    side = isqrt(max(0, n_saved))
    candidates = [each for each in (saved, (rows, columns), (side, side)) if each and each[0] * each[1] == n_saved]
    if not candidates:
        raise WeightsMismatch(
            f"{name} has {n_saved} patches, which are no square, so their rows and columns are not known. Open the "
            "model at the image size that it was trained at."
        )
    if candidates[0] == (rows, columns):
        return tensor
    resampled: Tensor = resample_abs_pos_embed(tensor, [rows, columns], list(candidates[0]), prefix)
    return resampled


def _timm_grid(description: Mapping[str, Any], module: nn.Module) -> Grid | None:
    """The grid that a folder's timm model was saved with; None where its image size is not stated."""
    size = description.get("args", {}).get("img_size")
    if size is None:
        return None
    rows, columns = (size, size) if isinstance(size, int) else size
    patch_px: Any = getattr(module, "patch_embed").patch_size  # noqa: B009 - a timm model has it, nn.Module has not
    return int(rows // patch_px[0]), int(columns // patch_px[1])


def _timm_module(description: Any, request: Request) -> nn.Module:
    import timm

    options = _known_options(description)
    if request.image_size is not None:
        options["img_size"] = request.image_size
    if request.n_classes is not None:
        options["num_classes"] = request.n_classes
    windows = description.get("windows", "predicted")
    if windows not in ("predicted", "none"):
        raise UnknownModel(f"config.json gives a timm model windows = {windows!r}; there are predicted and none.")
    try:
        module: nn.Module = timm.create_model(description["name"], **options)
        if windows == "predicted":
            edges, cut = (float(description.get(name, 0.0)) for name in ("edges", "cut"))
            attach(module, description["start"], edges, cut)
    except (KeyError, RuntimeError, TypeError) as error:
        raise UnknownModel(f"config.json describes a timm model that cannot be made: {error}.") from error
    return module


def _known_options(description: Any) -> dict[str, Any]:
    """What a folder says of its timm model, if nothing of it could make timm load or run anything else."""
    import timm

    if not isinstance(description, dict):
        raise UnknownModel(f"config.json has {description!r} where it should describe a timm model. Check the folder.")
    name, options = description.get("name"), description.get("args", {})
    if not isinstance(name, str) or not timm.is_model(name):
        raise UnknownModel(f"config.json names the timm model {name!r}, which timm does not have. Check the folder.")
    if not isinstance(options, dict) or not OPTIONS.issuperset(options):
        unknown = sorted(set(options) - OPTIONS) if isinstance(options, dict) else type(options).__name__
        raise UnknownModel(
            f"config.json gives {name} the arguments {unknown}, which no WinT has. Check where the folder comes from; "
            f"there are: {', '.join(sorted(OPTIONS))}."
        )
    return dict(options)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UnknownModel(f"{folder / 'config.json'} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict) or config.get("architecture") != ARCHITECTURE:
        raise UnknownModel(f"{folder} holds no WinT: its config.json does not name the architecture {ARCHITECTURE!r}.")
    return config


OLD_SHAPE_KEYS = {"dropped_paths": "drop_path_rate"}
"""Names of earlier folders, still read."""


def _shape(folder: Path, description: Mapping[str, Any]) -> Shape:
    values = {OLD_SHAPE_KEYS.get(key, key): value for key, value in description.items()}
    unknown = sorted(values.keys() - {field.name for field in fields(Shape)})
    if unknown:
        raise UnknownModel(f"{folder / 'config.json'} has unknown keys {unknown} in its shape.")
    if "image_px" in values:
        values["image_px"] = tuple(values["image_px"])
    if "start" in values:
        values["start"] = tuple(tuple(sides) for sides in values["start"])
    return Shape(**values)
