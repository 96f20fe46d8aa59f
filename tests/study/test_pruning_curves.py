"""Pruning curves of a study: the answers are those of the model with heads masked, and the report draws them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from vitrail.cli import app
from vitrail.contract.tiny_models import FAMILIES
from vitrail.data import LabelSource, stored_image
from vitrail.errors import DamagedStudy, StudyError, Unsupported, UsageError
from vitrail.models.open import open_vit
from vitrail.pruning import curves as curves_module
from vitrail.pruning.curves import measure_curves
from vitrail.pruning.ranking import CURVES_FILE, Curves, halves, orders, read_curves, scores
from vitrail.report import write_report
from vitrail.report.heads import curve_findings
from vitrail.study.run import run_study
from vitrail.study.store import open_study, read_manifest
from vitrail.tap.edits import Edit

N_PHOTOS, N_TEST = 20, 6


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("curves") / "study"
    run_study(open_vit("vitrail:photos"), "photos", out=out, measures="heads", limit=N_PHOTOS)
    return out


def test_curves_are_the_answers_with_heads_masked_and_reach_the_report(study: Path, tmp_path: Path) -> None:
    write_report(study, tmp_path / "before.html")
    assert "vitrail curves STUDY" in (tmp_path / "before.html").read_text()
    curves = measure_curves(study, rankings=["flips", "probability"], n_test=N_TEST, n_random=3)
    dataset, vit = open_study(study), open_vit("vitrail:photos")
    half = halves(N_PHOTOS)
    order = orders(scores(dataset, half.calibration)["flips"])
    manifest = read_manifest(study)
    test = np.sort(np.random.default_rng(0).permutation(half.test)[:N_TEST])  # not the first classes alone
    images = vit.prepare([stored_image(manifest, manifest.images[at]) for at in test])
    labels = dataset["label"].to_numpy()[test]
    assert curves.counts[0] == 0
    assert curves.counts[-1] == len(order) == sum(vit.n_heads)
    for at, count in enumerate(curves.counts):
        for first, chosen in (("least", order[:count]), ("most", order[::-1][:count])):
            with torch.no_grad():
                edits = [Edit(layer, prune=(head,)) for layer, head in chosen]
                answers = vit.tap().read(images, edits=edits).argmax(-1).numpy()
            np.testing.assert_array_equal(getattr(curves, first)["flips"][at], answers == labels)
    assert curves.random.shape == (3, len(curves.counts), N_TEST)
    again = read_curves(study)
    np.testing.assert_array_equal(again.most["probability"], curves.most["probability"])
    np.testing.assert_array_equal(again.random, curves.random)
    accuracy = curves.accuracy("least", next(iter(curves.least)))
    finding = curve_findings(curves)[0]
    assert f"Of {len(order)} heads" in finding
    assert f"{100 * accuracy[0]:.0f} %" in finding.replace(".0 %", " %")
    write_report(study, tmp_path / "after.html")
    page = (tmp_path / "after.html").read_text()
    assert "vitrail curves STUDY" not in page
    assert "Accuracy with heads pruned one after the other" in page
    assert finding in page


def test_a_ranking_of_some_heads_alone_has_no_curve_over_all(tmp_path: Path) -> None:
    """Of CaiT the class token is there in the last layers alone, so a shift of it ranks few of the heads."""
    model = next(each for each in FAMILIES if each.name == "timm CaiT").make()
    vit = open_vit(model, mean=0.5, std=0.5)
    run_study(vit, "photos", out=tmp_path / "study", measures="heads", limit=6)
    held = scores(open_study(tmp_path / "study"))
    assert len(orders(held["class token"])) < len(orders(held["probability"])) == sum(vit.n_heads)
    curves = measure_curves(tmp_path / "study", n_test=2, n_random=1, model=vit)
    assert "class token" not in curves.least
    assert curves.counts[-1] == sum(vit.n_heads)
    assert curves.labels == LabelSource.PREDICTED
    assert "one point of agreement with the model's own answers" in str(curve_findings(curves)[0])
    with pytest.raises(UsageError, match=r"class token has no number for \d+ of the"):
        measure_curves(tmp_path / "study", rankings=["class token", "probability"], model=vit)


def test_a_loss_of_exactly_one_point_is_at_most_one_point() -> None:
    counts = np.array([0, 5, 10])
    right = np.arange(100)[None] < np.array([7, 6, 0])[:, None]  # of 100 images; 0.07 - 0.01 is above 0.06 in binary
    finding = curve_findings(Curves(counts, {"rank": right}, {"rank": right}, right[None]))[0]
    assert "Of 10 heads 5 can go together for at most one point" in finding


def test_the_best_of_several_rankings_is_said_to_know_no_more_than_chance_gives_it() -> None:
    counts = np.array([0, 5, 10])
    answers = lambda *right: np.arange(100)[None] < np.array(right)[:, None]  # noqa: E731
    spread = np.stack([answers(90, middle, 0) for middle in (20, 40, 60, 80)])
    least, most = answers(90, 70, 0), answers(90, 30, 0)
    several = Curves(counts, {"a": least, "b": most}, {"a": most, "b": least}, spread)
    spared, area, over = curve_findings(several)
    assert "on these images, least important first by a, the best of 2 rankings on these images" in spared
    assert "0 is the mean of rankings that know nothing, and the best of 2 of them may reach" in area
    assert "that a knows which heads matter is not shown; more orders at random may tell" in area
    assert "is not shown to keep more than an order at random does" in over
    assert over.endswith("beating 3 of 4.")
    alike = np.stack([answers(90, middle, 0) for middle in (40, 41, 42, 43)])
    _, area, over = curve_findings(Curves(counts, several.least, several.most, alike))
    assert area.endswith("that a knows which heads matter is shown.")
    assert "it keeps more than an order at random does" in over
    assert len(curve_findings(Curves(counts, several.least, several.most, alike[:1]))) == 2


def test_the_command_says_how_many_can_go(study: Path) -> None:
    result = CliRunner().invoke(app, ["curves", str(study), "--test", "2", "--random-orders", "2"])
    assert result.exit_code == 0, result.output
    assert "can go together for at most one point of accuracy" in " ".join(result.output.split())


def test_curves_of_a_study_that_grows_or_cannot_be_written_to_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, vit, real = tmp_path / "study", open_vit("vitrail:photos"), curves_module.StudyImages.correct

    def measure(n_photos: int) -> None:
        run_study(vit, "photos", out=study, measures="head_probability", limit=n_photos)

    def grow_and_measure(self: object, *arguments: object) -> object:
        measure(6)
        return real(self, *arguments)

    measure(4)
    with monkeypatch.context() as patched:
        patched.setattr(curves_module.StudyImages, "correct", grow_and_measure)
        with pytest.raises(StudyError, match=r"other images than when its pruning curves were begun.*again"):
            measure_curves(study, n_test=2, n_random=1)
    assert read_curves(study) is None
    monkeypatch.setattr(curves_module, "reopen", pytest.fail)  # nothing is opened or run in vain
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(StudyError, match=r"cannot be written to .*: Read-only file system\. Make room, or copy"):
        measure_curves(study)


def test_what_has_no_curves_says_so(study: Path, tmp_path: Path) -> None:
    for loudness in (["loudness"], "loudness"):
        with pytest.raises(UsageError, match="has no ranking loudness; it has"):
            measure_curves(study, rankings=loudness)
    with pytest.raises(UsageError, match="n_test=0 leaves no image to ask"):
        measure_curves(study, n_test=0)
    features = tmp_path / "features"
    vit = open_vit("vitrail:photos", task="embedding")
    run_study(vit, "photos", out=features, measures="head_output_shift", limit=2)
    with pytest.raises(Unsupported, match="classifier"):
        measure_curves(features)
    assert read_curves(features) is None
    for content in (b"no arrays", b"", b"PK\x03\x04"):
        (features / CURVES_FILE).write_bytes(content)
        with pytest.raises(DamagedStudy, match="vitrail curves"):
            read_curves(features)
