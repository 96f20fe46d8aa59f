"""WinT, the window-free transformer: a ViT in which each patch predicts the window that it attends within.

model       the transformer, its window heads and masks; the same heads on a timm model (`attach`)
folder      saved as config.json and model.safetensors; opened by `open_vit`
teacher     the windows of a trained ViT on the view that the student sees
recipe      what a training run is, as a TOML file with its expected result and cost
batches     images, augmentation and order as a function of seed and step
building    what a recipe asks for: model, teacher, optimiser, schedule
train       the loop: resumable to the bit, on one device or several
evaluate    accuracy, area of the windows, agreement with a teacher, speed
collect     the windows room: predicted windows in a study, compared with measured ones (its measures need no torch)
sparse      hard windows as block-sparse attention (FlexAttention)

Known of Ma et al. 2022 (arXiv 2203.05922): attention windows are predicted, differ from layer to layer, and are guided
by the interactions of a trained ViT. All formulas here are our construction; `docs/wint.md` has the experiments.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vitrail.measure import ROOMS

if TYPE_CHECKING:
    from vitrail.vit.open import Vit
    from vitrail.wint.collect import WindowCollector

__all__ = ["OPTIONS", "collectors", "skipped"]

OPTIONS: Mapping[str, tuple[str, ...]] = {}
"""The windows room has no options."""


def collectors(vit: "Vit", names: Sequence[str], options: Mapping[str, str] | None = None) -> "list[WindowCollector]":
    """What computes those of the measures `names` that belong to the windows room, for a model that has windows."""
    from vitrail.wint.collect import WindowCollector

    wanted = [name for name in dict.fromkeys(names) if name in ROOMS["windows"] and not skipped(vit, [name])]
    return [WindowCollector(vit, wanted)] if wanted else []


def skipped(vit: "Vit", names: Sequence[str], options: Mapping[str, str] | None = None) -> dict[str, str]:
    """Measures among `names` that this model cannot give, each with the reason."""
    from vitrail.wint.model import window_heads

    of_room = [name for name in names if name in ROOMS["windows"]]
    if not of_room or window_heads(vit.model):
        return {}
    return dict.fromkeys(of_room, "the model has no windows of its own (a WinT has)")
