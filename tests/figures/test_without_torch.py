"""Every figure is drawn from a stored study in a process that cannot import torch, and none computes anything."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vitrail
from vitrail.analysis import analyses

SOURCES = Path(vitrail.__file__).parent
TESTS = Path(__file__).parents[1]
OLD_STUDY = TESTS / "study" / "old" / "study_0.1.0.zip"

WITHOUT_TORCH = """
import sys
for name in ("torch", "timm", "torchvision"):
    sys.modules[name] = None  # importing them raises
from pathlib import Path
from drawn_studies import study_of_everything
from vitrail.figures.whole import draw_figures
from vitrail.study.store import open_study
folder = Path(sys.argv[1])
stored = draw_figures(open_study(folder / "study"), folder / "stored", ("svg",))
print(*(path.stem for path in stored))
print(*(path.stem for path in draw_figures(study_of_everything(), folder / "planted", ("svg",))))
"""

STATISTICS = {
    "argmax", "argmin", "argsort", "bincount", "cov", "histogram2d", "mean", "median", "nanmean", "nanmedian",
    "nanpercentile", "nanquantile", "nanstd", "percentile", "polyfit", "quantile", "std", "var",
    "mean_interval", "share_interval", "quantile_interval",
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    shutil.unpack_archive(OLD_STUDY, folder / "study")
    path = os.pathsep.join(map(str, (SOURCES.parent, TESTS, TESTS / "figures")))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(folder)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stored, planted = done.stdout.splitlines()
    return folder, set(stored.split()), set(planted.split())


def test_every_figure_is_drawn_where_torch_cannot_be_imported(drawn):
    _, stored, planted = drawn
    assert planted == {
        figure.stem for analysis in analyses().values() for figure in analysis.all_figures() if not figure.one_image
    }
    # the stored study is of a plain classifier, on a few images without masks
    other_tasks = {"importance_map_head_value_change", "importance_map_head_output_shift"}
    others = {"window_area", "window_agreement", "grouping_by_layer", "pattern_clusters", "window_object_map"}
    others |= {"object_scores", "object_maps", "head_window_areas", "exciting_photographs"}
    assert planted - stored == other_tasks | others


def test_text_of_an_svg_stays_text(drawn):
    folder, *_ = drawn
    drawing = (folder / "planted" / "overview.svg").read_text(encoding="utf-8")
    assert "planted:everything, 6 images</text>" in drawing
    assert ">layer (index)</text>" in drawing
    assert "'DejaVu Sans', 'Verdana'" in drawing


@pytest.mark.parametrize("source", sorted((SOURCES / "figures").glob("*.py")), ids=lambda path: path.stem)
def test_a_figure_computes_no_statistics(source):
    """Colour scales may: `overlaid` and `view_panels` end theirs at a quantile of the pixels."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    of_scales = {"overlaid", "view_panels"}
    nodes = [
        node
        for part in tree.body
        if not (isinstance(part, ast.FunctionDef) and part.name in of_scales)
        for node in ast.walk(part)
    ]
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    names = {func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "") for func in calls}
    assert not names & STATISTICS
