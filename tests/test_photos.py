"""The built-in photographs and the model trained on them."""

import copy
import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vitrail import photos
from vitrail.errors import DataError, UsageError
from vitrail.photos import (
    CLASS_NAMES,
    CROP_PX,
    GUARD_SHARE,
    LARGEST_TRAINING_SHARE,
    Crop,
    held_out_blocks,
    held_out_crops,
    photographs,
    training_box,
    training_crop,
)

EMBEDDED = Path(photos.__file__).parent / "embedded"
REFERENCE_BOXES = {
    "astronaut/000": (172, 170, 288, 286),
    "cat/001": (26, 12, 98, 84),
    "handwriting/001": (149, 71, 190, 112),
}
"""Printed by `held_out_crops(26)` when the weights were trained: another machine must cut the same squares."""


@pytest.fixture(scope="module")
def crops() -> list[Crop]:
    return held_out_crops(40 * len(CLASS_NAMES))


def digest(crops: list[Crop]) -> str:
    parts = [crop.id.encode() + bytes([crop.label]) + crop.image.tobytes() for crop in crops]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def mask(size: tuple[int, int], boxes: list[photos.Box]) -> np.ndarray:
    covered = np.zeros((size[1], size[0]), dtype=bool)
    for left, top, right, bottom in boxes:
        covered[top:bottom, left:right] = True
    return covered


def answer_of_another_process(program: str) -> str:
    source = str(Path(photos.__file__).parents[1])
    program = f"import sys; sys.path.insert(0, {source!r})\n{program}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_another_process_draws_the_same_held_out_crops() -> None:
    program = """
from hashlib import sha256
from vitrail.photos import held_out_crops
print(*(sha256(crop.image.tobytes()).hexdigest() for crop in held_out_crops(39)))
"""
    expected = [hashlib.sha256(crop.image.tobytes()).hexdigest() for crop in held_out_crops(39)]
    assert answer_of_another_process(program).split() == expected


def test_boxes_of_held_out_crops_are_those_the_accuracy_was_reported_on() -> None:
    boxes = {crop.id: crop.box for crop in held_out_crops(26)}
    assert {name: boxes[name] for name in REFERENCE_BOXES} == REFERENCE_BOXES


def test_a_longer_list_begins_with_the_shorter_one(crops: list[Crop]) -> None:
    assert digest(held_out_crops(20)) == digest(crops[:20])


def test_no_pixel_of_a_held_out_crop_is_within_the_guard_band_of_a_training_crop(crops: list[Crop]) -> None:
    rng = np.random.default_rng(0)
    for label, photograph in enumerate(photographs().values()):
        guard = round(GUARD_SHARE * min(photograph.size))
        held_out = [crop.box for crop in crops if crop.label == label]
        widened = [(max(0, a - guard), max(0, b - guard), c + guard, d + guard) for a, b, c, d in held_out]
        shares = (0.1, LARGEST_TRAINING_SHARE)
        training = mask(photograph.size, [training_box(rng, photograph.size, shares) for _ in range(300)])
        assert training.mean() > 0.4
        assert not (training & mask(photograph.size, widened)).any()


