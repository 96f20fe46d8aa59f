"""Opening a study's model again, for what needs the live model: single images, region modes, attention maps."""

import json
from pathlib import Path
from typing import Any

from vitrail.errors import StudyError, UnknownModel, Unsupported, UsageError, WeightsMismatch
from vitrail.models.open import Vit, open_vit
from vitrail.models.preprocessing import Preprocessing
from vitrail.models.sources import split_python_name
from vitrail.study.ownership import MODEL, write_atomic
from vitrail.study.planning import model_identity
from vitrail.study.store import read_plan

__all__ = ["reopen", "save_model_arguments"]


def save_model_arguments(folder: Path, vit: Vit) -> None:
    """Stores how the model was opened, for `reopen`.

    Args:
        folder: The study.
        vit: Its model.
    """
    write_atomic(folder / MODEL, json.dumps(vit.opened_with, indent=1) + "\n")


def reopen(
    folder: str | Path, *, model: str | Path | Vit | None = None, weights: str | Path | None = None, device: str = "cpu"
) -> Vit:
    """Opens the model of a study as it was opened then.

    Args:
        folder: The study.
        model: Where the model is now, as `open_vit` takes it: a folder that has moved, "FILE.py:FUNCTION" (which runs
            that file), or an opened model. None: as the study names it.
        weights: A file of the same weights, where they have moved; None: where they were.
        device: Where it runs.

    Returns:
        The model.

    Raises:
        UnknownModel: The model was handed over as a Python object, or made by a Python file, and `model` does not name
            it; or it is not where it was; or it was studied with a function as target, and `model` is no opened one.
        WeightsMismatch: The weights are not those that were studied.
        UsageError: `model` is an opened model with another target.
        StudyError: The folder is no study, or does not say how its model was opened.
    """
    folder = Path(folder)
    plan = read_plan(folder)
    if isinstance(model, Vit):
        plan.require_model(model_identity(model))
        return model
    opened = _read_arguments(folder)
    name = str(model) if model is not None else _name_of(opened, plan.model)
    opened = opened or {"task": plan.task or None, "precision": plan.precision, "output": plan.output}
    if plan.target is not None and opened.get("target") is None:
        raise UnknownModel(
            f"{plan.model} was studied with the target {plan.target}, which is not stored and cannot be opened from "
            "here. In Python hand over the model opened with it, open_vit(.., target=..), as `model=vit` or, to serve "
            "the page, vitrail.app.server.serve(study, vitrail.live.LiveModel(vit))."
        )
    size = opened.get("image_size")
    try:
        vit = open_vit(
            name,
            image_size=tuple(size) if isinstance(size, list) else size,
            preprocessing=Preprocessing.from_dict(plan.preprocessing),
            weights=weights or opened.get("weights"),
            device=device,
            precision=opened["precision"],
            n_classes=opened.get("n_classes"),
            class_names=plan.class_names,
            task=opened.get("task"),
            output=opened.get("output"),
            prompts=opened.get("prompts"),
            target=opened.get("target"),
        )
    except UnknownModel as error:
        if model is not None or not _is_gone(name):
            raise
        raise UnknownModel(
            f"The model of this study, {name}, is not where it was. Name it where it is now, with --model."
        ) from error
    except (UsageError, Unsupported, WeightsMismatch) as error:
        if model is None:
            raise
        raise WeightsMismatch(
            f"{name} is not the model of this study, {plan.model}. Opened as that was, it says: {error}"
        ) from error
    plan.require_model(model_identity(vit))
    return vit


def _is_gone(name: str) -> bool:
    """Whether a model's name is that of a folder which is not there."""
    return not Path(name).exists() and (":" not in name or Path(name).is_absolute())


def _read_arguments(folder: Path) -> dict[str, Any] | None:
    """The arguments that the model of a study was opened with; None if it was handed over as an object."""
    try:
        opened = json.loads((folder / MODEL).read_text())
    except (OSError, ValueError) as error:
        raise StudyError(f"{folder / MODEL}, which says how the model was opened, cannot be read: {error}.") from error
    if opened is not None and not (isinstance(opened, dict) and {"model", "precision"} <= opened.keys()):
        raise StudyError(f"{folder / MODEL} does not say how the model was opened.")
    return opened


def _name_of(opened: dict[str, Any] | None, model: str) -> str:
    """What leads to the model without a word of the user; raises `UnknownModel` where nothing may."""
    name_it = (
        "Name it to have it here: --model FILE.py:FUNCTION, of a function that returns the model with its trained "
        "weights; in Python hand over the opened model, as `model=vit` or, to serve the page, "
        "vitrail.app.server.serve(study, vitrail.live.LiveModel(vit))."
    )
    if opened is None:
        raise UnknownModel(
            f"{model} was handed to the study as a Python object and cannot be opened again from here. {name_it}"
        )
    if split_python_name(opened["model"]) is not None:
        raise UnknownModel(
            f"The model of this study was made by running {opened['model']}. Vitrail runs a Python file only when you "
            f"name it, never because a study does. {name_it}"
        )
    return str(opened["model"])
