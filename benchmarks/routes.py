"""What the page's server answers on a very large stored study: 1.3 million images x 144 heads, without a browser.

    python benchmarks/routes.py                     writes the study (1 GB) under the temporary folder, once
    python benchmarks/routes.py --images 50000

The study holds planted values of two measures of heads, written as a real one's are, and no thumbnails. Prints the time
until it is open, then of each route the time of the first answer and of the same again, and its size; last the peak
memory. Answers are asked for inside the process: the network is not measured.
"""

import argparse
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from starlette.testclient import TestClient

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from synthetic_study import CLASSES, plan_of
from vitrail.analysis import declaration
from vitrail.app import create_app
from vitrail.data import ImageEntry, Manifest
from vitrail.study.writing import StudyFolder

N_LAYERS, N_HEADS, PART = 12, 12, 8192
MEASURES = ("label", "prediction", "probability", "head_loss_change", "attention_distance")

ROUTES = (
    "/api/study",
    "/api/images",
    "/api/array/image_xy",
    "/api/array/label",
    "/api/summary/head_loss_change",
    "/api/array/head_loss_change?layer=3&head=7",
    "/api/array/head_loss_change?layer=11&head=0",
    "/api/array/attention_distance?layer=3&head=7",
    "/api/array/head_loss_change?image=777",
)
"""What the first screen asks for, then a click on a head, on another, on another measure of it, and on an image."""


def write_study(folder: Path, n_images: int) -> None:
    """Planted values to 8 bits, so that the study is written quickly; a real one's do not compress as well."""
    labels = (np.arange(n_images) % len(CLASSES)).astype(np.int32)
    entries = [ImageEntry(f"{i:07d}.png", None, int(label), 1, "0" * 64) for i, label in enumerate(labels)]
    manifest = Manifest(None, "planted", tuple(entries), ())
    plan = plan_of(
        n_images,
        manifest.digest,
        n_layers=N_LAYERS,
        n_heads=[N_HEADS] * N_LAYERS,
        measures={name: declaration(name).version for name in MEASURES},
        part_size=PART,
        batch_size=64,
    )
    folder.mkdir(parents=True)
    writing = StudyFolder(folder, plan, manifest)
    rng = np.random.default_rng(0)
    heads = rng.integers(-40, 200, (2, PART, N_LAYERS, N_HEADS)).astype(np.float32) / 256
    for part in writing.missing:
        chosen = slice(0, part.stop - part.start)
        label = labels[part.start : part.stop]
        arrays = {"label": label, "prediction": label, "probability": np.abs(heads[0, chosen, 0, 0])}
        arrays["head_loss_change"] = np.roll(heads[0], part.number, axis=0)[chosen]
        arrays["attention_distance"] = np.abs(np.roll(heads[1], part.number, axis=0)[chosen])
        writing.write_part(part, arrays)
    writing.write_derived({"image_xy": rng.normal(0, 9, (n_images, 2)).astype(np.float32)})


def main() -> None:
    """Writes the study if it is not there, and asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_300_000)
    asked = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / f"vitrail-routes-{asked.images}"
    if not (folder / "parts" / "derived.json").is_file():
        write_study(folder, asked.images)
    began, processor = time.perf_counter(), time.process_time()
    app = create_app(folder)
    print(f"| opened | {time.perf_counter() - began:.2f} s | {time.process_time() - processor:.2f} s | |")
    with TestClient(app, base_url="http://127.0.0.1") as client:
        for thread in threading.enumerate():
            if thread.name == "vitrail-warm-up":
                thread.join()
        print(f"| read ahead | {time.perf_counter() - began:.2f} s | {time.process_time() - processor:.2f} s | |")
        for route in ROUTES:
            times = []
            for _ in range(2):
                began, processor = time.perf_counter(), time.process_time()
                answer = client.get(route)
                assert answer.status_code == 200, answer.text
                times.append(f"{time.perf_counter() - began:.3f} s ({time.process_time() - processor:.3f} s)")
            print(f"| {route} | {' | '.join(times)} | {len(answer.content) / 1e6:.1f} MB |", flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
