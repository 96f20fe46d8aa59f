"""Attention patterns of all heads of all images: a sample to learn from, coders and maps fitted on it, and placing.

Nothing here holds all maps: a bounded sample is drawn up front (`draw_sample`), filled in one pass (`MapSample`), and
everything else is read off maps as passes make them (`PatternStatistics`). After Li et al. 2023; what differs is said
where it does.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vitrail.errors import StudyError, UsageError
from vitrail.patterns.coders import LATENTS, Coder, Kind, Progress, Shape, coder_inputs, fit_coder, load_coder
from vitrail.patterns.layout import PatternLayout, fit_layout
from vitrail.patterns.maps import ComparableLayers, PatternMaps, pool_maps

__all__ = [
    "KINDS",
    "HeadPositions",
    "MapSample",
    "PatternModel",
    "PatternStatistics",
    "coder_shape",
    "draw_held_out",
    "draw_sample",
    "fit_patterns",
    "place_heads",
]

KINDS: tuple[Kind, ...] = ("patch", "cls")
"""Patch patterns and class-token patterns are treated apart, as in the paper."""

MAX_SAMPLE = 6144
"""Bound of a sample in maps; at 14 x 14 patches so many take 450 MiB."""

SAMPLE_BYTES = 640 * 2**20
"""Bound of a sample in memory (float16), for larger grids."""

HELD_OUT_SHARE = 0.2
"""Of the images; their maps judge the coders and train none."""

ENCODE_MAPS = 256
"""Maps of the sample that are encoded together."""

VARYING = 1e-5
"""A map varies if it differs from its mean by more than this share of its length: above the rounding of float32."""


def coder_shape(kind: Kind, layers: ComparableLayers) -> Shape:
    """What the coder of a kind of pattern takes in.

    Args:
        kind: Kind of pattern.
        layers: The layers that take part.

    Returns:
        Sizes of input and output.
    """
    n_tokens = layers.prefix + layers.n_patches
    n_inputs = layers.n_patches**2 if kind == "patch" else 2 * n_tokens - 1
    return Shape(kind, layers.grid, n_inputs, LATENTS[kind])


def draw_held_out(n_images: int, seed: int) -> Bool[np.ndarray, "image"]:
    """The images that judge the coders and train none: a fifth of them, at random, at least one of several.

    Args:
        n_images: Images of the study.
        seed: Of the study.

    Returns:
        True for images held out.
    """
    held_out = np.zeros(n_images, dtype=bool)
    n_held = max(1, round(HELD_OUT_SHARE * n_images)) if n_images > 1 else 0
    held_out[np.random.default_rng(seed).permutation(n_images)[:n_held]] = True
    return held_out


def draw_sample(
    kind: Kind, layers: ComparableLayers, n_heads: Sequence[int], n_images: int, seed: int
) -> Bool[np.ndarray, "image layer head"]:
    """The maps to learn from: all, or as many at random as fit the bounds of a sample.

    Args:
        kind: Kind of pattern.
        layers: The layers that take part.
        n_heads: Heads of each layer of the model.
        n_images: Images of the study.
        seed: Of the study.

    Returns:
        True for maps of the sample.
    """
    in_sample = np.zeros((n_images, len(n_heads), max(n_heads)), dtype=bool)
    for layer in layers.grids:
        for heads in layers.heads_of(layer):
            in_sample[:, layer, : n_heads[layer]][:, heads] = True
    bound = min(MAX_SAMPLE, SAMPLE_BYTES // (2 * coder_shape(kind, layers).n_inputs))
    candidates = np.flatnonzero(in_sample)
    if len(candidates) > bound:
        indices = np.random.default_rng([seed, KINDS.index(kind)]).choice(candidates, bound, replace=False)
        in_sample[:] = False
        in_sample.reshape(-1)[indices] = True
    return in_sample


class MapSample:
    """The drawn maps of one kind, filled as passes show them.

    Args:
        shape: Of the coder that is to be fitted.
        keep: The maps that were drawn (`draw_sample`).

    Attributes:
        x: Inputs of the coder [map cell], float16.
        image: The image of each map.
    """

    def __init__(self, shape: Shape, keep: Bool[np.ndarray, "image layer head"]) -> None:
        self.shape, self._keep = shape, keep
        self._row = np.cumsum(keep.reshape(-1)).reshape(keep.shape) - 1
        n_maps = int(keep.sum())
        self.x = torch.empty(n_maps, shape.n_inputs, dtype=torch.float16)
        self.image = np.nonzero(keep)[0]

    def add(self, first: int, layer: int, maps: PatternMaps) -> None:
        """Stores those of some images' maps that were drawn.

        Args:
            first: Position in the study of the batch's first image; images beyond the last of the study are padding.
            layer: Index of the layer.
            maps: Of one attention call.
        """
        cells = _cells_of(self.shape.kind, maps)
        assert cells is not None, "class patterns are sampled only where maps hold a class token"
        start = first + maps.images.start
        keep = self._keep[start : start + len(cells), layer, maps.heads]
        if keep.any():
            drawn = cells[: len(keep)][torch.as_tensor(keep)]
            rows = self._row[start : start + len(keep), layer, maps.heads][keep]
            self.x[torch.as_tensor(rows)] = coder_inputs(drawn, self.shape).half().cpu()


def _cells_of(kind: Kind, maps: PatternMaps) -> Tensor | None:
    return maps.block if kind == "patch" else maps.cross


@dataclass(frozen=True)
class PatternModel:
    """A coder, and the standing map of the sample, for one kind of pattern.

    Attributes:
        coder: Maps of attention to latents.
        layout: The standing map.
        layers: The layers that take part.
    """

    coder: Coder
    layout: PatternLayout
    layers: ComparableLayers

    @property
    def kind(self) -> Kind:
        """Kind of pattern."""
        return self.coder.shape.kind

    def to_bytes(self) -> bytes:
        """The model as a safetensors file; the same model gives the same bytes.

        Returns:
            The contents of the file.
        """
        tensors = {f"coder.{name}": value.contiguous() for name, value in self.coder.state_dict().items()}
        for name in ("latents", "xy", "cluster"):
            tensors[f"map.{name}"] = torch.from_numpy(np.ascontiguousarray(getattr(self.layout, name)))
        about = {"coder": self.coder.config(), "ground": _layers_to_json(self.layers)}
        return save(tensors, metadata={"about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> "PatternModel":
        """Reads a model from a file of `to_bytes`.

        Args:
            path: The file.

        Returns:
            The model, on the CPU.

        Raises:
            StudyError: There is no such file, or it is no pattern model.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            layout = {name: tensors[f"map.{name}"].numpy() for name in ("latents", "xy", "cluster")}
            coder = load_coder(about["coder"], _strip_prefix("coder.", tensors))
            return cls(coder, PatternLayout(**layout), _layers_from_json(about["ground"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise StudyError(
                f"{path} holds no fitted patterns: {error}. They are made by `vitrail study ... --measures patterns`."
            ) from error


def _strip_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _layers_to_json(layers: ComparableLayers) -> dict[str, Any]:
    return {
        "grid": layers.grid,
        "grids": [[layer, grid, prefix] for layer, (grid, prefix) in layers.grids.items()],
        "class_index": layers.class_index,
        "refused": list(layers.refused.items()),
    }


def _layers_from_json(stored: Mapping[str, Any]) -> ComparableLayers:
    grids = {layer: (tuple(grid), prefix) for layer, grid, prefix in stored["grids"]}
    return ComparableLayers(tuple(stored["grid"]), grids, stored["class_index"], dict(stored["refused"]))


def fit_patterns(
    sample: MapSample,
    layers: ComparableLayers,
    is_held_out: Bool[np.ndarray, "image"],
    seed: int,
    progress: Progress | None = None,
) -> PatternModel:
    """Fits coder and standing map on a filled sample.

    Args:
        sample: Its inputs are clipped in place.
        layers: The layers that take part.
        is_held_out: The images that judge and are not learnt from (`draw_held_out`).
        seed: Of the study.
        progress: Called after each update of the training.

    Returns:
        The model.
    """
    coder = fit_coder(sample.x, sample.image, is_held_out, sample.shape, seed, progress)
    latents = torch.cat([coder.encode_inputs(piece) for piece in sample.x.split(ENCODE_MAPS)])
    return PatternModel(coder, fit_layout(latents.numpy(), seed), layers)


class HeadPositions(NamedTuple):
    """Where heads lie on a standing map.

    Attributes:
        xy: In layout units.
        cluster: Number of the cluster; -1 for none.
    """

    xy: Float32[np.ndarray, "head xy"]
    cluster: Int32[np.ndarray, "head"]


def place_heads(model: PatternModel, layer: int, weights: Float[Tensor, "head token token"]) -> HeadPositions:
    """Where the heads of a layer of one image lie on a study's standing map.

    Args:
        model: Of the study.
        layer: Index of the layer.
        weights: Attention of one image, over all tokens.

    Returns:
        Positions and clusters.

    Raises:
        UsageError: The layer has no patterns there, or maps of another number of tokens.
    """
    if layer not in model.layers.grids:
        reason = model.layers.refused.get(layer, f"the model has layers {sorted(model.layers.grids)}")
        raise UsageError(f"Heads of L{layer} were to be placed on the map of patterns: {reason}.")
    grid, prefix = model.layers.grids[layer]
    n_tokens = prefix + grid[0] * grid[1]
    if weights.ndim != 3 or weights.shape[1:] != (n_tokens, n_tokens):
        raise UsageError(
            f"Maps [head, {n_tokens}, {n_tokens}] of L{layer} were to be placed; got {tuple(weights.shape)}."
        )
    cells = _cells_of(model.kind, pool_maps(weights[None], layer, model.layers, slice(0, 1)))
    assert cells is not None, "a model of class patterns is fitted only where there is a class token"
    return HeadPositions(*model.layout.place(model.coder.encode(cells[0]).cpu().numpy()))


class PatternStatistics:
    """What is read off every map once the models are fitted: latents, cluster means, and how alike images are.

    Args:
        models: One for each kind of pattern.
        layers: The layers that take part.
        n_heads: Heads of each layer of the model.
        n_images: Images of the study.

    Attributes:
        models: By kind.
        latents: [image layer head latent] by kind; NaN for heads that take no part.
    """

    def __init__(self, models: Sequence[PatternModel], layers: ComparableLayers, n_heads: Sequence[int], n_images: int):
        shape = (n_images, len(n_heads), max(n_heads))
        self._layers, self._n_images = layers, n_images
        self.models = {model.kind: model for model in models}
        self.latents = {
            kind: np.full((*shape, model.coder.shape.n_latents), np.nan, np.float32)
            for kind, model in self.models.items()
        }
        self._sums = {
            kind: torch.zeros(model.layout.n_clusters, model.coder.shape.n_inputs)
            for kind, model in self.models.items()
        }
        self._counts = {kind: np.zeros(model.layout.n_clusters, np.int64) for kind, model in self.models.items()}
        self._unit_sum = torch.zeros(*shape[1:], layers.n_patches**2)
        self._varying = np.zeros(shape[1:], np.int64)

    def add(self, first: int, layer: int, maps: PatternMaps) -> None:
        """Takes in some images' maps of a layer.

        Args:
            first: Position in the study of the batch's first image; images beyond the last of the study are padding.
            layer: Index of the layer.
            maps: Of one attention call.
        """
        start = first + maps.images.start
        n_real = min(len(maps.block), self._n_images - start)
        if n_real <= 0:
            return
        heads, n_heads = maps.heads, maps.block.shape[1]
        for kind, model in self.models.items():
            cells = _cells_of(kind, maps)
            assert cells is not None
            cells = cells[:n_real].flatten(0, 1).cpu()
            latents = model.coder.encode(cells).numpy()
            self.latents[kind][start : start + n_real, layer, heads] = latents.reshape(n_real, n_heads, -1)
            cluster = model.layout.nearest_cluster(latents)
            member = torch.as_tensor(np.flatnonzero(cluster >= 0))
            self._sums[kind].index_add_(0, torch.as_tensor(cluster)[member].long(), cells.flatten(1)[member])
            self._counts[kind] += np.bincount(cluster[cluster >= 0], minlength=len(self._counts[kind]))
        unit, varies = _standardise(maps.block[:n_real].flatten(2).cpu())
        self._unit_sum[layer, heads] += unit.sum(0)
        self._varying[layer, heads] += varies.sum(0).numpy()

    def cluster_maps(self, kind: Kind) -> Float32[np.ndarray, "cluster cell"]:
        """The mean attention map of each cluster, over all heads in it.

        Args:
            kind: Kind of pattern.

        Returns:
            Attention weights; NaN for a cluster that no head fell into.
        """
        counts = torch.as_tensor(self._counts[kind])[:, None]
        return torch.where(counts > 0, self._sums[kind] / counts.clamp(min=1), torch.nan).numpy()

    def image_dependence(self) -> Float32[np.ndarray, "layer head"]:
        """1 - mean correlation of a head's maps between all pairs of images.

        From one sum of standardised maps: with u_i of length 1, the mean over pairs of u_i u_j is (|sum u|^2 - n) / (n
        (n - 1)), exactly. Maps that do not vary, such as even attention, have no correlation and are left out.

        Returns:
            0 (the same map for all images) to 1, above 1 for maps that oppose each other; NaN with fewer than two maps.
        """
        n = self._varying.astype(np.float64)
        square = self._unit_sum.double().square().sum(-1).numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            alike = (square - n) / (n * (n - 1))
        return np.where(n > 1, 1 - alike, np.nan).astype(np.float32)


def _standardise(maps: Float[Tensor, "image head cell"]) -> tuple[Tensor, Tensor]:
    """Maps less their mean, with length 1; and which of them vary beyond rounding."""
    centred = maps - maps.mean(-1, keepdim=True)
    length = centred.norm(dim=-1, keepdim=True)
    varies = length > VARYING * maps.norm(dim=-1, keepdim=True)
    return torch.where(varies, centred / length.clamp(min=torch.finfo(length.dtype).tiny), 0.0), varies[..., 0]
