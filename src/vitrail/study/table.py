"""A finished study in a few lines for a terminal."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from vitrail.data import LabelSource
from vitrail.heads.summary import head_table
from vitrail.study.plan import Plan
from vitrail.study.store import read_manifest, read_plan

if TYPE_CHECKING:
    from vitrail.pruning.prune import KeptAccuracy, Pruned

__all__ = ["pruning_summary", "study_record", "study_summary"]

N_HEADS = 8
"""Heads in the table."""

N_SKIPPED = 5
"""Skipped files that are named."""


def study_summary(study: xr.Dataset, folder: str | Path) -> list[RenderableType]:
    """A study in a few lines: the model, files that were skipped and why, and the heads that matter most.

    Args:
        study: From `open_study`.
        folder: Where it lies.

    Returns:
        Text and a table, to print with rich.
    """
    folder = Path(folder)
    lines = [_headline(study, folder), *_skip_lines(folder), *_scaling_lines(folder)]
    return [*map(Text, lines), *_most_important(study)]  # Text, since brackets in names would be read as markup


def study_record(study: xr.Dataset, folder: str | Path) -> dict[str, Any]:
    """What `study_summary` says, for a machine.

    Args:
        study: From `open_study`.
        folder: Where it lies.

    Returns:
        `study`, `model`, `images`, `accuracy` (0 to 1; None without labels), `measures`, `left_out` (reason by
        measure), `skipped` (reason by file), `notes`.
    """
    plan = read_plan(folder)
    return {
        "study": str(folder),
        "model": plan.model,
        "images": study.sizes["image"],
        "accuracy": _accuracy(study, plan),
        "measures": sorted(plan.measures),
        "left_out": plan.left_out,
        "skipped": {skipped.id: skipped.reason for skipped in read_manifest(folder).skipped},
        "notes": plan.notes,
    }


def _accuracy(study: xr.Dataset, plan: Plan) -> float | None:
    """Share of the images whose label is the most probable class; None where nobody gave labels."""
    if not {"label", "prediction"} <= set(study) or plan.labels != LabelSource.GIVEN:
        return None
    return float((study["label"].to_numpy() == study["prediction"].to_numpy()).mean())


def _headline(study: xr.Dataset, folder: Path) -> str:
    plan = read_plan(folder)
    parts = [f"{plan.model}: {study.sizes['image']} images"]
    accuracy = _accuracy(study, plan)
    if accuracy is not None:
        parts.append(f"top-1 {accuracy:.1%}")
    parts.append(f"labels: {plan.labels_from}")
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in plan.left_out.items():
        names_by_reason.setdefault(reason, []).append(name)
    left_out = [f"left out: {', '.join(names)}: {reason}" for reason, names in names_by_reason.items()]
    return "\n".join(["", ", ".join(parts), *plan.notes, *left_out])


def _skip_lines(folder: Path) -> list[str]:
    skipped = read_manifest(folder).skipped
    if not skipped:
        return []
    lines = [f"  {item.id}: {item.reason}" for item in skipped[:N_SKIPPED]]
    more = len(skipped) - N_SKIPPED
    return [
        f"{len(skipped)} files were skipped:",
        *lines,
        *([f"  and {more} more, all in images.json"] if more > 0 else []),
    ]


def _scaling_lines(folder: Path) -> list[str]:
    """Images whose values were scaled by a guess of their range."""
    scaled = [entry for entry in read_manifest(folder).images if entry.scaling]
    counts = Counter(str(entry.scaling).split(":")[0] for entry in scaled)
    return [f"{count} images hold {what} and were scaled by that; see images.json" for what, count in counts.items()]


RANKED_BY = (
    "drop_mean",
    "head_divergence_mean",
    "head_value_change_mean",
    "head_output_shift_mean",
    "head_token_shift_mean",
)
"""Columns of the table of heads that importance is read from, in order of preference."""


def _most_important(study: xr.Dataset) -> list[RenderableType]:
    """The heads whose removal costs most of the label's probability (or changes the output most)."""
    heads = head_table(study)
    by = next((name for name in RANKED_BY if name in heads), None)
    if by is None:
        return []
    columns = _columns(heads)
    table = Table(title="heads that matter most", title_justify="left", box=None, pad_edge=False)
    table.add_column("head", no_wrap=True)
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    score = heads[by].to_numpy()
    order = np.argsort(-np.nan_to_num(score, nan=-np.inf), axis=None)[:N_HEADS]
    for layer, head in zip(*np.unravel_index(order, score.shape), strict=True):
        if not np.isnan(score[layer, head]):
            cells = [_cell(text, [float(heads[name][layer, head]) for name in names]) for _, (text, names) in columns]
            table.add_row(f"L{layer}H{head}", *cells)
    n_first = int(np.nansum(heads["drop_may_be_largest"].to_numpy())) if by == "drop_mean" else 0
    if n_first > 1 and study.sizes["image"] > 1:
        table.caption = f"95 %: of each head alone; on other images any of {n_first} heads may cost most"
        table.caption_justify = "left"
    words = heads.attrs.get("corrected") if by == "drop_mean" else None
    return [table, Text(f"p lost: estimated on all images and {words}")] if words else [table]


