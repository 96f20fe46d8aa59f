"""Removing heads for real: smaller linear maps, with the logits of the model whose heads are masked.

A head is a group of rows of the maps to queries, keys and values, and a group of columns of the output projection.
Heads are left out of both; the projection keeps its bias, as it does when a head's output is zero. Whether code counts
on its whole width, or interleaves its heads, cannot be told by its looks, so it is tried once per model.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vitrail.errors import Unsupported, UsageError
from vitrail.models.open import PRECISIONS, Vit
from vitrail.models.pruned import shrink
from vitrail.pruning.ranking import as_heads
from vitrail.tap.anatomy import Anatomy, Block, Call, layer_ranges
from vitrail.tap.clone import clone_sharing, first_weight
from vitrail.tap.edits import Edit
from vitrail.tap.rounding import rounding_bound

__all__ = ["Heads", "PrunedModel", "remove_heads", "why_not_removable"]

Heads = Collection[tuple[int, int]]
"""(layer, head), zero-based."""

_LAYOUTS: Sequence[tuple[tuple[str, ...], str]] = (
    (("qkv",), "proj"),  # timm
    (("q_proj", "k_proj", "v_proj"), "o_proj"),  # transformers
    (("q_proj", "k_proj", "v_proj"), "proj"),
)
"""(maps to queries, keys and values; output projection), as attributes of the module that attends."""

_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads")
_WIDTHS = ("attn_dim", "all_head_size", "inner_dim")


@dataclass(frozen=True)
class _AttentionLinears:
    """Where the heads of one attention module lie: `rows` are maps to q, k, v (one fused or three), `columns` projects
    them; `first_head` is which of the layer's heads its first one is."""

    path: str
    first_head: int
    rows: tuple[str, ...]
    columns: str
    heads: int
    width: int


@dataclass(frozen=True)
class PrunedModel:
    """The smaller model, and per attention module what changed, as `vitrail.models.pruned.shrink` takes it."""

    module: nn.Module
    changes: Mapping[str, Any]


def remove_heads(vit: Vit, heads: str | Iterable[Any]) -> PrunedModel:
    """A copy of the model without these heads; all tensors that did not change are shared with it.

    A layer that loses all its heads keeps the bias of its projection and is no layer with attention any more.

    Args:
        vit: The model; not edited.
        heads: The heads to remove: (layer, head) of each, or names, "L0H4,L3H1".

    Returns:
        The smaller model in evaluation mode, and what changed.

    Raises:
        UsageError: The model has no such head, or one is named twice.
        Unsupported: Heads of a layer cannot be taken apart, or the model does not run as the masked one without them.
    """
    pairs = as_heads(heads)
    _check_heads(vit.anatomy, pairs)
    reason = why_not_removable(vit)
    if reason:
        raise Unsupported(reason)
    return _without_heads(vit.model, vit.anatomy, pairs)


def why_not_removable(vit: Vit) -> str:
    """Why heads of this model can be masked but not removed; empty where they can be.

    One head of every attention module is removed on trial and the logits compared with those of the masked model. Tried
    once per model.

    Args:
        vit: The model.

    Returns:
        A sentence, or nothing.
    """
    if vit not in _REASONS:
        _REASONS[vit] = _reason_of_trial(vit)
    return _REASONS[vit]


_REASONS: WeakKeyDictionary[Vit, str] = WeakKeyDictionary()


@torch.no_grad()
def _reason_of_trial(vit: Vit) -> str:
    calls = [(layer, call) for layer, block in enumerate(vit.anatomy.blocks) for call in block.calls if not call.repeat]
    heads = [(layer, call.first_head) for layer, call in calls if call.heads > 1] or [
        (layer, call.first_head) for layer, call in calls[:1]
    ]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((2, *vit.anatomy.image_shape), generator=generator)
    images = images.to(vit.device, first_weight(vit.model).dtype)
    try:
        for layer in {layer for layer, _ in calls}:
            _linears_of(vit.model, vit.anatomy, layer)
        removed = vit.read_output(_without_heads(vit.model, vit.anatomy, heads).module(images)).float()
    except Unsupported as refusal:
        return str(refusal)
    except (RuntimeError, ValueError, TypeError) as error:
        message = " ".join(str(error).split())[:120]
        return f"{vit.name} does not run with fewer heads ({message}): its code counts on all. They can be masked."
    masked = vit.tap().read(images, edits=[Edit(layer, prune=(head,)) for layer, head in heads]).float()
    bound = rounding_bound(PRECISIONS[vit.precision])
    if not (removed - masked).abs().max() <= bound * masked.abs().max():
        return f"{vit.name} answers in another way with heads removed than with heads masked. They can be masked."
    return ""


def _without_heads(model: nn.Module, anatomy: Anatomy, heads: Heads) -> PrunedModel:
    clone = clone_sharing(model)
    changes: dict[str, Any] = {}
    state: dict[str, Tensor] = {}
    for layer in sorted({layer for layer, _ in heads}):
        for maps in _linears_of(model, anatomy, layer):
            heads_left = [head for head in range(maps.heads) if (layer, maps.first_head + head) not in heads]
            if len(heads_left) == maps.heads:
                continue
            changes[maps.path], smaller = _smaller(clone, maps, heads_left)
            state |= smaller
    shrink(clone, changes, state)
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        clone.get_submodule(path)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    return PrunedModel(clone.eval(), changes)


