"""The built-in photographs and the model trained on them."""

import copy
import hashlib
import importlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vitrail.data import photographs as photos
from vitrail.data.photographs import (
    CLASS_NAMES,
    CROP_PX,
    GUARD_SHARE,
    LARGEST_TRAINING_SHARE,
    OUTLINES,
    Crop,
    held_out_blocks,
    held_out_crops,
    object_mask,
    photographs,
    square_view,
    training_box,
    training_crop,
)
from vitrail.errors import DataError, UsageError

EMBEDDED = Path(photos.__file__).parents[1] / "embedded"
COSTLIEST, CHEAPEST, FINDS_OBJECTS = (5, 0), (2, 0), (5, 0)
"""Heads of the embedded model as (layer, head), from `train_embedded.py --check`."""

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
    source = str(Path(photos.__file__).parents[2])
    program = f"import sys; sys.path.insert(0, {source!r})\n{program}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_another_process_draws_the_same_held_out_crops() -> None:
    program = """
from hashlib import sha256
from vitrail.data.photographs import held_out_crops
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
    program = "import vitrail.data.photographs as photos; photos.held_out_crops(13); print('torch' in sys.modules)"
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


@pytest.fixture(scope="module")
def wholes() -> list[Image.Image]:
    """The middle squares of the photographs that have an outlined object."""
    return [square_view(photographs()[name]).resize((CROP_PX, CROP_PX), Image.Resampling.BICUBIC) for name in OUTLINES]


def attention(model: torch.nn.Module, batch: torch.Tensor) -> list[np.ndarray]:
    """Softmax of q k^T of each block, written out; [image, head, query, key]."""
    inputs: list[torch.Tensor] = []
    hooks = [block.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in model.blocks]
    with torch.inference_mode():
        model(batch)
        maps = []
        for block, x in zip(model.blocks, inputs, strict=True):
            q, k, _ = block.attn.qkv(x).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            maps.append((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).numpy())
    for hook in hooks:
        hook.remove()
    return maps


def entropy(shares: np.ndarray) -> np.ndarray:
    return -(shares * np.log(np.maximum(shares, 1e-30))).sum(-1)


def test_heads_of_the_embedded_model_attend_differently(model: torch.nn.Module, batch: torch.Tensor) -> None:
    row, column = np.divmod(np.arange(64), 8)
    hops = np.maximum(abs(row[:, None] - row), abs(column[:, None] - column))
    over_keys, over_hops = [], []
    for weights in attention(model, batch[:104]):
        over_keys.append(entropy(weights).mean((0, 2)))
        between = weights[..., 1:, 1:]
        strength = np.stack([between[..., hops == hop].mean(-1) for hop in range(8)], -1)
        over_hops.append(entropy(strength / strength.sum(-1, keepdims=True)).mean(0))
    assert np.ptp(over_keys) >= np.log(65) / 3
    assert np.ptp(over_hops) >= np.log(8) / 3


def test_a_head_of_the_embedded_model_costs_a_tenth_of_the_probability_and_another_nothing(
    model: torch.nn.Module, batch: torch.Tensor, crops: list[Crop]
) -> None:
    labels = torch.tensor([crop.label for crop in crops])[:, None]

    def probability(without: tuple[int, int] | None = None) -> float:
        pruned = copy.deepcopy(model)
        with torch.inference_mode():
            if without is not None:
                layer, head = without
                pruned.blocks[layer].attn.proj.weight[:, 32 * head : 32 * head + 32] = 0
            return float(pruned(batch).softmax(1).gather(1, labels).mean())

    whole = probability()
    assert whole - probability(without=COSTLIEST) > 0.1
    assert whole - probability(without=CHEAPEST) < 0.01


def test_attention_of_the_embedded_model_lies_on_the_objects_of_whole_photographs(
    model: torch.nn.Module, wholes: list[Image.Image]
) -> None:
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    layer, head = FINDS_OBJECTS
    maps = attention(model, torch.stack([transform(whole) for whole in wholes]))[layer][:, head, 0, 1:]
    masks = [
        np.asarray(object_mask(name, (64, 64))).reshape(8, 8, 8, 8).mean((1, 3)).ravel() / 255 for name in OUTLINES
    ]
    objects = np.stack(masks) >= 0.5
    hits = objects[:, maps.argmax(1)]  # of photograph, map
    own = np.eye(len(masks), dtype=bool)
    assert hits[own].sum() >= 4  # it misses the cup of coffee
    assert hits[~own].mean() < hits[own].mean() - 0.3


def test_the_mask_of_an_object_is_what_its_polygons_enclose() -> None:
    for name, outlines in OUTLINES.items():
        area = 0.0
        for outline in outlines:
            x, y = np.array([corner.split(",") for corner in outline.split()], dtype=float).T / 100
            area += abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
        mask = np.asarray(object_mask(name, (400, 400)))
        assert set(np.unique(mask)) == {0, 255}
        np.testing.assert_allclose((mask > 0).mean(), area, atol=0.01)
    with pytest.raises(UsageError, match="objects are outlined in astronaut"):
        object_mask("grass", (8, 8))


def test_pictures_of_the_second_stage_never_read_the_held_out_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    pictures = importlib.import_module("embedded_pictures")
    whole = photographs()

    def drawn(spoil: bool) -> np.ndarray:
        read = {name: image.copy() for name, image in whole.items()}
        for image in read.values() if spoil else ():
            for block in held_out_blocks(image.size):
                image.paste((255, 0, 255), block)
        monkeypatch.setattr(pictures, "photographs", lambda: read)
        drawing = pictures.Pictures(np.random.default_rng(5))
        return np.stack([drawing.half()[0] for _ in range(150)] + [drawing.pasted()[0] for _ in range(50)])

    np.testing.assert_array_equal(drawn(spoil=False), drawn(spoil=True))
