"""Speed, memory and correctness on a GPU: one command, at most 8 minutes, random weights, nothing to download.

    python benchmarks/gpu.py                  every row on the first CUDA device
    python benchmarks/gpu.py --minutes 4      the rows that fit into four minutes, the most important ones first
    python benchmarks/gpu.py --short          tiny models on the processor: shows that the command works

Rows of a model: the plain pass in images a second; reading (strength, entropy, distance, prefix share), all measures of
patches and all of tokens as multiples of the plain pass; exact and estimated importance of all heads against naive
leave-one-out, which zeroes each head with a hook and runs the whole model (timed on some heads and scaled). Peak memory
is what is allocated above the model and its images. Peers do the same work: their maps, then the same four measures.
Ends with status 1 if a check fails; a row that could not be measured says why.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "wint"))

from peers import PEERS, four_measures, plain_model
from tiny_runs import recipe

import vitrail
from vitrail.analysis import analyses, make_collectors, unavailable
from vitrail.errors import VitrailError
from vitrail.measure import Measure
from vitrail.models.open import Vit, open_vit
from vitrail.tap.budget import fixed_budget
from vitrail.tap.tap import Readers
from vitrail.wint.train import train

REACH = ["attention_strength", "strength_entropy", "attention_distance", "prefix_share"]
IMPORTANCE = ["head_probability", "head_divergence", "head_loss_change", "head_flip"]

BOUND = 0.02
"""Of a measure's spread over images, heads and places: what a GPU's sums in another order may change it by."""

MAX_REPEATS, ROW_SECONDS = 5, 4.0
"""A row is run again until it has taken so long, at most so often."""

NAIVE_HEADS = 4
"""Heads on which naive leave-one-out is timed."""


@dataclass(frozen=True)
class Subject:
    """A model that is measured: what timm calls it, with what options, and whether peers can follow it."""

    label: str
    name: str
    options: dict[str, Any]
    has_peers: bool = False


SUBJECTS = (
    Subject("ViT-B/16, 224 px", "vit_base_patch16_224", {}, has_peers=True),
    Subject("ViT-Tiny/16, 224 px", "vit_tiny_patch16_224", {}, has_peers=True),
    Subject("ViT-L/16, 224 px", "vit_large_patch16_224", {}),
    Subject("ViT-B/14 with 4 registers, 518 px", "vit_base_patch14_reg4_dinov2", {"num_classes": 1000}),
    Subject("Swin-T, 224 px", "swin_tiny_patch4_window7_224", {}),
)

SHORT = (
    Subject(
        "tiny ViT, 32 px",
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10},
        has_peers=True,
    ),
    Subject(
        "tiny Swin, 32 px",
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)},
    ),
)


class TimeIsUp(Exception):
    """The minutes that were given have passed."""


class Bench:
    """Times work on one device until a deadline, and collects the rows of the tables."""

    def __init__(self, device: str, minutes: float) -> None:
        self.device, self.deadline = device, time.perf_counter() + 60 * minutes
        self.on_gpu = device != "cpu"

    def seconds(self, work: Callable[[], object]) -> float:
        """Median time of a call, after one that is not counted."""
        if time.perf_counter() > self.deadline:
            raise TimeIsUp
        self._once(work)
        taken: list[float] = []
        while len(taken) < MAX_REPEATS and sum(taken) < ROW_SECONDS and time.perf_counter() < self.deadline:
            taken.append(self._once(work))
        if not taken:
            raise TimeIsUp
        return statistics.median(taken)

    def _once(self, work: Callable[[], object]) -> float:
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def peak_mib(self, work: Callable[[], object]) -> str:
        """Memory of a call above what is allocated before it."""
        if not self.on_gpu:
            return "-"
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:,.0f}"


def table(title: str, columns: list[str], rows: Iterator[list[str]]) -> None:
    """A markdown table whose rows are printed as they come."""
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


# --- models ----------------------------------------------------------------------------------------------------------


def names_of(vit: Vit, analysis: str, options: dict[str, str]) -> list[str]:
    """The measures of an analysis that the model can give."""
    return [name for name in analyses()[analysis].measure_names if name not in unavailable(vit, [name], options)]


def collect(vit: Vit, images: Tensor, names: list[str], **options: str) -> dict[str, np.ndarray]:
    """Measures of one batch, as a study computes them."""
    collectors = make_collectors(vit, names, options)
    readers = Readers.join([each.readers() for each in collectors])
    replay, logits = vit.tap().record(images, readers, keep=any(each.replays for each in collectors))
    labels = logits.argmax(-1).cpu().numpy().astype(np.int64)
    arrays: dict[str, np.ndarray] = {}
    for each in collectors:
        arrays |= each.finish(vit.tap(), replay, logits, labels)
    return arrays


@torch.no_grad()
def leave_out(model: nn.Module, images: Tensor, layer: int, head: int) -> Tensor:
    """Logits without a head, as anyone would write it: a hook before the output projection, and the whole model."""
    attention = [module for module in model.modules() if hasattr(module, "num_heads") and hasattr(module, "proj")]
    width = attention[layer].proj.in_features // attention[layer].num_heads

    def zero(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = inputs[0].clone()
        changed[..., head * width : (head + 1) * width] = 0
        return (changed,)

    handle = attention[layer].proj.register_forward_pre_hook(zero)
    try:
        return model(images)
    finally:
        handle.remove()


def model_rows(bench: Bench, subjects: tuple[Subject, ...], batch_size: int) -> Iterator[list[str]]:
    """What is measured of every model, bfloat16 first."""
    for precision in ("bfloat16", "float32"):
        for subject in subjects:
            torch.manual_seed(0)
            module = plain_model(subject.name, **subject.options)
            vit = open_vit(module, device=bench.device, precision=precision, weights="random")
            images = random_images(vit, batch_size)
            plain = bench.seconds(lambda: vit.logits(images))  # noqa: B023
            memory = bench.peak_mib(lambda: vit.logits(images))  # noqa: B023
            yield [subject.label, precision, "plain pass", f"{batch_size / plain:,.0f} images/s", memory]
            for way, work, against in ways(bench, vit, images, plain):
                try:
                    yield [subject.label, precision, way, against(bench.seconds(work)), bench.peak_mib(work)]
                except (VitrailError, torch.OutOfMemoryError) as error:
                    yield [subject.label, precision, way, f"not measured: {str(error).splitlines()[0]}", "-"]
            del vit, module, images
            gc.collect()


def random_images(vit: Vit, n_images: int) -> Tensor:
    """The same in every run, on the model's device in its precision."""
    images = torch.randn((n_images, 3, *vit.image_size), generator=torch.Generator().manual_seed(1))
    parameter = next(vit.model.parameters())
    return images.to(parameter.device, parameter.dtype)


