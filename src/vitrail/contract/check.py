"""Does the tap keep its promises on this model? Each promise is tried on the model itself and answered with a figure.

`check_vit(vit).text()` is what `vitrail check MODEL` prints; the contract suite holds every family to the same report.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.contract.surgery import NoProjection, Projection, projection_inputs, projections, run_without_head
from vitrail.data.files import some
from vitrail.errors import ModelError, TapError, Unsupported
from vitrail.markup import html_table
from vitrail.models.open import Vit, require_vit
from vitrail.tap.anatomy import MAPLESS_KINDS, Anatomy, Block, Kind, layer_ranges
from vitrail.tap.anatomy_table import ANATOMY_COLUMNS, anatomy_notes, anatomy_rows
from vitrail.tap.attention import LayerAttention, Readers
from vitrail.tap.clone import CANNOT_RUN, first_weight, has_compiled_parts
from vitrail.tap.edits import Edit
from vitrail.tap.modes import plain_modes
from vitrail.tap.rounding import rounding_bound

__all__ = ["PROMISES", "Finding", "Report", "check_vit", "differences", "footprint"]

T = TypeVar("T")

_N_IMAGES, _N_LARGE_IMAGES, _SMALL_PX = 4, 2, 128
"""Images that are tried, and how many above this many pixels a side: several, so that mixed-up images would show."""

_MAX_COPIES = 4
"""Heads that are pruned on one batch when batching is tried: more would only take longer."""

_BATCH_FACTOR = 4
"""A pruned head may move with the size of the batch by this much more than the whole model: sums are fewer, and their
errors stand out. Only where the whole model moves by more than rounding."""

_TINY = 1e-30
"""Keeps a difference relative to nothing from being a division by zero."""

PROMISES = (
    "logits unchanged",
    "rows sum to 1",
    "weights @ v",
    "prune = surgery",
    "edits act",
    "run from the middle",
    "heads batched",
    "maps on the grid",
    "nothing left behind",
)
"""The promises of a report, in its order."""

MARKS = {True: "ok", False: "BROKEN", None: "-"}


@dataclass(frozen=True)
class Finding:
    """One promise tried on one model.

    Attributes:
        name: One of `PROMISES`.
        holds: Whether it holds; None where the question does not arise or cannot be answered.
        figure: The largest difference, relative to the largest value compared (0: bitwise equal), or None.
        sentence: What was found, or why there is no answer.
        word: The reason in a word or two, where `holds` is None.
    """

    name: str
    holds: bool | None
    figure: float | None
    sentence: str
    word: str = ""


@dataclass(frozen=True)
class Report:
    """Every promise tried on one model.

    Attributes:
        model: Name of the model.
        anatomy: Its anatomy as a table.
        findings: One for each promise.
        preprocessing: How images are prepared, and where that comes from.
        weights: Where the weights come from, and which were taken of a file that holds several.
    """

    model: str
    anatomy: str
    findings: tuple[Finding, ...]
    preprocessing: str
    weights: str

    @property
    def ok(self) -> bool:
        """Whether no promise is broken. What is refused with a reason is not broken."""
        return all(finding.holds is not False for finding in self.findings)

    @property
    def verdict(self) -> str:
        """Whether all promises hold, in words."""
        return "All promises hold." if self.ok else "A promise is broken; please report this model."

    def finding(self, name: str) -> Finding:
        """Looks a finding up.

        Args:
            name: One of `PROMISES`.

        Returns:
            The finding of that promise.
        """
        return next(finding for finding in self.findings if finding.name == name)

    def text(self) -> str:
        """Formats the report as lines to print.

        Returns:
            One line a promise.
        """
        width = max(map(len, PROMISES))
        lines = [f"{MARKS[item.holds]:<6}  {item.name:<{width}}  {item.sentence}" for item in self.findings]
        return "\n".join(
            [
                self.model,
                "",
                self.anatomy,
                f"weights: {self.weights}",
                f"preprocessing: {self.preprocessing}",
                "",
                *lines,
                "",
                self.verdict,
            ]
        )

    def _repr_html_(self) -> str:
        """The promises as a table, for notebooks."""
        rows = [(MARKS[item.holds], item.name, item.sentence) for item in self.findings]
        return html_table(f"{self.model}: what can be trusted", rows, ("", "promise", ""), self.verdict)


@plain_modes()
@torch.no_grad()
def check_vit(
    vit: Vit, images: Float[Tensor, "image channel row column"] | None = None, *, quick: bool = False
) -> Report:
    """Tries every promise of the tap on a model.

    Models that draw at random (ViT-MAE) are given the same draw in each pass.

    Args:
        vit: The opened model.
        images: Prepared images [image, channel, row, column]; by default 4 of noise (2 above 128 pixels).
        quick: Passes that are made per layer are made for the first, middle and last layer only.

    Returns:
        A finding for each promise; `report.ok` says whether all hold.

    Raises:
        ModelError: The model answers with NaN or infinite numbers, with which nothing can be compared.

    Example:
        >>> print(check_vit(vit).text())
    """
    require_vit(vit)
    images = _noise(vit) if images is None else images
    trial = _Trial(vit, images, quick)
    _require_finite(trial)
    own = trial.users_own_logits()
    before = footprint(vit.model)
    findings = [
        _logits_unchanged(trial, own),
        *_maps(trial),
        *_pruning(trial),
        _or_failure("run from the middle", _from_the_middle, trial),
        _or_failure("heads batched", _heads_batched, trial),
        _on_grid(trial),
        _nothing_left(trial, before),
    ]
    return Report(vit.name, describe(vit.anatomy), tuple(findings), vit.preprocessing_source, vit.weights_source)


def _require_finite(trial: "_Trial") -> None:
    if trial.plain.isfinite().all():
        return
    bad = [name for name, weight in trial.vit.model.state_dict().items() if not weight.isfinite().all()]
    cause = f"These weights hold such numbers: {some(bad)}" if bad else "The weights are finite; try float32"
    raise ModelError(
        f"{trial.vit.name} answers with NaN or infinite numbers, so nothing of it can be checked. {cause}."
    )


def _noise(vit: Vit) -> Tensor:
    size = vit.image_size
    generator = torch.Generator().manual_seed(1)
    weight = first_weight(vit.model)
    n_images = _N_IMAGES if max(size) <= _SMALL_PX else _N_LARGE_IMAGES
    return torch.randn((n_images, vit.n_channels, *size), generator=generator).to(weight)


@dataclass
class _Trial:
    """The model under trial and what its plain pass gives."""

    vit: Vit
    images: Tensor
    quick: bool
    plain: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.plain = self.run_seeded(self.vit.logits, self.images)

    @property
    def bound(self) -> float:
        return rounding_bound(self.plain.dtype)

    @property
    def layers(self) -> list[int]:
        last = self.vit.n_layers - 1
        return sorted({0, last // 2, last}) if self.quick else list(range(last + 1))

    def run_seeded(self, run: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """The result of a pass whose random draws are always the same."""
        device = self.images.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            return run(*args, **kwargs)

    def read(self, readers: Readers | None = None, edits: Sequence[Edit] = ()) -> Tensor:
        return self.run_seeded(self.vit.tap().read, self.images, readers, edits)

    def batch_difference(self, copies: int) -> float:
        """How far the untouched model's answers move when images are repeated on the batch: kernels sum otherwise."""
        together = self.run_seeded(self.vit.logits, self.images.repeat(copies, 1, 1, 1))
        return max(_relative(part, self.plain) for part in together.split(len(self.images)))

    def users_own_logits(self) -> Tensor | None:
        """What the user's own module gives, where it is in evaluation mode."""
        model = self.vit.model
        if any(module.training for module in model.modules()):
            return None
        return self.vit.read_output(self.run_seeded(model, self.images))


