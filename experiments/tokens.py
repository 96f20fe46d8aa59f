"""Tables of docs/tokens.md from real models and photographs, one command each; every command goes on where it stopped.

    python experiments/tokens.py robustness --data ../shared/data --images 1000
    python experiments/tokens.py masked     --data ../shared/data
    python experiments/tokens.py precision  --data ../shared/data
    python experiments/tokens.py grouping   --data ../shared/data
    python experiments/tokens.py filters    --data ../shared/data
    python experiments/tokens.py relevance  --data ../shared/data
    python experiments/tokens.py hierarchy  --data ../shared/data
    python experiments/tokens.py views      --data ../shared/data
    python experiments/tokens.py artefacts  --data ../shared/data

Partial results lie in --work (a folder below the system's temporary one by default); tables and curves are written to
docs/tokens. Photographs are taken in a fixed shuffled order, so that what is there at any time is a fair sample.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from PIL import Image
from tiny_swin import SIDE, normalised, trained_swin

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
from vitrail.tokens.levels import read_levels
from vitrail.tokens.relevance import METHODS, deletion_and_insertion, relevance, unavailable_methods
from vitrail.tokens.views import agreement, faithful_view, flow_view, neuron_view
from vitrail.wint.batches import read_images

MODELS = ("vit_tiny_patch16_224", "deit_tiny_patch16_224")
DOCS = Path(__file__).resolve().parents[1] / "docs" / "tokens"
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
    asked = robustness.all_probes(vit.anatomy.grid)
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
    fields = ("correct", "probability", "drift", "class_drift")
    found = {field: np.stack([getattr(response, field) for response in responses], 1) for field in fields}
    answers = np.take_along_axis(intact, labels[:, None], 1)[:, 0]
    save_all(file, asked, intact.argmax(1) == labels, answers, found)


def save_all(file: Path, asked, correct: np.ndarray, probability: np.ndarray, found: dict[str, np.ndarray]) -> None:
    """Whole or not at all."""
    told = json.dumps([{"kind": type(probe).__name__, **asdict(probe)} for probe in asked])
    unfinished = file.with_suffix(".unfinished.npz")
    np.savez(unfinished, probes=told, intact_correct=correct, intact_probability=probability, **found)
    unfinished.replace(file)


def robustness_command(arguments: argparse.Namespace) -> None:
    lines = ["# Robustness", ""]
    for model in arguments.models:
        if arguments.finished:
            files = sorted(arguments.work.glob(f"robustness-{model}-{arguments.precision}-????.npz"))
        else:
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
    for loss in sorted({each["loss"] for each in asked if "loss" in each}):
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
    """Robustness on the photographs with objects: salient patches are those that objects cover."""
    lines = ["# Robustness where objects are known", "", "Labels are the model's own predictions on the intact image."]
    for model in arguments.models:
        file = arguments.work / f"masked-{model}-{arguments.precision}.npz"
        if not file.exists():
            save_masked(file, opened(arguments.data, model, arguments.precision), arguments.data)
        lines += ["", *robustness_table(model, arguments.precision, dict(np.load(file)))]
    write("robustness-masks.md", lines)


def save_masked(file: Path, vit, data: Path) -> None:
    asked, kept = robustness.all_probes(vit.anatomy.grid, losses=("mean", "removed")), []
    for number, (image, ids, _, _) in enumerate(masked_photographs(data)):
        covered = coverage((in_view(ids, vit.preprocessing) > 0).astype(np.int64), vit.anatomy.grid)[1]
        if not len(covered):
            continue
        images = vit.prepare([image])
        intact = vit.logits(images).float().softmax(-1).numpy()
        responses = robustness.respond(vit, images, intact.argmax(1), covered[:1], [number], asked)
        kept.append((intact.max(), responses))
    fields = ("correct", "probability", "drift", "class_drift")
    save_all(file, asked, np.ones(len(kept), dtype=bool), np.array([each for each, _ in kept]), {
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
    lines = ["# Relevance", "", "Area under deletion (lower is better) and insertion (higher is better) of the label's "
             "probability; patches painted in the image's mean colour, ten steps.", ""]  # fmt: skip
    for model in arguments.models:
        files = relevance_of(arguments, model)
        lines += relevance_table(model, [dict(np.load(file)) for file in files])
    write("relevance.md", lines)


def relevance_of(arguments: argparse.Namespace, model: str) -> list[Path]:
    wide, narrow = opened(arguments.data, model), opened(arguments.data, model, arguments.precision)
    source, entries = photographs(arguments.data, min(arguments.images, 100))
    files = []
    for start, some in chunks(entries):
        file = arguments.work / f"relevance-{model}-{start:04d}.npz"
        if not file.exists():
            images = [load_image(source, entry) for entry in some]
            labels = np.array([entry.label for entry in some])
            maps = relevance(wide, wide.prepare(images), labels)
            np.savez(file, **curves_of(narrow, narrow.prepare(images), labels, maps))
            print(file.name, flush=True)
        files.append(file)
    return files


def curves_of(vit, images, labels: np.ndarray, maps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Curves of deletion and insertion [image amount] of each map, by method and way."""
    found = {}
    for method, scores in maps.items():
        curves = deletion_and_insertion(vit, images, labels, scores)
        found |= {f"{method} deletion": curves.deletion, f"{method} insertion": curves.insertion}
    return found


