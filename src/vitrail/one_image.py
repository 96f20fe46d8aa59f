"""One image as data: every analysis of one photograph in one `xarray.Dataset`, as a study has them of many.

    look(vit, image)                     measures of all analyses, and what is computed of one image only
    look(vit, image)["relevance"]        with title, unit, source and limits, like the arrays of a study

    one = record_image(vit, image)       the same in parts, for whoever shows one part while the next is computed
    parts_of(vit, analyses()["tokens"])[0].compute(one)

Figures draw such a dataset, the page shows it, `vitrail look --save` writes it; it can be compared with a study.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from vitrail.analysis import (
    BASE,
    Analysis,
    Collector,
    TakesMasks,
    analyses,
    analyses_named,
    declaration,
    is_of_other_models,
    make_collectors,
    places,
    unavailable,
)
from vitrail.arguments import whole_number, whole_numbers
from vitrail.contract.outlook import require_finite
from vitrail.data import ImageEntry, Manifest, PhotographLike, as_photograph, ids_of, image_digest
from vitrail.dataset import MeasureDataset
from vitrail.errors import Unsupported, UsageError
from vitrail.measure import Measure
from vitrail.models.objects import in_view, object_shares
from vitrail.models.open import Vit, require_vit
from vitrail.models.task import Task
from vitrail.models.token_grid import pad_patches
from vitrail.study.ownership import remove_arrays
from vitrail.study.plan import N_TOP
from vitrail.study.planning import make_plan
from vitrail.tap.modes import plain_modes
from vitrail.tap.tap import Readers, Replay

__all__ = [
    "LookPart",
    "OneImage",
    "look",
    "measure_image",
    "missing_by_reason",
    "parts_of",
    "record_image",
    "save_look",
]


@dataclass(frozen=True, eq=False)
class OneImage:
    """One prepared image with its recorded plain pass, as `Analysis.look` is given it.

    Attributes:
        vit: the model.
        view: what the model sees of the photograph, resized and cropped.
        pixels: [1 channel row column], prepared for the model.
        replay: the plain pass, to go on from any layer.
        logits: [1 class], of the plain pass.
        measured: the arrays of the study's measures of this image, with the image dimension of size 1.
        asked_patch: row and column of the patch to look at, if one was asked for.
        asked_channel: the neuron to look at, if one was asked for.
        instance_ids: [row column] of the view, 0 for background; None without a mask.
        prototype: [feature] what relevance by `prototype_similarity` compares patches with; None without one.
        left_out: reasons by array name.
    """

    vit: Vit
    view: Image.Image
    pixels: Float[Tensor, "image channel row column"]
    replay: Replay
    logits: Float[Tensor, "image class"]
    measured: dict[str, np.ndarray]
    asked_patch: tuple[int, int] | None = None
    asked_channel: int | None = None
    instance_ids: Int[np.ndarray, "row column"] | None = None
    prototype: Float[np.ndarray, "feature"] | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    _computed: dict[str, Any] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the first layer's patches. Raises `Unsupported` where its tokens lie on no grid."""
        grid = self.vit.anatomy.blocks[0].grid
        if grid is None:
            raise Unsupported(f"The tokens of {self.vit.name} lie on no grid that could be found.")
        return grid

    @property
    def label(self) -> int:
        """The model's own prediction. Raises `Unsupported` without a classifier."""
        if self.vit.n_classes is None:
            raise Unsupported(f"{self.vit.name} has no classifier, so there is no prediction to explain.")
        return int(self.logits.argmax(-1)[0])

    @cached_property
    def patch(self) -> tuple[int, int]:
        """Row and column of the patch to look at: the one asked for, or the one that the prediction rests on most."""
        if self.asked_patch is not None:
            return self.asked_patch
        from vitrail.tokens.one_image import most_relevant_patch

        return most_relevant_patch(self)

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """Computes something that several arrays need, the first time it is asked for.

        Args:
            key: its name.
            compute: what computes it.

        Returns:
            What `compute` returned the first time.
        """
        if key not in self._computed:
            self._computed[key] = compute()
        return self._computed[key]

    def leave_out(self, names: Iterable[str], reason: object) -> None:
        """Says why arrays are not computed for this model.

        Args:
            names: of the arrays.
            reason: a sentence, or the error that has it.
        """
        self.left_out.update(dict.fromkeys(names, str(reason)))


