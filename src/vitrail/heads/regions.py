"""Which part of a head's map matters: the six region modes of Li et al. 2023.

A map has three regions: the corner where prefix tokens look at prefix tokens, the rest of the prefix rows and columns,
and the patch block. In the paper the prefix is the class token alone; here distillation and register tokens belong to
it too (our extension). What a mode prunes is set to zero after the softmax, without renormalisation.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.errors import Unsupported, UsageError
from vitrail.tap.anatomy import Anatomy, Block
from vitrail.tap.edits import Edit
from vitrail.tap.tap import Tap

__all__ = [
    "Mode",
    "RegionModes",
    "mode_edits",
    "modes_offered",
    "region_mask",
    "region_modes",
    "require_mode",
    "why_not_all_modes",
]


class Mode(IntEnum):
    """What is pruned. In masks, CROSS = EDGE + CORNER and EVERYTHING = CROSS + PATCHES."""

    NOTHING = 1
    EVERYTHING = 2
    CROSS = 3
    """The rows and columns of the prefix, with the corner."""
    PATCHES = 4
    """Patches looking at patches."""
    EDGE = 5
    """The rows and columns of the prefix, without the corner."""
    CORNER = 6
    """The prefix looking at the prefix: with one class token, a single cell."""


class RegionModes(NamedTuple):
    """The outputs of the model with parts of one head's map pruned.

    Attributes:
        modes: The modes that the layer has.
        logits: Output of each mode, in the same order.
        missing: Why a mode is left out; empty when all six are there.
    """

    modes: tuple[Mode, ...]
    logits: Float[Tensor, "mode image class"]
    missing: str


def region_modes(tap: Tap, anatomy: Anatomy, images: Tensor, layer: int, head: int) -> RegionModes:
    """The output of the model in every region mode of one head.

    One plain pass, then one run from block `layer` with a copy of the images for every other mode. Mode 1 is the plain
    pass itself, bitwise. The rest agree with runs of their own within 1e-5 of the largest logit in float32 (another
    batch size; weights @ v instead of the fused kernel).

    Args:
        tap: Of the model.
        anatomy: Of the model.
        images: Prepared images.
        layer: Index of the layer.
        head: Index of the head.

    Returns:
        The modes that the layer has, with their outputs.

    Raises:
        UsageError: The model has no such head.
    """
    _check_head(anatomy, layer, head)
    modes = modes_offered(anatomy, layer, head)
    replay, plain = tap.record(images)
    edits = mode_edits(anatomy, layer, head, modes[1:])
    n_copies = len(modes) - 1
    stacked = tap.run_from(layer, replay, edits=edits, copies=n_copies)
    logits = torch.cat([plain[None], stacked.reshape(n_copies, *plain.shape)])
    return RegionModes(modes, logits, why_not_all_modes(anatomy, layer, head))


def modes_offered(anatomy: Anatomy, layer: int, head: int = 0) -> tuple[Mode, ...]:
    """The modes that mean something for a head.

    Args:
        anatomy: Of the model.
        layer: Index of the layer.
        head: Index of the head; heads of one attention call have the same modes.

    Returns:
        Modes in growing order, mode 1 first.
    """
    if not _has_square_map(anatomy.blocks[layer], head):
        return (Mode.NOTHING, Mode.EVERYTHING)
    if anatomy.class_index(layer) is None:
        return (Mode.NOTHING, Mode.EVERYTHING, Mode.PATCHES)
    return tuple(Mode)


def _has_square_map(block: Block, head: int) -> bool:
    """Windows of a block with tokens that are no patches are no windows of its tokens (TNT: the pixels of a patch)."""
    calls = [block.calls[call] for call in block.calls_of(head)]
    return (
        bool(calls)
        and block.grid is not None
        and all(
            (call.kind == "window" and block.prefix == 0) or (call.kind == "token" and call.queries == block.tokens)
            for call in calls
        )
    )


def why_not_all_modes(anatomy: Anatomy, layer: int, head: int = 0) -> str:
    """The reason that some modes are missing for a head.

    Args:
        anatomy: Of the model.
        layer: Index of the layer.
        head: Index of the head.

    Returns:
        A sentence; empty where all six modes are offered.
    """
    block = anatomy.blocks[layer]
    if not _has_square_map(block, head):
        kind = next((block.calls[call].kind for call in block.calls_of(head)), block.kind)
        return (
            f"L{layer}H{head} has no map from patches to the same patches (kind {kind!r}, grid {block.grid}), "
            "so only modes 1 and 2 are offered."
        )
    if anatomy.class_index(layer) is None:
        return (
            f"Layer {layer} has no class token, so there is no class row, column or corner to prune: modes 3, 5 and 6 "
            "are not offered."
        )
    return ""


def region_mask(mode: Mode, n_tokens: int, prefix: int) -> Float[Tensor, "query key"]:
    """The cells of a map that a mode leaves.

    Args:
        mode: What is pruned.
        n_tokens: Rows and columns of the map.
        prefix: Tokens before the patches.

    Returns:
        1 where the map stays, 0 where it is pruned.
    """
    is_prefix = torch.arange(n_tokens) < prefix
    corner = is_prefix[:, None] & is_prefix
    cross = is_prefix[:, None] | is_prefix
    pruned = {
        Mode.NOTHING: torch.zeros_like(cross),
        Mode.EVERYTHING: torch.ones_like(cross),
        Mode.CROSS: cross,
        Mode.PATCHES: ~cross,
        Mode.EDGE: cross & ~corner,
        Mode.CORNER: corner,
    }[mode]
    return (~pruned).float()


def mode_edits(anatomy: Anatomy, layer: int, head: int, modes: Sequence[Mode]) -> list[Edit]:
    """The edits of one head that modes stand for. What prunes the whole map is the head's removal.

    Args:
        anatomy: Of the model.
        layer: Index of the layer.
        head: Index of the head; one that runs several times is edited in every run.
        modes: What is pruned, of those that the head has; each on a copy of the images of its own, in this order.

    Returns:
        Edits of the tap.

    Raises:
        UsageError: There is no such layer or head.
    """
    _check_head(anatomy, layer, head)
    return [edit for copy, mode in enumerate(modes) for edit in _mode_edits(anatomy, layer, head, mode, copy)]


def _mode_edits(anatomy: Anatomy, layer: int, head: int, mode: Mode, copy: int) -> list[Edit]:
    block = anatomy.blocks[layer]
    if mode is Mode.EVERYTHING or (mode is Mode.PATCHES and block.prefix == 0):
        return [Edit(layer, copy=copy, prune=(head,))]
    edits = []
    for number in block.calls_of(head):
        call = block.calls[number]
        mask = torch.ones(call.heads, block.tokens, block.tokens, dtype=torch.bool)
        mask[head - call.first_head] = region_mask(mode, block.tokens, block.prefix).bool()
        edits.append(Edit(layer, number, copy, region=mask))
    return edits


def _check_head(anatomy: Anatomy, layer: int, head: int) -> None:
    if not 0 <= layer < len(anatomy.blocks):
        raise UsageError(f"Layer {layer} was asked for; the model has layers 0 to {len(anatomy.blocks) - 1}.")
    if not 0 <= head < anatomy.blocks[layer].heads:
        raise UsageError(
            f"L{layer}H{head} was asked for; layer {layer} has heads 0 to {anatomy.blocks[layer].heads - 1}."
        )


def require_mode(anatomy: Anatomy, layer: int, mode: Mode, head: int = 0) -> None:
    """Refuses a mode that a head does not have.

    Args:
        anatomy: Of the model.
        layer: Index of the layer.
        mode: The mode.
        head: Index of the head.

    Raises:
        Unsupported: The head does not have it; the message says why.
    """
    if mode not in modes_offered(anatomy, layer, head):
        raise Unsupported(f"Region mode {int(mode)} was asked for. {why_not_all_modes(anatomy, layer, head)}")
