"""Studies that gain measures and images: the same bytes as one that was made at once, whatever happens on the way."""

import errno
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from filelock import SoftFileLease
from numpy.testing import assert_array_equal
from PIL import Image
from safetensors.numpy import save
from tiny_studies import BATCH_SIZE, N_IMAGES, folder_bytes, part_values, tiny_vit, write_model, write_photos

from vitrail.analysis import Analysis, Option, declaration, register, unregister
from vitrail.cli import app
from vitrail.cli.studies import study as study_command
from vitrail.data import open_images, scan
from vitrail.errors import DamagedStudy, PlanMismatch, StudyError, UsageError
from vitrail.measure import Measure
from vitrail.models.open import Vit, open_vit
from vitrail.report import write_report
from vitrail.study import plan as plan_module
from vitrail.study import planning, writing
from vitrail.study import run as run_module
from vitrail.study.growth import merge_plans
from vitrail.study.ownership import write_access
from vitrail.study.plan import Part, differences, growing_command
from vitrail.study.reopen import reopen
from vitrail.study.run import run_study
from vitrail.study.store import open_study, read_manifest, read_plan, verify
from vitrail.study.writing import StudyFolder
from vitrail.tap.tap import Readers

WHEREVER_THERE_ARE_CLASSES = ("label", "prediction", "probability", "top_class", "top_probability", "thumbnail")
"""What every study of a classifier holds."""


OWN_OPTION = Option("own_option", ("a", "b"), "of an analysis of one's own")


class OwnNumber:
    measures, replays = ("own_number",), False

    def __init__(self, value: float, n_batches: int, dims: tuple[str, ...]) -> None:
        self._value, self._left, self._dims = value, n_batches, dims

    def calibrate(self, tap: object, images: torch.Tensor, n_images: int) -> None:
        pass

    def calibration_statistics(self) -> dict[str, np.ndarray]:
        return {"m": np.zeros(1, np.float32)}

    def load_calibration(self, arrays: dict[str, np.ndarray]) -> None:
        assert arrays.keys() == {"m"}

    def readers(self) -> Readers:
        return Readers()

    def finish(self, tap: object, replay: object, logits: torch.Tensor, labels: np.ndarray) -> dict[str, np.ndarray]:
        self._left -= 1
        if self._left < 0:
            raise ZeroDivisionError("a mistake of one's own")
        shape = (len(logits), *(2 for _ in self._dims[1:]))
        return {"own_number": np.full(shape, self._value, np.float32)}


def own_analysis(
    value: float = 0, *, version: int = 1, n_batches: int = 100, dims: tuple[str, ...] = ("image",)
) -> Analysis:
    """An analysis of a package that may not be installed; after so many batches it fails."""
    number = Measure(
        name="own_number", title="own", dims=dims, unit="1", low="", high="", source="", limits="", version=version
    )
    return Analysis(
        name="own",
        title="Own",
        question="Which?",
        measures=(number,),
        collectors=lambda vit, names, options: [OwnNumber(value, n_batches, dims)],
        options=(OWN_OPTION,),
    )


@contextmanager
def registered(analysis: Analysis) -> Iterator[None]:
    register(analysis)
    try:
        yield
    finally:
        unregister(analysis.name)


