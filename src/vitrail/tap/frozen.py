"""A model as a linear map: everything in it that depends on the input is frozen at its values for one image.

Attention weights, the statistics of norms and the gain of each activation (f(x) / x) are recorded in one pass. With
them frozen, the model is linear plus a constant from pixels to any token, whatever library it is from:

    frozen = Frozen()
    with frozen:                # records
        tap.read(image, ...)
    with frozen.replay():       # the same map on another input
        tap.read(other, ...)

A product of two signals (a gated MLP) is split between them, each half with the other frozen. Operations that are not
known here (a maximum, say) stay as they are; the map is then not linear, which a caller finds by comparing sums. What
is computed of a trainable parameter cannot be told from a signal: read with `parameters_at_rest` around.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
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
    Tensor.relu_,
    F.relu6,
    F.hardtanh,
    F.hardtanh_,
    F.prelu,
    torch.prelu,
    F.softsign,
    F.silu,
    F.mish,
    F.hardswish,
    F.leaky_relu,
    F.elu,
    F.selu,
    F.celu,
    torch.tanh,
    torch.tanh_,
    Tensor.tanh,
    Tensor.tanh_,
    F.tanh,
    torch.square,
    Tensor.square,
}
"""Elementwise functions with f(0) = 0: x times a gain. A square that a norm is made of is held still by its root."""

_POWERS = {torch.pow, Tensor.pow, Tensor.__pow__}
"""As activations where the exponent is above 0, else whole: the reciprocal of a statistic."""

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

    def __enter__(self) -> "Frozen":
        self._whole = disable_saved_tensors_hooks(_RUN_AGAIN)
        self._whole.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._whole.__exit__(kind, error, trace)

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
        if kwargs and any(func in group for group in (_ACTIVATIONS, _POWERS, _PRODUCTS, _QUOTIENTS)):
            args, kwargs = operands_first(args, kwargs)
        if func is _SDPA:
            return self._attention(*args, **kwargs)
        if func in _NORMS:
            return getattr(self, _NORMS[func])(*args, **kwargs)
        if func is F.instance_norm and kwargs.get("use_input_stats", args[5] if len(args) > 5 else True):
            return self._instance_norm(*args, **kwargs)
        if (func in _ACTIVATIONS and _is_signal(args[0])) or (func in _POWERS and _is_positive_power(*args, **kwargs)):
            return self._activation(func, args, kwargs)
        if func in _FROZEN_WHOLE or func in _POWERS:
            return self._freeze(lambda: func(*args, **kwargs))
        if func in _PRODUCTS and len(args) == 2 and _is_signal(args[0]) and _is_signal(args[1]):
            return self._product(func, *args)
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
        cudnn_enable: bool = True,
    ) -> Tensor:
        """`torch.nn.functional.layer_norm`, and `torch.layer_norm`, argument for argument."""
        axes = tuple(range(-len(normalized_shape), 0))
        wide = _widen(input)
        normed = self._scale(wide - wide.mean(axes, keepdim=True), axes, eps)
        return _affine(normed, weight, bias).to(input.dtype)

    def _rms_norm(
        self, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        """`torch.nn.functional.rms_norm`, argument for argument."""
        axes = tuple(range(-len(normalized_shape), 0))
        floor = torch.finfo(input.dtype).eps if eps is None else eps
        return _affine(self._scale(_widen(input), axes, floor), weight, None).to(input.dtype)

    def _group_norm(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,
    ) -> Tensor:
        """`torch.nn.functional.group_norm`, and `torch.group_norm`, argument for argument."""
        wide = _widen(input).unflatten(1, (num_groups, -1)).flatten(2)
        normed = self._scale(wide - wide.mean(2, keepdim=True), (2,), eps).view(input.shape)
        of_channel = (-1, *[1] * (input.ndim - 2))
        weight, bias = (each if each is None else each.view(of_channel) for each in (weight, bias))
        return _affine(normed, weight, bias).to(input.dtype)

    def _instance_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """`torch.nn.functional.instance_norm` by statistics of the input, argument for argument."""
        return self._group_norm(input, input.shape[1], weight, bias, eps)

    def _normalize(
        self, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
    ) -> Tensor:
        """`torch.nn.functional.normalize`, argument for argument."""
        length = self._freeze(lambda: input.norm(p, dim, keepdim=True).clamp_min(eps))
        normed: Tensor = input / length
        return normed

    def _cosine(self, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
        """`torch.nn.functional.cosine_similarity`, argument for argument."""
        units = [self._normalize(each, 2.0, dim, eps) for each in (x1, x2)]
        both = self._product(torch.mul, *units) if all(map(_is_signal, units)) else units[0] * units[1]
        return both.sum(dim)

    def _scale(self, x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
        """x over its root mean square, which is frozen."""
        scale: Tensor = self._freeze(lambda: (x.square().mean(axes, keepdim=True) + eps).rsqrt())
        return x * scale

    def _activation(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        x: Tensor = args[0]

        def gain() -> tuple[Tensor, bool]:
            at = x.detach()
            given = at.clone()
            result: Tensor = func(given, *args[1:], **kwargs)
            return torch.where(at != 0, result / torch.where(at != 0, at, 1), 0), result is given

        gains, in_place = self._freeze(gain)
        scaled: Tensor = x * gains
        return x.copy_(scaled) if in_place else scaled

    def _product(self, func: Any, left: Tensor, right: Tensor) -> Tensor:
        one, other = self._freeze(left.clone), self._freeze(right.clone)
        halves: Tensor = 0.5 * (left * other + one * right)
        return left.copy_(halves) if func in _IN_PLACE else halves


_NORMS = {
    F.layer_norm: "_layer_norm",
    torch.layer_norm: "_layer_norm",
    F.rms_norm: "_rms_norm",
    torch.rms_norm: "_rms_norm",
    F.group_norm: "_group_norm",
    torch.group_norm: "_group_norm",
    F.normalize: "_normalize",
    F.cosine_similarity: "_cosine",
    torch.cosine_similarity: "_cosine",
}
_IN_PLACE = {Tensor.mul_, Tensor.__imul__}


_RUN_AGAIN = "torch.utils.checkpoint runs a part of it again in the backward pass, where nothing is held still"
_OTHER_PATH = "This model takes another path for another input, so it cannot be frozen as a linear map."


def _is_signal(value: Any) -> bool:
    """Whether the tensor depends on the input, as far as gradients tell; parameters and views of them do not."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or not value.requires_grad:
        return False
    return not isinstance(value._base, nn.Parameter)


def _is_positive_power(base: Any, exponent: Any) -> bool:
    """Whether a signal is raised to what is above 0 everywhere, and depends on no input itself."""
    if not _is_signal(base) or _is_signal(exponent):
        return False
    return bool((exponent > 0).all()) if isinstance(exponent, Tensor) else exponent > 0


def _affine(normed: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """In float32 or wider, as torch's own kernels do, whatever the weights are in."""
    normed = normed if weight is None else normed * weight.to(normed.dtype)
    return normed if bias is None else normed + bias.to(normed.dtype)


def _widen(x: Tensor) -> Tensor:
    """Half precision as float32, in which norms are computed."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
