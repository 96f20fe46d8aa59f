"""Windows as block-sparse attention: FlexAttention skips blocks of keys that no query of a block may see.

A dense mask saves no time, it only closes what was computed. Here the cost follows the windows' area, in blocks of
`BLOCK` tokens. Three things make that pay:

- Patches stand in tiles of 8 x 16 instead of rows (`TileOrder`), so that a block of tokens is compact on the grid.
- Which blocks are open follows in closed form from the bounding boxes of blocks and of their windows: no cell of the
  attention matrix is evaluated, and blocks that every query sees whole need no rule (`block_mask`).
- Within the other blocks the rule computes where a key lies from its index, and reads one packed number a query.

Soft edges need no rounding for it: a row or column of patches that a window lets through by less than the model's `cut`
is closed, a patch or so beyond where rounding would close it, and what soft edges add to the scores of the others is
looked up by the key's row and column. The answers are those of the dense mask. A model without a cut is cut at `CUT`,
which changes its answers as far as it has learnt to look through its windows.

`tile_windows` goes further: the queries of a block share their mean window, snapped to whole blocks. No block needs a
rule then, and as much is computed as windows have area; the answer changes a little.

On a GPU the kernel is compiled. Uncompiled, and on a CPU, it gives the same numbers slowly: that is how it is tested.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from math import log
from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vitrail.errors import UsageError
from vitrail.grid import Grid
from vitrail.wint.model import Attention, FixedWindows, WindowHead, round_sides, soft_edges

__all__ = [
    "BLOCK",
    "CUT",
    "TileOrder",
    "attend",
    "block_mask",
    "block_sparse",
    "hard_edges",
    "open_share",
    "soft_reach",
    "sparse_attention",
    "tile_order",
    "window_mode",
]

BLOCK = 128
"""Tokens of a block, of queries and of keys: FlexAttention's own default, and the size its kernels are tuned for."""

TILE_ROWS = 8
"""Rows of patches in a tile; with 128 tokens it is then 16 columns wide. A kernel of 128 tokens has no squarer tile
whose sides are powers of two."""

CUT = 1e-3
"""How open a row or column of patches must be at least for soft windows to be seen in blocks."""

PACKED_SIDE = 256
"""Grids up to this many rows and columns: the four edges of a window share one 32-bit number."""


@dataclass(frozen=True, eq=False)
class TileOrder:
    """The order of tokens in which blocks are compact, and where each block lies.

    Strips of eight rows are walked column by column, every second strip backwards. So each run of 128 patches is a tile
    of 8 x 16, or at the turn of two strips about one of 16 x 8, whatever the grid's width. Prefix tokens come last.

    order: the token at each position. inverse: the position of each token. patch: the patch at each position (counted
    without the prefix), the last one repeated up to whole blocks. corner: its edges, and limit: the grid's, as
    `_edges` has them. box_near, box_far: of each block (first column, first row, minus last column, minus last row) and
    (last column, last row, minus first column, minus first row). has_prefix: blocks with a prefix token. only_patches:
    blocks full of patches. only_tokens: blocks full of tokens.
    """

    order: Int[Tensor, "token"]
    inverse: Int[Tensor, "token"]
    patch: Int[Tensor, "position"]
    corner: Float[Tensor, "4 position"]
    limit: Float[Tensor, "4 1"]
    box_near: Float[Tensor, "4 block"]
    box_far: Float[Tensor, "4 block"]
    has_prefix: Bool[Tensor, "block"]
    only_patches: Bool[Tensor, "block"]
    only_tokens: Bool[Tensor, "block"]


