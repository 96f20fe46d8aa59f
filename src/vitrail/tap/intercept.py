"""Seeing attention wherever it is computed: fused, inside `nn.MultiheadAttention`, or written by hand.

A `TorchFunctionMode` sees every torch function a model calls. Three kinds of them matter:

1. `scaled_dot_product_attention`: handed to the handler with the exact q, k, v, mask and scale; and the operator inside
   `flex_attention`, whose map comes from the operator itself.
2. `multi_head_attention_forward`: its own body runs with the mode entered again, so the call inside arrives as 1 or 3.
3. `softmax` over the last dimension: its result is followed by identity through dropout, casts, views and head mixing
   to every product with values. The operand of that product is the attention map; nothing is recomputed.

Additions are reported too: the one that joins the attention branch to the block's input is the residual.
"""

import math
import operator
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitrail.errors import Unsupported
from vitrail.tap.budget import budget_of

__all__ = [
    "Captured",
    "Handler",
    "Interceptor",
    "PassiveHandler",
    "RawCall",
    "Region",
    "has_native_path",
    "native_path_enabled",
    "operands_first",
    "sdpa_call",
]


_MIN_ATTENTION_DIMS = 3
"""A map has at least (batch, query, key) and values (batch, key, channel). A softmax of fewer dimensions is over
classes or a gate; a product with fewer is with a weight."""


class Captured(BaseException):
    """Stops a pass once its handler has what it came for. Not an `Exception`: models must not catch it."""


@dataclass(frozen=True, eq=False)
class Region:
    """What weights after softmax are mapped to.

    Attributes:
        change: Maps the weights [.., query, key] of a slice of the queries to other weights.
        by_query: Queries may come some at a time, as they have the order that `change` counts them in.
    """

    change: Callable[[Tensor, slice], Tensor]
    by_query: bool = True


PIECE_BYTES = 2**26
"""Bound on the weights of one piece on a processor, where they are changed: a usual batch is one piece, and maps of
thousands of tokens are cut into rows of queries."""


@dataclass(eq=False)
class RawCall:
    """One attention call with the tensors as the model laid them out.

    Attributes:
        q: [.., query, channel]; None where the model computes the map by hand.
        k: [.., key, channel]; None where the model computes the map by hand.
        v: [.., key, channel].
        mask: What is added to the scores, or None.
        scale: Factor on q k^T.
        fused: The call is `scaled_dot_product_attention`.
        run: `run(bias, region)` gives the output [.., query, channel] of the model's own product: `bias` is added
            before softmax, `region` maps the weights to other weights. Without either the model's own kernel runs on
            the exact arguments it received.
        weights: `weights(bias)` gives the map [.., query, key] after softmax, float32 or wider for fused calls.
        softmaxes: Which softmaxes the map comes from, of those that `Handler.score_bias` was asked about since the
            interceptor last forgot, from 0; none for fused calls.
        scores_changed: A bias has been added to the scores on their way to each of these softmaxes.
        first_query: Computes the output of the first query only, with zeros for the others; None where that is not
            possible.
        is_softmax_of_qk: The map is softmax(scale q k^T + mask), so that a reader may compute any part of it itself.
        pieces: `pieces(bias)` gives the map some queries at a time, with the place of those queries, in bounded memory;
            None where the model makes all of it.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor
    mask: Tensor | None
    scale: float
    fused: bool
    run: Callable[[Tensor | None, Region | None], Tensor]
    weights: Callable[[Tensor | None], Tensor]
    softmaxes: tuple[int, ...] = ()
    scores_changed: bool = False
    first_query: Callable[[], Tensor] | None = None
    is_softmax_of_qk: bool = False
    pieces: Callable[[Tensor | None], Iterator[tuple[slice, Tensor]]] | None = None


@runtime_checkable
class Handler(Protocol):
    """The receiver of an interceptor's reports."""

    def attention(self, call: RawCall) -> Tensor:
        """Receives an attention call and returns the output that the model goes on with.

        Args:
            call: The attention call.

        Returns:
            [.., query, channel].
        """

    def score_bias(self, scores: Tensor) -> Tensor | None:
        """Receives the scores of hand-written attention before softmax; returns what to add to them, or None.

        Args:
            scores: [.., query, key] before softmax.

        Returns:
            A tensor that broadcasts to the scores, or None.
        """

    def addition(self, left: Any, right: Any, result: Tensor) -> Tensor:
        """Receives a sum and its operands, and returns the sum that the model goes on with.

        Args:
            left: First operand.
            right: Second operand.
            result: Their sum.

        Returns:
            The sum, shaped as `result`.
        """


