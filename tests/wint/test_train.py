"""Training: it learns, goes on to the bit after a kill, gives one curve on one process or two, refuses bad recipes."""

import copy
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from filelock import FileLock
from numpy.testing import assert_allclose
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from vitrail import open_vit
from vitrail.errors import (
    BadImage,
    DamagedStudy,
    DataError,
    PlanMismatch,
    StudyError,
    TrainingDiverged,
    Unsupported,
    UsageError,
)
from vitrail.models.preprocessing import Preprocessing
from vitrail.tap.tap import Readers
from vitrail.wint import checkpoint
from vitrail.wint import train as train_module
from vitrail.wint.batches import Batches, Images, read_images
from vitrail.wint.building import build_model, build_optimiser, grid_of, temperature_at
from vitrail.wint.folder import save
from vitrail.wint.model import Shape, WinT, hard_mask, record_sides, window_heads
from vitrail.wint.objectives import TrainingBatch, WindowArea, WindowDistillation
from vitrail.wint.recipe import read_recipe, recipe_from
from vitrail.wint.teacher import Teacher, build_teacher, window_l1
from vitrail.wint.train import train
from wint.tiny_runs import described, packed, recipe

TESTS = Path(__file__).resolve().parents[1]
FOLLOWED = {"checkpoint_steps": 1}
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src")]),
}  # fmt: skip


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoint.safetensors")


