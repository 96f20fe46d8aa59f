"""Removing heads of a studied model for good: which, the smaller model on disk, and what it costs and saves.

Where heads are chosen, one half of the study's images chooses and the other half says what the choice cost, so that no
accuracy is reported on images that were used for choosing.
"""

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.data import Manifest, stored_image
from vitrail.errors import ModelError, Unsupported, UsageError
from vitrail.heads.pruning import logits_without, predictions_without, why_not_removable
from vitrail.heads.ranking import Order, halves, orders, scores
from vitrail.study.progress import Progress
from vitrail.study.reopen import reopen
from vitrail.study.store import open_study, read_manifest
from vitrail.study.writing import write_whole
from vitrail.vit.open import Vit, open_vit
from vitrail.vit.removal import without_heads
from vitrail.vit.saving import refuse_full_folder, write_smaller

__all__ = ["Kept", "Pruned", "Speed", "prune_study"]

EQUAL = 1e-5
"""Logits of the smaller model and of the masked one may differ by this share of the largest logit."""

RANKINGS = ("flips", "divergence", "probability", "loss", "tokens")
"""What heads are ranked by where nothing else is asked for: the first that the study holds. In the order of the areas
between their pruning curves (docs/heads.md, section 3)."""

HOPELESS_AFTER, HOPELESS_ERRORS = 64, 4
"""A number of heads is given up before all images are run where, on so many, so many standard errors do not reach."""

SPEED_IMAGES, SPEED_REPEATS = 16, 25
RESAMPLES = 5000
RECORD = "pruning.json"


@dataclass(frozen=True)
class Kept:
    """Accuracy before and after on `images`, and the share of it that is kept with a 95 % interval (bootstrap over
    images). `held_out`: nothing was chosen on these images. `promised`: the share asked for, or None."""

    images: int
    held_out: bool
    before: float
    after: float
    share: float
    low: float
    high: float
    promised: float | None

    @property
    def holds(self) -> bool | None:
        """The share measured is the share promised, or more; None where nothing was promised."""
        return None if self.promised is None else self.share >= self.promised


@dataclass(frozen=True)
class Speed:
    """Time of a pass of the whole model over that of the smaller one, in turn (on a processor: its own time): median of
    the pairs and their middle half. Above 1: the smaller one is faster."""

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
    kept: Kept | None