class PassiveHandler:
    """A handler that changes nothing, to derive from."""

    def attention(self, call: RawCall) -> Tensor:
        """Runs the model's own product.

        Args:
            call: The attention call.

        Returns:
            [.., query, channel], as the model computes it.
        """
        return call.run(None, None)

    def score_bias(self, scores: Tensor) -> Tensor | None:
        """Adds nothing.

        Args:
            scores: [.., query, key] before softmax.

        Returns:
            None.
        """
        return None

    def addition(self, left: Any, right: Any, result: Tensor) -> Tensor:
        """Leaves the sum as it is.

        Args:
            left: First operand.
            right: Second operand.
            result: Their sum.

        Returns:
            `result`.
        """
        return result


_MHA = F.multi_head_attention_forward
_SDPA = F.scaled_dot_product_attention
_SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax}
_PRODUCT = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, operator.matmul, Tensor.__rmatmul__}
_FLEX = "FlexAttentionHOP"
"""The class of the operator inside `flex_attention`; importing it takes a second, which few models need."""

_OPERANDS = ("input", "other", "mat2")
"""What torch calls the operands of sums and products, in their order."""

_ADDITION = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}


def _mha_body() -> Callable[..., Any]:
    """`multi_head_attention_forward` without its own dispatch, which would call the mode again for ever."""
    scope = {**_MHA.__globals__, "has_torch_function": lambda _: False}
    body = types.FunctionType(_MHA.__code__, scope, _MHA.__name__, _MHA.__defaults__, _MHA.__closure__)
    body.__kwdefaults__ = _MHA.__kwdefaults__
    return body


_MHA_BODY = _mha_body()


class Interceptor(TorchFunctionMode):
    """Reports a model's attention calls and additions to a handler. Enter it around the model's call.

    Args:
        handler: Receives the calls and additions.
    """

    def __init__(self, handler: Handler) -> None:
        super().__init__()
        self.handler = handler
        self._live: dict[int, tuple[weakref.ref[Tensor], frozenset[int]]] = {}
        """By id, the tensors that carry softmax results on their way to products, and which softmaxes those are. An
        entry goes when the model lets go of the tensor."""
        self._scores_changed: list[bool] = []
        """Of each softmax so far, whether the handler has added to its scores."""

    def forget(self) -> None:
        """Drops softmax results that the model still has (at the end of a block), and counts softmaxes from 0 again."""
        self._live.clear()
        self._scores_changed.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs and (func in _ADDITION or func in _PRODUCT):
            args, kwargs = operands_first(args, kwargs)
        if func is _SDPA:
            return self.handler.attention(sdpa_call(*args, **kwargs))
        if type(func).__name__ == _FLEX:
            call, outputs = _flex_call(func, *args, **kwargs)
            return (self.handler.attention(call), *outputs()[1:])
        if func is _MHA:
            with self:
                return _MHA_BODY(*args, **kwargs)
        if func in _SOFTMAX:
            return self._softmax(func, args, kwargs)
        if func in _ADDITION and len(args) == 2 and not self._live:
            return self.handler.addition(args[0], args[1], func(*args, **kwargs))
        if self._live:
            return self._track(func, args, kwargs)
        return func(*args, **kwargs)

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Any:
        scores = args[0] if args else kwargs["input"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if scores.ndim < _MIN_ATTENTION_DIMS or dim not in (-1, scores.ndim - 1):
            return func(*args, **kwargs)
        bias = self.handler.score_bias(scores)
        if bias is not None:
            args = (scores + bias, *args[1:])
            kwargs = {name: value for name, value in kwargs.items() if name != "input"}
        weights = func(*args, **kwargs)
        self._follow(weights, frozenset({len(self._scores_changed)}))
        self._scores_changed.append(bias is not None)
        return weights

    def _follow(self, tensor: Tensor, softmaxes: frozenset[int]) -> None:
        key = id(tensor)
        self._live[key] = weakref.ref(tensor, lambda _: self._live.pop(key, None)), softmaxes

    def _track(self, func: Any, args: Any, kwargs: Any) -> Any:
        maps = [*self._maps_among((*args, *kwargs.values()))]
        if not maps:
            if func in _ADDITION and len(args) == 2:
                return self.handler.addition(args[0], args[1], func(*args, **kwargs))
            return func(*args, **kwargs)
        tensor, softmaxes = maps[0][0], frozenset[int]().union(*(softmaxes for _, softmaxes in maps))
        product = _product_of(func, args, tensor) if len(maps) == 1 else None  # a product of two maps is a map
        if product is not None:
            changed = all(self._scores_changed[number] for number in softmaxes)
            call = _handwritten_call(product, tuple(sorted(softmaxes)), scores_changed=changed)
            return product.as_written(self.handler.attention(call))
        result = func(*args, **kwargs)
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor) and _is_still_the_map(func, each, tensor):
                self._follow(each, softmaxes)
        return result

    def _maps_among(self, args: Any) -> Iterator[tuple[Tensor, frozenset[int]]]:
        for argument in args:
            if isinstance(argument, Tensor):
                reference, softmaxes = self._live.get(id(argument), (None, frozenset[int]()))
                if reference is not None and reference() is argument:
                    yield argument, softmaxes
            elif isinstance(argument, (tuple, list)):
                yield from self._maps_among(argument)


