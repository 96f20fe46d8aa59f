"""A study deletes and overwrites nothing that a study did not write."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_studies import DEAD_LOCK, folder_bytes, write_study

from vitrail.errors import MissingLibrary, StudyError, UsageError
from vitrail.models.open import Vit
from vitrail.study.locking import LOCK, folder_lock
from vitrail.study.ownership import MARKER, remove_arrays, write_access
from vitrail.study.plan import Plan
from vitrail.study.run import run_study
from vitrail.study.store import open_study


def write(path: Path, text: str = "years of work") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name",
    [
        "parts/engine.stl", "parts/00000.json", "patterns/dress.svg", "arrays.zarr/zarr.json", "images.json",
        "model.json", "survey.safetensors", "film.mkv.partial", "thesis.unfinished", "study.json.unfinished",
        ".lock", ".hidden",
    ],
)  # fmt: skip
def test_a_folder_with_files_of_somebody_else_is_refused_and_stays_as_it_was(
    name: str, any_plan: Plan, photos: Path, tmp_path: Path
) -> None:
    write(tmp_path / "out" / name)
    before = folder_bytes(tmp_path / "out")
    with pytest.raises(StudyError, match=r"holds other files \(.*\) and no study; name a new or empty folder"):
        write_study(tmp_path / "out", any_plan, photos)
    assert folder_bytes(tmp_path / "out") == before


def test_a_study_json_of_somebody_else_is_refused_and_stays_as_it_was(
    any_plan: Plan, photos: Path, tmp_path: Path
) -> None:
    write(tmp_path / "out" / "study.json", '{"title": "my study of bees"}')
    write(tmp_path / "out" / "parts" / "wing.txt")
    before = folder_bytes(tmp_path / "out")
    with pytest.raises(StudyError, match=r"study\.json"):
        write_study(tmp_path / "out", any_plan, photos)
    assert folder_bytes(tmp_path / "out") == before


def test_files_that_somebody_puts_into_a_study_outlive_every_run(any_plan: Plan, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    write_study(out, any_plan, photos)
    names = (
        "film.mkv.partial", "notes.unfinished", "patterns/dress.svg", "parts/drawing.partial", "parts/x.unfinished",
        "figures/mine.partial", "arrays.zarr/mine.partial", "deep/below/film.partial",
    )  # fmt: skip
    for name in names:
        write(out / name)
    (out / "parts" / "00001.json").unlink()
    write_study(out, any_plan, photos)
    open_study(out)
    assert {name: (out / name).read_text(encoding="utf-8") for name in names} == dict.fromkeys(names, "years of work")


def test_what_a_killed_run_left_half_written_is_removed(any_plan: Plan, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    write_study(out, any_plan, photos)
    complete = folder_bytes(out)
    chunk = "0123456789abcdef" * 2 + ".partial"
    for name in (
        f"{MARKER}.unfinished", "study.json.unfinished", "images.json.unfinished", "model.json.unfinished",
        "survey.safetensors.unfinished", "parts/00001.json.unfinished", "parts/derived.json.unfinished",
        "arrays.zarr.unfinished/zarr.json", "arrays.zarr.unfinished/head_flip/zarr.json",
        f"arrays.zarr/zarr.{chunk}", f"arrays.zarr/head_flip/c/1/0/0.{chunk}",
    ):  # fmt: skip
        write(out / name, "12")
    write(out / LOCK, DEAD_LOCK)
    write_study(out, any_plan, photos)
    assert folder_bytes(out) == complete


def test_a_half_written_store_with_files_of_somebody_else_is_not_removed(
    any_plan: Plan, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    write_study(out, any_plan, photos)
    thesis = write(out / "arrays.zarr.unfinished" / "thesis.tex")
    with pytest.raises(StudyError, match=r"a file that Vitrail did not write \(thesis\.tex\)"):
        write_study(out, any_plan, photos)
    assert thesis.is_file()


def test_nothing_behind_a_link_is_removed(tmp_path: Path) -> None:
    outside = write(tmp_path / "elsewhere" / "zarr.json")
    (tmp_path / "group").mkdir()
    (tmp_path / "group" / "head_flip").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(StudyError, match=r"did not write \(head_flip\)"):
        remove_arrays(tmp_path / "group")
    assert outside.is_file()


def test_the_marker_is_the_first_file_of_a_study(tmp_path: Path) -> None:
    with write_access(tmp_path / "study"):
        assert {path.name for path in (tmp_path / "study").iterdir()} == {LOCK, MARKER}


def test_a_run_that_begins_no_study_leaves_an_empty_folder_empty(tmp_path: Path) -> None:
    with write_access(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_begun_by_a_run_that_was_killed_is_gone_on_with(any_plan: Plan, photos: Path, tmp_path: Path) -> None:
    write(tmp_path / "out" / LOCK, DEAD_LOCK)
    write(tmp_path / "out" / f"{MARKER}.unfinished", "")
    write_study(tmp_path / "out", any_plan, photos)
    open_study(tmp_path / "out")


def test_results_whose_plan_is_lost_are_not_deleted(any_plan: Plan, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    write_study(out, any_plan, photos)
    (out / "study.json").unlink()
    before = folder_bytes(out)
    with pytest.raises(StudyError, match=r"holds results \(arrays\.zarr\) and no study\.json"):
        write_study(out, any_plan, photos)
    assert folder_bytes(out) == before


def test_a_study_from_before_the_marker_is_gone_on_with(any_plan: Plan, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    write_study(out, any_plan, photos)
    (out / MARKER).unlink()
    (out / "parts" / "00001.json").unlink()
    write_study(out, any_plan, photos)
    assert open_study(out).attrs["missing_images"] == 0


@pytest.mark.parametrize("address", ["s3://bucket/study", "gs://bucket", "hf://datasets/me/x", "file:///tmp/x"])
def test_an_address_is_no_folder(
    address: str, vit: Vit, any_plan: Plan, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("obstore", "obstore.exceptions", "obstore.store"):  # also where another test has imported them
        monkeypatch.setitem(sys.modules, name, None)
    is_store = address.startswith(("s3:", "gs:"))
    with pytest.raises(
        MissingLibrary if is_store else UsageError, match="pip install" if is_store else "is no object store"
    ):
        run_study(vit, photos, out=address)
    with pytest.raises(UsageError, match=r"is an address"):
        write_study(Path(address), any_plan, photos)
    assert os.listdir(tmp_path) == []


WITHOUT_FCNTL = """
import os, sys
from pathlib import Path