def same(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def rows(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def text_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_in_forks(data: Path, *runs: tuple[str, Path, dict[str, dict[str, object]]]) -> None:
    """Tiny runs, each in a process of its own: "whole", "killed" or "two" (processes), their folder and recipe."""
    listed = json.dumps([(kind, str(out), changes) for kind, out, changes in runs])
    command = [sys.executable, "-m", "wint.forked_runs", str(data), listed]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run and its data's folder."""
    folder = tmp_path_factory.mktemp("data")
    train(recipe(folder, run=FOLLOWED), folder / "whole")
    return folder


# --- a run -----------------------------------------------------------------------------------------------------------


def test_it_learns_what_a_mark_means(tmp_path):
    results = train(recipe(tmp_path, data={"augmentation": "none"}, run={"epochs": 25, "ema": 0.0}), tmp_path / "run")
    assert results.accuracy > 0.8
    losses = [row["loss"] for row in rows(tmp_path / "run" / "steps.csv")]
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_leaves_models_that_open_and_tables(whole):
    out = whole / "whole"
    vit = open_vit(out / "best")
    assert vit.class_names == ("mark 0", "mark 1", "mark 2")
    assert vit.anatomy.grid == (4, 4)
    epochs = rows(out / "epochs.csv")
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    assert all(0 <= row["accuracy"] <= 1 and 0 < row["area"] <= 1 for row in epochs)
    temperatures = [row["temperature"] for row in rows(out / "steps.csv")]
    assert temperatures == sorted(temperatures, reverse=True)
    assert temperatures[-1] == pytest.approx(0.15)
    averaged = {name: tensor for name, tensor in weights(out).items() if name.startswith("average/")}
    assert torch.equal(open_vit(out / "last").model.head.weight, averaged["average/head.weight"])


def test_two_runs_in_one_folder_are_refused_and_what_a_killed_one_was_writing_goes(whole, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "recipe.json").write_bytes((whole / "whole" / "recipe.json").read_bytes())
    half_written = out / ".checkpoint.safetensors.4194305"
    half_written.write_bytes(b"half")
    with FileLock(out / ".lock"), pytest.raises(StudyError, match="Another process is training"):
        train(recipe(whole, run=FOLLOWED), out)
    assert half_written.exists()
    train(recipe(whole, run=FOLLOWED), out)
    assert not half_written.exists()
    same(whole / "whole", out)


def test_killed_at_any_time_and_started_again_it_ends_in_the_same_weights(whole, tmp_path):
    """kill -9 as soon as a checkpoint of some step is there; two kills, then to the end."""
    run_in_forks(whole, *((kind, tmp_path / "killed", {"run": FOLLOWED}) for kind in ("killed", "killed", "whole")))
    same(whole / "whole", tmp_path / "killed")
    assert torch.equal(
        open_vit(whole / "whole" / "best").model.head.weight, open_vit(tmp_path / "killed" / "best").model.head.weight
    )
    for column in ("loss", "cross_entropy", "lr", "temperature"):
        ours = [row[column] for row in rows(tmp_path / "killed" / "steps.csv")]
        assert ours == [row[column] for row in rows(whole / "whole" / "steps.csv")]


def test_interrupted_before_a_checkpoint_is_in_place_the_last_one_holds(whole, tmp_path, monkeypatch):
    """Every way of stopping within the writing of a checkpoint leaves a folder that goes on to the same weights."""
    out, replaced, calls = tmp_path / "run", Path.replace, 0

    def stop(self, target):
        nonlocal calls
        calls += 1
        if calls == 23:
            raise KeyboardInterrupt
        return replaced(self, target)

    wanted = recipe(whole, run=FOLLOWED)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            train(wanted, out)
    assert [path.name for path in out.rglob(".*")] in (
        [],
        [".lock"],
    )  # the lock of the folder stays, nothing half-written does
    train(recipe(whole, run=FOLLOWED), out)
    same(whole / "whole", out)


def test_interrupted_it_keeps_its_step_and_says_where_it_goes_on(whole, tmp_path):
    def interrupt(what, done, total, word):
        if what == "training" and done == 4:
            os.kill(os.getpid(), signal.SIGINT)

    wanted, before = recipe(whole, run=FOLLOWED), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(wanted, tmp_path / "run", progress=interrupt)
    assert stopped.value.__notes__ == ["The same command goes on at step 4 of 18."]
    assert signal.getsignal(signal.SIGINT) == before
    train(wanted, tmp_path / "run")
    same(whole / "whole", tmp_path / "run")


def test_the_rate_decays_by_layer_in_a_wint_as_in_a_vit_of_timm(tmp_path):
    wanted = recipe_from(described(tmp_path, optimiser={"layer_decay": 0.5}, windows={"lr_scale": 3.0}))
    wint = WinT(Shape(width=16, depth=2, heads=2, image_px=(16, 16)))
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=16, depth=2, num_heads=2, img_size=16, patch_size=4)
    scales = []
    for model in (wint, vit):
        scale_of = {
            id(parameter): group["lr_scale"]
            for group in build_optimiser(wanted, model).param_groups for parameter in group["params"]
        }  # fmt: skip
        scales.append({name: scale_of[id(parameter)] for name, parameter in model.named_parameters()})
    ours, theirs = scales
    assert len(set(theirs.values())) > 3
    for name in ("cls_token", "blocks.0.attn.qkv.weight", "blocks.1.norm2.bias", "norm.weight", "head.weight"):
        assert ours[name] == theirs[name], name
    assert ours["positions"] == ours["patch_embed.weight"] == theirs["pos_embed"]
    assert ours["blocks.1.attn.windows.sides.weight"] == 3 * theirs["blocks.1.attn.qkv.weight"]


class Stop(Exception):
    """Ends a run as a killed one ends: nothing is written any more."""


def stop_at(step: int):
    def report(what, done, total, word):
        if what == "training" and done == step:
            raise Stop

    return report


@pytest.mark.parametrize("name", ["lamb", "adan", "adabelief", "adafactorbv", "nadamlegacy", "laprop", "muon"])
def test_an_optimiser_goes_on_as_it_was(tmp_path, name):
    """Steps kept in groups, as tensors or whole numbers; numbers and tensors of half precision in the state."""
    torch.manual_seed(0)
    model = WinT(Shape(width=16, depth=1, heads=2, image_px=(16, 16), n_classes=3))
    wanted = recipe_from(described(tmp_path, optimiser={"name": name}))
    begun, other = copy.deepcopy(model), copy.deepcopy(model)
    optimiser = build_optimiser(wanted, begun)
    take_steps(begun, optimiser, range(3))
    checkpoint.save(tmp_path / "checkpoint", begun, None, optimiser, {"step": 3})
    resumed = build_optimiser(wanted, other)
    assert checkpoint.load(tmp_path / "checkpoint", other, None, resumed) == {"step": 3}
    for module, each in ((begun, optimiser), (other, resumed)):
        take_steps(module, each, range(3, 6))
    for one, two in zip(begun.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def take_steps(model: nn.Module, optimiser: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.randn((4, 3, 16, 16), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(images), torch.arange(4) % 3).backward()
        optimiser.step()
        optimiser.zero_grad()


def test_a_run_goes_on_with_the_steps_of_its_groups(whole, tmp_path):
    wanted = recipe(whole, optimiser={"name": "lamb"}, run=FOLLOWED)
    train(wanted, tmp_path / "whole")
    with pytest.raises(Stop):
        train(wanted, tmp_path / "stopped", progress=stop_at(9))
    train(wanted, tmp_path / "stopped")
    same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adamx", "name = 'adamx' cannot be run here.*Did you mean adam"),
        ("adahessian", "cannot be run here"),
        ("kron", "a checkpoint cannot hold"),
        ("lookahead_adamw", "a checkpoint cannot hold"),
    ],
)
def test_an_optimiser_that_could_not_go_on_is_refused_at_the_start(tmp_path, name, said):
    with pytest.raises(UsageError, match=said):
        build_optimiser(recipe_from(described(tmp_path, optimiser={"name": name})), nn.Linear(3, 3))


def test_the_scale_of_half_precision_goes_on(whole, tmp_path, monkeypatch):
    """Accelerate scales losses on GPUs only; here a run in float32 gets such a scaler, whose growth counts steps."""

    class Scaling(train_module.Accelerator):
        def __init__(self, **options):
            super().__init__(**options)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=7)

    monkeypatch.setattr(train_module, "Accelerator", Scaling)
    wanted, scales = recipe(whole, run=FOLLOWED), {}
    train(wanted, tmp_path / "whole")
    with pytest.raises(Stop):
        train(wanted, tmp_path / "stopped", progress=stop_at(9))
    train(wanted, tmp_path / "stopped")
    for name in ("whole", "stopped"):
        with safe_open(tmp_path / name / "checkpoint.safetensors", "pt") as file:
            scales[name] = json.loads(file.metadata()["progress"])["scaler"]
    assert scales["whole"] == scales["stopped"]
    assert scales["whole"]["scale"] == 1024.0
    same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_it_learns_the_same_and_ends_in_the_same_weights_after_a_kill(whole, tmp_path):
    """In processes of their own, for operations cannot be fused while the tests check shapes."""
    changes = {"model": {"drop_path_rate": 0.0, "depth": 1}, "run": {**FOLLOWED, "compile": True}}
    train(recipe(whole, model=changes["model"], run=FOLLOWED), tmp_path / "plain")
    kinds = {"fused": ("whole",), "killed": ("killed", "whole")}
    run_in_forks(whole, *((kind, tmp_path / name, changes) for name in kinds for kind in kinds[name]))
    assert_allclose(*([row["loss"] for row in rows(tmp_path / run / "steps.csv")] for run in ("fused", "plain")), 1e-4)
    same(tmp_path / "fused", tmp_path / "killed")


