"""One image at a time through an open model: what the page and `vitrail look` compute on the spot.

live = Live(open_vit("timm:vit_tiny_patch16_224"))
live.attention(image, layer=3)        # the maps of one layer's heads
live.look(image)                      # every measure that a study would hold for this image
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Float32, Int
from PIL import Image
from torch import Tensor

from vitrail.errors import Unsupported, UsageError
from vitrail.figures.heads import refuse_formats
from vitrail.figures.look import LookedAt, look_at
from vitrail.figures.style import save
from vitrail.heads.collect import Collector
from vitrail.heads.regions import mode_edit, modes_offered
from vitrail.measure import MEASURES, ROOMS
from vitrail.neuron_look import CloseUp, neuron_figures
from vitrail.study import rooms
from vitrail.study.store import N_TOP, declared
from vitrail.vit.open import Vit
from vitrail.vit.tap import LayerAttention, Readers, Replay

__all__ = ["Live", "look_figures"]

OF_ONE_IMAGE = tuple(name for name in MEASURES if name not in {*ROOMS["regions"], *ROOMS["windows"]})
"""What `look` gives unless told otherwise; `Live.modes` has the regions of a head, on demand."""

REMEMBERED = 4
"""Images whose recorded pass is kept, so that the next layer or head of the same image starts in the middle."""


@dataclass(eq=False)
class _Seen:
    """One image's plain pass."""

    replay: Replay
    logits: Float[Tensor, "image class"]


class Live:
    """A model that answers questions on single images; any number of threads may ask, one at a time is served.

    The same image asked about again is recognised by its pixels. All numbers are exact; a study made with
    `importance="estimate"` holds estimates instead, and pruned heads are zero also where a study put their mean.
    """

    def __init__(self, vit: Vit, measures: Sequence[str] = OF_ONE_IMAGE) -> None:
        self.vit = vit
        self._measures = tuple(measures)
        self._lock = RLock()
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        self._collectors: list[Collector] | None = None

    def attention(self, image: Image.Image, layer: int) -> Float32[np.ndarray, "head token token"]:
        """Attention after the softmax of every head of a layer (its first attention call), over all its tokens.

        Windowed attention is put back on the image grid, zero between windows. Raises `UsageError` for a layer that is
        not there, `Unsupported` where the layer has no map from tokens to the same tokens.
        """
        self._check_layer(layer)
        maps: list[Tensor] = []

        def read(attention: LayerAttention) -> None:
            if attention.layer == layer and attention.call == 0:
                maps.append(attention.weights_on_grid()[0])

        with self._lock:
            seen, tap = self._recorded(image), self.vit.tap()
            if self.vit.anatomy.blocks[layer].kind == "window":
                tap.window_slots(layer)  # measured by passes of its own, which cannot run inside a reader
            tap.run_from(layer, seen.replay, readers=Readers(attention=read))
        if maps[0].shape[-1] != maps[0].shape[-2]:
            raise Unsupported(
                f"L{layer} has {maps[0].shape[-2]} queries and {maps[0].shape[-1]} keys (kind "
                f"{self.vit.anatomy.blocks[layer].kind!r}), so its map does not join tokens with the same tokens. "
                "Its heads can still be pruned."
            )
        return maps[0].float().cpu().numpy()

    def modes(self, image: Image.Image, layer: int, head: int) -> Float32[np.ndarray, "mode class"]:
        """Class probabilities with parts of one head's map set to zero, a row per mode that this layer has.

        Six rows where it has a class token; modes 1, 2, 4 without; modes 1 and 2 where it has no map on a grid
        (`heads.regions`). Raises `UsageError` for a head that is not there, `Unsupported` without a classifier.
        """
        self._check_head(layer, head)
        if self.vit.n_classes is None:
            raise Unsupported(
                f"Probabilities were asked for; {self.vit.name} has no classifier, its output is a feature vector. "
                "Its heads can be compared by head_divergence and the layer metrics."
            )
        anatomy = self.vit.anatomy
        modes = modes_offered(anatomy, layer)
        edits = [mode_edit(anatomy, layer, head, mode, copy) for copy, mode in enumerate(modes[1:])]
        with self._lock:
            seen = self._recorded(image)
            rows = self.vit.tap().run_from(layer, seen.replay, edits=edits, copies=len(edits))
        return _probabilities(torch.cat([seen.logits, rows]))

    def look(self, image: Image.Image) -> dict[str, np.ndarray]:
        """Every measure that was asked for and that this model has, for one image, by the names of a study; without the
        image dimension.

        The label is the model's own top-1. With a classifier `probabilities` [class] comes along. Takes one recorded
        pass and the exact sweep over all heads.
        """
        with self._lock:
            if self._collectors is None:
                self._collectors = rooms.collectors(self.vit, self._measures)
            tap, collectors = self.vit.tap(), self._collectors
            joined = Readers.joined([collector.readers() for collector in collectors])
            replay, logits = tap.record(self.vit.prepare([image]), joined)
            self._remember(_digest(image), _Seen(replay, logits))
            with_classes = self.vit.n_classes is not None
            label = logits.argmax(-1).cpu().numpy().astype(np.int64) if with_classes else np.array([-1])
            arrays = _answers(logits) if with_classes else {"label": label.astype(np.int32)}
            for collector in collectors:
                arrays |= collector.finish(tap, replay, logits, label)
        return {name: np.asarray(values[0]) for name, values in arrays.items()}

    def study_of(self, image: Image.Image, name: str = "image") -> xr.Dataset:
        """What `look` gives, as a study of one image: the same arrays, attributes and plan as `open_study` gives."""
        arrays = {}
        for key, values in self.look(image).items():
            if key != "probabilities":
                measure = declared(key)
                arrays[key] = xr.DataArray(values[None], dims=measure.dims, attrs=measure.attributes())
        anatomy = self.vit.anatomy
        return xr.Dataset(
            arrays,
            coords={"image": np.array([name])},
            attrs={
                "model": self.vit.name,
                "n_heads": list(self.vit.n_heads),
                "grids": [None if block.grid is None else list(block.grid) for block in anatomy.blocks],
                "prefixes": [block.prefix for block in anatomy.blocks],
                "class_token": anatomy.class_token,
                "class_names": None if self.vit.class_names is None else list(self.vit.class_names),
                "labels_from": "the model's own top-1",
            },
        )

    def _recorded(self, image: Image.Image) -> _Seen:
        """The plain pass of an image, from memory if it is one of the last."""
        key = _digest(image)
        if key not in self._seen:
            self._remember(key, _Seen(*self.vit.tap().record(self.vit.prepare([image]))))
        self._seen.move_to_end(key)
        return self._seen[key]

    def _remember(self, key: str, seen: _Seen) -> None:
        self._seen[key] = seen
        self._seen.move_to_end(key)
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.vit.n_layers:
            raise UsageError(f"L{layer} was asked for; the model has L0 to L{self.vit.n_layers - 1}.")

    def _check_head(self, layer: int, head: int) -> None:
        self._check_layer(layer)
        n_heads = self.vit.n_heads[layer]
        if not 0 <= head < n_heads:
            raise UsageError(f"L{layer}H{head} was asked for; L{layer} has heads 0 to {n_heads - 1}.")