sys.modules["fcntl"] = None  # as on Windows, where it cannot be imported
from vitrail.errors import StudyError
from vitrail.study.locking import folder_lock

folder = Path(sys.argv[1])
with folder_lock(folder):
    try:
        with folder_lock(folder):
            print("both")
    except StudyError as error:
        print(str(error).replace(str(os.getpid()), "PID"))
print(folder.exists())
"""


def test_the_lock_needs_no_fcntl(tmp_path: Path) -> None:
    out = tmp_path / "study"
    done = subprocess.run([sys.executable, "-c", WITHOUT_FCNTL, str(out)], capture_output=True, text=True, check=False)
    host = socket.gethostname()
    expected = f"Process PID on {host} is writing {out}; wait until it has ended, or end it.\nFalse\n"
    assert (done.stdout, done.returncode) == (expected, 0), done.stderr


@pytest.mark.parametrize("content", ["", "12\n"])
def test_a_lock_that_names_nobody_or_was_written_by_an_older_version_holds_for_a_moment_only(
    content: str, tmp_path: Path
) -> None:
    write(tmp_path / LOCK, content)
    with folder_lock(tmp_path):
        assert f"pid={os.getpid()}" in (tmp_path / LOCK).read_text(encoding="utf-8")
    assert not (tmp_path / LOCK).exists()