Way = tuple[str, Callable[[], object], Callable[[float], str]]


def ways(bench: Bench, vit: Vit, images: Tensor, plain: float) -> Iterator[Way]:
    """What is measured of a model: its name, the work, and how its seconds are said."""

    def over_plain(seconds: float) -> str:
        return f"{seconds / plain:.2f} x plain"

    reading = [name for name in REACH if not unavailable(vit, [name], {})]
    yield "reading", lambda: collect(vit, images, reading), over_plain
    for analysis in ("patches", "tokens"):
        yield f"all measures of {analysis}", _collect(vit, images, names_of(vit, analysis, {}), {}), over_plain
    heads = [(layer, head) for layer, n_heads in enumerate(vit.n_heads) for head in range(n_heads)]
    sample = heads[:: max(1, len(heads) // NAIVE_HEADS)]
    naive = bench.seconds(lambda: [leave_out(vit.model, images, *each) for each in sample]) * len(heads) / len(sample)

    def over_naive(seconds: float) -> str:
        return f"{naive / seconds:.2f} x faster than naive"

    yield f"estimate, {len(heads)} heads", _collect(vit, images, IMPORTANCE[:1], {"importance": "estimate"}), over_naive
    yield f"exact, {len(heads)} heads", _collect(vit, images, IMPORTANCE, {}), over_naive


def _collect(vit: Vit, images: Tensor, names: list[str], options: dict[str, str]) -> Callable[[], object]:
    return lambda: collect(vit, images, names, **options)


# --- peers -----------------------------------------------------------------------------------------------------------


def peer_rows(bench: Bench, subjects: tuple[Subject, ...], batch_sizes: tuple[int, ...]) -> Iterator[list[str]]:
    """The same four measures of all heads, by Vitrail and by way of others' maps."""
    for subject in (each for each in subjects if each.has_peers):
        for precision in (torch.bfloat16, torch.float32):
            for batch_size in batch_sizes:
                yield from _peer_rows(bench, subject, precision, batch_size)


def _peer_rows(bench: Bench, subject: Subject, precision: torch.dtype, batch_size: int) -> Iterator[list[str]]:
    words = str(precision).removeprefix("torch.")
    vit = open_vit(plain_model(subject.name, **subject.options), device=bench.device, precision=words, weights="random")
    images = random_images(vit, batch_size)
    start = [subject.label, words, str(batch_size)]
    own = bench.seconds(lambda: collect(vit, images, REACH))
    yield [*start, "Vitrail", f"{1000 * own:.1f} ms", bench.peak_mib(lambda: collect(vit, images, REACH))]
    for peer in PEERS:
        try:
            run = four_measures(peer, plain_model(subject.name, bench.device, precision, **subject.options))
            taken = bench.seconds(lambda: run(images))  # noqa: B023
            memory = bench.peak_mib(lambda: run(images))  # noqa: B023
            yield [*start, peer, f"{1000 * taken:.1f} ms ({taken / own:.2f} x Vitrail)", memory]
        except ImportError:
            yield [*start, peer, "not installed here", "-"]
        except torch.OutOfMemoryError:
            yield [*start, peer, "memory does not suffice", "-"]


# --- a whole study ---------------------------------------------------------------------------------------------------


def study_rows(bench: Bench, n_images: int) -> Iterator[list[str]]:
    """Photographs from files to arrays on disk: loading, preprocessing, measures and writing."""
    from scale import write_photographs

    if time.perf_counter() > bench.deadline:
        raise TimeIsUp
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder) / "photographs", n_images)
        vit = open_vit("vitrail:photos", device=bench.device)
        began = time.perf_counter()
        vitrail.run_study(
            vit, Path(folder) / "photographs", out=Path(folder) / "study", measures=REACH, batch_size=min(64, n_images)
        )
        taken = time.perf_counter() - began
    yield ["vitrail:photos, 64 px, JPEG files of 96 px", "reading", f"{n_images / taken:,.0f} images/s"]


