"""A tiny model and photographs of noise for studies to report on."""

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from vitrail.vit.open import open_vit

ROOMS = ("heads", "regions", "patterns", "patches", "neurons")


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