def hierarchy_command(arguments: argparse.Namespace) -> None:
    """Relevance on a Swin trained here, whose rollout is refused; labels are the true ones."""
    vit = trained_swin(arguments.data, arguments.build / "tiny_swin.safetensors")
    test = read_images(str(arguments.data / "cifar10" / "test.npz"))
    pixels, labels = normalised(test.pixels(SIDE)), test.labels.numpy()
    with torch.no_grad():
        answers = torch.cat([vit.logits(some).argmax(-1) for some in pixels.split(500)])
    accuracy = f"{(answers.numpy() == labels).mean():.1%} of the 10,000 test images right"
    print(accuracy)
    reasons = unavailable_methods(vit)
    chosen = np.random.default_rng(0).permutation(len(labels))[:200]
    images, labels = pixels[chosen], labels[chosen]
    maps = relevance(vit, images, labels, [method for method in METHODS if method not in reasons])
    lines = ["# Relevance in a hierarchy", "", f"A small Swin trained on CIFAR-10 (`experiments/tiny_swin.py`): three "
             f"stages on grids of 16 x 16, 8 x 8 and 4 x 4 patches, windows of 4 x 4, {accuracy}. Otherwise as in "
             "[relevance.md](relevance.md). Rollout and gradient-weighted rollout are refused: "
             f"\"{reasons['gradient']}\".", ""]  # fmt: skip
    lines += relevance_table("Swin, CIFAR-10", [curves_of(vit, images, labels, maps)])
    write("relevance-hierarchy.md", lines)


def relevance_table(model: str, pieces: Sequence[dict[str, np.ndarray]]) -> list[str]:
    areas = {}
    for name in pieces[0]:
        curve = np.concatenate([piece[name] for piece in pieces])
        areas[name] = (curve[:, 1:] + curve[:, :-1]).mean(axis=1) / 2
    n = len(next(iter(areas.values())))
    lines = [
        f"## {model}, {n} photographs",
        "",
        "| method | deletion | insertion | insertion - deletion | that beyond random (paired) |",
        "|---|---|---|---|---|",
    ]
    random = areas["random insertion"] - areas["random deletion"]
    for method in [method for method in METHODS if f"{method} deletion" in areas]:
        gap = areas[f"{method} insertion"] - areas[f"{method} deletion"]
        beyond = interval(gap - random) if method != "random" else ""
        lines.append(
            row(
                [
                    method,
                    interval(areas[f"{method} deletion"]),
                    interval(areas[f"{method} insertion"]),
                    interval(gap),
                    beyond,
                ]
            )
        )
    return [*lines, ""]


# --- views -----------------------------------------------------------------------------------------------------------


