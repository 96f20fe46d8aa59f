"""Removing patches, what hubs are, responsive fields with their nulls; for experiments/patches.py."""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from patches_common import MODELS, Batch, Photographs, answers, interval, opened, parts, shown, table
from PIL import Image
from torch import Tensor

from vitrail.models.open import Vit
from vitrail.patches import field, windows
from vitrail.patches.hubs import find_hubs, query_share, without_hubs
from vitrail.tap.attention import Readers
from vitrail.tap.edits import Edit

# --- removing patches ------------------------------------------------------------------------------------------------

DROPPED = {0: (60,), 6: (40, 100, 140)}
"""Patches dropped before a block."""


def orders(batch: Batch) -> dict[str, Tensor]:
    """Patches [image patch] in the order in which each rule removes them, from what all layers of a plain pass say."""
    received = {name: torch.stack(batch.indicators(name)).sum(2).mean(0) for name in ("mean", "removal")}
    layers = range(batch.n_layers)
    kept = torch.stack([query_share(each) for each in batch.indicators("mean")]).mean(0)
    watched = torch.stack([batch.weights(layer)[:, :, 0, batch.prefix :].mean(1) for layer in layers]).mean(0)
    return {
        "hubs first": (-kept).argsort(-1),
        "random": torch.rand(kept.shape, generator=batch.generator).argsort(-1),
        **{f"least received, {name}": each.argsort(-1) for name, each in received.items()},
        "least class attention": watched.argsort(-1),
        "most class attention": (-watched).argsort(-1),
    }


def tokens_at(batch: Batch, start: int) -> Tensor:
    """The tokens that block `start` is given."""
    model: Any = batch.vit.model
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(batch.images)))
    for block in model.blocks[:start]:
        tokens = block(tokens)
    return tokens


def dropped_logits(batch: Batch, tokens: Tensor, order: Tensor, count: int, start: int) -> Tensor:
    """The answer if the first `count` patches of an order are gone from block `start`, given `tokens`, on."""
    model: Any = batch.vit.model
    left = order[:, count:].sort(-1).values + batch.prefix
    left = torch.cat([torch.arange(batch.prefix).expand(len(left), -1), left], 1)
    tokens = tokens.gather(1, left[..., None].expand(-1, -1, tokens.shape[-1]))
    for block in model.blocks[start:]:
        tokens = block(tokens)
    return model.forward_head(model.norm(tokens))


def hub_masks(batch: Batch) -> dict[str, Sequence[Edit]]:
    """Each layer's own hubs closed to everybody in that layer; and as many others."""
    closed: dict[str, list[Tensor]] = {}
    for matrix in batch.indicators("mean"):
        found = find_hubs(matrix).hubs
        count = found.sum(-1, keepdim=True)
        rules = {"random": torch.rand(found.shape, generator=batch.generator)}
        closed.setdefault("hubs", []).append(found)
        for name, score in rules.items():
            closed.setdefault(name, []).append((-score).argsort(-1).argsort(-1) < count)
    return {name: [_closed(batch, layer, each) for layer, each in enumerate(found)] for name, found in closed.items()}


def _closed(batch: Batch, layer: int, patches: Tensor) -> Edit:
    bias = torch.zeros((len(patches), 1, 1, batch.prefix + patches.shape[1]))
    bias[:, 0, 0, batch.prefix :].masked_fill_(patches, -torch.inf)
    return Edit(layer, bias=bias)


def removals_found(options: argparse.Namespace) -> dict[str, np.ndarray]:
    photographs = Photographs(options.data, options.images)

    def part(start: int) -> dict[str, np.ndarray]:
        vit = opened(options.model, options.data, options.precision)
        return _removals(Batch(vit, *photographs.batch(vit, start, options.batch), seed=start))

    return parts(options, part)


