"""Attention patterns of all heads of all images: a sample to learn from, coders and maps fitted on it, and placing.

Nothing here holds all maps: a bounded sample is drawn up front (`drawn`), filled in one pass (`SampleOfMaps`), and
everything else is read off maps as passes make them (`Placing`). After Li et al. 2023; what differs is said where it
does.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from vitrail.errors import StudyError, UsageError
from vitrail.heads.pattern_coders import LATENTS, Coder, Kind, Shape, Told, fit_coder, inputs, restored
from vitrail.heads.pattern_map import StandingMap, standing_map
from vitrail.heads.pattern_maps import PatternGround, Pictures, pictures_of

__all__ = ["KINDS", "PatternModel", "Placed", "Placing", "SampleOfMaps", "drawn", "fit_patterns", "held_out", "place"]

KINDS: tuple[Kind, ...] = ("patch", "cls")
"""Patch patterns and class-token patterns are treated apart, as in the paper."""

MAX_SAMPLE = 6144
SAMPLE_BYTES = 640 * 2**20
"""Bounds of a sample, in maps and in memory (float16): at 14 x 14 patches 6,144 maps take 450 MiB."""

HELD_SHARE = 0.2
"""Of the images; their maps judge the coders and train none."""

ENCODED_TOGETHER = 256


def shape_of(kind: Kind, ground: PatternGround) -> Shape:
    """The inputs of a kind of pattern on this ground."""
    n_tokens = ground.prefix + ground.n_patches
    n_inputs = ground.n_patches**2 if kind == "patch" else 2 * n_tokens - 1
    return Shape(kind, ground.grid, n_inputs, LATENTS[kind])


def held_out(n_images: int, seed: int) -> Bool[np.ndarray, "image"]:
    """A fifth of the images, at random, at least one of several."""
    held = np.zeros(n_images, dtype=bool)
    n_held = max(1, round(HELD_SHARE * n_images)) if n_images > 1 else 0
    held[np.random.default_rng(seed).permutation(n_images)[:n_held]] = True
    return held


def drawn(
    kind: Kind, ground: PatternGround, n_heads: Sequence[int], n_images: int, seed: int
) -> Bool[np.ndarray, "image layer head"]:
    """Which maps are in the sample: all, or as many at random as fit its bounds."""
    there = np.zeros((n_images, len(n_heads), max(n_heads)), dtype=bool)
    for layer in ground.grids:
        there[:, layer, : n_heads[layer]] = True
    bound = min(MAX_SAMPLE, SAMPLE_BYTES // (2 * shape_of(kind, ground).n_inputs))
    every = np.flatnonzero(there)
    if len(every) > bound:
        chosen = np.random.default_rng([seed, KINDS.index(kind)]).choice(every, bound, replace=False)
        there[:] = False
        there.reshape(-1)[chosen] = True
    return there


class SampleOfMaps:
    """The drawn maps of one kind as `inputs`, filled as passes show them."""

    def __init__(self, shape: Shape, keep: Bool[np.ndarray, "image layer head"]) -> None:
        self.shape, self._keep = shape, keep
        self._row = np.cumsum(keep.reshape(-1)).reshape(keep.shape) - 1
        n_maps = int(keep.sum())
        self.x = torch.empty(n_maps, shape.n_inputs, dtype=torch.float16)
        self.image = np.nonzero(keep)[0]

    def take(self, first: int, layer: int, pictures: Pictures) -> None:
        """`first` is the place in the study of the batch's first image; images beyond the last are padding."""
        maps = _maps_of(self.shape.kind, pictures)
        if maps is None:
            return
        start = first + pictures.images.start
        keep = self._keep[start : start + len(maps), layer, : maps.shape[1]]
        if keep.any():
            chosen = maps[: len(keep)][torch.as_tensor(keep)]
            rows = self._row[start : start + len(keep), layer, : maps.shape[1]][keep]
            self.x[torch.as_tensor(rows)] = inputs(chosen, self.shape).half().cpu()


