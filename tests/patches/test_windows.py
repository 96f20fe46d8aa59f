"""Windows: the best box of an area, against brute force and against planted boxes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from patches.planted import attention_in, neighbourhood, planted_boxes
from vitrail.errors import UsageError
from vitrail.patches import budget, integral, windows
from vitrail.patches.field import strongest_share
from vitrail.patches.hubs import find_hubs
from vitrail.patches.interaction import INDICATORS, indicator, normalise_rows


def random_indicator(n_images: int, n_patches: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalise_rows(torch.rand((n_images, n_patches, n_patches), generator=generator) ** 4)


def heaviest(matrix: Tensor, grid: tuple[int, int], n_patches: int) -> Tensor:
    """The most that any box of at most `n_patches` holds, by trying them all."""
    maps = matrix.unflatten(-1, grid)
    best = torch.zeros(matrix.shape[:-1])
    tops = itertools.combinations(range(grid[0] + 1), 2)
    for (top, bottom), (left, right) in itertools.product(tops, itertools.combinations(range(grid[1] + 1), 2)):
        if (bottom - top) * (right - left) <= n_patches:
            best = torch.maximum(best, maps[..., top:bottom, left:right].sum((-1, -2)))
    return best


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of masks, per query."""
    return (one & other).sum(-1) / (one | other).sum(-1)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), n_patches=st.integers(1, 36), seed=st.integers(0, 99))
def test_no_box_of_the_area_holds_more_than_the_best(rows: int, columns: int, n_patches: int, seed: int) -> None:
    matrix = random_indicator(2, rows * columns, seed)
    boxes, mass = windows.best_boxes(matrix, (rows, columns), n_patches)
    assert_close(mass, heaviest(matrix, (rows, columns), n_patches), atol=1e-5, rtol=0)
    assert_close((matrix * windows.in_box(boxes, (rows, columns))).sum(-1), mass, atol=1e-5, rtol=0)
    assert int(windows.areas(boxes).max()) <= n_patches


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), share=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_no_smaller_box_holds_the_share(rows: int, columns: int, share: float, seed: int) -> None:
    matrix = random_indicator(2, rows * columns, seed)
    boxes, mass = windows.smallest_boxes(matrix, (rows, columns), share)
    wanted = share * matrix.sum(-1)
    assert torch.all(mass >= wanted - 2e-5)
    size = windows.areas(boxes)
    for n_patches in range(1, rows * columns):
        too_small = size > n_patches
        assert torch.all(heaviest(matrix, (rows, columns), n_patches)[too_small] < wanted[too_small])


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), share=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_the_smallest_area_is_that_of_the_smallest_box(rows: int, columns: int, share: float, seed: int) -> None:
    matrix = random_indicator(2, rows * columns, seed)
    maps = matrix.unflatten(-1, (rows, columns))
    found = windows.smallest_areas(matrix, (rows, columns), share)
    boxes = [
        (top, left, bottom, right)
        for top, bottom in itertools.combinations(range(rows + 1), 2)
        for left, right in itertools.combinations(range(columns + 1), 2)
    ]
    sums = torch.stack([maps[..., top:bottom, left:right].sum((-1, -2)) for top, left, bottom, right in boxes])
    areas = torch.tensor([(bottom - top) * (right - left) for top, left, bottom, right in boxes]).view(-1, 1, 1)
    enough = sums >= share * matrix.sum(-1) - integral.ROUNDING
    expected = torch.where(enough, areas, rows * columns).amin(0).float()
    empty = matrix.sum(-1) == 0
    assert_close(found, expected.masked_fill(empty, torch.nan), equal_nan=True)