COMPILED_GRADIENTS = """
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from vitrail.wint.model import Shape, WinT

torch.manual_seed(0)
model = WinT(Shape(width=128, depth=1, heads=4, mlp_ratio=3.0, class_token=False, windows="none"))
images, gradients = torch.randn(64, 3, 32, 32), []
for compiled in (False, True):
    model.zero_grad()
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16, enabled=compiled):
        logits = (torch.compile(model) if compiled else model)(images)
    logits.float().pow(2).mean().backward()
    gradients.append(torch.cat([each.grad.flatten() for each in model.parameters()]))
print(float((gradients[1] - gradients[0]).norm() / gradients[0].norm()))
"""


def test_compiled_in_bfloat16_gradients_are_finite_and_those_of_float32():
    """Compiled by PyTorch 2.14, a stem whose tokens are a transposed view had NaN in all gradients. In a process of its
    own, without the tests' type checks, which are not compiled."""
    command = [sys.executable, "-c", COMPILED_GRADIENTS]
    printed = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True).stdout
    assert float(printed) < 0.05


@pytest.mark.parametrize("log_steps", [1, 1000])
def test_weights_that_give_no_numbers_stop_a_run_and_are_not_saved(tmp_path, log_steps):
    diverging = recipe(tmp_path, optimiser={"lr": 1e30}, run={"log_steps": log_steps, "checkpoint_steps": 1000})
    with pytest.raises(TrainingDiverged, match=r"gives no numbers any more at step \d+ of \d+.*lower lr"):
        train(diverging, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()
    assert not (tmp_path / "run" / "best").exists()


def test_two_processes_give_the_curve_of_one(whole, tmp_path):
    """The same batches, mixing included, shared by two: losses and weights agree to rounding."""
    changes = {"run": {"mixup": 0.2, "ema": 0.0, "epochs": 2}, "model": {"drop_path_rate": 0.0}}
    train(recipe(whole, **changes), tmp_path / "one")
    run_in_forks(whole, ("two", tmp_path / "two", changes))
    one, two = rows(tmp_path / "one" / "steps.csv"), rows(tmp_path / "two" / "steps.csv")
    assert_allclose([row["loss"] for row in two], [row["loss"] for row in one], rtol=1e-4)
    assert_allclose(
        rows(tmp_path / "two" / "epochs.csv")[-1]["accuracy"], rows(tmp_path / "one" / "epochs.csv")[-1]["accuracy"]
    )


def test_gradients_gathered_in_pieces_are_those_of_the_whole_batch(whole, tmp_path):
    plain = {"model": {"drop_path_rate": 0.0}}
    train(recipe(whole, **plain, run={"epochs": 1}), tmp_path / "whole")
    train(recipe(whole, **plain, run={"epochs": 1, "accumulate": 4}), tmp_path / "pieces")
    losses = [[row["loss"] for row in rows(tmp_path / name / "steps.csv")] for name in ("whole", "pieces")]
    assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_metrics_go_to_tensorboard_too(whole, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra [train] is not installed")
    train(recipe(whole, run={"epochs": 1, "tensorboard": True}), tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_another_recipe_or_a_broken_checkpoint_is_refused(whole, tmp_path):
    with pytest.raises(PlanMismatch, match=r"optimiser\.lr was 0\.003, is 0\.1"):
        train(recipe(whole, run=FOLLOWED, optimiser={"lr": 0.1}), whole / "whole")
    changes = {"run": {"epochs": 1}}
    train(recipe(whole, **changes), tmp_path / "run")
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(DamagedStudy, match="no checkpoint"):
        train(recipe(whole, **changes), tmp_path / "run")


def test_a_folder_belongs_to_a_recipe_when_a_step_was_taken(whole, tmp_path):
    """What was refused before is corrected in the same folder."""
    with pytest.raises(DataError, match="classes = 4"):
        train(recipe(whole, data={"classes": 4}), tmp_path / "run")
    (tmp_path / "run" / "recipe.json").unlink()  # as one that is killed between the lock and its recipe leaves it
    with pytest.raises(UsageError, match="could not be made"):
        train(recipe(whole, model=of_timm(timm="resnet18", timm_args={}), run={"epochs": 1}), tmp_path / "run")
    corrected = recipe(whole, run={"epochs": 0.2, "log_steps": 1})
    train(corrected, tmp_path / "run")
    assert recipe_from(json.loads((tmp_path / "run" / "recipe.json").read_text())) == corrected
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    with pytest.raises(PlanMismatch, match=r"run\.epochs was 0\.2, is 1"):
        train(recipe(whole, run={"epochs": 1, "log_steps": 1}), tmp_path / "run")


# --- the teacher -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def control(whole):
    """A trained plain ViT to teach."""
    train(recipe(whole, model={"windows": "none"}, run={"epochs": 1}), whole / "control")
    return whole / "control" / "last"


@pytest.mark.parametrize("start", [[[0.4] * 4], [[0.4] * 4] * 2], ids=["one for all heads", "one a head"])
def test_a_teacher_draws_windows_towards_its_own(whole, control, tmp_path, start):
    apart = {}
    for weight in (0.0, 5.0):
        changes = {
            "distillation": {"teacher": str(control), "weight": weight, "area": 25}, "model": {"start": start},
            "run": {"epochs": 4, "ema": 0.0}, "windows": {"lr_scale": 20.0},
        }  # fmt: skip
        wanted = recipe(whole, **changes)
        train(wanted, tmp_path / str(weight))
        student = open_vit(tmp_path / str(weight) / "last").model
        teacher = Teacher(open_vit(control), 25, 2, len(start), (4, 4))
        images = Batches(wanted, read_images(wanted.data.test), read_images(wanted.data.test).pixels(16))[0][0]
        with record_sides(student) as sides, torch.no_grad():
            student(images)
        apart[weight] = float(window_l1(sides, teacher.sides(images), (4, 4)))
    assert apart[5.0] < 0.9 * apart[0.0]


def test_tables_have_means_of_the_steps_that_computed_a_loss_and_the_rate_of_the_model(whole, control, tmp_path):
    """The teacher's time ends within a row; later rows are empty, not zeros."""
    tables = {}
    for log_steps in (1, 4):
        changes = {
            "distillation": {"teacher": str(control), "until": 0.5}, "model": {"start": [[0.3] * 4] * 2},
            "windows": {"lr_scale": 3.0}, "run": {"log_steps": log_steps, "checkpoint_steps": 9},
        }  # fmt: skip
        wanted, out = recipe(whole, **changes), tmp_path / str(log_steps)
        with pytest.raises(Stop):
            train(wanted, out, progress=stop_at(9))
        train(wanted, out)
        tables[log_steps] = text_rows(out / "steps.csv")
    by_step = [float(row["window_l1"]) for row in tables[1][:9]]
    assert {row["window_l1"] for row in tables[1][9:]} == {""}
    means = [np.mean(by_step[first : first + 4]) for first in (0, 4, 8)]
    assert_allclose([float(row["window_l1"]) for row in tables[4][:3]], means)
    assert [row["window_l1"] for row in tables[4][3:]] == ["", ""]
    assert_allclose(float(tables[1][9]["lr"]), 1e-5 + (3e-3 - 1e-5) / 2)  # half of the cosine


@pytest.mark.parametrize(("edges", "kept"), [("soft", 0.3), ("hard", 0.0)])
def test_edges_are_exported_as_they_were_asked_for(whole, tmp_path, edges, kept):
    """Soft edges keep their last temperature in the exported model; hard ones are those of the last steps."""
    train(
        recipe(whole, windows={"final_temperature": 0.3, "edges": edges, "hard_from": 0.5}, run={"epochs": 1}),
        tmp_path / "run",
    )
    vit = open_vit(tmp_path / "run" / "last")
    assert [head.edges for head in window_heads(vit.model)] == [kept, kept]
    images = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    masks = []
    vit.tap().read(images, Readers(attention=lambda seen: masks.append(seen.mask)))
    assert all(bool(mask.isfinite().all()) is (edges == "soft") for mask in masks)


def test_the_teachers_windows_hold_their_query_and_no_more_than_their_area(whole, control):
    teacher = Teacher(open_vit(control), 25, 2, 2, (4, 4))
    sides = teacher.sides(torch.randn(3, 3, 16, 16))
    assert [tuple(layer.shape) for layer in sides] == [(3, 2, 16, 4)] * 2
    assert min(float(layer.min()) for layer in sides) == 0
    smallest = min(float(hard_mask(layer, (4, 4)).sum(-1).min()) for layer in sides)
    assert smallest >= 1
    shared = Teacher(open_vit(control), 25, 2, 2, (4, 4), shared_budget=True)
    boxes = [hard_mask(layer, (4, 4)).sum(-1).float() for layer in shared.sides(torch.randn(3, 3, 16, 16))]
    assert len({float(each.mean()) for layer in boxes for each in layer.unbind(1)}) > 1  # heads differ
    with pytest.raises(UsageError, match="share a budget between heads"):
        Teacher(open_vit(control), 25, 2, 1, (4, 4), shared_budget=True)
    with pytest.raises(UsageError, match="2 layers of"):
        Teacher(open_vit(control), 25, 3, 2, (4, 4))


def test_a_teacher_in_the_precision_of_training_has_nearly_the_same_windows(whole, control):
    images = torch.randn(8, 3, 16, 16)
    exact, rounded = (
        Teacher(open_vit(control, precision=precision), 25, 2, 2, (4, 4)).sides(images)
        for precision in ("float32", "bfloat16")
    )
    assert all(layer.dtype == torch.float32 for layer in rounded)
    same = torch.stack([(ours == theirs).all(-1).float().mean() for ours, theirs in zip(rounded, exact, strict=True)])
    assert float(same.min()) > 0.8
    for budget, precision in ((False, "bfloat16"), (True, "float32")):
        settings = {"teacher": str(control), "shared_budget": budget}
        wanted = recipe(whole, distillation=settings, run={"precision": "bf16"}, model={"start": [[0.5] * 4] * 2})
        teacher = build_teacher(wanted, build_model(wanted), (4, 4), "cpu")
        assert teacher._vit.precision == precision
        assert all(bool(layer.isfinite().all()) for layer in teacher.sides(images))


def test_a_teacher_is_shown_images_as_it_was_trained(whole, control):
    images = torch.rand(2, 3, 16, 16)
    plain = Teacher(open_vit(control), 25, 2, 1, (4, 4)).sides((images - 0.5) / 0.5)
    view = Preprocessing((16, 16), (0.3, 0.4, 0.5), (0.2, 0.3, 0.4))
    other = Teacher(open_vit(control), 25, 2, 1, (4, 4), view)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.3, 0.4, 0.5), (0.2, 0.3, 0.4)))
    for one, two in zip(plain, other.sides((images - mean) / std), strict=True):
        assert_allclose(one, two)


