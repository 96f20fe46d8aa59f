"""See through vision transformers: which patches interact, which heads matter, what neurons carry.

import vitrail

vit = vitrail.open_vit("timm:deit_tiny_patch16_224")          # any ViT, unedited
vitrail.run_study(vit, "photos/", out="study/")               # resumable, any number of images
study = vitrail.open_study("study/")                          # an xarray.Dataset, no torch needed
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vitrail.errors import explain_missing_library

if TYPE_CHECKING:
    from vitrail.analysis import (
        Analysis,
        Figure,
        Need,
        Option,
        analyses,
        measures,
        register,
        unregister,
    )
    from vitrail.comparison.compare import compare
    from vitrail.contract.check import check_vit
    from vitrail.data import decode_image, open_images
    from vitrail.errors import VitrailError
    from vitrail.exports import export_study
    from vitrail.figures.whole import draw_figure
    from vitrail.measure import Measure
    from vitrail.models.open import Vit, open_vit
    from vitrail.models.preprocessing import Preprocessing
    from vitrail.notebook import show
    from vitrail.one_image import look
    from vitrail.study.run import run_study
    from vitrail.study.store import open_study
    from vitrail.tap.edits import Edit
    from vitrail.tap.tap import LayerAttention, Readers
    from vitrail.tokens.artefacts import artefact_heads, artefact_neurons, with_registers
    from vitrail.tokens.matches import match_patches

__version__ = "0.1.0"

_HOME = {
    "Edit": "vitrail.tap.edits",
    "LayerAttention": "vitrail.tap.tap",
    "Analysis": "vitrail.analysis",
    "Figure": "vitrail.analysis",
    "Need": "vitrail.analysis",
    "Option": "vitrail.analysis",
    "analyses": "vitrail.analysis",
    "artefact_heads": "vitrail.tokens.artefacts",
    "artefact_neurons": "vitrail.tokens.artefacts",
    "measures": "vitrail.analysis",
    "register": "vitrail.analysis",
    "unregister": "vitrail.analysis",
    "Measure": "vitrail.measure",
    "Preprocessing": "vitrail.models.preprocessing",
    "Readers": "vitrail.tap.tap",
    "Vit": "vitrail.models.open",
    "VitrailError": "vitrail.errors",
    "check_vit": "vitrail.contract.check",
    "compare": "vitrail.comparison.compare",
    "decode_image": "vitrail.data",
    "draw_figure": "vitrail.figures.whole",
    "export_study": "vitrail.exports",
    "look": "vitrail.one_image",
    "match_patches": "vitrail.tokens.matches",
    "open_images": "vitrail.data",
    "open_study": "vitrail.study.store",
    "open_vit": "vitrail.models.open",
    "run_study": "vitrail.study.run",
    "show": "vitrail.notebook",
    "with_registers": "vitrail.tokens.artefacts",
}

__all__ = [
    "Analysis",
    "Edit",
    "Figure",
    "LayerAttention",
    "Measure",
    "Need",
    "Option",
    "Preprocessing",
    "Readers",
    "Vit",
    "VitrailError",
    "analyses",
    "artefact_heads",
    "artefact_neurons",
    "check_vit",
    "compare",
    "decode_image",
    "draw_figure",
    "export_study",
    "look",
    "match_patches",
    "measures",
    "open_images",
    "open_study",
    "open_vit",
    "register",
    "run_study",
    "show",
    "unregister",
    "with_registers",
]


def __getattr__(name: str) -> Any:
    """Public names are loaded when first used, so that `import vitrail` does not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'vitrail' has no attribute {name!r}")
    try:
        value = getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if sentence := explain_missing_library(error):
            raise sentence from error
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