def prune_study(
    study: str | Path,
    out: str | Path,
    *,
    heads: Sequence[tuple[int, int]] | None = None,
    keep_accuracy: float | None = None,
    ranking: str | None = None,
    weights: str | Path | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> Pruned:
    """Removes `heads` (layer, head), or as many as leave the share `keep_accuracy` of the accuracy; writes to `out`.

    To keep a share of the accuracy, heads are ranked on one half of the images by `ranking` (`heads.ranking.scores`)
    and removed in that order, least important first, as long as the accuracy on that half, less one standard error,
    keeps the share; the number is found by bisection. The other half says what was kept. With `heads`, all images do.
    Without a classifier there is no accuracy, and only `heads` can be given.

    The folder opens with `open_vit(out)` and, by its load.py, with the model's library alone; its `pruning.json` holds
    what is returned. Logits are compared with those of the masked model before anything is reported.

    Raises `UsageError` for heads that are not there, for all heads, for neither or both of `heads` and `keep_accuracy`
    and for a folder that holds files; `Unsupported` for attention whose heads cannot be removed; what `reopen` raises
    if the model cannot be opened again, `DataError` if the images have moved or changed.
    """
    out = Path(out)
    _check_request(heads, keep_accuracy)
    refuse_full_folder(out)
    dataset = open_study(study)
    vit = reopen(study, weights=weights, device=device)
    reason = why_not_removable(vit)
    if reason:
        raise Unsupported(reason)
    images = _Images(vit, read_manifest(study), dataset["label"].to_numpy())
    with Progress(progress) as shown:
        if heads is None:
            assert keep_accuracy is not None
            ranking, chosen, places = _chosen(images, dataset, keep_accuracy, ranking, seed, shown)
        else:
            ranking, chosen, places = None, list(heads), np.arange(dataset.sizes["image"])
        _refuse_all(vit, chosen)
        done = _written(vit, chosen, images, places[:SPEED_IMAGES], out, ranking)
        if vit.n_classes is not None:
            done = _with_accuracy(done, images, places, keep_accuracy, shown)
    write_whole(out / RECORD, json.dumps(asdict(done), indent=1) + "\n")
    return done


def _check_request(heads: Sequence[tuple[int, int]] | None, keep: float | None) -> None:
    if (heads is None) == (keep is None):
        raise UsageError(
            "Say either which heads to remove (--heads L0H4,L3H1) or how much accuracy to keep (--keep-accuracy 0.99)."
        )
    if keep is not None and not 0 < keep <= 1:
        raise UsageError(f"--keep-accuracy {keep} has no meaning; it is a share of the accuracy, such as 0.99.")


def _refuse_all(vit: Vit, chosen: Order) -> None:
    if len(chosen) >= sum(vit.n_heads):
        raise UsageError(
            f"All {sum(vit.n_heads)} heads were to be removed; what would be left is no transformer. Keep at least one."
        )


class _Images:
    """A study's images and labels, a batch at a time, for any model that prepares them alike."""

    def __init__(self, vit: Vit, manifest: Manifest, labels: Int[np.ndarray, "image"], batch: int = 16) -> None:
        self.vit, self.labels, self._manifest, self._batch = vit, labels, manifest, batch

    def prepared(self, places: Sequence[int], vit: Vit | None = None) -> Float[Tensor, "image channel row column"]:
        entries = [self._manifest.images[int(at)] for at in places]
        return (vit or self.vit).prepare([stored_image(self._manifest, entry) for entry in entries])

    def right(
        self, places: Int[np.ndarray, "image"], answer: Callable[[Sequence[int]], np.ndarray], shown: Progress
    ) -> Iterator[Bool[np.ndarray, "*lead some"]]:
        """Which images `answer` (of their positions, predicted classes [.. image]) gets right, batch by batch."""
        for start in range(0, len(places), self._batch):
            part = places[start : start + self._batch]
            yield answer(part.tolist()) == self.labels[part]
            shown.advance(len(part))


def _chosen(
    images: _Images, dataset: xr.Dataset, keep: float, ranking: str | None, seed: int, shown: Progress
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
    places = np.random.default_rng(seed).permutation(half.calibration)  # so that the first are a fair sample
    before = dataset["prediction"].to_numpy()[places] == images.labels[places]
    if not before.any():
        raise UsageError("The model answers no image of the choosing half rightly, so there is no accuracy to keep.")
    shown.studying(0, int(np.ceil(np.log2(len(order)))) * len(places), "choosing")
    enough, too_many = 0, len(order)
    while too_many - enough > 1:
        count = (enough + too_many) // 2
        if _keeps(images, places, before, order[:count], keep, shown):
            enough = count
        else:
            too_many = count
    if not enough:
        raise UsageError(
            f"No head can be removed such that {keep:.1%} of the accuracy is kept with one standard error to spare, "
            f"judged on {len(half.calibration)} images and by the ranking {ranking!r}. Keep less, or study more images."
        )
    return ranking, order[:enough], half.test


def _keeps(
    images: _Images, places: Int[np.ndarray, "image"], before: Bool[np.ndarray, "image"], heads: Order, keep: float,
    shown: Progress,
) -> bool:  # fmt: skip
    """The share is kept without these heads, less one standard error; given up early where it is hopeless."""
    after = np.zeros(0, dtype=bool)
    for part in images.right(
        places, lambda some: predictions_without(images.vit, images.prepared(some), [heads])[0], shown
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


def _written(
    vit: Vit, chosen: Order, images: _Images, places: Int[np.ndarray, "image"], out: Path, ranking: str | None
) -> Pruned:
    """The folder, tried on a few images: it gives what the masked model gives, and how fast."""
    whole = _in_float32(vit)
    write_smaller(whole, without_heads(whole.model, whole.anatomy, chosen), out)
    try:
        smaller = open_vit(out, device=vit.device)
        tried = images.prepared(places.tolist(), whole)
        error = _error(whole, smaller, tried, chosen)
    except BaseException:
        shutil.rmtree(out)  # a folder that was not found to be right does not stay
        raise
    heads = sum(vit.n_heads)
    lost = [layer for layer, n_heads in enumerate(vit.n_heads) if sum(at == layer for at, _ in chosen) == n_heads]
    sizes = [sum(weight.numel() for weight in each.model.parameters()) for each in (whole, smaller)]
    speed = _speed(whole, smaller, tried)
    return Pruned(str(out), sorted(chosen), heads, ranking, sizes[0], sizes[1], lost, error, speed, None)


def _in_float32(vit: Vit) -> Vit:
    """The model with its weights as they were before a study rounded them to another precision."""
    if vit.precision == "float32":
        return vit
    opened = dict(vit.opened_with or {}) | {"precision": "float32"}
    size = opened.pop("image_size")
    return open_vit(
        **opened, image_size=tuple(size) if isinstance(size, list) else size, device=vit.device,
        class_names=vit.class_names,
    )  # fmt: skip


def _error(whole: Vit, smaller: Vit, tried: Tensor, chosen: Order) -> float:
    """Largest difference of logits over the largest. Raises `ModelError` if the folder is not the masked model."""
    masked = logits_without(whole, tried, chosen)
    error = float((smaller.logits(tried) - masked).abs().max() / masked.abs().max())
    if not error <= EQUAL or smaller.preprocessing != whole.preprocessing:
        raise ModelError(
            f"The smaller model does not answer as the one with masked heads (logits differ by {error:.1e} of the "
            f"largest, allowed is {EQUAL:.0e}) or prepares images in another way, so it was not written."
        )
    return error


def _speed(whole: Vit, smaller: Vit, tried: Tensor) -> Speed:
    # on a processor its own time, which other programs do not change
    clock = time.process_time if tried.device.type == "cpu" else time.perf_counter

    def seconds(vit: Vit) -> float:
        begun = clock()
        float(vit.logits(tried).sum())  # waits for the device
        return clock() - begun

    seconds(whole), seconds(smaller)
    ratios = [seconds(whole) / seconds(smaller) for _ in range(SPEED_REPEATS)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return Speed(statistics.median(ratios), low, high, len(tried))


def _with_accuracy(
    done: Pruned, images: _Images, places: Int[np.ndarray, "image"], keep: float | None, shown: Progress
) -> Pruned:
    """Accuracy of the folder's own model beside that of the whole one, both in float32."""
    whole, smaller = _in_float32(images.vit), open_vit(done.folder, device=images.vit.device)
    shown.studying(0, len(places), "measuring")

    def answers(some: Sequence[int]) -> np.ndarray:
        prepared = images.prepared(some, whole)
        return torch.stack([vit.logits(prepared).argmax(-1) for vit in (whole, smaller)]).cpu().numpy()

    before, after = np.concatenate(list(images.right(places, answers, shown)), -1)
    share, low, high = _kept_share(before, after)
    kept = Kept(len(places), keep is not None, float(before.mean()), float(after.mean()), share, low, high, keep)
    return replace(done, kept=kept)


def _kept_share(before: Bool[np.ndarray, "image"], after: Bool[np.ndarray, "image"]) -> tuple[float, float, float]:
    """Accuracy after over before, with a 95 % interval; NaN where nothing was right before."""
    if not before.any():
        return (float("nan"),) * 3
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(before), np.full(len(before), 1 / len(before)), size=RESAMPLES)
    right = drawn @ before
    low, high = np.quantile((drawn @ after)[right > 0] / right[right > 0], (0.025, 0.975))
    return float(after.mean() / before.mean()), float(low), float(high)
