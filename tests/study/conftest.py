"""What tests of studies share."""

from pathlib import Path

import pytest
from tiny_studies import BATCH_SIZE, N_IMAGES, tiny_vit, write_photos

from vitrail.analysis import declaration
from vitrail.data import open_images, scan
from vitrail.models.open import Vit
from vitrail.study import planning
from vitrail.study.plan import Plan


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one batch instead of about 64 images, so that small studies have several."""
    monkeypatch.setattr(planning, "PART_IMAGES", BATCH_SIZE)


@pytest.fixture(scope="session")
def vit() -> Vit:
    return tiny_vit()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), N_IMAGES)


@pytest.fixture
def any_plan(vit: Vit, photos: Path) -> Plan:
    """A plan for studies whose numbers come from no model."""
    manifest = scan(open_images(photos))
    measures = [declaration("head_probability"), declaration("head_flip")]
    return planning.make_plan(
        vit, manifest, measures, left_out={}, options={}, batch_size=BATCH_SIZE, seed=0, threads=1
    )
