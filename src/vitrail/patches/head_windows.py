"""Windows of every head and query under one budget, chosen layer by layer.

Our construction, after Ma et al. 2022 (arXiv 2203.05922). What a box costs is told by `budget`; here it is multiplied
by how much the prediction depends on the query's token, and boxes are chosen twice. First of the plain pass, which says
how much area each layer is worth; then layer by layer on tokens that have passed the windows of the layers before,
towards what the heads give without windows: what early windows change, later ones can make good.

    prices = head_prices(vit, images[:20])                  # once per model
    boxes = head_windows(vit, images, prices, 0.25)
    edits = window_edits(vit, boxes)
    logits = vit.tap().read(images, edits=edits)
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.errors import Unsupported
from vitrail.grid import Grid
from vitrail.models.gradients import gradients_enabled
from vitrail.models.open import Vit
from vitrail.models.task import Task
from vitrail.models.token_grid import share_grids
from vitrail.patches import windows
from vitrail.patches.budget import allocate, boxes_of_shapes, output_changes
from vitrail.tap.attention import LayerAttention, Readers
from vitrail.tap.edits import Edit

__all__ = ["common_grid", "head_windows", "query_weights", "reason_against_common_grid", "window_edits"]

N_DIRECTIONS = 4
"""Gradients whose lengths make the weight of a query: of the most probable classes, or of random directions of another
output. More move few weights by much, and take a backward pass each."""

TINY = torch.finfo(torch.float32).tiny


def common_grid(vit: Vit) -> tuple[Grid, int]:
    """The grid of patches that every layer's maps join, and the number of tokens before them.

    Args:
        vit: The model.

    Returns:
        (rows, columns), and the number of prefix tokens.

    Raises:
        Unsupported: Layers differ in that, attend within windows, or have no map between patches.
    """
    reason = reason_against_common_grid(vit)
    if reason:
        raise Unsupported(reason)
    tokens = next(iter(share_grids(vit)[0].values()))
    return tokens.grid, tokens.n_prefix


def reason_against_common_grid(vit: Vit) -> str:
    """Why a model has no grid of patches that every layer's maps join.

    Args:
        vit: The model.

    Returns:
        A sentence's end; empty where it has one.
    """
    grids, reasons = share_grids(vit)
    if reasons:
        return next(iter(reasons.values()))
    if any(len(block.calls) != 1 for block in vit.anatomy.blocks):
        return "it has layers with several attention calls, or with none that is seen"
    if any(tokens.slots is not None for tokens in grids.values()):
        return "the model attends within windows of its own"
    if len({(tokens.grid, tokens.n_prefix) for tokens in grids.values()}) > 1:
        return "its layers have different grids or prefix tokens"
    return ""


@torch.no_grad()
def head_windows(
    vit: Vit, images: Float[Tensor, "image channel row column"], prices: Float[Tensor, "layer head"], area: float
) -> list[Int[Tensor, "image _ patch side"]]:
    """A box for each head and query, all of an image under one budget of area. Labels play no part.

    Args:
        vit: The model; all layers have one grid (`common_grid`).
        images: Prepared images.
        prices: From `vitrail.patches.budget.head_prices`.
        area: Mean area over the queries, heads and layers of an image, as a share of the grid; above 0, at most 1.

    Returns:
        Of each layer boxes (top, left, bottom, right), half open; empty where a query is left with itself alone.

    Raises:
        Unsupported: Layers have no common grid.
        UsageError: `area` is no share.
    """
    grid, prefix = common_grid(vit)
    n_patches = windows.n_patches_of(area, grid)
    importance = query_weights(vit, images)

    def priced_boxes(
        weights: Tensor, v: Tensor, layer: int, target: Tensor
    ) -> tuple[Int[Tensor, "image head patch level side"], Float[Tensor, "image head patch level"]]:
        boxes = boxes_of_shapes(weights, prefix, grid)
        changes = output_changes(weights, v, boxes, prefix, grid, target)
        price = prices[layer, : vit.n_heads[layer]].to(changes)[:, None, None]
        return boxes, price * importance[layer][:, None, :, None] * changes

    targets: list[Tensor] = []
    costs: list[Tensor] = []
    sizes: list[Tensor] = []

    def read_plain(attention: LayerAttention) -> None:
        weights, v = attention.weights(), attention.v[:, 0]
        targets.append((weights @ v.to(weights))[:, :, prefix:])
        boxes, cost = priced_boxes(weights, v, attention.layer, targets[-1])
        costs.append(cost)
        sizes.append(windows.areas(boxes))

    vit.tap().read(images, Readers(attention=read_plain))
    budgets = _layer_budgets(costs, sizes, n_patches)
    chosen: list[Tensor] = []
    for layer in range(vit.n_layers):
        read: list[tuple[Tensor, Tensor]] = []
        vit.tap().read(images, _reader_of(layer, read), edits=window_edits(vit, chosen))
        boxes, cost = priced_boxes(*read[0], layer, targets[layer])
        level = allocate(cost, windows.areas(boxes), budgets[layer])
        chosen.append(boxes.gather(-2, level[..., None, None].expand(*level.shape, 1, 4))[..., 0, :])
    return chosen


def window_edits(vit: Vit, boxes: Sequence[Int[Tensor, "image _ patch side"]]) -> list[Edit]:
    """Edits under which the patches of each head see only their boxes and themselves; prefix tokens are open.

    Args:
        vit: The model.
        boxes: Of its first layers, in order.

    Returns:
        An edit for each layer that has boxes.

    Raises:
        Unsupported: Layers have no common grid.
    """
    grid, prefix = common_grid(vit)
    return [
        Edit(layer, bias=windows.attention_bias(windows.masks(each, grid), prefix)) for layer, each in enumerate(boxes)
    ]


def query_weights(vit: Vit, images: Float[Tensor, "image channel row column"]) -> list[Float[Tensor, "image patch"]]:
    """How much the prediction depends on each patch's token, layer by layer.

    The length of the gradient by the token that a layer returns, root mean square over a few directions of the output:
    the most probable classes with the square root of their probability (as in the Fisher information), of an output
    that is no class random directions with a seed.

    Args:
        vit: The model; all layers have one grid.
        images: Prepared images.

    Returns:
        Of each layer, relative to the root mean square over the patches of the image; 1 where no patch matters.

    Raises:
        Unsupported: Layers have no common grid, or the model lets no gradient through.
    """
    _, prefix = common_grid(vit)
    tokens: list[Tensor] = []
    with gradients_enabled():
        pixels = images.detach().clone().requires_grad_()  # the weights may be frozen
        output = vit.tap().read(pixels, Readers(output=lambda layer, each: tokens.append(each)))
        directions = _directions(vit.task, output)
        squares = [torch.zeros(each.shape[:2], device=each.device) for each in tokens]
        for direction in directions:
            gradients = torch.autograd.grad(direction, tokens, retain_graph=True, allow_unused=True)
            for square, gradient in zip(squares, gradients, strict=True):
                if gradient is not None:
                    square += gradient.float().square().sum(-1)
    patches = [square[:, prefix:] for square in squares]
    means = [each.mean(-1, keepdim=True) for each in patches]
    return [
        torch.where(mean > 0, each / mean.clamp_min(TINY), 1.0).sqrt()
        for each, mean in zip(patches, means, strict=True)
    ]


def _directions(task: Task, output: Float[Tensor, "image value"]) -> list[Float[Tensor, ""]]:
    """Numbers of all images, summed, whose squared gradients are added up."""
    if task.n_classes is None:
        signs = torch.randint(0, 2, (N_DIRECTIONS, output.shape[-1]), generator=torch.Generator().manual_seed(0))
        unit = output / output.detach().norm(dim=-1, keepdim=True).clamp_min(TINY)
        return [(unit * each).sum() for each in (2 * signs - 1).to(unit)]
    log_probabilities = task.log_probabilities(output)
    top = log_probabilities.detach().topk(min(N_DIRECTIONS, output.shape[-1]), dim=-1)
    weighted = log_probabilities.gather(-1, top.indices) * (top.values / 2).exp()
    return list(weighted.sum(0))


def _layer_budgets(
    costs: Sequence[Float[Tensor, "image _ patch level"]],
    sizes: Sequence[Int[Tensor, "image _ patch level"]],
    n_patches: int,
) -> list[Float[Tensor, "image"]]:
    """Mean size of a window of each layer if areas are shared by all queries, heads and layers of an image."""
    queries = [cost.flatten(1, 2) for cost in costs]  # layers may have different numbers of heads
    size = torch.cat([each.flatten(1, 2) for each in sizes], 1)
    level = allocate(torch.cat(queries, 1), size, float(n_patches))
    taken = size.gather(-1, level[..., None])[..., 0].float()
    return [part.mean(1) for part in taken.split([each.shape[1] for each in queries], 1)]


def _reader_of(layer: int, read: list[tuple[Tensor, Tensor]]) -> Readers:
    """Keeps weights and values of one layer."""

    def keep(attention: LayerAttention) -> None:
        if attention.layer == layer:
            read.append((attention.weights(), attention.v[:, 0]))

    return Readers(attention=keep)
