"""A finished study in a few lines for a terminal."""

from pathlib import Path

import numpy as np
import xarray as xr
from rich.console import RenderableType
from rich.table import Table

from vitrail.heads.summary import head_table
from vitrail.study.store import read_manifest, read_plan

__all__ = ["summary"]

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
