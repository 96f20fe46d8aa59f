"""Hubs: found where planted, and nowhere else."""

import pytest
import torch
from torch.testing import assert_close

from patches.planted import attention_in, planted_boxes
from vitrail.patches import windows
from vitrail.patches.hubs import find_hubs, query_share, sink_share, without_hubs
from vitrail.patches.interaction import indicator, normalise_rows


def planted_hubs(
    n_images: int, n_patches: int, n_hubs: int, strength: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all queries raised on a few patches of each image; and which."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand((n_images, n_patches), generator=generator).argsort(-1) < n_hubs
    scores = torch.randn((n_images, 3, n_patches, n_patches), generator=generator)
    return (scores + strength * chosen[:, None, None]).softmax(-1), chosen


def test_planted_hubs_are_found_and_no_others() -> None:
    attention, planted = planted_hubs(n_images=20, n_patches=196, n_hubs=6, strength=3, seed=0)
    found = find_hubs(indicator(attention, prefix=0)).hubs
    right = (found & planted).sum()
    assert float(right / found.sum()) >= 0.95
    assert float(right / planted.sum()) >= 0.95


def test_hubs_of_unequal_strength_are_found_in_rounds() -> None:
    attention, strong = planted_hubs(n_images=10, n_patches=100, n_hubs=2, strength=5, seed=1)
    weak = torch.zeros_like(strong)
    weak[:, 7] = ~strong[:, 7]
    raised = attention * torch.where(weak, 30.0, 1.0)[:, None, None]
    found = find_hubs(indicator(raised / raised.sum(-1, keepdim=True), prefix=0)).hubs
    right = (found & (strong | weak)).sum()
    assert float(right / (strong | weak).sum()) >= 0.95
    assert float(right / found.sum()) >= 0.95


def test_sinks_are_the_hubs_that_most_queries_keep_before_any_is_taken_away() -> None:
    rest = torch.rand((3, 100, 100), generator=torch.Generator().manual_seed(1))
    rest[..., [3, 40, 77]] = 0
    matrix = 0.15 * rest / rest.sum(-1, keepdim=True)
    matrix[..., [3, 40]] = 0.4
    matrix[..., 77] = 0.05
    matrix = normalise_rows(matrix)
    of_images = find_hubs(matrix)
    assert of_images.sinks.nonzero()[:, 1].tolist() == [3, 40] * 3
    assert (of_images.hubs & ~of_images.sinks).nonzero()[:, 1].tolist() == [77] * 3
    for rows, sinks, share in zip(matrix, of_images.sinks, sink_share(matrix, of_images.sinks), strict=True):
        kept = rows >= (rows.mean(1) + rows.std(1, correction=0))[:, None]
        assert (kept.float().mean(0)[sinks] > 0.5).all()
        assert float(share) == pytest.approx(float(rows[:, sinks].sum()) / len(rows), rel=1e-5)
        assert float(share) > 0.7


def test_uniform_attention_has_no_hub() -> None:
    attention = torch.full((2, 3, 50, 50), 1 / 50)
    assert not find_hubs(indicator(attention, prefix=1)).hubs.any()


def test_attention_without_preference_has_no_hub() -> None:
    attention = torch.randn((5, 3, 100, 100), generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert not find_hubs(indicator(attention, prefix=0)).hubs.any()


def test_windows_are_no_hubs() -> None:
    planted = windows.masks(planted_boxes((14, 14), (5, 5), n_images=4), (14, 14))
    assert not find_hubs(indicator(attention_in(planted, n_heads=3, prefix=1), prefix=1)).hubs.any()


def test_what_is_left_has_no_hub_columns_and_rows_that_sum_to_one() -> None:
    attention, _ = planted_hubs(n_images=3, n_patches=60, n_hubs=3, strength=4, seed=2)
    matrix = indicator(attention, prefix=0)
    before = matrix.clone()
    found = find_hubs(matrix).hubs
    rest = without_hubs(matrix, found)
    assert_close(rest.transpose(1, 2)[found], torch.zeros(int(found.sum()), 60))
    assert_close(rest.sum(-1), torch.ones(3, 60))
    assert_close(matrix, before)


def test_columns_that_are_gone_count_as_zero() -> None:
    attention, _ = planted_hubs(n_images=3, n_patches=60, n_hubs=3, strength=4, seed=2)
    matrix = indicator(attention, prefix=0)
    found = find_hubs(matrix).hubs
    there = query_share(matrix, left=~found).masked_fill(found, 0)
    assert_close(there, query_share(without_hubs(matrix, found)))


def test_an_image_is_judged_alone() -> None:
    attention, _ = planted_hubs(n_images=4, n_patches=60, n_hubs=3, strength=4, seed=3)
    matrix = indicator(attention, prefix=0)
    alone = torch.cat([find_hubs(matrix[image : image + 1]).hubs for image in range(4)])
    assert torch.equal(alone, find_hubs(matrix).hubs)


def test_kept_share_counts_the_queries_that_keep_a_patch() -> None:
    matrix = normalise_rows(torch.tensor([[[0, 9.0, 1, 1], [9.0, 0, 1, 1], [9.0, 1, 0, 1], [9.0, 1, 1, 0]]]))
    assert_close(query_share(matrix), torch.tensor([[0.75, 0.25, 0, 0]]))


def test_within_windows_only_those_who_can_see_a_patch_are_counted() -> None:
    """Two separate windows of three patches; in each all look at the first."""
    inside = torch.tensor([[0.0, 0.5, 0.5], [0.9, 0, 0.1], [0.9, 0.1, 0]])
    matrix = torch.block_diag(inside, inside)[None]
    share = query_share(matrix, reachable=torch.full((6,), 3))
    assert_close(share[0, [0, 3]], torch.full((2,), 2 / 3))
