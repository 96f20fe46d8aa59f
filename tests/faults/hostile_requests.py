"""Requests that no page sends, as raw bytes: the same ones for the same seed, one kind after the other."""

import io
import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib.parse import quote

from PIL import Image

__all__ = ["ROUTES", "Answer", "complaint", "hostile_requests", "send"]

ROUTES = (
    "/api/study",
    "/api/images",
    "/api/array/strength_entropy",
    "/api/summary/head_probability",
    "/api/findings",
    "/api/findings/heads",
    "/api/curves",
    "/api/why?layer=0&head=0",
    "/api/live",
    "/api/live/attention/0?layer=0&head=0",
    "/api/live/maps/0",
    "/api/live/modes/0?layer=0&head=0",
    "/api/maps/importance-pca",
    "/api/look",
    "/api/look/0",
    "/api/look/0/stream?analyses=base",
    "/api/look/0/probability",
    "/api/what_if",
    "/api/what_if/token_drift?layer=0",
    "/api/patterns",
    "/api/patterns/0",
    "/api/patterns/map/patch",
    "/api/compare",
    "/api/compare/0",
    "/api/compare/0/image/0",
    "/api/compare/0/image/0/probability",
    "/api/compare/0/change",
    "/thumb/0",
    "/photo/0",
    "/",
)
"""Every route of the server, with values that it answers; routes that a body goes to are among them."""

ODD_NAMES = (
    "class_names", "image", "modes", "<U5", "float128", "int64", "object", "V8", "__class__", "../study.json",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "a" * 4000, "\N{SNOWMAN}", "nan", "thumbnail", "patch_cluster_map",
)  # fmt: skip

ODD_INDICES = (
    "-1", "1e3", "٣", "99999999999999999999", "0x10", "NaN", "", " 0", "0;1", "1.0", "9" * 4000, "0&layer=1",
    str(2**63), str(-(2**63)), "u", "u" + "f" * 16, "%00", "None", "True", "[]",
)  # fmt: skip

ODD_ORIGINS = (
    "null", "http://[", "http://[::1", "//", "file://", "http://127.0.0.1:99999999", "\x7f", "http://evil.example",
    "http://127.0.0.1@evil.example", "chrome-extension://x", "a" * 5000,
)  # fmt: skip

ODD_HOSTS = ("", "evil.example", "[::1", "127.0.0.1.evil.example", "0.0.0.0", "localhost@evil.example", "a" * 5000)

NAMED = (
    "/api/array/",
    "/api/maps/",
    "/api/summary/",
    "/api/findings/",
    "/api/live/attention/",
    "/api/look/",
    "/api/look/0/",
    "/api/what_if/",
    "/api/patterns/",
    "/api/patterns/map/",
    "/api/compare/",
    "/api/compare/0/",
    "/api/compare/0/image/",
    "/thumb/",
    "/photo/",
    "/",
)
"""Where a name or an index of an image goes into the path."""

INDEXED = (
    "/api/array/strength_entropy",
    "/api/summary/head_probability",
    "/api/why",
    "/api/live/modes/0",
    "/api/look/0/probability",
    "/api/look/0/stream",
)

ODD_CHANGES = (
    {}, {"image": "0"}, {"image": None}, {"image": ["0"]}, {"image": "9" * 4000}, {"image": "\ud800"},
    {"heads_off": [[0, 2**70]]}, {"heads_off": [[-1, 0]]}, {"heads_off": [[True, 0]]}, {"heads_off": [0] * 6000},
    {"heads_off": {"0": 0}}, {"modes": [[0, 0, 99]]}, {"modes": [[0, 0, "2"]]}, {"patches": [2**70]},
    {"patches": [-1, 0.5]}, {"patches": list(range(5_000))}, {"how": "\ud800", "patches": [0]}, {"how": 7},
    {"how": "removed", "patches": list(range(196))}, {"\ud800": 1}, {"unknown" * 20: 1}, {"seed": -1},
    {"seed": 2**64, "how": "shuffled", "patches": [0]}, {"windows": [{"layer": 0, "sides": [2**70, 0, 0, 0]}]},
    {"windows": [{"layer": 0, "sides": [-1, -1, -1, -1]}]}, {"windows": [{"layer": 99, "sides": [0, 0, 1, 1]}]},
    {"windows": [{"layer": 0, "head": 99, "patch": 2**40, "sides": [1, 1, 1, 1]}]}, {"windows": [[]]},
    {"windows": [{"sides": None}]}, {"windows": [{"layer": 0, "\ud800": 0, "sides": [0, 0, 1, 1]}]},
)  # fmt: skip

