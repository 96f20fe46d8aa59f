"""Which layers of a model have a map between the patches of one grid, and where the tokens of that map lie."""

from typing import NamedTuple

from torch import Tensor

from vitrail.errors import Unsupported
from vitrail.vit.open import Vit

__all__ = ["MapGround", "grounds_of_layers"]


class MapGround(NamedTuple):
    """`prefix` tokens, then the patches of `grid` (rows, columns); for attention within windows, the token in each
    slot of each window [window slot], -1 for padding."""

    grid: tuple[int, int]
    prefix: int
    slots: Tensor | None


def grounds_of_layers(vit: Vit) -> tuple[dict[int, MapGround], dict[int, str]]:
    """The ground of each layer that joins patches of one grid; and why the others have none."""
    found: dict[int, MapGround] = {}
    refused: dict[int, str] = {}
    for layer, block in enumerate(vit.anatomy.blocks):
        if block.grid is None or not block.maps_on_grid:
            refused[layer] = f"L{layer} has attention of kind {block.kind!r} on grid {block.grid}"
        elif block.kind == "window":
            try:
                found[layer] = MapGround(block.grid, 0, vit.tap().window_slots(layer))
            except Unsupported as error:
                refused[layer] = str(error)
        elif block.calls[0].queries == block.tokens:
            found[layer] = MapGround(block.grid, block.prefix, None)
        else:
            refused[layer] = f"L{layer} changes its {block.tokens} tokens to {block.calls[0].queries} on the way"
    return found, refused
