"""Studies to report on: real ones of tiny models, with every room."""

import pytest
from tiny_reports import ROOMS, photographs, small_vit

from vitrail.study.run import run_study
from vitrail.vit.open import open_vit


@pytest.fixture(scope="session")
def crops(tmp_path_factory):
    """All rooms of the built-in model on labelled crops."""
    folder = tmp_path_factory.mktemp("report") / "crops"
    run_study(open_vit("vitrail:photos"), "photos", out=folder, limit=12, measures=",".join(ROOMS), batch_size=12)
    return folder


@pytest.fixture(scope="session")
def masked(tmp_path_factory):
    """All rooms, with objects, without labels."""
    folder = photographs(tmp_path_factory.mktemp("masked"))
    study = folder / "study"
    run_study(small_vit(), folder / "photos", out=study, measures=",".join(ROOMS), masks=folder / "masks", batch_size=4)
    return study
