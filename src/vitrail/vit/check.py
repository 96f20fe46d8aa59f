"""Does the tap keep its promises on this model? Each promise is tried on the model itself and answered with a figure.

`check_vit(vit).text()` is what `vitrail check MODEL` prints; the contract suite holds every family to the same report.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import Unsupported
from vitrail.vit.anatomy import Anatomy, Block
from vitrail.vit.attention import LayerAttention, Readers
from vitrail.vit.choose import feature_or_logits
from vitrail.vit.edits import Edit
from vitrail.vit.open import Vit
from vitrail.vit.surgery import NoProjection, projections, without_head

__all__ = ["PROMISES", "Finding", "Report", "check_vit", "differences", "footprint"]

T = TypeVar("T")

PROMISES = (
    "logits unchanged",
    "rows sum to 1",
    "weights @ v",
    "prune = surgery",
    "edits act",
    "run from the middle",
    "heads stacked",
    "maps on the grid",
    "nothing left behind",
)
"""What a report answers, in its order."""


@dataclass(frozen=True)
class Finding:
    """One promise tried on one model.

    holds: None where the question does not arise or the answer is refused, and then the sentence says why.
    figure: the worst difference seen, relative to the largest value compared (0: bitwise equal), or None.
    word: the reason in a word or two, where `holds` is None.
    """

    name: str
    holds: bool | None
    figure: float | None
    sentence: str
    word: str = ""


@dataclass(frozen=True)
class Report:
    """What was found on one model, and its anatomy as a table."""

    model: str
    anatomy: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """No promise was broken. What is refused with a reason is not broken."""
        return all(finding.holds is not False for finding in self.findings)

    def finding(self, name: str) -> Finding:
        """The finding of that name, one of `PROMISES`."""
        return next(finding for finding in self.findings if finding.name == name)

    def text(self) -> str:
        """The report as lines to print."""
        width = max(map(len, PROMISES))
        marks = {True: "ok", False: "BROKEN", None: "-"}
        lines = [f"{marks[item.holds]:<6}  {item.name:<{width}}  {item.sentence}" for item in self.findings]
        verdict = "All promises hold." if self.ok else "A promise is broken; please report this model."
        return "\n".join([self.model, "", self.anatomy, "", *lines, "", verdict])


@torch.no_grad()
def check_vit(
    vit: Vit, images: Float[Tensor, "image channel row column"] | None = None, *, quick: bool = False
) -> Report:
    """Tries every promise of the tap on a model.

    Args:
        images: prepared images; by default 4 of noise (2 above 128 pixels).
        quick: runs that are made per layer are made for the first, middle and last layer only.

    Models that draw at random (ViT-MAE) are given the same draw in each pass.
    """
    images = _noise(vit) if images is None else images
    trial = _Trial(vit, images, quick)
    own = trial.users_own_logits()
    before = footprint(vit.model)
    findings = [
        _logits_unchanged(trial, own),
        *_maps(trial),
        *_pruning(trial),
        _from_the_middle(trial),
        _heads_stacked(trial),
        _on_grid(trial),
        _nothing_left(trial, before),
    ]
    return Report(vit.name, describe(vit.anatomy), tuple(findings))


def _noise(vit: Vit) -> Tensor:
    size = vit.preprocessing.size
    generator = torch.Generator().manual_seed(1)
    weight = next(vit.model.parameters())
    return torch.randn((4 if max(size) <= 128 else 2, 3, *size), generator=generator).to(weight)


@dataclass
class _Trial:
    """The model under trial and what its plain pass gives."""

    vit: Vit
    images: Tensor
    quick: bool
    plain: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.plain = self.seeded(self.vit.logits, self.images)

    @property
    def bound(self) -> float:
        """What another order of the same sums may change, relative: 1e-5 in float32, 2e-2 in half precision."""
        return 1e-5 if self.plain.dtype in (torch.float32, torch.float64) else 2e-2

    @property
    def layers(self) -> list[int]:
        last = self.vit.n_layers - 1
        return sorted({0, last // 2, last}) if self.quick else list(range(last + 1))

    def seeded(self, run: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """The result of a pass whose random draws are always the same."""
        device = self.images.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            return run(*args, **kwargs)

    def read(self, readers: Readers | None = None, edits: Sequence[Edit] = ()) -> Tensor:
        return self.seeded(self.vit.tap().read, self.images, readers, edits)

    def users_own_logits(self) -> Tensor | None:
        """What the user's own module gives, where it is in evaluation mode."""
        model = self.vit.model
        if any(module.training for module in model.modules()):
            return None
        return feature_or_logits(self.seeded(model, self.images))


