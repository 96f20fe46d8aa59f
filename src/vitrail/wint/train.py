"""Training a WinT from a recipe: on one device or, started by `accelerate launch` or `torchrun`, on several.

A run is a folder: recipe.json, checkpoint.safetensors, steps.csv, epochs.csv, and the models `last` and `best`, which
`open_vit` opens. Stop it anywhere: the same call goes on, and ends in the same weights, bit for bit on a CPU.
"""

import csv
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from filelock import FileLock, Timeout
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import DataError, PlanMismatch, StudyError, TrainingDiverged, UsageError
from vitrail.grid import Grid
from vitrail.outputs import local_folder, remove_unfinished, write_atomically
from vitrail.wint import checkpoint
from vitrail.wint.batches import DROPS, Batches, Images, derive_seed, normalise, read_images
from vitrail.wint.building import (
    build_average,
    build_model,
    build_optimiser,
    build_schedule,
    edge_temperature,
    grid_of,
    temperature_at,
    timm_description,
)
from vitrail.wint.folder import save
from vitrail.wint.model import hard_mask, record_sides, set_temperature
from vitrail.wint.objectives import TrainingBatch, build_objectives
from vitrail.wint.recipe import Data, Recipe, recipe_from

__all__ = ["Results", "results_of", "train"]

EVALUATION_BATCH = 250
"""Test images at a time: their activations fit beside the training's in a small GPU's memory."""

LOCK, CHECKPOINT, TABLES = ".lock", "checkpoint.safetensors", ("steps.csv", "epochs.csv")
FILES = ("recipe.json", CHECKPOINT, *TABLES, "config.json", "model.safetensors")
"""Of a run and of the models in it, which only the process writes that holds the lock."""

OLD_COLUMNS = {"taught": "window_l1", "guidance": "window_l1_weight", "rate": "lr"}
"""Columns of steps.csv and sums of checkpoints by the names that earlier runs gave them."""

Progress = Callable[[str, int, int, str], None]
"""Called with what is going on, how much of it is done, of how much, and a word about it."""


@dataclass(frozen=True)
class Results:
    """Of test images: the share of correct predictions, and each layer's mean area of windows, a share of the grid."""

    accuracy: float
    areas: tuple[float, ...]


def train(recipe: Recipe, out: str | Path, *, progress: Progress | None = None) -> Results:
    """Trains, or goes on training, in a folder.

    Args:
        recipe: What to train, on what, how long.
        out: The run's folder; one that holds a run of this recipe goes on.
        progress: Told what is going on.

    Returns:
        The results of the last weights.

    Raises:
        PlanMismatch: The folder was started with another recipe.
        StudyError: Another process is training in the folder.
        UsageError: The recipe cannot be run.
        DataError: The images do not fit the recipe.
        TrainingDiverged: A loss or a weight is infinite or no number.

    Example:
        results = train(read_recipe("cifar10.toml"), "runs/cifar10")
    """
    run, out = recipe.run, local_folder(out)
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(
        mixed_precision=run.precision,
        gradient_accumulation_steps=run.accumulate,
        dynamo_backend="inductor" if run.compile else None,
    )
    with ExitStack() as stack:
        if accelerator.is_main_process:
            _refuse_other_files(out)
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_lock(out))
            _start(out, recipe)
        torch.manual_seed(run.seed)
        images, test_images = _read_data(recipe)
        session = _Session(recipe, out, accelerator, images, test_images, progress)
        session.restore()
        stack.callback(session.close)
        session.run()
    return session.results


@torch.no_grad()
def results_of(
    model: nn.Module,
    pixels: Float[Tensor, "image 3 row column"] | Tensor,
    labels: Tensor,
    grid: Grid,
    data: Data,
) -> Results:
    """Tests a model on undisturbed images, with windows as in evaluation.

    Args:
        model: The model; its mode is put back afterwards.
        pixels: Bytes [image 3 row column].
        labels: Class numbers [image].
        grid: Rows and columns of patches.
        data: How images are normalised.

    Returns:
        Accuracy, and the mean area of each layer's windows.
    """
    device = next(model.parameters()).device
    n_correct, areas, training = 0, [], model.training
    model.eval()
    for start in range(0, len(pixels), EVALUATION_BATCH):
        part = slice(start, start + EVALUATION_BATCH)
        with record_sides(model) as sides:
            logits = model(normalise(pixels[part], data.mean, data.std).to(device))
        n_correct += int((logits.argmax(1).cpu() == labels[part]).sum())
        areas.append([float(hard_mask(layer, grid).float().mean()) * len(logits) for layer in sides])
    model.train(training)
    mean = [sum(layer) / len(pixels) for layer in zip(*areas, strict=True)]
    return Results(n_correct / len(pixels), tuple(mean))


# --- a run -----------------------------------------------------------------------------------------------------------


