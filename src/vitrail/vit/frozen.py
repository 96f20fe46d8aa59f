"""A model as a linear map: everything that its input decides is held as it was at one image.

Attention weights, the statistics of norms and the gain of each activation (f(x) / x) are recorded in one pass. With
them held still, what is left from pixels to any token is linear plus a constant, whatever library the model is from:

    seen = Frozen()
    with seen:                  # records
        tap.read(image, ...)
    with seen.again():          # the same map on another input
        tap.read(other, ...)

A product of two signals (a gated MLP) is split between them, each half with the other held still. What is not known
here (a maximum, say) stays as it is; the map is then not linear, which a caller finds by comparing sums.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitrail.errors import Unsupported
from vitrail.vit.intercept import fused_call

__all__ = ["Frozen"]

_SDPA = F.scaled_dot_product_attention
_ACTIVATIONS = {
    F.gelu, F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, F.silu, F.mish, F.hardswish, F.leaky_relu, F.elu,
    F.selu, F.celu, torch.tanh, Tensor.tanh, F.tanh,
}  # fmt: skip
"""Elementwise functions with f(0) = 0: x times a gain."""

_HELD = {
    torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax, torch.sigmoid, Tensor.sigmoid, F.sigmoid,
    F.hardsigmoid, torch.rsqrt, Tensor.rsqrt, torch.sqrt, Tensor.sqrt, torch.exp, Tensor.exp, torch.pow, Tensor.pow,
    Tensor.__pow__, torch.square, Tensor.square, torch.var, Tensor.var, torch.std, Tensor.std, torch.norm, Tensor.norm,
    torch.linalg.vector_norm, torch.linalg.norm, torch.reciprocal, Tensor.reciprocal,
}  # fmt: skip
"""Results that steer others (weights, gates, statistics): held whole."""

_PRODUCTS = {
    torch.mul,
    torch.multiply,
    Tensor.mul,
    Tensor.multiply,
    Tensor.__mul__,
    Tensor.__rmul__,
    Tensor.mul_,
    Tensor.__imul__,
}
_QUOTIENTS = {torch.div, torch.true_divide, Tensor.div, Tensor.true_divide, Tensor.__truediv__}


class Frozen(TorchFunctionMode):
    """Enter it around a pass of a tap with gradients on. It changes no value of the pass that it records, but for the
    rounding of kernels that it takes apart."""

    def __init__(self) -> None:
        super().__init__()
        self._held: list[Any] = []
        self._place: int | None = None
        """Where a repeated pass has come to; None while recording."""

    @contextmanager
    def again(self) -> Iterator[None]:
        """A pass of the same model that uses what was recorded. Raises `Unsupported` if it goes another way."""
        self._place = 0
        try:
            with self:
                yield
            if self._place != len(self._held):
                raise Unsupported(_OTHER_WAY)
        finally:
            self._place = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA:
            return self._attention(*args, **kwargs)
        if func is F.layer_norm:
            return self._norm(True, *args, **kwargs)
        if func is F.rms_norm:
            return self._norm(False, *args, **kwargs)
        if func in _ACTIVATIONS and _is_signal(args[0]):
            return self._activation(func, args, kwargs)
        if func in _HELD:
            return self._kept(lambda: func(*args, **kwargs))
        if func in _PRODUCTS and len(args) == 2 and _is_signal(args[0]) and _is_signal(args[1]):
            return self._product(*args)
        if func in _QUOTIENTS and len(args) == 2 and _is_signal(args[1]):
            below = self._kept(lambda: args[1])
            return func(args[0], below, **kwargs)
        return func(*args, **kwargs)

    def _kept(self, make: Callable[[], Any]) -> Any:
        """What `make` gives while recording, the same again afterwards; no gradient flows to it."""
        if self._place is None:
            made = make()
            held = made.detach() if isinstance(made, Tensor) else made
            self._held.append(held)
            return held
        if self._place == len(self._held):
            raise Unsupported(_OTHER_WAY)
        self._place += 1
        return self._held[self._place - 1]

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        call = fused_call(*args, **kwargs)
        weights: Tensor = self._kept(lambda: call.weights(None))
        out: Tensor = weights.to(call.v.dtype) @ call.v
        return out

    def _norm(
        self, centred: bool, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
        eps: float | None = 1e-5,
    ) -> Tensor:  # fmt: skip
        axes = tuple(range(-len(shape), 0))
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        moved = wide - wide.mean(axes, keepdim=True) if centred else wide
        least = torch.finfo(x.dtype).eps if eps is None else eps
        scale: Tensor = self._kept(lambda: (moved.square().mean(axes, keepdim=True) + least).rsqrt())
        normed = (moved * scale).to(x.dtype)
        normed = normed if weight is None else normed * weight
        return normed if bias is None else normed + bias

    def _activation(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        x: Tensor = args[0]

        def gain() -> Tensor:
            still = x.detach()
            answer: Tensor = func(still.clone(), *args[1:], **kwargs)
            return torch.where(still != 0, answer / torch.where(still != 0, still, 1), 0)

        steered: Tensor = x * self._kept(gain)
        return steered

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        one, other = self._kept(lambda: left), self._kept(lambda: right)
        halves: Tensor = 0.5 * (left * other + one * right)
        return halves


_OTHER_WAY = "This model takes another way for another input, so it cannot be held still as a linear map."


def _is_signal(value: Any) -> bool:
    """The tensor depends on the input, as far as gradients tell; parameters, and views of them, do not."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or not value.requires_grad:
        return False
    return not isinstance(value._base, nn.Parameter)
