"""The patches of a study: windows, responsive fields, tendencies and hubs."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vitrail.figures import patches as figures
from vitrail.figures.layers import quantities_over_layers
from vitrail.grid import box_means, boxes_of_sides
from vitrail.layer_summary import LayerQuantity, finite_mean, in_first_patches, layer_quantity
from vitrail.report.parts import Drawing, Part, ReportData, Section, Table, Text, readings
from vitrail.sentence import Sentence, percent
from vitrail.stats import mean_interval, simultaneous_intervals

__all__ = ["patches"]

OBJECT_SHARE = 0.5
"""Share of a patch that objects cover from which it counts as a patch of an object."""

COVERAGE_IMAGES = 64
"""Images whose windows are summed up in the picture."""


def patches(study: ReportData) -> Section | None:
    """Windows, fields, tendencies and hubs over the images, if the study holds any of them.

    Args:
        study: The study.

    Returns:
        The section; None where the study holds nothing for it.
    """
    names = study.measures_of("patches")
    if not names:
        return None
    lines = _lines(study, names)
    return Section("patches", "Patches", tuple(_findings(lines)), lambda: _parts(study, lines, names))


def _lines(study: ReportData, names: list[str]) -> dict[str, LayerQuantity]:
    """A number per image and layer of everything the analysis measures."""
    sample = study.sample
    plain = ("field_size", "strongest_share", "interaction_distance", "sink_share")
    quantities: dict[str, LayerQuantity] = {name: layer_quantity(sample, name) for name in names if name in plain}
    if "tendency" in names:
        tendency = in_first_patches(sample["tendency"], sample.attrs["grids"])
        pulls, unit = tendency.to_numpy().astype(np.float64), str(tendency.attrs["unit"]).partition(",")[0]
        quantities["tendency"] = LayerQuantity(
            "length of the tendency", unit, finite_mean(np.hypot(pulls[..., 0], pulls[..., 1]))
        )
    if "window" in names:
        sides = sample["window"].to_numpy().astype(np.float64)
        away = np.where(np.isnan(sides[..., 0]), np.nan, (sides < 0).any(-1))
        quantities["window"] = LayerQuantity(
            "windows that do not hold their own patch", "share of patches", finite_mean(away)
        )
    for name, title in (("sink", "sinks (hubs of the first round)"), ("hub", "hubs of all rounds")):
        if name in names:
            counts = sample[name].to_numpy().sum(-1).astype(np.float64)
            counts[:, [grid is None for grid in study.plan.grids]] = np.nan
            quantities[name] = LayerQuantity(title, "patches of an image", counts)
    if "window_object_share" in names:
        quantities |= _windows_on_objects(study, "window" in names)
    return quantities


def _windows_on_objects(study: ReportData, with_windows: bool) -> dict[str, LayerQuantity]:
    """How much of the windows of object and of background patches lies on objects; and, by another image's windows.

    Of layers with the grid of the first, which the masks are stored on; NaN where an image has no such patches.
    """
    rows, columns = study.plan.grids[0] or (0, 0)
    covered = study.sample["object_share"].to_numpy().astype(np.float64)[:, : rows * columns]
    masked = np.asarray(np.isfinite(covered).all(1))
    shares = study.sample["window_object_share"].to_numpy().astype(np.float64)[..., : covered.shape[1]]
    shares[:, [grid != study.plan.grids[0] for grid in study.plan.grids]] = np.nan
    on = (covered >= OBJECT_SHARE)[:, None]
    unit = "share of the window that objects cover"
    found = {
        "windows_of_objects": LayerQuantity("windows of object patches", unit, _mean_where(shares, on)),
        "windows_of_background": LayerQuantity(
            "windows of background patches", unit, _mean_where(shares, ~on & masked[:, None, None])
        ),
    }
    if with_windows and masked.sum() > 1:
        sides = study.sample["window"].to_numpy()[masked][..., : covered.shape[1], :]
        # Half of the images away: neighbours in a folder of classes show the same object at the same place.
        sides, without = (np.roll(each, len(sides) // 2, axis=0) for each in (sides, np.isnan(shares[masked])))
        sides = np.where(without[..., None], 0, sides).astype(np.int64)
        boxes = np.stack(boxes_of_sides(sides, (rows, columns)), axis=-1)
        others = np.full(shares.shape, np.nan)
        others[masked] = np.where(without, np.nan, box_means(covered[masked][:, None], boxes, (rows, columns)))
        others[np.isnan(shares)] = np.nan
        found["windows_of_others"] = LayerQuantity(
            "another image's windows at the places of object patches", unit, _mean_where(others, on)
        )
    return found


def _mean_where(
    values: Float[np.ndarray, "image layer patch"], where: Bool[np.ndarray, "image _ patch"]
) -> Float[np.ndarray, "image layer"]:
    return finite_mean(np.where(where, values, np.nan))


def _findings(lines: dict[str, LayerQuantity]) -> Iterator[str]:
    if "field_size" in lines:
        at, size = _extremes(lines["field_size"])
        yield Sentence(
            f"The smallest box with half of what a patch takes from others has {percent(size[0])} of the grid in "
            f"L{at[0]}, where boxes are smallest, and {percent(size[1])} in L{at[1]}, where they are largest.",
            measure="field_size",
            layer=at[1],
            **_line(lines["field_size"]),
        )
    if "interaction_distance" in lines:
        at, far = _extremes(lines["interaction_distance"])
        yield Sentence(
            f"On average a patch takes from others {far[0]:z.1f} {lines['interaction_distance'].unit} away in "
            f"L{at[0]}, the nearest, and {far[1]:z.1f} in L{at[1]}, the farthest.",
            measure="interaction_distance",
            layer=at[1],
            **_line(lines["interaction_distance"]),
        )
    if "window" in lines:
        at, away = _extremes(lines["window"])
        yield Sentence(
            f"In L{at[1]} {percent(away[1])} of the windows do not hold the patch that asks, in L{at[0]} "
            f"{percent(away[0])}.",
            measure="window",
            layer=at[1],
            **_line(lines["window"]),
        )
    if "strongest_share" in lines:
        at, share = _extremes(lines["strongest_share"])
        yield Sentence(
            f"Half of what a patch takes comes from {percent(share[0])} of the patches, wherever they lie, in "
            f"L{at[0]}, the fewest, and from {percent(share[1])} in L{at[1]}, the most.",
            measure="strongest_share",
            layer=at[1],
            **_line(lines["strongest_share"]),
        )
    if "sink" in lines:
        yield _sinks(lines["sink"], lines.get("sink_share"))
    if "windows_of_others" in lines:
        yield from _of_objects(lines["windows_of_objects"], lines["windows_of_others"])
    if {"sink", "hub"} <= lines.keys():
        later = (lines["hub"].values - lines["sink"].values)[:, np.isfinite(lines["hub"].values).any(0)]
        if np.nansum(later):
            yield Sentence(
                f"When sinks are taken away, further patches stand out: {np.nanmax(np.nanmean(later, axis=0)):z.1f} an "
                "image in the layer with the most of them. They are hubs, but no sinks.",
                measure="hub",
            )


def _of_objects(own: LayerQuantity, others: LayerQuantity) -> Iterator[str]:
    """Whether windows follow the object of their image: beyond those of other images, in the layer with the most."""
    difference = own.values - others.values
    rows = difference[np.isfinite(difference).any(1)]
    if len(rows) < 2:
        return
    means = finite_mean(rows.T)
    layer = int(np.nanargmax(means))
    low, high = (float(end[layer]) for end in simultaneous_intervals(rows, limits=(-1.0, 1.0))[:2])
    interval = "too few images for an interval"
    if np.isfinite(low + high):
        interval = f"95 % interval of all layers at once {100 * low:+z.0f} to {100 * high:+z.0f}"
    known = f"{100 * means[layer]:+z.0f} points, {interval}; {len(rows)} images with objects"
    if not low > 0:
        yield f"Windows are not shown to follow objects beyond other images' windows: most in L{layer} ({known})."
        return
    yield Sentence(
        f"Of the windows of object patches {percent(own.layer_means[layer])} lies on objects in L{layer}, where they "
        f"follow the image most: with the windows of another image at the same places it is "
        f"{percent(others.layer_means[layer])} ({known}).",
        measure="window",
        layer=layer,
        **_line(own),
    )


def _sinks(counts: LayerQuantity, taken: LayerQuantity | None) -> str:
    """Says where sinks are, and names every layer that has them equally often."""
    finite = np.isfinite(counts.values).any(0)
    often = np.where(finite, (np.nan_to_num(counts.values) > 0).mean(0), np.nan)
    most = float(np.nan_to_num(often).max(initial=0))
    if most <= 0:
        return "No layer has sinks, patches that more than half of the queries keep."
    layers = [int(layer) for layer in np.flatnonzero(np.isclose(often, most))]
    sentence = (
        f"Sinks, patches that more than half of the queries keep, appear in {percent(most)} of the images in "
        f"{', '.join(f'L{layer}' for layer in layers)}, and no more often elsewhere."
    )
    if taken is None:
        title = "share of the images with sinks"
        return Sentence(sentence, measure="sink", layer=layers[0], by_layer=often, by_layer_title=title)
    (_, layer), (_, share) = _extremes(taken)
    more = f"They take the most in L{layer}: {percent(share)} of what patches take from patches."
    return Sentence(f"{sentence} {more}", measure="sink", layer=layer, evidence=[(more, "sink_share")], **_line(taken))


def _line(line: LayerQuantity) -> dict[str, Any]:
    """What is drawn beside a sentence that gives means of a quantity."""
    return {"by_layer": line.layer_means, "by_layer_title": line.title}


def _extremes(line: LayerQuantity) -> tuple[tuple[int, int], tuple[float, float]]:
    """The layers with the lowest and the highest mean over images, and the means."""
    means = line.layer_means
    low, high = int(np.nanargmin(means)), int(np.nanargmax(means))
    return (low, high), (float(means[low]), float(means[high]))


def _parts(study: ReportData, lines: dict[str, LayerQuantity], names: list[str]) -> Iterator[Part]:
    if study.sample_words:
        yield Text(study.sample_words)
    n_images = study.sample.sizes["image"]
    whose = f"{n_images:,} images" if n_images > 1 else "one image"
    title = f"Interactions over the layers, {whose}"
    yield Drawing(
        quantities_over_layers(
            list(lines.values()), title, "Each image's mean over its patches. Our constructions, after Ma et al. 2022."
        )
    )
    if "window" in names:
        yield Drawing(figures.window_coverage(study.sample.isel(image=slice(COVERAGE_IMAGES)), None))
    if "tendency" in names:
        yield Drawing(figures.tendency_flow(study.sample))
    if "window_object_share" in names and "object_share" in study.sample:
        yield Drawing(figures.window_object_map(study.sample, None))
    if "hub" in names and bool(study.sample["hub"].any()):
        yield Drawing(figures.hub_map(study.sample, None))
    yield Table(
        "Layer by layer",
        ("layer", *(f"{line.title}, {line.unit}" for line in lines.values())),
        _rows(lines),
        "Means over images, with their 95 % interval." if study.n_images > 1 else "",
        folded=True,
    )
    yield readings(study, names)


def _rows(lines: dict[str, LayerQuantity]) -> list[list[str]]:
    n_layers = max(line.values.shape[1] for line in lines.values())
    return [[f"L{layer}", *(_cell(line.values[:, layer]) for line in lines.values())] for layer in range(n_layers)]


def _cell(values: Float[np.ndarray, "image"]) -> str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "none"
    low, high, reason = mean_interval(finite)
    return f"{finite.mean():z.3f}" + ("" if reason else f" ({low:z.3f} to {high:z.3f})")
