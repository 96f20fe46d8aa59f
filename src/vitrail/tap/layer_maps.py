"""The attention of one layer over all its tokens, whatever calls the layer makes."""

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.errors import Unsupported
from vitrail.tap.anatomy import MAPLESS_KINDS
from vitrail.tap.attention import LayerAttention
from vitrail.tap.tap import Tap

__all__ = ["LayerMaps"]


class LayerMaps:
    """Keeps the maps of one layer as a pass of a single image makes them.

    Windowed attention is put back on the image grid, zero between windows. Of a layer with several attention calls the
    heads of all that join the same tokens are kept, each head the first time that it runs.

    Args:
        tap: Of the model; windows are measured by passes of their own, before the reader is used.
        layer: Zero-based index of the block.

    Raises:
        Unsupported: The layer attends within windows whose tokens cannot be found.

    Example:
        >>> maps = LayerMaps(vit.tap(), 3)
        >>> logits = vit.tap().read(image, Readers(attention=maps.read))
        >>> maps.joined()     # [head, query, key]
    """

    def __init__(self, tap: Tap, layer: int) -> None:
        self._layer, self._block = layer, tap.anatomy.blocks[layer]
        first_runs = [calls[0] for calls in self._block.attentions]
        self._calls = [number for number in first_runs if self._block.calls[number].kind not in MAPLESS_KINDS]
        for number in self._calls:
            if self._block.calls[number].kind == "window":
                tap.window_slots(layer, number)  # measured by passes of its own, which cannot run inside a reader
        self._maps: dict[int, Tensor] = {}

    def read(self, attention: LayerAttention) -> None:
        """Receives an attention call.

        Args:
            attention: Of any layer; the others are passed over.
        """
        if attention.layer == self._layer and attention.call in self._calls:
            self._maps[attention.call] = attention.weights_on_grid()[0].float().cpu()

    def joined(self) -> Float[Tensor, "head query key"]:
        """The maps of the last pass.

        Returns:
            Weights 0 to 1 on the CPU; NaN for heads that join other tokens than the most.

        Raises:
            Unsupported: The layer has no map from tokens to the same tokens.
        """
        square = {number: each for number, each in self._maps.items() if each.shape[-1] == each.shape[-2]}
        if not square:
            sizes = ", ".join(f"{each.shape[-2]} queries and {each.shape[-1]} keys" for each in self._maps.values())
            raise Unsupported(
                f"L{self._layer} has {sizes or 'no maps'} (kind {', '.join(dict.fromkeys(self._block.kinds))}), so its "
                "map does not join tokens with the same tokens. Its heads can still be pruned."
            )
        n_tokens = max(each.shape[-1] for each in square.values())
        joined = torch.full((self._block.heads, n_tokens, n_tokens), torch.nan)
        for number, each in square.items():
            if each.shape[-1] == n_tokens:
                joined[self._block.calls[number].layer_heads] = each
        return joined
