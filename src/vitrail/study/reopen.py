"""Opening a study's model again, for what needs the live model: single images, region modes, attention maps."""

import json
from pathlib import Path

from vitrail.errors import StudyError, UnknownModel, WeightsMismatch
from vitrail.models.open import Vit, open_vit
from vitrail.models.preprocessing import Preprocessing
from vitrail.models.sources import split_python_name
from vitrail.study.ownership import MODEL, write_atomic
from vitrail.study.store import read_plan

__all__ = ["reopen", "save_model_arguments"]


def save_model_arguments(folder: Path, vit: Vit) -> None:
    """Stores how the model was opened, for `reopen`.

    Args:
        folder: The study.
        vit: Its model.
    """
    write_atomic(folder / MODEL, json.dumps(vit.opened_with, indent=1) + "\n")


def reopen(folder: str | Path, *, weights: str | Path | None = None, device: str = "cpu") -> Vit:
    """Opens the model of a study as it was opened then.

    Args:
        folder: The study.
        weights: A file of the same weights, where they have moved; None: where they were.
        device: Where it runs.

    Returns:
        The model.

    Raises:
        UnknownModel: The model was handed over as a Python object, or made by a Python file.
        WeightsMismatch: The weights are not those that were studied.
        StudyError: The folder is no study, or does not say how its model was opened.
    """
    folder = Path(folder)
    plan = read_plan(folder)
    try:
        opened = json.loads((folder / MODEL).read_text())
    except (OSError, ValueError) as error:
        raise StudyError(f"{folder / MODEL}, which says how the model was opened, cannot be read: {error}.") from error
    if opened is None:
        raise UnknownModel(
            f"{plan.model} was handed to the study as a Python object and cannot be opened again from here. "
            "Serve it from Python: vitrail.app.server.serve(study, vitrail.live.LiveModel(vit))."
        )
    if split_python_name(opened["model"]) is not None:
        raise UnknownModel(
            f"The model of this study was made by running {opened['model']}. Vitrail runs a Python file only when you "
            "name it, never because a study does: open it with vitrail.open_vit and serve it from Python, "
            "vitrail.app.server.serve(study, vitrail.live.LiveModel(vit))."
        )
    size = opened["image_size"]
    preprocessing = Preprocessing.from_dict(plan.preprocessing)
    vit = open_vit(
        opened["model"],
        image_size=tuple(size) if isinstance(size, list) else size,
        preprocessing=preprocessing,
        weights=weights or opened["weights"],
        device=device,
        precision=opened["precision"],
        n_classes=opened["n_classes"],
        class_names=plan.class_names,
        task=opened.get("task"),
        output=opened.get("output"),
        prompts=opened.get("prompts"),
    )
    if vit.weight_digest != plan.weight_digest:
        raise WeightsMismatch(
            f"{plan.model} was studied with other weights ({plan.weight_digest[:12]}) than those found now "
            f"({vit.weight_digest[:12]}). Give the studied file with --weights, or open the study without the model."
        )
    return vit
