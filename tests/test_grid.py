"""Positions, distances and the three forms of a window, against loops over all patches; arrays and tensors."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from vitrail.grid import (
    box_masks,
    box_means,
    boxes_of_sides,
    distances,
    n_patches,
    patch_edges,
    pixels_moved,
    positions,
    sides_in_patches,
    sides_of_boxes,
    view_in_patches,
    window_masks,
)

GRIDS = st.tuples(st.integers(1, 7), st.integers(1, 7))


@given(GRIDS)
def test_patches_are_counted_row_by_row(grid: tuple[int, int]) -> None:
    expected = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    assert n_patches(grid) == len(expected)
    assert_array_equal(np.stack(positions(grid), -1), expected)
    tensors = positions(grid, torch.arange)
    assert all(isinstance(axis, torch.Tensor) for axis in tensors)
    assert_array_equal(torch.stack(tensors, -1), expected)


def test_distances_are_euclidean() -> None:
    places = [(row, column) for row in range(3) for column in range(5)]
    expected = [[((a - c) ** 2 + (b - d) ** 2) ** 0.5 for c, d in places] for a, b in places]
    assert_allclose(distances((3, 5)), expected)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (6, 4)])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_a_mask_holds_the_patches_between_the_edges_of_its_box(grid: tuple[int, int], kind: str) -> None:
    boxes = _random_boxes(grid, beyond=2)
    expected = np.array(
        [
            [top <= row < bottom and left <= column < right for row in range(grid[0]) for column in range(grid[1])]
            for top, left, bottom, right in boxes.tolist()
        ]
    )
    given, arange = (boxes, np.arange) if kind == "array" else (torch.from_numpy(boxes), torch.arange)
    assert_array_equal(box_masks(given, grid, arange), expected)
    own = np.eye(n_patches(grid), dtype=bool)
    assert_array_equal(window_masks(given, grid, arange), expected | own)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (6, 4)])
def test_sides_and_boxes_are_two_forms_of_one_window(grid: tuple[int, int]) -> None:
    boxes = _random_boxes(grid)
    for query, (top, left, bottom, right) in enumerate(boxes.tolist()):
        row, column = query // grid[1], query % grid[1]
        expected = (column - left, row - top, right - 1 - column, bottom - 1 - row)
        assert tuple(int(side[query]) for side in sides_of_boxes(boxes, grid)) == expected
    sides = np.stack(sides_of_boxes(boxes, grid), -1)
    assert_array_equal(np.stack(boxes_of_sides(sides, grid), -1), boxes)
    tensors = boxes_of_sides(torch.from_numpy(sides).float(), grid, partial(torch.arange, device="cpu"))
    assert_array_equal(torch.stack(tensors, -1), boxes)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (6, 4)])
def test_the_mean_over_a_box_is_that_of_the_patches_in_its_mask(grid: tuple[int, int]) -> None:
    boxes = _random_boxes(grid)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)  # none is empty
    boxes -= np.maximum(boxes - np.array([*grid, *grid]), 0)[:, [2, 3, 2, 3]]
    values = np.random.default_rng(1).random((2, n_patches(grid)))
    expected = np.stack([[row[mask].mean() for mask in box_masks(boxes, grid)] for row in values])
    assert_allclose(box_means(values, np.stack([boxes, boxes]), grid), expected, atol=1e-12)
    assert_allclose(box_means(values[:1], np.stack([boxes, boxes]), grid), expected[[0, 0]], atol=1e-12)
    empty = boxes.copy()
    empty[0] = 0
    assert_allclose(box_means(values, np.stack([empty, empty]), grid)[:, 1:], expected[:, 1:], atol=1e-12)
    assert np.isnan(box_means(values, np.stack([empty, empty]), grid)[:, 0]).all()
    values[1, 0] = np.nan
    assert np.isnan(box_means(values, np.stack([boxes, boxes]), grid)[1]).all()


def test_a_few_queries_give_the_rows_that_all_give() -> None:
    grid, boxes = (4, 5), _random_boxes((4, 5))
    sides = np.stack(sides_of_boxes(boxes, grid), -1)
    some = np.stack(boxes_of_sides(sides[7:9], grid, first=7), -1)
    assert_array_equal(some, boxes[7:9])
    assert_array_equal(window_masks(some, grid, first=7), window_masks(boxes, grid)[7:9])


def test_a_query_without_sides_sees_itself_alone() -> None:
    boxes = np.stack(boxes_of_sides(np.zeros((6, 4)), (2, 3)), -1)
    assert_array_equal(box_masks(boxes, (2, 3)), np.eye(6, dtype=bool))


def _random_boxes(grid: tuple[int, int], beyond: int = 0) -> np.ndarray:
    """One box for each patch, up to `beyond` patches over the border."""
    generator = np.random.default_rng(0)
    edges = [np.sort(generator.integers(-beyond, side + beyond + 1, (n_patches(grid), 2)), axis=1) for side in grid]
    return np.stack([edges[0][:, 0], edges[1][:, 0], edges[0][:, 1], edges[1][:, 1]], axis=-1)


@given(st.integers(1, 90), st.integers(1, 12))
def test_edges_of_patches_cut_a_side_in_order_and_evenly_where_they_can(n_pixels: int, n: int) -> None:
    edges = patch_edges(max(n_pixels, n), n)
    assert edges[0] == 0
    assert edges[-1] <= max(n_pixels, n)
    assert (np.diff(edges) > 0).all()
    assert len(set(np.diff(edges)[:-1].tolist())) <= 1
    assert_array_equal(patch_edges(n * 7, n), np.arange(n + 1) * 7)


@pytest.mark.parametrize(
    ("n_pixels", "n", "step"),
    [
        (60, 14, 4),  # kernels of 8 pixels, 4 apart
        (230, 14, 16),  # 6 pixels left over
        (230, 58, 4),  # filled up to 232
        (66, 17, 4),  # kernels of 7 pixels, 4 apart, filled up on both sides
    ],
)
def test_patches_are_as_wide_as_the_step_between_them(n_pixels: int, n: int, step: int) -> None:
    assert_array_equal(patch_edges(n_pixels, n)[:-1], np.arange(n) * step)


def test_the_step_that_a_model_states_places_patches_where_much_is_left_over() -> None:
    assert_array_equal(patch_edges(320, 22, 14), np.arange(23) * 14)  # 12 pixels left over
    assert_array_equal(patch_edges(250, 17, 14), np.arange(18) * 14)
    assert_array_equal(patch_edges(230, 58, 4)[-2:], [228, 230])


def test_what_is_drawn_on_the_grid_lies_on_the_pixels_of_its_patches() -> None:
    assert sides_in_patches((76, 320), (4, 22), (16, 14)) == (4.75, 320 / 14)
    assert sides_in_patches((230, 64), (58, 8), (4, 8)) == (57.5, 8)  # filled up to 232
    assert sides_in_patches((76, 76), (4, 4)) == (4, 4)
    study = {"grids": [[4, 4], None, [2, 2]], "preprocessing": {"size": [76, 64]}}
    assert view_in_patches(study, 0) == (4, 4)  # an older study
    study["patch_steps"] = [[16, 16], None, None]
    assert [view_in_patches(study, layer) for layer in (0, 2)] == [(4.75, 4), (2, 2)]


def test_pixels_move_with_their_cell_and_stay_where_there_is_none() -> None:
    size, cells = (7, 9), (2, 2)
    places = np.array([[3, 2, 0, 1], [0, 1, 2, 3]])
    moved = pixels_moved(size, cells, places, grid=(6, 4))  # patches of 1 x 2 pixels, cells of 3 x 4
    own = np.arange(63).reshape(size)
    expected = own.copy()
    for place, source in enumerate(places[0]):
        (down, across), (top, left) = divmod(place, 2), divmod(int(source), 2)
        expected[3 * down : 3 * down + 3, 4 * across : 4 * across + 4] = own[
            3 * top : 3 * top + 3, 4 * left : 4 * left + 4
        ]
    assert_array_equal(moved[0].reshape(size), expected)
    assert_array_equal(moved[1], np.arange(63))