def run(vit: Vit, photos: Path, out: Path, **options: object) -> xr.Dataset:
    return run_study(vit, photos, out=out, **{"batch_size": BATCH_SIZE, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(vit: Vit, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of heads and patches of all images, made at once."""
    out = tmp_path_factory.mktemp("whole") / "study"
    before, planning.PART_IMAGES = planning.PART_IMAGES, BATCH_SIZE
    try:
        run(vit, photos, out, measures="heads,patches")
    finally:
        planning.PART_IMAGES = before
    return out


class Killed(BaseException):
    """Passes every `except Exception`, as the end of a process does."""


def stop_at_the_plan(write: Callable[[Path, str], None]) -> Callable[[Path, str], None]:
    def stopped(path: Path, content: str) -> None:
        if path.name == "study.json":
            raise Killed
        write(path, content)

    return stopped


class TestGrowing:
    @pytest.mark.parametrize(
        "n_images", [6, 3, 4]
    )  # a last part of two, a study below one part, a last part that is full
    def test_a_study_that_gains_measures_then_images_is_the_study_made_at_once(
        self, n_images: int, vit: Vit, photos: Path, whole: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "study"
        run(vit, photos, out, measures="heads", limit=n_images)
        run(vit, photos, out, measures="patches", limit=n_images)
        assert verify(out) == -(-n_images // BATCH_SIZE)
        run(vit, photos, out, measures="patches")
        assert folder_bytes(out) == folder_bytes(whole)

    def test_in_another_order_it_is_the_same_study(self, vit: Vit, photos: Path, whole: Path, tmp_path: Path) -> None:
        out = tmp_path / "study"
        run(vit, photos, out, measures="window,head_flip", limit=6)
        run(vit, photos, out, measures="patches,prefix_share")
        run(vit, photos, out, measures="heads")
        assert folder_bytes(out) == folder_bytes(whole)

    def test_a_study_with_a_measure_that_is_not_installed_here_gains_others_and_no_images(
        self, vit: Vit, photos: Path, tmp_path: Path
    ) -> None:
        out, measured = tmp_path / "study", "own_number,prefix_share"
        with registered(own_analysis()):
            run(vit, photos, out, measures=measured, limit=8)
            run(vit, photos, tmp_path / "begun", measures=measured, limit=8)
            (tmp_path / "begun" / "parts" / "00001.json").unlink()
        study = run(vit, photos, out, measures="token_norm", limit=8)
        assert {"own_number", "prefix_share", "token_norm"} <= set(study)
        before = folder_bytes(out)
        for folder, limit in ((out, None), (tmp_path / "begun", 8)):
            with pytest.raises(UsageError, match=r"holds own_number, which no analysis here declares.*Install"):
                run(vit, photos, folder, measures="prefix_share", limit=limit)
        assert folder_bytes(out) == before
        assert open_study(out).sizes["image"] == 8

    def test_a_measure_that_fails_half_way_leaves_the_study_open_and_is_measured_anew_once_mended(
        self, vit: Vit, photos: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "study"
        run(vit, photos, out, measures="prefix_share", limit=8)
        finished = folder_bytes(out)
        with registered(own_analysis(1, n_batches=1)), pytest.raises(ZeroDivisionError):
            run(vit, photos, out, measures="own_number", limit=8)
        assert set(read_plan(out).measures) - {"own_number"} == {"label", "prediction", "probability", "prefix_share"}
        for ask in (
            lambda: open_study(out),
            lambda: run(vit, photos, out, measures="prefix_share", limit=8),
            lambda: run(vit, photos, out, measures="token_norm"),  # more images, too
        ):
            with pytest.warns(RuntimeWarning, match="does not hold own_number of every image yet"):
                study = ask()
            assert study.attrs["missing_measures"] == ["own_number"]
            assert "own_number" not in study
        with pytest.warns(RuntimeWarning, match="does not hold own_number"):
            report = write_report(out, tmp_path / "report.html").read_text(encoding="utf-8")
        assert "Begun and not complete, so left out here: own_number." in report
        assert study.sizes["image"] == N_IMAGES
        mended = own_analysis(2, version=2, dims=("image", "layer"))
        with registered(mended):
            with pytest.raises(PlanMismatch, match=r"an earlier version of own_number\. Ask for it in --measures"):
                run(vit, photos, out, measures="prefix_share")
            study = run(vit, photos, out, measures="own_number")
            assert_array_equal(study["own_number"], np.full((N_IMAGES, 2), 2))
            assert study["own_number"].attrs["version"] == 2
            run(vit, photos, tmp_path / "at once", measures="own_number,prefix_share,token_norm")
        assert folder_bytes(out) == folder_bytes(tmp_path / "at once")
        assert finished.keys() < folder_bytes(out).keys()

    def test_a_later_version_takes_the_place_of_a_complete_measure(
        self, vit: Vit, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "study"
        with registered(own_analysis(1)):
            run(vit, photos, out, measures="own_number,head_probability")
        with registered(own_analysis(2, version=2)):
            with monkeypatch.context() as patched:
                patched.setattr(writing, "write_atomic", stop_at_the_plan(writing.write_atomic))
                with pytest.raises(Killed):
                    run(vit, photos, out, measures="own_number")
            with pytest.warns(RuntimeWarning, match="does not hold own_number"):
                assert "own_number" not in open_study(out)  # no number of either version passes as one of the other
            study = run(vit, photos, out, measures="own_number")
            assert_array_equal(study["own_number"], np.full(N_IMAGES, 2))
            run(vit, photos, tmp_path / "at once", measures="own_number,head_probability")
        assert folder_bytes(out) == folder_bytes(tmp_path / "at once")

    def test_a_list_gains_a_file_of_another_folder(self, vit: Vit, tmp_path: Path) -> None:
        photos = write_photos(tmp_path / "class 2", 6)
        some, more = sorted((photos / "class 0").glob("*.png")), sorted((photos / "class 1").glob("*.png"))
        out = tmp_path / "study"
        run(vit, some, out, measures="prefix_share")
        for _ in range(2):  # and the same once more
            study = run(vit, [more[0], *some], out, measures="prefix_share")
            assert study["image"].to_numpy().tolist() == [*(path.name for path in some), "class 1/1.png"]
        again = run(vit, [*some, more[0]], tmp_path / "at once", measures="prefix_share")
        assert_array_equal(study["prefix_share"], again["prefix_share"])
        shutil.copy(more[0], photos / "0.png")
        with pytest.raises(PlanMismatch, match=r"0\.png of this run would have the ids of other images"):
            run(vit, [photos / "0.png", *some, more[0]], out, measures="prefix_share")

    def test_what_is_there_is_not_measured_again(
        self, vit: Vit, photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written: list[tuple[int, frozenset[str]]] = []
        write = StudyFolder.write_part

        def record(study: StudyFolder, part: Part, arrays: dict[str, np.ndarray]) -> None:
            written.append((part.number, frozenset(arrays)))
            write(study, part, arrays)

        run(vit, photos, tmp_path / "study", measures="heads", limit=8)
        monkeypatch.setattr(StudyFolder, "write_part", record)
        run(vit, photos, tmp_path / "study", measures="patches", limit=8)
        assert [number for number, _ in written] == [0, 1]
        assert {declaration(name).analysis for _, names in written for name in names} == {"patches"}
        written.clear()
        run(vit, photos, tmp_path / "study", measures="heads")
        assert [number for number, _ in written] == [2]
        assert folder_bytes(tmp_path / "study") == folder_bytes(whole)

    def test_a_run_that_asks_for_a_part_of_what_is_there_changes_nothing(
        self, vit: Vit, photos: Path, whole: Path
    ) -> None:
        before = folder_bytes(whole)
        run(vit, photos, whole, measures="head_flip")
        assert folder_bytes(whole) == before

    def test_images_that_lie_between_the_others_come_after_them(self, vit: Vit, tmp_path: Path) -> None:
        photos = write_photos(tmp_path / "photos", 6)
        out = tmp_path / "study"
        first = run(vit, photos, out, measures="prefix_share").load()
        shutil.copy(photos / "class 1" / "3.png", photos / "class 0" / "1.png")
        second = run(vit, photos, out, measures="prefix_share")
        assert second["image"].values.tolist() == [*first["image"].values, "class 0/1.png"]
        assert_array_equal(second["prefix_share"][:6], first["prefix_share"])
        assert_array_equal(second["prefix_share"][6], first["prefix_share"].sel(image="class 1/3.png"))
        before = folder_bytes(out)
        run(vit, photos, out, measures="prefix_share")
        assert folder_bytes(out) == before

    def test_options_of_the_measures_that_are_there_need_not_be_repeated(
        self, vit: Vit, photos: Path, tmp_path: Path
    ) -> None:
        estimate = {"importance": "estimate"}
        run(vit, photos, tmp_path / "study", measures="head_loss_change", options=estimate, limit=4)
        grown = run(vit, photos, tmp_path / "study", measures="field_size", options={"window_area": "36"}, limit=4)
        assert grown.attrs["options"] == {"importance": "estimate", "window_area": "36"}
        with pytest.raises(PlanMismatch, match='options, importance: the folder has "estimate", this run "exact"'):
            run(vit, photos, tmp_path / "study", measures="head_flip", limit=4)

    def test_options_and_calibration_of_an_analysis_that_is_not_installed_are_left_to_it(
        self, vit: Vit, photos: Path, tmp_path: Path
    ) -> None:
        out, by_mean = tmp_path / "study", {"ablation": "mean"}
        with registered(own_analysis(1)):
            run(vit, photos, out, measures="own_number", options={"own_option": "b"}, limit=4)
        run(vit, photos, out, measures="attention_distance", limit=4)
        study = run(vit, photos, out, measures="head_flip", options=by_mean, limit=4)  # the distance knows no ablation
        assert study.attrs["options"] == {"ablation": "mean", "own_option": "b"}
        alone = run(vit, photos, tmp_path / "alone", measures="head_flip", options=by_mean, limit=4)
        assert_array_equal(study["head_flip"], alone["head_flip"])
        run(vit, photos, out, measures="token_norm", limit=4)

    def test_calibration_of_an_earlier_version_counts_by_its_number(
        self, vit: Vit, photos: Path, tmp_path: Path
    ) -> None:
        folder = StudyFolder.__new__(StudyFolder)
        folder.folder = tmp_path
        arrays = {"0/L0": np.ones(2, np.float32), "1/m": np.zeros(1, np.float32)}
        content = save(arrays, metadata={"digest": writing._joint_digest(arrays)})
        (tmp_path / "survey.safetensors").write_bytes(content)
        assert folder.read_calibration([("head_flip",)]) is None
        assert [each.keys() for each in folder.read_calibration([("head_flip",), ("own_number",)]) or ()] == [
            {"L0"},
            {"m"},
        ]

    def test_a_model_that_has_moved_is_the_same_model(self, photos: Path, tmp_path: Path) -> None:
        model, out = write_model(tmp_path / "before"), tmp_path / "study"
        run(open_vit(model), photos, out, measures="prefix_share", limit=4)
        moved = model.rename(tmp_path / "after")
        study = run(open_vit(moved), photos, out, measures="token_norm", limit=4)
        assert {"prefix_share", "token_norm"} <= set(study)
        assert read_plan(out).model == str(moved)
        assert reopen(out).name == str(moved)
        plan = read_plan(out)
        for name in ("timm:vit_tiny_patch16_224", "hf:facebook/dino", "module:Net"):
            assert any("model: the folder has" in each for each in differences(plan, replace(plan, model=name)))
        assert differences(replace(plan, model="hf:/before"), replace(plan, model="net.py:make")) == []

    def test_the_command_that_adds_a_measure_has_what_differs_from_the_defaults(
        self, tmp_path: Path, photos: Path
    ) -> None:
        assert BATCH_SIZE not in (plan_module.BATCH_SIZE, plan_module.PART_IMAGES)
        for command in (run_study, study_command):
            assert inspect.signature(command).parameters["batch_size"].default == plan_module.BATCH_SIZE
        model, out = write_model(tmp_path / "model"), tmp_path / "study"
        given = {"options": {"ablation": "mean", "image_map": "none"}, "seed": 3, "part_images": 2 * BATCH_SIZE}
        run(open_vit(model), photos, out, measures="head_flip", limit=4, **given)
        words = growing_command(read_plan(out), [str(photos), "--limit", "4"], ["token_norm"], str(out)).split()[1:]
        app([*words, "--no-figures", "--quiet"], standalone_mode=False)
        assert "token_norm" in open_study(out)
        masked = replace(read_plan(out), options={"masks": "given"}, device="cuda", output=1)
        assert growing_command(masked, ["IMAGES"], [], "study").endswith(
            "IMAGES --masks FOLDER --batch-size 4 --part-images 8 --seed 3 --output 1 --device cuda --out study"
        )
        for task, model, words in (
            ("labels", "module:Net", "--task labels "),
            ("classes", "net.py:make", "--task classes "),
        ):
            plan = replace(masked, model=model, task=task, n_classes=5)
            assert f" {words}--output 1 " in growing_command(plan, ["IMAGES"], [], "study")
        unknown = replace(masked, task="unknown", n_classes=None)
        assert "--task" not in growing_command(unknown, ["IMAGES"], [], "study")
        differing = differences(read_plan(out), replace(read_plan(out), options={"ablation": "mean"}))
        assert differing == ['options, image_map: the folder has "none", this run "tsne"']

    @pytest.mark.parametrize("content", [None, b"\xff\xfe\x00garb", b"{"])
    def test_a_list_of_images_that_is_lost_or_damaged_is_written_anew(
        self, vit: Vit, photos: Path, tmp_path: Path, content: bytes | None
    ) -> None:
        run(vit, photos, tmp_path / "study", measures="prefix_share", limit=4)
        before, file = folder_bytes(tmp_path / "study"), tmp_path / "study" / "images.json"
        file.unlink() if content is None else file.write_bytes(content)
        run(vit, photos, tmp_path / "study", measures="prefix_share", limit=4)
        assert folder_bytes(tmp_path / "study") == before


class TestFullDisk:
    def test_growing_on_a_full_disk_damages_nothing_and_goes_on_later(
        self, vit: Vit, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        out = tmp_path / "study"
        with monkeypatch.context() as patched:
            patched.setattr(run_module, "save_model_arguments", full)
            with pytest.raises(StudyError, match=r"how the model was opened could not be written.*make room and run"):
                run(vit, photos, out, measures="prefix_share", limit=8)
        run(vit, photos, out, measures="prefix_share", limit=8)
        for owner, name in ((zarr.Array, "resize"), (writing, "_consolidate"), (SoftFileLease, "acquire")):
            with monkeypatch.context() as patched:
                patched.setattr(owner, name, full)
                with pytest.raises(StudyError, match=r"No space left on device.* make room and run") as refusal:
                    run(vit, photos, out, measures="prefix_share")
                assert not isinstance(refusal.value, DamagedStudy)
        run(vit, photos, out, measures="prefix_share")
        run(vit, photos, tmp_path / "at once", measures="prefix_share")
        assert folder_bytes(out) == folder_bytes(tmp_path / "at once")


class TestRefusals:
    def test_an_image_that_changed_or_went_is_named(self, vit: Vit, tmp_path: Path) -> None:
        photos = write_photos(tmp_path / "photos", 4)
        run(vit, photos, tmp_path / "study", measures="prefix_share")
        Image.new("RGB", (40, 40)).save(photos / "class 0" / "2.png")
        (photos / "class 1" / "3.png").rename(photos / "class 1" / "4.png")
        before = folder_bytes(tmp_path / "study")
        with pytest.raises(PlanMismatch, match=r"class 1/3\.png missing; class 0/2\.png changed"):
            run(vit, photos, tmp_path / "study", measures="prefix_share")
        assert folder_bytes(tmp_path / "study") == before

    def test_images_with_other_labels_or_masks_or_beyond_the_limit_have_not_changed(
        self, vit: Vit, tmp_path: Path
    ) -> None:
        photos, masks = write_photos(tmp_path / "photos", 4), tmp_path / "masks"
        files = sorted(photos.rglob("*.png"))
        for file in files:
            mask = masks / file.relative_to(photos)
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (40, 40), 1).save(mask)
        labels = tmp_path / "labels.csv"
        labels.write_text("".join(f"{file},class 5\n" for file in files), encoding="utf-8")
        plain, masked = tmp_path / "plain", tmp_path / "masked"
        run(vit, photos, plain, measures="prefix_share", limit=3)
        run(vit, photos, masked, measures="prefix_share", masks=masks)
        refusals = (
            (plain, {"masks": masks}, "with another mask", "leave --masks out, as it began without"),
            (masked, {}, "with another mask", "give the same --masks"),
            (
                plain,
                {"images": labels},
                "with another label",
                r"give the labels that it has \(the names of the class fol",
            ),
        )
        for folder, options, reason, advice in refusals:
            with pytest.raises(PlanMismatch, match=rf"{reason}\. A study can gain images; {advice}") as refusal:
                run(vit, options.pop("images", photos), folder, measures="prefix_share", **options)
            assert "changed" not in str(refusal.value)
        shutil.copy(files[-1], photos / "class 0" / "0 first.png")
        with pytest.raises(
            PlanMismatch, match=r"class 1/1\.png beyond the limit\. A study .* images; raise --limit, or"
        ):
            run(vit, photos, plain, measures="prefix_share", limit=3)

    def test_why_images_have_no_labels_is_no_difference(self, vit: Vit, tmp_path: Path) -> None:
        photos = write_photos(tmp_path / "photos", 4)
        (photos / "class 0").rename(photos / "aa")
        (photos / "class 1").rename(photos / "bb")
        run(vit, photos, tmp_path / "study", measures="prefix_share", limit=4)
        shutil.copytree(photos / "aa", photos / "zz")
        study = run(vit, photos, tmp_path / "study", measures="prefix_share", limit=4)
        assert study.sizes["image"] == 4

    def test_fewer_images_are_refused(self, vit: Vit, photos: Path, whole: Path) -> None:
        with pytest.raises(PlanMismatch, match="number of images: the folder has 11, this run 5"):
            run(vit, photos, whole, limit=5)

    def test_other_weights_are_refused_also_where_measures_are_added(self, photos: Path, whole: Path) -> None:
        with pytest.raises(PlanMismatch, match="weights: the folder has"):
            run(tiny_vit(seed=1), photos, whole, measures="token_norm")

    def test_images_cannot_be_added_where_all_images_count_in_each_number(
        self, vit: Vit, photos: Path, tmp_path: Path
    ) -> None:
        mean = {"ablation": "mean"}
        run(vit, photos, tmp_path / "study", measures="head_flip", options=mean, limit=4)
        with pytest.raises(PlanMismatch, match="head_flip are measured against means over all images"):
            run(vit, photos, tmp_path / "study", measures="head_flip", options=mean)


def grow(folder: Path, vit: Vit, photos: Path, names: list[str], limit: int) -> None:
    """A run that asks for these measures of the first images, with numbers that need no model."""
    with write_access(folder):
        existing = writing.plan_of(folder)
        manifest = scan(open_images(photos, limit=limit))
        declared = [declaration(name) for name in dict.fromkeys([*(existing.measures if existing else ()), *names])]
        plan = planning.make_plan(
            vit, manifest, declared, left_out={}, options={}, batch_size=BATCH_SIZE, seed=0, threads=1
        )
        study = StudyFolder(folder, merge_plans(existing, plan, names) if existing else plan, manifest)
        for part in study.missing:
            values = part_values(part.number, BATCH_SIZE)[: part.stop - part.start]
            arrays = {"head_probability": values, "prefix_share": values + 1}
            study.write_part(part, {n: arrays[n] for n in plan.measures if n not in study.arrays_of(part)})
        if study.derived_is_missing:
            study.write_derived({"image_xy": open_study(folder)["head_probability"].values[:, :, 0]})


def test_ended_before_any_step_of_growing_it_is_a_study_and_grows_to_the_same_bytes(
    vit: Vit, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(tmp_path / "whole", vit, photos, ["head_probability", "prefix_share"], 2 * BATCH_SIZE)
    grow(tmp_path / "small", vit, photos, ["head_probability"], 6)
    expected, values = folder_bytes(tmp_path / "whole"), open_study(tmp_path / "small")["head_probability"].values
    for step in range(1, 200):
        left = step

        def stop_before(function: object) -> object:
            def stopped(*arguments: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    raise Killed
                return function(*arguments, **options)  # type: ignore[operator]

            return stopped

        folder = tmp_path / f"stopped {step}"
        shutil.copytree(tmp_path / "small", folder)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", stop_before(os.fsync))
            for name in ("replace", "rename", "unlink", "rmdir"):
                patched.setattr(Path, name, stop_before(getattr(Path, name)))
            patched.setattr(writing, "_consolidate", stop_before(writing._consolidate))
            try:
                grow(folder, vit, photos, ["prefix_share"], 2 * BATCH_SIZE)
            except Killed:
                pass
            else:
                break
        there = open_study(folder, partial=True)["head_probability"]
        assert_array_equal(there[:BATCH_SIZE], values[:BATCH_SIZE])
        grow(folder, vit, photos, ["prefix_share"], 2 * BATCH_SIZE)
        assert folder_bytes(folder) == expected, f"stopped before step {step}"
    assert 20 < step < 199


def test_a_study_that_is_gaining_measures_opens_with_those_that_are_complete(
    vit: Vit, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "study"
    run(vit, photos, out, measures="prefix_share")
    write = StudyFolder.write_part

    def stop(study: StudyFolder, part: Part, arrays: dict[str, np.ndarray]) -> None:
        if part.number == 1:
            raise KeyboardInterrupt
        write(study, part, arrays)

    with monkeypatch.context() as patched:
        patched.setattr(StudyFolder, "write_part", stop)
        with pytest.raises(KeyboardInterrupt):
            run(vit, photos, out, measures="token_norm")
    with pytest.warns(RuntimeWarning, match="does not hold token_norm of every image yet, so it opens without"):
        opened = open_study(out)
    for there in (opened, open_study(out, partial=True)):
        assert there.sizes["image"] == N_IMAGES
        assert there.attrs["missing_images"] == 0
        assert there.attrs["missing_measures"] == ["token_norm"]
        assert set(there.data_vars) == {*WHEREVER_THERE_ARE_CLASSES, "prefix_share"}
    assert set(read_plan(out).measures) == {"label", "prediction", "probability", "prefix_share", "token_norm"}
    assert len(read_manifest(out).images) == N_IMAGES


def test_heads_then_patches_then_images_then_a_second_worker_is_the_study_made_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, photos, later = write_model(tmp_path / "model"), write_photos(tmp_path / "photos", 22), tmp_path / "later"

    def study(folder: str, measures: str, *options: str) -> None:
        sizes = ["--batch-size", str(BATCH_SIZE), "--part-images", str(BATCH_SIZE)]
        words = ["study", str(model), str(photos), "--out", str(tmp_path / folder), "--measures", measures, *sizes]
        app([*words, "--no-figures", "--quiet", *options], standalone_mode=False)

    study("whole", "heads,patches")
    (photos / "class 1").rename(later)
    study("study", "heads")
    study("study", "patches")
    later.rename(photos / "class 1")
    asks_for_help, asked = os.pipe()
    has_helped, helped = os.pipe()
    write, written = StudyFolder.write_part, set[int]()

    def write_and_tell(study: StudyFolder, part: Part, arrays: dict[str, np.ndarray]) -> None:
        write(study, part, arrays)
        os.write(helped, bytes([part.number]))

    def ask_for_help_first(study: StudyFolder, part: Part, arrays: dict[str, np.ndarray]) -> None:
        if not written:
            os.write(asked, b"?")
            assert os.read(has_helped, 1) == bytes([4])  # this process has claimed 2 and 3
        write(study, part, arrays)
        written.add(part.number)

    child = os.fork()
    if child == 0:
        try:
            os.close(asked)
            assert os.read(asks_for_help, 1)
            monkeypatch.setattr(StudyFolder, "write_part", write_and_tell)
            study("study", "heads,patches", "--worker")
        finally:
            os._exit(sys.exc_info()[0] is not None)
    os.close(helped)
    monkeypatch.setattr(StudyFolder, "write_part", ask_for_help_first)
    study("study", "heads,patches", "--worker")
    assert os.waitpid(child, 0)[1] == 0
    for end in (asked, asks_for_help, has_helped):
        os.close(end)
    assert written in ({2, 3}, {2, 3, 5})  # 2 was not full before the images came
    assert folder_bytes(tmp_path / "study") == folder_bytes(tmp_path / "whole")
    with open_study(tmp_path / "study") as grown, open_study(tmp_path / "whole") as whole:
        assert grown.identical(whole)
        assert {declaration(name).analysis for name in grown.data_vars} >= {"heads", "patches"}