def _removals(batch: Batch) -> dict[str, np.ndarray]:
    found = {"full": answers(batch, batch.logits, 1.0)}
    closed = hub_masks(batch)
    n_hubs = float(torch.stack([find_hubs(each).hubs.sum(-1).float() for each in batch.indicators("mean")]).mean())
    for name, edits in closed.items():
        found[f"masked|{name}"] = answers(batch, batch.vit.tap().read(batch.images, edits=edits), n_hubs)
    ranked = orders(batch)
    for start, counts in DROPPED.items():
        tokens = tokens_at(batch, start)
        for name, order in ranked.items():
            for count in counts:
                logits = dropped_logits(batch, tokens, order, count, start)
                found[f"{start}|{name}|{count}"] = answers(batch, logits, count)
    return found


def removal_experiment(options: argparse.Namespace) -> str:
    found = removals_found(options)
    full = found.pop("full")
    lines = [
        f"{MODELS[options.model]}, {len(full)} photographs, {options.precision}; all patches: top-1 "
        f"{full[:, 0].mean():.3f}\n"
    ]
    masked = {name.partition("|")[2]: values for name, values in found.items() if name.startswith("masked")}
    n_hubs = masked["hubs"][:, 2].mean()
    lines.append(f"Each layer's own hubs closed to all in that layer, {n_hubs:.1f} a layer on average:\n")
    rows = [
        [name, f"{values[:, 0].mean():.3f}", *(shown(interval(values[:, n] - full[:, n])) for n in (0, 1))]
        for name, values in masked.items()
    ]  # fmt: skip
    lines.append(table(["closed", "top-1", "change, points", "change of p(label) x 100"], rows))
    for start, counts in DROPPED.items():
        lines.append(f"\nTokens dropped before L{start}, top-1 and its change in points:\n")
        names = dict.fromkeys(name.split("|")[1] for name in found if name.startswith(f"{start}|"))
        rows = []
        for name in names:
            cells = [found[f"{start}|{name}|{count}"][:, 0] for count in counts]
            rows.append([name, *(f"{each.mean():.3f} ({shown(interval(each - full[:, 0]))})" for each in cells)])
        lines.append(table(["order", *map(str, counts)], rows))
    return "\n".join(lines)


# --- what hubs are ---------------------------------------------------------------------------------------------------


def overlap_experiment(options: argparse.Namespace) -> str:
    """Of hubs and of all patches: how many are outliers of norm, sinks, background, of low detail; float32."""
    vit = opened(options.model, options.data, "float32")
    folder = options.data / "coco-masks"
    paths = sorted((folder / "images").iterdir())[: options.images]
    shares = []
    for path in paths:
        image = Image.open(path).convert("RGB")
        mask = Image.open(folder / "masks" / f"{path.stem}.png")
        shares.append(_traits(vit, image, mask))
    traits = np.stack(shares)  # image layer trait (hubs, all)
    count = traits[..., 0, 2].mean(0)
    title = f"{MODELS[options.model]}, {len(paths)} COCO photographs: share of hubs | of all patches that are ..\n\n"
    rows = []
    for layer in range(traits.shape[1]):
        with_hubs = traits[:, layer, 0, 2] > 0
        cells = [
            f"{np.average(traits[with_hubs, layer, trait, 0]):.2f} / {traits[:, layer, trait, 1].mean():.2f}"
            if with_hubs.any() else "-"
            for trait in range(len(TRAITS))
        ]  # fmt: skip
        rows.append([f"L{layer}", f"{count[layer]:.1f}", f"{with_hubs.mean():.0%}", *cells])
    return title + table(["layer", "hubs", "images with any", *TRAITS], rows)


TRAITS = ("norm outlier", "sink", "background", "low detail", "border")


