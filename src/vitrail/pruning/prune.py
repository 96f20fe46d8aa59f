"""Removing heads of a studied model for good: which, the smaller model on disk, and what it costs and saves.

Where heads are chosen, one half of the study's images chooses and the other half says what the choice cost, so that no
accuracy is reported on images that were used for choosing.
"""

import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Int
from torch import Tensor

from vitrail.data.labels import LabelSource
from vitrail.errors import ModelError, Unsupported, UsageError
from vitrail.models.open import Vit, open_vit
from vitrail.outputs import local_folder
from vitrail.pruning.masked import logits_without, predictions_without
from vitrail.pruning.ranking import Order, as_heads, halves, orders, scores
from vitrail.pruning.removal import remove_heads, why_not_removable
from vitrail.pruning.saving import refuse_full_folder, require_savable, save_pruned
from vitrail.pruning.study_images import StudyImages
from vitrail.sentence import percent
from vitrail.stats import mean_interval
from vitrail.study.ownership import UNFINISHED, write_atomic
from vitrail.study.progress import Progress
from vitrail.study.reopen import reopen
from vitrail.study.store import open_study, read_manifest, read_plan, study_folder

__all__ = ["KeptAccuracy", "Pruned", "Speed", "prune_study"]

EQUAL = 1e-5
"""Logits of the smaller model and of the masked one may differ by this share of the largest logit."""

RANKINGS = ("flips", "divergence", "probability", "loss", "tokens")
"""What heads are ranked by where nothing else is asked for: the first that the study holds. In the order of the areas
between their pruning curves (docs/heads.md, section 3)."""

HOPELESS_AFTER, HOPELESS_ERRORS = 64, 4
"""A number of heads is given up before all images are run where, on so many, so many standard errors do not reach."""

SPEED_IMAGES, SPEED_REPEATS = 16, 25
RECORD = "pruning.json"

FILES = ("config.json", "preprocessor_config.json", "model.safetensors", "load.py", RECORD, RECORD + UNFINISHED)
"""What `save_pruned` writes, and the record."""


@dataclass(frozen=True)
class KeptAccuracy:
    """Accuracy before and after on `images`, and the share of it that is kept with a 95 % interval over images.

    Ends of the interval are NaN, in the record null, where the images are too few for one. `held_out`: nothing was
    chosen on these images. `promised`: the share asked for, or None. `labels`: whose they are; where they are the
    model's own answers, accuracy is agreement with these.
    """

    images: int
    held_out: bool
    before: float
    after: float
    share: float
    low: float
    high: float
    promised: float | None
    labels: LabelSource = LabelSource.GIVEN

    @property
    def holds(self) -> bool | None:
        """The share measured is the share promised, or more; None where nothing was promised."""
        return None if self.promised is None else self.share >= self.promised


@dataclass(frozen=True)
class Speed:
    """Time of a pass of the original model over that of the smaller one, in turn (on a processor: its own time): median
    of the pairs and their middle half. Above 1: the smaller one is faster."""

    ratio: float
    low: float
    high: float
    images: int


@dataclass(frozen=True)
class Pruned:
    """What `prune_study` did. `error`: largest difference to the masked model's logits over the largest logit.

    `layers_without_heads` kept none: they are no layers with attention any more, and Vitrail numbers those that are.
    """

    folder: str
    heads: list[tuple[int, int]]
    heads_before: int
    ranking: str | None
    parameters_before: int
    parameters_after: int
    layers_without_heads: list[int]
    error: float
    speed: Speed
    kept: KeptAccuracy | None
    output: str | int | None = None
    """Which of the model's outputs all of it is of; None for its own."""


