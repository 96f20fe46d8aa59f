"""Pruning curves of a study: its model answers the other half of the images with more and more heads pruned."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xarray as xr

from vitrail.data.labels import LabelSource
from vitrail.errors import StudyError, Unsupported, UsageError
from vitrail.heads.summary import present_heads
from vitrail.models.open import Vit
from vitrail.pruning.masked import predictions_without
from vitrail.pruning.ranking import CURVES_FILE, Curves, halves, orders, random_orders, scores
from vitrail.pruning.study_images import StudyImages
from vitrail.study.ownership import UNFINISHED, write_atomic
from vitrail.study.plan import Plan
from vitrail.study.progress import Progress
from vitrail.study.reopen import reopen
from vitrail.study.store import open_study, read_manifest, read_plan, study_folder

__all__ = ["measure_curves"]

RANKINGS = ("probability", "divergence", "loss", "flips", "class token", "tokens")
"""The rankings that are compared where nothing else is asked for."""

SHARES = (0, 1 / 18, 1 / 9, 7 / 36, 5 / 18, 7 / 18, 19 / 36, 13 / 18, 1)
"""Shares of the heads that are pruned: dense where accuracy falls."""


def measure_curves(
    study: str | Path | xr.Dataset,
    *,
    rankings: str | Sequence[str] | None = None,
    n_test: int = 200,
    n_random: int = 5,
    model: str | Path | Vit | None = None,
    weights: str | Path | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> Curves:
    """Prunes heads one after the other by several rankings of a study, and writes the curves into the study.

    Heads are ranked on one half of the images and pruned on images of the other half. The report then shows the curves.

    Args:
        study: The folder of a study of heads, of a classifier, or the study as `open_study` gives it.
        rankings: Names of rankings (`vitrail.pruning.ranking.scores`), or one name; None: six of them, as far as the
            study has them for every head.
        n_test: Images of the other half that are asked, at most, 1 or more; drawn at random.
        n_random: Orders at random beside the rankings.
        model: Where the model is now, if not where it was, or the opened model: as for `reopen`.
        weights: The weights file, where it has moved.
        device: Where the model runs.
        seed: Of the two halves and of the orders at random.
        progress: Shows a bar.

    Returns:
        The curves, as `vitrail.pruning.ranking.read_curves` reads them again.

    Raises:
        UsageError: A ranking that the study does not have, or not for every head; or no images to ask.
        Unsupported: The model is no classifier.
        DataError: The images have moved or changed.
        StudyError: The folder takes no file, or the study has grown meanwhile.

    Example:
        >>> from vitrail.pruning.curves import measure_curves
        >>> measure_curves("study").accuracy("least", "flips")  # doctest: +SKIP
    """
    if n_test < 1:
        raise UsageError(f"n_test={n_test} leaves no image to ask; give 1 or more (--test).")
    rankings = [rankings] if isinstance(rankings, str) else rankings
    study = study_folder(study)
    plan, dataset = read_plan(study), open_study(study)
    _refuse_unwritable(Path(study))
    vit = reopen(study, model=model, weights=weights, device=device)
    if vit.n_classes is None:
        raise Unsupported(f"Pruning curves are of accuracy: {vit.task.without('a classifier')}.")
    half = halves(dataset.sizes["image"], seed)
    held = scores(dataset, half.calibration)
    names = [name for name in RANKINGS if name in held] if rankings is None else list(rankings)
    unknown = [name for name in names if name not in held]
    if unknown or not names:
        raise UsageError(f"This study has no ranking {', '.join(unknown)}; it has {', '.join(held)}.")
    heads = [(int(layer), int(head)) for layer, head in np.argwhere(present_heads(dataset))]
    by_rank = {name: orders(held[name]) for name in names}
    partial = [name for name, order in by_rank.items() if len(order) < len(heads)]
    if partial and (rankings is not None or len(partial) == len(names)):
        raise UsageError(
            f"The ranking {partial[0]} has no number for {len(heads) - len(by_rank[partial[0]])} of the {len(heads)} "
            "heads, so no curve over all of them; choose other rankings."
        )
    by_rank = {name: order for name, order in by_rank.items() if name not in partial}
    counts = sorted({round(share * len(heads)) for share in SHARES})
    ranked = [order for least in by_rank.values() for order in (least, least[::-1])]
    every = [*ranked, *random_orders(heads, n_random, seed=seed + 1)]
    sets = [frozenset(order[:count]) for order in every for count in counts]
    images = StudyImages(vit, read_manifest(study), dataset["label"].to_numpy())
    # at random: the first of a half are the first classes, where images lie in order of their classes
    test = np.sort(np.random.default_rng(seed).permutation(half.test)[:n_test])
    with Progress(progress) as bars:
        bars.studying(0, len(test), "pruning")
        parts = list(
            images.correct(test, lambda part: predictions_without(vit, images.prepare(part), sets), bars),
        )
    right = np.concatenate(parts, -1).reshape(len(every), len(counts), -1)
    curves = Curves(
        np.array(counts),
        {name: right[2 * at] for at, name in enumerate(by_rank)},
        {name: right[2 * at + 1] for at, name in enumerate(by_rank)},
        right[len(ranked) :],
        LabelSource(plan.labels),
    )
    _write(Path(study), curves, plan)
    return curves


def _refuse_unwritable(folder: Path) -> None:
    """Refuses a folder that takes no file, before minutes of passes whose result could not be kept."""
    trial = folder / (CURVES_FILE + UNFINISHED)
    with _disk_errors(folder):
        trial.write_bytes(b"")
        trial.unlink()


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StudyError(
            f"Pruning curves cannot be written to {folder}: {error.strerror or error}. Make room, or copy the study to "
            "where it can be written to, and ask for them there."
        ) from error


def _write(folder: Path, curves: Curves, plan: Plan) -> None:
    """Stores curves of the study of this plan; refuses where it has become another while they were measured."""
    if read_plan(folder).data_digest != plan.data_digest:
        raise StudyError(
            f"{folder} has other images than when its pruning curves were begun, so they are not of it and were not "
            "written. Measure them again."
        )
    stream = io.BytesIO()
    np.savez_compressed(
        stream,
        data_digest=np.array(plan.data_digest),
        names=np.array(list(curves.least)),
        counts=curves.counts,
        least=np.stack(list(curves.least.values())),
        most=np.stack(list(curves.most.values())),
        random=curves.random,
    )
    with _disk_errors(folder):
        write_atomic(folder / CURVES_FILE, stream.getvalue())
