"""How far a head looks: attention strength over hops, its entropy, mean distance, share of the prefix.

Every one of these is linear in the attention weights up to a last step on a handful of numbers per head. So they share
one matrix product: the map of a head, laid out flat, times a matrix with one column per number (`_readout_matrix`).
Rows of that matrix that belong to prefix or padding tokens are zero, so a map is read where it lies and never sliced.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.errors import Unsupported
from vitrail.grid import positions
from vitrail.models.token_grid import TokenGrid
from vitrail.tap.budget import budget_of

__all__ = [
    "Reach",
    "attention_strength",
    "count_hops",
    "distance_px",
    "entropy_share",
    "hop_distance",
    "neighbours_per_hop",
    "pair_mean_strength",
    "reach",
    "strength_entropy",
]

CACHED_BYTES = 48 * 2**20
"""A readout matrix up to this size is kept for the next batch; a larger one is built piece by piece on every call."""

PIECE_BYTES = 16 * 2**20
"""Size of such a piece: large enough for the product to be as fast as in one."""

N_EXTRA = 3
"""Columns after the hops: prefix share, patch-patch mass, distance times mass."""


class Reach(NamedTuple):
    """Measures of distance of a layer's attention maps, per image and head, in float32; see `reach`."""

    strength: Float[Tensor, "image head hop"]
    entropy: Float[Tensor, "image head"]
    distance: Float[Tensor, "image head"]
    prefix_share: Float[Tensor, "image head"]
    patch_mass: Float[Tensor, "image head"]


def reach(weights: Float[Tensor, "batch head query key"], tokens: TokenGrid) -> Reach:
    """All measures of distance of one layer from its attention weights.

    With windows the map is read as the full map on the image grid that it is: zero wherever the window does not reach.

    Args:
        weights: post-softmax; with windows the batch is image-major (image x window).
        tokens: where the tokens of the map lie.

    Returns:
        Per image and head:

        - `strength[n]`, 0 .. 1: mean over patches that have neighbours at Chebyshev distance n of the mean weight they
          give such a neighbour. Borders clip the ring; rows are not renormalised after leaving the prefix out (Li et
          al. 2023).
        - `entropy`: `strength_entropy` of it, nats.
        - `distance`, patches: Euclidean distance between query and key, averaged with the attention between patches as
          weights (after Dosovitskiy et al. 2021, figure 7). Renormalised to the patch-patch mass, so that a head which
          parks most attention on the class token does not pass for a local one; implementations that skip this report
          `distance * patch_mass`.
        - `prefix_share`, `patch_mass`, 0 .. 1: what a patch gives to prefix tokens and to patches, mean over patches.
    """
    numbers = _readout(weights, tokens)
    strength = numbers[..., : count_hops(tokens.grid)]
    prefix_share, patch_mass, moment = numbers[..., count_hops(tokens.grid) :].unbind(-1)
    return Reach(strength, strength_entropy(strength), moment / patch_mass, prefix_share, patch_mass)


def attention_strength(
    weights: Float[Tensor, "image head query key"], tokens: TokenGrid
) -> Float[Tensor, "image head hop"]:
    """Attention strength alone: mean attention weight per neighbour at each hop.

    Args:
        weights: as for `reach`.
        tokens: where the tokens of the map lie.

    Returns:
        `strength` of `reach`, 0 .. 1.
    """
    return reach(weights, tokens).strength


def pair_mean_strength(
    weights: Float[Tensor, "image head query key"], tokens: TokenGrid
) -> Float[Tensor, "image head hop"]:
    """Mean weight over all ordered pairs of patches at each hop (ours; `reach` takes the mean per patch first).

    Its sum over hops, each times the number of its pairs, is the attention that patches give to patches.

    Args:
        weights: as for `reach`.
        tokens: where the tokens of the map lie.

    Returns:
        Mean weights, 0 .. 1.
    """
    numbers = _readout(weights, tokens, pair_mean=True)
    return numbers[..., : count_hops(tokens.grid)]


