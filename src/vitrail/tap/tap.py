"""Reading and editing a running model: the only file that does.

A `Tap` owns a clone of the model that shares its weights, with replaced `forward`s on the blocks, and enters an
`Interceptor` around each pass. It never touches the user's modules, so there is nothing to remove afterwards.

A pass does one of three things: it reads (and edits), it records what enters and leaves each block, or it starts at a
block from what was recorded. On modules that a native kernel answers, a shadow run beside the kernel serves the reader.

One tap serves one thread; `Vit.tap()` gives each thread its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from vitrail.errors import TapError, Unsupported, UsageError
from vitrail.tap.anatomy import MAPLESS_KINDS, Anatomy, Block, Call
from vitrail.tap.attention import CallResult, LayerAttention, Readers
from vitrail.tap.clone import CANNOT_RUN, ModuleState, clone_sharing, images_of_model, require_images
from vitrail.tap.edits import Edit, apply_regions, apply_to_output, edits_by_call, score_bias
from vitrail.tap.intercept import Captured, Interceptor, RawCall, Region, has_native_path, native_path_enabled
from vitrail.tap.layout import MAP_AXES, MIN_TOKEN_AXES, own_tensors, repeat_images
from vitrail.tap.modes import autocast_off
from vitrail.tap.places import KeyPlaces, find_key_places
from vitrail.tap.rounding import rounding_bound
from vitrail.tap.slots import measure_window_slots

__all__ = ["KnownTrials", "LayerAttention", "Readers", "Replay", "Tap"]

Forward = Callable[..., Any]


@dataclass(eq=False)
class _BlockRecord:
    """What entered and left a block in a recorded pass; copies where the block is `in_place`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(eq=False)
class Replay:
    """What entered and left each block in one recorded pass, from which passes can start in the middle.

    Attributes:
        images: The batch [image, channel, row, column].
        blocks: Arguments and output of each block, in the order they ran.
        convolutions: By module path, the outputs of each convolution before and between the blocks.
        logits: What the pass gave [image, class].
    """

    images: Tensor
    blocks: list[_BlockRecord] = field(default_factory=list)
    convolutions: dict[str, list[Tensor]] = field(default_factory=dict)
    logits: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Start:
    """Where a pass begins, and how, if it begins in the middle.

    Attributes:
        layer: The first block that runs; blocks before it return their recorded output.
        replay: The recorded pass.
        from_stem: Copies are on the batch from the images on, not only from `layer` on.
        anew: Blocks before `layer` run all the same, for what they keep on the model for later blocks.
        stop_at_residual: The pass ends when block `layer` has added attention to its input.
        class_token_only: From the last block's residual on only the class token is carried.
    """

    layer: int
    replay: Replay
    from_stem: bool = False
    anew: bool = False
    stop_at_residual: bool = False
    class_token_only: bool = False


@dataclass(eq=False)
class _Position:
    """The block that is running.

    Attributes:
        layer: Its index.
        stream: The token tensors it was given, and their sums with what its attention calls gave so far, by identity:
            the residual is the first sum with one of them after the last call.
        n_products: Products with maps so far, among them those that are no attention calls.
        n_calls: Attention calls so far.
        n_softmaxes: Softmaxes so far that may be maps.
        residual_added: All attention has been added to the input.
    """

    layer: int
    stream: tuple[Tensor, ...]
    n_products: int = 0
    n_calls: int = 0
    n_softmaxes: int = 0
    residual_added: bool = False


@dataclass(eq=False)
class _Pass:
    """One pass: what it is to do (first part) and how far it has come (second part).

    Attributes:
        n_rows: Images times copies.
        copies: How often each image is on the batch.
        readers: Who is called.
        edits: What is changed, each in one attention call.
        record: Where inputs and outputs of blocks are kept, if they are.
        start: Where the pass begins; None at the images.
        position: The block that is running; None outside the blocks.
        visited: Blocks that were entered, in order.
        used: Indices of edits that were applied.
        n_block_runs: By path, how often a module that is a block has run.
        n_convolution_runs: By path, how often a convolution has been answered from the record.
        reader_error: What a reader has raised.
        native: Whether a native kernel is answering ("kernel"), a shadow run beside it is serving the reader
            ("shadow"), or neither ("off").
    """

    n_rows: int
    copies: int = 1
    readers: Readers = field(default_factory=Readers)
    edits: tuple[Edit, ...] = ()
    record: Replay | None = None
    start: _Start | None = None

    position: _Position | None = None
    visited: list[int] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    n_block_runs: dict[str, int] = field(default_factory=dict)
    n_convolution_runs: dict[str, int] = field(default_factory=dict)
    reader_error: BaseException | None = None
    native: Literal["off", "kernel", "shadow"] = "off"

    def edits_of(self, position: _Position, call: int | None = None) -> tuple[Edit, ...]:
        """Edits of an attention call of the block that is running, by default of the one that comes next."""
        call = position.n_calls if call is None else call
        return tuple(edit for edit in self.edits if edit.layer == position.layer and edit.call == call)

    def stops_at_residual(self, layer: int) -> bool:
        """Whether the pass ends at this layer's residual."""
        return self.start is not None and self.start.stop_at_residual and self.start.layer == layer