def test_a_teacher_of_another_image_size_is_refused(whole, tmp_path):
    """It has as many patches, of twice the size."""
    save(WinT(Shape(width=16, depth=2, heads=2, patch_px=8, image_px=(32, 32), windows="none")), tmp_path / "teacher")
    wanted = recipe(whole, distillation={"teacher": str(tmp_path / "teacher")}, model={"start": [[0.3] * 4] * 2})
    with pytest.raises(UsageError, match=r"takes images of 32 x 32 px.* 16 x 16.*patches of 4 x 4 px"):
        train(wanted, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_px": 8}, r"2 layers of \[2\] heads on a grid \(2, 2\).*2 layers of 2 windows on \(4, 4\)"),
        ({"heads": 4}, r"2 layers of \[4\] heads on a grid \(4, 4\).*2 layers of 2 windows on \(4, 4\)"),
    ],
    ids=["grid", "heads"],
)
def test_a_teacher_of_another_grid_or_number_of_heads_is_refused_before_anything_is_written(
    whole, tmp_path, changes, words
):
    shape = {"width": 16, "depth": 2, "heads": 2, "patch_px": 4, "image_px": (16, 16), "windows": "none"} | changes
    save(WinT(Shape(**shape)), tmp_path / "teacher")
    start = [[0.3] * 4] * 2
    wanted = recipe(whole, distillation={"teacher": str(tmp_path / "teacher")}, model={"start": start})
    with pytest.raises(UsageError, match=words):
        train(wanted, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("teacher", "is_path"),
    [("openclip:ViT-B-32/x", False), ("hf:x/y", False), ("timm:deit", False), ("tv:vit_b_16", False),
     ("vitrail:photos", False), ("runs/vit", True), ("model.py:make", True)],
)  # fmt: skip
def test_a_teachers_path_counts_from_the_recipe(tmp_path, teacher, is_path):
    read = recipe_from(described(tmp_path, distillation={"teacher": teacher}), Path("/recipes")).distillation.teacher
    assert read == (f"/recipes/{teacher}" if is_path else teacher)