class LookPart(NamedTuple):
    """Arrays of one image that are computed together.

    Attributes:
        names: of the arrays; those that the model turns out not to have are left out.
        compute: given the recorded image, the arrays as `look` has them; `attrs["left_out"]` has reasons by name.
    """

    names: tuple[str, ...]
    compute: Callable[[OneImage], xr.Dataset]


def parts_of(vit: Vit, analysis: Analysis, options: Mapping[str, str] | None = None) -> tuple[LookPart, ...]:
    """What an analysis computes of one image, in parts that can be computed one by one.

    Args:
        vit: the model.
        analysis: a registered analysis.
        options: values that differ from the default, by name.

    Returns:
        The parts that this model may have, in the order of the declarations: those of the study's measures first. Put
        together they are what `look` gives. `vitrail.analysis.unavailable` names the measures that it does not have.
    """
    names = [measure.name for measure in analysis.measures if not measure.derived]
    options = {} if options is None else options
    reasons = unavailable(vit, names, options)
    parts: list[LookPart] = []
    if analysis.name == BASE:
        present = tuple(name for name in (*names, "top_class", "top_probability") if name not in reasons)
        parts.append(LookPart(present, _base_part))
    for collector in make_collectors(vit, names, options):
        parts.append(LookPart(collector.measures, _collector_part(collector)))
    for together, compute in analysis.all_look_parts().items():
        parts.append(LookPart(together, _image_part(together, compute)))
    return tuple(parts)


@plain_modes()
@torch.no_grad()
def record_image(
    vit: Vit,
    image: PhotographLike,
    *,
    mask: np.ndarray | Image.Image | None = None,
    patch: Iterable[SupportsIndex] | None = None,
    channel: SupportsIndex | None = None,
    prototype: Float[np.ndarray, "feature"] | None = None,
) -> OneImage:
    """Passes one image through the model, for the parts that are computed from it.

    Args:
        vit: the model.
        image: the photograph, as `vitrail.data.as_photograph` takes it.
        mask: [row column] instance ids of its objects, an array or an image, as large as the photograph.
        patch: row and column of the patch to look at, as for `look`.
        channel: the neuron to look at, as for `look`.
        prototype: an embedding that patches are compared with, as for `look`.

    Returns:
        The image with its plain pass and without measures.

    Raises:
        UsageError: the patch is not on the grid, or the image is no photograph.
        DataError: the image is broken or its black and white are not defined; the mask holds no instance ids, or has
            another size than the image.
        ModelError: the model's answer has NaN or infinite numbers.
    """
    require_vit(vit)
    place, channel = _place(vit, patch), None if channel is None else whole_number("The channel", channel)
    image = as_photograph(image)
    ids = None if mask is None else in_view(ids_of(mask, image.size), vit.preprocessing)
    pixels = vit.prepare([image])
    replay, logits = vit.tap().record(pixels)
    require_finite(vit.name, logits)
    return OneImage(vit, vit.view(image), pixels, replay, logits, {}, place, channel, ids, prototype)


def _base_part(one: OneImage) -> xr.Dataset:
    masks = None if one.instance_ids is None else [one.instance_ids]
    return _dataset(one.vit, _outputs(one.vit, one.logits, masks)).assign_attrs(left_out={})


def _collector_part(collector: Collector) -> Callable[[OneImage], xr.Dataset]:
    @plain_modes()
    def compute(one: OneImage) -> xr.Dataset:
        masks = None if one.instance_ids is None else [one.instance_ids]
        arrays = _collect(one.vit, one.pixels, [collector], masks)[0]
        present, empty = _part_empty({name: arrays[name] for name in collector.measures})
        return _dataset(one.vit, present).assign_attrs(left_out=empty)

    return compute


