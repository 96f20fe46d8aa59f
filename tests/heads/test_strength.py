"""Attention strength and its company: closed forms, the published profiles, invariants, a slow reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from vitrail.errors import Unsupported
from vitrail.heads import strength as module
from vitrail.heads.strength import (
    attention_strength,
    distance_px,
    entropy_share,
    hop_distance,
    neighbours_per_hop,
    pair_mean_strength,
    reach,
    strength_entropy,
)
from vitrail.models.token_grid import TokenGrid

# Strength over hops of two heads as printed in the interface figure of Li et al. 2023 (heads.md, section 2).
PUBLISHED_L0H9 = (
    .01158, .00681, .00604, .00571, .00515, .00510, .00509,
    .00489, .00459, .00462, .00463, .00450, .00470, .00517,
)  # fmt: skip


def random_maps(n_images, n_heads, n_tokens, seed=0):
    return torch.randn(n_images, n_heads, n_tokens, n_tokens, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def embed(patch_map, prefix=0):
    """A patch x patch map as the map of one image and head, with prefix tokens that patches do not look at."""
    n = prefix + len(patch_map)
    weights = torch.zeros(1, 1, n, n)
    weights[0, 0, :prefix, :prefix] = 1 / max(prefix, 1)
    weights[0, 0, prefix:, prefix:] = patch_map
    return weights


def slow_reach(weights, grid, prefix):
    """The definitions of heads.md section 2, one weight at a time, for one map."""
    rows, columns = grid
    patches = [(r, c) for r in range(rows) for c in range(columns)]
    sums = [[0.0] * max(grid) for _ in patches]
    counts = [[0] * max(grid) for _ in patches]
    mass = moment = parked = 0.0
    for i, (ri, ci) in enumerate(patches):
        parked += sum(float(weights[prefix + i, p]) for p in range(prefix))
        for j, (rj, cj) in enumerate(patches):
            weight, hop = float(weights[prefix + i, prefix + j]), max(abs(ri - rj), abs(ci - cj))
            sums[i][hop] += weight
            counts[i][hop] += 1
            mass += weight
            moment += weight * math.hypot(ri - rj, ci - cj)
    strength = []
    for n in range(max(grid)):
        means = [s[n] / c[n] for s, c in zip(sums, counts, strict=True) if c[n]]
        strength.append(sum(means) / len(means))
    total = sum(strength)
    entropy = -sum(s / total * math.log(s / total) for s in strength if s)
    return strength, entropy, moment / mass, parked / len(patches), mass / len(patches)


def test_uniform_attention_has_the_same_strength_at_every_hop_and_the_largest_entropy():
    n_tokens = 2 + 15
    found = reach(torch.full((1, 1, n_tokens, n_tokens), 1 / n_tokens), TokenGrid((3, 5), 2))
    assert_close(found.strength, torch.full((1, 1, 5), 1 / n_tokens), rtol=1e-6, atol=0)
    assert_close(found.entropy, torch.full((1, 1), math.log(5)), rtol=1e-6, atol=0)
    assert_close(entropy_share(found.entropy, 5), torch.ones(1, 1), rtol=1e-6, atol=0)
    assert_close(found.prefix_share, torch.full((1, 1), 2 / n_tokens), rtol=1e-6, atol=0)


def test_identity_has_all_strength_at_hop_zero_and_no_entropy_and_no_distance():
    found = reach(embed(torch.eye(15), 1), TokenGrid((3, 5), 1))
    assert_close(found.strength[0, 0], torch.tensor([1.0, 0, 0, 0, 0]), rtol=1e-6, atol=0)
    assert_close(found.entropy, torch.zeros(1, 1), rtol=0, atol=1e-6)
    assert_close(found.distance, torch.zeros(1, 1), rtol=0, atol=0)
    assert_close(found.patch_mass, torch.ones(1, 1), rtol=1e-6, atol=0)


def test_looking_at_the_right_neighbour_gives_strength_at_hop_one_only():
    patch = torch.arange(15)
    inner = patch[patch % 5 < 4]
    shift = torch.zeros(15, 15)
    shift[inner, inner + 1] = 1.0
    found = reach(embed(shift), TokenGrid((3, 5)))
    counts = neighbours_per_hop((3, 5))[inner, 1]
    assert_close(found.strength[0, 0, 1], (1 / counts).sum() / 15, rtol=1e-6, atol=0)
    assert_close(found.strength[0, 0, [0, 2, 3, 4]], torch.zeros(4), rtol=0, atol=0)
    assert_close(found.distance, torch.ones(1, 1), rtol=1e-6, atol=0)


def test_entropy_of_the_published_profile_is_the_published_entropy():
    assert_close(strength_entropy(torch.tensor(PUBLISHED_L0H9)), torch.tensor(2.599), rtol=0, atol=5e-4)


def test_entropy_is_unknown_where_a_mixed_head_has_negative_strength():
    assert_close(
        strength_entropy(torch.tensor([[0.5, 0.5], [0.5, -0.1]])),
        torch.tensor([math.log(2), math.nan]),
        equal_nan=True,
    )


@pytest.mark.parametrize(("grid", "prefix"), [((3, 5), 2), ((4, 2), 0), ((1, 1), 1)])
def test_all_measures_agree_with_a_reference_that_visits_every_weight(grid, prefix):
    weights = random_maps(2, 3, prefix + grid[0] * grid[1])
    found = reach(weights, TokenGrid(grid, prefix))
    for image in range(2):
        for head in range(3):
            expected = slow_reach(weights[image, head], grid, prefix)
            for got, want in zip(found, expected, strict=True):
                assert_close(got[image, head], torch.tensor(want), rtol=1e-5, atol=1e-6)


def test_pair_means_times_pairs_sum_to_the_attention_between_patches():
    weights, tokens = random_maps(2, 3, 2 + 15), TokenGrid((3, 5), 2)
    n_pairs = neighbours_per_hop((3, 5)).sum(0)
    total = (pair_mean_strength(weights, tokens) * n_pairs).sum(-1)
    assert_close(total, weights[:, :, 2:, 2:].sum((-1, -2)), rtol=1e-5, atol=0)


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 10_000))
def test_permuting_the_images_permutes_the_results(order, seed):
    weights, tokens = random_maps(4, 2, 1 + 6, seed), TokenGrid((2, 3), 1)
    for permuted, straight in zip(reach(weights[order], tokens), reach(weights, tokens), strict=True):
        assert_close(permuted, straight[list(order)], rtol=1e-5, atol=1e-7)


@settings(max_examples=15, deadline=None)
@given(st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(0, 2), st.sampled_from([[0], [1], [0, 1]]))
def test_flipping_the_image_leaves_every_measure_as_it_is(grid, prefix, axes):
    n_patches = grid[0] * grid[1]
    flipped = torch.arange(n_patches).view(grid).flip(axes).flatten() + prefix
    order = torch.cat([torch.arange(prefix), flipped])
    weights, tokens = random_maps(1, 2, prefix + n_patches), TokenGrid(grid, prefix)
    for before, after in zip(reach(weights, tokens), reach(weights[:, :, order][..., order], tokens), strict=True):
        assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_a_matrix_too_large_to_keep_is_built_in_pieces_with_the_same_result(monkeypatch):
    weights, tokens = random_maps(2, 3, 2 + 15), TokenGrid((3, 5), 2)
    whole = reach(weights, tokens)
    monkeypatch.setattr(module, "CACHED_BYTES", 0)
    monkeypatch.setattr(module, "PIECE_BYTES", 3 * 17 * 8 * 4)
    for piecewise, at_once in zip(reach(weights, tokens), whole, strict=True):
        assert_close(piecewise, at_once, rtol=1e-5, atol=1e-7)


def test_windows_read_the_map_on_the_image_grid_with_zeros_outside_the_window():
    grid = (4, 6)
    token = torch.arange(24).view(grid).roll((-1, -1), (0, 1))  # shifted, so that some windows wrap around
    windows = token.view(2, 2, 3, 2).permute(0, 2, 1, 3).reshape(6, 4)
    weights = random_maps(2 * 6, 3, 4)
    full = torch.zeros(2, 3, 24, 24)
    for image in range(2):
        for window, slots in enumerate(windows):
            full[image][:, slots[:, None], slots] = weights[image * 6 + window]
    found = reach(weights, TokenGrid(grid, 0, windows))
    for windowed, whole in zip(found, reach(full, TokenGrid(grid)), strict=True):
        assert_close(windowed, whole, rtol=1e-5, atol=1e-6)


def test_attention_to_padding_slots_counts_for_no_distance():
    windows = ((0, 1, 2, -1), (3, 4, 5, -1))
    found = reach(torch.full((2, 1, 4, 4), 0.25), TokenGrid((2, 3), 0, torch.tensor(windows)))
    assert_close(found.patch_mass, torch.full((1, 1), 0.75), rtol=1e-6, atol=0)
    assert_close(found.strength[0, 0, 0], torch.tensor(0.25), rtol=1e-6, atol=0)


def test_hop_distance_is_the_larger_of_row_and_column_steps():
    distance = hop_distance((3, 5))
    assert distance[0, 14] == 4
    assert distance[0, 10] == 2
    assert_close(distance, distance.T)


def test_strength_alone_is_the_strength_of_reach():
    weights, tokens = random_maps(1, 2, 7), TokenGrid((2, 3), 1)
    assert_close(attention_strength(weights, tokens), reach(weights, tokens).strength, rtol=0, atol=0)


def test_bfloat16_maps_stay_within_a_percent():
    weights, tokens = random_maps(2, 3, 1 + 49), TokenGrid((7, 7), 1)
    assert_close(reach(weights.bfloat16(), tokens).strength, reach(weights, tokens).strength, rtol=1e-2, atol=0)


def test_distance_in_pixels_needs_square_patches():
    assert_close(distance_px(torch.tensor(2.0), (14, 14), (224, 224)), torch.tensor(32.0))
    with pytest.raises(Unsupported, match="no single side"):
        distance_px(torch.tensor(2.0), (14, 7), (224, 224))
