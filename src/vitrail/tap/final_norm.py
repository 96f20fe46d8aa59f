"""The norm that tokens go through after the last block, which readers of blocks do not see."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.tap.clone import clone_sharing, images_accepted
from vitrail.tap.modes import autocast_off
from vitrail.tap.rounding import rounding_bound

__all__ = ["FinalNorm", "apply_norm", "find_final_norm"]

_N_COMPARED = 8
"""Tokens of a norm's input that are compared with those of the block, the first and the last half: enough on noise."""

_PICTURE_AXES = 4
"""Image, channel, row, column."""


class FinalNorm(NamedTuple):
    """A norm of a model.

    Attributes:
        path: Of its module.
        as_picture: It takes channels in front of rows and columns.
    """

    path: str
    as_picture: bool


@torch.no_grad()
def find_final_norm(
    model: nn.Module,
    block_paths: tuple[str, ...],
    images: Float[Tensor, "image channel row column"],
    tokens: Float[Tensor, "image token feature"],
    prefix: int,
) -> FinalNorm | None:
    """Finds the norm that is given what the last block returns: all its tokens, the class token alone, or their mean.

    Models name it in many ways and apply it before or after pooling, so it is found by its numbers: each vector that it
    is given is one of the tokens or a mean of them, and applied to that vector alone it gives what it gave in the pass.

    Args:
        model: The model; a copy that shares its tensors is run.
        block_paths: Paths of the blocks: what is inside them is not the final norm.
        images: Images of noise, on which no two tokens are alike.
        tokens: What the last block returns for them.
        prefix: How many of these are no patches, in front.

    Returns:
        The norm; None where none follows.
    """
    inside = tuple(f"{path}." for path in block_paths)
    clone, runs = clone_sharing(model), list[tuple[str, Tensor, Tensor]]()

    def keep(path: str, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            runs.append((path, inputs[0].clone(), output.clone()))

    hooks = [
        module.register_forward_hook(lambda _, inputs, output, path=path: keep(path, inputs, output))
        for path, module in clone.named_modules()
        if "norm" in type(module).__name__.lower() and not f"{path}.".startswith(inside)
    ]
    try:
        with images_accepted(model, images.shape), autocast_off():
            clone(images)
    finally:
        for hook in hooks:
            hook.remove()
    means = torch.stack([tokens[:, prefix:].mean(1), tokens.mean(1)], 1)
    vectors = torch.cat([tokens, means], 1).flatten(0, 1)
    for path, given, returned in reversed(runs):
        norm = FinalNorm(path, given.ndim == _PICTURE_AXES and given.shape[1] == tokens.shape[-1])
        if given.shape == returned.shape and (norm.as_picture or given.shape[-1] == tokens.shape[-1]):
            inputs, outputs = (_some_vectors(each, norm) for each in (given, returned))
            if _are_among(inputs, vectors) and _alike(apply_norm(clone, norm, inputs), outputs):
                return norm
    return None


@torch.no_grad()
def apply_norm(
    model: nn.Module, norm: FinalNorm, vectors: Float[Tensor, "*rows feature"]
) -> Float[Tensor, "*rows feature"]:
    """Applies a norm of the model to vectors, each by itself.

    Args:
        model: The model.
        norm: As `find_final_norm` gives it.
        vectors: Tokens in any arrangement.

    Returns:
        The same arrangement.
    """
    module, rows = clone_sharing(model.get_submodule(norm.path)), vectors.reshape(-1, vectors.shape[-1])
    normed: Tensor = module(rows[..., None, None] if norm.as_picture else rows)
    return normed.reshape(vectors.shape)


def _some_vectors(tensor: Tensor, norm: FinalNorm) -> Float[Tensor, "vector feature"]:
    """The first and the last vectors that a norm was given or gave."""
    rows = (tensor.movedim(1, -1) if norm.as_picture else tensor).flatten(0, -2)
    return rows if len(rows) <= _N_COMPARED else torch.cat([rows[: _N_COMPARED // 2], rows[-_N_COMPARED // 2 :]])


def _are_among(some: Float[Tensor, "vector feature"], others: Float[Tensor, "other feature"]) -> bool:
    nearest = torch.stack([(others - each).abs().amax(-1).amin() for each in some])
    return bool((nearest <= rounding_bound(others.dtype) * others.abs().amax()).all())


def _alike(one: Tensor, other: Tensor) -> bool:
    return bool(((one - other).abs() <= rounding_bound(one.dtype) * other.abs().amax()).all())
