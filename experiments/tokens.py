"""Tables of docs/tokens.md from real models and photographs, one command each; every command goes on where it stopped.

    python experiments/tokens.py robustness [--data ../shared/data] [--images 1000] [--models MODEL ...]
    python experiments/tokens.py relevance      the same options
    python experiments/tokens.py views          the same options; [--neurons 1] a level and photograph
    python experiments/tokens.py masked         robustness of the photographs with masks
    python experiments/tokens.py merged         one table of all four, of what of them is there
    python experiments/tokens.py precision --images 20
    python experiments/tokens.py grouping
    python experiments/tokens.py filters
    python experiments/tokens.py artefacts      of the ViT-S as well
    python experiments/tokens.py hierarchy [--hierarchy swin]     or pvt, maxvit; trains it where --build has no weights

Partial results lie in --work (a folder below the system's temporary one by default), a file for 20 photographs; tables
are written to docs/tokens. Photographs are taken in a fixed shuffled order, the same for every command, so that what is
there at any time is a fair sample. `--finished` tabulates what is there and computes nothing.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from PIL import Image
from tiny_hierarchies import HIERARCHIES, SIDE, normalised, trained

from vitrail import open_vit
from vitrail.data import ImageEntry, load_image, open_images, scan, with_masks
from vitrail.errors import Unsupported
from vitrail.figures.artefacts import artefact_trial
from vitrail.figures.style import save
from vitrail.models.objects import coverage, in_view, patch_objects
from vitrail.stats import mean_interval, share_interval, spearman
from vitrail.study.batches import view_with_mask
from vitrail.tokens import robustness
from vitrail.tokens.amounts import cells_that_divide
from vitrail.tokens.artefact_findings import artefact_findings
from vitrail.tokens.artefact_trial import try_registers
from vitrail.tokens.embedding import find_embedding
from vitrail.tokens.filters import auroc, best_filters_by_class, filter_energy, filter_table, salient_patches
from vitrail.tokens.flow import flow_row, read_steps, rollout
from vitrail.tokens.grouping import RADII, SCORES, score_grouping
from vitrail.tokens.label_free import final_tokens
from vitrail.tokens.levels import read_levels
from vitrail.tokens.relevance import METHODS, deletion_and_insertion, relevance, unavailable_methods
from vitrail.tokens.views import agreement, faithful_view, flow_view, neuron_view
from vitrail.wint.batches import read_images

MODELS = ("vit_tiny_patch16_224", "deit_tiny_patch16_224")
ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "tokens"
CHUNK = 20
N_NEIGHBOURS = 5
"""Photographs whose mean embedding is a prototype."""


def opened(data: Path, model: str, precision: str = "float32"):
    return open_vit(f"timm:{model}", weights=data / "models" / f"{model}.safetensors", precision=precision)


def photographs(data: Path, limit: int | None):
    """The source and its entries in a fixed shuffled order; labels by class folder."""
    source = open_images(data / "imagenet-sample", class_names=data / "models" / "imagenet_classes.txt", n_classes=1000)
    entries = scan(source).images
    order = np.random.default_rng(0).permutation(len(entries))[:limit]
    return source, [entries[index] for index in order]


def chunks(entries: Sequence[ImageEntry], size: int = CHUNK) -> Iterator[tuple[int, Sequence[ImageEntry]]]:
    for start in range(0, len(entries), size):
        yield start, entries[start : start + size]


# --- parts -----------------------------------------------------------------------------------------------------------


def computed_parts(
    arguments: argparse.Namespace,
    name: str,
    entries: Sequence[ImageEntry],
    compute: Callable[[int, Sequence[ImageEntry]], dict[str, np.ndarray]],
) -> list[Path]:
    """One file for each chunk of photographs; computes those that are not there, and none with `--finished`."""
    files = []
    for start, some in chunks(entries):
        file = arguments.work / f"{name}-{start:04d}.npz"
        if not arguments.finished and n_photographs(file) < len(some):
            started = time.perf_counter()
            save_part(file, compute(start, some))
            seconds = (time.perf_counter() - started) / len(some)
            print(f"{name}: {start + len(some)} of {len(entries)} photographs, {seconds:.1f} s each", flush=True)
        if file.exists():
            files.append(file)
    return files


def save_part(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all."""
    unfinished = file.with_suffix(".unfinished.npz")
    np.savez(unfinished, **arrays)
    unfinished.replace(file)


def n_photographs(file: Path) -> int:
    """How many photographs a part holds; 0 where it is not there. A run of fewer `--images` leaves a short one."""
    return len(joined([file])["photograph"]) if file.exists() else 0


def joined(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """The arrays of all parts, by name, and the number of each `photograph`; `probes` once."""
    pieces = [dict(np.load(file)) for file in files]
    whole = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0] if name != "probes"}
    whole.setdefault("photograph", np.arange(len(next(iter(whole.values())))))
    return whole | ({"probes": pieces[0]["probes"]} if "probes" in pieces[0] else {})


def write_sections(
    arguments: argparse.Namespace, name: str, head: Sequence[str], sections: Sequence[list[str]]
) -> None:
    """Writes a page of what is there; a page that is there already does not become an empty one."""
    if not any(sections):
        raise SystemExit(f"{arguments.work} has no part of {name} to tabulate; run this without --finished.")
    write(name, [*head, "", *(line for section in sections for line in section)])


