"""The built-in photographs: labelled crops of thirteen pictures that scikit-image carries inside its wheel.

They make the embedded default possible with nothing to download: `vitrail demo` studies the held-out crops with a small
vision transformer trained on the training crops (`scripts/train_embedded.py`). The label of a crop is the photograph
it was cut from. Beside some crops the demo shows the thirteen photographs whole; the regions that are not held out have
been seen in training there.

**The split.** Each photograph is divided into 3 x 3 equal blocks. The three blocks of the main diagonal are held out:
a held-out crop lies whole inside one of them. A training crop touches none of them, nor a guard band around them of
2 % of the photograph's shorter side. So no pixel is ever seen on both sides, and a held-out crop shows a part of the
scene that training never showed. Crops are square, 20 to 30 % of the shorter side, and are scaled to 64 x 64 px. A
crop with hardly any contrast (plain sky, unlit background) can be told by nobody and is never drawn, on either side.

Only photographs that scikit-image states to be CC0, in the public domain or without known copyright restrictions are
used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw, ImageStat

from vitrail.errors import DataError, UsageError

__all__ = [
    "CLASS_NAMES",
    "CROP_PX",
    "Box",
    "Crop",
    "held_out_blocks",
    "held_out_crops",
    "object_mask",
    "photographs",
    "square_view",
    "training_box",
    "training_crop",
]

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the photograph; right and bottom are the first column and row outside."""

_FILES: Mapping[str, tuple[str, tuple[int, int]]] = MappingProxyType(
    {
        "astronaut": ("astronaut.png", (512, 512)),
        "bricks": ("brick.png", (512, 512)),
        "photographer": ("camera.png", (512, 512)),
        "cat": ("chelsea.png", (451, 300)),
        "coffee": ("coffee.png", (600, 400)),
        "coins": ("coins.png", (384, 303)),
        "grass": ("grass.png", (512, 512)),
        "gravel": ("gravel.png", (512, 512)),
        "galaxies": ("hubble_deep_field.jpg", (1000, 872)),
        "tissue": ("ihc.png", (512, 512)),
        "retina": ("retina.jpg", (1411, 1411)),
        "rocket": ("rocket.jpg", (640, 427)),
        "handwriting": ("text.png", (448, 172)),
    }
)
"""Class name -> file in `skimage/data` and its width and height in pixels."""

CLASS_NAMES: tuple[str, ...] = tuple(_FILES)

OUTLINES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "astronaut": (
            "30,10 33,4 45,3 57,7 58,22 55,28 60,45 70,55 73,68 90,70 97,85 97,100 5,100 4,75 10,50 22,40 25,30 34,26",
        ),
        "photographer": (
            "31,20 37,13 46,13 52,19 52,26 66,28 66,38 60,42 57,60 45,62 37,65 28,78 30,100 0,100 5,45 16,28 26,21",
        ),
        "cat": (
            "20,30 30,27 45,37 45,50 33,51 22,46",
            "73,42 80,36 90,38 90,52 80,55 74,52",
            "48,62 62,72 75,70 76,82 66,92 50,88 46,75",
        ),
        "coffee": ("18,20 30,7 46,4 65,8 76,18 76,35 68,55 55,64 40,66 35,74 25,75 23,62 20,45",),
        "rocket": ("46,32 50.5,28 55,32 57,80 60,96 60,100 40,100 40,96 44,80",),
    }
)
"""Name -> polygons, corners "x,y" in percent of the square view. What a person would point at: the astronaut, the man
with his camera, the cat's eyes and muzzle, the cup, the rocket. Drawn by hand; nothing is trained with them."""
CROP_PX = 64

BLOCKS_PER_SIDE = 3
GUARD_SHARE = 0.02
CROP_SHARE = (0.20, 0.30)
LARGEST_TRAINING_SHARE = 0.31
"""A third less the guard: a larger square does not fit beside the held-out blocks."""

MIN_CONTRAST = 8.0
"""Standard deviation of the grey levels (0 to 255) below which a crop counts as plain."""


@dataclass(frozen=True)
class Crop:
    """One held-out crop: `id` is class name and running number, `label` indexes `CLASS_NAMES`, `box` says where."""

    id: str
    label: int
    image: Image.Image
    box: Box


def photographs() -> dict[str, Image.Image]:
    """The whole photographs, in the order of `CLASS_NAMES`.

    Returns:
        RGB images by class name.

    Raises:
        DataError: The installed scikit-image lacks one of them or ships another picture under its name.
    """
    return {name: _photograph(name).copy() for name in CLASS_NAMES}


