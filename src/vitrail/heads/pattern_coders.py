"""From a map to a few numbers: an autoencoder, or principal components where these describe unseen images better.

A coder is fitted on a bounded sample of maps, split by image: on the images held out, an autoencoder has to beat PCA
with as many components, or PCA is what the coder is. After Li et al. 2023, who use two autoencoders; their shapes and
the referee are our construction.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["LATENTS", "Coder", "Fit", "Kind", "Shape", "autoencoder", "fit_coder", "inputs", "principal_axes", "restored"]

LATENTS = {"patch": 128, "cls": 32}

CLIP_QUANTILE = 0.999
"""Inputs above this quantile of the sample are clipped: a handful of cells would otherwise be most of the error."""

BATCH, LEARNING_RATE, WEIGHT_DECAY = 64, 1e-3, 1e-2
UPDATES = 1600
EPOCHS = (10, 30)
"""About so many updates, but at least and at most so many times over the sample."""

TOO_FEW = 4 * BATCH
"""With fewer maps to learn from no autoencoder is tried."""

CHUNK = 256
"""Maps worked on together outside of training."""

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
    """Maps of attention to latents: x = (sqrt(n A) clipped - mean) / scale through an encoder, or onto axes.

    n is the number of cells of a row, so that even attention is 1 before the mean is taken.
    """

    mean: Tensor
    axes: Tensor

    def __init__(self, shape: Shape, clip: float, scale: float, mean: Tensor, axes: Tensor, fit: Fit) -> None:
        super().__init__()
        self.shape, self.clip, self.scale, self.fit = shape, clip, scale, fit
        self.register_buffer("mean", mean)
        self.register_buffer("axes", axes)
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
        x = (x.float().clamp(max=self.clip) - self.mean) / self.scale
        return x @ self.axes if self.net is None else self.net["encode"](x)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "map latent"]) -> Float[Tensor, "map cell"]:
        """What the latents say of the clipped inputs sqrt(n A)."""
        x = latents @ self.axes.T if self.net is None else self.net["decode"](latents)
        return x * self.scale + self.mean

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
    coder = Coder(shape, about["clip"], about["scale"], tensors["mean"], tensors["axes"], Fit(**about["fit"]))
    if about["method"] == "autoencoder":
        coder.net = autoencoder(shape)
    coder.load_state_dict(dict(tensors))
    return coder.eval().requires_grad_(False)


def inputs(maps: Float[Tensor, "map *cells"], shape: Shape) -> Float[Tensor, "map cell"]:
    """sqrt(n A) with n the cells of a row: P for the patch block, T for the class row and column of 2 T - 1 cells."""
    n = math.isqrt(shape.n_inputs) if shape.kind == "patch" else (shape.n_inputs + 1) // 2
    return (maps.flatten(1) * n).clamp(min=0).sqrt()


def autoencoder(shape: Shape) -> nn.ModuleDict:
    """Untrained. For blocks, convolutions of stride 2 over the grid of queries, whose channels are the keys; for class
    rows and columns an MLP. GELU, no skips."""
    if shape.kind == "cls":
        hidden = min(256, max(2 * shape.n_latents, shape.n_inputs // 2))
        return nn.ModuleDict(
            {
                "encode": nn.Sequential(
                    nn.Linear(shape.n_inputs, hidden), nn.GELU(), nn.Linear(hidden, shape.n_latents)
                ),
                "decode": nn.Sequential(
                    nn.Linear(shape.n_latents, hidden), nn.GELU(), nn.Linear(hidden, shape.n_inputs)
                ),
            }
        )
    return _block_autoencoder(shape)


def _block_autoencoder(shape: Shape) -> nn.ModuleDict:
    n_keys, narrow, wide = shape.grid[0] * shape.grid[1], 128, 256
    half = tuple(-(-side // 2) for side in shape.grid)
    quarter = tuple(-(-side // 2) for side in half)
    flat = wide * quarter[0] * quarter[1]
    spare = [tuple(big - (2 * small - 1) for big, small in zip(*pair, strict=True)) for pair in ((half, quarter), (shape.grid, half))]  # fmt: skip
    encode = nn.Sequential(
        nn.Unflatten(1, (*shape.grid, n_keys)),
        _Turn(0, 3, 1, 2),
        nn.Conv2d(n_keys, narrow, 1),
        nn.GELU(),
        nn.Conv2d(narrow, narrow, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(narrow, wide, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(flat, shape.n_latents),
    )
    decode = nn.Sequential(
        nn.Linear(shape.n_latents, flat),
        nn.GELU(),
        nn.Unflatten(1, (wide, *quarter)),
        nn.ConvTranspose2d(wide, narrow, 3, stride=2, padding=1, output_padding=spare[0]),
        nn.GELU(),
        nn.ConvTranspose2d(narrow, narrow, 3, stride=2, padding=1, output_padding=spare[1]),
        nn.GELU(),
        nn.Conv2d(narrow, n_keys, 1),
        _Turn(0, 2, 3, 1),
        nn.Flatten(),
    )
    return nn.ModuleDict({"encode": encode, "decode": decode})


class _Turn(nn.Module):
    """Dimensions in another order."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


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
    mean = torch.stack([piece.sum(0, dtype=torch.float64) for piece in _pieces(train)]).sum(0).div(len(train)).float()
    scale = math.sqrt(_squares(train, lambda x: x - mean) / train.numel()) or 1.0
    n_latents = max(1, min(shape.n_latents, len(train) - 1, shape.n_inputs))
    shape = Shape(shape.kind, shape.grid, shape.n_inputs, n_latents)
    axes = principal_axes(train, mean, n_latents, seed)
    coder = Coder(shape, clip, scale, mean, axes, Fit(math.nan, math.nan, len(train), len(test), ""))
    spread = _squares(test, lambda x: x - mean)
    pca_error = _error(coder, test, spread)
    net, reason = None, _no_trial(len(train), len(test), spread)
    ae_error = math.nan
    if not reason:
        net = _trained(shape, train, mean, scale, seed, told or (lambda done, of: None))
        coder.net = net
        ae_error = _error(coder, test, spread)
        reason = f"{'an autoencoder' if ae_error < pca_error else 'PCA'} describes held-out images better"
        if not ae_error < pca_error:
            coder.net = None
    coder.fit = Fit(ae_error, pca_error, len(train), len(test), reason)
    return coder.eval()


