"""Windows under one budget: what a box changes is exact, areas go where they matter, and the budget is kept."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from heads.head_models import drawn_wide, timm_vit
from vitrail import Readers, open_vit
from vitrail.models.open import Vit
from vitrail.patches import budget, windows
from vitrail.patches.interaction import between_patches, normalise_rows
from vitrail.tap.budget import fixed_budget
from vitrail.tap.edits import Edit
from vitrail.tap.tap import Replay, Tap

GRID = (3, 5)
N = 15


@pytest.fixture(scope="module")
def vit() -> Vit:
    return open_vit(drawn_wide(timm_vit()), image_size=(48, 80))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))


def seen(vit: Vit, images: Tensor, edits: list[Edit] | None = None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Weights, values and heads' outputs of every layer."""
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    keep = Readers(attention=lambda each: kept.append((each.weights(), each.v[:, 0], each.out[:, 0])))
    with torch.no_grad():
        vit.tap().read(images, keep, edits or [])
    return kept


def test_boxes_of_levels_are_the_best_of_each_head_and_the_first_is_empty(vit: Vit, images: Tensor) -> None:
    weights, _, _ = seen(vit, images)[1]
    boxes = budget.boxes_of_levels(weights, 1, GRID, (0.2, 1.0))
    assert boxes.shape == (2, 3, N, 3, 4)
    assert torch.all(windows.areas(boxes[..., 0, :]) == 0)
    matrix = normalise_rows(between_patches(weights, 1))
    assert torch.equal(boxes[..., 1, :], windows.best_boxes(matrix, GRID, 3)[0])
    assert torch.all(windows.areas(boxes[..., 2, :]) == N)


def test_changes_are_what_closing_the_keys_does_to_the_heads_output(vit: Vit, images: Tensor) -> None:
    weights, v, out = seen(vit, images)[0]
    boxes = budget.boxes_of_levels(weights, 1, GRID, (0.2, 0.6))
    moved = budget.output_changes(weights, v, boxes, 1, GRID)
    for level in range(3):
        bias = windows.attention_bias(windows.masks(boxes[..., level, :], GRID), 1)
        _, _, closed = seen(vit, images, [Edit(0, bias=bias)])[0]
        expected = (closed - out)[:, :, 1:].square().sum(-1)
        assert_close(moved[..., level], expected, atol=1e-6, rtol=1e-3)


