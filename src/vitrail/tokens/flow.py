"""Attention as a flow between tokens: the step a_l of one layer, and the product J_l of the steps below a level.

After Abnar and Zuidema 2020 (arXiv 2005.00928), whose rollout J is, and Nguyen et al. 2022 (arXiv 2210.07646), who
carry views of pixels along it. Values, projections and the MLP have no part in it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.errors import Unsupported, UsageError
from vitrail.tap.tap import LayerAttention, Readers, Tap
from vitrail.tokens.levels import require_one_grid

__all__ = ["STEPS", "LayerSteps", "flow_row", "flows", "measure_windows", "read_steps", "rollout", "step"]

STEPS = ("mean", "raw", "owner")
"""mean: heads averaged, plus identity (the residual), rows normalised; raw: heads averaged, no identity; owner: the
head whose slice of the heads' output the channel lies in, plus identity."""


def step(
    weights: Float[Tensor, "image head query key"], how: str = "mean", head: int | None = None
) -> Float[Tensor, "image query key"]:
    """The mixing a_l of one layer between tokens.

    Args:
        weights: Post-softmax attention of the layer.
        how: One of `STEPS`.
        head: The head to take, with `how="owner"` only.

    Returns:
        0 to 1, every row summing to 1.

    Raises:
        UsageError: There is no such step, or a head was passed for a step that takes all, or none for `owner`.
    """
    if how not in STEPS or (how == "owner") != (head is not None):
        raise UsageError(f"There is no step {how!r} with head {head}; choose mean or raw, or owner with a head.")
    mixed = weights[:, head] if head is not None else weights.mean(1)
    if how != "raw":
        mixed = mixed + torch.eye(mixed.shape[-1], dtype=mixed.dtype, device=mixed.device)
    return mixed / mixed.sum(-1, keepdim=True)


def flows(steps: Sequence[Float[Tensor, "image query key"]]) -> list[Float[Tensor, "image query key"]]:
    """The products of steps below each level: J_0 = identity, J_1 = a_0, ..., J_L = a_{L-1} ... a_0.

    Args:
        steps: a_0, a_1, ..., of `step`.

    Returns:
        One matrix for each level, 0 to the number of steps; 0 to 1, rows summing to 1.
    """
    n_images, n_tokens, _ = steps[0].shape
    products = [torch.eye(n_tokens, dtype=steps[0].dtype, device=steps[0].device).expand(n_images, -1, -1)]
    for each in steps:
        products.append(each @ products[-1])
    return products


def flow_row(steps: Sequence[Float[Tensor, "image query key"]], token: int) -> Float[Tensor, "image key"]:
    """One row of the last of `flows`, without the other rows: one vector times one matrix a layer.

    Args:
        steps: a_0, a_1, ..., of `step`.
        token: Index of the row; prefix tokens count.

    Returns:
        0 to 1, summing to 1.
    """
    n_images, n_tokens, _ = steps[0].shape
    row = torch.zeros((n_images, 1, n_tokens), dtype=steps[0].dtype, device=steps[0].device)
    row[:, 0, token] = 1
    for each in reversed(steps):
        row = row @ each
    return row[:, 0]


@torch.no_grad()
def read_steps(
    tap: Tap,
    images: Float[Tensor, "image channel row column"],
    how: str = "mean",
    channel: int | None = None,
    levels: int | None = None,
) -> tuple[list[Float[Tensor, "image query key"]], Float[Tensor, "image class"]]:
    """The steps of the first layers and the logits, from one pass.

    Args:
        tap: Of the model.
        images: Prepared images.
        how: One of `STEPS`.
        channel: With `how="owner"`: the channel whose head is taken in every layer.
        levels: Number of layers; None: all.

    Returns:
        The steps, and the logits.

    Raises:
        Unsupported: Tokens cannot be followed that far.
        UsageError: `how="owner"` without a channel, or with one that lies in no head.
    """
    require_one_grid(tap.anatomy, levels)
    measure_windows(tap, levels)
    steps = LayerSteps(how, channel, levels)
    logits = tap.read(images, Readers(attention=steps.read))
    return steps.all(), logits


class LayerSteps:
    """Makes the step of each layer while a pass shows its attention.

    The heads of calls beside each other are averaged together; calls that work on what the one before gave, a loop for
    one, are steps one after the other, whose product is the layer's.

    Args:
        how: One of `STEPS`.
        channel: With `how="owner"`: the channel whose head is taken in every layer.
        levels: Number of layers that are read; None: all.

    Attributes:
        mean_map: The mean over heads of the calls that were read last, [image query key].
    """

    def __init__(self, how: str = "mean", channel: int | None = None, levels: int | None = None) -> None:
        self.mean_map: Tensor | None = None
        self._by_layer: dict[int, Tensor] = {}
        self._how, self._channel, self._levels = how, channel, levels
        self._maps: list[Tensor] = []

    def all(self) -> list[Float[Tensor, "image query key"]]:
        """The steps that were read.

        Returns:
            One step for each layer, in order.
        """
        return [self._by_layer[layer] for layer in sorted(self._by_layer)]

    def read(self, attention: LayerAttention) -> None:
        """Reads an attention call.

        Args:
            attention: The call; its map joins the tokens of the layer.

        Raises:
            UsageError: The channel that names the owner is missing or lies in no head.
            Unsupported: The layer has several attention calls, so no one head owns a channel.
        """
        layer = attention.layer
        if self._levels is not None and layer >= self._levels:
            return
        head = _owner_head(attention, self._channel) if self._how == "owner" else None
        if attention.follows:
            self._close(layer, head)
        self._maps.append(attention.weights_on_grid())
        if attention.is_last:
            self._close(layer, head)

    def _close(self, layer: int, head: int | None) -> None:
        weights = self._maps[0] if len(self._maps) == 1 else torch.cat(self._maps, 1)
        each, self._maps = step(weights, self._how, head), []
        self._by_layer[layer] = each @ self._by_layer[layer] if layer in self._by_layer else each
        self.mean_map = weights.mean(1)


def measure_windows(tap: Tap, levels: int | None = None) -> None:
    """Finds where the tokens of windows lie, before a pass whose reader asks for them: a reader may run nothing.

    Args:
        tap: Of the model.
        levels: Number of layers; None: all.
    """
    for layer, block in enumerate(tap.anatomy.blocks[:levels]):
        for number, call in enumerate(block.calls):
            if call.kind == "window":
                tap.window_slots(layer, number)


def _owner_head(attention: LayerAttention, channel: int | None) -> int:
    if channel is None:
        raise UsageError("The head that owns a channel needs the channel.")
    if attention.call or not attention.is_last:
        raise Unsupported(f"L{attention.layer} has several attention calls, so no one head owns a channel; use mean.")
    head = channel // attention.v.shape[-1]
    if not 0 <= head < attention.heads:
        raise UsageError(f"Channel {channel} lies in no head of L{attention.layer}, which has {attention.heads}.")
    return head


def rollout(
    steps: Sequence[Float[Tensor, "image query key"]], prefix: int, class_index: int | None
) -> Float[Tensor, "image patch"]:
    """How much of each patch flows to the class token, or to the patches on average where there is none.

    Args:
        steps: Of all layers.
        prefix: Tokens before the patches.
        class_index: Index of the class token; None without one.

    Returns:
        0 to 1; the sum over patches is below 1 by what flows from prefix tokens.
    """
    if class_index is not None:
        return flow_row(steps, class_index)[:, prefix:]
    return flows(steps)[-1][:, prefix:, prefix:].mean(1)
