"""The experiments behind docs/patches.md, on real photographs and two ImageNet models; one command each.

    python benchmarks/patches.py windows  --model vit_tiny            accuracy under windows and their controls
    python benchmarks/patches.py variants --model vit_tiny            adaptive areas, other indicators, boxes per head
    python benchmarks/patches.py sinks    --model vit_tiny            windows that need not stretch to hold sinks
    python benchmarks/patches.py referee  --model vit_tiny            which indicator agrees with causal removal
    python benchmarks/patches.py removal  --model vit_tiny            dropping hubs, random and other patches
    python benchmarks/patches.py overlap  --model vit_tiny            hubs against norms, sinks, detail, objects
    python benchmarks/patches.py field    --model vit_tiny            tendencies and distances with their nulls
    python benchmarks/patches.py speed    --model vit_tiny            the cost of the collector

Each prints a markdown table. All but `speed` write what they have after every batch to --cache and go on from there.
Models and photographs are looked for in --data; they come with no package.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.measure import ROOMS
from vitrail.patches import budget, collectors, field, windows
from vitrail.patches.hubs import hubs, kept_share, without_hubs
from vitrail.patches.interaction import INDICATORS, between_patches, indicator, normalised
from vitrail.vit.attention import LayerAttention, Readers
from vitrail.vit.edits import Edit
from vitrail.vit.open import Vit, open_vit
from vitrail.vit.tap import Replay

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"vit_tiny": "vit_tiny_patch16_224", "deit_tiny": "deit_tiny_patch16_224"}
AREAS = (0.10, 0.25, 0.44, 0.60)
CHOOSING = 60
"""The first photographs served to choose the rule, and to price its heads; windows are tried on the rest."""
N_PRICED = 20
N_FEW = 100
"""Photographs for conditions whose effect is so large, or which are so secondary, that more would tell nothing new."""
N_RESAMPLES = 5000

Condition = Callable[["Batch"], Sequence[Edit]]


# --- photographs and models ------------------------------------------------------------------------------------------


class Photographs:
    """The labelled photographs in a fixed order at random, so that the first n are a fair sample."""

    def __init__(self, data: Path, n_images: int, skip: int = 0) -> None:
        classes = (data / "models/imagenet_classes.txt").read_text().splitlines()
        index = {line.split()[0]: number for number, line in enumerate(classes)}
        paths = sorted(path for folder in (data / "imagenet-sample").iterdir() for path in folder.iterdir())
        order = np.random.default_rng(0).permutation(len(paths))[skip : skip + n_images]
        self.paths = [paths[number] for number in order]
        self.labels = np.array([index[path.parent.name] for path in self.paths])

    def batch(self, vit: Vit, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Prepared images and labels of one batch."""
        images = [Image.open(path).convert("RGB") for path in self.paths[start : start + size]]
        return vit.prepare(images), torch.as_tensor(self.labels[start : start + size])


def opened(name: str, data: Path, precision: str) -> Vit:
    return open_vit(f"timm:{MODELS[name]}", weights=data / f"models/{MODELS[name]}.safetensors", precision=precision)


