"""What excites a neuron: the images of a data set that do most, and an image made to do it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.arguments import at_least_one, number_below, whole_number
from vitrail.contract.outlook import require_finite
from vitrail.errors import UsageError
from vitrail.models.gradients import gradients_enabled
from vitrail.models.open import PRECISIONS, Vit
from vitrail.stats import require_seed
from vitrail.tap.tap import Readers, Replay, Tap
from vitrail.tokens.levels import layers_of_own_grid
from vitrail.tokens.pictures import as_picture

if TYPE_CHECKING:
    from vitrail.one_image import OneImage

__all__ = ["ExcitingImage", "PeakCollector", "TopImages", "exciting_images", "maximise_activation"]


NOISE = 0.01
"""Standard deviation of the spectrum at the start: a grey image with a trace of structure."""

MAX_SHIFT = 8
"""Largest shift of an image between steps, in pixels: half a usual patch, so that no pattern hangs on its edges."""


class PeakCollector:
    """`neuron_peak` and `neuron_peak_patch`: of each image and channel the patch with the highest value.

    Args:
        vit: The model, some of whose layers return the patches that they were given.
        measures: Names of its measures.
    """

    replays = False

    def __init__(self, vit: Vit, measures: Sequence[str]) -> None:
        self.measures = tuple(measures)
        self._layer = max(layers_of_own_grid(vit))
        self._prefix = vit.anatomy.blocks[self._layer].prefix
        self._arrays: dict[str, np.ndarray] = {}

    def readers(self) -> Readers:
        """Reads what the last layer with a grid returns.

        Returns:
            One reader.
        """
        return Readers(output=self._read)

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """Hands over what was read.

        Args:
            tap: Not used.
            replay: Not used.
            logits: Not used.
            labels: Not used.

        Returns:
            Arrays [image, token_channel].
        """
        arrays = {name: self._arrays[name] for name in self.measures}
        self._arrays = {}
        return arrays

    def _read(self, layer: int, tokens: Tensor) -> None:
        if layer == self._layer:
            highest = tokens[:, self._prefix :].float().max(dim=1)
            self._arrays = {
                "neuron_peak": highest.values.cpu().numpy(),
                "neuron_peak_patch": highest.indices.cpu().numpy().astype(np.int16),
            }


def exciting_images(one: "OneImage") -> dict[str, Any]:
    """Makes images that excite the chosen neuron of one look, in the middle of the model and at its end.

    Args:
        one: The image with its plain pass. The neuron is the one asked for, or the one that a patch of the image
            excites most against the other patches.

    Returns:
        `exciting_image` [excited_level row column channel], 0 to 1.

    Raises:
        UsageError: The model has no such channel.
    """
    vit = one.vit
    layer = max(layers_of_own_grid(vit))
    read: dict[int, Tensor] = {}
    with torch.no_grad():
        vit.tap().read(one.pixels, Readers(output=read.__setitem__))
    patches = read[layer][0, vit.anatomy.blocks[layer].prefix :].float()
    spread = (patches.max(0).values - patches.mean(0)) / patches.std(0).clamp_min(torch.finfo(patches.dtype).tiny)
    n_channels = patches.shape[1]
    if one.asked_channel is not None and not 0 <= one.asked_channel < n_channels:
        raise UsageError(
            f"Neuron {one.asked_channel} was asked for; L{layer} of this model has neurons 0 to {n_channels - 1}."
        )
    channel = int(spread.argmax()) if one.asked_channel is None else one.asked_channel
    levels = sorted({level + 1 for level in layers_of_own_grid(vit) if read[level].shape[-1] == n_channels})
    levels = sorted({levels[(len(levels) - 1) // 2], levels[-1]})
    made = [
        as_picture(torch.from_numpy(maximise_activation(vit, level, channel).pixels).permute(2, 0, 1))
        for level in levels
    ]
    return {
        "exciting_image": xr.DataArray(
            np.stack(made),
            dims=("excited_level", "row", "column", "channel"),
            coords={"excited_level": levels, "excited_neuron": channel},
        )
    }


class TopImages:
    """The images that excite each channel of one level most, streamed: memory for `keep` entries a channel, no more.

    An image counts once, with its most excited patch. Equal activations keep the image that came first.

    Args:
        n_channels: Channels of the level.
        keep: Images to keep for each channel.

    Attributes:
        activation: The highest activation of each image, falling; -inf where fewer than `keep` images came.
        image: The number of that image; -1 where there is none.
        patch: The patch with that activation; -1 where there is none.

    Raises:
        UsageError: `n_channels` or `keep` is below 1.
    """

    def __init__(self, n_channels: int, keep: int = 9) -> None:
        if keep < 1 or n_channels < 1:
            raise UsageError(f"{keep} images of {n_channels} channels cannot be kept; give 1 or more of both.")
        self.activation: Float[np.ndarray, "channel rank"] = np.full((n_channels, keep), -np.inf)
        self.image: Int[np.ndarray, "channel rank"] = np.full((n_channels, keep), -1)
        self.patch: Int[np.ndarray, "channel rank"] = np.full((n_channels, keep), -1)

    def add(self, patches: Float[Tensor, "image patch channel"], numbers: Sequence[int]) -> None:
        """Takes in some images.

        Args:
            patches: Their patch tokens at the level.
            numbers: The number by which each image is to be named.
        """
        highest = patches.float().max(dim=1)
        values = np.concatenate([self.activation, highest.values.T.cpu().numpy()], axis=1)
        images = np.concatenate([self.image, np.broadcast_to(numbers, highest.values.T.shape)], axis=1)
        patches_of = np.concatenate([self.patch, highest.indices.T.cpu().numpy()], axis=1)
        best = np.argsort(-values, axis=1, kind="stable")[:, : self.image.shape[1]]
        self.activation, self.image, self.patch = (
            np.take_along_axis(each, best, axis=1) for each in (values, images, patches_of)
        )


@dataclass(frozen=True, eq=False)
class ExcitingImage:
    """An image made to excite a channel.

    Attributes:
        pixels: 0 to 1, before normalisation.
        before: The channel's activation for the noise that the ascent began with.
        after: Its activation for `pixels`.
    """

    pixels: Float[np.ndarray, "row column colour"]
    before: float
    after: float


def maximise_activation(
    vit: Vit,
    level: int,
    channel: int,
    *,
    token: int | None = None,
    n_steps: int = 64,
    lr: float = 0.05,
    seed: int = 0,
) -> ExcitingImage:
    """Makes an image that excites a channel, by gradient ascent from faint noise.

    Pixels are kept natural by three means that feature visualisation uses (Olah et al. 2017, distill.pub): a spectrum
    that falls with frequency, small random shifts, and a sigmoid that keeps values in 0..1. Such images show what the
    neuron answers to among all images, not among photographs.

    Args:
        vit: The model.
        level: Level of the neuron: 1, after the first layer, to the number of layers.
        channel: Channel of the neuron.
        token: The token whose activation is raised; None raises the mean over patches.
        n_steps: Steps of Adam.
        lr: Learning rate on the spectrum.
        seed: Of the noise and the shifts.

    Returns:
        The image, with the activation before and after.

    Raises:
        UsageError: The model has no such level, channel or token, or there is no step or no learning rate above 0.
        Unsupported: The model lets no gradient through.
        ModelError: The answer to the image is not finite (NaN or infinite).
    """
    if not 1 <= whole_number("level", level) <= vit.n_layers:
        raise UsageError(f"There is no level {level} to excite: {vit.name} has levels 1 to {vit.n_layers}.")
    n_steps, seed = at_least_one("steps", n_steps), require_seed(seed)
    if not 0 < lr < float("inf"):
        raise UsageError(f"A learning rate of {lr} has no meaning; give a number above 0.")
    generator = torch.Generator().manual_seed(seed)
    rows, columns = vit.image_size
    activations = []
    with gradients_enabled():  # also where the caller has switched gradients off
        scale = _frequency_scale(rows, columns)
        spectrum = NOISE * torch.randn((vit.n_channels, rows, columns // 2 + 1, 2), generator=generator, **_ON_CPU)
        optimiser = torch.optim.Adam([spectrum.requires_grad_()], lr=lr)
        for _ in range(n_steps):
            pixels = _pixels(spectrum, scale, (rows, columns))
            shift = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2,), generator=generator, device="cpu").tolist()
            activation = _activation(vit, torch.roll(pixels, shift, (1, 2)), level, channel, token)
            activations.append(float(activation.detach()))
            (spectrum.grad,) = torch.autograd.grad(-activation, [spectrum])  # nothing is added to the model's own
            optimiser.step()
    with torch.no_grad():
        final = _pixels(spectrum, scale, (rows, columns))
        after = float(_activation(vit, final, level, channel, token))
    return ExcitingImage(final.permute(1, 2, 0).numpy(), activations[0], after)


_ON_CPU: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Where an image is made, whatever the device and precision of the model: the same noise everywhere."""


