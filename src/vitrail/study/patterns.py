"""Attention patterns of a finished study: two more passes over its images, and what is fitted between them.

The first pass fills the bounded sample; its models are stored whole, so a run that ends later fits nothing again. The
second encodes every map and stores the arrays. Both give the same bytes however often they were begun.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from vitrail.data import ImageSource, Manifest
from vitrail.heads.maps import MapSource
from vitrail.heads.pattern_maps import PatternGround, Pictures, pattern_ground, read_pictures
from vitrail.heads.patterns import (
    KINDS,
    PatternModel,
    Placing,
    SampleOfMaps,
    drawn,
    fit_patterns,
    held_out,
    shape_of,
)
from vitrail.measure import MEASURES
from vitrail.study.batches import loaded_batches
from vitrail.study.plan import Plan
from vitrail.study.progress import Progress
from vitrail.study.writing import StudyFolder
from vitrail.vit.attention import LayerAttention, Readers
from vitrail.vit.open import Vit

__all__ = ["Passes", "derive_patterns"]

Take = Callable[[int, int, Pictures], None]
"""(place of the batch's first image, layer, pictures)"""


def derive_patterns(vit: Vit, source: ImageSource, manifest: Manifest, study: StudyFolder, shown: Progress) -> None:
    """Fits and stores what the plan asks for of attention patterns, unless that is done."""
    wanted = [name for name in study.plan.measures if MEASURES[name].derived]
    if not wanted or not study.patterns_are_missing:
        return
    ground = pattern_ground(vit)
    kinds = [kind for kind in KINDS if any(name.startswith(f"pattern_{kind}_") for name in wanted)]
    passes = Passes(vit, source, manifest, study.plan, ground)
    plan, seed, held = study.plan, study.plan.seed, held_out(study.plan.n_images, study.plan.seed)
    missing = [kind for kind in kinds if not study.pattern_model(kind).is_file()]
    samples = [SampleOfMaps(shape_of(k, ground), drawn(k, ground, plan.n_heads, plan.n_images, seed)) for k in missing]
    if samples:
        passes.run([sample.take for sample in samples], shown.step("sampling patterns"))
    while samples:
        sample = samples.pop(0)  # its memory goes when it is fitted
        kind = sample.shape.kind
        model = fit_patterns(sample, ground, held, seed, shown.step(f"learning {kind} patterns"))
        study.write_pattern_model(kind, model.to_bytes())
    models = [PatternModel.load(study.pattern_model(kind)) for kind in kinds]
    placing = Placing(models, ground, plan.n_heads, plan.n_images)
    passes.run([placing.take], shown.step("reading patterns"))
    arrays = _arrays(placing, ground, shown.step("placing patterns"))
    of_clusters = {f"{kind}_cluster_map" for kind in kinds}
    arrays = {name: values for name, values in arrays.items() if name in wanted or name in of_clusters}
    study.write_patterns(arrays, _about(models, ground))


class Passes:
    """Plain passes over all images of a study, for readers of maps."""

    def __init__(self, vit: Vit, source: ImageSource, manifest: Manifest, plan: Plan, ground: PatternGround) -> None:
        self._vit, self._source, self._images, self._ground = vit, source, manifest.images, ground
        self._size = plan.batch_size
        self._maps = MapSource(torch.bfloat16 if plan.options.get("maps") == "bfloat16" else None)

    def run(self, takers: Sequence[Take], told: Callable[[int, int], None]) -> None:
        """Shows every map that takes part to all of `takers`; `told` hears how many images are done."""
        batches = [self._images[at : at + self._size] for at in range(0, len(self._images), self._size)]
        tap, first = self._vit.tap(), 0

        def read(attention: LayerAttention) -> None:
            for pictures in read_pictures(attention, self._ground, self._maps):
                for take in takers:
                    take(first, attention.layer, pictures)

        with loaded_batches(self._vit, self._source, batches) as loaded, torch.no_grad():
            for batch in loaded:
                tap.read(batch.prepared, Readers(attention=read))
                first += len(batch.entries)
                told(first, len(self._images))


def _arrays(placing: Placing, ground: PatternGround, told: Callable[[int, int], None]) -> dict[str, np.ndarray]:
    """Every array of patterns by its name."""
    arrays: dict[str, np.ndarray] = {"image_dependence": placing.image_dependence()}
    for done, (kind, model) in enumerate(placing.models.items()):
        told(done, len(placing.models))
        latents = placing.latents[kind]
        there = ~np.isnan(latents).any(-1)
        xy, cluster = model.map.place(latents[there])
        arrays[f"pattern_{kind}_xy"] = np.full((*there.shape, 2), np.nan, np.float32)
        arrays[f"pattern_{kind}_xy"][there] = xy
        arrays[f"pattern_{kind}_cluster"] = np.full(there.shape, -1, np.int32)
        arrays[f"pattern_{kind}_cluster"][there] = cluster
        means = placing.cluster_maps(kind)
        n_patches = ground.n_patches
        arrays[f"{kind}_cluster_map"] = means.reshape(-1, n_patches, n_patches) if kind == "patch" else means
        told(done + 1, len(placing.models))
    return arrays


def _about(models: Sequence[PatternModel], ground: PatternGround) -> dict[str, Any]:
    """What a reader of the arrays has to know: how they were made, and how well."""
    about: dict[str, Any] = {
        "grid": list(ground.grid),
        "note": ground.note,
        "layers": sorted(ground.grids),
        "refused": {str(layer): reason for layer, reason in ground.refused.items()},
    }
    for model in models:
        fit, coder = model.coder.fit, model.coder
        about[model.kind] = {
            "method": coder.method,
            "why": fit.why,
            "n_latents": coder.shape.n_latents,
            "autoencoder_error": _number(fit.autoencoder_error),
            "pca_error": _number(fit.pca_error),
            "n_train": fit.n_train,
            "n_held": fit.n_held,
            "n_clusters": model.map.n_clusters,
        }
    return about


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
