"""Speed and memory of the heads room, as ratios within one run: machines differ, ratios travel.

    python benchmarks/speed.py                     ViT-Tiny/16 and ViT-B/16 with random weights
    python benchmarks/speed.py --weights FILE      ViT-Tiny with trained weights, for the rank correlation

Naive leave-one-out zeroes a head's slice of the input of the output projection with a hook and runs the whole model,
once per head. Rows are medians over interleaved repetitions. `--part` runs one table.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import timm
import torch
from peers import PEERS, four_measures, plain_model
from torch import Tensor, nn

from vitrail.analysis import analyses, make_collectors, unavailable
from vitrail.models.open import Vit, open_vit
from vitrail.stats import spearman
from vitrail.tap.tap import Readers

TINY, BASE = "vit_tiny_patch16_224", "vit_base_patch16_224"
REACH = ["attention_strength", "strength_entropy", "attention_distance", "prefix_share"]
LONG = "long sequences"
MODEL = ["head_probability", "head_divergence", "head_loss_change", "head_flip"]


def opened(name: str, weights: str | None, precision: str = "float32") -> Vit:
    """The model; random weights are the same in every process."""
    torch.manual_seed(0)
    return open_vit(f"timm:{name}", weights=weights or "random", precision=precision)


def batch(n_images: int, vit: Vit) -> Tensor:
    """Random images of the model's size."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn((n_images, 3, *vit.preprocessing.size), generator=generator)
    return images.to(next(vit.model.parameters()).dtype)


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call."""
    begun = clock()
    run()
    return clock() - begun


def ratios(
    one: Callable[[], object],
    two: Callable[[], object],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """one / two, run in turn."""
    one(), two()
    return [seconds(one, clock) / seconds(two, clock) for _ in range(repeats)]


def shown(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} .. {max(values):.2f})"


# --- leave-one-out ---------------------------------------------------------------------------------------------------


@contextmanager
def without_head(block: nn.Module, head: int) -> Iterator[None]:
    """A hook that zeroes a head before the output projection, as anyone would write it."""
    width = block.attn.head_dim

    def zero(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = args[0].clone()
        changed[..., head * width : (head + 1) * width] = 0
        return (changed,)

    handle = block.attn.proj.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def naive(model: nn.Module, images: Tensor, which: list[tuple[int, int]]) -> Tensor:
    """[head, image, class] logits, one whole pass per head."""
    found = []
    for layer, head in which:
        with without_head(model.blocks[layer], head):
            found.append(model(images))
    return torch.stack(found)


def collected(
    vit: Vit, images: Tensor, names: list[str], labels: np.ndarray | None = None, **options: str
) -> dict[str, np.ndarray]:
    """The measures `names` of one batch as a study computes them; the label is the model's own answer if not given."""
    each = make_collectors(vit, names, options)
    readers = Readers.join([one.readers() for one in each])
    replay, logits = vit.tap().record(images, readers, keep=any(one.replays for one in each))
    labels = logits.argmax(-1).cpu().numpy().astype(np.int64) if labels is None else labels
    found: dict[str, np.ndarray] = {}
    for one in each:
        found |= one.finish(vit.tap(), replay, logits, labels)
    return found


def sweep_rows(name: str, weights: str | None, n_images: int, repeats: int, every: int) -> list[list[str]]:
    """Exact and estimated importance against naive leave-one-out. `every`: naive runs each such head and is scaled."""
    vit, half = opened(name, weights), opened(name, weights, "bfloat16")
    images = batch(n_images, vit)
    whole = [(layer, head) for layer, n_heads in enumerate(vit.n_heads) for head in range(n_heads)]
    sampled = whole[::every]
    scale = len(whole) / len(sampled)
    runs = {
        "exact": lambda: collected(vit, images, MODEL),
        "exact, bfloat16": lambda: collected(half, images.bfloat16(), MODEL),
        "estimate": lambda: collected(vit, images, MODEL[:1], importance="estimate"),
    }
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {kind: [] for kind in runs}
    for _ in range(repeats):
        slow = seconds(lambda: naive(vit.model, images, sampled)) * scale
        for kind, run in runs.items():
            found[kind].append(slow / seconds(run))
    errors = _sweep_errors(vit, half, images, sampled)
    return [[name, kind, str(len(whole)), shown(found[kind]), errors[kind]] for kind in runs]


