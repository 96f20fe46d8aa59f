"""Windows under one budget: a box for each head and query, its area bought where it changes the answer most.

Our construction. Three numbers decide what a box is worth: how much of the head's interactions it holds (this picks the
box of each area), how far the head's output moves if the query sees that box alone (exact, in closed form), and what a
move of that head costs the answer (its price, measured once per model by masking on a few photographs). Areas are then
dealt out to all queries, heads and layers of an image so that the cost is least and the mean area keeps to the budget.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.patches import windows
from vitrail.patches.interaction import between_patches, normalised
from vitrail.vit.attention import LayerAttention, Readers
from vitrail.vit.edits import Edit
from vitrail.vit.open import Vit

__all__ = ["LEVELS", "boxes_of_levels", "changes", "chosen", "prices"]

LEVELS = (0.02, 0.06, 0.13, 0.25, 0.41, 0.64, 1.0)
"""Shares of the grid among which a query's area is chosen; beside them the query may be left with itself alone."""

TRIED = (0.06, 0.25, 0.64)
"""Shares of the grid at which a head is tried for its price."""


def boxes_of_levels(
    weights: Float[Tensor, "image head query key"], prefix: int, grid: tuple[int, int], levels: Sequence[float] = LEVELS
) -> Int[Tensor, "image head patch level side"]:
    """For each head and query the best box of each area, that without any patch first."""
    matrix = normalised(between_patches(weights, prefix))
    nothing = torch.zeros((*matrix.shape[:-1], 4), dtype=torch.int64, device=matrix.device)
    found = [windows.best_boxes(matrix, grid, windows.n_patches_of(level, grid))[0] for level in levels]
    return torch.stack([nothing, *found], -2)


def changes(
    weights: Float[Tensor, "image head query key"],
    v: Float[Tensor, "image head key channel"],
    boxes: Int[Tensor, "image head patch level side"],
    prefix: int,
    grid: tuple[int, int],
) -> Float[Tensor, "image head patch level"]:
    """Squared length of the change of the head's output if the query sees its box, itself and the prefix alone.

    The weights that are left are scaled up to sum to 1, as closing keys before softmax does.
    """
    rows, v = weights[:, :, prefix:], v.to(weights)
    whole = rows @ v
    found = []
    for level in range(boxes.shape[-2]):
        left = rows.clone()
        left[..., prefix:] *= windows.masks(boxes[..., level, :], grid)
        found.append(((left @ v) / left.sum(-1, keepdim=True) - whole).square().sum(-1))
    return torch.stack(found, -1)


def chosen(
    cost: Float[Tensor, "image *query level"], size: Int[Tensor, "image *query level"], n_patches: float
) -> Int[Tensor, "image *query"]:
    """The level of each query for which the costs of an image sum to least, the mean size being at most `n_patches`.

    One price of a patch holds for all queries of an image, found by bisection. It cannot see that moves of several
    heads may cancel or add up.
    """
    costs, sizes = cost.flatten(1, -2), size.flatten(1, -2).to(cost)
    low, high = costs.new_full((len(costs),), -14.0), costs.new_full((len(costs),), 6.0)
    for _ in range(40):
        middle = (low + high) / 2
        bought = sizes.gather(-1, _cheapest(costs, sizes, middle)[..., None]).mean((1, 2))
        too_much = bought > n_patches
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return _cheapest(costs, sizes, high).view(cost.shape[:-1])


def prices(vit: Vit, images: Float[Tensor, "image channel row column"]) -> Float[Tensor, "layer head"]:
    """What a move of each head's output costs the answer: divergence of the class probabilities per squared change.

    Each head in turn sees only the best boxes of its queries, at three areas, all else untouched; the Kullback-Leibler
    divergences from the plain answer are divided by the mean squared changes. 0: whatever this head's patches see, the
    answer stays (in a last layer that is read by the class token alone, always). Labels are not used.
    """
    kept: list[LayerAttention] = []
    replay, logits = vit.tap().record(images, Readers(attention=kept.append))
    found = []
    for layer, block in enumerate(vit.anatomy.blocks):
        assert block.grid is not None
        weights = kept[layer].weights()
        boxes = boxes_of_levels(weights, block.prefix, block.grid, TRIED)[..., 1:, :]
        moved = changes(weights, kept[layer].v[:, 0], boxes, block.prefix, block.grid).mean((0, 2))
        edits = _one_head_each(layer, boxes, block.prefix, block.grid)
        answers = vit.tap().run_from(layer, replay, edits, copies=len(edits))
        lost = _divergence(logits, answers.unflatten(0, (len(edits), -1))).mean(1).view(moved.shape)
        found.append(lost.sum(-1) / moved.sum(-1).clamp_min(torch.finfo(moved.dtype).tiny))
    return torch.stack(found).clamp(min=0)


def _cheapest(
    cost: Float[Tensor, "image query level"], size: Float[Tensor, "image query level"], price: Float[Tensor, "image"]
) -> Int[Tensor, "image query"]:
    return (cost + 10 ** price[:, None, None] * size).argmin(-1)


def _one_head_each(
    layer: int, boxes: Int[Tensor, "image head patch level side"], prefix: int, grid: tuple[int, int]
) -> list[Edit]:
    """Copy head x level: that head alone sees the boxes of that level."""
    n_images, n_heads, n_patches, n_levels = boxes.shape[:4]
    edits = []
    for head in range(n_heads):
        for level in range(n_levels):
            bias = torch.zeros((n_images, n_heads, prefix + n_patches, prefix + n_patches))
            bias[:, head] = windows.attention_bias(windows.masks(boxes[:, head, :, level], grid), prefix)
            edits.append(Edit(layer, bias=bias, copy=head * n_levels + level))
    return edits


def _divergence(
    logits: Float[Tensor, "image class"], other: Float[Tensor, "copy image class"]
) -> Float[Tensor, "copy image"]:
    plain = logits.float().log_softmax(-1)
    return (plain.exp() * (plain - other.float().log_softmax(-1))).sum(-1)
