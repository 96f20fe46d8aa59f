"""Runs a study to its end, then again and again killed at random moments until it is finished too.

    python killed.py PHOTOS WHOLE PIECES SEED

Everything is loaded once; each run is a fork, so that kills fall into the study and not into the imports. Prints how
many parts were complete after each kill. Started by test_kill.py in a process of its own, which has no threads yet.
"""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

torch.set_num_threads(1)

import sklearn.manifold  # noqa: E402, F401 - loaded here, or every fork would spend its time on that
from tiny_studies import BATCH_SIZE, tiny_vit  # noqa: E402

from vitrail.study import planning  # noqa: E402
from vitrail.study.run import run_study  # noqa: E402

N_KILLS = 4


def in_fork(work: Callable[[], object], killed_after_s: float | None) -> bool:
    """Whether the work came to its end; raises if it failed by itself."""
    child = os.fork()
    if child == 0:
        if killed_after_s is not None:
            threading.Timer(killed_after_s, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - told, and the fork must not return from here
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status != 0:
        raise SystemExit(f"a run ended by itself with status {status}")
    return True


def main(photos: str, whole: str, pieces: str, seed: str) -> None:
    planning.PART_IMAGES = BATCH_SIZE
    vit, chance = tiny_vit(), random.Random(seed)

    def study(out: str) -> Callable[[], object]:
        return lambda: run_study(vit, photos, out=out, batch_size=BATCH_SIZE)

    began = time.monotonic()
    in_fork(study(whole), None)
    duration = time.monotonic() - began
    for _ in range(N_KILLS):
        if in_fork(study(pieces), chance.uniform(0.05, 0.4) * duration):
            break
        print(len(list(Path(pieces).glob("parts/*.json"))))
    in_fork(study(pieces), None)


if __name__ == "__main__":
    main(*sys.argv[1:])