def test_the_weight_of_distillation_grows_and_ends(whole, control):
    settings = recipe_from(
        described(Path(), distillation={"teacher": "somewhere", "weight": 2.0, "warmup_share": 0.2, "until": 0.6})
    ).distillation
    objective = WindowDistillation(Teacher(open_vit(control), 25, 2, 2, (4, 4)), settings, (4, 4))
    assert [objective.weight(progress) for progress in (0.0, 0.1, 0.2, 0.5, 0.6)] == [0.0, 1.0, 2.0, 2.0, 0.0]


def test_the_area_objective_in_closed_form_and_in_training(whole, tmp_path):
    """Sides 3, 1, 0, 1 on a 4 x 4 grid: 4 x 3 of 16 patches. A weight of it makes windows smaller."""
    sides = torch.tensor([3.0, 1.0, 0.0, 1.0]).expand(2, 1, 16, 4)
    batch = TrainingBatch(torch.zeros(2, 3, 16, 16), torch.zeros(2), torch.zeros(2, 3), (sides, sides))
    assert_allclose(WindowArea(1.0, (4, 4)).loss(batch), 12 / 16)
    areas = [
        sum(train(recipe(whole, windows={"area_weight": weight, "lr_scale": 20.0}), tmp_path / str(weight)).areas)
        for weight in (0.0, 5.0)
    ]
    assert areas[1] < 0.8 * areas[0]
    row = rows(tmp_path / "5.0" / "steps.csv")[0]
    assert_allclose(row["loss"], row["cross_entropy"] + 5 * row["window_area"], rtol=1e-5)
    assert list(row)[:4] == ["step", "loss", "cross_entropy", "window_area"]


def test_window_l1_in_closed_form():
    one, two = torch.zeros(1, 1, 12, 4), torch.zeros(1, 1, 12, 4)
    two[..., 0], two[..., 1] = 3.0, 1.0  # left by 3 of 3 columns, top by 1 of 2 rows on a 3 x 4 grid
    assert_allclose(window_l1([one], [two], (3, 4)), (1 + 0.5) / 4)


def test_a_hugging_face_dataset_trains_as_the_same_images_in_a_packed_file_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets", reason="the extra `data` (Hugging Face datasets) is not installed")
    features = datasets.Features({
        "image": datasets.Image(), "label": datasets.ClassLabel(names=["mark 2", "mark 0", "mark 1"])
    })  # fmt: skip
    packs, sets = {}, {}
    for name, n_images in (("train", 32), ("test", 16)):
        packs[name] = str(packed(tmp_path / f"{name}.npz", n_images))
        images = read_images(packs[name])
        rows = {
            "image": [{"bytes": content(), "path": None} for content in images.contents],
            "label": [features["label"].str2int(images.class_names[label]) for label in images.labels.tolist()],
        }
        sets[name] = str(tmp_path / f"{name}-rows")
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(sets[name])
    for name, data in (("packed", packs), ("rows", sets)):
        train(recipe(tmp_path, data=data, run={**FOLLOWED, "epochs": 1}), tmp_path / name)
    same(tmp_path / "packed", tmp_path / "rows")
    assert open_vit(tmp_path / "rows" / "last").class_names == ("mark 0", "mark 1", "mark 2")


# --- batches ---------------------------------------------------------------------------------------------------------


