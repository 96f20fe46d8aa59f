"""A tiny model and photographs of noise for studies to report on, and studies of planted numbers."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import timm
import torch
import xarray as xr
from PIL import Image

from vitrail.analysis import declaration
from vitrail.data import ImageEntry, LabelSource, Manifest
from vitrail.models.open import open_vit
from vitrail.report.parts import ReportData
from vitrail.study.plan import Plan

ANALYSES = ("heads", "regions", "patterns", "patches", "head_windows", "tokens", "exciting")


def small_vit(**options):
    torch.manual_seed(0)
    shape = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8, "num_classes": 5}
    return open_vit(timm.create_model("vit_tiny_patch16_224", **shape | options).eval(), image_size=32)


def photographs(folder: Path, n_images: int = 4) -> Path:
    """Noise in files, and instance ids of two halves beside them."""
    for name in ("photos", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(n_images):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
        ids = np.ones((40, 40), dtype=np.uint8)
        ids[:, 20:] = 2
        Image.fromarray(ids).save(folder / "masks" / f"{number}.png")
    return folder


def planted_study(arrays: dict[str, np.ndarray], grids: list[list[int]], **plan: object) -> ReportData:
    """Numbers that no model made, as a report reads a study of theirs."""
    n_images = len(next(iter(arrays.values())))
    data = {
        name: xr.DataArray(values, dims=declaration(name).dims, attrs=declaration(name).attributes())
        for name, values in arrays.items()
    }
    values = {
        "model": "planted", "weight_digest": "", "n_classes": None, "class_names": None, "n_layers": len(grids),
        "n_heads": [2] * len(grids), "grid": grids[0], "prefix": 1, "grids": grids, "prefixes": [1] * len(grids),
        "class_token": True, "preprocessing": {}, "data_digest": "", "n_images": n_images, "labels_from": "planted",
        "measures": dict.fromkeys(arrays, 1), "left_out": {}, "options": {}, "precision": "float32", "batch_size": 1,
        "part_size": 1, "seed": 0, "device": "cpu", "threads": 1, "versions": {}, "labels": LabelSource.NONE.value,
    }  # fmt: skip
    read = Plan(**values | plan)
    entries = tuple(ImageEntry(f"{image}.png", None, None, 0, "") for image in range(n_images))
    dataset = xr.Dataset(data, coords={"image": [entry.id for entry in entries]}, attrs=asdict(read))
    return ReportData(Path(), dataset, read, Manifest(None, "planted", entries, ()))
