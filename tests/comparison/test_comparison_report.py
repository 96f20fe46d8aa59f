"""The comparison as one file and as a command: it says what the numbers say, and what cannot be said."""

import re
from pathlib import Path

import numpy as np
import pytest
from test_compare import NAMES, N, numbers, write
from typer.testing import CliRunner

import vitrail
from vitrail.cli import app
from vitrail.comparison.findings import comparison_findings, measures_by_effect
from vitrail.report.comparison import write_comparison


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The second model reaches half a patch further, most in its last layer, and its heads are those of the first."""
    tmp = tmp_path_factory.mktemp("report")
    a, b = numbers(0), numbers(1)
    b["attention_distance"] = b["attention_distance"] + np.array([0.2, 0.3, 0.4, 1.1])[:, None]
    for arrays in (a, b):
        arrays["thumbnail"] = np.zeros((N, 8, 8, 3), np.uint8) + np.arange(N, dtype=np.uint8)[:, None, None, None]
    return write(tmp / "before", a, NAMES, model="timm:a"), write(tmp / "after", b, NAMES, model="timm:b<i>")


@pytest.fixture(scope="module")
def compared(folders):
    return vitrail.compare(*folders)


def test_the_sentences_say_what_the_numbers_say(compared):
    findings = comparison_findings(compared)
    row = compared.sel(measure="attention_distance")
    told = next(sentence for sentence in findings if sentence.startswith("Mean attention distance"))
    a, b, shift = (f"{float(row[name]):.3g}" for name in ("mean_a", "mean_b", "mean_difference"))
    assert told.startswith(f"Mean attention distance (patches) is {a} in a and {b} in b<i>: +{shift} (")
    assert (told.measure, told.layer) == ("attention_distance", 3)
    assert "most at L3 (+1." in told
    assert any(sentence.startswith("1 of 6 measures differs") for sentence in findings)
    same = float(compared["same_prediction"].mean())
    assert any(f"the same class for {100 * same:.1f} % of the images" in sentence for sentence in findings)
    assert any("which chance may give" in sentence for sentence in findings)
    assert any("compared head by head" in sentence for sentence in findings)
    assert measures_by_effect(compared)[0] == "attention_distance"


def test_models_that_do_not_differ_are_not_said_to(folders, tmp_path):
    other = write(tmp_path / "other", {k: v for k, v in numbers(9).items() if k != "prediction"}, NAMES)
    findings = comparison_findings(vitrail.compare(folders[0], other))
    assert any(sentence.startswith("None of 6 measures differs") for sentence in findings)
    assert not any("right about" in sentence for sentence in findings)


def test_the_file_holds_everything_and_escapes_names(folders, compared, tmp_path):
    target, _ = write_comparison(*folders, tmp_path / "compared.html")
    text = target.read_text()
    assert "b<i>" not in text
    assert "timm:b&lt;i&gt;" in text
    assert text.count("<img") >= 4 + 10
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    for name in compared["measure"].values:
        title = str(compared.sel(measure=name)["title"].item())
        assert title in text
    assert write_comparison(*folders, tmp_path / "again.html")[0].read_bytes() == target.read_bytes()


def test_the_command_prints_the_findings_and_refuses_in_sentences(folders, tmp_path):
    runner = CliRunner()
    done = runner.invoke(app, ["compare", *map(str, folders), "--out", str(tmp_path / "c.html")])
    assert done.exit_code == 0, done.output
    shift = float(vitrail.compare(*folders)["mean_difference"].sel(measure="attention_distance"))
    assert "Mean attention distance (patches) is" in done.output
    assert f": {shift:+.3g} (" in done.output
    assert "c.html" in done.output
    assert (tmp_path / "c.html").is_file()
    same = runner.invoke(app, ["compare", str(folders[0]), str(folders[0])])
    assert "compared with itself" in str(same.exception)
    unknown = runner.invoke(app, ["compare", *map(str, folders), "--measures", "zebra"])
    assert "zebra was to be compared" in str(unknown.exception)
