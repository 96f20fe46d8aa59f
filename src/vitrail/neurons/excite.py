"""What excites a neuron: the images of a data set that do most, and an image made to do it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.errors import UsageError
from vitrail.vit.open import Vit
from vitrail.vit.tap import Readers

__all__ = ["Made", "TopImages", "make_image"]


class TopImages:
    """The images that excite each channel of one level most, streamed: memory for `keep` entries a channel, no more.

    An image counts once, with its most excited patch. Equal activations keep the image that came first.
    """

    def __init__(self, n_channels: int, keep: int = 9) -> None:
        if keep < 1 or n_channels < 1:
            raise UsageError(f"{keep} images of {n_channels} channels cannot be kept; give 1 or more of both.")
        self.activation: Float[np.ndarray, "channel rank"] = np.full((n_channels, keep), -np.inf)
        self.image: Int[np.ndarray, "channel rank"] = np.full((n_channels, keep), -1)
        self.patch: Int[np.ndarray, "channel rank"] = np.full((n_channels, keep), -1)

    def add(self, patches: Float[Tensor, "image patch channel"], numbers: Sequence[int]) -> None:
        """Takes in the patch tokens of some images, whose `numbers` will name them."""
        highest = patches.float().max(dim=1)
        values = np.concatenate([self.activation, highest.values.T.cpu().numpy()], axis=1)
        images = np.concatenate([self.image, np.broadcast_to(numbers, highest.values.T.shape)], axis=1)
        places = np.concatenate([self.patch, highest.indices.T.cpu().numpy()], axis=1)
        best = np.argsort(-values, axis=1, kind="stable")[:, : self.image.shape[1]]
        self.activation, self.image, self.patch = (
            np.take_along_axis(each, best, axis=1) for each in (values, images, places)
        )


@dataclass(frozen=True, eq=False)
class Made:
    """An image made to excite a channel: pixels 0..1, and the channel's activation before and after."""

    pixels: Float[np.ndarray, "row column colour"]
    before: float
    after: float


def make_image(
    vit: Vit,
    level: int,
    channel: int,
    *,
    token: int | None = None,
    n_steps: int = 64,
    rate: float = 0.05,
    seed: int = 0,
) -> Made:
    """An image that excites channel `channel` at `level` (1 or more), by gradient ascent from faint noise.

    The mean over patches is raised, or one `token`. Pixels are kept natural by three means that feature visualisation
    uses (Olah et al. 2017, distill.pub): a spectrum that falls with frequency, small random shifts, and a sigmoid that
    keeps values in 0..1. Such images show what the neuron answers to among all images, not among photographs.
    """
    if not 1 <= level <= vit.n_layers:
        raise UsageError(f"There is no level {level} to excite: {vit.name} has levels 1 to {vit.n_layers}.")
    generator = torch.Generator().manual_seed(seed)
    rows, columns = vit.preprocessing.size
    scale = _falling(rows, columns)
    spectrum = (0.01 * torch.randn((3, rows, columns // 2 + 1, 2), generator=generator)).requires_grad_(True)
    optimiser = torch.optim.Adam([spectrum], lr=rate)
    activations = []
    for _ in range(n_steps):
        pixels = _pixels(spectrum, scale, (rows, columns))
        shift = torch.randint(-8, 9, (2,), generator=generator).tolist()
        activation = _activation(vit, torch.roll(pixels, shift, (1, 2)), level, channel, token)
        activations.append(float(activation.detach()))
        optimiser.zero_grad()
        (-activation).backward()
        optimiser.step()
    with torch.no_grad():
        final = _pixels(spectrum, scale, (rows, columns))
        after = float(_activation(vit, final, level, channel, token))
    return Made(final.permute(1, 2, 0).numpy(), activations[0], after)


def _falling(rows: int, columns: int) -> Float[Tensor, "row frequency"]:
    """1 / frequency, as in photographs."""
    frequency = (torch.fft.fftfreq(rows)[:, None] ** 2 + torch.fft.rfftfreq(columns)[None] ** 2).sqrt()
    scale: Tensor = (rows * columns) ** 0.5 / frequency.clamp(min=1 / max(rows, columns))
    return scale


def _pixels(spectrum: Tensor, scale: Tensor, size: tuple[int, int]) -> Float[Tensor, "colour row column"]:
    image = torch.fft.irfft2(torch.view_as_complex(spectrum) * scale, s=size)
    return torch.sigmoid(image)


def _activation(vit: Vit, pixels: Tensor, level: int, channel: int, token: int | None) -> Tensor:
    """Gradients flow to the pixels."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (vit.preprocessing.mean, vit.preprocessing.std))
    prefix = vit.anatomy.blocks[level - 1].prefix
    kept: list[Tensor] = []

    def keep(layer: int, tokens: Tensor) -> None:
        if layer == level - 1:
            kept.append(tokens[0, prefix:, channel].mean() if token is None else tokens[0, token, channel])

    with torch.enable_grad():
        vit.tap().read(((pixels - mean) / std)[None], Readers(output=keep))
    return kept[0]
