"""Seeing attention wherever it is computed: fused, inside `nn.MultiheadAttention`, or written by hand.

A `TorchFunctionMode` sees every torch function a model calls. Three of them matter:

1. `scaled_dot_product_attention`: handed to the handler with the exact q, k, v, mask and scale.
2. `multi_head_attention_forward`: its own body runs with the mode entered again, so the call inside arrives as 1 or 3.
3. `softmax` over the last dimension: its result is followed by identity through dropout, casts, views and head mixing
   to the product that consumes it. The operand of that product is the attention map; nothing is recomputed.

Additions are reported too: the one that joins the attention branch to the block's input is the residual.
"""

import math
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitrail.errors import Unsupported

__all__ = ["Captured", "Handler", "Interceptor", "RawCall", "fused_call", "has_native_path", "native_path_enabled"]


class Captured(BaseException):
    """Raised by a handler to stop a pass once it has what it came for. Not an `Exception`: models must not catch it."""


@dataclass(eq=False)
class RawCall:
    """One attention call with the tensors as the model laid them out.

    `run(bias, region)` gives the output of the model's own product: `bias` is added before softmax, `region` maps the
    weights to other weights. Without either the model's own kernel runs on the exact arguments it received.
    `first_query()` computes the output of the first query only, with zeros for the others.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor
    mask: Tensor | None
    scale: float
    fused: bool
    run: Callable[[Tensor | None, Callable[[Tensor], Tensor] | None], Tensor]
    weights: Callable[[Tensor | None], Tensor]
    scores_changed: bool = False
    first_query: Callable[[], Tensor] | None = None


@runtime_checkable
class Handler(Protocol):
    """What an interceptor reports to."""

    def attention(self, call: RawCall) -> Tensor:
        """Gives the result that the model goes on with."""

    def score_bias(self, scores: Tensor) -> Tensor | None:
        """What to add to scores that hand-written attention is about to hand to softmax."""

    def addition(self, left: Any, right: Any, result: Tensor) -> Tensor:
        """Gives the sum that the model goes on with."""


_MHA = F.multi_head_attention_forward
_SDPA = F.scaled_dot_product_attention
_SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax}
_PRODUCT = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, operator.matmul, Tensor.__rmatmul__}
_ADDITION = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}


def _body_of_mha() -> Callable[..., Any]:
    """`multi_head_attention_forward` without its own dispatch, which would call the mode again for ever."""
    scope = {**_MHA.__globals__, "has_torch_function": lambda _: False}
    body = types.FunctionType(_MHA.__code__, scope, _MHA.__name__, _MHA.__defaults__, _MHA.__closure__)
    body.__kwdefaults__ = _MHA.__kwdefaults__
    return body


_MHA_BODY = _body_of_mha()


class Interceptor(TorchFunctionMode):
    """Reports a model's attention calls and additions to a handler. One per clone; enter it around the call."""

    def __init__(self, handler: Handler) -> None:
        super().__init__()
        self.handler = handler
        self._live: dict[int, tuple[Tensor, _Softmax]] = {}

    def forget(self) -> None:
        """Lets go of softmax results that no product consumed (at the end of a block)."""
        self._live.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA:
            return self.handler.attention(fused_call(*args, **kwargs))
        if func is _MHA:
            with self:
                return _MHA_BODY(*args, **kwargs)
        if func in _SOFTMAX:
            return self._softmax(func, args, kwargs)
        if func in _ADDITION and len(args) == 2 and not self._live:
            return self.handler.addition(args[0], args[1], func(*args, **kwargs))
        if self._live:
            return self._follow(func, args, kwargs)
        return func(*args, **kwargs)

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Any:
        scores = args[0] if args else kwargs["input"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if scores.ndim < 3 or dim not in (-1, scores.ndim - 1):
            return func(*args, **kwargs)
        bias = self.handler.score_bias(scores)
        if bias is not None:
            args = (scores + bias, *args[1:])
            kwargs = {name: value for name, value in kwargs.items() if name != "input"}
        weights = func(*args, **kwargs)
        self._live = {id(weights): (weights, _Softmax(changed=bias is not None))}
        return weights

    def _follow(self, func: Any, args: Any, kwargs: Any) -> Any:
        origin = self._origin((*args, *kwargs.values()))
        if origin is None:
            if func in _ADDITION and len(args) == 2:
                return self.handler.addition(args[0], args[1], func(*args, **kwargs))
            return func(*args, **kwargs)
        tensor, softmax = origin
        product = _product_with(func, args, tensor)
        if product is not None:
            self._live.clear()
            out = self.handler.attention(_written_call(product, softmax))
            return out.mT if product.turned else out
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.numel() == tensor.numel():
            self._live[id(result)] = (result, softmax)
        return result

    def _origin(self, args: Any) -> "tuple[Tensor, _Softmax] | None":
        for argument in args:
            if isinstance(argument, Tensor) and id(argument) in self._live:
                return self._live[id(argument)]
            if isinstance(argument, (tuple, list)):
                found = self._origin(argument)
                if found is not None:
                    return found
        return None


@dataclass
class _Softmax:
    """Where a followed tensor comes from."""

    changed: bool = False


@dataclass
class _Product:
    """`weights @ v` as the model writes it: possibly turned round (`v @ weights^T`), possibly an einsum."""

    weights: Tensor
    v: Tensor
    again: Callable[[Tensor], Tensor] = field(repr=False)
    turned: bool = False


def _product_with(func: Any, args: Any, live: Tensor) -> _Product | None:
    """The product that consumes the followed tensor, in the orientation [.., query, key] @ [.., key, channel]."""
    if func is torch.einsum:
        return _einsum_with(args, live)
    if func not in _PRODUCT or len(args) != 2:
        return None
    left, right = args
    if left is live and _is_activation(right):
        return _Product(left, right, lambda weights: func(weights, right))
    if right is live and _is_activation(left):
        return _Product(right.mT, left.mT, lambda weights: func(left, weights.mT).mT, turned=True)
    return None


def _einsum_with(args: Any, live: Tensor) -> _Product | None:
    operands = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    if len(operands) != 2 or not any(operand is live for operand in operands):
        return None
    equation = str(args[0]).replace(" ", "")
    inputs, _, output = equation.partition("->")
    first, _, second = inputs.partition(",")
    plain = first[:-1] == output[:-1] and second[-2:-1] == first[-1] and second[-1:] == output[-1:]
    if operands[0] is not live or not plain or first[:-2] != second[:-2]:
        raise Unsupported(
            f"Attention written as einsum({args[0]!r}) is not of the form '...qk,...kd->...qd', "
            "so its map cannot be told apart."
        )
    return _Product(live, operands[1], lambda weights: torch.einsum(args[0], weights, operands[1]))


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.ndim >= 3


def _written_call(product: _Product, softmax: _Softmax) -> RawCall:
    def weights(_: Tensor | None) -> Tensor:
        return product.weights

    def run(_: Tensor | None, region: Callable[[Tensor], Tensor] | None) -> Tensor:
        return product.again(product.weights if region is None else region(product.weights))

    return RawCall(None, None, product.v, None, 1.0, False, run, weights, softmax.changed)


def fused_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **unknown: Any,
) -> RawCall:
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    keys, values = _grouped(q, k, v) if enable_gqa else (k, v)
    mask = _additive(attn_mask, is_causal, q, keys)

    def weights(bias: Tensor | None) -> Tensor:
        return _softmax_weights(q, keys, mask, bias, factor)

    def run(bias: Tensor | None, region: Callable[[Tensor], Tensor] | None) -> Tensor:
        if region is not None:
            return region(weights(bias)).to(values.dtype) @ values
        if bias is None:
            extra = {"enable_gqa": True, **unknown} if enable_gqa else unknown
            return _SDPA(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **extra)
        total = bias.to(q.dtype) if mask is None else mask + bias.to(q.dtype)
        return _SDPA(q, keys, values, total, dropout_p, False, scale=scale)

    def first_query() -> Tensor:
        first = mask if mask is None or mask.shape[-2] == 1 else mask[..., :1, :]
        whole = q.new_zeros((*q.shape[:-3], q.shape[-2], q.shape[-3], values.shape[-1])).transpose(-2, -3)
        whole[..., :1, :] = _SDPA(q[..., :1, :], keys, values, first, dropout_p, scale=scale)
        return whole

    return RawCall(q, keys, values, mask, factor, True, run, weights, first_query=first_query)


def _softmax_weights(q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """Post-softmax attention in float32 or wider; the product of q and k in the model's own precision."""
    scores = torch.matmul(q * scale, k.mT)
    if mask is not None:
        scores = scores + mask
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    wide = torch.float32 if scores.dtype in (torch.bfloat16, torch.float16) else scores.dtype
    return torch.softmax(scores, dim=-1, dtype=wide)


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[-3] // k.shape[-3]
    return k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3)


def _additive(mask: Tensor | None, is_causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as a float tensor that is added to the scores."""
    if is_causal:
        mask = torch.ones((q.shape[-2], k.shape[-2]), dtype=torch.bool, device=q.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)


def has_native_path(module: nn.Module) -> bool:
    """The module may answer from one native kernel, which no mode sees and which any active mode turns off."""
    return isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer))


def native_path_enabled() -> bool:
    """The native kernels are on (`torch.backends.mha`)."""
    return bool(torch.backends.mha.get_fastpath_enabled())
