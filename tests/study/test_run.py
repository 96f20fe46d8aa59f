"""Running studies of a real, tiny ViT: what is computed, resumed, refused."""

import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from tiny_studies import BATCH_SIZE, DEAD_LOCK, N_IMAGES, folder_bytes, tiny_vit, write_photos

import vitrail
from vitrail import data
from vitrail.analysis import analyses, declaration, is_of_other_models, measures
from vitrail.errors import (
    DataError,
    ModelError,
    NoImages,
    PlanMismatch,
    StudyError,
    Unsupported,
    UsageError,
    WeightsMismatch,
)
from vitrail.models.open import Vit, open_vit
from vitrail.study import planning
from vitrail.study.locking import LOCK, folder_lock
from vitrail.study.plan import Part, Plan, differences
from vitrail.study.reopen import reopen
from vitrail.study.run import run_study
from vitrail.study.store import open_study, read_manifest, read_plan, verify
from vitrail.study.writing import StudyFolder

HEAD_MEASURES = [name for name in analyses()["heads"].measure_names if not is_of_other_models(name)]
"""Measures of heads that a classifier has."""


@pytest.fixture(scope="module")
def finished(vit: Vit, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vitrail.study import planning

    out = tmp_path_factory.mktemp("finished") / "study"
    before, planning.PART_IMAGES = planning.PART_IMAGES, BATCH_SIZE
    try:
        run_study(vit, photos, out=out, batch_size=BATCH_SIZE)
    finally:
        planning.PART_IMAGES = before
    return out


def run(vit: Vit, photos: object, out: Path, **options: object) -> xr.Dataset:
    return run_study(vit, photos, out=out, **{"batch_size": BATCH_SIZE, **options})  # type: ignore[arg-type]


class TestWhatIsComputed:
    def test_every_measure_of_the_room_is_there_as_declared(self, finished: Path) -> None:
        study = open_study(finished)
        assert set(HEAD_MEASURES) < set(study.data_vars)
        for name, array in study.data_vars.items():
            measure = declaration(str(name))
            assert array.dims == measure.dims
            assert array.dtype == measure.dtype
            assert array.attrs == measure.attributes()

    def test_images_are_in_order_with_their_ids_and_labels(self, finished: Path) -> None:
        study = open_study(finished)
        expected = [f"class {parity}/{n}.png" for parity in (0, 1) for n in range(parity, N_IMAGES, 2)]
        assert study["image"].values.tolist() == expected
        assert_array_equal(study["label"], [int(name[6]) for name in expected])
        assert study.attrs["labels_from"] == "the names of the class folders"

    def test_a_skipped_file_is_in_the_report(self, finished: Path) -> None:
        (skipped,) = read_manifest(finished).skipped
        assert skipped.id == "class 0/notes.txt"
        assert "not an image" in skipped.reason

    def test_predictions_are_the_models_own(self, finished: Path, vit: Vit) -> None:
        study = open_study(finished)
        manifest = read_manifest(finished)
        images = [data.stored_image(manifest, entry) for entry in manifest.images[:BATCH_SIZE]]
        probabilities = vit.logits(vit.prepare(images)).softmax(-1).numpy()
        best = probabilities.argsort(-1)[:, ::-1][:, :5]
        assert_array_equal(study["top_class"][:BATCH_SIZE], best)
        assert_array_equal(study["prediction"][:BATCH_SIZE], best[:, 0])
        assert_allclose(study["top_probability"][:BATCH_SIZE], np.take_along_axis(probabilities, best, 1), rtol=1e-6)
        labels = study["label"].values[:BATCH_SIZE]
        assert_allclose(study["probability"][:BATCH_SIZE], probabilities[np.arange(BATCH_SIZE), labels], rtol=1e-6)

    def test_thumbnails_show_what_the_model_sees(self, finished: Path, vit: Vit) -> None:
        manifest = read_manifest(finished)
        seen = vit.view(data.stored_image(manifest, manifest.images[3]))
        assert_array_equal(open_study(finished)["thumbnail"][3], np.asarray(seen))

    def test_measures_are_finite_and_heads_differ(self, finished: Path) -> None:
        study = open_study(finished)
        for name in HEAD_MEASURES:
            values = study[name].values.astype(np.float64)
            if name != "attention_strength":  # has hops that no patch of a small grid has
                assert np.isfinite(values).all(), name
        assert study["head_probability"].values.std() > 1e-4

    def test_without_class_folders_labels_are_the_models_top_1(self, vit: Vit, photos: Path, tmp_path: Path) -> None:
        study = run(vit, photos / "class 1", tmp_path / "study", measures="strength_entropy")
        assert_array_equal(study["label"], study["prediction"])
        assert study.attrs["labels_from"].startswith("the model's own top-1 prediction, as the images do not lie in")

    def test_chosen_measures_alone_are_stored(self, vit: Vit, photos: Path, tmp_path: Path) -> None:
        study = run(vit, photos, tmp_path / "study", measures=["prefix_share"], limit=4)
        assert set(study.data_vars) & set(measures()) == {"label", "prediction", "probability", "prefix_share"}
        assert "image_xy" not in study

    def test_the_last_digits_do_not_depend_on_the_images_that_follow(
        self, vit: Vit, photos: Path, tmp_path: Path
    ) -> None:
        short = run(vit, photos, tmp_path / "short", limit=5)
        long = run(vit, photos, tmp_path / "long", limit=8).isel(image=slice(5))
        xr.testing.assert_identical(short.drop_vars("image_xy").drop_attrs(), long.drop_vars("image_xy").drop_attrs())

    def test_a_study_and_masks_in_the_folder_of_images_are_no_images(self, vit: Vit, tmp_path: Path) -> None:
        photos = write_photos(tmp_path / "photos", 6)
        for photo in sorted(photos.glob("*/*.png")):
            mask = photos / "masks" / photo.relative_to(photos)
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (40, 40), 1).save(mask)
        arguments = {"measures": "strength_entropy", "masks": photos / "masks"}
        run(vit, photos, photos / "results" / "study", limit=4, **arguments)
        (photos / "results" / "study" / "figures").mkdir()
        Image.new("RGB", (40, 40)).save(photos / "results" / "study" / "figures" / "layers.png")
        study = run(vit, photos, photos / "results" / "study", **arguments)
        assert study.sizes["image"] == 6
        assert study.attrs["labels_from"] == "the names of the class folders"
        assert "object_share" in study

    def test_a_model_without_classifier_is_studied_without_what_needs_one(self, photos: Path, tmp_path: Path) -> None:
        vit = tiny_vit(n_classes=0)
        study = run(vit, photos, tmp_path / "study", limit=4)
        assert "head_output_shift" in study
        assert not {"head_divergence", "head_probability", "prediction", "top_class", "image_xy"} & set(study.data_vars)
        assert study.attrs["left_out"]["head_probability"].startswith("the model has no classifier")
        assert_array_equal(study["label"], [-1] * 4)

    def test_a_measure_asked_for_by_name_that_the_model_lacks_is_refused(self, photos: Path, tmp_path: Path) -> None:
        with pytest.raises(Unsupported, match="head_flip: the model has no classifier"):
            run(tiny_vit(n_classes=0), photos, tmp_path / "study", measures="head_flip,strength_entropy")

    def test_layers_with_fewer_heads_are_padded_and_what_needs_a_class_token_left_out(
        self, photos: Path, tmp_path: Path
    ) -> None:
        torch.manual_seed(0)
        swin = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(2, 2), num_heads=(1, 2), num_classes=10
        )
        study = run(open_vit(swin), photos, tmp_path / "study", limit=4)
        absent = np.isnan(study["head_probability"].values)
        assert_array_equal(absent, [[[False, True]] * 2 + [[False, False]] * 2] * 4)
        assert study.attrs["grids"] == [[14, 14]] * 2 + [[7, 7]] * 2
        assert study.attrs["left_out"]["head_cls_shift"] == "the model has no class token"
        assert np.isfinite(study["image_xy"]).all()

    def test_another_precision_is_stored_in_the_declared_types(self, vit: Vit, photos: Path, tmp_path: Path) -> None:
        study = run(open_vit(vit.model, precision="bfloat16"), photos, tmp_path / "study", limit=4)
        exact = run(vit, photos, tmp_path / "exact", limit=4)
        assert study.attrs["precision"] == "bfloat16"
        assert study["head_probability"].dtype == np.float32
        assert_allclose(study["top_probability"], exact["top_probability"], atol=0.05)

    def test_the_estimate_says_what_it_left_out(self, vit: Vit, photos: Path, tmp_path: Path) -> None:
        study = run(vit, photos, tmp_path / "study", options={"importance": "estimate"}, limit=4)
        assert "head_loss_change" in study
        assert "no estimate" in study.attrs["left_out"]["head_flip"]

    def test_the_built_in_crops_can_be_studied_by_their_name(self, tmp_path: Path) -> None:
        from vitrail.data.photographs import CLASS_NAMES

        vit = tiny_vit(n_classes=len(CLASS_NAMES))
        vit.class_names = CLASS_NAMES
        study = run(vit, "photos", tmp_path / "study", measures="strength_entropy", limit=6)
        assert_array_equal(study["label"], range(6))
        manifest = read_manifest(tmp_path / "study")
        assert data.stored_image(manifest, manifest.images[2]).size == (64, 64)


