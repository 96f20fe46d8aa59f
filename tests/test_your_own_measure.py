"""A measure from outside the package appears wherever Vitrail's own do: examples/your_own_measure.py, unedited."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import vitrail
from vitrail import analysis as spine
from vitrail.analysis import (
    Analysis,
    Need,
    Option,
    analyses,
    changed_options,
    make_collectors,
    measures_named,
    places,
    register,
    resolve_options,
    unregister,
)
from vitrail.errors import UsageError

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "your_own_measure.py"

SERVED = """
import sys; sys.argv = sys.argv[:1]
import runpy, json, vitrail.study.run
try:
    vitrail.study.run.run_study = None  # declares and registers; the study at the end is not run again
    runpy.run_path({example!r})
except TypeError:
    pass
from starlette.testclient import TestClient
from vitrail.app.server import create_app
with TestClient(create_app({study!r}), base_url="http://127.0.0.1:8765") as client:
    print(json.dumps(client.get("/api/study").json()["measures"]["self_attention"]))
"""


def command(*words: str, cwd: Path) -> str:
    """What the example's command line prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    command("study", "vitrail:photos", "photos", "--measures", "own", "--limit", "4", "--out", "study", cwd=folder)
    return folder / "study"


def test_threads_that_use_the_register_first_all_find_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    load = spine._load

    def load_slowly(point: EntryPoint) -> object:
        time.sleep(0.02)
        return load(point)

    everything = len(spine.measures())
    monkeypatch.setattr(spine, "_REGISTER", spine._Register())
    monkeypatch.setattr(spine, "_load", load_slowly)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: len(spine.measures()), range(4))) == [everything] * 4


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 60


def test_the_study_holds_the_measure_with_its_words(study: Path) -> None:
    array = vitrail.open_study(study)["self_attention"]
    assert array.shape == (4, 6, 3)
    assert array.attrs["title"] == "attention of a patch to itself"


def test_the_study_draws_its_figure(study: Path) -> None:
    assert (study / "figures" / "self_attention.png").is_file()


def test_the_report_has_its_section(study: Path) -> None:
    command("report", str(study), cwd=study.parent)
    assert "patches keep" in (study / "report.html").read_text(encoding="utf-8")


def test_a_look_holds_and_draws_it(study: Path) -> None:
    from PIL import Image
    from skimage.data import cat

    Image.fromarray(cat()).save(study.parent / "cat.png")
    out = command("look", "vitrail:photos", "cat.png", "--measures", "own", "--save", "--out", "look", cwd=study.parent)
    assert "patches keep" in out
    assert (study.parent / "look" / "cat" / "self_attention.png").is_file()


def test_the_page_lists_it(study: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    code = SERVED.format(example=str(EXAMPLE), study=str(study))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["dims"] == ["image", "layer", "head"]


def test_the_command_line_offers_it(study: Path) -> None:
    assert "own" in command("study", "--help", cwd=study.parent).split("--measures")[1].split("--masks")[0]


# --- the register ----------------------------------------------------------------------------------------------------


def measure(name: str = "mine", **options: object) -> vitrail.Measure:
    words = {"title": "a", "dims": ("image",), "unit": "1", "low": "", "high": "", "source": "a test", "limits": "all"}
    return vitrail.Measure(name=name, **words | options)  # type: ignore[arg-type]


def analysis(name: str = "own", **options: object) -> Analysis:
    return Analysis(name=name, title="", question="", **{"measures": (measure(),)} | options)  # type: ignore[arg-type]


def test_places_are_named_where_an_analysis_names_as_many_as_there_are() -> None:
    import numpy as np
    import xarray as xr

    def named(study: dict[str, object]) -> dict[str, tuple[str, ...]]:
        return {"feature": tuple(study["n"] * "x"), "rank": ("first", "second"), "side": ("a", "b", "c", "d")}

    register(analysis(places=named, measures=(measure(dims=("image", "feature")),)))
    try:
        data = {
            "mine": (("image", "feature"), np.zeros((2, 3))),
            "other": (("rank", "side", "xy"), np.zeros((5, 4, 2))),
        }
        found = places(xr.Dataset(data), {"n": 3})
        assert found == {"feature": ["x", "x", "x"], "side": ["a", "b", "c", "d"], "xy": ["x", "y"]}
        without = places(xr.Dataset(data).drop_vars("mine"), {"n": 3})
        assert without == {"side": ["left", "top", "right", "bottom"], "xy": ["x", "y"]}
    finally:
        unregister("own")


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        (lambda: analysis("heads"), "'heads' of the analysis 'heads' is taken"),
        (lambda: analysis("neurons"), "'neurons' of the analysis 'neurons' is taken"),
        (lambda: analysis(measures=(measure("window"),)), "'window' of the analysis 'own' is taken"),
        (lambda: analysis(measures=(measure(), measure())), "'mine' of the analysis 'own' is taken"),
        (lambda: analysis("My own"), "no name for an analysis"),
        (lambda: analysis(measures=(measure(needs=("luck",)),)), "needs luck, which no analysis explains"),
        (lambda: analysis(options=(Option("maps", ("x",), ""),)), "another option of the name 'maps'"),
        (lambda: analysis(options=(Option("none", (), ""),)), "has no choices"),
        (lambda: measure(dims=("image", "colour")), "dimensions colour; choose from image"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(declared, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        register(declared())
    assert "own" not in analyses()


def test_an_analysis_can_be_registered_again_when_a_notebook_cell_runs_twice() -> None:
    register(analysis())
    try:
        with pytest.raises(UsageError, match="taken"):
            register(analysis())
        again = register(analysis(measures=(measure("other"),)), replace_same_name=True)
        assert [each.name for each in measures_named("own")][-1] == "other"
        assert analyses()["own"] is again
    finally:
        unregister("own")
    with pytest.raises(UsageError, match="no analysis called 'own'"):
        unregister("own")


def test_options_are_checked_and_defaults_are_not_part_of_a_plan() -> None:
    assert resolve_options({"maps": "bfloat16"})["importance"] == "exact"
    assert changed_options({"maps": "bfloat16", "importance": "exact"}) == {"maps": "bfloat16"}
    for wrong in ({"maps": "float8"}, {"mapz": "model"}):
        with pytest.raises(UsageError, match="There is no option map"):
            resolve_options(wrong)


def test_a_need_that_is_not_met_leaves_the_measure_out_with_its_reason() -> None:
    need = Need("luck", "luck", lambda vit, options, measure: f"no luck with {measure.name}")
    register(analysis(needs=(need,), measures=(measure(needs=("luck",)),), collectors=lambda *_: pytest.fail("asked")))
    try:
        vit = vitrail.open_vit("vitrail:photos")
        assert vitrail.analysis.unavailable(vit, ["mine"]) == {"mine": "no luck with mine"}
        assert make_collectors(vit, ["mine"]) == []
    finally:
        unregister("own")


def test_a_measure_that_does_not_exist_is_answered_with_what_was_meant() -> None:
    with pytest.raises(
        UsageError, match=r"no measure called 'head_flips'\. Did you mean head_flip or .*Analyses: heads, "
    ):
        measures_named("heads,head_flips")
    with pytest.raises(UsageError, match=r"called 'zzz'\. Analyses: "):
        measures_named("zzz")
