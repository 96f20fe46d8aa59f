"""Evaluation, comparison with measured windows, block-sparse attention, the commands, and studies of a WinT."""

import time

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from typer.testing import CliRunner

from vitrail import open_vit
from vitrail.analysis import analyses, is_of_other_models, make_collectors, unavailable
from vitrail.cli import app
from vitrail.contract.check import differences, footprint
from vitrail.errors import DataError, NoImages, UsageError
from vitrail.figures.whole import draw_figures
from vitrail.one_image import look
from vitrail.report import write_report
from vitrail.report.sections import findings_of
from vitrail.study.run import run_study
from vitrail.tap.tap import Readers
from vitrail.windows.collect import WindowCollector, measure_sides, overlap, predict_windows
from vitrail.windows.evaluate import evaluate
from vitrail.wint import sparse
from vitrail.wint.batches import Images, read_images
from vitrail.wint.folder import save
from vitrail.wint.model import Shape, WinT, hard_mask, window_heads
from wint.tiny_runs import packed

GRID = (8, 8)


def small(seed=0, **options) -> WinT:
    torch.manual_seed(seed)
    shape = {"width": 24, "depth": 2, "heads": 2, "n_classes": 3, "start": ((0.2,) * 4, (0.5,) * 4)}
    model = WinT(Shape(**shape | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.2 * parameter.shape[1] ** -0.5)
    return model


def open_small(model: WinT):
    """A module states no preprocessing of its own."""
    return open_vit(model, mean=0.5, std=0.5)


def pictures(n_images=6) -> Images:
    rng = np.random.default_rng(0)
    shown = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(n_images)]
    labels = torch.arange(n_images) % 3
    return Images("pictures", [lambda image=image: image for image in shown], labels, ("a", "b", "c"))


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_an_evaluation_says_what_the_model_itself_says():
    vit, images = open_small(small()), pictures()
    found = evaluate(vit, images, batch_size=4)
    pixels = vit.prepare([images.image(index) for index in range(len(images))])
    assert found.accuracy == int((vit.logits(pixels).argmax(1) == images.labels).sum()) / 6
    areas = [float(hard_mask(layer, GRID).float().mean()) for layer in predict_windows(vit, pixels)]
    assert_allclose(found.area, areas, rtol=1e-5)
    assert found.overlap_teacher == ()
    assert found.images_per_s > 0


def test_the_first_pass_of_a_size_of_batch_is_not_timed():
    model, sizes = small(), []

    def slow_at_first(_, images):
        if len(images[0]) not in sizes:
            sizes.append(len(images[0]))
            time.sleep(0.5)

    vit = open_small(model)
    model.register_forward_pre_hook(slow_at_first)
    assert evaluate(vit, pictures(), batch_size=4).images_per_s > 6 / 0.5
    assert sizes == [4, 2]


def test_each_way_to_attend_is_measured_whatever_was_run_before_and_stays_in_the_evaluation(monkeypatch):
    calls = []
    monkeypatch.setattr(sparse, "attend", lambda *given, attend=sparse.attend: calls.append(1) or attend(*given))
    vit, images = open_small(small().train()), pictures()
    pixels = vit.prepare([images.image(0)])
    plain = vit.logits(pixels)
    evaluate(vit, images, windows="sparse")
    assert len(calls) == 4
    assert torch.equal(vit.logits(pixels), plain)
    assert len(calls) == 4
    assert vit.model.training


def test_labels_are_those_of_the_model_by_name():
    """Another order of the same classes changes nothing, other names of a model are an error, no names are numbers."""
    vit, images = open_vit(small(), mean=0.5, std=0.5, class_names=["a", "b", "c"]), pictures()
    answers = vit.logits(vit.prepare([images.image(index) for index in range(len(images))])).argmax(1)
    new = torch.tensor([2, 0, 1])  # where classes a, b, c are now
    for names, labels in ((("a", "b", "c"), answers), (("b", "c", "a"), new[answers])):
        assert evaluate(vit, Images("other", images.contents, labels, names)).accuracy == 1
    assert evaluate(open_small(small()), Images("other", images.contents, answers, ("x", "y", "z"))).accuracy == 1
    for names in (("a", "b", "d"), ("x", "y", "z")):
        with pytest.raises(DataError, match=r"no classes of .*--class-names"):
            evaluate(vit, Images("other", images.contents, images.labels, names))


