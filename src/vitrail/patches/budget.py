"""What a window costs, for windows under one budget: a box for each head and query, areas where they matter most.

Our construction. Three numbers decide what a box is worth: how much of the head's interactions it holds (this picks
the place of each shape), how far the head's output moves if the query sees that box alone (exact, in closed form), and
what a move of that head costs the prediction (its price, measured once per model by masking on a few photographs).
Shapes are then allotted to all queries, heads and layers of an image so that the cost is least and the mean area keeps
to the budget. `head_windows` applies the rule.
"""

import itertools
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vitrail.data.photographs import photographs
from vitrail.errors import Unsupported
from vitrail.grid import positions
from vitrail.models.open import Vit
from vitrail.models.task import Task
from vitrail.patches import windows
from vitrail.patches.integral import Integral, blocks
from vitrail.patches.interaction import between_patches, normalise_rows
from vitrail.tap.attention import LayerAttention, Readers
from vitrail.tap.budget import budget_of
from vitrail.tap.edits import Edit

__all__ = [
    "PRICE_LEVELS",
    "allocate",
    "boxes_of_levels",
    "boxes_of_shapes",
    "builtin_prices",
    "head_prices",
    "output_changes",
]

LEVELS = (0.02, 0.06, 0.13, 0.25, 0.41, 0.64, 1.0)
"""Shares of the grid among which a query's area is chosen; beside them the query may be left with itself alone."""

SHAPE_SIDES = (1 / 14, 2 / 14, 3 / 14, 5 / 14, 7 / 14, 10 / 14, 1.0)
"""Sides of boxes as shares of the grid's; boxes of all heights and widths are offered to each query. The steps grow:
one patch more or less changes a small box most."""

CHANGES_BYTES = 2**24
"""Integral images of weighted values that are held together on a processor: about one map of 196 patches."""

PRICE_LEVELS = (0.06, 0.25, 0.64)
"""Shares of the grid at which a head is masked for its price."""

PRICE_BYTES = 2**26
"""Masks of heads that are held together on a processor: those of all built-in photographs and areas for a ViT-Tiny at
224 px."""

PRICE_EXPONENTS = (-14.0, 6.0)
"""Powers of ten between which the price of a patch is searched: costs are divergences (at most some nats) per patch, so
the lower end gives every query the whole grid and the upper end none."""

PRICE_STEPS = 40
"""Bisections of that range, down to 2e-11 of an exponent: far below what moves any query to another level."""


def boxes_of_levels(
    weights: Float[Tensor, "image head query key"], prefix: int, grid: tuple[int, int], levels: Sequence[float] = LEVELS
) -> Int[Tensor, "image head patch level side"]:
    """For each head and query the best box of each area.

    Args:
        weights: Post-softmax attention over all tokens.
        prefix: Tokens before the patches.
        grid: (rows, columns) of patches.
        levels: Areas as shares of the grid, each above 0 and at most 1.

    Returns:
        Boxes (top, left, bottom, right), half open; before those of `levels` an empty one, as level 0.
    """
    matrix = normalise_rows(between_patches(weights, prefix))
    empty = torch.zeros((*matrix.shape[:-1], 4), dtype=torch.int64, device=matrix.device)
    best = [windows.best_boxes(matrix, grid, windows.n_patches_of(level, grid))[0] for level in levels]
    return torch.stack([empty, *best], -2)


def boxes_of_shapes(
    weights: Float[Tensor, "image head query key"], prefix: int, grid: tuple[int, int]
) -> Int[Tensor, "image head patch level side"]:
    """For each head and query the best place of a box of each shape.

    Args:
        weights: Post-softmax attention over all tokens.
        prefix: Tokens before the patches.
        grid: (rows, columns) of patches.

    Returns:
        Boxes (top, left, bottom, right), half open; before those of all shapes an empty one, as level 0.
    """
    matrix = normalise_rows(between_patches(weights, prefix))
    heights, widths = ({max(1, round(share * side)) for share in SHAPE_SIDES} for side in grid)
    rows = matrix.flatten(0, -2)
    parts = []
    for part in blocks(rows):
        sums = Integral(rows[part], grid)
        best = [sums.best_box([(height, width)])[0] for height in sorted(heights) for width in sorted(widths)]
        parts.append(torch.stack([torch.zeros_like(best[0]), *best], 1))
    boxes: Tensor = torch.cat(parts).unflatten(0, matrix.shape[:-1])
    return boxes