@dataclass
class _Session:
    """All that lives while a run goes on."""

    recipe: Recipe
    out: Path
    accelerator: Accelerator
    images: Images
    test_images: Images
    progress: Progress | None
    step: int = 0
    best: float = -1.0
    results: Results = Results(0.0, ())
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        recipe, accelerator, run = self.recipe, self.accelerator, self.recipe.run
        self.module = build_model(recipe).to(accelerator.device)
        self.grid = grid_of(self.module)
        self.objectives = build_objectives(recipe, self.module, self.grid, str(accelerator.device))
        pixels = None if recipe.data.augmentation == "timm" else self._decode(self.images, "reading images")
        self.batches = Batches(recipe, self.images, pixels, accelerator.process_index, accelerator.num_processes)
        self.test_pixels = self._decode(self.test_images, "reading test images")
        self.optimiser = build_optimiser(recipe, self.module)
        self.schedule = build_schedule(recipe, self.optimiser, self.batches)
        self.average = build_average(run.ema, self.module)
        self.model = accelerator.prepare_model(self.module.train())
        self.prepared = accelerator.prepare_optimizer(self.optimiser)
        self._board = _board(self.out, run.tensorboard) if accelerator.is_main_process else None

    def restore(self) -> None:
        """Goes back to the checkpoint, if there is one; rows of the tables that came after it are dropped."""
        average = self.average.module if self.average is not None else None
        state = checkpoint.load(self._checkpoint, self.module, average, self.optimiser)
        if state is not None:
            self.step, self.best = state["step"], state["best"]
            self.results = Results(state["accuracy"], tuple(state["areas"]))
            self._sums = {
                OLD_COLUMNS.get(name, name): torch.tensor(total, device=self.accelerator.device)
                for name, total in state["sums"].items()
            }
            earlier = dict.fromkeys(self._sums, state.get("since", 0))  # of a checkpoint that has one count for all
            self._counts = state.get("counts", earlier)
            if state.get("scaler") and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.accelerator.is_main_process:
            for name in ("steps", "epochs"):
                _rewrite_table(self.out / f"{name}.csv", self.step)
        self.accelerator.wait_for_everyone()

    def run(self) -> None:
        """The steps that are left."""
        if self.accelerator.num_processes > 1:  # processes that stop at different steps would wait for each other
            self._run_steps(lambda: False)
            return
        with _defer_interrupt() as interrupted:
            self._run_steps(interrupted)

    def _run_steps(self, interrupted: Callable[[], bool]) -> None:
        start_time, first = time.perf_counter(), self.step
        for images, labels in self.batches.from_step(self.step):
            row = self._train_step(images, labels)
            self.step += 1
            self._log(row)
            epoch_ends = self.step % self.batches.per_epoch == 0 or self.step == len(self.batches)
            every = self.recipe.run.evaluate_epochs * self.batches.per_epoch
            if self.step % every == 0 or self.step == len(self.batches):
                pace = (self.step - first) * self.recipe.run.batch_size / (time.perf_counter() - start_time)
                self._evaluate(pace)
            steps = self.recipe.run.checkpoint_steps
            if epoch_ends or (steps and self.step % steps == 0):
                self._save_checkpoint()
            if self.progress is not None and self.accelerator.is_main_process:
                word = f"loss {float(row['loss']):.3f}" + (f"  best {self.best:.3f}" if self.best >= 0 else "")
                self.progress("training", self.step, len(self.batches), word)
            if interrupted():
                self._save_checkpoint()
                stop = KeyboardInterrupt()
                stop.add_note(f"The same command goes on at step {self.step} of {len(self.batches)}.")
                raise stop

    def close(self) -> None:
        """Lets go of the writers."""
        if self._board is not None:
            self._board.close()
        self.accelerator.end_training()

    def _train_step(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """One step of the optimiser. The losses of all objectives that have a weight now, the weights of all, and what
        the step was taken with."""
        recipe, accelerator, run = self.recipe, self.accelerator, self.recipe.run
        progress = self.step / len(self.batches)
        temperature = temperature_at(recipe, progress)
        hard = progress >= recipe.windows.hard_from and not edge_temperature(recipe)
        set_temperature(self.module, temperature, hard=hard)
        torch.manual_seed(derive_seed(run.seed, DROPS, self.step, accelerator.process_index))
        self.schedule.step_update(self.step)
        weights = {objective.name: objective.weight(progress) for objective in self.objectives}
        losses: dict[str, Any] = {}
        for piece, target in zip(images.chunk(run.accumulate), labels.chunk(run.accumulate), strict=True):
            with accelerator.accumulate(self.model):
                parts = self._losses(piece.to(accelerator.device), target.to(accelerator.device), weights)
                loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
                accelerator.backward(loss)
                if recipe.optimiser.clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), recipe.optimiser.clip)
                self.prepared.step()
                self.prepared.zero_grad()
            for name, part in {"loss": loss, **parts}.items():
                losses[name] = losses.get(name, 0.0) + part.detach() / run.accumulate
        if self.average is not None:
            self.average.update(self.module, step=self.step + 1)
        lr = next(group["lr"] / group["lr_scale"] for group in self.optimiser.param_groups if group["lr_scale"])
        return {
            **dict.fromkeys(("loss", *weights)),
            **losses,
            **{f"{name}_weight": weight for name, weight in weights.items()},
            "lr": lr,
            "temperature": temperature,
        }

    def _losses(self, images: Tensor, labels: Tensor, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """The objectives that have a weight now."""
        active = [objective for objective in self.objectives if weights[objective.name] != 0]
        sides: list[Tensor] = []
        with ExitStack() as stack:
            if any(objective.reads_sides for objective in active):
                sides = stack.enter_context(record_sides(self.module))
            stack.enter_context(self.accelerator.autocast())
            logits = self.model(images)
        batch = TrainingBatch(images, labels, logits, tuple(sides))
        return {objective.name: objective.loss(batch) for objective in active}

    def _log(self, row: Mapping[str, Any]) -> None:
        """Means of the losses over the steps since the last row that computed them, over all processes; none where no
        step did."""
        losses = ("loss", *(objective.name for objective in self.objectives))
        for name in losses:
            if row[name] is not None:
                self._sums[name] = self._sums.get(name, 0) + row[name]
                self._counts[name] = self._counts.get(name, 0) + 1
        if self.step % self.recipe.run.log_steps and self.step != len(self.batches):
            return
        means = {
            name: float(self.accelerator.reduce(self._sums[name] / self._counts[name], "mean"))
            for name in losses
            if self._counts.get(name)
        }
        self._refuse([f"{name} is {mean}" for name, mean in means.items() if not math.isfinite(mean)])
        self._sums, self._counts = {}, {}
        self._append_row("steps", {"step": self.step, **row, **dict.fromkeys(losses), **means})

    def _evaluate(self, pace: float) -> None:
        """Tests the weights that are exported, and keeps them if none were better."""
        self._refuse_lost_weights()
        module = self.average.module if self.average is not None else self.module
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        part = slice(rank, None, world)
        own = results_of(module, self.test_pixels[part], self.test_images.labels[part], self.grid, self.recipe.data)
        share = len(self.test_pixels[part]) / len(self.test_pixels)
        numbers = torch.tensor([own.accuracy, *own.areas], device=self.accelerator.device) * share
        accuracy, *areas = self.accelerator.reduce(numbers, "sum").tolist()
        self.results = Results(accuracy, tuple(areas))
        area = sum(areas) / len(areas) if areas else 1.0
        epoch = self.step / self.batches.per_epoch
        row = {"step": self.step, "epoch": epoch, "accuracy": accuracy, "area": area, "images_per_s": pace}
        self._append_row("epochs", row)
        if accuracy > self.best:
            self.best = accuracy
            self._export("best")

    def _refuse(self, wrong: Sequence[str]) -> None:
        """Weights that give no numbers are lost: nothing is tested, exported or saved from them."""
        if wrong:
            kept = "goes on from the last checkpoint" if self._checkpoint.is_file() else "begins anew"
            raise TrainingDiverged(
                f"Training gives no numbers any more at step {self.step} of {len(self.batches)}: {', '.join(wrong)}. "
                f"Nothing was saved from it, and the same command {kept}. Try a lower lr or clip = 1.0 under "
                '[optimiser], or precision = "no" and compile = false under [run], in another folder.'
            )

    def _refuse_lost_weights(self) -> None:
        self._refuse(
            [f"{name} is not finite" for name, each in self.module.named_parameters() if not each.isfinite().all()][:1]
        )

    def _save_checkpoint(self) -> None:
        self._refuse_lost_weights()
        self._export("last")
        if self.accelerator.is_main_process:
            state = {
                "step": self.step,
                "best": self.best,
                "accuracy": self.results.accuracy,
                "areas": self.results.areas,
                "sums": {name: float(total) for name, total in self._sums.items()},
                "counts": self._counts,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
            }
            average = self.average.module if self.average is not None else None
            checkpoint.save(self._checkpoint, self.module, average, self.optimiser, state)
        self.accelerator.wait_for_everyone()

    def _export(self, name: str) -> None:
        if self.accelerator.is_main_process:
            module = self.average.module if self.average is not None else self.module
            data, names = self.recipe.data, self.images.class_names
            save(module, self.out / name, names, timm_description(self.recipe), data.mean, data.std)

    def _append_row(self, table: str, row: Mapping[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        path = self.out / f"{table}.csv"
        if _header(path) not in ([], list(row)):
            _rewrite_table(path, self.step, list(row))
        is_new = not path.is_file()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow({key: "" if value is None else f"{value:.9g}" for key, value in row.items()})
        if self._board is not None:
            for key, value in row.items():
                if value is not None:
                    self._board.add_scalar(f"{table}/{key}", value, self.step)

    def _decode(self, images: Images, what: str) -> Tensor:
        report = self.progress
        if report is None or not self.accelerator.is_main_process:
            return images.pixels(self.recipe.data.image_px)
        return images.pixels(self.recipe.data.image_px, lambda done, total: report(what, done, total, ""))

    @property
    def _checkpoint(self) -> Path:
        return self.out / CHECKPOINT


@contextmanager
def _defer_interrupt() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C is only noted, so that a step is finished and saved; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    interrupted = False

    def note(number: int, frame: Any) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _start(out: Path, recipe: Recipe) -> None:
    """The folder with its recipe; refuses another recipe once a step of the first was taken."""
    path = out / "recipe.json"
    if path.is_file():
        earlier = _read_started(path)
        if earlier == recipe:
            return
        if any((out / name).is_file() for name in (CHECKPOINT, *TABLES)):
            flat, other = _flatten(earlier.as_dict()), _flatten(recipe.as_dict())
            differences = [
                f"{key} was {flat.get(key)!r}, is {other.get(key)!r}"
                for key in {**flat, **other}
                if flat.get(key) != other.get(key)
            ]
            raise PlanMismatch(f"{out} was begun with another recipe: {'; '.join(differences)}. Choose another folder.")
    description = json.dumps(recipe.as_dict(), indent=2) + "\n"
    write_atomically(path, lambda beside: beside.write_text(description, encoding="utf-8"))


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Two runs in one folder would mix their tables and their checkpoints; what a killed one left behind goes."""
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StudyError(f"Another process is training in {out}; wait until it has ended, or end it.") from error
    try:
        for folder in (out, out / "last", out / "best"):
            remove_unfinished(folder, FILES)
        yield
    finally:
        lock.release()


def _read_started(path: Path) -> Recipe:
    """The recipe that a folder was started with, also by an earlier version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StudyError(f"{path} is not the recipe of a training: {error}. Name another folder.") from error
    if not isinstance(content, dict):
        raise StudyError(f"{path} is not the recipe of a training: it holds no object. Name another folder.")
    try:
        return recipe_from(content)
    except UsageError as error:
        raise StudyError(f"{path} is not the recipe of a training: {error} Name another folder.") from error


def _refuse_other_files(out: Path) -> None:
    """A training begins in a new or empty folder; what one leaves behind that has not begun does not count."""
    files = sorted(each.name for each in out.iterdir()) if out.is_dir() else []
    if "recipe.json" not in files and not all(name == LOCK or name.startswith(".recipe.json.") for name in files):
        raise UsageError(f"{out} holds other files ({', '.join(files[:3])}) and no training; name a new folder.")


def _flatten(recipe: Mapping[str, Any]) -> dict[str, Any]:
    parts = {key: value if isinstance(value, dict) else {"": value} for key, value in recipe.items()}
    return {f"{key}.{name}".strip("."): each for key, value in parts.items() for name, each in value.items()}


def _read_data(recipe: Recipe) -> tuple[Images, Images]:
    data = recipe.data
    images, test_images = read_images(data.train), read_images(data.test)
    for each in (images, test_images):
        if len(each.class_names) != data.classes:
            raise DataError(
                f"[data] classes = {data.classes}, and {each.name} has {len(each.class_names)} "
                f"({', '.join(each.class_names[:5])}{', ...' if len(each.class_names) > 5 else ''})."
            )
    if images.class_names != test_images.class_names:
        raise DataError(f"{images.name} and {test_images.name} have different classes.")
    return images.subset(data.limit), test_images.subset(data.test_limit)


def _board(out: Path, tensorboard: bool) -> Any:
    if not tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("[run] tensorboard = true needs its writer: pip install 'vitrail[train]'.") from error
    return SummaryWriter(out / "tensorboard")


def _header(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def _rewrite_table(path: Path, step: int, columns: Sequence[str] = ()) -> None:
    """Drops rows after a step, and gives columns of earlier versions their names; `columns` come first, in order."""
    if not path.is_file():
        return
    with path.open(newline="") as file:
        rows = [{OLD_COLUMNS.get(name, name): value for name, value in row.items()} for row in csv.DictReader(file)]
    before = _header(path)
    remaining = [row for row in rows if int(row["step"]) <= step]
    if not remaining:
        path.unlink()
        return
    names = list(columns) or list(remaining[0])

    def write(beside: Path) -> None:
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(remaining)

    if len(remaining) < len(rows) or names != before:
        write_atomically(path, write)
