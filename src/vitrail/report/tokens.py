"""Tokens and neurons of a study: lengths, grouping by object, and what answers survive."""

from collections.abc import Iterator

import numpy as np
import xarray as xr
from jaxtyping import Float

from vitrail.figures.tokens import grouping_by_layer, norms_by_layer, survival
from vitrail.layer_summary import images_in_every_layer
from vitrail.report.parts import Drawing, Part, ReportData, Section, Table, Text, readings
from vitrail.sentence import Sentence, percent
from vitrail.stats import mean_interval
from vitrail.tokens.amounts import AMOUNTS, cells_that_divide
from vitrail.tokens.summary import (
    LayerPatches,
    grouping_quantities,
    norm_outliers_by_layer,
    patch_norms,
)

__all__ = ["tokens"]

N_SHOWN = 4
"""Images that a sentence names."""

LEAST_COUNT = 0.1
"""Of patches an image; a smaller mean is printed as below it."""

OFTEN = 0.5
"""Share of the images from which a position counts as one where outliers always lie."""


def tokens(study: ReportData) -> Section | None:
    """Norms, grouping and robustness, if the study holds any of them.

    Args:
        study: The study.

    Returns:
        The section; None where the study holds nothing for it.
    """
    names = study.measures_of("tokens")
    if not names:
        return None
    return Section("tokens", "Tokens and neurons", tuple(_findings(study, names)), lambda: _parts(study, names))


def _findings(study: ReportData, names: list[str]) -> Iterator[str]:
    if "token_norm" in names:
        yield from _of_norms(study)
    if "grouping_silhouette" in names:
        yield from _of_grouping(study.data)
    yield from _of_survival(study, names)


def _of_norms(study: ReportData) -> Iterator[str]:
    outlying = norm_outliers_by_layer(study.sample)
    if not outlying:
        yield "Of no layer is it known which of the tokens that it returns are patches, so their lengths say nothing."
        return
    most = max(outlying, key=lambda layer: outlying[layer].values.sum())
    outliers = outlying[most].values
    if not outliers.any():
        yield "No layer has patches of outlying length."
        return
    counts = outliers.sum(1)
    most_counted = [int(image) for image in np.argsort(-counts, kind="stable")[:N_SHOWN] if counts[image]]
    average = f"{counts.mean():.1f}" if counts.mean() >= LEAST_COUNT else f"below {LEAST_COUNT}"
    share = percent(float((counts > 0).mean()))
    yield Sentence(
        f"No layer has more patches that stand out by their length than L{most}: {share} of the images have such "
        f"patches after it, {average} of {outliers.shape[1]} on average"
        f"{_frequent_positions(outlying[most])}.",
        measure="token_norm",
        layer=most,
        by_layer=[
            outlying[layer].values.sum(1).mean() if layer in outlying else np.nan
            for layer in range(study.plan.n_layers)
        ],
        by_layer_title="patches of outlying length an image",
        images=[
            (int(study.sample_positions[image]), f"{counts[image]} patch{'es' if counts[image] > 1 else ''}")
            for image in most_counted
        ],
        caption="these have the most such patches",
    )


def _frequent_positions(outliers: LayerPatches) -> str:
    """Positions where the outliers of most images lie."""
    grid = outliers.grid
    positions = np.flatnonzero(outliers.values.mean(0) >= OFTEN)
    if grid is None or not len(positions) or len(outliers.values) < 2:
        return ""
    named = [f"row {position // grid[1]}, column {position % grid[1]}" for position in positions[:4]]
    more = f" and {len(positions) - 4} more" if len(positions) > 4 else ""
    return f", in most images at {'; '.join(named)}{more}"


def _of_grouping(data: xr.Dataset) -> Iterator[str]:
    values = data["grouping_silhouette"].to_numpy()
    if not np.isfinite(values).any():
        yield "No image has two objects large enough to score how tokens group."
        return
    scored = values[images_in_every_layer(values)]
    if not len(scored):
        yield "How tokens group is not summed up: no image has two objects large enough for the grid of every layer."
        return
    means = scored.mean(0)
    first, last = np.flatnonzero(np.isfinite(means))[[0, -1]]
    best = int(np.nanargmax(means))
    which = "the last layer" if last == len(means) - 1 else f"L{last}, the last layer that has one"
    whose = "1 image" if len(scored) == 1 else f"{len(scored):,} images"
    yield Sentence(
        f"Tokens of an object find together best after L{best} (silhouette {means[best]:z.3f}; {means[first]:z.3f} "
        f"after L{first}, {means[last]:z.3f} after {which}; {whose} with two objects or more).",
        measure="grouping_silhouette",
        layer=best,
        by_layer=means,
        by_layer_title="silhouette of tokens of objects",
    )