@dataclass(eq=False)
class _Trials:
    """What a run from the middle may leave out, as far as it was tried; None and empty where it was not.

    Attributes:
        copies_from_stem: Copies must be on the batch from the images on; by whether the batch has a single image.
        keeps_state: Blocks read what earlier blocks of a pass keep on the model.
        class_token_suffices: The last block's residual on the class token alone decides the logits.
    """

    copies_from_stem: dict[bool, bool] = field(default_factory=dict)
    keeps_state: bool | None = None
    class_token_suffices: bool | None = None


class KnownTrials:
    """What the taps of one model have tried, for all threads, as long as the model's modules stay as they are."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._latest: tuple[ModuleState, _Trials] | None = None

    def of(self, model: nn.Module) -> _Trials:
        """What was tried with a model as it is now.

        Args:
            model: The model.

        Returns:
            To be read and completed by its taps.
        """
        with self._lock:
            if self._latest is None or not self._latest[0].is_of(model):
                self._latest = ModuleState(model), _Trials()
            return self._latest[1]

    def for_variant(self, model: nn.Module, variant: nn.Module) -> "KnownTrials":
        """The same for a variant of a model whose blocks hand on what the model's do, such as one with moved windows.

        Args:
            model: The model.
            variant: Its variant.

        Returns:
            What was tried, and will be, with either of them.
        """
        trials = KnownTrials()
        trials._latest = ModuleState(variant), self.of(model)
        return trials


class Tap:
    """Runs one model with readers and edits, and leaves it as it is.

    Not re-entrant: a reader may run another model's tap, not this one. One tap serves one thread.

    Args:
        model: The user's model; a copy that shares its weights is run.
        anatomy: What `discover` gave for it.
        choose: Picks the [image class] tensor out of what the model returns.
        trials: What other taps of the model have tried; None for a tap of its own.

    Attributes:
        anatomy: Blocks, heads, grids of the model.

    Example:
        >>> tap = vit.tap()
        >>> replay, logits = tap.record(images)
        >>> without = tap.run_from(5, replay, [Edit(5, prune=(2,))])  # L5H2 pruned; L0 to L4 are not run again
    """

    def __init__(
        self, model: nn.Module, anatomy: Anatomy, choose: Callable[[Any], Tensor], trials: "KnownTrials | None" = None
    ) -> None:
        self.anatomy = anatomy
        self._known_trials = KnownTrials() if trials is None else trials
        self._original = model
        self._choose = choose
        self._pass: _Pass | None = None
        self._prepare()

    def _prepare(self) -> None:
        """Clones the model as it is now; what was tried on an earlier clone is tried anew."""
        self._state: ModuleState | None = None  # until the clone is finished
        self._slots: dict[tuple[int, int], Tensor] = {}
        self._places: dict[tuple[int, int], KeyPlaces] = {}
        state = ModuleState(self._original)
        self._trials = self._known_trials.of(self._original)
        self._clone = clone_sharing(self._original)
        self._mode = Interceptor(self)
        for path, module in self._clone.named_modules():
            in_block = any(path.startswith(block.path) for block in self.anatomy.blocks)
            if has_native_path(module) and in_block:
                self._wrap_native(module)
            if isinstance(module, nn.Conv2d) and not in_block:
                self._wrap_convolution(path, module)
        layers: dict[str, dict[int, int]] = {}
        for layer, block in enumerate(self.anatomy.blocks):
            layers.setdefault(block.path, {})[block.run] = layer
        for path, by_run in layers.items():
            self._wrap_block(path, by_run)
        self._state = state

    # --- passes ------------------------------------------------------------------------------------------------------

    def read(
        self,
        images: Float[Tensor, "image channel row column"],
        readers: Readers | None = None,
        edits: Sequence[Edit] = (),
    ) -> Float[Tensor, "image class"]:
        """Runs the model once, with readers and edits. Gradients flow if they are enabled.

        Args:
            images: Prepared images.
            readers: Functions to call on the way.
            edits: Changes to attention calls.

        Returns:
            Logits; without edits bitwise the model's own.

        Raises:
            UsageError: An edit names a layer, call, head or key that does not exist, or these are no images for it.
            Unsupported: An edit would not mean what it says on that kind of attention.
            TapError: The pass went another way than when the model was opened, or a reader ran this model.
        """
        require_images(images)
        self._follow_model()
        return self._logits(self._run(images, _Pass(len(images), 1, readers or Readers(), self._validate(edits, 1))))

    @torch.no_grad()
    def record(
        self,
        images: Float[Tensor, "image channel row column"],
        readers: Readers | None = None,
        *,
        keep: bool = True,
    ) -> tuple[Replay, Float[Tensor, "image class"]]:
        """Runs the model once without edits and records what enters and leaves its blocks, for `run_from`.

        Args:
            images: Prepared images.
            readers: Functions to call on the way.
            keep: Without it only images and logits are kept.

        Returns:
            The record, and the logits.

        Raises:
            UsageError: These are no images for the model.
            TapError: The pass went another way than when the model was opened, or a reader ran this model.
        """
        require_images(images)
        self._follow_model()
        replay = Replay(images)
        state = _Pass(len(images), readers=readers or Readers(), record=replay if keep else None)
        replay.logits = self._logits(self._run(images, state))
        return replay, replay.logits

    @torch.no_grad()
    def run_from(
        self,
        layer: int,
        replay: Replay,
        edits: Sequence[Edit] = (),
        copies: int = 1,
        readers: Readers | None = None,
        *,
        until_residual: bool = False,
    ) -> Float[Tensor, "row class"]:
        """Runs the blocks from `layer` on, on recorded tokens, with several copies of each image on the batch.

        Args:
            layer: The first block that runs, zero-based.
            replay: What `record` gave.
            edits: Changes to attention calls; those with `copy=c` act on one copy.
            copies: How often each image is on the batch, copy-major: rows 0 .. n - 1 are copy 0.
            readers: Functions to call on the way.
            until_residual: End the pass when block `layer` has added attention to its residual.

        Returns:
            Logits [copy x image, class]; empty with `until_residual`.

        Raises:
            UsageError: There is no such layer, an edit names a layer, call, head, key or copy that does not exist, or
                the record keeps no tokens.
            Unsupported: An edit would not mean what it says on that kind of attention.
            TapError: An edit before `layer`, or a layer without an observable residual with `until_residual`.
        """
        self._check_layer(layer)
        self._follow_model()
        if not replay.blocks:
            raise UsageError("This pass was recorded with keep=False, so no run can start from it; record it anew.")
        needs_all_tokens = until_residual or (readers is not None and readers.output is not None)
        anew = layer > 0 and self.blocks_keep_state(replay)
        start = _Start(
            layer,
            replay,
            from_stem=anew or (copies > 1 and self._needs_copies_from_stem(replay)),
            anew=anew,
            stop_at_residual=until_residual,
            class_token_only=not needs_all_tokens and self._class_token_is_enough(replay),
        )
        return self._run_from(start, self._validate(edits, copies), copies, readers or Readers())

    def _run_from(
        self, start: _Start, edits: tuple[Edit, ...] = (), copies: int = 1, readers: Readers | None = None
    ) -> Tensor:
        images = start.replay.images
        state = _Pass(len(images) * copies, copies, readers or Readers(), edits, start=start)
        if start.from_stem:
            images = images.repeat(copies, *[1] * (images.ndim - 1))
        output = self._run(images, state)
        if output is None:
            return images.new_zeros((0, 0))
        return self._logits(output)

    def _logits(self, output: Any) -> Tensor:
        return self._choose(output)

    def _run(self, images: Tensor, state: _Pass) -> Any:
        """What the model returns; None where the pass was to stop at a residual."""
        if self._pass is not None:
            raise TapError(
                "This model is already being tapped in this thread: a reader may not run the model it reads. "
                "Keep what you need and run after the pass, or open the model a second time."
            )
        self._pass = state
        try:
            # a reader of another model may be the caller
            shape, is_of_reader = self.anatomy.image_shape, lambda error: error is state.reader_error
            accepted = images_of_model(self._clone, images, shape, is_of_reader)
            with accepted, autocast_off(), torch._C._EnableTorchFunction(), self._mode:
                output = self._clone(images)
        except Captured:
            if state.start is None or not state.start.stop_at_residual:
                raise
            output = None
        finally:
            self._pass = None
            self._mode.forget()
        if self._state is not None:
            self._state.note_pass(self._original)
        self._check_pass(state, complete=output is not None)
        return output

    def _follow_model(self) -> None:
        """The user may have changed modules, hooks or attributes since the last pass."""
        if self._pass is None and (self._state is None or not self._state.is_of(self._original)):
            self._prepare()

    def _check_pass(self, state: _Pass, *, complete: bool) -> None:
        missing = [index for index in range(len(self.anatomy.blocks)) if index not in state.visited]
        if complete and missing:
            raise TapError(f"Blocks {', '.join(f'L{index}' for index in missing)} did not run in this pass.")
        if complete and state.start is not None and state.start.stop_at_residual:
            raise TapError(
                f"L{state.start.layer} is not seen to add its attention to the tokens that it was given; the pass "
                "could not stop there."
            )
        unused = [edit for index, edit in enumerate(state.edits) if index not in state.used]
        if unused:
            first_layer = state.start.layer if state.start else 0
            raise TapError(
                f"An edit touched nothing: L{unused[0].layer} call {unused[0].call} did not run in this pass "
                f"(it began at L{first_layer})."
            )

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < len(self.anatomy.blocks):
            raise UsageError(f"There is no L{layer}: this model has L0 to L{len(self.anatomy.blocks) - 1}.")

    def _validate(self, edits: Sequence[Edit], copies: int) -> tuple[Edit, ...]:
        """Refuses edits that name what does not exist; those of a whole layer become edits of its calls."""
        edits = edits if isinstance(edits, Edit) else tuple(edits)
        if isinstance(edits, Edit) or not all(isinstance(edit, Edit) for edit in edits):
            raise UsageError("edits= takes a list of vitrail.Edit, such as edits=[Edit(layer=3, prune=(0, 2))].")
        by_call: list[Edit] = []
        for edit in edits:
            self._check_layer(edit.layer)
            block = self.anatomy.blocks[edit.layer]
            if not block.calls:
                raise Unsupported(
                    f"L{edit.layer} ({block.path}) computes its attention in an operator that cannot be observed, so "
                    "it cannot be edited."
                )
            if edit.call is not None and not 0 <= edit.call < len(block.calls):
                raise UsageError(
                    f"L{edit.layer} makes {len(block.calls)} attention calls; there is no call {edit.call}."
                )
            if edit.copy is not None and not 0 <= edit.copy < copies:
                raise UsageError(f"An edit names copy {edit.copy} of a run with {copies} copies.")
            _check_heads(edit, block.heads if edit.call is None else block.calls[edit.call].heads)
            parts = edits_by_call(edit, block)
            for part in parts:
                assert part.call is not None
                _check_kind(part, block)
                _check_keys(part, block.calls[part.call])
            by_call.extend(parts)
        return tuple(by_call)

    # --- what a run from the middle may leave out --------------------------------------------------------------------

    @torch.no_grad()
    def blocks_keep_state(self, replay: Replay) -> bool:
        """Whether blocks read what earlier blocks of a pass keep on the model, such as the values of the first.

        Tried once: what a changed pass leaves behind must not show in a run from a later block. Where it does, and does
        not once the earlier blocks run too, they run.

        Args:
            replay: What `record` gave.

        Returns:
            False for models that hand on all that they compute.
        """
        if self._trials.keeps_state is None:
            keeps_state = False
            blocks = self.anatomy.blocks
            first, last = next((layer for layer, block in enumerate(blocks) if block.calls), 0), len(blocks) - 1
            layers = sorted({first + 1, (first + 1 + last) // 2, last}, reverse=True)  # a run hides what it makes anew
            if blocks[first].calls and first < last:
                device = replay.images.device
                with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                    self._run_without_heads_of(first, replay.images)
                    if not all(self._gives_logits(_Start(layer, replay), copies=1) for layer in layers):
                        self._run_without_heads_of(first, replay.images)
                        starts = (_Start(layer, replay, from_stem=True, anew=True) for layer in layers)
                        keeps_state = all(self._gives_logits(start, copies=1) for start in starts)
            self._trials.keeps_state = keeps_state  # not before: a trial that is interrupted has shown nothing
        return self._trials.keeps_state

    def _run_without_heads_of(self, layer: int, images: Tensor) -> None:
        """A pass that leaves other things behind than one of these images does: pruned, and of another number."""
        edits = [Edit(layer, prune=tuple(range(self.anatomy.blocks[layer].heads)))]
        others = images[:1].repeat(3 if len(images) == 2 else 2, *[1] * (images.ndim - 1))
        try:
            self.read(others, edits=edits)
        except torch.OutOfMemoryError:
            raise
        except CANNOT_RUN:  # a model that keeps its batch size
            self.read(images, edits=edits)

    def _needs_copies_from_stem(self, replay: Replay) -> bool:
        """Whether copies must be on the batch from the images on. Tried once: most models take them at any block.

        Once for batches of one image and once for others: a single row is broadcast to any number, and tells nothing.
        """
        single = len(replay.images) == 1
        if single not in self._trials.copies_from_stem:
            last = len(self.anatomy.blocks) - 1
            layers = sorted({0, last // 2, last})
            from_block = all(self._gives_logits(_Start(layer, replay), copies=2) for layer in layers)
            if not from_block:
                starts = [_Start(layer, replay, from_stem=True) for layer in layers]
                # answers that move with the size of the batch, as those of convolutions may, are the model's own
                twice = None if self._gives_logits(starts[0], copies=2) else self.read(replay.images.repeat(2, 1, 1, 1))
                if not all(self._gives_logits(start, copies=2, logits=twice) for start in starts):
                    raise TapError(
                        "Runs that start at a block do not give the model's own answer, even without an edit, so their "
                        "numbers are withheld. The model may draw random numbers, or keep something from pass to pass."
                    )
            self._trials.copies_from_stem[single] = not from_block
        return self._trials.copies_from_stem[single]

    def _class_token_is_enough(self, replay: Replay) -> bool:
        """Whether the last block's residual on the class token alone decides the logits. Tried once and compared."""
        if self._trials.class_token_suffices is None:
            last = len(self.anatomy.blocks) - 1
            block = self.anatomy.blocks[last]
            in_order = block.layout.token_axis is not None and not block.layout.non_patches.move_tokens
            may_suffice = block.class_token and block.kind == "token" and in_order
            start = _Start(last, replay, class_token_only=True)
            self._trials.class_token_suffices = may_suffice and self._gives_logits(start, copies=1)
        return self._trials.class_token_suffices

    def _gives_logits(self, start: _Start, copies: int, logits: Tensor | None = None) -> bool:
        """Whether a run without edits gives these logits of all copies, or the recorded ones, up to rounding."""
        recorded = start.replay.logits
        assert recorded is not None
        logits = recorded.repeat(copies, *[1] * (recorded.ndim - 1)) if logits is None else logits
        try:
            rows = self._run_from(start, copies=copies)
        except torch.OutOfMemoryError:
            raise  # says nothing of the model; a study goes on with smaller batches
        except CANNOT_RUN:
            return False  # a model that keeps its batch size takes no more rows midway; a head may read every token
        if rows.shape != logits.shape:
            return False
        difference = (rows.float() - logits.float()).abs().max()
        return bool(difference <= rounding_bound(logits.dtype) * logits.float().abs().max())

    # --- modules -----------------------------------------------------------------------------------------------------

    def _wrap_block(self, path: str, layers: Mapping[int, int]) -> None:
        """`layers` says which layer each run of the module is; a run that is none passes through."""
        module = self._clone.get_submodule(path)
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            state = self._pass
            if state is None:
                return inner(*args, **kwargs)
            run = state.n_block_runs.get(path, 0)
            state.n_block_runs[path] = run + 1
            if run not in layers:
                return inner(*args, **kwargs)
            return self._block_output(state, layers[run], inner, args, kwargs)

        module.forward = forward

    def _wrap_convolution(self, path: str, module: nn.Module) -> None:
        """Before the block that a run starts at, convolutions need not run: what they lead to comes from the record.

        Copies are recorded and returned, since models go on to add to them in place.
        """
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            state = self._pass
            start = None if state is None else state.start
            if state is not None and start is not None and not start.from_stem and start.layer not in state.visited:
                run = state.n_convolution_runs.get(path, 0)
                state.n_convolution_runs[path] = run + 1
                return start.replay.convolutions[path][run].clone()
            output = inner(*args, **kwargs)
            if state is not None and state.record is not None:
                state.record.convolutions.setdefault(path, []).append(output.clone())
            return output

        module.forward = forward

    def _block_output(
        self, state: _Pass, index: int, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        block, start = self.anatomy.blocks[index], state.start
        n_images = state.n_rows // state.copies
        state.visited.append(index)
        own = own_tensors if block.in_place else _as_it_is  # the model writes to these: neither record nor reader
        if start is not None and index < start.layer:  # may hold them
            if start.anew:
                inner(*args, **kwargs)
                self._mode.forget()  # a map that the block keeps on the model is none of the blocks to come
            output = own(start.replay.blocks[index].output)
            return repeat_images(output, block.outputs, n_images, state.copies) if start.from_stem else output
        if start is not None and index == start.layer:
            args, kwargs = own((start.replay.blocks[index].args, start.replay.blocks[index].kwargs))
        if state.copies > 1:
            args, kwargs = repeat_images((args, kwargs), block.inputs, n_images, state.copies)
        given_args, given_kwargs = own((args, kwargs)) if state.record is not None else (args, kwargs)
        output = self._run_block(state, index, inner, args, kwargs)
        if state.record is not None:
            state.record.blocks.append(_BlockRecord(given_args, given_kwargs, own(output)))
        if state.readers.output is not None:
            with _reader_errors(state):
                self._report_output(state.readers.output, block, index, output)
            output = own(output)  # the reader has the block's own, whose gradient is that of what it stands for
        return output

    def _run_block(
        self, state: _Pass, index: int, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        around = state.position  # another block, where blocks are nested
        position = _Position(index, _token_tensors((args, kwargs)))
        state.position = position
        try:
            output = inner(*args, **kwargs)
            self._mode.forget()
            block = self.anatomy.blocks[index]
            # a native kernel hides calls where nobody reads or edits, so they are counted only where somebody does
            observed = state.readers.attention is not None or any(edit.layer == index for edit in state.edits)
            if observed and position.n_calls != len(block.calls):
                raise TapError(
                    f"L{index} ({block.path}) made {position.n_calls} attention calls; "
                    f"{len(block.calls)} were found when the model was opened."
                )
        finally:
            state.position = around
        return output

    def _report_output(self, read: Callable[[int, Tensor], None], block: Block, index: int, output: Any) -> None:
        tokens = _token_tensors(output)
        if not tokens:
            return
        with torch._C.DisableTorchFunction():
            layout = block.output_layout
            tokens = tuple(leaf for leaf in tokens if leaf.ndim == layout.n_axes and not _is_map(leaf, block)) or tokens
            parts = _parts_of_images(output, block)
            tokens = tuple(leaf for leaf in tokens if id(leaf) not in parts) or tokens
            main = max(tokens, key=lambda leaf: leaf.numel())
            read(index, layout.canonical(main) if main.ndim == layout.n_axes else main)

    def _wrap_native(self, module: nn.Module) -> None:
        """A native kernel answers, as it does untapped; a shadow run that stops at attention serves the reader."""
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            state = self._pass
            if state is None or state.native != "off" or not self._keeps_native(state, module, args):
                return inner(*args, **kwargs)
            state.native = "kernel"
            try:
                with torch._C.DisableTorchFunction():
                    output = inner(*args, **kwargs)
            finally:
                state.native = "off"
            if state.readers.attention is not None:
                self._shadow_run(state, inner, args, kwargs)
            elif isinstance(module, nn.MultiheadAttention) and state.position is not None:
                # counted, so that the sum that follows is known as the residual though nobody reads the attention
                state.position.n_products += 1
                state.position.n_calls += 1
            return output

        module.forward = forward

    def _shadow_run(self, state: _Pass, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state.native = "shadow"
        try:
            with self._mode:
                inner(*args, **kwargs)
        except Captured:
            pass  # the reader has been called, which is all that the shadow run was for
        finally:
            state.native = "off"

    def _keeps_native(self, state: _Pass, module: nn.Module, args: tuple[Any, ...]) -> bool:
        layer = None if state.position is None else state.position.layer
        edits_here = any(edit.layer == layer for edit in state.edits)
        tensors = (*module.parameters(), *(item for item in args if isinstance(item, Tensor)))
        needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        return native_path_enabled() and not edits_here and not needs_gradient and not module.training

    # --- what the interceptor reports --------------------------------------------------------------------------------

    def attention(self, raw: RawCall) -> Tensor:
        """Applies the edits of an attention call, calls the reader, returns the output.

        Args:
            raw: The call, as the interceptor describes it.

        Returns:
            [.., query, channel], which the model goes on with.

        Raises:
            TapError: The block makes more calls than were found by tracing.
        """
        state = self._pass
        position = None if state is None else state.position
        if state is None or position is None:
            return raw.run(None, None)
        block, shadow = self.anatomy.blocks[position.layer], state.native == "shadow"
        product, position.n_products = position.n_products, position.n_products + 1
        if product in block.side_products:
            return raw.run(None, None)
        if position.n_calls >= len(block.calls):
            raise TapError(
                f"L{position.layer} ({block.path}) made more attention calls than the {len(block.calls)} found when "
                "the model was opened."
            )
        result = CallResult() if shadow else self._apply_edits(state, position, raw)
        if state.readers.attention is not None:
            layer, call = position.layer, position.n_calls
            with torch._C.DisableTorchFunction(), _reader_errors(state):
                state.readers.attention(
                    LayerAttention(
                        layer, call, block, raw, state.n_rows, result, lambda: self.window_slots(layer, call)
                    )
                )
        position.n_calls += 1
        if shadow:
            raise Captured
        assert result.out is not None
        return result.out

    def _apply_edits(self, state: _Pass, position: _Position, raw: RawCall) -> CallResult:
        spec = self.anatomy.blocks[position.layer].calls[position.n_calls]
        edits = state.edits_of(position)
        first_query = self._first_query_run(state, position, raw, edits)
        if not edits:
            return CallResult(first_query() if first_query else raw.run(None, None))
        state.used.update(index for index, edit in enumerate(state.edits) if edit in edits)
        if not raw.fused and not raw.scores_changed and any(edit.changes_scores for edit in edits):
            raise TapError(f"A bias on L{position.layer} did not reach its softmax, so the numbers are withheld.")
        edited_maps: list[Tensor] = []
        bias = _bias_in_layout(state, spec, edits, raw.v if raw.q is None else raw.q) if raw.fused else None

        def change(weights: Tensor, queries: slice) -> Tensor:
            windows = spec.layout.canonical(weights, state.n_rows, MAP_AXES).unbind(1)
            edited = torch.stack([apply_regions(window, edits, state.copies, queries) for window in windows], 1)
            if state.readers.attention is not None:
                edited_maps.append(edited)
            return spec.layout.original(edited, weights, MAP_AXES)

        has_region = any(edit.region is not None for edit in edits)
        region = Region(change, by_query=not spec.layout.non_patches.move_tokens) if has_region else None
        out = first_query() if first_query else raw.run(bias, region)
        if any(edit.changes_output for edit in edits):
            canonical = apply_to_output(spec.layout.canonical(out, state.n_rows), edits, state.copies)
            out = spec.layout.original(canonical, out)
        return CallResult(out, torch.cat(edited_maps, -2) if edited_maps else None, bias)

    def _first_query_run(
        self, state: _Pass, position: _Position, raw: RawCall, edits: tuple[Edit, ...]
    ) -> Callable[[], Tensor] | None:
        """Where the class token alone goes on and nobody reads, the other queries need no answer."""
        if not self._carries_class_token_only(state, position.layer):
            return None
        if state.readers.attention is not None or state.readers.residual is not None:
            return None
        plain = not any(edit.changes_scores or edit.region is not None for edit in edits)
        return raw.first_query if plain else None

    def _carries_class_token_only(self, state: _Pass, layer: int) -> bool:
        return state.start is not None and state.start.class_token_only and layer == len(self.anatomy.blocks) - 1

    def score_bias(self, scores: Tensor) -> Tensor | None:
        """Sums what edits add to scores on their way to a hand-written softmax.

        Args:
            scores: [.., query, key] before softmax.

        Returns:
            A tensor that broadcasts to the scores; None where no edit adds anything.
        """
        state = self._pass
        position = None if state is None else state.position
        if state is None or position is None:
            return None
        number, position.n_softmaxes = position.n_softmaxes, position.n_softmaxes + 1
        calls = self.anatomy.blocks[position.layer].calls
        takers = [index for index, call in enumerate(calls) if number in call.softmaxes]
        if len(takers) != 1:
            return None
        return _bias_in_layout(state, calls[takers[0]], state.edits_of(position, takers[0]), scores)

    def addition(self, left: Any, right: Any, result: Tensor) -> Tensor:
        """Recognises the residual: the first sum after the last attention call with the block's own input, or with what
        attention has been added to so far.

        Args:
            left: First operand of the sum.
            right: Second operand.
            result: The sum.

        Returns:
            The sum that the model goes on with.
        """
        state = self._pass
        position = None if state is None else state.position
        if state is None or position is None or state.native == "shadow":
            return result
        if position.residual_added or position.n_calls == 0:
            return result
        if not any(left is token or right is token for token in position.stream):
            return result
        block = self.anatomy.blocks[position.layer]
        if position.n_calls < len(block.calls):
            position.stream += (result,)
            return result
        position.residual_added = True
        layout = block.layout
        if state.readers.residual is not None and result.ndim == layout.n_axes:
            with torch._C.DisableTorchFunction(), _reader_errors(state):
                tokens = layout.canonical(result.clone() if block.in_place else result)
                state.readers.residual(position.layer, tokens)
        if state.stops_at_residual(position.layer):
            raise Captured
        if self._carries_class_token_only(state, position.layer) and layout.token_axis is not None:
            return result.narrow(layout.token_axis, 0, 1)
        return result

    # --- windows -----------------------------------------------------------------------------------------------------

    def window_slots(self, layer: int, call: int = 0) -> Int[Tensor, "window slot"]:
        """Finds which token sits in each slot of each window of a layer, by moving tokens. Measured once.

        Args:
            layer: Zero-based index of the block.
            call: Which attention call of the block.

        Returns:
            Token index at each slot, -1 for padding.

        Raises:
            Unsupported: Tokens are not each in exactly one slot (convolution or pooling inside the block).
        """
        self._follow_model()
        if (layer, call) not in self._slots:
            self._slots[layer, call] = measure_window_slots(self._original, self.anatomy, layer, call)
        return self._slots[layer, call]

    def key_places(self, layer: int, call: int = 0) -> KeyPlaces:
        """Finds where the keys of an attention call lie on the layer's grid: in windows, pooled or whole. Found once.

        Args:
            layer: Zero-based index of the block.
            call: Which attention call of the block.

        Returns:
            Shares of rows and columns of patches.

        Raises:
            Unsupported: The layer has no grid, its attention has no keys that are tokens, or no patch moves a key.
        """
        self._follow_model()
        if (layer, call) not in self._places:
            self._places[layer, call] = find_key_places(self._original, self.anatomy, layer, call)
        return self._places[layer, call]


@contextmanager
def _reader_errors(state: _Pass) -> Iterator[None]:
    """Notes what a reader raises, which neither the model nor its images have caused.

    Python takes a `TypeError` inside `a + b` or `a @ b` for operands that do not fit, and hides its message.
    """
    try:
        yield
    except TypeError as error:
        raise TapError(f"A reader failed: {error}") from error
    except BaseException as error:
        state.reader_error = error
        raise


def _as_it_is(tree: Any) -> Any:
    return tree


def _is_map(leaf: Tensor, block: Block) -> bool:
    """Whether a block hands on one of its attention maps, which are larger than its tokens."""
    return any(tuple(leaf.shape[-3:]) == (call.heads, call.queries, call.keys) for call in block.calls)


def _parts_of_images(output: Any, block: Block) -> set[int]:
    """The tensors of a block's output that have several rows for each image, such as the pixels of each patch."""
    leaves = tree_flatten(output)[0]
    return {
        id(leaf)
        for leaf, batch in zip(leaves, block.outputs, strict=False)
        if batch is not None and batch.per_image > 1
    }


def _token_tensors(tree: Any) -> tuple[Tensor, ...]:
    leaves = tree_flatten(tree)[0]
    return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim >= MIN_TOKEN_AXES)


def _bias_in_layout(state: _Pass, spec: Call, edits: tuple[Edit, ...], like: Tensor) -> Tensor | None:
    """The sum of the edits' biases, with the leading dimensions, dtype and device of `like`."""
    shape = (state.n_rows, spec.heads, spec.queries, spec.keys)
    bias = score_bias(edits, state.copies, shape, like)
    return None if bias is None else spec.layout.original(bias.unsqueeze(1), like, MAP_AXES)


def _check_heads(edit: Edit, n_heads: int) -> None:
    absent = [head for head in edit.prune if not 0 <= head < n_heads]
    if absent:
        raise UsageError(f"L{edit.layer} has heads H0 to H{n_heads - 1}; an edit names H{absent[0]}.")


def _check_keys(edit: Edit, call: Call) -> None:
    absent = [key for key in edit.drop_keys if not 0 <= key < call.keys]
    if absent:
        raise UsageError(f"L{edit.layer} attends to tokens 0 to {call.keys - 1}; an edit drops {absent[0]}.")


def _check_kind(edit: Edit, block: Block) -> None:
    assert edit.call is not None
    call = block.calls[edit.call]
    if edit.changes_scores and not call.row_stochastic:
        raise Unsupported(
            f"L{edit.layer} mixes its heads' maps after softmax, so a bias or a dropped key does not mean what it "
            "says. Pruning and regions work."
        )
    others = {number for other in block.calls if other is not call for number in other.softmaxes}
    if edit.changes_scores and others.intersection(call.softmaxes):
        raise Unsupported(
            f"L{edit.layer} uses one softmax for several attention calls, so a bias or a dropped key of one would be "
            "that of the others too. Pruning and regions work."
        )
    if (edit.region is not None or edit.changes_scores) and call.kind in MAPLESS_KINDS:
        raise Unsupported(f"L{edit.layer} has no token map (kind {call.kind!r}); its heads can be pruned, no more.")
    if edit.changes_scores and call.windows > 1:
        raise Unsupported(f"L{edit.layer} attends within windows; biases and dropped keys are not offered there.")