def held_out_crops(n: int = 320) -> list[Crop]:
    """The first held-out crops, 64 x 64 px RGB, classes in turn so that any two differ by at most one crop.

    The list is the same in every run: crop `cat/007` is drawn from its own random stream, so a longer list begins with
    the shorter one. Crops of one block overlap each other; they sample three regions a photograph, not `n` scenes.

    Args:
        n: How many crops.

    Returns:
        Crops with name and label.

    Raises:
        UsageError: `n` is below 1.
    """
    if n < 1:
        raise UsageError(f"held_out_crops(n={n}): at least one crop must be asked for")
    return [_held_out_crop(index % len(CLASS_NAMES), index // len(CLASS_NAMES)) for index in range(n)]


def training_crop(rng: np.random.Generator, label: int, shares: tuple[float, float] = CROP_SHARE) -> Image.Image:
    """One random training crop, 64 x 64 px RGB.

    Args:
        rng: Where the randomness comes from.
        label: Index of the photograph.
        shares: Least and largest side, relative to the photograph's shorter side.

    Returns:
        The crop.

    Raises:
        UsageError: The shares are not in order within 0 to 0.31: a larger square does not fit beside the held-out
            blocks.
    """
    if not 0 < shares[0] <= shares[1] <= LARGEST_TRAINING_SHARE:
        raise UsageError(
            f"training_crop(shares={shares}): give the least, then the largest relative side, above 0 and at most "
            f"{LARGEST_TRAINING_SHARE}"
        )
    photograph = _photograph(CLASS_NAMES[label])
    while True:
        crop = photograph.crop(training_box(rng, photograph.size, shares))
        if _has_contrast(crop):
            return _scale_crop(crop)


def square_view(photograph: Image.Image) -> Image.Image:
    """The square in the middle of a photograph, which is what a model with a square input sees of it.

    Args:
        photograph: Any size.

    Returns:
        The square, as wide as the shorter side.
    """
    width, height = photograph.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return photograph.crop((left, top, left + side, top + side))


def object_mask(name: str, size: tuple[int, int]) -> Image.Image:
    """Where the object of a photograph lies in its square view, as outlined by hand.

    Args:
        name: One of `OUTLINES`.
        size: (width, height) of the mask in pixels.

    Returns:
        Mode "L": 255 on the object, else 0.

    Raises:
        UsageError: No outline was drawn in that photograph.
    """
    if name not in OUTLINES:
        raise UsageError(f"object_mask({name!r}): objects are outlined in {', '.join(OUTLINES)}; name one of these")
    mask = Image.new("L", size)
    for outline in OUTLINES[name]:
        corners = [corner.split(",") for corner in outline.split()]
        ImageDraw.Draw(mask).polygon([(float(x) / 100 * size[0], float(y) / 100 * size[1]) for x, y in corners], 255)
    return mask


def held_out_blocks(size: tuple[int, int]) -> list[Box]:
    """The blocks of the main diagonal of a photograph.

    Args:
        size: (width, height) of the photograph in pixels.

    Returns:
        Boxes in pixels.
    """
    columns, rows = (np.linspace(0, length, BLOCKS_PER_SIDE + 1).astype(int).tolist() for length in size)
    return [(columns[i], rows[i], columns[i + 1], rows[i + 1]) for i in range(BLOCKS_PER_SIDE)]


def training_box(rng: np.random.Generator, size: tuple[int, int], shares: tuple[float, float] = CROP_SHARE) -> Box:
    """A random square of a photograph, clear of the held-out blocks and their guard band.

    Args:
        rng: Where the randomness comes from.
        size: (width, height) of the photograph in pixels.
        shares: Least and largest side, relative to the photograph's shorter side.

    Returns:
        A box in pixels.
    """
    guard = _guard(size)
    forbidden = [
        (left - guard, top - guard, right + guard, bottom + guard) for left, top, right, bottom in held_out_blocks(size)
    ]
    while True:
        box = _square_within((0, 0, *size), _side(rng, size, shares), rng)
        if not any(_overlap(box, block) for block in forbidden):
            return box


def _held_out_crop(label: int, number: int) -> Crop:
    rng = np.random.Generator(np.random.PCG64([label, number]))
    photograph = _photograph(CLASS_NAMES[label])
    blocks = held_out_blocks(photograph.size)
    while True:
        block = blocks[int(rng.random() * len(blocks))]
        box = _square_within(block, _side(rng, photograph.size, CROP_SHARE), rng)
        crop = photograph.crop(box)
        if _has_contrast(crop):
            return Crop(f"{CLASS_NAMES[label]}/{number:03d}", label, _scale_crop(crop), box)


@lru_cache(maxsize=len(_FILES))
def _photograph(name: str) -> Image.Image:
    file_name, size = _FILES[name]
    file = resources.files("skimage") / "data" / file_name
    if not file.is_file():
        raise DataError(
            f"the built-in photograph {name!r} is skimage/data/{file_name}, which the installed scikit-image does "
            "not carry; install a release that does, such as scikit-image 0.26"
        )
    with file.open("rb") as stream, Image.open(stream) as opened:
        image = opened.convert("RGB")
    if image.size != size:
        raise DataError(
            f"the built-in photograph {name!r} should be {size[0]} x {size[1]} px, and skimage/data/{file_name} is "
            f"{image.size[0]} x {image.size[1]} px: another picture; install a release such as scikit-image 0.26"
        )
    return image


def _guard(size: tuple[int, int]) -> int:
    return round(GUARD_SHARE * min(size))


def _side(rng: np.random.Generator, size: tuple[int, int], shares: tuple[float, float]) -> int:
    least, largest = shares
    return int(min(size) * (least + (largest - least) * rng.random()))


def _square_within(box: Box, side: int, rng: np.random.Generator) -> Box:
    left = box[0] + int(rng.random() * (box[2] - box[0] - side + 1))
    top = box[1] + int(rng.random() * (box[3] - box[1] - side + 1))
    return left, top, left + side, top + side


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _has_contrast(crop: Image.Image) -> bool:
    return ImageStat.Stat(crop.convert("L")).stddev[0] >= MIN_CONTRAST


def _scale_crop(crop: Image.Image) -> Image.Image:
    return crop.resize((CROP_PX, CROP_PX), Image.Resampling.BICUBIC)
