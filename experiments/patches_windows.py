"""Accuracy of a classifier whose patches see windows only, and the controls; for experiments/patches.py."""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from patches_common import (
    MODELS,
    Batch,
    Photographs,
    answers,
    cache_file,
    interval,
    open_share,
    opened,
    parts,
    save,
    shown,
    table,
)
from torch import Tensor

from vitrail.models.open import Vit
from vitrail.patches import budget, windows
from vitrail.patches.hubs import find_hubs, without_hubs
from vitrail.patches.interaction import INDICATORS, between_patches, normalise_rows
from vitrail.tap.attention import LayerAttention, Readers
from vitrail.tap.edits import Edit

AREAS = (0.10, 0.25, 0.44, 0.60)
CHOOSING = 60
"""The first photographs served to choose the rule, and to price its heads; windows are tried on the rest."""
N_PRICED = 20
N_FEW = 60
"""Photographs for conditions whose effect is so large, or which are so secondary, that more would tell nothing new."""

Condition = Callable[[Batch], Sequence[Edit]]
# --- conditions: what each query may see -----------------------------------------------------------------------------


def window(batch: Batch, share: float, name: str = "mean") -> list[Edit]:
    return batch.edits([windows.masks(boxes, batch.grid) for boxes in batch.boxes(share, name)])


def random_box(batch: Batch, share: float) -> list[Edit]:
    drawn = [windows.random_boxes(boxes, batch.grid, batch.generator) for boxes in batch.boxes(share)]
    return batch.edits([windows.masks(boxes, batch.grid) for boxes in drawn])


def centred_square(batch: Batch, share: float) -> list[Edit]:
    """The squarest box of at least nine tenths of the area, centred on the query and pushed inside the grid."""
    wanted = batch.n_patches(share)
    large = [shape for shape in windows.shapes_of_area(batch.grid, wanted) if shape[0] * shape[1] >= 0.9 * wanted]
    squarest = min(large, key=lambda shape: abs(shape[0] - shape[1]))
    boxes = torch.tensor([0, 0, *squarest]).expand(1, batch.grid[0] * batch.grid[1], 4)
    mask = windows.masks(windows.centred_boxes(boxes, batch.grid), batch.grid)
    return batch.edits([mask] * batch.n_layers)


def top_keys(batch: Batch, share: float) -> list[Edit]:
    """As many keys as the best box has patches, the strongest first."""
    counts = [windows.areas(boxes)[..., None] for boxes in batch.boxes(share)]
    return batch.edits([rank < count for rank, count in zip(batch.ranks(), counts, strict=True)])


def complement(batch: Batch, share: float) -> list[Edit]:
    return batch.edits([windows.complements(boxes, batch.grid) for boxes in batch.boxes(share)])


def with_share(condition: Callable[..., Sequence[Edit]], share: float, *more: Any) -> Condition:
    return lambda batch: condition(batch, share, *more)


Prices = Callable[[], Tensor]


def bought(batch: Batch, share: float, prices: Prices | None, place: str = "best") -> list[Edit]:
    """A box per head, areas under one budget; or controls with the same shapes, or as many of the strongest keys."""
    return _placed(batch, batch.bought(share, prices), place)


def by_layers(batch: Batch, share: float, prices: Prices, place: str = "best") -> list[Edit]:
    """The same of the boxes that are chosen layer by layer."""
    return _placed(batch, batch.head_windows(share, prices), place)


def bought_with_rest(batch: Batch, share: float, prices: Prices) -> list[Edit]:
    """The same budget, less a patch a query; for that patch a query sees the mean of all patches outside its box.

    That mean has the mean key of those patches, so its score is the mean of theirs, and it counts as many times as
    they are: attention evenly spread outside a box is kept as it was.
    """
    n_patches = batch.grid[0] * batch.grid[1]
    edits: list[Edit] = []
    for layer, boxes in enumerate(batch.bought(share - 1 / n_patches, prices)):
        read: list[Tensor] = []
        readers = Readers(attention=functools.partial(_keep_scores, layer, read))
        batch.vit.tap().read(batch.images, readers, edits=edits)
        scores = read[0][:, :, batch.prefix :, batch.prefix :]
        outside = ~windows.masks(boxes, batch.grid)
        mean = (scores * outside).sum(-1, keepdim=True) / outside.sum(-1, keepdim=True).clamp_min(1)
        bias = torch.zeros_like(read[0])
        bias[:, :, batch.prefix :, batch.prefix :] = torch.where(outside, mean - scores, 0.0)
        edits.append(Edit(layer, bias=bias))
    return edits


