"""Integral images: boxes and centres equal to sums over the patches themselves."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from vitrail.patches import field, windows
from vitrail.patches.integral import BLOCK_NUMBERS, Integral, blocks


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 7), columns=st.integers(1, 7), seed=st.integers(0, 99))
def test_the_centre_of_a_box_is_that_of_the_patches_in_it(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n_patches = rows * columns
    matrix = torch.rand((n_patches, n_patches), generator=generator)
    boxes = windows.random_boxes(
        torch.tensor([0, 0, (rows + 1) // 2, (columns + 1) // 2]).expand(n_patches, 4), (rows, columns), generator
    )
    centre = Integral(matrix, (rows, columns)).centre(boxes)
    expected = field.tendency(matrix, windows.in_box(boxes, (rows, columns)), (rows, columns))
    assert_close(centre - field.xy_positions((rows, columns)), expected, atol=1e-4, rtol=0)


def test_a_box_that_holds_nothing_has_no_centre() -> None:
    matrix = torch.zeros((2, 6))
    matrix[0, 5] = 1
    boxes = torch.tensor([[0, 0, 2, 3], [0, 0, 2, 3]])
    centre = Integral(matrix, (2, 3)).centre(boxes)
    assert_close(centre[0], torch.tensor([2.0, 1.0]))
    assert torch.isnan(centre[1]).all()


def test_ties_go_to_the_first_shape_then_topmost_then_leftmost() -> None:
    matrix = torch.full((1, 12), 1 / 16)
    boxes, held = Integral(matrix, (3, 4)).best_box([(1, 2), (2, 1)])
    assert boxes.tolist() == [[0, 0, 1, 2]]
    assert_close(held, torch.tensor([1 / 8]))


def test_a_row_of_nan_has_a_box_inside_the_grid_and_nan_in_it() -> None:
    matrix = torch.eye(12)
    matrix[5] = torch.nan
    boxes, held = Integral(matrix, (3, 4)).best_box([(1, 2), (2, 1)])
    assert torch.all((boxes >= 0) & (boxes <= torch.tensor([3, 4, 3, 4])))
    assert_close(held, torch.where(torch.arange(12) == 5, torch.nan, 1.0), equal_nan=True)


def test_blocks_cover_all_rows_once() -> None:
    rows = torch.empty((BLOCK_NUMBERS // 50 + 7, 100))
    seen = torch.zeros(len(rows))
    for part in blocks(rows):
        seen[part] += 1
    assert_close(seen, torch.ones(len(rows)))
