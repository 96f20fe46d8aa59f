#!/usr/bin/env python
"""Rows of docs/findings.md that one study answers, with 95 % intervals over its photographs.

    vitrail study MODEL PHOTOS --measures heads,regions,patterns --out STUDY
    vitrail study MODEL PHOTOS --masks MASKS --measures patches,tokens,objects,head_windows --out WITH_MASKS
    python experiments/findings.py STUDY [WITH_MASKS ..]

A study without a row's measures leaves the row out.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr

from vitrail import open_study
from vitrail.heads.object_summary import summarise_scores
from vitrail.heads.summary import heads_that_matter
from vitrail.stats import Interval, mean_interval, paired_interval

Row = Callable[[xr.Dataset], str]


def shown(mean: float, interval: Interval, digits: int = 3) -> str:
    """A mean with its interval, or with the reason why there is none."""
    if not np.isfinite(interval.low):
        return f"{mean:.{digits}f} (no interval: {interval.reason})"
    return f"{mean:.{digits}f} [{float(interval.low):.{digits}f}, {float(interval.high):.{digits}f}]"


def mean(values: np.ndarray, digits: int = 3, limits: tuple[float, float] | None = None) -> str:
    """Mean over the photographs that have a value."""
    if values.dtype != bool:
        values = np.asarray(values, np.float64)
    return shown(float(np.nanmean(values)), mean_interval(values, limits=limits), digits)


def by_layer(values: np.ndarray, digits: int = 3, limits: tuple[float, float] | None = None) -> str:
    """[image layer], each layer with its mean and interval."""
    return ", ".join(f"L{layer} {mean(each, digits, limits)}" for layer, each in enumerate(values.T))


def loss(study: xr.Dataset) -> np.ndarray:
    """[image layer head] what a photograph loses without a head: probability, or how far the output turns."""
    if "head_probability" in study:
        return (study["probability"] - study["head_probability"]).transpose("image", "layer", "head").to_numpy()
    return study["head_output_shift"].transpose("image", "layer", "head").to_numpy()


def heads_needed(study: xr.Dataset) -> str:
    """Heads that cost a photograph more than 0.1."""
    if "head_probability" not in study:
        counts, heads = (loss(study) > 0.1).sum((1, 2)), loss(study)[0].size
        return f"{mean(counts, 2)} of {heads} heads, {len(counts)} photographs (1 - cosine of the output)"
    counts, sure = heads_that_matter(study), study["probability"].to_numpy() > 0.9
    of_sure = f"{mean(counts[sure], 2)} where p > 0.9 ({int(sure.sum())})" if sure.any() else "p > 0.9 in none"
    return f"{mean(counts, 2)} of {loss(study)[0].size} heads, {len(counts)} photographs; {of_sure}"


def one_head(study: xr.Dataset) -> str:
    """The head that costs most, on average."""
    costs = loss(study)
    best = np.unravel_index(costs.mean(0).argmax(), costs.shape[1:])
    return f"L{best[0]}H{best[1]}: {mean(costs[:, *best], limits=(-1.0, 2.0))}"


def important_layers(study: xr.Dataset) -> str:
    """Mean cost of a head of each layer."""
    return by_layer(loss(study).mean(2), limits=(-1.0, 2.0))


def regions(study: xr.Dataset) -> str:
    """Cost of a head's patch block and of its class part, in thirds of the layers."""
    lost = study["probability"] - study["head_region_probability"]
    of_class, of_patches = np.moveaxis(lost.transpose("image", "layer", "head", ...).to_numpy(), -1, 0)
    said = []
    for layers in np.array_split(np.arange(of_class.shape[1]), 3):
        parts = (mean(part[:, layers].mean((1, 2)), limits=(-1.0, 1.0)) for part in (of_patches, of_class))
        said.append("L{} to L{}: patches {}, class {}".format(layers[0], layers[-1], *parts))
    return f"{'; '.join(said)} ({len(of_class)} photographs)"


def first_entropies(study: xr.Dataset) -> str:
    """Entropy of attention strength over hops, of the heads of L0."""
    entropies = study["strength_entropy"].transpose("image", "layer", "head").to_numpy()[:, 0]
    return ", ".join(f"L0H{head} {mean(each, 2)}" for head, each in enumerate(entropies.T))


def smallest_entropies(study: xr.Dataset) -> str:
    """Of each layer, that of the head whose mean is smallest."""
    entropies = study["strength_entropy"].transpose("image", "layer", "head").to_numpy()
    local = entropies.mean(0).argmin(1)
    return by_layer(np.stack([entropies[:, layer, head] for layer, head in enumerate(local)], 1), 2)


def clusters(study: xr.Dataset) -> str:
    """Clusters that the maps of all heads fall into, and the share of maps in none, of each image."""
    said = []
    for kind, words in (("patch", "patch patterns"), ("cls", "class patterns")):
        if f"pattern_{kind}_cluster" in study:
            cluster = study[f"pattern_{kind}_cluster"].transpose("image", "layer", "head").to_numpy()
            taken = np.isfinite(study[f"pattern_{kind}_xy"].transpose("image", "layer", "head", ...).to_numpy()).all(-1)
            none = np.where(taken, cluster < 0, np.nan).reshape(len(cluster), -1)
            count = study.attrs["patterns"][kind]["n_clusters"]
            said.append(f"{words} {count} clusters, {mean(np.nanmean(none, 1), limits=(0.0, 1.0))} of maps in none")
    return f"{'; '.join(said)} ({study.sizes['image']} photographs)"