def views_command(arguments: argparse.Namespace) -> None:
    """How far the plain view agrees with the faithful one, what that accounts for, and what a view costs."""
    lines = ["# Views", ""]
    for model in arguments.models:
        file = arguments.work / f"views-{model}.npz"
        if not file.exists():
            save_views(file, opened(arguments.data, model), arguments.data)
        held = dict(np.load(file))
        lines += [
            f"## {model}, {held['cosine'].shape[1]} neurons of {held['cosine'].shape[1] // 4} photographs a level",
            "",
            "| level | gradient x input: cosine with plain | ranks of patches | missing (median) | 16 steps: missing "
            "| frozen: cosine with plain | ranks of patches | missing (largest) | share of bias (median) |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for index, level in enumerate(held["levels"]):
            lines.append(row([
                str(level), interval(held["cosine"][index], 2), interval(held["rank"][index], 2),
                f"{np.median(held['missing'][index]):.2f}", f"{np.median(held['missing16'][index]):.3f}",
                interval(held["cosine_frozen"][index], 2), interval(held["rank_frozen"][index], 2),
                f"{held['missing_frozen'][index].max():.0e}", f"{np.median(held['bias_share'][index]):.2f}",
            ]))  # fmt: skip
        lines += [
            "",
            f"One view (median): {1000 * np.median(held['seconds_view']):.1f} ms from kept maps, "
            f"{1000 * np.median(held['seconds_both']):.0f} ms with the pass that reads them; the faithful view "
            f"{1000 * np.median(held['seconds_faithful']):.0f} ms by gradient, "
            f"{1000 * np.median(held['seconds_frozen']):.0f} ms frozen (processor time, {int(held['threads'])} cores).",
            "",
        ]
    write("views.md", lines)


def save_views(file: Path, vit, data: Path, levels: Sequence[int] = (0, 1, 2, 4, 6, 8, 10, 12)) -> None:
    """Four random neurons of four photographs at some levels; the complete view, which is dear, of one of two."""
    source, entries = photographs(data, 4)
    rng, embedding = np.random.default_rng(0), find_embedding(vit)
    names = ("cosine", "rank", "missing", "missing16", "cosine_frozen", "rank_frozen", "missing_frozen", "bias_share")
    found = {name: [[] for _ in levels] for name in names}
    times = {name: [] for name in ("seconds_view", "seconds_both", "seconds_faithful", "seconds_frozen")}
    for number, entry in enumerate(entries):
        image = vit.prepare([load_image(source, entry)])
        steps, _ = read_steps(vit.tap(), image)
        for index, level in enumerate(levels):
            for _ in range(4):
                token, channel = int(rng.integers(1, 197)), int(rng.integers(len(embedding.filters)))
                started = time.process_time()
                row_ = flow_row(steps[:level], token) if level else flow_row(steps[:1], token) * 0
                plain = flow_view(image, embedding.filters[channel], embedding.grid, row_[:, embedding.prefix :])[0]
                times["seconds_view"].append(time.process_time() - started)
                started = time.process_time()
                plain = neuron_view(vit, image, level, token, channel, embedding=embedding)[0]
                times["seconds_both"].append(time.process_time() - started)
                started = time.process_time()
                faithful = faithful_view(vit, image, level, token, channel)
                times["seconds_faithful"].append(time.process_time() - started)
                both = agreement(plain, faithful.pixels, embedding.grid)
                found["cosine"][index].append(both.cosine)
                found["rank"][index].append(both.rank)
                found["missing"][index].append(faithful.missing)
                started = time.process_time()
                frozen = faithful_view(vit, image, level, token, channel, path="frozen")
                times["seconds_frozen"].append(time.process_time() - started)
                both = agreement(plain, frozen.pixels, embedding.grid)
                found["cosine_frozen"][index].append(both.cosine)
                found["rank_frozen"][index].append(both.rank)
                found["missing_frozen"][index].append(frozen.missing)
                found["bias_share"][index].append(abs(frozen.bias) / (abs(frozen.bias) + abs(frozen.change)))
            if number < 2:
                found["missing16"][index].append(faithful_view(vit, image, level, token, channel, 16).missing)
    np.savez(file, levels=levels, threads=torch.get_num_threads(), **found, **times)


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
            trial = saved_trial(file)
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
    parser.add_argument("--data", type=Path, required=True, help="folder with models/, imagenet-sample/, coco-masks/")
    parser.add_argument("--models", nargs="+", help="Default: the two tiny ones; artefacts: the ViT-S as well.")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--finished", action="store_true", help="robustness: tabulate what is there, compute nothing")
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
    "precision": precision_command,
    "relevance": relevance_command,
    "robustness": robustness_command,
    "views": views_command,
}

if __name__ == "__main__":
    main()
