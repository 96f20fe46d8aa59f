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

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["LATENTS", "Coder", "Fit", "Kind", "Shape", "Told", "fit_coder", "inputs", "principal_axes", "restored"]

LATENTS = {"patch": 128, "cls": 32}

COORDINATES = 3
"""An autoencoder sees and paints so many times as many principal coordinates as it has latents."""

CLIP_QUANTILE = 0.999
"""Inputs above this quantile of the sample are clipped: a handful of cells would otherwise be most of the error."""

CLEARLY = 0.99
"""An autoencoder is kept where its held-out error is below this share of PCA's: else the simpler of equals is."""

HIDDEN, DROPPED = 512, 0.2
BATCH, LEARNING_RATE, WEIGHT_DECAY = 64, 1e-3, 1e-2
UPDATES = 2000
EPOCHS = (10, 30)
"""About so many updates, but at least and at most so many times over the sample."""

TOO_FEW = 4 * BATCH
"""With fewer maps to learn from no autoencoder is tried."""

CHUNK = 256
"""Maps worked on together."""

Kind = Literal["patch", "cls"]
Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Shape:
    """What goes in: the patch block of `grid` (rows, columns), or `n_inputs` cells of the class row and column.
    `n_latents` numbers come out."""

    kind: Kind
    grid: tuple[int, int]
    n_inputs: int
    n_latents: int


class Fit(NamedTuple):
    """How well the sample is described: squared error on held-out images as a share of their variance about the mean
    map (0: perfectly, 1: no better than the mean), NaN where it was not tried or there is nothing to measure.
    `why` says what the coder is and why."""

    autoencoder_error: float
    pca_error: float
    n_train: int
    n_held: int
    why: str


class Coder(nn.Module):
    """Maps of attention to latents: the first principal coordinates of (sqrt(n A), clipped, less its mean) / scale,
    and what the networks of `net` add to them where there are any.

    n is the number of cells of a row, so that even attention is 1 before the mean is taken. `axes` are [cell
    coordinate], `spread` the standard deviation of each coordinate over the sample.
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
        """Latents of attention maps, whose weights are given as they are."""
        return self.encode_inputs(inputs(maps, self.shape))

    @torch.no_grad()
    def encode_inputs(self, x: Float[Tensor, "map cell"]) -> Float[Tensor, "map latent"]:
        """Latents of what `inputs` gives."""
        return self.compress(self.coordinates(x))

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "map latent"]) -> Float[Tensor, "map cell"]:
        """What the latents say of the clipped inputs sqrt(n A)."""
        return self.expand(latents) @ self.axes.T * self.scale + self.mean

    def coordinates(self, x: Float[Tensor, "map cell"]) -> Float[Tensor, "map coordinate"]:
        """Principal coordinates of inputs, of which there are more than latents where there is a network."""
        return (x.float().clamp(max=self.clip) - self.mean) @ self.axes / self.scale

    def compress(self, coordinates: Float[Tensor, "map coordinate"]) -> Float[Tensor, "map latent"]:
        """Latents of principal coordinates."""
        plain = coordinates[:, : self.shape.n_latents]
        if self.net is None:
            return plain
        added: Tensor = self.net["encode"](coordinates / self.spread)
        return plain + added * self.spread[: self.shape.n_latents]

    def expand(self, latents: Float[Tensor, "map latent"]) -> Float[Tensor, "map coordinate"]:
        """Principal coordinates of latents."""
        plain = nn.functional.pad(latents, (0, self.axes.shape[1] - latents.shape[1]))
        if self.net is None:
            return plain
        added: Tensor = self.net["decode"](latents / self.spread[: self.shape.n_latents])
        return plain + added

    def about(self) -> dict[str, object]:
        """What `restored` needs beside the tensors."""
        return {
            "shape": asdict(self.shape),
            "clip": self.clip,
            "scale": self.scale,
            "fit": self.fit._asdict(),
            "method": self.method,
        }


def restored(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Coder:
    """A coder from what `about` said of it and its `state_dict`."""
    shape = Shape(**{**about["shape"], "grid": tuple(about["shape"]["grid"])})
    coder = Coder(shape, about["clip"], about["scale"], tensors, Fit(**about["fit"]))
    if about["method"] == "autoencoder":
        coder.net = _corrections(shape.n_latents, coder.axes.shape[1])
    coder.load_state_dict(dict(tensors))
    return coder.eval().requires_grad_(False)


def inputs(maps: Float[Tensor, "map *cells"], shape: Shape) -> Float[Tensor, "map cell"]:
    """sqrt(n A) with n the cells of a row: P for the patch block, T for the class row and column of 2 T - 1 cells."""
    n = math.isqrt(shape.n_inputs) if shape.kind == "patch" else (shape.n_inputs + 1) // 2
    return (maps.flatten(1) * n).clamp(min=0).sqrt()


def fit_coder(
    sample: Float[Tensor, "map cell"], held: Bool[Tensor, "map"], shape: Shape, seed: int = 0, told: Told | None = None
) -> Coder:
    """Fits both on the maps of images that are not `held` out, and keeps what describes the held-out ones better.

    `sample` holds sqrt(n A) (`inputs`), in float16 to save memory; it is clipped in place. `told(done, of)` hears of
    each update. The same sample and seed give the same coder on the same machine and number of threads.
    """
    clip = _quantile(sample)
    sample.clamp_(max=clip)
    train, test = sample[~held], sample[held]
    n_latents = max(1, min(shape.n_latents, len(train) - 1, shape.n_inputs))
    coder = _principal_coder(train, replace(shape, n_latents=n_latents), clip, seed)
    spread = _squares(test, lambda x: (x - coder.mean) / coder.scale)
    coordinates = [torch.cat([coder.coordinates(piece) for piece in _pieces(each)]) for each in (train, test)]
    outside = spread - float(coordinates[1].square().sum(dtype=torch.float64))

    def error() -> float:
        """Of the held-out maps; what lies outside of all coordinates is lost either way."""
        with torch.no_grad():
            rest = coordinates[1] - coder.expand(coder.compress(coordinates[1]))
        return (outside + float(rest.square().sum(dtype=torch.float64))) / spread if spread > 0 else math.nan

    pca_error, ae_error, why = error(), math.nan, _no_trial(len(train), len(test), spread)
    if not why:
        coder.net = _trained(coder, coordinates[0], seed, told or (lambda done, of: None))
        ae_error = error()
        better = ae_error < CLEARLY * pca_error
        why = f"{'an autoencoder' if better else 'PCA'}, as it describes held-out images "
        why += "better" if better else "as well"
        coder.net = coder.net if better else None
    if coder.net is None:
        coder.axes, coder.spread = coder.axes[:, :n_latents].contiguous(), coder.spread[:n_latents].clone()
    coder.fit = Fit(ae_error, pca_error, len(train), len(test), why)
    return coder.eval().requires_grad_(False)


def _principal_coder(train: Float[Tensor, "map cell"], shape: Shape, clip: float, seed: int) -> Coder:
    """PCA with more coordinates than latents."""
    mean = torch.stack([piece.sum(0, dtype=torch.float64) for piece in _pieces(train)]).sum(0).div(len(train)).float()
    squares = _squares(train, lambda x: x - mean)
    scale = math.sqrt(squares / train.numel()) or 1.0
    n_axes = max(1, min(COORDINATES * shape.n_latents, len(train) - 1, shape.n_inputs))
    axes = principal_axes(train, mean, n_axes, seed)
    coder = Coder(shape, clip, scale, {"mean": mean, "axes": axes, "spread": torch.ones(n_axes)}, NOT_YET)
    found = torch.cat([coder.coordinates(piece) for piece in _pieces(train)])
    coder.spread = found.square().mean(0).sqrt().clamp(min=1e-3 * float(found.square().mean(0).sqrt().max()) + 1e-12)
    return coder


NOT_YET = Fit(math.nan, math.nan, 0, 0, "not yet judged")


def _no_trial(n_train: int, n_test: int, spread: float) -> str:
    """Why no autoencoder is trained; empty if one is."""
    if n_test == 0:
        return "PCA, unjudged: there is no second image to hold out"
    if not spread > 0:
        return "PCA, unjudged: the maps held out do not differ from the mean map"
    return f"PCA: {n_train} maps are too few to train an autoencoder" if n_train < TOO_FEW else ""


def principal_axes(
    sample: Float[Tensor, "map cell"], mean: Float[Tensor, "cell"], n_axes: int, seed: int = 0, turns: int = 3
) -> Float[Tensor, "cell axis"]:
    """The first principal axes, by subspace iteration over pieces of the sample (Halko et al. 2011), so that a sample
    in float16 is never copied to float32 as a whole. Axes beyond the sample's rank are zero."""
    generator = torch.Generator().manual_seed(seed)
    width = min(n_axes + 32, sample.shape[1])
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
    real = sizes[:n_axes] > 1e-6 * max(float(sizes[0]), 1e-12)
    axes = axes[:, : len(real)] * real
    largest = axes.abs().argmax(0)
    axes = axes * torch.where(axes.gather(0, largest[None])[0] < 0, -1.0, 1.0)
    return torch.nn.functional.pad(axes, (0, n_axes - axes.shape[1]))


