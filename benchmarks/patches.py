"""The experiments behind docs/patches.md, on real photographs and two ImageNet models; one command each.

    python benchmarks/patches.py windows  --model vit_tiny            accuracy under windows and their controls
    python benchmarks/patches.py variants --model vit_tiny            adaptive areas, other indicators, heads, class token
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
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.patches import field, windows
from vitrail.patches.hubs import hubs, kept_share
from vitrail.patches.interaction import INDICATORS, indicator
from vitrail.vit.attention import LayerAttention, Readers
from vitrail.vit.edits import Edit
from vitrail.vit.open import Vit, open_vit

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"vit_tiny": "vit_tiny_patch16_224", "deit_tiny": "deit_tiny_patch16_224"}
AREAS = (0.10, 0.15, 0.20, 0.25, 0.36, 0.44, 0.60)
N_RESAMPLES = 5000

Condition = Callable[["Batch"], Sequence[Edit]]


# --- photographs and models ------------------------------------------------------------------------------------------


class Photographs:
    """The labelled photographs in a fixed order at random, so that the first n are a fair sample."""

    def __init__(self, data: Path, n_images: int) -> None:
        classes = (data / "models/imagenet_classes.txt").read_text().splitlines()
        index = {line.split()[0]: number for number, line in enumerate(classes)}
        paths = sorted(path for folder in (data / "imagenet-sample").iterdir() for path in folder.iterdir())
        order = np.random.default_rng(0).permutation(len(paths))[:n_images]
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
        self.grid, self.prefix, self.n_layers = block.grid, block.prefix, vit.n_layers
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
        if name == "gradient":
            pulls = self._pulls()
            return [indicator(w, self.prefix, name, gradient=pulls[layer]) for layer, (w, _, _) in enumerate(self._seen)]
        if name.startswith("head"):
            head = slice(int(name[4:]), int(name[4:]) + 1)
            return [indicator(weights[:, head], self.prefix) for weights, _, _ in self._seen]
        return [indicator(w, self.prefix, name, v=v, out=out) for w, v, out in self._seen]

    def _pulls(self) -> list[Tensor]:
        """A dp(label)/dA of every layer, through a region of ones."""
        ones = [torch.ones_like(weights).requires_grad_() for weights, _, _ in self._seen]
        with torch.enable_grad():
            logits = self.vit.tap().read(self.images, edits=[Edit(layer, region=one) for layer, one in enumerate(ones)])
            logits.float().softmax(-1).gather(1, self.labels[:, None]).sum().backward()
        return [one.grad for one in ones if one.grad is not None]

    def n_patches(self, share: float) -> int:
        return windows.n_patches_of(share, self.grid)

    def boxes(self, share: float, name: str = "mean") -> list[Tensor]:
        """The best boxes of an area, per layer."""
        key = (name, self.n_patches(share))
        if key not in self._best:
            self._best[key] = [windows.best_boxes(each, self.grid, key[1])[0] for each in self.indicators(name)]
        return self._best[key]

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


def centred_box(batch: Batch, share: float) -> list[Edit]:
    """The same shape as the best box, centred on the query."""
    centred = [windows.centred_boxes(boxes, batch.grid) for boxes in batch.boxes(share)]
    return batch.edits([windows.masks(boxes, batch.grid) for boxes in centred])


def centred_square(batch: Batch, share: float) -> list[Edit]:
    """The squarest box of that many patches, centred on the query."""
    best = min(
        windows.shapes_of_area(batch.grid, batch.n_patches(share)), key=lambda shape: (-shape[0] * shape[1] // 2 * 2, abs(shape[0] - shape[1]))
    )
    squarest = min(windows.shapes_of_area(batch.grid, batch.n_patches(share)), key=lambda s: (abs(s[0] - s[1]), -s[0] * s[1]))
    del best
    boxes = torch.tensor([0, 0, *squarest]).expand(1, batch.grid[0] * batch.grid[1], 4)
    mask = windows.masks(windows.centred_boxes(boxes, batch.grid), batch.grid)
    return batch.edits([mask] * batch.n_layers)


def top_keys(batch: Batch, share: float) -> list[Edit]:
    pairs = zip(batch.indicators("mean"), batch.boxes(share), strict=True)
    return batch.edits([windows.top_keys(each, windows.areas(boxes)) for each, boxes in pairs])


def complement(batch: Batch, share: float) -> list[Edit]:
    return batch.edits([windows.complements(boxes, batch.grid) for boxes in batch.boxes(share)])


def with_share(condition: Callable[..., Sequence[Edit]], share: float, *more: Any) -> Condition:
    return lambda batch: condition(batch, share, *more)


def window_conditions() -> dict[str, Condition]:
    kinds = {
        "window": window, "random box": random_box, "centred box": centred_box, "centred square": centred_square,
        "top keys": top_keys, "complement": complement,
    }  # fmt: skip
    return {f"{kind}@{share}": with_share(run, share) for share in AREAS for kind, run in kinds.items()}


LEVELS = (0.04, 0.07, 0.1, 0.14, 0.18, 0.22, 0.25, 0.3, 0.36, 0.43, 0.5, 0.6, 0.75, 1.0)


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
    n_heads = batch.weights(0).shape[1]
    by_head = [batch.boxes(share, f"head{head}") for head in range(n_heads)]
    return batch.edits(
        [windows.masks(torch.stack(boxes, 1), batch.grid) for boxes in zip(*by_head, strict=True)], heads=True
    )


def with_class_token(batch: Batch, share: float) -> list[Edit]:
    """The class token too sees one window of each layer: the box that holds most of its attention."""
    edits = window(batch, share)
    for layer, edit in enumerate(edits):
        asks = batch.weights(layer)[:, :, 0, batch.prefix :].mean(1, keepdim=True)
        box, _ = windows.best_boxes(asks, batch.grid, batch.n_patches(share))
        assert edit.bias is not None
        edit.bias[:, 0, 0, batch.prefix :].masked_fill_(~windows.in_box(box, batch.grid)[:, 0], -torch.inf)
    return edits


def without_hubs(batch: Batch, share: float) -> list[Edit]:
    cleaned = [hubs(each).without for each in batch.indicators("mean")]
    found = [windows.best_boxes(each, batch.grid, batch.n_patches(share))[0] for each in cleaned]
    return batch.edits([windows.masks(boxes, batch.grid) for boxes in found])


def with_hubs_open(batch: Batch, share: float) -> list[Edit]:
    """Best boxes of the indicator without hubs, and the hubs open to every query (beyond the area)."""
    kept = []
    for each in batch.indicators("mean"):
        cleaned = hubs(each)
        boxes, _ = windows.best_boxes(cleaned.without, batch.grid, batch.n_patches(share) - 4)
        kept.append(windows.masks(boxes, batch.grid) | cleaned.found[:, None])
    return batch.edits(kept)


def variant_conditions() -> dict[str, Condition]:
    found: dict[str, Condition] = {}
    for share in (0.15, 0.25, 0.44):
        for name in INDICATORS:
            found[f"window, {name}@{share}"] = with_share(window, share, name)
        for kind, run in {
            "shared in a layer": shared, "shared over layers": shared_by_layers, "a box per head": per_head,
            "class token too": with_class_token, "hubs removed first": without_hubs, "hubs open": with_hubs_open,
        }.items():  # fmt: skip
            found[f"{kind}@{share}"] = with_share(run, share)
    for held in (0.5, 0.7):
        found[f"smallest box holding@{held}"] = with_share(smallest, held)
    return found


# --- running conditions ----------------------------------------------------------------------------------------------


def run_conditions(options: argparse.Namespace, conditions: dict[str, Condition]) -> dict[str, np.ndarray]:
    """For each condition and image: top-1 right, probability of the label, share of the map left open."""
    photographs = Photographs(options.data, options.images)
    vit = opened(options.model, options.data, options.precision)
    parts = []
    for start in range(0, options.images, options.batch):
        file = cache_file(options, f"{start:05d}.npz")
        if not file.exists():
            batch = Batch(vit, *photographs.batch(vit, start, options.batch), seed=start)
            found = {"full": answers(batch, batch.logits, 1.0)}
            for name, condition in conditions.items():
                edits = condition(batch)
                found[name] = answers(batch, vit.tap().read(batch.images, edits=edits), open_share(edits, batch.prefix))
            save(file, found)
            print(f"{time.strftime('%H:%M:%S')} {options.model} {start + options.batch}", flush=True)
        with np.load(file) as held:
            parts.append(dict(held))
    return {name: np.concatenate([part[name] for part in parts])[: options.images] for name in parts[0]}


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
        kind, _, share = name.partition("@")
        rows.append([
            f"{float(share):.0%}", kind, f"{values[:, 2].mean():.3f}", f"{values[:, 0].mean():.3f}",
            shown(interval(values[:, 0] - full[:, 0])), f"{values[:, 1].mean():.3f}",
            shown(interval(values[:, 1] - full[:, 1])),
        ])  # fmt: skip
    head = ["area", "what a patch sees", "open", "top-1", "change, points", "p(label)", "change x 100"]
    print(table(head, rows))


def windows_experiment(options: argparse.Namespace) -> None:
    print_conditions(options, run_conditions(options, window_conditions()))


def variants_experiment(options: argparse.Namespace) -> None:
    print_conditions(options, run_conditions(options, variant_conditions()))


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "windows": windows_experiment,
    "variants": variants_experiment,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--model", choices=MODELS, default="vit_tiny")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--cache", type=Path, default=ROOT / ".build/patches")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        EXPERIMENTS[options.experiment](options)


if __name__ == "__main__":
    main()
