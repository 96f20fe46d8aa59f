"""Tiny training runs, one after another, each in forks of this process: what all of them need is loaded once.

    python -m wint.forked_runs DATA '[["whole", OUT, CHANGES], ["killed", OUT, CHANGES], ["two", OUT, CHANGES]]'

"whole" runs to the end; "killed" ends by SIGKILL as soon as it has written another checkpoint; "two" shares the work
between two processes. Started in a process of its own, which has no threads and does not check shapes.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitrail.wint.train import train
from wint.tiny_runs import recipe


def fork(work: Callable[[], object], **environment: str) -> int:
    """The id of a process that does the work and ends with status 0, or 1 if it failed."""
    child = os.fork()
    if child != 0:
        return child
    os.environ.update(environment)
    try:
        work()
    except BaseException:  # noqa: BLE001 - printed, and the fork must not return from here
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def succeed(*children: int) -> None:
    """Waits for processes; raises if one failed."""
    for child in children:
        status = os.waitpid(child, 0)[1]
        if status != 0:
            raise SystemExit(f"a run ended by itself with status {status}")


def kill_after_a_checkpoint(child: int, checkpoint: Path, before: int) -> None:
    """Kills a run when its checkpoint is another than `before`; raises if it ended by itself."""
    while modified(checkpoint) == before:
        if os.waitpid(child, os.WNOHANG)[0] != 0:
            raise SystemExit("a run ended before it could be killed")
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    if os.WTERMSIG(os.waitpid(child, 0)[1]) != signal.SIGKILL:
        raise SystemExit("a run ended before it could be killed")


def modified(file: Path) -> int:
    return file.stat().st_mtime_ns if file.is_file() else 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def main(data: Path, runs: list[tuple[str, str, dict[str, dict[str, Any]]]]) -> None:
    for kind, out, changes in runs:

        def work(out: str = out, changes: dict[str, dict[str, Any]] = changes) -> object:
            return train(recipe(data, **changes), Path(out))

        if kind == "whole":
            succeed(fork(work))
        elif kind == "killed":
            checkpoint = Path(out) / "checkpoint.safetensors"
            before = modified(checkpoint)
            kill_after_a_checkpoint(fork(work), checkpoint, before)
        else:  # as torchrun starts them
            shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            succeed(*(fork(work, RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2", **shared) for rank in ("0", "1")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
