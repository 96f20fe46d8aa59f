"""Responsive fields: tendencies point where the interactions are, and turn with the image."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from patches.planted import attention_in, planted_boxes
from vitrail.patches import field, windows
from vitrail.patches.hubs import find_hubs, without_hubs
from vitrail.patches.interaction import indicator, normalise_rows

GRID = (6, 8)
N = GRID[0] * GRID[1]
OPEN = torch.ones((N, N), dtype=torch.bool)


def any_indicator(seed: int) -> Tensor:
    return normalise_rows(torch.rand((2, N, N), generator=torch.Generator().manual_seed(seed)) ** 4)


def flipped(matrix: Tensor) -> Tensor:
    """The same interactions seen in a mirror: queries and keys swap left and right."""
    order = torch.arange(N).view(GRID).flip(1).flatten()
    return matrix[:, order][:, :, order]


def test_tendency_points_at_a_planted_window() -> None:
    grid = (14, 14)
    boxes = planted_boxes(grid, (5, 5), n_images=2)
    planted = windows.masks(boxes, grid)
    matrix = indicator(attention_in(planted, n_heads=3, prefix=1, inside=4), prefix=1)
    found, _ = windows.best_boxes(matrix, grid, 25)
    tendency = field.tendency(matrix, windows.masks(found, grid), grid)
    centre = torch.stack([(boxes[..., 1] + boxes[..., 3] - 1) / 2, (boxes[..., 0] + boxes[..., 2] - 1) / 2], -1)
    known = centre - field.xy_positions(grid)
    cosine = torch.nn.functional.cosine_similarity(tendency, known, dim=-1)
    apart = torch.linalg.vector_norm(known, dim=-1) >= 1  # a window around its query pulls nowhere
    assert float(cosine[apart].mean()) >= 0.9


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99))
def test_flipping_the_image_flips_tendencies(seed: int) -> None:
    matrix = any_indicator(seed)
    there = field.tendency(matrix, OPEN, GRID).view(2, *GRID, 2)
    mirrored = field.tendency(flipped(matrix), OPEN, GRID).view(2, *GRID, 2)
    assert_close(mirrored.flip(2), there * torch.tensor([-1.0, 1.0]), atol=1e-5, rtol=0)


def test_tendency_is_in_patches_x_right_y_down() -> None:
    matrix = torch.zeros((N, N))
    matrix[0, 2 * 8 + 3] = 1
    matrix[1, 1] = 0
    tendency = field.tendency(matrix, OPEN, GRID)
    assert_close(tendency[0], torch.tensor([3.0, 2.0]))
    assert torch.isnan(tendency[1]).all()


def test_tendency_sees_only_what_lies_in_the_window() -> None:
    matrix = torch.zeros((N, N))
    matrix[0, [1, 5]] = 0.5
    mask = torch.zeros((N, N), dtype=torch.bool)
    mask[0, 1] = True
    assert_close(field.tendency(matrix, mask, GRID)[0], torch.tensor([1.0, 0.0]))


def test_the_strongest_patches_are_as_many_as_it_takes_to_hold_the_share() -> None:
    matrix = any_indicator(0)
    share = field.strongest_share(matrix, 0.5)
    for image, query in ((0, 0), (1, 7), (1, N - 1)):
        row, total, count = sorted(matrix[image, query].tolist(), reverse=True), 0.0, 0
        while total < 0.5 * sum(row):
            total, count = total + row[count], count + 1
        assert float(share[image, query]) == pytest.approx(count / N)


def test_far_sinks_make_a_large_box_of_few_patches() -> None:
    matrix = torch.full((1, N), 0.3 / N)
    matrix[0, [0, 7, N - 8, N - 1]] += 0.175  # the four corners
    assert_close(field.strongest_share(matrix, 0.5), torch.tensor([3 / N]))
    two_corners_and_half_of_the_rest = torch.tensor([N / 2])
    assert_close(windows.smallest_areas(matrix, GRID, 0.5), two_corners_and_half_of_the_rest)


def test_rows_without_mass_have_no_field() -> None:
    empty = torch.zeros((1, N))
    assert torch.isnan(field.strongest_share(empty, 0.5)).all()
    assert torch.isnan(windows.smallest_areas(empty, GRID, 0.5)).all()


def test_interaction_distance_is_euclidean() -> None:
    matrix = torch.zeros((N, N))
    matrix[0, 2 * 8 + 3], matrix[0, 1] = 0.5, 0.5
    assert_close(field.interaction_distance(matrix, GRID)[0], torch.tensor((math.hypot(3, 2) + 1) / 2))


def test_agreement_is_one_for_one_direction_and_small_for_directions_at_random() -> None:
    lengths = torch.rand((1, 50, 1)) + 0.1
    assert_close(field.agreement(lengths * torch.tensor([0.6, -0.8])), torch.ones(1))
    angle = torch.rand((4, 1000), generator=torch.Generator().manual_seed(0)) * 2 * math.pi
    assert float(field.agreement(torch.stack([angle.cos(), angle.sin()], -1)).max()) < 0.1


def test_agreement_leaves_undefined_tendencies_out() -> None:
    tendencies = torch.tensor([[[1.0, 0.0], [torch.nan, torch.nan], [0.0, 0.0]]])
    assert_close(field.agreement(tendencies), torch.ones(1))


def test_interior_leaves_the_border_out() -> None:
    inside = field.interior(GRID, 2).view(GRID)
    assert int(inside.sum()) == 2 * 4
    assert bool(inside[2:4, 2:6].all())


def test_a_shuffled_indicator_has_the_same_values_in_each_row() -> None:
    matrix = any_indicator(0)
    null = field.shuffle_rows(matrix, torch.Generator().manual_seed(0))
    assert_close(null.sort(-1).values, matrix.sort(-1).values)
    assert_close(null.diagonal(dim1=-2, dim2=-1), torch.zeros(2, N))
    assert float((null != matrix).float().mean()) > 0.9


def test_hubs_draw_tendencies_and_taking_them_away_gives_the_windows_back() -> None:
    grid = (14, 14)
    boxes = planted_boxes(grid, (5, 5), n_images=2)
    planted = windows.masks(boxes, grid)
    scores = 3.0 * planted
    hub = torch.tensor([0, 1, 14, 15])  # one corner
    scores[..., hub] += 6
    matrix = indicator(scores.softmax(-1)[:, None], prefix=0)
    found = find_hubs(matrix).hubs
    assert torch.equal(found.nonzero()[:, 1], hub.repeat(2))
    centre = torch.stack([(boxes[..., 1] + boxes[..., 3] - 1) / 2, (boxes[..., 0] + boxes[..., 2] - 1) / 2], -1)
    known = centre - field.xy_positions(grid)
    apart = torch.linalg.vector_norm(known, dim=-1) >= 2
    cosine = []
    for each in (matrix, without_hubs(matrix, found)):
        best, _ = windows.best_boxes(each, grid, 25)
        pull = field.tendency(each, windows.masks(best, grid), grid)
        cosine.append(float(torch.nn.functional.cosine_similarity(pull, known, dim=-1)[apart].mean()))
    assert cosine[0] < 0.7
    assert cosine[1] >= 0.9
