"""Writing a model from which heads were removed as a folder: config.json, model.safetensors, load.py."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from torch import nn

from vitrail.data.geometry import resize_target
from vitrail.errors import Unsupported, UsageError
from vitrail.models import pruned
from vitrail.models.checkpoint import write_tensors
from vitrail.models.open import Vit
from vitrail.models.sources import ModelWithOptions
from vitrail.pruning.removal import PrunedModel
from vitrail.tap.clone import CANNOT_RUN, clone_sharing

__all__ = ["refuse_full_folder", "require_savable", "save_pruned"]

CONFIG, LOADER = "config.json", "load.py"


def save_pruned(vit: Vit, pruned_model: PrunedModel, folder: str | Path) -> None:
    """The smaller model of `remove_heads(vit, ..)` into a new or empty folder.

    `open_vit(folder)` opens it in Vitrail; `load.py` in the folder opens it with timm or transformers alone, as neither
    can say in a configuration that layers keep different numbers of heads.

    Args:
        vit: The model with all its heads.
        pruned_model: What `remove_heads(vit, ..)` gave.
        folder: A new or an empty folder.

    Raises:
        UsageError: The folder holds files, or the preprocessing of the model is not known.
        Unsupported: The model comes from neither library.
    """
    folder = Path(folder)
    refuse_full_folder(folder)
    write_configuration = _library(vit)
    preprocessing = vit.preprocessing  # asked before anything is written: it may not be known
    folder.mkdir(parents=True, exist_ok=True)
    write_configuration(vit, pruned_model.module, folder)
    state = {
        name: value.detach().cpu().contiguous().clone() for name, value in pruned_model.module.state_dict().items()
    }
    write_tensors(folder / "model.safetensors", state, {"format": "pt"})
    shutil.copyfile(pruned.__file__, folder / LOADER)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["preprocessing"] = preprocessing.as_dict()
    config["pruned"] = _compose_changes(_earlier_changes(vit), pruned_model.changes)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def require_savable(vit: Vit) -> None:
    """Raises where `save_pruned` could not write a folder that opens as the model without some heads.

    Tried: the library makes a model of the configuration, without weights, and its tensors are as large as the model's.

    Args:
        vit: The model with all its heads.

    Raises:
        UsageError: The preprocessing of the model is not known.
        Unsupported: The model comes from neither library, or its configuration does not make it again.
    """
    write_configuration = _library(vit)
    _ = vit.preprocessing
    module = clone_sharing(vit.model)
    expected = module.state_dict()
    advice = (
        "its configuration does not make it again, so a folder with it would not open. Open it by its name or folder, "
        "or make it by its library's arguments. In Python, `vitrail.pruning.removal.remove_heads` gives the smaller "
        "module."
    )
    try:
        with TemporaryDirectory() as folder:
            write_configuration(vit, module, Path(folder))
            config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
            again = pruned.whole_model(Path(folder), config)
        pruned.shrink(again, _earlier_changes(vit), expected)
    except CANNOT_RUN as error:
        reason = f"{type(error).__name__}: {str(error)[:120]}"
        raise Unsupported(f"{vit.name} cannot be made by its library ({reason}): {advice}") from error
    remade = {name: list(tensor.shape) for name, tensor in again.state_dict().items()}
    own = {name: list(tensor.shape) for name, tensor in expected.items()}
    other = next((name for name in {**own, **remade} if own.get(name) != remade.get(name)), None)
    if other is not None:
        sizes = (str(shapes.get(other, "not there")) for shapes in (own, remade))
        raise Unsupported(
            f"{vit.name} was changed in Python since its library made it ({other} is {next(sizes)}, and {next(sizes)} "
            f"where it is made again): {advice}"
        )


def refuse_full_folder(folder: Path) -> None:
    """Raises unless a folder is new or empty.

    Args:
        folder: Where a model is to be written.

    Raises:
        UsageError: It holds files, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"The smaller model was to be written to {folder}, which holds other files; name a new folder."
        )


def _library(vit: Vit) -> Callable[[Vit, nn.Module, Path], None]:
    """What writes the configuration with which the model's library makes the whole model again."""
    model: Any = vit.model
    if isinstance(model, ModelWithOptions):
        raise Unsupported(
            f"{vit.name} is called with options that its configuration cannot hold (another image size than its own, "
            "or ViT-MAE's), so a folder that opens it cannot be written. Study it at its own image size."
        )
    if hasattr(model, "pretrained_cfg"):
        return _timm_configuration
    if hasattr(model, "config") and hasattr(model.config, "to_json_string"):
        return _transformers_configuration
    raise Unsupported(
        f"{type(model).__name__} comes from neither timm nor transformers, so no configuration that makes it again can "
        "be written. In Python, `vitrail.pruning.removal.remove_heads` gives the smaller module."
    )


def _timm_configuration(vit: Vit, smaller: nn.Module, folder: Path) -> None:
    from timm.models import save_for_hf

    preprocessing = vit.preprocessing
    data = {
        "input_size": (vit.n_channels, *preprocessing.size),
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "interpolation": preprocessing.interpolation,
        "crop_pct": preprocessing.crop_pct,
        "crop_mode": preprocessing.crop_mode,
    }
    extra = {"label_names": list(vit.class_names)} if vit.class_names else {}
    bare = copy.copy(smaller)
    vars(bare)["state_dict"] = dict  # the configuration alone: weights are written for both libraries alike
    save_for_hf(bare, str(folder), model_config=extra, data_config=data, safe_serialization=True)


def _transformers_configuration(vit: Vit, smaller: nn.Module, folder: Path) -> None:
    model: Any = smaller
    preprocessing = vit.preprocessing
    rows, columns = preprocessing.size
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": dict(zip(("height", "width"), resize_target(preprocessing.as_dict()), strict=True)),
        "resample": int(Image.Resampling[preprocessing.interpolation.upper()]),
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
    if preprocessing.crop_mode == "center":
        processor |= {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": min(resize_target(preprocessing.as_dict()))},
        }
    if preprocessing.crop_mode == "center" or resize_target(preprocessing.as_dict()) != preprocessing.size:
        processor |= {"do_center_crop": True, "crop_size": {"height": rows, "width": columns}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    if vit.class_names:
        config["id2label"] = dict(enumerate(vit.class_names))
        config["label2id"] = {name: label for label, name in enumerate(vit.class_names)}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def _earlier_changes(vit: Vit) -> dict[str, Any]:
    """What had been removed from the model when it was opened from a folder of this kind."""
    config = Path(str((vit.opened_with or {}).get("model"))) / CONFIG
    changes: dict[str, Any] = {}
    if config.is_file():
        changes = json.loads(config.read_text(encoding="utf-8")).get("pruned", {})
    return changes


def _compose_changes(before: dict[str, Any], after: Any) -> dict[str, Any]:
    """Changes against the whole model: `kept` counts its heads, also where heads had been removed before."""
    changes = dict(before)
    for path, change in after.items():
        heads_left = before.get(path, {}).get("kept")
        changes[path] = change | ({"kept": [heads_left[head] for head in change["kept"]]} if heads_left else {})
    return changes