def strength_entropy(strength: Float[Tensor, "*batch hop"]) -> Float[Tensor, "*batch"]:
    """Shannon entropy of strength normalised over hops; low: one distance, high: all distances alike.

    Source: after Li et al. 2023.

    Args:
        strength: mean weight per neighbour at each hop.

    Returns:
        Nats, 0 .. ln(number of hops); NaN where a strength is negative (possible in heads mixed after the softmax) or
        all are zero.
    """
    share = strength / strength.sum(-1, keepdim=True)
    entropy = torch.special.entr(share).sum(-1)
    return torch.where((strength >= 0).all(-1), entropy, torch.nan)


def entropy_share(entropy: Float[Tensor, "*batch"], n_hops: int) -> Float[Tensor, "*batch"]:
    """Entropy as a share of the largest one, H / ln(hops), to compare grids of different size.

    Args:
        entropy: nats.
        n_hops: number of hops it was taken over.

    Returns:
        0 .. 1; NaN for a single hop.
    """
    return entropy / (math.log(n_hops) if n_hops > 1 else math.nan)


def distance_px(
    distance: Float[Tensor, "*batch"], grid: tuple[int, int], image_size: tuple[int, int]
) -> Float[Tensor, "*batch"]:
    """A distance in patches as pixels of the model's input.

    Args:
        distance: in patches.
        grid: (rows, columns) of patches.
        image_size: (rows, columns) of pixels.

    Returns:
        The distance in pixels.

    Raises:
        Unsupported: patches that are not square have no single number of pixels.
    """
    side = image_size[0] / grid[0]
    if not math.isclose(side, image_size[1] / grid[1], rel_tol=1e-6):
        raise Unsupported(
            f"Distances in pixels were asked for; patches of {side:g} x {image_size[1] / grid[1]:g} px "
            f"(input {image_size}, grid {grid}) have no single side. Use distances in patches."
        )
    return distance * side


def count_hops(grid: tuple[int, int]) -> int:
    """Number of Chebyshev distances on a grid, 0 .. larger side - 1.

    Args:
        grid: (rows, columns) of patches.

    Returns:
        The larger side.
    """
    return max(grid)


def hop_distance(grid: tuple[int, int]) -> Int[Tensor, "patch patch"]:
    """Chebyshev distance between every two patches of the grid.

    Args:
        grid: (rows, columns) of patches.

    Returns:
        Hops, 0 .. larger side - 1, patches in raster order.
    """
    row, column = positions(grid, torch.arange)
    return torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())


@lru_cache(maxsize=16)
def neighbours_per_hop(grid: tuple[int, int]) -> Int[Tensor, "patch hop"]:
    """Number of patches at each hop of each patch; rings are clipped at the border.

    Args:
        grid: (rows, columns) of patches.

    Returns:
        Counts, patches in raster order.
    """
    hop = torch.arange(max(grid))
    sides = [
        (axis[:, None] + hop).clamp(max=size - 1) - (axis[:, None] - hop).clamp(min=0) + 1
        for axis, size in zip(positions(grid, torch.arange), grid, strict=True)
    ]
    up_to = sides[0] * sides[1]  # patches of the square of so many hops, as far as the grid goes
    return torch.diff(up_to, dim=1, prepend=torch.zeros(len(up_to), 1, dtype=up_to.dtype))


def _slots(tokens: TokenGrid) -> Int[Tensor, "window slot"]:
    """The token in each slot; without windows one window that holds all tokens in order."""
    return torch.arange(tokens.n_tokens)[None] if tokens.slots is None else tokens.slots


def _readout(
    weights: Float[Tensor, "batch head query key"], tokens: TokenGrid, pair_mean: bool = False
) -> Float[Tensor, "image head number"]:
    """The product of all maps with the readout matrix, in one piece where that is small."""
    n_windows = 1 if tokens.slots is None else len(tokens.slots)
    n_images, n_heads, n_keys = weights.shape[0] // n_windows, weights.shape[1], weights.shape[3]
    if n_windows > 1:  # every window has its own rows of the matrix, so windows join the queries
        weights = weights.reshape(n_images, n_windows, *weights.shape[1:]).transpose(1, 2)
    maps = weights.reshape(n_images * n_heads, -1, n_keys)
    assert maps.shape[1:] == (_slots(tokens).numel(), _slots(tokens).shape[1]), (maps.shape, tokens)
    numbers: Tensor | None = None
    for queries, matrix in _pieces(tokens, pair_mean, weights.dtype, weights.device):
        part = maps[:, queries].reshape(len(maps), -1) @ matrix
        numbers = part.float() if numbers is None else numbers + part.float()
    assert numbers is not None
    return numbers.view(n_images, n_heads, -1)


