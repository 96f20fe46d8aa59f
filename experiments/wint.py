"""Does WinT gain anything, and against what: arms at equal steps and equal order of data, several seeds.

    python experiments/wint.py scratch  [--data ../shared/data] [--seeds 0 1 2] [--only ARM ...]    six arms, CIFAR-10
    python experiments/wint.py tuned    the same, all begun from the trained control of their seed
    python experiments/wint.py long     20 epochs with mixup and cutmix, arms in the order that gives pairs earliest
    python experiments/wint.py transfer the control and WinT go on to 25 look-alike animals; `longer`: twice as long
    python experiments/wint.py table    docs/wint/arms.md from the records, without training
    python experiments/wint.py sparse   docs/wint/sparse.md: dense, masked and block-sparse attention on this machine
                                   (`python benchmarks/wint.py sparse` prints it alone, of any grids)
    python experiments/wint.py pictures docs/wint/*.png: a trained WinT and its teacher on a photograph; and
                                   docs/wint/agreement.md: predicted against measured windows
    python experiments/wint.py beside   docs/wint/beside.md: studies of a trained WinT and of its ViT

Each run is resumable (kill it, call again) and leaves a small record under docs/wint/runs, from which the table is
made; models stay in --work.
"""

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from vitrail.figures import wint as figures
from vitrail.figures.style import save
from vitrail.models.open import open_vit
from vitrail.outputs import write_atomically
from vitrail.study.run import run_study
from vitrail.windows.collect import predict_windows
from vitrail.windows.evaluate import Evaluation, evaluate
from vitrail.windows.window_maps import windows_as_study
from vitrail.wint.batches import normalise, read_images
from vitrail.wint.folder import open_model
from vitrail.wint.model import WindowHead, hard_mask, soft_bias, window_heads
from vitrail.wint.recipe import Recipe, recipe_from
from vitrail.wint.sparse import BLOCK, CUT, attend, block_mask, open_share, soft_reach, sparse_attention
from vitrail.wint.teacher import Teacher
from vitrail.wint.train import train

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "wint"
RUNS = DOCS / "runs"
GRID = (8, 8)
LONGEST = 7

START_PATCHES = ((3, 1.4, 0.4, 1.4), (1.4, 3, 1.4, 0.4), (0.4, 1.4, 3, 1.4), (1.4, 0.4, 1.4, 3))
"""Where the windows of the four heads begin: left, top, right, bottom. One head looks left, one up, one right, one
down."""

SHAPE = {"patch_px": 4, "width": 128, "depth": 6, "heads": 4, "mlp_ratio": 3.0, "class_token": False}
RUN = {"batch_size": 64, "label_smoothing": 0.1, "log_steps": 71, "checkpoint_steps": 200, "precision": "bf16",
       "compile": True}  # fmt: skip
EPOCHS = {"scratch": 2, "long": 20, "tuned": 0.6, "transfer": 3, "longer": 6}
LONG_RUN = {"mixup": 0.2, "cutmix": 0.5, "evaluate_epochs": 2, "log_steps": 78}
OPTIMISER = {"lr": 6e-4, "weight_decay": 0.05, "warmup_epochs": 0.3}
LONG_OPTIMISER = {"lr": 1e-3, "weight_decay": 0.05, "warmup_epochs": 1.0}
TUNING = {"lr": 3e-4, "weight_decay": 0.05, "warmup_epochs": 0.1}
DISTILLATION = {"weight": 0.5, "area": 15, "batch_share": 0.25, "until": 0.6}
BUDGET = {"shared_budget": True, "batch_share": 1 / 32}
"""Every box of an image is priced, a quarter of a second of a core: shown as often, a run takes seven hours."""
WINDOWS = {
    "scratch": {"lr_scale": 3.0},
    "long": {"lr_scale": 3.0},
    "tuned": {"lr_scale": 20.0},
    "transfer": {"lr_scale": 1.0, "temperature": 0.15},
}
WINDOWS["longer"] = WINDOWS["transfer"]
CIFAR = {"train": "cifar10/train.npz", "test": "cifar10/test.npz", "classes": 10}
LONG_CIFAR = {**CIFAR, "limit": 25_000}
ANIMALS = {"train": "fine-animals/train.npz", "test": "fine-animals/val.npz", "classes": 25}

