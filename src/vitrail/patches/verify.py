"""What becomes of a model's prediction if its patches see only what masks leave open: the proof of windows.

Our construction, after Ma et al. 2022 (arXiv 2203.05922), who verify their indicator on attention windows.
"""

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.errors import Unsupported, UsageError
from vitrail.models.open import Vit
from vitrail.models.task import Task
from vitrail.models.token_grid import token_grids
from vitrail.patches.windows import attention_bias
from vitrail.tap.edits import Edit

__all__ = ["Score", "mask_edits", "score_logits", "score_under_masks"]


class Score(NamedTuple):
    """How well images are classified.

    Attributes:
        correct: The label is the most probable class.
        probability: Of the label, 0 to 1.
    """

    correct: Bool[Tensor, "image"]
    probability: Float[Tensor, "image"]


def score_under_masks(
    vit: Vit,
    images: Float[Tensor, "image channel row column"],
    masks: Mapping[int, Bool[Tensor, "image ... patch other"]],
    labels: Int[Tensor, "image"] | None = None,
) -> Score:
    """Scores images whose patches see, in each layer of `masks`, only the keys that its mask opens.

    Prefix tokens see everything and are seen by all.

    Args:
        vit: The model.
        images: Prepared images.
        masks: By layer: True where the patch (row) may see the patch (column), for all heads or for each.
        labels: The class of each image; None: the model's own prediction with full attention, so that `correct` says
            whether the masks keep it.

    Returns:
        Whether each label is predicted, and its probability.

    Raises:
        UsageError: A mask does not have the size of its layer's grid.
        Unsupported: A layer does not exist, or has no single map between patches.
    """
    label = vit.logits(images).argmax(-1) if labels is None else labels
    return score_logits(vit.tap().read(images, edits=mask_edits(vit, masks)), label, vit.task)


def score_logits(logits: Float[Tensor, "image class"], labels: Int[Tensor, "image"], task: Task) -> Score:
    """Scores a model's output on labels.

    Args:
        logits: Output of a classifier.
        labels: The class of each image.
        task: What the output means.

    Returns:
        Whether each label is predicted, and its probability.
    """
    probability = task.probabilities(logits).gather(1, labels[:, None])[:, 0]
    return Score(logits.argmax(-1) == labels, probability)


def mask_edits(vit: Vit, masks: Mapping[int, Bool[Tensor, "image ... patch other"]]) -> list[Edit]:
    """Edits that close, before softmax, what masks do not open.

    Args:
        vit: The model.
        masks: As `score_under_masks`.

    Returns:
        One edit for each layer.

    Raises:
        UsageError: A mask does not have the size of its layer's grid.
        Unsupported: A layer does not exist, or has no single map between patches.
    """
    grids, refused = token_grids(vit)
    edits = []
    for layer, mask in masks.items():
        whys = [reason for (of_layer, _), reason in refused.items() if of_layer == layer]
        of_layer = [tokens for (at, _), tokens in grids.items() if at == layer]
        if whys or not of_layer:
            why = whys[0] if whys else f"this model has L0 to L{vit.n_layers - 1}"
            raise Unsupported(f"L{layer} cannot be masked between patches: {why}.")
        grid, prefix = of_layer[0].grid, of_layer[0].n_prefix
        if any(tokens.slots is not None for tokens in of_layer):
            raise Unsupported(f"L{layer} attends within windows of its own; masks of the whole grid do not fit it.")
        n_patches = grid[0] * grid[1]
        if mask.shape[-2:] != (n_patches, n_patches):
            raise UsageError(
                f"The mask of L{layer} ends in {tuple(mask.shape[-2:])}; this model has {grid[0]} x {grid[1]} patches "
                f"there, so give [.., {n_patches}, {n_patches}]."
            )
        bias = attention_bias(mask, prefix)
        edits.append(Edit(layer, bias=bias[:, None] if bias.ndim == 3 else bias))
    return edits
