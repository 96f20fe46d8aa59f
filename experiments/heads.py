"""The experiments behind docs/heads.md, on studies of real photographs, one command each.

    vitrail study timm:vit_tiny_patch16_224 PHOTOGRAPHS --class-names NAMES --weights FILE --measures heads -o STUDY

    python experiments/heads.py curves   STUDY      pruning curves of every ranking
    python experiments/heads.py table    STUDY...   what studies say of their heads; of two, how far they agree
    python experiments/heads.py classes  STUDY      the heads that matter for each class
    python experiments/heads.py estimate STUDY      what correcting the estimate by a sample saves
    python experiments/heads.py corrected STUDY CORRECTED   the same of a study with --importance corrected
    python experiments/heads.py ablation STUDY MEAN   zero against the mean output (MEAN: a study with --ablation mean)
    python experiments/heads.py regions  STUDY...   which part of a head carries it (of --measures heads,regions)

Each prints markdown and goes on where it stopped: what is done lies in --work, batch by batch. Photographs are taken in
a fixed order at random, so that what is there at any time is a fair sample.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from vitrail import open_study
from vitrail.analysis import SamplesImages, make_collectors
from vitrail.data import stored_image
from vitrail.figures.style import head_name
from vitrail.heads.classes import heads_by_class
from vitrail.heads.correction import exact_values
from vitrail.heads.estimate import loss_gradients
from vitrail.heads.summary import (
    correct_estimate,
    head_table,
    heads_that_matter,
    rank_agreement,
    value_limits,
)
from vitrail.pruning.masked import predictions_without
from vitrail.pruning.ranking import Area, Curves, area_table, halves, orders, random_orders, scores
from vitrail.stats import mean_interval, spearman
from vitrail.study.reopen import reopen
from vitrail.study.store import read_manifest
from vitrail.tap.tap import Readers

COUNTS = (0, 1 / 18, 1 / 9, 7 / 36, 5 / 18, 7 / 18, 19 / 36, 13 / 18, 1)
"""Shares of the heads that are pruned: of 36 heads 0, 2, 4, 7, 10, 14, 19, 26 and all."""

RANKED = ("probability", "divergence", "loss", "flips", "class token", "tokens")
"""Rankings that are tried, beside the two estimates; those in L2 order heads much as their cosines do."""

BATCH = 16


class ReportData:
    """A study, its model opened again, and its photographs."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.work = folder, options.work
        self.data: xr.Dataset = open_study(folder, partial=options.limit is not None).isel(image=slice(options.limit))
        refuse_without(self.data, folder, ("head_probability",), "heads")
        self.vit = reopen(folder)
        self.name = self.vit.name.partition(":")[2]
        self.labels = self.data["label"].to_numpy().astype(np.int64)
        self._manifest = read_manifest(folder)
        half = halves(self.data.sizes["image"])
        rng = np.random.default_rng(1)
        self.calibration, self.test = rng.permutation(half.calibration), rng.permutation(half.test)

    def prepared(self, places: Sequence[int]) -> torch.Tensor:
        """Photographs as the model's input."""
        return self.vit.prepare([stored_image(self._manifest, self._manifest.images[at]) for at in places])

    def file(self, kind: str, *depends_on: object) -> Path:
        """Where a partial result lies; another one for other photographs, heads, orders."""
        digest = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]
        return self.work / f"{kind}-{self.name}-{self.vit.precision}-{digest}.npz"


# --- curves ----------------------------------------------------------------------------------------------------------


def curves_experiment(options: argparse.Namespace) -> None:
    studied = ReportData(options.studies[0], options)
    held = scores(studied.data, studied.calibration)
    rankings = {name: held[name] for name in RANKED if name in held} | estimated_scores(studied, options)
    found = run_curves(studied, options, rankings)
    print_curves(studied, options, found)
    if options.figure:
        from vitrail.figures.pruning import pruning_curves
        from vitrail.figures.style import save

        save(pruning_curves(found, studied.name), options.figure)