def look_figures(
    vit: Vit,
    image: Image.Image,
    folder: str | Path,
    formats: Sequence[str] = ("png",),
    name: str = "image",
    *,
    of_rooms: Sequence[str] = tuple(ROOMS),
    mask: Int[np.ndarray, "row column"] | None = None,
    patch: tuple[int, int] | None = None,
    channel: int | None = None,
    step: Callable[[str], None] = lambda _: None,
    left_out: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Draws what the model does with one image into `folder`; the files written.

    heads      an overview, importance as map and line, entropy by layer, strength of the most important head, and where
               that head looks from the class token and from the patch that the other tokens look at most
    patches    windows of `patch` (row, column; by default the one the answer rests on most) and the sum of all windows,
               tendencies as arrows and flow, patches that everybody keeps
    windows    of a WinT: the windows of `patch` that each head predicts in each layer, and their sum over layers
    neurons    tokens as colours, lengths and likeness, relevance with deletion and insertion, filters, views of one
               neuron (`channel`), what survives lost and displaced patches; t-SNE by object with a `mask` of ids

    `name` stands in the titles. `step` is told what is being done, `left_out` what this model does not have, and why.
    Raises `UsageError` for an unknown format or room, or a patch or channel that is not there; `DataError` for a mask
    of another size.
    """
    refuse_formats(formats)
    measures = _measures_of(of_rooms)
    close = CloseUp.of(vit, image, name, patch, channel, mask)
    reasons: dict[str, list[str]] = {}
    for measure, why in rooms.skipped(vit, measures).items():
        reasons.setdefault(why, []).append(measure)
    for why, names in reasons.items():
        expected = ("grouping_", "predicted_") if len(of_rooms) > 1 else ("grouping_",)
        if not all(each.startswith(expected) for each in names):  # come with a mask, and with a WinT
            left_out(f"{', '.join(names)}: {why}")
    live = Live(vit, measures)
    step("measuring")
    on_grid = vit.anatomy.blocks[0].grid is not None and "patches" in of_rooms
    seen = LookedAt(
        live.study_of(image, name), close.view, lambda layer: live.attention(image, layer),
        close.patch if on_grid else None,
    )  # fmt: skip
    step("drawing")
    written = look_at(seen, folder, formats)
    for stem, draw in neuron_figures(close) if "neurons" in of_rooms else ():
        step(stem)
        try:
            figure = draw()
        except Unsupported as reason:
            left_out(f"{stem}: {reason}")
            continue
        written += [save(figure, Path(folder) / f"{stem}.{kind}") for kind in formats]
    return written


def _measures_of(of_rooms: Sequence[str]) -> tuple[str, ...]:
    unknown = [room for room in of_rooms if room not in ROOMS]
    if unknown or not of_rooms:
        raise UsageError(f"There is no room {', '.join(unknown) or 'asked for'}; choose from {', '.join(ROOMS)}.")
    base = [name for name, measure in MEASURES.items() if measure.room == "base"]
    return (*base, *(name for room in of_rooms for name in ROOMS[room]))


def _answers(logits: Float[Tensor, "image class"]) -> dict[str, np.ndarray]:
    probabilities = _probabilities(logits)
    best = np.argsort(-logits.detach().float().cpu().numpy(), axis=-1, kind="stable")[:, :N_TOP]
    return {
        "label": best[:, 0].astype(np.int32),
        "prediction": best[:, 0].astype(np.int32),
        "probability": np.take_along_axis(probabilities, best[:, :1], axis=-1)[:, 0],
        "top_class": best.astype(np.int32),
        "top_probability": np.take_along_axis(probabilities, best, axis=-1),
        "probabilities": probabilities,
    }


def _probabilities(logits: Float[Tensor, "row class"]) -> Float32[np.ndarray, "row class"]:
    return logits.detach().float().softmax(dim=-1).cpu().numpy()


def _digest(image: Image.Image) -> str:
    return hashlib.blake2b(f"{image.mode} {image.size} ".encode() + image.tobytes(), digest_size=16).hexdigest()