def test_pixels_of_a_held_out_crop_come_from_its_box(crops: list[Crop]) -> None:
    whole = photographs()
    for crop in crops[::37]:
        expected = whole[CLASS_NAMES[crop.label]].crop(crop.box).resize((CROP_PX, CROP_PX), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(np.asarray(crop.image), np.asarray(expected))


def test_a_training_crop_never_reads_the_held_out_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    original = photographs()["astronaut"]
    spoiled = original.copy()
    for block in held_out_blocks(original.size):
        spoiled.paste((255, 0, 255), block)

    def crops_of(photograph: Image.Image) -> list[bytes]:
        monkeypatch.setattr(photos, "_photograph", lambda name: photograph)
        rng = np.random.default_rng(1)
        return [training_crop(rng, 0).tobytes() for _ in range(100)]

    assert crops_of(original) == crops_of(spoiled)


def test_held_out_crops_lie_inside_blocks_that_cover_a_third(crops: list[Crop]) -> None:
    for label, photograph in enumerate(photographs().values()):
        blocks = mask(photograph.size, held_out_blocks(photograph.size))
        held_out = mask(photograph.size, [crop.box for crop in crops if crop.label == label])
        np.testing.assert_allclose(blocks.mean(), 1 / 3, atol=0.01)
        assert not (held_out & ~blocks).any()


def test_classes_are_balanced_and_ids_unique(crops: list[Crop]) -> None:
    assert set(Counter(crop.label for crop in crops).values()) == {40}
    counts = Counter(crop.label for crop in held_out_crops()).values()
    assert sum(counts) == 320
    assert max(counts) - min(counts) <= 1
    assert len({crop.id for crop in crops}) == len(crops)
    assert all(crop.id.split("/")[0] == CLASS_NAMES[crop.label] for crop in crops)


def test_crops_are_rgb_of_one_size(crops: list[Crop]) -> None:
    rng = np.random.default_rng(0)
    images = [crop.image for crop in crops] + [training_crop(rng, label) for label in range(len(CLASS_NAMES))]
    assert {(image.mode, image.size) for image in images} == {("RGB", (CROP_PX, CROP_PX))}


def test_training_crops_follow_the_seed() -> None:
    def drawn(seed: int) -> list[bytes]:
        rng = np.random.default_rng(seed)
        return [training_crop(rng, label).tobytes() for label in range(len(CLASS_NAMES))]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_a_photograph_missing_from_scikit_image_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "_FILES", {**photos._FILES, "cat": ("no_such_file.png", (451, 300))})
    photos._photograph.cache_clear()
    with pytest.raises(DataError, match=r"'cat' is skimage/data/no_such_file\.png"):
        photographs()


def test_another_picture_under_the_same_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "_FILES", {**photos._FILES, "cat": ("coffee.png", (451, 300))})
    photos._photograph.cache_clear()
    with pytest.raises(DataError, match=r"should be 451 x 300 px, and skimage/data/coffee\.png is 600 x 400 px"):
        photographs()


def test_arguments_without_meaning_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one"):
        held_out_crops(0)
    with pytest.raises(UsageError, match=r"at most 0\.31"):
        training_crop(np.random.default_rng(0), 0, (0.2, 0.5))


def test_reading_the_photographs_needs_no_torch() -> None:
    program = "import vitrail.photos as photos; photos.held_out_crops(13); print('torch' in sys.modules)"
    assert answer_of_another_process(program) == "False"


def test_embedded_weights_stay_under_eight_megabytes() -> None:
    assert (EMBEDDED / "model.safetensors").stat().st_size <= 8_000_000


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return timm.create_model(f"local-dir:{EMBEDDED}", pretrained=True).eval()


@pytest.fixture(scope="module")
def batch(model: torch.nn.Module, crops: list[Crop]) -> torch.Tensor:
    """The crops as timm prepares them for the model, [image, channel, row, column]."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return torch.stack([transform(crop.image) for crop in crops])


def answered_right(model: torch.nn.Module, batch: torch.Tensor, crops: list[Crop]) -> np.ndarray:
    with torch.inference_mode():
        predicted = model(batch).argmax(1).numpy()
    return predicted == np.array([crop.label for crop in crops])


def test_timm_opens_the_embedded_model_and_it_tells_held_out_crops(
    model: torch.nn.Module, batch: torch.Tensor, crops: list[Crop]
) -> None:
    right = answered_right(model, batch, crops)
    assert tuple(model.pretrained_cfg["label_names"]) == CLASS_NAMES
    assert right.mean() >= 0.85
    assert right[:320].mean() >= 0.85


def test_heads_of_the_embedded_model_differ_in_worth(
    model: torch.nn.Module, batch: torch.Tensor, crops: list[Crop]
) -> None:
    def points_lost_without(layer: int, head: int) -> float:
        pruned = copy.deepcopy(model)
        attention = pruned.blocks[layer].attn
        with torch.no_grad():
            attention.proj.weight[:, head * attention.head_dim : (head + 1) * attention.head_dim] = 0
        return 100 * float(whole - answered_right(pruned, batch, crops).mean())

    whole = answered_right(model, batch, crops).mean()
    assert points_lost_without(layer=0, head=1) >= 2
    assert points_lost_without(layer=1, head=1) >= 2
    assert points_lost_without(layer=5, head=2) <= 0.5
