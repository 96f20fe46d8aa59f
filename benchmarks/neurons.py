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
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitrail import open_vit
from vitrail.data import ImageEntry, load_image, open_images, scan
from vitrail.neurons import robustness
from vitrail.neurons.flow import read_steps, rollout
from vitrail.neurons.grouping import RADII, SCORES, group
from vitrail.neurons.levels import read_levels
from vitrail.neurons.objects import in_view, patch_objects

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


# --- robustness ------------------------------------------------------------------------------------------------------


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
    lines = ["# Robustness", ""]
    for model in arguments.models:
        files = robustness_of(arguments, arguments.precision, model, arguments.images, arguments.work)
        lines += robustness_table(model, arguments.precision, joined(files))
    write("robustness.md", lines)


def joined(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """The responses of all chunks, by name; `probes` once."""
    pieces = [dict(np.load(file)) for file in files if file.exists()]
    found = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0] if name != "probes"}
    return found | {"probes": pieces[0]["probes"]}


def robustness_table(model: str, precision: str, found: dict[str, np.ndarray]) -> list[str]:
    asked = json.loads(str(found["probes"]))
    n = len(found["correct"])
    lines = [
        f"## {model}, {n} photographs, {precision}",
        "",
        "| patches | lost by | amount | top-1 | probability | drift after L0 | L3 | L7 | last | class token, last |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| intact | | | {interval(found['intact_correct'])} | {interval(found['intact_probability'])} | | | | | |",
    ]
    last = found["drift"].shape[2] - 1
    for index, probe in enumerate(asked):
        name = [probe["selection"], probe["loss"], f"{probe['amount']:.0%}"] if probe["kind"] == "Occlusion" else [
            "shuffled", f"{probe['cells']} x {probe['cells']} cells", ""]  # fmt: skip
        drifts = [f"{found['drift'][:, index, layer].mean():.3f}" for layer in (0, 3, 7, last)]
        scores = [interval(found["correct"][:, index]), interval(found["probability"][:, index])]
        lines.append(row([*name, *scores, *drifts, f"{found['class_drift'][:, index, last].mean():.3f}"]))
    return [*lines, "", *matched_table(found, asked), ""]


def matched_table(found: dict[str, np.ndarray], asked: list[dict]) -> list[str]:
    """Paired differences on the same photographs: what losing salient patches costs beyond as many others."""
    place = {(each.get("selection"), each.get("loss"), each.get("amount")): i for i, each in enumerate(asked)}
    lines = [
        "Probability lost by salient patches beyond the same number of random or non-salient ones (paired):",
        "",
        "| lost by | amount | beyond random | beyond non-salient |",
        "|---|---|---|---|",
    ]
    for loss in robustness.LOSSES:
        for amount in sorted({each["amount"] for each in asked if "amount" in each}):
            salient = found["probability"][:, place["salient", loss, amount]]
            beyond = [
                interval(found["probability"][:, place[other, loss, amount]] - salient)
                for other in ("random", "non-salient")
            ]
            lines.append(row([loss, f"{amount:.0%}", *beyond]))
    return lines


def precision_command(arguments: argparse.Namespace) -> None:
    """The same probes in float32 and bfloat16 on the same photographs."""
    limit = min(arguments.images, 40)
    lines = ["# bfloat16 against float32", "", f"{limit} photographs, all probes.", "",
             "| model | mean probability, largest difference | same top-1 | mean drift, largest difference |",
             "|---|---|---|---|"]  # fmt: skip
    for model in arguments.models:
        wide, narrow = (
            joined(robustness_of(arguments, precision, model, limit, arguments.work))
            for precision in ("float32", "bfloat16")
        )
        probability = np.abs(wide["probability"].mean(0) - narrow["probability"].mean(0)).max()
        same = (wide["correct"] == narrow["correct"]).mean()
        drift = np.abs(wide["drift"].mean(0) - narrow["drift"].mean(0)).max()
        lines.append(row([model, f"{probability:.4f}", f"{same:.2%}", f"{drift:.4f}"]))
    write("precision.md", lines)


