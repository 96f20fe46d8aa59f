"""Making the plan of a study from a model and its images."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from itertools import pairwise
from typing import Any

import numpy as np
import torch

import vitrail
from vitrail.analysis import in_order_of_declaration
from vitrail.data import LabelSource, Manifest
from vitrail.errors import UsageError
from vitrail.measure import Measure
from vitrail.models.noise import noise_images
from vitrail.models.open import Vit
from vitrail.models.task import Target
from vitrail.study.plan import PART_IMAGES, ModelIdentity, Plan, images_in_part
from vitrail.tap.clone import CANNOT_RUN
from vitrail.tokens.levels import layers_of_own_grid

__all__ = ["make_plan", "model_identity"]

_NUMBER = re.compile(r"\d+")

PACKAGES = ("torch", "timm", "numpy", "xarray", "zarr", "pillow", "scikit-learn")
"""Those whose version can change a number or a byte."""

PATTERN_PACKAGES = ("openTSNE", "safetensors")
"""The same for studies of attention patterns."""


N_OUTPUTS = 8
"""Made-up outputs that tell a target from another."""


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
    numbers, n_blocks = _block_numbers(vit)
    plan = Plan(
        model=vit.name,
        n_classes=vit.n_classes,
        class_names=list(vit.class_names) if vit.class_names is not None else None,
        n_layers=vit.n_layers,
        n_heads=list(vit.n_heads),
        grid=list(vit.anatomy.grid) if vit.anatomy.grid else None,
        prefix=next(iter(prefixes)) if len(prefixes) == 1 else None,
        grids=[list(block.grid) if block.grid else None for block in blocks],
        prefixes=[block.prefix for block in blocks],
        patch_steps=[list(block.patch_step) if block.patch_step else None for block in blocks],
        block_numbers=numbers,
        n_blocks=n_blocks,
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
        part_size=images_in_part(batch_size, part_images or PART_IMAGES),
        seed=seed,
        device=torch.device(vit.device).type,
        device_name=_device_name(vit),
        threads=threads,
        task=vit.task.kind,
        output=vit.read_output.output,
        weights_from=vit.weights_source,
        notes=[*vit.anatomy.outside, *vit.anatomy.notes],
        **asdict(model_identity(vit)),
        versions={"vitrail": vitrail.__version__, **_versions(measures)},
    )
    return Plan.from_json(plan.to_json())  # tuples become lists here, once, instead of at every comparison


def _block_numbers(vit: Vit) -> tuple[list[int], int] | tuple[None, None]:
    """Which block each layer is, and how many there are: modules whose paths are those of layers but for the numbers.

    Nothing where they do not run in the order that the model lists them in, or one is several layers.
    """
    paths = [block.path for block in vit.anatomy.blocks]
    forms = {_NUMBER.sub("*", path) for path in paths}
    listed = [path for path, _ in vit.model.named_modules() if _NUMBER.sub("*", path) in forms]
    numbers = [listed.index(path) for path in paths]
    return (numbers, len(listed)) if all(one < two for one, two in pairwise(numbers)) else (None, None)


def model_identity(vit: Vit) -> ModelIdentity:
    """What tells a model from others of its name.

    Args:
        vit: The model.

    Returns:
        Digests, what its target gives for the same outputs every time, and numbers of its buffers.
    """
    target = vit.task.target
    return ModelIdentity(
        vit.weight_digest,
        vit.buffer_digest,
        None if target is None else target.name,
        None if target is None else _target_values(vit, target),
        vit.buffer_values,
    )


def _target_values(vit: Vit, target: Target) -> list[float] | None:
    """A target's values of made-up outputs of this model's shape; where it takes none, of the outputs of noise.

    None where it takes neither, as it may be a function of what only photographs give.
    """
    of_noise = vit.logits(noise_images(vit, 2))
    made_up = np.random.default_rng(0).standard_normal((N_OUTPUTS, *of_noise.shape[1:]))
    for output in (torch.as_tensor(made_up).to(of_noise), of_noise):
        try:
            with torch.no_grad():
                values = target(output)
        except (*CANNOT_RUN, UsageError):
            continue
        return [float(f"{value:.6g}") for value in values.tolist()]
    return None


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
