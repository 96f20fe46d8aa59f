"""The experiments behind docs/heads.md, on real photographs and two ImageNet models; one command each.

    python benchmarks/heads.py curves   --model vit_tiny --data ../shared/data     pruning curves of every ranking
    python benchmarks/heads.py estimate --model vit_tiny --data ../shared/data     what correcting the estimate saves
    python benchmarks/heads.py ablation --model vit_tiny --data ../shared/data     zero against the mean output
    python benchmarks/heads.py table    --model vit_tiny --data ../shared/data     importance over the photographs

Each prints markdown and goes on where it stopped: what is done lies in --work, batch by batch. Photographs are taken in
a fixed shuffled order, so that what is there at any time is a fair sample. Models and photographs come with no package.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from PIL import Image

from vitrail.heads import collectors
from vitrail.heads.pruning import predictions_without
from vitrail.heads.ranking import Area, Curves, area_table, orders, random_orders, scores
from vitrail.measure import ROOMS
from vitrail.study.run import run_study
from vitrail.vit.open import Vit, open_vit

MODELS = {"vit_tiny": "vit_tiny_patch16_224", "deit_tiny": "deit_tiny_patch16_224"}
COUNTS = (0, 1, 2, 4, 6, 9, 12, 16, 20, 25, 30, 36)
"""How many of the 36 heads are pruned."""

SWEPT = [name for name in ROOMS["heads"] if name.startswith("head_")]
BATCH = 8


# --- photographs and models ------------------------------------------------------------------------------------------


class Photographs:
    """The labelled photographs in a fixed order at random: the first --calibration of them rank, the others test."""

    def __init__(self, data: Path) -> None:
        classes = (data / "models/imagenet_classes.txt").read_text().splitlines()
        index = {line.split()[0]: number for number, line in enumerate(classes)}
        paths = sorted(path for folder in (data / "imagenet-sample").iterdir() for path in folder.iterdir())
        self.paths = [paths[number] for number in np.random.default_rng(0).permutation(len(paths))]
        self.labels = np.array([index[path.parent.name] for path in self.paths])

    def prepared(self, vit: Vit, places: Sequence[int]) -> torch.Tensor:
        images = [Image.open(self.paths[at]).convert("RGB") for at in places]
        return vit.prepare(images)


def opened(options: argparse.Namespace) -> Vit:
    name = MODELS[options.model]
    names = (options.data / "models/imagenet_classes.txt").read_text().splitlines()
    weights = options.data / f"models/{name}.safetensors"
    return open_vit(f"timm:{name}", weights=weights, precision=options.precision, class_names=names)


def calibration_study(
    options: argparse.Namespace, vit: Vit, photographs: Photographs, n_images: int, **choices: str
) -> xr.Dataset:
    """A study of the first photographs; goes on where it stopped."""
    ending = "".join(f"-{value}" for value in choices.values())
    folder = options.work / f"study-{options.model}-{n_images}{ending}"
    listed = options.work / f"photographs-{n_images}.txt"
    listed.write_text("".join(f"{path.absolute()}\n" for path in photographs.paths[:n_images]))
    return run_study(
        vit, listed, out=folder, measures=SWEPT, options=choices, batch_size=16, progress=sys.stderr.isatty()
    )


# --- curves ----------------------------------------------------------------------------------------------------------


def curves_experiment(options: argparse.Namespace) -> None:
    photographs, vit = Photographs(options.data), opened(options)
    study = calibration_study(options, vit, photographs, options.calibration)
    rankings = scores(study) | estimated_scores(options, vit, photographs, study)
    found = run_curves(options, vit, photographs, rankings)
    print_curves(options, found, len(study["image"]))
    if options.figure:
        from vitrail.figures.pruning import pruning_curves
        from vitrail.figures.style import save

        save(pruning_curves(found, MODELS[options.model]), options.figure)


def estimated_scores(
    options: argparse.Namespace, vit: Vit, photographs: Photographs, study: xr.Dataset
) -> dict[str, np.ndarray]:
    """The two first-order rankings of the calibration photographs: |g| (Michel et al.) and - g + g^2 / 2."""
    from vitrail.heads.estimate import loss_gradients

    file = options.work / f"gradients-{options.model}-{options.precision}-{len(study['image'])}.npz"
    if not file.exists():
        parts = []
        for start in range(0, len(study["image"]), BATCH):
            places = range(start, min(start + BATCH, len(study["image"])))
            labels = torch.as_tensor(photographs.labels[list(places)])
            gradients = loss_gradients(vit.tap(), vit.anatomy, photographs.prepared(vit, places), labels)
            parts.append(torch.stack(gradients, 1).float().numpy())
        save_arrays(file, {"gradient": np.concatenate(parts)})
    with np.load(file) as held:
        gradient = held["gradient"].astype(np.float64)
    return {"estimate, |g|": np.abs(gradient).mean(0), "estimate": (gradient**2 / 2 - gradient).mean(0)}


def run_curves(
    options: argparse.Namespace, vit: Vit, photographs: Photographs, rankings: dict[str, np.ndarray]
) -> Curves:
    """Batch by batch: predictions of test photographs with the first heads of every order pruned."""
    by_rank = {name: orders(ranking) for name, ranking in rankings.items()}
    heads = next(iter(by_rank.values()))
    at_random = random_orders(sorted(heads), options.random_orders, seed=1)
    ranked = [order for least in by_rank.values() for order in (least, least[::-1])]
    parts = []
    for start in range(0, options.test, BATCH):
        several = [*ranked, *(at_random if start < options.random_test else [])]
        places = list(range(options.calibration + start, options.calibration + min(start + BATCH, options.test)))
        file = options.work / f"curves-{options.model}-{options.precision}-{len(several)}-{places[0]:05d}.npz"
        if not file.exists() and not options.no_run:
            sets = [frozenset(order[:count]) for order in several for count in COUNTS]
            answers = predictions_without(vit, photographs.prepared(vit, places), sets)
            right = (answers == photographs.labels[places]).reshape(len(several), len(COUNTS), -1)
            save_arrays(file, {"right": right})
            print(f"{time.strftime('%H:%M:%S')} {options.model} {start + BATCH}", file=sys.stderr, flush=True)
        if file.exists():
            with np.load(file) as held:
                parts.append(held["right"])
    n_random = sum(len(part) > len(ranked) for part in parts)
    right = np.concatenate([part[: len(ranked)] for part in parts], -1)
    chance = np.concatenate([part[len(ranked) :] for part in parts[:n_random]], -1)
    names = list(by_rank)
    return Curves(
        np.array(COUNTS),
        {name: right[2 * at] for at, name in enumerate(names)},
        {name: right[2 * at + 1] for at, name in enumerate(names)},
        chance,
    )


def print_curves(options: argparse.Namespace, found: Curves, n_calibration: int) -> None:
    table = area_table(found)
    first = next(iter(found.least.values()))
    n_orders, _, n_random = found.random.shape
    print(
        f"\n{MODELS[options.model]}, {options.precision}: ranked on {n_calibration} photographs, tried on "
        f"{first.shape[1]} others ({n_orders} random orders on {n_random} of them); nothing pruned: top-1 "
        f"{first[0].mean():.3f}\n"
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
    return [
        name, f"{area.least[0]:.3f}", f"{area.most[0]:.3f}", interval(area.between), interval(area.over_random),
        interval(tuple(-value for value in (area.under_random[0], area.under_random[2], area.under_random[1]))),
        f"{area.beaten:.0%}",
    ]  # fmt: skip


# --- shared ----------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> str:
    return f"{values[0]:+.3f} [{values[1]:+.3f}, {values[2]:+.3f}]"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def save_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all."""
    unfinished = file.with_suffix(".tmp.npz")
    np.savez(unfinished, **arrays)
    unfinished.rename(file)


EXPERIMENTS = {"curves": curves_experiment}


def main() -> None:
    """One experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("--model", choices=list(MODELS), default="vit_tiny")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vitrail-heads")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--calibration", type=int, default=128, help="photographs that rank")
    parser.add_argument("--test", type=int, default=128, help="photographs that are tried")
    parser.add_argument("--random-test", type=int, default=48, help="of them, those for orders at random")
    parser.add_argument("--random-orders", type=int, default=20)
    parser.add_argument("--no-run", action="store_true", help="print what is there")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    EXPERIMENTS[options.experiment](options)


if __name__ == "__main__":
    main()