def _no_trial(n_train: int, n_test: int, spread: float) -> str:
    """Why no autoencoder is trained; empty if one is."""
    if spread == 0:
        held = "there is no second image to hold out" if n_test == 0 else "all maps held out are the same"
        return f"PCA, unjudged: {held}"
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


def _trained(
    shape: Shape, train: Float[Tensor, "map cell"], mean: Tensor, scale: float, seed: int, told: Told
) -> nn.ModuleDict:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = autoencoder(shape).train()
        per_epoch = len(train) // BATCH
        epochs = min(max(round(UPDATES / per_epoch), EPOCHS[0]), EPOCHS[1])
        optimiser = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * per_epoch)
        for epoch in range(epochs):
            for number, chosen in enumerate(torch.randperm(len(train)).split(BATCH)[:per_epoch]):
                x = (train[chosen].float() - mean) / scale
                loss = torch.nn.functional.mse_loss(net["decode"](net["encode"](x)), x)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                told(epoch * per_epoch + number + 1, epochs * per_epoch)
    return net.eval().requires_grad_(False)


def _error(coder: Coder, test: Float[Tensor, "map cell"], spread: float) -> float:
    """Squared error of a sample's clipped inputs as a share of `spread`."""
    if spread == 0:
        return math.nan

    def rest(x: Tensor) -> Tensor:
        return x - coder.decode(coder.encode_inputs(x))

    return _squares(test, rest) / spread


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