def _frequency_scale(rows: int, columns: int) -> Float[Tensor, "row frequency"]:
    """1 / frequency, as in photographs."""
    down, across = torch.fft.fftfreq(rows, **_ON_CPU), torch.fft.rfftfreq(columns, **_ON_CPU)
    frequency = (down[:, None] ** 2 + across[None] ** 2).sqrt()
    scale: Tensor = (rows * columns) ** 0.5 / frequency.clamp(min=1 / max(rows, columns))
    return scale


def _pixels(spectrum: Tensor, scale: Tensor, size: tuple[int, int]) -> Float[Tensor, "colour row column"]:
    image = torch.fft.irfft2(torch.view_as_complex(spectrum) * scale, s=size)
    return torch.sigmoid(image)


def _activation(vit: Vit, pixels: Tensor, level: int, channel: int, token: int | None) -> Tensor:
    """Gradients flow to the pixels where they are enabled."""
    preprocessing = vit.preprocessing
    mean, std = (torch.tensor(values, **_ON_CPU).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    images = ((pixels - mean) / std)[None].to(vit.device, PRECISIONS[vit.precision])
    prefix = vit.anatomy.blocks[level - 1].prefix
    activations: list[Tensor] = []

    def keep(layer: int, tokens: Tensor) -> None:
        if layer == level - 1:
            owner = f"level {level} of {vit.name}"
            values = tokens[0, :, number_below(tokens.shape[2], "channel", channel, owner)].float()
            at = slice(prefix, None) if token is None else number_below(len(values), "token", token, owner)
            activations.append(values[at].mean())

    require_finite(vit.name, vit.tap().read(images, Readers(output=keep)))
    return activations[0]
