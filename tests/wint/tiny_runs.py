"""Small training runs of the tests: pictures of noise with a mark whose place is the class, as packed images."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitrail.wint.recipe import Recipe, recipe_from


def packed(path: Path, n_images: int, n_classes: int = 3, seed: int = 0) -> Path:
    """PNGs of 16 px, packed as in the project's data: the mark's column tells the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_classes, size=n_images)
    encoded = []
    for label in labels:
        pixels = rng.integers(0, 120, (16, 16, 3), dtype=np.uint8)
        pixels[4:8, 5 * label : 5 * label + 4] += 120
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        encoded.append(file.getvalue())
    offset = np.cumsum([0, *map(len, encoded)])
    names = np.array([f"mark {label}" for label in range(n_classes)])
    np.savez(path, blob=np.frombuffer(b"".join(encoded), np.uint8), offset=offset, label=labels, classes=names)
    return path


def described(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe that takes a second, as plain data; `changes` by table."""
    tables: dict[str, dict[str, Any]] = {
        "data": {"train": str(folder / "train.npz"), "test": str(folder / "test.npz"), "classes": 3, "image_px": 16,
                 "border_px": 2},
        "model": {"patch_px": 4, "width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2.0, "class_token": False,
                  "drop_path_rate": 0.1},
        "optimiser": {"lr": 3e-3, "warmup_epochs": 0.5},
        "run": {"epochs": 3, "batch_size": 16, "log_steps": 2, "ema": 0.9},
    }  # fmt: skip
    for table, values in changes.items():
        tables[table] = {**tables.get(table, {}), **values}
    return {"title": "tiny", "expected": "more than chance", "cost": "a second", **tables}


def recipe(folder: Path, **changes: dict[str, Any]) -> Recipe:
    """The same, read."""
    if not (folder / "train.npz").is_file():
        packed(folder / "train.npz", 96)
        packed(folder / "test.npz", 40, seed=1)
    return recipe_from(described(folder, **changes))
