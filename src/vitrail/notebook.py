"""Vitrail in a notebook: a page in the output of a cell, with everything it shows inside and nothing loaded.

import vitrail

vitrail.show(vitrail.look(vit, image))        # one image: findings and figures
vitrail.show(study)                           # a study: the page of `vitrail open`, with some of its images
vitrail.show("study/", vit)                   # with attention, too
"""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from vitrail.app.export import DEFAULT_IMAGES, export_html, write_html
from vitrail.errors import UsageError
from vitrail.outputs import local_path
from vitrail.report import look_page
from vitrail.study.store import open_study

__all__ = ["Page", "show"]

HEIGHT_PX = 720
"""Of the frame in the notebook: a page at 1280 x 720."""


class Page:
    """A page of Vitrail as a notebook shows it.

    Attributes:
        html: The whole page; `save` writes it as a file.
        height: Of its frame in the notebook, in pixels.
    """

    def __init__(self, html: str, height: int = HEIGHT_PX) -> None:
        self.html = html
        self.height = height

    def save(self, path: str | Path) -> Path:
        """Write the page as a file that opens in any browser, without a server and offline.

        Args:
            path: The file; `~` is the home folder, and folders that are missing are made.

        Returns:
            The file.

        Raises:
            UsageError: The file cannot be written.
        """
        return write_html(local_path(os.path.expanduser(path)), self.html)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that neither its styles and scripts nor the notebook's touch the other."""
        return (
            f'<iframe srcdoc="{escape(self.html)}" sandbox="allow-scripts allow-downloads" title="Vitrail" '
            f'style="width:100%;height:{self.height}px;border:0"></iframe>'
        )

    def __repr__(self) -> str:
        return f"Page({len(self.html) / 2**20:.1f} MB of HTML; shown in a notebook, or written by .save(FILE))"


def show(item: Any, vit: Any = None, *, images: Sequence[int] | None = None, height: int = HEIGHT_PX) -> Page:
    """A study or one image as a page in a notebook.

    Args:
        item: A study, as its folder or as `open_study` gives it, or one image, as `vitrail.look` gives it. Of some
            images of a study, as `study.isel(image=...)` gives them, the page has the photographs, of 12 at most; its
            means are of the whole study.
        vit: The model of the study, for the attention of the images; None leaves attention out.
        images: Positions in the study of the images whose photographs, patches and attention are shown; None chooses
            those that the findings speak of.
        height: Of the frame in the notebook, in pixels.

    Returns:
        The page; a cell that ends with it shows it.

    Raises:
        StudyError: The folder is no study.
        WeightsMismatch: `vit` has other weights than the model of the study.
        UsageError: It is neither, or `vit` has another target than the model of the study.

    Example:
        >>> import vitrail
        >>> vitrail.show("study")  # doctest: +SKIP
    """
    if isinstance(item, xr.Dataset) and "image" not in (*item.dims, *item.coords):
        raise UsageError('These numbers have no images any more, as after mean("image"); give the study itself.')
    if isinstance(item, xr.Dataset) and "source" in item.encoding:
        images = _positions_in_study(item) if images is None else images
        item = item.encoding["source"]
    if isinstance(item, str | Path):
        live = None
        if vit is not None:
            from vitrail.live import LiveModel  # needs torch, which a study alone does not

            live = LiveModel(vit)
        return Page(export_html(item, live, images=images), height)
    if isinstance(item, xr.Dataset):
        return Page(look_page(item), height)
    raise UsageError(
        f"{type(item).__name__} was to be shown; give a study, its folder, or what vitrail.look(vit, image) gives."
    )


def _positions_in_study(part: xr.Dataset) -> list[int] | None:
    """Positions in the study of the first images of a part of it; None for all of its images."""
    ids = open_study(part.encoding["source"], partial=True)["image"].to_numpy()
    chosen = np.atleast_1d(part["image"].to_numpy())
    if np.array_equal(ids, chosen):
        return None
    position = {image: at for at, image in enumerate(ids.tolist())}
    return [position[image] for image in chosen.tolist() if image in position][:DEFAULT_IMAGES] or None