_SELECTION = {
    Tensor.__getitem__,
    Tensor.select,
    torch.select,
    Tensor.unbind,
    torch.unbind,
    Tensor.chunk,
    torch.chunk,
    Tensor.split,
    torch.split,
}


def _is_still_the_map(func: Any, result: Tensor, tensor: Tensor) -> bool:
    """Whether what was made of a map is a map of the same queries and keys: with as many elements after dropout, a
    cast, a view, a bias, mixing of heads; with others where heads were selected, or mixed to another number."""
    if result.numel() == tensor.numel():
        return True
    keeps_heads = func in _SELECTION or func is torch.einsum
    return keeps_heads and result.ndim >= _MIN_ATTENTION_DIMS and result.shape[-2:] == tensor.shape[-2:]


def _unchanged(out: Tensor) -> Tensor:
    return out


@dataclass
class _Product:
    """`weights @ v` as the model writes it: possibly transposed (`v @ weights^T`), possibly an einsum."""

    weights: Tensor
    v: Tensor
    multiply: Callable[[Tensor], Tensor] = field(repr=False)
    """The model's own product with other weights, as [.., query, channel]."""
    as_written: Callable[[Tensor], Tensor] = field(default=_unchanged, repr=False)
    """[.., query, channel] in the order of the model's own product."""


def _product_of(func: Any, args: Any, live: Tensor) -> _Product | None:
    """The product that consumes the tracked tensor, in the orientation [.., query, key] @ [.., key, channel]."""
    if func is torch.einsum:
        return _einsum_product(args, live)
    if func not in _PRODUCT or len(args) != 2:
        return None
    left, right = args
    if left is live and _is_activation(right):
        return _Product(left, right, lambda weights: func(weights, right))
    if right is live and _is_activation(left):
        return _Product(right.mT, left.mT, lambda weights: func(left, weights.mT).mT, lambda out: out.mT)
    return None


def operands_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Moves operands that a call names, as in `torch.matmul(input=a, other=b)`, in front of the other arguments.

    Args:
        args: Positional arguments.
        kwargs: Arguments by name.

    Returns:
        The same arguments with the operands by position.
    """
    named = tuple(kwargs[name] for name in _OPERANDS if name in kwargs)
    return (*args, *named), {name: value for name, value in kwargs.items() if name not in _OPERANDS}


def _einsum_product(args: Any, live: Tensor) -> _Product | None:
    """Attention as einsum: either operand first, its axes in any order ("bkhd,bhqk->bqhd")."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    if len(operands) != 2 or not any(operand is live for operand in operands):
        return None
    equation = str(args[0]).replace(" ", "")
    inputs, _, output = equation.partition("->")
    first, _, second = inputs.partition(",")
    place = 0 if operands[0] is live else 1
    weights_axes, v_axes = (first, second) if place == 0 else (second, first)
    v = operands[1 - place]
    if not set(weights_axes) - set(v_axes):
        return None  # no axis counts queries: each token weighs things of its own, as a mixture weighs its experts
    if output[-2:] == weights_axes[-2:] and not set(v_axes) & set(output[-2:]):
        return None  # heads are mixed: what comes out is still the map
    axes = _einsum_axes(weights_axes, v_axes, output)
    if axes is None and {*weights_axes[-2:]} <= {*v_axes}:
        raise Unsupported(
            f"Attention written as einsum({args[0]!r}) has values of their own for each pair of a query and a key "
            "(relative positions added to the values), so what a head gives is no product of its map with one set of "
            "values, which is what Vitrail reads and prunes."
        )
    if axes is None:
        raise Unsupported(
            f"Attention written as einsum({args[0]!r}) does not sum the keys of one map with the values of as many "
            "keys, so its map cannot be recognised."
        )
    batch, query, key, channel = axes

    def multiply(weights: Tensor) -> Tensor:
        written = _permute(weights, batch + query + key, weights_axes)
        pair = (written, v) if place == 0 else (v, written)
        return _permute(torch.einsum(args[0], *pair), output, batch + query + channel)

    shared = [letter for letter in batch if letter not in v_axes]  # one set of values for several heads
    values = _permute(v[(None,) * len(shared)], "".join(shared) + v_axes, batch + key + channel)
    return _Product(
        _permute(live, weights_axes, batch + query + key),
        values,
        multiply,
        lambda out: _permute(out, batch + query + channel, output),
    )


