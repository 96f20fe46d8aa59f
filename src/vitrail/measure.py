"""What a measure is, and the closed list of words for its dimensions.

A measure is declared once, in data that needs no torch, by the analysis that computes it (`vitrail.analysis`). Whatever
reads a study (figures, the application, a notebook) finds title, unit, source and how to read it in the declaration,
which the store also writes beside the numbers.
"""

from dataclasses import dataclass

from vitrail.errors import UsageError

__all__ = ["DIMENSIONS", "PLACES", "Measure", "range_or_unit"]

DIMENSIONS = (
    "image",
    "layer",
    "head",
    "query",
    "key",
    "token",
    "patch",
    "hop",
    "channel",
    "class",
    "xy",
    "side",
    "row",
    "column",
    "amount",
    "cells",
    "mode",
    "rule",
    "cluster",
    "cls_cluster",
    "cell",
    "view_level",
    "relevance_method",
    "step",
    "filter",
    "rank",
    "token_channel",
    "excited_level",
    "feature",
)
"""The closed list of dimension words: types, store, JSON and TypeScript use these and no others."""

PLACES = {"xy": ("x", "y"), "side": ("left", "top", "right", "bottom")}
"""What the places along dimensions are called that mean the same in every measure; analyses name those of others."""


def range_or_unit(unit: str) -> str:
    """A unit as tables and axes print it.

    Args:
        unit: Of a measure.

    Returns:
        The range of a share, whose unit is "1"; any other unit as it is.
    """
    return "0 to 1" if unit == "1" else unit


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One quantity that a study holds for every image.

    Attributes:
        name: its name in the store; a public contract, never renamed.
        title: a few words for axes and tables.
        dims: words of `DIMENSIONS`, `image` first where there is a value for each image.
        unit: unit or range of the values, "1" for a share.
        low: meaning of a low value.
        high: meaning of a high value.
        source: the paper, or "our construction".
        limits: what the measure cannot tell.
        needs: names of `vitrail.analysis.Need`s that the model, the images or the options must meet.
        dtype: of the stored array.
        version: raised whenever the numbers change: a study with another version is refused, not mixed; asked for by
            name, a later version is measured anew for all images.
        derived: whether it needs all images, so that the study computes it after the last of them.
        value_range: lowest and highest value that is possible at all, in the unit of the measure; None where there is
            none. It bounds an interval where few images have values that differ (`vitrail.stats`).
        is_quantity: whether means and differences of it mean something; not of class ids, cluster numbers, places on a
            layout and pictures.
        depends_on: what decides the numbers beside model and image: options of the analysis by name, "label" (the
            label of the image), and of one image "patch" and "channel" (those that a look was asked for). None stands
            for all options of the analysis.
        baseline: the measure of the plain pass that this one is read against: their difference is what a change costs.
            Empty where values stand for themselves.
        analysis: the analysis that computes it; set by `Analysis`.
    """

    name: str
    title: str
    dims: tuple[str, ...]
    unit: str
    low: str
    high: str
    source: str
    limits: str
    needs: tuple[str, ...] = ()
    dtype: str = "float32"
    version: int = 1
    derived: bool = False
    value_range: tuple[float, float] | None = None
    is_quantity: bool = True
    depends_on: tuple[str, ...] | None = None
    baseline: str = ""
    analysis: str = ""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.dims) - set(DIMENSIONS))
        if unknown:
            raise UsageError(
                f"The measure {self.name!r} has dimensions {', '.join(unknown)}; choose from {', '.join(DIMENSIONS)}."
            )
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise UsageError(
                f"The measure {self.name!r} has the range {self.value_range}; give (lowest, highest) or leave it out."
            )

    @property
    def several_kinds(self) -> str:
        """The dimension along which its numbers are of several kinds, such as x and y, so that they have no mean in
        common; empty where there is none."""
        return next((name for name in self.dims if name in (*PLACES, "rule")), "")

    def attributes(self) -> dict[str, str | int]:
        """The declaration as the store writes it beside the array.

        Returns:
            Title, unit, low, high, source, limits, analysis and version by these names.
        """
        return {
            "title": self.title,
            "unit": self.unit,
            "low": self.low,
            "high": self.high,
            "source": self.source,
            "limits": self.limits,
            "room": self.analysis,  # the word of older studies, which other tools may read
            "analysis": self.analysis,
            "version": self.version,
        }
