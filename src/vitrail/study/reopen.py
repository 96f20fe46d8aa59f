"""Opening a study's model again, for what needs the live model: single images, region modes, attention maps."""

import json
from pathlib import Path

from vitrail.errors import StudyError, UnknownModel, WeightsMismatch
from vitrail.study.store import read_plan
from vitrail.study.writing import write_whole
from vitrail.vit.open import Vit, open_vit

__all__ = ["remember", "reopen"]

FILE = "model.json"
"""How the model was opened. Apart from the plan: where a weights file lies changes no number, what is in it does."""


def remember(folder: Path, vit: Vit) -> None:
    """Writes down how the model was opened."""
    write_whole(folder / FILE, json.dumps(vit.opened_with, indent=1) + "\n")


def reopen(folder: str | Path, *, weights: str | Path | None = None, device: str = "cpu") -> Vit:
    """The model of a study, opened as it was then; `weights` where the file has moved.

    Raises `UnknownModel` for a model that was handed over as a Python object, `WeightsMismatch` if the weights are not
    those that were studied.
    """
    folder = Path(folder)
    plan = read_plan(folder)
    try:
        opened = json.loads((folder / FILE).read_text())
    except (OSError, ValueError) as error:
        raise StudyError(f"{folder / FILE}, which says how the model was opened, cannot be read: {error}.") from error
    if opened is None:
        raise UnknownModel(
            f"{plan.model} was handed to the study as a Python object and cannot be opened again from here. "
            "Serve it from Python: vitrail.app.server.serve(study, vitrail.live.Live(vit))."
        )
    size = opened["image_size"]
    vit = open_vit(
        opened["model"],
        image_size=tuple(size) if isinstance(size, list) else size,
        weights=weights or opened["weights"],
        device=device,
        precision=opened["precision"],
        n_classes=opened["n_classes"],
        class_names=plan.class_names,
    )
    if vit.weight_digest != plan.weight_digest:
        raise WeightsMismatch(
            f"{plan.model} was studied with other weights ({plan.weight_digest[:12]}) than those found now "
            f"({vit.weight_digest[:12]}). Give the studied file with --weights, or open the study without the model."
        )
    return vit
