"""How far a head looks: attention strength over hops, its entropy, mean distance, share of the prefix.

Every one of these is linear in the attention weights up to a last step on a handful of numbers per head. So they share
one matrix product: the map of a head, laid out flat, times a matrix with one column per number (`readout_matrix`).
Rows of that matrix that belong to prefix or padding tokens are zero, so a map is read where it lies and never sliced.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.errors import Unsupported

__all__ = [
    "Layout",
    "Reach",
    "attention_strength",
    "distance_px",
    "hop_distance",
    "neighbours_per_hop",
    "normalised_entropy",
    "pair_mean_strength",
    "reach",
    "strength_entropy",
]

CACHED_BYTES = 48 * 2**20
"""A readout matrix up to this size is kept for the next batch; a larger one is built piece by piece on every call."""

PIECE_BYTES = 16 * 2**20

N_EXTRA = 3
"""Columns after the hops: prefix share, patch-patch mass, distance times mass."""


@dataclass(frozen=True)
class Layout:
    """Where the tokens of an attention map lie: `prefix` tokens first, then the patches of `grid` (rows, columns).

    `windows` is for attention inside windows: for each window the token index of each slot, -1 for padding.
    """

    grid: tuple[int, int]
    prefix: int = 0
    windows: tuple[tuple[int, ...], ...] | None = None

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def n_hops(self) -> int:
        """Chebyshev distances 0 .. max(rows, columns) - 1."""
        return max(self.grid)

    def slots(self) -> Int[Tensor, "window slot"]:
        """Token index at each slot; without windows one window that holds all tokens in order."""
        if self.windows is None:
            return torch.arange(self.prefix + self.n_patches)[None]
        return torch.tensor(self.windows)


class Reach(NamedTuple):
    """What one pass over a layer's attention maps says about distance, per image and head, in float32."""

    strength: Float[Tensor, "image head hop"]
    entropy: Float[Tensor, "image head"]
    distance: Float[Tensor, "image head"]
    prefix_share: Float[Tensor, "image head"]
    patch_mass: Float[Tensor, "image head"]


def reach(weights: Float[Tensor, "batch head query key"], layout: Layout) -> Reach:
    """All measures of distance of one layer from its attention weights.

    `weights` are post-softmax; with windows the batch is image-major (image x window). Distances are in patches.

    - `strength[n]`: mean over patches that have neighbours at Chebyshev distance n of the mean weight they give such a
      neighbour. Borders clip the ring; rows are not renormalised after leaving the prefix out (Li et al. 2023).
    - `entropy`: `strength_entropy` of it.
    - `distance`: Euclidean distance between query and key, averaged with the attention between patches as weights
      (after Dosovitskiy et al. 2021, figure 7). Renormalised to the patch-patch mass, so that a head which parks most
      attention on the class token does not pass for a local one; implementations that skip this report
      `distance * patch_mass`.
    - `prefix_share`, `patch_mass`: what a patch gives to prefix tokens and to patches, mean over patches.

    With windows the map is read as the full map on the image grid that it is: zero wherever the window does not reach.
    """
    numbers = _readout(weights, layout)
    strength = numbers[..., : layout.n_hops]
    prefix_share, patch_mass, moment = numbers[..., layout.n_hops :].unbind(-1)
    return Reach(strength, strength_entropy(strength), moment / patch_mass, prefix_share, patch_mass)


def attention_strength(
    weights: Float[Tensor, "image head query key"], layout: Layout
) -> Float[Tensor, "image head hop"]:
    """Attention strength alone: mean attention weight per neighbour at each hop; see `reach`."""
    return reach(weights, layout).strength


def pair_mean_strength(
    weights: Float[Tensor, "image head query key"], layout: Layout
) -> Float[Tensor, "image head hop"]:
    """Mean weight over all ordered pairs of patches at each hop (ours; `reach` takes the mean per patch first).

    Its sum over hops, each times the number of its pairs, is the attention that patches give to patches.
    """
    numbers = _readout(weights, layout, pair_mean=True)
    return numbers[..., : layout.n_hops]


def strength_entropy(strength: Float[Tensor, "*batch hop"]) -> Float[Tensor, "*batch"]:
    """Shannon entropy in nats of strength normalised over hops: 0 (one distance) .. ln(number of hops) (all alike).

    NaN where a strength is negative (possible in heads mixed after the softmax) or all are zero. After Li et al. 2023.
    """
    share = strength / strength.sum(-1, keepdim=True)
    entropy = torch.special.entr(share).sum(-1)
    return torch.where((strength >= 0).all(-1), entropy, torch.nan)


def normalised_entropy(entropy: Float[Tensor, "*batch"], n_hops: int) -> Float[Tensor, "*batch"]:
    """Entropy as a share of the largest one, H / ln(hops), to compare grids of different size; NaN for a single hop."""
    return entropy / (math.log(n_hops) if n_hops > 1 else math.nan)