def _sweep_errors(vit: Vit, half: Vit, images: Tensor, sampled: list[tuple[int, int]]) -> dict[str, str]:
    from vitrail.tap.edits import Edit

    reference = naive(vit.model, images, sampled)
    largest = float(reference.abs().max())
    exact = vit.tap().record(images)[0]
    rough = half.tap().record(images.bfloat16())[0]
    worst = {"exact": 0.0, "exact, bfloat16": 0.0}
    for (layer, head), truth in zip(sampled, reference, strict=True):
        for kind, tap, replay in (("exact", vit.tap(), exact), ("exact, bfloat16", half.tap(), rough)):
            answer = tap.run_from(layer, replay, [Edit(layer, prune=(head,))]).float()
            worst[kind] = max(worst[kind], float((answer - truth).abs().max()))
    told = {kind: f"logits within {value:.1e} of {largest:.1f}" for kind, value in worst.items()}
    return told | {"estimate": "rank correlation below"}


# --- reading attention while it passes -------------------------------------------------------------------------------


def reach_rows(name: str, weights: str | None, n_images: int, repeats: int) -> list[list[str]]:
    """Strength, entropy, distance and prefix share against the plain pass of the same model in float32.

    One thread and processor time, in turn: what is asked is how much work reading adds.
    """
    vit = opened(name, weights)
    images = batch(n_images, vit)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for maps in ("model", "bfloat16"):
        run = lambda: collected(vit, images, REACH, maps=maps)  # noqa: B023, E731
        found = ratios(run, lambda: vit.logits(images), repeats, time.process_time)
        rows.append(
            [name, "float32" if maps == "model" else "maps in bfloat16", shown(found), _maps_error(vit, images, maps)]
        )
    torch.set_num_threads(n_threads)
    return rows


def _maps_error(vit: Vit, images: Tensor, maps: str) -> str:
    if maps == "model":
        return "-"
    truth, rough = collected(vit, images, REACH), collected(vit, images, REACH, maps=maps)
    error = {name: np.abs(rough[name] - truth[name]) / np.abs(truth[name]) for name in REACH}
    return ", ".join(f"{name} {np.nanmedian(each):.0e} (worst {np.nanmax(each):.0e})" for name, each in error.items())


# --- memory and peers ------------------------------------------------------------------------------------------------