ARMS = {
    "control": "1 ViT, no windows",
    "wint": "2 WinT, guided by the trained control of its seed",
    "wint-free": "3 WinT, no teacher (lambda = 0)",
    "wint-shuffled": "4 WinT, the teacher's boxes shuffled between images",
    "fixed-local": "5 fixed local window of the same mean area, one for all heads",
    "frozen": "6 windows that stay where WinT's begin, one a head",
    "hard": "7 WinT, no teacher, hard edges for the last 30 % of training",
    "hard-start": "8 WinT, no teacher, hard edges from the start (straight-through gradient)",
    "wint-budget": "9 WinT, the teacher's boxes share one budget between its heads",
}
"""In the order in which they are run: later arms need what earlier ones leave."""

PHASES = {
    "scratch": "From scratch, CIFAR-10",
    "long": "From scratch, 25,000 images of CIFAR-10, 20 epochs with mixup and cutmix",
    "tuned": "Fine-tuned from the trained ViT, CIFAR-10",
    "transfer": "Transfer to 25 look-alike animals",
    "longer": "The same transfer, twice as long",
}
ARMS_OF = {"scratch": tuple(ARMS)[:6], "long": tuple(ARMS), "tuned": tuple(ARMS)[:5], "transfer": ("control", "wint")}
ARMS_OF["longer"] = ARMS_OF["transfer"]
TRANSFERS = ("transfer", "longer")
LONG_QUEUE = (
    *((arm, seed) for seed in (0, 1) for arm in tuple(ARMS)[:5]),
    ("frozen", 0), ("hard", 0),
    *((arm, 2) for arm in tuple(ARMS)[:4]),
    ("frozen", 1), ("hard", 1), ("hard-start", 0), ("hard-start", 1),
    ("wint-budget", 2), ("wint-budget", 0),
)  # fmt: skip
"""Arms and seeds of the long runs, in the order in which differences that are paired by seed become known."""

BESIDE = {
    "p lost": "probability lost without the layer's most important head",
    "attention_distance": "mean attention distance, patches", "strength_entropy": "entropy of attention strength",
    "interaction_distance": "mean distance of interactions, patches", "field_size": "responsive field, share of grid",
    "tendency": "length of the tendency, patches", "hub": "hubs, share of patches",
    "predicted_area": "windows, share of grid",
    "predicted_overlap": "predicted against measured windows", "predicted_overlap_open": "the same without the mask",
    "predicted_overlap_moved": "the same, moved at random",
}  # fmt: skip
"""What is measured in a trained WinT and its ViT."""

