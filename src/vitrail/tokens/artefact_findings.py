"""What a trial of artefacts says, in sentences with numbers and intervals; needs no torch."""

from collections.abc import Callable, Iterator

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from vitrail.sentence import percent
from vitrail.stats import mean_interval, paired_interval, share_interval
from vitrail.tokens.outliers import ABLATIONS, REGISTER_MODELS

__all__ = ["SCORE_WORDS", "artefact_effects", "artefact_findings"]

SCORE_WORDS = {
    "object_silhouette": "the silhouette of tokens by object",
    "silhouette": "the silhouette of clusters of tokens",
    "purity": "the purity of clusters of tokens",
    "in_object": "the cosine between tokens of an object",
}


def artefact_effects(trial: xr.Dataset) -> xr.Dataset:
    """What each changed model makes of tokens and answers, over images.

    Args:
        trial: What `vitrail.tokens.artefact_trial.try_registers` gives.

    Returns:
        [effect model]: `mean`, and its 95 % interval `low` to `high`, NaN where there is none. Effects are
        `outliers` (patches of outlying length after the worst layer), `same_top1` of models with classes,
        `outlier_attention`, `attention_entropy`, and the first score of grouping by its name.

    Example:
        >>> artefact_effects(trial)["mean"].sel(effect="outliers").to_series()  # doctest: +SKIP
    """
    grouping = trial["grouping"].isel(score=0)
    effects = {
        "outliers": trial["outlier_share"].isel(layer=int(trial.attrs["worst_layer"])) * trial.sizes["patch"],
        **({"same_top1": trial["same_top1"]} if "same_top1" in trial else {}),
        "outlier_attention": trial["outlier_attention"],
        "attention_entropy": trial["attention_entropy"],
        str(grouping["score"].values): grouping,
    }
    models = trial["model"].values
    rows = np.array(
        [
            [_mean_and_interval(each.sel(model=model).to_numpy(), is_share=name == "same_top1") for model in models]
            for name, each in effects.items()
        ]
    )
    parts = {name: (("effect", "model"), rows[..., at]) for at, name in enumerate(("mean", "low", "high"))}
    return xr.Dataset(parts, {"effect": list(effects), "model": models})


def artefact_findings(trial: xr.Dataset) -> list[str]:
    """What a trial says.

    Args:
        trial: What `try_registers` gives.

    Returns:
        Sentences with numbers.
    """
    worst, n_images = int(trial.attrs["worst_layer"]), trial.sizes["image"]
    counts = _outlier_counts(trial)
    n_patches = int(np.prod(trial.attrs["grid"]))
    sentences = [
        f"After L{worst}, the layer with the most tokens of outlying length, {counts['as it is'].mean():.1f} of "
        f"{n_patches} patches have one, mean over {n_images} images.",
        f"{_largest_part(trial)} {_strongest_neurons(trial)}",
        _strongest_heads(trial),
        *_ablations(trial, counts),
    ]
    n_registers = int(trial.attrs["n_registers"])
    registers = "a register that takes" if n_registers == 1 else f"{n_registers} registers that take"
    sentences.append(
        f"With {registers} over what these neurons write, {counts['registers'].mean():.1f} patches are left with an "
        f"outlying length; {counts['random neurons'].mean():.1f} with as many other neurons of the same layers."
    )
    sentences += [*_attention_sentences(trial), *_grouping_sentences(trial)]
    shift = trial["output_shift"].sel(model="registers").to_numpy()
    low, high, reason = mean_interval(shift.astype(np.float64))
    interval = "" if reason else f" (95 % interval {float(low):.3f} to {float(high):.3f})"
    sentences.append(f"With registers the output turns by {shift.mean():.3f}{interval}, as 1 - cosine.")
    if "same_top1" in trial:
        same = trial["same_top1"].sel(model="registers").to_numpy().astype(bool)
        low, high, reason = share_interval(same)
        interval = "" if reason else f" (95 % interval {percent(float(low))} to {percent(float(high))})"
        stays = f"stays for {percent(same.mean())} of {n_images} images"
        sentences.append(f"With them the most probable class {stays}{interval}.")
    return sentences


def _outlier_counts(trial: xr.Dataset) -> dict[str, Float[np.ndarray, "image"]]:
    """Outlying patches of each image after the layer that has most, by model."""
    share = trial["outlier_share"].isel(layer=int(trial.attrs["worst_layer"]))
    n_patches = int(np.prod(trial.attrs["grid"]))
    return {model: n_patches * share.sel(model=model).to_numpy() for model in map(str, trial["model"].values)}


def _largest_part(trial: xr.Dataset) -> str:
    written, length = trial["written"].to_numpy(), float(trial.attrs["outlier_length"])
    layer, part = np.unravel_index(int(written.argmax()), written.shape)
    before = length - float(written.sum())  # what the token holds before L0: layers add the rest
    if before > written[layer, part]:
        return (
            "They have the largest part of their length before L0, from patch embedding and position: "
            f"{percent(before / length)}."
        )
    return (
        f"The {('attention', 'MLP')[part]} of L{layer} writes the largest part of their length: "
        f"{percent(written[layer, part] / length)}."
    )


def _strongest_neurons(trial: xr.Dataset) -> str:
    shares = trial["neuron_share"].to_numpy()
    together = "" if len(shares) == 1 else f", the {len(shares)} strongest {percent(shares.sum())}"
    return (
        f"Neuron {int(trial['neuron_index'][0])} of L{int(trial['neuron_layer'][0])} alone writes {percent(shares[0])} "
        f"of it{together}."
    )


