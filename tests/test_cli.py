"""The command line: what it says at once, in how many lines, and that it is never silent."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from numpy.testing import assert_array_equal
from PIL import Image
from typer.testing import CliRunner

import vitrail
from synthetic_study import write_study
from vitrail import cli
from vitrail.cli import options
from vitrail.cli.page import study_photographs
from vitrail.errors import UsageError
from vitrail.report import write_report
from vitrail.study import progress, store
from vitrail.study.table import study_summary


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vitrail", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_version_is_printed() -> None:
    completed = run_cli("--version")
    assert (completed.returncode, completed.stdout.strip()) == (0, f"vitrail {vitrail.__version__}")


@pytest.mark.parametrize("command", [["report"], ["figures"], ["verify"], ["open"], ["prune", "--out", "pruned"]])
def test_a_folder_that_is_no_study_is_refused_before_anything_heavy_is_imported(
    command: list[str], tmp_path: Path
) -> None:
    code = (
        "import sys; from vitrail import cli\n"
        f"sys.argv = ['vitrail', *{command!r}, {str(tmp_path)!r}]\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert end.code == 1, end.code\n"
        "heavy = {'torch', 'xarray', 'zarr', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert completed.returncode == 0, completed.stderr
    assert "is not a study" in completed.stderr
    assert options.STUDY_PLAN == store.PLAN


@pytest.mark.parametrize(
    "command", [["study", "vitrail:photos", "photos", "--out"], ["curves"], ["prune"], ["compare"], ["artefacts", "m"]]
)
def test_every_command_refuses_a_seed_that_no_generator_takes(command: list[str], tmp_path: Path) -> None:
    for seed in ("-1", "5000000000"):
        result = CliRunner().invoke(cli.app, [*command, str(tmp_path), "--seed", seed], env={"COLUMNS": "200"})
        assert result.exit_code == 2
        assert "for '--seed'" in result.output


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are text there")
def test_a_name_that_is_no_utf_8_is_printed_with_escapes(tmp_path: Path) -> None:
    study = write_study(tmp_path / os.fsdecode(b"caf\xe9"), 8)
    command = [sys.executable, "-m", "vitrail", "report", str(study), "--json"]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert completed.returncode == 0, completed.stderr
    assert json.loads(completed.stdout)["study"] == str(study)


def test_measures_left_out_for_one_reason_share_a_line(tmp_path: Path) -> None:
    study = write_study(tmp_path, 8)
    left_out = {"first_measure": "no class token", "second_measure": "no class token", "third": "no grid"}
    plan = replace(store.read_plan(study), left_out=left_out)
    store_read = store.read_plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitrail.study.table.read_plan", lambda folder: plan if folder == study else store_read(folder))
        headline = str(study_summary(store.open_study(study), study)[0])
    assert [line for line in headline.splitlines() if "left out" in line] == [
        "left out: first_measure, second_measure: no class token",
        "left out: third: no grid",
    ]


def test_without_a_terminal_lines_say_that_a_study_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.02)
    with progress.Progress(True) as bars:
        bars.studying(0, 1_200)
        bars.advance(300)
        time.sleep(0.5)
    assert "studying: 300 of 1,200" in capsys.readouterr().err
    with progress.Progress(False) as bars:
        bars.studying(0, 1_200)
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_commands_run_under_the_type_checks_of_the_tests(tmp_path: Path) -> None:
    completed = CliRunner().invoke(cli.app, ["verify", str(write_study(tmp_path, 8))])
    assert completed.exit_code == 0, completed.output


OWN_MODEL = """
from torch import nn
from vitrail.contract.tiny_models import FAMILIES


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = next(each for each in FAMILIES if each.name == "timm ViT 18x2").model()

    def forward(self, images):
        values = self.inner(images)
        return {"first": values, "second": 2 * values}


def make():
    return Two()