def test_attention_that_carries_gradients_is_read_like_any_other() -> None:
    """A tap outside `torch.no_grad` gives such attention, and whoever calls these functions by hand has it."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.rand((2, 3, 17, 17), generator=generator).softmax(-1)
    v, out = torch.rand((2, 2, 3, 17, 5), generator=generator)
    carrying = plain.clone().requires_grad_() * 1
    for name in INDICATORS:
        given = (
            {"v": v, "out": out} if name in ("value", "removal") else {"gradient": plain} if name == "gradient" else {}
        )
        matrix, same = indicator(plain, 1, name, **given), indicator(carrying, 1, name, **given)
        assert_close(same.detach(), matrix, rtol=0, atol=0)
        for found in (windows.best_boxes, windows.smallest_boxes):
            share = 4 if found is windows.best_boxes else 0.5
            assert_close(found(same, (4, 4), share), found(matrix, (4, 4), share), rtol=0, atol=0)
        assert_close(windows.smallest_areas(same, (4, 4), 0.5), windows.smallest_areas(matrix, (4, 4), 0.5))
        assert_close(strongest_share(same, 0.5), strongest_share(matrix, 0.5))
        assert torch.equal(find_hubs(same).hubs, find_hubs(matrix).hubs)
    levels = budget.boxes_of_levels(carrying, 1, (4, 4))
    assert torch.equal(levels, budget.boxes_of_levels(plain, 1, (4, 4)))
    changes = budget.output_changes(carrying, v, levels, 1, (4, 4))
    assert_close(changes.detach(), budget.output_changes(plain, v, levels, 1, (4, 4)))
    assert torch.equal(budget.boxes_of_shapes(carrying, 1, (4, 4)), budget.boxes_of_shapes(plain, 1, (4, 4)))


@pytest.mark.parametrize(("grid", "shape"), [((14, 14), (7, 7)), ((14, 14), (4, 12)), ((9, 16), (6, 6))])
def test_planted_windows_are_found(grid: tuple[int, int], shape: tuple[int, int]) -> None:
    planted = windows.masks(planted_boxes(grid, shape, n_images=2), grid)
    matrix = indicator(attention_in(planted, n_heads=3, prefix=1), prefix=1)
    boxes, _ = windows.best_boxes(matrix, grid, shape[0] * shape[1])
    assert float(overlap(windows.masks(boxes, grid), planted).mean()) >= 0.9


def test_blocks_of_the_search_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_indicator(2, 30, seed=3)
    whole = windows.best_boxes(matrix, (5, 6), 8)
    monkeypatch.setattr(integral, "BLOCK_NUMBERS", 100)
    assert_close(windows.best_boxes(matrix, (5, 6), 8), whole)


@pytest.mark.parametrize("radius", [1, 2])
def test_windows_of_a_known_neighbourhood_have_exactly_its_size(radius: int) -> None:
    grid = (7, 8)
    attention = neighbourhood(grid, radius)
    boxes, _ = windows.smallest_boxes(indicator(attention[None, None], prefix=0), grid, 1.0)
    assert torch.equal(windows.masks(boxes, grid)[0], attention > 0)


def test_shared_areas_keep_to_the_budget_and_hold_more() -> None:
    grid = (8, 8)
    spread = torch.linspace(0.2, 6, 64)[:, None]
    matrix = normalise_rows((torch.randn((3, 64, 64), generator=torch.Generator().manual_seed(0)) * spread).exp())
    boxes, mass = windows.shared_boxes(matrix, grid, 16, [2, 4, 8, 12, 16, 24, 32, 64])
    _, alone = windows.best_boxes(matrix, grid, 16)
    assert torch.all(windows.areas(boxes).float().mean(-1) <= 16)
    assert torch.all(mass.mean(-1) >= alone.mean(-1))


def test_controls_keep_shape_and_lie_inside_the_grid() -> None:
    grid = (6, 9)
    boxes, _ = windows.best_boxes(random_indicator(2, 54, seed=5), grid, 12)
    for control in (
        windows.centred_boxes(boxes, grid),
        windows.random_boxes(boxes, grid, torch.Generator().manual_seed(0)),
    ):
        assert torch.equal(control[..., 2:] - control[..., :2], boxes[..., 2:] - boxes[..., :2])
        assert int(control[..., :2].min()) >= 0
        assert torch.all(control[..., 2:] <= torch.tensor(grid))


def test_a_random_box_may_lie_anywhere() -> None:
    boxes = torch.tensor([0, 0, 2, 2]).expand(500, 16, 4)
    drawn = windows.random_boxes(boxes, (4, 4), torch.Generator().manual_seed(0))
    count = torch.bincount((drawn[..., 0] * 3 + drawn[..., 1]).flatten(), minlength=9)
    assert_close(count / count.sum(), torch.full((9,), 1 / 9), atol=0.02, rtol=0)


def test_a_centred_box_holds_its_query() -> None:
    boxes, _ = windows.best_boxes(random_indicator(1, 25, seed=2), (5, 5), 6)
    inside = windows.in_box(windows.centred_boxes(boxes, (5, 5)), (5, 5))
    assert torch.all(inside.diagonal(dim1=-2, dim2=-1))


def test_masks_open_the_query_itself_and_complements_close_the_box() -> None:
    boxes, _ = windows.best_boxes(random_indicator(1, 25, seed=2), (5, 5), 6)
    inside, closed = windows.in_box(boxes, (5, 5)), windows.complements(boxes, (5, 5))
    own = torch.eye(25, dtype=torch.bool)
    assert torch.equal(windows.masks(boxes, (5, 5)), inside | own)
    assert torch.equal(closed, ~inside | own)


def test_sides_are_distances_from_the_query() -> None:
    boxes = torch.tensor([[1, 2, 3, 6]]).expand(24, 4)  # rows 1..2, columns 2..5 of a 4 x 6 grid
    of_patch = windows.sides(boxes, (4, 6)).tolist()
    assert of_patch[1 * 6 + 3] == [1, 0, 2, 1]
    assert of_patch[0] == [-2, -1, 5, 2]


@pytest.mark.parametrize(("grid", "n_patches"), [((8, 8), 16), ((7, 9), 15), ((14, 14), 49)])
def test_equal_boxes_are_told_by_the_rule_and_not_by_rounding(grid: tuple[int, int], n_patches: int) -> None:
    n = grid[0] * grid[1]
    ranked = torch.tensor(
        [
            (top, left, top + height, left + width)
            for height, width in windows.shapes_of_area(grid, n_patches)
            for top in range(grid[0] - height + 1)
            for left in range(grid[1] - width + 1)
        ]
    )
    others = ~torch.eye(n, dtype=torch.bool)  # even attention: what a box holds is a count
    row, column = torch.arange(n) // grid[1], torch.arange(n) % grid[1]
    top, left, bottom, right = ranked[:, :, None].unbind(1)
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    counts = others.double() @ inside.double().T
    first = torch.as_tensor(counts.numpy().argmax(1))
    boxes, _ = windows.best_boxes(others / (n - 1), grid, n_patches)
    assert torch.equal(boxes, ranked[first])


def test_a_query_without_interactions_has_an_empty_box_and_sees_itself_alone() -> None:
    matrix = random_indicator(2, 20, seed=3)
    matrix[1, 7] = 0
    boxes, mass = windows.best_boxes(matrix, (4, 5), 6)
    empty = windows.areas(boxes) == 0
    assert torch.equal(empty, matrix.sum(-1) == 0)
    assert float(mass[1, 7]) == 0
    assert windows.masks(boxes, (4, 5))[1, 7].nonzero().tolist() == [[7]]


def test_top_keys_are_the_strongest() -> None:
    matrix = random_indicator(1, 20, seed=4)
    mask = windows.top_keys(matrix, torch.full((1, 20), 5))
    chosen = mask & ~torch.eye(20, dtype=torch.bool)
    assert torch.all(chosen.sum(-1) == 5)
    weakest_in = matrix.masked_fill(~chosen, 2).amin(-1)
    strongest_out = matrix.masked_fill(mask, -1).amax(-1)
    assert torch.all(weakest_in >= strongest_out)


def test_sinks_are_open_to_all_within_the_area_and_the_box_looks_at_the_rest() -> None:
    grid = (14, 14)
    planted = windows.masks(planted_boxes(grid, (6, 6), n_images=2), grid)
    matrix = indicator(attention_in(planted, n_heads=3, prefix=0), prefix=0)
    sinks = torch.tensor([0, 13, 182, 195])
    matrix[..., sinks] += 0.2
    boxes, mask = windows.boxes_and_sinks(normalise_rows(matrix), grid, 40, 4)
    assert torch.all(mask[..., sinks])
    assert int(mask.sum(-1).max()) <= 41
    assert float(overlap(windows.masks(boxes, grid), planted).mean()) >= 0.85


def test_prefix_rows_and_columns_stay_open() -> None:
    bias = windows.attention_bias(torch.eye(4, dtype=torch.bool)[None], prefix=2)
    assert bias.shape == (1, 6, 6)
    assert torch.all(bias[:, :2] == 0)
    assert torch.all(bias[:, :, :2] == 0)
    assert torch.equal(bias[0, 2:, 2:] == 0, torch.eye(4, dtype=torch.bool))


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_a_share_of_no_meaning_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        windows.n_patches_of(share, (14, 14))


@pytest.mark.parametrize("n_patches", [0, -1])
def test_a_box_of_no_patch_is_refused(n_patches):
    with pytest.raises(UsageError, match="cannot be asked for"):
        windows.best_boxes(torch.rand(2, 16, 16), (4, 4), n_patches)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("search", [windows.smallest_boxes, windows.smallest_areas])
def test_a_box_that_holds_no_share_is_refused(search, share):
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        search(torch.rand(2, 16, 16), (4, 4), share)