def _relative(one: Tensor, other: Tensor) -> float:
    """max |one - other| / max |other|; infinite where something is not finite or shapes differ."""
    if one.shape != other.shape or not (one.isfinite().all() and other.isfinite().all()):
        return float("inf")
    difference = (one.double() - other.double()).abs().amax() if one.numel() else one.new_zeros(())
    return float(difference / other.double().abs().amax().clamp_min(_TINY)) if one.numel() else 0.0


# --- logits and maps -------------------------------------------------------------------------------------------------


def _logits_unchanged(trial: _Trial, own: Tensor | None) -> Finding:
    read = trial.read(Readers(attention=lambda attention: None))
    recorded = trial.run_seeded(trial.vit.tap().record, trial.images)[1]
    compiled = own is not None and has_compiled_parts(trial.vit.model)
    exact = [read, recorded] if own is None or compiled else [read, recorded, own]
    worst = max(_relative(other, trial.plain) for other in exact)
    same = all(torch.equal(other, trial.plain) for other in exact)
    against = "an untapped copy" if own is None or compiled else "an untapped copy and your own module"
    sentence = (
        f"read and recorded passes are bitwise those of {against}"
        if same
        else f"logits differ from {against} by {worst:.0e} of the largest"
    )
    if own is not None and compiled:  # the compiler may order sums otherwise, so that bits differ
        to_compiled = _relative(own, trial.plain)
        same = same and to_compiled <= trial.bound
        sentence += f"; your compiled module gives them to {to_compiled:.0e}"
    return Finding("logits unchanged", same, worst, sentence)


