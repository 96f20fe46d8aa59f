"""Attention patterns of a finished study: two more passes over its images, and what is fitted between them.

The first pass fills the bounded sample; its models are stored whole, so a run that ends later fits nothing again. The
second encodes every map and stores the arrays. Both give the same bytes however often they were begun.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from vitrail.analysis import measures
from vitrail.data import ImageSource, Manifest
from vitrail.models.open import Vit
from vitrail.patterns.maps import ComparableLayers, PatternMaps, comparable_layers, read_pattern_maps
from vitrail.patterns.model import (
    KINDS,
    MapSample,
    PatternModel,
    PatternStatistics,
    coder_shape,
    draw_held_out,
    draw_sample,
    fit_patterns,
)
from vitrail.study.batches import StudyRun, load_batches
from vitrail.study.plan import Plan
from vitrail.tap.attention import LayerAttention, Readers
from vitrail.tap.maps import MapSource

__all__ = ["Passes", "derive_patterns"]

AddMaps = Callable[[int, int, PatternMaps], None]
"""Called with the position of the batch's first image, the layer, and its maps."""


def derive_patterns(run: StudyRun) -> None:
    """Fits and stores what the plan asks for of attention patterns, unless that is done.

    Args:
        run: the study, all of whose parts are complete.
    """
    vit, source, manifest, study, bars = run.vit, run.source, run.manifest, run.folder, run.progress
    declared = [measure for name, measure in measures().items() if name in study.plan.measures]
    names = [measure.name for measure in declared if measure.derived and measure.analysis == "patterns"]
    if not names or not study.patterns_are_missing:
        return
    layers = comparable_layers(vit)
    kinds = [kind for kind in KINDS if any(name.startswith(f"pattern_{kind}_") for name in names)]
    passes = Passes(vit, source, manifest, study.plan, layers)
    plan, seed, is_held_out = study.plan, study.plan.seed, draw_held_out(study.plan.n_images, study.plan.seed)
    missing = [kind for kind in kinds if not study.pattern_model_file(kind).is_file()]
    samples = [
        MapSample(coder_shape(k, layers), draw_sample(k, layers, plan.n_heads, plan.n_images, seed)) for k in missing
    ]
    if samples:
        passes.run([sample.add for sample in samples], bars.step("sampling patterns"))
    while samples:
        sample = samples.pop(0)  # its memory goes when it is fitted
        kind = sample.shape.kind
        model = fit_patterns(sample, layers, is_held_out, seed, bars.step(f"learning {kind} patterns"))
        study.write_pattern_model(kind, model.to_bytes())
    models = [PatternModel.load(study.pattern_model_file(kind)) for kind in kinds]
    placing = PatternStatistics(models, layers, plan.n_heads, plan.n_images)
    passes.run([placing.add], bars.step("reading patterns"))
    arrays = _arrays(placing, layers, bars.step("placing patterns"))
    of_clusters = {f"{kind}_cluster_map" for kind in kinds}
    arrays = {name: values for name, values in arrays.items() if name in names or name in of_clusters}
    study.write_patterns(arrays, _about(models, layers))


class Passes:
    """Plain passes over all images of a study, for readers of maps.

    Args:
        vit: The model.
        source: What loads the images.
        manifest: The images.
        plan: Of the study.
        layers: The layers that take part.
    """

    def __init__(self, vit: Vit, source: ImageSource, manifest: Manifest, plan: Plan, layers: ComparableLayers) -> None:
        self._vit, self._source, self._images, self._layers = vit, source, manifest.images, layers
        self._size = plan.batch_size
        self._maps = MapSource(torch.bfloat16 if plan.options.get("maps") == "bfloat16" else None)

    def run(self, readers: Sequence[AddMaps], report: Callable[[int, int], None]) -> None:
        """Hands every map that takes part to all readers, in one pass over the images.

        Args:
            readers: Called for each piece of maps.
            report: Called with the images done, and all of them.
        """
        batches = [self._images[at : at + self._size] for at in range(0, len(self._images), self._size)]
        tap, first = self._vit.tap(), 0

        def read(attention: LayerAttention) -> None:
            for maps in read_pattern_maps(attention, self._layers, self._maps):
                for add in readers:
                    add(first, attention.layer, maps)

        with load_batches(self._vit, self._source, batches) as loaded, torch.no_grad():
            for batch in loaded:
                tap.read(batch.prepared, Readers(attention=read))
                first += len(batch.entries)
                report(first, len(self._images))


def _arrays(
    placing: PatternStatistics, layers: ComparableLayers, report: Callable[[int, int], None]
) -> dict[str, np.ndarray]:
    """Every array of patterns by its name."""
    arrays: dict[str, np.ndarray] = {"image_dependence": placing.image_dependence()}
    for done, (kind, model) in enumerate(placing.models.items()):
        report(done, len(placing.models))
        latents = placing.latents[kind]
        present = ~np.isnan(latents).any(-1)
        xy, cluster = model.layout.place(latents[present])
        arrays[f"pattern_{kind}_xy"] = np.full((*present.shape, 2), np.nan, np.float32)
        arrays[f"pattern_{kind}_xy"][present] = xy
        arrays[f"pattern_{kind}_cluster"] = np.full(present.shape, -1, np.int32)
        arrays[f"pattern_{kind}_cluster"][present] = cluster
        means = placing.cluster_maps(kind)
        n_patches = layers.n_patches
        arrays[f"{kind}_cluster_map"] = means.reshape(-1, n_patches, n_patches) if kind == "patch" else means
        report(done + 1, len(placing.models))
    return arrays


def _about(models: Sequence[PatternModel], layers: ComparableLayers) -> dict[str, Any]:
    """What a reader of the arrays has to know: how they were made, and how well."""
    about: dict[str, Any] = {
        "grid": list(layers.grid),
        "note": layers.note,
        "layers": sorted(layers.grids),
        "refused": {str(layer): reason for layer, reason in layers.refused.items()},
    }
    for model in models:
        fit, coder = model.coder.fit, model.coder
        about[model.kind] = {
            "method": coder.method,
            "why": fit.why,
            "n_latents": coder.shape.n_latents,
            "autoencoder_error": _number(fit.autoencoder_error),
            "pca_error": _number(fit.pca_error),
            "gain": [_number(fit.gain_low), _number(fit.gain_high)],
            "n_train": fit.n_train,
            "n_held": fit.n_held,
            "n_clusters": model.layout.n_clusters,
        }
    return about


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