def test_the_whole_grid_changes_nothing(vit: Vit, images: Tensor) -> None:
    weights, v, _ = seen(vit, images)[0]
    boxes = budget.boxes_of_levels(weights, 1, GRID, (1.0,))
    moved = budget.output_changes(weights, v, boxes, 1, GRID)
    assert float(moved[..., 1].max()) < 1e-9
    assert float(moved[..., 0].min()) > 1e-6


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), n_patches=st.floats(0.5, 9.0))
def test_the_budget_is_kept_and_nothing_affordable_at_that_size_costs_less(seed: int, n_patches: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand((1, 4, 3), generator=generator).sort(-1, descending=True).values
    size = torch.tensor([0, 4, 9]).expand(1, 4, 3)
    level = budget.allocate(cost, size, n_patches)
    spent = float(size.gather(-1, level[..., None]).sum())
    assert spent <= 4 * n_patches
    paid = float(cost.gather(-1, level[..., None]).sum())
    for other in itertools.product(range(3), repeat=4):
        index = torch.tensor(other)[None, :, None]
        if float(size.gather(-1, index).sum()) <= spent:
            assert paid <= float(cost.gather(-1, index).sum()) + 1e-5


def test_area_goes_to_the_head_whose_changes_cost_the_answer() -> None:
    moved = torch.tensor([1.0, 0.5, 0.0]).expand(1, 2, 10, 3)  # image head patch level
    size = torch.tensor([0, 5, 10]).expand(1, 2, 10, 3)
    price = torch.tensor([0.0, 1.0])[None, :, None, None]
    level = budget.allocate(price * moved, size, 5.0)
    assert torch.all(level[:, 0] == 0)
    assert torch.all(level[:, 1] == 2)


def test_each_image_has_its_own_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand((3, 6, 4), generator=generator).sort(-1, descending=True).values
    size = torch.tensor([0, 2, 5, 9]).expand(3, 6, 4)
    together = budget.allocate(cost, size, 3.0)
    alone = torch.cat([budget.allocate(cost[image : image + 1], size[image : image + 1], 3.0) for image in range(3)])
    assert torch.equal(together, alone)


def test_prices_are_divergence_per_squared_change(vit: Vit, images: Tensor) -> None:
    with torch.no_grad():
        found = budget.head_prices(vit, images)
        plain = vit.tap().read(images).log_softmax(-1)
        weights, v, _ = seen(vit, images)[1]
        boxes = budget.boxes_of_levels(weights, 1, GRID, budget.PRICE_LEVELS)
        moved = budget.output_changes(weights, v, boxes, 1, GRID)[:, 0, :, 1:].mean((0, 1)).sum()
        lost = torch.zeros(())
        for level in range(1, 4):
            bias = torch.zeros((2, 3, N + 1, N + 1))
            bias[:, 0] = windows.attention_bias(windows.masks(boxes[:, 0, :, level], GRID), 1)
            answer = vit.tap().read(images, edits=[Edit(1, bias=bias)]).log_softmax(-1)
            lost = lost + (plain.exp() * (plain - answer)).sum(-1).mean()
    assert found.shape == (3, 3)
    assert_close(found[1, 0], lost / moved, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_prices_are_the_same_in_steps_of_a_budget(
    vit: Vit, images: Tensor, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_from, sizes = Tap.run_from, []

    def spy(tap: Tap, layer: int, replay: Replay, edits: list[Edit], copies: int) -> Tensor:
        sizes.append(sum(each.bias.nbytes for each in edits if each.bias is not None))
        return run_from(tap, layer, replay, edits, copies)

    with torch.no_grad():
        together = budget.head_prices(vit, images)
        monkeypatch.setattr(Tap, "run_from", spy)
        n_bytes = rows * 4 * 3 * 16**2
        with fixed_budget(n_bytes):
            found = budget.head_prices(vit, images)
    assert_close(found, together, rtol=1e-4, atol=1e-8)
    assert max(sizes) <= n_bytes
    assert sum(sizes) == 3 * len(images) * 9 * 4 * 3 * 16**2  # each layer, image, head and level once


def test_patches_of_a_last_layer_that_only_the_class_token_reads_cost_nothing(vit: Vit, images: Tensor) -> None:
    with torch.no_grad():
        found = budget.head_prices(vit, images)
    assert_close(found[-1], torch.zeros(3), atol=1e-6, rtol=0)
    assert float(found[0].max()) > 1e-6


def test_boxes_of_shapes_have_each_shape_at_its_best_place(vit: Vit, images: Tensor) -> None:
    weights, _, _ = seen(vit, images)[1]
    boxes = budget.boxes_of_shapes(weights, 1, GRID)
    sides = boxes[..., 2:] - boxes[..., :2]
    shapes = [tuple(each) for each in sides[0, 0, 0].tolist()]
    assert shapes == [(0, 0), *itertools.product((1, 2, 3), (1, 2, 4, 5))]
    assert torch.equal(sides, sides[:1, :1, :1].expand(sides.shape))
    matrix = normalise_rows(between_patches(weights, 1))
    for level, (height, width) in enumerate(shapes[1:], start=1):
        mass = (matrix * windows.in_box(boxes[..., level, :], GRID)).sum(-1)
        places = [
            matrix.unflatten(-1, GRID)[..., top : top + height, left : left + width].sum((-1, -2))
            for top in range(GRID[0] - height + 1)
            for left in range(GRID[1] - width + 1)
        ]
        assert_close(mass, torch.stack(places).amax(0), atol=1e-5, rtol=0)


def test_changes_towards_another_target_are_distances_to_it(vit: Vit, images: Tensor) -> None:
    weights, v, out = seen(vit, images)[0]
    boxes = budget.boxes_of_shapes(weights, 1, GRID)
    target = out[:, :, 1:] + 0.1
    change = budget.output_changes(weights, v, boxes, 1, GRID, target)
    for level in (0, 3, 7):
        bias = windows.attention_bias(windows.masks(boxes[..., level, :], GRID), 1)
        _, _, masked = seen(vit, images, [Edit(0, bias=bias)])[0]
        assert_close(change[..., level], (masked[:, :, 1:] - target).square().sum(-1), atol=1e-6, rtol=1e-3)


def test_prices_of_a_model_without_classes_are_relative_changes_of_its_output() -> None:
    model = drawn_wide(timm_vit(num_classes=0))
    vit, pixels = open_vit(model, image_size=(48, 80)), torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        prices = budget.head_prices(vit, pixels)
    assert float(prices[0].min()) > 0
    assert_close(prices[-1], torch.zeros(3), atol=1e-6, rtol=0)
