"""Reading studies back: what is told of a folder that is unfinished, damaged or no study at all."""

import json
import multiprocessing
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from numpy.testing import assert_allclose, assert_array_equal
from tiny_studies import folder_bytes, part_values, write_photos, write_study

from vitrail.data import open_images, scan
from vitrail.errors import DamagedStudy, StudyError, UsageError
from vitrail.study import image_map, store
from vitrail.study.image_map import image_xy
from vitrail.study.ownership import write_access
from vitrail.study.plan import Plan, differences
from vitrail.study.store import open_study, read_plan, study_folder, verify
from vitrail.study.writing import StudyFolder


@pytest.fixture
def study(tmp_path: Path, any_plan: Plan, photos: Path) -> Path:
    write_study(tmp_path / "study", any_plan, photos)
    return tmp_path / "study"


def test_the_folder_of_a_study_is_known_by_its_dataset(study: Path) -> None:
    opened = open_study(study)
    assert study_folder(study) is study
    assert Path(study_folder(opened)) == study.resolve()
    for part in (opened.isel(image=[0]), opened.mean("image")):
        with pytest.raises(UsageError, match="A part of a study was given"):
            study_folder(part)
    with pytest.raises(UsageError, match="were not read from a study"):
        study_folder(xr.Dataset())


class TestOpening:
    @pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no forks")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
    def test_a_fork_reads_a_study_that_was_read_before_it(self, study: Path) -> None:
        opened = open_study(study)
        expected = opened["head_probability"].values

        def read() -> None:
            assert_array_equal(opened["head_flip"], open_study(study)["head_flip"])
            assert_array_equal(open_study(study)["head_probability"], expected)

        child = multiprocessing.get_context("fork").Process(target=read)
        child.start()
        child.join(60)
        still = child.is_alive()
        child.kill()
        assert not still, "it waits for threads that a fork does not have"
        assert child.exitcode == 0

    def test_a_study_reads_back_as_it_was_written(self, study: Path, any_plan: Plan) -> None:
        opened = open_study(study)
        written = np.concatenate([part_values(part.number, part.stop - part.start) for part in any_plan.parts])
        assert_array_equal(opened["head_probability"], written)
        assert opened["head_flip"].dtype == bool
        assert opened.attrs["grid"] == [4, 4]
        assert opened["head_probability"].attrs["unit"] == "1"

    def test_threads_that_open_studies_leave_the_options_of_zarr_as_they_were(self, study: Path) -> None:
        before = zarr.config.get("codec_pipeline.path")
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: open_study(study), range(64)))
        assert zarr.config.get("codec_pipeline.path") == before

    def test_what_is_written_has_every_chunk_whatever_pipeline_is_set(
        self, tmp_path: Path, any_plan: Plan, photos: Path
    ) -> None:
        zarrs = pytest.importorskip("zarrs", reason="zarrs is not made for this system")
        with zarr.config.set({"codec_pipeline.path": f"{zarrs.__name__}.ZarrsCodecPipeline"}):
            write_study(tmp_path / "study", any_plan, photos)
        assert not open_study(tmp_path / "study")["head_flip"].values.any()  # chunks of zeros

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

    @pytest.mark.parametrize("rows", [slice(None), [0, 3], 3])
    def test_a_chunk_that_is_damaged_when_it_is_read_is_an_error_with_the_remedy(
        self, study: Path, rows: object
    ) -> None:
        chunk = study / "arrays.zarr" / "head_probability" / "c" / "0" / "0" / "0"
        content = bytearray(chunk.read_bytes())
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        chunk.write_bytes(content)
        opened = open_study(study)
        with pytest.raises(DamagedStudy, match=rf"Values of head_probability .*vitrail verify {study} --repair"):
            opened["head_probability"].isel(image=rows).load()
        assert not opened["head_flip"].any()  # no value of `write_study` is above 2

    def test_a_study_that_was_moved_or_lost_a_chunk_while_open_does_not_read_as_nan(self, study: Path) -> None:
        opened = open_study(study)
        chunk(study, 1).rename(study / "away")
        probability = opened["head_probability"]
        for rows in (5, slice(3, 6), [0, 10, 4], slice(None), slice(10, None, -5)):
            with pytest.raises(DamagedStudy, match=r"head_probability .* chunk 1 is missing.*verify"):
                probability.isel(image=rows).load()
        assert np.isfinite(probability.isel(image=[0, 8, -1]).to_numpy()).all()
        (study / "away").rename(chunk(study, 1))
        study.rename(study.with_name("moved"))
        for name in ("head_probability", "head_flip", "image_xy"):
            with pytest.raises(StudyError, match="no longer there"):
                opened[name].load()
        study.with_name("moved").rename(study)
        assert np.isfinite(opened["head_probability"]).all()

    def test_a_study_that_has_grown_into_longer_chunks_is_to_be_opened_again(
        self, study: Path, any_plan: Plan, photos: Path, tmp_path: Path
    ) -> None:
        few = write_photos(tmp_path / "few", 3)
        short, long = (scan(open_images(folder)) for folder in (few, photos))
        entries = (
            *short.images,
            *(entry for entry in long.images if entry.id not in {each.id for each in short.images}),
        )
        grown = replace(long, images=entries)
        plan = replace(any_plan, n_images=3, data_digest=short.digest)
        with write_access(tmp_path / "growing"):
            folder = StudyFolder(tmp_path / "growing", plan, short)
            folder.write_part(
                plan.parts[0], {"head_probability": part_values(0, 3), "head_flip": part_values(0, 3) > 2}
            )
        opened = open_study(tmp_path / "growing")
        plan = replace(any_plan, data_digest=grown.digest)
        with write_access(tmp_path / "growing"):
            folder = StudyFolder(tmp_path / "growing", plan, grown)
            with pytest.raises(StudyError, match="has changed since it was opened; open it again"):
                opened["head_flip"].load()
            for part in folder.missing:
                values = part_values(part.number, part.stop - part.start)
                folder.write_part(part, {"head_probability": values, "head_flip": values > 2})
            with pytest.raises(StudyError, match="has changed since it was opened; open it again"):
                opened["head_probability"].load()

    def test_values_are_read_once_and_by_any_index(self, study: Path, any_plan: Plan) -> None:
        written = np.concatenate([part_values(part.number, part.stop - part.start) for part in any_plan.parts])
        array = open_study(study)["head_probability"]
        assert_array_equal(array[[4, 0], :, [1]], written[[4, 0]][:, :, [1]])
        assert_array_equal(array[::-2, 1], written[::-2, 1])
        assert_array_equal(array.isel(image=array[:, 0, 0] > 0.5), written[written[:, 0, 0] > 0.5])
        assert_array_equal(array, written)
        shutil.rmtree(study)
        assert_array_equal(array, written)

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


