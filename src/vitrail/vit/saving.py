"""Writing a model from which heads were removed as a folder: config.json, model.safetensors, load.py."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from vitrail.errors import Unsupported, UsageError
from vitrail.vit import pruned
from vitrail.vit.open import Vit
from vitrail.vit.removal import Removed
from vitrail.vit.sources import WithOptions

__all__ = ["write_smaller"]

CONFIG, LOADER = "config.json", "load.py"


def write_smaller(vit: Vit, removed: Removed, folder: str | Path) -> None:
    """The smaller model of `without_heads(vit.model, ..)` into a new or empty folder.

    `open_vit(folder)` opens it in Vitrail; `load.py` in the folder opens it with timm or transformers alone, as neither
    can say in a configuration that layers keep different numbers of heads. Raises `UsageError` for a folder that holds
    files, `Unsupported` for a model of neither library.
    """
    folder = Path(folder)
    refuse_full_folder(folder)
    write_configuration = _library(vit)
    folder.mkdir(parents=True, exist_ok=True)
    write_configuration(vit, removed.module, folder)
    state = {name: value.detach().cpu().contiguous().clone() for name, value in removed.module.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(pruned.__file__, folder / LOADER)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["pruned"] = _composed(_removed_before(vit), removed.changes)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def refuse_full_folder(folder: Path) -> None:
    """Raises `UsageError` unless the folder is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"The smaller model was to be written to {folder}, which holds other files; name a new folder."
        )


def _library(vit: Vit) -> Callable[[Vit, nn.Module, Path], None]:
    """What writes the configuration with which the model's library makes the whole model again."""
    model: Any = vit.model
    if isinstance(model, WithOptions):
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
        "be written. In Python, `vitrail.vit.removal.without_heads` gives the smaller module."
    )


def _timm_configuration(vit: Vit, smaller: nn.Module, folder: Path) -> None:
    from timm.models import save_for_hf

    seen = vit.preprocessing
    data = {
        "input_size": (3, *seen.size), "mean": seen.mean, "std": seen.std, "interpolation": seen.interpolation,
        "crop_pct": seen.crop_pct, "crop_mode": seen.crop_mode,
    }  # fmt: skip
    extra = {"label_names": list(vit.class_names)} if vit.class_names else {}
    save_for_hf(smaller, str(folder), model_config=extra, data_config=data, safe_serialization=True)


def _transformers_configuration(vit: Vit, smaller: nn.Module, folder: Path) -> None:
    model: Any = smaller
    seen = vit.preprocessing
    rows, columns = seen.size
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"height": rows, "width": columns},
        "resample": {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}[seen.interpolation],
        "image_mean": list(seen.mean),
        "image_std": list(seen.std),
    }
    if seen.crop_mode == "center":
        short = round(rows / seen.crop_pct)
        processor |= {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": short},
            "do_center_crop": True,
            "crop_size": {"height": rows, "width": columns},
        }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    if vit.class_names:
        config["id2label"] = dict(enumerate(vit.class_names))
        config["label2id"] = {name: label for label, name in enumerate(vit.class_names)}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def _removed_before(vit: Vit) -> dict[str, Any]:
    """What had been removed from the model when it was opened from a folder of this kind."""
    config = Path(str((vit.opened_with or {}).get("model"))) / CONFIG
    found: dict[str, Any] = {}
    if config.is_file():
        found = json.loads(config.read_text(encoding="utf-8")).get("pruned", {})
    return found


def _composed(before: dict[str, Any], after: Any) -> dict[str, Any]:
    """Changes against the whole model: `kept` counts its heads, also where heads had been removed before."""
    found = dict(before)
    for path, change in after.items():
        kept = before.get(path, {}).get("kept")
        found[path] = change | ({"kept": [kept[head] for head in change["kept"]]} if kept else {})
    return found
