"""Images of noise, on which models are tried before there are photographs."""

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.models.open import Vit
from vitrail.tap.clone import first_weight

__all__ = ["noise_images"]


def noise_images(vit: Vit, n_images: int = 1, seed: int = 0) -> Float[Tensor, "image channel row column"]:
    """Makes prepared images of normal noise, the same ones for the same seed.

    Args:
        vit: The opened model.
        n_images: How many.
        seed: Of the noise.

    Returns:
        [image, channel, row, column] on the model's device and in its precision.
    """
    noise = torch.randn((n_images, vit.n_channels, *vit.image_size), generator=torch.Generator().manual_seed(seed))
    return noise.to(first_weight(vit.model))