def _keep_scores(layer: int, read: list[Tensor], attention: LayerAttention) -> None:
    """Scores of a layer, but for a constant a row."""
    if attention.layer == layer:
        read.append(attention.weights().clamp_min(torch.finfo(torch.float32).tiny).log())


def _placed(batch: Batch, boxes_of_layers: Sequence[Tensor], place: str) -> list[Edit]:
    masks = []
    for layer, boxes in enumerate(boxes_of_layers):
        if place == "keys":
            matrix = normalise_rows(between_patches(batch.weights(layer), batch.prefix))
            masks.append(windows.top_keys(matrix, windows.areas(boxes)))
            continue
        if place == "centred":
            boxes = windows.centred_boxes(boxes, batch.grid)
        if place == "random":
            boxes = windows.random_boxes(boxes, batch.grid, batch.generator)
        masks.append(windows.masks(boxes, batch.grid))
    return batch.edits(masks, heads=True)


def window_conditions(prices: Prices) -> dict[str, Condition]:
    """The plain window and the budget at every area, each with the control hardest to beat; all others at 25 %."""
    found: dict[str, Condition] = {}
    for share in AREAS:
        found[f"one box@{share}"] = with_share(window, share)
        found[f"one box: centred square@{share}"] = with_share(centred_square, share)
        found[f"budget@{share}"] = with_share(bought, share, prices)
        found[f"budget: same boxes, centred@{share}"] = with_share(bought, share, prices, "centred")
    return found | {
        "one box, removal@0.25": with_share(window, 0.25, "removal"),
        "one box: random place@0.25": with_share(random_box, 0.25),
        "one box: strongest keys@0.25": with_share(top_keys, 0.25),
        "one box: complement@0.25": with_share(complement, 0.25),
        "budget: same boxes, random place@0.25": with_share(bought, 0.25, prices, "random"),
        "budget: strongest keys@0.25": with_share(bought, 0.25, prices, "keys"),
        "a box per head, one area@0.25": with_share(per_head, 0.25),
        "a box per head, areas shared by mass@0.25": with_share(bought, 0.25, None),
    }


def head_window_conditions(prices: Prices) -> dict[str, Condition]:
    """The rule of `vitrail.patches.head_windows` beside the budget over seven areas in one pass, and its controls."""
    return {
        "head windows@0.25": with_share(by_layers, 0.25, prices),
        "head windows: same boxes, centred@0.25": with_share(by_layers, 0.25, prices, "centred"),
        "head windows: strongest keys@0.25": with_share(by_layers, 0.25, prices, "keys"),
        "budget, and the mean of the rest@0.25": with_share(bought_with_rest, 0.25, prices),
        "budget@0.25": with_share(bought, 0.25, prices),
    }


def for_few(name: str) -> bool:
    """Whether a condition is tried on the first `N_FEW` photographs alone."""
    kind, _, share = name.partition("@")
    many = ("one box", "one box: centred square", "budget", "budget: same boxes, centred", "budget: strongest keys")
    return kind not in many or float(share) > 0.5


