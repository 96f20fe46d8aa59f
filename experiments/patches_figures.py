"""Figures of docs/patches: accuracy against area and patches removed, and the room's pictures of photographs."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from patches_common import MODELS, ROOT, cache_file, interval, opened
from patches_removal import DROPPED, removals_found
from patches_windows import windows_found
from PIL import Image

from vitrail.figures import patches as drawn
from vitrail.figures.style import COOL, INK, MARK, SOFT, blank, explain, save, styled
from vitrail.study.run import run_study
from vitrail.study.store import open_study

FOLDER = ROOT / "docs/patches"

WINDOWS = {
    "budget": (MARK, "-", "o", "budget: box per head, area where it counts"),
    "budget: same boxes, centred": (MARK, ":", "o", "the same boxes centred on their patch"),
    "one box": (COOL, "-", "s", "one box for all heads and queries alike"),
    "one box: centred square": (COOL, ":", "s", "a square of that area around the patch"),
}
ORDERS = {
    "least received, mean": (COOL, "-", "s", "least received first (mean)"),
    "least received, removal": (COOL, ":", "D", "least received first (removal)"),
    "random": (INK, "--", "^", "random"),
    "hubs first": (MARK, "-", "o", "hubs first"),
    "most class attention": (SOFT, ":", "v", "most watched by the class token first"),
}


def curves_experiment(options: argparse.Namespace) -> str:
    """Both figures, from the parts that are held of both models."""
    options.held = True
    made = []
    for name, found_of, draw in (("windows", windows_found, area_curves), ("removal", removals_found, removal_curves)):
        found = {}
        for model in MODELS:
            options.experiment, options.model, options.images = name, model, 1000
            found[MODELS[model]] = found_of(options)
        made.append(str(save(draw(found), FOLDER / f"{name}.png")))
    return "\n".join(made)


@styled
def area_curves(found: dict[str, dict[str, np.ndarray]]) -> object:
    """Change of top-1 and of the label's probability against the mean area, with 95 % bands."""
    figure = blank(9.2, 6.4, "Windows without retraining: what is lost at which area")
    places = figure.add_gridspec(2, len(found))
    for column, (model, values) in enumerate(found.items()):
        full = values["full"]
        for row, (kind, title) in enumerate(((0, "top-1, change in points"), (1, "p(label), change x 100"))):
            axes = figure.add_subplot(places[row, column])
            for rule, look in WINDOWS.items():
                cases = sorted(
                    (float(n.partition("@")[2].split(",")[0]), n) for n in values if n.partition("@")[0] == rule
                )
                kept = [values[name] for _, name in cases]
                x = [100 * float(each[:, 2].mean()) for each in kept]
                _curve(axes, x, [interval(each[:, kind] - full[: len(each), kind]) for each in kept], look)
            axes.axhline(0, color=INK, linewidth=0.8)
            axes.set(
                ylabel=title if column == 0 else "", xlabel="mean area a patch sees, % of the image" if row else ""
            )
            if row == 0:
                axes.set_title(f"{model}, {len(full)} photographs", fontsize=8)
    figure.axes[0].legend(fontsize=6.5, frameon=False, loc="lower right")
    explain(
        figure,
        "Every layer is masked at once; 0: full attention. Bands: 95 %, paired over photographs.",
        "Random places lose about 70 points and are left out. At 60 % 60 photographs, hence wide bands.",
    )
    return figure


def _of_rule(values: dict[str, np.ndarray], rule: str) -> list[np.ndarray]:
    return [each for name, each in values.items() if name.partition("@")[0] == rule]


@styled
def removal_curves(found: dict[str, dict[str, np.ndarray]]) -> object:
    """Change of top-1 against patches dropped from the middle on, with 95 % bands."""
    start = max(DROPPED)
    figure = blank(9.2, 3.9, f"Patches dropped before L{start}: which can go")
    places = figure.add_gridspec(1, len(found))
    for column, (model, values) in enumerate(found.items()):
        axes = figure.add_subplot(places[0, column])
        full = values["full"][:, 0]
        for order, look in ORDERS.items():
            kept = [values[f"{start}|{order}|{count}"][:, 0] for count in DROPPED[start]]
            _curve(axes, [0, *DROPPED[start]], [(0.0, 0.0, 0.0), *(interval(each - full) for each in kept)], look)
        axes.set_title(f"{model}, {len(full)} photographs", fontsize=8)
        axes.set(xlabel="patches dropped, of 196", ylabel="top-1, change in points" if column == 0 else "")
    figure.axes[0].legend(fontsize=6.5, frameon=False, loc="lower left")
    explain(figure, "Bands: 95 %, paired over photographs. Orders rest on one full pass.")
    return figure


def _curve(
    axes: plt.Axes, x: Sequence[float], y: Sequence[tuple[float, float, float]], look: tuple[str, str, str, str]
) -> None:
    colour, dashes, marker, label = look
    mean, low, high = np.array(y).T
    axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    axes.plot(x, mean, dashes, color=colour, marker=marker, markersize=3.5, linewidth=1.3, label=label)


def pictures_experiment(options: argparse.Namespace) -> str:
    """The room's figures of a cat and an astronaut, over the photograph."""
    from skimage import data

    folder = cache_file(options, "photographs")
    folder.mkdir(exist_ok=True)
    for name, pixels in {"cat": data.chelsea(), "astronaut": data.astronaut()}.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    vit = opened(options.model, options.data, "float32")
    run_study(vit, folder, out=folder.parent / "study", measures="patches", batch_size=2)
    study = open_study(folder.parent / "study")
    cat, astronaut = (vit.view(Image.open(folder / f"{name}.png").convert("RGB")) for name in ("cat", "astronaut"))
    figures: dict[str, Callable[[], object]] = {
        "arrows": lambda: drawn.tendency_arrows(study, "cat.png", cat),
        "flow": lambda: drawn.tendency_flow(study, "cat.png", cat),
        "windows-of-a-patch": lambda: drawn.windows_of_patch(study, 6 * 14 + 5, "cat.png", cat),
        "sums": lambda: drawn.window_coverage(study, "cat.png", cat),
        "hubs": lambda: drawn.hub_map(study, "astronaut.png", astronaut),
    }
    return "\n".join(_slim(save(draw(), FOLDER / f"{name}.png")) for name, draw in figures.items())


def _slim(file: Path) -> str:
    """The picture about as wide as a page shows it: a third of the bytes; its colours stay, for they carry meaning."""
    picture = Image.open(file).convert("RGB")
    picture.resize((1200, round(1200 * picture.height / picture.width)), Image.Resampling.LANCZOS).save(file)
    return str(file)
