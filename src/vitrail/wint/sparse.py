"""Hard windows as block-sparse attention: FlexAttention skips blocks of keys that no query of a block may see.

A dense mask saves no time, it only closes what was computed. With FlexAttention the cost follows the windows' area, in
blocks of `BLOCK` tokens; on a GPU, compiled, that pays from some resolution on. Uncompiled, and on a CPU, it gives the
same numbers slowly: that is how it is tested.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from vitrail.errors import UsageError
from vitrail.wint.model import Attention, Grid, rounded

__all__ = ["BLOCK", "block_mask", "block_sparse", "sparse_attention"]

BLOCK = 128
"""Tokens of a block, of queries and of keys: FlexAttention's own default."""


def block_mask(
    sides: Float[Tensor, "image window patch side"], grid: Grid, prefix: int, block: int = BLOCK
) -> BlockMask:
    """Which blocks are open, and the rule within them. Prefix tokens see everything and are seen by all.

    The rule is one expression of tensors: FlexAttention traces it, and counts its four arguments.
    """
    token = torch.arange(prefix + grid[0] * grid[1], device=sides.device)
    row, column = (token - prefix) // grid[1], (token - prefix) % grid[1]
    left, top, right, bottom = F.pad(rounded(sides).int(), (0, 0, prefix, 0), value=max(grid)).unbind(-1)
    left, right, top, bottom = column - left, column + right, row - top, row + bottom
    per_head = int(sides.shape[1] > 1)
    return create_block_mask(
        lambda image, head, query, key: (
            (query < prefix)
            | (key < prefix)
            | (
                (column[key] >= left[image, head * per_head, query])
                & (column[key] <= right[image, head * per_head, query])
                & (row[key] >= top[image, head * per_head, query])
                & (row[key] <= bottom[image, head * per_head, query])
            )
        ),
        len(sides), sides.shape[1] if per_head else None, len(token), len(token), device=sides.device.type,
        BLOCK_SIZE=block,
    )  # fmt: skip


def sparse_attention(
    q: Float[Tensor, "image head token channel"],
    k: Float[Tensor, "image head token channel"],
    v: Float[Tensor, "image head token channel"],
    sides: Float[Tensor, "image window patch side"],
    grid: Grid,
    prefix: int,
) -> Float[Tensor, "image head token channel"]:
    """Attention within hard windows; compiled on a GPU."""
    attend = _compiled() if q.is_cuda else _plain
    out: Tensor = attend(q, k, v, block_mask=block_mask(sides, grid, prefix))
    return out


@contextmanager
def block_sparse(model: nn.Module) -> Iterator[nn.Module]:
    """Within, a WinT in evaluation attends through FlexAttention. The tap does not see such attention.

    Raises `UsageError` for a model without windows of ours, or one that is training.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention) and module.windows is not None]
    if not layers or model.training:
        raise UsageError("Block-sparse attention is for a WinT with windows, in evaluation: call model.eval().")
    if any(getattr(layer.windows, "edges", 0.0) for layer in layers):
        raise UsageError("Block-sparse attention is for windows with hard edges; this model's are soft (edges).")
    for layer in layers:
        layer.kernel = sparse_attention
    try:
        yield model
    finally:
        for layer in layers:
            layer.kernel = None


def _plain(q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask) -> Any:
    with warnings.catch_warnings():
        # it says that it is slow without torch.compile, which is known here
        warnings.filterwarnings("ignore", message=".*flex_attention.*", category=UserWarning)
        return flex_attention(q, k, v, block_mask=block_mask)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return compiled
