"""Attention patterns of a study: what is stored, stopped and resumed anywhere, placed again."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from tiny_studies import folder_bytes, tiny_vit, write_photos

from vitrail.analysis import analyses, declaration
from vitrail.figures.whole import draw_figures
from vitrail.heads.why import why_sentences
from vitrail.live import LiveModel
from vitrail.models.open import Vit
from vitrail.patterns.model import PatternModel, place_heads
from vitrail.patterns.tables import all_patterns, pattern_clusters, pattern_of_head
from vitrail.study import patterns as stage
from vitrail.study import planning
from vitrail.study.run import run_study
from vitrail.study.store import open_study, verify
from vitrail.study.writing import StudyFolder

N_IMAGES = 24


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), N_IMAGES)


@pytest.fixture(scope="module")
def vit() -> Vit:
    return tiny_vit()


@pytest.fixture(scope="module")
def finished(vit: Vit, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "study"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(planning, "PART_IMAGES", 8)
        run_study(vit, photos, out=out, measures="heads,patterns,regions", batch_size=8)
    return out


def test_every_measure_of_patterns_is_there_as_declared(finished: Path) -> None:
    study = open_study(finished)
    assert set(analyses()["patterns"].measure_names) < set(study.data_vars)
    for name, array in study.data_vars.items():
        measure = declaration(str(name))
        assert (array.dims, array.dtype, array.attrs) == (measure.dims, measure.dtype, measure.attributes()), name
    assert np.isfinite(study["pattern_patch_xy"]).all()
    assert np.isfinite(study["image_dependence"]).all()
    assert study.attrs["patterns"]["patch"]["n_held"] == 4 * 5
    assert verify(finished) == 3


def test_a_study_of_heads_alone_has_no_patterns(vit: Vit, photos: Path, tmp_path: Path) -> None:
    study = run_study(vit, photos, out=tmp_path / "study", measures="heads", limit=4)
    assert not {"pattern_rule", "image_dependence"} & set(study)
    assert not (tmp_path / "study" / "patterns").exists()


class Killed(BaseException):
    """Passes every `except Exception`, as the end of a process does."""


@pytest.mark.parametrize(
    "moment", ["write_pattern_model", "write_patterns", "_mark", "fit_patterns", "PatternStatistics"]
)
def test_stopped_at_any_step_and_resumed_it_gives_the_same_bytes(
    moment: str, vit: Vit, photos: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "study"
    monkeypatch.setattr(planning, "PART_IMAGES", 8)

    def stop(*_: object, **__: object) -> None:
        raise Killed

    home = StudyFolder if hasattr(StudyFolder, moment) else stage
    whole = getattr(home, moment)
    seen: list[object] = []

    def second(*arguments: object, **options: object) -> object:
        """The first call goes through, so that half of the work is done."""
        seen.append(arguments)
        return whole(*arguments, **options) if len(seen) == 1 else stop()

    once = moment in ("write_patterns", "PatternStatistics")
    with monkeypatch.context() as patched:
        patched.setattr(home, moment, stop if once else second)
        with pytest.raises(Killed):
            run_study(vit, photos, out=out, measures="heads,patterns,regions", batch_size=8)
    run_study(vit, photos, out=out, measures="heads,patterns,regions", batch_size=8)
    assert folder_bytes(out) == folder_bytes(finished)


def test_a_training_images_heads_are_placed_where_the_study_has_them(vit: Vit, photos: Path, finished: Path) -> None:
    study, model = open_study(finished), PatternModel.load(finished / "patterns" / "patch.safetensors")
    at = 3
    with Image.open(photos / str(study["image"].values[at])) as image:
        weights = LiveModel(vit).attention(image.convert("RGB"), 1)
    found = place_heads(model, 1, torch.as_tensor(weights))
    assert_array_equal(found.cluster, study["pattern_patch_cluster"][at, 1])
    size = float(np.ptp(study["pattern_patch_xy"].values.reshape(-1, 2), axis=0).max())
    assert_allclose(found.xy, study["pattern_patch_xy"][at, 1], atol=0.02 * size)


def test_tables_and_sentences_follow_from_the_study(finished: Path) -> None:
    study = open_study(finished)
    patterns = all_patterns(study)
    assert [(each.layer, each.head) for each in patterns] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert pattern_of_head(study, 1, 0).naming == patterns[2].naming
    for each in patterns:
        assert_allclose(each.share + sum(share for _, share in each.others), 1.0)
    for cluster in pattern_clusters(study):
        assert cluster.size == int((study["pattern_patch_cluster"] == cluster.number).sum())
    told = " ".join(why_sentences(study, 1, 0))
    assert f"Its pattern is {patterns[2].naming.label}" in told
    assert "does not hold" not in told


def test_one_image_has_patterns_and_no_image_dependence(vit: Vit, photos: Path, tmp_path: Path) -> None:
    study = run_study(vit, photos, out=tmp_path / "study", measures="patterns", limit=1)
    assert np.isfinite(study["pattern_patch_xy"]).all()
    assert np.isnan(study["image_dependence"]).all()
    assert study.attrs["patterns"]["patch"]["why"] == "PCA, unjudged: there is no second image to hold out"
    assert draw_figures(study, tmp_path / "figures", only=["patterns"])


def test_a_damaged_array_of_patterns_is_found_and_made_again(vit: Vit, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    before = run_study(vit, photos, out=out, measures="patterns", limit=6).load()
    chunk = out / "patterns" / "arrays.zarr" / "image_dependence" / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-3] + b"xyz")
    verify(out, repair=True)
    xr.testing.assert_identical(run_study(vit, photos, out=out, measures="patterns", limit=6).load(), before)