def _image_part(
    names: tuple[str, ...], compute: Callable[[OneImage], Mapping[str, Any]]
) -> Callable[[OneImage], xr.Dataset]:
    @plain_modes()
    def compute_or_leave_out(one: OneImage) -> xr.Dataset:
        arrays = xr.Dataset()
        reasons = unavailable(one.vit, names, {} if one.instance_ids is None else {"masks": "given"})
        if len(reasons) == len(names):
            one.left_out.update(reasons)
        else:
            try:
                arrays = _dataset(one.vit, compute(one))
            except Unsupported as reason:
                one.leave_out(names, reason)
        return arrays.assign_attrs(left_out={name: one.left_out[name] for name in names if name in one.left_out})

    return compute_or_leave_out


@plain_modes()
def look(
    vit: Vit,
    image: PhotographLike,
    *,
    name: str = "image",
    measures: str | Sequence[str] | None = None,
    mask: np.ndarray | Image.Image | None = None,
    patch: Iterable[SupportsIndex] | None = None,
    channel: SupportsIndex | None = None,
    prototype: Float[np.ndarray, "feature"] | None = None,
    progress: Callable[[str], None] = lambda doing: None,
) -> xr.Dataset:
    """Computes every analysis of one image.

    Args:
        vit: the model.
        image: the photograph, as `vitrail.data.as_photograph` takes it: a picture, a path, an array.
        name: the id of the image in the dataset.
        measures: names of analyses; None for all.
        mask: [row column] instance ids of the photograph's objects, an array or an image, as large as the photograph, 0
            for background.
        patch: row and column of the patch to look at; None for the one that the prediction rests on most.
        channel: the neuron to look at; None for the filter through which salient patches stand out most.
        prototype: an embedding that patches are compared with too (relevance by `prototype_similarity`), as
            `vitrail.tokens.label_free.mean_embedding` makes it of a class or a folder; None: without.
        progress: told what is being computed.

    Returns:
        The arrays of a study with one image (dimension `image` of size 1), and the arrays of one image only, each with
        the attributes of its declaration. `attrs` hold the plan of a study of this image alone, as
        those of `open_study` do (with `left_out`: the reason by the name of each array that this model does not have),
        and `patch`: row and column of the patch that was looked at.

    Raises:
        UsageError: an analysis, the patch or the channel is not known, the prototype is none of this model's, or the
            image is no photograph.
        DataError: the image is broken or its black and white are not defined; the mask holds no instance ids, or has
            another size than the image.
        ModelError: the model's answer has NaN or infinite numbers.

    Example:
        >>> import vitrail
        >>> from vitrail.data.photographs import photographs
        >>> looked = vitrail.look(vitrail.open_vit("vitrail:photos"), photographs()["cat"], measures="heads")
        >>> looked["head_probability"].dims
        ('image', 'layer', 'head')
    """
    require_vit(vit)
    chosen = list(analyses().values()) if measures is None else [analyses()[BASE], *analyses_named(measures)]
    names = [name for analysis in chosen for name in analysis.measure_names]
    place, channel = _place(vit, patch), None if channel is None else whole_number("The channel", channel)
    image = as_photograph(image)
    ids = None if mask is None else in_view(ids_of(mask, image.size), vit.preprocessing)
    options = {} if mask is None else {"masks": "given"}
    reasons = unavailable(vit, names, options)
    progress("heads, patches and tokens")
    pixels = vit.prepare([image])
    arrays, replay, logits = measure_image(vit, pixels, names, None if ids is None else [ids])
    arrays, empty = _part_empty(arrays)
    one = OneImage(
        vit, vit.view(image), pixels, replay, logits, arrays, place, channel, ids, prototype, {**reasons, **empty}
    )
    dataset = _dataset(vit, arrays)
    for analysis in chosen:
        progress(analysis.title.lower())
        for together, compute in analysis.all_look_parts().items():
            dataset = _merge(dataset, _image_part(together, compute)(one))
    measured = [declaration(each) for each in names if each in arrays]
    attributes = _attributes(vit, image, one, name, measured, options)
    return dataset.assign_coords(image=np.array([name])).assign_attrs(attributes)


