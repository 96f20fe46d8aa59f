"""Removing heads for real: smaller linear maps, with the answers of the model whose heads are masked.

A head is a group of rows of the maps to queries, keys and values, and a group of columns of the output projection.
Heads are left out of both; the projection keeps its bias, as it does when a head's output is zero.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitrail.errors import Unsupported, UsageError
from vitrail.vit.anatomy import Anatomy
from vitrail.vit.clone import clone_sharing
from vitrail.vit.pruned import shrink

__all__ = ["Heads", "Removed", "attention_maps", "without_heads"]

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
class AttentionMaps:
    """Where the heads of one layer lie: `rows` are maps to q, k, v (one fused or three), `columns` projects them."""

    path: str
    rows: tuple[str, ...]
    columns: str
    heads: int
    width: int


@dataclass(frozen=True)
class Removed:
    """The smaller model, and per attention module what changed, as `vitrail.vit.pruned.shrink` takes it."""

    module: nn.Module
    changes: Mapping[str, Any]


def without_heads(model: nn.Module, anatomy: Anatomy, heads: Heads) -> Removed:
    """A copy of the model without these heads; all tensors that did not change are shared with it.

    A layer that loses all its heads keeps the bias of its projection and is no layer with attention any more. Raises
    `UsageError` for a head that is not there, `Unsupported` for attention whose heads cannot be taken apart.
    """
    _check_heads(anatomy, heads)
    layers = sorted({layer for layer, _ in heads})
    maps = attention_maps(model, anatomy, layers)
    clone = clone_sharing(model)
    changes: dict[str, Any] = {}
    state: dict[str, Tensor] = {}
    for layer in layers:
        kept = [head for head in range(maps[layer].heads) if (layer, head) not in heads]
        changes[maps[layer].path], smaller = _smaller(clone, maps[layer], kept)
        state |= smaller
    shrink(clone, changes, state)
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        clone.get_submodule(path)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    return Removed(clone.eval(), changes)


def attention_maps(model: nn.Module, anatomy: Anatomy, layers: Collection[int]) -> dict[int, AttentionMaps]:
    """The linear maps of each layer. Raises `Unsupported`, naming the layer, where they are not understood."""
    return {layer: _maps_of(model, anatomy, layer) for layer in layers}


def _maps_of(model: nn.Module, anatomy: Anatomy, layer: int) -> AttentionMaps:
    block = anatomy.blocks[layer]
    call = block.calls[0]
    module = model.get_submodule(call.path)
    if len(block.calls) > 1:
        raise Unsupported(_refusal(layer, f"it makes {len(block.calls)} attention calls"))
    inner = call.heads * call.head_dim
    for rows, columns in _LAYOUTS:
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in (*rows, columns)):
            sizes = {getattr(module, name).out_features * len(rows) for name in rows}
            if sizes != {3 * inner} or getattr(module, columns).in_features != inner:
                raise Unsupported(_refusal(layer, "its queries, keys and values have other sizes than its heads"))
            _refuse_other_weights(module, (*rows, columns), call.head_dim, layer)
            return AttentionMaps(call.path, rows, columns, call.heads, call.head_dim)
    raise Unsupported(_refusal(layer, f"{type(module).__name__} ({call.path}) has no such linear maps"))


def _refusal(layer: int, why: str) -> str:
    return (
        f"Heads of L{layer} cannot be removed: {why}. Vitrail removes heads from attention with a fused qkv and a proj "
        "(timm), or with q_proj, k_proj, v_proj and o_proj (transformers). Heads of any model can be masked."
    )


def _refuse_other_weights(module: nn.Module, known: tuple[str, ...], width: int, layer: int) -> None:
    """Weights with entries per head (position biases, gates, norms over all heads) would keep those of lost heads."""
    prefixes = tuple(f"{name}." for name in known)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    other = [name for name, value in tensors if not name.startswith(prefixes) and tuple(value.shape) != (width,)]
    if other:
        raise Unsupported(_refusal(layer, f"its attention has weights of its own ({', '.join(other[:3])})"))


def _smaller(clone: nn.Module, maps: AttentionMaps, kept: list[int]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the change, the new tensors by their full names)"""
    module = clone.get_submodule(maps.path)
    projection: nn.Linear = module.get_submodule(maps.columns)  # type: ignore[assignment]
    if not kept:
        bias = projection.bias if projection.bias is not None else projection.weight.new_zeros(projection.out_features)
        return {"kept": [], "pair": maps.columns == "o_proj"}, {f"{maps.path}.bias": bias.detach()}
    found: dict[str, Tensor] = {}
    for name in maps.rows:
        for leaf, tensor in module.get_submodule(name).named_parameters():
            by_head = tensor.detach().unflatten(0, (-1, maps.heads, maps.width))
            found[f"{maps.path}.{name}.{leaf}"] = by_head[:, kept].flatten(0, 2)
    columns = projection.weight.detach().unflatten(1, (maps.heads, maps.width))[:, kept].flatten(1)
    found[f"{maps.path}.{maps.columns}.weight"] = columns.contiguous()
    if projection.bias is not None:
        found[f"{maps.path}.{maps.columns}.bias"] = projection.bias.detach()
    change = {"kept": kept, "linears": [*maps.rows, maps.columns], "counts": _counts(module, maps, len(kept))}
    return change, found


def _counts(module: nn.Module, maps: AttentionMaps, n_kept: int) -> dict[str, int]:
    """The attributes that say how many heads there are, with their new values."""
    counts = {name: n_kept for name in _HEAD_COUNTS if getattr(module, name, None) == maps.heads}
    inner = maps.heads * maps.width
    return counts | {name: n_kept * maps.width for name in _WIDTHS if getattr(module, name, None) == inner}


def _check_heads(anatomy: Anatomy, heads: Heads) -> None:
    for layer, head in heads:
        if not 0 <= layer < len(anatomy.blocks) or not 0 <= head < anatomy.blocks[layer].heads:
            there = ", ".join(f"L{at} has H0 to H{block.heads - 1}" for at, block in enumerate(anatomy.blocks[:3]))
            raise UsageError(
                f"L{layer}H{head} is not a head of this model: it has L0 to L{len(anatomy.blocks) - 1} ({there}"
                f"{', ...' if len(anatomy.blocks) > 3 else ''})."
            )
