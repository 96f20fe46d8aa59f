"""The mean output of every head over a data set: what a head returns on average over images.

Putting it in a head's place ("mean ablation") asks for what the head says of this image, where zero also takes away
what it says of every image. Token by token, so a head that returns the same at each position for all images loses
nothing.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.tap.anatomy import Anatomy
from vitrail.tap.attention import LayerAttention
from vitrail.tap.edits import Edit
from vitrail.tap.tap import Readers, Tap

__all__ = ["MeanOutputs"]


class MeanOutputs:
    """Means over images, summed batch by batch in float64; the same batches in the same order give the same bytes.

    Args:
        anatomy: Of the model.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._n_images = self._counted = 0

    @torch.no_grad()
    def add(self, tap: Tap, images: Float[Tensor, "image channel row column"], n_images: int) -> None:
        """Takes in one batch, with one pass.

        Args:
            tap: Of the model.
            images: Prepared images.
            n_images: How many of them count, from the first.
        """
        gates = [
            Edit(layer, gate=torch.ones((len(images), block.heads), device=images.device))
            for layer, block in enumerate(self._anatomy.blocks)
            if block.calls
        ]  # edits that change nothing: a native kernel would hide what the heads give
        self._counted = n_images
        tap.read(images, Readers(attention=self._sum_outputs), gates)
        self._n_images += n_images

    def _sum_outputs(self, attention: LayerAttention) -> None:
        assert attention.out is not None
        call = (attention.layer, attention.call)
        self._sums[call] = self._sums.get(call, 0) + attention.out[: self._counted].double().sum(0)

    def arrays(self) -> dict[str, Float[np.ndarray, "window head query channel"]]:
        """The means over all images so far.

        Returns:
            By layer ("L0", ..; "L0.1" for the second attention call of a block) in float32: window, head, query and
            channel as the attention has them.
        """
        return {
            f"L{layer}.{call}" if call else f"L{layer}": (total / self._n_images).float().cpu().numpy()
            for (layer, call), total in sorted(self._sums.items())
        }

    @staticmethod
    def by_call(
        arrays: Mapping[str, Float[np.ndarray, "window head query channel"]],
    ) -> dict[tuple[int, int], Float[Tensor, "window head query channel"]]:
        """The means as `importance.sweep` takes them.

        Args:
            arrays: Of `arrays`.

        Returns:
            By index of the layer, and of the attention call in it.
        """
        places = {name: name.removeprefix("L").partition(".") for name in arrays}
        return {(int(places[name][0]), int(places[name][2] or 0)): torch.from_numpy(arrays[name]) for name in arrays}