def test_processes_share_a_batch_and_keep_partners_together(whole):
    wanted = recipe(whole, run={"mixup": 0.5})
    images = read_images(wanted.data.train)
    pixels = images.pixels(16)
    one = Batches(wanted, images, pixels)
    parts = [Batches(wanted, images, pixels, rank, 4) for rank in range(4)]
    assert sorted(torch.cat([part.mine for part in parts]).tolist()) == list(range(16))
    for part in parts:
        assert part.mine.flip(0).tolist() == [15 - place for place in part.mine.tolist()]
        whole_images, whole_labels = one[3]
        own_images, own_labels = part[3]
        assert_allclose(own_images, whole_images[part.mine], rtol=1e-6)
        assert_allclose(own_labels, whole_labels[part.mine], rtol=1e-6)


@pytest.mark.parametrize(("size", "world", "accumulate"), [(6, 2, 1), (75, 3, 1), (60, 4, 5), (16, 1, 2), (15, 1, 1)])
def test_processes_have_equal_parts_of_a_batch_and_of_its_pieces(whole, size, world, accumulate):
    wanted = recipe(whole, run={"batch_size": size, "accumulate": accumulate})
    images = read_images(wanted.data.train)
    parts = [Batches(wanted, images, images.pixels(16), rank, world).mine for rank in range(world)]
    assert sorted(torch.cat(parts).tolist()) == list(range(size))
    pieces = [[len(piece) for piece in part.chunk(accumulate)] for part in parts]
    assert pieces == [[size // world // accumulate] * accumulate] * world


def test_every_image_is_seen_once_an_epoch_and_in_another_order_the_next(whole):
    wanted = recipe(whole, data={"augmentation": "none"})
    images = read_images(wanted.data.train)
    batches = Batches(wanted, images, images.pixels(16))
    seen = [torch.cat([batches._batch_indices(step) for step in range(first, first + 6)]).tolist() for first in (0, 6)]
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(96))
    assert seen[0] != seen[1]


def test_crops_are_parts_of_the_image_with_its_border_reflected(whole):
    wanted = recipe(whole)
    images = read_images(wanted.data.train)
    pixels = images.pixels(16)
    batches = Batches(wanted, images, pixels)
    wide = nn.functional.pad(pixels.float(), (2, 2, 2, 2), mode="reflect")
    batch, _ = batches[0]
    for shown, index in zip(batch, batches._batch_indices(0).tolist(), strict=True):
        original = (shown * 127.5 + 127.5).round()
        candidates = [wide[index, :, top : top + 16, left : left + 16] for top in range(5) for left in range(5)]
        assert any(torch.equal(original, each) or torch.equal(original.flip(2), each) for each in candidates)


def test_timms_augmentation_is_a_function_of_the_step_whatever_is_drawn_between(whole):
    options = {"auto_augment": "rand-m6-mstd0.5-inc1", "re_prob": 0.5}
    wanted = recipe(whole, data={"augmentation": "timm", "timm": options})
    images = read_images(wanted.data.train)
    first = Batches(wanted, images, None)[2]
    torch.rand(7)
    np.random.rand(3)
    kept = torch.get_rng_state()
    second = Batches(wanted, images, None)[2]
    assert torch.equal(first[0], second[0])
    assert torch.equal(torch.get_rng_state(), kept)
    assert not torch.equal(first[0], Batches(wanted, images, None)[3][0])


def test_workers_prepare_the_same_batches(whole):
    wanted, parallel = recipe(whole), recipe(whole, data={"workers": 2})
    images = read_images(wanted.data.train)
    pixels = images.pixels(16)
    plain, prepared = (list(Batches(each, images, pixels).from_step(15)) for each in (wanted, parallel))
    assert len(plain) == 3
    for one, two in zip(plain, prepared, strict=True):
        assert torch.equal(one[0], two[0])


def test_class_folders_are_read(tmp_path):
    for label, grey in (("cat", 30), ("dog", 200)):
        (tmp_path / label).mkdir()
        Image.new("RGB", (20, 12), (grey, grey, grey)).save(tmp_path / label / "one.png")
    images = read_images(str(tmp_path))
    assert images.class_names == ("cat", "dog")
    assert images.labels.tolist() == [0, 1]
    assert images.pixels(8).float().mean((1, 2, 3)).tolist() == [30, 200]
    (tmp_path / "README.md").write_text("Two classes.")
    assert read_images(str(tmp_path)).class_names == ("cat", "dog")
    (tmp_path / "dog" / "two.png").write_text("nonsense")
    with pytest.raises(BadImage, match=r"^dog/two\.png of .*not an image"):
        read_images(str(tmp_path)).pixels(8)


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimiser": {"learning_rate": 1.0}}, r"no key 'learning_rate'.*Valid keys: name, lr"),
        ({"run": {"epoch": 1}}, r"Did you mean 'epochs'"),
        ({"runs": {}}, r"no key 'runs'. Did you mean 'run'\?"),
        ({"run": {"epochs": "many"}}, "must be a float"),
        ({"run": {"batch_size": 16, "accumulate": 3}}, "one divides the other"),
        ({"data": {"augmentation": "lots"}}, "choose crop_flip, timm or none"),
        ({"model": {"start": [[1, "a"]]}}, "must be a float"),
        ({"windows": {"edges": "round"}}, "choose hard or soft"),
        ({"windows": {"hard_from": 1.5}}, "hard_from = 1.5; give a share"),
        ({"run": {"evaluate_epochs": 0}}, "evaluate_epochs = 0; give 1 or more"),
        ({"run": {"log_steps": 0}}, "log_steps = 0; give 1 or more"),
        ({"run": {"seed": -1}}, "seed = -1; give 0 or more"),
        ({"run": {"label_smoothing": 1.5}}, "label_smoothing = 1.5; give a share"),
        ({"run": {"ema": 1.5}}, "ema = 1.5; give a share below 1"),
        ({"run": {"epochs": float("inf")}}, "epochs = inf"),
        ({"data": {"workers": -1}}, "workers = -1; give 0 or more"),
        ({"data": {"border_px": 16}}, "border_px = 16; give 0 or more, less than image_px = 16"),
        ({"optimiser": {"lr": -1.0}}, r"lr = -1\.0; give 0 or more"),
        ({"distillation": {"teacher": "x"}, "model": {"windows": "none"}}, 'needs .model. windows = "predicted"'),
    ],
)
def test_recipes_that_cannot_be_run_say_what_can(tmp_path, changes, said):
    with pytest.raises(UsageError, match=said):
        recipe_from(described(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"augmentation": "timm", "timm": {"auto_augment": "rnd"}}}, "auto_augment.*create_transform"),
        ({"data": {"augmentation": "timm", "timm": {"colour": 1}}}, "colour.*create_transform"),
    ],
)
def test_what_libraries_do_not_take_is_said_before_a_step(whole, tmp_path, changes, said):
    with pytest.raises(UsageError, match=said):
        train(recipe(whole, **changes), tmp_path / "run")


