"""How every figure looks: colours, type, the line that says how to read it, and files whose bytes repeat.

Nothing global changes: figures are `matplotlib.figure.Figure` objects made under `rc_context`, so no window, no pyplot
and no setting of the user's session is touched.
"""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from vitrail.errors import UsageError
from vitrail.measure import range_or_unit
from vitrail.outputs import FIGURE_SIGN, local_file, refuse_foreign_file

__all__ = [
    "ATTENTION",
    "BAND",
    "COOL",
    "DASHES",
    "FORMATS",
    "INK",
    "LINE",
    "MARK",
    "SOFT",
    "WHISKER",
    "Figure",
    "FigureTable",
    "axis_title",
    "blank",
    "colour_scale",
    "describe_measure",
    "explain",
    "figure_path",
    "head_name",
    "ink_on",
    "number",
    "picture",
    "refuse_formats",
    "save",
    "spaced_indices",
    "style_colorbar",
    "styled",
    "when",
]

INK, SOFT, LINE = "#1d2127", "#5a6170", "#e2dfd6"
COOL, BAND, MARK = "#0a628a", "#d7e3ea", "#c8470a"
WHISKER = "#a9bcc7"
"""The colours of the application's light page: text, second text, grid; line, its band, what is pointed at; bars."""

DEPTH = LinearSegmentedColormap.from_list(
    "vitrail_depth", mpl.colormaps["cividis"](np.linspace(0.03, 0.93, 256)), N=256
)
"""Cividis without its ends, as in the application: they stand out from ink and from paper."""

ATTENTION = LinearSegmentedColormap.from_list(
    "vitrail_attention",
    [(1.0, 0.87, 0.60, 0.0), (0.99, 0.65, 0.25, 0.75), (0.78, 0.28, 0.04, 0.92), (0.29, 0.05, 0.16, 0.97)],
)
"""Over a photograph in grey: clear where nothing is, then one hue that darkens, which print and any eye can order."""

DASHES: dict[str, tuple[int, tuple[float, ...]]] = {"dotted": (0, (2, 3)), "dashed": (0, (4, 3))}
"""Dotted: a reference such as the model with nothing pruned; dashed: a mean behind what is drawn."""

FORMATS = ("png", "svg", "pdf")
PNG_DPI = 200
METADATA = {
    "png": {"Software": "vitrail"},
    "svg": {"Date": None, "Creator": "vitrail"},
    "pdf": {"CreationDate": None, "Creator": "vitrail"},
}
"""Who wrote a file, and not when, which would change its bytes."""

SIGNS = {"png": FIGURE_SIGN, "svg": b"<dc:title>vitrail</dc:title>", "pdf": b"/Creator (vitrail)"}
"""How these entries look in a file: only figures of Vitrail's are overwritten."""

STYLE = {
    "font.family": ["sans-serif"],
    # The first is matplotlib's own, so that files repeat anywhere; an SVG names them all, and Verdana is as wide.
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Bitstream Vera Sans", "Arial"],
    "font.size": 8.0,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 8.0,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.edgecolor": "#cfcbc0",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,  # or every number beside an axis is parsed as a formula: half of all time
    "axes.formatter.useoffset": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": "#cfcbc0",
    "ytick.color": "#cfcbc0",
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": 7.0,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
    "lines.linewidth": 1.5,
    "lines.solid_joinstyle": "round",
    "savefig.facecolor": "white",
    "svg.hashsalt": "vitrail",
    "svg.fonttype": "none",  # text stays text: it can be searched, selected and edited
    "pdf.fonttype": 42,
    "pdf.compression": 6,
}

CHARACTERS_PER_INCH = {"title": 10.5, "explanation": 18.5}
"""Where lines break, by the width of the figure; measured with the sizes of the type."""

AXIS_CHARACTERS = 36
"""Longest line beside an axis: longer ones run over the side of a small chart."""

DARK_BELOW = 0.55
"""Luma (Rec. 601) under which a colour takes white text."""

STEPS = (1, 2, 4, 5, 8, 10, 12, 16, 20, 50, 100, 1000)

P = ParamSpec("P")
R = TypeVar("R")

FigureTable = tuple[tuple[str, Callable[[xr.Dataset], Figure | None]], ...]
"""Figures of an analysis in drawing order: the file's stem, and a function of a study that returns None where the study
holds nothing for it."""


def when(
    measured: Callable[[xr.Dataset], object], draw: Callable[[xr.Dataset], Figure | None]
) -> Callable[..., Figure | None]:
    """A function that draws a study where it holds what the figure needs, and returns None otherwise.

    Args:
        measured: Whether a study holds what is needed.
        draw: Draws such a study.

    Returns:
        A function of a study.
    """

    def draw_or_none(study: xr.Dataset) -> Figure | None:
        return draw(study) if measured(study) else None

    return draw_or_none


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Runs a drawing function under Vitrail's style, and leaves the session's settings as they were.

    Args:
        draw: A function that makes or writes a figure.

    Returns:
        The same function, under the style.
    """

    @wraps(draw)
    def draw_in_style(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return draw_in_style


def blank(width: float, height: float, title: str) -> Figure:
    """An empty figure with its title at the left.

    Args:
        width: Width in inches.
        height: Height in inches.
        title: The title; broken into lines where it is longer than the figure is wide.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    lines = textwrap.fill(title, int(width * CHARACTERS_PER_INCH["title"]))
    figure.suptitle(lines, x=0.008, ha="left", fontsize=10, fontweight="bold", color=INK)
    return figure


