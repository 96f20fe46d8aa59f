"""The independent way to prune a head: close its channels where the output projection takes them, without a tap.

Which channels are a head's is asked of the model: in some passes the attention outputs of chosen heads are ones and
those of the others zeros, and the projection's input shows where they arrive. So interleaved heads (NesT) are found as
well as heads side by side, and heads of several calls that meet in one projection. The projection is the first weight
of the block after the call whose input is zero where all heads give zeros: what makes gates or the next head is not.
Channels are closed at one use of the weight only, since blocks may share their weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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


class _LaterUse(NamedTuple):
    """A use of a weight after an attention call, and at which input channels something arrives."""

    weight: str
    use: int
    projects: bool
    nonzero: Bool[Tensor, "channel"]


@dataclass(frozen=True)
class _NumberedCall:
    """An attention call whose heads are numbered among those of its block, from 1.

    Attributes:
        layer: Of its block.
        number: Of the call in the block.
        call: Its description.
        n_heads: Of its block.
    """

    layer: int
    number: int
    call: Call
    n_heads: int

    @property
    def heads(self) -> range:
        """The numbers of its heads."""
        return range(self.call.layer_heads.start + 1, self.call.layer_heads.stop + 1)


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
    specs = {
        (layer, number): _NumberedCall(layer, number, call, block.heads)
        for layer, block in enumerate(anatomy.blocks)
        for number, call in enumerate(block.calls)
    }
    n_bits = max(block.heads for block in anatomy.blocks).bit_length()
    coded = _CodedHeads(clone, anatomy, specs)
    silent, *by_bit = (coded.later_uses(images, bit) for bit in (None, *range(n_bits)))
    return {
        key: _projection(spec, silent.get(key, []), [uses.get(key, []) for uses in by_bit])
        for key, spec in specs.items()
    }


def _projection(
    spec: _NumberedCall, silent: list[_LaterUse], by_bit: list[list[_LaterUse]]
) -> Projection | NoProjection:
    if not silent:
        return NoProjection("nothing with weights takes what attention gives")
    taker = next((use for use in silent if not bool(use.nonzero.any())), None)
    if taker is None:
        return NoProjection("the model adds to the heads before their projection, so a pruned head leaves that sum")
    same = [[use for use in uses if (use.weight, use.use) == (taker.weight, taker.use)] for uses in by_bit]
    if not taker.projects or not all(same):
        return NoProjection(f"attention goes into {taker.weight}, which is no projection")
    code = torch.as_tensor(sum(use.nonzero.long() << bit for bit, (use, *_) in enumerate(same)))
    channels = code[None] == torch.tensor([*spec.heads], device=code.device)[:, None]
    of_block = (code >= 1) & (code <= spec.n_heads)
    if not bool(of_block.all()) or not bool(channels.any(1).all()):
        return NoProjection(f"channels that go into {taker.weight} do not belong to one head each")
    return Projection(taker.weight, taker.use, channels)


class _CodedHeads(PassiveHandler):
    """Gives ones for some heads of every attention call and zeros for the rest; notes which weights are used then."""

    def __init__(self, clone: nn.Module, anatomy: Anatomy, specs: dict[tuple[int, int], _NumberedCall]) -> None:
        self.model, self.anatomy, self.specs = clone, anatomy, specs
        self.mode = Interceptor(self)
        self.layers: list[int] = []
        self.bit: int | None = None
        self.n_images = 0
        self.n_runs: dict[str, int] = {}
        self.n_products: dict[int, int] = {}
        self.waiting: list[tuple[int, int]] = []
        self.uses: dict[tuple[int, int], list[_LaterUse]] = {}
        by_path: dict[str, dict[int, int]] = {}
        for layer, block in enumerate(anatomy.blocks):
            by_path.setdefault(block.path, {})[block.run] = layer
        for path, by_run in by_path.items():
            self._wrap(path, by_run)

    @torch.no_grad()
    def later_uses(self, images: Tensor, bit: int | None) -> dict[tuple[int, int], list[_LaterUse]]:
        """The uses of weights after each call, up to the first call of another block.

        Args:
            images: A batch of prepared images.
            bit: Heads whose number has this bit give ones; None: every head gives zeros.
        """
        self.bit, self.n_images, self.waiting, self.uses = bit, len(images), [], {}
        self.n_runs, self.n_products = {}, {}
        with torch.random.fork_rng(devices=[]), _WeightUses(self.model, self._note), self.mode:
            self.model(images)
        self.mode.forget()
        return self.uses

    def attention(self, call: RawCall) -> Tensor:
        """Gives zeros and ones instead of the output."""
        own = super().attention(call)
        out = torch.zeros_like(own)
        if not self.layers:
            self.waiting = []
            return out
        layer = self.layers[-1]
        product = self.n_products.get(layer, 0)
        self.n_products[layer] = product + 1
        number = self.anatomy.blocks[layer].call_of_product(product)
        if number is None:
            return own
        spec = self.specs[layer, number]
        self.waiting = [*(each for each in self.waiting if each[0] == layer), (layer, number)]
        if self.bit is None:
            return out
        layout = spec.call.layout
        canonical = layout.canonical(out, self.n_images).clone()
        heads = torch.tensor([*spec.heads], device=out.device)
        canonical[:, :, (heads >> self.bit & 1).bool()] = 1
        # written into the same strides as the kernel's result, so that views in the model stay possible
        return out.copy_(layout.original(canonical, out))

    def _note(self, use: _WeightUse) -> None:
        if self.waiting:
            later = _LaterUse(use.weight, use.use, use.func in _PROJECTING, (use.by_channel() != 0).any(1))
            for key in self.waiting:
                self.uses.setdefault(key, []).append(later)

    def _wrap(self, path: str, layers: Mapping[int, int]) -> None:
        """`layers` says which layer each run of the module is; a run that is none passes through."""
        module = self.model.get_submodule(path)
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            run = self.n_runs.get(path, 0)
            self.n_runs[path] = run + 1
            if run not in layers:
                return inner(*args, **kwargs)
            self.layers.append(layers[run])
            try:
                return inner(*args, **kwargs)
            finally:
                self.layers.pop()
                self.mode.forget()

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
