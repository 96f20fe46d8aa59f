"""Studies whose estimates are corrected by a sweep over a sample of their images."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal
from tiny_studies import folder_bytes, tiny_vit, write_photos

from vitrail.analysis import make_collectors
from vitrail.comparison import compare
from vitrail.errors import Unsupported, UsageError
from vitrail.heads.correction import is_swept
from vitrail.heads.summary import correct_estimate, head_table
from vitrail.models.open import Vit
from vitrail.report.heads import heads
from vitrail.report.parts import ReportData
from vitrail.stats import spearman
from vitrail.study import planning
from vitrail.study.run import run_study
from vitrail.study.store import open_study
from vitrail.study.writing import StudyFolder

N_IMAGES = 106
CORRECTED = {"importance": "corrected"}
ESTIMATED = ("head_probability", "head_loss_change")


def run(vit: Vit, photos: Path, out: Path, importance: str = "corrected", **others: object) -> xr.Dataset:
    arguments = {"batch_size": 16, "measures": "heads", "options": {"importance": importance}} | others
    return run_study(vit, photos, out=out, **arguments)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PART_IMAGES", 32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), N_IMAGES)


@pytest.fixture(scope="module")
def corrected(vit: Vit, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corrected") / "study"
    before, planning.PART_IMAGES = planning.PART_IMAGES, 32
    try:
        run(vit, photos, out)
    finally:
        planning.PART_IMAGES = before
    return out


def test_swept_images_have_the_values_of_an_exact_study_and_all_have_those_of_an_estimate(
    vit: Vit, photos: Path, corrected: Path, tmp_path: Path
) -> None:
    study = open_study(corrected)
    exact = run(vit, photos, tmp_path / "exact", "exact")
    estimate = run(vit, photos, tmp_path / "estimate", "estimate")
    swept = np.array([is_swept(place) for place in range(N_IMAGES)])
    for name in ESTIMATED:
        found = study[f"{name}_exact"].to_numpy()
        assert_allclose(found[swept], exact[name].to_numpy()[swept], rtol=1e-5, atol=2e-6)
        assert np.isnan(found[~swept]).all()
        assert_array_equal(study[name], estimate[name])
        attrs = study[f"{name}_exact"].attrs
        assert all(attrs[key] for key in ("title", "unit", "low", "high", "source", "limits"))
    for name in ("head_cls_shift", "head_token_shift", "prefix_share"):
        assert_array_equal(study[name], exact[name])
    assert "head_probability_exact" not in {*exact, *exact.attrs["left_out"], *estimate, *estimate.attrs["left_out"]}
    table, sample = head_table(study), np.flatnonzero(swept)
    by_hand = correct_estimate(
        estimate["head_loss_change"].to_numpy(), sample, exact["head_loss_change"].to_numpy()[sample]
    )
    for column, values in zip(("mean", "low", "high"), by_hand, strict=True):
        assert_allclose(table[f"head_loss_change_{column}"], values, rtol=1e-3, atol=1e-5)


def test_a_study_that_is_interrupted_and_grows_has_the_same_bytes(
    vit: Vit, photos: Path, corrected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "study", StudyFolder.write_part

    def interrupt(study: StudyFolder, *arguments: object) -> None:
        if len(study.missing) == 1:
            raise KeyboardInterrupt
        write(study, *arguments)  # type: ignore[arg-type]

    run(vit, photos, out, measures="prefix_share", limit=101)
    monkeypatch.setattr(StudyFolder, "write_part", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(vit, photos, out, limit=101)
    monkeypatch.setattr(StudyFolder, "write_part", write)
    run(vit, photos, out, limit=101)
    run(vit, photos, out, worker=True)
    assert folder_bytes(out) == folder_bytes(corrected)


def test_which_images_are_swept_does_not_depend_on_the_batches(
    vit: Vit, photos: Path, corrected: Path, tmp_path: Path
) -> None:
    measures = ["head_loss_change", "head_loss_change_exact"]
    study, whole = run(vit, photos, tmp_path / "study", measures=measures, batch_size=6), open_study(corrected)
    for name in measures:
        assert_allclose(study[name], whole[name], rtol=1e-5, atol=2e-6)


def test_the_report_says_by_what_means_are_corrected(corrected: Path) -> None:
    section = heads(ReportData.of(corrected))
    assert section is not None
    n_exact = sum(map(is_swept, range(N_IMAGES)))
    assert f", corrected by {n_exact} exact images)" in str(section.findings[0])
    assert f"of the {n_exact} images whose heads were all pruned" in str(section.findings[1])
    assert any("Estimated on all images and corrected" in str(part) for part in section.parts())


def test_the_report_says_how_far_the_estimate_orders_heads_as_pruning_them_does(corrected: Path) -> None:
    section, study = heads(ReportData.of(corrected)), open_study(corrected)
    assert section is not None
    sample = np.flatnonzero([is_swept(place) for place in range(N_IMAGES)])
    rough, exact = (
        study[name].to_numpy()[sample].mean(0).ravel() for name in ("head_probability", "head_probability_exact")
    )
    said = str(section.findings[2])
    assert f"On the {len(sample)} images whose heads were all pruned" in said
    assert f"a rank correlation of {spearman(rough, exact):.2f} (" in said
    assert said.endswith("by the mean probability of the label without this head.")
    assert section.findings[2].measure == "head_probability"


def test_the_report_of_an_estimate_alone_says_that_its_order_was_not_measured_and_what_does(
    vit: Vit, photos: Path, tmp_path: Path
) -> None:
    for importance in ("estimate", "exact"):
        run(vit, photos, tmp_path / importance, importance, limit=4, measures="head_probability")
    section = heads(ReportData.of(tmp_path / "estimate"))
    assert section is not None
    said = str(section.findings[2])
    assert said.startswith("What heads cost is an estimate from one backward pass an image")
    assert "was not measured: --importance corrected prunes every head on one image in 4 (100 images or more)" in said
    exact = heads(ReportData.of(tmp_path / "exact"))
    assert exact is not None
    assert not [sentence for sentence in exact.findings if "estimate" in sentence]


def test_too_few_images_are_refused_with_what_to_do(vit: Vit, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"of 40 images that is 10\. Give 100 images or more, or take --importance exact"
    ):
        run(vit, photos, tmp_path / "study", limit=40)
    assert not (tmp_path / "study" / "study.json").exists()
    run(vit, photos, tmp_path / "study", measures="prefix_share", limit=40)
    with pytest.raises(UsageError, match="Give 100 images or more"):
        run(vit, photos, tmp_path / "study", limit=40)
    assert "head_probability" not in open_study(tmp_path / "study")


def test_an_estimate_without_what_corrects_it_is_refused(vit: Vit, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ask for head_loss_change_exact too, or for heads"):
        run(vit, photos, tmp_path / "study", measures="head_loss_change")
    with pytest.raises(Unsupported, match="use --importance corrected"):
        run(vit, photos, tmp_path / "study", "exact", measures="head_loss_change_exact")


def test_a_head_is_not_estimated_with_its_mean_in_its_place(vit: Vit, photos: Path, tmp_path: Path) -> None:
    mean = {"importance": "corrected", "ablation": "mean"}
    with pytest.raises(Unsupported, match="turns heads down to zero, not to their mean"):
        run(vit, photos, tmp_path / "study", measures="head_loss_change_exact", options=mean)
    study = run(vit, photos, tmp_path / "study", options=mean, limit=4)
    assert not {"head_probability", "head_probability_exact"} & set(study)
    assert "not to their mean" in study.attrs["left_out"]["head_probability"]


def test_outside_a_study_every_image_is_swept(vit: Vit) -> None:
    (collector,) = make_collectors(vit, ["head_loss_change_exact"], CORRECTED)
    (exact,) = make_collectors(vit, ["head_loss_change"])
    images = torch.randn((3, 3, *vit.image_size), generator=torch.Generator().manual_seed(0))
    tap, labels = vit.tap(), np.array([0, 1, 2])
    with torch.no_grad():
        replay, logits = tap.record(images)
        found = collector.finish(tap, replay, logits, labels)["head_loss_change_exact"]
        assert_allclose(found, exact.finish(tap, replay, logits, labels)["head_loss_change"], rtol=1e-4, atol=2e-6)


def test_two_such_studies_are_compared_where_both_have_exact_values(
    vit: Vit, photos: Path, corrected: Path, tmp_path: Path
) -> None:
    other = run(tiny_vit(seed=1), photos, tmp_path / "other")
    compared = compare(corrected, tmp_path / "other")
    one = open_study(corrected)["head_probability_exact"].to_numpy()
    expected = np.nanmean(other["head_probability_exact"].to_numpy() - one, 0)
    assert_allclose(compared["head_probability_exact_head_difference"], expected, rtol=1e-4, atol=1e-6)
