"""The map of a study's images for Embedding Atlas: one Parquet file, a row an image."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from vitrail.errors import Unsupported
from vitrail.exports.source import THUMBNAIL, ExportSource, import_library

__all__ = ["FILE", "write_atlas"]

MAP = "image_xy"
FILE = "images.parquet"


def write_atlas(source: ExportSource, folder: Path) -> str:
    """Writes each image with its place on the map, thumbnail, label, prediction and one number of each measure.

    Args:
        source: The study.
        folder: A folder without files of these names.

    Returns:
        The command that opens the map, with `{folder}` in it.

    Raises:
        MissingLibrary: pyarrow is not installed.
        Unsupported: The study has no map of images.
    """
    remedy = "pip install 'vitrail[export]'"
    arrow = import_library("pyarrow", "embedding-atlas", remedy)
    parquet = import_library("pyarrow.parquet", "embedding-atlas", remedy)
    study = source.everything
    if MAP not in study:
        raise Unsupported(
            f"Embedding Atlas shows images on a map, and this study has none ({MAP}): it is made of a classifier's "
            "studies with head_probability. Export to parquet instead, or study with --measures heads."
        )
    x, y = study[MAP].to_numpy().T
    columns = {"id": study["image"].to_numpy().tolist(), "x": x, "y": y, "image": _pictures(source)}
    for name in ("label", "prediction"):
        if name in study:
            columns[name] = source.class_names(study[name].to_numpy())
    if {"label", "prediction"} <= set(study):
        label, prediction = study["label"].to_numpy(), study["prediction"].to_numpy()
        columns["correct"] = [
            bool(same) if known else None for same, known in zip(label == prediction, label >= 0, strict=True)
        ]
    columns |= {name: values.astype(np.float32) for name, values in source.numbers_of_images().items()}
    parquet.write_table(arrow.table(columns), folder / FILE, compression="zstd")
    return f"embedding-atlas '{{folder}}/{FILE}' --image image --x x --y y"


def _pictures(source: ExportSource) -> list[dict[str, bytes | str | None]]:
    """Thumbnails as the structs of bytes and path that Hugging Face data sets have too."""
    pictures: list[dict[str, bytes | str | None]] = []
    for entry, pixels in zip(source.entries, source.everything[THUMBNAIL], strict=False):
        encoded = io.BytesIO()
        Image.fromarray(pixels.to_numpy()).save(encoded, format="PNG")
        pictures.append({"bytes": encoded.getvalue(), "path": entry.id})
    return pictures
