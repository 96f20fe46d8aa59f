"""From a map to a few numbers: an autoencoder, or principal components where these describe unseen images as well.

A coder is fitted on a bounded sample of maps, split by image: on the images held out, an autoencoder has to beat PCA
with as many components clearly, or PCA is what the coder is. After Li et al. 2023, who use two autoencoders.
A convolutional one was still far behind PCA after minutes of training (docs/patterns.md), so ours start at PCA and
learn what it misses: shapes and referee are our construction.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vitrail.stats import Interval, mean_interval

__all__ = [
    "LATENTS",
    "Coder",
    "Fit",
    "Kind",
    "Progress",
    "Shape",
    "coder_inputs",
    "fit_coder",
    "load_coder",
    "principal_axes",
    "spread_share",
]

LATENTS = {"patch": 128, "cls": 32}
"""Latents by kind of pattern; ours (docs/patterns.md has the errors for other numbers)."""

COORDINATES = 3
"""An autoencoder sees and paints so many times as many principal coordinates as it has latents."""

CLIP_QUANTILE = 0.999
"""Inputs above this quantile of the sample are clipped: a handful of cells would otherwise be most of the error."""

CLEARLY_BETTER = 0.99
"""An autoencoder is kept where its held-out error is below this share of PCA's: else the simpler of equals is."""

HIDDEN, DROPOUT = 512, 0.2
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 64, 1e-3, 1e-2
UPDATES = 2000
EPOCHS = (10, 30)
"""About so many updates, but at least and at most so many times over the sample."""

MIN_TRAIN_MAPS = 4 * BATCH_SIZE
"""With fewer maps to learn from no autoencoder is tried."""

CHUNK_MAPS = 256
"""Maps worked on together."""

RELATIVE_SPREAD, LEAST_SPREAD = 1e-3, 1e-12
"""Coordinates are divided by their spread, which is taken to be at least this share of the largest, and above 0: what
hardly varies in the sample would otherwise be blown up in a map that is not of it."""

RANK_TOLERANCE = 1e-6
"""A singular value below this share of the largest is rounding: the sample has no such axis."""

OVERSAMPLING = 32
"""Extra columns of the subspace iteration, so that the axes converge (Halko et al. 2011: 10 or more)."""

QUANTILE_CELLS = 2_000_000
"""About how many cells a quantile is read from, spread over all maps: sorting more takes seconds."""

Kind = Literal["patch", "cls"]
"""Patch patterns, and class-token patterns."""

Progress = Callable[[int, int], None]
"""Called with what is done and how much there is."""


@dataclass(frozen=True)
class Shape:
    """What goes into a coder, and how much comes out.

    Attributes:
        kind: Kind of pattern.
        grid: (rows, columns) of patches.
        n_inputs: Cells of the patch block, or of the class row and column.
        n_latents: Numbers that come out.
    """

    kind: Kind
    grid: tuple[int, int]
    n_inputs: int
    n_latents: int


class Fit(NamedTuple):
    """How well the sample is described, and why the coder is what it is.

    Attributes:
        autoencoder_error: Squared error on held-out images as a share of their variance about the mean map (0: perfect,
            1: no better than the mean); NaN where none was tried or there is nothing to measure.
        pca_error: The same of PCA with as many components.
        n_train: Maps that were learnt from.
        n_held: Maps held out.
        why: A sentence.
        gain_low, gain_high: 95 % interval, over the images held out, of pca_error - autoencoder_error; NaN where no
            autoencoder was tried or too few images are held out.
    """

    autoencoder_error: float
    pca_error: float
    n_train: int
    n_held: int
    why: str
    gain_low: float = math.nan
    gain_high: float = math.nan


