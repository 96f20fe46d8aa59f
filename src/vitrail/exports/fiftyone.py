"""A study as a FiftyOne data set: photographs with labels, predictions, numbers, and heat maps of patches."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from vitrail.data.geometry import crop_corner, resized_sides
from vitrail.errors import MissingLibrary
from vitrail.exports.source import THUMBNAIL, ExportSource, import_library
from vitrail.grid import Sides, view_in_patches

__all__ = ["DATASET", "PICTURES", "heat_map", "patch_maps", "write_fiftyone"]

DATASET, PICTURES = "dataset", "pictures"
CELL_PX = 8
"""Sides of a patch in a heat map: FiftyOne stretches the map over the photograph, and the edges of the model's crop
seldom lie on those of a patch."""

ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)
"""The tag by which a camera says that rows are columns, and its values that say so."""


def write_fiftyone(source: ExportSource, folder: Path) -> str:
    """Writes a data set in FiftyOne's own format, with the photographs where they are.

    Args:
        source: The study.
        folder: A folder without files of these names.

    Returns:
        A line that loads the data set, with `{folder}` in it.

    Raises:
        MissingLibrary: FiftyOne, or its database, is not installed.
    """
    fo = import_library("fiftyone", "fiftyone", "pip install fiftyone")
    try:
        dataset = fo.Dataset(f"vitrail-export-{uuid.uuid4().hex}")
    except Exception as error:
        raise MissingLibrary(
            f"FiftyOne is installed and its database does not start ({error}); see its troubleshooting page, or name a "
            "MongoDB with FIFTYONE_DATABASE_URI.",
            name="fiftyone",
        ) from error
    try:
        dataset.info = {"model": source.plan.model, "measures": _titles(source)}
        dataset.add_samples(_samples(fo, source, folder), progress=False)
        dataset.export(
            export_dir=str(folder / DATASET), dataset_type=fo.types.FiftyOneDataset, export_media=False, progress=False
        )
    finally:
        dataset.delete()
    return "fiftyone.Dataset.from_dir('{folder}/dataset', fiftyone.types.FiftyOneDataset)"


def _samples(fo: Any, source: ExportSource, folder: Path) -> list[Any]:
    study = source.everything
    names = {name: source.class_names(study[name].to_numpy()) for name in ("label", "prediction") if name in study}
    numbers, maps = source.numbers_of_images(), patch_maps(source)
    ranges = {name: _range(values) for name, values in maps.items()}
    samples = []
    for row, entry in enumerate(source.entries):
        path, sides = _photograph(source, row, folder)
        sample = fo.Sample(filepath=str(path), tags=["study"])
        sample["image_id"] = entry.id
        if names.get("label", [None] * (row + 1))[row] is not None:
            sample["ground_truth"] = fo.Classification(label=names["label"][row])
        if "prediction" in names:
            confidence = float(study["probability"][row]) if "probability" in study else None
            sample["prediction"] = fo.Classification(label=names["prediction"][row], confidence=confidence)
        for name, values in numbers.items():
            sample[name] = float(values[row]) if np.isfinite(values[row]) else None
        for name, values in maps.items():
            laid = heat_map(values[row], sides, source.plan.preprocessing, _view(source))
            sample[name] = fo.Heatmap(map=laid, range=ranges[name])
        samples.append(sample)
    return samples


def patch_maps(source: ExportSource) -> dict[str, Float[np.ndarray, "image row column"]]:
    """Measures of patches, of the last layer that has a grid.

    Args:
        source: The study.

    Returns:
        One map of patches an image, by name of the measure.
    """
    layer = _map_layer(source)
    grid = None if layer is None else source.plan.grids[layer]
    if grid is None:
        return {}
    chosen = {
        str(name): array for name, array in source.data.data_vars.items() if array.dims == ("image", "layer", "patch")
    }
    return {
        name: array.isel(layer=layer, patch=slice(0, grid[0] * grid[1]))
        .to_numpy()
        .astype(np.float64)
        .reshape(-1, *grid)
        for name, array in chosen.items()
    }


def _map_layer(source: ExportSource) -> int | None:
    """The last layer that has a grid."""
    return max((layer for layer, grid in enumerate(source.plan.grids) if grid is not None), default=None)


def _view(source: ExportSource) -> Sides | None:
    """How many patches of the maps long the sides of the model's crop are."""
    layer = _map_layer(source)
    return None if layer is None else view_in_patches(source.everything.attrs, layer)


def heat_map(
    values: Float[np.ndarray, "row column"],
    sides: tuple[int, int] | None,
    preprocessing: Mapping[str, Any],
    view: Sides | None = None,
) -> Float[np.ndarray, "pixel_row pixel_column"]:
    """A map of patches laid over the whole photograph, of which the model saw a crop.

    Args:
        values: A value for each patch.
        sides: (columns, rows) of the photograph; None where the picture is the crop itself.
        preprocessing: Of the plan.
        view: How many patches long the sides of the crop are (`grid.view_in_patches`); None: as long as the map.

    Returns:
        Values of any size with the photograph's proportions; 0 where the model saw nothing, and behind the last patch.
    """
    rows, columns = preprocessing["size"]
    (left, top), (width, height) = (0, 0), (columns, rows)
    if sides is not None:
        width, height = resized_sides(*sides, preprocessing)
        left, top = crop_corner((width, height), preprocessing)
    n_rows, n_columns = values.shape
    pixels = [
        max(1, round(side * CELL_PX * n / crop))
        for side, n, crop in ((height, n_rows, rows), (width, n_columns, columns))
    ]
    # the patch at the middle of each pixel of the map
    below, across = view or (n_rows, n_columns)
    down = ((np.arange(pixels[0]) + 0.5) * height / pixels[0] - top) * below / rows
    right = ((np.arange(pixels[1]) + 0.5) * width / pixels[1] - left) * across / columns
    inside = ((down >= 0) & (down < min(n_rows, below)))[:, None] & ((right >= 0) & (right < min(n_columns, across)))
    at = np.clip(down, 0, n_rows - 1).astype(int)[:, None], np.clip(right, 0, n_columns - 1).astype(int)
    return np.where(inside, np.nan_to_num(values[at]), 0.0)


def _photograph(source: ExportSource, row: int, folder: Path) -> tuple[Path, tuple[int, int] | None]:
    """The file and its sides; where there is none (any more), the thumbnail of what the model saw."""
    entry = source.entries[row]
    sides = None if entry.path is None else _sides(Path(entry.path))
    if entry.path is not None and sides is not None:
        return Path(entry.path).resolve(), sides
    path = folder / PICTURES / f"{row:06d}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(source.everything[THUMBNAIL][row].to_numpy()).save(path)
    return path, None


def _sides(path: Path) -> tuple[int, int] | None:
    """(columns, rows) of a photograph as it is looked at; None where the file is gone or is no image any more."""
    try:
        with Image.open(path) as image:
            return image.size[::-1] if image.getexif().get(ORIENTATION) in TURNED else image.size
    except (OSError, ValueError):
        return None


def _range(values: np.ndarray) -> list[float]:
    """From nothing to the largest value of all images, so that maps compare."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return [min(0.0, low), high if high > min(0.0, low) else 1.0]


def _titles(source: ExportSource) -> dict[str, str]:
    return {
        str(name): f"{array.attrs.get('title', '')}, {array.attrs.get('unit', '')}"
        for name, array in source.data.data_vars.items()
    }