def distance_px(
    distance: Float[Tensor, "*batch"], grid: tuple[int, int], image_size: tuple[int, int]
) -> Float[Tensor, "*batch"]:
    """A distance in patches as pixels of the model's input; `grid` and `image_size` are (rows, columns).

    Raises `Unsupported` when patches are not square: then one number of pixels per patch does not exist.
    """
    side = image_size[0] / grid[0]
    if not math.isclose(side, image_size[1] / grid[1], rel_tol=1e-6):
        raise Unsupported(
            f"Distances in pixels were asked for; patches of {side:g} x {image_size[1] / grid[1]:g} px "
            f"(input {image_size}, grid {grid}) have no single side. Use distances in patches."
        )
    return distance * side


def hop_distance(grid: tuple[int, int]) -> Int[Tensor, "patch patch"]:
    """Chebyshev distance between every two patches of the grid, row-major."""
    row, column = _coordinates(grid)
    return torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())


@lru_cache(maxsize=16)
def neighbours_per_hop(grid: tuple[int, int]) -> Int[Tensor, "patch hop"]:
    """How many patches lie at each hop of each patch; rings are clipped at the border."""
    return torch.nn.functional.one_hot(hop_distance(grid), max(grid)).sum(1)


def _coordinates(grid: tuple[int, int]) -> tuple[Int[Tensor, "patch"], Int[Tensor, "patch"]]:
    patch = torch.arange(grid[0] * grid[1])
    return patch // grid[1], patch % grid[1]


def _readout(
    weights: Float[Tensor, "batch head query key"], layout: Layout, pair_mean: bool = False
) -> Float[Tensor, "image head number"]:
    """The product of all maps with the readout matrix, in one piece where that is small."""
    n_windows = 1 if layout.windows is None else len(layout.windows)
    n_images, n_heads, n_keys = weights.shape[0] // n_windows, weights.shape[1], weights.shape[3]
    if n_windows > 1:  # every window has its own rows of the matrix, so windows join the queries
        weights = weights.reshape(n_images, n_windows, *weights.shape[1:]).transpose(1, 2)
    maps = weights.reshape(n_images * n_heads, -1, n_keys)
    assert maps.shape[1:] == (layout.slots().numel(), layout.slots().shape[1]), (maps.shape, layout)
    numbers: Tensor | None = None
    for queries, matrix in _pieces(layout, pair_mean, weights.dtype, weights.device):
        part = maps[:, queries].reshape(len(maps), -1) @ matrix
        numbers = part.float() if numbers is None else numbers + part.float()
    assert numbers is not None
    return numbers.view(n_images, n_heads, -1)


def _pieces(
    layout: Layout, pair_mean: bool, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[slice, Float[Tensor, "pair number"]]]:
    n_queries, n_keys = layout.slots().numel(), layout.slots().shape[1]
    bytes_per_query = n_keys * (layout.n_hops + N_EXTRA) * dtype.itemsize
    if n_queries * bytes_per_query <= CACHED_BYTES:
        yield slice(None), _kept_matrix(layout, pair_mean, dtype, device)
        return
    step = max(1, PIECE_BYTES // bytes_per_query)
    for start in range(0, n_queries, step):
        queries = slice(start, min(start + step, n_queries))
        yield queries, readout_matrix(layout, queries, pair_mean).to(device, dtype)


@lru_cache(maxsize=8)
def _kept_matrix(
    layout: Layout, pair_mean: bool, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "pair number"]:
    return readout_matrix(layout, slice(None), pair_mean).to(device, dtype)


def readout_matrix(layout: Layout, queries: slice, pair_mean: bool = False) -> Float[Tensor, "pair number"]:
    """What a weight between a query and a key adds to each number: hops, prefix share, patch mass, distance moment.

    One row per (query, key) of the given queries (windows one after the other). Averages over neighbours and over
    patches are folded in, so a product with the flat map gives the finished mean.
    """
    slots = layout.slots()
    query = slots.flatten()[queries]
    key = slots[torch.arange(slots.numel())[queries] // slots.shape[1]]
    asks, answers = query >= layout.prefix, key >= layout.prefix
    both = asks[:, None] & answers
    rows, columns = (
        axis[(query - layout.prefix).clamp(min=0)][:, None] - axis[(key - layout.prefix).clamp(min=0)]
        for axis in _coordinates(layout.grid)
    )
    hops = torch.maximum(rows.abs(), columns.abs())
    patch = (query - layout.prefix).clamp(min=0)
    share = both / layout.n_patches
    numbers = torch.zeros(*key.shape, layout.n_hops + N_EXTRA)
    numbers.scatter_(-1, hops[..., None], (both * _hop_weight(layout.grid, patch, hops, pair_mean))[..., None])
    numbers[..., -3] = (asks[:, None] & (key >= 0) & ~answers) / layout.n_patches
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