def test_a_missing_table_and_a_broken_file_are_named(tmp_path):
    with pytest.raises(UsageError, match="lacks expected, cost, data"):
        recipe_from({"title": "x"})
    (tmp_path / "broken.toml").write_text("title = ")
    with pytest.raises(UsageError, match=r"broken\.toml is not TOML"):
        read_recipe(tmp_path / "broken.toml")


def test_a_wrong_class_count_is_an_error_that_names_the_classes(whole, tmp_path):
    with pytest.raises(DataError, match=r"classes = 10, and .*train\.npz has 3 \(mark 0"):
        train(recipe(whole, data={"classes": 10}), tmp_path)


def test_packs_that_are_damaged_are_refused(tmp_path):
    path = packed(tmp_path / "pack.npz", 4)
    with np.load(path) as pack:
        arrays = dict(pack)
    np.savez(path, **{**arrays, "offset": arrays["offset"][:-1]})
    with pytest.raises(DataError, match="damaged"):
        read_images(str(path))
    np.savez(path, **arrays)
    for content in (b"nothing", b"", path.read_bytes()[: path.stat().st_size // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as packed images"):
            read_images(str(path))
    np.savez(path, **{**arrays, "offset": arrays["offset"][:1], "label": arrays["label"][:0]})
    with pytest.raises(DataError, match="holds no images"):
        read_images(str(path))


def test_training_can_begin_with_a_saved_vit_and_other_classes(whole, control, tmp_path):
    packed(tmp_path / "train.npz", 48, n_classes=2)
    packed(tmp_path / "test.npz", 16, n_classes=2, seed=1)
    wanted = recipe(tmp_path, data={"classes": 2}, model={"start_from": str(control), "start": [[0.98] * 4]})
    torch.manual_seed(0)
    module = build_model(wanted)
    before = open_vit(control).model.state_dict()
    assert torch.equal(module.state_dict()["blocks.1.mlp.0.weight"], before["blocks.1.mlp.0.weight"])
    assert module.state_dict()["head.weight"].shape == (2, 16)
    train(wanted, tmp_path / "run")


TIMM_ARGS = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def of_timm(**changes: object) -> dict[str, object]:
    return {"timm": "vit_tiny_patch16_224", "timm_args": TIMM_ARGS, "start": [[0.982] * 4], **changes}


@pytest.mark.parametrize(("windows", "n_heads"), [("predicted", 2), ("none", 0)])
def test_a_timm_model_trains_with_and_without_window_heads_and_opens_again(whole, tmp_path, windows, n_heads):
    """Arguments that count in training alone are not in the folder, from which timm makes the model."""
    args = {**TIMM_ARGS, "drop_rate": 0.1, "weight_init": "jax"}
    changes = {
        "model": of_timm(windows=windows, timm_args=args), "run": {"epochs": 1}, "optimiser": {"layer_decay": 0.8},
    }  # fmt: skip
    train(recipe(whole, **changes), tmp_path / "run")
    vit = open_vit(tmp_path / "run" / "last")
    assert vit.anatomy.grid == (4, 4)
    assert len(window_heads(vit.model)) == n_heads
    averaged = weights(tmp_path / "run")
    assert all(torch.equal(tensor, averaged[f"average/{name}"]) for name, tensor in vit.model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (of_timm(windows="fixed"), r"timm has windows = .predicted. or .none."),
        (of_timm(start_from="somewhere"), "start_from is a WinT of ours"),
        (of_timm(timm_args={"foo": 3, "num_classes": 3}), "timm_args has foo, num_classes.*valid keys: attn_drop_rate"),
        (of_timm(timm_args={"embed_dim": 7}), "could not be made with"),
        (of_timm(timm="resnet18", timm_args={}, windows="none"), "could not be made with"),
    ],
)
def test_a_timm_model_that_cannot_be_what_was_asked_for_is_refused(tmp_path, model, said):
    with pytest.raises(UsageError, match=said):
        build_model(recipe_from(described(tmp_path, model=model)))


def test_a_model_without_a_grid_of_patches_is_refused():
    with pytest.raises(Unsupported, match="no grid of patches"):
        grid_of(nn.Linear(3, 3))


def test_the_temperature_falls_geometrically(tmp_path):
    wanted = recipe_from(
        described(tmp_path, windows={"temperature": 1.0, "final_temperature": 0.25, "anneal_until": 0.5})
    )
    assert_allclose([temperature_at(wanted, done) for done in (0.0, 0.25, 0.5, 1.0)], [1, 0.5, 0.25, 0.25])


OLD_NAMES = {
    "model": {"drop_path_rate": "dropped_paths"},
    "windows": {
        "temperature": "first",
        "final_temperature": "last",
        "anneal_until": "until",
        "lr_scale": "rate",
        "area_weight": None,
    },
    "teacher": {"teacher": "folder", "warmup_share": "from_share", "batch_share": "share"},
    "optimiser": {"lr": "rate", "min_lr": "last_rate", "warmup_epochs": "warm_up_epochs"},
}


def with_old_names(description: dict) -> dict:
    """A recipe as an earlier version wrote it."""
    old = {{"distillation": "teacher"}.get(table, table): values for table, values in description.items()}
    for table, names in OLD_NAMES.items():
        if table in old:
            pairs = ((names.get(key, key), value) for key, value in old[table].items())
            old[table] = {key: value for key, value in pairs if key is not None}
    return old


def test_old_names_are_read_with_a_note(tmp_path):
    new = recipe_from(described(tmp_path, windows={"lr_scale": 3.0}, distillation={"teacher": "hf:x", "weight": 2.0}))
    notes = []
    old = with_old_names(
        described(tmp_path, windows={"lr_scale": 3.0}, distillation={"teacher": "hf:x", "weight": 2.0})
    )
    assert "rate" in old["optimiser"]
    assert recipe_from(old, note=notes.append) == new
    assert "[teacher] is called [distillation] now; it is read as that." in notes
    assert "[optimiser] rate is called [optimiser] lr now; it is read as that." in notes
    with pytest.raises(UsageError, match=r"\[optimiser\] rate is the old name of \[optimiser\] lr, and both"):
        recipe_from(described(tmp_path, optimiser={"rate": 1.0}))


def test_a_run_folder_of_an_earlier_version_goes_on_to_the_same_weights(whole, tmp_path):
    """Its recipe, its tables, its checkpoint's sums and its exported model have the names of then."""
    wanted, out = recipe(whole, run=FOLLOWED), tmp_path / "run"

    def interrupt(what, done, total, word):
        if what == "training" and done == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(wanted, out, progress=interrupt)
    (out / "recipe.json").write_text(json.dumps(with_old_names(wanted.as_dict())))
    config = (out / "last" / "config.json").read_text()
    (out / "last" / "config.json").write_text(config.replace("drop_path_rate", "dropped_paths"))
    assert open_vit(out / "last").model.shape.drop_path_rate == 0.1
    header, *lines = (out / "steps.csv").read_text().splitlines()
    assert header == "step,loss,cross_entropy,cross_entropy_weight,lr,temperature"
    old_lines = [",".join((*line.split(",")[:2], "0", line.split(",")[4], "0", line.split(",")[5])) for line in lines]
    (out / "steps.csv").write_text("\n".join(["step,loss,taught,rate,guidance,temperature", *old_lines]) + "\n")
    with safe_open(out / "checkpoint.safetensors", "pt") as file:
        progress = json.loads(file.metadata()["progress"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert progress.pop("counts") == {"loss": 1, "cross_entropy": 1}
    progress["since"] = 1
    progress["sums"] = {"loss": progress["sums"]["loss"], "taught": 0.0}
    save_file(tensors, out / "checkpoint.safetensors", {"progress": json.dumps(progress)})
    train(wanted, out)
    same(whole / "whole", out)
    for column in ("step", "loss", "lr", "temperature"):
        assert [row[column] for row in text_rows(out / "steps.csv")] == [
            row[column] for row in text_rows(whole / "whole" / "steps.csv")
        ]


RECIPES = sorted((TESTS.parent / "examples" / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_that_we_ship_are_complete(path):
    """They read, their models are made, and their window heads fit; weights and data are the user's."""
    wanted = read_recipe(path)
    assert wanted.expected
    assert wanted.cost
    module = build_model(replace(wanted, model=replace(wanted.model, start_from="")))
    assert sum(parameter.numel() for parameter in module.parameters()) > 1e6
    grey = Image.new("RGB", (wanted.data.image_px,) * 2, "grey")
    images = Images("grey", [lambda: grey] * 4, torch.arange(4), ("a", "b", "c", "d"))
    pixels = None if wanted.data.augmentation == "timm" else images.pixels(wanted.data.image_px)
    seen, labels = Batches(replace(wanted, run=replace(wanted.run, batch_size=4)), images, pixels)[0]
    assert seen.shape == (4, 3, wanted.data.image_px, wanted.data.image_px)
    assert labels.shape == (4, wanted.data.classes)  # all of them mix


def test_the_imagenet_recipe_runs_on_a_few_images(shared, tmp_path):
    """Two steps of four photographs: all as it is written but depth, batch, precision and the teacher."""
    sample = shared / "data" / "imagenet-sample"
    if not sample.is_dir():
        pytest.skip("the sample of ImageNet is not here")
    wanted = read_recipe(next(path for path in RECIPES if path.stem == "imagenet"))
    small = replace(
        wanted,
        data=replace(wanted.data, train=str(sample), test=str(sample), limit=8, test_limit=4, workers=0),
        model=replace(wanted.model, depth=2),
        distillation=replace(wanted.distillation, teacher=""),
        run=replace(wanted.run, epochs=1.0, batch_size=4, precision="no", tensorboard=False),
    )
    results = train(small, tmp_path / "run")
    assert len(results.areas) == 2
    assert [row["step"] for row in rows(tmp_path / "run" / "steps.csv")] == [2]