AGREEMENT = {
    "its queries and keys without the mask": "overlap_open", "its attention": "overlap_own",
    "its teacher": "overlap_teacher", "moved at random": "overlap_chance",
}  # fmt: skip
"""What predicted windows are compared with, and the number of an evaluation that tells."""

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*PHASES, "table", "sparse", "pictures", "beside"])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / ".build" / "wint")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(ARMS), default=list(ARMS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "sparse":
        (DOCS / "sparse.md").write_text(text := crossover())
        print(text)
        return
    if options.what == "beside":
        (DOCS / "beside.md").write_text(beside(options.data, options.work))
        return
    if options.what == "pictures":
        draw(options.data, options.work)
        return
    for arm, seed in queue(options.what):
        if arm in options.only and seed in options.seeds:
            run_arm(options.what, arm, seed, options.data, options.work)
    text = "\n".join(table(phase, records(phase)) for phase in PHASES if records(phase))
    if text:
        (DOCS / "arms.md").write_text(text)
    console.print(text or "No run has left a record yet.", markup=False)


def queue(what: str) -> tuple[tuple[str, int], ...]:
    """The arms and seeds of a phase in the order of their runs."""
    if what == "long":
        return LONG_QUEUE
    return tuple((arm, seed) for seed in (0, 1, 2) for arm in ARMS_OF.get(what, ()))


# --- runs ------------------------------------------------------------------------------------------------------------


def run_arm(phase: str, arm: str, seed: int, data: Path, work: Path) -> None:
    """Trains one arm unless its record is there."""
    name = f"{phase}-{arm}-{seed}"
    record, out = RUNS / f"{name}.json", work / name
    description = describe_run(phase, arm, seed)
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    if record.is_file() and json.loads(record.read_text())["recipe"] == digest:
        return
    spent = out / "spent_s"  # unknown where an earlier run was killed before it could write it
    before = float(spent.read_text()) if spent.is_file() else math.nan if out.is_dir() else 0.0
    began = time.process_time()
    try:
        results = train_with_bar(name, recipe(description, data, work), out)
    finally:
        if out.is_dir():
            spent.write_text(str(before + time.process_time() - began))
    rounded = (
        {}
        if not has_windows(out)
        else {"accuracy_rounded": hard_edge_accuracy(out, data / description["data"]["test"])}
    )
    kept = {
        "phase": phase, "arm": arm, "seed": seed, "recipe": digest, **asdict(results), **rounded, "steps": steps(out),
        **({"core_s": round(core_s, 1)} if math.isfinite(core_s := float(spent.read_text())) else {}),
        "parameters": sum(parameter.numel() for parameter in open_model(out / "last").parameters()),
        "torch": torch.__version__,
    }  # fmt: skip
    RUNS.mkdir(parents=True, exist_ok=True)
    write_atomically(record, lambda beside: beside.write_text(json.dumps(kept, indent=1) + "\n"))


def train_with_bar(title: str, wanted: Recipe, out: Path) -> Any:
    """Trains with a bar."""
    with Progress(console=console) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int, word: str) -> None:
            task = tasks.setdefault(what, bars.add_task(what, total=total) if what not in tasks else None)
            bars.update(task, completed=done, total=total, description=f"{title}: {what} {word}")

        return train(wanted, out, progress=progress)


def has_windows(out: Path) -> bool:
    """Whether a finished run's patches predict windows."""
    return any(isinstance(head, WindowHead) for head in window_heads(open_model(out / "last")))


@torch.no_grad()
def hard_edge_accuracy(out: Path, test: Path) -> float:
    """Test accuracy if sides are rounded and edges hard."""
    model, images = open_model(out / "last").eval(), read_images(str(test))
    for head in window_heads(model):
        head.hard = True
    pixels = images.pixels(GRID[0] * SHAPE["patch_px"])
    parts = [slice(start, start + 250) for start in range(0, len(images), 250)]
    right = [int((model(normalise(pixels[part])).argmax(1) == images.labels[part]).sum()) for part in parts]
    return sum(right) / len(images)


def steps(out: Path) -> int:
    """Steps of the optimiser that a run took."""
    return int((out / "epochs.csv").read_text().splitlines()[-1].split(",")[0])