# --- grouping --------------------------------------------------------------------------------------------------------


def masked_photographs(data: Path):
    """Photographs with instance ids and the category of each object."""
    folder = data / "coco-masks"
    source = open_images(folder / "images")
    objects = json.loads((folder / "objects.json").read_text())
    for entry in scan(source).images:
        stem = Path(entry.id).stem
        ids = np.asarray(Image.open(folder / "masks" / f"{stem}.png")).astype(np.int64)
        yield load_image(source, entry), ids, {each["id"]: each["category"] for each in objects[stem]}, entry.id


def grouping_command(arguments: argparse.Namespace) -> None:
    lines = ["# Grouping", ""]
    for model in arguments.models:
        vit = opened(arguments.data, model)
        for cells in (None, *robustness.cells_that_divide(vit.anatomy.grid)):
            file = arguments.work / f"grouping-{model}-{cells or 'plain'}.npz"
            if not file.exists():
                save_grouping(file, vit, arguments.data, cells)
            lines += grouping_table(model, cells, dict(np.load(file)))
    write("grouping.md", lines)


def save_grouping(file: Path, vit, data: Path, cells: int | None) -> None:
    """Scores [image radius level score] of every photograph with at least two objects."""
    started, found = time.perf_counter(), []
    for number, (image, ids, categories, _) in enumerate(masked_photographs(data)):
        owner = patch_objects(in_view(ids, vit.preprocessing), vit.anatomy.grid)
        if len(set(owner) - {0}) < 2:
            continue
        prepared = vit.prepare([image])
        if cells is not None:
            places = robustness.cell_places(cells, [number])
            prepared = robustness.shuffle(prepared, cells, places)
            owner = owner[robustness.moved_patches(places, cells, vit.anatomy.grid)[0]]
        levels = read_levels(vit.tap(), prepared).tokens[1:]
        prefix, inside = vit.anatomy.blocks[0].prefix, owner > 0
        labels = {
            each: sorted(set(categories.values())).index(categories[each]) for each in set(owner[inside].tolist())
        }
        tokens = [level[0, prefix:].numpy()[inside] for level in levels]
        found.append(
            [[list(vars(group(each, owner[inside], radius, labels)).values()) for each in tokens] for radius in RADII]
        )
    np.savez(file, scores=np.array(found), seconds=time.perf_counter() - started)
    print(file.name, f"{time.perf_counter() - started:.1f} s", flush=True)


def grouping_table(model: str, cells: int | None, held: dict[str, np.ndarray]) -> list[str]:
    scores = held["scores"]
    what = "plain" if cells is None else f"shuffled {cells} x {cells}"
    lines = [
        f"## {model}, {what}: {len(scores)} photographs in {float(held['seconds']):.0f} s",
        "",
        row(["radius", "after", *SCORES]),
        row(["---"] * (2 + len(SCORES))),
    ]
    for index, radius in enumerate(RADII):
        for layer in range(scores.shape[2]):
            values = [interval(scores[:, index, layer, score], 3) for score in range(len(SCORES))]
            lines.append(row([radius, f"L{layer}", *values]))
    return [*lines, ""]


# --- words -----------------------------------------------------------------------------------------------------------


def interval(values: np.ndarray, digits: int = 3) -> str:
    """Mean and the half-width of its 95 % interval (normal approximation over images)."""
    values = values[~np.isnan(values.astype(float))].astype(float)
    return f"{values.mean():.{digits}f} ± {1.96 * values.std(ddof=1) / len(values) ** 0.5:.{digits}f}"


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(name: str, lines: Sequence[str]) -> None:
    (DOCS / name).write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(DOCS / name)


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


COMMANDS = {"robustness": robustness_command, "precision": precision_command, "grouping": grouping_command}

if __name__ == "__main__":
    main()
