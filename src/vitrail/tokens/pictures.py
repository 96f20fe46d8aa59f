"""What has the channels of a model's input, as a picture."""

import numpy as np
from jaxtyping import Float
from torch import Tensor

from vitrail.errors import Unsupported

__all__ = ["as_picture"]

COLOURS = 3


def as_picture(pixels: Tensor) -> Float[np.ndarray, "row column channel"]:
    """Lays one image out as pictures are stored; grey is given three equal colours.

    Args:
        pixels: [.. channel row column] of one image.

    Returns:
        Three colours for each pixel.

    Raises:
        Unsupported: The image has neither one channel nor three, so it is no picture.
    """
    image = pixels.reshape(pixels.shape[-3:]).detach().float().cpu()
    if len(image) not in (1, COLOURS):
        raise Unsupported(f"its images have {len(image)} channels, of which no picture can be made")
    return image.expand(COLOURS, *image.shape[1:]).permute(1, 2, 0).numpy()
