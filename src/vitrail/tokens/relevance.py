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
from vitrail.models.open import Vit
from vitrail.tap.edits import Edit
from vitrail.tap.tap import Readers, Tap
from vitrail.tokens.flow import LayerSteps, flows, measure_windows, rollout
from vitrail.tokens.levels import require_one_grid
from vitrail.tokens.robustness import drop_orders, paint, patches_to_drop

__all__ = ["METHODS", "Curves", "deletion_and_insertion", "gradient_rollout", "relevance"]

Images = Float[Tensor, "image channel row column"]
METHODS = ("raw", "rollout", "gradient", "random")

N_STEPS = 10
"""Steps of deletion and insertion between nothing and everything."""


@torch.no_grad()
def relevance(
    vit: Vit, images: Images, classes: Int[np.ndarray, "image"], methods: Sequence[str] = METHODS, seed: int = 0
) -> dict[str, Float[np.ndarray, "image patch"]]:
    """How much each patch matters to the prediction, by each method.

    Args:
        vit: The model.
        images: Prepared images.
        classes: The class of each image that `gradient` explains; the other methods do not know of classes.
        methods: Of `METHODS`.
        seed: Of `random`.

    Returns:
        Scores by method; scales differ, only the order within an image means something.

    Raises:
        UsageError: There is no such method.
        Unsupported: Tokens cannot be followed through all layers, or `gradient` of a model without classifier.
    """
    undefined = [method for method in methods if method not in METHODS]
    if undefined:
        raise UsageError(f"There is no relevance {undefined[0]!r}; choose from {', '.join(METHODS)}.")
    anatomy = vit.anatomy
    rows, columns = require_one_grid(anatomy)
    prefix, index = anatomy.blocks[0].prefix, anatomy.class_index(0)
    steps, raw = _maps(vit.tap(), images)
    scores: dict[str, Float[np.ndarray, "image patch"]] = {}
    for method in methods:
        if method == "raw":
            scores[method] = (raw[:, index, prefix:] if index is not None else raw[:, prefix:, prefix:].mean(1)).numpy()
        elif method == "rollout":
            scores[method] = rollout(steps, prefix, index).cpu().numpy()
        elif method == "gradient":
            scores[method] = gradient_rollout(vit, images, classes).cpu().numpy()
        else:
            scores[method] = np.random.default_rng(seed).random((len(images), rows * columns))
    return scores


def _maps(tap: Tap, images: Images) -> tuple[list[Tensor], Tensor]:
    """The steps of all layers, and the last layer's map with heads averaged."""
    measure_windows(tap)
    steps = LayerSteps()
    tap.read(images, Readers(attention=steps.read))
    assert steps.mean_map is not None
    return steps.all(), steps.mean_map.cpu()


def gradient_rollout(vit: Vit, images: Images, classes: Int[np.ndarray, "image"]) -> Float[Tensor, "image patch"]:
    """Gradient-weighted rollout of one class for each image.

    R = R + mean over heads of max(map x gradient, 0) R, layer by layer, from R = identity. A factor of 1 on every
    attention weight has the derivative map x gradient, so no map needs to be stored.

    Args:
        vit: The model.
        images: Prepared images.
        classes: The class of each image that is explained.

    Returns:
        The class token's row less the identity, or the patches' mean row where there is no class token; zero or more.

    Raises:
        Unsupported: The model has no classifier, or attends within windows.
    """
    if vit.n_classes is None:
        raise Unsupported(f"{vit.name} has no classifier, so no class has a gradient; use rollout.")
    anatomy = vit.anatomy
    require_one_grid(anatomy)
    if any(set(block.kinds) != {"token"} for block in anatomy.blocks):
        raise Unsupported(f"{vit.name} attends within windows; gradient-weighted rollout needs whole maps.")
    if any(call.follows for block in anatomy.blocks for call in block.calls):
        raise Unsupported(
            f"{vit.name} has layers whose attention calls follow each other, and gradient-weighted rollout takes one "
            "step a layer; use rollout."
        )
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
    """Probability of the class as patches go (deletion) or come (insertion), most relevant first.

    A good map of relevance has a low area under deletion and a high one under insertion.

    Attributes:
        amounts: Shares of the patches, 0 to 1.
        deletion: Probability after that share was painted over.
        insertion: Probability with that share visible alone.
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
    n_steps: int = N_STEPS,
    seed: int = 0,
) -> Curves:
    """Deletion and insertion (Petsiuk et al. 2018, arXiv 1806.07421) on patches.

    Lost patches are painted in the image's mean colour, on the model's own input. The same amounts for every map; equal
    scores in random order.

    Args:
        vit: The model.
        images: Prepared images.
        classes: The class of each image whose probability is followed.
        scores: Relevance of each patch.
        n_steps: Amounts between none and all.
        seed: Of the order of equal scores.

    Returns:
        The curves.

    Raises:
        Unsupported: Tokens cannot be followed through all layers.
    """
    grid = require_one_grid(vit.anatomy)
    amounts = np.linspace(0, 1, n_steps + 1)
    order = drop_orders(scores, range(len(images)), seed)["salient"]
    full, empty = _probability(vit, images, classes), _probability(vit, _blank(vit, images, grid), classes)
    deletion, insertion = [full], [empty]
    for amount in amounts[1:-1]:
        lost = patches_to_drop(order, amount)
        deletion.append(_probability(vit, paint(images, lost, grid, "mean", vit.preprocessing), classes))
        insertion.append(_probability(vit, paint(images, ~lost, grid, "mean", vit.preprocessing), classes))
    return Curves(amounts, np.stack([*deletion, empty], 1), np.stack([*insertion, full], 1))


def _blank(vit: Vit, images: Images, grid: tuple[int, int]) -> Images:
    all_patches = np.ones((len(images), grid[0] * grid[1]), dtype=bool)
    return paint(images, all_patches, grid, "mean", vit.preprocessing)


def _probability(vit: Vit, images: Images, classes: Int[np.ndarray, "image"]) -> Float[np.ndarray, "image"]:
    probabilities = vit.task.probabilities(vit.tap().read(images)).cpu().numpy()
    return np.take_along_axis(probabilities, classes[:, None], axis=1)[:, 0]
