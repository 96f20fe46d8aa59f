"""Removing heads of a studied model: which, what it costs, where it is measured, and what is refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from tiny_studies import BATCH_SIZE, tiny_vit, write_model, write_photos

from vitrail.data import stored_image
from vitrail.errors import DamagedStudy, DataError, UnknownModel, Unsupported, UsageError
from vitrail.models.open import open_vit
from vitrail.models.pruned import load
from vitrail.pruning import prune as pruning
from vitrail.pruning import saving
from vitrail.pruning.masked import logits_without
from vitrail.pruning.prune import prune_study
from vitrail.pruning.ranking import halves
from vitrail.study.run import run_study
from vitrail.study.store import open_study, read_manifest
from vitrail.study.table import pruning_summary

N_PHOTOS = 48


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model that comes with Vitrail on some of its photographs."""
    out = tmp_path_factory.mktemp("pruning") / "study"
    run_study(open_vit("vitrail:photos"), "photos", out=out, measures="heads", limit=N_PHOTOS)
    return out


@pytest.fixture(scope="module")
def kept(study: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pruning.Pruned, Path]:
    out = tmp_path_factory.mktemp("kept") / "smaller"
    return prune_study(study, out, keep_accuracy=0.8), out


def answers(folder: str | Path, study: Path, places: np.ndarray) -> np.ndarray:
    manifest, vit = read_manifest(study), open_vit(folder)
    images = [stored_image(manifest, manifest.images[at]) for at in places]
    return vit.logits(vit.prepare(images)).argmax(-1).numpy()


def test_accuracy_is_measured_on_images_that_nothing_was_chosen_on(study: Path, kept: tuple) -> None:
    done, out = kept
    test = halves(N_PHOTOS).test
    labels = open_study(study)["label"].values[test]
    assert done.kept.held_out
    assert done.kept.images == len(test)
    assert_allclose(done.kept.after, (answers(out, study, test) == labels).mean())
    assert_allclose(done.kept.before, (answers("vitrail:photos", study, test) == labels).mean())
    assert_allclose(done.kept.share, done.kept.after / done.kept.before)
    assert done.kept.low <= done.kept.share <= done.kept.high


def test_choosing_sees_only_the_other_half(study: Path, kept: tuple, tmp_path: Path, monkeypatch) -> None:
    asked: list[int] = []
    real = pruning.StudyImages.prepare

    def noting(self, places, vit=None):
        asked.extend(places)
        return real(self, places, vit)

    def written(vit, chosen, *rest):
        asked.append(-1)  # what follows is not choosing any more
        return real_written(vit, chosen, *rest)

    real_written = pruning._write_model
    monkeypatch.setattr(pruning.StudyImages, "prepare", noting)
    monkeypatch.setattr(pruning, "_write_model", written)
    again = prune_study(study, tmp_path / "again", keep_accuracy=0.8)
    assert again.heads == kept[0].heads
    choosing, measuring = asked[: asked.index(-1)], asked[asked.index(-1) + 1 :]
    assert set(choosing) == set(halves(N_PHOTOS).calibration.tolist())
    assert set(measuring) == set(halves(N_PHOTOS).test.tolist())


def test_the_promise_is_kept_with_a_margin_on_the_choosing_half_and_one_head_more_breaks_it(
    study: Path, kept: tuple
) -> None:
    done, _ = kept
    from vitrail.pruning.ranking import orders, scores

    half = halves(N_PHOTOS).calibration
    order = orders(scores(open_study(study), half)[done.ranking])
    assert sorted(order[: len(done.heads)]) == [tuple(head) for head in done.heads]
    vit, manifest = open_vit("vitrail:photos"), read_manifest(study)
    images = vit.prepare([stored_image(manifest, manifest.images[at]) for at in half])
    labels = open_study(study)["label"].values[half]
    right = lambda count: logits_without(vit, images, order[:count]).argmax(-1).numpy() == labels  # noqa: E731
    left = lambda count: np.subtract(*pruning._share_and_error(right(0), right(count)))  # noqa: E731
    assert left(len(done.heads)) >= 0.8
    assert left(len(done.heads) + 1) < 0.8


