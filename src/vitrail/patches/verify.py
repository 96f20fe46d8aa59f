"""What becomes of a model's answer if its patches see only what masks leave open: the proof of windows.

Our construction, after Ma et al. 2022 (arXiv 2203.05922), who verify their indicator on attention windows.
"""

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.errors import Unsupported, UsageError
from vitrail.patches.windows import attention_bias
from vitrail.vit.edits import Edit
from vitrail.vit.ground import grounds_of_layers
from vitrail.vit.open import Vit

__all__ = ["Verdict", "edits_of_masks", "judged", "under_masks"]


class Verdict(NamedTuple):
    """Whether the label is the top class, and its probability (0 .. 1)."""

    right: Bool[Tensor, "image"]
    probability: Float[Tensor, "image"]


def under_masks(
    vit: Vit,
    images: Float[Tensor, "image channel row column"],
    masks: Mapping[int, Bool[Tensor, "image ... patch other"]],
    labels: Int[Tensor, "image"] | None = None,
) -> Verdict:
    """The verdict on images whose patches see, in each layer of `masks`, only the keys that its mask opens.

    A mask is [image patch other], or [image head patch other]. Prefix tokens see everything and are seen by all.
    Where there are no `labels`, the model's own answer with full attention is the label: `right` then says whether the
    masks keep that answer. Raises `UsageError` where masks and model do not fit, `Unsupported` for layers without one
    map between patches.
    """
    known = vit.logits(images).argmax(-1) if labels is None else labels
    return judged(vit.tap().read(images, edits=edits_of_masks(vit, masks)), known)


def judged(logits: Float[Tensor, "image class"], labels: Int[Tensor, "image"]) -> Verdict:
    """The verdict that logits give on labels."""
    logits = logits.float()
    probability = logits.softmax(-1).gather(1, labels[:, None])[:, 0]
    return Verdict(logits.argmax(-1) == labels, probability)


def edits_of_masks(vit: Vit, masks: Mapping[int, Bool[Tensor, "image ... patch other"]]) -> list[Edit]:
    """One edit a layer that closes what its mask does not open, before softmax."""
    grounds, refused = grounds_of_layers(vit)
    edits = []
    for layer, mask in masks.items():
        if layer not in grounds:
            why = refused.get(layer, f"this model has L0 to L{vit.n_layers - 1}")
            raise Unsupported(f"L{layer} cannot be masked between patches: {why}.")
        grid, prefix, slots = grounds[layer]
        if slots is not None:
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