def prune_study(
    study: str | Path | xr.Dataset,
    out: str | Path,
    *,
    heads: str | Iterable[Any] | None = None,
    keep_accuracy: float | None = None,
    ranking: str | None = None,
    model: str | Path | Vit | None = None,
    weights: str | Path | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> Pruned:
    """Removes heads of a studied model for good, and measures what that saves and costs.

    To keep a share of the accuracy, heads are ranked on one half of the images and removed in that order, least
    important first, as long as the accuracy on that half, less one standard error, keeps the share; the number is found
    by bisection. The other half says what was kept; with `heads`, all images do. Logits are compared with those of the
    masked model before anything is reported.

    Args:
        study: The folder of a study, or the study as `open_study` gives it.
        out: Folder of the smaller model, new or empty. It opens with `open_vit(out)` and, by its load.py, with the
            model's library alone; its `pruning.json` holds what is returned.
        heads: The (layer, head) to remove, or their names, "L0H1,L9H2"; or give `keep_accuracy`.
        keep_accuracy: Share of the accuracy to keep, 0 to 1: as many heads are removed as leave it.
        ranking: Name of the ranking (`heads.ranking.scores`); default: the best that the study has.
        model: Where the model is now, if not where it was, or the opened model: as for `reopen`.
        weights: The weights file, where it has moved.
        device: Where the models run.
        seed: Of the two halves.
        progress: Shows a bar.

    Returns:
        Heads removed, parameters, speed and accuracy before and after.

    Raises:
        UsageError: Heads that are not there, all heads, neither or both of `heads` and `keep_accuracy`, or a folder
            that holds files.
        Unsupported: Heads of this attention cannot be removed, no folder could hold the smaller model (it comes from
            neither library, or its configuration does not make it again), there is no classifier whose accuracy could
            be kept, or a model that was handed over has its weights rounded to another precision than float32.
        DataError: The images have moved or changed.
        UnknownModel, WeightsMismatch: The model cannot be opened again, as for `reopen`.
        ModelError: The smaller model does not give what the masked one gives; it is not written.
    """
    out = local_folder(out)
    _check_request(heads, keep_accuracy)
    named = None if heads is None else as_heads(heads)
    refuse_full_folder(out)
    study = study_folder(study)
    dataset = open_study(study)
    vit = reopen(study, model=model, weights=weights, device=device)
    reason = why_not_removable(vit)
    if reason:
        raise Unsupported(reason)
    if vit.precision != "float32" and vit.opened_with is None:
        raise Unsupported(
            f"{vit.name} was handed over in {vit.precision}, and a smaller model is made of the weights before they "
            "were rounded. Hand it over opened in float32."
        )
    require_savable(vit)
    images = StudyImages(vit, read_manifest(study), dataset["label"].to_numpy())
    with Progress(progress) as bars:
        if named is None:
            assert keep_accuracy is not None
            ranking, selected, positions = _choose_heads(images, dataset, keep_accuracy, ranking, seed, bars)
        else:
            ranking, selected, positions = None, named, np.arange(dataset.sizes["image"])
        _refuse_all(vit, selected)
        refuse_full_folder(out)  # choosing may have taken hours
        try:
            done = _write_model(vit, selected, images, positions[:SPEED_IMAGES], out, ranking)
            if vit.n_classes is not None:
                labels = LabelSource(read_plan(study).labels)
                done = _with_accuracy(done, images, positions, keep_accuracy, labels, bars)
            write_atomic(out / RECORD, json.dumps(_without_nan(asdict(done)), indent=1, allow_nan=False) + "\n")
        except BaseException:
            _remove_model(out)  # nothing that was not tried and measured to its end stays
            raise
    return done


def _without_nan(record: Any) -> Any:
    """The record with null for numbers that do not exist: NaN is no JSON."""
    if isinstance(record, dict):
        return {name: _without_nan(value) for name, value in record.items()}
    return None if isinstance(record, float) and np.isnan(record) else record


def _check_request(heads: str | Iterable[Any] | None, keep: float | None) -> None:
    if (heads is None) == (keep is None):
        raise UsageError(
            "Say either which heads to remove (--heads L0H4,L3H1) or how much accuracy to keep (--keep-accuracy 0.99)."
        )
    if keep is not None and not 0 < keep <= 1:
        raise UsageError(f"--keep-accuracy {keep} has no meaning; it is a share of the accuracy, such as 0.99.")


def _refuse_all(vit: Vit, selected: Order) -> None:
    if len(selected) >= sum(vit.n_heads):
        raise UsageError(
            f"All {sum(vit.n_heads)} heads were to be removed; what would be left is no transformer. Keep at least one."
        )


def _choose_heads(
    images: StudyImages, dataset: xr.Dataset, keep: float, ranking: str | None, seed: int, bars: Progress
) -> tuple[str, Order, Int[np.ndarray, "image"]]:
    """(the ranking, the heads to remove, the images that had no part in it)"""
    if images.vit.n_classes is None:
        raise Unsupported(
            f"--keep-accuracy was asked for; {images.vit.name} has no classifier, so it has no accuracy. Name the "
            "heads with --heads."
        )
    half = halves(dataset.sizes["image"], seed)
    offered = scores(dataset, half.calibration)
    ranking = ranking or next((name for name in RANKINGS if name in offered), next(iter(offered)))
    if ranking not in offered:
        raise UsageError(f"This study does not rank heads by {ranking!r}; it has {', '.join(offered)}.")
    order = orders(offered[ranking])
    positions = np.random.default_rng(seed).permutation(half.calibration)  # so that the first are a fair sample
    before = dataset["prediction"].to_numpy()[positions] == images.labels[positions]
    if not before.any():
        raise UsageError("The model answers no image of the choosing half rightly, so there is no accuracy to keep.")
    bars.studying(0, int(np.ceil(np.log2(len(order)))) * len(positions), "choosing")
    enough, too_many = 0, len(order)
    while too_many - enough > 1:
        count = (enough + too_many) // 2
        if _keeps(images, positions, before, order[:count], keep, bars):
            enough = count
        else:
            too_many = count
    if not enough:
        raise UsageError(
            f"No head can be removed such that {percent(keep, 1)} of the accuracy is kept with one standard "
            f"error to spare, judged on {len(half.calibration)} images and by the ranking {ranking!r}. "
            "Keep less, or study more images."
        )
    return ranking, order[:enough], half.test


def _keeps(
    images: StudyImages,
    positions: Int[np.ndarray, "image"],
    before: Bool[np.ndarray, "image"],
    heads: Order,
    keep: float,
    bars: Progress,
) -> bool:
    """The share is kept without these heads, less one standard error; given up early where it is hopeless."""
    after = np.zeros(0, dtype=bool)
    for part in images.correct(
        positions, lambda some: predictions_without(images.vit, images.prepare(some), [heads])[0], bars
    ):
        after = np.concatenate([after, part])
        share, error = _share_and_error(before[: len(after)], after)
        if len(after) >= HOPELESS_AFTER and share + HOPELESS_ERRORS * error < keep:
            return False
    return share - error >= keep


def _share_and_error(before: Bool[np.ndarray, "image"], after: Bool[np.ndarray, "image"]) -> tuple[float, float]:
    """Accuracy after over before, and its standard error (that of the paired differences)."""
    lost = before.astype(float) - after
    accuracy = max(float(before.mean()), 1e-9)
    return float(after.mean()) / accuracy, float(lost.std() / np.sqrt(len(lost))) / accuracy


def _write_model(
    vit: Vit, selected: Order, images: StudyImages, positions: Int[np.ndarray, "image"], out: Path, ranking: str | None
) -> Pruned:
    """The folder, tried on a few images: it gives what the masked model gives, and how fast."""
    original = _in_float32(vit)
    save_pruned(original, remove_heads(original, selected), out)
    smaller = _open_smaller(out, vit)
    tried = images.prepare(positions.tolist(), original)
    error = _error(original, smaller, tried, selected)
    heads = sum(vit.n_heads)
    lost = [layer for layer, n_heads in enumerate(vit.n_heads) if sum(at == layer for at, _ in selected) == n_heads]
    sizes = [sum(weight.numel() for weight in each.model.parameters()) for each in (original, smaller)]
    speed = _speed(original, smaller, tried)
    return Pruned(
        str(out), sorted(selected), heads, ranking, sizes[0], sizes[1], lost, error, speed, None, vit.read_output.output
    )


def _open_smaller(folder: str | Path, vit: Vit) -> Vit:
    """The model in the folder, its answers read as those of the model that it was made of."""
    return open_vit(folder, device=vit.device, output=vit.read_output.output)


def _remove_model(folder: Path) -> None:
    """Removes what was written, and the folder if nothing else is in it."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _in_float32(vit: Vit) -> Vit:
    """The model with its weights as they were before a study rounded them to another precision."""
    if vit.precision == "float32":
        return vit
    opened = dict(vit.opened_with or {}) | {"precision": "float32"}
    size = opened.pop("image_size")
    return open_vit(
        **opened,
        image_size=tuple(size) if isinstance(size, list) else size,
        device=vit.device,
        class_names=vit.class_names,
        preprocessing=vit.preprocessing,
    )


def _error(original: Vit, smaller: Vit, tried: Tensor, selected: Order) -> float:
    """Largest difference of logits over the largest. Raises `ModelError` if the folder is not the masked model."""
    masked = logits_without(original, tried, selected)
    error = float((smaller.logits(tried) - masked).abs().max() / masked.abs().max())
    if not error <= EQUAL or smaller.preprocessing != original.preprocessing:
        raise ModelError(
            f"The smaller model does not answer as the one with masked heads (logits differ by {error:.1e} of the "
            f"largest, allowed is {EQUAL:.0e}) or prepares images in another way, so it was not written."
        )
    return error


def _speed(original: Vit, smaller: Vit, tried: Tensor) -> Speed:
    # on a processor its own time, which other programs do not change
    clock = time.process_time if tried.device.type == "cpu" else time.perf_counter

    def seconds(vit: Vit) -> float:
        begun = clock()
        float(vit.logits(tried).sum())  # waits for the device
        return clock() - begun

    seconds(original), seconds(smaller)
    ratios = [seconds(original) / seconds(smaller) for _ in range(SPEED_REPEATS)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Speed(statistics.median(ratios), low, high, len(tried))


def _with_accuracy(
    done: Pruned,
    images: StudyImages,
    positions: Int[np.ndarray, "image"],
    keep: float | None,
    labels: LabelSource,
    bars: Progress,
) -> Pruned:
    """Accuracy of the folder's own model beside that of the original one, both in float32."""
    original, smaller = _in_float32(images.vit), _open_smaller(done.folder, images.vit)
    bars.studying(0, len(positions), "measuring")

    def predictions(some: Sequence[int]) -> np.ndarray:
        prepared = images.prepare(some, original)
        return torch.stack([vit.logits(prepared).argmax(-1) for vit in (original, smaller)]).cpu().numpy()

    before, after = np.concatenate(list(images.correct(positions, predictions, bars)), -1)
    share, low, high = _share_interval(before, after)
    accuracy = KeptAccuracy(
        len(positions),
        keep is not None,
        float(before.mean()),
        float(after.mean()),
        share,
        low,
        high,
        keep,
        labels,
    )
    return replace(done, kept=accuracy)


def _share_interval(before: Bool[np.ndarray, "image"], after: Bool[np.ndarray, "image"]) -> tuple[float, float, float]:
    """Accuracy after over before, with a 95 % interval; NaN where nothing was right before."""
    if not before.any():
        return (float("nan"),) * 3
    accuracy = float(before.mean())
    share = float(after.mean()) / accuracy
    # A ratio of means errs as the mean of these, which lie in a known range (linearised; Cochran 1977, chapter 6).
    errors = (after.astype(np.float64) - share * before) / accuracy
    low, high, _ = mean_interval(errors, limits=(-share / accuracy, 1 / accuracy))
    return share, max(share + float(low), 0.0), share + float(high)
