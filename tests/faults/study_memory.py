"""The memory that a study of large photographs takes above its model.

    python tests/faults/study_memory.py [--model timm:vit_tiny_patch16_224] [--images 32] [--large 4]

The model has random weights. Some photographs have as many pixels as a study reads, in the forms that take the most to
decode. Ends with an error if the study takes more than 1.5 GB above what the process has once the model is open.
"""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from memory import peak_growth
from PIL import Image

MOST_BYTES = 1.5e9
LARGE_SIDES = (10_000, 8_000)
LARGE_MODES = ("RGB", "RGBA", "I;16", "L")


def main() -> None:
    """Writes the photographs, opens the model and studies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="timm:vit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--large", type=int, default=len(LARGE_MODES))
    parser.add_argument("--measures", default="heads,patches,tokens")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    from vitrail import open_vit, run_study
    from vitrail.models.noise import noise_images

    with tempfile.TemporaryDirectory() as folder:
        _write_photographs(Path(folder) / "photographs", asked.images, asked.large)
        vit = open_vit(asked.model, weights="random")
        vit.logits(noise_images(vit, 2))  # what the libraries load with the first pass is no part of the study

        def study() -> None:
            run_study(vit, Path(folder) / "photographs", out=Path(folder) / "study", measures=asked.measures)

        growth = peak_growth(study)
    pixels = LARGE_SIDES[0] * LARGE_SIDES[1] / 1e6
    print(f"{asked.model}, {asked.measures}: {asked.images} photographs, {asked.large} of {pixels:.0f} megapixels:")
    print(f"{growth / 1e9:.2f} GB above the open model")
    if growth > MOST_BYTES:
        raise SystemExit(f"that is more than {MOST_BYTES / 1e9} GB")


def _write_photographs(folder: Path, n_images: int, n_large: int) -> None:
    folder.mkdir()
    for index in range(n_images - n_large):
        pixels = np.random.default_rng(index).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{index:03d}.jpg")
    for index in range(n_large):
        mode = LARGE_MODES[index % len(LARGE_MODES)]
        large = Image.new(mode, LARGE_SIDES, 40_000 if mode == "I;16" else None)
        large.paste(60_000 if mode == "I;16" else "white", (0, 0, 4_000, 4_000))
        large.save(folder / f"large_{index}.png", compress_level=1)


if __name__ == "__main__":
    main()
