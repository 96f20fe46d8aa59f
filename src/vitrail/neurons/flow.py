"""Attention as a flow between tokens: the step a_l of one layer, and the product J_l of the steps below a level.

After Abnar and Zuidema 2020 (arXiv 2005.00928), whose rollout J is, and Nguyen et al. 2022 (arXiv 2210.07646), who
carry views of pixels along it. Values, projections and the MLP have no part in it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.errors import UsageError
from vitrail.neurons.levels import refuse_regrouped
from vitrail.vit.tap import LayerAttention, Readers, Tap

__all__ = ["STEPS", "flow_row", "flows", "measure_windows", "read_steps", "rollout", "step"]

STEPS = ("mean", "raw", "owner")
"""mean: heads averaged, plus identity (the residual), rows normalised; raw: heads averaged, no identity; owner: the
head whose slice of the heads' output the channel lies in, plus identity."""


def step(
    weights: Float[Tensor, "image head query key"], how: str = "mean", head: int | None = None
) -> Float[Tensor, "image query key"]:
    """a_l from one layer's maps; every row sums to 1. `head` is for `how="owner"`."""
    if how not in STEPS or (how == "owner") != (head is not None):
        raise UsageError(f"There is no step {how!r} with head {head}; choose mean or raw, or owner with a head.")
    mixed = weights[:, head] if head is not None else weights.mean(1)
    if how != "raw":
        mixed = mixed + torch.eye(mixed.shape[-1], dtype=mixed.dtype, device=mixed.device)
    return mixed / mixed.sum(-1, keepdim=True)


def flows(steps: Sequence[Float[Tensor, "image query key"]]) -> list[Float[Tensor, "image query key"]]:
    """J_0 = identity, J_1 = a_0, ..., J_L = a_{L-1} ... a_0; rows sum to 1."""
    n_images, n_tokens, _ = steps[0].shape
    found = [torch.eye(n_tokens, dtype=steps[0].dtype, device=steps[0].device).expand(n_images, -1, -1)]
    for each in steps:
        found.append(each @ found[-1])
    return found


def flow_row(steps: Sequence[Float[Tensor, "image query key"]], token: int) -> Float[Tensor, "image key"]:
    """Row `token` of the last of `flows(steps)`, without the other rows: one vector times one matrix a layer."""
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
    """The steps of the first `levels` layers (default: all) and the logits, from one pass.

    `channel` says which head is the owner. Raises `Unsupported` where tokens cannot be followed that far.
    """
    refuse_regrouped(tap.anatomy, levels)
    measure_windows(tap, levels)
    found: dict[int, Tensor] = {}

    def keep(attention: LayerAttention) -> None:
        if attention.call == 0 and (levels is None or attention.layer < levels):
            head = _owner(tap, attention, channel) if how == "owner" else None
            found[attention.layer] = step(attention.weights_on_grid(), how, head)

    logits = tap.read(images, Readers(attention=keep))
    return [found[layer] for layer in sorted(found)], logits


def measure_windows(tap: Tap, levels: int | None = None) -> None:
    """Finds where the tokens of windows lie, before a pass whose reader asks for them: a reader may run nothing."""
    for layer, block in enumerate(tap.anatomy.blocks[:levels]):
        if block.kind == "window":
            tap.window_slots(layer)


def _owner(tap: Tap, attention: LayerAttention, channel: int | None) -> int:
    if channel is None:
        raise UsageError("The head that owns a channel needs the channel.")
    head = channel // tap.anatomy.blocks[attention.layer].calls[0].head_dim
    if not 0 <= head < attention.heads:
        raise UsageError(f"Channel {channel} lies in no head of L{attention.layer}, which has {attention.heads}.")
    return head


def rollout(
    steps: Sequence[Float[Tensor, "image query key"]], prefix: int, class_index: int | None
) -> Float[Tensor, "image patch"]:
    """How much of each patch flows to the class token, or to the patches on average where there is none."""
    if class_index is not None:
        return flow_row(steps, class_index)[:, prefix:]
    return flows(steps)[-1][:, prefix:, prefix:].mean(1)
