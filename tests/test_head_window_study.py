"""Windows of heads in a study: areas and effects are those of the boxes, recomputed by masking; report and figure."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from torch import Tensor

from heads.head_models import drawn_wide, timm_swin, timm_vit
from vitrail import open_study, open_vit, run_study
from vitrail.analysis import analyses, unavailable
from vitrail.models.open import Vit
from vitrail.patches import windows
from vitrail.patches.budget import boxes_of_levels, builtin_prices, head_prices
from vitrail.patches.head_windows import head_windows
from vitrail.pruning.removal import remove_heads
from vitrail.report.head_windows import head_windows as section
from vitrail.report.parts import ReportData
from vitrail.tap.attention import Readers
from vitrail.tap.edits import Edit

N_IMAGES, GRID, AREA = 6, (3, 5), 0.36
NAMES = analyses()["head_windows"].measure_names


@pytest.fixture(scope="module")
def vit() -> Vit:
    return open_vit(drawn_wide(timm_vit()), image_size=(48, 80))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vit):
    folder = tmp_path_factory.mktemp("head_windows")
    (folder / "photos").mkdir()
    for index in range(N_IMAGES):
        pixels = np.random.default_rng(index).integers(0, 256, (48, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{index}.png")
    run_study(
        vit,
        folder / "photos",
        out=folder / "study",
        measures="head_windows",
        options={"window_budget": "36"},
        batch_size=N_IMAGES,
    )
    return folder


def probabilities_under(vit: Vit, images: Tensor, boxes: list[Tensor]) -> np.ndarray:
    """The model with -inf on every key outside each query's box, but for itself and the class token."""
    edits = []
    row, column = torch.arange(15) // 5, torch.arange(15) % 5
    for layer, each in enumerate(boxes):
        top, left, bottom, right = each[..., None].unbind(-2)
        inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
        bias = torch.zeros(*each.shape[:2], 16, 16)
        bias[:, :, 1:, 1:] = torch.where(inside | torch.eye(15, dtype=torch.bool), 0.0, -torch.inf)
        edits.append(Edit(layer, bias=bias))
    return vit.tap().read(images, edits=edits).softmax(-1).double().numpy()


def divergence_in_bits(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    middle = (p + q) / 2
    return ((p * np.log2(p / middle) + q * np.log2(q / middle)) / 2).sum(-1)


@torch.no_grad()
def test_areas_and_effects_are_those_of_the_boxes(vit, folder):
    study = open_study(folder / "study")
    images = vit.prepare([Image.open(folder / "photos" / f"{index}.png") for index in range(N_IMAGES)])
    boxes = head_windows(vit, images, builtin_prices(vit), AREA)
    area = torch.stack([windows.areas(each).float().mean(-1) / 15 for each in boxes], 1)
    assert_allclose(study["head_window_area"], area, atol=1e-6)
    assert (
        float(study["head_window_area"].mean(("layer", "head")).max()) <= windows.n_patches_of(AREA, GRID) / 15 + 1e-4
    )
    equal = []
    vit.tap().read(images, Readers(attention=lambda each: equal.append(each.weights())))
    of_area = [boxes_of_levels(each, 1, GRID, (AREA,))[..., 1, :] for each in equal]
    plain = vit.logits(images).softmax(-1).double().numpy()
    for end, chosen in (("", boxes), ("_equal", of_area)):
        under = probabilities_under(vit, images, chosen)
        assert_allclose(study[f"head_window_divergence{end}"], divergence_in_bits(plain, under), atol=1e-4)
        assert (study[f"head_window_flip{end}"].to_numpy() == (plain.argmax(-1) != under.argmax(-1))).all()
    assert "head_window_output_shift" not in study


def test_layers_may_have_different_numbers_of_heads(vit, folder, tmp_path):
    pruned = open_vit(remove_heads(vit, [(0, 1)]).module, image_size=(48, 80), mean=0.5, std=0.5)
    run_study(pruned, folder / "photos", out=tmp_path / "study", measures="head_windows", batch_size=N_IMAGES)
    area = open_study(tmp_path / "study")["head_window_area"].to_numpy()
    lacking = np.zeros((3, 3), bool)
    lacking[0, 2] = True
    assert (np.isnan(area) == lacking).all()
    assert (np.isnan(builtin_prices(pruned).numpy()) == lacking).all()
    assert "needs the most" in section(ReportData.of(tmp_path / "study")).findings[0]


def test_prices_come_from_the_built_in_photographs_alone(vit):
    from vitrail.data.photographs import photographs

    with torch.no_grad():
        expected = head_prices(vit, vit.prepare(list(photographs().values())))
    assert_allclose(builtin_prices(vit), expected)
    assert float(expected.max()) > 0


def test_the_section_names_the_head_that_needs_most(folder):
    study = ReportData.of(folder / "study")
    findings = section(study).findings
    area = open_study(folder / "study")["head_window_area"].mean("image").to_numpy()
    layer, head = np.unravel_index(int(area.argmax()), area.shape)
    assert f"windows of 36 % of the grid, L{layer}H{head} needs the most" in findings[0]
    assert (findings[0].layer, findings[0].head) == (layer, head)
    flips = open_study(folder / "study")["head_window_flip"].to_numpy()
    assert f"class stays for {100 * (1 - flips.mean()):.0f} %" in findings[1]


def test_a_model_that_photographs_cannot_be_shown_to_says_why_it_has_none():
    bands = open_vit(timm_vit(in_chans=5), image_size=(48, 80), mean=0.5, std=0.5)
    reasons = unavailable(bands, NAMES)
    assert set(reasons) == set(NAMES)
    assert "built-in photographs, and this model takes images of 5 channels" in reasons["head_window_area"]
    grey = open_vit(timm_vit(in_chans=1), image_size=(48, 80), mean=0.5, std=0.5)
    assert "head_window_area" not in unavailable(grey, NAMES)


def test_a_model_with_windows_of_its_own_says_why_it_has_none():
    swin = open_vit(timm_swin(), image_size=(64, 64))
    options = {option.name: option.default for each in analyses().values() for option in each.options}
    assert unavailable(swin, NAMES, options)["head_window_area"] == "the model attends within windows of its own"