@dataclass
class _Maps:
    """A reader that compares maps with what the model makes of them."""

    rows: float = 0.0
    product: float = 0.0
    n_maps: int = 0
    mapless: dict[Kind, list[int]] = field(default_factory=dict)
    mixing: list[int] = field(default_factory=list)
    waiting: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def attention(self, attention: LayerAttention) -> None:
        if attention.kind in MAPLESS_KINDS:
            self.mapless.setdefault(attention.kind, []).append(attention.layer)
            return
        weights = attention.window_weights()
        self.n_maps += 1
        if attention.row_stochastic:
            sums = weights.float().sum(-1)
            self.rows = max(self.rows, _relative(sums, torch.ones_like(sums)))
        else:
            self.mixing.append(attention.layer)
        product = weights.to(attention.v.dtype) @ attention.v
        if attention.out is None:
            self.waiting[attention.layer, attention.call] = product
        else:
            self.product = max(self.product, _relative(product, attention.out))

    def native_outputs(self, attention: LayerAttention) -> None:
        product = self.waiting.pop((attention.layer, attention.call), None)
        if product is not None and attention.out is not None:
            self.product = max(self.product, _relative(product, attention.out))


def _maps(trial: _Trial) -> list[Finding]:
    maps = _Maps()
    trial.read(Readers(attention=maps.attention))
    native = len(maps.waiting)
    if native:
        layers = sorted({layer for layer, _ in maps.waiting})
        trial.read(Readers(attention=maps.native_outputs), [_no_change(trial, layer) for layer in layers])
    if not maps.n_maps:
        return [Finding(name, None, None, *_no_maps(maps)) for name in ("rows sum to 1", "weights @ v")]
    except_for = "".join(
        f"; {layer_ranges(layers)} {_MAPLESS_WORDS[kind]} and have no map" for kind, layers in maps.mapless.items()
    )
    mixing = f"; {layer_ranges(maps.mixing)} mix heads after softmax, where rows need not" if maps.mixing else ""
    kernels = f" ({native} answered by a native kernel, compared with its written form)" if native else ""
    rows = f"{maps.n_maps} maps, off by at most {maps.rows:.0e}{mixing}{except_for}"
    product = f"the model's own attention output to {maps.product:.0e}{kernels}{except_for}"
    return [
        Finding("rows sum to 1", maps.rows <= trial.bound, maps.rows, rows),
        Finding("weights @ v", maps.product <= trial.bound and not maps.waiting, maps.product, product),
    ]


_MAPLESS_WORDS: dict[Kind, str] = {
    "channel": "attend between channels",
    "unknown": "attend in a way that is not understood",
}


def _no_maps(maps: _Maps) -> tuple[str, str]:
    """Why a model has no map at all, in a sentence and in a word."""
    if set(maps.mapless) == {"channel"}:
        return "attention is between channels, not tokens, so there are no maps", "channels"
    if not maps.mapless:
        return "attention is computed where it cannot be observed, so there are no maps", "hidden"
    layers = [f"{layer_ranges(each)} {_MAPLESS_WORDS[kind]}" for kind, each in maps.mapless.items()]
    return f"{'; '.join(layers)}, so there are no maps", "unknown"


