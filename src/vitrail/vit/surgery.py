"""The independent way to prune a head: zero its columns of the output projection, in a copy. Used to check the tap."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitrail.vit.anatomy import Anatomy, Call
from vitrail.vit.clone import clone_sharing
from vitrail.vit.intercept import Interceptor, RawCall

__all__ = ["NoProjection", "Projection", "projections", "without_head"]

_PROJECTING = {F.linear, F.conv1d, F.conv2d}
_NORMALISING = {F.layer_norm, F.rms_norm, F.batch_norm, F.group_norm}


@dataclass(frozen=True)
class Projection:
    """The linear map that takes the heads side by side: head h has columns h*width to (h+1)*width of `weight`."""

    weight: str
    width: int


@dataclass(frozen=True)
class NoProjection:
    """Why there are no columns that stand for a head."""

    reason: str


@dataclass(frozen=True)
class _Met:
    """What takes the result of an attention call: the name of its weight, and whether only attention enters it."""

    weight: str
    projects: bool
    inputs: int
    alone: bool


def projections(model: nn.Module, anatomy: Anatomy, images: Tensor) -> dict[tuple[int, int], Projection | NoProjection]:
    """(layer, call) -> the projection that follows. Found in one pass in which every attention call gives zeros."""
    met = _Watch(clone_sharing(model)).after_each_call(images)
    calls = [
        (layer, number, call) for layer, block in enumerate(anatomy.blocks) for number, call in enumerate(block.calls)
    ]
    turns: dict[str, int] = {}
    found: dict[tuple[int, int], Projection | NoProjection] = {}
    for layer, number, call in calls:
        turn = turns.get(call.path, 0)
        turns[call.path] = turn + 1
        found[layer, number] = _projection(call, met.get((call.path, turn)))
    return found


def _projection(call: Call, met: _Met | None) -> Projection | NoProjection:
    width = call.queries if call.kind == "channel" else call.head_dim
    if met is None:
        return NoProjection("nothing with weights takes what attention gives")
    if not met.projects or met.inputs != call.heads * width:
        return NoProjection(f"attention goes into {met.weight}, which is no projection of the heads side by side")
    if not met.alone:
        return NoProjection("the model adds to the heads before their projection, so a pruned head leaves that sum")
    return Projection(met.weight, width)


def without_head(model: nn.Module, projection: Projection, head: int) -> nn.Module:
    """A copy of the model, sharing all weights but one, in which the head's columns are zero."""
    clone = clone_sharing(model)
    path, _, name = projection.weight.rpartition(".")
    module = clone.get_submodule(path)
    weight = module.get_parameter(name).detach().clone()
    weight[:, head * projection.width : (head + 1) * projection.width] = 0
    module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    return clone


class _Watch:
    """Notes which weights are used first after each attention call."""

    def __init__(self, clone: nn.Module) -> None:
        self.model = clone
        self.names = {id(weight): name for name, weight in clone.named_parameters()}
        self.stack: list[str] = []
        self.waiting: tuple[str, int] | None = None
        self.turns: dict[str, int] = {}
        self.met: dict[tuple[str, int], _Met] = {}
        for path, module in clone.named_modules():
            self._wrap(path, module)

    @torch.no_grad()
    def after_each_call(self, images: Tensor) -> dict[tuple[str, int], _Met]:
        """(module path of the call, turn) -> what it met."""
        with torch.random.fork_rng(devices=[]), _Weights(self), Interceptor(self):
            self.model(images)
        return self.met

    def attention(self, call: RawCall) -> Tensor:
        """Gives zeros, so that what else enters the projection shows."""
        path = self.stack[-1]
        self.waiting = (path, self.turns.get(path, 0))
        self.turns[path] = self.waiting[1] + 1
        return torch.zeros_like(call.run(None, None))

    def score_bias(self, scores: Tensor) -> Tensor | None:
        """Changes nothing."""
        return None

    def addition(self, left: Any, right: Any, result: Tensor) -> Tensor:
        """Changes nothing."""
        return result

    def weights_used(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Told of every linear map, convolution and norm."""
        values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        weights = [value for value in values if id(value) in self.names]
        if self.waiting is None or not weights:
            return
        weight = weights[0]
        inputs = weight.shape[1] if weight.ndim > 1 else 0
        self.met[self.waiting] = _Met(self.names[id(weight)], func in _PROJECTING, inputs, not bool(values[0].any()))
        self.waiting = None

    def _wrap(self, path: str, module: nn.Module) -> None:
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.stack.append(path)
            try:
                return inner(*args, **kwargs)
            finally:
                self.stack.pop()

        module.forward = forward


class _Weights(TorchFunctionMode):
    """Below the interceptor on the stack: tells a watch of functions that use weights."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PROJECTING or func in _NORMALISING:
            self.watch.weights_used(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
