"""What a notebook shows: a model, its check, a study and one image, each with everything inside."""

import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import xarray as xr
from PIL import Image

import vitrail
from synthetic_study import write_study
from vitrail.errors import StudyError, UsageError, WeightsMismatch
from vitrail.markup import html_table
from vitrail.notebook import Page
from vitrail.report import findings_of, write_look


class Words(HTMLParser):
    """The text of a page, and the addresses that it names."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.cells.append(data.strip())

    def handle_starttag(self, tag: str, attrs) -> None:
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2, num_classes=5
    )
    return vitrail.open_vit(model.eval(), image_size=32)


def inside(page: Page) -> str:
    """The page in the frame, as a browser reads it from the attribute."""
    frame = page._repr_html_()
    (document,) = re.findall(r'srcdoc="([^"]*)"', frame)
    assert "allow-same-origin" not in frame
    return unescape(document)


def test_a_model_is_shown_as_its_anatomy(vit):
    cells = Words(vit._repr_html_()).cells
    assert {"L0-L1", "token", "2", "1 + 4x4", "32 x 32 pixels"} <= set(cells)
    assert {"L0-L1", "token", "2", "1 + 4x4"} <= set(Words(vit.anatomy._repr_html_()).cells)


def test_a_check_is_shown_promise_by_promise(vit):
    report = vitrail.check_vit(vit, quick=True)
    cells = Words(report._repr_html_()).cells
    assert [each.name for each in report.findings if each.name not in cells] == []
    assert cells[-1] == report.verdict


def test_nothing_in_a_table_is_read_as_markup():
    hostile = "<img src=x onerror=alert(1)>"
    words = Words(html_table(hostile, [(hostile, "1")], (hostile,), hostile))
    assert words.cells.count(hostile) == 4
    assert words.addresses == []


def test_one_image_is_shown_with_its_findings_and_figures(vit, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    look = vitrail.look(vit, Image.fromarray(pixels).resize((40, 36)), name="cat & dog", measures="heads")
    page = vitrail.show(look, height=500)
    assert "height:500px" in page._repr_html_()
    document = inside(page)
    words = Words(document)
    assert all(sentence in words.cells for sentence in findings_of(look))
    pictures = [address for address in words.addresses if address.startswith("data:image/")]
    assert len(pictures) >= 5  # the photograph and the figures of heads
    assert [each for each in words.addresses if not each.startswith(("data:", "#"))] == []
    assert page.save(tmp_path / "page.html").read_text(encoding="utf-8") == document
    assert write_look(look, tmp_path / "look.html").read_text(encoding="utf-8") == document


def test_a_study_is_shown_by_its_dataset_as_by_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("vitrail.notebook.export_html", lambda folder, live, images: f"{Path(folder).name} {images}")
    folder = write_study(tmp_path / "mine", 6)
    assert (
        vitrail.show(vitrail.open_study(folder), images=[2]).html
        == vitrail.show(folder, images=[2]).html
        == "study [2]"
    )


def test_some_images_of_a_study_are_those_whose_photographs_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("vitrail.notebook.export_html", lambda _folder, _live, images: str(images))
    study = vitrail.open_study(write_study(tmp_path, 20))
    assert vitrail.show(study).html == "None"
    assert vitrail.show(study.isel(image=[7, 2])).html == "[7, 2]"
    assert vitrail.show(study.isel(image=3)).html == "[3]"
    assert vitrail.show(study.isel(image=slice(1, 20))).html == str(list(range(1, 13)))
    assert vitrail.show(study.isel(image=[7, 2]), images=[1]).html == "[1]"


def test_a_page_is_saved_where_folders_are_missing_and_at_home(tmp_path, monkeypatch):
    page = Page("<p>words</p>")
    assert page.save(tmp_path / "no" / "such" / "page.html").read_text("utf-8") == page.html
    monkeypatch.setenv("HOME", str(tmp_path))
    assert page.save("~/page.html") == tmp_path / "page.html"
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written to"):
        page.save(tmp_path / "file" / "page.html")


def test_a_study_is_not_shown_with_the_attention_of_another_model(vit, tmp_path):
    with pytest.raises(WeightsMismatch, match="studied with other weights"):
        vitrail.show(write_study(tmp_path, 6), vit)


def test_what_cannot_be_shown_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UsageError, match="vitrail report FOLDER"):
        vitrail.show(xr.Dataset({"probability": ("image", [0.5, 0.25])}))
    with pytest.raises(UsageError, match="no images any more"):
        vitrail.show(vitrail.open_study(write_study(tmp_path / "mine", 6)).mean("image", keep_attrs=True))
    with pytest.raises(UsageError, match="give a study, its folder"):
        vitrail.show(3)
    with pytest.raises(StudyError, match="absent"):
        vitrail.show(tmp_path / "absent")