def _relative(one: Tensor, other: Tensor) -> float:
    """max |one - other| / max |other|; infinite where something is not finite or shapes differ."""
    if one.shape != other.shape or not (one.isfinite().all() and other.isfinite().all()):
        return float("inf")
    difference = (one.double() - other.double()).abs().amax() if one.numel() else one.new_zeros(())
    return float(difference / other.double().abs().amax().clamp_min(1e-30)) if one.numel() else 0.0


# --- logits and maps -------------------------------------------------------------------------------------------------


def _logits_unchanged(trial: _Trial, own: Tensor | None) -> Finding:
    read = trial.read(Readers(attention=lambda attention: None))
    recorded = trial.seeded(trial.vit.tap().record, trial.images)[1]
    others = [read, recorded] if own is None else [read, recorded, own]
    worst = max(_relative(other, trial.plain) for other in others)
    same = all(torch.equal(other, trial.plain) for other in others)
    against = "an untapped copy" if own is None else "an untapped copy and your own module"
    sentence = (
        f"read and recorded passes are bitwise those of {against}"
        if same
        else f"logits differ from {against} by {worst:.0e} of the largest"
    )
    return Finding("logits unchanged", same, worst, sentence)


@dataclass
class _Maps:
    """A reader that compares maps with what the model made of them."""

    rows: float = 0.0
    product: float = 0.0
    read: int = 0
    mapless: list[int] = field(default_factory=list)
    mixing: list[int] = field(default_factory=list)
    waiting: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def attention(self, attention: LayerAttention) -> None:
        if attention.kind in ("channel", "unknown"):
            self.mapless.append(attention.layer)
            return
        weights = attention.window_weights()
        self.read += 1
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

    def answered_natively(self, attention: LayerAttention) -> None:
        product = self.waiting.pop((attention.layer, attention.call), None)
        if product is not None and attention.out is not None:
            self.product = max(self.product, _relative(product, attention.out))


def _maps(trial: _Trial) -> list[Finding]:
    maps = _Maps()
    trial.read(Readers(attention=maps.attention))
    native = len(maps.waiting)
    if native:
        layers = sorted({layer for layer, _ in maps.waiting})
        trial.read(Readers(attention=maps.answered_natively), [_no_change(trial, layer) for layer in layers])
    if not maps.read:
        sentence = "attention is between channels, not tokens, so there are no maps"
        return [Finding(name, None, None, sentence, "channels") for name in ("rows sum to 1", "weights @ v")]
    except_for = f"; {_named(maps.mapless)} attend between channels and have no map" if maps.mapless else ""
    mixing = f"; {_named(maps.mixing)} mix heads after softmax, where rows need not" if maps.mixing else ""
    kernels = f" ({native} answered by a native kernel, compared with its written form)" if native else ""
    return [
        Finding(
            "rows sum to 1", maps.rows <= trial.bound, maps.rows,
            f"{maps.read} maps, off by at most {maps.rows:.0e}{mixing}{except_for}",
        ),
        Finding(
            "weights @ v", maps.product <= trial.bound and not maps.waiting, maps.product,
            f"the model's own attention output to {maps.product:.0e}{kernels}{except_for}",
        ),
    ]  # fmt: skip


