"""Making the plan of a study from a model and its images."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

import vitrail
from vitrail.analysis import in_order_of_declaration
from vitrail.data import LabelSource, Manifest
from vitrail.measure import Measure
from vitrail.models.open import Vit
from vitrail.study.plan import Plan
from vitrail.tokens.levels import layers_of_own_grid

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
    part_images: int | None = None,
) -> Plan:
    """Makes the plan of a study.

    Args:
        vit: The model.
        manifest: The images.
        measures: To be computed.
        left_out: Reason by name of each measure that the model cannot have.
        options: Of the analyses, those that differ from the default.
        batch_size: Images in a pass.
        seed: Of all that is random.
        threads: Of torch.
        part_images: About how many images make a part; None: 64.

    Returns:
        The plan, as it would be read back from its file.
    """
    blocks = vit.anatomy.blocks
    prefixes = {block.prefix for block in blocks}
    labels = _labels(vit, manifest)
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
        own_grid_layers=_own_grid_layers(vit, measures),
        class_token=vit.anatomy.class_token,
        preprocessing=asdict(vit.preprocessing),
        data_digest=manifest.digest,
        n_images=len(manifest.images),
        labels_from=_labels_from(labels, manifest),
        labels=labels.value,
        measures=in_order_of_declaration({measure.name: measure.version for measure in measures}),
        left_out=in_order_of_declaration(left_out),
        options=dict(sorted(options.items())),
        precision=vit.precision,
        batch_size=batch_size,
        part_size=batch_size * max(1, round((part_images or PART_IMAGES) / batch_size)),
        seed=seed,
        device=torch.device(vit.device).type,
        device_name=_device_name(vit),
        threads=threads,
        task=vit.task.kind,
        output=vit.read_output.output,
        weights_from=vit.weights_source,
        notes=[*vit.anatomy.outside, *vit.anatomy.notes],
        target=vit.task.target.name if vit.task.target is not None else None,
        versions={"vitrail": vitrail.__version__, **_versions(measures)},
    )
    return Plan.from_json(plan.to_json())  # tuples become lists here, once, instead of at every comparison


def _own_grid_layers(vit: Vit, measures: Sequence[Measure]) -> list[int] | None:
    return sorted(layers_of_own_grid(vit)) if any("grid_output" in each.needs for each in measures) else None


def _device_name(vit: Vit) -> str:
    """Of a GPU; empty otherwise."""
    return torch.cuda.get_device_name(vit.device) if torch.device(vit.device).type == "cuda" else ""


def _versions(measures: Sequence[Measure]) -> dict[str, str]:
    fits = any(measure.derived for measure in measures)
    return {package: metadata.version(package) for package in (*PACKAGES, *(PATTERN_PACKAGES if fits else ()))}


def _labels(vit: Vit, manifest: Manifest) -> LabelSource:
    if any(entry.label is not None for entry in manifest.images):
        return LabelSource.GIVEN
    return LabelSource.NONE if vit.n_classes is None else LabelSource.PREDICTED


def _labels_from(labels: LabelSource, manifest: Manifest) -> str:
    if labels is LabelSource.GIVEN:
        return manifest.labels_from
    if labels is LabelSource.NONE:
        return f"no labels: {manifest.labels_from}"
    return f"the model's own top-1 prediction, as {manifest.labels_from}"
