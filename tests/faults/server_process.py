"""`vitrail open` in a process of its own, as a user has it, with what it printed."""

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from hostile_requests import Answer, send

__all__ = ["START_S", "PageServer", "page_server"]

START_S = 180
"""A model is opened meanwhile, on a machine that may be busy."""


@dataclass
class PageServer:
    """A server that listens."""

    process: "subprocess.Popen[bytes]"
    port: int
    log: IO[bytes]

    def send(self, content: bytes, **limits: float) -> Answer:
        """Sends raw bytes over a connection of their own."""
        return send("127.0.0.1", self.port, content, **limits)

    def get(self, path: str) -> Answer:
        """A request as the page makes it."""
        return self.send(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nConnection: close\r\n\r\n".encode())

    def post(self, path: str, body: bytes) -> Answer:
        """A request with a body as the page makes it."""
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nConnection: close\r\n"
        return self.send(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def printed(self) -> str:
        """Everything that the process has printed."""
        self.log.seek(0)
        return self.log.read().decode("utf-8", "replace")

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60) -> float:
        """Sends a signal and waits for the end; how many seconds it took."""
        start = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(timeout_s)
        return time.monotonic() - start


@contextmanager
def page_server(command: Sequence[str]) -> Iterator[PageServer]:
    """Starts a server on a free port, and ends it.

    Args:
        command: Arguments of Python that begin to serve and print the page's address.

    Yields:
        The server, once it answers.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, "-u", *command], stdout=log, stderr=subprocess.STDOUT)
        try:
            yield PageServer(process, _port(process, log), log)
        finally:
            process.kill()
            process.wait()


def _port(process: "subprocess.Popen[bytes]", log: IO[bytes]) -> int:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        log.seek(0)
        printed = log.read().decode("utf-8", "replace")
        if address := re.search(r"http://127\.0\.0\.1:(\d+)/", printed):
            return int(address.group(1))
        if process.poll() is not None:
            raise RuntimeError(f"the server ended before it listened:\n{printed}")
        time.sleep(0.05)
    raise TimeoutError(f"the server did not listen within {START_S} s")