def _columns(heads: xr.Dataset) -> list[tuple[str, tuple[str, tuple[str, ...]]]]:
    """(title, (format, columns of the head table)) of those that this study has."""
    available = set(map(str, heads))
    reach = heads["attention_distance_mean"].attrs["unit"] if "attention_distance_mean" in heads else ""
    offered = [
        ("p lost", ("{:+.3f}", ("drop_mean",))),
        ("95 %", ("{:+.2f} .. {:+.2f}", ("drop_low", "drop_high"))),
        ("flips", ("{:.1%}", ("flip_share",))),
        ("top-1 without", ("{:.1%}", ("accuracy",))),
        ("JSD, bits", ("{:.4f}", ("head_divergence_mean",))),
        ("value change", ("{:.4g}", ("head_value_change_mean",))),
        ("1 - cosine", ("{:.4f}", ("head_output_shift_mean",))),
        (f"reach, {reach}", ("{:.1f}", ("attention_distance_mean",))),
        ("entropy", ("{:.2f}", ("strength_entropy_mean",))),
    ]
    return [(title, (text, names)) for title, (text, names) in offered if set(names) <= available]


def _cell(text: str, values: list[float]) -> str:
    return "too few images" if np.isnan(values).any() else text.format(*values)


def pruning_summary(done: "Pruned") -> list[RenderableType]:
    """What removing heads saved and cost.

    Args:
        done: From `prune_study`.

    Returns:
        Text and a table, to print with rich.
    """
    speed, accuracy = done.speed, done.kept
    table = Table(box=None, pad_edge=False)
    for title in ("", "before", "after", "after / before"):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    left = done.heads_before - len(done.heads)
    table.add_row("heads", f"{done.heads_before}", f"{left}", f"{left / done.heads_before:.3f}")
    before, after = done.parameters_before, done.parameters_after
    table.add_row("parameters", f"{before:,}", f"{after:,}", f"{after / before:.3f}")
    if accuracy is not None:
        title = "top-1" if accuracy.labels == LabelSource.GIVEN else "agreement"
        table.add_row(title, f"{accuracy.before:.1%}", f"{accuracy.after:.1%}", _share_cell(accuracy))
    lines: list[RenderableType] = [f"removed: {', '.join(f'L{layer}H{head}' for layer, head in done.heads) or 'none'}"]
    lines += [table, _speed_line(speed.ratio, speed.low, speed.high, speed.images)]
    lines += [f"logits: those of the model with these heads masked, within {done.error:.0e} of the largest"]
    if accuracy is not None:
        lines.append(_accuracy_line(done))
    if done.layers_without_heads:
        names = ", ".join(f"L{layer}" for layer in done.layers_without_heads)
        lines.append(f"{names} kept no head: of the smaller model, Vitrail numbers the layers with attention left")
    output = "" if done.output is None else f", output={done.output!r}"
    return [*lines, Text(f'\nOpen it:  open_vit("{done.folder}"{output})   or, without Vitrail, {done.folder}/load.py')]


def _share_cell(accuracy: "KeptAccuracy") -> str:
    if np.isnan(accuracy.share):
        return "none was correct before"
    interval = "" if np.isnan(accuracy.low) else f" [{accuracy.low:.3f}, {accuracy.high:.3f}]"
    return f"{accuracy.share:.3f}{interval}"


def _speed_line(ratio: float, low: float, high: float, images: int) -> str:
    return (
        f"speed: {ratio:.2f} times as fast (middle half of pairs run in turn {low:.2f} .. {high:.2f}, {images} images "
        "a pass)"
    )


def _accuracy_line(done: "Pruned") -> str:
    accuracy = done.kept
    assert accuracy is not None
    what = accuracy.labels.correctness
    if accuracy.promised is None:
        return f"{what}: on all {accuracy.images} images of the study, which may be those the heads were chosen on"
    if np.isnan(accuracy.share):
        return f"{what}: the original model has none to keep: it predicts no label of {accuracy.images} test images"
    verdict = "kept" if accuracy.holds else "NOT kept"
    interval = (
        "too few for an interval"
        if np.isnan(accuracy.low)
        else f"95 % interval {accuracy.low:.1%} .. {accuracy.high:.1%}"
    )
    return (
        f"{what}: {verdict}: {accuracy.share:.1%} of it where {accuracy.promised:.1%} was promised, measured on "
        f"{accuracy.images} images that nothing was chosen on ({interval}); heads "
        f"ranked by {done.ranking} on the others"
    )
