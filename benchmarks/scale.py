"""How a study grows: 1,000, then 10,000, then 50,000 synthetic photographs of the built-in model, in one folder.

    python benchmarks/scale.py FOLDER
    python benchmarks/scale.py FOLDER --sizes 100 200      a try

Photographs are crops of the built-in ones with other colours, as JPEG files. Every phase is a process of its own: the
study goes on from the size before, then the folder is opened, every measure summarised, the report written. Interrupted
and begun again, it goes on where it was; phases that were measured are not measured again.
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = (1_000, 10_000, 50_000)

MEASURES = "head_probability,head_loss_change,attention_strength,strength_entropy,attention_distance,prefix_share"


def write_photographs(folder: Path, n_images: int) -> None:
    """Random crops, each channel scaled by its own factor; the first images are the same for every number."""
    from vitrail.data.photographs import CLASS_NAMES, photographs

    originals = list(photographs().values())
    for index in range(n_images):
        path = folder / f"{index // 1000:03d}" / f"{index:06d}.jpg"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(index)
        original = originals[index % len(CLASS_NAMES)]
        side = int(min(original.size) * rng.uniform(0.2, 0.5))
        left, top = (int(rng.integers(0, length - side + 1)) for length in original.size)
        pixels = np.asarray(original.resize((96, 96), box=(left, top, left + side, top + side)), dtype=np.float32)
        pixels = np.clip(pixels * rng.uniform(0.7, 1.3, 3), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=85)


def study(folder: Path, n_images: int) -> None:
    """Measures the first images; those of a smaller study are not measured again."""
    import torch

    import vitrail

    torch.set_num_threads(1)
    vit = vitrail.open_vit("vitrail:photos")
    options = {"importance": "estimate"}
    source, out = folder / "photographs", folder / "study"
    vitrail.run_study(vit, source, out=out, measures=MEASURES, options=options, limit=n_images, batch_size=32)


def open_it(folder: Path, n_images: int) -> None:
    """Opens the folder and reads one image."""
    import vitrail

    data = vitrail.open_study(folder / "study")
    assert data.sizes["image"] == n_images
    data["head_loss_change"][n_images // 2].load()


def summary(folder: Path, n_images: int) -> None:
    """The table of heads."""
    import vitrail
    from vitrail.heads.summary import head_table

    head_table(vitrail.open_study(folder / "study"))


def report(folder: Path, n_images: int) -> None:
    """The report with all of its figures."""
    from vitrail.report import write_report

    write_report(folder / "study", folder / "report.html")


PHASES: dict[str, Callable[[Path, int], None]] = {
    "study": study,
    "open": open_it,
    "summary": summary,
    "report": report,
}


def measure(work: Callable[[Path, int], None], folder: Path, n_images: int) -> dict[str, float]:
    """Seconds (of the clock and of the processor) and peak memory of a phase, imports included."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_cost, args=(work, folder, n_images, sender))
    process.start()
    sender.close()
    cost: dict[str, float] = receiver.recv()
    process.join()
    return cost


def _report_cost(work: Callable[[Path, int], None], folder: Path, n_images: int, sender: object) -> None:
    began = time.perf_counter()
    work(folder, n_images)
    used = resource.getrusage(resource.RUSAGE_SELF)
    cost = {
        "seconds": time.perf_counter() - began,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
    }
    sender.send(cost)  # type: ignore[attr-defined]


def megabytes(folder: Path) -> float:
    """Size of the files of a folder, 10^6 bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    """Measures what was not measured yet, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for photographs, study and results; 1 GB for 50,000 images")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    asked = parser.parse_args()
    results_file = asked.folder / "results.json"
    results = json.loads(results_file.read_text()) if results_file.exists() else {}
    for n_images in sorted(asked.sizes):
        write_photographs(asked.folder / "photographs", n_images)
        costs = results.setdefault(str(n_images), {})
        for name, work in PHASES.items():
            if name not in costs:
                costs[name] = measure(work, asked.folder, n_images)
                costs["megabytes"] = megabytes(asked.folder / "study")
                results_file.write_text(json.dumps(results, indent=1))
                print(n_images, name, {key: round(value, 1) for key, value in costs[name].items()}, flush=True)
    print(f"\n| images | {' | '.join(f'{name}, processor s (MiB)' for name in PHASES)} | folder, MB |")
    print("|---" * (len(PHASES) + 2) + "|")
    for n_images, costs in results.items():
        cells = [f"{costs[name]['processor_seconds']:.1f} ({costs[name]['peak_mib']:.0f})" for name in PHASES]
        print(f"| {int(n_images):,} | {' | '.join(cells)} | {costs['megabytes']:.0f} |")


if __name__ == "__main__":
    main()
