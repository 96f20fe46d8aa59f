"""The images that two studies share, and what else they have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Bool, Int

from vitrail.analysis import all_options
from vitrail.data import LabelSource, Manifest
from vitrail.errors import UsageError
from vitrail.study.plan import Plan, same_buffers
from vitrail.study.store import open_study, read_manifest, read_plan

__all__ = ["LayerPairs", "Pair", "StudySide", "describe_labels", "open_pair", "refuse_same_folder"]

MOST_IMAGES = 10_000
"""More paired images than this are thinned evenly: intervals shrink with the root of the number, and resampling more
takes minutes a measure."""


@dataclass(frozen=True, eq=False)
class StudySide:
    """One of the two studies.

    Attributes:
        folder: Where it lies.
        data: Its arrays.
        plan: Its plan.
        manifest: Its list of images.
        rows: Positions of the paired images, in the order of the first study.
    """

    folder: Path
    data: xr.Dataset
    plan: Plan
    manifest: Manifest
    rows: Int[np.ndarray, "image"]

    def option(self, name: str) -> Any:
        """The value that an option had.

        Args:
            name: Of the option.

        Returns:
            The plan's value, or the default.
        """
        options = all_options()
        return self.plan.options.get(name, options[name].default if name in options else None)


class LayerPairs(NamedTuple):
    """Layers of two models that are the same block.

    Attributes:
        a, b: Their indices in each model.
        depths: Where they lie between input and output, 0 to 1.
    """

    a: list[int]
    b: list[int]
    depths: list[float]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two studies joined by their images.

    Attributes:
        a, b: The studies; differences are b less a.
        n_shared: Images that both have; more than are compared where they were thinned.
        label_reason: Why measures of the label cannot be compared; empty where they can.
    """

    a: StudySide
    b: StudySide
    n_shared: int
    label_reason: str

    @property
    def same_heads(self) -> bool:
        """Both models have the same layers, with the same number of heads in each."""
        return self.a.plan.n_heads == self.b.plan.n_heads and self.a.plan.depths == self.b.plan.depths

    @property
    def same_layers(self) -> LayerPairs | None:
        """The layers of both models that are the same block; None where the models have other numbers of blocks or no
        block with attention in common."""
        a, b = self.a.plan, self.b.plan
        if (a.n_blocks or a.n_layers) != (b.n_blocks or b.n_layers):
            return None
        both = [depth for depth in a.depths if depth in b.depths]
        if not both:
            return None
        return LayerPairs([a.depths.index(depth) for depth in both], [b.depths.index(depth) for depth in both], both)

    def same_label(self) -> Bool[np.ndarray, "image"]:
        """Which images have the same label in both studies.

        Returns:
            A flag for each paired image.
        """
        labels = [np.asarray(side.data["label"].values)[side.rows] for side in (self.a, self.b)]
        return np.asarray(labels[0] == labels[1])


def refuse_same_folder(a: Path, b: Path) -> None:
    """Refuses a study that is to be compared with itself.

    Args:
        a: Folder of the first study.
        b: Folder of the second.

    Raises:
        UsageError: They are one folder.
    """
    if a.resolve() == b.resolve():
        raise UsageError(f"{a} was to be compared with itself; name another study of the same images.")


def open_pair(a: str | Path, b: str | Path) -> Pair:
    """Joins two finished studies by the digests of their images.

    Args:
        a: Folder of the first study.
        b: Folder of the second.

    Returns:
        The pair.

    Raises:
        StudyError: One of them is no finished study.
        UsageError: They are the same study, of the same model with the same settings, or share no image.

    Example:
        >>> pair = open_pair("study-before", "study-after")
        >>> pair.n_shared
        1000
    """
    folders = Path(a), Path(b)
    refuse_same_folder(*folders)
    plans = [read_plan(folder) for folder in folders]
    _refuse_same_model(folders, plans)
    manifests = [read_manifest(folder) for folder in folders]
    by_digest = [_first_by_digest(manifest) for manifest in manifests]
    shared = [digest for digest in by_digest[0] if digest in by_digest[1]]
    if not shared:
        raise UsageError(
            f"{a} ({len(manifests[0].images):,} images) and {b} ({len(manifests[1].images):,} images) have no image in "
            "common: images are joined by what is in their files. Study the same photographs with both models."
        )
    at = np.unique(np.linspace(0, len(shared) - 1, min(len(shared), MOST_IMAGES)).round().astype(np.int64))
    sides = [
        StudySide(folder, data := open_study(folder), plan, manifest, _rows(data, [ids[shared[i]] for i in at]))
        for folder, plan, manifest, ids in zip(folders, plans, manifests, by_digest, strict=True)
    ]
    return Pair(sides[0], sides[1], len(shared), _label_reason(*plans))


def _refuse_same_model(folders: tuple[Path, Path], plans: list[Plan]) -> None:
    what = ("weight_digest", "preprocessing", "options", "precision", "device", "batch_size", "output", "target")
    alike = same_buffers(plans[0], plans[1], plans[0].precision)
    same_target = plans[0].target is None or plans[0].target_values == plans[1].target_values is not None
    if all(getattr(plans[0], name) == getattr(plans[1], name) for name in what) and alike and same_target:
        raise UsageError(
            f"{folders[0]} and {folders[1]} are studies of the same weights ({plans[0].model}, "
            f"{plans[0].weight_digest[:12]}) with the same settings, so nothing can differ but the images. Compare "
            "studies of two models, or of one before and after a change."
        )


def _first_by_digest(manifest: Manifest) -> dict[str, str]:
    """The id of the first image with each content: a copy of a file counts once."""
    ids: dict[str, str] = {}
    for entry in manifest.images:
        ids.setdefault(entry.digest, entry.id)
    return ids


def _rows(data: xr.Dataset, ids: list[str]) -> Int[np.ndarray, "image"]:
    position = {str(name): row for row, name in enumerate(data["image"].to_numpy().tolist())}
    return np.array([position[name] for name in ids], dtype=np.int64)


def _label_reason(a: Plan, b: Plan) -> str:
    if a.n_classes is None or b.n_classes is None:
        return "a model without a classifier has no probability of a label"
    same_names = a.class_names == b.class_names if a.class_names and b.class_names else True
    if a.n_classes != b.n_classes or not same_names:
        return f"the two models have other classes ({a.n_classes} and {b.n_classes}), so labels differ"
    return ""


def describe_labels(pair: Pair) -> str:
    """Whose labels the measures of the label are of, and how many images they are of.

    Args:
        pair: Two studies.

    Returns:
        A sentence; empty where no measure is of the label.
    """
    if pair.label_reason:
        return ""
    count, same = len(pair.a.rows), int(pair.same_label().sum())
    if pair.a.plan.labels == pair.b.plan.labels == LabelSource.GIVEN:
        if same == count:
            return ""
        return f"Measures of the label are of the {same:,} of {count:,} images whose label is the same in both studies."
    of_images = f"so measures of the label are of the {same:,} of {count:,} images"
    if LabelSource.GIVEN in (pair.a.plan.labels, pair.b.plan.labels):
        own = pair.b if pair.a.plan.labels == LabelSource.GIVEN else pair.a
        return (
            f"The labels of {own.folder.name} are the model's own predictions, those of the other study were given, "
            f"{of_images} for which they are the same."
        )
    return f"The labels are the models' own predictions, {of_images} for which both predict the same class."