class Coder(nn.Module):
    """Maps of attention to latents: principal coordinates, and what networks add to them, if any.

    Coordinates are of (sqrt(n A), clipped, less its mean) / scale; n is the number of cells of a row, so that even
    attention is 1 before the mean is subtracted.

    Args:
        shape: What goes in, and how much comes out.
        clip: Inputs above it are clipped.
        scale: Divides the inputs.
        tensors: `mean` [cell], `axes` [cell coordinate] and `spread` [coordinate], the standard deviation of each
            coordinate over the sample.
        fit: How well the sample is described.

    Attributes:
        net: The networks, "encode" and "decode"; None for PCA alone.
    """

    mean: Tensor
    axes: Tensor
    spread: Tensor

    def __init__(self, shape: Shape, clip: float, scale: float, tensors: Mapping[str, Tensor], fit: Fit) -> None:
        super().__init__()
        self.shape, self.clip, self.scale, self.fit = shape, clip, scale, fit
        for name in ("mean", "axes", "spread"):
            self.register_buffer(name, tensors[name])
        self.net: nn.ModuleDict | None = None

    @property
    def method(self) -> str:
        """autoencoder or pca."""
        return "pca" if self.net is None else "autoencoder"

    @torch.no_grad()
    def encode(self, maps: Float[Tensor, "map *cells"]) -> Float[Tensor, "map latent"]:
        """Latents of attention maps.

        Args:
            maps: Attention weights, as the model computed them.

        Returns:
            Latents, in units of `scale`.
        """
        return self.encode_inputs(coder_inputs(maps, self.shape))

    @torch.no_grad()
    def encode_inputs(self, x: Float[Tensor, "map cell"]) -> Float[Tensor, "map latent"]:
        """Latents of inputs.

        Args:
            x: As `coder_inputs` returns them.

        Returns:
            Latents, in units of `scale`.
        """
        return self.compress(self.coordinates(x))

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "map latent"]) -> Float[Tensor, "map cell"]:
        """The inputs that latents stand for.

        Args:
            latents: As `encode` returns them.

        Returns:
            Clipped inputs sqrt(n A), approximately.
        """
        return self.expand(latents) @ self.axes.T * self.scale + self.mean

    def coordinates(self, x: Float[Tensor, "map cell"]) -> Float[Tensor, "map coordinate"]:
        """Principal coordinates of inputs, of which there are more than latents where there is a network.

        Args:
            x: As `coder_inputs` returns them.

        Returns:
            Coordinates, in units of `scale`.
        """
        return (x.float().clamp(max=self.clip) - self.mean) @ self.axes / self.scale

    def compress(self, coordinates: Float[Tensor, "map coordinate"]) -> Float[Tensor, "map latent"]:
        """Latents of principal coordinates.

        Args:
            coordinates: As `coordinates` returns them.

        Returns:
            Latents, in units of `scale`.
        """
        plain = coordinates[:, : self.shape.n_latents]
        if self.net is None:
            return plain
        added: Tensor = self.net["encode"](coordinates / self.spread)
        return plain + added * self.spread[: self.shape.n_latents]

    def expand(self, latents: Float[Tensor, "map latent"]) -> Float[Tensor, "map coordinate"]:
        """Principal coordinates of latents.

        Args:
            latents: As `compress` returns them.

        Returns:
            Coordinates, in units of `scale`.
        """
        plain = nn.functional.pad(latents, (0, self.axes.shape[1] - latents.shape[1]))
        if self.net is None:
            return plain
        added: Tensor = self.net["decode"](latents / self.spread[: self.shape.n_latents])
        return plain + added

    def config(self) -> dict[str, object]:
        """What `load_coder` needs beside the tensors.

        Returns:
            Values that JSON can hold.
        """
        return {
            "shape": asdict(self.shape),
            "clip": self.clip,
            "scale": self.scale,
            "fit": self.fit._asdict(),
            "method": self.method,
        }