class TestDamage:
    @pytest.mark.parametrize("part", [0, 1, 2])
    def test_a_lost_chunk_is_named_when_the_study_is_opened(self, study: Path, part: int) -> None:
        """zarr would read the fill value: a share that nobody measured."""
        chunk(study, part).unlink()
        for partial in (False, True):
            with pytest.raises(DamagedStudy, match=rf"those of part {part} \(head_probability\).*--repair"):
                open_study(study, partial=partial)

    def test_an_empty_chunk_and_a_lost_array_are_named(self, study: Path) -> None:
        chunk(study, 1).write_bytes(b"")
        shutil.rmtree(study / "arrays.zarr" / "head_flip")
        with pytest.raises(DamagedStudy, match=r"part 0 \(head_flip\), part 1 \(.*head_probability.*\), part 2"):
            open_study(study)

    def test_a_lost_map_of_images_is_named(self, study: Path) -> None:
        (study / "arrays.zarr" / "image_xy" / "c" / "0" / "0").unlink()
        with pytest.raises(DamagedStudy, match=r"part derived \(image_xy\)"):
            open_study(study)

    def test_a_map_of_images_that_is_to_be_made_again_is_not_read(self, study: Path) -> None:
        (study / "arrays.zarr" / "image_xy" / "c" / "0" / "0").unlink()
        assert verify(study, repair=True) == 3
        assert "image_xy" not in open_study(study)

    def test_a_part_that_is_completed_between_two_looks_does_not_open_as_a_finished_study(
        self, study: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mark, look = study / "parts" / "00002.json", store.arrays_by_part
        content = mark.read_bytes()
        mark.unlink()

        def look_and_complete(*arguments: object) -> dict[int, frozenset[str]]:
            listed = look(*arguments)
            mark.write_bytes(content)
            return listed

        monkeypatch.setattr(store, "arrays_by_part", look_and_complete)
        with pytest.raises(StudyError, match="has 2 of 3 parts"):
            open_study(study)
        assert open_study(study).sizes["image"] == 11

    def test_a_chunk_of_a_part_that_is_not_complete_may_be_missing(self, study: Path) -> None:
        chunk(study, 1).unlink()
        (study / "parts" / "00001.json").unlink()
        assert open_study(study, partial=True).sizes["image"] == 7

    @pytest.mark.parametrize(("name", "value"), [("seed", 7), ("n_images", 3), ("left_out", {"head_flip": "no"})])
    def test_a_plan_that_was_edited_is_refused(self, study: Path, name: str, value: object) -> None:
        content = json.loads((study / "study.json").read_text(encoding="utf-8"))
        (study / "study.json").write_text(json.dumps(content | {name: value}), encoding="utf-8")
        with pytest.raises(DamagedStudy, match=r"study\.json was changed after the study had begun"):
            open_study(study)

    def test_a_plan_without_a_digest_opens(self, study: Path, any_plan: Plan) -> None:
        content = json.loads((study / "study.json").read_text(encoding="utf-8"))
        del content["digest"]
        (study / "study.json").write_text(json.dumps(content, indent=4), encoding="utf-8")
        assert read_plan(study) == any_plan

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("n_images", "many"),
            ("n_heads", [2, "3"]),
            ("part_size", 0),
            ("measures", [1]),
            ("class_token", 1),
            ("labels", "mine"),
        ],
    )
    def test_a_plan_without_a_digest_whose_fields_are_something_else_is_refused(
        self, study: Path, name: str, value: object
    ) -> None:
        content = json.loads((study / "study.json").read_text(encoding="utf-8"))
        del content["digest"]
        (study / "study.json").write_text(json.dumps(content | {name: value}), encoding="utf-8")
        with pytest.raises(StudyError, match=rf"study\.json is not a plan: {name}"):
            open_study(study)

    @pytest.mark.parametrize("name", ["study.json", "images.json", "arrays.zarr/zarr.json"])
    @pytest.mark.parametrize(
        "content", [b"", b"\xff\xfe\x00", b"[]", b"null", b"{}", b'"text"', b'{"format": 1}', b"[" * 100_000]
    )
    def test_damaged_metadata_is_a_sentence(self, study: Path, name: str, content: bytes) -> None:
        (study / name).write_bytes(content)
        for read in (open_study, verify):
            with pytest.raises(StudyError):
                read(study)

    def test_no_flipped_byte_of_the_metadata_is_a_traceback(self, study: Path) -> None:
        random = np.random.default_rng(0)
        for name in ("study.json", "images.json", "arrays.zarr/zarr.json"):
            sound = (study / name).read_bytes()
            for place in random.integers(0, len(sound), 40):
                damaged = bytearray(sound)
                damaged[place] = random.integers(0, 256)
                (study / name).write_bytes(damaged)
                with suppress(StudyError):
                    open_study(study)
            (study / name).write_bytes(sound)


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
        with pytest.raises(DamagedStudy, match=r"00002\.json: lost values of head_probability"):
            verify(study)

    def test_a_lost_chunk_is_a_loss_even_where_the_fill_value_is_what_was_written(self, study: Path) -> None:
        (study / "arrays.zarr" / "head_flip" / "c" / "0" / "0" / "0").unlink()
        with pytest.raises(DamagedStudy, match=r"00000\.json: lost values of head_flip"):
            verify(study)

    def test_a_damaged_map_of_images_is_found(self, study: Path) -> None:
        (study / "arrays.zarr" / "image_xy" / "c" / "0" / "0").unlink()
        with pytest.raises(DamagedStudy, match=r"derived\.json: lost values of image_xy"):
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

    def test_of_many_images_some_are_laid_out_and_the_others_lie_among_those_most_like_them(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(image_map, "N_LANDMARKS", 20)
        monkeypatch.setattr(image_map, "BLOCK_IMAGES", 7)
        table = self.table(50)
        places = image_xy(table, 0)
        drawn = np.sort(np.random.default_rng(0).permutation(50)[:20])
        assert_array_equal(places[drawn], image_xy(table[drawn], 0))
        for other in set(range(50)) - set(drawn):
            distance = np.linalg.norm((table[drawn] - table[other]).reshape(20, -1), axis=1)
            assert_allclose(places[other], places[drawn[np.argsort(distance)[:5]]].mean(0), rtol=1e-4, atol=1e-4)
        axes = np.linalg.svd(table[drawn].reshape(20, -1) - table[drawn].reshape(20, -1).mean(0))[2][:2]
        expected = (table.reshape(50, -1) - table[drawn].reshape(20, -1).mean(0)) @ axes.T
        assert_allclose(np.abs(image_xy(table, 0, "pca")), np.abs(expected), atol=1e-5)
