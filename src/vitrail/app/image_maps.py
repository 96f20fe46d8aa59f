"""Maps of the images: the one that the study stores, and others of what it stores, computed when first asked for.

    GET /api/maps/{map}               [image, xy]
    GET /api/maps/{map}?image=u..     [xy], where a photograph of the visitor's own lies on it

`maps` of `/api/study` lists those that this study can give, the stored one first.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from vitrail.app.answers import binary
from vitrail.app.once import Once
from vitrail.app.study_arrays import StudyArrays
from vitrail.heads.head_values import main_metric
from vitrail.study.image_map import image_xy
from vitrail.study.plan import Plan

if TYPE_CHECKING:
    from vitrail.app.server import AppState

__all__ = ["ImageMap", "ImageMaps", "routes"]

STORED = "image_xy"
STORED_TABLE = "head_probability"
"""What the stored map is made of."""

METHODS = {"tsne": "t-SNE", "pca": "PCA"}

MOST_IMAGES_TSNE = 1000
"""More images than this wait longer than a visitor does for t-SNE: two seconds for so many, half a minute for 5,000."""

N_NEIGHBOURS = 5
"""Images between which a photograph of the visitor's own is placed."""


@dataclass(frozen=True)
class ImageMap:
    """A map of the images that a study can give.

    Attributes:
        name: In the page's address, as "importance-pca".
        title: In its list, as "PCA of head importance".
        table: The array whose rows are alike for images that lie near each other.
        method: "tsne" or "pca".
        stored: Whether the study holds it.
    """

    name: str
    title: str
    table: str
    method: str
    stored: bool


class ImageMaps:
    """The maps of one study; any thread may ask, and each is computed once."""

    def __init__(self, arrays: StudyArrays, plan: Plan) -> None:
        """Compute nothing yet.

        Args:
            arrays: The arrays of the study.
            plan: The plan that it was made by.
        """
        self._arrays = arrays
        self._seed = plan.seed
        self._made = Once()
        self.maps = _list_maps(arrays, plan)

    def find(self, name: str) -> ImageMap:
        """The map of a name.

        Args:
            name: As a request writes it.

        Returns:
            The map.

        Raises:
            HTTPException: 404 with those that this study can give.
        """
        for each in self.maps:
            if each.name == name:
                return each
        names = ", ".join(each.name for each in self.maps) or "none"
        raise HTTPException(404, f"This study has no map of its images called {name[:40]!r}. It has: {names}.")

    def positions(self, each: ImageMap) -> Float32[np.ndarray, "image xy"]:
        """Where each image lies.

        Args:
            each: One of `maps`.

        Returns:
            Positions, in units without meaning, or of the table for principal components.
        """
        if each.stored:
            return self._arrays.load(STORED)

        def compute() -> Float32[np.ndarray, "image xy"]:
            return image_xy(self._arrays.dataset[each.table], self._seed, each.method)

        positions: Float32[np.ndarray, "image xy"] = self._made.get(each.name, compute)
        return positions

    def position(self, each: ImageMap, numbers: dict[str, np.ndarray]) -> Float32[np.ndarray, "xy"]:
        """Where a new image lies: at the mean of the images whose rows of the table are nearest to its own.

        Our construction; the map itself is not computed again.

        Args:
            each: One of `maps`.
            numbers: Arrays of the new image by name, without the image dimension.

        Returns:
            The position on the map.

        Raises:
            HTTPException: 404 if the table was not computed for this image.
        """
        if each.table not in numbers:
            raise HTTPException(404, f"{each.table!r}, which places images on this map, was not computed for this one.")
        stored = self._arrays.load(each.table).reshape(self._arrays.n_images, -1)
        distance = np.nansum((stored - numbers[each.table].reshape(1, -1)) ** 2, axis=1)
        nearest = np.argsort(distance, kind="stable")[:N_NEIGHBOURS]
        return np.asarray(self.positions(each)[nearest].mean(axis=0), dtype=np.float32)


def _list_maps(arrays: StudyArrays, plan: Plan) -> list[ImageMap]:
    """The stored one, then what can be computed of stored arrays in a moment."""
    dataset = arrays.dataset
    stored = plan.options.get("image_map", "tsne") if STORED in dataset else None
    tables = {
        "importance": (STORED_TABLE if stored else main_metric(dataset), "head importance"),
        "embedding": ("image_embedding", "the model's embedding"),
    }
    maps = []
    for key, (table, what) in tables.items():
        for method, words in METHODS.items():
            is_quick = method == "pca" or (arrays.n_images <= MOST_IMAGES_TSNE and find_spec("sklearn") is not None)
            is_stored = key == "importance" and method == stored
            if is_stored or (table in dataset and is_quick):
                maps.append(ImageMap(f"{key}-{method}", f"{words} of {what}", str(table), method, is_stored))
    # a model without a classifier is asked for its embedding more than for its heads
    return sorted(maps, key=lambda each: (not each.stored, stored is None and each.table != "image_embedding"))


def routes(state: "AppState") -> list[Route]:
    """The route of the maps.

    Args:
        state: What the server's routes share.

    Returns:
        Routes for the application.
    """

    async def image_map(request: Request) -> Response:
        each = state.image_maps.find(request.path_params["map"])
        image = request.query_params.get("image")
        if image is None:
            return binary(("image", "xy"), await state.summaries.run(lambda: state.image_maps.positions(each)))
        upload = state.uploads.get(image)
        return binary(("xy",), await run_in_threadpool(state.image_maps.position, each, upload.arrays))

    return [Route("/api/maps/{map}", image_map)]
