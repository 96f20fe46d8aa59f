"""The patches of a study: windows, responsive fields, tendencies and hubs."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from vitrail.figures import patches as figures
from vitrail.figures.layers import OverLayers, over_layers, per_image
from vitrail.report.parts import Drawing, Part, Section, Studied, Table, Text, percent, readings

__all__ = ["patches"]

COVERAGE_IMAGES = 64
"""Images whose windows are summed up in the picture."""


def patches(study: Studied) -> Section | None:
    """Windows, fields, tendencies and hubs over the images, if the study holds any of them."""
    held = study.held("patches")
    if not held:
        return None
    lines = _lines(study, held)
    return Section("patches", "Patches", tuple(_findings(lines)), tuple(_parts(study, lines, held)))


def _lines(study: Studied, held: list[str]) -> dict[str, OverLayers]:
    """A number per image and layer of everything the room measures."""
    sample = study.sample
    plain = ("field_size", "interaction_distance")
    found: dict[str, OverLayers] = {name: per_image(sample, name) for name in held if name in plain}
    if "tendency" in held:
        pulls = sample["tendency"].to_numpy().astype(np.float64)
        found["tendency"] = OverLayers(
            "length of the tendency", "patches", _mean(np.hypot(pulls[..., 0], pulls[..., 1]))
        )
    if "window" in held:
        sides = sample["window"].to_numpy().astype(np.float64)
        away = np.where(np.isnan(sides[..., 0]), np.nan, (sides < 0).any(-1))
        found["window"] = OverLayers("windows that do not hold their own patch", "share of patches", _mean(away))
    if "hub" in held:
        n_hubs = sample["hub"].to_numpy().sum(-1).astype(np.float64)
        n_hubs[:, [grid is None for grid in study.plan.grids]] = np.nan
        found["hub"] = OverLayers("hubs (indiscriminative patches)", "patches of an image", n_hubs)
    return found


def _mean(values: Float[np.ndarray, "image layer patch"]) -> Float[np.ndarray, "image layer"]:
    known = np.isfinite(values)
    return np.where(known.any(-1), np.where(known, values, 0).sum(-1) / np.maximum(known.sum(-1), 1), np.nan)


def _findings(lines: dict[str, OverLayers]) -> Iterator[str]:
    if "field_size" in lines:
        at, size = _extremes(lines["field_size"])
        yield (
            f"Half of what a patch takes from others lies in {percent(size[0])} of the grid in L{at[0]}, where fields "
            f"are smallest, and in {percent(size[1])} in L{at[1]}, where they are widest."
        )
    if "interaction_distance" in lines:
        at, far = _extremes(lines["interaction_distance"])
        yield (
            f"On average a patch takes from others {far[0]:.1f} patches away in L{at[0]}, the nearest, and "
            f"{far[1]:.1f} in L{at[1]}, the farthest."
        )
    if "window" in lines:
        at, away = _extremes(lines["window"])
        yield (
            f"In L{at[1]} {percent(away[1])} of the windows do not hold the patch that asks, in L{at[0]} "
            f"{percent(away[0])}."
        )
    if "hub" in lines:
        values = lines["hub"].values
        known = np.isfinite(values).any(0)
        some = np.where(known, (np.nan_to_num(values) > 0).mean(0), -1)
        layer = int(some.argmax())
        n_hubs = values[:, layer][values[:, layer] > 0]
        yield (
            f"Patches that everybody keeps appear in up to {percent(float(some[layer]))} of the images (L{layer}: "
            f"{n_hubs.mean():.1f} of them in an image that has some)."
            if len(n_hubs)
            else "No layer has patches that everybody keeps."
        )


def _extremes(line: OverLayers) -> tuple[tuple[int, int], tuple[float, float]]:
    """The layers with the lowest and the highest mean over images, and the means."""
    known = np.isfinite(line.values)
    means = np.where(known.any(0), np.where(known, line.values, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)
    low, high = int(np.nanargmin(means)), int(np.nanargmax(means))
    return (low, high), (float(means[low]), float(means[high]))


def _parts(study: Studied, lines: dict[str, OverLayers], held: list[str]) -> Iterator[Part]:
    if study.sample_words:
        yield Text(study.sample_words)
    title = f"Interactions over the layers, {study.sample.sizes['image']:,} images"
    yield Drawing(
        over_layers(
            list(lines.values()), title, "Each image's mean over its patches. Our constructions, after Ma et al. 2022."
        )
    )
    if "window" in held:
        yield Drawing(figures.window_coverage(study.sample.isel(image=slice(COVERAGE_IMAGES)), None))
    if "tendency" in held:
        yield Drawing(figures.tendency_flow(study.sample))
    if "hub" in held and bool(study.sample["hub"].any()):
        yield Drawing(figures.hub_map(study.sample, None))
    yield Table(
        "Layer by layer", ("layer", *(f"{line.title}, {line.unit}" for line in lines.values())), _rows(lines),
        "Means over images, with the half-width of their 95 % interval." if study.n_images > 1 else "", folded=True,
    )  # fmt: skip
    yield readings(study, held)


def _rows(lines: dict[str, OverLayers]) -> list[list[str]]:
    n_layers = max(line.values.shape[1] for line in lines.values())
    return [[f"L{layer}", *(_cell(line.values[:, layer]) for line in lines.values())] for layer in range(n_layers)]


def _cell(values: Float[np.ndarray, "image"]) -> str:
    known = values[np.isfinite(values)]
    if not len(known):
        return "none"
    half = f" ± {1.96 * known.std(ddof=1) / len(known) ** 0.5:.3f}" if len(known) > 1 else ""
    return f"{known.mean():.3f}{half}"
