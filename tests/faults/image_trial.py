"""Decodes broken images one by one, as a study's scan and the page's uploads do.

    python tests/faults/image_trial.py [--seeds 20]

Ends with an error at a fault. Run by test_broken_images.py in a short form.
"""

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from broken_images import broken_images

from vitrail.data import MAX_PIXELS, decode_image
from vitrail.errors import BadImage

__all__ = ["ImageTrial", "try_images"]

LONGEST_REASON = 300
"""Characters: a reason stands in a line of the report, beside the file's name."""


@dataclass
class ImageTrial:
    """What became of broken images.

    Attributes:
        n_decoded: Images that gave a picture.
        n_refused: Images that were refused with a reason.
        faults: What went wrong: other errors, reasons that are no sentence, pictures beyond the cap.
        slowest_s: The longest time of one image, in seconds of the processor.
    """

    n_decoded: int = 0
    n_refused: int = 0
    faults: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    @property
    def n_images(self) -> int:
        """Images that were tried."""
        return self.n_decoded + self.n_refused + len(self.faults)


def try_images(seeds: Iterable[int], only: str = "") -> ImageTrial:
    """Decodes all broken images of some seeds.

    Args:
        seeds: Their seeds.
        only: A part of the names of those that are tried; empty for all.

    Returns:
        What became of them.
    """
    trial = ImageTrial()
    for seed in seeds:
        for name, content in broken_images(seed):
            if only in name:
                _try_image(f"{name} of seed {seed}", content, trial)
    return trial


def _try_image(name: str, content: bytes, trial: ImageTrial) -> None:
    start = time.process_time()
    try:
        picture = decode_image(content)
    except BadImage as reason:
        trial.n_refused += 1
        if not _is_sentence(str(reason)):
            trial.faults.append(f"{name}: the reason is no sentence: {str(reason)[:500]!r}")
    except Exception as error:  # noqa: BLE001 - any other error is what is looked for
        trial.faults.append(f"{name}: {error!r}")
    else:
        trial.n_decoded += 1
        if picture.mode != "RGB" or not 0 < picture.width * picture.height <= MAX_PIXELS:
            trial.faults.append(f"{name}: {picture.mode} of {picture.size} pixels")
    trial.slowest_s = max(trial.slowest_s, time.process_time() - start)


def _is_sentence(reason: str) -> bool:
    """One line that can be printed, without addresses of objects."""
    return reason.isprintable() and 10 < len(reason) < LONGEST_REASON and "0x" not in reason


def main() -> None:
    """Tries the images of some seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    trial = try_images(range(parser.parse_args().seeds))
    print(
        f"{trial.n_images:,} broken images: {trial.n_decoded} decoded, {trial.n_refused} refused in a sentence, the "
        f"slowest in {trial.slowest_s:.1f} s"
    )
    if trial.faults:
        raise SystemExit("\n".join(trial.faults))


if __name__ == "__main__":
    main()
