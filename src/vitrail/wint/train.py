"""Training a WinT from a recipe: on one device or, started by `accelerate launch` or `torchrun`, on several.

A run is a folder: recipe.json, checkpoint.safetensors, steps.csv, epochs.csv, and the models `last` and `best`, which
`open_vit` opens. Stop it anywhere: the same call goes on, and ends in the same weights, bit for bit on a CPU.
"""

import csv
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import DataError, PlanMismatch, UsageError
from vitrail.wint import checkpoint
from vitrail.wint.batches import DROPS, Batches, Images, derived_seed, normalised, read_images
from vitrail.wint.building import (
    average_of,
    built,
    edges,
    grid_of,
    optimiser_of,
    schedule_of,
    teacher_of,
    temperature,
    timm_model,
)
from vitrail.wint.folder import as_text, save, written
from vitrail.wint.model import hard_mask, recorded_sides, set_temperature
from vitrail.wint.recipe import Data, Recipe
from vitrail.wint.teacher import disagreement, guidance

__all__ = ["Results", "results_of", "train"]

EVALUATED_AT_ONCE = 250
Progress = Callable[[str, int, int, str], None]
"""What is going on, done, of how many, and a word about it."""


@dataclass(frozen=True)
class Results:
    """Of test images: how many answers are right, and the mean area of each layer's windows as a share of the grid."""

    accuracy: float
    areas: tuple[float, ...]


def train(recipe: Recipe, out: str | Path, *, progress: Progress | None = None) -> Results:
    """Trains, or goes on training, in the folder `out`; returns the results of the last weights.

    Raises `PlanMismatch` if the folder was begun with another recipe, `UsageError` and `DataError` for a recipe that
    cannot be run.
    """
    run, out = recipe.run, Path(out)
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(
        mixed_precision=run.precision, gradient_accumulation_steps=run.accumulate,
        dynamo_backend="inductor" if run.compile else None,
    )  # fmt: skip
    if accelerator.is_main_process:
        _begun(out, recipe)
    torch.manual_seed(run.seed)
    images, tested = _data(recipe)
    session = _Session(recipe, out, accelerator, images, tested, progress)
    session.restore()
    try:
        session.run()
    finally:
        session.close()
    return session.results


@torch.no_grad()
def results_of(
    model: nn.Module,
    pixels: Float[Tensor, "image 3 row column"] | Tensor,
    labels: Tensor,
    grid: tuple[int, int],
    data: Data,
) -> Results:
    """Accuracy and areas with hard windows on undisturbed images, bytes [image 3 row column]."""
    device = next(model.parameters()).device
    right, areas, training = 0, [], model.training
    model.eval()
    for start in range(0, len(pixels), EVALUATED_AT_ONCE):
        part = slice(start, start + EVALUATED_AT_ONCE)
        with recorded_sides(model) as sides:
            logits = model(normalised(pixels[part], data.mean, data.std).to(device))
        right += int((logits.argmax(1).cpu() == labels[part]).sum())
        areas.append([float(hard_mask(layer, grid).float().mean()) * len(logits) for layer in sides])
    model.train(training)
    mean = [sum(layer) / len(pixels) for layer in zip(*areas, strict=True)]
    return Results(right / len(pixels), tuple(mean))


# --- a run -----------------------------------------------------------------------------------------------------------