class Batch:
    """A batch and what one plain pass says of it: an indicator per layer, made when first asked for."""

    def __init__(self, vit: Vit, images: Tensor, labels: Tensor, seed: int) -> None:
        self.vit, self.images, self.labels = vit, images, labels
        self.generator = torch.Generator().manual_seed(seed)
        block = vit.anatomy.blocks[0]
        assert block.grid is not None
        self.grid, self.prefix = block.grid, block.prefix
        self.n_layers, self.n_heads = vit.n_layers, block.heads
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.logits = vit.tap().read(images, Readers(attention=self._keep))
        self._best: dict[tuple[str, int], list[Tensor]] = {}

    def _keep(self, attention: LayerAttention) -> None:
        assert attention.out is not None
        self._seen.append((attention.weights(), attention.v[:, 0], attention.out[:, 0]))

    def weights(self, layer: int) -> Tensor:
        return self._seen[layer][0]

    @functools.cache  # noqa: B019  a batch lives as long as its cache
    def indicators(self, name: str) -> list[Tensor]:
        """One indicator [image patch other] per layer; "head0", "head1", .. are single heads."""
        if name.startswith("gradient"):
            pulls = self._pulls(self.labels if name == "gradient, true label" else self.logits.argmax(-1))
            return [
                indicator(seen[0], self.prefix, "gradient", gradient=pull)
                for seen, pull in zip(self._seen, pulls, strict=True)
            ]
        if name.startswith("head"):
            head = slice(int(name[4:]), int(name[4:]) + 1)
            return [indicator(weights[:, head], self.prefix) for weights, _, _ in self._seen]
        return [indicator(w, self.prefix, name, v=v, out=out) for w, v, out in self._seen]

    def _pulls(self, label: Tensor) -> list[Tensor]:
        """A dp(label)/dA of every layer, through a region of ones."""
        ones = [torch.ones_like(weights).requires_grad_() for weights, _, _ in self._seen]
        with torch.enable_grad():
            logits = self.vit.tap().read(self.images, edits=[Edit(layer, region=one) for layer, one in enumerate(ones)])
            logits.float().softmax(-1).gather(1, label[:, None]).sum().backward()
        return [one.grad for one in ones if one.grad is not None]

    def n_patches(self, share: float) -> int:
        return windows.n_patches_of(share, self.grid)

    @functools.cache  # noqa: B019
    def ranks(self) -> list[Tensor]:
        """For each query the rank of each key by the mean indicator, the query itself before all others."""
        found = []
        for each in self.indicators("mean"):
            order = (each + 2 * torch.eye(each.shape[-1])).argsort(-1, descending=True)
            found.append(torch.empty_like(order).scatter_(-1, order, torch.arange(each.shape[-1]).expand_as(order)) - 1)
        return found

    def boxes(self, share: float, name: str = "mean") -> list[Tensor]:
        """The best boxes of an area, per layer."""
        key = (name, self.n_patches(share))
        if key not in self._best:
            self._best[key] = [windows.best_boxes(each, self.grid, key[1])[0] for each in self.indicators(name)]
        return self._best[key]

    @functools.cache  # noqa: B019
    def level_boxes(self) -> Tensor:
        """For each query the best boxes of several areas, [image layer head patch level side]."""
        found = [budget.boxes_of_levels(weights, self.prefix, self.grid) for weights, _, _ in self._seen]
        return torch.stack(found, 1)

    @functools.cache  # noqa: B019
    def changes(self) -> Tensor:
        """How far each of those boxes moves its head's output, [image layer head patch level]."""
        boxes = self.level_boxes().unbind(1)
        seen = zip(self._seen, boxes, strict=True)
        return torch.stack([budget.changes(w, v, each, self.prefix, self.grid) for (w, v, _), each in seen], 1)

    @functools.cache  # noqa: B019
    def bought(self, share: float, prices: Callable[[], Tensor] | None) -> list[Tensor]:
        """A box [image head patch side] per layer: areas shared by what they cost the answer, or by mass alone."""
        boxes = self.level_boxes()
        size = windows.areas(boxes)
        cost = self._missed(boxes) if prices is None else prices()[:, :, None, None] * self.changes()
        level = budget.chosen(cost, size, self.n_patches(share))
        return list(boxes.gather(-2, level[..., None, None].expand(*level.shape, 1, 4))[..., 0, :].unbind(1))

    def _missed(self, boxes: Tensor) -> Tensor:
        found = []
        for (weights, _, _), each in zip(self._seen, boxes.unbind(1), strict=True):
            matrix = normalised(between_patches(weights, self.prefix))
            held = [(matrix * windows.in_box(box, self.grid)).sum(-1) for box in each.unbind(-2)]
            found.append(1 - torch.stack(held, -1))
        return torch.stack(found, 1)

    def edits(self, masks: Sequence[Tensor], heads: bool = False) -> list[Edit]:
        """Every layer under its mask [image patch other], or [image head patch other]."""
        biases = [windows.attention_bias(mask, self.prefix) for mask in masks]
        return [Edit(layer, bias=bias if heads else bias[:, None]) for layer, bias in enumerate(biases)]


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
    masks = []
    for layer, boxes in enumerate(batch.bought(share, prices)):
        if place == "keys":
            matrix = normalised(between_patches(batch.weights(layer), batch.prefix))
            masks.append(windows.top_keys(matrix, windows.areas(boxes)))
            continue
        if place == "centred":
            boxes = windows.centred_boxes(boxes, batch.grid)
        if place == "random":
            boxes = windows.random_boxes(boxes, batch.grid, batch.generator)
        masks.append(windows.masks(boxes, batch.grid))
    return batch.edits(masks, heads=True)