def test_a_model_taught_by_itself_agrees_with_itself_more_than_by_chance():
    """Measured windows lie where attention may look, so they overlap with the predicted ones."""
    found = evaluate(open_small(small(start=((0.15,) * 4,))), pictures())
    for own, chance in zip(found.overlap_own, found.overlap_chance, strict=True):
        assert own > 2 * chance


def test_measured_windows_hold_the_windows_that_the_model_has():
    """Windows of 3 x 3, measured with boxes of up to 18 patches: a box that holds all interaction holds the window."""
    vit = open_small(small(windows="fixed", start=((1.0, 1.0, 1.0, 1.0),)))
    pixels = vit.prepare([pictures().image(0)])
    found = {}

    def read(attention):
        wider = predicted[attention.layer] + 1
        found[attention.layer] = measure_sides(attention.weights(), attention.prefix, wider, GRID)

    predicted = predict_windows(vit, pixels)
    vit.tap().read(pixels, Readers(attention=read))
    for layer, own in enumerate(predicted):
        outside = hard_mask(own, GRID) & ~hard_mask(found[layer], GRID)
        assert float(outside.sum(-1).float().mean()) < 0.05


def test_predicting_windows_leaves_the_model_in_its_mode_also_where_it_fails():
    vit = open_small(small().train())
    for module in vit.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.eval()  # frozen, as when the windows alone are trained
    before = footprint(vit.model)
    assert len(predict_windows(vit, vit.prepare([pictures().image(0)]))) == 2
    assert differences(before, footprint(vit.model)) == []
    with pytest.raises(RuntimeError):
        predict_windows(vit, torch.zeros(1, 3, 20, 20))
    assert differences(before, footprint(vit.model)) == []


def test_attention_that_can_lie_nowhere_else_agrees_with_windows_of_the_query_alone():
    """One head, then heads with windows of their own; the class token takes a half."""
    weights = torch.eye(65).repeat(1, 2, 1, 1) / 2
    weights[..., 0] += 0.5
    for n_windows in (1, 2):
        predicted = torch.zeros(1, n_windows, 64, 4)
        assert torch.equal(measure_sides(weights, 1, predicted, GRID), predicted)


def test_open_attention_is_that_of_the_same_weights_without_windows():
    """In the first layer, which sees the same tokens either way: where queries would look, whatever their windows."""
    windowed = open_small(small(3))
    plain = open_small(small(3, windows="none"))
    state = windowed.model.state_dict()
    plain.model.load_state_dict({name: state[name] for name in plain.model.state_dict()})
    pixels = windowed.prepare([pictures().image(index) for index in range(2)])
    predicted = predict_windows(windowed, pixels)[0]
    weights = {}
    plain.tap().read(pixels, Readers(attention=lambda seen: weights.setdefault(seen.layer, seen.weights())))
    measured = measure_sides(weights[0], windowed.anatomy.blocks[0].prefix, predicted, GRID)
    wanted = overlap(hard_mask(predicted, GRID), hard_mask(measured, GRID)).mean(-1)
    collector = WindowCollector(windowed, ("predicted_overlap_open", "predicted_overlap"))
    found = collector.of(pixels)
    assert_allclose(found["predicted_overlap_open"][:, 0], wanted, atol=1e-6)
    assert (found["predicted_overlap"] > found["predicted_overlap_open"]).all()


def test_overlap_in_closed_form():
    one, two = torch.tensor([[True, True, False, False]]), torch.tensor([[True, False, True, False]])
    assert_allclose(overlap(one, two), [1 / 3])
    assert_allclose(overlap(one, one), [1.0])