def parts_name(analysis: str, model: str, precision: str) -> str:
    return f"{analysis}-{model}-{precision}"


# --- robustness ------------------------------------------------------------------------------------------------------


def robustness_of(arguments: argparse.Namespace, precision: str, model: str, limit: int) -> list[Path]:
    source, entries = photographs(arguments.data, limit)
    vit = opened(arguments.data, model, precision)
    asked = robustness.all_probes(vit.anatomy.grid)

    def compute(start: int, some: Sequence[ImageEntry]) -> dict[str, np.ndarray]:
        images = vit.prepare([load_image(source, entry) for entry in some])
        labels = np.array([entry.label for entry in some])
        return responses_of(vit, images, labels, range(start, start + len(some)), asked)

    return computed_parts(arguments, parts_name("robustness", model, precision), entries, compute)


def responses_of(vit, images, labels, numbers, asked) -> dict[str, np.ndarray]:
    steps, logits = read_steps(vit.tap(), images)
    salience = rollout(steps, vit.anatomy.blocks[0].prefix, vit.anatomy.class_index(0)).numpy()
    intact = logits.float().softmax(-1).numpy()
    responses = robustness.respond(vit, images, labels, salience, numbers, asked)
    fields = ("correct", "probability", "drift", "class_drift")
    arrays = {field: np.stack([getattr(response, field) for response in responses], 1) for field in fields}
    answers = np.take_along_axis(intact, labels[:, None], 1)[:, 0]
    return with_probes(asked, intact.argmax(1) == labels, answers, arrays) | {"photograph": np.array(numbers)}


def with_probes(asked, correct: np.ndarray, probability: np.ndarray, arrays: dict[str, np.ndarray]):
    """Responses with the probes that they answer and what the intact images give."""
    probes = np.array(json.dumps([{"kind": type(probe).__name__, **asdict(probe)} for probe in asked]))
    return {"probes": probes, "intact_correct": correct, "intact_probability": probability, **arrays}


def robustness_command(arguments: argparse.Namespace) -> None:
    sections = []
    for model in arguments.models:
        files = robustness_of(arguments, arguments.precision, model, arguments.images)
        sections.append(robustness_table(model, arguments.precision, joined(files)) if files else [])
    write_sections(arguments, "robustness.md", ["# Robustness"], sections)


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


def lost_beyond(found: dict[str, np.ndarray], asked: list[dict]) -> dict[tuple[str, float, str], np.ndarray]:
    """What losing salient patches costs each photograph beyond as many others, by loss, amount and which others."""
    place = {(each.get("selection"), each.get("loss"), each.get("amount")): i for i, each in enumerate(asked)}
    beyond = {}
    for loss in sorted({each["loss"] for each in asked if "loss" in each}):
        for amount in sorted({each["amount"] for each in asked if "amount" in each}):
            salient = found["probability"][:, place["salient", loss, amount]]
            for other in ("random", "non-salient"):
                beyond[loss, amount, other] = found["probability"][:, place[other, loss, amount]] - salient
    return beyond


def matched_table(found: dict[str, np.ndarray], asked: list[dict]) -> list[str]:
    """Paired differences on the same photographs."""
    lines = [
        "Probability lost by salient patches beyond the same number of random or non-salient ones (paired):",
        "",
        "| lost by | amount | beyond random | beyond non-salient |",
        "|---|---|---|---|",
    ]
    beyond = lost_beyond(found, asked)
    for loss, amount in dict.fromkeys((loss, amount) for loss, amount, _ in beyond):
        cells = [interval(beyond[loss, amount, other]) for other in ("random", "non-salient")]
        lines.append(row([loss, f"{amount:.0%}", *cells]))
    return lines


def precision_command(arguments: argparse.Namespace) -> None:
    """The same probes in float32 and bfloat16 on the same photographs."""
    limit = min(arguments.images, 40)
    lines = ["# bfloat16 against float32", "", f"{limit} photographs, all probes.", "",
             "| model | mean probability, largest difference | same top-1 | mean drift, largest difference |",
             "|---|---|---|---|"]  # fmt: skip
    for model in arguments.models:
        wide, narrow = (
            joined(robustness_of(arguments, precision, model, limit)) for precision in ("float32", "bfloat16")
        )
        probability = np.abs(wide["probability"].mean(0) - narrow["probability"].mean(0)).max()
        same = (wide["correct"] == narrow["correct"]).mean()
        drift = np.abs(wide["drift"].mean(0) - narrow["drift"].mean(0)).max()
        lines.append(row([model, f"{probability:.4f}", f"{same:.2%}", f"{drift:.4f}"]))
    write("precision.md", [*lines, *precision_of_relevance(arguments)])