def _einsum_axes(weights: str, v: str, output: str) -> tuple[str, str, str, str] | None:
    """The letters of (batch, query, key, channel) in an einsum of a map and values; None where it is another product.

    An ellipsis stands for batch axes that lead everywhere.
    """
    if any("..." in axes and not axes.startswith("...") for axes in (weights, v, output)):
        return None
    dots = "..." in weights
    if dots != ("..." in output) or dots != ("..." in v):
        return None
    weights, v, output = (axes.removeprefix("...") for axes in (weights, v, output))
    key, channel = set(weights) & set(v) - set(output), set(v) - set(weights)
    query = set(weights[-2:-1]) & set(output) - set(v)
    if (len(key), len(channel), len(query)) != (1, 1, 1) or weights[-1] not in key:
        return None  # the softmax was over the last axis: that of the keys
    batch = "".join(letter for letter in weights if letter not in query | key)
    if set(output) != {*batch, *query, *channel} or not set(v) <= {*batch, *key, *channel}:
        return None
    return "..." * dots + batch, query.pop(), key.pop(), channel.pop()


def _permute(tensor: Tensor, axes: str, order: str) -> Tensor:
    """A view of the tensor with its named axes in another order."""
    if axes == order:
        return tensor
    n_dots = tensor.ndim - len(axes.replace("...", ""))
    names = [*range(n_dots), *axes.removeprefix("...")]
    return tensor.permute([names.index(name) for name in [*range(n_dots), *order.removeprefix("...")]])


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.ndim >= _MIN_ATTENTION_DIMS


def _handwritten_call(product: _Product, softmaxes: tuple[int, ...], *, scores_changed: bool) -> RawCall:
    def weights(_: Tensor | None) -> Tensor:
        return product.weights

    def run(_: Tensor | None, region: Region | None) -> Tensor:
        return product.multiply(product.weights if region is None else region.change(product.weights, slice(None)))

    _, values = _broadcast(product.weights, product.v)
    return RawCall(None, None, values, None, 1.0, False, run, weights, softmaxes, scores_changed)


