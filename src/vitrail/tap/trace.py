"""Forward passes of a clone whose modules report their path, and which of those modules are the blocks.

Blocks are found, not configured: for each attention call the innermost child of a container (`ModuleList`,
`Sequential`) whose siblings with attention are *chained*, that is, work on what the one before gave. A module of the
same class outside the container is one more block if it is chained with them; without containers, chained modules that
take and return tokens are the blocks. A module that runs several times in a pass (shared weights) is a block each time.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, equal, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from vitrail.tap.intercept import Interceptor, PassiveHandler, RawCall
from vitrail.tap.layout import MIN_TOKEN_AXES

__all__ = [
    "Frame",
    "ModuleRun",
    "Trace",
    "TracedCall",
    "Tracer",
    "Unit",
    "branch_units",
    "is_fed",
    "other_weights",
    "units_of",
    "without_side_products",
]

_PROJECTING = {F.linear, F.conv1d, F.conv2d}


class Unit(NamedTuple):
    """A block of the chain: a module, and which of its runs in a pass."""

    path: str
    run: int


class Frame(NamedTuple):
    """A module that is running: its path, which of its runs in the pass this is, and the shapes of its inputs."""

    path: str
    run: int
    inputs: tuple[tuple[int, ...], ...]

    @property
    def unit(self) -> Unit:
        """The run as a unit."""
        return Unit(self.path, self.run)


@dataclass(eq=False)
class TracedCall:
    """An attention call of a trace.

    Attributes:
        frames: The modules it was inside, outermost first.
        step: When it happened, counted with the runs of modules.
        q: Shape of q, empty where the map is computed by hand.
        v: Shape of v.
        weights: Shape of the map.
        fused: Made by `scaled_dot_product_attention`.
        row_error: Largest distance of a row's sum from 1.
        softmaxes: Which softmaxes of the pass the map comes from; none for fused calls.
        projection: Name of the first weight that a linear map or convolution used after it; None where none did.
    """

    frames: tuple[Frame, ...]
    step: int
    q: tuple[int, ...]
    v: tuple[int, ...]
    weights: tuple[int, ...]
    fused: bool
    row_error: float
    softmaxes: tuple[int, ...] = ()
    projection: str | None = None

    @property
    def path(self) -> str:
        """Path of the module that makes the call."""
        return self.frames[-1].path

    @property
    def stack(self) -> tuple[str, ...]:
        """Paths of the modules it was inside, outermost first."""
        return tuple(frame.path for frame in self.frames)


@dataclass(eq=False)
class ModuleRun:
    """One run of a module.

    Attributes:
        step: When it began.
        inputs: Leaves of its arguments. Tensors are referenced, so that their identities stay unique; of modules that
            an earlier pass saw working in place they are copies.
        outputs: Leaves of what it returned.
        versions: How often each tensor among both had been changed: of inputs when it began, of outputs when it ended.
    """

    step: int
    inputs: list[Any]
    outputs: list[Any]
    versions: tuple[int | None, ...]

    @property
    def changed_in_place(self) -> bool:
        """Whether anything has written to its inputs since it began, or to its outputs since it ended."""
        return None in self.versions or _versions([*self.inputs, *self.outputs]) != self.versions


class ConvolutionGrid(NamedTuple):
    """The picture that a convolution put out: when, which module, its (rows, columns), and the stride of one that reads
    the image."""

    step: int
    path: str
    grid: tuple[int, int]
    stride: tuple[int, int] | None


@dataclass(eq=False)
class Trace:
    """One traced pass.

    Attributes:
        calls: Attention calls, in order.
        softmaxes: The modules that each softmax that may be a map was inside, outermost first.
        runs: By path, the runs of every module whose inputs and outputs are recorded.
        convolutions: What convolutions put out, in order.
    """

    calls: list[TracedCall] = field(default_factory=list)
    softmaxes: list[tuple[Frame, ...]] = field(default_factory=list)
    runs: dict[str, list[ModuleRun]] = field(default_factory=dict)
    convolutions: list[ConvolutionGrid] = field(default_factory=list)


class Tracer(PassiveHandler):
    """Runs a clone whose modules report their path.

    Args:
        clone: A copy of the model; its modules' `forward`s are replaced. Inputs and outputs are recorded of children of
            containers, and of modules that `watch` names.

    Attributes:
        model: The clone.
        in_place: Runs of recorded modules that were given, summed up or returned tensors which were written to later.
            All of them under `torch.inference_mode`, which counts no writes.
    """

    def __init__(self, clone: nn.Module) -> None:
        self.model = clone
        self.in_place: set[Unit] = set()
        self._watched = {path for path, _ in clone.named_modules() if not path or self.container_of(path) is not None}
        self._trace = Trace()
        self._stack: list[Frame] = []
        self._n_runs: dict[str, int] = {}
        self._weights = {id(weight): name for name, weight in clone.named_parameters()}
        self._step = 0
        self._disturb: str | None = None
        self._without_attention = False
        self._value_step: int | None = None
        self._values: list[Tensor] = []
        self._disturb_step: int | None = None
        self._turn: Frame | None = None
        self._sides = torch.Size()
        self._answers: dict[Unit, list[Any]] = {}
        self._moves: dict[tuple[Unit, Unit], bool] = {}
        for path, module in clone.named_modules():
            self._wrap(path, module)

    def watch(self, paths: Collection[str]) -> None:
        """Records inputs and outputs of more modules from the next pass on.

        Args:
            paths: Of the modules.
        """
        self._watched.update(paths)

    def run(self, images: Tensor, disturb: str | None = None, *, without_attention: bool = False) -> Trace:
        """Traces one pass.

        Args:
            images: [image, channel, row, column].
            disturb: Path of a module to whose output one is added.
            without_attention: Attention gives zeros.

        Returns:
            What the pass did.
        """
        self._without_attention = without_attention
        self._trace, self._stack, self._step, self._disturb = Trace(), [], 0, disturb
        self._n_runs, self._sides = {}, images.shape[2:]
        with _Projections(self._project), Interceptor(self):
            self.model(images)
        for path, runs in self._trace.runs.items():
            self.in_place.update(Unit(path, number) for number, run in enumerate(runs) if run.changed_in_place)
        return self._trace

    def run_with_outputs(self, images: Tensor, trace: Trace, units: Collection[Unit]) -> Trace:
        """Traces one pass in which some modules return what they did in another, whatever they are given.

        Args:
            images: As many as in the other pass [image, channel, row, column].
            trace: Of the other pass.
            units: The modules, and which of their runs.

        Returns:
            What the pass did.
        """
        self._answers = {unit: trace.runs[unit.path][unit.run].outputs for unit in units}
        try:
            return self.run(images)
        finally:
            self._answers = {}

    def moves(self, trace: Trace, images: Tensor, one: Unit, two: Unit) -> bool:
        """Whether what a module is given moves with what another gives. Asked once for each pair.

        Args:
            trace: Of a pass.
            images: Of that pass.
            one: The module whose output is changed.
            two: The module that is given something.

        Returns:
            True where any tensor among its inputs does.
        """
        if (one, two) not in self._moves:
            plain, other = (
                runs[two.path][two.run].inputs for runs in (trace.runs, self.run(images, disturb=one.path).runs)
            )
            self._moves[one, two] = _differ(plain, other)
        return self._moves[one, two]

    def outputs_of(self, unit: Unit, images: Tensor, disturb: TracedCall | None = None) -> list[Any]:
        """What a module that is recorded returns.

        Args:
            unit: The module, and which of its runs.
            images: [image, channel, row, column].
            disturb: An attention call to whose output noise is added.

        Returns:
            Leaves of its output.
        """
        self._disturb_step = None if disturb is None else disturb.step
        try:
            return self.run(images).runs[unit.path][unit.run].outputs
        finally:
            self._disturb_step = None

    def values_of(
        self, call: TracedCall, images: Tensor, disturb: TracedCall | None = None, turn: Frame | None = None
    ) -> Tensor:
        """The v that an attention call multiplies, in the model's own layout, on other images.

        Args:
            call: The call, of an earlier trace.
            images: [image, channel, row, column].
            disturb: An attention call to whose output noise is added.
            turn: A module that is given another first token: its channels in turned order.

        Returns:
            [.., key, channel], as the call has it.
        """
        self._value_step, self._values = call.step, []
        self._disturb_step = None if disturb is None else disturb.step
        self._turn = turn
        try:
            self.run(images)
        finally:
            self._value_step = self._disturb_step = self._turn = None
        return self._values[0]

    def container_of(self, path: str) -> str | None:
        """Path of the container that a module is a child of; None if its parent is no container.

        Args:
            path: Path of the module.

        Returns:
            A path, or None.
        """
        if not path:
            return None
        parent = _parent(path)
        is_container = isinstance(self.model.get_submodule(parent), (nn.ModuleList, nn.Sequential, nn.ModuleDict))
        return parent if is_container else None

    def attention(self, call: RawCall) -> Tensor:
        """Notes the call's shapes and lets it run.

        Args:
            call: The attention call.

        Returns:
            [.., query, channel], as the model computes it.
        """
        shape, row_error = _shape_and_row_error(call)
        self._step += 1
        if self._step == self._value_step:
            self._values.append(call.v)
        self._trace.calls.append(
            TracedCall(
                tuple(self._stack),
                self._step,
                tuple(call.q.shape) if call.q is not None else (),
                tuple(call.v.shape),
                shape,
                call.fused,
                row_error,
                call.softmaxes,
            )
        )
        out = super().attention(call)
        if self._without_attention:
            return torch.zeros_like(out)
        return _plus_noise(out) if self._step == self._disturb_step else out

    def score_bias(self, scores: Tensor) -> None:
        """Notes where a softmax is.

        Args:
            scores: What it is taken of.
        """
        self._trace.softmaxes.append(tuple(self._stack))

    def addition(self, left: Any, right: Any, result: Tensor) -> Tensor:
        """Notes sums in place of what may be tokens.

        Args:
            left: First operand of the sum.
            right: Second operand.
            result: The sum; the first operand itself where it was made in place.

        Returns:
            The sum.
        """
        if result is left:
            shape = tuple(result.shape)
            self.in_place.update(frame.unit for frame in self._stack if shape in frame.inputs)
        return result

    def _project(self, weights: list[Tensor]) -> None:
        """Notes a weight that takes what attention gave, for the calls that none has taken yet."""
        name = next((self._weights[id(weight)] for weight in weights if id(weight) in self._weights), None)
        for call in reversed(self._trace.calls if name else []):
            if call.projection is not None:
                break
            call.projection = name

    def _wrap(self, path: str, module: nn.Module) -> None:
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            record = path in self._watched
            shapes = tuple(tuple(leaf.shape) for leaf in _tensors(tree_flatten((args, kwargs))[0]))
            run = self._n_runs.get(path, 0)
            self._n_runs[path] = run + 1
            self._stack.append(Frame(path, run, shapes))
            if self._turn is not None and self._turn.unit == (path, run):
                args, kwargs = _first_token_turned(args, kwargs)
            self._step += 1
            step = self._step
            inputs = tree_flatten((args, kwargs))[0] if record else []
            if (path, run) in self.in_place:
                inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in inputs]
            versions = _versions(inputs)
            try:
                out = inner(*args, **kwargs)
            finally:
                self._stack.pop()
            if path == self._disturb:
                out = _plus_one(out)
            if (path, run) in self._answers:
                answers = [
                    leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._answers[Unit(path, run)]
                ]
                out = tree_unflatten(answers, tree_flatten(out)[1])
            if record:
                outputs = tree_flatten(out)[0]
                entry = ModuleRun(step, inputs, outputs, versions + _versions(outputs))
                self._trace.runs.setdefault(path, []).append(entry)
            if isinstance(module, nn.Conv2d) and out.ndim == 4:
                sides = args[0].shape[2:] if args else ()
                stride = (module.stride[0], module.stride[1]) if sides == self._sides else None
                self._trace.convolutions.append(ConvolutionGrid(step, path, (out.shape[2], out.shape[3]), stride))
            return out

        module.forward = forward


def _shape_and_row_error(call: RawCall) -> tuple[tuple[int, ...], float]:
    """The shape of a call's map, and how far a row of it is from summing to one at most."""
    pieces = [(slice(None), call.weights(None))] if call.pieces is None else call.pieces(None)
    n_queries, shape, errors = 0, torch.Size(), []
    for _, weights in pieces:
        n_queries, shape = n_queries + weights.shape[-2], weights.shape
        errors.append((weights.float().sum(-1) - 1).abs().max())
    return (*shape[:-2], n_queries, shape[-1]), float(torch.stack(errors).max())