def explain(figure: Figure, *sentences: str) -> None:
    """Writes the lines under a figure: how to read it, and where the quantity comes from.

    Args:
        figure: The figure.
        sentences: Sentences; empty ones are left out.
    """
    text = " ".join(sentence.strip() for sentence in sentences if sentence.strip())
    per_line = int(figure.get_figwidth() * CHARACTERS_PER_INCH["explanation"])
    lines = textwrap.fill(text, per_line, break_long_words=False)
    figure.supxlabel(lines, x=0.008, ha="left", fontsize=6.8, color=SOFT, linespacing=1.35)


def describe_measure(attrs: Mapping[str, Any]) -> tuple[str, str, str]:
    """How to read low and high values of a measure, and its source, as sentences.

    Args:
        attrs: The attributes that a study holds beside the measure.

    Returns:
        Three sentences, empty where the attribute is missing.
    """
    low, high = (str(attrs.get(key, "")).replace(": ", ", ", 1) for key in ("low", "high"))
    source = attrs.get("source", "")
    return (
        f"Low: {low}." if low else "",
        f"High: {high}." if high else "",
        f"Source: {source}." if source else "",
    )


def refuse_formats(formats: Sequence[str]) -> None:
    """Refuses formats that figures cannot be written in.

    Args:
        formats: Endings of files without the dot.

    Raises:
        UsageError: One of them is unknown, or there is none.
    """
    unknown = [kind for kind in formats if kind not in FORMATS]
    if unknown or not formats:
        raise UsageError(
            f"Figures were asked for as {', '.join(unknown) or 'nothing'}; choose from {', '.join(FORMATS)}."
        )


@styled
def save(figure: Figure, path: str | Path) -> Path:
    """Writes a figure as PNG, SVG or PDF, by the path's ending; the same figure gives the same bytes.

    Args:
        figure: The figure.
        path: Where to write it; folders are made.

    Returns:
        The path.

    Raises:
        UsageError: The ending is another, the path is an address, or a file that Vitrail did not draw is there.
    """
    path = figure_path(path)
    kind = _kind(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format=kind, dpi=PNG_DPI, metadata=METADATA[kind])
    return path


def figure_path(path: str | Path) -> Path:
    """The file that a figure is going to be written to: asked before minutes of work are done for it.

    Args:
        path: As the user wrote it.

    Returns:
        The path.

    Raises:
        UsageError: The ending is another, the path is an address or no place for a file, or a file that Vitrail did not
            draw is there.
    """
    path = local_file(path)
    kind = _kind(path)
    if kind not in FORMATS:
        raise UsageError(f"A figure was to be written to {path.name!r}; it can be {', '.join(FORMATS)}.")
    refuse_foreign_file(path, SIGNS[kind])
    return path


def _kind(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


@styled
def picture(figure: Figure, kind: str, *, bare: bool = False) -> bytes:
    """A figure as the bytes of a PNG, SVG or PDF file.

    Args:
        figure: The figure.
        kind: png, svg or pdf.
        bare: Takes the title and the lines under the figure off, for good: for where they stand beside it as text.

    Returns:
        The content of the file.
    """
    if bare:
        figure.suptitle("")
        figure.supxlabel("")
    stream = io.BytesIO()
    cut: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.04} if bare else {}
    figure.savefig(stream, format=kind, dpi=PNG_DPI, metadata=METADATA[kind], **cut)
    return stream.getvalue()


def colour_scale(values: Float[np.ndarray, "..."]) -> tuple[Colormap, Normalize]:
    """Cividis over the range of the values; where they lie on both sides of 0, purple to orange around it.

    Args:
        values: Numbers; NaN is left out.

    Returns:
        Colours and the range they stand for.
    """
    finite = values[~np.isnan(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low < 0 < high:
        end = max(-low, high)
        return mpl.colormaps["PuOr_r"], TwoSlopeNorm(0.0, -end, end)
    half = 0.5 * abs(low) or 0.5
    return DEPTH, Normalize(low, high) if high > low else Normalize(low - half, low + half)


def ink_on(colour: Sequence[float]) -> str:
    """Dark or white text, whichever can be read on a colour.

    Args:
        colour: Red, green and blue, 0 to 1.

    Returns:
        The colour of the text.
    """
    return INK if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > DARK_BELOW else "white"


def head_name(layer: int, head: int) -> str:
    """The name of a head, zero-based as everywhere: L3H7.

    Args:
        layer: Index of the layer.
        head: Index of the head.

    Returns:
        The name.
    """
    return f"L{layer}H{head}"


def number(value: float) -> str:
    """A number with three significant digits, without an exponent where one can do without.

    Args:
        value: Any number.

    Returns:
        The text; "none" for NaN.
    """
    if np.isnan(value):
        return "none"
    if value == 0 or 1e-4 <= abs(value) < 1000:
        return f"{float(f'{value:.3g}'):.10g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1e}"


def axis_title(title: str, unit: str) -> str:
    """A quantity with its unit as an axis shows it, in lines short enough for the side of a small chart.

    Args:
        title: The quantity.
        unit: Its unit; "1" stands for a number from 0 to 1.

    Returns:
        The text, in lines.
    """
    unit = range_or_unit(unit)
    return textwrap.fill(title if not unit or unit == title else f"{title} ({unit})", AXIS_CHARACTERS)


def spaced_indices(n: int, at_most: int) -> list[int]:
    """Indices 0 to n - 1, thinned to about `at_most` by a round step.

    Args:
        n: How many indices there are.
        at_most: About how many to give.

    Returns:
        Indices in order.
    """
    step = next(step for step in STEPS if n / step <= at_most)
    return list(range(0, n, step))


def style_colorbar(bar: Any, label: str) -> None:
    """Gives a colour bar a label and takes its frame away.

    Args:
        bar: A matplotlib colour bar.
        label: What its colours stand for.
    """
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(length=2)