def window_conditions(prices: Prices) -> dict[str, Condition]:
    """The plain window and the budget, each with the control that is hardest to beat; `few`: on `N_FEW` photographs."""
    found: dict[str, Condition] = {}
    for share in AREAS:
        few = "" if share < 0.5 else ", few"
        found[f"one box@{share}{few}"] = with_share(window, share)
        found[f"one box: centred square@{share}{few}"] = with_share(centred_square, share)
        found[f"budget@{share}{few}"] = with_share(bought, share, prices)
        found[f"budget: same boxes, centred@{share}{few}"] = with_share(bought, share, prices, "centred")
    found |= {
        "one box: random place@0.25, few": with_share(random_box, 0.25),
        "one box: strongest keys@0.25, few": with_share(top_keys, 0.25),
        "one box: complement@0.25, few": with_share(complement, 0.25),
        "budget: same boxes, random place@0.25, few": with_share(bought, 0.25, prices, "random"),
        "budget: strongest keys@0.25, few": with_share(bought, 0.25, prices, "keys"),
        "a box per head, one area@0.25, few": with_share(per_head, 0.25),
        "a box per head, areas shared by mass@0.25, few": with_share(bought, 0.25, None),
    }
    return found


def priced(options: argparse.Namespace, vit: Vit) -> Prices:
    """Prices of the heads of a model, measured on the first photographs and kept beside the parts."""

    @functools.cache
    def prices() -> Tensor:
        file = cache_file(options, "prices.npz")
        if not file.exists():
            images, _ = Photographs(options.data, N_PRICED).batch(vit, 0, N_PRICED)
            half = [budget.prices(vit, part) for part in images.split(N_PRICED // 2)]
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
    cleaned = [without_hubs(each, hubs(each).found) for each in batch.indicators("mean")]
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
    options: argparse.Namespace, made: Callable[[Vit], dict[str, Condition]], skip: int = 0
) -> dict[str, np.ndarray]:
    """For each condition and image: top-1 right, probability of the label, share of the map left open."""
    photographs = Photographs(options.data, options.images, skip)
    options.images = len(photographs.paths)
    vit = opened(options.model, options.data, options.precision)
    conditions = made(vit)
    parts = []
    for start in range(0, options.images, options.batch):
        file = cache_file(options, f"{start:05d}.npz")
        if not file.exists():
            batch = Batch(vit, *photographs.batch(vit, start, options.batch), seed=start)
            found = {"full": answers(batch, batch.logits, 1.0)}
            for name, condition in conditions.items():
                if name.endswith("few") and start >= N_FEW:
                    continue
                edits = condition(batch)
                found[name] = answers(batch, vit.tap().read(batch.images, edits=edits), open_share(edits, batch.prefix))
            save(file, found)
            print(f"{time.strftime('%H:%M:%S')} {options.model} {start + options.batch}", flush=True)
        with np.load(file) as held:
            parts.append(dict(held))
    every = {name: [part[name] for part in parts if name in part] for name in parts[0]}
    return {name: np.concatenate(several)[: options.images] for name, several in every.items()}


def answers(batch: Batch, logits: Tensor, share: float) -> np.ndarray:
    logits = logits.float()
    right = logits.argmax(-1) == batch.labels
    probability = logits.softmax(-1).gather(1, batch.labels[:, None])[:, 0]
    return torch.stack([right.float(), probability, torch.full_like(probability, share)], 1).numpy()


def open_share(edits: Sequence[Edit], prefix: int) -> float:
    """Mean share of the patches that a patch may see."""
    shares = [(edit.bias[..., prefix:, prefix:] == 0).float().mean() for edit in edits if edit.bias is not None]
    return float(torch.stack(shares).mean())


def cache_file(options: argparse.Namespace, name: str) -> Path:
    folder = options.cache / f"{options.experiment}-{options.model}-{options.precision}-{options.batch}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all."""
    unfinished = file.with_suffix(".tmp.npz")
    np.savez(unfinished, **arrays)
    unfinished.rename(file)


# --- tables ----------------------------------------------------------------------------------------------------------


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over images of paired differences, in points (hundredths)."""
    draws = np.random.default_rng(0).integers(0, len(differences), (N_RESAMPLES, len(differences)))
    means = differences[draws].mean(1) * 100
    low, high = np.percentile(means, [2.5, 97.5])
    return float(differences.mean() * 100), float(low), float(high)


def shown(values: tuple[float, float, float]) -> str:
    return f"{values[0]:+.1f} [{values[1]:+.1f}, {values[2]:+.1f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def print_conditions(options: argparse.Namespace, found: dict[str, np.ndarray]) -> None:
    full = found["full"]
    print(
        f"\n{MODELS[options.model]}, {len(full)} photographs, {options.precision}; full attention: "
        f"top-1 {full[:, 0].mean():.3f}, probability of the label {full[:, 1].mean():.3f}\n"
    )
    rows = []
    for name, values in found.items():
        if name == "full":
            continue
        kind, _, share = name.removesuffix(", few").partition("@")
        plain = full[: len(values)]
        rows.append([
            f"{float(share):.0%}", kind, str(len(values)), f"{values[:, 2].mean():.3f}", f"{values[:, 0].mean():.3f}",
            shown(interval(values[:, 0] - plain[:, 0])), f"{values[:, 1].mean():.3f}",
            shown(interval(values[:, 1] - plain[:, 1])),
        ])  # fmt: skip
    rows.sort(key=lambda row: float(row[0][:-1]))
    head = ["area", "what a patch sees", "photographs", "open", "top-1", "change, points", "p(label)", "change x 100"]
    print(table(head, rows))


def windows_experiment(options: argparse.Namespace) -> None:
    print_conditions(options, run_conditions(options, lambda vit: window_conditions(priced(options, vit)), CHOOSING))


def variants_experiment(options: argparse.Namespace) -> None:
    print_conditions(options, run_conditions(options, lambda _: variant_conditions()))


# --- the causal referee ----------------------------------------------------------------------------------------------

EFFECTS = ("pair: token", "pair: class token", "pair: p", "key: class token", "key: p")
REFEREE_LAYERS = (0, 2, 4, 6, 8, 10)
N_PAIRS = 8
"""Pairs, and keys, whose effect on the answer is measured per image and layer."""


def referee_experiment(options: argparse.Namespace) -> None:
    """Rank agreement of each indicator with what masking really changes; float32, for the changes are small."""
    options.precision = "float32"
    photographs = Photographs(options.data, options.images)
    vit = opened(options.model, options.data, "float32")
    parts = []
    for start in range(0, options.images, options.batch):
        file = cache_file(options, f"{start:05d}.npz")
        if not file.exists():
            batch = Batch(vit, *photographs.batch(vit, start, options.batch), seed=start)
            save(file, {"spearman": np.stack([_agreement(batch, layer) for layer in REFEREE_LAYERS], 1)})
            print(f"{time.strftime('%H:%M:%S')} {options.model} {start + options.batch}", flush=True)
        with np.load(file) as held:
            parts.append(held["spearman"])
    by_image = np.concatenate(parts)[: options.images].mean(1)  # image indicator effect
    print(f"\n{MODELS[options.model]}, {len(by_image)} photographs, layers {REFEREE_LAYERS}; Spearman, mean [95 %]\n")
    rows = []
    for index, name in enumerate(INDICATORS):
        cells = [interval(by_image[:, index, effect] / 100) for effect in range(len(EFFECTS))]
        rows.append([name, *(f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in cells)])
    print(table(["indicator", *EFFECTS], rows))


def _agreement(batch: Batch, layer: int) -> np.ndarray:
    """Spearman correlations [image indicator effect] of one layer."""
    replay, logits = batch.vit.tap().record(batch.images)
    effects = _effects(batch, layer, replay, logits)
    found = np.empty((len(batch.images), len(INDICATORS), len(EFFECTS)))
    for index, name in enumerate(INDICATORS):
        matrix = batch.indicators(name)[layer]
        for image in range(len(matrix)):
            for column, (effect, (query, key)) in enumerate(effects):
                strength = (
                    matrix[image].sum(0)[key[image]] if query is None else matrix[image][query[image], key[image]]
                )
                found[image, index, column] = spearman(strength.numpy(), effect[image].numpy())
    return found


Effect = tuple[Tensor, tuple[Tensor | None, Tensor]]
"""What changed, and which query and key were parted (no query: all of them); [image pair] each."""


def _effects(batch: Batch, layer: int, replay: Replay, logits: Tensor) -> list[Effect]:
    n_images, n_patches = len(batch.images), batch.grid[0] * batch.grid[1]
    draw = functools.partial(torch.randint, generator=batch.generator)
    everyone = torch.arange(n_patches).expand(n_images, -1)
    other = (everyone + draw(1, n_patches, (n_images, n_patches))) % n_patches
    query = draw(0, n_patches, (n_images, N_PAIRS))
    key = (query + draw(1, n_patches, (n_images, N_PAIRS))) % n_patches
    own = _token_change(batch, layer, replay, other)
    pair_class, pair_p = _answer_change(batch, layer, replay, logits, query, key)
    key_class, key_p = _answer_change(batch, layer, replay, logits, None, key)
    return [
        (own, (everyone, other)), (pair_class, (query, key)), (pair_p, (query, key)),
        (key_class, (None, key)), (key_p, (None, key)),
    ]  # fmt: skip


def _token_change(batch: Batch, layer: int, replay: Replay, key: Tensor) -> Tensor:
    """How far each patch's token moves, relative to its length, if it cannot see one key of its own; [image patch]."""
    bias = torch.zeros((len(key), 1, *batch.weights(layer).shape[-2:]))
    bias[:, 0, batch.prefix :, batch.prefix :].scatter_(-1, key[..., None], -torch.inf)
    seen: list[Tensor] = []
    keep = Readers(residual=lambda at, tokens: seen.append(tokens.clone()) if at == layer else None)
    batch.vit.tap().run_from(layer, replay, [Edit(layer, bias=bias, copy=1)], 2, keep, until_residual=True)
    before, after = seen[0][:, batch.prefix :].unflatten(0, (2, -1))
    return (after - before).norm(dim=-1) / before.norm(dim=-1)


def _answer_change(
    batch: Batch, layer: int, replay: Replay, logits: Tensor, query: Tensor | None, key: Tensor
) -> tuple[Tensor, Tensor]:
    """Relative change of the last class token, and |change| of p(own answer), for each pair; [image pair]."""
    copies = key.shape[1]
    edits = []
    for copy in range(copies):
        bias = torch.zeros((len(key), 1, *batch.weights(layer).shape[-2:]))
        image = torch.arange(len(key))
        row = slice(None) if query is None else batch.prefix + query[:, copy]
        bias[image, 0, row, batch.prefix + key[:, copy]] = -torch.inf
        edits.append(Edit(layer, bias=bias, copy=copy))
    last: list[Tensor] = []
    keep = Readers(output=lambda at, tokens: last.append(tokens[:, 0].clone()) if at == batch.n_layers - 1 else None)
    tap = batch.vit.tap()
    changed = tap.run_from(layer, replay, edits, copies, keep).unflatten(0, (copies, -1))
    tap.run_from(batch.n_layers - 1, replay, readers=keep)
    after, before = last[0].unflatten(0, (copies, -1)), last[1]
    answer = logits.argmax(-1)
    p = [each.softmax(-1)[..., torch.arange(len(key)), answer] for each in (changed, logits)]
    return ((after - before).norm(dim=-1) / before.norm(dim=-1)).T, (p[0] - p[1]).abs().T


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    ranks = [each.argsort().argsort().astype(float) for each in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


# --- removing patches ------------------------------------------------------------------------------------------------

DROPPED = {0: (60,), 6: (40, 100, 140)}
"""Patches dropped before a block."""


def orders(batch: Batch) -> dict[str, Tensor]:
    """Patches [image patch] in the order in which each rule removes them, from what all layers of a plain pass say."""
    received = {name: torch.stack(batch.indicators(name)).sum(2).mean(0) for name in ("mean", "removal")}
    layers = range(batch.n_layers)
    kept = torch.stack([kept_share(each) for each in batch.indicators("mean")]).mean(0)
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
        found = hubs(matrix).found
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


def removal_experiment(options: argparse.Namespace) -> None:
    photographs = Photographs(options.data, options.images)
    vit = opened(options.model, options.data, options.precision)
    parts = []
    for start in range(0, options.images, options.batch):
        file = cache_file(options, f"{start:05d}.npz")
        if not file.exists():
            save(file, _removals(Batch(vit, *photographs.batch(vit, start, options.batch), seed=start)))
            print(f"{time.strftime('%H:%M:%S')} {options.model} {start + options.batch}", flush=True)
        with np.load(file) as held:
            parts.append(dict(held))
    found = {name: np.concatenate([part[name] for part in parts])[: options.images] for name in parts[0]}
    _print_removals(options, found)


def _removals(batch: Batch) -> dict[str, np.ndarray]:
    found = {"full": answers(batch, batch.logits, 1.0)}
    closed = hub_masks(batch)
    n_hubs = float(torch.stack([hubs(each).found.sum(-1).float() for each in batch.indicators("mean")]).mean())
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


def _print_removals(options: argparse.Namespace, found: dict[str, np.ndarray]) -> None:
    full = found.pop("full")
    print(
        f"\n{MODELS[options.model]}, {len(full)} photographs, {options.precision}; all patches: top-1 "
        f"{full[:, 0].mean():.3f}\n"
    )
    masked = {name.partition("|")[2]: values for name, values in found.items() if name.startswith("masked")}
    print(f"Each layer's own hubs closed to all in that layer, {masked['hubs'][:, 2].mean():.1f} a layer on average:\n")
    rows = [
        [name, f"{values[:, 0].mean():.3f}", *(shown(interval(values[:, n] - full[:, n])) for n in (0, 1))]
        for name, values in masked.items()
    ]  # fmt: skip
    print(table(["closed", "top-1", "change, points", "change of p(label) x 100"], rows))
    for start, counts in DROPPED.items():
        print(f"\nTokens dropped before L{start}, top-1 and its change in points:\n")
        names = dict.fromkeys(name.split("|")[1] for name in found if name.startswith(f"{start}|"))
        rows = []
        for name in names:
            cells = [found[f"{start}|{name}|{count}"][:, 0] for count in counts]
            rows.append([name, *(f"{each.mean():.3f} ({shown(interval(each - full[:, 0]))})" for each in cells)])
        print(table(["order", *map(str, counts)], rows))


# --- what hubs are ---------------------------------------------------------------------------------------------------


def overlap_experiment(options: argparse.Namespace) -> None:
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
    print(f"\n{MODELS[options.model]}, {len(paths)} COCO photographs: share of hubs | of all patches that are ..\n")
    rows = []
    for layer in range(traits.shape[1]):
        with_hubs = traits[:, layer, 0, 2] > 0
        cells = [
            f"{np.average(traits[with_hubs, layer, trait, 0]):.2f} / {traits[:, layer, trait, 1].mean():.2f}"
            if with_hubs.any() else "-"
            for trait in range(len(TRAITS))
        ]  # fmt: skip
        rows.append([f"L{layer}", f"{count[layer]:.1f}", f"{with_hubs.mean():.0%}", *cells])
    print(table(["layer", "hubs", "images with any", *TRAITS], rows))


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
        hub = hubs(matrix).found[0]
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


def field_experiment(options: argparse.Namespace) -> None:
    photographs = Photographs(options.data, options.images)
    vit = opened(options.model, options.data, options.precision)
    parts = []
    for start in range(0, options.images, options.batch):
        file = cache_file(options, f"{start:05d}.npz")
        if not file.exists():
            batch = Batch(vit, *photographs.batch(vit, start, options.batch), seed=start)
            save(file, {"field": np.stack([_fields(batch, layer) for layer in range(batch.n_layers)], 1)})
            print(f"{time.strftime('%H:%M:%S')} {options.model} {start + options.batch}", flush=True)
        with np.load(file) as held:
            parts.append(held["field"])
    found = np.concatenate(parts)[: options.images]  # image layer (as is, without hubs, null) number
    print(f"\n{MODELS[options.model]}, {len(found)} photographs: as it is | without hubs | shuffled within rows\n")
    rows = []
    for layer, values in enumerate(found.mean(0)):
        rows.append([f"L{layer}", *(" / ".join(f"{value:.2f}" for value in values[:, n]) for n in range(len(NUMBERS)))])
    print(table(["layer", *NUMBERS], rows))


def _fields(batch: Batch, layer: int) -> np.ndarray:
    """[image (as is, without hubs, null) number] of one layer."""
    matrix = batch.indicators("mean")[layer]
    inside = field.interior(batch.grid, 3)
    kinds = matrix, without_hubs(matrix, hubs(matrix).found), field.shuffled(matrix, batch.generator)
    found = []
    for kind in kinds:
        boxes, _ = windows.best_boxes(kind, batch.grid, batch.n_patches(0.25))
        pull = field.tendency(kind, windows.in_box(boxes, batch.grid), batch.grid)
        length = torch.linalg.vector_norm(pull, dim=-1)
        size = windows.held_area(kind, batch.grid, 0.5) / kind.shape[-1]
        distance = field.interaction_distance(kind, batch.grid)
        numbers = (
            length.nanmean(1), length[:, inside].nanmean(1), size.mean(1), distance.mean(1),
            field.agreement(pull[:, inside]),
        )  # fmt: skip
        found.append(torch.stack(numbers, -1))
    return torch.stack(found, 1).numpy()


# --- speed -----------------------------------------------------------------------------------------------------------


def speed_experiment(options: argparse.Namespace) -> None:
    """Processor time of the collectors over the plain pass, interleaved, best of rounds."""
    vit = opened(options.model, options.data, "float32")
    images, labels = Photographs(options.data, 16).batch(vit, 0, 16)
    tap = vit.tap()

    def collected(names: Sequence[str]) -> Callable[[], Any]:
        def run() -> None:
            (collector,) = collectors(vit, names)
            replay, logits = tap.record(images, collector.readers())
            collector.finish(tap, replay, logits, labels.numpy())

        return run

    runs: dict[str, Callable[[], Any]] = {"plain pass": lambda: tap.record(images)}
    runs["attention weights alone"] = lambda: tap.record(images, Readers(attention=lambda seen: seen.weights()))
    runs |= {name: collected([name]) for name in ROOMS["patches"]} | {"all of the room": collected(ROOMS["patches"])}
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(7):
        for name, run in runs.items():
            began = time.process_time()
            run()
            spent[name].append(time.process_time() - began)
    plain = np.array(spent["plain pass"])
    rows = [
        [name, f"{min(took) / 16 * 1000:.1f}", f"{min(took) / plain.min():.2f}", f"{np.median(took / plain):.2f}"]
        for name, took in spent.items()
    ]
    print(table([MODELS[options.model], "ms an image", "ratio, best", "ratio, median of paired"], rows))
    print()
    rows = []
    half = opened(options.model, options.data, options.precision)
    batch = Batch(half, *Photographs(options.data, 16).batch(half, 0, 16), seed=0)
    order = orders(batch)["random"]
    for count in (0, 40, 60, 100, 140):
        took = []
        for _ in range(5):
            began = time.process_time()
            dropped_logits(batch, tokens_at(batch, 0), order, count, 0)
            took.append(time.process_time() - began)
        rows.append([str(count), f"{min(took) / 16 * 1000:.1f}"])
    print(table(["tokens dropped before L0", f"ms an image, {options.precision}"], rows))


def sinks_experiment(options: argparse.Namespace) -> None:
    print_conditions(options, run_conditions(options, lambda _: sink_conditions()))


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "windows": windows_experiment,
    "variants": variants_experiment,
    "sinks": sinks_experiment,
    "referee": referee_experiment,
    "removal": removal_experiment,
    "overlap": overlap_experiment,
    "field": field_experiment,
    "speed": speed_experiment,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--model", choices=MODELS, default="vit_tiny")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--cache", type=Path, default=ROOT / ".build/patches")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        EXPERIMENTS[options.experiment](options)


if __name__ == "__main__":
    main()
