"""A tiny random ViT and small photographs, made so that a study takes a fraction of a second."""

import hashlib
import json
import socket
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from vitrail.data import open_images, scan
from vitrail.models.open import Vit, open_vit
from vitrail.study.locking import LEASE_S
from vitrail.study.ownership import write_access
from vitrail.study.plan import Plan
from vitrail.study.store import open_study
from vitrail.study.writing import StudyFolder

DEAD_LOCK = f"filelock/2\npid=4194305\nhost={socket.gethostname()}\nmode=lease\ntoken={'0' * 32}\nduration={LEASE_S}\n"
"""The lock of a process of this machine that was killed: no process has so high a number."""

N_IMAGES = 11
BATCH_SIZE = 4


def write_photos(folder: Path, n_images: int) -> Path:
    """Smooth random colours in two class folders, and one file that is no image."""
    for index in range(n_images):
        path = folder / f"class {index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC).save(path)
    (folder / "class 0" / "notes.txt").write_text("not a picture", encoding="utf-8")
    return folder


def tiny_vit(seed: int = 0, n_classes: int = 10) -> Vit:
    """2 layers of 2 heads on a 4 x 4 grid."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=n_classes,
    )  # fmt: skip
    for parameter in model.parameters():  # timm's initialisation leaves a head of zeros and attention almost even
        torch.nn.init.normal_(parameter, std=0.2)
    names = [f"class {index}" for index in range(n_classes)] if n_classes else None
    return open_vit(model, class_names=names)


def write_model(folder: Path) -> Path:
    """The tiny model as a folder in timm's form, which every process opens by its name."""
    folder.mkdir(exist_ok=True)
    module = tiny_vit().model
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    prepared = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 10}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 10,
        "model_args": sizes,
        "pretrained_cfg": prepared,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, folder / "model.safetensors")
    return folder


def folder_bytes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its place in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_study(folder: Path, plan: Plan, photos: Path) -> None:
    """Parts and what is derived from them, from numbers that need no model."""
    with write_access(folder):
        study = StudyFolder(folder, plan, scan(open_images(photos)))
        for part in study.missing:
            values = part_values(part.number, part.stop - part.start)
            study.write_part(part, {"head_probability": values, "head_flip": values > 2})
        if study.derived_is_missing:
            study.write_derived({"image_xy": open_study(folder)["head_probability"].values[:, :, 0]})


def part_values(number: int, n_images: int) -> np.ndarray:
    """Those that `write_study` puts into a part."""
    return np.random.default_rng(number).random((n_images, 2, 2), dtype=np.float32)
