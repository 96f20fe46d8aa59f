"""Several workers on one study, killed at random moments and started again, give the bytes of one process.

    python tests/faults/kill_workers.py OUT                      four workers, 20 kills, every analysis
    python tests/faults/kill_workers.py OUT --on s3              the same in a bucket of an S3-compatible server (moto)
    python tests/faults/kill_workers.py OUT --on ray             the same with four actors of Ray

Everything is loaded once; each worker is a fork, so that kills fall into the study and not into the imports (Ray starts
its actors anew itself). Kills are spread over the work: each is due when a random share of the parts is complete, some
after the last part, and falls a random while later. OUT gets photographs, a small model, the study of one process and
that of the workers. Prints how many parts were complete at each kill, and ends with an error if a byte differs. Run by
test_kill_workers.py in a short form.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

import sklearn.manifold  # noqa: E402, F401 - loaded here, or every fork would spend its time on that

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from forks import ended, start  # noqa: E402
from tiny_studies import BATCH_SIZE, folder_bytes, write_model, write_photos  # noqa: E402

from vitrail.models.open import open_vit  # noqa: E402
from vitrail.study.object_store import open_objects  # noqa: E402
from vitrail.study.run import run_study  # noqa: E402

BUCKET = "s3://bucket/study"

AFTER_THE_LAST_PART = 0.25
"""How many kills fall after the last part, for each that falls before it."""


@contextmanager
def s3_server() -> Iterator[Any]:
    """An S3-compatible server in a process of its own, with an empty bucket; gives a client of it."""
    import boto3

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    credentials = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    os.environ.update(credentials, AWS_ENDPOINT_URL=url)
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.1)
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        client.create_bucket(Bucket="bucket")
        yield client
    finally:
        server.kill()
        server.wait()


class Kills:
    """When workers are killed.

    Args:
        n_kills: How many there are in all.
        n_parts: Of the study.
        n_complete: Counts the parts that are complete.
        longest_s: Between two looks at the workers, in seconds.
    """

    def __init__(self, n_kills: int, n_parts: int, n_complete: Callable[[], int], longest_s: float) -> None:
        self._due = sorted(random.uniform(0, n_parts * (1 + AFTER_THE_LAST_PART)) for _ in range(n_kills))
        self._n_parts, self._n_complete, self._longest_s = n_parts, n_complete, longest_s
        self.n_kills = 0

    def wait(self) -> None:
        """Sleeps for a random while."""
        time.sleep(random.uniform(0.02, 1) * self._longest_s)

    def kill_if_due(self, processes: Sequence[int]) -> int | None:
        """Kills one of these processes if the time has come; its number."""
        n_complete = self._n_complete()
        if self.n_kills == len(self._due) or not processes or min(self._due[self.n_kills], self._n_parts) > n_complete:
            return None
        killed = random.choice(processes)
        os.kill(killed, signal.SIGKILL)
        self.n_kills += 1
        print("kill", self.n_kills, "complete parts", n_complete, flush=True)
        return killed


def kill_forks(study: Callable[[], object], n_workers: int, kills: Kills) -> None:
    """Lets forks work until all have come to their end."""
    children = [start(study) for _ in range(n_workers)]
    while children:
        kills.wait()
        children = [child for child in children if not ended(child, wait=False)]
        killed = kills.kill_if_due(children)
        if killed is not None:
            ended(killed, wait=True)
            children[children.index(killed)] = start(study)


def kill_actors(study: Callable[[], object], kills: Kills) -> None:
    """Lets actors of Ray work until the study is done."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            study()
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        kills.wait()
        kills.kill_if_due([each for each in descendants(os.getpid()) if _command(each).startswith("ray::_Worker.run")])
    if failures:
        raise failures[0]


def descendants(process: int) -> list[int]:
    """The processes that a process started, and those that they did."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found = [process]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text().partition("\0")[0]
    except OSError:
        return ""


def main() -> None:
    """Makes both studies and compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--on", choices=["folder", "s3", "ray"], default="folder")
    parser.add_argument("--measures", default="heads,patches,patterns,tokens")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", default="0")
    asked = parser.parse_args()
    random.seed(asked.seed)
    asked.out.mkdir(parents=True, exist_ok=True)
    photos, model = asked.out / "photos", write_model(asked.out / "model")
    if not photos.exists():
        write_photos(photos, asked.images)
    vit = open_vit(model)

    def study(out: object, **options: object) -> None:
        sizes = {"batch_size": BATCH_SIZE, "part_images": BATCH_SIZE}
        run_study(vit, photos, out=out, measures=asked.measures, **sizes, **options)  # type: ignore[arg-type]

    whole, shared = asked.out / "whole", asked.out / asked.on
    began = time.monotonic()
    ended(start(lambda: study(whole)), wait=True)
    duration = time.monotonic() - began

    def kills_of(n_complete: Callable[[], int]) -> Kills:
        return Kills(asked.kills, -(-asked.images // BATCH_SIZE), n_complete, duration / (2 * max(1, asked.kills)))

    def n_files() -> int:
        return len(list(shared.glob("parts/0*.json")))

    if asked.on == "s3":
        with s3_server() as client:
            # obstore has threads, which a fork would not have: it is left alone until the last fork has ended
            kills = kills_of(lambda: client.list_objects_v2(Bucket="bucket", Prefix="study/parts/0")["KeyCount"])
            kill_forks(lambda: study(BUCKET), asked.workers, kills)
            objects = open_objects(BUCKET)
            objects.pull(values=True)
            keys = {str(each["path"]) for page in objects.store.list() for each in page}
            shared = objects.folder
            if keys != folder_bytes(shared).keys():
                raise SystemExit(f"objects that are no study's: {sorted(keys ^ folder_bytes(shared).keys())[:5]}")
    elif asked.on == "ray":
        kills = kills_of(n_files)
        kill_actors(lambda: study(shared, engine="ray", n_workers=asked.workers), kills)
    else:
        kills = kills_of(n_files)
        kill_forks(lambda: study(shared, worker=True), asked.workers, kills)
    differing = {name for name, _ in set(folder_bytes(whole).items()) ^ set(folder_bytes(shared).items())}
    if differing:
        raise SystemExit(f"{len(differing)} files differ: {sorted(differing)[:5]}")
    print(f"the same {len(folder_bytes(whole))} files after {kills.n_kills} kills")


if __name__ == "__main__":
    main()
