"""How models lay their tensors out, and the one order that everything else uses.

Canonical order of attention: [row, window, head, .., ..], where a row is one image of one copy. Models use at least
seven others: (B, h, N, D); (B*W, h, S, D) with W windows (Swin); (B, h, W, S, D) (Hiera); (B, W, h, S, D) (Twins);
(B*h, N, D) (SAM, `nn.MultiheadAttention`); (h*B, N, D) (the Set Transformer); (h, B, N, D).

Canonical order of tokens: those that are no patches, then the patches. A model may have tokens behind the patches
(detection tokens, prompts); in canonical order they follow the tokens in front. The class token, where there is one, is
the first of all, wherever the model has it.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = [
    "MAP_AXES",
    "MIN_TOKEN_AXES",
    "BatchAxis",
    "CallLayout",
    "NonPatches",
    "TokenLayout",
    "TokenOrder",
    "layout_of_input",
    "layout_of_output",
    "main_output",
    "own_tensors",
    "repeat_images",
]

MIN_TOKEN_AXES = 3
"""Image, token, channel. Tensors of fewer axes are masks, sizes or a conditioning vector, which every block of a chain
may be given, so that they say nothing about the chain."""

MAP_AXES = (-2, -1)
"""The axes of an attention map that count tokens: queries and keys."""

_TOKEN_AXES = (-2,)
"""The axis of q, k, v and of an output that counts tokens."""

TokenOrder = Literal["NLC", "LNC", "NHWC", "NCHW"]
"""N images, L tokens, C channels; H rows and W columns where tokens are kept as a picture."""


class BatchAxis(NamedTuple):
    """The batch dimension of a tensor, and how many entries each image has along it (several for windows)."""

    axis: int
    per_image: int


def repeat_images(tree: Any, axes: Sequence[BatchAxis | None], n_images: int, copies: int) -> Any:
    """Repeats every tensor that has one entry per image, copy-major, so that it has one per image and copy.

    Args:
        tree: Arguments or outputs of a module, nested as the module has them.
        axes: For each leaf of `tree` its batch dimension, None for a leaf without one.
        n_images: Number of images; a tensor that no longer has that many has been repeated before and stays.
        copies: How often to repeat.

    Returns:
        The same nesting with repeated tensors.
    """
    leaves, form = tree_flatten(tree)
    for index, batch in enumerate(axes):
        leaf = leaves[index]
        if batch is not None and isinstance(leaf, Tensor) and leaf.shape[batch.axis] == n_images * batch.per_image:
            leaves[index] = leaf.repeat([copies if dim == batch.axis else 1 for dim in range(leaf.ndim)])
    return tree_unflatten(leaves, form)


def own_tensors(tree: Any) -> Any:
    """Copies every tensor, so that a change in place of the original or of the copy does not reach the other.

    Args:
        tree: Arguments or outputs of a module, nested as the module has them.

    Returns:
        The same nesting; a tensor that occurs several times is one copy.
    """
    leaves, form = tree_flatten(tree)
    copies = {id(leaf): leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)}
    return tree_unflatten([copies.get(id(leaf), leaf) for leaf in leaves], form)


class NonPatches(NamedTuple):
    """How many tokens that are no patches lie in front of the patches and behind them, and which of them is first.

    Attributes:
        in_front: Tokens in front of the patches.
        behind: Tokens behind them.
        first: Which of all these, in the model's order, is the class token; 0 where there is none.
    """

    in_front: int = 0
    behind: int = 0
    first: int = 0

    @property
    def move_tokens(self) -> bool:
        """Whether the model's order is another than the canonical one."""
        return bool(self.behind or self.first)

    def canonical(self, tensor: Tensor, axis: int) -> Tensor:
        """Moves the tokens behind the patches between those in front and the patches, and the class token to the front.

        Args:
            tensor: Tokens along `axis`, in the model's order; a sequence without patches stays as it is.
            axis: The axis of the tokens.

        Returns:
            The same tokens: the class token, those in front, those behind, patches. The tensor itself where this is
            its order.
        """
        n_patches = tensor.shape[axis] - self.in_front - self.behind
        if not self.move_tokens or n_patches <= 0:
            return tensor
        front, patches, behind = tensor.split([self.in_front, n_patches, self.behind], axis)
        before, first, after = torch.cat([front, behind], axis).split(self._around_first, axis)
        return torch.cat([first, before, after, patches], axis)

    def original(self, canonical: Tensor, axis: int) -> Tensor:
        """Inverts `canonical`.

        Args:
            canonical: Tokens along `axis` in canonical order; any number of patches.
            axis: The axis of the tokens.

        Returns:
            The same tokens in the model's order.
        """
        n_patches = canonical.shape[axis] - self.in_front - self.behind
        if not self.move_tokens or n_patches <= 0:
            return canonical
        n_before, n_first, n_after = self._around_first
        first, before, after, patches = canonical.split([n_first, n_before, n_after, n_patches], axis)
        front, behind = torch.cat([before, first, after], axis).split([self.in_front, self.behind], axis)
        return torch.cat([front, patches, behind], axis)

    @property
    def _around_first(self) -> list[int]:
        """How many of the tokens that are no patches lie before the first in canonical order, are it, lie after it."""
        return [self.first, 1, self.in_front + self.behind - self.first - 1]


