"""Reading and editing a running model: the only file that does.

A `Tap` owns a clone of the model that shares its weights, with replaced `forward`s on the blocks, and enters an
`Interceptor` around each pass. It never touches the user's modules, so there is nothing to remove afterwards.

One tap serves one thread; `Vit.tap()` gives each thread its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from vitrail.errors import TapError, Unsupported, UsageError
from vitrail.vit.anatomy import Anatomy, Block, Call
from vitrail.vit.attention import LayerAttention, Readers
from vitrail.vit.clone import clone_sharing, same_tensors
from vitrail.vit.edits import Edit, apply_regions, apply_to_output, score_bias
from vitrail.vit.intercept import Captured, Interceptor, RawCall, has_native_path, native_path_enabled

__all__ = ["LayerAttention", "Readers", "Replay", "Tap"]


@dataclass(eq=False)
class Replay:
    """What entered and left each block in one plain pass, from which passes can start in the middle."""

    images: Tensor
    blocks: list["_Recorded"] = field(default_factory=list)
    stem: dict[str, list[Tensor]] = field(default_factory=dict)
    logits: Tensor | None = None


@dataclass(eq=False)
class _Recorded:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(eq=False)
class _Pass:
    """The state of one pass."""

    rows: int
    copies: int = 1
    readers: Readers = field(default_factory=Readers)
    edits: tuple[Edit, ...] = ()
    record: Replay | None = None
    start: int = 0
    replay: Replay | None = None
    wide: bool = False
    until: tuple[int, str] | None = None
    class_row: int | None = None
    layer: int | None = None
    calls: int = 0
    residual_seen: bool = False
    inputs: tuple[Tensor, ...] = ()
    visited: list[int] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    stem_runs: dict[str, int] = field(default_factory=dict)
    shadow: bool = False
    native: bool = False
    probe: Callable[[RawCall, int], None] | None = None

    def edits_here(self) -> tuple[Edit, ...]:
        return tuple(edit for edit in self.edits if edit.layer == self.layer and edit.call == self.calls)


class Tap:
    """Passes of one model with readers and edits.

    `choose(output)` picks the [image class] tensor out of what the model returns. Not re-entrant: a reader may run
    another model's tap, not this one.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, choose: Callable[[Any], Tensor]) -> None:
        self.anatomy = anatomy
        self._original = model
        self._choose = choose
        self._pass: _Pass | None = None
        self._slots: dict[tuple[int, int], Tensor] = {}
        self._wide: bool | None = None
        self._class_row: bool | None = None
        self._prepare()

    def _prepare(self) -> None:
        self._clone = clone_sharing(self._original)
        self._mode = Interceptor(self)
        for path, module in self._clone.named_modules():
            if has_native_path(module) and any(path.startswith(block.path) for block in self.anatomy.blocks):
                self._wrap_native(module)
            if isinstance(module, nn.Conv2d) and not any(path.startswith(block.path) for block in self.anatomy.blocks):
                self._wrap_stem(path, module)
        for index, block in enumerate(self.anatomy.blocks):
            self._wrap_block(self._clone.get_submodule(block.path), index)

    # --- passes ------------------------------------------------------------------------------------------------------

    def read(
        self,
        images: Float[Tensor, "image channel row column"],
        readers: Readers | None = None,
        edits: Sequence[Edit] = (),
    ) -> Float[Tensor, "image class"]:
        """One pass; logits are bitwise the model's own where nothing is edited. Gradients flow if enabled."""
        state = _Pass(images.shape[0], readers=readers or Readers(), edits=self._checked(edits, 1))
        return self._logits(self._run(images, state))

    @torch.no_grad()
    def record(
        self,
        images: Float[Tensor, "image channel row column"],
        readers: Readers | None = None,
        *,
        keep: bool = True,
    ) -> tuple[Replay, Float[Tensor, "image class"]]:
        """One plain pass whose blocks' inputs and outputs are kept, for `run_from`; without `keep` only its images."""
        replay = Replay(images)
        state = _Pass(images.shape[0], readers=readers or Readers(), record=replay if keep else None)
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
        """Runs blocks >= layer on the recorded tokens, with `copies` of every image stacked copy-major on the batch.

        Edits with `copy=c` act on one copy. With `until_residual` the pass ends when block `layer` has added attention
        to its residual: readers have been told, and the result is empty.
        """
        if not 0 <= layer < len(self.anatomy.blocks):
            raise UsageError(f"There is no L{layer}: this model has L0 to L{len(self.anatomy.blocks) - 1}.")
        whole = until_residual or (readers is not None and readers.output is not None)
        class_row = None if whole else self._class_row_layer(replay)
        wide = copies > 1 and self._needs_wide(replay)
        checked = self._checked(edits, copies)
        return self._from(layer, replay, checked, copies, readers or Readers(), wide, class_row, until_residual)

    def _from(
        self, layer: int, replay: Replay, edits: tuple[Edit, ...], copies: int, readers: Readers, wide: bool,
        class_row: int | None, until_residual: bool = False,
    ) -> Tensor:  # fmt: skip
        images = replay.images
        state = _Pass(
            images.shape[0] * copies, copies, readers, edits, start=layer, replay=replay, wide=wide,
            until=(layer, "residual") if until_residual else None, class_row=class_row,
        )  # fmt: skip
        if wide:
            images = images.repeat(copies, *[1] * (images.ndim - 1))
        output = self._run(images, state)
        if output is None:
            return images.new_zeros((0, 0))
        return self._logits(output)

    def _logits(self, output: Any) -> Tensor:
        return self._choose(output)

    def _run(self, images: Tensor, state: _Pass) -> Any:
        if self._pass is not None:
            raise TapError(
                "This model is already being tapped in this thread: a reader may not run the model it reads. "
                "Keep what you need and run after the pass, or open the model a second time."
            )
        if not same_tensors(self._original, self._clone):
            self._prepare()
        self._pass = state
        try:
            with torch._C._EnableTorchFunction(), self._mode:  # a reader of another model may be the caller
                output = self._clone(images)
        except Captured:
            if state.until is None:
                raise
            output = None
        finally:
            self._pass = None
            self._mode.forget()
        self._check_pass(state, complete=output is not None)
        return output

    def _check_pass(self, state: _Pass, *, complete: bool) -> None:
        missing = [index for index in range(len(self.anatomy.blocks)) if index not in state.visited]
        if complete and missing:
            raise TapError(f"Blocks {', '.join(f'L{index}' for index in missing)} did not run in this pass.")
        if state.until is not None and complete:
            raise TapError(f"L{state.until[0]} shows no sum of attention and residual; the pass could not stop there.")
        unused = [edit for index, edit in enumerate(state.edits) if index not in state.used]
        if unused:
            raise TapError(
                f"An edit touched nothing: L{unused[0].layer} call {unused[0].call} did not run in this pass "
                f"(it began at L{state.start})."
            )

    def _checked(self, edits: Sequence[Edit], copies: int) -> tuple[Edit, ...]:
        for edit in edits:
            if not 0 <= edit.layer < len(self.anatomy.blocks):
                raise UsageError(f"There is no L{edit.layer}: this model has L0 to L{len(self.anatomy.blocks) - 1}.")
            block = self.anatomy.blocks[edit.layer]
            if not 0 <= edit.call < len(block.calls):
                raise UsageError(
                    f"L{edit.layer} makes {len(block.calls)} attention calls; there is no call {edit.call}."
                )
            if edit.copy is not None and not 0 <= edit.copy < copies:
                raise UsageError(f"An edit names copy {edit.copy} of a run with {copies} copies.")
            _check_heads_and_kind(edit, block.calls[edit.call])
        return tuple(edits)

    # --- how the batch grows in a run from the middle ----------------------------------------------------------------

    def _needs_wide(self, replay: Replay) -> bool:
        """Whether copies must be stacked from the stem on. Tried once: stacking late (light) serves most models."""
        if self._wide is None:
            last = len(self.anatomy.blocks) - 1
            self._wide = not all(self._light_holds(layer, replay) for layer in {0, last // 2, last})
        return self._wide

    def _light_holds(self, layer: int, replay: Replay) -> bool:
        try:
            rows = self._from(layer, replay, (), 2, Readers(), False, None)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False  # a model that keeps the batch size of its input cannot take more rows midway
        return _close_copies(rows, replay.logits, 2)

    def _class_row_layer(self, replay: Replay) -> int | None:
        """The last block, if from its residual on the class token alone decides the logits. Tried once and compared."""
        last = len(self.anatomy.blocks) - 1
        block = self.anatomy.blocks[last]
        if self._class_row is None:
            self._class_row = False
            if self.anatomy.class_index(last) == 0 and block.kind == "token" and block.layout.token_axis is not None:
                self._class_row = self._class_row_holds(last, replay)
        return last if self._class_row else None

    def _class_row_holds(self, last: int, replay: Replay) -> bool:
        try:
            short = self._from(last, replay, (), 1, Readers(), False, last)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False  # the head reads more than the class token
        return _close_copies(short, replay.logits, 1)

    # --- blocks ------------------------------------------------------------------------------------------------------

    def _wrap_block(self, module: nn.Module, index: int) -> None:
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            state = self._pass
            if state is None:
                return inner(*args, **kwargs)
            return self._block(state, index, inner, args, kwargs)

        module.forward = forward

    def _wrap_stem(self, path: str, module: nn.Module) -> None:
        """Before the block that a run starts at, convolutions need not run: what they lead to comes from the record.

        Copies are kept and given, since models go on to add to them in place.
        """
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            state = self._pass
            if state is not None and state.replay is not None and not state.wide and state.start not in state.visited:
                run = state.stem_runs[path] = state.stem_runs.get(path, 0) + 1
                return state.replay.stem[path][run - 1].clone()
            output = inner(*args, **kwargs)
            if state is not None and state.record is not None:
                state.record.stem.setdefault(path, []).append(output.clone())
            return output

        module.forward = forward

    def _block(
        self, state: _Pass, index: int, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        spec = self.anatomy.blocks[index]
        state.visited.append(index)
        if state.replay is not None and index < state.start:
            output = state.replay.blocks[index].output
            return _tiled(output, spec.outputs, state) if state.wide else output
        if state.replay is not None and index == state.start:
            recorded = state.replay.blocks[index]
            args, kwargs = recorded.args, recorded.kwargs
        if state.copies > 1:
            args, kwargs = _tiled((args, kwargs), spec.inputs, state)
        output = self._entered(state, index, inner, args, kwargs)
        if state.record is not None:
            state.record.blocks.append(_Recorded(args, kwargs, output))
        if state.readers.output is not None:
            self._tell_output(state, spec, index, output)
        return output

    def _entered(
        self, state: _Pass, index: int, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        outside = (state.layer, state.calls, state.residual_seen, state.inputs)
        leaves = tree_flatten((args, kwargs))[0]
        state.layer, state.calls, state.residual_seen = index, 0, False
        state.inputs = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim >= 3)
        try:
            output = inner(*args, **kwargs)
            self._mode.forget()
            expected = len(self.anatomy.blocks[index].calls)
            if state.calls != expected and self._watches(state, index):
                raise TapError(
                    f"L{index} ({self.anatomy.blocks[index].path}) made {state.calls} attention calls; "
                    f"{expected} were found when the model was opened."
                )
        finally:
            state.layer, state.calls, state.residual_seen, state.inputs = outside
        return output

    def _watches(self, state: _Pass, index: int) -> bool:
        """Whether attention calls of this block must have been seen (a native kernel hides them where nobody looks)."""
        return state.readers.attention is not None or any(edit.layer == index for edit in state.edits)

    def _tell_output(self, state: _Pass, spec: Block, index: int, output: Any) -> None:
        leaves = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor) and leaf.ndim >= 3]
        if not leaves or state.readers.output is None:
            return
        with torch._C.DisableTorchFunction():
            main = max(leaves, key=lambda leaf: leaf.numel())
            state.readers.output(index, spec.layout.canonical(main) if main.ndim == len(spec.layout.order) else main)

    def _wrap_native(self, module: nn.Module) -> None:
        """A native kernel answers, as it does untapped; a shadow run that stops at attention serves the reader."""
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            state = self._pass
            if state is None or state.shadow or state.native or not self._keeps_native(state, module, args):
                return inner(*args, **kwargs)
            state.native = True
            try:
                with torch._C.DisableTorchFunction():
                    output = inner(*args, **kwargs)
            finally:
                state.native = False
            if state.readers.attention is not None or state.probe is not None:
                state.shadow = True
                try:
                    with self._mode:
                        inner(*args, **kwargs)
                except Captured:
                    pass  # the shadow run has told the reader, which is all it was for
                finally:
                    state.shadow = False
            elif isinstance(module, nn.MultiheadAttention):
                state.calls += 1  # the sum that follows it in the block is the residual, though nobody reads attention
            return output

        module.forward = forward

    def _keeps_native(self, state: _Pass, module: nn.Module, args: tuple[Any, ...]) -> bool:
        edited = any(edit.layer == state.layer for edit in state.edits)
        tensors = (*module.parameters(), *(item for item in args if isinstance(item, Tensor)))
        needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        return native_path_enabled() and not edited and not needs_gradient and not module.training

    # --- what the interceptor reports --------------------------------------------------------------------------------

    def attention(self, raw: RawCall) -> Tensor:
        """At an attention call: apply the edits, tell the reader, give the output."""
        state = self._pass
        if state is None or state.layer is None:
            return raw.run(None, None)
        if state.probe is not None:
            state.probe(raw, state.calls)
        block = self.anatomy.blocks[state.layer]
        if state.calls >= len(block.calls):
            raise TapError(
                f"L{state.layer} ({block.path}) made more attention calls than the {len(block.calls)} found when the "
                "model was opened."
            )
        spec, edits = block.calls[state.calls], state.edits_here()
        out, final, bias = (None, None, None) if state.shadow else self._edited(state, raw, spec, edits)
        if state.readers.attention is not None:
            with torch._C.DisableTorchFunction(), _said_by_the_reader():
                layer, call = state.layer, state.calls
                state.readers.attention(
                    LayerAttention(
                        layer,
                        call,
                        spec,
                        block,
                        raw,
                        state.rows,
                        out,
                        final,
                        bias,
                        lambda: self.window_slots(layer, call),
                    )
                )
        state.calls += 1
        if state.shadow:
            raise Captured
        assert out is not None
        return out

    def _edited(
        self, state: _Pass, raw: RawCall, spec: Call, edits: tuple[Edit, ...]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(output, the map [image window head query key] if a region changed it, the bias as the model lays it out)"""
        only_first = self._only_first_query(state, raw, edits)
        if not edits:
            return only_first() if only_first else raw.run(None, None), None, None
        state.used.update(index for index, edit in enumerate(state.edits) if edit in edits)
        if not raw.fused and not raw.scores_changed and any(edit.touches_scores for edit in edits):
            raise TapError(f"A bias on L{state.layer} did not reach its softmax, so the numbers are withheld.")
        final: list[Tensor] = []
        bias = self._bias_of(state, raw, spec, edits) if raw.fused else None

        def region(weights: Tensor) -> Tensor:
            canonical = spec.layout.canonical(weights, state.rows)
            changed = torch.stack(
                [apply_regions(canonical[:, window], edits, state.copies) for window in range(canonical.shape[1])], 1
            )
            final.append(changed)
            return spec.layout.original(changed, weights)

        has_region = any(edit.region is not None for edit in edits)
        out = only_first() if only_first else raw.run(bias, region if has_region else None)
        if any(edit.prune or edit.gate is not None or edit.drop_queries for edit in edits):
            canonical = apply_to_output(spec.layout.canonical(out, state.rows), edits, state.copies)
            out = spec.layout.original(canonical, out)
        return out, final[0] if final else None, bias

    def _only_first_query(self, state: _Pass, raw: RawCall, edits: tuple[Edit, ...]) -> Callable[[], Tensor] | None:
        """Where the class token alone goes on and nobody looks, the other queries need not be answered."""
        if state.class_row != state.layer or state.readers.attention is not None or state.readers.residual is not None:
            return None
        plain = not any(edit.touches_scores or edit.region is not None for edit in edits)
        return raw.first_query if plain else None

    def _bias_of(self, state: _Pass, raw: RawCall, spec: Call, edits: tuple[Edit, ...]) -> Tensor | None:
        if not any(edit.touches_scores for edit in edits):
            return None
        shape = (state.rows, spec.heads, spec.queries, spec.keys)
        bias = score_bias(edits, state.rows // state.copies, state.copies, raw.v.new_zeros(()).expand(shape))
        assert bias is not None
        return spec.layout.original(bias.unsqueeze(1), raw.v if raw.q is None else raw.q)

    def score_bias(self, scores: Tensor) -> Tensor | None:
        """What an edit adds to scores on their way to a hand-written softmax."""
        state = self._pass
        if state is None or state.layer is None:
            return None
        block = self.anatomy.blocks[state.layer]
        edits = tuple(edit for edit in state.edits_here() if edit.touches_scores)
        if not edits or state.calls >= len(block.calls):
            return None
        spec = block.calls[state.calls]
        shape = (state.rows, spec.heads, spec.queries, spec.keys)
        bias = score_bias(edits, state.rows // state.copies, state.copies, scores.new_zeros(()).expand(shape))
        return None if bias is None else spec.layout.original(bias.unsqueeze(1), scores)

    def addition(self, left: Any, right: Any, result: Tensor) -> Tensor:
        """At a sum: the first after attention that takes the block's own input is attention + residual."""
        state = self._pass
        if state is None or state.layer is None or state.residual_seen or state.calls == 0 or state.shadow:
            return result
        if not any(left is token or right is token for token in state.inputs):
            return result
        state.residual_seen = True
        block = self.anatomy.blocks[state.layer]
        if state.readers.residual is not None and result.ndim == len(block.layout.order):
            with torch._C.DisableTorchFunction(), _said_by_the_reader():
                state.readers.residual(state.layer, block.layout.canonical(result))
        if state.until == (state.layer, "residual"):
            raise Captured
        if state.class_row == state.layer and block.layout.token_axis is not None:
            return result.narrow(block.layout.token_axis, 0, 1)
        return result

    # --- windows -----------------------------------------------------------------------------------------------------

    def window_slots(self, layer: int, call: int = 0) -> Int[Tensor, "window slot"]:
        """Which token sits in each slot of each window of a layer (-1: padding), measured by moving tokens.

        In run b the tokens whose number (from 1) has bit b are moved; the bits that change v at a slot spell its token.
        Raises `Unsupported` unless every token is found exactly once.
        """
        if (layer, call) not in self._slots:
            prober = Tap(self._original, self.anatomy, self._choose)
            self._slots[layer, call] = prober._measured_slots(layer, call)
        return self._slots[layer, call]

    @torch.no_grad()
    def _measured_slots(self, layer: int, call: int) -> Tensor:
        block = self.anatomy.blocks[layer]
        weight = next(self._clone.parameters())
        size = self.anatomy.image_shape
        generator = torch.Generator().manual_seed(0)
        image = torch.randn((1, *size), generator=generator).to(weight)
        replay, _ = self.record(image)
        bits = block.tokens.bit_length()
        args, kwargs = replay.blocks[layer].args, replay.blocks[layer].kwargs
        state = _Pass(1 + bits, 1 + bits, probe=None)
        leaves, tree = tree_flatten(_tiled((args, kwargs), block.inputs, state))
        leaves[block.main_input] = _moved_by_bits(leaves[block.main_input], block, bits)
        values = self._probe(layer, call, tree_unflatten(leaves, tree), 1 + bits)
        v = block.calls[call].layout.canonical(values, 1 + bits)
        changed = (v[1:] - v[:1]).abs().amax(dim=(2, 4)) > 0
        code = sum(changed[bit].long() << bit for bit in range(bits))
        slots = torch.as_tensor(code) - 1
        found = slots[slots >= 0].sort().values
        if not torch.equal(found, torch.arange(block.tokens, device=found.device)):
            raise Unsupported(
                f"L{layer} ({block.path}) attends within windows, but its {block.tokens} tokens are not each in "
                "exactly one window slot (convolution or pooling inside the block): no maps on the grid."
            )
        return slots

    def _probe(self, layer: int, call: int, inputs: Any, rows: int) -> Tensor:
        """v of one attention call of one block, run alone on given inputs."""
        found: list[Tensor] = []

        def probe(raw: RawCall, index: int) -> None:
            if index == call:
                found.append(raw.v)
                raise Captured

        self._pass = _Pass(rows, probe=probe)
        args, kwargs = inputs
        try:
            with torch._C._EnableTorchFunction(), self._mode:  # a reader of another model may be the caller
                self._clone.get_submodule(self.anatomy.blocks[layer].path)(*args, **kwargs)
        except Captured:
            pass  # that is where the probe stops the block
        finally:
            self._pass = None
            self._mode.forget()
        return found[0]


@contextmanager
def _said_by_the_reader() -> Iterator[None]:
    """Python takes a `TypeError` inside `a + b` or `a @ b` for operands that do not fit, and hides what it said."""
    try:
        yield
    except TypeError as error:
        raise TapError(f"A reader failed: {error}") from error


def _check_heads_and_kind(edit: Edit, call: Call) -> None:
    wrong = [head for head in edit.prune if not 0 <= head < call.heads]
    if wrong:
        raise UsageError(f"L{edit.layer} has heads H0 to H{call.heads - 1}; an edit names H{wrong[0]}.")
    if edit.touches_scores and not call.row_stochastic:
        raise Unsupported(
            f"L{edit.layer} mixes its heads' maps after softmax, so a bias or a dropped key does not mean what it "
            "says. Pruning and regions work."
        )
    if (edit.region is not None or edit.touches_scores) and call.kind in ("channel", "unknown"):
        raise Unsupported(f"L{edit.layer} has no token map (kind {call.kind!r}); its heads can be pruned, no more.")
    if edit.touches_scores and call.windows > 1:
        raise Unsupported(f"L{edit.layer} attends within windows; biases and dropped keys are not offered there.")


def _tiled(tree: Any, spec: tuple[tuple[int, int] | None, ...], state: _Pass) -> Any:
    """The leaves that still have one row per image, repeated copy-major to one row per image and copy."""
    leaves, form = tree_flatten(tree)
    images = state.rows // state.copies
    for index, entry in enumerate(spec):
        if entry is None or not isinstance(leaves[index], Tensor):
            continue
        axis, ratio = entry
        if leaves[index].shape[axis] == images * ratio:
            repeats = [state.copies if dim == axis else 1 for dim in range(leaves[index].ndim)]
            leaves[index] = leaves[index].repeat(repeats)
    return tree_unflatten(leaves, form)


def _moved_by_bits(leaf: Tensor, block: Block, bits: int) -> Tensor:
    tokens = block.layout.canonical(leaf).clone()
    generator = torch.Generator().manual_seed(1)
    push = torch.randn(tokens.shape[-1], generator=generator).to(tokens)
    number = torch.arange(1, block.tokens + 1, device=tokens.device)
    for bit in range(bits):
        tokens[1 + bit, (number >> bit & 1).bool()] += push
    return block.layout.original(tokens, leaf)


def _close_copies(rows: Tensor, logits: Tensor | None, copies: int) -> bool:
    """Every copy gives the plain logits, up to what another batch size may change (1e-5 of the largest, float32)."""
    assert logits is not None
    if rows.shape != (copies * logits.shape[0], *logits.shape[1:]):
        return False
    bound = 1e-5 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    difference = (rows.unflatten(0, (copies, -1)).float() - logits.float()).abs().max()
    return bool(difference <= bound * logits.float().abs().max())
