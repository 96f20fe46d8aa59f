"""Making the plan of a study from a model and its images."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

import vitrail
from vitrail.data import Manifest
from vitrail.measure import Measure
from vitrail.study.plan import Plan
from vitrail.vit.open import Vit

__all__ = ["make_plan"]

PART_IMAGES = 64
"""About how many images make a part: what an interruption can cost, and the chunk length of every array."""

PACKAGES = ("torch", "timm", "numpy", "xarray", "zarr", "pillow", "scikit-learn")
"""Those whose version can change a number or a byte."""

PATTERN_PACKAGES = ("openTSNE", "safetensors")
"""The same for studies of attention patterns."""


def make_plan(
    vit: Vit,
    manifest: Manifest,
    measures: Sequence[Measure],
    *,
    left_out: Mapping[str, str],
    options: Mapping[str, Any],
    batch_size: int,
    seed: int,
    threads: int,
) -> Plan:
    """The plan of studying `measures` of `vit` over the images of `manifest`."""
    blocks = vit.anatomy.blocks
    prefixes = {block.prefix for block in blocks}
    plan = Plan(
        model=vit.name,
        weight_digest=vit.weight_digest,
        n_classes=vit.n_classes,
        class_names=list(vit.class_names) if vit.class_names is not None else None,
        n_layers=vit.n_layers,
        n_heads=list(vit.n_heads),
        grid=list(vit.anatomy.grid) if vit.anatomy.grid else None,
        prefix=next(iter(prefixes)) if len(prefixes) == 1 else None,
        grids=[list(block.grid) if block.grid else None for block in blocks],
        prefixes=[block.prefix for block in blocks],
        class_token=vit.anatomy.class_token,
        preprocessing=asdict(vit.preprocessing),
        data_digest=manifest.digest,
        n_images=len(manifest.images),
        labels_from=_labels_from(vit, manifest),
        measures={measure.name: measure.version for measure in measures},
        left_out=dict(left_out),
        options=dict(options),
        precision=vit.precision,
        batch_size=batch_size,
        part_size=batch_size * max(1, round(PART_IMAGES / batch_size)),
        seed=seed,
        device=torch.device(vit.device).type,
        threads=threads,
        versions={"vitrail": vitrail.__version__, **_versions(measures)},
    )
    return Plan.from_json(plan.to_json())  # tuples become lists here, once, instead of at every comparison


def _versions(measures: Sequence[Measure]) -> dict[str, str]:
    fits = any(measure.derived for measure in measures)
    return {package: metadata.version(package) for package in (*PACKAGES, *(PATTERN_PACKAGES if fits else ()))}


def _labels_from(vit: Vit, manifest: Manifest) -> str:
    if any(entry.label is not None for entry in manifest.images):
        return manifest.labels_from
    if vit.n_classes is None:
        return f"no labels: {manifest.labels_from}"
    return f"the model's own top-1 prediction, as {manifest.labels_from}"