def priced(options: argparse.Namespace, vit: Vit) -> Prices:
    """Prices of the heads of a model, measured on the first photographs and kept beside the parts."""

    @functools.cache
    def prices() -> Tensor:
        file = cache_file(options, "prices.npz")
        if not file.exists():
            images, _ = Photographs(options.data, N_PRICED).batch(vit, 0, N_PRICED)
            half = [budget.head_prices(vit, part) for part in images.split(N_PRICED // 2)]
            save(file, {"prices": torch.stack(half).mean(0).numpy()})
        with np.load(file) as held:
            return torch.as_tensor(held["prices"])

    return prices


LEVELS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75)


def shared(batch: Batch, share: float) -> list[Edit]:
    """Areas shared out between the queries of a layer."""
    levels = [batch.n_patches(level) for level in LEVELS]
    found = [
        windows.shared_boxes(each, batch.grid, batch.n_patches(share), levels)[0] for each in batch.indicators("mean")
    ]
    return batch.edits([windows.masks(boxes, batch.grid) for boxes in found])


def shared_by_layers(batch: Batch, share: float) -> list[Edit]:
    """Areas shared out between all queries of all layers of an image."""
    levels = [batch.n_patches(level) for level in LEVELS]
    joined = torch.cat(batch.indicators("mean"), 1)
    found, _ = windows.shared_boxes(joined, batch.grid, batch.n_patches(share), levels)
    return batch.edits([windows.masks(boxes, batch.grid) for boxes in found.chunk(batch.n_layers, 1)])


def smallest(batch: Batch, held: float) -> list[Edit]:
    """The smallest box that holds a share of the interactions."""
    found = [windows.smallest_boxes(each, batch.grid, held)[0] for each in batch.indicators("mean")]
    return batch.edits([windows.masks(boxes, batch.grid) for boxes in found])


def per_head(batch: Batch, share: float) -> list[Edit]:
    by_head = [batch.boxes(share, f"head{head}") for head in range(batch.n_heads)]
    return batch.edits(
        [windows.masks(torch.stack(boxes, 1), batch.grid) for boxes in zip(*by_head, strict=True)], heads=True
    )


def per_head_shared(batch: Batch, share: float) -> list[Edit]:
    """A box per head; areas shared out between all queries, heads and layers of an image."""
    levels = [batch.n_patches(level) for level in LEVELS]
    joined = torch.cat([each for head in range(batch.n_heads) for each in batch.indicators(f"head{head}")], 1)
    found, _ = windows.shared_boxes(joined, batch.grid, batch.n_patches(share), levels)
    boxes = found.unflatten(1, (batch.n_heads, batch.n_layers, -1))
    return batch.edits([windows.masks(boxes[:, :, layer], batch.grid) for layer in range(batch.n_layers)], heads=True)


def with_class_token(batch: Batch, share: float) -> list[Edit]:
    """The class token too sees one window of each layer: the box that holds most of its attention."""
    edits = window(batch, share)
    for layer, edit in enumerate(edits):
        asks = batch.weights(layer)[:, :, 0, batch.prefix :].mean(1, keepdim=True)
        box, _ = windows.best_boxes(asks, batch.grid, batch.n_patches(share))
        assert edit.bias is not None
        edit.bias[:, 0, 0, batch.prefix :].masked_fill_(~windows.in_box(box, batch.grid)[:, 0], -torch.inf)
    return edits


def without_hubs_first(batch: Batch, share: float) -> list[Edit]:
    cleaned = [without_hubs(each, find_hubs(each).hubs) for each in batch.indicators("mean")]
    found = [windows.best_boxes(each, batch.grid, batch.n_patches(share))[0] for each in cleaned]
    return batch.edits([windows.masks(boxes, batch.grid) for boxes in found])


def with_sinks(batch: Batch, share: float, n_sinks: int) -> list[Edit]:
    """The keys that receive most are open to all, and a box has the rest of the area."""
    found = [
        windows.boxes_and_sinks(each, batch.grid, batch.n_patches(share), n_sinks)[1]
        for each in batch.indicators("mean")
    ]
    return batch.edits(found)


def per_head_with_sinks(batch: Batch, share: float, n_sinks: int) -> list[Edit]:
    by_head = [batch.indicators(f"head{head}") for head in range(batch.n_heads)]
    found = [
        windows.boxes_and_sinks(torch.stack(heads, 1), batch.grid, batch.n_patches(share), n_sinks)[1]
        for heads in zip(*by_head, strict=True)
    ]
    return batch.edits(found, heads=True)


def sink_conditions() -> dict[str, Condition]:
    found: dict[str, Condition] = {}
    for share in (0.15, 0.25, 0.36):
        for n_sinks in (4, 8):
            found[f"box and {n_sinks} sinks@{share}"] = with_share(with_sinks, share, n_sinks)
        found[f"a box and 4 sinks per head@{share}"] = with_share(per_head_with_sinks, share, 4)
    found["box and 16 sinks@0.25"] = with_share(with_sinks, 0.25, 16)
    return found


def variant_conditions() -> dict[str, Condition]:
    found: dict[str, Condition] = {}
    for name in (*INDICATORS, "gradient, true label"):
        found[f"best box, {name}@0.25"] = with_share(window, 0.25, name)
    for share in (0.15, 0.25, 0.44):
        found[f"a box per head@{share}"] = with_share(per_head, share)
    for kind, run in {
        "a box per head, areas shared over all": per_head_shared, "areas shared in a layer": shared,
        "areas shared over layers": shared_by_layers, "class token too": with_class_token,
        "hubs removed first": without_hubs_first,
    }.items():  # fmt: skip
        found[f"{kind}@0.25"] = with_share(run, 0.25)
    found["smallest box holding half@0.25"] = lambda batch: smallest(batch, 0.5)
    return found


# --- running conditions ----------------------------------------------------------------------------------------------


def run_conditions(
    options: argparse.Namespace,
    made: Callable[[Vit], dict[str, Condition]],
    skip: int = 0,
    few: Callable[[str], bool] = lambda _: False,
) -> dict[str, np.ndarray]:
    """For each condition and image: top-1 right, probability of the label, share of the map left open."""
    photographs = Photographs(options.data, options.images, skip)
    options.images = len(photographs.paths)

    def part(start: int) -> dict[str, np.ndarray]:
        vit = opened(options.model, options.data, options.precision)
        batch = Batch(vit, *photographs.batch(vit, start, options.batch), seed=start)
        found = {"full": answers(batch, batch.logits, 1.0)}
        for name, condition in made(vit).items():
            if start >= N_FEW and few(name):
                continue
            edits = condition(batch)
            found[name] = answers(batch, vit.tap().read(batch.images, edits=edits), open_share(edits, batch.prefix))
        return found

    return parts(options, part)


def conditions_table(options: argparse.Namespace, found: dict[str, np.ndarray]) -> str:
    full = found["full"]
    title = (
        f"{MODELS[options.model]}, {len(full)} photographs, {options.precision}; full attention: "
        f"top-1 {full[:, 0].mean():.3f}, probability of the label {full[:, 1].mean():.3f}\n\n"
    )
    rows = []
    for name, values in found.items():
        if name == "full":
            continue
        kind, _, share = name.partition("@")
        plain = full[: len(values)]
        rows.append([
            f"{float(share):.0%}", kind, str(len(values)), f"{values[:, 2].mean():.3f}", f"{values[:, 0].mean():.3f}",
            shown(interval(values[:, 0] - plain[:, 0])), f"{values[:, 1].mean():.3f}",
            shown(interval(values[:, 1] - plain[:, 1])),
        ])  # fmt: skip
    rows.sort(key=lambda row: float(row[0][:-1]))
    head = ["area", "what a patch sees", "photographs", "open", "top-1", "change, points", "p(label)", "change x 100"]
    return title + table(head, rows)


def windows_found(options: argparse.Namespace) -> dict[str, np.ndarray]:
    return run_conditions(options, lambda vit: window_conditions(priced(options, vit)), CHOOSING, for_few)


def head_windows_experiment(options: argparse.Namespace) -> str:
    found = run_conditions(options, lambda vit: head_window_conditions(priced(options, vit)), CHOOSING)
    return (
        f"{conditions_table(options, found)}\n\nHow far head windows are ahead of all else:\n\n"
        f"{_ahead(found, 'head windows')}"
    )


def windows_experiment(options: argparse.Namespace) -> str:
    found = windows_found(options)
    return f"{conditions_table(options, found)}\n\nHow far the budget is ahead of all else:\n\n{_ahead(found)}"


def _ahead(found: dict[str, np.ndarray], rule: str = "budget") -> str:
    """Paired differences between a rule and each other condition of the same area."""
    rows = []
    for name, values in found.items():
        kind, _, share = name.partition("@")
        if name == "full" or kind == rule:
            continue
        ahead = found[f"{rule}@{share}"][: len(values)] - values
        rows.append(
            [f"{float(share):.0%}", kind, str(len(values)), shown(interval(ahead[:, 0])), shown(interval(ahead[:, 1]))]
        )
    rows.sort(key=lambda row: float(row[0][:-1]))
    return table(["area", f"{rule} less", "photographs", "top-1, points", "p(label) x 100"], rows)


def variants_experiment(options: argparse.Namespace) -> str:
    return conditions_table(options, run_conditions(options, lambda _: variant_conditions()))


def sinks_experiment(options: argparse.Namespace) -> str:
    return conditions_table(options, run_conditions(options, lambda _: sink_conditions()))
