"""Tokens and neurons of a study: lengths, grouping by object, and what answers survive."""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from vitrail.figures.neurons import grouping_by_layer, norms_by_layer, patch_norms, survival
from vitrail.heads.summary import bootstrap_interval
from vitrail.neurons.amounts import AMOUNTS, cells_that_divide
from vitrail.neurons.outliers import norm_outliers
from vitrail.report.parts import Drawing, Part, Section, Studied, Table, Text, percent, readings

__all__ = ["neurons"]

OFTEN = 0.5
"""Share of the images from which a place counts as one where outliers always lie."""


def neurons(study: Studied) -> Section | None:
    """Norms, grouping and robustness, if the study holds any of them."""
    held = study.held("neurons")
    if not held:
        return None
    return Section("neurons", "Tokens and neurons", tuple(_findings(study, held)), tuple(_parts(study, held)))


def _findings(study: Studied, held: list[str]) -> Iterator[str]:
    if "token_norm" in held:
        yield from _of_norms(study)
    if "grouping_silhouette" in held:
        yield from _of_grouping(study.data)
    yield from _of_survival(study, held)


def _of_norms(study: Studied) -> Iterator[str]:
    outlying = {layer: norm_outliers(each) for layer, each in enumerate(patch_norms(study.sample)) if each is not None}
    most = max(outlying, key=lambda layer: outlying[layer].sum())
    found = outlying[most]
    if not found.any():
        yield "No layer has patches of outlying length."
        return
    yield (
        f"After L{most}, where most patches stand out by their length, {percent(float(found.any(1).mean()))} of the "
        f"images have such patches: {found.sum(1).mean():.1f} of {found.shape[1]} on average"
        f"{_always(study, most, found)}."
    )


def _always(study: Studied, layer: int, found: np.ndarray) -> str:
    """Places where the outliers of most images lie."""
    grid = study.plan.grids[layer]
    places = np.flatnonzero(found.mean(0) >= OFTEN)
    if grid is None or not len(places) or study.n_images < 2:
        return ""
    named = [f"row {place // grid[1]}, column {place % grid[1]}" for place in places[:4]]
    more = f" and {len(places) - 4} more" if len(places) > 4 else ""
    return f", in most images at {'; '.join(named)}{more}"


def _of_grouping(data: xr.Dataset) -> Iterator[str]:
    values = data["grouping_silhouette"].to_numpy()
    known = values[np.isfinite(values).all(1)]
    if not len(known):
        yield "No image has two objects large enough to score how tokens group."
        return
    means = known.mean(0)
    best = int(means.argmax())
    yield (
        f"Tokens of an object find together best after L{best} (silhouette {means[best]:.3f}; {means[0]:.3f} after L0, "
        f"{means[-1]:.3f} after the last layer; {len(known)} images with two objects or more)."
    )


def _of_survival(study: Studied, held: list[str]) -> Iterator[str]:
    half = AMOUNTS.index(0.5)
    named = {"random": "random", "salient": "salient", "non_salient": "non-salient"}
    left = {
        words: study.data[f"occlusion_{name}"].to_numpy()[:, half].astype(np.float64)
        for name, words in named.items()
        if f"occlusion_{name}" in held
    }
    if left:
        told = ", ".join(f"{values.mean():.2f} without {words} ones" for words, values in left.items())
        whole = float(study.data["probability"].to_numpy().mean())
        yield f"With half of the patches lost the label keeps a probability of {told} ({whole:.2f} intact)."
    if {"random", "salient"} <= set(left) and study.n_images > 1:
        beyond = left["random"] - left["salient"]
        low, high = (float(each[0]) for each in bootstrap_interval(beyond[:, None]))
        verdict = "hurts more than" if low > 0 else "hurts less than" if high < 0 else "cannot be told from"
        yield (
            f"Losing salient patches {verdict} losing as many random ones: {beyond.mean():+.3f} of probability beyond "
            f"them (95 % interval {low:+.3f} to {high:+.3f})."
        )
    if "shuffle_probability" in held:
        cells = cells_that_divide(_grid(study))
        values = study.data["shuffle_probability"].to_numpy().mean(0)
        told = ", ".join(f"{value:.2f} with {n} x {n} cells" for n, value in zip(cells, values, strict=True))
        yield f"With its patches displaced the label keeps {told}."


def _parts(study: Studied, held: list[str]) -> Iterator[Part]:
    if "token_norm" in held:
        if study.sample_words:
            yield Text(study.sample_words)
        yield Drawing(norms_by_layer(study.sample))
    grouped = [name for name in held if name.startswith("grouping_")]
    if grouped and np.isfinite(study.data[grouped[0]].to_numpy()).all(1).any():
        yield Drawing(grouping_by_layer(study.data))
    if any(name.startswith(("occlusion_", "shuffle_")) for name in held):
        yield Drawing(survival(study.data))
        yield _survival_table(study, held)
    yield readings(study, held)


def _survival_table(study: Studied, held: list[str]) -> Table:
    rows = []
    for name in ("random", "salient", "non_salient"):
        if f"occlusion_{name}" in held:
            values = study.data[f"occlusion_{name}"].to_numpy().astype(np.float64)
            rows += [
                [f"{name.replace('_', '-')} patches lost", percent(amount), *_cells(values[:, at])]
                for at, amount in enumerate(AMOUNTS)
            ]
    if "shuffle_probability" in held:
        values = study.data["shuffle_probability"].to_numpy().astype(np.float64)
        rows += [
            ["displaced", f"{n} x {n} cells", *_cells(values[:, at])]
            for at, n in enumerate(cells_that_divide(_grid(study)))
        ]
    rows.insert(0, ["intact", "", *_cells(study.data["probability"].to_numpy().astype(np.float64))])
    reading = "Intervals: 95 %, bootstrap over images." if study.n_images > 1 else ""
    return Table(
        "What is left of the label's probability",
        ("what", "how much", "probability", "95 %"),
        rows,
        reading,
        words=(0, 1),
    )


def _cells(values: np.ndarray) -> tuple[str, str]:
    if len(values) < 2:
        return f"{values.mean():.3f}", ""
    low, high = (float(each[0]) for each in bootstrap_interval(values[:, None]))
    return f"{values.mean():.3f}", f"{low:.3f} to {high:.3f}"


def _grid(study: Studied) -> tuple[int, int]:
    grid = study.plan.grids[0]
    assert grid is not None, "shuffling needs a grid"
    return grid[0], grid[1]