def test_the_smaller_model_is_smaller_is_the_masked_one_and_is_recorded(kept: tuple) -> None:
    done, out = kept
    vit = open_vit(out)
    assert sum(vit.n_heads) == done.heads_before - len(done.heads)
    assert sum(weight.numel() for weight in vit.model.parameters()) == done.parameters_after < done.parameters_before
    assert done.error <= 1e-5
    assert done.speed.low <= done.speed.ratio <= done.speed.high
    record = json.loads((out / "pruning.json").read_text())
    assert record["heads"] == [list(head) for head in done.heads]
    assert record["kept"]["promised"] == 0.8
    assert (out / "load.py").is_file()


def test_one_test_image_has_no_interval_and_none_is_printed_or_recorded_as_nan(kept: tuple) -> None:
    done, _ = kept
    correct = np.array([True])
    share, low, high = pruning._share_interval(correct, correct)
    single = replace(done, kept=replace(done.kept, images=1, share=share, low=low, high=high))
    lines = pruning_summary(single)
    assert any("too few for an interval" in str(line) for line in lines)
    assert pruning._without_nan(asdict(single))["kept"]["low"] is None
    none_correct = replace(done, kept=replace(done.kept, **dict.fromkeys(("share", "low", "high"), np.nan)))
    for summary in (lines, pruning_summary(none_correct)):
        cells = [cell for column in summary[1].columns for cell in column.cells]
        assert not any("nan" in text for text in [*map(str, summary), *cells])


def test_named_heads_are_removed_and_accuracy_is_of_all_images(study: Path, tmp_path: Path) -> None:
    done = prune_study(study, tmp_path / "out", heads=[(0, 1), (5, 0), (5, 1), (5, 2)])
    vit = open_vit(tmp_path / "out")
    assert vit.n_heads == (2, 3, 3, 3, 3)
    assert done.layers_without_heads == [5]
    assert done.kept.images == N_PHOTOS
    assert not done.kept.held_out
    assert done.kept.holds is None
    told = "\n".join(map(str, pruning_summary(done)))
    assert "may be those the heads were chosen on" in told
    assert "L5 kept no head" in told


def test_heads_may_be_numpy_numbers_or_names(study: Path, tmp_path: Path) -> None:
    pairs = np.argwhere(np.arange(6)[:, None] + np.arange(3) == 1)
    done = prune_study(study, tmp_path / "array", heads=pairs)
    assert done.heads == [(0, 1), (1, 0)]
    assert json.loads((tmp_path / "array" / "pruning.json").read_text())["heads"] == [[0, 1], [1, 0]]
    assert prune_study(study, tmp_path / "names", heads="L1H0,L0H1").heads == done.heads


def test_a_model_handed_over_in_another_precision_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    vit = open_vit(tiny_vit().model, precision="bfloat16", mean=0.5, std=0.5)
    run_study(vit, "photos", out=tmp_path / "study", measures="head_divergence", limit=2)
    with pytest.raises(Unsupported, match=r"in bfloat16, .*Hand it over opened in float32"):
        prune_study(tmp_path / "study", tmp_path / "out", heads=[(0, 0)], model=vit)
    assert not (tmp_path / "out").exists()


def test_a_chosen_output_is_that_of_the_smaller_model_too(tmp_path: Path) -> None:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 24}
    torch.manual_seed(0)
    model = DeiTForImageClassificationWithTeacher(DeiTConfig(image_size=32, patch_size=8, num_labels=4, **shape))
    model.save_pretrained(tmp_path / "model")
    vit = open_vit(tmp_path / "model", output="cls_logits", mean=0.5, std=0.5)
    run_study(vit, "photos", out=tmp_path / "study", measures="head_divergence", limit=4)
    done = prune_study(tmp_path / "study", tmp_path / "out", heads=[(0, 0)])
    assert done.error < 1e-5
    assert "output='cls_logits'" in "\n".join(map(str, pruning_summary(done)))
    assert done.kept.labels == "predicted"
    assert "agreement with the model's own answers: on all 4 images" in "\n".join(map(str, pruning_summary(done)))