def sdpa_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **unknown: Any,
) -> RawCall:
    """Describes a call of `scaled_dot_product_attention` from its arguments, which have torch's own names.

    Grouped keys and values are repeated to one per query head, and boolean and causal masks become additive ones, in
    what readers see; without an edit the kernel still gets the arguments as they came.

    Args:
        query: [.., head, query, channel].
        key: [.., head or group, key, channel].
        value: [.., head or group, key, channel].
        attn_mask: Boolean or additive, broadcast to [.., head, query, key].
        dropout_p: Share of the weights that the kernel drops.
        is_causal: Whether a query sees only the keys up to itself.
        scale: Factor of the scores; None for 1 / sqrt(channels).
        enable_gqa: Whether keys and values are shared by groups of heads.
        **unknown: Arguments of later torch versions, handed on.

    Returns:
        The call, which runs with or without edits.
    """
    q, k, v = query, key, value
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    queries, keys, values = _broadcast(q, *(_repeat_groups(q, k, v) if enable_gqa else (k, v)))
    mask = _additive_mask(attn_mask, is_causal, queries, keys)

    def weights(bias: Tensor | None) -> Tensor:
        return _softmax_weights(queries, keys, mask, bias, factor)

    def pieces(bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        n_queries = queries.shape[-2]
        bytes_per_query = 4 * queries.shape[:-2].numel() * keys.shape[-2]
        step = max(1, budget_of(q.device).bytes_for(PIECE_BYTES) // max(1, bytes_per_query))
        for start in range(0, n_queries, step):
            part = slice(start, min(start + step, n_queries))
            own_mask, own_bias = _of_queries(mask, part), _of_queries(bias, part)
            yield part, _softmax_weights(queries[..., part, :], keys, own_mask, own_bias, factor)

    def run(bias: Tensor | None, region: Region | None) -> Tensor:
        if region is not None:
            parts = pieces(bias) if region.by_query else [(slice(None), weights(bias))]
            return torch.cat([region.change(part, rows).to(values.dtype) @ values for rows, part in parts], -2)
        if bias is None:
            extra = {"enable_gqa": True, **unknown} if enable_gqa else unknown
            return _SDPA(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **extra)
        total = bias.to(q.dtype) if mask is None else mask + bias.to(q.dtype)
        return _SDPA(queries, keys, values, total, dropout_p, False, scale=scale)

    def first_query() -> Tensor:
        first = mask if mask is None or mask.shape[-2] == 1 else mask[..., :1, :]
        # strides as the kernel's own result has them (heads inside queries), so that a view in the model stays possible
        n_queries, n_heads = queries.shape[-2], queries.shape[-3]
        out = q.new_zeros((*queries.shape[:-3], n_queries, n_heads, values.shape[-1])).transpose(-2, -3)
        out[..., :1, :] = _SDPA(queries[..., :1, :], keys, values, first, dropout_p, scale=scale)
        return out

    return RawCall(
        queries,
        keys,
        values,
        mask,
        factor,
        True,
        run,
        weights,
        first_query=first_query,
        is_softmax_of_qk=True,
        pieces=pieces,
    )


def _flex_call(
    func: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any
) -> tuple[RawCall, Callable[[], tuple[Tensor, ...]]]:
    """Describes a call of the operator inside `flex_attention`, and all that the operator gives.

    The map is what the operator gives for values that are the unit matrix: score and mask functions act as ever.
    """

    @cache
    def outputs() -> tuple[Tensor, ...]:
        given: tuple[Tensor, ...] = func(q, k, v, *rest, **options)
        return given

    queries, keys, values = _broadcast(q, *_repeat_groups(q, k, v))

    def weights(bias: Tensor | None) -> Tensor:
        unit = torch.eye(k.shape[-2], dtype=v.dtype, device=v.device).expand(*k.shape[:-1], -1)
        shares = func(q, k, unit, *rest, **options)[0]
        shares = shares.to(torch.promote_types(shares.dtype, torch.float32))
        return shares if bias is None else torch.softmax(shares.log() + bias, -1)

    def run(bias: Tensor | None, region: Region | None) -> Tensor:
        if bias is None and region is None:
            return outputs()[0]
        edited = weights(bias)
        return (edited if region is None else region.change(edited, slice(None))).to(values.dtype) @ values

    scale = rest[2] if len(rest) > 2 else options["scale"]
    return RawCall(queries, keys, values, None, float(scale), True, run, weights), outputs


def _softmax_weights(q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """Post-softmax attention in float32 or wider; the product of q and k in the model's own precision."""
    scores = torch.matmul(q * scale, k.mT)
    if mask is not None:
        scores = scores + mask
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    wide = torch.float32 if scores.dtype in (torch.bfloat16, torch.float16) else scores.dtype
    return torch.softmax(scores, dim=-1, dtype=wide)


def _of_queries(scores: Tensor | None, queries: slice) -> Tensor | None:
    """Rows of what is added to scores; one row may stand for all."""
    return scores if scores is None or scores.shape[-2] == 1 else scores[..., queries, :]


def _broadcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """One set of keys and values may serve several heads or images: each has its own in what readers see."""
    lead = torch.broadcast_shapes(*(each.shape[:-2] for each in tensors))
    return tuple(each.expand(*lead, -1, -1) for each in tensors)


def _repeat_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[-3] // k.shape[-3]
    return k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3)


def _additive_mask(mask: Tensor | None, is_causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as a float tensor that is added to the scores."""
    if is_causal:
        mask = torch.ones((q.shape[-2], k.shape[-2]), dtype=torch.bool, device=q.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)


def has_native_path(module: nn.Module) -> bool:
    """Whether the module may answer from one native kernel, which no mode sees and any active mode turns off.

    Args:
        module: Any module.

    Returns:
        True for torch's own attention and encoder layers.
    """
    return isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer))


def native_path_enabled() -> bool:
    """Whether native kernels are on (`torch.backends.mha`).

    Returns:
        True unless they were turned off for the process.
    """
    return bool(torch.backends.mha.get_fastpath_enabled())
