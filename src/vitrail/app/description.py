"""The description of a study that the page needs before it draws: plan, sizes, measures and accuracy, as JSON."""

import shlex
from collections.abc import Mapping
from typing import Any

import xarray as xr

from vitrail.analysis import BASE, Analysis, analyses, measures
from vitrail.app.answers import number_or_none
from vitrail.app.study_arrays import StudyArrays
from vitrail.data import Manifest, class_title
from vitrail.data.sources import BUILT_IN, PHOTOS
from vitrail.grid import Sides, view_in_patches
from vitrail.stats import share_interval
from vitrail.study.plan import Plan, growing_command

__all__ = ["describe_study", "describe_views"]

MEASURE_TEXTS = ("title", "low", "high", "source", "limits", "analysis")


def describe_study(
    arrays: StudyArrays, plan: Plan, manifest: Manifest, name: str, in_commands: str, on_disk: xr.Dataset
) -> dict[str, Any]:
    """Describe a study for the page.

    Args:
        arrays: The study's arrays.
        plan: The plan that the study was made by.
        manifest: The list of its images.
        name: The study's name, in the page's address.
        in_commands: How commands call its folder.
        on_disk: The study as it opens now, perhaps with more than when it was opened.

    Returns:
        Values that JSON can hold: sizes and names of places by dimension, the plan's facts, each measure's dimensions
        and texts, and every registered analysis with the measures that this study holds of it and the command that
        measures it.
    """
    dataset = arrays.dataset
    return {
        "name": name,
        "in_commands": shlex.quote(in_commands),
        "model": plan.model,
        "sizes": {str(dimension): int(size) for dimension, size in dataset.sizes.items()},
        "places": {str(name): each.to_numpy().tolist() for name, each in dataset.coords.items() if name != "image"},
        "n_heads": plan.n_heads,
        "grids": plan.grids,
        "views": describe_views(dataset.attrs),
        "depths": plan.depths,
        "prefixes": plan.prefixes,
        "own_grid_layers": plan.own_grid_layers,
        "class_token": plan.class_token,
        "measures": {measure: _describe_measure(arrays, measure) for measure in arrays.measures},
        "start": arrays.start(),
        "analyses": _describe_analyses(arrays, plan, manifest, in_commands),
        "left_out": plan.left_out,
        "notes": plan.notes,
        "weights_from": plan.weights_from,
        "class_names": [class_title(name) for name in plan.class_names or ()],
        "accuracy": _accuracy(arrays),
        "labels_from": plan.labels_from,
        "own_labels": any(entry.label is not None for entry in manifest.images),
        "missing_images": int(dataset.attrs["missing_images"]),
        "missing_measures": list(on_disk.attrs["missing_measures"]),
        "arrived_images": on_disk.sizes["image"] - dataset.sizes["image"],
        "arrived_measures": [str(measure) for measure in on_disk.data_vars if measure not in dataset],
        "has_thumbnails": "thumbnail" in dataset,
    }


def describe_views(study: Mapping[Any, Any]) -> list[Sides | None]:
    """Where patches lie on what the model sees, for whoever draws on it.

    Args:
        study: Attributes of a study.

    Returns:
        For each layer how many of its patches long the rows and columns of what the model sees are; None for a layer
        without a grid.
    """
    return [None if grid is None else view_in_patches(study, at) for at, grid in enumerate(study["grids"])]


def _describe_analyses(arrays: StudyArrays, plan: Plan, manifest: Manifest, name: str) -> list[dict[str, Any]]:
    """Every registered analysis; then those whose numbers are stored, but whose package is not installed here."""
    described = [
        {
            "name": analysis.name,
            "title": analysis.title,
            "question": analysis.question,
            "only_for": analysis.only_for,
            "measures": list(analysis.measure_names),
            "stored": [name for name in analysis.measure_names if name in arrays.dataset],
            "command": _command(analysis, plan, manifest, name),
        }
        for analysis in analyses().values()
    ]
    elsewhere: dict[str, list[str]] = {}
    for measure in arrays.undeclared:
        elsewhere.setdefault(str(arrays.dataset[measure].attrs["analysis"]), []).append(measure)
    return described + [
        {
            "name": name,
            "title": name.replace("_", " ").capitalize(),
            "question": "Measured by a package that is not installed here.",
            "only_for": "",
            "measures": names,
            "stored": names,
            "command": "",
        }
        for name, names in elsewhere.items()
    ]


def _command(analysis: Analysis, plan: Plan, manifest: Manifest, name: str) -> str:
    """What adds an analysis to this study, which grows by it; of special models, to a study of one."""
    if analysis.only_for:
        return f"vitrail study MODEL IMAGES --measures {analysis.name} --out FOLDER"
    images = [BUILT_IN, "--limit", str(plan.n_images)] if manifest.source == PHOTOS else ["IMAGES"]
    return growing_command(plan, images, [] if analysis.name == BASE else [analysis.name], name)


def _describe_measure(arrays: StudyArrays, name: str) -> dict[str, Any]:
    array, declared = arrays.dataset[name], measures().get(name)
    unit = arrays.unit(name)
    return {
        # the store does not say it of a measure whose package is not installed here: values that are names have no mean
        "is_quantity": not unit.startswith(("class", "number")) if declared is None else declared.is_quantity,
        "dims": [str(dimension) for dimension in array.dims],
        "baseline": arrays.baseline(name),
        "unit": unit,
        **{key: str(array.attrs.get(key, "")) for key in MEASURE_TEXTS},
    }


def _accuracy(arrays: StudyArrays) -> dict[str, Any] | None:
    """Share of images whose top-1 prediction is the label, with its interval; None without a classifier."""
    if "prediction" not in arrays.dataset:
        return None
    correct = arrays.load("prediction") == arrays.load("label")
    low, high, _ = share_interval(correct)  # none of a single image
    return {
        "value": float(correct.mean()),
        "low": number_or_none(low),
        "high": number_or_none(high),
        "n_right": int(correct.sum()),
    }
