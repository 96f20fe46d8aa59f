"""The pictures of the second stage of `train_embedded.py`: crops, crops pasted onto others, half photographs and more.

Every pixel is from a training region: held-out blocks are painted over before anything is scaled.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.data.photographs import (
    CLASS_NAMES,
    CROP_PX,
    GUARD_SHARE,
    MIN_CONTRAST,
    held_out_blocks,
    photographs,
    training_box,
)

TRAINING_SHARES = (0.16, 0.31)
"""Sides of the training crops relative to the photograph's shorter side: a little wider than the held-out crops'."""

FINE_BATCH_SIZE = 32
FINE_SHARES = (0.14, 0.31)
PASTED, HALVES = 10, 6
"""Pictures of a batch that are pasted together, and that are views of half a photograph and more."""

PASTED_SHARES = (0.12, 0.31)
OBJECTS = [CLASS_NAMES.index(name) for name in ("astronaut", "photographer", "cat", "coffee", "coins")]
OBJECTS += [CLASS_NAMES.index(name) for name in ("retina", "rocket", "handwriting")]
TEXTURES = [label for label in range(len(CLASS_NAMES)) if label not in OBJECTS]
WITH_PLAIN_PARTS = [CLASS_NAMES.index(n) for n in ("astronaut", "photographer", "cat", "coffee", "rocket", "retina")]
PLAIN = 18
"""Standard deviation of the grey levels up to which a crop serves as a plain background."""


def as_pixels(crops: np.ndarray) -> Tensor:
    """Crops of bytes, (n, 64, 64, 3), as channels first in 0..1."""
    return torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255


class Pictures:
    """Draws the pictures of the second stage; every pixel is from a training region."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        covered = [covered_photograph(photograph) for photograph in photographs().values()]
        self.wholes = [shrunk(image, 512) for image, _ in covered]
        self.small = [shrunk(image, 200) for image, _ in covered]
        self.hidden = [shrunk(mask, 200) for _, mask in covered]

    def crop(self, label: int, shares: tuple[float, float], px: int = CROP_PX, plain: bool = False) -> np.ndarray:
        """A crop with some contrast, or a plain one; (px, px, 3) bytes."""
        image = self.wholes[label]
        for _ in range(400):
            box = training_box(self.rng, image.size, shares)
            crop = image.resize((px, px), Image.Resampling.BICUBIC, box=box)
            contrast = np.asarray(crop.convert("L")).std()
            if contrast < PLAIN if plain else contrast >= MIN_CONTRAST:
                break
        return np.asarray(crop)

    def pasted(self) -> tuple[np.ndarray, int, np.ndarray]:
        """A crop with a soft edge on another picture: a texture, a plain crop or its mean colour.

        Returns:
            Bytes (64, 64, 3), the label of the pasted crop, and how far it covers each pixel, (64, 64).
        """
        draw = self.rng.random()
        if draw < 0.45:
            ground = self.crop(int(self.rng.choice(TEXTURES)), TRAINING_SHARES).astype(np.float32)
            label = int(self.rng.choice(OBJECTS))
        else:
            ground = self.crop(int(self.rng.choice(WITH_PLAIN_PARTS)), PASTED_SHARES, plain=True).astype(np.float32)
            label = int(self.rng.integers(len(CLASS_NAMES)))
            if draw > 0.85:
                ground = ground.mean((0, 1)) + self.rng.normal(0, 4, ground.shape)
        px = int(CROP_PX * self.rng.uniform(0.3, 0.65))
        left, top = self.rng.integers(0, CROP_PX - px + 1, 2)
        cover, crop = np.zeros((CROP_PX, CROP_PX), np.float32), np.zeros((CROP_PX, CROP_PX, 3), np.float32)
        crop[top : top + px, left : left + px] = self.crop(label, PASTED_SHARES, px)
        cover[top : top + px, left : left + px] = self.soft_blob(px)
        picture = ground * (1 - cover[..., None]) + crop * cover[..., None]
        return picture.clip(0, 255).astype(np.uint8), label, cover

    def soft_blob(self, px: int) -> np.ndarray:
        """A superellipse between a circle and a square, turned and squeezed, 1 inside and falling to 0 at its edge."""
        row, column = (np.mgrid[0:px, 0:px] + 0.5) / px * 2 - 1
        power = self.rng.choice([2, 2, 4, 8])
        angle = self.rng.uniform(0, np.pi) if power == 2 else 0.0
        across, along = np.cos(angle) * column + np.sin(angle) * row, np.cos(angle) * row - np.sin(angle) * column
        radius = (abs(across) ** power + abs(along / self.rng.uniform(0.6, 1)) ** power) ** (1 / power)
        return np.clip((1 - radius) / self.rng.uniform(0.02, 0.25), 0, 1)

    def half(self) -> tuple[np.ndarray, int]:
        """A square of 60 % of a photograph's shorter side or more, held-out blocks painted over; and its label."""
        label = int(self.rng.integers(len(CLASS_NAMES)))
        image = self.small[label]
        side = int(min(image.size) * self.rng.uniform(0.6, 1))
        left, top = (int(self.rng.integers(0, length - side + 1)) for length in image.size)
        box, size = (left, top, left + side, top + side), (CROP_PX, CROP_PX)
        view = np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box))
        hidden = np.asarray(self.hidden[label].resize(size, Image.Resampling.BICUBIC, box=box))[..., None] > 0
        paint = np.full(3, 127, np.uint8)
        if self.rng.random() >= 0.5:
            paint = self.crop(int(self.rng.choice(WITH_PLAIN_PARTS)), PASTED_SHARES, plain=True)
        return np.where(hidden, paint, view), label

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures in 0..1, [image, channel, row, column], pasted ones first; labels; cover of the pasted ones."""
        pasted = [self.pasted() for _ in range(PASTED)]
        others = [self.half() for _ in range(HALVES)]
        for _ in range(FINE_BATCH_SIZE - PASTED - HALVES):
            label = int(self.rng.integers(len(CLASS_NAMES)))
            others.append((self.crop(label, FINE_SHARES), label))
        pixels = as_pixels(np.stack([picture for picture, *_ in (*pasted, *others)]))
        labels = torch.tensor([entry[1] for entry in (*pasted, *others)])
        return pixels, labels, torch.from_numpy(np.stack([cover for *_, cover in pasted]))


def covered_photograph(photograph: Image.Image) -> tuple[Image.Image, Image.Image]:
    """A photograph whose held-out blocks are grey, and the mask of these blocks with their guard band."""
    image, mask, guard = photograph.copy(), Image.new("L", photograph.size), round(GUARD_SHARE * min(photograph.size))
    for left, top, right, bottom in held_out_blocks(photograph.size):
        image.paste((127, 127, 127), (left, top, right, bottom))
        mask.paste(255, (left - guard, top - guard, right + guard, bottom + guard))
    return image, mask


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """The image with a shorter side of at most `side` pixels."""
    scale = min(1.0, side / min(image.size))
    return image.resize((round(image.size[0] * scale), round(image.size[1] * scale)), Image.Resampling.BICUBIC)