def _no_change(trial: _Trial, layer: int) -> Edit:
    """Makes a native kernel's block run in its written form, in which the output of attention can be read."""
    heads = trial.vit.anatomy.blocks[layer].heads
    return Edit(layer, gate=torch.ones((len(trial.images), heads), device=trial.images.device))


# --- edits -----------------------------------------------------------------------------------------------------------


def _pruning(trial: _Trial) -> list[Finding]:
    """Prunes one head of each attention module, at the tap and at the input of the output projection of a copy."""
    blocks = trial.vit.anatomy.blocks
    tap = trial.vit.tap()
    past = tap.blocks_keep_state(trial.run_seeded(tap.record, trial.images)[0])
    by_call = projections(trial.vit.model, trial.vit.anatomy, trial.images)
    differences, refused, effects = [], dict[str, list[int]](), _Effects()
    for layer in trial.layers:
        for number, calls in enumerate(blocks[layer].attentions):
            spec = blocks[layer].calls[calls[0]]
            head = (layer + number) % spec.heads
            edit = Edit(layer, prune=(spec.first_head + head,))
            of_calls = [by_call[layer, call] for call in calls]
            reason = next((each.reason for each in of_calls if isinstance(each, NoProjection)), None)
            if past:
                reason = "blocks keep something on the model for later ones, which goes past their projections"
            if reason is not None:
                refused.setdefault(reason, []).append(layer)
                effects.add_output(trial, edit)
                continue
            known = [each for each in of_calls if isinstance(each, Projection)]
            pruned = effects.add_projection(trial, edit, known[0], head)
            reference = trial.run_seeded(run_without_head, trial.vit.model, known, head, trial.images)
            differences.append(_relative(pruned, trial.vit.read_output(reference)))
    return [_surgery_finding(differences, refused, trial.bound), effects.finding()]


def _surgery_finding(differences: list[float], refused: dict[str, list[int]], bound: float) -> Finding:
    reasons = "; ".join(f"{layer_ranges(layers)}: {reason}" for reason, layers in refused.items())
    if not differences:
        return Finding("prune = surgery", None, None, reasons, "no projection")
    worst = max(differences)
    sentence = f"pruned logits are those of a copy with the head's input to the projection zeroed, to {worst:.0e}"
    return Finding("prune = surgery", worst <= bound, worst, f"{sentence}; {reasons}" if reasons else sentence)


@dataclass
class _Effects:
    """Whether pruned heads are gone, told by what the model itself computes next, not by the size of the logits' move:
    a small LayerScale or a classifier of zeros lets a good edit move them little or not at all."""

    acting: list[int] = field(default_factory=list)
    without_effect: list[int] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    least: float = float("inf")

    def add_projection(self, trial: _Trial, edit: Edit, projection: Projection, head: int) -> Tensor:
        """Looks at the projection's input: the head's channels are zero, the others are not touched. Gives logits."""
        with projection_inputs(trial.vit.model, projection) as edited:
            pruned = trial.read(edits=[edit])
        with projection_inputs(trial.vit.model, projection) as plain:
            trial.read(edits=[_no_change(trial, edit.layer)])
        channels = projection.channels[head]
        correct = len(edited) == len(plain) == 1 and not bool(edited[0][channels].any())
        correct = correct and _relative(edited[0][~channels], plain[0][~channels]) <= trial.bound
        self._add(trial, edit, pruned, None if not bool(plain[0].any()) else correct)
        return pruned

    def add_output(self, trial: _Trial, edit: Edit) -> None:
        """Without a projection, looks at what the block returns."""
        edited, plain = list[Tensor](), list[Tensor]()
        outputs = (edited, edit), (plain, _no_change(trial, edit.layer))
        logits = [trial.read(_output_reader(edit.layer, tokens), [each]) for tokens, each in outputs]
        moved = len(edited) == len(plain) == 1 and not torch.equal(edited[0], plain[0])
        self._add(trial, edit, logits[0], True if moved else None)

    def _add(self, trial: _Trial, edit: Edit, logits: Tensor, acts: bool | None) -> None:
        layers = {True: self.acting, False: self.broken, None: self.without_effect}[acts]
        layers.append(edit.layer)
        self.least = min(self.least, _relative(logits, trial.plain))

    def finding(self) -> Finding:
        """Whether edits act, over all layers that were tried."""
        if self.broken:
            return Finding("edits act", False, None, f"{layer_ranges(self.broken)}: a pruned head is not gone")
        nothing = f"{layer_ranges(self.without_effect)}: heads give nothing that reaches the block's output"
        if not self.acting:
            return Finding("edits act", None, None, nothing, "no effect")
        sentence = (
            f"a pruned head is gone in {layer_ranges(self.acting)} and moves the logits by {self.least:.0e} or more"
        )
        return Finding("edits act", True, None, f"{sentence}; {nothing}" if self.without_effect else sentence)


