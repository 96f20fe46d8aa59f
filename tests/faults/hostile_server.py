"""`vitrail open` with its model under hostile requests, many large uploads at once and stalled senders.

    python tests/faults/hostile_server.py [--requests 300]

The study is one of the model that comes with Vitrail, on its own photographs. Ends with an error if an answer is no
sentence, if the page does not go on, if a traceback was printed or if the server took more than 2 GB.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hostile_requests import complaint, hostile_requests
from memory import peak_memory
from PIL import Image
from server_process import START_S, PageServer, page_server

MOST_BYTES = 2e9
LARGE_SIDES = (8_000, 8_000)
"""As many pixels as an upload may have."""

N_LARGE, N_AT_ONCE = 10, 5


def main() -> None:
    """Makes a study, serves it and asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder) / "study"
        options = ["--measures", "heads,patches,tokens", "--limit", "16", "--out", study]
        command = [sys.executable, "-m", "vitrail", "study", "vitrail:photos", "vitrail:photos", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with page_server(["-m", "vitrail", "open", str(study), "--no-browser", "--port", "0"]) as server:
            _wait_for_model(server)
            at_start = peak_memory(server.process.pid)
            statuses: Counter[int] = Counter()
            slowest = 0.0
            with ThreadPoolExecutor(N_AT_ONCE) as threads:
                requests = list(hostile_requests(asked.seed, asked.requests))
                for (kind, content), answer in zip(
                    requests, threads.map(server.send, (content for _, content in requests)), strict=True
                ):
                    if fault := complaint(answer):
                        raise SystemExit(f"{kind}: {fault}\n{content[:500]!r}\n{server.printed()[-3000:]}")
                    statuses[answer.status] += 1
                    slowest = max(slowest, answer.seconds)
                large = _large_photograph()
                uploads = Counter(
                    answer.status for answer in threads.map(lambda _: server.post("/api/look", large), range(N_LARGE))
                )
            for path in ("/api/study", "/api/look/0/probability"):
                if (answer := server.get(path)).status != 200:
                    raise SystemExit(f"the page does not go on: {path} gives {answer.status} {answer.body[:300]!r}")
            peak = peak_memory(server.process.pid)
            seconds = server.stop()
            if "Traceback" in server.printed():
                raise SystemExit(server.printed())
    print(f"{asked.requests} requests, by status: {dict(sorted(statuses.items()))}; the slowest took {slowest:.1f} s")
    print(
        f"{N_LARGE} uploads of {LARGE_SIDES[0] * LARGE_SIDES[1] / 1e6:.0f} megapixels, {N_AT_ONCE} at once: {uploads}"
    )
    print(f"memory at most {peak / 1e9:.2f} GB ({at_start / 1e9:.2f} GB at the start); stopped within {seconds:.1f} s")
    if peak > MOST_BYTES:
        raise SystemExit(f"that is more than {MOST_BYTES / 1e9:.0f} GB")


def _wait_for_model(server: PageServer) -> None:
    """The page is served before its model is open, and would be tried without one."""
    deadline = time.monotonic() + START_S
    while (state := json.loads(server.get("/api/live").body)["state"]) != "ready":
        if state == "failed" or time.monotonic() > deadline:
            raise SystemExit(f"the model is not open: {state}\n{server.printed()[-3000:]}")
        time.sleep(0.2)


def _large_photograph() -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").resize(LARGE_SIDES).convert("RGB").save(file, "JPEG", quality=60)
    return file.getvalue()


if __name__ == "__main__":
    main()
