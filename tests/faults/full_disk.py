"""A disk that is full: each command ends with a sentence, loses nothing, and goes on once there is room.

    python tests/faults/full_disk.py [--sizes 10]

The disk is a file system in memory of so many bytes, from hardly any up to nearly enough, mounted for this process
alone; the script starts itself anew where it may mount one. Ends with an error if a command fails in another way, or if
what it gives with room again is not what it gives on an empty disk. Run by test_full_disk.py in a short form.
"""

import argparse
import errno
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["MOUNTING"]

MOUNTING = ("unshare", "--map-root-user", "--mount", "--user")
"""Begins a process that may mount what nobody else sees."""

ROOMY_BYTES = 256 * 2**20
PAGE_BYTES = 4096


def main() -> None:
    """Starts itself where it may mount, and fills disks there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=10, help="How many sizes are tried of each command.")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if not asked.inside:
        sys.exit(subprocess.run([*MOUNTING, sys.executable, *sys.argv, "--inside"], check=False).returncode)
    with tempfile.TemporaryDirectory() as folder:
        _fill_disks(Path(folder), asked.sizes)


def _fill_disks(folder: Path, n_sizes: int) -> None:
    works = _works(folder)
    for name, (work, bytes_of) in works.items():
        work(folder / "whole" / name)
        expected = bytes_of(folder / "whole" / name)
        needed = _needed(folder / "whole" / name)
        refused = 0
        for size in (PAGE_BYTES + needed * index // n_sizes for index in range(n_sizes)):
            with _disk(folder / "disk", size) as disk:
                refused += _is_refused(work, disk / name)
                _resize(disk, ROOMY_BYTES)
                work(disk / name)
                if bytes_of(disk / name) != expected:
                    raise SystemExit(f"{name}: after a disk of {size:,} bytes it differs from that of an empty disk")
        if not refused:
            raise SystemExit(f"{name}: no disk was too small")
        print(f"{name}: {n_sizes} disks of up to {needed:,} bytes, {refused} too small, all went on with room")


def _is_refused(work: Callable[[Path], object], out: Path) -> bool:
    """Whether a full disk stops the work; raises if anything else does, or if the reason is not said."""
    from vitrail.errors import VitrailError

    try:
        work(out)
    except OSError as refusal:  # printed by the command line as a sentence
        if refusal.errno != errno.ENOSPC:
            raise
    except VitrailError as refusal:
        if "No space left" not in str(refusal):
            raise
    else:
        return False
    return True


def _works(folder: Path) -> dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]]:
    """What is done on each disk, and what of its result is compared."""
    import torch

    torch.set_num_threads(1)
    sys.path[:0] = [str(Path(__file__).parents[1] / "study"), str(Path(__file__).parents[1])]
    from safetensors.numpy import load_file
    from tiny_studies import BATCH_SIZE, folder_bytes, tiny_vit, write_photos

    from vitrail.report import write_report
    from vitrail.study import planning
    from vitrail.study.run import run_study
    from vitrail.wint.train import train
    from wint.tiny_runs import recipe

    planning.PART_IMAGES = BATCH_SIZE
    vit, photos, study = tiny_vit(), write_photos(folder / "photos", 3 * BATCH_SIZE), folder / "whole" / "study"

    def make_study(out: Path) -> None:
        run_study(vit, photos, out=out, batch_size=BATCH_SIZE, measures="heads,tokens", options={"ablation": "mean"})

    def train_wint(out: Path) -> None:
        train(recipe(folder, run={"checkpoint_steps": 2}), out)

    def checkpoint(out: Path) -> dict[str, bytes]:
        return {name: values.tobytes() for name, values in load_file(out / "checkpoint.safetensors").items()}

    return {
        "study": (make_study, folder_bytes),
        "training": (train_wint, checkpoint),
        "report": (lambda out: write_report(study, out), Path.read_bytes),
    }


def _needed(path: Path) -> int:
    """Bytes that a file or a folder takes on a disk, by whole pages."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(-(-file.stat().st_size // PAGE_BYTES) * PAGE_BYTES for file in files)


@contextmanager
def _disk(place: Path, n_bytes: int) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "none", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        shutil.rmtree(place)


def _resize(disk: Path, n_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={n_bytes}", disk], check=True)


if __name__ == "__main__":
    main()
