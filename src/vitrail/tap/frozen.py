"""A model as a linear map: everything in it that depends on the input is frozen at its values for one image.

Attention weights, the statistics of norms and the gain of each activation (f(x) / x) are recorded in one pass. With
them frozen, the model is linear plus a constant from pixels to any token, whatever library it is from:

    frozen = Frozen()
    with frozen:                # records
        tap.read(image, ...)
    with frozen.replay():       # the same map on another input
        tap.read(other, ...)

A product of two signals (a gated MLP) is split between them, each half with the other frozen. Operations that are not
known here (a maximum, say) stay as they are; the map is then not linear, which a caller finds by comparing sums.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitrail.errors import Unsupported
from vitrail.tap.intercept import operands_first, sdpa_call

__all__ = ["Frozen"]

_SDPA = F.scaled_dot_product_attention
_ACTIVATIONS = {
    F.gelu,
    F.relu,
    F.relu_,
    torch.relu,
    torch.relu_,
    Tensor.relu,
    F.silu,
    F.mish,
    F.hardswish,
    F.leaky_relu,
    F.elu,
    F.selu,
    F.celu,
    torch.tanh,
    Tensor.tanh,
    F.tanh,
}
"""Elementwise functions with f(0) = 0: x times a gain."""

_FROZEN_WHOLE = {
    torch.softmax,
    Tensor.softmax,
    F.softmax,
    torch.special.softmax,
    torch.sigmoid,
    Tensor.sigmoid,
    F.sigmoid,
    F.hardsigmoid,
    torch.rsqrt,
    Tensor.rsqrt,
    torch.sqrt,
    Tensor.sqrt,
    torch.exp,
    Tensor.exp,
    torch.pow,
    Tensor.pow,
    Tensor.__pow__,
    torch.square,
    Tensor.square,
    torch.var,
    Tensor.var,
    torch.std,
    Tensor.std,
    torch.norm,
    Tensor.norm,
    torch.linalg.vector_norm,
    torch.linalg.norm,
    torch.reciprocal,
    Tensor.reciprocal,
}
"""Results that steer others (weights, gates, statistics): frozen whole."""

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
    """Records, and replays, everything in a pass that depends on the input.

    Enter it around a pass of a tap with gradients enabled. It changes no value of the pass that it records, but for the
    rounding of kernels that it takes apart.

    Example:
        >>> frozen = Frozen()
        >>> with torch.enable_grad(), frozen:
        ...     tap.read(image.requires_grad_())
        >>> with frozen.replay():
        ...     tap.read(other.requires_grad_())  # linear in `other`, up to a constant
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: list[Any] = []
        self._next: int | None = None
        """Index of the value that a replayed pass takes next; None while recording."""

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Around a pass of the same model, uses the recorded values instead of its own.

        Returns:
            Nothing; a context manager.

        Raises:
            Unsupported: The pass takes another path than the recorded one.
        """
        self._next = 0
        try:
            with self:
                yield
            if self._next != len(self._values):
                raise Unsupported(_OTHER_PATH)
        finally:
            self._next = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs and (func in _ACTIVATIONS or func in _PRODUCTS or func in _QUOTIENTS):
            args, kwargs = operands_first(args, kwargs)
        if func is _SDPA:
            return self._attention(*args, **kwargs)
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is F.rms_norm:
            return self._rms_norm(*args, **kwargs)
        if func is F.group_norm:
            return self._group_norm(*args, **kwargs)
        if func in _ACTIVATIONS and _is_signal(args[0]):
            return self._activation(func, args, kwargs)
        if func in _FROZEN_WHOLE:
            return self._freeze(lambda: func(*args, **kwargs))
        if func in _PRODUCTS and len(args) == 2 and _is_signal(args[0]) and _is_signal(args[1]):
            return self._product(*args)
        if func in _QUOTIENTS and len(args) == 2 and _is_signal(args[1]):
            divisor = self._freeze(lambda: args[1])
            return func(args[0], divisor, **kwargs)
        return func(*args, **kwargs)

    def _freeze(self, compute: Callable[[], Any]) -> Any:
        """The result of `compute` while recording, the recorded one in a replay; no gradient flows to it."""
        if self._next is None:
            value = compute()
            value = value.detach() if isinstance(value, Tensor) else value
            self._values.append(value)
            return value
        if self._next == len(self._values):
            raise Unsupported(_OTHER_PATH)
        self._next += 1
        return self._values[self._next - 1]

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        call = sdpa_call(*args, **kwargs)
        weights: Tensor = self._freeze(lambda: call.weights(None))
        out: Tensor = weights.to(call.v.dtype) @ call.v
        return out

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        """`torch.nn.functional.layer_norm`, argument for argument."""
        axes = tuple(range(-len(normalized_shape), 0))
        wide = _widen(input)
        normed = self._scale(wide - wide.mean(axes, keepdim=True), axes, eps).to(input.dtype)
        normed = normed if weight is None else normed * weight
        return normed if bias is None else normed + bias

    def _rms_norm(
        self, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        """`torch.nn.functional.rms_norm`, argument for argument."""
        axes = tuple(range(-len(normalized_shape), 0))
        floor = torch.finfo(input.dtype).eps if eps is None else eps
        normed = self._scale(_widen(input), axes, floor).to(input.dtype)
        return normed if weight is None else normed * weight

    def _group_norm(
        self, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        """`torch.nn.functional.group_norm`, argument for argument."""
        wide = _widen(input).unflatten(1, (num_groups, -1)).flatten(2)
        normed = self._scale(wide - wide.mean(2, keepdim=True), (2,), eps).view(input.shape).to(input.dtype)
        of_channel = (-1, *[1] * (input.ndim - 2))
        normed = normed if weight is None else normed * weight.view(of_channel)
        return normed if bias is None else normed + bias.view(of_channel)

    def _scale(self, x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
        """x over its root mean square, which is frozen."""
        scale: Tensor = self._freeze(lambda: (x.square().mean(axes, keepdim=True) + eps).rsqrt())
        return x * scale

    def _activation(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        x: Tensor = args[0]

        def gain() -> Tensor:
            at = x.detach()
            result: Tensor = func(at.clone(), *args[1:], **kwargs)
            return torch.where(at != 0, result / torch.where(at != 0, at, 1), 0)

        scaled: Tensor = x * self._freeze(gain)
        return scaled

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        one, other = self._freeze(lambda: left), self._freeze(lambda: right)
        halves: Tensor = 0.5 * (left * other + one * right)
        return halves


_OTHER_PATH = "This model takes another path for another input, so it cannot be frozen as a linear map."


def _is_signal(value: Any) -> bool:
    """Whether the tensor depends on the input, as far as gradients tell; parameters and views of them do not."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or not value.requires_grad:
        return False
    return not isinstance(value._base, nn.Parameter)


def _widen(x: Tensor) -> Tensor:
    """Half precision as float32, in which norms are computed."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
