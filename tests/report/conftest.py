"""Studies to report on: real ones of tiny models, with every analysis."""

from io import BytesIO

import pytest
from matplotlib.figure import Figure
from tiny_reports import ANALYSES, photographs, small_vit

from vitrail.models.open import open_vit
from vitrail.study.run import run_study


@pytest.fixture
def blank_pictures(monkeypatch):
    """Figures are made and not painted, three quarters of a report's time: for tests of what stands around them."""

    def save(_figure: Figure, target: BytesIO, **_options: object) -> None:
        target.write(b'<svg xmlns="http://www.w3.org/2000/svg" width="1pt" height="1pt"/>')

    monkeypatch.setattr(Figure, "savefig", save)


@pytest.fixture(scope="session")
def crops(tmp_path_factory):
    """All rooms of the built-in model on labelled crops."""
    folder = tmp_path_factory.mktemp("report") / "crops"
    run_study(open_vit("vitrail:photos"), "photos", out=folder, limit=12, measures=",".join(ANALYSES), batch_size=12)
    return folder


@pytest.fixture(scope="session")
def masked(tmp_path_factory):
    """All rooms, with objects, without labels."""
    folder = photographs(tmp_path_factory.mktemp("masked"))
    study = folder / "study"
    run_study(
        small_vit(), folder / "photos", out=study, measures=",".join(ANALYSES), masks=folder / "masks", batch_size=4
    )
    return study
