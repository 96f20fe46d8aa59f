"""See through vision transformers: which patches interact, which heads matter, what neurons carry.

import vitrail

vit = vitrail.open_vit("timm:deit_tiny_patch16_224")          # any ViT, unedited
vitrail.run_study(vit, "photos/", out="study/")               # resumable, any number of images
study = vitrail.open_study("study/")                          # an xarray.Dataset, no torch needed
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrail.data import decode_image, open_images
    from vitrail.errors import VitrailError
    from vitrail.measure import MEASURES, Measure
    from vitrail.study.run import run_study
    from vitrail.study.store import open_study
    from vitrail.vit.check import check_vit
    from vitrail.vit.edits import Edit
    from vitrail.vit.open import Vit, open_vit
    from vitrail.vit.tap import LayerAttention, Readers

__version__ = "0.1.0"

_HOME = {
    "Edit": "vitrail.vit.edits",
    "LayerAttention": "vitrail.vit.tap",
    "MEASURES": "vitrail.measure",
    "Measure": "vitrail.measure",
    "Readers": "vitrail.vit.tap",
    "Vit": "vitrail.vit.open",
    "VitrailError": "vitrail.errors",
    "check_vit": "vitrail.vit.check",
    "decode_image": "vitrail.data",
    "open_images": "vitrail.data",
    "open_study": "vitrail.study.store",
    "open_vit": "vitrail.vit.open",
    "run_study": "vitrail.study.run",
}

__all__ = [
    "MEASURES",
    "Edit",
    "LayerAttention",
    "Measure",
    "Readers",
    "Vit",
    "VitrailError",
    "check_vit",
    "decode_image",
    "open_images",
    "open_study",
    "open_vit",
    "run_study",
]


def __getattr__(name: str) -> Any:
    """Public names are loaded when first used, so that `import vitrail` does not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'vitrail' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