@dataclass
class _Session:
    """All that lives while a run goes on."""

    recipe: Recipe
    out: Path
    accelerator: Accelerator
    images: Images
    tested: Images
    progress: Progress | None
    step: int = 0
    best: float = -1.0
    results: Results = Results(0.0, ())
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _since: int = 0

    def __post_init__(self) -> None:
        recipe, accelerator, run = self.recipe, self.accelerator, self.recipe.run
        self.module = built(recipe).to(accelerator.device)
        self.grid = grid_of(self.module)
        self.teacher = teacher_of(recipe, self.module, self.grid, str(accelerator.device))
        whole = None if recipe.data.augmentation == "timm" else self._decoded(self.images, "reading images")
        self.batches = Batches(recipe, self.images, whole, accelerator.process_index, accelerator.num_processes)
        self.test_pixels = self._decoded(self.tested, "reading test images")
        self.optimiser = optimiser_of(recipe, self.module)
        self.schedule = schedule_of(recipe, self.optimiser, self.batches)
        self.average = average_of(run.ema, self.module)
        self.model = accelerator.prepare_model(self.module.train())
        self.prepared = accelerator.prepare_optimizer(self.optimiser)
        self._board = _board(self.out, run.tensorboard) if accelerator.is_main_process else None

    def restore(self) -> None:
        """Goes back to the checkpoint, if there is one; rows of the tables that came after it are dropped."""
        average = self.average.module if self.average is not None else None
        found = checkpoint.load(self._checkpoint, self.module, average, self.optimiser)
        if found is not None:
            self.step, self.best = found["step"], found["best"]
            self.results = Results(found["accuracy"], tuple(found["areas"]))
            self._sums = {
                name: torch.tensor(total, device=self.accelerator.device) for name, total in found["sums"].items()
            }
            self._since = found["since"]
        if self.accelerator.is_main_process:
            for name in ("steps", "epochs"):
                _cut(self.out / f"{name}.csv", self.step)
        self.accelerator.wait_for_everyone()

    def run(self) -> None:
        """The steps that are left."""
        if self.accelerator.num_processes > 1:  # processes that stop at different steps would wait for each other
            self._steps(lambda: False)
            return
        with _held_interrupts() as asked:
            self._steps(asked)

    def _steps(self, asked_to_stop: Callable[[], bool]) -> None:
        began, first = time.perf_counter(), self.step
        for images, labels in self.batches.from_step(self.step):
            row = self._learned(images, labels)
            self.step += 1
            self._logged(row)
            ended = self.step % self.batches.per_epoch == 0 or self.step == len(self.batches)
            every = self.recipe.run.evaluate_epochs * self.batches.per_epoch
            if self.step % every == 0 or self.step == len(self.batches):
                pace = (self.step - first) * self.recipe.run.batch_size / (time.perf_counter() - began)
                self._evaluated(row, pace)
            if ended or (self.recipe.run.checkpoint_steps and self.step % self.recipe.run.checkpoint_steps == 0):
                self._kept()
            if self.progress is not None and self.accelerator.is_main_process:
                word = f"loss {float(row['loss']):.3f}" + (f"  best {self.best:.3f}" if self.best >= 0 else "")
                self.progress("training", self.step, len(self.batches), word)
            if asked_to_stop():
                self._kept()
                stop = KeyboardInterrupt()
                stop.add_note(f"The same command goes on at step {self.step} of {len(self.batches)}.")
                raise stop

    def close(self) -> None:
        """Lets go of the writers."""
        if self._board is not None:
            self._board.close()
        self.accelerator.end_training()

    def _learned(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """One step of the optimiser; what it saw."""
        recipe, accelerator, run = self.recipe, self.accelerator, self.recipe.run
        done = self.step / len(self.batches)
        set_temperature(
            self.module, temperature(recipe, done), hard=done >= recipe.windows.hard_from and not edges(recipe)
        )
        torch.manual_seed(derived_seed(run.seed, DROPS, self.step, accelerator.process_index))
        self.schedule.step_update(self.step)
        weight, totals = guidance(recipe.teacher, done), dict[str, Any](loss=0.0, taught=0.0)
        for piece, target in zip(images.chunk(run.accumulate), labels.chunk(run.accumulate), strict=True):
            with accelerator.accumulate(self.model):
                loss, taught = self._loss(piece.to(accelerator.device), target.to(accelerator.device), weight)
                accelerator.backward(loss)
                if recipe.optimiser.clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), recipe.optimiser.clip)
                self.prepared.step()
                self.prepared.zero_grad()
            totals["loss"] += loss.detach() / run.accumulate
            totals["taught"] += taught.detach() / run.accumulate
        if self.average is not None:
            self.average.update(self.module, step=self.step + 1)
        return {**totals, "rate": max(group["lr"] for group in self.optimiser.param_groups), "guidance": weight,
                "temperature": temperature(recipe, done)}  # fmt: skip

    def _loss(self, images: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Cross-entropy plus the teacher's term, and that term alone, unweighted."""
        smoothing = self.recipe.run.label_smoothing if labels.ndim == 1 else 0.0
        if weight == 0 or self.teacher is None:
            with self.accelerator.autocast():
                logits = self.model(images)
            return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing), logits.new_zeros(())
        with recorded_sides(self.module) as sides, self.accelerator.autocast():
            logits = self.model(images)
        shown = images[: max(1, round(self.recipe.teacher.share * len(images)))]
        taught = self.teacher.sides(shown)
        if self.recipe.teacher.shuffled:
            taught = [layer.roll(1, 0) for layer in taught]
        apart = disagreement([layer[: len(shown)] for layer in sides], taught, self.grid)
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing) + weight * apart, apart

    def _logged(self, row: Mapping[str, Any]) -> None:
        """Means over the steps since the last row, over all processes."""
        for name in ("loss", "taught"):
            self._sums[name] = self._sums.get(name, 0) + torch.as_tensor(row[name])
        self._since += 1
        if self.step % self.recipe.run.log_steps and self.step != len(self.batches):
            return
        means = {
            name: float(self.accelerator.reduce(total / self._since, "mean")) for name, total in self._sums.items()
        }
        self._sums, self._since = {}, 0
        self._row(
            "steps", {"step": self.step, **means, **{key: row[key] for key in ("rate", "guidance", "temperature")}}
        )

    def _evaluated(self, row: Mapping[str, Any], pace: float) -> None:
        """Tests the weights that are exported, and keeps them if none were better."""
        shown = self.average.module if self.average is not None else self.module
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        part = slice(rank, None, world)
        own = results_of(shown, self.test_pixels[part], self.tested.labels[part], self.grid, self.recipe.data)
        share = len(self.test_pixels[part]) / len(self.test_pixels)
        numbers = torch.tensor([own.accuracy, *own.areas], device=self.accelerator.device) * share
        accuracy, *areas = self.accelerator.reduce(numbers, "sum").tolist()
        self.results = Results(accuracy, tuple(areas))
        area = sum(areas) / len(areas) if areas else 1.0
        epoch = self.step / self.batches.per_epoch
        self._row(
            "epochs", {"step": self.step, "epoch": epoch, "accuracy": accuracy, "area": area, "images_per_s": pace}
        )
        if accuracy > self.best:
            self.best = accuracy
            self._exported("best")

    def _kept(self) -> None:
        self._exported("last")
        if self.accelerator.is_main_process:
            state = {
                "step": self.step, "best": self.best, "accuracy": self.results.accuracy, "areas": self.results.areas,
                "sums": {name: float(total) for name, total in self._sums.items()}, "since": self._since,
            }  # fmt: skip
            average = self.average.module if self.average is not None else None
            checkpoint.save(self._checkpoint, self.module, average, self.optimiser, state)
        self.accelerator.wait_for_everyone()

    def _exported(self, name: str) -> None:
        if self.accelerator.is_main_process:
            shown = self.average.module if self.average is not None else self.module
            data, names = self.recipe.data, self.images.class_names
            save(shown, self.out / name, names, timm_model(self.recipe), data.mean, data.std)

    def _row(self, table: str, row: Mapping[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        path = self.out / f"{table}.csv"
        fresh = not path.is_file()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow({key: f"{value:.9g}" for key, value in row.items()})
        if self._board is not None:
            for key, value in row.items():
                self._board.add_scalar(f"{table}/{key}", value, self.step)

    def _decoded(self, images: Images, what: str) -> Tensor:
        shown = None
        if self.progress is not None and self.accelerator.is_main_process:
            told = self.progress
            shown = lambda done, total: told(what, done, total, "")  # noqa: E731
        return images.pixels(self.recipe.data.image_px, shown)

    @property
    def _checkpoint(self) -> Path:
        return self.out / "checkpoint.safetensors"


@contextmanager
def _held_interrupts() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C is only noted, so that a step is finished and kept; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def note(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def _begun(out: Path, recipe: Recipe) -> None:
    """The folder with its recipe; refuses one begun with another."""
    out.mkdir(parents=True, exist_ok=True)
    path, wanted = out / "recipe.json", json.loads(json.dumps(recipe.as_dict()))
    if not path.is_file():
        written(path, lambda beside: as_text(beside, json.dumps(wanted, indent=2) + "\n"))
        return
    there = json.loads(path.read_text())
    if there != wanted:
        flat, other = _flat(there), _flat(wanted)
        wrong = [
            f"{key} was {flat.get(key)!r}, is {other.get(key)!r}"
            for key in {**flat, **other}
            if flat.get(key) != other.get(key)
        ]
        raise PlanMismatch(f"{out} was begun with another recipe: {'; '.join(wrong)}. Choose another folder.")


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    parts = {key: value if isinstance(value, dict) else {"": value} for key, value in recipe.items()}
    return {f"{key}.{name}".strip("."): each for key, value in parts.items() for name, each in value.items()}


def _data(recipe: Recipe) -> tuple[Images, Images]:
    data = recipe.data
    images, tested = read_images(data.train), read_images(data.test)
    for found in (images, tested):
        if len(found.class_names) != data.classes:
            raise DataError(
                f"[data] classes = {data.classes}, and {found.name} has {len(found.class_names)} "
                f"({', '.join(found.class_names[:5])}{', ...' if len(found.class_names) > 5 else ''})."
            )
    if images.class_names != tested.class_names:
        raise DataError(f"{images.name} and {tested.name} have different classes.")
    return images.some(data.limit), tested.some(data.test_limit)


def _board(out: Path, wanted: bool) -> Any:
    if not wanted:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("[run] tensorboard = true needs its writer: pip install 'vitrail[train]'.") from error
    return SummaryWriter(out / "tensorboard")


def _cut(path: Path, step: int) -> None:
    """Keeps the rows up to a step."""
    if not path.is_file():
        return
    with path.open(newline="") as file:
        rows: Sequence[dict[str, str]] = list(csv.DictReader(file))
        names = list(rows[0]) if rows else []
    kept = [row for row in rows if int(row["step"]) <= step]
    if not kept:
        path.unlink()
        return

    def write(beside: Path) -> None:
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(kept)

    if len(kept) < len(rows):
        written(path, write)