def coders(study: xr.Dataset) -> str:
    """Held-out errors of the autoencoder and of PCA, and how much lower the first is, over the images held out."""
    said = []
    for kind, words in (("patch", "patch patterns"), ("cls", "class patterns")):
        fit = study.attrs["patterns"].get(kind, {})
        if fit.get("autoencoder_error") is not None:
            gain = fit["pca_error"] - fit["autoencoder_error"]
            low, high = fit.get("gain", (None, None))
            bounds = f"[{low:.4f}, {high:.4f}]" if low is not None else "(no interval)"
            errors = f"autoencoder {fit['autoencoder_error']:.4f}, PCA {fit['pca_error']:.4f}"
            said.append(f"{words} {errors}, PCA - autoencoder {gain:.4f} {bounds}, used: {fit['method']}")
    return "; ".join(said) or "no autoencoder was tried"


def tendencies(study: xr.Dataset) -> str:
    """Length of the tendency of the responsive field."""
    field = study["tendency"].transpose("image", "layer", "patch", "xy").to_numpy().astype(np.float64)
    return by_layer(np.hypot(field[..., 0], field[..., 1]).mean(2), 2)


def sinks(study: xr.Dataset) -> str:
    """Share of the interactions that sinks take."""
    return by_layer(study["sink_share"].transpose("image", "layer").to_numpy(), 3)


def windows(study: xr.Dataset) -> str:
    """What windows of the plan's mean area cost: one budget for all heads, and one area for each."""
    said = []
    for measure, words in (("flip", "answers change"), ("output_shift", "output turns by")):
        name = f"head_window_{measure}"
        if name not in study:
            continue
        budget, equal = (np.asarray(study[each]) for each in (name, f"{name}_equal"))
        ahead = shown(float(equal.mean() - budget.mean()), paired_interval(equal, budget, limits=(-2.0, 2.0)))
        limits = (0.0, 2.0)
        said.append(
            f"{words} {mean(budget, limits=limits)}, with one area {mean(equal, limits=limits)}, more by {ahead}"
        )
    return f"{'; '.join(said)} ({study.sizes['image']} photographs)"


def window_areas(study: xr.Dataset) -> str:
    """Area of the windows under one budget, mean over the heads of a layer."""
    return by_layer(study["head_window_area"].mean("head").transpose("image", "layer").to_numpy(), 2)


def grouping(name: str) -> Row:
    def row(study: xr.Dataset) -> str:
        values = study[f"grouping_{name}"].transpose("image", "layer").to_numpy().astype(np.float64)
        values = values[np.isfinite(values).all(1)]
        if not len(values):
            return "no photograph has it in every layer"
        middle = np.nanmean(values, 0).argmax()
        change = shown(float((values[:, -1] - values[:, 0]).mean()), paired_interval(values[:, -1], values[:, 0]))
        at = [f"L{layer} {mean(values[:, layer])}" for layer in sorted({0, int(middle), values.shape[1] - 1})]
        return f"{', '.join(at)}; last - first {change} ({len(values)} photographs)"

    return row


def objects(name: str) -> Row:
    def row(study: xr.Dataset) -> str:
        score = summarise_scores(study, f"object_{name}")
        if score is None:
            return "no photograph has objects"
        best = score.ranked[0]
        blob = f"; a blob in the middle {score.centre:.3f}" if np.isfinite(score.centre) else ""
        return (
            f"{'L{}H{}'.format(*best)} {score.mean[best]:.3f} [{score.low[best]:.3f}, {score.high[best]:.3f}], against "
            f"other photographs' objects {score.null[best]:.3f}, more by {score.excess[best]:.3f} "
            f"[{score.excess_low[best]:.3f}, {score.excess_high[best]:.3f}]{blob} ({score.n_images} photographs; "
            f"{int(score.may_be_best.sum())} heads may be the best)"
        )

    return row


ROWS: dict[str, tuple[tuple[str, ...], Row]] = {
    "Few heads matter for an image": (("head_output_shift|head_probability",), heads_needed),
    "The head that costs most": (("head_output_shift|head_probability",), one_head),
    "Cost of a head, by layer": (("head_output_shift|head_probability",), important_layers),
    "Which region of a head carries it": (("head_region_probability",), regions),
    "Entropy over hops of L0, nats": (("strength_entropy",), first_entropies),
    "Smallest entropy of a layer, nats": (("strength_entropy",), smallest_entropies),
    "Patterns of attention": (("pattern_patch_cluster|pattern_cls_cluster",), clusters),
    "Autoencoder or PCA, held-out error": (("pattern_patch_cluster|pattern_cls_cluster",), coders),
    "Tendency of the responsive field, patches": (("tendency",), tendencies),
    "Sinks take": (("sink_share",), sinks),
    "Windows under one budget": (("head_window_area",), windows),
    "Area of these windows": (("head_window_area",), window_areas),
    "Which head finds the objects (AUROC)": (("object_auroc",), objects("auroc")),
    ".. from a patch of the object": (("object_patch_auroc",), objects("patch_auroc")),
    **{
        f"Grouping: {words}": ((f"grouping_{name}",), grouping(name))
        for name, words in (
            ("silhouette", "silhouette"), ("purity", "purity"), ("in_object", "cosine in objects"),
            ("in_cluster", "cosine in clusters"), ("unique_label", "labels that own a cluster"),
        )
    },
}  # fmt: skip
"""Claim -> measures that it needs (`a|b`: one of them), and how a study's cell is written."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY")
    parser.add_argument("--partial", action="store_true", help="of a study that is not finished, what is there")
    arguments = parser.parse_args()
    for folder in arguments.studies:
        study = open_study(folder, partial=arguments.partial)
        print(f"\n## {Path(study.attrs['model']).name}, {study.sizes['image']} photographs\n")
        for claim, (needs, row) in ROWS.items():
            if all(any(name in study for name in each.split("|")) for each in needs):
                print(f"- {claim}: {row(study)}", flush=True)


if __name__ == "__main__":
    main()
