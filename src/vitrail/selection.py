"""Which image of a study is meant: by its position, by its id, or all of them together."""

import numpy as np
import xarray as xr

from vitrail.errors import UsageError

__all__ = ["ImageChoice", "describe_choice", "image_id", "image_position"]

ImageChoice = int | np.integer | str | None
"""An image by its position or id; None: all images together."""

N_IDS_NAMED = 3
"""Ids that an error message gives as examples."""


def image_position(study: xr.Dataset, image: int | np.integer | str) -> int:
    """The position of an image in the study.

    Args:
        study: A dataset with the dimension `image`, and ids as its coordinate if images are chosen by id.
        image: A position, 0 to the number of images less 1, or an id.

    Returns:
        The position along `image`.

    Raises:
        UsageError: The study has no such image.
    """
    n_images = study.sizes["image"]
    if isinstance(image, (int, np.integer)):
        if 0 <= image < n_images:
            return int(image)
        raise UsageError(f"Image {image} was asked for; the study has images 0 to {n_images - 1}.")
    ids = study["image"].to_numpy().astype(str) if "image" in study.coords else np.array([], dtype=str)
    positions = np.flatnonzero(ids == image)
    if not positions.size:
        examples = ", ".join(ids[:N_IDS_NAMED]) + (", ..." if len(ids) > N_IDS_NAMED else "")
        raise UsageError(f"There is no image {image!r} in this study. Its {n_images} images are named like: {examples}")
    return int(positions[0])


def image_id(study: xr.Dataset, position: int) -> str:
    """The id of the image at a position, or the position as text where the study has no ids.

    Args:
        study: A dataset with the dimension `image`.
        position: A position along `image`.

    Returns:
        The id.
    """
    return str(study["image"].to_numpy()[position]) if "image" in study.coords else str(position)


def describe_choice(study: xr.Dataset, image: ImageChoice) -> str:
    """A choice in words: "image ID" for one image, "mean over N images" for all.

    Args:
        study: A dataset with the dimension `image`.
        image: A position, an id, or None for all.

    Returns:
        The words, without a full stop.

    Raises:
        UsageError: The study has no such image.
    """
    if image is not None:
        return f"image {image_id(study, image_position(study, image))}"
    n_images = study.sizes["image"]
    return f"mean over {n_images:,} image{'s' if n_images != 1 else ''}"