def load_coder(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Coder:
    """Builds a coder from what was stored of it.

    Args:
        config: Of `Coder.config`.
        tensors: Its `state_dict`.

    Returns:
        The coder, ready to encode.
    """
    shape = Shape(**{**config["shape"], "grid": tuple(config["shape"]["grid"])})
    coder = Coder(shape, config["clip"], config["scale"], tensors, Fit(**config["fit"]))
    if config["method"] == "autoencoder":
        coder.net = _corrections(shape.n_latents, coder.axes.shape[1])
    coder.load_state_dict(dict(tensors))
    return coder.eval().requires_grad_(False)


def coder_inputs(maps: Float[Tensor, "map *cells"], shape: Shape) -> Float[Tensor, "map cell"]:
    """What a coder takes in: sqrt(n A) with n the cells of a row.

    Args:
        maps: Attention weights.
        shape: Of the coder; n is P for the patch block, T for the class row and column of 2 T - 1 cells.

    Returns:
        Zero or more; 1 for even attention.
    """
    n = math.isqrt(shape.n_inputs) if shape.kind == "patch" else (shape.n_inputs + 1) // 2
    return (maps.flatten(1) * n).clamp(min=0).sqrt()


def fit_coder(
    sample: Float[Tensor, "map cell"],
    images: Int[np.ndarray, "map"],
    is_held_out: Bool[np.ndarray, "image"],
    shape: Shape,
    seed: int = 0,
    progress: Progress | None = None,
) -> Coder:
    """Fits PCA and an autoencoder on some images, and keeps what describes the other images better.

    The same sample and seed give the same coder on the same machine and number of threads.

    Args:
        sample: Inputs of the coder (`coder_inputs`), in float16 to save memory; clipped in place.
        images: The image of each map.
        is_held_out: The images that judge and are not learnt from.
        shape: Of the coder; fewer latents where the sample has fewer maps.
        seed: Of the axes and of the training.
        progress: Called after each update.

    Returns:
        The coder.
    """
    clip = _quantile(sample)
    sample.clamp_(max=clip)
    held = torch.as_tensor(is_held_out[images])
    train, test = sample[~held], sample[held]
    n_latents = max(1, min(shape.n_latents, len(train) - 1, shape.n_inputs))
    coder = _principal_coder(train, replace(shape, n_latents=n_latents), clip, seed)
    spread = _squares(test, lambda x: (x - coder.mean) / coder.scale)
    coordinates = [torch.cat([coder.coordinates(piece) for piece in _pieces(each)]) for each in (train, test)]
    outside = spread - coordinates[1].square().sum(1, dtype=torch.float64)

    def loss_by_map() -> Float[Tensor, "map"]:
        """Of each map held out; what lies outside of all coordinates is lost either way."""
        with torch.no_grad():
            rest = coordinates[1] - coder.expand(coder.compress(coordinates[1]))
        return outside + rest.square().sum(1, dtype=torch.float64)

    def error(each: Float[Tensor, "map"]) -> float:
        return float(each.sum() / spread.sum()) if spread.sum() > 0 else math.nan

    by_pca = loss_by_map()
    coder.fit = Fit(math.nan, error(by_pca), len(train), len(test), _no_trial(len(train), len(test), spread))
    if not coder.fit.why:
        coder.net = _train(coder, coordinates[0], seed, progress or (lambda done, of: None))
        by_networks = loss_by_map()
        better = error(by_networks) < CLEARLY_BETTER * coder.fit.pca_error
        gain = spread_share((by_pca - by_networks).numpy(), spread.numpy(), images[is_held_out[images]])
        coder.fit = coder.fit._replace(
            autoencoder_error=error(by_networks),
            why=f"{'an autoencoder' if better else 'PCA'}, as it describes held-out images "
            f"{'better' if better else 'as well'}",
            gain_low=float(gain.low),
            gain_high=float(gain.high),
        )
        coder.net = coder.net if better else None
    if coder.net is None:
        coder.axes, coder.spread = coder.axes[:, :n_latents].contiguous(), coder.spread[:n_latents].clone()
    return coder.eval().requires_grad_(False)


def _principal_coder(train: Float[Tensor, "map cell"], shape: Shape, clip: float, seed: int) -> Coder:
    """PCA with more coordinates than latents."""
    mean = torch.stack([piece.sum(0, dtype=torch.float64) for piece in _pieces(train)]).sum(0).div(len(train)).float()
    squares = float(_squares(train, lambda x: x - mean).sum())
    scale = math.sqrt(squares / train.numel()) or 1.0
    n_axes = max(1, min(COORDINATES * shape.n_latents, len(train) - 1, shape.n_inputs))
    axes = principal_axes(train, mean, n_axes, seed)
    coder = Coder(shape, clip, scale, {"mean": mean, "axes": axes, "spread": torch.ones(n_axes)}, NOT_FITTED)
    coordinates = torch.cat([coder.coordinates(piece) for piece in _pieces(train)])
    spread = coordinates.square().mean(0).sqrt()
    coder.spread = spread.clamp(min=RELATIVE_SPREAD * float(spread.max()) + LEAST_SPREAD)
    return coder


NOT_FITTED = Fit(math.nan, math.nan, 0, 0, "not yet judged")


def spread_share(
    amounts: Float[np.ndarray, "map"], spread: Float[np.ndarray, "map"], images: Int[np.ndarray, "map"]
) -> Interval:
    """95 % interval, over images, of an amount as a share of all spread, which is taken as known.

    Args:
        amounts: Of each map, such as what a coder loses of it.
        spread: Squared distance of each map from the mean map.
        images: The image of each map.

    Returns:
        The interval of sum of amounts / sum of spread; NaN for too few images.
    """
    _, image = np.unique(images, return_inverse=True)
    by_image = np.bincount(image, amounts)
    return mean_interval(by_image * len(by_image) / spread.sum())


def _no_trial(n_train: int, n_test: int, spread: Float[Tensor, "map"]) -> str:
    """Why no autoencoder is trained; empty if one is."""
    if n_test == 0:
        return "PCA, unjudged: there is no second image to hold out"
    if not spread.sum() > 0:
        return "PCA, unjudged: the maps held out do not differ from the mean map"
    return f"PCA: {n_train} maps are too few to train an autoencoder" if n_train < MIN_TRAIN_MAPS else ""


def principal_axes(
    sample: Float[Tensor, "map cell"], mean: Float[Tensor, "cell"], n_axes: int, seed: int = 0, turns: int = 3
) -> Float[Tensor, "cell axis"]:
    """The first principal axes, by subspace iteration over pieces of the sample (Halko et al. 2011).

    A sample in float16 is never copied to float32 as a whole.

    Args:
        sample: One row for each map.
        mean: Mean row of the sample.
        n_axes: How many axes.
        seed: Of the first subspace.
        turns: Iterations.

    Returns:
        Unit vectors, the largest entry of each positive; zeros beyond the sample's rank.
    """
    generator = torch.Generator().manual_seed(seed)
    width = min(n_axes + OVERSAMPLING, sample.shape[1])
    basis = torch.randn(sample.shape[1], width, generator=generator)
    for _ in range(turns):
        product = torch.zeros_like(basis)
        for piece in _pieces(sample):
            centred = piece.float() - mean
            product += centred.T @ (centred @ basis)
        basis = torch.linalg.qr(product).Q
    inside = torch.cat([(piece.float() - mean) @ basis for piece in _pieces(sample)])
    _, sizes, turn = torch.linalg.svd(inside.double(), full_matrices=False)
    axes = (basis.double() @ turn.T).float()[:, :n_axes]
    real = sizes[:n_axes] > RANK_TOLERANCE * max(float(sizes[0]), LEAST_SPREAD)
    axes = axes[:, : len(real)] * real
    largest = axes.abs().argmax(0)
    axes = axes * torch.where(axes.gather(0, largest[None])[0] < 0, -1.0, 1.0)
    return torch.nn.functional.pad(axes, (0, n_axes - axes.shape[1]))


def _corrections(n_latents: int, n_coordinates: int) -> nn.ModuleDict:
    """MLPs with GELU before training, one on either side of the bottleneck and none around it, which are added to PCA.

    Their last layers are zero, so that training starts at PCA's own error.
    """

    def correction(n_in: int, n_out: int) -> nn.Sequential:
        last = nn.Linear(HIDDEN, n_out)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(n_in, HIDDEN), nn.GELU(), nn.Dropout(DROPOUT), last)

    return nn.ModuleDict(
        {"encode": correction(n_coordinates, n_latents), "decode": correction(n_latents, n_coordinates)}
    )