# --- checks ----------------------------------------------------------------------------------------------------------


def check_rows(bench: Bench, subjects: tuple[Subject, ...]) -> Iterator[list[str]]:
    """What must hold on every device."""
    yield from _logits_rows(bench, subjects)
    yield _study_row(bench)
    yield _training_row()


def _logits_rows(bench: Bench, subjects: tuple[Subject, ...]) -> Iterator[list[str]]:
    for subject in subjects:
        for precision in ("float32", "bfloat16"):
            module = plain_model(subject.name, **subject.options)
            vit = open_vit(module, device=bench.device, precision=precision, weights="random")
            images = random_images(vit, 4)
            seen: list[int] = []
            readers = Readers(attention=lambda attention: seen.append(attention.layer), output=lambda *_: None)  # noqa: B023
            tapped = vit.tap().read(images, readers)
            passed = torch.equal(tapped, vit.logits(images)) and set(seen) == set(range(vit.n_layers))
            yield [f"logits under the tap are bitwise the model's own: {subject.label}, {precision}", verdict(passed)]


def _study_row(bench: Bench) -> list[str]:
    """The same study on this device and, in chunks of other sizes, on the processor."""
    names = "heads,patches,tokens"
    with tempfile.TemporaryDirectory() as folder:
        studies = []
        for number, device in enumerate((bench.device, "cpu")):
            vit = open_vit("vitrail:photos", device=device)
            budget = fixed_budget(2**28) if number == 0 and not bench.on_gpu else nullcontext()
            with budget:
                study = vitrail.run_study(vit, "photos", out=Path(folder) / str(number), measures=names, limit=16)
            studies.append(study.load())
    declared = vitrail.measures()
    compared = [name for name in studies[0].data_vars if name in declared and _is_smooth(declared[name])]
    errors = {name: _relative_error(studies[0][name].values, studies[1][name].values) for name in compared}
    worst = max(errors, key=lambda name: errors[name])
    words = f"a study of {names} equals the processor's: {len(errors)} measures, the worst ({worst}) differs by"
    return [f"{words} {errors[worst]:.1e} of its spread (bound {BOUND})", verdict(errors[worst] <= BOUND)]


