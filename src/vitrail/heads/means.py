"""The mean output of every head over a data set: what a head gives when it knows nothing of the image.

Putting it in a head's place ("mean ablation") asks for what the head says of this image, where zero also takes away
what it says of every image. Token by token, so a head that gives each position always the same loses nothing.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.vit.anatomy import Anatomy
from vitrail.vit.attention import LayerAttention
from vitrail.vit.edits import Edit
from vitrail.vit.tap import Readers, Tap

__all__ = ["MeanOutputs"]


class MeanOutputs:
    """Means over images, summed batch by batch in float64; the same batches in the same order give the same bytes."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._sums: dict[int, Tensor] = {}
        self._n_images = self._counted = 0

    @torch.no_grad()
    def see(self, tap: Tap, images: Float[Tensor, "image channel row column"], n_images: int) -> None:
        """One pass; only the first `n_images` of the batch count."""
        gates = [
            Edit(layer, gate=torch.ones((len(images), block.heads), device=images.device))
            for layer, block in enumerate(self._anatomy.blocks)
        ]  # edits that change nothing: a native kernel would hide what the heads give
        self._counted = n_images
        tap.read(images, Readers(attention=self._add), gates)
        self._n_images += n_images

    def _add(self, attention: LayerAttention) -> None:
        if attention.call == 0:
            assert attention.out is not None
            total = attention.out[: self._counted].double().sum(0)
            self._sums[attention.layer] = self._sums.get(attention.layer, 0) + total

    def arrays(self) -> dict[str, Float[np.ndarray, "window head query channel"]]:
        """Means by layer ("L0", ..), float32: window, head, query and channel as the layer's attention has them."""
        return {
            f"L{layer}": (total / self._n_images).float().cpu().numpy() for layer, total in sorted(self._sums.items())
        }

    @staticmethod
    def by_layer(
        arrays: Mapping[str, Float[np.ndarray, "window head query channel"]],
    ) -> dict[int, Float[Tensor, "window head query channel"]]:
        """The means as `importance.sweep` takes them."""
        return {int(name.removeprefix("L")): torch.from_numpy(values) for name, values in arrays.items()}