def _merge(dataset: xr.Dataset, part: xr.Dataset) -> xr.Dataset:
    """Joins arrays, padded along tokens and patches to the most that any has: layers return others than maps join."""
    for dim in ("token", "patch"):
        widest = max(each.sizes.get(dim, 0) for each in (dataset, part))
        if any(0 < each.sizes.get(dim, 0) < widest for each in (dataset, part)):
            pad = partial(_pad, dim, widest)
            dataset, part = dataset.map(pad, keep_attrs=True), part.map(pad, keep_attrs=True)
    return dataset.merge(part, compat="no_conflicts")


def _pad(dim: str, size: int, array: xr.DataArray) -> xr.DataArray:
    if dim not in array.dims:
        return array
    fill = np.nan if array.dtype.kind == "f" else 0
    return array.pad({dim: (0, size - array.sizes[dim])}, constant_values=fill, keep_attrs=True)


def _part_empty(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays that have a number, and why the others have none, as where other images are compared with."""
    empty = {name for name, each in arrays.items() if each.dtype.kind == "f" and not np.isfinite(each).any()}
    reasons = {name: f"it has no number of this image alone. {declaration(name).limits}" for name in empty}
    return {name: each for name, each in arrays.items() if name not in empty}, reasons


def missing_by_reason(looked: xr.Dataset, *, by_name: bool = False) -> dict[str, list[str]]:
    """What the model lacks, as a user would be told.

    Args:
        looked: one image, as `look` gives it.
        by_name: analyses were asked for by name, so that those of special models are missed too.

    Returns:
        Names of arrays by the reason why they are not there; without what needs a mask if none was given.
    """
    reasons: dict[str, list[str]] = {}
    for name, reason in looked.attrs["left_out"].items():
        measure = declaration(name)
        special = analyses()[measure.analysis].only_for and not by_name
        if "masks" not in measure.needs and not special and not is_of_other_models(name):
            reasons.setdefault(reason, []).append(name)
    return reasons


def save_look(looked: xr.Dataset, path: str | Path) -> Path:
    """Writes every array of one image.

    Args:
        looked: one image, as `look` gives it.
        path: a Zarr folder, which `xarray.open_zarr` reads; an earlier look is overwritten.

    Returns:
        The path.

    Raises:
        UsageError: there is something else.
        StudyError: somebody else's files lie among those of the earlier look, which then stays.
    """
    path = Path(path)
    if path.exists():
        file = path / "zarr.json"
        try:
            attributes = json.loads(file.read_text(encoding="utf-8"))["attributes"]
            ours = "data_digest" in attributes and attributes["n_images"] == 1  # what is made of a study has more
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise UsageError(f"{path} is no look of Vitrail's, and it is not overwritten; name another folder.")
    words = {name: each.astype(object) for name, each in looked.coords.items() if each.dtype.kind == "U"}
    beside = path.with_name(f".{path.name}.{os.getpid()}")  # half a look would be taken for somebody else's folder
    try:
        looked.assign_coords(words).to_zarr(beside, mode="w", consolidated=False)  # Zarr has no text of fixed length
        if path.exists():
            remove_arrays(path)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return path


def measure_image(
    vit: Vit,
    pixels: Float[Tensor, "image channel row column"],
    names: Sequence[str],
    masks: Sequence[Int[np.ndarray, "_ _"]] | None = None,
) -> tuple[dict[str, np.ndarray], Replay, Float[Tensor, "image class"]]:
    """Computes a study's measures of prepared images in one recorded pass and what the collectors add to it.

    Args:
        vit: the model.
        pixels: prepared images [image channel row column].
        names: of measures; those that the model lacks are passed over.
        masks: [row column] instance ids of each image, resized and cropped as the image.

    Returns:
        The arrays by name, led by the image dimension, labels being the model's own top-1; the recorded pass; and its
        logits [image class].
    """
    options = {} if masks is None else {"masks": "given"}
    names = [name for name in names if not declaration(name).derived]
    return _collect(vit, pixels, make_collectors(vit, names, options), masks)


@torch.no_grad()
def _collect(
    vit: Vit,
    pixels: Float[Tensor, "image channel row column"],
    collectors: Sequence[Collector],
    masks: Sequence[Int[np.ndarray, "_ _"]] | None,
) -> tuple[dict[str, np.ndarray], Replay, Float[Tensor, "image class"]]:
    """What `measure_image` returns, by these collectors."""
    for collector in collectors:
        if masks is not None and isinstance(collector, TakesMasks):
            collector.take_masks(masks)
    tap = vit.tap()
    replay, logits = tap.record(pixels, Readers.join([collector.readers() for collector in collectors]))
    require_finite(vit.name, logits)
    arrays = _outputs(vit, logits, masks)
    for collector in collectors:
        arrays |= collector.finish(tap, replay, logits, arrays["label"].astype(np.int64))
    return pad_patches(vit, arrays), replay, logits


def _outputs(
    vit: Vit, logits: Float[Tensor, "image class"], masks: Sequence[Int[np.ndarray, "_ _"]] | None
) -> dict[str, np.ndarray]:
    """What the model says of each image, the label being its own prediction, and what objects cover of each patch."""
    if vit.n_classes is not None:
        arrays = _predictions(vit.task, logits)
    else:
        arrays = {"label": np.full(len(logits), -1, dtype=np.int32)}
    if vit.task.has_value:
        arrays["value"] = vit.task.value(logits).cpu().numpy()
    first = vit.anatomy.blocks[0]
    if masks is not None and first.grid is not None:
        arrays["object_share"] = object_shares(masks, first.grid, first.patch_step)
    return arrays


def _predictions(task: Task, logits: Float[Tensor, "image class"]) -> dict[str, np.ndarray]:
    probabilities = task.probabilities(logits).cpu().numpy()
    best = np.argsort(-logits.detach().float().cpu().numpy(), axis=-1, kind="stable")[:, :N_TOP]
    return {
        "label": best[:, 0].astype(np.int32),
        "prediction": best[:, 0].astype(np.int32),
        "probability": np.take_along_axis(probabilities, best[:, :1], axis=-1)[:, 0],
        "top_class": best.astype(np.int32),
        "top_probability": np.take_along_axis(probabilities, best, axis=-1),
    }


def _place(vit: Vit, patch: Iterable[SupportsIndex] | None) -> tuple[int, int] | None:
    """Row and column of the patch to look at, if one was asked for."""
    if patch is None:
        return None
    row, column = whole_numbers("The patch", patch, 2)
    grid = vit.anatomy.blocks[0].grid
    if grid is None or not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise UsageError(
            f"The patch at row {row}, column {column} was asked for; this model's grid is {grid} (rows, columns)."
        )
    return row, column


def _dataset(vit: Vit, arrays: Mapping[str, np.ndarray | xr.DataArray]) -> xr.Dataset:
    """The arrays with dimensions, attributes and names of places along dimensions, as their declarations have them."""
    variables = {}
    for name, values in arrays.items():
        if isinstance(values, xr.DataArray):  # with coordinates of its own
            variables[name] = values.assign_attrs(declaration(name).attributes())
        else:
            measure = declaration(name)
            variables[name] = xr.DataArray(values, dims=measure.dims, attrs=measure.attributes())
    dataset = MeasureDataset(variables)
    return dataset.assign_coords(places(dataset, {"grids": [block.grid for block in vit.anatomy.blocks]}))


def _attributes(
    vit: Vit, image: Image.Image, one: OneImage, name: str, measures: Sequence[Measure], options: Mapping[str, str]
) -> dict[str, object]:
    """The plan of a study of this image alone, as `open_study` gives it, and what was looked at."""
    entry = ImageEntry(name, None, None, len(image.tobytes()), image_digest(image))
    manifest = Manifest(None, "one image was looked at", (entry,), ())
    plan = make_plan(
        vit,
        manifest,
        measures,
        left_out=one.left_out,
        options=options,
        batch_size=1,
        seed=0,
        threads=torch.get_num_threads(),
    )
    try:
        patch: list[int] | None = list(one.patch)
    except Unsupported:
        patch = None
    return {**json.loads(plan.to_json()), "missing_images": 0, "patch": patch}
