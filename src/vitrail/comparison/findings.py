"""What a comparison says, in sentences. Numbers decide: nothing is called a difference that random signs give too."""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from vitrail.sentence import Sentence, percent
from vitrail.stats import ALPHA, share_interval

__all__ = ["ALPHA", "comparison_findings", "describe_difference", "heads_by_difference", "measures_by_effect"]

N_TOLD = 4
"""Measures that get a sentence of their own; the table has all."""


def measures_by_effect(compared: xr.Dataset) -> list[str]:
    """The measures, those first that differ most against the spread of the images: alike in every image before all.

    Args:
        compared: What `vitrail.compare` gives.

    Returns:
        Their names.
    """
    effect = np.nan_to_num(np.abs(compared["standardised"].to_numpy()), nan=-1.0)
    return [str(compared["measure"].values[at]) for at in np.argsort(-effect, kind="stable")]


def heads_by_difference(compared: xr.Dataset, name: str) -> list[tuple[int, int]]:
    """The heads that differ in a measure, those first that differ most.

    Args:
        compared: What `vitrail.compare` gives, of models with the same heads.
        name: A measure of heads.

    Returns:
        Pairs of layer and head; heads that one of the models lacks, and heads that are equal, are left out.
    """
    difference = np.abs(compared[f"{name}_head_b"].to_numpy() - compared[f"{name}_head_a"].to_numpy())
    order = np.argsort(-np.nan_to_num(difference), axis=None, kind="stable")
    heads = (np.unravel_index(int(flat), difference.shape) for flat in order)
    return [(int(layer), int(head)) for layer, head in heads if difference[layer, head] > 0]


def comparison_findings(compared: xr.Dataset) -> list[str]:
    """The main results.

    Args:
        compared: What `vitrail.compare` gives.

    Returns:
        Sentences with numbers, the most important first.
    """
    return [*_of_answers(compared), *_of_measures(compared), *_of_heads(compared)]


def _of_answers(compared: xr.Dataset) -> Iterator[str]:
    a, b = compared.attrs["name_a"], compared.attrs["name_b"]
    if "correct" in compared["measure"].values:
        row = compared.sel(measure="correct")
        difference, p = float(row["mean_difference"]), float(row["p"])
        words = (
            "as many"
            if difference == 0
            else f"{100 * abs(difference):.1f} points {'more' if difference > 0 else 'fewer'}"
        )
        verdict = "" if p < ALPHA else ", which chance may give"
        right = " and ".join(percent(float(row[name]), 1) for name in ("mean_a", "mean_b"))
        yield (
            f"{b} is right about {words} of the images ({right}; {_interval(row, 100, ' points')}p {p:.3f}{verdict})."
        )
    if "same_prediction" in compared:
        same = compared["same_prediction"].to_numpy()
        low, high, reason = share_interval(same)
        interval = "" if reason else f" (95 % interval {percent(float(low), 1)} to {percent(float(high), 1)})"
        yield f"{a} and {b} predict the same class for {percent(same.mean(), 1)} of the images{interval}."


def _of_measures(compared: xr.Dataset) -> Iterator[str]:
    names = [name for name in measures_by_effect(compared) if name != "correct"]
    differ = [name for name in names if float(compared["p"].sel(measure=name)) < ALPHA]
    if not differ:
        yield (
            f"None of {len(names)} measures differs on average by more than random signs give "
            f"(p {ALPHA} or more, corrected for all of them)."
        )
        return
    verb = "differs" if len(differ) == 1 else "differ"
    yield (
        f"{len(differ)} of {len(names)} measures {verb} on average by more than random signs give (p below {ALPHA}, "
        "corrected for all of them); those that differ most against the spread of the images:"
    )
    for name in differ[:N_TOLD]:
        yield describe_difference(compared, name)


def describe_difference(compared: xr.Dataset, name: str) -> Sentence:
    """One measure's difference, and the layer where it is largest.

    Args:
        compared: What `vitrail.compare` gives.
        name: Of the measure.

    Returns:
        A sentence, with the layer of the first model that it names where both have it.
    """
    row = compared.sel(measure=name)
    difference, unit = float(row["mean_difference"]), str(row["unit"].item())
    title = str(row["title"].item())
    words = "" if unit in ("1", "bool") else f" ({unit})"
    a, b = (f"{float(row[f'mean_{side}']):.3g} in {compared.attrs[f'name_{side}']}" for side in "ab")
    layer, where = _largest_layer(compared, name)
    text = (
        f"{title[0].upper()}{title[1:]}{words} is {a} and {b}: {difference:+.3g} "
        f"({_interval(row, 1, '')}p {float(row['p']):.3f}){where}."
    )
    return Sentence(text, measure=name, layer=layer)


def _largest_layer(compared: xr.Dataset, name: str) -> tuple[int | None, str]:
    variable = f"{name}_difference"
    if variable not in compared or compared[variable].dims != ("layer",):
        return None, ""
    values, p = compared[variable].to_numpy(), compared[f"{name}_p"].to_numpy()
    if not np.isfinite(values).any() or not (p < ALPHA).any():
        return None, ""
    at = int(np.nanargmax(np.where(p < ALPHA, np.abs(values), np.nan)))
    layer, where = None, f"{percent(float(compared['depth'][at]))} of the depth"
    if "layer_a" in compared.coords:
        layer, other = (int(compared[f"layer_{side}"][at]) for side in "ab")
        where = f"L{layer}" if layer == other else f"L{layer} of {compared.attrs['name_a']}, L{other} of the other"
    return layer, f"; most at {where} ({values[at]:+.3g})"


def _left_out(compared: xr.Dataset) -> str:
    """How many layers are no layer of the other model, where layers are joined block by block."""
    if "layer_a" not in compared.coords:
        return ""
    counts = [compared.attrs[f"n_layers_{side}"] - compared.sizes["layer"] for side in "ab"]
    told = [
        f"{count} layer{'s' if count > 1 else ''} of {compared.attrs[f'name_{side}']}"
        for count, side in zip(counts, "ab", strict=True)
        if count
    ]
    verb = "is" if sum(counts) == 1 else "are"
    return f"; {' and '.join(told)} without attention in the other {verb} left out" if told else ""


def _interval(row: xr.Dataset, factor: int, unit: str) -> str:
    low, high = (factor * float(row[end]) for end in ("low", "high"))
    if np.isnan(low + high):
        return f"no 95 % interval: {row.attrs['no_interval'][str(row['measure'].item())]}; "
    return f"95 % interval of the difference {low:+.3g} to {high:+.3g}{unit}; "


def _of_heads(compared: xr.Dataset) -> Iterator[str]:
    heads = compared.attrs["heads_correspond"]
    if heads is None:
        if not compared.attrs["same_heads"]:
            how = "block by block" if "layer_a" in compared.coords else "at the same depth"
            yield f"The models have different heads, so they are compared by layer, {how}{_left_out(compared)}."
        return
    correlation, p = heads["correlation"], heads["p"]
    if p < ALPHA:
        yield (
            f"Heads of the same index do alike in both models (correlation within layers {correlation:.2f}, p {p:.3f} "
            "against heads in random order), so they are compared head by head."
        )
    else:
        yield (
            f"Heads of the same index have no more in common than heads in random order (correlation within layers "
            f"{correlation:.2f}, p {p:.3f}): compare layers, not heads."
        )