def describe_run(phase: str, arm: str, seed: int) -> dict[str, Any]:
    """An arm's recipe as plain data, with paths by name only."""
    shares = [[side / LONGEST for side in window] for window in START_PATCHES]
    model: dict[str, Any] = {**SHAPE, "windows": "predicted", "start": shares}
    distillation: dict[str, Any] = {}
    if phase == "tuned":
        model |= {"start": [[0.982] * 4] * 4, "start_from": f"scratch-control-{seed}/last"}
    if phase in TRANSFERS:
        model |= {"start_from": f"scratch-{arm}-{seed}/last", "keep_windows": True}
    if arm == "control":
        model |= {"windows": "none", "start": [[0.5] * 4]}
    if arm == "fixed-local":
        model |= {"windows": "fixed", "start": [closest_window(mean_area(f"{phase}-wint-{seed}"))]}
    hard = {"hard": {"edges": "hard", "hard_from": 0.7}, "hard-start": {"edges": "hard", "hard_from": 0.0}}
    cut = {"cut": 0.001} if phase == "long" else {}
    soft = {} if arm in ("control", "fixed-local") else {"edges": "soft"} | cut
    windows = WINDOWS[phase] | hard.get(arm, soft)
    if arm == "frozen":
        windows |= {"lr_scale": 0.0}
    if arm in ("wint", "wint-shuffled", "wint-budget") and phase not in TRANSFERS:
        begun = "long" if phase == "long" else "scratch"
        distillation = {**DISTILLATION, "teacher": f"{begun}-control-{seed}/last", "shuffled": arm == "wint-shuffled"}
        distillation |= BUDGET if arm == "wint-budget" else {}
    run = {**RUN, "epochs": EPOCHS[phase], "evaluate_epochs": max(1, round(EPOCHS[phase])), "seed": seed}
    return {
        "title": f"{PHASES[phase]}: {ARMS[arm]}", "expected": "see docs/wint.md",
        "cost": "an hour of one core" if phase == "long" else "at most twelve minutes of one core",
        "data": ANIMALS if phase in TRANSFERS else LONG_CIFAR if phase == "long" else CIFAR,
        "model": model, "windows": windows, "distillation": distillation,
        "optimiser": {"scratch": OPTIMISER, "long": LONG_OPTIMISER}.get(phase, TUNING),
        "run": run | (LONG_RUN if phase == "long" else {}),
    }  # fmt: skip


def recipe(description: dict[str, Any], data: Path, work: Path) -> Recipe:
    """With the paths of this machine."""
    images = {key: str(data / description["data"][key]) for key in ("train", "test")}
    model, distillation = dict(description["model"]), dict(description["distillation"])
    for table_, key in ((model, "start_from"), (distillation, "teacher")):
        if table_.get(key):
            table_[key] = str((work / table_[key]).absolute())
    placed = {"data": {**description["data"], **images}, "model": model, "distillation": distillation}
    return recipe_from({**description, **placed})


def mean_area(run: str) -> float:
    """Mean area of a finished run's windows, a share of the grid."""
    return statistics.fmean(json.loads((RUNS / f"{run}.json").read_text())["areas"])


def closest_window(area: float) -> list[float]:
    """The near-square window around its query whose mean area, cut at the border, is closest."""
    shapes = [
        (a, b, c, d) for a in range(8) for b in (a, a + 1) for c in (a, a + 1) for d in (b, c) if max(b, c, d) < 8
    ]
    return [float(side) for side in min(shapes, key=lambda sides: abs(area_of(sides) - area))]


def area_of(sides: tuple[float, ...]) -> float:
    """Mean area of one window over all queries, a share of the grid."""
    return float(hard_mask(torch.tensor(sides, dtype=torch.float32).expand(64, 4), GRID).float().mean())


# --- the table -------------------------------------------------------------------------------------------------------


def records(phase: str) -> list[dict[str, Any]]:
    """All records of a phase."""
    return [json.loads(path.read_text()) for path in sorted(RUNS.glob(f"{phase}-*.json"))]


