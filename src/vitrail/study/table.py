"""A finished study in a few lines for a terminal."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from rich.console import RenderableType
from rich.table import Table

from vitrail.heads.summary import head_table
from vitrail.study.store import read_manifest, read_plan

if TYPE_CHECKING:
    from vitrail.study.pruning import Pruned

__all__ = ["pruning_summary", "summary"]

SHOWN = 8
"""Heads in the table."""

SKIPPED_SHOWN = 5


def summary(study: xr.Dataset, folder: str | Path) -> list[RenderableType]:
    """What was studied, what was skipped and why, and the heads that matter most; ready to print with rich."""
    return [_headline(study, Path(folder)), *_skipped(Path(folder)), *_most_important(study)]


def _headline(study: xr.Dataset, folder: Path) -> str:
    plan = read_plan(folder)
    parts = [f"{plan.model}: {study.sizes['image']} images"]
    if {"label", "prediction"} <= set(study) and not plan.labels_from.startswith("the model's own"):
        accuracy = float((study["label"].to_numpy() == study["prediction"].to_numpy()).mean())
        parts.append(f"top-1 {accuracy:.1%}")
    parts.append(f"labels: {plan.labels_from}")
    left_out = [f"{name} was left out: {reason}" for name, reason in plan.left_out.items()]
    return "\n".join(["", ", ".join(parts), *left_out])


def _skipped(folder: Path) -> list[str]:
    skipped = read_manifest(folder).skipped
    if not skipped:
        return []
    lines = [f"  {item.id}: {item.reason}" for item in skipped[:SKIPPED_SHOWN]]
    more = len(skipped) - SKIPPED_SHOWN
    return [
        f"{len(skipped)} files were skipped:",
        *lines,
        *([f"  and {more} more, all in images.json"] if more > 0 else []),
    ]


def _most_important(study: xr.Dataset) -> list[RenderableType]:
    """The heads whose removal costs most of the label's probability (or changes the output most)."""
    heads = head_table(study)
    by = next((name for name in ("drop_mean", "head_divergence_mean", "head_token_shift_mean") if name in heads), None)
    if by is None:
        return []
    columns = _columns(set(map(str, heads)))
    table = Table(title="heads that matter most", title_justify="left", box=None, pad_edge=False)
    table.add_column("head", no_wrap=True)
    for title, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    score = heads[by].to_numpy()
    order = np.argsort(-np.nan_to_num(score, nan=-np.inf), axis=None)[:SHOWN]
    for layer, head in zip(*np.unravel_index(order, score.shape), strict=True):
        if not np.isnan(score[layer, head]):
            shown = [text.format(*(float(heads[name][layer, head]) for name in names)) for _, (text, names) in columns]
            table.add_row(f"L{layer}H{head}", *shown)
    return [table]


def _columns(held: set[str]) -> list[tuple[str, tuple[str, tuple[str, ...]]]]:
    """(title, (format, columns of the head table)) of those that this study has."""
    offered = [
        ("p lost", ("{:+.3f}", ("drop_mean",))),
        ("95 %", ("{:+.2f} .. {:+.2f}", ("drop_low", "drop_high"))),
        ("flips", ("{:.1%}", ("flip_share",))),
        ("top-1 without", ("{:.1%}", ("accuracy",))),
        ("JSD, bits", ("{:.4f}", ("head_divergence_mean",))),
        ("reach", ("{:.1f}", ("attention_distance_mean",))),
        ("entropy", ("{:.2f}", ("strength_entropy_mean",))),
    ]
    return [(title, (text, names)) for title, (text, names) in offered if set(names) <= held]


def pruning_summary(done: "Pruned") -> list[RenderableType]:
    """What removing heads saved and cost; ready to print with rich."""
    speed, kept = done.speed, done.kept
    table = Table(box=None, pad_edge=False)
    for title in ("", "before", "after", "after / before"):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    left = done.heads_before - len(done.heads)
    table.add_row("heads", f"{done.heads_before}", f"{left}", f"{left / done.heads_before:.3f}")
    before, after = done.parameters_before, done.parameters_after
    table.add_row("parameters", f"{before:,}", f"{after:,}", f"{after / before:.3f}")
    if kept is not None:
        share = f"{kept.share:.3f} [{kept.low:.3f}, {kept.high:.3f}]"
        table.add_row("top-1", f"{kept.before:.1%}", f"{kept.after:.1%}", share)
    lines: list[RenderableType] = [f"removed: {', '.join(f'L{layer}H{head}' for layer, head in done.heads) or 'none'}"]
    lines += [table, _speed_line(speed.ratio, speed.low, speed.high, speed.images)]
    lines += [f"logits: those of the model with these heads masked, within {done.error:.0e} of the largest"]
    if kept is not None:
        lines.append(_accuracy_line(done))
    if done.layers_without_heads:
        names = ", ".join(f"L{layer}" for layer in done.layers_without_heads)
        lines.append(f"{names} kept no head: of the smaller model, Vitrail numbers the layers with attention left")
    return [*lines, f'\nOpen it:  open_vit("{done.folder}")   or, without Vitrail, {done.folder}/load.py']


def _speed_line(ratio: float, low: float, high: float, images: int) -> str:
    return (
        f"speed: {ratio:.2f} times as fast (middle half of pairs run in turn {low:.2f} .. {high:.2f}, {images} images "
        "a pass)"
    )


def _accuracy_line(done: "Pruned") -> str:
    kept = done.kept
    assert kept is not None
    if kept.promised is None:
        return f"accuracy: on all {kept.images} images of the study, which may be those the heads were chosen on"
    held = "kept" if kept.holds else "NOT kept"
    return (
        f"accuracy: {held}: {kept.share:.1%} of it where {kept.promised:.1%} was promised, measured on "
        f"{kept.images} images that nothing was chosen on (95 % interval {kept.low:.1%} .. {kept.high:.1%}); heads "
        f"ranked by {done.ranking} on the others"
    )
