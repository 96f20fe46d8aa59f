"""Studies that earlier versions wrote open, are verified, reported and drawn.

`old/study_0.1.0.zip` is 6 of the built-in photographs through the built-in model, written by version 0.1.0 before plans
had a digest and a field for the labels and before folders had a marker:

    vitrail study vitrail:photos photos --limit 6 --batch-size 4 --measures heads,patches,regions,neurons,patterns

without its figures and without the fitted coders, which no reader of a finished study opens.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vitrail.errors import DamagedStudy
from vitrail.figures.whole import draw_figures
from vitrail.report import write_report
from vitrail.study.locking import LOCK
from vitrail.study.ownership import write_access
from vitrail.study.plan import Plan, differences
from vitrail.study.store import open_study, read_manifest, read_plan, verify

ARCHIVE = Path(__file__).parent / "old" / "study_0.1.0.zip"

SUMS = {
    "probability": 4.601030450314283,
    "head_probability": 82.29356962349266,
    "attention_distance": 456.9108021259308,
}
"""Of arrays as version 0.1.0 read them."""

FIGURES = (
    "entropy_by_layer hub_map importance_line importance_map_head_cls_shift importance_map_head_cls_shift_l2 "
    "importance_map_head_divergence importance_map_head_flip importance_map_head_loss_change "
    "importance_map_head_probability importance_map_head_token_shift importance_map_head_token_shift_l2 "
    "norms_by_layer overview pattern_map_cls pattern_map_patch patterns_by_head "
    "strength_of_top_heads survival tendency_flow window_coverage"
)
"""Those that version 0.1.0 drew; the three of a head's strength, `strength_LxHy`, are one figure now."""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old") / "study"
    shutil.unpack_archive(ARCHIVE, folder)
    return folder


def test_it_opens_with_the_values_that_were_read_then(old: Path) -> None:
    study = open_study(old)
    assert len(study.data_vars) == 41
    for name, total in SUMS.items():
        np.testing.assert_allclose(np.nansum(study[name].values.astype(np.float64)), total, rtol=1e-12)
    assert float((study["label"] == study["prediction"]).mean()) == 5 / 6
    assert (study.attrs["labels"], study.attrs["labels_from"]) == ("given", "the names of the class folders")


def test_every_array_reads_back_as_it_was_written(old: Path) -> None:
    assert verify(old) == 1
    assert len(read_manifest(old).images) == 6


def test_its_plan_is_equal_to_the_same_plan_written_today(old: Path) -> None:
    plan = read_plan(old)
    again = Plan.from_json(plan.to_json())
    assert differences(plan, again) == []
    assert set(json.loads(again.to_json())) - set(json.loads((old / "study.json").read_text())) == {
        "block_numbers",
        "buffer_digest",
        "buffer_values",
        "device_name",
        "digest",
        "labels",
        "n_blocks",
        "notes",
        "output",
        "own_grid_layers",
        "patch_steps",
        "target",
        "target_values",
        "task",
        "weights_from",
    }


def test_it_is_a_study_that_may_be_gone_on_with(old: Path) -> None:
    with write_access(old):
        assert (old / LOCK).is_file()


def test_the_same_figures_are_drawn(old: Path, tmp_path: Path) -> None:
    drawn = draw_figures(open_study(old), tmp_path, ("png",))
    assert {path.stem for path in drawn} >= set(FIGURES.split())


def test_it_is_reported(old: Path, tmp_path: Path) -> None:
    html = write_report(old, tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("vitrail:photos", "The model is right about 83.3 % of the 6 images", "the names of the class folders"):
        assert text in html


def test_its_lost_chunks_are_named(old: Path, tmp_path: Path) -> None:
    shutil.copytree(old, tmp_path / "study")
    (tmp_path / "study" / "arrays.zarr" / "head_flip" / "c" / "0" / "0" / "0").unlink()
    (tmp_path / "study" / "patterns" / "arrays.zarr" / "image_dependence" / "c" / "0" / "0").unlink()
    with pytest.raises(DamagedStudy, match=r"part 0 \(head_flip\), part patterns \(image_dependence\)"):
        open_study(tmp_path / "study")


@pytest.mark.parametrize(
    ("sentence", "labels"),
    [
        ("the names of the class folders", "given"),
        ("the model's own top-1 prediction, as there are no class names to look the folders up in", "predicted"),
        ("no labels: the images do not lie in class folders", "none"),
    ],
)
def test_the_labels_of_an_old_plan_are_read_off_its_sentence(old: Path, sentence: str, labels: str) -> None:
    content = json.loads((old / "study.json").read_text(encoding="utf-8"))
    assert Plan.from_json(json.dumps(content | {"labels_from": sentence})).labels == labels