def _maps_of(kind: Kind, pictures: Pictures) -> Tensor | None:
    return pictures.block if kind == "patch" else pictures.cross


@dataclass(frozen=True)
class PatternModel:
    """A coder and the standing map of what it says of the sample, for one kind of pattern."""

    coder: Coder
    map: StandingMap
    ground: PatternGround

    @property
    def kind(self) -> Kind:
        return self.coder.shape.kind

    def to_bytes(self) -> bytes:
        """As a safetensors file; the same model gives the same bytes."""
        tensors = {f"coder.{name}": value.contiguous() for name, value in self.coder.state_dict().items()}
        for name in ("latents", "xy", "cluster"):
            tensors[f"map.{name}"] = torch.from_numpy(np.ascontiguousarray(getattr(self.map, name)))
        about = {"coder": self.coder.about(), "ground": _ground_to_json(self.ground)}
        return save(tensors, metadata={"about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> "PatternModel":
        """Raises `StudyError` if there is no such file, or if it is no pattern model."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            held = {name: tensors[f"map.{name}"].numpy() for name in ("latents", "xy", "cluster")}
            coder = restored(about["coder"], _below("coder.", tensors))
            return cls(coder, StandingMap(**held), _ground_from_json(about["ground"]))
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise StudyError(
                f"{path} holds no fitted patterns: {error}. They are made by `vitrail study ... --measures patterns`."
            ) from error


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _ground_to_json(ground: PatternGround) -> dict[str, Any]:
    return {
        "grid": ground.grid,
        "grids": [[layer, grid, prefix] for layer, (grid, prefix) in ground.grids.items()],
        "class_index": ground.class_index,
        "refused": list(ground.refused.items()),
    }


def _ground_from_json(held: Mapping[str, Any]) -> PatternGround:
    grids = {layer: (tuple(grid), prefix) for layer, grid, prefix in held["grids"]}
    return PatternGround(tuple(held["grid"]), grids, held["class_index"], dict(held["refused"]))


def fit_patterns(
    sample: SampleOfMaps, ground: PatternGround, held: Bool[np.ndarray, "image"], seed: int, told: Told | None = None
) -> PatternModel:
    """Coder and standing map of a filled sample, whose inputs are clipped in place."""
    coder = fit_coder(sample.x, torch.as_tensor(held[sample.image]), sample.shape, seed, told)
    latents = torch.cat([coder.encode_inputs(piece) for piece in sample.x.split(ENCODED_TOGETHER)])
    return PatternModel(coder, standing_map(latents.numpy(), seed), ground)


class Placed(NamedTuple):
    """Where heads lie on the standing map, in layout units, and their clusters, -1 for none."""

    xy: Float32[np.ndarray, "head xy"]
    cluster: Int32[np.ndarray, "head"]


def place(model: PatternModel, layer: int, weights: Float[Tensor, "head token token"]) -> Placed:
    """Where the heads of a layer of one image lie on a study's standing map, from their maps over all tokens.

    Raises `UsageError` for a layer that has no patterns there, or for maps of another number of tokens.
    """
    if layer not in model.ground.grids:
        reason = model.ground.refused.get(layer, f"the model has layers {sorted(model.ground.grids)}")
        raise UsageError(f"Heads of L{layer} were to be placed on the map of patterns: {reason}.")
    grid, prefix = model.ground.grids[layer]
    n_tokens = prefix + grid[0] * grid[1]
    if weights.ndim != 3 or weights.shape[1:] != (n_tokens, n_tokens):
        raise UsageError(
            f"Maps [head, {n_tokens}, {n_tokens}] of L{layer} were to be placed; got {tuple(weights.shape)}."
        )
    maps = _maps_of(model.kind, pictures_of(weights[None], layer, model.ground, slice(0, 1)))
    assert maps is not None, "a model of class patterns is fitted only where there is a class token"
    return Placed(*model.map.place(model.coder.encode(maps[0]).cpu().numpy()))


class Placing:
    """What is read off every map once the models stand: latents, cluster means, and how alike images are.

    Images may come in batches; `first` is the place in the study of a batch's first image.
    """

    def __init__(self, models: Sequence[PatternModel], ground: PatternGround, n_heads: Sequence[int], n_images: int):
        shape = (n_images, len(n_heads), max(n_heads))
        self._ground, self._n_images = ground, n_images
        self.models = {model.kind: model for model in models}
        self.latents = {
            kind: np.full((*shape, model.coder.shape.n_latents), np.nan, np.float32)
            for kind, model in self.models.items()
        }
        self._sums = {
            kind: torch.zeros(model.map.n_clusters, model.coder.shape.n_inputs) for kind, model in self.models.items()
        }
        self._counts = {kind: np.zeros(model.map.n_clusters, np.int64) for kind, model in self.models.items()}
        self._alike = torch.zeros(*shape[1:], ground.n_patches**2)
        self._varying = np.zeros(shape[1:], np.int64)

    def take(self, first: int, layer: int, pictures: Pictures) -> None:
        """Reads some images' maps of a layer."""
        start = first + pictures.images.start
        n_real = min(len(pictures.block), self._n_images - start)
        if n_real <= 0:
            return
        n_heads = pictures.block.shape[1]
        for kind, model in self.models.items():
            maps = _maps_of(kind, pictures)
            assert maps is not None
            maps = maps[:n_real].flatten(0, 1).cpu()
            latents = model.coder.encode(maps).numpy()
            self.latents[kind][start : start + n_real, layer, :n_heads] = latents.reshape(n_real, n_heads, -1)
            cluster = model.map.cluster_of(latents)
            member = torch.as_tensor(np.flatnonzero(cluster >= 0))
            self._sums[kind].index_add_(0, torch.as_tensor(cluster)[member].long(), maps.flatten(1)[member])
            self._counts[kind] += np.bincount(cluster[cluster >= 0], minlength=len(self._counts[kind]))
        unit, varies = _standardised(pictures.block[:n_real].flatten(2).cpu())
        self._alike[layer, :n_heads] += unit.sum(0)
        self._varying[layer, :n_heads] += varies.sum(0).numpy()

    def cluster_maps(self, kind: Kind) -> Float32[np.ndarray, "cluster cell"]:
        """The mean attention map of each cluster, over all heads in it; NaN for a cluster that nothing fell into."""
        counts = torch.as_tensor(self._counts[kind])[:, None]
        return torch.where(counts > 0, self._sums[kind] / counts.clamp(min=1), torch.nan).numpy()

    def image_dependence(self) -> Float32[np.ndarray, "layer head"]:
        """1 - mean correlation of a head's maps between all pairs of images, from one sum of standardised maps.

        With u_i of length 1, the mean over pairs of u_i u_j is (|sum u|^2 - n) / (n (n - 1)): exact. Maps that do not
        vary, such as even attention, have no correlation and are left out; NaN with fewer than two others.
        """
        n = self._varying.astype(np.float64)
        square = self._alike.double().square().sum(-1).numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            alike = (square - n) / (n * (n - 1))
        return np.where(n > 1, 1 - alike, np.nan).astype(np.float32)


def _standardised(maps: Float[Tensor, "image head cell"]) -> tuple[Tensor, Tensor]:
    """Maps less their mean, with length 1; and which of them vary beyond rounding."""
    centred = maps - maps.mean(-1, keepdim=True)
    length = centred.norm(dim=-1, keepdim=True)
    varies = length > 1e-5 * maps.norm(dim=-1, keepdim=True)
    return torch.where(varies, centred / length.clamp(min=1e-30), 0.0), varies[..., 0]
