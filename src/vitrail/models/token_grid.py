"""Which attention of a model has maps that join the patches of one grid, and where the tokens of each lie."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int
from torch import Tensor

from vitrail.analysis import declaration
from vitrail.errors import Unsupported
from vitrail.models.open import Vit
from vitrail.tap.anatomy import Block

__all__ = ["TokenGrid", "pad_patches", "share_grids", "token_grids"]


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """Where the tokens of an attention map lie on the image.

    The first `n_prefix` tokens (class, distillation, register tokens) lie nowhere; the patches of `grid` follow in
    raster order.

    Attributes:
        grid: (rows, columns) of patches.
        n_prefix: Number of tokens before the patches.
        slots: For attention within windows, the token in each slot of each window, -1 for padding; otherwise None.
        heads: Which of the layer's heads have such maps.
    """

    grid: tuple[int, int]
    n_prefix: int = 0
    slots: Int[Tensor, "window slot"] | None = None
    heads: slice = field(default_factory=lambda: slice(None))

    @property
    def n_patches(self) -> int:
        """Number of patches."""
        return self.grid[0] * self.grid[1]

    @property
    def n_tokens(self) -> int:
        """Number of tokens: prefix and patches."""
        return self.n_prefix + self.n_patches


def token_grids(vit: Vit) -> tuple[dict[tuple[int, int], TokenGrid], dict[tuple[int, int], str]]:
    """The token grid of each attention call whose maps join patches, and the reason for each other one.

    Windows are measured (one short pass each), so the first call may take a second. Of heads that run several times in
    a block only the first run counts.

    Args:
        vit: The opened model.

    Returns:
        Two dictionaries by (layer, call): the grids, and for attention without one a sentence that says why.
    """
    grids: dict[tuple[int, int], TokenGrid] = {}
    reasons: dict[tuple[int, int], str] = {}
    for layer, block in enumerate(vit.anatomy.blocks):
        for number in (calls[0] for calls in block.attentions):
            grid_or_reason = _token_grid(vit, layer, block, number)
            if isinstance(grid_or_reason, str):
                reasons[layer, number] = grid_or_reason
            else:
                grids[layer, number] = grid_or_reason
        if not block.calls:
            reasons[layer, 0] = f"L{layer} computes its attention in an operator that cannot be observed"
    return grids, reasons


def share_grids(vit: Vit) -> tuple[dict[tuple[int, int], TokenGrid], dict[tuple[int, int], str]]:
    """The token grids of attention calls whose weights are shares of attention: zero or more, and 1 in each row.

    Where a model mixes its heads after the softmax (talking heads), weights can be negative. Such maps are real, and
    heads can be pruned; what reads a weight as a share of attention has no meaning there.

    Args:
        vit: The opened model.

    Returns:
        Two dictionaries by (layer, call), as those of `token_grids`.
    """
    grids, reasons = token_grids(vit)
    for layer, call in list(grids):
        if not vit.anatomy.blocks[layer].calls[call].row_stochastic:
            del grids[layer, call]
            reasons[layer, call] = (
                f"L{layer} mixes its heads after the softmax, so its weights are no shares of attention: rows need not "
                "sum to 1, and weights can be negative"
            )
    return grids, dict(sorted(reasons.items()))


def pad_patches(vit: Vit, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays with as many patches as the model's largest grid has: one number in a study, whichever layers they are of.

    Args:
        vit: The opened model.
        arrays: By name of the measure.

    Returns:
        The same arrays; along `patch` those of smaller grids are filled up with NaN, False or 0 at the end.
    """
    n_patches = max((block.grid[0] * block.grid[1] for block in vit.anatomy.blocks if block.grid), default=0)
    padded = dict(arrays)
    for name, values in arrays.items():
        dims = declaration(name).dims
        n_more = n_patches - values.shape[dims.index("patch")] if "patch" in dims else 0
        if n_more > 0:
            fill = np.nan if values.dtype.kind == "f" else 0
            padded[name] = np.pad(values, [(0, n_more * (dim == "patch")) for dim in dims], constant_values=fill)
    return padded


def _token_grid(vit: Vit, layer: int, block: Block, number: int) -> TokenGrid | str:
    """The token grid of one attention call, or why it has none."""
    call = block.calls[number]
    name = f"L{layer}" if len(block.attentions) == 1 else f"L{layer} ({call.path})"
    if block.grid is None or call.kind not in ("token", "window"):
        return f"{name} has attention of kind {call.kind!r} on grid {block.grid}"
    if call.kind == "window":
        try:
            return TokenGrid(block.grid, 0, vit.tap().window_slots(layer, number), call.layer_heads)
        except Unsupported as error:
            return str(error)
    if call.queries == block.tokens:
        return TokenGrid(block.grid, block.prefix, heads=call.layer_heads)
    return f"{name} attends between {call.queries} tokens, not the {block.tokens} that it is given"