def _pieces(
    tokens: TokenGrid, pair_mean: bool, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[slice, Float[Tensor, "pair number"]]]:
    n_queries, n_keys = _slots(tokens).numel(), _slots(tokens).shape[1]
    bytes_per_query = n_keys * (count_hops(tokens.grid) + N_EXTRA) * dtype.itemsize
    budget = budget_of(device)
    if n_queries * bytes_per_query <= budget.bytes_for(CACHED_BYTES):
        slots = None if tokens.slots is None else tuple(map(tuple, tokens.slots.tolist()))
        yield slice(None), _cached_matrix(tokens.grid, tokens.n_prefix, slots, pair_mean, dtype, device)
        return
    step = max(1, budget.bytes_for(PIECE_BYTES) // bytes_per_query)
    for start in range(0, n_queries, step):
        queries = slice(start, min(start + step, n_queries))
        yield queries, _readout_matrix(tokens, queries, pair_mean).to(device, dtype)


@lru_cache(maxsize=8)
def _cached_matrix(
    grid: tuple[int, int],
    n_prefix: int,
    slots: tuple[tuple[int, ...], ...] | None,
    pair_mean: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, "pair number"]:
    """Cached by value: layers alike share one matrix, though each has its own `TokenGrid`."""
    tokens = TokenGrid(grid, n_prefix, None if slots is None else torch.tensor(slots))
    return _readout_matrix(tokens, slice(None), pair_mean).to(device, dtype)


def _readout_matrix(tokens: TokenGrid, queries: slice, pair_mean: bool = False) -> Float[Tensor, "pair number"]:
    """What a weight between a query and a key adds to each number: hops, prefix share, patch mass, distance moment.

    One row per (query, key) of the given queries (windows one after the other). Averages over neighbours and over
    patches are folded in, so a product with the flat map gives the finished mean.
    """
    slots = _slots(tokens)
    query = slots.flatten()[queries]
    key = slots[torch.arange(slots.numel())[queries] // slots.shape[1]]
    from_patch, to_patch = query >= tokens.n_prefix, key >= tokens.n_prefix
    both = from_patch[:, None] & to_patch
    rows, columns = (
        axis[(query - tokens.n_prefix).clamp(min=0)][:, None] - axis[(key - tokens.n_prefix).clamp(min=0)]
        for axis in positions(tokens.grid, torch.arange)
    )
    hops = torch.maximum(rows.abs(), columns.abs())
    patch = (query - tokens.n_prefix).clamp(min=0)
    share = both / tokens.n_patches
    numbers = torch.zeros(*key.shape, count_hops(tokens.grid) + N_EXTRA)
    numbers.scatter_(-1, hops[..., None], (both * _hop_weight(tokens.grid, patch, hops, pair_mean))[..., None])
    numbers[..., -3] = (from_patch[:, None] & (key >= 0) & ~to_patch) / tokens.n_patches
    numbers[..., -2] = share
    numbers[..., -1] = share * torch.hypot(rows.float(), columns.float())
    return numbers.flatten(0, 1)


def _hop_weight(
    grid: tuple[int, int], patch: Int[Tensor, "query"], hops: Int[Tensor, "query key"], pair_mean: bool
) -> Float[Tensor, "query key"]:
    """1 / (neighbours of the patch at this hop x patches that have any); for the pair mean 1 / pairs at this hop."""
    count = neighbours_per_hop(grid)
    if pair_mean:
        return 1.0 / count.sum(0)[hops]
    has_any: Bool[Tensor, "patch hop"] = count > 0
    return 1.0 / (count[patch].gather(1, hops).clamp(min=1) * has_any.sum(0)[hops])