def _output_reader(layer: int, tokens: list[Tensor]) -> Readers:
    return Readers(output=lambda index, output: tokens.append(output) if index == layer else None)


def _or_failure(name: str, promise: Callable[[_Trial], Finding], trial: _Trial) -> Finding:
    """A promise of runs that start at a block, which a model may not take: that is what is found then."""
    try:
        return promise(trial)
    except torch.OutOfMemoryError:
        raise  # says nothing of the model
    except (TapError, *CANNOT_RUN) as error:
        return Finding(name, False, None, f"runs that start at a block fail: {error}")


def _from_the_middle(trial: _Trial) -> Finding:
    tap = trial.vit.tap()
    replay, _ = trial.run_seeded(tap.record, trial.images)
    every_token = Readers(output=lambda layer, tokens: None)  # every token is carried to the end, as in a plain pass
    runs = {layer: trial.run_seeded(tap.run_from, layer, replay, readers=every_token) for layer in trial.layers}
    unequal = [layer for layer, logits in runs.items() if not torch.equal(logits, trial.plain)]
    worst = max(_relative(logits, trial.plain) for logits in runs.values())
    sentence = (
        f"{layer_ranges(unequal)} differ from the plain pass by {worst:.0e}"
        if unequal
        else f"bitwise the plain pass from each of {len(runs)} layers tried"
    )
    return Finding("run from the middle", not unequal, worst, sentence)