def _traits(vit: Vit, image: Image.Image, mask: Image.Image) -> np.ndarray:
    """[layer trait (share of hubs, share of patches, number of hubs)] of one photograph."""
    norms: list[Tensor] = []
    prepared = vit.prepare([image])
    batch = Batch(vit, prepared, torch.zeros(1, dtype=torch.int64), seed=0)
    keep = Readers(output=lambda layer, tokens: norms.append(tokens[0, batch.prefix :].norm(dim=-1)))
    vit.tap().read(prepared, keep)
    rows, columns = batch.grid
    pixels = np.asarray(vit.view(image).convert("L"), dtype=np.float32)
    side = pixels.shape[0] // rows
    detail = torch.as_tensor(pixels.reshape(rows, side, columns, side).std((1, 3)).flatten())
    seen = vit.preprocessing
    nearest = np.asarray(_same_view(seen, mask)) > 0
    background = torch.as_tensor(nearest.reshape(rows, side, columns, side).mean((1, 3)).flatten() < 0.1)
    found = np.zeros((batch.n_layers, len(TRAITS), 3))
    for layer, matrix in enumerate(batch.indicators("mean")):
        hub = find_hubs(matrix).hubs[0]
        received = batch.weights(layer)[0, :, batch.prefix :, batch.prefix :].mean((0, 1))
        has = (
            _outlying(norms[layer]), _outlying(received), background, detail <= detail.quantile(0.25),
            ~field.interior(batch.grid, 1),
        )  # fmt: skip
        for trait, patches in enumerate(has):
            share = float(patches[hub].float().mean()) if hub.any() else 0.0
            found[layer, trait] = share, float(patches.float().mean()), float(hub.sum())
    return found


def _outlying(values: Tensor) -> Tensor:
    return values > values.mean() + 2 * values.std()


def _same_view(preprocessing: Any, mask: Image.Image) -> Image.Image:
    """The mask resized and cropped as the photograph is, without mixing object numbers."""
    binary = mask.point(lambda value: 255 if value else 0).convert("RGB")
    return preprocessing.view(binary).convert("L").point(lambda value: 255 if value > 127 else 0)


# --- responsive fields -----------------------------------------------------------------------------------------------

NUMBERS = ("length", "length, interior", "size", "distance", "agreement, interior")


def field_experiment(options: argparse.Namespace) -> str:
    photographs = Photographs(options.data, options.images)

    def part(start: int) -> dict[str, np.ndarray]:
        vit = opened(options.model, options.data, options.precision)
        batch = Batch(vit, *photographs.batch(vit, start, options.batch), seed=start)
        return {"field": np.stack([_fields(batch, layer) for layer in range(batch.n_layers)], 1)}

    found = parts(options, part)["field"]  # image layer (as is, without hubs, null) number
    title = f"{MODELS[options.model]}, {len(found)} photographs: as it is | without hubs | shuffled within rows\n\n"
    rows = []
    for layer, values in enumerate(found.mean(0)):
        rows.append([f"L{layer}", *(" / ".join(f"{value:.2f}" for value in values[:, n]) for n in range(len(NUMBERS)))])
    return title + table(["layer", *NUMBERS], rows)


def _fields(batch: Batch, layer: int) -> np.ndarray:
    """[image (as is, without hubs, null) number] of one layer."""
    matrix = batch.indicators("mean")[layer]
    inside = field.interior(batch.grid, 3)
    kinds = matrix, without_hubs(matrix, find_hubs(matrix).hubs), field.shuffle_rows(matrix, batch.generator)
    found = []
    for kind in kinds:
        boxes, _ = windows.best_boxes(kind, batch.grid, batch.n_patches(0.25))
        pull = field.tendency(kind, windows.in_box(boxes, batch.grid), batch.grid)
        length = torch.linalg.vector_norm(pull, dim=-1)
        size = windows.smallest_areas(kind, batch.grid, 0.5) / kind.shape[-1]
        distance = field.interaction_distance(kind, batch.grid)
        numbers = (
            length.nanmean(1), length[:, inside].nanmean(1), size.mean(1), distance.mean(1),
            field.agreement(pull[:, inside]),
        )  # fmt: skip
        found.append(torch.stack(numbers, -1))
    return torch.stack(found, 1).numpy()