def output_changes(
    weights: Float[Tensor, "image head query key"],
    v: Float[Tensor, "image head key channel"],
    boxes: Int[Tensor, "image head patch level side"],
    prefix: int,
    grid: tuple[int, int],
    target: Float[Tensor, "image head patch channel"] | None = None,
) -> Float[Tensor, "image head patch level"]:
    """Squared length of the change of the head's output if the query sees its box, itself and the prefix alone.

    The weights that are left are scaled up to sum to 1, as masking keys before softmax does.

    Args:
        weights: Post-softmax attention over all tokens.
        v: Values of all tokens.
        boxes: Boxes of each query at each level, as `boxes_of_levels` gives them.
        prefix: Tokens before the patches.
        grid: (rows, columns) of patches.
        target: What the head should give each patch; None for what it gives without windows.

    Returns:
        Zero or more, in squared units of the head's output.
    """
    rows, v = weights[:, :, prefix:], v.to(weights)
    target = rows @ v if target is None else target
    flat = [each.flatten(0, 1) for each in (rows, v, boxes, target)]
    per_map = 4 * rows.shape[2] * (grid[0] + 1) * (grid[1] + 1) * (v.shape[-1] + 1)
    step = max(1, budget_of(rows.device).bytes_for(CHANGES_BYTES) // per_map)
    squares: list[Tensor] = []
    for start in range(0, len(flat[0]), step):
        row, value, box, output = (each[start : start + step] for each in flat)
        inside = _outputs_of_boxes(row, value, box, prefix, grid)
        squares.append((inside - output[:, :, None]).square().sum(-1))
    changes: Tensor = torch.cat(squares).unflatten(0, rows.shape[:2])
    return changes


def _outputs_of_boxes(
    rows: Float[Tensor, "map patch key"],
    v: Float[Tensor, "map key channel"],
    boxes: Int[Tensor, "map patch level side"],
    prefix: int,
    grid: tuple[int, int],
) -> Float[Tensor, "map patch level channel"]:
    """Each map's output for each query that sees its box, itself and the prefix: from one integral image of weighted
    values, whose last channel holds the weights themselves."""
    n_maps, n_patches = rows.shape[:2]
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    weighted = rows[:, :, prefix:].permute(2, 0, 1)[..., None] * values[:, prefix:].transpose(0, 1)[:, :, None]
    corner = weighted.new_zeros((grid[0] + 1, grid[1] + 1, n_maps, n_patches, values.shape[-1]))
    corner[1:, 1:] = weighted.unflatten(0, grid)
    for row in range(2, grid[0] + 1):  # long contiguous sums, which cumsum over short axes is not
        corner[row] += corner[row - 1]
    for column in range(2, grid[1] + 1):
        corner[:, column] += corner[:, column - 1]
    corner = corner.flatten(0, 3)
    query = torch.arange(n_maps * n_patches, device=rows.device).view(n_maps, n_patches, 1)

    def before(row: Int[Tensor, "map patch level"], column: Int[Tensor, "map patch level"]) -> Tensor:
        at = (row * (grid[1] + 1) + column) * (n_maps * n_patches) + query
        sums: Tensor = corner.index_select(0, at.flatten()).unflatten(0, at.shape)
        return sums

    top, left, bottom, right = boxes.unbind(-1)
    seen = before(bottom, right).sub_(before(top, right)).sub_(before(bottom, left)).add_(before(top, left))
    own_row, own_column = (axis[:, None] for axis in positions(grid, partial(torch.arange, device=rows.device)))
    outside = (own_row < top) | (own_row >= bottom) | (own_column < left) | (own_column >= right)
    patch = torch.arange(n_patches, device=rows.device)
    seen += weighted[patch, :, patch].transpose(0, 1)[:, :, None] * outside[..., None]
    seen += (rows[:, :, :prefix] @ values[:, :prefix])[:, :, None]
    return seen[..., :-1] / seen[..., -1:].clamp_min(torch.finfo(rows.dtype).tiny)


def allocate(
    cost: Float[Tensor, "image *query level"],
    size: Int[Tensor, "image *query level"],
    n_patches: float | Float[Tensor, "image"],
) -> Int[Tensor, "image *query"]:
    """The level of each query for which the costs of an image sum to least within a budget of area.

    One price of a patch holds for all queries of an image, found by bisection. It cannot see that changes of several
    heads may cancel or add up.

    Args:
        cost: What each level costs each query.
        size: Patches of each level of each query; some level of every query is small enough for the budget.
        n_patches: Bound on the mean size over the queries of an image, the same for all images or one for each.

    Returns:
        The index of a level for each query.
    """
    costs, sizes = cost.flatten(1, -2), size.flatten(1, -2).to(cost)
    most = (torch.as_tensor(n_patches, dtype=torch.float64, device="cpu") * costs.shape[1]).floor().to(size)
    low, high = (costs.new_full((len(costs),), exponent) for exponent in PRICE_EXPONENTS)
    for _ in range(PRICE_STEPS):
        middle = (low + high) / 2
        total = size.flatten(1, -2).gather(-1, _cheapest(costs, sizes, middle)[..., None]).sum((1, 2))
        too_much = total > most
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return _cheapest(costs, sizes, high).view(cost.shape[:-1])


def head_prices(vit: Vit, images: Float[Tensor, "image channel row column"]) -> Float[Tensor, "layer head"]:
    """What a change of each head's output costs the prediction: divergence of class probabilities per squared change.

    Each head in turn sees only the best boxes of its queries, at three areas, all else untouched; the Kullback-Leibler
    divergences from the plain prediction (without classes the squared change of the output relative to its length) are
    divided by the mean squared changes. Labels are not used.

    Args:
        vit: The model; every layer has a grid of patches.
        images: Prepared images; a few dozen are enough.

    Returns:
        Nats per squared unit of the head's output, zero or more. 0: whatever this head's patches see, the prediction
        stays (in a last layer that is read by the class token alone, always). NaN for heads that a layer lacks.
    """
    if any(len(block.calls) > 1 for block in vit.anatomy.blocks):
        raise Unsupported(f"{vit.name} has layers with several attention calls; prices of their heads are not defined.")
    n_rows = _rows_at_once(vit)
    n_images = min(n_rows, len(images))
    parts = [_divergences_and_changes(vit, part, n_rows // n_images) for part in images.split(n_images)]
    prices = [
        divergence / change.clamp_min(torch.finfo(change.dtype).tiny)
        for divergence, change in (torch.stack(of_layer).sum(0) for of_layer in zip(*parts, strict=True))
    ]
    return pad_sequence(prices, batch_first=True, padding_value=torch.nan).clamp(min=0)


def builtin_prices(vit: Vit) -> Float[Tensor, "layer head"]:
    """What a change of each head costs the prediction, measured on the built-in photographs.

    No image of a study takes part, so that its numbers do not depend on which images it holds.

    Args:
        vit: The model; all layers have one grid.

    Returns:
        As `head_prices`.
    """
    with torch.no_grad():
        return head_prices(vit, vit.prepare(list(photographs().values())))


def _cheapest(
    cost: Float[Tensor, "image query level"], size: Float[Tensor, "image query level"], price: Float[Tensor, "image"]
) -> Int[Tensor, "image query"]:
    return (cost + 10 ** price[:, None, None] * size).argmin(-1)


def _rows_at_once(vit: Vit) -> int:
    """How many images run together, each with one head masked: the masks are what takes memory."""
    per_row = max(4 * block.heads * call.queries * call.keys for block in vit.anatomy.blocks for call in block.calls)
    return max(1, budget_of(vit.device).bytes_for(PRICE_BYTES) // per_row)


def _divergences_and_changes(
    vit: Vit, images: Float[Tensor, "image channel row column"], n_copies: int
) -> list[Float[Tensor, "two _"]]:
    """Of each layer, by head and summed over images and levels: the divergences, and the mean squared changes."""
    attentions: list[LayerAttention] = []
    replay, logits = vit.tap().record(images, Readers(attention=attentions.append))
    sums = []
    for layer, (block, attention) in enumerate(zip(vit.anatomy.blocks, attentions, strict=True)):
        assert block.grid is not None
        weights = attention.weights()
        boxes = boxes_of_levels(weights, block.prefix, block.grid, PRICE_LEVELS)[..., 1:, :]
        change = output_changes(weights, attention.v[:, 0], boxes, block.prefix, block.grid).mean(2).sum((0, 2))
        masked_boxes = list(itertools.product(range(block.heads), range(len(PRICE_LEVELS))))
        divergences = []
        for start in range(0, len(masked_boxes), n_copies):
            edits = [
                Edit(layer, bias=_bias_of_head(boxes[..., level, :], head, block.prefix, block.grid), copy=copy)
                for copy, (head, level) in enumerate(masked_boxes[start : start + n_copies])
            ]
            masked = vit.tap().run_from(layer, replay, edits, copies=len(edits)).unflatten(0, (len(edits), -1))
            divergences.append(_divergence(vit.task, logits, masked).sum(1))
        sums.append(torch.stack([torch.cat(divergences).view(block.heads, -1).sum(1), change]))
    return sums


def _bias_of_head(
    boxes: Int[Tensor, "image head patch side"], head: int, prefix: int, grid: tuple[int, int]
) -> Float[Tensor, "image head query key"]:
    """What to add to scores so that one head alone sees only its boxes."""
    n_images, n_heads, n_patches = boxes.shape[:3]
    bias = torch.zeros((n_images, n_heads, prefix + n_patches, prefix + n_patches), device=boxes.device)
    bias[:, head] = windows.attention_bias(windows.masks(boxes[:, head], grid), prefix)
    return bias


def _divergence(
    task: Task, logits: Float[Tensor, "image class"], other: Float[Tensor, "copy image class"]
) -> Float[Tensor, "copy image"]:
    """Kullback-Leibler, in nats; of outputs that are no classes their squared change relative to their length."""
    if task.n_classes is None:
        return (other - logits).float().square().sum(-1) / logits.float().square().sum(-1)
    plain = task.outcome_logits(logits).log_softmax(-1)
    return (plain.exp() * (plain - task.outcome_logits(other).log_softmax(-1))).sum((-1, -2))
