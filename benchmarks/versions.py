"""Is this version slower than another one? Processor time of the same studies by both, turn about.

    git worktree add .build/before COMMIT
    python benchmarks/versions.py .build/before/src

ViT-Tiny/16 with random weights, one thread, one process for each study. Processor time stands in for time on the clock,
so that a busy machine can measure it; the plain passes of each process are timed beside its study, and what is compared
is the cost of one more image (a study of n, then one of 2 n images): what a study costs once, such as asking the same
batch twice, is not in it. A study's measures are those that both versions have.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OWN = Path(__file__).parents[1] / "src"
STUDIES = {"heads": 8, "patterns": 16, "patches": 16, "tokens": 8}
"""Images of the smaller of two studies."""

RUN = """
import json, sys, tempfile, time, warnings
import torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
from vitrail import open_vit, run_study
measures, images, batch = sys.argv[1], sys.argv[2], 8
torch.manual_seed(0)
vit = open_vit("timm:vit_tiny_patch16_224", weights="random")
pixels = torch.randn(batch, 3, 224, 224)
with torch.no_grad():
    vit.model(pixels)
    begun = time.process_time()
    for _ in range(4):
        vit.model(pixels)
    plain = (time.process_time() - begun) / (4 * batch)
costs = []
for factor in (1, 2):
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as out:
        run_study(vit, images, out=out + "/study", measures=measures, batch_size=batch, limit=factor * int(sys.argv[3]),
                  masks=images + "-masks")
    costs.append(time.process_time() - begun)
print("RESULT", json.dumps([costs[1] - costs[0], plain]))
"""

OWN_NAMES = """
import json, sys
from vitrail.analysis import analyses
print(json.dumps([each.name for each in analyses()[sys.argv[1]].measures if not each.derived]))
"""
COMMON_NAMES = """
import json, sys
try:
    from vitrail.analysis import measures_named
except ImportError:
    from vitrail.measure import measures_named
from vitrail.errors import UsageError
common = []
for name in json.loads(sys.argv[1]):
    try:
        measures_named(name)
    except UsageError:
        continue
    common.append(name)
print(json.dumps(common))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="src folder of the other version")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    args = parser.parse_args()
    print("| study of | plain passes an image, before | now | now / before |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.only:
            folder = write_images(Path(scratch) / name, 2 * STUDIES[name])
            measures = names_in(args.before, name)
            costs: dict[Path, list[float]] = {args.before: [], OWN: []}
            for turn in range(args.rounds):
                for source in (args.before, OWN) if turn % 2 == 0 else (OWN, args.before):
                    costs[source].append(cost(source, measures, folder, STUDIES[name]))
            before, now = (statistics.median(costs[source]) for source in (args.before, OWN))
            spread = [one / other for one, other in zip(costs[OWN], costs[args.before], strict=True)]
            print(
                f"| {name} | {before:.1f} | {now:.1f} | {now / before:.2f} ({min(spread):.2f} to {max(spread):.2f}) |",
                flush=True,
            )


def names_in(source: Path, analysis: str) -> str:
    """The measures of an analysis of this version that the other one has, too."""
    own = run(OWN, OWN_NAMES, analysis).splitlines()[-1]
    return ",".join(json.loads(run(source, COMMON_NAMES, own).splitlines()[-1]))


def cost(source: Path, measures: str, images: Path, n_images: int) -> float:
    """Plain passes that a study costs for each image."""
    lines = run(source, RUN, measures, str(images), str(n_images)).splitlines()
    study, plain = json.loads(next(line for line in lines if line.startswith("RESULT"))[len("RESULT") :])
    return float(study / n_images / plain)


def run(source: Path, script: str, *arguments: str) -> str:
    """What a script prints, given one version's sources."""
    environment = {**os.environ, "PYTHONPATH": str(source.absolute()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def write_images(folder: Path, n_images: int) -> Path:
    """Noise, as files of 224 x 224 px, and beside the folder the instance ids of two objects on each."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    masks = folder.with_name(f"{folder.name}-masks")
    masks.mkdir()
    objects = np.zeros((224, 224), np.uint8)
    objects[32:112, 32:192] = 1
    objects[128:208, 96:176] = 2
    for index in range(n_images):
        pixels = np.random.default_rng(index).integers(0, 256, (224, 224, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        Image.fromarray(objects).save(masks / f"{index}.png")
    return folder


if __name__ == "__main__":
    main()