def table(phase: str, found: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, and differences paired by seed."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in ARMS}
    for each in found:
        by_arm[each["arm"]][each["seed"]] = each
    lines = [
        f"{PHASES[phase]}\n",
        "| arm | seeds | top-1, % | minus control | minus fixed local window | rounded, % | area, % | steps | core s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in ARMS_OF[phase]:
        runs = by_arm[arm]
        if runs:
            area = mean_cell(runs, lambda run: 100 * statistics.fmean(run["areas"] or [1.0]))
            lines.append(
                f"| {ARMS[arm]} | {len(runs)} | {spread([100 * run['accuracy'] for run in runs.values()])} "
                f"| {gain_cell(runs, by_arm['control'])} | {gain_cell(runs, by_arm['fixed-local'])} "
                f"| {hard_edge_cell(runs)} | {area} "
                f"| {next(iter(runs.values()))['steps']:,} | {core_seconds_cell(runs)} |"
            )
    return "\n".join(lines) + "\n"


def spread(values: list[float], sign: str = "") -> str:
    """Mean and sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.2f}{deviation}"


def hard_edge_cell(runs: dict[int, dict[str, Any]]) -> str:
    """Accuracy with hard edges, where windows are predicted."""
    found = [100 * run["accuracy_rounded"] for run in runs.values() if "accuracy_rounded" in run]
    return spread(found) if found else ""


def gain_cell(runs: dict[int, dict[str, Any]], others: dict[int, dict[str, Any]]) -> str:
    """Points gained over another arm, seed by seed."""
    seeds = sorted(runs.keys() & others.keys())
    if not seeds or runs is others:
        return ""
    return spread([100 * (runs[seed]["accuracy"] - others[seed]["accuracy"]) for seed in seeds], "+")


def core_seconds_cell(runs: dict[int, dict[str, Any]]) -> str:
    """Of the runs of which all seconds are known."""
    known = {seed: run for seed, run in runs.items() if "core_s" in run}
    return mean_cell(known, lambda run: run["core_s"]) if known else ""


def mean_cell(runs: dict[int, dict[str, Any]], number: Callable[[dict[str, Any]], float]) -> str:
    return f"{statistics.fmean(map(number, runs.values())):.1f}"


# --- pictures --------------------------------------------------------------------------------------------------------


def draw(data: Path, work: Path) -> None:
    """A trained WinT of seed 0 and its teacher on a photograph; how its windows agree with others."""
    from PIL import Image
    from skimage import data as photographs

    student, teacher = (open_vit(work / f"scratch-{arm}-0" / "last") for arm in ("wint", "control"))
    guide = Teacher(teacher, DISTILLATION["area"], student.n_layers, len(START_PATCHES), GRID)
    view = Image.fromarray(photographs.chelsea())
    short = min(view.size)
    photo = view.crop(((view.width - short) // 2, 0, (view.width + short) // 2, short))
    pixels = student.prepare([photo])
    sides, patch = stack_layers(predict_windows(student, pixels)), 3 * GRID[1] + 3
    windows, taught = (windows_as_study(each, GRID) for each in (sides, stack_layers(guide.sides(pixels))))
    save(figures.windows_by_layer(windows, patch, 0, photo, teacher=taught), DOCS / "chelsea-windows.png")
    save(figures.summed_windows(windows, [patch, 18, 45, 60], 0, photo), DOCS / "chelsea-summed.png")
    shown, areas = read_images(str(data / CIFAR["test"])).subset(1000), {}
    for arm, words in (("wint", "WinT"), ("wint-free", "no teacher"), ("wint-shuffled", "shuffled boxes")):
        if (RUNS / f"scratch-{arm}-0.json").is_file():
            areas[words] = np.array(json.loads((RUNS / f"scratch-{arm}-0.json").read_text())["areas"])
    save(figures.lines_of_areas(areas), DOCS / "area.png")
    found = evaluate(student, shown, teacher=teacher, teacher_area=DISTILLATION["area"])
    save(
        figures.lines_of_overlaps({words: np.array(getattr(found, field)) for words, field in AGREEMENT.items()}),
        DOCS / "overlap.png",
    )
    (DOCS / "agreement.md").write_text(agreement(found))


def beside(data: Path, work: Path) -> str:
    """A trained WinT next to its ViT, both studied on the same photographs, layer by layer."""
    images, photos = read_images(str(data / CIFAR["test"])).subset(300), work / "test-photos"
    for index, label in enumerate(images.labels.tolist()):
        folder = photos / images.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        images.image(index).save(folder / f"{index:03}.png")
    studies = {
        name: run_study(
            open_vit(work / f"scratch-{arm}-0" / "last"), str(photos), out=work / f"study-{arm}",
            measures="heads,patches,windows",
        )
        for name, arm in (("WinT", "wint"), ("ViT", "control"))
    }  # fmt: skip
    lines = [
        f"{len(images)} test images, seed 0; means over images, heads and patches\n",
        f"| measure | model | {' | '.join(f'L{layer}' for layer in range(SHAPE['depth']))} |",
        f"| --- | --- | {' | '.join(['---'] * SHAPE['depth'])} |",
    ]
    for measure, words in BESIDE.items():
        for name, study in studies.items():
            values = by_layer(study, measure)
            if values is not None:
                lines.append(f"| {words} | {name} | {' | '.join(f'{value:.3f}' for value in values)} |")
    return "\n".join(lines) + "\n"


def by_layer(study: Any, measure: str) -> Any:
    """Means of each layer; of a layer's heads the one that matters most."""
    if measure == "p lost":
        return (study["probability"] - study["head_probability"]).mean("image").max("head").to_numpy()
    if measure not in study:
        return None
    values = np.abs(study[measure]) if measure != "tendency" else (study[measure] ** 2).sum("xy") ** 0.5
    return values.mean([dim for dim in values.dims if dim != "layer"]).to_numpy()


def agreement(found: Evaluation) -> str:
    """Predicted against measured windows, layer by layer."""
    lines = [
        f"{found.n_images:,} test images, intersection over union of windows, seed 0; accuracy {found.accuracy:.3f}\n",
        f"| layer | area, % | {' | '.join(AGREEMENT)} |", f"| {' | '.join(['---'] * (2 + len(AGREEMENT)))} |",
    ]  # fmt: skip
    for layer, area in enumerate(found.area):
        cells = " | ".join(f"{getattr(found, field)[layer]:.2f}" for field in AGREEMENT.values())
        lines.append(f"| L{layer} | {100 * area:.1f} | {cells} |")
    return "\n".join(lines) + "\n"


def stack_layers(layers: list[Tensor]) -> Any:
    """Sides of one image, [layer window patch side]."""
    return torch.stack([layer[0] for layer in layers]).numpy()


# --- block-sparse attention ------------------------------------------------------------------------------------------


def crossover(sides: Sequence[int] = (), *, heads: int = 2, width: int = 32, share: float = 0.1) -> str:
    """Times of one layer's attention by resolution; windows are squares of a tenth of the grid around the query.

    Args:
        sides: Rows and columns of the grids; empty: those of docs/wint/sparse.md.
        heads: Of the layer.
        width: Channels of a head.
        share: Of the grid that a window covers, before the border cuts it.

    Returns:
        Three tables in markdown: kernel, mask and both together; soft edges; the mask alone.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [
        f"{torch.cuda.get_device_name() if device == 'cuda' else 'one CPU thread, FlexAttention not compiled'}; "
        f"{heads} heads of {width} channels, square windows of {share:.0%} of the grid, blocks of {BLOCK} tokens, "
        "milliseconds a call (median of 5). `kernel`: block-sparse attention with a finished mask of tokens in tile "
        "order; `mask`: making it; `whole`: both, with the tokens' way into tile order and back. `tiles`: windows that "
        "the queries of a block share.\n",
        "| grid | tokens | full attention | dense mask | kernel | mask | whole | tiles: kernel | mask | whole "
        "| windows' area, % | open blocks, % | tiles, % | largest difference |",
        f"| {' | '.join(['---'] * 14)} |",
    ]
    for side in sides or ((14, 24, 32, 48) if device == "cpu" else (14, 28, 56, 84, 112)):
        lines.append(crossover_row(side, heads, width, share, device))
        print(lines[-1], file=sys.stderr, flush=True)  # minutes, on a CPU
    lines += ["", "Soft edges at the final temperature, cut where they let through less than a thousandth:\n"]
    lines += ["| grid | dense soft mask | in blocks, whole | open blocks, % | hard edges', % | largest difference |"]
    lines += [f"| {' | '.join(['---'] * 6)} |"]
    for side in sides or ((14, 32, 48) if device == "cpu" else (28, 56, 112)):
        lines.append(soft_row(side, heads, width, share, device))
    if device == "cpu":
        lines += [soft_row(side, heads, width, share, "") for side in (() if sides else (56, 112))]
        lines += ["", "The mask alone, in closed form, on one CPU thread (least of 50):\n"]
        lines += ["| grid | tokens | mask, ms | of 10,000 tokens, ms | windows' area, % | open blocks, % | tiles, % |"]
        lines += [f"| {' | '.join(['---'] * 7)} |", *(mask_row(side, share) for side in sides or (56, 112))]
    return "\n".join(lines) + "\n"


def square_windows(side: int, share: float, device: str) -> Tensor:
    """Sides of square windows of a share of the grid around each query."""
    return torch.full((1, 1, side * side, 4), (share**0.5 * side - 1) / 2, device=device)


def crossover_row(side: int, heads: int, width: int, share: float, device: str) -> str:
    """One resolution: the ways to attend, and how far dense mask and blocks are apart."""
    grid = (side, side)
    q, k, v = torch.randn((3, 1, heads, side * side, width), generator=torch.Generator().manual_seed(0)).to(device)
    sides = square_windows(side, share, device)
    inside = hard_mask(sides[0, 0], grid)
    bias = torch.zeros((side * side,) * 2, device=device).masked_fill(~inside, -torch.inf)
    ways: list[Callable[[], Any]] = [
        lambda: F.scaled_dot_product_attention(q, k, v),
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
    ]
    masks = {tiles: block_mask(sides, grid, 0, tile_windows=tiles) for tiles in (False, True)}
    for tiles, mask in masks.items():
        ways += [
            partial(attend, q, k, v, mask),
            partial(block_mask, sides, grid, 0, tile_windows=tiles),
            partial(sparse_attention, q, k, v, sides, grid, 0, tile_windows=tiles),
        ]
    apart = float((ways[4]() - ways[1]()).abs().max())
    cells = " | ".join(f"{milliseconds(way, device):.2f}" for way in ways)
    shares = " | ".join(
        f"{100 * each:.1f}" for each in (float(inside.float().mean()), *map(open_share, masks.values()))
    )
    return f"| {side} x {side} | {side * side:,} | {cells} | {shares} | {apart:.0e} |"


def soft_row(side: int, heads: int, width: int, share: float, device: str) -> str:
    """One resolution with soft edges: what blocks open for them, and how far the answers are from the dense mask's."""
    grid, edges = (side, side), 0.15
    sides = square_windows(side, share, device or "cpu")
    opened = [100 * open_share(block_mask(sides + soft_reach(each), grid, 0)) for each in (edges, 0.0)]
    shares = " | ".join(f"{each:.1f}" for each in opened)
    if not device:  # counted, not computed
        return f"| {side} x {side} | | | {shares} | |"
    q, k, v = torch.randn((3, 1, heads, side * side, width), generator=torch.Generator().manual_seed(0)).to(device)
    bias = soft_bias(sides, grid, edges, CUT)
    ways: list[Callable[[], Any]] = [
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
        lambda: sparse_attention(q, k, v, sides, grid, 0, edges=edges),
    ]
    times = " | ".join(f"{milliseconds(way, device):.2f}" for way in ways)
    return f"| {side} x {side} | {times} | {shares} | {float((ways[0]() - ways[1]()).abs().max()):.0e} |"


def mask_row(side: int, share: float) -> str:
    """How long the closed form takes, and what it opens."""
    grid, sides, taken = (side, side), square_windows(side, share, "cpu"), []
    for _ in range(50):
        began = time.process_time()
        block_mask(sides, grid, 0)
        taken.append(1000 * (time.process_time() - began))
    area = float(hard_mask(sides[0, 0], grid).sum()) / side**4
    opened = (open_share(block_mask(sides, grid, 0, tile_windows=tiles)) for tiles in (False, True))
    shares = " | ".join(f"{100 * each:.1f}" for each in (area, *opened))
    return f"| {side} x {side} | {side**2:,} | {min(taken):.2f} | {min(taken) * 1e4 / side**2:.2f} | {shares} |"


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """Median of five; on a CPU the process's own time, which other processes disturb less."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    call()
    taken = []
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        began = clock()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(1000 * (clock() - began))
    return statistics.median(taken)


if __name__ == "__main__":
    main()
