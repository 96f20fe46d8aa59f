"""Two processes that begin the same work in one folder: the second is refused in a sentence, and the result is whole.

    python tests/faults/two_at_once.py [--times 5]

Studies and training runs, each begun twice at the same moment, and reports written to one file. Ends with an error if
none of the two comes to its end, if one fails in another way, or if the result is not that of a process alone. Several
workers on one study are tried by kill_workers.py.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

torch.set_num_threads(1)

sys.path[:0] = [str(Path(__file__).parents[1] / "study"), str(Path(__file__).parents[1])]
from forks import start  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from tiny_studies import BATCH_SIZE, folder_bytes, tiny_vit, write_photos  # noqa: E402

from vitrail.errors import StudyError  # noqa: E402
from vitrail.report import write_report  # noqa: E402
from vitrail.study import planning  # noqa: E402
from vitrail.study.run import run_study  # noqa: E402
from vitrail.wint.train import train  # noqa: E402
from wint.tiny_runs import recipe  # noqa: E402

REFUSED = 3
"""Status of a process whose work was refused because another does it."""


def main() -> None:
    """Does each work twice at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    asked = parser.parse_args()
    planning.PART_IMAGES = BATCH_SIZE
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vit, photos = tiny_vit(), write_photos(folder / "photos", 3 * BATCH_SIZE)
        recipe(folder)  # writes the data

        def study(out: Path) -> None:
            run_study(vit, photos, out=out, batch_size=BATCH_SIZE, measures="heads")

        def training(out: Path) -> None:
            train(recipe(folder, run={"checkpoint_steps": 2}), out)

        def tensors(out: Path) -> dict[str, bytes]:
            return {name: each.tobytes() for name, each in load_file(out / "checkpoint.safetensors").items()}

        study(folder / "studied")
        _try("study", study, folder_bytes, folder / "study", asked.times)
        _try("training", training, tensors, folder / "training", asked.times)
        _try(
            "report", lambda out: write_report(folder / "studied", out), Path.read_bytes, folder / "report", asked.times
        )


def _try(
    name: str, work: Callable[[Path], object], result_of: Callable[[Path], object], folder: Path, n_times: int
) -> None:
    folder.mkdir()
    if _statuses([start(lambda: work(folder / "alone"))]) != [0]:
        raise SystemExit(f"{name}: a process alone failed")
    expected, n_refused = result_of(folder / "alone"), 0
    for number in range(n_times):
        out = folder / f"twice_{number}"
        statuses = _statuses([start(lambda: _refusable(work, out)) for _ in range(2)])  # noqa: B023
        if not set(statuses) <= {0, REFUSED} or 0 not in statuses:
            raise SystemExit(f"{name}: two at once ended with {statuses}")
        if result_of(out) != expected:
            raise SystemExit(f"{name}: two at once gave something else than one alone")
        n_refused += statuses.count(REFUSED)
    print(f"{name}: begun twice at once {n_times} times, {n_refused} refused, each result whole")


def _refusable(work: Callable[[Path], object], out: Path) -> None:
    try:
        work(out)
    except StudyError as refusal:
        if "wait until it has ended" not in str(refusal):
            raise
        os._exit(REFUSED)


def _statuses(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    main()