def _heads_batched(trial: _Trial) -> Finding:
    tap, worst, bound, copies = trial.vit.tap(), 0.0, trial.bound, 1
    replay, _ = trial.run_seeded(tap.record, trial.images)
    for layer in (layer for layer in trial.layers if trial.vit.anatomy.blocks[layer].calls):
        n_heads = trial.vit.anatomy.blocks[layer].heads
        copies = min(_MAX_COPIES, n_heads)
        heads = [copy * n_heads // copies for copy in range(copies)]  # of all its attention calls
        edits = [Edit(layer, copy=copy, prune=(head,)) for copy, head in enumerate(heads)]
        batched = trial.run_seeded(tap.run_from, layer, replay, edits, copies)
        single = torch.cat([trial.read(edits=[Edit(layer, prune=(head,))]) for head in heads])
        worst = max(worst, _relative(batched, single))
    sentence = f"up to {_MAX_COPIES} heads pruned on one batch differ from one at a time by {worst:.0e}"
    if worst > trial.bound:
        own = trial.batch_difference(copies)
        if own > trial.bound:
            bound = _BATCH_FACTOR * own
            sentence += f"; your model's own answers differ by {own:.0e} on a batch {copies} times as large"
    return Finding("heads batched", worst <= bound, worst, sentence)


# --- maps on the image grid ------------------------------------------------------------------------------------------

_OFF_GRID = {
    "channels": "attention is between channels",
    "class": "the class token is the only query",
    "pooled": "queries and keys are other sets of tokens",
    "unknown": "this attention is not understood",
    "hidden": "attention is computed where it cannot be observed",
    "windows": "which tokens are in a window could not be found",
    "no grid": "tokens lie on no grid",
    "changed": "attention is between another number of tokens than the layer is given",
}


def _on_grid(trial: _Trial) -> Finding:
    """Which layers have maps that join patches of the image, and why the others, or some of their heads, have not."""
    off: dict[str, list[int]] = {}
    partly: dict[str, list[int]] = {}
    for layer, block in enumerate(trial.vit.anatomy.blocks):
        reasons = {calls[0]: _off_grid(trial, layer, block, calls[0]) for calls in block.attentions}
        missing = {number: reason for number, reason in reasons.items() if reason}
        if len(missing) == len(reasons):
            off.setdefault(next(iter(missing.values()), "hidden"), []).append(layer)
        else:
            for number, reason in missing.items():
                heads = block.calls[number].layer_heads
                partly.setdefault(f"H{heads.start}-H{heads.stop - 1}: {_OFF_GRID[reason]}", []).append(layer)
    n_layers, n_off = trial.vit.n_layers, sum(map(len, off.values()))
    whys = "; ".join([f"{layer_ranges(layers)}: {_OFF_GRID[reason]}" for reason, layers in off.items()])
    but = "".join(f"; not those of {layer_ranges(layers)} {heads}" for heads, layers in partly.items())
    if "no grid" in off:
        whys = "; ".join([whys, *(note.rstrip(".") for note in trial.vit.anatomy.notes)])
    if not off:
        return Finding("maps on the grid", True, None, f"all {n_layers} layers have maps that join patches{but}")
    if n_off == n_layers:
        return Finding("maps on the grid", None, None, f"no layer has such maps. {whys}", ", ".join(off))
    return Finding(
        "maps on the grid",
        None,
        None,
        f"all but {n_off} of {n_layers} layers have such maps. {whys}{but}",
        "not all" if "no grid" in off else f"not {', '.join(off)}",
    )


def _off_grid(trial: _Trial, layer: int, block: Block, number: int) -> str | None:
    """Why the maps of an attention call join no patches of the image; None where they do."""
    call = block.calls[number]
    if call.kind not in ("token", "window"):
        return "channels" if call.kind == "channel" else call.kind
    if block.grid is None:
        return "no grid"
    if call.windows > 1:
        try:
            trial.vit.tap().window_slots(layer, number)
        except Unsupported:
            return "windows"  # the answer to the question asked, which the sentence gives
    elif call.queries != block.tokens:
        return "changed"
    return None


# --- what is left behind ---------------------------------------------------------------------------------------------


class _ReaderFailed(Exception):
    """Raised by the failing reader."""


def _nothing_left(trial: _Trial, before: dict[str, object]) -> Finding:
    modes = torch._C._len_torch_function_stack()
    reached_caller = False
    try:
        trial.read(Readers(attention=_failing))
    except _ReaderFailed:
        reached_caller = True
    left = differences(before, footprint(trial.vit.model))
    if not reached_caller:
        left.append("a reader's exception did not reach the caller")
    if torch._C._len_torch_function_stack() != modes:
        left.append("a torch function mode")
    if not torch.equal(trial.read(), trial.plain):
        left.append("other logits after a reader's exception")
    sentence = "; ".join(left) or "modules, weights and modes are as before, also after a reader's exception"
    return Finding("nothing left behind", not left, None, sentence)


def _failing(attention: LayerAttention) -> None:
    raise _ReaderFailed


def footprint(model: nn.Module) -> dict[str, object]:
    """Lists everything a tap could leave on a model: attributes, hooks, training flags, tensors and their versions.

    Args:
        model: Any module.

    Returns:
        Marks by what they mark, for `differences`.
    """
    marks: dict[str, object] = {}
    for path, module in model.named_modules():
        state = vars(module)
        marks[f"attributes of {path or 'the model'}"] = tuple(sorted(state))
        marks[f"training of {path or 'the model'}"] = module.training
        marks[f"hooks of {path or 'the model'}"] = tuple(
            (name, len(value)) for name, value in sorted(state.items()) if name.endswith("_hooks") and value is not None
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        marks[f"tensor {name}"] = (id(tensor), tensor._version, tensor.requires_grad, tensor.grad is None)
    return marks


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Lists what changed between two footprints, in words.

    Args:
        before: An earlier `footprint`.
        after: A later one.

    Returns:
        One sentence for each entry that differs; empty where the footprints agree.
    """
    return [f"{name} changed" for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


# --- anatomy ---------------------------------------------------------------------------------------------------------


def describe(anatomy: Anatomy) -> str:
    """Formats an anatomy as a table, one line per run of equal blocks.

    Args:
        anatomy: Of any model.
    """
    rows = [ANATOMY_COLUMNS, *anatomy_rows(anatomy)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *anatomy_notes(anatomy)])
