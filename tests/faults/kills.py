"""A study and a training run that are killed at random moments end with the numbers of one that was left alone.

    python tests/faults/kills.py OUT [--kills 40] [--work study|training] [--measures heads,patches,tokens]

Work that comes to its end before all kills have fallen begins again in a new folder. Ends with an error if a byte of a
study or a number of a training run differs. Run by test_kills.py in a short form.
"""

import argparse
import csv
import random
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

import sklearn.manifold  # noqa: E402, F401 - loaded here, or every fork would spend its time on that

sys.path[:0] = [str(Path(__file__).parents[1] / "study"), str(Path(__file__).parents[1])]
from forks import in_fork, killed_until_done  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from tiny_studies import BATCH_SIZE, folder_bytes, tiny_vit, write_photos  # noqa: E402

from vitrail.study import planning  # noqa: E402
from vitrail.study.run import run_study  # noqa: E402
from vitrail.study.store import verify  # noqa: E402
from vitrail.wint.train import train  # noqa: E402
from wint.tiny_runs import recipe  # noqa: E402

KILLS_A_RUN = 4
"""About so many fall into work that goes on from where it was: each run is killed within half of what is left."""


def main() -> None:
    """Kills the work that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", choices=["study", "training"], default="study")
    parser.add_argument("--measures", default="heads,patches,tokens")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", default="0")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    planning.PART_IMAGES = BATCH_SIZE
    work, compare = (_study, _compare_studies) if asked.work == "study" else (_training, _compare_trainings)
    if asked.work == "study":
        write_photos(asked.out / "photos", asked.images)
    else:
        recipe(asked.out)  # writes the data

    def do(folder: Path) -> None:
        work(asked.out, folder, asked.measures)

    start = time.monotonic()
    in_fork(lambda: do(asked.out / "whole"))
    longest_s = 2 * (time.monotonic() - start) / KILLS_A_RUN
    n_folders = 0
    for folder in killed_until_done(do, asked.out, asked.kills, longest_s, random.Random(asked.seed)):
        compare(asked.out / "whole", folder)
        n_folders += 1
    print(f"{asked.work}: {asked.kills} kills, {n_folders} times to the end, each time as if left alone")


def _study(out: Path, folder: Path, measures: str) -> None:
    run_study(tiny_vit(), out / "photos", out=folder, batch_size=BATCH_SIZE, measures=measures)


def _compare_studies(whole: Path, folder: Path) -> None:
    verify(folder)
    differing = {name for name, _ in set(folder_bytes(whole).items()) ^ set(folder_bytes(folder).items())}
    if differing:
        raise SystemExit(f"{len(differing)} files differ: {sorted(differing)[:5]}")


def _training(out: Path, folder: Path, _measures: str) -> None:
    train(recipe(out, run={"checkpoint_steps": 2}), folder)


def _compare_trainings(whole: Path, folder: Path) -> None:
    for file in ("checkpoint.safetensors", "best/model.safetensors", "last/model.safetensors"):
        one, two = load_file(whole / file), load_file(folder / file)
        differing = [name for name in one.keys() | two.keys() if not (one[name] == two[name]).all()]
        if differing:
            raise SystemExit(f"{file}: {len(differing)} tensors differ: {differing[:5]}")
    for file, columns in (("steps.csv", ("step", "loss", "lr")), ("epochs.csv", ("epoch", "accuracy", "area"))):
        if _columns(whole / file, columns) != _columns(folder / file, columns):
            raise SystemExit(f"{file} differs")


def _columns(file: Path, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    with file.open(newline="") as opened:
        return [tuple(row[name] for name in names) for row in csv.DictReader(opened)]


if __name__ == "__main__":
    main()