def estimated_scores(studied: ReportData, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """The two first-order rankings, on some of the calibration photographs: |g| and - g + g^2 / 2."""
    gradient = gradients(studied, studied.calibration[: options.estimated]).astype(np.float64)
    return {"estimate, |g|": np.abs(gradient).mean(0), "estimate": (gradient**2 / 2 - gradient).mean(0)}


def gradients(studied: ReportData, places: np.ndarray) -> np.ndarray:
    """Derivative of the loss by each head's gate, [image layer head]."""
    parts = []
    for start in range(0, len(places), BATCH):
        part = places[start : start + BATCH].tolist()
        file = studied.file("gradients", [str(studied.data["image"].to_numpy()[at]) for at in part])
        if not file.exists():
            labels = torch.as_tensor(studied.labels[part])
            vit = studied.vit
            found = loss_gradients(vit.tap(), vit.anatomy, studied.prepared(part), labels, vit.task)
            save_arrays(file, {"gradient": torch.stack(found, 1).float().numpy()})
        with np.load(file) as held:
            parts.append(held["gradient"])
    return np.concatenate(parts)


def run_curves(studied: ReportData, options: argparse.Namespace, rankings: dict[str, np.ndarray]) -> Curves:
    """Batch by batch: which test photographs are right with the first heads of every order pruned."""
    by_rank = {name: orders(ranking) for name, ranking in rankings.items()}
    heads = next(iter(by_rank.values()))
    counts = [round(share * len(heads)) for share in COUNTS]
    at_random = random_orders(sorted(heads), options.random_orders, seed=1)
    ranked = [order for least in by_rank.values() for order in (least, least[::-1])]
    parts = []
    for start in range(0, options.test, BATCH):
        several = [*ranked, *(at_random if start < options.random_test else [])]
        places = studied.test[start : min(start + BATCH, options.test)].tolist()
        file = studied.file("curves", [str(studied.data["image"].to_numpy()[at]) for at in places], several, counts)
        if not file.exists() and not options.no_run:
            sets = [frozenset(order[:count]) for order in several for count in counts]
            answers = predictions_without(studied.vit, studied.prepared(places), sets)
            save_arrays(file, {"right": (answers == studied.labels[places]).reshape(len(several), len(counts), -1)})
            print(f"{time.strftime('%H:%M:%S')} {studied.name} {start + BATCH}", file=sys.stderr, flush=True)
        if file.exists():
            with np.load(file) as held:
                parts.append(held["right"])
    chance = [part[len(ranked) :] for part in parts if len(part) > len(ranked)]
    right = np.concatenate([part[: len(ranked)] for part in parts], -1)
    least = {name: right[2 * at] for at, name in enumerate(by_rank)}
    most = {name: right[2 * at + 1] for at, name in enumerate(by_rank)}
    return Curves(np.array(counts), least, most, np.concatenate(chance, -1))


def print_curves(studied: ReportData, options: argparse.Namespace, found: Curves) -> None:
    table = area_table(found)
    first = next(iter(found.least.values()))
    n_orders, _, n_random = found.random.shape
    print(
        f"\n{studied.name}, {studied.vit.precision}: ranked on {len(studied.calibration)} photographs (estimates on "
        f"{options.estimated}), tried on {first.shape[1]} others ({n_orders} random orders on {n_random} of them); "
        f"nothing pruned: top-1 {first[0].mean():.3f}\n"
    )
    head = [
        "ranking", "area, least first", "area, most first", "between", "least over random", "random over most",
        "random orders beaten",
    ]  # fmt: skip
    print(markdown(head, [area_row(name, area) for name, area in table.items()]))
    best = next(iter(table))
    rows = [
        [str(count), f"{found.least[best][at].mean():.3f}", f"{found.random[:, at].mean():.3f}",
         f"{found.random[:, at].mean(1).min():.3f} .. {found.random[:, at].mean(1).max():.3f}",
         f"{found.most[best][at].mean():.3f}"]
        for at, count in enumerate(found.counts)
    ]  # fmt: skip
    print(f"\nTop-1 by number of heads pruned, ranking `{best}`:\n")
    print(markdown(["heads pruned", "least first", "random, mean", "random, range", "most first"], rows))


def area_row(name: str, area: Area) -> list[str]:
    under, low, high = area.under_random
    return [
        name, f"{area.least[0]:.3f}", f"{area.most[0]:.3f}", interval(area.between), interval(area.over_random),
        interval((-under, -high, -low)), f"{area.beaten:.0%}",
    ]  # fmt: skip


# --- importance ------------------------------------------------------------------------------------------------------


def table_experiment(options: argparse.Namespace) -> None:
    """What studies say of their heads: how many matter, which, and how far two models agree."""
    studies = [open_study(folder, partial=True) for folder in options.studies]
    for folder, study in zip(options.studies, studies, strict=True):
        refuse_without(study, folder, ("head_probability",), "heads")
    tables = [head_table(study) for study in studies]
    for study, table in zip(studies, tables, strict=True):
        print(f"\n{study.attrs['model']}, {study.sizes['image']} photographs, {study.attrs['precision']}\n")
        print(counted(study))
        print(most_important(table))
    if len(studies) == 2:
        print(agreement(studies, tables))


def counted(study: xr.Dataset) -> str:
    """How many heads an image needs."""
    counts = heads_that_matter(study)
    sure = study["probability"].to_numpy() > 0.9
    rows = []
    for name, some in (("all", counts), ("probability over 0.9", counts[sure])):
        low, high, _ = mean_interval(some)
        rows.append([
            name, str(len(some)), f"{some.mean():.2f} [{low:.2f}, {high:.2f}]", f"{np.median(some):.0f}",
            f"{np.quantile(some, 0.95):.0f}", f"{(some == 0).mean():.0%}", f"{(some <= 3).mean():.0%}",
        ])  # fmt: skip
    head = ["photographs", "n", "heads that matter, mean", "median", "95 %", "none", "at most 3"]
    return markdown(head, rows)


def most_important(table: xr.Dataset, shown: int = 8) -> str:
    """The heads that cost most."""
    drop = table["drop_mean"].to_numpy()
    order = np.argsort(-np.nan_to_num(drop, nan=-np.inf), axis=None)[:shown]
    value = lambda name, at: float(table[name].to_numpy()[at])  # noqa: E731
    rows = []
    for at in zip(*np.unravel_index(order, drop.shape), strict=True):
        rows.append([
            "L{}H{}".format(*at),
            *(
                f"{value(name, at):.3f} [{value(f'{of}_low', at):.3f}, {value(f'{of}_high', at):.3f}]"
                for name, of in (
                    ("drop_mean", "drop"), ("drop_median", "drop_median"), ("drop_q95", "drop_q95"),
                    ("drop_share_large", "drop_share_large"), ("flip_share", "flip_share"), ("accuracy", "accuracy"),
                )
            ),
        ])  # fmt: skip
    head = ["head", "p lost, mean", "median", "95 % quantile", "over 0.1", "flips", "top-1 without"]
    return f"\nNothing pruned: top-1 {table.attrs['accuracy']:.3f}\n\n{markdown(head, rows)}"


def agreement(studies: Sequence[xr.Dataset], tables: Sequence[xr.Dataset]) -> str:
    """Rank correlation over heads of two models, by measure, and how much of the loss each layer holds."""
    names = ["drop_mean", "head_divergence_mean", "flip_share", "head_cls_shift_mean", "head_token_shift_mean"]
    rows = [[name, f"{spearman(*(table[name].to_numpy().ravel() for table in tables)):+.2f}"] for name in names]
    drops = [(study["probability"] - study["head_probability"]).mean("head").to_numpy() for study in studies]
    layers = [[f"L{layer}", *(lost(of_model[:, layer]) for of_model in drops)] for layer in range(drops[0].shape[1])]
    return (
        f"\n{markdown(['measure', 'Spearman over heads, first and second model'], rows)}\n\n"
        f"{markdown(['p lost, mean over the heads of a layer [95 %]', 'first model', 'second model'], layers)}"
    )


def classes_experiment(options: argparse.Namespace) -> None:
    """The heads that matter for each class."""
    study = open_study(options.studies[0])
    print(f"\n{study.attrs['model']}, {study.sizes['image']} photographs\n")
    rows = []
    for found in heads_by_class(study, n_heads=2):
        drops = [
            f"{head_name(head.layer, head.head)} {head.drop:.2f} [{head.low:.2f}, {head.high:.2f}], others "
            f"{head.elsewhere:.2f}{' *' if head.is_own else ''}"
            for head in found.heads
        ]
        rows.append([found.name, str(found.n_images), f"{found.accuracy:.2f}", *drops, found.note or "-"])
    head = ["class", "n", "top-1", "first head: p lost, interval, mean elsewhere", "second head", "note"]
    print(markdown(head, rows))


# --- estimate and ablation -------------------------------------------------------------------------------------------


def estimate_experiment(options: argparse.Namespace) -> None:
    """The estimate on all photographs, corrected by the exact sweep on a sample of them, against the sweep on all."""
    studied = ReportData(options.studies[0], options)
    places = studied.calibration[: options.images]
    gradient = gradients(studied, places).astype(np.float64)
    rough = gradient**2 / 2 - gradient
    exact = studied.data["head_loss_change"].to_numpy()[places].astype(np.float64)
    print(f"\n{studied.name}: change of loss in nats, {len(places)} photographs; rank correlation over heads of the")
    print(f"estimated and the exact means {rank_agreement(rough, exact):.2f}\n")
    rows = []
    for size in (16, 32, 64):
        found = [correction(rough, exact, size, seed) for seed in range(20)]
        width, plain, covered, error, same = np.mean(found, 0)
        images = size * (plain / width) ** 2
        passes = studied_cost(studied)
        cost = size * passes[0] + len(places) * passes[1]
        rows.append([
            str(size), f"{plain:.3f}", f"{width:.3f}", f"{images:.0f}", f"{covered:.0%}", f"{error:.3f}",
            f"{same:.3f}", f"{cost / (images * passes[0]):.2f}",
        ])  # fmt: skip
    head = [
        "sample, photographs", "width, sample alone", "width, corrected", "photographs for that width, exactly",
        "intervals that hold the mean of all", "mean error, corrected", "mean error, sample alone",
        "cost / exact at equal width",
    ]  # fmt: skip
    print(markdown(head, rows))
    sweep, guess = studied_cost(studied)
    cost = least_cost(rough, exact, guess / sweep)
    low, middle, high = np.quantile(cost, (0, 0.5, 1))
    print(
        f"\nAn estimate costs {guess / sweep:.2f} of an exact sweep ({guess:.2f} and {sweep:.2f} s an image)."
        f"\nLeast cost at equal width, over heads: {low:.2f} .. {high:.2f}, median {middle:.2f}; below 1 for "
        f"{(cost < 1).sum()} of {cost.size} heads."
    )


def least_cost(rough: np.ndarray, exact: np.ndarray, ratio: float) -> np.ndarray:
    """Per head the least cost of the corrected mean over that of exact values alone at equal width.

    Double sampling at its best split, (sqrt(1 - r^2) + sqrt(c r^2))^2 with r the correlation over photographs and c
    what an estimate costs in exact sweeps (Cochran 1977, section 12.3). Above 1: better without the estimate.
    """
    centred = [values.reshape(len(values), -1) - values.reshape(len(values), -1).mean(0) for values in (rough, exact)]
    r = (centred[0] * centred[1]).mean(0) / (centred[0].std(0) * centred[1].std(0))
    return np.asarray((np.sqrt(1 - r**2) + np.sqrt(ratio * r**2)) ** 2)


def correction(rough: np.ndarray, exact: np.ndarray, size: int, seed: int) -> list[float]:
    """Median width over heads with and without the estimate, coverage of the mean of all, mean errors."""
    sample = np.random.default_rng(seed).permutation(len(rough))[:size]
    fixed = correct_estimate(rough, sample, exact[sample])
    truth = exact.mean(0)
    alone = mean_interval(exact[sample])
    inside = (fixed.low <= truth) & (truth <= fixed.high)
    return [
        float(np.median(fixed.high - fixed.low)), float(np.median(alone.high - alone.low)), float(inside.mean()),
        float(np.abs(fixed.mean - truth).mean()), float(np.abs(exact[sample].mean(0) - truth).mean()),
    ]  # fmt: skip


def studied_cost(studied: ReportData) -> tuple[float, float]:
    """Processor seconds an image of the exact sweep and of the estimate, measured once."""
    file = studied.file("cost")
    if not file.exists():
        seconds = [seconds_an_image(studied, importance) for importance in ("exact", "estimate")]
        save_arrays(file, {"seconds": np.array(seconds)})
    with np.load(file) as held:
        exact, rough = held["seconds"]
    return float(exact), float(rough)


def seconds_an_image(studied: ReportData, importance: str) -> float:
    """Processor seconds that the change of loss without each head takes, on one batch."""
    chosen = studied.calibration[:BATCH]
    images, labels, tap = studied.prepared(chosen.tolist()), studied.labels[chosen], studied.vit.tap()
    names = ["head_loss_change", *(["head_loss_change_exact"] if importance == "corrected" else [])]
    collectors = make_collectors(studied.vit, names, {"importance": importance})
    begun = time.process_time()
    keep = any(each.replays for each in collectors)
    replay, logits = tap.record(images, Readers.join([each.readers() for each in collectors]), keep=keep)
    for each in collectors:
        if isinstance(each, SamplesImages):
            each.take_places(range(len(images)))
        each.finish(tap, replay, logits, labels)
    return (time.process_time() - begun) / len(images)


def corrected_experiment(options: argparse.Namespace) -> None:
    """Two studies of the same photographs, exact and corrected: widths of intervals, and what they cost."""
    exact, corrected = (open_study(folder) for folder in options.studies)
    if exact["image"].to_numpy().tolist() != corrected["image"].to_numpy().tolist():
        raise SystemExit("The two studies are not of the same images in the same order.")
    tables, n_images = [head_table(exact), head_table(corrected)], exact.sizes["image"]
    studied = ReportData(options.studies[0], options)
    ways = ("exact", "estimate", "corrected")
    runs = [[seconds_an_image(studied, way) for way in ways] for _ in range(5)]  # in turn: what else runs hits all
    seconds = dict(zip(ways, np.median(runs, 0).tolist(), strict=True))
    costs = ", ".join(f"{way} {each:.2f}" for way, each in seconds.items())
    n_exact = np.count_nonzero(~np.isnan(corrected["head_loss_change_exact"].to_numpy()).all((1, 2)))
    print(
        f"\n{exact.attrs['model']}, {n_images} photographs, {n_exact} of them exact in the corrected study; processor"
    )
    print(f"seconds an image: {costs}\n")
    rows = []
    for name in ("drop", "head_loss_change"):
        values = exact_values(corrected, name)
        alone = mean_interval(values[~np.isnan(values).all((1, 2))], limits=value_limits(name))
        widths = [float(np.nanmedian(table[f"{name}_high"] - table[f"{name}_low"])) for table in tables]
        widths.append(float(np.nanmedian(alone.high - alone.low)))
        truth = tables[0][f"{name}_mean"].to_numpy()
        means = (tables[1][f"{name}_mean"].to_numpy(), np.nanmean(values, 0), estimated_mean(corrected, name))
        errors = [f"{float(np.nanmean(np.abs(each - truth))):.3f}" for each in means]
        holds = (tables[1][f"{name}_low"] <= truth) & (truth <= tables[1][f"{name}_high"])
        equal = n_images * (widths[0] / widths[1]) ** 2
        cost = n_images * seconds["corrected"] / (equal * seconds["exact"])
        rows.append([
            name, *(f"{width:.3f}" for width in widths), f"{equal:.0f}", f"{float(holds.mean()):.0%}",
            *errors, f"{cost:.2f}",
        ])  # fmt: skip
    head = [
        "mean of", "width, exact", "width, corrected", "width, sample alone", "photographs for that width, exactly",
        "intervals that hold the exact mean", "mean error, corrected", "of the sample alone", "of the estimate",
        "cost / exact at equal width",
    ]  # fmt: skip
    print(markdown(head, rows))


def estimated_mean(study: xr.Dataset, name: str) -> np.ndarray:
    """Mean of the estimate alone, [layer head]."""
    if name != "drop":
        return np.asarray(study[name].to_numpy().mean(0, dtype=np.float64))
    without = study["head_probability"].to_numpy().mean(0, dtype=np.float64)
    return np.asarray(float(study["probability"].mean(dtype=np.float64)) - without)


def ablation_experiment(options: argparse.Namespace) -> None:
    """Two studies of the same photographs, by zero and by the mean: which heads matter in each."""
    zero, mean = (open_study(folder) for folder in options.studies)
    both = sorted(set(zero["image"].to_numpy()) & set(mean["image"].to_numpy()))
    tables = [head_table(study.sel(image=both)) for study in (zero, mean)]
    print(f"\n{zero.attrs['model']}, {len(both)} photographs\n")
    rows = []
    for name in ("drop_mean", "head_divergence_mean", "head_loss_change_mean", "head_cls_shift_mean"):
        one, two = (table[name].to_numpy() for table in tables)
        rows.append([
            name, f"{np.nanmean(one):.4f}", f"{np.nanmean(two):.4f}", f"{spearman(one.ravel(), two.ravel()):+.2f}",
            f"{(two < one).mean():.0%}",
        ])  # fmt: skip
    print(
        markdown(
            ["measure", "zero, mean over heads", "mean output", "Spearman over heads", "heads that matter less"], rows
        )
    )
    fall = tables[0]["head_divergence_mean"] - tables[1]["head_divergence_mean"]
    order = np.argsort(-fall.to_numpy(), axis=None)[:5]
    rows = [
        ["L{}H{}".format(*at), *(f"{float(table['head_divergence_mean'].to_numpy()[at]):.4f}" for table in tables)]
        for at in zip(*np.unravel_index(order, fall.shape), strict=True)
    ]
    print(
        f"\nWhere zero says much more than the mean:\n\n{markdown(['head', 'bits, zero', 'bits, mean output'], rows)}"
    )


def regions_experiment(options: argparse.Namespace) -> None:
    """Which part of a head carries it: the rows and columns of the class token, or attention between patches."""
    for folder in options.studies:
        study = open_study(folder, partial=options.limit is not None).isel(image=slice(options.limit))
        refuse_without(study, folder, ("head_probability", "head_region_probability"), "heads,regions")
        before = study["probability"].to_numpy().astype(np.float64)
        whole = before[:, None, None] - study["head_probability"].to_numpy()
        of_class, of_patches = np.moveaxis(
            before[:, None, None, None] - study["head_region_probability"].to_numpy(), -1, 0
        )
        print(f"\n{study.attrs['model']}, {len(before)} photographs; probability of the label lost, 95 % intervals\n")
        order = np.argsort(-whole.mean(0), axis=None)[:8]
        rows = [
            [head_name(*at), *(lost(part[:, *at]) for part in (whole, of_class, of_patches))]
            for at in zip(*np.unravel_index(order, whole.shape[1:]), strict=True)
        ]
        print(markdown(["head", "without it", "without class rows and columns", "without patches to patches"], rows))
        lead = mean_interval(of_class - of_patches, limits=(-2.0, 2.0))
        matter = mean_interval(whole, limits=(-1.0, 1.0)).low > 0
        verdicts = {
            "the class part costs more": (lead.low > 0) & matter,
            "patches to patches cost more": (lead.high < 0) & matter,
            "not told apart": (lead.low <= 0) & (lead.high >= 0) & matter,
        }
        counts = ", ".join(f"{words}: {int(heads.sum())}" for words, heads in verdicts.items())
        print(f"\nOf {int(matter.sum())} heads of {matter.size} that cost something (interval above 0): {counts}.")
        thirds = np.array_split(np.arange(len(matter)), 3)
        rows = [
            [f"L{layers[0]} to L{layers[-1]}"]
            + [lost(part[:, layers].mean((1, 2))) for part in (whole, of_class, of_patches)]
            for layers in thirds
        ]
        print("\n" + markdown(["layers, mean of their heads", "head", "class part", "patches to patches"], rows))


# --- shared ----------------------------------------------------------------------------------------------------------


def refuse_without(study: xr.Dataset, folder: Path, names: Sequence[str], measures: str) -> None:
    """Ends with a sentence where a study lacks what an experiment reads."""
    missing = [name for name in names if name not in study]
    if not missing:
        return
    left_out = study.attrs.get("left_out", {})
    reasons = [f"{name}: {left_out[name]}" for name in missing if name in left_out]
    if reasons:
        raise SystemExit(f"{folder} does not hold {', '.join(missing)} ({'; '.join(reasons)}).")
    raise SystemExit(
        f"{folder} does not hold {', '.join(missing)}. The same study goes on with them: vitrail study MODEL PHOTOS "
        f"--measures {measures} --out {folder}, with the model and the photographs that it was made of."
    )


def lost(probability: np.ndarray) -> str:
    """Mean over photographs with its interval."""
    low, high, _ = mean_interval(probability, limits=(-1.0, 1.0))
    return interval((float(probability.mean()), float(low), float(high)))


def interval(values: Sequence[float]) -> str:
    return f"{values[0]:+.3f} [{values[1]:+.3f}, {values[2]:+.3f}]"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        " | ".join(head),
        " | ".join("---" for _ in head),
        *(" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows),
    ]
    return "\n".join(f"| {line} |" for line in lines)


def save_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all."""
    unfinished = file.with_suffix(".tmp.npz")
    np.savez(unfinished, **arrays)
    unfinished.rename(file)


EXPERIMENTS = {
    "curves": curves_experiment,
    "estimate": estimate_experiment,
    "corrected": corrected_experiment,
    "ablation": ablation_experiment,
    "regions": regions_experiment,
    "table": table_experiment,
    "classes": classes_experiment,
}


def main() -> None:
    """One experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vitrail-heads")
    parser.add_argument("--limit", type=int, help="only the first images of the study, which may be unfinished")
    parser.add_argument("--estimated", type=int, default=96, help="photographs that the estimates rank on")
    parser.add_argument("--images", type=int, default=192, help="photographs that the estimate experiment looks at")
    parser.add_argument("--test", type=int, default=96, help="photographs that are tried")
    parser.add_argument("--random-test", type=int, default=32, help="of them, those for orders at random")
    parser.add_argument("--random-orders", type=int, default=20)
    parser.add_argument("--no-run", action="store_true", help="print what is there")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    EXPERIMENTS[options.experiment](options)


if __name__ == "__main__":
    main()