@lru_cache(maxsize=16)
def tile_order(grid: Grid, prefix: int, block: int = BLOCK, device: torch.device | str = "cpu") -> TileOrder:
    """The order of `prefix` prefix tokens and a grid of patches in tiles.

    Args:
        grid: rows and columns of patches, at most 256 each.
        prefix: prefix tokens that stand before the patches in the model's order.
        block: tokens of a block.
        device: where the tensors are to be.

    Returns:
        The order, kept for the next call.

    Raises:
        UsageError: the grid has more than 256 rows or columns.
    """
    if max(grid) > PACKED_SIDE:
        raise UsageError(f"Block-sparse attention fits grids of up to {PACKED_SIDE} patches a side, not {grid}.")
    n_patches = grid[0] * grid[1]
    n_tokens = n_patches + prefix
    n_blocks = -(-n_tokens // block)
    row, column = _place_of_patch(torch.arange(n_blocks * block).clamp(max=n_patches - 1), grid)
    patch = row * grid[1] + column
    order = torch.cat([prefix + patch[:n_patches], torch.arange(prefix)])
    corner = torch.stack([column, row, -column, -row]).float()
    near = corner.unflatten(1, (n_blocks, block)).amin(2)
    far = corner.unflatten(1, (n_blocks, block)).amax(2)
    end = block * torch.arange(1, n_blocks + 1)
    parts = (
        order,
        torch.argsort(order),
        patch,
        corner,
        torch.tensor([[0.0], [0.0], [1.0 - grid[1]], [1.0 - grid[0]]]),
        near,
        far,
        (end > n_patches) & torch.tensor(prefix > 0),
        end <= n_patches,
        end <= n_tokens,
    )
    return TileOrder(*(part.to(device) for part in parts))


def block_mask(
    sides: Float[Tensor, "image window patch side"],
    grid: Grid,
    prefix: int,
    block: int = BLOCK,
    *,
    tile_windows: bool = False,
) -> BlockMask:
    """FlexAttention's mask of hard windows for tokens in tile order (`tile_order`), in closed form.

    A block of keys is open where its bounding box meets the hull of the windows of a block of queries, and needs no
    rule where it lies in all of them. Prefix tokens see everything and are seen by all.

    Args:
        sides: patches left, top, right, bottom of each query, rounded here; patches in the model's order.
        grid: rows and columns of patches.
        prefix: number of prefix tokens.
        block: tokens of a block.
        tile_windows: let the queries of a block share their mean window, in whole blocks: those whose middle lies in
            it, and the block itself. No block needs a rule then.

    Returns:
        The mask [image, window, query block, key block], for q, k and v in tile order.
    """
    order = tile_order(grid, prefix, block, sides.device)
    edges = _edges(sides, order)
    if tile_windows:
        is_open = _shared_blocks(edges, order, block)
        is_full = is_open & order.only_tokens
        rule = _block_rule(is_open, block)
    else:
        is_open, is_full = _blocks(edges, order, block)
        rule = _window_rule(edges, grid)
    counts, indices = _as_lists(is_open & ~is_full)
    full_counts, full_indices = _as_lists(is_full)
    length = len(order.order)
    return BlockMask.from_kv_blocks(
        counts,
        indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=block,
        mask_mod=rule,
        seq_lengths=(length, length),
        compute_q_blocks=False,
    )


def open_share(mask: BlockMask) -> float:
    """Counts the blocks that are computed, with a rule or without one.

    Args:
        mask: As `block_mask` makes it.

    Returns:
        Their share of all blocks, 0 to 1.
    """
    counts = mask.kv_num_blocks.sum()
    if mask.full_kv_num_blocks is not None:
        counts = counts + mask.full_kv_num_blocks.sum()
    return float(counts) / (mask.kv_num_blocks.numel() * mask.kv_indices.shape[-1])


def sparse_attention(
    q: Float[Tensor, "image head token channel"],
    k: Float[Tensor, "image head token channel"],
    v: Float[Tensor, "image head token channel"],
    sides: Float[Tensor, "image window patch side"],
    grid: Grid,
    prefix: int,
    *,
    tile_windows: bool = False,
    edges: float = 0.0,
    cut: float = CUT,
) -> Float[Tensor, "image head token channel"]:
    """Attention within windows; compiled on a GPU.

    Args:
        q: queries, tokens in the model's order.
        k: keys.
        v: values.
        sides: patches left, top, right, bottom of each query, for one window or one a head.
        grid: rows and columns of patches.
        prefix: number of prefix tokens.
        tile_windows: as in `block_mask`.
        edges: the temperature of soft edges, in patches; 0: hard ones.
        cut: rows and columns of patches that soft edges let through by less than this are closed.

    Returns:
        The heads' output, tokens in the model's order.
    """
    order = tile_order(grid, prefix, BLOCK, sides.device)
    mask = block_mask(sides + soft_reach(edges, cut), grid, prefix, tile_windows=tile_windows)
    soften = _soft_rule(soft_edges(sides, grid, edges, cut), order, grid) if edges else None
    out = attend(q[:, :, order.order], k[:, :, order.order], v[:, :, order.order], mask, soften)
    return out[:, :, order.inverse]


def soft_reach(edges: float, cut: float = CUT) -> float:
    """Says how far beyond rounded sides soft edges let through as much as their cut.

    Args:
        edges: Their temperature, in patches; 0 for hard edges.
        cut: A share.

    Returns:
        Patches.
    """
    return edges * log(1 / cut - 1)


def attend(
    q: Float[Tensor, "image head token channel"],
    k: Float[Tensor, "image head token channel"],
    v: Float[Tensor, "image head token channel"],
    mask: BlockMask,
    soften: Callable[..., Tensor] | None = None,
) -> Float[Tensor, "image head token channel"]:
    """Attends through FlexAttention: the kernel alone, compiled on a GPU.

    Args:
        q: Queries, tokens in tile order.
        k: Keys.
        v: Values.
        mask: As `block_mask` makes it.
        soften: What each score becomes, as FlexAttention's `score_mod`; None for the scores as they are.

    Returns:
        The heads' output, tokens in tile order.
    """
    kernel = _compile_kernel() if q.is_cuda else _eager_kernel
    out: Tensor = kernel(q, k, v, block_mask=mask, score_mod=soften)
    return out


@contextmanager
def block_sparse(model: nn.Module, *, tile_windows: bool = False, harden: bool = False) -> Iterator[nn.Module]:
    """Lets a WinT in evaluation attend through FlexAttention, within. The tap does not see such attention.

    Soft edges stay soft: the answers are those of the model where it has a cut (`Shape.cut`); one without is cut at
    `CUT`.

    Args:
        model: a WinT of ours.
        tile_windows: as in `block_mask`; it changes the answers. For hard edges.
        harden: round the sides of windows with soft edges, which changes the answers.

    Returns:
        The model.

    Raises:
        UsageError: the model has no windows of ours, is training, or is to share soft windows.

    Example:
        with torch.no_grad(), block_sparse(model) as sparse:
            logits = sparse(images)
    """
    layers = [module for module in model.modules() if isinstance(module, Attention) and module.windows is not None]
    if not layers:
        raise UsageError(
            "Block-sparse attention is for a WinT of ours with windows, in evaluation. This model has none, or window "
            "heads on a timm model, which attend as usual (--windows model or hard)."
        )
    if model.training:
        raise UsageError("Block-sparse attention is for a WinT in evaluation: call model.eval().")
    edges = [0.0 if harden else getattr(layer.windows, "edges", 0.0) for layer in layers]
    if tile_windows and any(edges):
        raise UsageError(
            "Windows that the queries of a block share have hard edges; this model's are soft. Round them with "
            "harden=True (vitrail evaluate --windows tiles does), which changes its answers a little."
        )
    for layer, temperature in zip(layers, edges, strict=True):
        cut = getattr(layer.windows, "cut", 0.0) or CUT
        layer.kernel = partial(sparse_attention, tile_windows=tile_windows, edges=temperature, cut=cut)
    try:
        yield model
    finally:
        for layer in layers:
            layer.kernel = None


@contextmanager
def hard_edges(model: nn.Module) -> Iterator[nn.Module]:
    """Rounds the sides of all predicted windows, within, by a dense mask.

    Args:
        model: A WinT in evaluation.

    Returns:
        The model.

    Raises:
        UsageError: The model has no windows.
    """
    heads = [module for module in model.modules() if isinstance(module, WindowHead)]
    if not heads and not any(isinstance(module, FixedWindows) for module in model.modules()):
        raise UsageError("Hard windows are for a WinT with windows; this model has none.")
    before = [head.hard for head in heads]
    for head in heads:
        head.hard = True
    try:
        yield model
    finally:
        for head, hard in zip(heads, before, strict=True):
            head.hard = hard


def window_mode(model: nn.Module, mode: str) -> AbstractContextManager[nn.Module]:
    """Lets a model attend in one of four ways, within.

    Args:
        model: A WinT in evaluation; any model for the mode "model".
        mode: "model", as it is; "hard" (`hard_edges`); "sparse", as it is, in blocks, or "tiles", hard and shared by
            the queries of a block (`block_sparse`).

    Returns:
        A context that gives the model.

    Raises:
        UsageError: There is no such mode, or the model has no windows.
    """
    modes: dict[str, Callable[[], AbstractContextManager[nn.Module]]] = {
        "model": lambda: nullcontext(model),
        "hard": lambda: hard_edges(model),
        "sparse": lambda: block_sparse(model),
        "tiles": lambda: block_sparse(model, harden=True, tile_windows=True),
    }
    if mode not in modes:
        raise UsageError(f"windows = {mode!r} has no meaning; choose {', '.join(modes)}.")
    return modes[mode]()


# FlexAttention traces the rules and this function, which shape checks of the tests would break.
@no_type_check
def _place_of_patch(index: Int[Tensor, "patch"], grid: Grid) -> tuple[Tensor, Tensor]:
    """Row and column of the patch at a position of the tile order: arithmetic alone, also within the kernel."""
    rows, columns = grid
    strip = (index // (TILE_ROWS * columns)).clamp(max=(rows - 1) // TILE_ROWS)
    height = (rows - strip * TILE_ROWS).clamp(max=TILE_ROWS)
    within = index - strip * TILE_ROWS * columns
    column = within // height
    column = torch.where(strip % 2 == 1, columns - 1 - column, column)
    return strip * TILE_ROWS + within % height, column


def _edges(sides: Tensor, order: TileOrder) -> Float[Tensor, "image window 4 position"]:
    """First column, first row, minus last column, minus last row of each window, cut at the border, in tile order.

    With the last two negated a wider window is a smaller number in all four. Filled up to whole blocks with the last
    patch's window, which changes no block's extremes.
    """
    # rows of one flat table: PyTorch copies them several times faster than slices of an inner dimension
    starts = torch.arange(0, sides.shape[:3].numel(), sides.shape[2], device=sides.device)
    reach = sides.flatten(0, 2).index_select(0, (starts[:, None] + order.patch).flatten())
    reach = round_sides(reach.view(*sides.shape[:2], -1, 4).mT.contiguous()).clamp_(min=0)
    return torch.maximum(torch.sub(order.corner, reach, out=reach), order.limit)


def _blocks(edges: Tensor, order: TileOrder, block: int) -> tuple[Tensor, Tensor]:
    """Which blocks are open and which of these need no rule, [image window query-block key-block]."""
    by_block = edges.unflatten(-1, (-1, block))
    hull, common = by_block.amin(-1), by_block.amax(-1)
    is_open = _all_four(order.box_far, hull) | order.has_prefix | order.has_prefix[:, None]
    inside = _all_four(order.box_near, common) & order.only_patches & order.only_patches[:, None]
    return is_open, is_open & inside


def _all_four(box: Float[Tensor, "4 block"], window: Float[Tensor, "image window 4 block"]) -> Tensor:
    left, top, right, bottom = (box[:, None] >= window[..., None]).unbind(-3)
    return left & top & right & bottom


def _shared_blocks(edges: Tensor, order: TileOrder, block: int) -> Bool[Tensor, "image window q k"]:
    """For each block of queries those blocks that hold most of its mean window, as many as the windows have area.

    The block itself is always among them; blocks with prefix tokens see all and are is_open by all.
    """
    by_block = edges.unflatten(-1, (-1, block))
    left, top, right, bottom = by_block.unbind(-3)
    area = ((1 - right - left) * (1 - bottom - top)).mean(-1)
    # how far the smaller of two ranges reaches, from the larger first to the smaller last
    common = -torch.maximum(by_block.mean(-1)[..., None], order.box_near[:, None])
    columns, rows = (common[..., side, :, :] + common[..., side + 2, :, :] + 1 for side in (0, 1))
    worth = columns.clamp(min=0) * rows.clamp(min=0)
    worth.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    rank = torch.arange(worth.shape[-1], device=worth.device)
    within_budget = rank < (area / block).round().clamp(min=1)[..., None]
    best = torch.argsort(worth, dim=-1, descending=True, stable=True)
    is_open = torch.zeros_like(within_budget).scatter_(-1, best, within_budget)
    return is_open | order.has_prefix | order.has_prefix[:, None]


def _as_lists(blocks: Bool[Tensor, "image window q k"]) -> tuple[Int[Tensor, "..."], Int[Tensor, "..."]]:
    """How many blocks are set in each row, and which, in order; a sort would take longer than all the rest."""
    n_blocks = blocks.shape[-1]
    position = blocks.cumsum(-1, dtype=torch.int32)
    column = torch.where(blocks, position - 1, n_blocks).long()
    number = torch.arange(n_blocks, dtype=torch.int32, device=blocks.device).expand_as(column)
    indices = position.new_zeros((*blocks.shape[:-1], n_blocks + 1)).scatter_(-1, column, number)
    return position[..., -1].contiguous(), indices[..., :n_blocks].contiguous()


def _window_rule(edges: Tensor, grid: Grid) -> Callable[..., Tensor]:
    """Whether a query sees a key, both by position in tile order. Traced by FlexAttention, which counts arguments."""
    n_patches, head_step = grid[0] * grid[1], int(edges.shape[1] > 1)
    packed = edges.abs().to(torch.uint8).mT.contiguous().view(torch.int32).squeeze(-1)

    @no_type_check
    def rule(image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, column = _place_of_patch(key, grid)
        window = packed[image, head * head_step, query]
        inside = (
            (column >= (window & 255))
            & (row >= ((window >> 8) & 255))
            & (column <= ((window >> 16) & 255))
            & (row <= ((window >> 24) & 255))
        )
        return inside | (query >= n_patches) | (key >= n_patches)

    return rule  # type: ignore[no-any-return]


def _soft_rule(edges: Float[Tensor, "image window patch line"], order: TileOrder, grid: Grid) -> Callable[..., Tensor]:
    """What soft edges make of a query's score for a key, both by position in tile order. Traced by FlexAttention."""
    n_patches, head_step = grid[0] * grid[1], int(edges.shape[1] > 1)
    by_line = edges.index_select(2, order.patch)

    @no_type_check
    def soften(score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, column = _place_of_patch(key.clamp(max=n_patches - 1), grid)
        window = head * head_step
        added = by_line[image, window, query, row] + by_line[image, window, query, grid[0] + column]
        sees_all = (query >= n_patches) | (key >= n_patches) | (query == key)
        return torch.where(sees_all, score, score + added)

    return soften  # type: ignore[no-any-return]


def _block_rule(is_open: Bool[Tensor, "image window q k"], block: int) -> Callable[..., Tensor]:
    """Whether a query's block sees a key's. The compiled kernel asks this of the last, ragged block alone; the eager
    one knows no blocks and asks it of every cell."""
    head_step = int(is_open.shape[1] > 1)

    @no_type_check
    def rule(image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        value: Tensor = is_open[image, head * head_step, query // block, key // block]
        return value

    return rule  # type: ignore[no-any-return]


def _eager_kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    with warnings.catch_warnings():
        # it says that it is slow without torch.compile, which is known here
        warnings.filterwarnings("ignore", message=".*flex_attention.*", category=UserWarning)
        return flex_attention(q, k, v, **options)


@lru_cache(maxsize=1)
def _compile_kernel() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return compiled
