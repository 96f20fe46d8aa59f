"""What a training step of WinT costs beside its ViT's: steps of several runs taken in turn, on planted images.

    python benchmarks/wint.py                        1 M parameters, 32 px, compiled, bfloat16: as in docs/wint.md
    python benchmarks/wint.py --no-compile --precision no
    python benchmarks/wint.py --image-px 224 --patch-px 16 --width 384 --depth 12 --heads 6    (a ViT-S, on a GPU)
    python benchmarks/wint.py sparse                 a layer's attention: block-sparse kernel, its mask, and both
    python benchmarks/wint.py sparse --sides 56 112  the same of these grids

Runs: the ViT, WinT, WinT with a teacher that is shown a quarter of each batch, fixed windows, and hard windows
with the soft ones' gradient. On a CPU the time is that of one core. Each ratio is that of two steps taken one after the
other on the same batch. Writes docs/wint/steps.md. `sparse` prints what `python experiments/wint.py sparse` writes into
docs/wint/sparse.md: the same code, and nothing of a training.
"""

import argparse
import runpy
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from vitrail.wint.batches import Images
from vitrail.wint.folder import save
from vitrail.wint.recipe import Recipe, recipe_from
from vitrail.wint.train import _Session

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs/wint"
N_IMAGES, WARM = 512, 8
SETTINGS = ("precision", "compile")
START = [[0.4, 0.1, 0.1, 0.1], [0.1, 0.4, 0.1, 0.1], [0.1, 0.1, 0.4, 0.1], [0.1, 0.1, 0.1, 0.4]]
HALF = (0.5, 0.5, 0.5)
RUNS = {
    "ViT": {"model": {"windows": "none", "start": [[0.5] * 4]}},
    "WinT": {"windows": {"edges": "soft"}},
    "WinT with a teacher": {"windows": {"edges": "soft"}, "distillation": {"weight": 0.5, "warmup_share": 0.0}},
    "fixed windows": {"model": {"windows": "fixed", "start": [[2.0] * 4]}},
    "WinT, hard from the start": {"windows": {"edges": "hard", "hard_from": 0.0}},
}


def main() -> None:
    """Prints the table; that of steps is written, too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("steps", "sparse"), default="steps")
    parser.add_argument(
        "--sides", nargs="+", type=int, default=[], metavar="PATCHES", help="of square grids, for sparse"
    )
    for name, value in (("image", 32), ("patch", 4)):
        parser.add_argument(f"--{name}-px", type=int, default=value)
    for name, value in (("width", 128), ("depth", 6), ("heads", 4), ("batch", 64), ("steps", 60)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "sparse":
        crossover = runpy.run_path(str(ROOT / "experiments/wint.py"), run_name="experiments_wint")["crossover"]
        print(crossover(options.sides), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(text := measure(options, Path(folder)), flush=True)
    if options == parser.parse_args([]):
        (DOCS / "steps.md").write_text(text)


def measure(options: argparse.Namespace, folder: Path) -> str:
    """The table of one run of this script."""
    images = planted_images(options.image_px)
    sessions: dict[str, _Session] = {}
    for name in dict.fromkeys(("ViT", *options.only)):
        sessions[name] = begin(name, options, folder, images)
        if name == "ViT":
            save(sessions[name].module, folder / "teacher", [str(i) for i in range(10)], None, HALF, HALF)
    spent: dict[str, list[float]] = {name: [] for name in sessions}
    batches = sessions["ViT"].batches.from_step(0)
    for step in range(WARM + options.steps):
        images_of_step, labels_of_step = next(batches)
        for name, session in sessions.items():
            began = now()
            session._train_step(images_of_step, labels_of_step)
            spent[name].append(now() - began)
            session.step += 1
        if sys.stderr.isatty() or step % 10 == 0:
            print(f"step {step + 1} of {WARM + options.steps}", file=sys.stderr, flush=True)
    return table(options, {name: times[WARM:] for name, times in spent.items()})


def now() -> float:
    """Seconds of this process on a CPU, whoever shares the machine; of the clock on a GPU, when its work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def begin(name: str, options: argparse.Namespace, folder: Path, images: Images) -> _Session:
    """A run that has its model and is at its first step."""
    wanted = recipe_of(name, options, folder)
    AcceleratorState._reset_state()
    backend = "inductor" if options.compile else None
    accelerator = Accelerator(mixed_precision=options.precision, dynamo_backend=backend)
    torch.manual_seed(0)
    out = folder / name.replace(" ", "-")
    out.mkdir()
    return _Session(wanted, out, accelerator, images, images, None)


def planted_images(px: int) -> Images:
    """Noise with labels."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (N_IMAGES, px, px, 3), dtype=np.uint8)
    contents = [partial(Image.fromarray, each) for each in pixels]
    return Images("planted", contents, torch.arange(N_IMAGES) % 10, tuple(str(number) for number in range(10)))


def recipe_of(name: str, options: argparse.Namespace, folder: Path) -> Recipe:
    """One of the RUNS, for a schedule that this script never comes to the end of."""
    start = [START[head % len(START)] for head in range(options.heads)]
    shape = {"patch_px": options.patch_px, "width": options.width, "depth": options.depth, "heads": options.heads}
    own = RUNS[name]
    distillation = own.get("distillation", {})
    if distillation:
        distillation = {**distillation, "teacher": str(folder / "teacher"), "batch_share": 0.25}
    return recipe_from({
        "title": name, "expected": "", "cost": "",
        "data": {"train": "planted", "test": "planted", "image_px": options.image_px, "classes": 10},
        "model": {**shape, "class_token": False, "windows": "predicted", "start": start, **own.get("model", {})},
        "windows": own.get("windows", {}), "distillation": distillation,
        "run": {"epochs": 1000, "batch_size": options.batch} | {name: getattr(options, name) for name in SETTINGS},
    })  # fmt: skip


def table(options: argparse.Namespace, spent: dict[str, list[float]]) -> str:
    """Milliseconds and ratios."""
    grid = options.image_px // options.patch_px
    compiled = "compiled" if options.compile else "not compiled"
    precision = {"no": "float32", "bf16": "bfloat16"}[options.precision]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "one core of a CPU"
    lines = [
        "# What a step of training costs\n",
        f"`python benchmarks/wint.py`: {device}, torch {torch.__version__}, {precision}, {compiled}; "
        f"{options.batch} images of {grid} x {grid} patches, {options.depth} layers of {options.heads} heads, "
        f"width {options.width}. Medians of {options.steps} steps taken in turn, and their first and third quartile.\n",
        "| run | ms a step | times the ViT's |",
        "| --- | --- | --- |",
    ]
    for name, times in spent.items():
        ratios = [mine / theirs for mine, theirs in zip(times, spent["ViT"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        ratio = "" if name == "ViT" else f"{middle:.2f} ({low:.2f} .. {high:.2f})"
        lines.append(f"| {name} | {1000 * statistics.median(times):.0f} | {ratio} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
