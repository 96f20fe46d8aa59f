"""Tables of docs/neurons.md from real models and photographs, one command each; every command goes on where it stopped.

    python benchmarks/neurons.py robustness --data ../shared/data --images 1000
    python benchmarks/neurons.py precision  --data ../shared/data
    python benchmarks/neurons.py grouping   --data ../shared/data
    python benchmarks/neurons.py filters    --data ../shared/data
    python benchmarks/neurons.py relevance  --data ../shared/data
    python benchmarks/neurons.py views      --data ../shared/data

Partial results lie in --work (a folder below the system's temporary one by default); tables and curves are written to
docs/neurons. Photographs are taken in a fixed shuffled order, so that what is there at any time is a fair sample.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from vitrail import open_vit
from vitrail.data import ImageEntry, load_image, open_images, scan
from vitrail.neurons import robustness
from vitrail.neurons.flow import read_steps, rollout

MODELS = ("vit_tiny_patch16_224", "deit_tiny_patch16_224")
DOCS = Path(__file__).resolve().parents[1] / "docs" / "neurons"
CHUNK = 20


def opened(data: Path, model: str, precision: str = "float32"):
    return open_vit(f"timm:{model}", weights=data / "models" / f"{model}.safetensors", precision=precision)


def photographs(data: Path, limit: int):
    """The source and its entries in a fixed shuffled order; labels by class folder."""
    source = open_images(data / "imagenet-sample", class_names=data / "models" / "imagenet_classes.txt", n_classes=1000)
    entries = scan(source).images
    order = np.random.default_rng(0).permutation(len(entries))[:limit]
    return source, [entries[index] for index in order]


def chunks(entries: Sequence[ImageEntry], size: int = CHUNK) -> Iterator[tuple[int, Sequence[ImageEntry]]]:
    for start in range(0, len(entries), size):
        yield start, entries[start : start + size]


# --- robustness -------------------------------------------------------------------------------------------------------


def robustness_of(arguments: argparse.Namespace, precision: str, model: str, limit: int, work: Path) -> list[Path]:
    """One file of responses per chunk of photographs; those that are there are not computed again."""
    vit = opened(arguments.data, model, precision)
    source, entries = photographs(arguments.data, limit)
    asked = robustness.probes(vit.anatomy.grid)
    files = []
    for start, some in chunks(entries):
        file = work / f"robustness-{model}-{precision}-{start:04d}.npz"
        files.append(file)
        if not file.exists():
            images = vit.prepare([load_image(source, entry) for entry in some])
            labels = np.array([entry.label for entry in some])
            save_responses(file, vit, images, labels, range(start, start + len(some)), asked)
            print(file.name, flush=True)
    return files


def save_responses(file: Path, vit, images, labels, numbers, asked) -> None:
    steps, logits = read_steps(vit.tap(), images)
    salience = rollout(steps, vit.anatomy.blocks[0].prefix, vit.anatomy.class_index(0)).numpy()
    intact = logits.float().softmax(-1).numpy()
    responses = robustness.respond(vit, images, labels, salience, numbers, asked)
    unfinished = file.with_suffix(".unfinished.npz")
    np.savez(
        unfinished,
        probes=json.dumps([{"kind": type(probe).__name__, **asdict(probe)} for probe in asked]),
        intact_correct=intact.argmax(1) == labels,
        intact_probability=np.take_along_axis(intact, labels[:, None], 1)[:, 0],
        **{
            field: np.stack([getattr(response, field) for response in responses], 1)
            for field in ("correct", "probability", "drift", "class_drift")
        },
    )
    unfinished.replace(file)


def robustness_command(arguments: argparse.Namespace) -> None:
    for model in arguments.models:
        robustness_of(arguments, arguments.precision, model, arguments.images, arguments.work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=sorted(COMMANDS))
    parser.add_argument("--data", type=Path, required=True, help="folder with models/, imagenet-sample/, coco-masks/")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vitrail-neurons")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    DOCS.mkdir(parents=True, exist_ok=True)
    COMMANDS[arguments.command](arguments)


COMMANDS = {"robustness": robustness_command}

if __name__ == "__main__":
    main()