def _corrections(n_latents: int, n_coordinates: int) -> nn.ModuleDict:
    """Untrained MLPs with GELU, one on either side of the bottleneck and none around it, which are added to PCA. Their
    last layers are zero, so that training starts at PCA's own error."""

    def correction(n_in: int, n_out: int) -> nn.Sequential:
        last = nn.Linear(HIDDEN, n_out)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(nn.Dropout(DROPPED), nn.Linear(n_in, HIDDEN), nn.GELU(), nn.Dropout(DROPPED), last)

    return nn.ModuleDict(
        {"encode": correction(n_coordinates, n_latents), "decode": correction(n_latents, n_coordinates)}
    )


def _trained(coder: Coder, coordinates: Float[Tensor, "map coordinate"], seed: int, told: Told) -> nn.ModuleDict:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = coder.net = _corrections(coder.shape.n_latents, coordinates.shape[1]).train()
        per_epoch = len(coordinates) // BATCH
        epochs = min(max(round(UPDATES / per_epoch), EPOCHS[0]), EPOCHS[1])
        optimiser = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * per_epoch)
        for epoch in range(epochs):
            for number, chosen in enumerate(torch.randperm(len(coordinates)).split(BATCH)[:per_epoch]):
                x = coordinates[chosen]
                loss = (coder.expand(coder.compress(x)) - x).square().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                told(epoch * per_epoch + number + 1, epochs * per_epoch)
    return net.eval().requires_grad_(False)


@torch.no_grad()
def _squares(sample: Float[Tensor, "map cell"], of: Callable[[Tensor], Tensor]) -> float:
    return float(sum(of(piece.float()).square().sum(dtype=torch.float64).item() for piece in _pieces(sample)))


def _pieces(sample: Float[Tensor, "map cell"]) -> Iterator[Float[Tensor, "piece cell"]]:
    yield from sample.split(CHUNK)


def _quantile(sample: Float[Tensor, "map cell"]) -> float:
    """Of about 2 million cells, which are spread over all maps."""
    flat = sample.flatten()
    step = max(1, len(flat) // 2_000_000) | 1
    return float(flat[::step].float().sort().values[int(CLIP_QUANTILE * (len(flat[::step]) - 1))])