def child(kind: str, n_images: int) -> None:
    """One way to go through `n_images` images in batches of 16, in a process of its own; prints seconds and peak."""
    run = CHILDREN[kind]()
    run(16)
    before = time.perf_counter()
    if kind == LONG:
        run(n_images)
    for _ in range(n_images // 16 if kind != LONG else 0):
        run(16)
    taken = time.perf_counter() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": taken, "peak_mib": peak}))


def _plain() -> Callable[[int], object]:
    vit = opened(TINY, None)
    return lambda n_images: vit.logits(batch(n_images, vit))


def _reach() -> Callable[[int], object]:
    vit = opened(TINY, None)
    return lambda n_images: collected(vit, batch(n_images, vit), REACH)


def _sweep() -> Callable[[int], object]:
    vit = opened(TINY, None)
    return lambda n_images: collected(vit, batch(n_images, vit), MODEL)


def _peer(peer: str) -> Callable[[], Callable[[int], object]]:
    """Another's maps of a batch, then the same four measures of them; nothing is kept."""

    def make() -> Callable[[int], object]:
        model = plain_model(TINY)
        measure = four_measures(peer, model)
        return lambda n_images: measure(torch.randn(n_images, 3, 224, 224))

    return make


def _long() -> Callable[[int], object]:
    """Two images of 3,137 tokens: the bare model's plain pass if asked for 16, heads and patches if for more."""
    torch.manual_seed(0)
    sizes = {"img_size": 448, "patch_size": 8, "depth": 2, "embed_dim": 96, "num_heads": 3, "num_classes": 3}
    model = timm.create_model(TINY, **sizes).eval()

    def measure() -> object:
        vit = open_vit(model, weights="random")
        both = [name for each in ("heads", "patches") for name in analyses()[each].measure_names]
        return collected(vit, batch(2, vit), [name for name in both if not unavailable(vit, [name], {})])

    def plain() -> object:
        with torch.no_grad():
            return model(torch.randn(2, 3, 448, 448))

    return lambda n_images: measure() if n_images > 16 else plain()


CHILDREN: dict[str, Callable[[], Callable[[int], object]]] = {
    LONG: _long,
    "plain pass": _plain,
    "Vitrail: strength, entropy, distance, prefix share": _reach,
    "Vitrail: exact importance of all heads": _sweep,
    **{f"{peer}, then the same 4 measures": _peer(peer) for peer in PEERS},
}


def long_rows() -> list[list[str]]:
    """Peak memory of opening and measuring with thousands of tokens, above the plain pass of the bare model."""
    peaks = []
    for n_images in (16, 17):
        command = [sys.executable, __file__, "--child", LONG, "--images", str(n_images)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(json.loads(done.stdout.splitlines()[-1])["peak_mib"])
    return [
        ["2 images of 3,137 tokens, 2 layers of 3 heads: opening, heads and patches", f"{peaks[1] - peaks[0]:+.0f} MiB"]
    ]


def memory_rows(sizes: tuple[int, ...]) -> list[list[str]]:
    """Time and peak memory of each way, each in a process of its own, as difference to the plain pass."""
    rows, plain = [], {}
    for kind in (each for each in CHILDREN if each != LONG):
        cells = []
        for size in sizes if "importance" not in kind else sizes[:1]:
            done = subprocess.run(
                [sys.executable, __file__, "--child", kind, "--images", str(size)], capture_output=True, text=True
            )
            if done.returncode:
                cells += [f"fails: {done.stderr.strip().splitlines()[-1][:90]}"]
                continue
            got = json.loads(done.stdout.splitlines()[-1])
            plain.setdefault(size, got)
            cells.append(
                f"{got['seconds'] / plain[size]['seconds']:.2f} x, {got['peak_mib'] - plain[size]['peak_mib']:+.0f} MiB"
            )
        rows.append([kind, *cells, *["-"] * (len(sizes) - len(cells))])
    return rows


def import_rows() -> list[list[str]]:
    """How long the library and the command take to come up (best of 5 processes)."""
    ways = {
        "import vitrail": [sys.executable, "-c", "import vitrail"],
        "vitrail --help": [str(Path(sys.executable).with_name("vitrail")), "--help"],
    }
    rows = []
    for name, command in ways.items():
        taken = [seconds(lambda: subprocess.run(command, capture_output=True, check=True)) for _ in range(5)]  # noqa: B023
        rows.append([name, f"{min(taken):.2f} s"])
    code = "import vitrail, vitrail.figures.heads, vitrail.app.server, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    return [*rows, ["figures and server without torch", "yes"]]


def rank_rows(weights: str, images: str, n_images: int) -> list[list[str]]:
    """Spearman over heads of the estimated and the exact mean change of loss and of probability, on photographs."""
    from vitrail.data import load_image, open_images, scan

    vit = opened(TINY, weights)
    source = open_images(images, n_classes=1000)
    entries = scan(source).images
    entries = entries[:: max(1, len(entries) // n_images)][:n_images]
    names = ["head_loss_change", "head_probability"]
    exact: dict[str, list[np.ndarray]] = {name: [] for name in names}
    rough: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for at in range(0, len(entries), 16):
        part = entries[at : at + 16]
        photos = vit.prepare([load_image(source, entry) for entry in part])
        labels = np.array([entry.label for entry in part])
        for found, options in ((exact, {}), (rough, {"importance": "estimate"})):
            for name, values in collected(vit, photos, names, labels, **options).items():
                found[name].append(values)
    rows = []
    for name in names:
        one, two = np.concatenate(exact[name]), np.concatenate(rough[name])
        halves = spearman(one[::2].mean(0).ravel(), one[1::2].mean(0).ravel())
        rows.append([name, str(len(one)), f"{spearman(one.mean(0).ravel(), two.mean(0).ravel()):.2f}", f"{halves:.2f}"])
    return rows


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A markdown table."""
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


def main() -> None:
    """All tables, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="safetensors of ViT-Tiny/16")
    parser.add_argument("--photographs", help="a folder of labelled photographs, for the rank correlation")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument(
        "--part", choices=["sweep", "base", "reach", "memory", "long", "import", "rank"], action="append"
    )
    parser.add_argument("--child", choices=list(CHILDREN))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if asked.child:
        child(asked.child, asked.images)
        return
    parts = asked.part or ["sweep", "base", "reach", "memory", "long", "import", "rank"]
    columns = ["model", "way", "heads", "times faster than naive float32", "against naive"]
    if "sweep" in parts:
        table("Importance, ViT-Tiny/16", columns, sweep_rows(TINY, asked.weights, 16, 3, 1))
    if "base" in parts:
        table("Importance, ViT-B/16 (naive: every 12th head, scaled)", columns, sweep_rows(BASE, None, 4, 1, 13))
    if "reach" in parts:
        rows = reach_rows(TINY, asked.weights, 16, 15) + reach_rows(BASE, None, 4, 5)
        table("Reading attention in passing", ["model", "precision", "time / plain pass", "relative error"], rows)
    if "memory" in parts:
        table("Time and peak memory over the plain pass", ["way", "64 images", "256 images"], memory_rows((64, 256)))
    if "long" in parts:
        table("Long sequences", ["what", "peak memory over the plain pass"], long_rows())
    if "import" in parts:
        table("Coming up", ["what", "time"], import_rows())
    if "rank" in parts and asked.weights and asked.photographs:
        rows = rank_rows(asked.weights, asked.photographs, asked.images)
        columns = ["measure", "photographs", "estimate and exact", "exact on one half and on the other"]
        table("Rank correlation (Spearman over 36 heads)", columns, rows)


if __name__ == "__main__":
    main()
