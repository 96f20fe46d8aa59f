"""Pruning many heads at once: what the model answers without them."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.errors import Unsupported
from vitrail.vit.choose import feature_or_logits
from vitrail.vit.edits import Edit
from vitrail.vit.open import Vit
from vitrail.vit.removal import Heads, attention_maps, without_heads

__all__ = ["logits_without", "predictions_without", "pruning_edits", "why_not_removable"]


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
    removes = not why_not_removable(vit)
    known: dict[frozenset[tuple[int, int]], np.ndarray] = {}
    for heads in map(frozenset, sets):
        if heads not in known:
            if removes:
                logits = feature_or_logits(without_heads(vit.model, vit.anatomy, heads).module(images))
            else:
                logits = logits_without(vit, images, heads)
            known[heads] = logits.float().argmax(-1).cpu().numpy()
    return np.stack([known[frozenset(heads)] for heads in sets])


def why_not_removable(vit: Vit) -> str:
    """Why heads of this model can be masked but not removed; empty where they can be.

    One head of every layer is removed on trial and the answer compared with that of the masked model, as code that
    counts on its whole width cannot be told by its looks. Tried once per model.
    """
    if vit not in _KNOWN:
        _KNOWN[vit] = _tried(vit)
    return _KNOWN[vit]


_KNOWN: WeakKeyDictionary[Vit, str] = WeakKeyDictionary()


@torch.no_grad()
def _tried(vit: Vit) -> str:
    heads = [(layer, 0) for layer, n_heads in enumerate(vit.n_heads) if n_heads > 1] or [(0, 0)]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((2, 3, *vit.preprocessing.size), generator=generator)
    images = images.to(vit.device, next(vit.model.parameters()).dtype)
    try:
        attention_maps(vit.model, vit.anatomy, range(vit.n_layers))
        removed = feature_or_logits(without_heads(vit.model, vit.anatomy, heads).module(images)).float()
    except Unsupported as refusal:
        return str(refusal)
    except (RuntimeError, ValueError, TypeError) as error:
        said = " ".join(str(error).split())[:120]
        return f"{vit.name} does not run with fewer heads ({said}): its code counts on all of them. They can be masked."
    masked = logits_without(vit, images, heads).float()
    bound = 1e-5 if vit.precision in ("float32", "float64") else 2e-2
    if not (removed - masked).abs().max() <= bound * masked.abs().max():
        return f"{vit.name} answers in another way with heads removed than with heads masked. They can be masked."
    return ""
