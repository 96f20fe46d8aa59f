"""What can be changed at an attention call, and in which order.

bias, dropped keys  ->  softmax  ->  region  ->  weights @ v  ->  gate  ->  prune  ->  reader
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vitrail.arguments import whole_number, whole_numbers
from vitrail.errors import Unsupported, UsageError
from vitrail.tap.anatomy import Block, Call

__all__ = ["Edit", "apply_regions", "apply_to_output", "edits_by_call", "prune_edits", "score_bias"]


@dataclass(frozen=True, eq=False)
class Edit:
    """One change to the attention of one layer, for `Tap.read` and `Tap.run_from`.

    Attributes:
        layer: Zero-based index of the block.
        call: None: the whole layer, whose heads are those of all its attention calls; c: only call c, in which heads
            count from its own first.
        copy: None: every copy on the batch; c: only copy c of a run with `copies > 1`.
        prune: Heads whose output is set to zero, before the output projection.
        fill: What the heads in `prune` give instead of zero, [window head query channel], heads in that order.
        region: Factor on the weights after softmax, [query key] or [head query key]; rows are not renormalised.
        bias: Added to the scores before softmax, [query key], [head query key] or [image head query key].
        drop_keys: Tokens that nobody may attend to.
        drop_queries: Also sets the attention output of the dropped tokens to zero.
        gate: Factor on the heads' output, [image head] or [image head query]; gradients flow through it.

    Example:
        >>> logits = vit.tap().read(images, edits=[Edit(layer=3, prune=(0, 2))])
    """

    layer: int
    call: int | None = None
    copy: int | None = None
    prune: tuple[int, ...] = ()
    fill: Float[Tensor, "window head query channel"] | None = None
    region: Float[Tensor, "..."] | Bool[Tensor, "..."] | None = None
    bias: Float[Tensor, "..."] | None = None
    drop_keys: tuple[int, ...] = ()
    drop_queries: bool = False
    gate: Float[Tensor, "..."] | None = None

    def __post_init__(self) -> None:
        for name in ("layer", "call", "copy"):
            if name == "layer" or getattr(self, name) is not None:
                object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        for name in ("prune", "drop_keys"):
            object.__setattr__(self, name, whole_numbers(name, getattr(self, name)))

    @property
    def changes_scores(self) -> bool:
        """Whether the edit acts before softmax."""
        return self.bias is not None or bool(self.drop_keys)

    @property
    def closes_queries(self) -> bool:
        """Whether the edit sets the output of whole queries to zero."""
        return self.drop_queries and bool(self.drop_keys)

    @property
    def changes_output(self) -> bool:
        """Whether the edit acts on what the heads give."""
        return bool(self.prune) or self.gate is not None or self.closes_queries


def prune_edits(heads: Iterable[tuple[int, int]]) -> list[Edit]:
    """Edits that set heads to zero.

    Args:
        heads: (layer, head) of each.

    Returns:
        One edit for each layer.
    """
    by_layer: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        by_layer.setdefault(layer, []).append(head)
    return [Edit(layer, prune=tuple(each)) for layer, each in by_layer.items()]


def edits_by_call(edit: Edit, block: Block) -> tuple[Edit, ...]:
    """Parts an edit of a layer into edits of its attention calls.

    Args:
        edit: An edit whose heads, if it names no call, are those of the layer.
        block: The layer's block.

    Returns:
        One edit for each call that it acts on, in which heads count from the call's first.

    Raises:
        Unsupported: Calls differ in what the edit would have to mean for each of them.
    """
    if edit.call is not None:
        return (edit,)
    if len(block.calls) == 1:
        return (replace(edit, call=0),)
    return tuple(_parts(edit, block)) or (replace(edit, call=0),)


def _parts(edit: Edit, block: Block) -> Iterator[Edit]:
    whole_map = edit.region is not None or edit.bias is not None or bool(edit.drop_keys)
    sizes = {(call.windows, call.queries, call.keys) for call in block.calls}
    if edit.fill is not None or (whole_map and len(sizes) > 1):
        raise Unsupported(
            f"L{edit.layer} makes {len(block.calls)} attention calls, and what is to take the place of "
            f"{'heads' if edit.fill is not None else 'their maps'} is not the same for all: give an edit for each "
            f"(Edit(.., call=0), ..)."
        )
    for number, call in enumerate(block.calls):
        prune = tuple(head - call.first_head for head in edit.prune if head in _head_range(call))
        acts = bool(prune) or whole_map or edit.gate is not None
        if acts:
            yield replace(
                edit,
                call=number,
                prune=prune,
                region=_of_heads(edit.region, call, block, axis=-3),
                bias=_of_heads(edit.bias, call, block, axis=-3),
                gate=_of_heads(edit.gate, call, block, axis=1),
            )


def _head_range(call: Call) -> range:
    return range(call.layer_heads.start, call.layer_heads.stop)


def _of_heads(values: Tensor | None, call: Call, block: Block, axis: int) -> Tensor | None:
    """The part of a tensor by head that belongs to a call; one that is the same for all heads stays."""
    if values is None or (values.ndim < 3 and axis == -3) or values.shape[axis] != block.heads:
        return values
    return values.narrow(axis, call.first_head, call.heads)


def score_bias(
    edits: tuple[Edit, ...], copies: int, shape: tuple[int, int, int, int], like: Tensor
) -> Float[Tensor, "row head query key"] | None:
    """Sums the biases and dropped keys of several edits of one call.

    Args:
        edits: Edits of one attention call.
        copies: Number of copies on the batch.
        shape: (copies x image, head, query, key) of the call.
        like: A tensor with the dtype and device of the scores.

    Returns:
        What to add to the scores, or None if no edit acts on them.

    Raises:
        UsageError: A bias does not fit the map.
    """
    changing = [edit for edit in edits if edit.changes_scores]
    if not changing:
        return None
    total = like.new_zeros((copies, shape[0] // copies, *shape[1:]))
    for edit in changing:
        part = total if edit.copy is None else total[edit.copy : edit.copy + 1]
        if edit.bias is not None:
            _require_fit(edit, "bias", edit.bias, total.shape[1:])  # of one copy
            part += edit.bias.to(like)
        if edit.drop_keys:
            part[..., list(edit.drop_keys)] = -torch.inf
    return total.flatten(0, 1)


def apply_regions(
    weights: Float[Tensor, "row head query key"],
    edits: tuple[Edit, ...],
    copies: int,
    queries: slice = slice(None),
) -> Float[Tensor, "row head query key"]:
    """Multiplies weights after softmax by each edit's region, out of place; a row is one image of one copy.

    Args:
        weights: [row, head, query, key] after softmax, of some queries.
        edits: Edits of this layer; those without a region count for nothing.
        copies: How many copies of the batch the rows hold.
        queries: Which of the map's queries these are.

    Returns:
        [row, head, query, key]; a new tensor where an edit has a region.

    Raises:
        UsageError: A region does not fit the map.
    """
    for edit in edits:
        if edit.region is None:
            continue
        region = edit.region[..., queries, :].to(weights)
        _require_fit(edit, "region", region, weights.shape)
        if edit.copy is None:
            weights = weights * region
        else:
            factor = torch.ones((copies, 1, *weights.shape[1:]), dtype=weights.dtype, device=weights.device)
            factor[edit.copy] = region
            weights = (weights.unflatten(0, (copies, -1)) * factor).flatten(0, 1)
    return weights


def _require_fit(edit: Edit, name: str, values: Tensor, shape: Sequence[int]) -> None:
    try:
        fits = torch.broadcast_shapes(values.shape, tuple(shape)) == tuple(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise UsageError(
            f"The {name} of an edit of L{edit.layer} is {list(values.shape)}, and the map that it is to change is "
            f"{list(shape)} [image head query key]; give [query key] or [head query key] of all tokens."
        )


def apply_to_output(
    out: Float[Tensor, "row window head query channel"], edits: tuple[Edit, ...], copies: int
) -> Float[Tensor, "row window head query channel"]:
    """Applies gates, then pruning and closed queries, to what the heads give; out of place.

    Args:
        out: [row, window, head, query, channel], before the output projection.
        edits: Edits of this layer.
        copies: How many copies of the batch the rows hold.

    Returns:
        [row, window, head, query, channel]; a new tensor where an edit changes it.
    """
    for edit in edits:
        if edit.gate is not None:
            gate = edit.gate.to(out)
            gate = gate[:, None, :, None, None] if gate.ndim == 2 else gate[:, None, :, :, None]
            out = out * gate
    overwriting = [edit for edit in edits if edit.prune or edit.closes_queries]
    if not overwriting:
        return out
    out = out.clone()
    by_copy = out.unflatten(0, (copies, -1))
    for edit in overwriting:
        part = by_copy if edit.copy is None else by_copy[edit.copy]
        if edit.prune:
            part[..., list(edit.prune), :, :] = 0 if edit.fill is None else edit.fill.to(out)
        if edit.closes_queries:
            part[..., list(edit.drop_keys), :] = 0
    return out