def test_the_summary_says_whether_the_promise_was_kept(kept: tuple) -> None:
    from dataclasses import replace

    done, _ = kept
    for promised, word in ((0.01, "accuracy: kept"), (0.9999, "accuracy: NOT kept")):
        told = pruning_summary(replace(done, kept=replace(done.kept, share=0.9, promised=promised)))
        assert any(word in str(line) for line in told)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "Say either which heads"),
        ({"heads": [(0, 0)], "keep_accuracy": 0.9}, "Say either which heads"),
        ({"keep_accuracy": 1.5}, "has no meaning"),
        ({"heads": [(0, 7)]}, "L0H7 is not a head"),
        ({"heads": [(layer, head) for layer in range(6) for head in range(3)]}, "All 18 heads"),
        ({"keep_accuracy": 0.9, "ranking": "luck"}, "it has probability"),
        ({"heads": "H0L0"}, "names no head"),
        ({"heads": [0, 1]}, "names no heads. Give pairs"),
        ({"heads": [(0, 0), (0, 0), (0, 1)]}, "a head twice"),
    ],
)
def test_what_has_no_meaning_is_refused_and_nothing_is_written(
    study: Path, tmp_path: Path, wanted: dict, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        prune_study(study, tmp_path / "out", **wanted)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_refused_before_anything_is_run(study: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        prune_study(study, tmp_path, heads=[(0, 0)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_where_no_head_can_go_it_is_said(study: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pruning, "_share_and_error", lambda before, after: (0.0, 0.0))
    with pytest.raises(UsageError, match="No head can be removed"):
        prune_study(study, tmp_path / "out", keep_accuracy=0.9)
    assert not (tmp_path / "out").exists()


def test_a_model_that_was_a_python_object_cannot_be_opened_again(photos: Path, tmp_path: Path) -> None:
    run_study(tiny_vit(), photos, out=tmp_path / "study", batch_size=BATCH_SIZE)
    with pytest.raises(UnknownModel, match="Python object"):
        prune_study(tmp_path / "study", tmp_path / "out", heads=[(0, 0)])


def test_attention_whose_heads_cannot_be_removed_is_refused(study: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pruning, "why_not_removable", lambda vit: "Heads of L0 cannot be removed: a reason.")
    with pytest.raises(Unsupported, match="a reason"):
        prune_study(study, tmp_path / "out", heads=[(0, 0)])


def test_images_that_changed_are_refused_and_no_folder_stays(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 6)
    run_study(open_vit("vitrail:photos"), photos, out=tmp_path / "study", batch_size=BATCH_SIZE)
    (photos / "class 1" / "1.png").unlink()
    with pytest.raises(DataError, match=r"class 1/1\.png"):
        prune_study(tmp_path / "study", tmp_path / "out", heads=[(0, 0)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("step", "error"), [("write_tensors", OSError), ("_with_accuracy", KeyboardInterrupt)])
def test_what_is_stopped_leaves_nothing_and_can_be_run_again(
    study: Path, tmp_path: Path, monkeypatch, step: str, error: type[BaseException]
) -> None:
    def stop(*_: object) -> None:
        raise error(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(saving if step == "write_tensors" else pruning, step, stop)
        with pytest.raises(error):
            prune_study(study, tmp_path / "out", heads=[(0, 0)])
    assert not (tmp_path / "out").exists()
    prune_study(study, tmp_path / "out", heads=[(0, 0)])
    assert (tmp_path / "out" / "pruning.json").is_file()


def test_a_model_that_could_not_be_saved_is_refused_before_heads_are_chosen(
    photos: Path, tmp_path: Path, monkeypatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(pruning, "_choose_heads", lambda *_: calls.append(1))
    write_model(tmp_path / "model")
    run_study(open_vit(tmp_path / "model"), photos, out=tmp_path / "whole", measures="head_divergence", limit=2)
    prune_study(tmp_path / "whole", tmp_path / "smaller", heads=[(0, 0)])
    shrunk = load(tmp_path / "smaller")
    kept = open_vit(tmp_path / "model").model
    kept.head = torch.nn.Linear(24, 3)
    for number, (module, reason) in enumerate(
        (
            (torch.nn.Sequential(kept), "neither timm nor transformers"),
            (shrunk, r"was changed in Python .*blocks\.0\.attn\.qkv\.weight is \[36, 24\], and \[72, 24\] where"),
            (kept, r"head\.weight is \[3, 24\], and \[10, 24\] where"),
        )
    ):
        vit = open_vit(module, image_size=32, mean=0.5, std=0.5)
        study = tmp_path / f"study {number}"
        run_study(vit, photos, out=study, measures="head_divergence", limit=2)
        with pytest.raises(Unsupported, match=reason):
            prune_study(study, tmp_path / "out", keep_accuracy=0.5, model=vit)
    assert not calls
    assert not (tmp_path / "out").exists()
    again = open_vit(tmp_path / "smaller")
    run_study(again, photos, out=tmp_path / "again", measures="head_divergence", limit=2)
    assert prune_study(tmp_path / "again", tmp_path / "smallest", heads=[(1, 0)]).error < 1e-5


# --- a study by the mean output --------------------------------------------------------------------------------------


def test_a_study_by_the_mean_calibrates_on_all_images_once(photos: Path, tmp_path: Path, vit) -> None:
    whole = run_study(vit, photos, out=tmp_path / "whole", batch_size=BATCH_SIZE, options={"ablation": "mean"})
    survey = (tmp_path / "whole" / "survey.safetensors").read_bytes()
    run_study(vit, photos, out=tmp_path / "cut", batch_size=BATCH_SIZE, options={"ablation": "mean"})
    (tmp_path / "cut" / "parts" / "00001.json").unlink()
    resumed = run_study(vit, photos, out=tmp_path / "cut", batch_size=BATCH_SIZE, options={"ablation": "mean"})
    assert (tmp_path / "cut" / "survey.safetensors").read_bytes() == survey
    assert_allclose(resumed["head_probability"].values, whole["head_probability"].values, rtol=0, atol=0)
    zero = run_study(vit, photos, out=tmp_path / "zero", batch_size=BATCH_SIZE)
    assert np.abs(zero["head_probability"].values - whole["head_probability"].values).max() > 1e-4
    assert not (tmp_path / "zero" / "survey.safetensors").exists()


def test_a_calibration_that_is_not_what_was_written_is_refused(photos: Path, tmp_path: Path, vit) -> None:
    from safetensors.torch import load_file, save_file

    out = tmp_path / "study"
    run_study(vit, photos, out=out, batch_size=BATCH_SIZE, options={"ablation": "mean"})
    (out / "parts" / "00001.json").unlink()
    held = load_file(out / "survey.safetensors")
    save_file({name: value + torch.ones(()) for name, value in held.items()}, out / "survey.safetensors")
    with pytest.raises(DamagedStudy, match="not what was written"):
        run_study(vit, photos, out=out, batch_size=BATCH_SIZE, options={"ablation": "mean"})
    (out / "survey.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DamagedStudy, match="cannot be read"):
        run_study(vit, photos, out=out, batch_size=BATCH_SIZE, options={"ablation": "mean"})


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_what_was_saved_and_where_it_lies(study: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from vitrail.cli import app

    out = tmp_path / "smaller"
    done = CliRunner().invoke(app, ["prune", str(study), "--heads", "L0H1,L5H0", "-o", str(out)])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    for part in ("removed: L0H1, L5H0", "heads 18 16 0.889", "parameters", "times as fast", "load.py"):
        assert part in said
    again = CliRunner().invoke(app, ["prune", str(study), "--heads", "L0H1", "-o", str(out)])
    assert isinstance(again.exception, UsageError)