def test_agreement_with_a_teacher_and_what_is_refused():
    teacher = open_small(small(1, windows="none"))
    found = evaluate(open_small(small()), pictures(), teacher=teacher)
    assert len(found.overlap_teacher) == 2
    assert all(0 < value < 1 for value in found.overlap_teacher)
    assert evaluate(teacher, pictures()).area == ()
    with pytest.raises(UsageError, match="predicts no windows"):
        evaluate(teacher, pictures(), teacher=teacher)
    with pytest.raises(DataError, match="has 3 classes"):
        evaluate(open_small(small(n_classes=5)), pictures())


# --- commands --------------------------------------------------------------------------------------------------------


RECIPE = """
title = "tiny"
expected = "more than chance"
cost = "a second"
[data]
train = "train.npz"
test = "test.npz"
classes = 3
image_px = 16
border_px = 2
[model]
width = 16
depth = 2
heads = 2
[run]
epochs = 1
batch_size = 16
"""


def test_the_commands_train_and_evaluate(tmp_path):
    packed(tmp_path / "train.npz", 48)
    packed(tmp_path / "test.npz", 16, seed=1)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    runner = CliRunner()
    made = runner.invoke(app, ["train", str(tmp_path / "tiny.toml"), "-o", str(tmp_path / "run")])
    assert made.exit_code == 0, made.output
    assert "expected: more than chance" in made.output
    seen = runner.invoke(app, ["evaluate", str(tmp_path / "run" / "best"), str(tmp_path / "test.npz")])
    assert seen.exit_code == 0, seen.output
    assert "16 images, accuracy" in seen.output
    assert "L1" in seen.output


def test_images_that_cannot_be_read_are_left_out_and_named(tmp_path):
    for number in range(3):
        folder = tmp_path / "images" / f"mark {number}"
        folder.mkdir(parents=True)
        Image.new("RGB", (16, 16), (90 * number, 60, 120)).save(folder / "one.png")
    save(small(), tmp_path / "model", class_names=["mark 0", "mark 1", "mark 2"])
    vit, whole = open_vit(tmp_path / "model"), read_images(str(tmp_path / "images"))
    right = evaluate(vit, whole)
    (tmp_path / "images" / "mark 1" / "notes.txt").write_text("nonsense")
    seen = evaluate(vit, read_images(str(tmp_path / "images")), batch_size=2)
    assert (seen.n_images, seen.accuracy, seen.area) == (3, right.accuracy, pytest.approx(right.area))
    assert [each.split(" of ")[0] for each in seen.skipped] == ["mark 1/notes.txt"]
    for file in (tmp_path / "images").glob("*/one.png"):
        file.write_text("nonsense")
    with pytest.raises(NoImages, match="None of the 4 images can be read: mark 0/one"):
        evaluate(vit, read_images(str(tmp_path / "images")))


def test_the_command_evaluates_through_blocks_and_at_another_size(tmp_path):
    """Soft edges are rounded by `hard`; `sparse` says the same of it; a size is one of the options for opening."""
    save(small(edges=0.15), tmp_path / "model", class_names=["mark 0", "mark 1", "mark 2"])
    packed(tmp_path / "test.npz", 40, seed=1)
    images, runner, said = read_images(str(tmp_path / "test.npz")), CliRunner(), {}
    for mode in ("model", "hard", "sparse", "tiles"):
        done = runner.invoke(app, ["evaluate", str(tmp_path / "model"), str(tmp_path / "test.npz"), "--windows", mode])
        assert done.exit_code == 0, done.output
        said[mode] = float(done.output.split("accuracy ")[1].split(",")[0])
    save(small(), tmp_path / "hard", class_names=["mark 0", "mark 1", "mark 2"])
    wanted = evaluate(open_vit(tmp_path / "hard"), images).accuracy
    assert said["hard"] == said["sparse"] == pytest.approx(wanted, abs=1e-4)
    assert said["model"] == pytest.approx(evaluate(open_vit(tmp_path / "model"), images).accuracy, abs=1e-4)
    done = runner.invoke(
        app, ["evaluate", str(tmp_path / "model"), str(tmp_path / "test.npz"), "--image-size", "48", "--limit", "3"]
    )
    assert done.exit_code == 0, done.output


