"""Pruning many heads at once: what the model answers without them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.errors import Unsupported
from vitrail.models.open import Vit
from vitrail.pruning.ranking import as_heads
from vitrail.pruning.removal import remove_heads, why_not_removable
from vitrail.tap.edits import Edit, prune_edits

__all__ = ["logits_without", "predictions_without", "pruning_edits"]


def pruning_edits(heads: str | Iterable[Any]) -> list[Edit]:
    """Edits of the tap that set heads to zero.

    Args:
        heads: (layer, head) of each, or names, "L0H4,L3H1".

    Returns:
        One edit for each layer.

    Raises:
        UsageError: They are no heads, or one is named twice.
    """
    return prune_edits(as_heads(heads))


@torch.no_grad()
def logits_without(
    vit: Vit, images: Float[Tensor, "image channel row column"], heads: str | Iterable[Any]
) -> Float[Tensor, "image class"]:
    """The output with heads masked, by the tap; works for every model.

    Args:
        vit: The model.
        images: Prepared images.
        heads: (layer, head) of each head to mask, or names, "L0H4,L3H1".

    Returns:
        Logits.

    Raises:
        UsageError: They are no heads, or one is named twice.
    """
    return vit.tap().read(images, edits=pruning_edits(heads))


@torch.no_grad()
def predictions_without(
    vit: Vit, images: Float[Tensor, "image channel row column"], sets: Sequence[str | Iterable[Any]]
) -> Int[np.ndarray, "set image"]:
    """The predicted class with each set of heads pruned.

    Where heads can be removed they are, which makes the pass cheaper; elsewhere they are masked. Equal sets are run
    once.

    Args:
        vit: The model.
        images: Prepared images.
        sets: Heads of each set, (layer, head) or by name.

    Returns:
        Indices of classes.

    Raises:
        UsageError: A set holds what is no head, or a head twice.
        Unsupported: The model has no classifier.
    """
    if vit.n_classes is None:
        raise Unsupported(f"Predictions were asked for of {vit.name}: {vit.task.without('a classifier')}.")
    removes = not why_not_removable(vit)
    predictions: dict[frozenset[tuple[int, int]], np.ndarray] = {}
    keys = [frozenset(as_heads(heads)) for heads in sets]
    for heads in keys:
        if heads not in predictions:
            if removes:
                logits = vit.read_output(remove_heads(vit, heads).module(images))
            else:
                logits = logits_without(vit, images, heads)
            predictions[heads] = logits.float().argmax(-1).cpu().numpy()
    return np.stack([predictions[heads] for heads in keys])