def _first_token_turned(args: Any, kwargs: Any) -> Any:
    """Arguments whose first tensor of three axes, [image token channel], has another first token."""
    leaves, form = tree_flatten((args, kwargs))
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.ndim == MIN_TOKEN_AXES and leaf.is_floating_point():
            leaves[index] = torch.cat([leaf[:, :1].flip(-1), leaf[:, 1:]], 1)
            break
    turned: Any = tree_unflatten(leaves, form)
    return turned


def _plus_one(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out + 1 if out.is_floating_point() else out
    if isinstance(out, tuple) and not hasattr(out, "_fields"):
        return tuple(_plus_one(item) for item in out)
    return out


def _plus_noise(out: Tensor) -> Tensor:
    """The same number everywhere would be lost where a norm over channels follows."""
    noise = torch.rand(out.shape, generator=torch.Generator().manual_seed(0))
    return out + noise.to(out)


class _Projections(TorchFunctionMode):
    """Reports the tensors that linear maps and convolutions are called with besides their input."""

    def __init__(self, report: Callable[[list[Tensor]], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PROJECTING:
            self._report([value for value in (*args[1:], *kwargs.values()) if isinstance(value, Tensor)])
        return func(*args, **kwargs)


@contextmanager
def other_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Meanwhile a model, a copy that shares its tensors, has other tensors for some of its parameters.

    Args:
        model: The copy.
        weights: The parameters, by name; noise is added to each.

    Returns:
        Nothing; a context manager.
    """
    generator = torch.Generator().manual_seed(0)
    owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in weights]
    try:
        for (owner, name), weight in zip(owners, weights.values(), strict=True):
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            setattr(owner, name, nn.Parameter(weight.detach() + noise, requires_grad=False))
        yield
    finally:
        for (owner, name), weight in zip(owners, weights.values(), strict=True):
            setattr(owner, name, weight)


# --- which modules are the blocks ------------------------------------------------------------------------------------


def units_of(tracer: Tracer, trace: Trace, images: Tensor) -> dict[Unit | None, list[int]]:
    """Groups attention calls into blocks.

    Args:
        tracer: The tracer that made the trace; it runs again where chaining cannot be seen from identities.
        trace: A trace of the model.
        images: What was traced.

    Returns:
        Unit -> indices of its calls in the trace. The key None holds calls outside all blocks. Products with a map that
        another block has made (maps that are handed on) are in none: that block ends before they run.
    """
    children: dict[str, list[Unit]] = {}
    for call in trace.calls:
        for unit in _candidates(tracer, call):
            siblings = children.setdefault(_parent(unit.path), [])
            if unit not in siblings:
                siblings.append(unit)
    chained = {parent: _is_chain(tracer, trace, images, siblings) for parent, siblings in children.items()}
    unit_by_call = [_unit_of(tracer, call, children, chained) for call in trace.calls]
    if not any(unit_by_call):
        unit_by_call = [*_units_without_container(tracer, trace, images)]
    elif not all(unit_by_call):
        unit_by_call = _with_units_outside(tracer, trace, images, unit_by_call)
    paths = {unit.path for unit in unit_by_call if unit}
    units: dict[Unit | None, list[int]] = {}
    for index, (call, around) in enumerate(zip(trace.calls, unit_by_call, strict=True)):
        units.setdefault(_without_other_units(call, around, paths), []).append(index)
    own = {
        unit: [i for i in indices if not _takes_a_map_of(units.keys() - {unit, None}, trace, trace.calls[i])]
        for unit, indices in units.items()
    }
    return {unit: indices for unit, indices in own.items() if indices}


def _takes_a_map_of(units: Collection[Unit | None], trace: Trace, call: TracedCall) -> bool:
    """Whether the map of a call comes from a softmax inside one of these units, which the call is not inside."""
    own = {frame.unit for frame in call.frames}
    around_softmax = {frame.unit for number in call.softmaxes for frame in trace.softmaxes[number]}
    return any(unit in around_softmax and unit not in own for unit in units)


def without_side_products(
    tracer: Tracer, trace: Trace, images: Tensor, units: dict[Unit | None, list[int]]
) -> tuple[dict[Unit | None, list[int]], dict[Unit, tuple[int, ...]]]:
    """Leaves out products with a map that nothing of what their block returns moves with.

    A model may multiply a map with other things than values, for plots or statistics: norms of values, positions. Such
    a product is no attention. Tried where products share a softmax; first with the block's own weights, then with
    others, since a stream that enters with a weight of zero is one. If no product of a map moves anything, nothing is
    told.

    Args:
        tracer: The tracer that made the trace.
        trace: A trace of the model.
        images: What was traced.
        units: Unit -> indices of its calls in the trace.

    Returns:
        Unit -> indices of its attention calls; unit -> which of its products, in the order they run, are none.
    """
    calls, side_products = dict(units), dict[Unit, tuple[int, ...]]()
    for unit, indices in units.items():
        shared = [] if unit is None else [index for index in indices if _shares_softmax(trace, index, indices)]
        if unit is None or not shared:
            continue
        carrying = _carrying(tracer, images, unit, {index: trace.calls[index] for index in shared})
        side = {
            index
            for index in shared
            if index not in carrying and any(_share_softmax(trace.calls[index], trace.calls[i]) for i in carrying)
        }
        if side:
            calls[unit] = [index for index in indices if index not in side]
            side_products[unit] = tuple(number for number, index in enumerate(indices) if index in side)
    return calls, side_products


def _shares_softmax(trace: Trace, index: int, indices: Collection[int]) -> bool:
    return any(_share_softmax(trace.calls[index], trace.calls[other]) for other in indices if other != index)


def _share_softmax(one: TracedCall, two: TracedCall) -> bool:
    return bool(set(one.softmaxes) & set(two.softmaxes))


def _carrying(tracer: Tracer, images: Tensor, unit: Unit, calls: Mapping[int, TracedCall]) -> set[int]:
    """Those of some attention calls of a block that move what it returns."""
    carrying = _moving(tracer, images, unit, calls)
    silent = {index: call for index, call in calls.items() if index not in carrying}
    if silent:
        own = {
            name: weight
            for name, weight in tracer.model.named_parameters()
            if name.startswith(f"{unit.path}." if unit.path else "") and type(weight) is nn.Parameter
        }
        with other_weights(tracer.model, {name: each for name, each in own.items() if each.is_floating_point()}):
            carrying |= _moving(tracer, images, unit, silent)
    return carrying


def _moving(tracer: Tracer, images: Tensor, unit: Unit, calls: Mapping[int, TracedCall]) -> set[int]:
    plain = tracer.outputs_of(unit, images)
    return {index for index, call in calls.items() if _differ(plain, tracer.outputs_of(unit, images, disturb=call))}


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _candidates(tracer: Tracer, call: TracedCall) -> list[Unit]:
    """The modules around a call that are children of a container, outermost first."""
    return [frame.unit for frame in call.frames if tracer.container_of(frame.path) is not None]


def _unit_of(
    tracer: Tracer, call: TracedCall, children: dict[str, list[Unit]], chained: dict[str, bool]
) -> Unit | None:
    candidates = _candidates(tracer, call)
    for unit in reversed(candidates):
        parent = _parent(unit.path)
        if len(children[parent]) > 1 and chained[parent]:
            return unit
    for unit in reversed(candidates):
        if len(children[_parent(unit.path)]) == 1:
            return unit
    return None


def _units_without_container(tracer: Tracer, trace: Trace, images: Tensor) -> list[Unit]:
    """Of each call the outermost module around it alone that takes and returns tokens, if these are chained.

    Else the module that makes it.
    """
    innermost = [call.frames[-1].unit for call in trace.calls]
    if len(trace.calls) == 1:
        return innermost
    n_calls = Counter(frame.unit for call in trace.calls for frame in call.frames)
    around = [[frame.unit for frame in call.frames if n_calls[frame.unit] == 1] for call in trace.calls]
    tracer.watch({unit.path for units in around for unit in units})
    trace = tracer.run(images)
    outermost = [
        next((unit for unit in units if _keeps_tokens(trace, unit)), own)
        for units, own in zip(around, innermost, strict=True)
    ]
    tracer.watch({unit.path for unit in outermost})
    return outermost if _is_chain(tracer, tracer.run(images), images, outermost) else innermost


def _keeps_tokens(trace: Trace, unit: Unit) -> bool:
    """Whether a module returns as many tokens and channels as it is given; one that pools returns fewer."""
    run = trace.runs[unit.path][unit.run]
    given, returned = (
        max((leaf.shape for leaf in _token_tensors(leaves)), key=torch.Size.numel, default=None)
        for leaves in (run.inputs, run.outputs)
    )
    return given is not None and given == returned


def _with_units_outside(
    tracer: Tracer, trace: Trace, images: Tensor, unit_by_call: Sequence[Unit | None]
) -> list[Unit | None]:
    """Calls outside all containers are those of modules of the blocks' class that are chained with the blocks."""
    classes = {type(tracer.model.get_submodule(unit.path)) for unit in unit_by_call if unit} - {nn.Sequential}
    around = [
        unit or next((frame.unit for frame in call.frames if _class_of(tracer, frame) in classes), None)
        for unit, call in zip(unit_by_call, trace.calls, strict=True)
    ]
    if around == [*unit_by_call]:
        return around
    tracer.watch({unit.path for unit in around if unit})
    trace = tracer.run(images)
    blocks = {unit for unit in unit_by_call if unit}
    for place, unit in enumerate(around):
        if unit is None or unit in blocks:
            continue
        before = next((each for each in reversed(around[:place]) if each in blocks), None)
        after = next((each for each in around[place:] if each in blocks), None)
        pair = (before, unit) if before is not None else (unit, after) if after is not None else None
        if pair and _keeps_tokens(trace, unit) and _feeds(tracer, trace, images, *pair):
            blocks.add(unit)
    return [unit if unit in blocks else None for unit in around]


def _class_of(tracer: Tracer, frame: Frame) -> type[nn.Module]:
    return type(tracer.model.get_submodule(frame.path))


def _without_other_units(call: TracedCall, unit: Unit | None, paths: set[str]) -> Unit | None:
    """A unit that contains other units hands its own calls to the outermost module below that contains none."""
    if unit is None:
        return None
    for frame in call.frames[call.stack.index(unit.path) :]:
        if not any(other != frame.path and other.startswith(f"{frame.path}.") for other in paths):
            return frame.unit
    return call.frames[-1].unit


def _is_chain(tracer: Tracer, trace: Trace, images: Tensor, siblings: list[Unit]) -> bool:
    """Whether each of the siblings works on what the one before it gave, or is the first one on another input.

    An encoder that runs once for each of two pictures starts over with the second.
    """
    first = siblings[0].path
    return all(
        (two.path == first and two.run > one.run) or _feeds(tracer, trace, images, one, two)
        for one, two in pairwise(siblings)
    )


def _feeds(tracer: Tracer, trace: Trace, images: Tensor, one: Unit, two: Unit) -> bool:
    """Whether unit `two` works on the output of `one`: the same tensor object, or its input moves with it."""
    if _hands_on(trace, one, two):
        return True
    tokens = {id(leaf) for leaf in _tensors(trace.runs[one.path][one.run].inputs) if leaf.ndim >= MIN_TOKEN_AXES}
    if any(id(leaf) in tokens for leaf in _tensors(trace.runs[two.path][two.run].inputs)):
        return False  # both take the same tokens: they are parallel
    return tracer.moves(trace, images, one, two)


def _differ(some: list[Any], others: list[Any]) -> bool:
    return any(
        isinstance(one, Tensor) and one.is_floating_point() and not equal(one, other)
        for one, other in zip(some, others, strict=True)
    )


def is_fed(tracer: Tracer, trace: Trace, images: Tensor, one: Unit, two: Unit) -> bool:
    """Whether a block works on what the block before it gave.

    Args:
        tracer: The tracer that made the trace; it runs again where that cannot be seen from identities.
        trace: A trace of the model.
        images: What was traced.
        one: The block before.
        two: The block.

    Returns:
        False where they are beside each other: two encoders, or one that starts over with another picture.
    """
    return _hands_on(trace, one, two) or tracer.moves(trace, images, one, two)


def _hands_on(trace: Trace, one: Unit, two: Unit) -> bool:
    """Whether a block is given the very tensor that another returned."""
    returned, given = trace.runs[one.path][one.run].outputs, trace.runs[two.path][two.run].inputs
    given_ids = {id(leaf) for leaf in _tensors(given)}
    return any(id(leaf) in given_ids for leaf in _tensors(returned))


def branch_units(tracer: Tracer, trace: Trace, images: Tensor, units: Sequence[Unit]) -> set[Unit]:
    """The blocks whose output the model adds to other tokens, on the way to the next block.

    Such a block is a branch, as attention in turns with an MLP. All blocks return what they did in the trace, while the
    images change: what still moves has come past them.

    Args:
        tracer: The tracer that made the trace.
        trace: A trace of the model.
        images: What was traced.
        units: All blocks, in the order they run.

    Returns:
        Some of those that feed the next.
    """
    pairs = [pair for pair in pairwise(units) if not _hands_on(trace, *pair) and tracer.moves(trace, images, *pair)]
    if not pairs:
        return set()
    one, two = (tracer.run_with_outputs(each, trace, units).runs for each in (images, images.flip(0)))
    return {
        before for before, unit in pairs if _differ(one[unit.path][unit.run].inputs, two[unit.path][unit.run].inputs)
    }


def _versions(leaves: list[Any]) -> tuple[int | None, ...]:
    """How often each tensor has been changed in place; None where torch does not count."""
    return tuple(None if leaf.is_inference() else leaf._version for leaf in _tensors(leaves))


def _tensors(leaves: list[Any]) -> Iterator[Tensor]:
    return (leaf for leaf in leaves if isinstance(leaf, Tensor))


def _token_tensors(leaves: list[Any]) -> Iterator[Tensor]:
    return (leaf for leaf in _tensors(leaves) if leaf.ndim == MIN_TOKEN_AXES and leaf.is_floating_point())