class TestResuming:
    def test_a_second_run_changes_nothing(self, vit: Vit, photos: Path, finished: Path) -> None:
        before = folder_bytes(finished)
        run(vit, photos, finished)
        assert folder_bytes(finished) == before

    def test_an_interrupted_run_tells_what_is_safe_and_goes_on_to_the_same_bytes(
        self, vit: Vit, photos: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = StudyFolder.write_part

        def interrupt(study: StudyFolder, part: Part, arrays: dict[str, np.ndarray]) -> None:
            if len(study.missing) == 1:
                raise KeyboardInterrupt
            write(study, part, arrays)

        with monkeypatch.context() as patched:
            patched.setattr(StudyFolder, "write_part", interrupt)
            with pytest.raises(KeyboardInterrupt) as stop:
                run(vit, photos, tmp_path / "study")
        assert stop.value.__notes__ == [
            f"2 of 3 parts are in {tmp_path / 'study'}; the same command goes on from there."
        ]
        run(vit, photos, tmp_path / "study")
        assert folder_bytes(tmp_path / "study") == folder_bytes(finished)

    def test_a_missing_part_is_computed_again_and_the_others_are_not(
        self, vit: Vit, photos: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = folder_bytes(finished)
        (finished / "parts" / "00001.json").unlink()
        written: list[int] = []
        write = StudyFolder.write_part
        monkeypatch.setattr(
            StudyFolder,
            "write_part",
            lambda self, part, arrays: (written.append(part.number), write(self, part, arrays)),
        )
        run(vit, photos, finished)
        assert written == [1]
        assert folder_bytes(finished) == before

    def test_the_number_of_threads_is_taken_from_the_folder_and_put_back(
        self, vit: Vit, photos: Path, finished: Path
    ) -> None:
        before = folder_bytes(finished)
        (finished / "parts" / "00002.json").unlink()
        n_threads = torch.get_num_threads()
        try:
            torch.set_num_threads(n_threads + 1)
            run(vit, photos, finished)
            assert torch.get_num_threads() == n_threads + 1
        finally:
            torch.set_num_threads(n_threads)
        assert folder_bytes(finished) == before

    def test_photographs_that_moved_are_found_at_their_new_place(self, vit: Vit, tmp_path: Path) -> None:
        photos = write_photos(tmp_path / "photos", 3)
        run(vit, photos, tmp_path / "study", measures="strength_entropy")
        photos.rename(tmp_path / "moved")
        run(vit, tmp_path / "moved", tmp_path / "study", measures="strength_entropy")
        manifest = read_manifest(tmp_path / "study")
        assert data.stored_image(manifest, manifest.images[0]).size == (40, 40)


class TestRefusals:
    def test_another_plan_is_refused_with_every_difference_named(
        self, vit: Vit, photos: Path, finished: Path, tmp_path: Path
    ) -> None:
        before = folder_bytes(finished)
        with pytest.raises(PlanMismatch) as refusal:
            run(tiny_vit(seed=1), photos, finished, batch_size=2, seed=7, measures="head_flip", limit=9)
        told = str(refusal.value)
        for difference in (
            "weights: the folder has",
            "images: the folder has",
            "number of images: the folder has 11, this run 9",
            "batch size: the folder has 4, this run 2",
            "seed: the folder has 0, this run 7",
        ):
            assert difference in told
        assert "class names" not in told
        assert "measures" not in told  # that a run asks for fewer is no difference
        assert folder_bytes(finished) == before

    def test_another_function_of_the_same_name_is_another_target(self, vit: Vit, photos: Path, tmp_path: Path) -> None:
        out, other, asked = tmp_path / "study", tmp_path / "other", {"measures": "head_value", "limit": 4}

        def opened(at: int) -> Vit:
            return open_vit(vit.model, target=lambda output: output[:, at])

        first, second = opened(0), opened(1)
        run(first, photos, out, **asked)
        run(opened(0), photos, out, **asked)
        with pytest.raises(PlanMismatch, match="target: the folder has another function of this name"):
            run(second, photos, out, **asked)
        run(second, photos, other, **asked)
        assert read_plan(out).target == read_plan(other).target
        assert "head_value" in vitrail.compare(out, other).coords["measure"]
        older = replace(read_plan(out), target_values=None)
        assert differences(older, read_plan(other)) == []  # told by its name alone, as it was

    def test_the_values_of_a_target_differ_by_rounding_between_machines(self, any_plan: Plan) -> None:
        here = replace(any_plan, target="mine", target_values=[1.0, -2.0, 0.0])
        assert differences(here, replace(here, target_values=[1.00001, -2.00001, 1e-7])) == []
        assert differences(here, replace(here, target_values=[1.0, -2.0, 0.1])) != []
        assert any("mine" in each for each in differences(here, replace(here, target="yours", target_values=[3.0])))

    def test_a_target_that_refuses_made_up_outputs_is_told_by_those_of_noise(self, vit: Vit, photos: Path) -> None:
        n_rows: list[int] = []

        def only_of_the_model(output: torch.Tensor) -> torch.Tensor:
            n_rows.append(len(output))
            if len(output) == planning.N_OUTPUTS:
                raise ValueError("no such output")
            return output[:, 0]

        identity = planning.model_identity(open_vit(vit.model, target=only_of_the_model))
        assert n_rows == [planning.N_OUTPUTS, len(identity.target_values)]
        assert planning.model_identity(open_vit(vit.model, target=lambda output: output)).target_values is None

    def test_another_buffer_outside_the_state_dict_is_another_model(self, photos: Path, tmp_path: Path) -> None:
        def scaled(temperature: float) -> Vit:
            module = tiny_vit().model
            module.register_buffer("temperature", torch.tensor(temperature), persistent=False)
            module.head.register_forward_hook(lambda head, images, logits: logits / module.temperature)
            return open_vit(module, n_classes=10)

        one, other = scaled(1.0), scaled(0.05)
        assert one.weight_digest == other.weight_digest
        run(one, photos, tmp_path / "study", measures="prefix_share", limit=4)
        with pytest.raises(PlanMismatch, match="buffers that the state dict lacks: the folder has"):
            run(other, photos, tmp_path / "study", measures="prefix_share", limit=4)
        with pytest.raises(WeightsMismatch, match="studied with other buffers"):
            reopen(tmp_path / "study", model=other)
        plan = read_plan(tmp_path / "study")
        assert differences(replace(plan, buffer_digest="", buffer_values=None), plan) == []  # a version that knew none

    def test_buffers_that_another_processor_rounds_otherwise_are_the_same(self, photos: Path, tmp_path: Path) -> None:
        positions = torch.arange(196)[:, None] * 10000 ** -torch.linspace(0, 1, 32)
        mask = torch.full((4, 4), -torch.inf).triu(1)

        def with_positions(values: torch.Tensor, mask: torch.Tensor = mask, number: int = 3) -> Vit:
            module = tiny_vit().model
            for name, buffer in (("sines", values), ("mask", mask), ("number", torch.tensor(number))):
                module.register_buffer(name, buffer, persistent=False)
            return open_vit(module, n_classes=10)

        sines = positions.sin()
        run(with_positions(sines), photos, tmp_path / "study", measures="prefix_share", limit=4)
        elsewhere = torch.where(torch.arange(32) % 2 == 0, torch.nextafter(sines, torch.ones(())), sines)
        assert not torch.equal(elsewhere, sines)
        same = with_positions(elsewhere)
        run(same, photos, tmp_path / "study", measures="prefix_share", limit=4)
        reopen(tmp_path / "study", model=same)
        others = [positions.cos(), sines * 1.01, -sines, sines.flip(0)]
        for other in (*map(with_positions, others), with_positions(sines, mask.mT), with_positions(sines, number=4)):
            with pytest.raises(WeightsMismatch, match="studied with other buffers"):
                reopen(tmp_path / "study", model=other)

    def test_a_batch_that_memory_does_not_take_is_a_sentence(self, vit: Vit, photos: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"does not take a batch of 10000000000 images.*smaller --batch-size"):
            run(vit, photos, tmp_path / "study", measures="prefix_share", batch_size=10**10)

    @pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names of files are text there")
    def test_a_table_of_labels_whose_name_is_no_utf_8_names_its_labels(
        self, vit: Vit, photos: Path, tmp_path: Path
    ) -> None:
        table = tmp_path / os.fsdecode(b"\xe9tiquettes.csv")
        photos_of_class = ((photo, photo.parent.name) for photo in sorted(photos.glob("*/*.png")))
        table.write_text("".join(f"{photo},{name}\n" for photo, name in photos_of_class), encoding="utf-8")
        study = run(vit, table, tmp_path / "study", measures="prefix_share")
        assert study.attrs["labels_from"] == "the names in \\xe9tiquettes.csv"

    def test_workers_without_an_engine_are_refused_and_empty_names_are_none(
        self, vit: Vit, photos: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match=r"8 workers were asked for.*--engine ray"):
            run(vit, photos, tmp_path / "study", n_workers=8)
        with pytest.raises(UsageError, match="No measure was named"):
            run(vit, photos, tmp_path / "study", measures=" ,")
        assert "prefix_share" in run(vit, photos, tmp_path / "study", measures="prefix_share,", limit=4)

    @pytest.mark.parametrize("seed", [-1, 2**32])
    def test_a_seed_that_no_generator_takes_is_refused_before_anything_is_computed(
        self, vit: Vit, photos: Path, tmp_path: Path, seed: int
    ) -> None:
        with pytest.raises(UsageError, match=rf"seed {seed} cannot be used; give a whole number from 0 to 4294967295"):
            run(vit, photos, tmp_path / "study", seed=seed)
        assert not (tmp_path / "study").exists()

    def test_another_version_of_a_package_is_another_plan(self, vit: Vit, photos: Path, tmp_path: Path) -> None:
        run(vit, photos, tmp_path / "study", measures="strength_entropy", limit=4)
        file = tmp_path / "study" / "study.json"
        plan = json.loads(file.read_text(encoding="utf-8"))
        plan["versions"]["torch"] = "1.0"
        del plan["digest"]  # as of a version that wrote none: with it the change itself would be refused
        file.write_text(json.dumps(plan), encoding="utf-8")
        with pytest.raises(PlanMismatch, match=r'versions, torch: the folder has "1\.0", this run "2'):
            run(vit, photos, tmp_path / "study", measures="strength_entropy", limit=4)

    def test_a_folder_of_other_things_is_left_alone(self, vit: Vit, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
        with pytest.raises(StudyError, match=r"holds other files \(thesis\.tex\) and no study"):
            run(vit, photos, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_file_in_place_of_the_folder_is_refused(self, vit: Vit, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "study").write_text("", encoding="utf-8")
        with pytest.raises(StudyError, match="is a file, and a study is a folder"):
            run(vit, photos, tmp_path / "study")

    def test_a_place_where_nothing_can_be_written_is_refused(self, vit: Vit, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("", encoding="utf-8")
        with pytest.raises(StudyError, match="Nothing can be written to"):
            run(vit, photos, tmp_path / "file" / "study")

    def test_two_processes_cannot_write_one_study(self, vit: Vit, photos: Path, finished: Path) -> None:
        with folder_lock(finished), pytest.raises(StudyError, match=f"Process {os.getpid()} on .* is writing"):
            run(vit, photos, finished)

    def test_the_lock_of_a_killed_process_does_not_hold(self, vit: Vit, photos: Path, finished: Path) -> None:
        (finished / LOCK).write_text(DEAD_LOCK, encoding="utf-8")
        run(vit, photos, finished)
        assert not (finished / LOCK).exists()

    def test_an_image_that_changed_meanwhile_is_named(self, vit: Vit, tmp_path: Path) -> None:
        photos = write_photos(tmp_path / "photos", 6)
        source = data.open_images(photos)
        scan = data.scan(source)
        Image.new("RGB", (9, 9)).save(photos / "class 1" / "3.png")
        with pytest.raises(DataError, match=r"Image class 1/3\.png has changed"):
            [data.load_image(source, entry) for entry in scan.images]

    def test_images_that_all_fail_leave_no_folder_behind(self, vit: Vit, tmp_path: Path) -> None:
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "a.jpg").write_text("no", encoding="utf-8")
        with pytest.raises(NoImages, match=r"a\.jpg: not an image"):
            run(vit, tmp_path / "photos", tmp_path / "study")
        assert not (tmp_path / "study").exists()

    def test_a_model_that_answers_by_chance_is_refused_before_anything_is_measured(
        self, photos: Path, tmp_path: Path
    ) -> None:
        class Dropping(torch.nn.Dropout):
            def train(self, mode: bool = True) -> "Dropping":
                return super().train(True)

        vit = tiny_vit()
        vit.model.head_drop = Dropping(0.1)
        with pytest.raises(ModelError, match=r"answered the same \d+ images twice and differently .*dropout"):
            run(open_vit(vit.model), photos, tmp_path / "study")
        assert not list((tmp_path / "study" / "parts").glob("*.json"))

    def test_an_answer_that_is_not_finite_names_the_images(self, photos: Path, tmp_path: Path) -> None:
        vit = tiny_vit()
        with torch.no_grad():
            vit.model.head.bias[0] = torch.nan
        with pytest.raises(ModelError, match=r"not finite .* for 4 of 4 images: class 0/0\.png"):
            run(vit, photos, tmp_path / "study")

    def test_labels_of_another_model_are_refused(self, vit: Vit, photos: Path, tmp_path: Path) -> None:
        source = data.open_images(photos, class_names=[f"other {n}" for n in range(20)] + ["class 0", "class 1"])
        with pytest.raises(DataError, match=r"label 21, and module:VisionTransformer has 10 classes"):
            run(vit, source, tmp_path / "study")

    def test_a_batch_size_below_one_is_refused(self, vit: Vit, photos: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="batch of 0"):
            run(vit, photos, tmp_path / "study", batch_size=0)

    def test_numbers_of_numpy_are_those_of_python(self, vit: Vit, photos: Path, tmp_path: Path) -> None:
        numbers = {"limit": np.int64(3), "batch_size": np.int32(2), "seed": np.int64(1), "part_images": np.int64(2)}
        study = run(vit, photos, tmp_path / "study", measures="attention_distance", **numbers)
        assert (study.sizes["image"], study.attrs["batch_size"], study.attrs["seed"]) == (3, 2, 1)

    def test_a_study_of_what_every_study_has_is_refused(self, vit: Vit, photos: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="Every study has base; name what else is to be measured"):
            run(vit, photos, tmp_path / "study", measures="base")


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """The system refuses to let any file grow beyond this: a write error as from a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_is_told_and_the_study_goes_on_later(
    vit: Vit, photos: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    run(vit, photos, out)
    for name in ("00001", "00002", "derived"):
        (out / "parts" / f"{name}.json").unlink()
    with files_of_at_most(4000), pytest.raises(StudyError, match=r"part 1 could not be written .* 1 of 3 parts"):
        run(vit, photos, out)
    assert open_study(out, partial=True).attrs["missing_images"] == N_IMAGES - BATCH_SIZE
    run(vit, photos, out)
    assert verify(out) == 3
    assert folder_bytes(out) == folder_bytes(finished)


def test_attention_outside_the_layers_is_named_in_the_plan(tmp_path: Path) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3,
        global_pool="map", class_token=False,
    )  # fmt: skip
    vit = open_vit(model, class_names=["a", "b", "c"])
    run_study(vit, write_photos(tmp_path / "photos", 2), out=tmp_path / "study", measures="head_probability")
    assert read_plan(tmp_path / "study").notes == ["Attention in attn_pool is outside the blocks: no layer has it."]
