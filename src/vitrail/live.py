"""One image at a time through an open model, for the page and notebooks.

live = LiveModel(open_vit("timm:vit_tiny_patch16_224"))
live.attention(image, layer=3)        # the maps of one layer's heads
live.parts("tokens")                  # what the analysis of tokens has of one image, in parts,
live.look_part(image, part, patch=90) # each computed when it is asked for
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from threading import RLock
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Float32
from PIL import Image

from vitrail.analysis import Analysis, analyses, unavailable
from vitrail.data import PhotographLike, as_photograph, ids_of, image_digest
from vitrail.errors import Unsupported, UsageError
from vitrail.heads.regions import mode_edits, modes_offered
from vitrail.models.open import Vit, require_vit
from vitrail.models.token_grid import token_grids
from vitrail.one_image import LookPart, OneImage, parts_of, record_image
from vitrail.study.plan import ModelIdentity
from vitrail.study.planning import model_identity
from vitrail.tap.clone import ModuleState, WeightState
from vitrail.tap.layer_maps import LayerMaps
from vitrail.tap.tap import LayerAttention, Readers

__all__ = ["AnalysisParts", "LiveModel"]

MAX_RECORDED_IMAGES = 4
"""Images whose recorded pass is kept, so that the next layer or head of the same image starts in the middle."""


class AnalysisParts(NamedTuple):
    """What an analysis computes of one image.

    Attributes:
        names: of the arrays of each part, in the order in which they are best asked for.
        left_out: the reason by the name of each measure that this model does not have.
    """

    names: tuple[tuple[str, ...], ...]
    left_out: Mapping[str, str]


class LiveModel:
    """A model that computes measures of single images; any number of threads may call it, one at a time is served.

    An image that comes again is recognised by its pixels, as long as the model stays as it is. All numbers are
    exact; a study made with `importance="estimate"` holds estimates instead, and pruned heads are zero also where a
    study put their mean.
    """

    def __init__(self, vit: Vit, prototype: Float[np.ndarray, "feature"] | None = None) -> None:
        """Wrap an open model.

        Args:
            vit: The model.
            prototype: An embedding that patches of every image are compared with, as for `vitrail.look`.
        """
        require_vit(vit)
        self.vit = vit
        self.prototype = prototype
        self._lock = RLock()
        self._images: OrderedDict[str, OneImage] = OrderedDict()
        self._parts: dict[str, tuple[LookPart, ...]] = {}
        self._states = WeightState(vit.model), ModuleState(vit.model)

    @property
    def identity(self) -> ModelIdentity:
        """What tells the model from others, as a study's plan has it of its own."""
        return model_identity(self.vit)

    def attention(self, image: PhotographLike, layer: int) -> Float32[np.ndarray, "head token token"]:
        """Attention after the softmax of every head of a layer, over all its tokens.

        Windowed attention is put back on the image grid, zero between windows. Of a layer with several attention calls
        the heads of all that join the same tokens; NaN for the others.

        Args:
            image: Any size and mode, as `vitrail.data.as_photograph` takes it; prepared as the model asks.
            layer: Counted from 0.

        Returns:
            Weights [head, query token, key token]; rows sum to 1 where the layer has no windows.

        Raises:
            UsageError: For a layer that the model does not have.
            Unsupported: Where the layer has no map from tokens to the same tokens.
        """
        self._check_layer(layer)
        with self._lock:
            recorded, tap = self._record(image), self.vit.tap()
            maps = LayerMaps(tap, layer)
            tap.run_from(layer, recorded.replay, readers=Readers(attention=maps.read))
        return maps.joined().numpy()

    def head_maps(self, image: PhotographLike) -> Float32[np.ndarray, "layer head patch"]:
        """What every head gives each patch: the class token's attention, or without one the mean over all patches.

        Args:
            image: Any size and mode, as `vitrail.data.as_photograph` takes it; prepared as the model asks.

        Returns:
            Attention weights [layer, head, patch]; NaN for heads and patches that a layer lacks, and for layers whose
            maps lie on no grid.

        Raises:
            Unsupported: Where no layer has a map between the patches of one grid.
        """
        grids, refused = token_grids(self.vit)
        if not grids:
            reason = next(iter(refused.values()))
            raise Unsupported(f"{self.vit.name} has no layer with a map between patches of one grid: {reason}")
        shape = (self.vit.n_layers, max(self.vit.n_heads), max(grid.n_patches for grid in grids.values()))
        maps = np.full(shape, np.nan, np.float32)

        def read(attention: LayerAttention) -> None:
            tokens = grids.get((attention.layer, attention.call))
            if tokens is None:
                return
            weights = attention.weights_on_grid()[0].float()
            index = self.vit.anatomy.class_index(attention.layer)
            rows = weights[:, index] if index is not None else weights[:, tokens.n_prefix :].mean(1)
            maps[attention.layer, tokens.heads, : tokens.n_patches] = rows[:, tokens.n_prefix :].cpu().numpy()

        with self._lock, torch.no_grad():
            recorded, tap = self._record(image), self.vit.tap()
            tap.run_from(0, recorded.replay, readers=Readers(attention=read))
        return maps

    def modes(self, image: PhotographLike, layer: int, head: int) -> Float32[np.ndarray, "mode class"]:
        """Class probabilities with parts of one head's map set to zero (modes of `heads.regions`).

        Args:
            image: Any size and mode, as `vitrail.data.as_photograph` takes it.
            layer: Counted from 0.
            head: Counted from 0 within the layer.

        Returns:
            Probabilities [mode, class]: six rows where the layer has a class token; modes 1, 2, 4 without; modes 1 and
            2 where it has no map on a grid.

        Raises:
            UsageError: For a head that the model does not have.
            Unsupported: Without a classifier.
        """
        self._check_head(layer, head)
        if self.vit.n_classes is None:
            raise Unsupported(
                f"Probabilities were asked for of {self.vit.name}: {self.vit.task.without('a classifier')}. "
                "Its heads can be compared by head_output_shift or head_value_change, and the layer metrics."
            )
        anatomy = self.vit.anatomy
        modes = modes_offered(anatomy, layer, head)
        edits = mode_edits(anatomy, layer, head, modes[1:])
        with self._lock:
            recorded = self._record(image)
            rows = self.vit.tap().run_from(layer, recorded.replay, edits=edits, copies=len(modes) - 1)
        return self.vit.task.probabilities(torch.cat([recorded.logits, rows])).cpu().numpy()

    def parts(self, analysis: str) -> AnalysisParts:
        """What an analysis computes of one image, in parts that `look_part` takes.

        Args:
            analysis: The name of a registered analysis.

        Returns:
            The names of the arrays by part; what a study has of each image first, what is of one image only then.

        Raises:
            UsageError: There is no such analysis.
        """
        declared = _analysis(analysis)
        with self._lock:
            parts = self._parts_of(declared)
        measures = [measure.name for measure in declared.measures if not measure.derived]
        return AnalysisParts(tuple(part.names for part in parts), unavailable(self.vit, measures))

    def look_part(
        self,
        image: PhotographLike,
        analysis: str,
        part: Sequence[str],
        patch: int | None = None,
        channel: int | None = None,
        mask: np.ndarray | Image.Image | None = None,
    ) -> xr.Dataset:
        """Some arrays of one image, as `vitrail.look` has them.

        Args:
            image: Any size and mode, as `vitrail.data.as_photograph` takes it.
            analysis: The name of a registered analysis.
            part: Names of arrays that are computed together, one of `parts(analysis).names`.
            patch: The patch to look at, row by row on the first layer's grid; None for the one that the prediction
                rests on most.
            channel: The neuron to look at; None for the filter through which salient patches stand out most.
            mask: [row column] instance ids of the photograph's objects, an array or an image, as large as the
                photograph, 0 for background; None without any.

        Returns:
            The arrays with the attributes of their declarations, the image dimension of size 1. `attrs["left_out"]` has
            the reason by the name of each array that this model does not have.

        Raises:
            UsageError: There is no such analysis, part, patch or channel.
            DataError: The mask holds no instance ids, or has another size than the image.
        """
        with self._lock:
            together = next((each for each in self._parts_of(_analysis(analysis)) if each.names == tuple(part)), None)
            if together is None:
                raise UsageError(f"{analysis} computes no part {', '.join(part)} of an image.")
            one = self._record(image, mask)
            # the copy shares what was computed once, and has a patch of its own
            one = replace(one, asked_patch=self._place(patch), asked_channel=channel, left_out={})
            return together.compute(one)

    def what_if(self, image: PhotographLike, **changes: Any) -> xr.Dataset:
        """What the answer becomes if something is changed, as `vitrail.what_if.what_if`.

        Args:
            image: Any size and mode, as `vitrail.data.as_photograph` takes it.
            changes: The keyword arguments of `vitrail.what_if.what_if`.

        Returns:
            Its dataset.

        Raises:
            UsageError: A change has no meaning for this model.
            Unsupported: The model cannot be changed that way.
        """
        with self._lock:
            return self.vit.what_if(image, **changes)

    def _parts_of(self, analysis: Analysis) -> tuple[LookPart, ...]:
        self._forget_if_changed()
        if analysis.name not in self._parts:
            self._parts[analysis.name] = parts_of(self.vit, analysis)
        return self._parts[analysis.name]

    def _place(self, patch: int | None) -> tuple[int, int] | None:
        grid = self.vit.anatomy.blocks[0].grid
        if patch is None:
            return None
        if grid is None or not 0 <= patch < grid[0] * grid[1]:
            raise UsageError(f"Patch {patch} was asked for; the first layer's grid is {grid} (rows, columns).")
        return divmod(patch, grid[1])

    def _record(self, image: PhotographLike, mask: np.ndarray | Image.Image | None = None) -> OneImage:
        """The image with its plain pass, from memory if it is one of the last; with a mask it is another."""
        self._forget_if_changed()
        image = as_photograph(image)
        ids = None if mask is None else ids_of(mask, image.size)
        key = image_digest(image) + ("" if ids is None else image_digest(Image.fromarray(ids.astype(np.int32))))
        if key not in self._images:
            self._images[key] = record_image(self.vit, image, mask=ids, prototype=self.prototype)
        self._images.move_to_end(key)
        while len(self._images) > MAX_RECORDED_IMAGES:
            self._images.popitem(last=False)
        return self._images[key]

    def _forget_if_changed(self) -> None:
        model = self.vit.model
        if not all(state.is_of(model) for state in self._states):
            self._images.clear()
            self._parts.clear()
            self._states = WeightState(model), ModuleState(model)

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.vit.n_layers:
            raise UsageError(f"L{layer} was asked for; the model has L0 to L{self.vit.n_layers - 1}.")

    def _check_head(self, layer: int, head: int) -> None:
        self._check_layer(layer)
        n_heads = self.vit.n_heads[layer]
        if not 0 <= head < n_heads:
            raise UsageError(f"L{layer}H{head} was asked for; L{layer} has heads 0 to {n_heads - 1}.")


def _analysis(name: str) -> Analysis:
    if name not in analyses():
        raise UsageError(f"There is no analysis {name!r}; choose from {', '.join(analyses())}.")
    return analyses()[name]