def precision_of_relevance(arguments: argparse.Namespace) -> list[str]:
    """Areas of deletion and insertion in both, of the photographs whose curves are there in both."""
    _, entries = photographs(arguments.data, arguments.images)
    lines = []
    for model in arguments.models:
        both = []
        for precision in ("float32", "bfloat16"):
            parts = argparse.Namespace(work=arguments.work, finished=True)
            files = computed_parts(parts, parts_name("relevance", model, precision), entries, nothing_is_computed)
            both.append(joined(files) if files else {"photograph": np.array([], dtype=int)})
        _, *rows = np.intersect1d(*(each["photograph"] for each in both), return_indices=True)
        if not len(rows[0]):
            continue
        wide, narrow = (
            relevance_areas({name: values[at] for name, values in each.items()})
            for each, at in zip(both, rows, strict=True)
        )
        apart = {
            what: [wide[method][what] - narrow[method][what] for method in wide if method in narrow]
            for what in wide["random"]
        }
        lines.append(row([
            f"{model}, {len(apart['deletion'][0])} photographs",
            *(f"{max(abs(each.mean()) for each in methods):.4f}" for methods in apart.values()),
            *(f"{np.abs(methods).mean():.4f}" for methods in [apart["insertion - deletion"]]),
        ]))  # fmt: skip
    if not lines:
        return []
    return [
        "", "Areas of relevance, maps in float32 and curves in both. Largest difference of a method's mean over "
        "photographs, and the mean difference of a single area, as a number without sign.", "",
        row(["model", "deletion", "insertion", "insertion - deletion", "that beyond random", "a single area"]),
        row(["---"] * 6), *lines,
    ]  # fmt: skip


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
        for cells in (None, *cells_that_divide(vit.anatomy.grid)):
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
            places = robustness.cell_permutations(cells, [number])
            prepared = robustness.shuffle(prepared, cells, places)
            owner = owner[robustness.patch_sources(places, cells, vit.anatomy.grid)[0]]
        levels = read_levels(vit.tap(), prepared).tokens[1:]
        prefix, inside = vit.anatomy.blocks[0].prefix, owner > 0
        labels = {
            each: sorted(set(categories.values())).index(categories[each]) for each in set(owner[inside].tolist())
        }
        tokens = [level[0, prefix:].numpy()[inside] for level in levels]
        found.append(
            [
                [list(vars(score_grouping(each, owner[inside], radius, labels)).values()) for each in tokens]
                for radius in RADII
            ]
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


# --- masked robustness -----------------------------------------------------------------------------------------------


def masked_command(arguments: argparse.Namespace) -> None:
    """Robustness on the photographs with objects: salient patches are those that objects cover. `merged` has it."""
    for model in arguments.models:
        file = arguments.work / f"{parts_name('masked', model, arguments.precision)}.npz"
        if not file.exists() and not arguments.finished:
            save_part(file, masked_responses(opened(arguments.data, model, arguments.precision), arguments.data))
        if file.exists():
            print("\n".join(robustness_table(model, arguments.precision, joined([file]))))


def masked_responses(vit, data: Path) -> dict[str, np.ndarray]:
    """Labels are the model's own predictions on the intact image."""
    asked, kept = robustness.all_probes(vit.anatomy.grid, losses=("mean", "removed")), []
    for number, (image, ids, _, name) in enumerate(masked_photographs(data)):
        covered = coverage((in_view(ids, vit.preprocessing) > 0).astype(np.int64), vit.anatomy.grid)[1]
        if not len(covered):
            continue
        images = vit.prepare([image])
        intact = vit.logits(images).float().softmax(-1).numpy()
        responses = robustness.respond(vit, images, intact.argmax(1), covered[:1], [number], asked)
        kept.append((intact.max(), responses))
        print(f"masked: {name}, {len(kept)} photographs with objects", flush=True)
    fields = ("correct", "probability", "drift", "class_drift")
    return with_probes(asked, np.ones(len(kept), dtype=bool), np.array([each for each, _ in kept]), {
        field: np.stack([np.stack([getattr(each, field)[0] for each in responses]) for _, responses in kept])
        for field in fields
    })  # fmt: skip


# --- filters ---------------------------------------------------------------------------------------------------------


def filters_command(arguments: argparse.Namespace) -> None:
    lines = ["# Filters", "", "AUROC of a filter's energy, object patches against the others, over the photographs of "
             "coco-masks.", ""]  # fmt: skip
    for model in arguments.models:
        vit = opened(arguments.data, model)
        by_mask, by_rollout, categories, ids = filter_scores(vit, arguments.data)
        lines += filter_lines(model, by_mask, by_rollout, categories, ids)
    write("filters.md", lines)


def filter_scores(vit, data: Path):
    """AUROC [image channel] with objects from masks, and with the quarter of patches that rollout ranks highest."""
    embedding, by_mask, by_rollout, categories, names = find_embedding(vit), [], [], [], []
    for image, ids, objects, name in masked_photographs(data):
        prepared = vit.prepare([image])
        energy = filter_energy(prepared, embedding.filters)[0].numpy()
        inside = patch_objects(in_view(ids, vit.preprocessing), embedding.grid, min_area=0.0, min_patches=1) > 0
        steps, _ = read_steps(vit.tap(), prepared)
        rolled = rollout(steps, embedding.prefix, vit.anatomy.class_index(0)).numpy()
        by_mask.append(auroc(energy, np.broadcast_to(inside, energy.shape)))
        by_rollout.append(auroc(energy, np.broadcast_to(salient_patches(rolled)[0], energy.shape)))
        categories.append(set(objects.values()))
        names.append(name)
    return np.array(by_mask), np.array(by_rollout), categories, names


def filter_lines(model: str, by_mask, by_rollout, categories, names) -> list[str]:
    table, rolled = filter_table(by_mask, 2), filter_table(by_rollout, 2)
    order = np.argsort(-table.mean)
    spread = np.nanstd(by_mask, axis=0).mean()
    known = by_mask[~np.isnan(by_mask).all(axis=1)]
    lines = [
        f"## {model}, {table.n_images} photographs with objects",
        "",
        f"Mean AUROC of the {len(order)} filters: {table.mean.min():.3f} to {table.mean.max():.3f}, median "
        f"{np.median(table.mean):.3f}; one filter varies over photographs by {spread:.3f} (standard deviation). The "
        f"best filter of each photograph has {known.max(axis=1).mean():.3f}, the worst "
        f"{known.min(axis=1).mean():.3f}. Ranks of filters by mask and by rollout "
        f"agree by {spearman(table.mean, rolled.mean):.2f} (Spearman).",
        "",
        "| filter | mean | deviation | by rollout | best photographs | worst photographs |",
        "|---|---|---|---|---|---|",
    ]
    for channel in [*order[:5], *order[-5:]]:
        best, worst = (", ".join(names[i] for i in each[channel]) for each in (table.best, table.worst))
        scores = [f"{each[channel]:.3f}" for each in (table.mean, table.deviation, rolled.mean)]
        lines.append(row([str(channel), *scores, best, worst]))
    counted = Counter(category for each in categories for category in each)
    frequent = [category for category, count in counted.most_common(8) if count >= 5]
    members = {category: np.array([category in each for each in categories]) for category in frequent}
    lines += ["", "| category | photographs | best filters (mean AUROC) |", "|---|---|---|"]
    for category, ranked in best_filters_by_class(by_mask, members).items():
        told = ", ".join(f"{channel} ({score:.3f})" for channel, score in ranked)
        lines.append(row([category, str(counted[category]), told]))
    return [*lines, ""]


# --- relevance -------------------------------------------------------------------------------------------------------


def relevance_command(arguments: argparse.Namespace) -> None:
    head = [
        "# Relevance",
        "",
        "Area under deletion (lower is better) and insertion (higher is better) of the label's probability; patches "
        "painted in the image's mean colour, ten steps. `prototype_similarity`: the prototype is the mean embedding of "
        f"the {N_NEIGHBOURS} other photographs whose embeddings are most like the photograph's own; "
        f"`random_prototype`, its null, that of {N_NEIGHBOURS} others by chance.",
    ]
    sections = []
    for model in arguments.models:
        files = relevance_of(arguments, model)
        title = model if arguments.precision == "float32" else f"{model}, curves in {arguments.precision}"
        sections.append(relevance_table(title, joined(files)) if files else [])
    write_sections(arguments, "relevance.md", head, sections)


def relevance_of(arguments: argparse.Namespace, model: str) -> list[Path]:
    """Maps are taken in float32, their curves in the precision asked for."""
    source, entries = photographs(arguments.data, arguments.images)
    wide = opened(arguments.data, model)
    narrow = wide if arguments.precision == "float32" else opened(arguments.data, model, arguments.precision)
    embeddings = None if arguments.finished else embeddings_of(arguments, model, wide)

    def compute(start: int, some: Sequence[ImageEntry]) -> dict[str, np.ndarray]:
        images, numbers = [load_image(source, entry) for entry in some], np.arange(start, start + len(some))
        labels = np.array([entry.label for entry in some])
        prepared = wide.prepare(images)
        maps = relevance(wide, prepared, labels, prototype=prototypes(embeddings, numbers))
        null = prototypes(embeddings, numbers, by_chance=True)
        maps["random_prototype"] = relevance(wide, prepared, labels, ["prototype_similarity"], prototype=null)[
            "prototype_similarity"
        ]
        return curves_of(narrow, narrow.prepare(images), labels, maps) | {"photograph": numbers}

    return computed_parts(arguments, parts_name("relevance", model, arguments.precision), entries, compute)


def embeddings_of(arguments: argparse.Namespace, model: str, vit) -> np.ndarray:
    """Of all photographs, however many are judged, so that the neighbours of one do not depend on that."""
    source, entries = photographs(arguments.data, None)

    def compute(start: int, some: Sequence[ImageEntry]) -> dict[str, np.ndarray]:
        embedding = final_tokens(vit, vit.prepare([load_image(source, entry) for entry in some])).embedding.numpy()
        return {"embedding": embedding, "photograph": np.arange(start, start + len(some))}

    return joined(computed_parts(arguments, parts_name("embeddings", model, "float32"), entries, compute))["embedding"]


def prototypes(embeddings: np.ndarray, numbers: np.ndarray, *, by_chance: bool = False) -> np.ndarray:
    """The mean embedding [image feature] of each photograph's nearest others by cosine, or of others by chance."""
    directions = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    rows = []
    for number in numbers:
        if by_chance:
            order = np.random.default_rng((0, number)).permutation(len(embeddings))
        else:
            order = np.argsort(-(directions @ directions[number]), kind="stable")
        rows.append(embeddings[order[order != number][:N_NEIGHBOURS]].mean(0))
    return np.array(rows, dtype=np.float32)


def curves_of(vit, images, labels: np.ndarray, maps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Curves of deletion and insertion [image amount] of each map, by method and way."""
    by_name = {}
    for method, scores in maps.items():
        curves = deletion_and_insertion(vit, images, labels, scores)
        by_name |= {f"{method} deletion": curves.deletion, f"{method} insertion": curves.insertion}
    return by_name


def hierarchy_command(arguments: argparse.Namespace) -> None:
    """Relevance on a hierarchy trained here, whose rollout is refused; labels are the true ones."""
    name = arguments.hierarchy
    vit = trained(name, arguments.data, arguments.build / f"tiny_{name}.safetensors")
    test = read_images(str(arguments.data / "cifar10" / "test.npz"))
    pixels, labels = normalised(test.pixels(SIDE)), test.labels.numpy()
    with torch.no_grad():
        answers = torch.cat([vit.logits(some).argmax(-1) for some in pixels.split(500)])
    accuracy = f"{(answers.numpy() == labels).mean():.1%} of the 10,000 test images right"
    print(accuracy)
    reasons = unavailable_methods(vit)
    chosen = np.random.default_rng(0).permutation(len(labels))[:200]
    others = np.setdiff1d(np.arange(len(labels)), chosen)
    of_classes = np.stack([class_prototype(vit, pixels[others][labels[others] == each]) for each in range(10)])
    images, labels = pixels[chosen], labels[chosen]
    methods = [method for method in METHODS if method not in reasons]
    maps = relevance(vit, images, labels, methods, prototype=of_classes[labels])
    other_classes = (labels + np.random.default_rng(1).integers(1, 10, len(labels))) % 10
    maps["random_prototype"] = relevance(
        vit, images, labels, ["prototype_similarity"], prototype=of_classes[other_classes]
    )["prototype_similarity"]
    grids = dict.fromkeys(block.grid for block in vit.anatomy.blocks)
    lines = [f"# Relevance in a hierarchy: {name}", "", "A small model trained on CIFAR-10 "
             f"(`experiments/tiny_hierarchies.py`) on grids of {', '.join(f'{a} x {b}' for a, b in grids)} patches, "
             f"{accuracy}. Otherwise as in [relevance.md](relevance.md), but that prototypes are the mean embedding of "
             f"{N_OF_CLASS} other test images of the class, and `random_prototype` that of another class. Rollout and "
             f"gradient-weighted rollout are refused: \"{reasons['gradient']}\".", ""]  # fmt: skip
    lines += relevance_table(f"{name}, CIFAR-10", curves_of(vit, images, labels, maps))
    write(f"relevance-hierarchy{'' if name == 'swin' else f'-{name}'}.md", lines)


N_OF_CLASS = 50


def class_prototype(vit, pixels: torch.Tensor) -> np.ndarray:
    return final_tokens(vit, pixels[:N_OF_CLASS]).embedding.mean(0).numpy()


def relevance_areas(curves: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """By method, of each photograph the areas, their difference and that beyond a random order."""
    areas = {name: (curve[:, 1:] + curve[:, :-1]).mean(axis=1) / 2 for name, curve in curves.items() if " " in name}
    random = areas["random insertion"] - areas["random deletion"]
    by_method = {}
    for method in [method for method in (*METHODS, "random_prototype") if f"{method} deletion" in areas]:
        deletion, insertion = (areas[f"{method} {way}"] for way in ("deletion", "insertion"))
        by_method[method] = {
            "deletion": deletion,
            "insertion": insertion,
            "insertion - deletion": insertion - deletion,
            "that beyond random (paired)": insertion - deletion - random,
        }
    return by_method


def relevance_table(model: str, curves: dict[str, np.ndarray]) -> list[str]:
    by_method = relevance_areas(curves)
    names = list(by_method["random"])
    lines = [
        f"## {model}, {len(by_method['random']['deletion'])} photographs",
        "",
        row(["method", *names]),
        row(["---"] * (1 + len(names))),
    ]
    for method, areas in by_method.items():
        cells = [interval(values) for values in areas.values()]
        lines.append(row([method, *(cells if method != "random" else [*cells[:-1], ""])]))
    return [*lines, ""]


# --- views -----------------------------------------------------------------------------------------------------------

LEVELS = (0, 1, 2, 4, 6, 8, 10, 12)
N_STEPS_BETWEEN = 20
"""Of so many photographs one has the view by 16 steps, which takes as long as 16 others."""

VIEW_SCORES = {
    "cosine": "gradient x input: cosine with plain",
    "rank": "gradient x input: ranks of patches",
    "missing": "gradient x input: missing",
    "missing16": "16 steps: missing",
    "cosine_frozen": "frozen: cosine with plain",
    "rank_frozen": "frozen: ranks of patches",
    "missing_frozen": "frozen: missing",
    "bias_share": "frozen: share of bias",
}
TIMES = ("seconds_view", "seconds_both", "seconds_faithful", "seconds_frozen")


def views_command(arguments: argparse.Namespace) -> None:
    """How far the plain view agrees with the faithful one, what that accounts for, and what a view costs."""
    sections = []
    for model in arguments.models:
        files = views_of(arguments, model)
        if not files:
            continue
        scores = joined(files)
        n, n_neurons = scores["cosine"].shape[0], scores["cosine"].shape[2]
        n_in_steps = int(np.isfinite(scores["missing16"]).any((1, 2)).sum())
        lines = [
            f"## {model}, {n} photographs, {n_neurons} neuron{'s' * (n_neurons != 1)} of each a level",
            "",
            "| level | gradient x input: cosine with plain | ranks of patches | missing (median) | 16 steps on "
            f"{n_in_steps}: missing (median) | frozen: cosine with plain | ranks of patches | missing (largest) | "
            "share of bias (median) |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for index, level in enumerate(LEVELS):
            each = {name: scores[name][:, index] for name in VIEW_SCORES}
            lines.append(row([
                str(level), interval(each["cosine"].mean(1), 2), interval(each["rank"].mean(1), 2),
                f"{np.median(each['missing']):.2f}", f"{np.nanmedian(each['missing16']):.3f}",
                interval(each["cosine_frozen"].mean(1), 2), interval(each["rank_frozen"].mean(1), 2),
                f"{each['missing_frozen'].max():.0e}", f"{np.median(each['bias_share']):.2f}",
            ]))  # fmt: skip
        view, both, faithful, frozen = (1000 * np.median(scores[name]) for name in TIMES)
        lines += [
            "",
            f"One view (median): {view:.1f} ms from kept maps, {both:.0f} ms with the pass that reads them; the "
            f"faithful view {faithful:.0f} ms by gradient, {frozen:.0f} ms frozen (processor time, "
            f"{int(scores['threads'][0])} threads).",
            "",
        ]
        sections.append(lines)
    write_sections(arguments, "views.md", ["# Views"], sections)


def views_of(arguments: argparse.Namespace, model: str) -> list[Path]:
    source, entries = photographs(arguments.data, arguments.images)
    vit = opened(arguments.data, model, arguments.precision)

    def compute(start: int, some: Sequence[ImageEntry]) -> dict[str, np.ndarray]:
        numbers = range(start, start + len(some))
        by_photograph = [
            view_scores(vit, load_image(source, entry), number, arguments.neurons)
            for number, entry in zip(numbers, some, strict=True)
        ]
        arrays = {name: np.array([each[name] for each in by_photograph]) for name in by_photograph[0]}
        threads = np.full(len(some), torch.get_num_threads())
        return {**arrays, "threads": threads, "photograph": np.array(numbers)}

    name = parts_name("views" if arguments.neurons == 1 else f"views{arguments.neurons}", model, arguments.precision)
    return computed_parts(arguments, name, entries, compute)


def view_scores(vit, photograph, number: int, n_neurons: int) -> dict[str, np.ndarray]:
    """Scores and seconds [level neuron] of random neurons of one photograph."""
    rng, embedding, image = np.random.default_rng((0, number)), find_embedding(vit), vit.prepare([photograph])
    steps, _ = read_steps(vit.tap(), image)
    n_tokens, n_channels = vit.anatomy.blocks[0].tokens, len(embedding.filters)
    scores = {name: np.full((len(LEVELS), n_neurons), np.nan) for name in (*VIEW_SCORES, *TIMES)}

    def timed(name: str, at: tuple[int, ...], compute: Callable[..., Any], *args: Any, **options: Any) -> Any:
        started = time.process_time()
        result = compute(*args, **options)
        scores[name][at] = time.process_time() - started
        return result

    for at in np.ndindex(len(LEVELS), n_neurons):
        level = LEVELS[at[0]]
        token, channel = int(rng.integers(embedding.prefix, n_tokens)), int(rng.integers(n_channels))
        neuron = (level, token, channel)
        timed("seconds_view", at, plain_view, image, embedding, steps, *neuron)
        plain = timed("seconds_both", at, neuron_view, vit, image, *neuron, embedding=embedding)[0]
        faithful = timed("seconds_faithful", at, faithful_view, vit, image, *neuron)
        frozen = timed("seconds_frozen", at, faithful_view, vit, image, *neuron, path="frozen")
        for suffix, view in (("", faithful), ("_frozen", frozen)):
            both = agreement(plain, view.pixels, embedding.grid)
            scores[f"cosine{suffix}"][at], scores[f"rank{suffix}"][at] = both.cosine, both.rank
            scores[f"missing{suffix}"][at] = view.missing
        scores["bias_share"][at] = abs(frozen.bias) / (abs(frozen.bias) + abs(frozen.change))
        if number % N_STEPS_BETWEEN == 0 and at[1] == 0:
            scores["missing16"][at] = faithful_view(vit, image, level, token, channel, 16).missing
    return scores


def plain_view(image, embedding, steps, level: int, token: int, channel: int):
    """From maps that were kept."""
    flow = flow_row(steps[:level], token) if level else flow_row(steps[:1], token) * 0
    return flow_view(image, embedding.filters[channel], embedding.grid, flow[:, embedding.prefix :])[0]


# --- one table -------------------------------------------------------------------------------------------------------


def merged_command(arguments: argparse.Namespace) -> None:
    """Robustness, relevance and views of all models in one table, of what is there of the same photographs."""
    arguments.finished = True
    by_model = [merged_rows(arguments, model) for model in arguments.models]
    names = list(dict.fromkeys(name for rows in by_model for name in rows))
    if not names:
        raise SystemExit(
            f"{arguments.work} has no part of {', '.join(arguments.models)} in {arguments.precision}: run robustness, "
            "relevance, views and masked first."
        )
    curves = f" (curves of relevance in {of_curves(arguments)})" if of_curves(arguments) != arguments.precision else ""
    lines = [
        "# Robustness, relevance and views",
        "",
        f"The same {arguments.images} photographs for all, in {arguments.precision}{curves}; mean and 95 % interval "
        "over photographs, of each the mean over its neurons. Where fewer photographs are there, the cell says on how "
        "many. Rows with objects are of photographs with masks, and their labels the model's own predictions.",
        "",
        row(["what", "of", *arguments.models]),
        row(["---"] * (2 + len(arguments.models))),
    ]
    for name in names:
        expected = None if name[0].startswith("objects known") else arguments.images
        lines.append(row([*name, *(merged_cell(rows.get(name), expected) for rows in by_model)]))
    write("robustness-relevance-views.md", lines)


def of_curves(arguments: argparse.Namespace) -> str:
    """The precision of the relevance curves that are merged."""
    return arguments.relevance_precision or arguments.precision


def merged_rows(arguments: argparse.Namespace, model: str) -> dict[tuple[str, str], np.ndarray]:
    """Values of each photograph, by what they are and of what."""
    rows: dict[tuple[str, str], np.ndarray] = {}
    _, entries = photographs(arguments.data, arguments.images)
    for title, analysis in (("", "robustness"), ("objects known: ", "masked")):
        name = parts_name(analysis, model, arguments.precision)
        if analysis == "masked":
            files = [file for file in [arguments.work / f"{name}.npz"] if file.exists()]
        else:
            files = computed_parts(arguments, name, entries, nothing_is_computed)
        rows |= robustness_rows(title, joined(files)) if files else {}
    if files := computed_parts(
        arguments, parts_name("relevance", model, of_curves(arguments)), entries, nothing_is_computed
    ):
        for method, areas in relevance_areas(joined(files)).items():
            rows |= {(f"relevance: {what}", method): values for what, values in areas.items()}
    if files := computed_parts(
        arguments, parts_name("views", model, arguments.precision), entries, nothing_is_computed
    ):
        scores = joined(files)
        for score, title in VIEW_SCORES.items():
            for index, level in enumerate(LEVELS):
                values = scores[score][:, index]
                values = values[:, 0] if score == "missing16" else values.mean(1)
                rows[f"views, {title}", f"level {level}"] = values[~np.isnan(values)]
    return rows


def nothing_is_computed(start: int, some: Sequence[ImageEntry]) -> dict[str, np.ndarray]:
    raise AssertionError("with --finished no part is computed")


def robustness_rows(title: str, responses: dict[str, np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
    asked = json.loads(str(responses["probes"]))
    rows = {
        (f"{title}top-1", "intact"): responses["intact_correct"],
        (f"{title}probability", "intact"): responses["intact_probability"],
    }
    for index, probe in enumerate(asked):
        rows[f"{title}top-1", probe_name(probe)] = responses["correct"][:, index]
        rows[f"{title}probability", probe_name(probe)] = responses["probability"][:, index]
        rows[f"{title}drift after the last layer", probe_name(probe)] = responses["drift"][:, index, -1]
    for (loss, amount, other), values in lost_beyond(responses, asked).items():
        rows[f"{title}probability lost beyond {other} patches (paired)", f"salient, {loss}, {amount:.0%}"] = values
    return rows


def probe_name(probe: dict) -> str:
    if probe["kind"] == "Occlusion":
        return f"{probe['selection']}, {probe['loss']}, {probe['amount']:.0%}"
    return f"shuffled {probe['cells']} x {probe['cells']}"


def merged_cell(values: np.ndarray | None, expected: int | None) -> str:
    """Mean, interval, and of how many photographs where these are not all."""
    if values is None or not len(values):
        return "not there"
    n = "" if len(values) == expected else f"; {len(values)} photograph{'s' * (len(values) != 1)}"
    return interval(values) + n


# --- artefacts -------------------------------------------------------------------------------------------------------

TRIALS = (
    ("vit_tiny_patch16_224", None),
    ("deit_tiny_patch16_224", None),
    ("vit_small_patch14", 224),
    ("vit_small_patch14", 518),
)
"""Models, and the side of their images in pixels where it is not their own."""

PHOTOGRAPHS = ("imagenet-sample", "coco-masks")
"""Every eighth of the first, and all of the second, whose tokens are grouped by object."""


def artefacts_command(arguments: argparse.Namespace) -> None:
    """Writers of tokens of outlying length, ablation, registers: one trial for each model and set of photographs."""
    lines = ["# Artefacts", "", "Neurons and heads are looked for on 16 photographs of the first half, changed models "
             "are tried on the second half. Null: as many other neurons (of the same layers) or heads, of ablations "
             "the mean of three draws. Mean (95 % interval) over photographs.", ""]  # fmt: skip
    for model, side in TRIALS:
        if model not in arguments.models:
            continue
        for photographs_of in PHOTOGRAPHS:
            name = f"{model}{'' if side is None else f'-{side}'}"
            file = arguments.work / f"artefacts-{name}-{photographs_of}-{arguments.images}.npz"
            title = f"## {model}{'' if side is None else f', {side} px'}, {photographs_of}"
            refusal = file.with_suffix(".txt")
            if not file.exists() and not refusal.exists():
                save_trial(file, refusal, arguments, model, side, photographs_of)
            if refusal.exists():
                lines += [title, "", refusal.read_text(), ""]
                continue
            trial = saved_trial(file).assign_attrs(name=model)  # a model in a folder has its path for a name
            lines += [title, "", *artefact_table(trial)]
            save(artefact_trial(trial.isel(example=slice(0))), DOCS / f"artefacts-{name}-{photographs_of}.png")
    write("artefacts.md", lines)


def save_trial(
    file: Path, refusal: Path, arguments: argparse.Namespace, model: str, side: int | None, photographs_of: str
) -> None:
    """The trial whole or not at all; the reason of a model without outlying tokens beside it."""
    started, data = time.perf_counter(), arguments.data
    vit = opened(data, model) if side is None else open_vit(data / "models" / model, image_size=side)
    if photographs_of == "coco-masks":
        source = open_images(data / "coco-masks" / "images", labels=False)
        entries = with_masks(scan(source), data / "coco-masks" / "masks").images
    else:
        source = open_images(data / "imagenet-sample", labels=False)
        entries = scan(source).images[::8]
    views, masks = zip(*(view_with_mask(vit, source, entry) for entry in entries[: arguments.images]), strict=True)

    def tell(what: str, done: int, total: int) -> None:
        print(f"{file.stem}: {what}, {done} of {total}, {time.perf_counter() - started:.0f} s", flush=True)

    try:
        trial = try_registers(vit, views, masks=masks if photographs_of == "coco-masks" else None, progress=tell)
    except Unsupported as reason:
        refusal.write_text(str(reason))
        return
    variables = {str(name): trial[name] for name in trial.variables}
    dims = {name: list(each.dims) for name, each in variables.items()}
    told = json.dumps({"attrs": trial.attrs, "dims": dims})
    unfinished = file.with_suffix(".unfinished.npz")
    np.savez(unfinished, told=told, **{name: each.to_numpy() for name, each in variables.items()})
    unfinished.replace(file)


def saved_trial(file: Path) -> xr.Dataset:
    """What `save_trial` wrote."""
    arrays = dict(np.load(file))
    told = json.loads(str(arrays.pop("told")))
    variables = {name: (told["dims"][name], values) for name, values in arrays.items()}
    return xr.Dataset(variables, attrs=told["attrs"]).set_coords(["model", "score"])


def trial_cell(name: str, values: np.ndarray, digits: int) -> str:
    """A mean with its interval; of answers that are all the same or not, a share with that of a share."""
    if name != "top-1 stays" or not np.isin(values, (0, 1)).all():
        return interval(values, digits)
    low, high, reason = share_interval(values.astype(bool))
    return f"{values.mean():.{digits}f} ({reason or f'{low:.{digits}f} to {high:.{digits}f}'})"


def artefact_table(trial: xr.Dataset) -> list[str]:
    """Every number of every model that was tried, and the findings."""
    worst, models = int(trial.attrs["worst_layer"]), [str(each) for each in trial["model"].values]
    columns = {
        f"outlying patches after L{worst}": (trial["outlier_share"].isel(layer=worst) * trial.sizes["patch"], 1),
        **({"top-1 stays": (trial["same_top1"], 3)} if "same_top1" in trial else {}),
        "1 - cosine of the output": (trial["output_shift"], 3),
        "attention on them": (trial["outlier_attention"], 3),
        "on registers": (trial["register_attention"], 3),
        "entropy of the map": (trial["attention_entropy"], 3),
        **{str(each).replace("_", " "): (trial["grouping"].sel(score=each), 3) for each in trial["score"].values},
    }
    lines = [row(["model", *columns]), row(["---"] * (1 + len(columns)))]
    for model in models:
        values = [(each.sel(model=model).to_numpy(), digits) for each, digits in columns.values()]
        lines.append(row([model, *(trial_cell(name, *each) for name, each in zip(columns, values, strict=True))]))
    writers = [
        ", ".join(
            f"{form.format(int(layer), int(index))} {share:.1%}"
            for layer, index, share in zip(
                *(trial[f"{of}_{each}"].values for each in ("layer", "index", "share")), strict=True
            )
        )
        for of, form in (("neuron", "L{} neuron {}"), ("head", "L{}H{}"))
    ]
    return [
        *lines,
        "",
        f"Of the length: {'; '.join(each for each in writers if each)}.",
        "",
        *(f"- {sentence}" for sentence in artefact_findings(trial)),
        "",
    ]


# --- words -----------------------------------------------------------------------------------------------------------


def interval(values: np.ndarray, digits: int = 3) -> str:
    """Mean and its 95 % interval over images."""
    values = values[~np.isnan(values.astype(float))].astype(float)
    low, high, reason = mean_interval(values)
    return f"{values.mean():.{digits}f} ({reason or f'{low:.{digits}f} to {high:.{digits}f}'})"


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(name: str, lines: Sequence[str]) -> None:
    (DOCS / name).write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(DOCS / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=sorted(COMMANDS))
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="has models/, imagenet-sample/, coco-masks/"
    )
    parser.add_argument("--models", nargs="+", help="Default: the two tiny ones; artefacts: the ViT-S as well.")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--relevance-precision", help="merged: of the curves of relevance, where not --precision")
    parser.add_argument("--neurons", type=int, default=1, help="views: of each photograph and level")
    parser.add_argument("--hierarchy", choices=sorted(HIERARCHIES), default="swin")
    parser.add_argument("--finished", action="store_true", help="tabulate the parts that are there, compute nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vitrail-neurons")
    parser.add_argument("--build", type=Path, default=Path(".build"), help="hierarchy: where its weights are kept")
    arguments = parser.parse_args()
    of_command = dict.fromkeys(model for model, _ in TRIALS) if arguments.command == "artefacts" else MODELS
    arguments.models = arguments.models or list(of_command)
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    DOCS.mkdir(parents=True, exist_ok=True)
    COMMANDS[arguments.command](arguments)


COMMANDS = {
    "artefacts": artefacts_command,
    "filters": filters_command,
    "grouping": grouping_command,
    "hierarchy": hierarchy_command,
    "masked": masked_command,
    "merged": merged_command,
    "precision": precision_command,
    "relevance": relevance_command,
    "robustness": robustness_command,
    "views": views_command,
}

if __name__ == "__main__":
    main()