def _of_survival(study: ReportData, names: list[str]) -> Iterator[str]:
    half = AMOUNTS.index(0.5)
    named = {"random": "random", "salient": "salient", "non_salient": "non-salient"}
    left = {
        words: study.data[f"occlusion_{name}"].to_numpy()[:, half].astype(np.float64)
        for name, words in named.items()
        if f"occlusion_{name}" in names
    }
    if left:
        probabilities = ", ".join(f"{values.mean():z.2f} without {words} ones" for words, values in left.items())
        intact = float(study.data["probability"].to_numpy().mean())
        yield Sentence(
            f"With half of the patches lost the label keeps a probability of {probabilities} ({intact:z.2f} intact).",
            measure=next(f"occlusion_{name}" for name, words in named.items() if words in left),
        )
    if {"random", "salient"} <= set(left) and study.n_images > 1:
        difference = left["random"] - left["salient"]
        low, high = (float(end) for end in mean_interval(difference, limits=(-1.0, 1.0))[:2])
        verdict = "hurts more than" if low > 0 else "hurts less than" if high < 0 else "cannot be told from"
        yield Sentence(
            f"Losing salient patches {verdict} losing as many random ones: {difference.mean():+z.3f} of probability "
            f"beyond them (95 % interval {low:+z.3f} to {high:+z.3f}).",
            measure="occlusion_salient",
            images=_most_hurt(difference),
            caption="these are hurt most; the probability lost beyond random patches",
        )
    if "shuffle_probability" in names:
        cells = cells_that_divide(_grid(study))
        values = study.data["shuffle_probability"].to_numpy().mean(0)
        probabilities = ", ".join(f"{value:z.2f} with {n} x {n} cells" for n, value in zip(cells, values, strict=True))
        yield Sentence(f"With its patches displaced the label keeps {probabilities}.", measure="shuffle_probability")


def _most_hurt(difference: Float[np.ndarray, "image"]) -> list[tuple[int, str]]:
    """The images that lose most with their salient patches, beyond random ones."""
    return [(int(at), f"{difference[at]:+z.2f}") for at in np.argsort(-difference, kind="stable")[:N_SHOWN]]


def _parts(study: ReportData, names: list[str]) -> Iterator[Part]:
    if "token_norm" in names:
        if study.sample_words:
            yield Text(study.sample_words)
        if patch_norms(study.sample):
            yield Drawing(norms_by_layer(study.sample))
    if grouping_quantities(study.data):
        yield Drawing(grouping_by_layer(study.data))
    if any(name.startswith(("occlusion_", "shuffle_")) for name in names):
        yield Drawing(survival(study.data))
        yield _survival_table(study, names)
    yield readings(study, names)


def _survival_table(study: ReportData, names: list[str]) -> Table:
    rows = []
    for name in ("random", "salient", "non_salient"):
        if f"occlusion_{name}" in names:
            values = study.data[f"occlusion_{name}"].to_numpy().astype(np.float64)
            rows += [
                [f"{name.replace('_', '-')} patches lost", percent(amount), *_cells(values[:, at])]
                for at, amount in enumerate(AMOUNTS)
            ]
    if "shuffle_probability" in names:
        values = study.data["shuffle_probability"].to_numpy().astype(np.float64)
        rows += [
            ["displaced", f"{n} x {n} cells", *_cells(values[:, at])]
            for at, n in enumerate(cells_that_divide(_grid(study)))
        ]
    rows.insert(0, ["intact", "", *_cells(study.data["probability"].to_numpy().astype(np.float64))])
    reading = "Intervals: 95 %, over images." if study.n_images > 1 else ""
    return Table(
        "What is left of the label's probability",
        ("what", "how much", "probability", "95 %"),
        rows,
        reading,
        words=(0, 1),
    )


def _cells(values: np.ndarray) -> tuple[str, str]:
    if len(values) < 2:
        return f"{values.mean():z.3f}", ""
    low, high = (float(end) for end in mean_interval(values, limits=(0.0, 1.0))[:2])
    return f"{values.mean():z.3f}", f"{low:z.3f} to {high:z.3f}"


def _grid(study: ReportData) -> tuple[int, int]:
    grid = study.plan.grids[0]
    assert grid is not None, "shuffling needs a grid"
    return grid[0], grid[1]
