"""Which token is the class token: the one that a parameter of that name moves, or that the answer reads alone."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from vitrail.tap.clone import images_accepted
from vitrail.tap.rounding import rounding_bound
from vitrail.tap.trace import Tracer, other_weights

if TYPE_CHECKING:
    from vitrail.tap.anatomy import Block

__all__ = ["find_class_tokens"]

_NAME = re.compile(r"(^|\.)(cls|class)_?(token|tok|embedding|embed|emb)s?(_?\d+)?$")

_MOST = 0.5
"""Of several class tokens (one for each class), all of which move about as far, the first is taken: the first that
moves by this share of the most that any token does."""


def find_class_tokens(tracer: Tracer, blocks: Sequence["Block"], images: Tensor) -> tuple[int | None, ...]:
    """Which of each block's tokens that are no patches is the class token.

    Args:
        tracer: Runs the model: a few times, and once more for each token that is no patch where no name tells.
        blocks: Its blocks.
        images: Two images [image, channel, row, column] or more.

    Returns:
        For each block a position among the tokens that are no patches, in front and behind, in the model's order; 0 too
        where the class token is the only query. None where the class token is not among them.
    """
    if not any(block.prefix or block.kind == "class" for block in blocks):
        return (None,) * len(blocks)
    named = {name: weight for name, weight in tracer.model.named_parameters() if _NAME.search(name)}
    if named:
        moved = _moved_by(tracer, named, blocks, images)
        places = tuple(0 if block.kind == "class" else place for block, place in zip(blocks, moved, strict=True))
        if any(place is not None for place in places):
            return places
    read = _read_alone(tracer.model, blocks[-1], images)
    if read is None:
        return (None,) * len(blocks)
    last = (blocks[-1].tokens, blocks[-1].prefix, blocks[-1].behind)
    alike = [(block.tokens, block.prefix, block.behind) == last for block in blocks]
    return tuple(
        read if same else 0 if block.prefix == 1 or block.kind == "class" else None
        for block, same in zip(blocks, alike, strict=True)
    )


# --- by the name of a parameter --------------------------------------------------------------------------------------


def _moved_by(
    tracer: Tracer, named: Mapping[str, Tensor], blocks: Sequence["Block"], images: Tensor
) -> list[int | None]:
    """Which of each block's tokens that are no patches moves with these parameters; None where a patch does, or none.

    Attention is off meanwhile, so that the tokens are not mixed; where nothing moves then, it is on.
    """
    moved = _movements(tracer, named, blocks, images, without_attention=True)
    if any(block.prefix and not each.any() for block, each in zip(blocks, moved, strict=True)):
        mixed = _movements(tracer, named, blocks, images, without_attention=False)
        moved = [one if one.any() else two for one, two in zip(moved, mixed, strict=True)]
    places = [int((each >= _MOST * each.max()).nonzero()[0]) if each.any() else len(each) for each in moved]
    return [place if place < block.prefix else None for block, place in zip(blocks, places, strict=True)]


def _movements(
    tracer: Tracer, named: Mapping[str, Tensor], blocks: Sequence["Block"], images: Tensor, *, without_attention: bool
) -> list[Tensor]:
    """How far each token that a block is given moves with the parameters; empty for blocks without tokens to tell."""
    plain = tracer.run(images, without_attention=without_attention).runs
    with other_weights(tracer.model, named):
        other = tracer.run(images, without_attention=without_attention).runs
    movements = []
    for block in blocks:
        if not block.prefix or block.layout.token_axis is None:
            movements.append(torch.zeros(0))
            continue
        one, two = (
            block.layout.canonical(runs[block.path][block.run].inputs[block.main_input]).float()
            for runs in (plain, other)
        )
        movements.append((two - one).nan_to_num().norm(dim=-1).amax(0))
    return movements


# --- by what the answer reads ----------------------------------------------------------------------------------------


def _read_alone(model: nn.Module, last: "Block", images: Tensor) -> int | None:
    """Which token that is no patch the answer reads of the last block, if it reads one and no patch."""
    axis = last.layout.token_axis
    if axis is None or not last.prefix:
        return None
    in_front, n_patches = last.prefix - last.behind, last.tokens - last.prefix
    plain = _answer(model, images)
    if not _all_close(plain, _answer(model, images, last, axis, slice(in_front, in_front + n_patches))):
        return None
    read = []
    for place in range(last.prefix):
        token = place if place < in_front else place + n_patches
        if not _all_close(plain, _answer(model, images, last, axis, slice(token, token + 1))):
            read.append(place)
    return read[0] if len(read) == 1 else None


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
