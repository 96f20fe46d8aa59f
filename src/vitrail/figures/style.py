"""How every figure looks: colours, type, the line that says how to read it, and files whose bytes repeat.

Nothing global changes: figures are `matplotlib.figure.Figure` objects made under `rc_context`, so no window, no pyplot
and no setting of the user's session is touched.
"""

import io
import textwrap
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from vitrail.errors import UsageError

__all__ = [
    "ATTENTION",
    "BAND",
    "COOL",
    "FORMATS",
    "INK",
    "LINE",
    "MARK",
    "SOFT",
    "WHISKER",
    "Figure",
    "axis_title",
    "blank",
    "colour_scale",
    "explain",
    "head_name",
    "ink_on",
    "number",
    "picture",
    "save",
    "styled",
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

FORMATS = ("png", "svg", "pdf")
PNG_DPI = 200
METADATA = {"png": {"Software": "vitrail"}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""What would otherwise put the time into a file."""

STYLE = {
    "font.family": ["DejaVu Sans"],
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
    "axes.formatter.use_mathtext": True,
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
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "pdf.compression": 6,
}

P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Runs a drawing function under Vitrail's style, and leaves the session's as it was."""

    @wraps(draw)
    def under_style(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return under_style


def blank(width: float, height: float, title: str) -> Any:
    """An empty figure, in inches, with its title at the left."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(
        textwrap.fill(title, int(width * 10.5)), x=0.008, ha="left", fontsize=10, fontweight="bold", color=INK
    )
    return figure


def explain(figure: Any, *sentences: str) -> None:
    """The line under a figure: how to read it, and where the quantity comes from. Empty sentences are left out."""
    text = " ".join(sentence.strip() for sentence in sentences if sentence.strip())
    per_line = int(figure.get_figwidth() * 18.5)
    figure.supxlabel(
        textwrap.fill(text, per_line, break_long_words=False),
        x=0.008,
        ha="left",
        fontsize=6.8,
        color=SOFT,
        linespacing=1.35,
    )


@styled
def save(figure: Any, path: str | Path) -> Path:
    """Writes a figure as PNG, SVG or PDF, by the path's ending; the same figure gives the same bytes.

    Raises `UsageError` for another ending.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise UsageError(f"A figure was to be written to {path.name!r}; it can be {', '.join(FORMATS)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format=kind, dpi=PNG_DPI, metadata=METADATA[kind])
    return path


@styled
def picture(figure: Any, kind: str, *, bare: bool = False) -> bytes:
    """A figure as the bytes of a PNG, SVG or PDF file. `bare` takes its title and the line under it off, for good:
    for where they stand beside the picture as text."""
    if bare:
        figure.suptitle("")
        figure.supxlabel("")
    stream = io.BytesIO()
    cut = {"bbox_inches": "tight", "pad_inches": 0.04} if bare else {}
    figure.savefig(stream, format=kind, dpi=PNG_DPI, metadata=METADATA[kind], **cut)
    return stream.getvalue()


def colour_scale(values: Float[np.ndarray, "..."]) -> tuple[Colormap, Normalize]:
    """Cividis over the range of the values; where they lie on both sides of 0, purple to orange around it."""
    known = values[~np.isnan(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if low < 0 < high:
        far = max(-low, high)
        return mpl.colormaps["PuOr_r"], TwoSlopeNorm(0.0, -far, far)
    half = 0.5 * abs(low) or 0.5
    return DEPTH, Normalize(low, high) if high > low else Normalize(low - half, low + half)


def ink_on(colour: Sequence[float]) -> str:
    """Dark or white text, whichever can be read on this colour (red, green, blue in 0 .. 1)."""
    return INK if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 0.55 else "white"


def head_name(layer: int, head: int) -> str:
    """Zero-based, as everywhere: L3H7."""
    return f"L{layer}H{head}"


def number(value: float) -> str:
    """Three significant digits, without an exponent where one can do without."""
    if np.isnan(value):
        return "none"
    if value == 0 or 1e-4 <= abs(value) < 1000:
        return f"{float(f'{value:.3g}'):.10g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1e}"


def axis_title(title: str, unit: str) -> str:
    """A quantity with its unit, as it stands on an axis, in lines short enough for the side of a small chart."""
    return textwrap.fill(title if not unit or unit == title else f"{title} ({unit})", 36)