_ONLY_PATCHES = NonPatches()


@dataclass(frozen=True)
class CallLayout:
    """Where the heads are among the leading dimensions of an attention call's q, k, v, weights and output.

    Attributes:
        heads: Number of heads.
        axis: Head axis of the tensor, after unfolding if `folded`.
        folded: Heads are folded into the first dimension, (B*h, N, D), or (h*B, N, D) with `axis` 0.
        span: Number of axes from `axis` on that count heads: 2 where groups of heads share keys, (B, group, h, N, D).
        non_patches: Tokens that are no patches, among those that attend and are attended to.
    """

    heads: int
    axis: int = 1
    folded: bool = False
    span: int = 1
    non_patches: NonPatches = _ONLY_PATCHES

    def canonical(self, tensor: Tensor, rows: int, token_axes: tuple[int, ...] = _TOKEN_AXES) -> Tensor:
        """Moves a tensor of the model to canonical order, as a view where strides and tokens allow.

        Args:
            tensor: [.., a, b] as the model has it.
            rows: Images times copies in the batch.
            token_axes: Which of a and b count tokens, as -2 and -1.

        Returns:
            [row, window, head, a, b].
        """
        for axis in token_axes:
            tensor = self.non_patches.canonical(tensor, axis)
        if self.folded:
            tensor = tensor.unflatten(0, (self.heads, -1) if self.axis == 0 else (-1, self.heads))
        tensor = tensor.flatten(self.axis, self.axis + self.span - 1) if self.span > 1 else tensor
        tensor = tensor.movedim(self.axis, -3)
        return tensor.reshape(rows, -1, *tensor.shape[-3:])

    def original(self, canonical: Tensor, like: Tensor, token_axes: tuple[int, ...] = _TOKEN_AXES) -> Tensor:
        """Inverts `canonical`.

        Args:
            canonical: [row, window, head, a, b].
            like: A tensor of the model with the leading dimensions that the result is to have.
            token_axes: Which of a and b count tokens, as -2 and -1.

        Returns:
            [.., a, b] in the model's order.
        """
        for axis in token_axes:
            canonical = self.non_patches.original(canonical, axis)
        first = (like.shape[0] // self.heads, self.heads) if self.folded else like.shape[:1]
        lead = (*(reversed(first) if self.axis == 0 else first), *like.shape[1:-2])
        head_axes = range(self.axis, self.axis + self.span)
        others = [size for axis, size in enumerate(lead) if axis not in head_axes]
        tensor = canonical.reshape(*others, *canonical.shape[-3:]).movedim(-3, self.axis)
        if self.span > 1:
            tensor = tensor.unflatten(self.axis, [lead[axis] for axis in head_axes])
        return tensor.flatten(0, 1) if self.folded else tensor


@dataclass(frozen=True)
class TokenLayout:
    """The order in which a block lays its tokens out.

    Attributes:
        order: "NLC", "LNC", "NHWC" or "NCHW" (N images, L tokens, C channels).
        non_patches: Tokens that are no patches.
    """

    order: TokenOrder
    non_patches: NonPatches = _ONLY_PATCHES

    def canonical(self, tensor: Tensor) -> Tensor:
        """Tokens as the block has them -> [image, token, channel], a view where strides allow.

        Args:
            tensor: Tokens in the order of the block.

        Returns:
            [image, token, channel]; tokens that are no patches first.
        """
        match self.order:
            case "NLC":
                return self.non_patches.canonical(tensor, 1)
            case "LNC":
                return self.non_patches.canonical(tensor.transpose(0, 1), 1)
            case "NHWC":
                return tensor.flatten(1, 2)
            case "NCHW":
                return tensor.flatten(2).transpose(1, 2)

    def original(self, canonical: Tensor, like: Tensor) -> Tensor:
        """[image, token, channel] -> tokens as the block has them.

        Args:
            canonical: [image, token, channel].
            like: A tensor of the block, for the rows and columns of "NHWC" and "NCHW"; any number of images.

        Returns:
            Tokens in the order of the block.
        """
        match self.order:
            case "NLC":
                return self.non_patches.original(canonical, 1)
            case "LNC":
                return self.non_patches.original(canonical, 1).transpose(0, 1)
            case "NHWC":
                return canonical.reshape(canonical.shape[0], *like.shape[1:3], -1)
            case "NCHW":
                return canonical.transpose(1, 2).reshape(canonical.shape[0], -1, *like.shape[2:4])

    @property
    def n_axes(self) -> int:
        """Number of dimensions of a tensor in this order."""
        return len(self.order)

    @property
    def token_axis(self) -> int | None:
        """The axis that tokens lie on; None where they lie on two (rows and columns)."""
        return {"NLC": 1, "LNC": 0}.get(self.order)


# --- which order a block uses ----------------------------------------------------------------------------------------


def layout_of_input(
    tokens: Tensor, batch: BatchAxis | None, n_channels: int, image_sides: tuple[int, int]
) -> TokenLayout:
    """The order of a block's tokens, by their shape.

    Args:
        tokens: What the block is given: three axes, or four where tokens are kept as a picture.
        batch: Its batch dimension.
        n_channels: Channels of all heads of the block's attention; 0 where it is not known.
        image_sides: (rows, columns) of the images in pixels: a picture of their shape is one.

    Returns:
        The layout, without tokens that are no patches.
    """
    shape = tuple(tokens.shape)
    if len(shape) == MIN_TOKEN_AXES:
        return TokenLayout("LNC" if batch and batch.axis == 1 else "NLC")
    rows, columns = image_sides
    last, first = (abs(math.log(shape[axis] * columns / (shape[axis + 1] * rows))) for axis in (1, 2))
    if (last == 0) != (first == 0):
        channels_last = last == 0
    elif n_channels in (shape[1], shape[-1]):
        channels_last = shape[-1] == n_channels
    else:
        channels_last = last <= first
    return TokenLayout("NHWC" if channels_last else "NCHW")


def layout_of_output(
    returned: Tensor,
    batch: BatchAxis | None,
    tokens: Tensor,
    layout: TokenLayout,
    n_channels: int,
    image_sides: tuple[int, int],
) -> TokenLayout:
    """The order of the tokens that a block returns: that of its input, unless the shapes say otherwise.

    Args:
        returned: What the block returns.
        batch: Its batch dimension.
        tokens: What the block is given.
        layout: Of `tokens`.
        n_channels: As for `layout_of_input`.
        image_sides: As for `layout_of_input`.

    Returns:
        The layout; a stage may take rows x columns x channels and return channels x rows x columns.
    """
    if returned.shape == tokens.shape:
        return layout
    form = layout_of_input(returned, batch, n_channels, image_sides)
    return layout if form.order == layout.order else form


def main_output(
    leaves: Sequence[Any],
    axes: Sequence[BatchAxis | None],
    layout: TokenLayout,
    maps: Collection[tuple[int, ...]],
) -> tuple[Tensor, BatchAxis | None] | None:
    """The tokens among what a block returns: the largest tensor, with as many axes as it was given if there is one.

    Tokens of parts of an image (the pixels of each patch in TNT), which may be larger, only if there is no other.

    Args:
        leaves: All that the block returns.
        axes: The batch dimension of each leaf; a leaf without one holds no tokens.
        layout: Of the block's input.
        maps: (heads, queries, keys) of the block's attention maps, which some blocks hand on.

    Returns:
        The tensor and its batch dimension; None where the block returns no tokens.
    """
    tensors = [
        (leaf, batch)
        for leaf, batch in zip(leaves, axes, strict=True)
        if batch and leaf.ndim >= MIN_TOKEN_AXES and tuple(leaf.shape[-3:]) not in maps
    ]
    tensors = [each for each in tensors if each[0].ndim == layout.n_axes] or tensors
    tensors = [each for each in tensors if each[1].per_image == 1] or tensors
    return max(tensors, key=lambda each: each[0].numel(), default=None)