def _strongest_heads(trial: xr.Dataset) -> str:
    if trial.attrs["no_heads"]:
        return f"Which heads write them is not told. {trial.attrs['no_heads']}"
    if not trial.sizes["head"]:
        return "No head adds to their length, or there are too few for as many others to be compared with."
    shares = trial["head_share"].to_numpy()
    together = "" if len(shares) == 1 else f", the {len(shares)} strongest {percent(shares.sum())}"
    return (
        f"Of the heads L{int(trial['head_layer'][0])}H{int(trial['head_index'][0])} writes most of it, through its own "
        f"part of the output projection: {percent(shares[0])}{together}."
    )


def _ablations(trial: xr.Dataset, counts: dict[str, np.ndarray]) -> Iterator[str]:
    for off, null in ABLATIONS.items():
        if off not in counts:
            continue
        what = off.removesuffix(" off")
        n = trial.sizes[what.removesuffix("s")]
        writers = f"With the {n} {what} off" if n > 1 else f"With the {what.removesuffix('s')} off"
        for_all = " for every token" if what == "neurons" else ""
        yield (
            f"{writers}{for_all}, {counts[off].mean():.1f} patches are left with an outlying length, "
            f"{counts[null].mean():.1f} with as many other {what} off"
            f"{_difference(counts[off], counts[null], lambda value: f'{value:+.1f}')}."
        )
        if "same_top1" in trial:
            same, other = (trial["same_top1"].sel(model=each).to_numpy() for each in (off, null))
            low, high, reason = share_interval(same.astype(bool))
            interval = "" if reason else f" (95 % interval {percent(float(low))} to {percent(float(high))})"
            yield (
                f"The most probable class stays for {percent(same.mean())} of the images{interval}, for "
                f"{percent(other.mean())} with the other {what} off{_difference(same, other, _points, (-1.0, 1.0))}."
            )


def _attention_sentences(trial: xr.Dataset) -> Iterator[str]:
    outlier, register, entropy = (
        {model: trial[name].sel(model=model).to_numpy() for model in REGISTER_MODELS}
        for name in ("outlier_attention", "register_attention", "attention_entropy")
    )
    whose = "class token's" if trial.attrs["class_token"] else "patches'"
    plain, cured, other = REGISTER_MODELS
    limits = (-1.0, 1.0)
    yield (
        f"Of the {whose} attention in the last layer {percent(outlier[plain].mean())} lies on these patches; with "
        f"registers {percent(outlier[cured].mean())}{_difference(outlier[cured], outlier[plain], _points, limits)}, "
        f"and {percent(register[cured].mean())} on the registers; with registers for other neurons "
        f"{percent(outlier[other].mean())}{_difference(outlier[other], outlier[plain], _points, limits)}."
    )
    yield (
        "The entropy of that attention over patches, as a share of the largest possible, is "
        f"{entropy[plain].mean():.3f}; with registers {entropy[cured].mean():.3f}"
        f"{_difference(entropy[cured], entropy[plain], _thousandths, limits)}; with registers for other neurons "
        f"{entropy[other].mean():.3f}{_difference(entropy[other], entropy[plain], _thousandths, limits)}."
    )


def _grouping_sentences(trial: xr.Dataset) -> Iterator[str]:
    by_object = "object_silhouette" in trial["score"].values
    for score in trial["score"].values:
        values = {model: trial["grouping"].sel(model=model, score=score).to_numpy() for model in REGISTER_MODELS}
        known = ~np.isnan(values["as it is"])
        plain, cured, other = (values[model][known] for model in REGISTER_MODELS)
        n_images = f"{known.sum()} images with two objects" if by_object else f"{known.sum()} images"
        yield (
            f"After the last layer {SCORE_WORDS[str(score)]} is {plain.mean():.3f}, mean over {n_images}; with "
            f"registers {cured.mean():.3f}{_difference(cured, plain, _thousandths)}; with registers for other neurons "
            f"{other.mean():.3f}{_difference(other, plain, _thousandths)}."
        )


def _difference(
    one: np.ndarray, other: np.ndarray, form: Callable[[float], str], limits: tuple[float, float] | None = None
) -> str:
    """The mean difference of the same images and its 95 % interval, in brackets; the reason where there is none."""
    low, high, reason = paired_interval(one.astype(np.float64), other.astype(np.float64), limits=limits)
    interval = reason or f"95 % interval {form(float(low))} to {form(float(high))}"
    return f" (difference {form(float(np.mean(one - other)))}, {interval})"


def _points(share: float) -> str:
    return f"{100 * share:+.1f} points"


def _thousandths(value: float) -> str:
    return f"{value:+.3f}"


def _mean_and_interval(
    values: Float[np.ndarray, "image"] | Bool[np.ndarray, "image"], *, is_share: bool
) -> tuple[float, float, float]:
    """Mean and interval over the images that have a value; that of a share where all are 0 or 1, and no mean of draws.

    Other effects may happen to be 0 in every image, as a silhouette is of one cluster: these have no interval.
    """
    numbers = values.astype(np.float64)[~np.isnan(values.astype(np.float64))]
    if not len(numbers):
        return np.nan, np.nan, np.nan
    is_yes_or_no = is_share and bool(np.isin(numbers, (0.0, 1.0)).all())
    low, high, _ = share_interval(numbers.astype(bool)) if is_yes_or_no else mean_interval(numbers)
    return float(numbers.mean()), float(low), float(high)
