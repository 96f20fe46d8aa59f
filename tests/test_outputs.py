"""Vitrail overwrites its own files and nobody else's, wherever it writes."""

from pathlib import Path

import pytest
import torch

from vitrail.errors import UsageError
from vitrail.figures.style import blank, save
from vitrail.outputs import local_path, refuse_foreign_file
from vitrail.wint import folder as wint_folder
from vitrail.wint.model import Shape, WinT
from vitrail.wint.train import _refuse_other_files


@pytest.mark.parametrize("address", ["s3://bucket/a", "gs:/bucket", "file:///tmp/a", "https://host/a", "memory://a"])
def test_addresses_are_refused(address: str) -> None:
    with pytest.raises(UsageError, match="is an address"):
        local_path(address)


@pytest.mark.parametrize("path", ["study", "/tmp/a:b/c", "C:/study", "a b/c:d", "./s3:x"])
def test_paths_are_paths(path: str) -> None:
    assert local_path(path) == Path(path)


def test_a_file_without_the_sign_is_refused_and_an_empty_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"words")
    with pytest.raises(UsageError, match="was not written by Vitrail"):
        refuse_foreign_file(tmp_path / "mine", b"sign")
    with pytest.raises(UsageError, match="cannot be read"):
        refuse_foreign_file(tmp_path, b"sign")
    (tmp_path / "empty").touch()
    refuse_foreign_file(tmp_path / "empty", b"sign")
    refuse_foreign_file(tmp_path / "missing", b"sign")


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_figures_are_drawn_over_figures_and_over_nothing_else(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"heads.{kind}"
    save(blank(3.0, 2.0, "first"), path)
    first = path.read_bytes()
    save(blank(3.0, 2.0, "second"), path)
    assert path.read_bytes() != first
    own = b"%PDF-1.4 /Creator (somebody) vitrail"
    path.write_bytes(own)
    with pytest.raises(UsageError, match=rf"heads\.{kind} was not written by Vitrail"):
        save(blank(3.0, 2.0, "third"), path)
    assert path.read_bytes() == own


def test_a_wint_is_written_over_a_wint_and_over_no_other_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WinT(Shape(image_px=(32, 32), patch_px=8, width=24, depth=1, heads=2, n_classes=3))
    wint_folder.save(model, tmp_path / "ours")
    wint_folder.save(model, tmp_path / "ours")
    for name in ("config.json", "model.safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text('{"architectures": ["ViTModel"]}', encoding="utf-8")
        with pytest.raises(UsageError, match=rf"holds another model \({name}\)"):
            wint_folder.save(model, folder)
        assert [path.name for path in folder.iterdir()] == [name]


def test_a_training_begins_in_no_folder_with_other_files(tmp_path: Path) -> None:
    _refuse_other_files(tmp_path)
    (tmp_path / ".recipe.json.4711").touch()
    _refuse_other_files(tmp_path)
    (tmp_path / "steps.csv").write_text("step,loss\n1,2\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"holds other files \(.*steps\.csv\) and no training"):
        _refuse_other_files(tmp_path)
    (tmp_path / "recipe.json").touch()
    _refuse_other_files(tmp_path)