def _train(coder: Coder, coordinates: Float[Tensor, "map coordinate"], seed: int, progress: Progress) -> nn.ModuleDict:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = coder.net = _corrections(coder.shape.n_latents, coordinates.shape[1]).train()
        per_epoch = len(coordinates) // BATCH_SIZE
        epochs = min(max(round(UPDATES / per_epoch), EPOCHS[0]), EPOCHS[1])
        optimiser = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * per_epoch)
        for epoch in range(epochs):
            for number, members in enumerate(torch.randperm(len(coordinates)).split(BATCH_SIZE)[:per_epoch]):
                x = coordinates[members]
                loss = (coder.expand(coder.compress(x)) - x).square().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                progress(epoch * per_epoch + number + 1, epochs * per_epoch)
    return net.eval().requires_grad_(False)


@torch.no_grad()
def _squares(sample: Float[Tensor, "map cell"], of: Callable[[Tensor], Tensor]) -> Float[Tensor, "map"]:
    return torch.cat([of(piece.float()).square().sum(1, dtype=torch.float64) for piece in _pieces(sample)])


def _pieces(sample: Float[Tensor, "map cell"]) -> Iterator[Float[Tensor, "piece cell"]]:
    yield from sample.split(CHUNK_MAPS)


def _quantile(sample: Float[Tensor, "map cell"]) -> float:

    flat = sample.flatten()
    step = max(1, len(flat) // QUANTILE_CELLS) | 1
    return float(flat[::step].float().sort().values[int(CLIP_QUANTILE * (len(flat[::step]) - 1))])
