"""A study's images and labels for trials with its model."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.data import Manifest, stored_image
from vitrail.models.open import Vit
from vitrail.study.progress import Progress

__all__ = ["StudyImages"]


class StudyImages:
    """A study's images and labels, a batch at a time, for any model that prepares them alike."""

    def __init__(self, vit: Vit, manifest: Manifest, labels: Int[np.ndarray, "image"], batch: int = 16) -> None:
        self.vit, self.labels, self._manifest, self._batch = vit, labels, manifest, batch

    def prepare(self, positions: Sequence[int], vit: Vit | None = None) -> Float[Tensor, "image channel row column"]:
        """Loads images as a model's input.

        Args:
            positions: Of the images in the study.
            vit: The model; None: the study's own.

        Returns:
            The prepared images.
        """
        entries = [self._manifest.images[int(at)] for at in positions]
        chosen = vit or self.vit
        return chosen.prepare_views([chosen.view(stored_image(self._manifest, entry)) for entry in entries])

    def correct(
        self, positions: Int[np.ndarray, "image"], predict: Callable[[Sequence[int]], np.ndarray], bars: Progress
    ) -> Iterator[Bool[np.ndarray, "*lead some"]]:
        """Which images are answered correctly, batch by batch.

        Args:
            positions: Of the images in the study.
            predict: Given positions, the predicted classes [.. image].
            bars: Advances with the images.

        Yields:
            True where the label is predicted, with the dimensions of what `predict` gives.
        """
        for start in range(0, len(positions), self._batch):
            part = positions[start : start + self._batch]
            yield predict(part.tolist()) == self.labels[part]
            bars.advance(len(part))
