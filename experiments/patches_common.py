"""Photographs, one plain pass and its indicators, cached parts and tables: what the experiments on patches share."""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor

from vitrail.models.open import Vit, open_vit
from vitrail.patches import budget, verify, windows
from vitrail.patches.head_windows import head_windows
from vitrail.patches.interaction import between_patches, indicator, normalise_rows
from vitrail.stats import mean_interval
from vitrail.tap.attention import LayerAttention, Readers
from vitrail.tap.edits import Edit

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"vit_tiny": "vit_tiny_patch16_224", "deit_tiny": "deit_tiny_patch16_224"}
OTHER_MODELS = {"vit_base": "vit_base_patch16_224"}


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


@functools.cache
def opened(name: str, data: Path, precision: str) -> Vit:
    """A model with its weights; of `OTHER_MODELS` no weights are at hand, so theirs are random: good for time alone."""
    if name in OTHER_MODELS:
        return open_vit(timm.create_model(OTHER_MODELS[name], pretrained=False).eval(), precision=precision)
    return open_vit(f"timm:{MODELS[name]}", weights=data / f"models/{MODELS[name]}.safetensors", precision=precision)


def _once(method: Callable[..., Any]) -> Callable[..., Any]:
    """Remembers what a method gave, on its object: a cache of the class would keep every batch there ever was."""

    @functools.wraps(method)
    def remembered(*given: Any) -> Any:
        held = given[0].__dict__.setdefault("_remembered", {})
        key = (method.__name__, *given[1:])
        if key not in held:
            held[key] = method(*given)
        return held[key]

    return remembered


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

    @_once
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

    @_once
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

    @_once
    def level_boxes(self) -> Tensor:
        """For each query the best boxes of several areas, [image layer head patch level side]."""
        found = [budget.boxes_of_levels(weights, self.prefix, self.grid) for weights, _, _ in self._seen]
        return torch.stack(found, 1)

    @_once
    def changes(self) -> Tensor:
        """How far each of those boxes moves its head's output, [image layer head patch level]."""
        boxes = self.level_boxes().unbind(1)
        seen = zip(self._seen, boxes, strict=True)
        return torch.stack([budget.output_changes(w, v, each, self.prefix, self.grid) for (w, v, _), each in seen], 1)

    @_once
    def bought(self, share: float, prices: Callable[[], Tensor] | None) -> list[Tensor]:
        """A box [image head patch side] per layer: areas shared by what they cost the answer, or by mass alone."""
        boxes = self.level_boxes()
        size = windows.areas(boxes)
        cost = self._missed(boxes) if prices is None else prices()[:, :, None, None] * self.changes()
        level = budget.allocate(cost, size, self.n_patches(share))
        return list(boxes.gather(-2, level[..., None, None].expand(*level.shape, 1, 4))[..., 0, :].unbind(1))

    @_once
    def head_windows(self, share: float, prices: Callable[[], Tensor]) -> list[Tensor]:
        """A box [image head patch side] per layer: shapes of all sizes under one budget, chosen layer by layer."""
        return head_windows(self.vit, self.images, prices(), share)

    def _missed(self, boxes: Tensor) -> Tensor:
        found = []
        for (weights, _, _), each in zip(self._seen, boxes.unbind(1), strict=True):
            matrix = normalise_rows(between_patches(weights, self.prefix))
            held = [(matrix * windows.in_box(box, self.grid)).sum(-1) for box in each.unbind(-2)]
            found.append(1 - torch.stack(held, -1))
        return torch.stack(found, 1)

    def edits(self, masks: Sequence[Tensor], heads: bool = False) -> list[Edit]:
        """Every layer under its mask [image patch other], or [image head patch other]."""
        biases = [windows.attention_bias(mask, self.prefix) for mask in masks]
        return [Edit(layer, bias=bias if heads else bias[:, None]) for layer, bias in enumerate(biases)]


def answers(batch: Batch, logits: Tensor, share: float) -> np.ndarray:
    """[image (correct, probability of the label, share of the map left open)]"""
    correct, probability = verify.score_logits(logits, batch.labels, batch.vit.task)
    return torch.stack([correct.float(), probability, torch.full_like(probability, share)], 1).numpy()


def open_share(edits: Sequence[Edit], prefix: int) -> float:
    """Mean share of the patches that a patch may see."""
    shares = [(edit.bias[..., prefix:, prefix:] == 0).float().mean() for edit in edits if edit.bias is not None]
    return float(torch.stack(shares).mean())


def cache_file(options: argparse.Namespace, name: str) -> Path:
    folder = options.cache / f"{options.experiment}-{options.model}-{options.precision}-{options.batch}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def parts(options: argparse.Namespace, made: Callable[[int], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What an experiment found, photographs first: parts that are held, and those that `made` makes from their start.

    With `--held` nothing new is made. Conditions that were tried on the first photographs alone are shorter.
    """
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, options.images, options.batch):
        file = cache_file(options, f"{start:05d}.npz")
        if not file.exists():
            if options.held:
                break
            save(file, made(start))
            done = f"{time.strftime('%H:%M:%S')} {options.experiment} {options.model} {start + options.batch}"
            print(done, file=sys.stderr, flush=True)
        with np.load(file) as held:
            for name in held.files:
                found.setdefault(name, []).append(held[name])
    if not found:
        sys.exit(f"Nothing of {options.experiment} with {options.model} is held in {options.cache}.")
    return {name: np.concatenate(several)[: options.images] for name, several in found.items()}


def save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all."""
    unfinished = file.with_suffix(".tmp.npz")
    np.savez(unfinished, **arrays)
    unfinished.rename(file)


# --- tables ----------------------------------------------------------------------------------------------------------


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval over images of paired differences of shares, in points (hundredths)."""
    low, high, _ = mean_interval(differences, limits=(-1.0, 1.0))
    return float(differences.mean() * 100), float(low) * 100, float(high) * 100


def shown(values: tuple[float, float, float]) -> str:
    return f"{values[0]:+.1f} [{values[1]:+.1f}, {values[2]:+.1f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)
