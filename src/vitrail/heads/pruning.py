"""Pruning many heads at once: what the model answers without them."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.errors import Unsupported
from vitrail.vit.choose import feature_or_logits
from vitrail.vit.edits import Edit
from vitrail.vit.open import Vit
from vitrail.vit.removal import Heads, attention_maps, without_heads

__all__ = ["logits_without", "predictions_without", "pruning_edits"]


def pruning_edits(heads: Heads) -> list[Edit]:
    """Edits of the tap that set all these heads to zero."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        by_layer.setdefault(layer, []).append(head)
    return [Edit(layer, prune=tuple(each)) for layer, each in by_layer.items()]


@torch.no_grad()
def logits_without(
    vit: Vit, images: Float[Tensor, "image channel row column"], heads: Heads
) -> Float[Tensor, "image class"]:
    """The answer with these heads masked, by the tap; works for every model."""
    return vit.tap().read(images, edits=pruning_edits(heads))


@torch.no_grad()
def predictions_without(
    vit: Vit, images: Float[Tensor, "image channel row column"], sets: Sequence[Heads]
) -> Int[np.ndarray, "set image"]:
    """The predicted class with each set of heads pruned.

    Where heads can be removed they are, which makes the pass cheaper; elsewhere they are masked. Equal sets are run
    once. Raises `Unsupported` for a model without classifier.
    """
    if vit.n_classes is None:
        raise Unsupported(f"Predictions were asked for; {vit.name} has no classifier, its output is a feature vector.")
    removes = _can_remove(vit)
    known: dict[frozenset[tuple[int, int]], np.ndarray] = {}
    for heads in map(frozenset, sets):
        if heads not in known:
            if removes:
                logits = feature_or_logits(without_heads(vit.model, vit.anatomy, heads).module(images))
            else:
                logits = logits_without(vit, images, heads)
            known[heads] = logits.float().argmax(-1).cpu().numpy()
    return np.stack([known[frozenset(heads)] for heads in sets])


def _can_remove(vit: Vit) -> bool:
    try:
        attention_maps(vit.model, vit.anatomy, range(vit.n_layers))
    except Unsupported:
        return False  # an answer, not a failure: such heads are masked
    return True
