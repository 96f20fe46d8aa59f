"""Reading studies back: what is told of a folder that is unfinished, damaged or no study at all."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from tiny_studies import folder_bytes, part_values, write_study

from vitrail.errors import DamagedStudy, StudyError
from vitrail.study.derived import image_xy
from vitrail.study.plan import Plan, differences
from vitrail.study.store import open_study, read_plan, verify


@pytest.fixture
def study(tmp_path: Path, any_plan: Plan, photos: Path) -> Path:
    write_study(tmp_path / "study", any_plan, photos)
    return tmp_path / "study"


class TestOpening:
    def test_a_study_reads_back_as_it_was_written(self, study: Path, any_plan: Plan) -> None:
        opened = open_study(study)
        written = np.concatenate([part_values(part.number, part.stop - part.start) for part in any_plan.parts])
        assert_array_equal(opened["head_probability"], written)
        assert opened["head_flip"].dtype == bool
        assert opened.attrs["grid"] == [4, 4]
        assert opened["head_probability"].attrs["unit"] == "1"

    def test_the_plan_reads_back_equal(self, study: Path, any_plan: Plan) -> None:
        assert read_plan(study) == any_plan
        assert differences(read_plan(study), any_plan) == []

    def test_a_folder_that_is_no_study_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(StudyError, match=r"is not a study: it has no study\.json"):
            open_study(tmp_path)

    def test_a_plan_of_a_later_format_is_refused(self, study: Path) -> None:
        (study / "study.json").write_text('{"format": 99}', encoding="utf-8")
        with pytest.raises(StudyError, match="format 99, and this Vitrail reads format 1"):
            open_study(study)

    def test_a_plan_that_is_not_json_is_refused(self, study: Path) -> None:
        (study / "study.json").write_text("[1, 2", encoding="utf-8")
        with pytest.raises(StudyError, match="is not a plan"):
            open_study(study)

    def test_an_unfinished_study_counts_its_parts(self, study: Path) -> None:
        (study / "parts" / "00001.json").unlink()
        with pytest.raises(StudyError, match="has 2 of 3 parts; run the same"):
            open_study(study)

    def test_an_unfinished_study_opens_without_the_missing_images(self, study: Path) -> None:
        whole = open_study(study)
        (study / "parts" / "00001.json").unlink()
        there = open_study(study, partial=True)
        assert there.attrs["missing_images"] == 4
        rows = [0, 1, 2, 3, 8, 9, 10]
        assert there["image"].values.tolist() == whole["image"].values[rows].tolist()
        assert_array_equal(there["head_probability"], whole["head_probability"].values[rows])
        assert "image_xy" not in there

    def test_a_study_without_any_part_has_nothing_to_open(self, study: Path) -> None:
        for number in range(3):
            (study / "parts" / f"{number:05d}.json").unlink()
        with pytest.raises(StudyError, match="has 0 of 3 parts"):
            open_study(study, partial=True)

    def test_opening_does_not_import_torch_and_warns_of_nothing(self, study: Path) -> None:
        program = (
            "import sys; from vitrail.study.store import open_study, verify; study = open_study(sys.argv[1]); "
            "study['head_probability'].values; verify(sys.argv[1]); print('torch' in sys.modules)"
        )
        command = [sys.executable, "-W", "error", "-c", program, str(study)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (answer.stdout.strip(), answer.stderr) == ("False", "")


def chunk(study: Path, part: int) -> Path:
    return study / "arrays.zarr" / "head_probability" / "c" / str(part) / "0" / "0"


class TestVerifying:
    def test_a_sound_study_counts_its_parts(self, study: Path) -> None:
        assert verify(study) == 3

    def test_a_flipped_bit_is_found_and_its_part_named(self, study: Path) -> None:
        content = bytearray(chunk(study, 1).read_bytes())
        content[len(content) // 2] ^= 1
        chunk(study, 1).write_bytes(content)
        with pytest.raises(DamagedStudy, match=r"1 of 4 parts do not read back.*\n.*00001\.json: cannot be read"):
            verify(study)

    def test_values_of_another_part_are_found(self, study: Path) -> None:
        chunk(study, 0).write_bytes(chunk(study, 1).read_bytes())
        with pytest.raises(DamagedStudy, match=r"00000\.json: other values in head_probability"):
            verify(study)

    def test_a_lost_chunk_is_found(self, study: Path) -> None:
        chunk(study, 2).unlink()
        with pytest.raises(DamagedStudy, match=r"00002\.json: other values in head_probability"):
            verify(study)

    def test_a_lost_chunk_of_zeros_is_no_loss(self, study: Path) -> None:
        """All False is what an absent chunk reads as, so the values are still those that were written."""
        (study / "arrays.zarr" / "head_flip" / "c" / "0" / "0" / "0").unlink()
        assert verify(study) == 3

    def test_a_damaged_map_of_images_is_found(self, study: Path) -> None:
        (study / "arrays.zarr" / "image_xy" / "c" / "0" / "0").unlink()
        with pytest.raises(DamagedStudy, match=r"derived\.json: other values in image_xy"):
            verify(study)

    def test_a_part_file_that_is_not_ours_is_found(self, study: Path) -> None:
        (study / "parts" / "00000.json").write_text("{}", encoding="utf-8")
        with pytest.raises(DamagedStudy, match=r"00000\.json: cannot be read"):
            verify(study)

    def test_another_list_of_images_is_found(self, study: Path) -> None:
        listed = json.loads((study / "images.json").read_text(encoding="utf-8"))
        listed["images"][0]["id"] = "somebody else"
        (study / "images.json").write_text(json.dumps(listed), encoding="utf-8")
        with pytest.raises(DamagedStudy, match="is not the list that the study was begun with"):
            verify(study)

    def test_repair_marks_damaged_parts_and_the_same_run_mends_them(
        self, study: Path, any_plan: Plan, photos: Path
    ) -> None:
        sound = folder_bytes(study)
        chunk(study, 1).unlink()
        assert verify(study, repair=True) == 2
        with pytest.raises(StudyError, match="2 of 3 parts"):
            open_study(study)
        write_study(study, any_plan, photos)
        assert folder_bytes(study) == sound


class TestMapOfImages:
    def table(self, n_images: int) -> np.ndarray:
        return np.random.default_rng(0).random((n_images, 3, 2), dtype=np.float32)

    @pytest.mark.parametrize("n_images", [1, 2, 4, 5, 6, 40])
    def test_any_number_of_images_gets_a_place(self, n_images: int) -> None:
        places = image_xy(self.table(n_images), 0)
        assert places.shape == (n_images, 2)
        assert places.dtype == np.float32
        assert np.isfinite(places).all()

    def test_the_same_seed_gives_the_same_bytes(self) -> None:
        assert image_xy(self.table(30), 3).tobytes() == image_xy(self.table(30), 3).tobytes()

    def test_alike_images_lie_together(self) -> None:
        groups = np.repeat(np.eye(3, 6).reshape(3, 3, 2), 10, axis=0)
        table = (groups + 0.01 * np.random.default_rng(0).random(groups.shape)).astype(np.float32)
        places = image_xy(table, 0).reshape(3, 10, 2)
        spread = np.linalg.norm(places - places.mean(1, keepdims=True), axis=-1).max()
        between = np.linalg.norm(places.mean(1)[[0, 0, 1]] - places.mean(1)[[1, 2, 2]], axis=-1).min()
        assert between > 2 * spread

    def test_heads_that_narrower_layers_lack_do_not_count(self) -> None:
        table = self.table(12)
        padded = np.concatenate([table, np.full((12, 3, 1), np.nan, np.float32)], axis=2)
        assert_array_equal(image_xy(padded, 0), image_xy(table, 0))

    def test_images_that_are_all_alike_share_one_place(self) -> None:
        assert_array_equal(image_xy(np.ones((8, 3, 2), np.float32), 0), np.zeros((8, 2)))