def _linears_of(model: nn.Module, anatomy: Anatomy, layer: int) -> list[_AttentionLinears]:
    """The linear maps of each attention module of a layer."""
    block = anatomy.blocks[layer]
    if not block.calls:
        raise Unsupported(
            f"Heads of L{layer} cannot be removed or masked: {block.path} computes its attention in an operator that "
            "cannot be observed, so it is not known how many heads there are. Leave this layer out."
        )
    modules = [block.calls[calls[0]] for calls in block.attentions]
    paths = [call.path for call in modules]
    shared = [at for at, other in enumerate(anatomy.blocks) if at != layer and {c.path for c in other.calls} & {*paths}]
    if shared:
        raise Unsupported(_refusal(layer, f"the same module serves {layer_ranges(shared)}, which would lose them too"))
    if len(set(paths)) < len(paths):
        raise Unsupported(_refusal(layer, f"{paths[0]} makes its heads in several attention calls"))
    return [_linears_of_call(model, call, layer) for call in modules]


def _linears_of_call(model: nn.Module, call: Call, layer: int) -> _AttentionLinears:
    module = model.get_submodule(call.path)
    inner = call.heads * call.head_dim
    for rows, columns in _LAYOUTS:
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in (*rows, columns)):
            sizes = {getattr(module, name).out_features * len(rows) for name in rows}
            if sizes != {3 * inner} or getattr(module, columns).in_features != inner:
                raise Unsupported(_refusal(layer, "its queries, keys and values have other sizes than its heads"))
            _refuse_other_weights(module, (*rows, columns), call.head_dim, layer)
            return _AttentionLinears(call.path, call.first_head, rows, columns, call.heads, call.head_dim)
    raise Unsupported(_refusal(layer, f"{type(module).__name__} ({call.path}) has no such linear maps"))


def _refusal(layer: int, why: str) -> str:
    return (
        f"Heads of L{layer} cannot be removed: {why}. Vitrail removes heads from attention with a fused qkv and a proj "
        "(timm), or with q_proj, k_proj, v_proj and o_proj (transformers). Heads of any model can be masked."
    )


def _refuse_other_weights(module: nn.Module, linears: tuple[str, ...], width: int, layer: int) -> None:
    """Weights with entries per head (position biases, gates, norms over all heads) would keep those of lost heads."""
    prefixes = tuple(f"{name}." for name in linears)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    other = [name for name, value in tensors if not name.startswith(prefixes) and tuple(value.shape) != (width,)]
    if other:
        raise Unsupported(_refusal(layer, f"its attention has weights of its own ({', '.join(other[:3])})"))


def _smaller(
    clone: nn.Module, maps: _AttentionLinears, heads_left: list[int]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the change, the new tensors by their full names)"""
    module = clone.get_submodule(maps.path)
    projection: nn.Linear = module.get_submodule(maps.columns)  # type: ignore[assignment]
    if not heads_left:
        bias = projection.bias if projection.bias is not None else projection.weight.new_zeros(projection.out_features)
        return {"kept": [], "pair": maps.columns == "o_proj"}, {f"{maps.path}.bias": bias.detach()}
    state: dict[str, Tensor] = {}
    for name in maps.rows:
        for leaf, tensor in module.get_submodule(name).named_parameters():
            by_head = tensor.detach().unflatten(0, (-1, maps.heads, maps.width))
            state[f"{maps.path}.{name}.{leaf}"] = by_head[:, heads_left].flatten(0, 2)
    columns = projection.weight.detach().unflatten(1, (maps.heads, maps.width))[:, heads_left].flatten(1)
    state[f"{maps.path}.{maps.columns}.weight"] = columns.contiguous()
    if projection.bias is not None:
        state[f"{maps.path}.{maps.columns}.bias"] = projection.bias.detach()
    change = {
        "kept": heads_left,
        "linears": [*maps.rows, maps.columns],
        "counts": _counts(module, maps, len(heads_left)),
    }
    return change, state


def _counts(module: nn.Module, maps: _AttentionLinears, n_heads_left: int) -> dict[str, int]:
    """The attributes that say how many heads there are, with their new values."""
    counts = {name: n_heads_left for name in _HEAD_COUNTS if getattr(module, name, None) == maps.heads}
    inner = maps.heads * maps.width
    return counts | {name: n_heads_left * maps.width for name in _WIDTHS if getattr(module, name, None) == inner}


def _check_heads(anatomy: Anatomy, heads: Heads) -> None:
    for layer, head in heads:
        if not 0 <= layer < len(anatomy.blocks) or not 0 <= head < anatomy.blocks[layer].heads:
            examples = ", ".join(_describe_heads(at, block) for at, block in enumerate(anatomy.blocks[:3]))
            raise UsageError(
                f"L{layer}H{head} is not a head of this model: it has L0 to L{len(anatomy.blocks) - 1} ({examples}"
                f"{', ...' if len(anatomy.blocks) > 3 else ''})."
            )


def _describe_heads(layer: int, block: Block) -> str:
    if not block.heads:
        return f"the heads of L{layer} cannot be observed"
    return f"L{layer} has H0 to H{block.heads - 1}"
