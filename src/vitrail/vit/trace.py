"""Forward passes of a clone whose modules say where they are, and which modules are its blocks.

Blocks are found, not configured: for each attention call the innermost child of a container (`ModuleList`,
`Sequential`) whose siblings with attention are *chained*, that is, work on what the one before gave.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor, equal, nn
from torch.utils._pytree import tree_flatten

from vitrail.vit.intercept import Interceptor, RawCall

__all__ = ["Seen", "Trace", "Tracer", "Visit", "units_of"]


@dataclass(eq=False)
class Seen:
    """An attention call of a trace: the modules it was inside, and its shapes."""

    stack: tuple[str, ...]
    order: int
    q: tuple[int, ...]
    v: tuple[int, ...]
    weights: tuple[int, ...]
    fused: bool
    row_error: float

    @property
    def path(self) -> str:
        return self.stack[-1]


@dataclass(eq=False)
class Visit:
    """One run of a module: what went in and came out (tensors are kept so that identities stay unique)."""

    order: int
    inputs: list[Any]
    outputs: list[Any]


@dataclass(eq=False)
class Trace:
    calls: list[Seen] = field(default_factory=list)
    visits: dict[str, list[Visit]] = field(default_factory=dict)
    grids: list[tuple[int, str, tuple[int, int]]] = field(default_factory=list)


class Tracer:
    """Runs a clone whose modules report where they are.

    What goes in and out is kept for children of containers and for `keep` only.
    """

    def __init__(self, clone: nn.Module, keep: Collection[str] = ()) -> None:
        self.model = clone
        self.keep = frozenset(keep)
        self.value_of: int | None = None
        self.values: list[Tensor] = []
        self.stack: list[str] = []
        self.order = 0
        self.trace = Trace()
        self.disturbed: str | None = None
        for path, module in clone.named_modules():
            self._wrap(path, module)

    def run(self, images: Tensor, disturbed: str | None = None) -> Trace:
        """One pass; with `disturbed`, one is added to what that module puts out."""
        self.trace, self.stack, self.order, self.disturbed = Trace(), [], 0, disturbed
        with Interceptor(self):
            self.model(images)
        return self.trace

    def value_at(self, order: int, images: Tensor) -> Tensor:
        """The v that the attention call with this order number multiplies."""
        self.value_of, self.values = order, []
        try:
            self.run(images)
        finally:
            self.value_of = None
        return self.values[0]

    def container(self, path: str) -> str | None:
        """The container that a module is a child of, if it is one."""
        if not path:
            return None
        parent = path.rpartition(".")[0]
        holder = self.model.get_submodule(parent)
        return parent if isinstance(holder, (nn.ModuleList, nn.Sequential, nn.ModuleDict)) else None

    def attention(self, call: RawCall) -> Tensor:
        """Notes the call's shapes and lets it run."""
        weights = call.weights(None)
        self.order += 1
        if self.order == self.value_of:
            self.values.append(call.v)
        self.trace.calls.append(
            Seen(
                tuple(self.stack),
                self.order,
                tuple(call.q.shape) if call.q is not None else (),
                tuple(call.v.shape),
                tuple(weights.shape),
                call.fused,
                float((weights.float().sum(-1) - 1).abs().max()),
            )
        )
        return call.run(None, None)

    def score_bias(self, scores: Tensor) -> Tensor | None:
        """A trace changes nothing."""
        return None

    def addition(self, left: Any, right: Any, result: Tensor) -> Tensor:
        """A trace changes nothing."""
        return result

    def _wrap(self, path: str, module: nn.Module) -> None:
        inner = module.forward
        keep = not path or path in self.keep or self.container(path) is not None

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.stack.append(path)
            self.order += 1
            order = self.order
            try:
                out = inner(*args, **kwargs)
            finally:
                self.stack.pop()
            if path == self.disturbed:
                out = _plus_one(out)
            if keep:
                leaves = tree_flatten((args, kwargs))[0]
                self.trace.visits.setdefault(path, []).append(Visit(order, leaves, tree_flatten(out)[0]))
            if isinstance(module, nn.Conv2d) and out.ndim == 4:
                self.trace.grids.append((order, path, (out.shape[2], out.shape[3])))
            return out

        module.forward = forward


def _plus_one(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out + 1 if out.is_floating_point() else out
    if isinstance(out, tuple) and not hasattr(out, "_fields"):
        return tuple(_plus_one(item) for item in out)
    return out


# --- which modules are the blocks ------------------------------------------------------------------------------------


def units_of(tracer: Tracer, trace: Trace, images: Tensor) -> dict[str, list[int]]:
    """Block path -> the indices of its calls in the trace; the key "" holds calls outside all blocks."""
    children: dict[str, list[str]] = {}
    for call in trace.calls:
        for path in _candidates(tracer, call):
            siblings = children.setdefault(_parent(path), [])
            if path not in siblings:
                siblings.append(path)
    chained = {parent: _chained(tracer, trace, images, paths) for parent, paths in children.items()}
    chosen = [_unit_of(tracer, call, children, chained) for call in trace.calls]
    if not any(chosen):
        chosen = [call.path for call in trace.calls]
    picked = {unit for unit in chosen if unit}
    units: dict[str, list[int]] = {}
    for index, (call, unit) in enumerate(zip(trace.calls, chosen, strict=True)):
        units.setdefault(_innermost_alone(call, unit, picked), []).append(index)
    return units


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _candidates(tracer: Tracer, call: Seen) -> list[str]:
    """The modules around a call that are children of a container, outermost first."""
    return [path for path in call.stack if tracer.container(path) is not None]


def _unit_of(tracer: Tracer, call: Seen, children: dict[str, list[str]], chained: dict[str, bool]) -> str:
    candidates = _candidates(tracer, call)
    for path in reversed(candidates):
        parent = _parent(path)
        if len(children[parent]) > 1 and chained[parent]:
            return path
    for path in reversed(candidates):
        if len(children[_parent(path)]) == 1:
            return path
    return ""


def _innermost_alone(call: Seen, unit: str, picked: set[str]) -> str:
    """A unit that contains other units hands its stray calls to the outermost module below that holds none."""
    if not unit:
        return ""
    for path in call.stack[call.stack.index(unit) :]:
        if not any(other != path and other.startswith(f"{path}.") for other in picked):
            return path
    return call.path


def _chained(tracer: Tracer, trace: Trace, images: Tensor, paths: list[str]) -> bool:
    """Each of the siblings works on what the one before it gave."""
    if any(len(trace.visits.get(path, ())) != 1 for path in paths):
        return False
    return all(_feeds(tracer, trace, images, one, two) for one, two in pairwise(paths))


def _feeds(tracer: Tracer, trace: Trace, images: Tensor, one: str, two: str) -> bool:
    source, target = trace.visits[one][0], trace.visits[two][0]
    taken = {id(leaf) for leaf in target.inputs if isinstance(leaf, Tensor)}
    if any(id(leaf) in taken for leaf in source.outputs if isinstance(leaf, Tensor)):
        return True
    if any(id(leaf) in taken for leaf in source.inputs if isinstance(leaf, Tensor) and leaf.ndim >= 3):
        return False
    moved = tracer.run(images, disturbed=one).visits[two][0]
    return any(
        isinstance(before, Tensor) and before.is_floating_point() and not equal(before, after)
        for before, after in zip(target.inputs, moved.inputs, strict=True)
    )
