"""The independent way to prune a head: close its channels where the output projection takes them, without a tap.

Which channels are a head's is asked of the model: in some passes the attention outputs of chosen heads are ones and
those of the others zeros, and the projection's input shows where they arrive. So interleaved heads (NesT) are found as
well as heads side by side. Channels are closed at one use of the weight only, since blocks may share their weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Bool
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitrail.tap.anatomy import Anatomy, Call
from vitrail.tap.clone import clone_sharing
from vitrail.tap.intercept import Interceptor, PassiveHandler, RawCall

__all__ = ["NoProjection", "Projection", "projection_inputs", "projections", "run_without_head"]

_PROJECTING = {F.linear, F.conv1d, F.conv2d}
_NORMALISING = {F.layer_norm, F.rms_norm, F.batch_norm, F.group_norm}


@dataclass(frozen=True, eq=False)
class Projection:
    """The linear map that takes the heads of an attention call.

    Attributes:
        weight: Name of its weight.
        use: Which use of that weight in a pass, from 0; several where blocks share it.
        channels: Which input channels belong to each head [head channel].
    """

    weight: str
    use: int
    channels: Bool[Tensor, "head channel"]


@dataclass(frozen=True)
class NoProjection:
    """Why an attention call has no input channels that stand for a head."""

    reason: str


class _WeightUse(NamedTuple):
    """A function of a pass that uses a weight of the model."""

    weight: str
    use: int
    func: Any
    x: Tensor

    @property
    def channel_axis(self) -> int:
        return self.x.ndim - 1 if self.func is F.linear or self.func in _NORMALISING else 1

    def by_channel(self) -> Tensor:
        """The input with its channels first, [channel, everything else]."""
        return self.x.movedim(self.channel_axis, 0).flatten(1)


class _FirstUse(NamedTuple):
    """The first use of a weight after an attention call, and at which input channels something arrives."""

    weight: str
    use: int
    projects: bool
    nonzero: Bool[Tensor, "channel"]


class _WeightUses(TorchFunctionMode):
    """Reports every function that uses a weight; what `report` returns, if not None, is taken instead of the input."""

    def __init__(self, model: nn.Module, report: Callable[[_WeightUse], Tensor | None]) -> None:
        super().__init__()
        self.names = {id(weight): name for name, weight in model.named_parameters()}
        self.report = report
        self.counts: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (func in _PROJECTING or func in _NORMALISING) and args:
            values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            name = next((self.names[id(value)] for value in values if id(value) in self.names), None)
            if name is not None:
                use = self.counts.get(name, 0)
                self.counts[name] = use + 1
                x = self.report(_WeightUse(name, use, func, args[0]))
                args = args if x is None else (x, *args[1:])
        return func(*args, **kwargs)


# --- which channels are a head's -------------------------------------------------------------------------------------


def projections(model: nn.Module, anatomy: Anatomy, images: Tensor) -> dict[tuple[int, int], Projection | NoProjection]:
    """Finds the projection after each attention call, and which of its input channels belong to which head.

    Args:
        model: The model; a copy that shares its weights is run.
        anatomy: Its anatomy.
        images: A batch of prepared images.

    Returns:
        By (layer, call): the projection, or why there is none.
    """
    clone = clone_sharing(model)
    specs = _calls_by_turn(anatomy)
    n_bits = max(call.heads for block in anatomy.blocks for call in block.calls).bit_length()
    coded = _CodedHeads(clone, specs)
    silent, *by_bit = (coded.first_uses(images, bit) for bit in (None, *range(n_bits)))
    return {
        number: _projection(specs[turn][1], silent.get(turn), [uses.get(turn) for uses in by_bit])
        for turn, (number, _) in specs.items()
    }


def _calls_by_turn(anatomy: Anatomy) -> dict[tuple[str, int], tuple[tuple[int, int], Call]]:
    """(module path, how many calls it has made before) -> ((layer, call), its description)."""
    counts: dict[str, int] = {}
    calls: dict[tuple[str, int], tuple[tuple[int, int], Call]] = {}
    for layer, block in enumerate(anatomy.blocks):
        for number, call in enumerate(block.calls):
            turn = counts.get(call.path, 0)
            counts[call.path] = turn + 1
            calls[call.path, turn] = ((layer, number), call)
    return calls


def _projection(call: Call, silent: _FirstUse | None, by_bit: list[_FirstUse | None]) -> Projection | NoProjection:
    if silent is None:
        return NoProjection("nothing with weights takes what attention gives")
    uses = [use for use in by_bit if use is not None and use.weight == silent.weight and use.projects]
    if len(uses) < len(by_bit):
        return NoProjection(f"attention goes into {silent.weight}, which is no projection")
    if bool(silent.nonzero.any()):
        return NoProjection("the model adds to the heads before their projection, so a pruned head leaves that sum")
    code = sum(use.nonzero.long() << bit for bit, use in enumerate(uses))
    channels = torch.as_tensor(code)[None] == torch.arange(1, call.heads + 1, device=silent.nonzero.device)[:, None]
    if not bool((channels.sum(0) == 1).all()) or not bool(channels.any(1).all()):
        return NoProjection(f"channels that go into {silent.weight} do not belong to one head each")
    return Projection(silent.weight, silent.use, channels)


class _CodedHeads(PassiveHandler):
    """Gives ones for some heads of every attention call and zeros for the rest; notes which weight is used next."""

    def __init__(self, clone: nn.Module, specs: dict[tuple[str, int], tuple[tuple[int, int], Call]]) -> None:
        self.model, self.specs = clone, specs
        self.stack: list[str] = []
        self.bit: int | None = None
        self.n_images = 0
        self.turns: dict[str, int] = {}
        self.waiting: list[tuple[str, int]] = []
        self.uses: dict[tuple[str, int], _FirstUse] = {}
        for path, module in clone.named_modules():
            self._wrap(path, module)

    @torch.no_grad()
    def first_uses(self, images: Tensor, bit: int | None) -> dict[tuple[str, int], _FirstUse]:
        """By (module path, turn), the first use of a weight after each call.

        Args:
            images: A batch of prepared images.
            bit: Heads whose number from 1 has this bit give ones; None: every head gives zeros.
        """
        self.bit, self.n_images, self.turns, self.waiting, self.uses = bit, len(images), {}, [], {}
        with torch.random.fork_rng(devices=[]), _WeightUses(self.model, self._note), Interceptor(self):
            self.model(images)
        return self.uses

    def attention(self, call: RawCall) -> Tensor:
        """Gives zeros and ones instead of the output."""
        path = self.stack[-1]
        turn = (path, self.turns.get(path, 0))
        self.turns[path] = turn[1] + 1
        self.waiting.append(turn)
        out = torch.zeros_like(super().attention(call))
        if self.bit is None or turn not in self.specs:
            return out
        layout = self.specs[turn][1].layout
        canonical = layout.canonical(out, self.n_images).clone()
        heads = torch.arange(1, layout.heads + 1, device=out.device)
        canonical[:, :, (heads >> self.bit & 1).bool()] = 1
        # written into the same strides as the kernel's result, so that views in the model stay possible
        return out.copy_(layout.original(canonical, out))

    def _note(self, use: _WeightUse) -> None:
        if self.waiting:
            nonzero = (use.by_channel() != 0).any(1)
            first_use = _FirstUse(use.weight, use.use, use.func in _PROJECTING, nonzero)
            self.uses |= dict.fromkeys(self.waiting, first_use)
            self.waiting = []

    def _wrap(self, path: str, module: nn.Module) -> None:
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.stack.append(path)
            try:
                return inner(*args, **kwargs)
            finally:
                self.stack.pop()

        module.forward = forward


# --- runs ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_without_head(model: nn.Module, projections: Sequence[Projection], head: int, images: Tensor) -> Any:
    """Runs an untapped copy of the model in which a head's channels are zero at the input of its projection.

    Every weight that takes the same tensor (an adapter beside the projection) takes it with those channels zero.

    Args:
        model: The model; a copy that shares its weights is run.
        projections: The projection of each attention call that runs the head.
        head: Zero-based index of the head among those of the call.
        images: A batch of prepared images.

    Returns:
        What the model returns.
    """
    closing: list[tuple[Tensor, Projection]] = []

    def close_channels(use: _WeightUse) -> Tensor | None:
        closing.extend((use.x, each) for each in projections if (use.weight, use.use) == (each.weight, each.use))
        if not closing:
            return None
        x, projection = closing[-1]
        if use.x.shape != x.shape or use.x.data_ptr() != x.data_ptr():
            return None
        closed = projection.channels[head].to(use.x.device)
        return use.x.movedim(use.channel_axis, -1).masked_fill(closed, 0).movedim(-1, use.channel_axis)

    clone = clone_sharing(model)
    with _WeightUses(clone, close_channels), Interceptor(PassiveHandler()):
        return clone(images)


@contextmanager
def projection_inputs(model: nn.Module, projection: Projection) -> Iterator[list[Tensor]]:
    """Around any pass of the model or of a copy that shares its weights: collects the input of a projection.

    Args:
        model: The model.
        projection: The projection.

    Yields:
        A list that receives the input [channel, everything else] when the pass gets there.
    """
    inputs: list[Tensor] = []

    def collect(use: _WeightUse) -> None:
        if use.weight == projection.weight and use.use == projection.use:
            inputs.append(use.by_channel())

    with _WeightUses(clone_sharing(model), collect):  # names and tensors are the copy's
        yield inputs
