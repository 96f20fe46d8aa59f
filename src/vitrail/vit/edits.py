"""What can be changed at the one interception point, and in which order.

bias, dropped keys  ->  softmax  ->  region  ->  weights @ v  ->  gate  ->  prune  ->  reader
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Edit"]


@dataclass(frozen=True, eq=False)
class Edit:
    """One change to one attention call.

    layer        zero-based index of the block
    call         which attention call of the block, for blocks that make several
    copy         None: every copy on the batch; c: only copy c of a run with `copies > 1`
    prune        heads whose output is set to zero, before the output projection
    fill         what the heads in `prune` give instead of zero, [window head query channel], heads in that order
    region       post-softmax weights are multiplied by this mask, [query key] or [head query key]; no renormalisation
    bias         added to the scores before softmax, [query key], [head query key] or [image head query key]
    drop_keys    tokens that nobody may attend to
    drop_queries also close the rows of the dropped tokens: their attention output is zero
    gate         [image head] (or [image head query]) factors on the heads' output; gradients flow through it
    """

    layer: int
    call: int = 0
    copy: int | None = None
    prune: tuple[int, ...] = ()
    fill: Float[Tensor, "window head query channel"] | None = None
    region: Float[Tensor, "..."] | Bool[Tensor, "..."] | None = None
    bias: Float[Tensor, "..."] | None = None
    drop_keys: tuple[int, ...] = ()
    drop_queries: bool = False
    gate: Float[Tensor, "..."] | None = None

    @property
    def touches_scores(self) -> bool:
        """The edit acts before softmax."""
        return self.bias is not None or bool(self.drop_keys)

    def on_copy(self, copy: int) -> "Edit":
        """The same edit for one copy only."""
        return replace(self, copy=copy)


def score_bias(edits: tuple[Edit, ...], images: int, copies: int, like: Tensor) -> Tensor | None:
    """The sum of all biases as [copies x image, head, query, key] (broadcastable), or None.

    `like` has the shape of the canonical weights, [copies x image, head, query, key].
    """
    touching = [edit for edit in edits if edit.touches_scores]
    if not touching:
        return None
    heads, queries, keys = like.shape[1:]
    total = like.new_zeros((copies, images, heads, queries, keys))
    for edit in touching:
        part = total if edit.copy is None else total[edit.copy : edit.copy + 1]
        if edit.bias is not None:
            part += edit.bias.to(like)
        if edit.drop_keys:
            part[..., list(edit.drop_keys)] = -torch.inf
    return total.flatten(0, 1)


def apply_regions(weights: Tensor, edits: tuple[Edit, ...], copies: int) -> Tensor:
    """Weights [copies x image, head, query, key] times each edit's region; out of place."""
    for edit in edits:
        if edit.region is None:
            continue
        region = edit.region.to(weights)
        if edit.copy is None:
            weights = weights * region
        else:
            factor = torch.ones((copies, 1, *weights.shape[1:]), dtype=weights.dtype, device=weights.device)
            factor[edit.copy] = region
            weights = (weights.unflatten(0, (copies, -1)) * factor).flatten(0, 1)
    return weights


def apply_to_output(out: Tensor, edits: tuple[Edit, ...], copies: int) -> Tensor:
    """Output [copies x image, window, head, query, channel] after gates, closed queries and pruning; out of place."""
    for edit in edits:
        if edit.gate is not None:
            gate = edit.gate.to(out)
            gate = gate[:, None, :, None, None] if gate.ndim == 2 else gate[:, None, :, :, None]
            out = out * gate
    changing = [edit for edit in edits if edit.prune or (edit.drop_keys and edit.drop_queries)]
    if not changing:
        return out
    out = out.clone()
    by_copy = out.unflatten(0, (copies, -1))
    for edit in changing:
        part = by_copy if edit.copy is None else by_copy[edit.copy]
        if edit.prune:
            part[..., list(edit.prune), :, :] = 0 if edit.fill is None else edit.fill.to(out)
        if edit.drop_keys and edit.drop_queries:
            part[..., list(edit.drop_keys), :] = 0
    return out