def _no_change(trial: _Trial, layer: int) -> Edit:
    """Makes a native kernel's block run in its written form, in which the output of attention can be seen."""
    heads = trial.vit.anatomy.blocks[layer].heads
    return Edit(layer, gate=torch.ones((len(trial.images), heads), device=trial.images.device))


def _named(layers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "L0-L2, L5" """
    runs = [
        [layer for _, layer in run]
        for _, run in groupby(enumerate(sorted(set(layers))), lambda item: item[1] - item[0])
    ]
    return ", ".join(f"L{run[0]}" if len(run) == 1 else f"L{run[0]}-L{run[-1]}" for run in runs)


# --- edits -----------------------------------------------------------------------------------------------------------


def _pruning(trial: _Trial) -> list[Finding]:
    """Prunes one head per attention call, at the tap and in the output projection of a copy."""
    blocks = trial.vit.anatomy.blocks
    found = projections(trial.vit.model, trial.vit.anatomy, trial.images)
    surgery, least, refused = [], float("inf"), dict[str, list[int]]()
    for layer in trial.layers:
        for call, spec in enumerate(blocks[layer].calls):
            head = (layer + call) % spec.heads
            pruned = trial.read(edits=[Edit(layer, call, prune=(head,))])
            least = min(least, _relative(pruned, trial.plain))
            projection = found[layer, call]
            if isinstance(projection, NoProjection):
                refused.setdefault(projection.reason, []).append(layer)
                continue
            cut = without_head(trial.vit.model, projection, head)
            surgery.append(_relative(pruned, feature_or_logits(trial.seeded(cut, trial.images))))
    return [_surgery_finding(surgery, refused, trial.bound), _acting_finding(least, len(trial.layers))]


def _surgery_finding(surgery: list[float], refused: dict[str, list[int]], bound: float) -> Finding:
    reasons = "; ".join(f"{_named(layers)}: {reason}" for reason, layers in refused.items())
    if not surgery:
        return Finding("prune = surgery", None, None, reasons, "no projection")
    worst = max(surgery)
    sentence = f"pruned logits are those of a copy with the head's columns zeroed, to {worst:.0e}"
    return Finding("prune = surgery", worst <= bound, worst, f"{sentence}; {reasons}" if reasons else sentence)


def _acting_finding(least: float, layers: int) -> Finding:
    sentence = f"a pruned head moves the logits in each of {layers} layers tried, by {least:.0e} or more"
    return Finding("edits act", 1e-6 < least < float("inf"), None, sentence)


def _from_the_middle(trial: _Trial) -> Finding:
    tap = trial.vit.tap()
    replay, _ = trial.seeded(tap.record, trial.images)
    whole = Readers(output=lambda layer, tokens: None)  # every token is carried to the end, as in a plain pass
    runs = {layer: trial.seeded(tap.run_from, layer, replay, readers=whole) for layer in trial.layers}
    unequal = [layer for layer, logits in runs.items() if not torch.equal(logits, trial.plain)]
    worst = max(_relative(logits, trial.plain) for logits in runs.values())
    sentence = (
        f"{_named(unequal)} differ from the plain pass by {worst:.0e}"
        if unequal
        else f"bitwise the plain pass from each of {len(runs)} layers tried"
    )
    return Finding("run from the middle", not unequal, worst, sentence)


def _heads_stacked(trial: _Trial) -> Finding:
    tap, worst, copies = trial.vit.tap(), 0.0, 1
    replay, _ = trial.seeded(tap.record, trial.images)
    for layer in trial.layers:
        copies = min(4, trial.vit.anatomy.blocks[layer].heads)
        edits = [Edit(layer, copy=head, prune=(head,)) for head in range(copies)]
        stacked = trial.seeded(tap.run_from, layer, replay, edits, copies)
        single = torch.cat([trial.read(edits=[Edit(layer, prune=(head,))]) for head in range(copies)])
        worst = max(worst, _relative(stacked, single))
    sentence = f"up to 4 heads pruned on one batch differ from one at a time by {worst:.0e}"
    return Finding("heads stacked", worst <= trial.bound, worst, sentence)


# --- maps on the image grid ------------------------------------------------------------------------------------------

_OFF_GRID = {
    "channels": "attention is between channels",
    "class": "the class token is the only query",
    "pooled": "queries and keys are other sets of tokens",
    "unknown": "this attention is not understood",
    "windows": "which tokens are in a window could not be told",
    "no grid": "tokens lie on no grid",
}


def _on_grid(trial: _Trial) -> Finding:
    """Which layers have maps that join patches of the image, and why the others have not."""
    off: dict[str, list[int]] = {}
    for layer, block in enumerate(trial.vit.anatomy.blocks):
        reason = _off_grid(trial, layer, block)
        if reason:
            off.setdefault(reason, []).append(layer)
    n_layers, n_off = trial.vit.n_layers, sum(map(len, off.values()))
    whys = "; ".join([f"{_named(layers)}: {_OFF_GRID[reason]}" for reason, layers in off.items()])
    if "no grid" in off:
        whys = "; ".join([whys, *(note.rstrip(".") for note in trial.vit.anatomy.notes)])
    if not off:
        return Finding("maps on the grid", True, None, f"all {n_layers} layers have maps that join patches")
    if n_off == n_layers:
        return Finding("maps on the grid", None, None, f"no layer has such maps. {whys}", ", ".join(off))
    return Finding(
        "maps on the grid",
        None,
        None,
        f"all but {n_off} of {n_layers} layers have such maps. {whys}",
        f"not {', '.join(off)}",
    )


def _off_grid(trial: _Trial, layer: int, block: Block) -> str | None:
    if block.kind not in ("token", "window"):
        return "channels" if block.kind == "channel" else block.kind
    if block.grid is None:
        return "no grid"
    if block.calls[0].windows > 1:
        try:
            trial.vit.tap().window_slots(layer)
        except Unsupported:
            return "windows"  # the answer to the question asked, which the sentence gives
    return None


# --- what is left behind ---------------------------------------------------------------------------------------------


class _ReaderFailed(Exception):
    """What the failing reader raises."""


def _nothing_left(trial: _Trial, before: dict[str, object]) -> Finding:
    modes = torch._C._len_torch_function_stack()
    passed_on = False
    try:
        trial.read(Readers(attention=_failing))
    except _ReaderFailed:
        passed_on = True
    left = differences(before, footprint(trial.vit.model))
    if not passed_on:
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
    """Everything a tap could leave on a model: attributes, hooks, training flags, which tensors, how often changed."""
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
    """What changed between two footprints, in words."""
    return [f"{name} changed" for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


# --- anatomy ---------------------------------------------------------------------------------------------------------


def describe(anatomy: Anatomy) -> str:
    """The anatomy as a table, one line per run of equal blocks."""
    rows = [("layers", "kind", "heads", "tokens", "attention", "module")]
    for _, run in groupby(enumerate(anatomy.blocks), lambda item: _alike(item[1])):
        members = list(run)
        block = members[0][1]
        layers = _named([layer for layer, _ in members])
        rows.append((layers, *_alike(block), block.path if len(members) == 1 else f"{block.path} ..."))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    pools = [f"outside the blocks: attention in {path or 'the model'}" for path in anatomy.pools]
    return "\n".join([*lines, *pools, *(f"note: {note}" for note in anatomy.notes)])


def _alike(block: Block) -> tuple[str, str, str, str]:
    call = block.calls[0]
    rows, columns = block.grid or (0, 0)
    tokens = f"{block.prefix} + {rows}x{columns}" if block.grid else f"{block.tokens}, no grid"
    several = f" x {len(block.calls)} calls" if len(block.calls) > 1 else ""
    windows = f" ({call.windows})" if call.windows > 1 else ""
    kinds = "/".join(dict.fromkeys(item.kind for item in block.calls))
    return f"{kinds}{windows}", f"{call.heads}{several}", tokens, "fused" if call.fused else "by hand"