LONGEST_ANSWER_S = 90
"""A body that does not come is refused after a minute."""


class Answer(NamedTuple):
    """What came back: status 0 where the connection was closed without an answer."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float


def hostile_requests(seed: int, n_requests: int) -> Iterator[tuple[str, bytes]]:
    """Makes requests.

    Args:
        seed: Any number.
        n_requests: How many.

    Yields:
        The kind of a request, and its bytes.
    """
    chance = random.Random(seed)
    for number in range(n_requests):
        kind, make = list(_KINDS.items())[number % len(_KINDS)]
        yield kind, make(chance)


def send(host: str, port: int, content: bytes, timeout_s: float = LONGEST_ANSWER_S) -> Answer:
    """Sends bytes over a connection of their own and reads until it is closed.

    Raises:
        TimeoutError: The server neither answers nor closes.
    """
    start = time.monotonic()
    received = b""
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        try:
            connection.sendall(content)
            if b"\r\n\r\n" not in content:  # the server waits for the rest, and is told that there is none
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(2**16):
                received += piece
        except TimeoutError:
            raise
        except OSError:  # reset or closed: the server had enough before all was sent
            pass
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    status = int(lines[0].split()[1]) if lines[0].startswith("HTTP/") else 0
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return Answer(status, headers, body, time.monotonic() - start)


def complaint(answer: Answer) -> str:
    """What is wrong with an answer to a hostile request; empty if nothing is.

    A refusal is a sentence of the server's own with its security headers, or the protocol's own 400 for bytes that are
    no HTTP. A connection may be closed without an answer. An answer of 500 is a fault.
    """
    if answer.status >= 500 and answer.status != 503:
        return f"status {answer.status}: {answer.body[:200]!r}"
    if answer.status == 0 or (answer.status == 400 and b"Invalid HTTP request" in answer.body):
        return ""
    if "default-src 'self'" not in answer.headers.get("content-security-policy", ""):
        return f"status {answer.status} without the security headers"
    if answer.status >= 400 and answer.headers.get("content-type") == "application/json" and answer.body:
        return "" if json.loads(answer.body)["error"] else f"status {answer.status} without a sentence"
    return "" if answer.status < 400 or not answer.body else f"status {answer.status} that is no sentence"


# --- the kinds ---


def _http(
    target: str, method: str = "GET", body: bytes | None = None, host: str = "127.0.0.1", **headers: str
) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body is not None and "Content_Length" not in headers and "Transfer_Encoding" not in headers:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + (body or b"")


def _odd_name(chance: random.Random) -> bytes:
    route = chance.choice(NAMED)
    return _http(route + quote(chance.choice(ODD_NAMES), safe="%/.<"))


def _odd_index(chance: random.Random) -> bytes:
    key = chance.choice(["image", "layer", "head", "over", "token", "patch", "channel", "analysis", "analyses"])
    route = chance.choice(INDEXED)
    return _http(f"{route}?{key}={quote(chance.choice(ODD_INDICES), safe='%&;[]')}")


def _odd_origin(chance: random.Random) -> bytes:
    return _http(chance.choice(ROUTES), Origin=chance.choice(ODD_ORIGINS))


def _odd_host(chance: random.Random) -> bytes:
    return _http(chance.choice(ROUTES), host=chance.choice(ODD_HOSTS))


def _odd_method(chance: random.Random) -> bytes:
    method = chance.choice(
        ["PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "OPTIONS", "HEAD", "POST", "GE\tT", "X" * 300]
    )
    return _http(chance.choice(ROUTES), method, b"x" if method == "POST" else None)


def _no_http(chance: random.Random) -> bytes:
    return chance.choice(
        [
            chance.randbytes(chance.randrange(1, 3000)),
            b"\x16\x03\x01\x02\x00" + chance.randbytes(512),  # as a browser that was given https://
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nA" + b"a" * 200_000 + b": b\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nno colon\r\n\r\n",
            b"GET /\x00 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        ]
    )


def _deep_json(chance: random.Random) -> bytes:
    depth = chance.choice([50, 1_000, 100_000])
    opening, closing = chance.choice([("[", "]"), ('{"images":', "}")])
    body = (opening * depth + "0" + closing * depth * chance.randrange(2)).encode()
    route = chance.choice(["/api/summary/strength_entropy", "/api/what_if"])
    return _http(route, "POST", body, Content_Type="application/json")


def _odd_images(chance: random.Random) -> bytes:
    listed = chance.choice(
        [[], [-1], [2**70], [0.5], ["0"], [True], None, [None], {"0": 1}, list(range(400_000)), [[0]], "0" * 1000]
    )
    body = chance.choice([json.dumps({"images": listed}), json.dumps(listed), '{"images": [1e400]}', "[" + "9" * 9000])
    return _http("/api/summary/strength_entropy", "POST", body.encode("utf-8", "surrogatepass"))


def _odd_changes(chance: random.Random) -> bytes:
    """Bodies of what if: heads, patches and windows that are not there, or that are none."""
    route = chance.choice(["/api/what_if", "/api/what_if/token_drift?layer=0", "/api/what_if/attention_after?layer=0"])
    return _http(route, "POST", json.dumps({"image": "0", **chance.choice(ODD_CHANGES)}).encode())


def _no_utf8(chance: random.Random) -> bytes:
    route = chance.choice(["/api/summary/strength_entropy", "/api/what_if"])
    return _http(route, "POST", chance.randbytes(chance.randrange(1, 5000)))


def _odd_length(chance: random.Random) -> bytes:
    body = b"x" * 10
    odd = chance.choice(
        [
            {"Content_Length": "-1"},
            {"Content_Length": "9" * 4000},
            {"Content_Length": str(40 * 2**20)},
            {"Content_Length": "1e3"},
            {"Content_Length": "5"},
            {"Transfer_Encoding": "chunked"},
            {"Transfer_Encoding": "gzip, identity"},
            {"Expect": "100-continue", "Content_Length": str(2**40)},
        ]
    )
    route = chance.choice(["/api/summary/strength_entropy", "/api/look", "/api/what_if"])
    return _http(route, "POST", body, **odd)


def _upload(chance: random.Random) -> bytes:
    """An upload that is no photograph, or one that unfolds."""
    file = io.BytesIO()
    sides = chance.choice([(60_000, 1), (1, 60_000), (7_000, 9_000), (9_000, 9_000), (2, 2)])
    Image.new("1", sides).save(file, "PNG")
    whole = file.getvalue()
    body = chance.choice([whole, whole[: len(whole) // 2], chance.randbytes(2000), b"GIF89a", b""])
    return _http("/api/look", "POST", body)


def _token(chance: random.Random) -> bytes:
    cookie = chance.choice(["vitrail_token_80=\x80", "vitrail_token_80=" + "a" * 9000, "; ; =", "vitrail_token_80"])
    bearer = chance.choice(["Bearer ", "Bearer \x7f", "Basic !!!", "a" * 9000])
    return _http(chance.choice(ROUTES), Cookie=cookie, Authorization=bearer)


_KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "odd name": _odd_name,
    "odd index": _odd_index,
    "odd origin": _odd_origin,
    "odd host": _odd_host,
    "odd method": _odd_method,
    "no HTTP": _no_http,
    "deep JSON": _deep_json,
    "odd list of images": _odd_images,
    "odd changes": _odd_changes,
    "no UTF-8": _no_utf8,
    "odd length": _odd_length,
    "upload": _upload,
    "odd token": _token,
}