def test_blocks_are_used_where_they_are_asked_for_and_a_vit_without_windows_is_refused(monkeypatch):
    calls = []
    monkeypatch.setattr(sparse, "attend", lambda *given, attend=sparse.attend: calls.append(1) or attend(*given))
    for mode, n_calls in (("model", 0), ("hard", 0), ("sparse", 4), ("tiles", 4)):  # of two layers, once untimed
        calls.clear()
        evaluate(open_small(small()), pictures(), windows=mode)
        assert len(calls) == n_calls
    with pytest.raises(UsageError, match="has none"):
        evaluate(open_small(small(windows="none")), pictures(), windows="hard")
    with pytest.raises(UsageError, match="choose model, hard, sparse, tiles"):
        evaluate(open_small(small()), pictures(), windows="dense")


# --- studies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_token", [True, False])
def test_a_study_of_a_wint_has_heads_and_patches_measured(tmp_path, class_token):
    save(small(class_token=class_token), tmp_path / "model", class_names=["a", "b", "c"])
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(4):
        pictures().image(index).save(folder / f"{index}.png")
    vit = open_vit(tmp_path / "model")
    study = run_study(vit, str(folder), out=tmp_path / "study", measures="heads,patches", batch_size=4)
    declared = [*analyses()["heads"].measures, *analyses()["patches"].measures]
    expected = [each.name for each in declared if "masks" not in each.needs]  # no masks are given
    missing = [name for name in expected if name not in study and not is_of_other_models(name)]
    assert missing == [] or (not class_token and all("cls" in name for name in missing)), missing
    pixels = vit.prepare([pictures().image(index) for index in range(4)])
    strength = study["attention_strength"].to_numpy()
    widest = [float(layer[:, 0].max()) for layer in predict_windows(vit, pixels)]
    for layer, side in enumerate(widest):
        beyond = int(np.floor(side + 0.5)) + 1
        assert_array_equal(strength[:, layer, 0, beyond:], 0)
    assert len(window_heads(vit.model)) == 2


def test_a_study_of_a_wint_holds_its_windows_which_the_report_and_a_look_show(tmp_path):
    save(small(class_token=False), tmp_path / "model", class_names=["a", "b", "c"])
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(4):
        pictures().image(index).save(folder / f"{index}.png")
    vit = open_vit(tmp_path / "model")
    study = run_study(vit, str(folder), out=tmp_path / "study", measures="windows", batch_size=2)
    assert [name for name in analyses()["windows"].measure_names if name not in study] == []
    pixels = vit.prepare([pictures().image(index) for index in range(4)])
    sides = torch.from_numpy(study["predicted_window"].to_numpy()).float()
    for layer, predicted in enumerate(predict_windows(vit, pixels)):
        assert torch.equal(hard_mask(sides[:, layer], GRID), hard_mask(predicted, GRID))
    row, column = torch.arange(64) // 8, torch.arange(64) % 8
    assert bool((sides <= torch.stack([column, row, 7 - column, 7 - row], -1)).all())  # cut at the border
    found = evaluate(vit, pictures(4))
    assert_allclose(study["predicted_area"].mean(("image", "head")), found.area, rtol=1e-5)
    assert_allclose(study["predicted_overlap_open"].mean(("image", "head")), found.overlap_open, rtol=1e-5)
    page = write_report(tmp_path / "study").read_text()
    assert f"A patch may see {100 * np.mean(found.area):.0f} % of the image on average" in page
    looked = look(vit, pictures().image(0), measures="windows")
    drawn = {path.stem for path in draw_figures(looked, tmp_path / "look", one_image=True)}
    assert drawn == {"predicted_windows", "predicted_windows_summed"}
    assert any("Between images the sides of one patch's window" in each for each in findings_of(study))
    alone = next(each for each in findings_of(looked) if "(standard deviation)" in each)
    assert alone.startswith("Between inner patches the sides of windows differ by ")


def test_a_plain_vit_has_no_windows_and_says_so():
    vit = open_small(small(windows="none"))
    assert set(unavailable(vit, analyses()["windows"].measure_names).values()) == {
        "the model has no windows of its own (a WinT has)"
    }
    assert make_collectors(vit, analyses()["windows"].measure_names) == []
