"""Does WinT gain anything, and against what: six arms at equal steps and equal order of data, several seeds.

    python benchmarks/wint.py arms --data ../shared/data [--seeds 0 1 2] [--only ARM ...]   trains what has no record
    python benchmarks/wint.py table                                              docs/wint/arms.md from the records
    python benchmarks/wint.py pictures --data ../shared/data                     docs/wint/*.png from the trained models
    python benchmarks/wint.py sparse                                             docs/wint/sparse.md, this machine

Each run is resumable (kill it, call again) and leaves one small record under docs/wint/runs; checkpoints go to --work.
"""

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from vitrail.wint.folder import as_text, open_model, written
from vitrail.wint.model import hard_mask
from vitrail.wint.recipe import Recipe, recipe_from
from vitrail.wint.train import train

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "docs" / "wint" / "runs"
GRID = (8, 8)
LONGEST = 7

START_PATCHES = ((2, 1, 0.4, 1), (1, 2, 1, 0.4), (0.4, 1, 2, 1), (1, 0.4, 1, 2))
"""Where the windows of the four heads begin: left, top, right, bottom. One head looks left, one up, one
right, one down."""

SHAPE = {"patch_px": 4, "width": 64, "depth": 6, "heads": 4, "mlp_ratio": 3.0, "class_token": False}
RUN = {"epochs": 2, "evaluate_epochs": 2, "batch_size": 64, "label_smoothing": 0.1, "log_steps": 39}
OPTIMISER = {"rate": 1.5e-3, "weight_decay": 0.05, "warm_up_epochs": 0.3}
TEACHING = {"weight": 0.5, "area": 15, "share": 0.5, "until": 0.6}

ARMS = {
    "control": "1 ViT, no windows",
    "wint": "2 WinT, guided by the trained control of its seed",
    "wint-free": "3 WinT, no teacher (lambda = 0)",
    "wint-shuffled": "4 WinT, the teacher's boxes shuffled between images",
    "fixed-local": "5 fixed local window of the same mean area, one for all heads",
    "fixed-start": "6 fixed windows where WinT's begin, one a head",
}
"""In the order in which they are run: later arms need what earlier ones leave."""

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["arms", "table"])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / ".build" / "wint")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(ARMS), default=list(ARMS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "arms":
        for seed in options.seeds:
            for arm in [arm for arm in ARMS if arm in options.only]:
                run_arm(arm, seed, options.data, options.work)
    text = table(records())
    (RUNS.parent / "arms.md").write_text(text)
    console.print(text, markup=False)


# --- runs ------------------------------------------------------------------------------------------------------------


def run_arm(arm: str, seed: int, data: Path, work: Path) -> None:
    """Trains one arm unless its record is there."""
    record, out = RUNS / f"{arm}-{seed}.json", work / f"{arm}-{seed}"
    description = described(arm, seed, work)
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    if record.is_file() and json.loads(record.read_text())["recipe"] == digest:
        return
    spent = out / "spent_s"
    before = float(spent.read_text()) if spent.is_file() else 0.0
    began = time.process_time()
    try:
        results = shown(f"{arm} {seed}", recipe(description, data, work), out)
    finally:
        if out.is_dir():
            spent.write_text(str(before + time.process_time() - began))
    kept = {
        "arm": arm, "seed": seed, "recipe": digest, "accuracy": results.accuracy, "areas": results.areas,
        "steps": json.loads(json.dumps(steps(out))), "core_s": round(float(spent.read_text()), 1),
        "parameters": sum(parameter.numel() for parameter in open_model(out / "last").parameters()),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    RUNS.mkdir(parents=True, exist_ok=True)
    written(record, lambda path: as_text(path, json.dumps(kept, indent=1) + "\n"))


def shown(title: str, wanted: Recipe, out: Path) -> Any:
    """Trains with a bar."""
    with Progress(console=console) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int, word: str) -> None:
            task = tasks.setdefault(what, bars.add_task(what, total=total) if what not in tasks else None)
            bars.update(task, completed=done, total=total, description=f"{title}: {what} {word}")

        return train(wanted, out, progress=progress)


def steps(out: Path) -> int:
    """Steps of the optimiser that a run took."""
    return int((out / "epochs.csv").read_text().splitlines()[-1].split(",")[0])


def described(arm: str, seed: int, work: Path) -> dict[str, Any]:
    """An arm's recipe as plain data, with paths by name only."""
    shares = [[side / LONGEST for side in window] for window in START_PATCHES]
    model: dict[str, Any] = {**SHAPE, "windows": "predicted", "start": shares}
    teacher: dict[str, Any] = {}
    if arm == "control":
        model |= {"windows": "none", "start": [[0.5] * 4]}
    if arm == "fixed-local":
        model |= {"windows": "fixed", "start": [closest_window(mean_area(f"wint-{seed}"))]}
    if arm == "fixed-start":
        model |= {"windows": "fixed", "start": [[float(side) for side in window] for window in START_PATCHES]}
    if arm in ("wint", "wint-shuffled"):
        teacher = {**TEACHING, "folder": f"control-{seed}/last", "shuffled": arm == "wint-shuffled"}
    return {
        "title": ARMS[arm], "expected": "see docs/wint.md", "cost": "two to four minutes of one core",
        "data": {"train": "cifar10/train.npz", "test": "cifar10/test.npz", "classes": 10, "limit": 12500},
        "model": model, "windows": {"rate": 5.0}, "teacher": teacher,
        "optimiser": OPTIMISER, "run": {**RUN, "seed": seed},
    }  # fmt: skip


def recipe(description: dict[str, Any], data: Path, work: Path) -> Recipe:
    """With the paths of this machine."""
    images = {key: str(data / description["data"][key]) for key in ("train", "test")}
    teacher = dict(description["teacher"])
    if teacher:
        teacher["folder"] = str((work / teacher["folder"]).absolute())
    return recipe_from({**description, "data": {**description["data"], **images}, "teacher": teacher})


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


def records() -> list[dict[str, Any]]:
    """All records, by arm and seed."""
    return [json.loads(path.read_text()) for path in sorted(RUNS.glob("*.json"))]


def table(found: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, and differences paired by seed."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in ARMS}
    for each in found:
        by_arm[each["arm"]][each["seed"]] = each
    lines = [
        "| arm | seeds | top-1, % | minus control | minus fixed local window | area, % | steps | core seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm, title in ARMS.items():
        runs = by_arm[arm]
        if runs:
            lines.append(
                f"| {title} | {len(runs)} | {spread([100 * run['accuracy'] for run in runs.values()])} "
                f"| {paired(runs, by_arm['control'])} | {paired(runs, by_arm['fixed-local'])} "
                f"| {over(runs, lambda run: 100 * statistics.fmean(run['areas'] or [1.0]))} "
                f"| {next(iter(runs.values()))['steps']:,} | {over(runs, lambda run: run['core_s'])} |"
            )
    return "\n".join(lines) + "\n"


def spread(values: list[float], sign: str = "") -> str:
    """Mean and sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.2f}{deviation}"


def paired(runs: dict[int, dict[str, Any]], others: dict[int, dict[str, Any]]) -> str:
    """Points gained over another arm, seed by seed."""
    seeds = sorted(runs.keys() & others.keys())
    if not seeds or runs is others:
        return ""
    return spread([100 * (runs[seed]["accuracy"] - others[seed]["accuracy"]) for seed in seeds], "+")


def over(runs: dict[int, dict[str, Any]], number: Callable[[dict[str, Any]], float]) -> str:
    return f"{statistics.fmean(map(number, runs.values())):.1f}"


if __name__ == "__main__":
    main()
