"""What every export reads: a finished study, block by block, without the padding that the store has."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Shaped

from vitrail.analysis import BASE, analyses, measures, measures_named
from vitrail.data.files import some
from vitrail.data.images import ImageEntry
from vitrail.errors import MissingLibrary, UsageError
from vitrail.layer_summary import finite_mean, in_first_patches
from vitrail.study.plan import Plan
from vitrail.study.store import open_study, read_manifest, read_plan

__all__ = ["ExportSource", "import_library", "open_source"]

BLOCK_BYTES = 64 * 2**20
"""Of one array that is read at a time: an export takes the same memory however many images there are."""

THUMBNAIL = "thumbnail"

N_NAMED = 40
"""Arrays of a study that a message lists: more than most studies hold."""


@dataclass(frozen=True)
class ExportSource:
    """A finished study, as exports read it.

    Attributes:
        data: The arrays to write, without the thumbnails.
        everything: All arrays of the study.
        plan: Its plan.
        entries: Its images, in order.
    """

    data: xr.Dataset
    everything: xr.Dataset
    plan: Plan
    entries: Sequence[ImageEntry]

    @property
    def left_out(self) -> list[str]:
        """Arrays of the study that are not written."""
        return sorted(set(map(str, self.everything.data_vars)) - set(map(str, self.data.data_vars)))

    def class_names(self, classes: Shaped[np.ndarray, "image"]) -> list[str | None]:
        """The name of each class.

        Args:
            classes: Class ids; a negative one is none.

        Returns:
            Names, the number where the model has no names, None for no class.
        """
        names = self.plan.class_names
        return [
            None if each < 0 else names[each] if names and each < len(names) else str(each) for each in classes.tolist()
        ]

    def present(self, dims: Sequence[str]) -> Bool[np.ndarray, "*cells"]:
        """Which cells of an array the model has: heads, patches and hops that a layer lacks are padding in the store.

        Args:
            dims: Dimensions of the array, without `image`.

        Returns:
            False where there is only padding.
        """
        sizes = [self.data.sizes[name] for name in dims]
        cells = np.ones(sizes, dtype=bool)
        if "layer" not in dims:
            return cells
        patches = np.array([0 if grid is None else grid[0] * grid[1] for grid in self.plan.grids])
        hops = np.array([0 if grid is None else max(grid) for grid in self.plan.grids])
        counts = {"head": np.array(self.plan.n_heads), "patch": patches, "hop": hops}
        if patches.all():
            counts["token"] = patches + np.array(self.plan.prefixes)
        at = np.indices(sizes)
        layers = at[list(dims).index("layer")]
        for name, count in counts.items():
            if name in dims and len(count) == self.data.sizes["layer"]:
                cells &= at[list(dims).index(name)] < count[layers]
        return cells

    def blocks(self, names: Sequence[str]) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
        """Arrays in blocks of images.

        Args:
            names: Of arrays that have the dimension `image`.

        Yields:
            The images, and the values of each array.
        """
        arrays = {name: self.data[name].transpose("image", ...) for name in names}
        n_images = self.data.sizes["image"]
        bytes_an_image = max(1, sum(array.nbytes for array in arrays.values()) // max(1, n_images))
        step = max(1, BLOCK_BYTES // bytes_an_image)
        for start in range(0, n_images, step):
            rows = slice(start, min(start + step, n_images))
            yield rows, {name: array.isel(image=rows).to_numpy() for name, array in arrays.items()}

    def numbers_of_images(self) -> dict[str, Float[np.ndarray, "image"]]:
        """One number an image of every measure whose mean says something: not of x and y, which cancel.

        Returns:
            The measure itself where it has no other dimension, else `mean_NAME` over what the model has, lengths as
            `in_first_patches` gives them; where a measure has a baseline, `largest_loss_NAME` too: the cost of the
            change that costs most.
        """
        numbers: dict[str, np.ndarray] = {}
        for name, measure in measures().items():
            if name not in self.data or not measure.is_quantity or measure.several_kinds:
                continue
            array = self.data[name]
            if array.dims[0] != "image":
                continue
            dims = [str(each) for each in array.dims[1:]]
            cells = self.present(dims)
            means, lowest = [], []
            for rows, values in self.blocks([name]):
                block = in_first_patches(array.isel(image=rows).copy(data=values[name]), self.plan.grids).to_numpy()
                present = np.where(cells, block.astype(np.float64), np.nan).reshape(len(block), -1)
                means.append(finite_mean(present))
                lowest.append(np.where(np.isnan(present), np.inf, present).min(1))
            numbers[f"mean_{name}" if dims else name] = np.concatenate(means)
            if dims and measure.baseline in self.everything:
                loss = self.everything[measure.baseline].to_numpy().astype(np.float64) - np.concatenate(lowest)
                numbers[f"largest_loss_{name}"] = np.where(np.isfinite(loss), loss, np.nan)
        return numbers


def open_source(study: str | Path, names: str | Sequence[str] | None = None) -> ExportSource:
    """Opens a finished study for an export.

    Args:
        study: Its folder.
        names: Measures or analyses, as `--measures` takes them; None: all.

    Returns:
        The study.

    Raises:
        StudyError: The folder is no finished study.
        UsageError: A measure is unknown, or none of those named is in the study.
    """
    everything = open_study(study)
    data = everything.drop_vars(THUMBNAIL, errors="ignore")
    if names is not None:
        asked = {measure.name for measure in measures_named(names)}
        chosen = [name for name in data.data_vars if name in asked]
        base = {measure.name for measure in analyses()[BASE].measures}
        if not set(chosen) - base and asked - base:
            raise UsageError(
                f"{study} holds none of {some(sorted(asked - base))}. It holds "
                f"{some(sorted(map(str, data.data_vars)), N_NAMED)}."
            )
        data = data[chosen]
    return ExportSource(data, everything, read_plan(study), read_manifest(study).images)


def import_library(name: str, to: str, remedy: str) -> Any:
    """Imports the library of a format.

    Args:
        name: Of the module.
        to: The format that needs it.
        remedy: What installs it.

    Returns:
        The module.

    Raises:
        MissingLibrary: It is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingLibrary(
            f"An export to {to} needs {name}, which is not installed here: {remedy}.", name=name
        ) from error
