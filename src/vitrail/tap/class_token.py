"""Whether a model has a class token: by the name of a parameter, or because the answer reads the first token alone."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from vitrail.tap.clone import images_accepted
from vitrail.tap.rounding import rounding_bound

if TYPE_CHECKING:
    from vitrail.tap.anatomy import Block

__all__ = ["has_class_token"]

_NAME = re.compile(r"(^|\.)(cls|class)_?(token|tok|embedding|embed|emb)s?(_?\d+)?$")


def has_class_token(model: nn.Module, blocks: Sequence["Block"], images: Tensor) -> bool:
    """Whether a parameter is called so, or the answer reads of the last block the first token and no other.

    Args:
        model: The model or its clone, run up to three times where no name tells.
        blocks: Its blocks.
        images: Two images [image, channel, row, column] or more.

    Returns:
        False where all tokens are patches.
    """
    if not any(block.prefix or block.kind == "class" for block in blocks):
        return False
    if any(_NAME.search(name) for name, _ in model.named_parameters()):
        return True
    last = blocks[-1]
    axis = last.layout.token_axis
    if axis is None or not last.prefix or (last.behind and not last.layout.non_patches.in_front):
        return False
    plain = _answer(model, images)
    others_disturbed = _answer(model, images, last, axis, slice(1, None))
    return _all_close(plain, others_disturbed) and not _all_close(
        plain, _answer(model, images, last, axis, slice(0, 1))
    )


def _answer(
    model: nn.Module, images: Tensor, block: "Block | None" = None, axis: int = 0, tokens: slice = slice(0)
) -> list[Tensor]:
    """What the model gives where some tokens of a block's output are multiplied with noise, channel by channel."""
    n_runs = 0

    def disturb(_module: nn.Module, _inputs: Any, out: Any) -> Any:
        nonlocal n_runs
        n_runs += 1
        if block is None or n_runs != block.run + 1:
            return None
        leaves, structure = tree_flatten(out)
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.ndim > axis + 1 and leaf.shape[axis] == block.tokens:
                leaves[position] = leaf.clone()
                noise = torch.rand(leaf.shape[-1], generator=torch.Generator().manual_seed(0))
                leaves[position][(slice(None),) * axis + (tokens,)] *= noise.to(leaf) + 2
        return tree_unflatten(leaves, structure)

    hook = model.get_submodule(block.path if block else "").register_forward_hook(disturb)
    try:
        with images_accepted(model, images.shape):
            out = model(images)
    finally:
        hook.remove()
    return [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _all_close(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether all of a model's outputs are the same up to rounding."""
    return all(
        (one - other).abs().max() <= rounding_bound(one.dtype) * one.abs().max()
        for one, other in zip(some, others, strict=True)
    )
