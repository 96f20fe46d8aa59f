"""Which patches an answer rests on: raw attention, rollout, gradient-weighted rollout, and curves that judge them.

raw        the class token's attention in the last layer, heads averaged
rollout    attention carried through all layers (Abnar and Zuidema 2020, arXiv 2005.00928); the same for every class
gradient   each layer's maps times their gradient for one class, positive part, carried through the layers (Chefer, Gur
           and Wolf 2021, arXiv 2103.15679, for one modality)
random     nothing but chance: what the others have to beat
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.errors import Unsupported, UsageError
from vitrail.neurons.flow import flows, measure_windows, rollout, step
from vitrail.neurons.levels import refuse_regrouped
from vitrail.neurons.robustness import drop_orders, lost_patches, paint
from vitrail.vit.edits import Edit
from vitrail.vit.open import Vit
from vitrail.vit.tap import LayerAttention, Readers, Tap

__all__ = ["METHODS", "Curves", "deletion_and_insertion", "gradient_rollout", "relevance"]

Images = Float[Tensor, "image channel row column"]
METHODS = ("raw", "rollout", "gradient", "random")

STEPS = 10


@torch.no_grad()
def relevance(
    vit: Vit, images: Images, classes: Int[np.ndarray, "image"], methods: Sequence[str] = METHODS, seed: int = 0
) -> dict[str, Float[np.ndarray, "image patch"]]:
    """How much each patch matters by each method; scales differ, only the order within an image means something.

    `classes` are those that `gradient` explains; the others do not know of classes.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise UsageError(f"There is no relevance {unknown[0]!r}; choose from {', '.join(METHODS)}.")
    anatomy = vit.anatomy
    rows, columns = refuse_regrouped(anatomy)
    prefix, index = anatomy.blocks[0].prefix, anatomy.class_index(0)
    steps, raw = _maps(vit.tap(), images)
    found: dict[str, Float[np.ndarray, "image patch"]] = {}
    for method in methods:
        if method == "raw":
            found[method] = (raw[:, index, prefix:] if index is not None else raw[:, prefix:, prefix:].mean(1)).numpy()
        elif method == "rollout":
            found[method] = rollout(steps, prefix, index).cpu().numpy()
        elif method == "gradient":
            found[method] = gradient_rollout(vit, images, classes).cpu().numpy()
        else:
            found[method] = np.random.default_rng(seed).random((len(images), rows * columns))
    return found


def _maps(tap: Tap, images: Images) -> tuple[list[Tensor], Tensor]:
    """The steps of all layers, and the last layer's map with heads averaged."""
    measure_windows(tap)
    steps: list[Tensor] = []
    last: list[Tensor] = []

    def keep(attention: LayerAttention) -> None:
        if attention.call == 0:
            weights = attention.weights_on_grid()
            steps.append(step(weights))
            last[:] = [weights.mean(1).cpu()]

    tap.read(images, Readers(attention=keep))
    return steps, last[0]


def gradient_rollout(vit: Vit, images: Images, classes: Int[np.ndarray, "image"]) -> Float[Tensor, "image patch"]:
    """R = R + mean over heads of max(map x gradient, 0) R, layer by layer, from R = identity; the class token's row, or
    the patches' mean where there is none.

    A factor of 1 on every attention weight has the derivative map x gradient, so no map needs to be kept.
    """
    if vit.n_classes is None:
        raise Unsupported(f"{vit.name} has no classifier, so no class has a gradient; use rollout.")
    anatomy = vit.anatomy
    refuse_regrouped(anatomy)
    if any(block.kind != "token" for block in anatomy.blocks):
        raise Unsupported(f"{vit.name} attends within windows; gradient-weighted rollout needs whole maps.")
    tokens = anatomy.blocks[0].tokens
    with torch.enable_grad():
        factors = [
            torch.ones((len(images), block.heads, tokens, tokens), device=images.device, requires_grad=True)
            for block in anatomy.blocks
        ]
        edits = [Edit(layer, region=factor) for layer, factor in enumerate(factors)]
        logits = vit.tap().read(images, edits=edits).float()
        target = torch.as_tensor(classes, device=logits.device)[:, None]
        gradients = torch.autograd.grad(logits.gather(1, target).sum(), factors)
    steps = [torch.eye(tokens, device=images.device) + each.float().clamp(min=0).mean(1) for each in gradients]
    carried = flows(steps)[-1] - torch.eye(tokens, device=images.device)
    prefix, index = anatomy.blocks[0].prefix, anatomy.class_index(0)
    return carried[:, index, prefix:] if index is not None else carried[:, prefix:, prefix:].mean(1)


@dataclass(frozen=True, eq=False)
class Curves:
    """Probability of the class as patches go (deletion) or come (insertion), most relevant first; [image amount].

    `amounts` are shares of the patches. A good map has a low area under deletion and a high one under insertion.
    """

    amounts: Float[np.ndarray, "amount"]
    deletion: Float[np.ndarray, "image amount"]
    insertion: Float[np.ndarray, "image amount"]

    @property
    def areas(self) -> tuple[Float[np.ndarray, "image"], Float[np.ndarray, "image"]]:
        """Area under deletion and insertion of each image, by trapezoids over amounts 0 to 1."""
        width = np.diff(self.amounts)
        both = [((curve[:, 1:] + curve[:, :-1]) / 2 * width).sum(axis=1) for curve in (self.deletion, self.insertion)]
        return both[0], both[1]


@torch.no_grad()
def deletion_and_insertion(
    vit: Vit,
    images: Images,
    classes: Int[np.ndarray, "image"],
    scores: Float[np.ndarray, "image patch"],
    n_steps: int = STEPS,
    seed: int = 0,
) -> Curves:
    """Petsiuk et al. 2018 (arXiv 1806.07421) on patches: lost patches are painted in the image's mean colour, on the
    model's own input. The same amounts for every map; equal scores in random order.
    """
    grid = refuse_regrouped(vit.anatomy)
    amounts = np.linspace(0, 1, n_steps + 1)
    order = drop_orders(scores, range(len(images)), seed)["salient"]
    whole, empty = _probability(vit, images, classes), _probability(vit, _blank(vit, images, grid), classes)
    deletion, insertion = [whole], [empty]
    for amount in amounts[1:-1]:
        gone = lost_patches(order, amount)
        deletion.append(_probability(vit, paint(images, gone, grid, "mean", vit.preprocessing), classes))
        insertion.append(_probability(vit, paint(images, ~gone, grid, "mean", vit.preprocessing), classes))
    return Curves(amounts, np.stack([*deletion, empty], 1), np.stack([*insertion, whole], 1))


def _blank(vit: Vit, images: Images, grid: tuple[int, int]) -> Images:
    everything = np.ones((len(images), grid[0] * grid[1]), dtype=bool)
    return paint(images, everything, grid, "mean", vit.preprocessing)


def _probability(vit: Vit, images: Images, classes: Int[np.ndarray, "image"]) -> Float[np.ndarray, "image"]:
    answers = vit.tap().read(images).float().softmax(-1).cpu().numpy()
    return np.take_along_axis(answers, classes[:, None], axis=1)[:, 0]