def _is_smooth(measure: Measure) -> bool:
    """Whether a small change of sums changes it a little: no classes, ranks or places of a maximum."""
    return measure.is_quantity and measure.dtype == "float32" and not measure.derived


def _relative_error(one: np.ndarray, two: np.ndarray) -> float:
    """The 99.9th percentile of the differences over the spread of the values."""
    here = np.isfinite(one) & np.isfinite(two)
    if not here.any():
        return 0.0
    spread = float(np.ptp(np.quantile(two[here], (0.01, 0.99)))) or 1.0
    return float(np.quantile(np.abs(one[here] - two[here]), 0.999)) / spread


def _training_row() -> list[str]:
    """A run that is ended after a checkpoint and begun again goes on from there to its end."""

    class Ended(Exception):
        pass

    with tempfile.TemporaryDirectory() as folder:
        described = recipe(Path(folder), run={"checkpoint_steps": 1, "epochs": 2})
        whole = train(described, Path(folder) / "whole")
        out, ended = Path(folder) / "ended", False

        def end(*_: object) -> None:
            if (out / "checkpoint.safetensors").is_file():
                raise Ended

        try:
            train(described, out, progress=end)
        except Ended:
            ended = True
        resumed = train(described, out)
    passed = ended and np.allclose(resumed.areas, whole.areas, atol=1e-3) and resumed.accuracy == whole.accuracy
    return ["training of a WinT goes on after it was ended, with the results of a whole run", verdict(passed)]


def verdict(passed: bool) -> str:
    """In capitals, to be seen."""
    return "passed" if passed else "FAILED"


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.5, help="when to stop beginning new rows")
    parser.add_argument("--short", action="store_true", help="tiny models on the processor")
    parser.add_argument("--batch-size", type=int, default=64)
    asked = parser.parse_args()
    if not asked.short and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here. `--short` shows on the processor that the command works.")
    warnings.simplefilter("ignore")
    bench = Bench("cpu" if asked.short else "cuda", asked.minutes)
    subjects, batch_size = (SHORT, 4) if asked.short else (SUBJECTS, asked.batch_size)
    device = torch.cuda.get_device_name() if bench.on_gpu else "the processor, short form"
    print(f"Vitrail on {device}, torch {torch.__version__}, batches of {batch_size}")
    checks: list[list[str]] = []

    def checked() -> Iterator[list[str]]:
        for row in check_rows(bench, subjects):
            checks.append(row)
            yield row

    columns = ["model", "precision", "work", "speed", "peak memory, MiB"]
    peer_columns = ["model", "precision", "batch", "way", "time of a batch", "peak memory, MiB"]
    try:
        table("Checks", ["what", "result"], checked())
        table("Models", columns, model_rows(bench, subjects, batch_size))
        sizes = (batch_size,) if asked.short else (16, 64, 256)
        table("The same four measures of all heads", peer_columns, peer_rows(bench, subjects, sizes))
        table("A study from files", ["images", "measures", "speed"], study_rows(bench, 16 if asked.short else 4096))
    except TimeIsUp:
        print(f"\nThe {asked.minutes:g} minutes are over: the rows that are missing were not measured.")
    if any(row[-1] != verdict(True) for row in checks):
        raise SystemExit("A check failed.")


if __name__ == "__main__":
    main()