"""


def test_what_the_output_means_and_how_large_images_may_be_can_be_said(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_MODEL)
    images = tmp_path / "images"
    images.mkdir()
    for name, side in (("small", 40), ("large", 80)):
        Image.new("RGB", (side, side), "teal").save(images / f"{name}.png")
    arguments = [f"{tmp_path / 'own.py'}:make", str(images), "--out", str(tmp_path / "study"), "--image-size", "64"]
    options = ["--task", "labels", "--output", "second", "--max-pixels", "2000", "--weights", "random", "--no-figures"]
    completed = CliRunner().invoke(cli.app, ["study", *arguments, *options, "--measures", "head_probability"])
    assert completed.exit_code == 0, completed.output
    plan, manifest = store.read_plan(tmp_path / "study"), store.read_manifest(tmp_path / "study")
    assert (plan.task, plan.output, plan.weights_from) == ("labels", "second", "random")
    assert plan.notes == ["L0-L2: H0-H2 are those of attns.0.attn; H3-H5 are those of attns.1.attn."]
    assert [entry.id for entry in manifest.images] == ["small.png"]
    assert "at most 2,000 are decoded" in manifest.skipped[0].reason
    write_report(tmp_path / "study", tmp_path / "report.html")
    assert "H3-H5 are those of attns.1.attn" in (tmp_path / "report.html").read_text()


def test_a_photograph_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_text("nonsense")
    for command in ("look", "open"):
        refused = CliRunner().invoke(cli.app, [command, "vitrail:photos", str(broken), str(tmp_path / "absent.png")])
        assert str(refused.exception).startswith(f"{broken}: not an image")


def test_photographs_are_opened_without_a_study(tmp_path: Path) -> None:
    """The folders' names are no labels, and a photograph alone in its pass has the numbers of a look."""
    files = [tmp_path / "cat" / "one.png", tmp_path / "dog" / "two.png"]
    for file, colour in zip(files, ("red", "navy"), strict=True):
        file.parent.mkdir()
        Image.new("RGB", (80, 64), colour).save(file)
    vit = vitrail.open_vit("vitrail:photos")
    study = study_photographs(vit, files[:1], tmp_path / "of-one", "heads")
    data = store.open_study(study)
    assert data["image"].values.tolist() == ["one.png"]
    assert "own" in str(data.attrs["labels_from"])
    expected = vitrail.look(vit, Image.open(files[0]), measures="heads")
    assert_array_equal(data["head_probability"].values, expected["head_probability"].values)
    both = store.open_study(study_photographs(vit, files, tmp_path / "of-two", "heads"))
    assert both.sizes["image"] == 2


def test_a_machine_reads_a_report_and_quiet_is_quiet(tmp_path: Path) -> None:
    study = write_study(tmp_path, 12)
    result = CliRunner().invoke(cli.app, ["report", str(study), "--json"])
    assert result.exit_code == 0, result.output
    findings = json.loads(result.stdout)["findings"]
    planted = [each for each in findings if (each["layer"], each["head"]) == (0, 1)]
    assert planted, "the report singles out no L0H1, whose pruning costs the most"
    assert {"section", "text", "measure", "images"} <= set(planted[0])
    assert not (study / "report.html").exists()
    refused = CliRunner().invoke(cli.app, ["report", str(study), "--json", "--out", "page.html"])
    assert isinstance(refused.exception, vitrail.VitrailError)
    quiet = CliRunner().invoke(cli.app, ["report", str(study), "--quiet"])
    assert (quiet.exit_code, quiet.output) == (0, "")
    assert (study / "report.html").is_file()


def test_a_machine_reads_a_check_and_a_study(tmp_path: Path) -> None:
    checked = CliRunner().invoke(cli.app, ["check", "vitrail:photos", "--json"])
    record = json.loads(checked.stdout)
    assert record["ok"] is True
    assert {each["name"]: each["holds"] for each in record["findings"]}
    assert "head_probability" in record["study"]["measures"]
    image = tmp_path / "images" / "one.png"
    image.parent.mkdir()
    Image.new("RGB", (64, 64), "teal").save(image)
    (image.parent / "two.png").write_text("nonsense")
    arguments = ["vitrail:photos", str(image.parent), "--out", str(tmp_path / "study"), "--no-figures"]
    run = CliRunner().invoke(cli.app, ["study", *arguments, "--measures", "prefix_share", "--json"])
    said = json.loads(run.stdout)
    assert said["images"] == 1
    assert said["accuracy"] is None
    assert set(said["skipped"]) == {"two.png"}
    again = CliRunner().invoke(cli.app, ["study", *arguments, "--measures", "prefix_share", "--quiet"])
    assert (again.exit_code, again.output) == (0, "")


