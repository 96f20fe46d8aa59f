"""What one neuron sees: views of pixels at level 0 and through the layers, plain and faithful.

Plain views are after Nguyen et al. 2022 (arXiv 2210.07646): at level 0 the pixels of a patch times a filter, above it
mixed by attention alone. They leave out values, projections and the MLP. The faithful view beside them takes the whole
model: the neuron's own derivative by the pixels, times the pixels, or the linear map that is left when attention, norms
and activations are held still. It is our addition, as is the agreement between the two.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.arguments import number_below
from vitrail.contract.outlook import require_finite
from vitrail.errors import Unsupported, UsageError
from vitrail.models.gradients import gradients_enabled, parameters_at_rest
from vitrail.models.open import Vit
from vitrail.stats import spearman
from vitrail.tap.frozen import Frozen
from vitrail.tap.tap import Readers
from vitrail.tokens.embedding import Embedding, find_embedding
from vitrail.tokens.flow import flow_row, read_steps
from vitrail.tokens.levels import level_zero, sum_over_patches

__all__ = [
    "Agreement",
    "Faithful",
    "agreement",
    "faithful_view",
    "flow_view",
    "global_view",
    "local_view",
    "neuron_view",
]

PATHS = ("gradient", "frozen")
"""How a faithful view is taken; `faithful_view` says what each is."""

COMPLETE = 1e-2
"""A frozen map whose parts miss more than this share of the neuron is not linear, in float32."""

ROUNDINGS = 16
"""In half precision it may miss this many roundings instead: 12.5 % in bfloat16, 1.6 % in float16. Neurons of the tiny
ImageNet models miss up to 11.6 and 0.6 %."""

NO_CHANGE = 1e-12
"""Keeps `Faithful.missing` finite for a neuron that does not change at all."""

Pixels = Float[Tensor, "image colour row column"]
Filter = Float[Tensor, "colour height width"]


def local_view(
    images: Pixels, filter_: Filter, grid: tuple[int, int], patch: int
) -> Float[Tensor, "image colour height width"]:
    """V(z_0[i, j]): the pixels of patch i times filter j, element by element.

    Args:
        images: Prepared images.
        filter_: Kernel of channel j.
        grid: (rows, columns) of patches.
        patch: Index i of the patch.

    Returns:
        Signed products.
    """
    row, column = divmod(patch, grid[1])
    height, width = filter_.shape[1:]
    rows, columns = slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)
    return images[:, :, rows, columns] * filter_


def global_view(images: Pixels, filter_: Filter, grid: tuple[int, int]) -> Pixels:
    """G_0[j]: the local views of all patches, each in its place.

    Args:
        images: Prepared images.
        filter_: Kernel of channel j.
        grid: (rows, columns) of patches.

    Returns:
        Signed products, as large as the images.
    """
    return images * filter_.repeat(1, *grid)


def flow_view(images: Pixels, filter_: Filter, grid: tuple[int, int], flow: Float[Tensor, "image patch"]) -> Pixels:
    """The closed form of V(z_l[i, j]): at patch m, J_l[i, m] times the local view of m.

    Needs no picture per token: one product of the size of the image.

    Args:
        images: Prepared images.
        filter_: Kernel of channel j.
        grid: (rows, columns) of patches.
        flow: Row i of J_l, without prefix tokens.

    Returns:
        Signed, as large as the images.
    """
    height, width = filter_.shape[1:]
    weights = flow.unflatten(1, grid).repeat_interleave(height, 1).repeat_interleave(width, 2)
    mixed: Tensor = global_view(images, filter_, grid) * weights[:, None]
    return mixed


def neuron_view(
    vit: Vit,
    images: Pixels,
    level: int,
    token: int,
    channel: int,
    how: str = "mean",
    embedding: Embedding | None = None,
) -> Pixels:
    """The plain view of one neuron, V(z_level[token, channel]).

    Args:
        vit: The model.
        images: Prepared images.
        level: 0 (patch embedding) to the number of layers.
        token: Index of the token; prefix tokens count, and hold no pixels at level 0, so their own view there is empty.
        channel: Of the token.
        how: How attention mixes tokens, one of `flow.STEPS`.
        embedding: Of the model, where it was found before.

    Returns:
        Signed, as large as the images.

    Raises:
        Unsupported: The model has no plain patch embedding, or tokens cannot be followed that far.
        UsageError: There is no such level, token or channel.
        ModelError: The answer to an image, or a filter, is not finite (NaN or infinite).
    """
    embedding = embedding or find_embedding(vit)
    _refuse_unknown(vit, embedding, level, token, channel)
    if level == 0:
        row = torch.zeros((len(images), vit.anatomy.blocks[0].tokens), dtype=images.dtype, device=images.device)
        row[:, token] = 1
    else:
        steps, logits = read_steps(vit.tap(), images, how, channel, level)
        require_finite(vit.name, logits)
        row = flow_row(steps, token)
    view = flow_view(images, embedding.filters[channel], embedding.grid, row[:, embedding.prefix :].to(images))
    require_finite(vit.name, view, subject=f"The view of channel {channel} of {vit.name} in")
    return view


@dataclass(frozen=True, eq=False)
class Faithful:
    """Pixels times the neuron's derivative by them.

    Attributes:
        pixels: The part that each pixel has in `change`.
        change: The neuron's value for this image less `bias`.
        bias: Its value for a blank (all-zero, after normalisation) image, by the same map.
        missing: |sum of pixels - change| / |change|; 0: the view accounts for all of the change (completeness).
    """

    pixels: Float[Tensor, "colour row column"]
    change: float
    bias: float
    missing: float


def faithful_view(
    vit: Vit, image: Pixels, level: int, token: int, channel: int, steps: int = 1, path: str = "gradient"
) -> Faithful:
    """What each pixel adds to z_level[token, channel], through values, projections and MLPs as well.

    Args:
        vit: The model.
        image: One prepared image.
        level: 0 (patch embedding) to the number of layers.
        token: Index of the token; prefix tokens count.
        channel: Of the token.
        steps: With "gradient": 1 takes the derivative at the image itself; more average it on the way from a blank
            image (integrated gradients, Sundararajan et al. 2017, arXiv 1703.01365): `missing` goes to 0 as steps grow,
            slowly in deep levels.
        path: "gradient": the derivative by the pixels, times the pixels. "frozen": attention weights, statistics of
            norms and gains of activations are held as they are for this image (`vitrail.tap.frozen`); what is left is
            linear, so the view is complete, and `bias` is what biases and positions give. It says how the pixels are
            carried, not how they decide where attention goes. Ours, after the attention rules of layer-wise relevance
            propagation (Ali et al. 2022, arXiv 2202.07304).

    Returns:
        The view with the change it accounts for.

    Raises:
        UsageError: More than one image, fewer than 1 step, or no such path, level, token or channel.
        Unsupported: "frozen" through a model in which something else than these is not linear; a model that lets no
            gradient through.
        ModelError: The answer to the image is not finite (NaN or infinite).
    """
    if len(image) != 1 or steps < 1:
        raise UsageError(f"A faithful view is of one image with 1 or more steps, not {len(image)} with {steps}.")
    if path not in PATHS or (path == "frozen" and steps != 1):
        raise UsageError(f"There is no path {path!r} with {steps} steps; choose gradient, or frozen with one step.")
    if number_below(vit.n_layers + 1, "level", level, vit.name) == 0:
        return _faithful_at_0(vit, image, token, channel)
    if path == "frozen":
        return _frozen_view(vit, image, level, token, channel)
    parts = [1.0] if steps == 1 else [(index + 0.5) / steps for index in range(steps)]
    points = torch.cat([image * part for part in parts]).detach().requires_grad_(True)
    with gradients_enabled():
        values = _neuron(vit, points, level, token, channel)
        (gradient,) = torch.autograd.grad(values.sum(), points)
    with torch.no_grad():
        blank = _neuron(vit, torch.zeros_like(image), level, token, channel)
        at_image = values[:1] if steps == 1 else _neuron(vit, image, level, token, channel)
    return _faithful((image * gradient.mean(0, keepdim=True))[0].detach(), float(at_image.detach()), float(blank))


def _frozen_view(vit: Vit, image: Pixels, level: int, token: int, channel: int) -> Faithful:
    """Two passes: one that is recorded and differentiated, one of a blank image through the same linear map."""
    frozen = Frozen()
    point, blank = (each.detach().clone().requires_grad_(True) for each in (image, torch.zeros_like(image)))
    with gradients_enabled(), parameters_at_rest(vit.model):
        with frozen:
            value = _neuron(vit, point, level, token, channel)
        (gradient,) = torch.autograd.grad(value.sum(), point)
        with frozen.replay():
            constant = _neuron(vit, blank, level, token, channel)
    faithful = _faithful((point * gradient)[0].detach(), float(value.detach()), float(constant.detach()))
    total = float(faithful.pixels.double().sum())
    allowed = max(COMPLETE, ROUNDINGS * torch.finfo(value.dtype).eps)
    if abs(total - faithful.change) > allowed * max(abs(faithful.change), abs(faithful.bias)):
        raise Unsupported(
            f"{vit.name} does something that is not linear even with attention, norms and activations held still: the "
            f"frozen path gives {total:.4g} of a change of {faithful.change:.4g}. Use path='gradient'."
        )
    return faithful


def _faithful_at_0(vit: Vit, image: Pixels, token: int, channel: int) -> Faithful:
    """Level 0 is linear in the pixels, so its derivative is the filter."""
    embedding = find_embedding(vit)
    if embedding.position is None:
        raise Unsupported(f"{vit.name} has a norm before its first block, so level 0 is no sum of pixels; ask for 1.")
    _refuse_unknown(vit, embedding, 0, token, channel)
    replay, logits = vit.tap().record(torch.cat([image, torch.zeros_like(image)]))
    require_finite(vit.name, logits, ("this image", "a blank image"))
    ends = level_zero(vit.anatomy, replay)[:, token, channel].double()
    return _faithful(neuron_view(vit, image, 0, token, channel, embedding=embedding)[0], float(ends[0]), float(ends[1]))


def _faithful(pixels: Float[Tensor, "colour row column"], here: float, blank: float) -> Faithful:
    change = here - blank
    return Faithful(pixels, change, blank, abs(float(pixels.double().sum()) - change) / max(abs(change), NO_CHANGE))


def _neuron(vit: Vit, images: Pixels, level: int, token: int, channel: int) -> Float[Tensor, "image"]:
    """z_level[token, channel] of each image, above level 0; gradients flow if enabled."""
    values: list[Tensor] = []

    def keep(layer: int, tokens: Tensor) -> None:
        if layer == level - 1:
            chosen = number_below(tokens.shape[1], "token", token, vit.name)
            values.append(tokens[:, chosen, number_below(tokens.shape[2], "channel", channel, vit.name)])

    require_finite(vit.name, vit.tap().read(images, Readers(output=keep)))
    return values[0]


@dataclass(frozen=True)
class Agreement:
    """How alike two views of one neuron are.

    Attributes:
        cosine: Of all pixel entries, -1 to 1.
        rank: Spearman's correlation of how much each patch holds (sum of absolute entries), -1 to 1.
    """

    cosine: float
    rank: float


def agreement(
    one: Float[Tensor, "colour row column"], other: Float[Tensor, "colour row column"], grid: tuple[int, int]
) -> Agreement:
    """How alike a plain and a faithful view are.

    Args:
        one: A view.
        other: Another view of the same size.
        grid: (rows, columns) of patches.

    Returns:
        1: alike; 0: unrelated; NaN where a view is empty.
    """
    lengths = float(one.double().norm() * other.double().norm())
    cosine = float((one.double() * other.double()).sum()) / lengths if lengths else float("nan")
    amounts = [sum_over_patches(each.float().abs().sum(0)[None], grid, None)[0].numpy() for each in (one, other)]
    return Agreement(cosine, spearman(*amounts))


def _refuse_unknown(vit: Vit, embedding: Embedding, level: int, token: int, channel: int) -> None:
    number_below(vit.n_layers + 1, "level", level, vit.name)
    number_below(vit.anatomy.blocks[0].tokens, "token", token, vit.name)
    number_below(len(embedding.filters), "channel", channel, vit.name)