def test_the_shell_completes_commands() -> None:
    environment = {**os.environ, "_VITRAIL_COMPLETE": "complete_bash", "COMP_WORDS": "vitrail ex", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['vitrail']; from vitrail.cli import app; app(prog_name='vitrail')"
    completed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert completed.stdout.split() == ["export"]


STOPPED = """
import os, signal, sys
from vitrail import cli
from vitrail.study.writing import StudyFolder

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a shell ignores it
write = StudyFolder.write_part
def interrupted(self, *given, **options):
    write(self, *given, **options)
    os.kill(os.getpid(), signal.SIGINT)
StudyFolder.write_part = interrupted
sys.argv = ["vitrail", *sys.argv[1:]]
cli.main()
"""


def test_ctrl_c_says_how_far_it_came_and_what_goes_on(tmp_path: Path) -> None:
    study = ["study", "vitrail:photos", "vitrail:photos", "--limit", "4", "--part-images", "2", "--batch-size", "2"]
    command = [*study, "--measures", "prefix_share", "--out", str(tmp_path / "study"), "--quiet"]
    completed = subprocess.run(
        [sys.executable, "-c", STOPPED, *command], capture_output=True, text=True, timeout=120, check=False
    )
    assert completed.returncode == 130, completed.stderr
    assert "Stopped. 1 of 2 parts are in " in completed.stderr
    assert "the same command goes on from there" in completed.stderr
    assert "Traceback" not in completed.stderr


@pytest.mark.parametrize(
    ("command", "target"),
    [
        (["figures"], "x"),
        (["export", "--to", "csv"], ""),
        (["prune", "--heads", "L0H0"], ""),
        (["matches", "vitrail:photos", "{image}", "vitrail:photos", "--patch", "0,0"], "x/m.png"),
        (["artefacts", "vitrail:photos", "vitrail:photos"], "x/a.png"),
        (["look", "vitrail:photos", "{image}"], ""),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_file_where_a_folder_has_to_be_is_said_before_anything_is_computed(
    command: list[str], target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*_given: object, **_options: object) -> None:
        raise AssertionError("a model was opened for nothing")

    monkeypatch.setattr("vitrail.models.open.open_vit", computed)
    monkeypatch.setattr("vitrail.study.reopen.open_vit", computed)
    image, file = tmp_path / "one.png", tmp_path / "file"
    Image.new("RGB", (64, 64), "teal").save(image)
    file.write_text("mine")
    study = [] if command[0] in ("matches", "artefacts", "look") else [str(write_study(tmp_path / "study", 8))]
    arguments = [each.replace("{image}", str(image)) for each in (command[0], *study, *command[1:])]
    refused = CliRunner().invoke(cli.app, [*arguments, "--out", str(file / target)])
    assert isinstance(refused.exception, vitrail.VitrailError), refused.exception
    assert f"{file} is no folder" in str(refused.exception)
    assert file.read_text() == "mine"


def test_options_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    study, image = str(write_study(tmp_path / "study", 8)), tmp_path / "one.png"
    Image.new("RGB", (64, 64), "teal").save(image)
    for command, said in (
        (["open", study, "--measures", "patches"], "--measures is for photographs"),
        (["open", "vitrail:photos", str(image), "--with", study], "--with compares studies"),
        (["prune", study, "--out", str(tmp_path / "p"), "--heads", "L0H0", "--ranking", "flips"], "one of the two"),
        (["export", study, "--to", "csv", "--measures", " ,"], "names nothing"),
        (["look", "vitrail:photos", str(image), "--measures", ","], "names nothing"),
        (["look", "vitrail:photos", str(image), "--patch", f"{'1' * 5000},0"], "has no meaning"),
        (["check", "vitrail:photos", "--image-size", "1" * 5000], "has no meaning"),
    ):
        refused = CliRunner().invoke(cli.app, command)
        assert isinstance(refused.exception, UsageError), (command[0], refused.exception)
        assert said in str(refused.exception)


def test_an_image_that_no_model_could_be_shown_is_named_before_the_first_is_looked_at(tmp_path: Path) -> None:
    files = [tmp_path / "good.png", tmp_path / "strip.png"]
    Image.new("RGB", (64, 64), "teal").save(files[0])
    Image.new("RGB", (20_000, 1), "teal").save(files[1])
    refused = CliRunner().invoke(cli.app, ["look", "vitrail:photos", *map(str, files), "--out", str(tmp_path / "out")])
    assert isinstance(refused.exception, vitrail.VitrailError)
    assert str(refused.exception).startswith(f"{files[1]}: ")
    assert not (tmp_path / "out").exists()


def test_json_is_json_on_an_output_that_is_no_utf_8(tmp_path: Path) -> None:
    study = write_study(tmp_path / "s\U0001f600", 8)
    completed = subprocess.run(
        [sys.executable, "-m", "vitrail", "report", str(study), "--json"],
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert json.loads(completed.stdout)["study"] == str(study)


def test_a_device_that_is_not_here_is_refused_in_a_line() -> None:
    with pytest.raises(UsageError, match="There is no device 'mps' here; there is cpu") as refused:
        vitrail.open_vit("vitrail:photos", device="mps")
    assert len(str(refused.value)) < 250


def test_weights_that_are_no_numbers_are_named_by_a_check() -> None:
    vit = vitrail.open_vit("vitrail:photos")
    name, weight = list(vit.model.named_parameters())[-1]
    weight.data.view(-1)[0] = float("nan")
    with pytest.raises(vitrail.VitrailError, match=rf"NaN or infinite numbers.*hold such numbers: {name}"):
        vitrail.check_vit(vit)
