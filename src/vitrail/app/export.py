"""The page as one HTML file: a study's own answers are recorded into it, so that it opens without a server, offline.

What the page would ask is asked of the very application that serves it, in this process, and the answers are packed
into the file (`web/src/recorded.ts` reads them). Arrays go in whole; those with a value for each patch, and whatever
else is large, of some images only, as do photographs and, with the model at hand, attention.
"""

import asyncio
import base64
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np

from vitrail.app.live_queue import LiveModelProtocol
from vitrail.app.server import AppState, create_app
from vitrail.app.static_files import NOT_BUILT, built_page
from vitrail.errors import UsageError
from vitrail.outputs import local_path, refuse_foreign_file

__all__ = ["DEFAULT_IMAGES", "export_html", "export_page", "write_html"]

DEFAULT_IMAGES = 12
"""Images whose photographs, patches and attention go into a file."""

WHOLE_BYTES = 4 * 2**20
"""An array up to this size goes in of all images: a head's measure of 7,000 images of a ViT-B."""

MOST_THUMBNAILS = 20_000
"""More images than this go in without thumbnails: about 2 kB each."""

LARGEST_ATTENTION_BYTES = 24 * 2**20
"""All attention in a file, a byte a weight: four images of a ViT-B."""

FLOOR_SHARE = 1 / 16
"""Attention below this share of even attention is stored as 0: no view draws it."""

RECORDED = (
    "/api/study",
    "/api/images",
    "/api/array/{name}",
    "/api/summary/{name}",
    "/api/findings",
    "/api/findings/{analysis}",
    "/api/why",
    "/api/curves",
    "/api/patterns",
    "/api/patterns/{image}",
    "/api/patterns/map/{kind}",
    "/api/maps/{map}",
    "/api/live/attention/{image}",
    "/api/live/maps/{image}",
    "/api/compare/{study}",
    "/api/compare/{study}/image/{image}",
    "/api/compare/{study}/image/{image}/{measure}",
    "/api/compare/{study}/{variable}",
    "/thumb/{image}",
    "/photo/{image}",
)
"""Routes whose answers go into a file."""

NOT_RECORDED = {
    "/api/live": "the description of the study says that a file has no model behind it",
    "/api/live/modes/{image}": "six passes of the model for every head of every image",
    "/api/look": "needs the model",
    "/api/look/{image}": "needs the model",
    "/api/look/{image}/stream": "needs the model",
    "/api/look/{image}/{name}": "needs the model",
    "/api/what_if": "needs the model",
    "/api/what_if/{name}": "needs the model",
    "/api/compare": "the description of the study names the others",
}
"""The other routes, each with the reason. Every route of the application stands in one of the two lists."""

OF_PATCHES = (("layer", "patch"), ("layer", "token"), ("layer", "patch", "xy"), ("layer", "patch", "side"))
"""Dimensions of the measures that lie over a photograph, beside `image`."""

CODES = 255

MARK = b"vitrail-recording"
"""Words in every exported page: only such files are overwritten."""


def export_page(
    study: str | Path,
    out: str | Path,
    live: LiveModelProtocol | None = None,
    *,
    images: Sequence[int] | None = None,
    others: Sequence[str | Path] = (),
) -> Path:
    """Writes the page of a study as one HTML file.

    Args:
        study: The folder of the study.
        out: The file; or a folder, which then has the page as index.html.
        live: The model, for the attention of the images; None leaves attention out.
        images: Positions of the images whose photographs, patches and attention go in; None chooses.
        others: Studies of the same images, to compare with.

    Returns:
        The file.

    Raises:
        StudyError: The folder is no study.
        WeightsMismatch: The model has other weights than the study's.
        UsageError: An image is not there, the page is not built, or the file is somebody else's.
    """
    target = local_path(out)
    if target.suffix.lower() not in (".html", ".htm"):
        target = target / "index.html"
    refuse_foreign_file(target, MARK)
    return write_html(target, export_html(study, live, images=images, others=others))


def write_html(target: Path, html: str) -> Path:
    """Writes a page, with the folders that it lies in.

    Args:
        target: The file.
        html: The page.

    Returns:
        The file.

    Raises:
        UsageError: The disk does not take it.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"The page cannot be written to {target}: {error.strerror}; name another place.") from error
    return target


def export_html(
    study: str | Path,
    live: LiveModelProtocol | None = None,
    *,
    images: Sequence[int] | None = None,
    others: Sequence[str | Path] = (),
) -> str:
    """The page of a study as HTML that needs nothing else.

    Args:
        study: The folder of the study.
        live: The model, for the attention of the images; None leaves attention out.
        images: Positions of the images whose photographs, patches and attention go in; None chooses.
        others: Studies of the same images, to compare with.

    Returns:
        The page.

    Raises:
        StudyError: The folder is no study.
        WeightsMismatch: The model has other weights than the study's.
        UsageError: An image is not there, or the page is not built.
    """
    files = built_page()
    if "/index.html" not in files:
        raise UsageError(NOT_BUILT)
    recorder = _Recorder(create_app(study, live, others=others))
    recorder.state.in_commands = Path(study).resolve().name
    with ThreadPoolExecutor(1) as thread:  # a notebook's own thread runs an event loop already
        recording = thread.submit(lambda: asyncio.run(recorder.record(images))).result()
    return _inline(recording)


class _Recorder:
    """Asks an application what the page would ask."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.state: AppState = app.state.shared
        self.answers: dict[str, dict[str, Any]] = {}

    async def record(self, images: Sequence[int] | None) -> dict[str, Any]:
        """Everything that goes into the file."""
        study = json.loads((await self._ask("/api/study"))[1])
        chosen = _check_images(images, self.state.arrays.n_images) if images is not None else None
        await self._record_sentences(study)
        if chosen is None:
            chosen = self._choose_images(study)
        for name in self._arrays(study):
            await self._record_array(name, chosen)
        for image in chosen:
            await self._record(f"/photo/{image}", optional=True)
            await self._record(f"/api/patterns/{image}", optional=True)
        for path in ("/api/curves", "/api/patterns", "/api/patterns/map/patch", "/api/patterns/map/cls"):
            await self._record(path, optional=True)
        for each in study["maps"]:
            await self._record(f"/api/maps/{each['name']}")
        thumbnails = await self._thumbnails()
        maps = await self._record_attention(chosen)
        await self._record_comparisons(chosen)
        reason = f"This page is a file without the model behind it. Open the study: vitrail open {study['in_commands']}"
        if study["start"]["image"] not in chosen:  # the file opens with a photograph that it holds
            study["start"]["image"] = chosen[0]
        study |= {
            "live": {"state": "none", "reason": reason},
            "upload": {"bytes": 0, "pixels": 0},
            "recorded_maps": maps,
            "has_thumbnails": bool(thumbnails),
        }
        self._put("/api/study", {}, json.dumps(study).encode())
        await self._record("/api/images")
        return {"study": study["name"], "thumbnails": thumbnails, "answers": self.answers}

    async def _ask(self, path: str) -> tuple[dict[str, str], bytes]:
        """The headers and the body of an answer; a refusal is an error of ours, for only what is there is asked."""
        status, headers, body = await _ask(self.app, path)
        if status != 200:
            raise UsageError(f"{path} cannot be put into the page: {json.loads(body)['error']}")
        return headers, body

    async def _record(self, path: str, *, optional: bool = False) -> bytes:
        status, headers, body = await _ask(self.app, path)
        if status != 200 and not optional:
            raise UsageError(f"{path} cannot be put into the page: {json.loads(body)['error']}")
        if status == 200:
            self._put(path, headers, body)
        return body

    def _put(self, path: str, headers: dict[str, str], body: bytes, **more: Any) -> None:
        packer = zlib.compressobj(9, wbits=-15)
        data = base64.b64encode(packer.compress(body) + packer.flush()).decode()
        self.answers[path] = {"headers": {"content-type": "", **headers}, "data": data, **more}

    async def _record_sentences(self, study: dict[str, Any]) -> None:
        for analysis in json.loads(await self._record("/api/findings"))["analyses"]:
            await self._record(f"/api/findings/{analysis['name']}")
        if any(measure["dims"] == ["image", "layer", "head"] for measure in study["measures"].values()):
            for layer, n_heads in enumerate(study["n_heads"]):
                for head in range(n_heads):
                    await self._record(f"/api/why?layer={layer}&head={head}")

    def _choose_images(self, study: dict[str, Any]) -> list[int]:
        """The image that the page opens with, those that sentences name, and others evenly spaced."""
        named = [
            each["image"]
            for path, recorded in self.answers.items()
            if path.startswith("/api/findings/")
            for sentence in json.loads(zlib.decompress(base64.b64decode(recorded["data"]), wbits=-15))["sentences"]
            for each in sentence["images"]
        ]
        n = self.state.arrays.n_images
        spaced = np.unique(np.linspace(0, n - 1, min(n, DEFAULT_IMAGES)).round().astype(int)).tolist()
        return list(dict.fromkeys([study["start"]["image"], *named, *spaced]))[:DEFAULT_IMAGES]

    def _arrays(self, study: dict[str, Any]) -> Iterator[str]:
        """Every array that a view may ask for, thumbnails apart."""
        yield from study["measures"]
        yield from (name for name in ("top_class", "top_probability") if name in self.state.dataset)

    async def _record_array(self, name: str, images: Sequence[int]) -> None:
        array = self.state.dataset[name]
        path = f"/api/array/{name}"
        if array.dims[:1] == ("image",) and array.nbytes > WHOLE_BYTES:
            answers = [await self._ask(f"{path}?{urlencode({'image': image})}") for image in images]
            headers = answers[0][0]
            shape = [str(len(images)), *filter(None, headers["x-shape"].split(","))]
            headers |= {"x-dims": ",".join(["image", *filter(None, headers["x-dims"].split(","))])}
            headers |= {"x-shape": ",".join(shape)}
            self._put(path, headers, b"".join(body for _, body in answers), images=list(map(int, images)))
        else:
            await self._record(path)
        if array.dims[:1] != ("image",) or array.dtype.kind not in "fbiu":
            return
        ways: list[dict[str, str]] = [{}]
        if "head" in array.dims:
            ways.append({"over": "head"})
        if self.state.arrays.baseline(name):
            ways += [{**way, "cost": "1"} for way in ways]
            headers, body = await self._ask(f"/api/array/{self.state.arrays.baseline(name)}")
            self._put(f"{path}?baseline", headers, body)
        for way in ways:
            await self._record(f"/api/summary/{name}" + (f"?{urlencode(way)}" if way else ""))

    async def _record_attention(self, images: Sequence[int]) -> list[int]:
        """Attention of as many images as have room; which they are."""
        if self.state.live.status()["state"] != "ready":
            return []
        recorded, left = [], LARGEST_ATTENTION_BYTES
        for image in images:
            size = await self._record_attention_of(image, left)
            if size is None:
                break
            left -= size
            recorded.append(int(image))
        return recorded

    async def _record_attention_of(self, image: int, most: int) -> int | None:
        layers: list[np.ndarray] = []
        n_heads = self.state.plan.n_heads
        for layer, heads in enumerate(n_heads):
            maps = []
            for head in range(heads):
                status, headers, body = await _ask(self.app, f"/api/live/attention/{image}?layer={layer}&head={head}")
                if status != 200:
                    return None
                shape = [int(size) for size in headers["x-shape"].split(",")]
                maps.append(np.frombuffer(body, np.float32).reshape(shape))
            layers.append(np.stack(maps))
        if sum(each.size for each in layers) > most:
            return None
        status, headers, body = await _ask(self.app, f"/api/live/maps/{image}")
        if status == 200:
            self._put(f"/api/live/maps/{image}", headers, body)
        for layer, weights in enumerate(layers):
            floor = FLOOR_SHARE / weights.shape[-1]
            codes = _encode_weights(weights, floor)
            for head in range(len(weights)):
                self._put(
                    f"/api/live/attention/{image}?layer={layer}&head={head}",
                    {
                        "x-dims": "query,key",
                        "x-shape": ",".join(map(str, weights.shape[1:])),
                        "x-dtype": "float32",
                        "x-floor": repr(floor),
                    },
                    codes[head].tobytes(),
                )
        return sum(each.size for each in layers)

    async def _record_comparisons(self, images: Sequence[int]) -> None:
        for number in range(len(self.state.others)):
            path = f"/api/compare/{number}"
            comparison = json.loads(await self._record(path))
            for measure in comparison["measures"]:
                if measure["by_layer"]:
                    for suffix in ("a", "b", "difference", "low_all", "high_all"):
                        await self._record(f"{path}/{measure['name']}_{suffix}")
                if measure["by_head"]:
                    for suffix in ("a", "b"):
                        await self._record(f"{path}/{measure['name']}_head_{suffix}")
            for image in comparison["images"]:
                await self._record(f"{path}/image/{image['image']}")
            for name in comparison["other"]["measures"]:
                if name in self.state.dataset and self.state.dataset[name].dims[1:] in OF_PATCHES:
                    for image in images:  # an image that only this study has is none of the comparison
                        await self._record(f"{path}/image/{image}/{name}", optional=True)

    async def _thumbnails(self) -> list[str]:
        n = self.state.arrays.n_images
        if "thumbnail" not in self.state.dataset or n > MOST_THUMBNAILS:
            return []
        return [base64.b64encode((await self._ask(f"/thumb/{image}"))[1]).decode() for image in range(n)]


def _encode_weights(weights: np.ndarray, floor: float) -> np.ndarray:
    """A byte a weight: evenly spaced by the logarithm from `floor` to 1, so off by 2 % at most; 0 is less."""
    with np.errstate(divide="ignore"):
        share = 1 - np.log(weights) / np.log(floor)
    return np.where(weights < floor, 0, np.clip(np.rint(CODES * share), 1, CODES)).astype(np.uint8)


def _check_images(images: Any, n_images: int) -> list[int]:
    listed = list(images) if isinstance(images, Iterable) else []
    if not listed or not all(isinstance(image, (int, np.integer)) for image in listed):
        raise UsageError(f"Images for the page are positions in the study, such as [0, 5]; {images!r} was given.")
    for image in listed:
        if not 0 <= image < n_images:
            raise UsageError(f"Image {image} was to go into the page; the study has images 0 to {n_images - 1}.")
    return list(dict.fromkeys(map(int, listed)))


async def _ask(app: Any, path: str) -> tuple[int, dict[str, str], bytes]:
    """One request to an application in this process."""
    route, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": route,
        "raw_path": route.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1")],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 80),
    }
    status, headers, body = 0, dict[str, str](), bytearray()

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()  # the client stays, and has nothing more to say
        raise AssertionError

    async def send(message: Any) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = {key.decode(): value.decode() for key, value in message["headers"]}
        else:
            body.extend(message.get("body", b""))

    await app(scope, receive, send)
    named = {key: value for key, value in headers.items() if key.startswith("x-") or key == "content-type"}
    return status, named, bytes(body)


# --- one file ---------------------------------------------------------------------------------------------------------


def _inline(recording: dict[str, Any]) -> str:
    """The built page with its script, its styles and the recording inside."""
    files = built_page()
    html = files["/index.html"].content.decode()
    styles = "".join(files[name].content.decode() for name in re.findall(r'href="([^"]+\.css)"', html))
    (name,) = re.findall(r'src="([^"]+\.js)"', html)  # vite makes one script of the page
    script = files[name].content.decode()
    script = script.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src blob: data:; base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(recording, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    html = re.sub(r"<link[^>]*>|<script[^>]*></script>", "", html)
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<style>{styles}</style>"
        f'<script type="application/json" id="{MARK.decode()}">{data}</script>'
    )
    start, end = html.split("</head>")
    body, rest = end.split("</body>")
    return f'{start}{head}</head>{body}<script type="module">{script}</script></body>{rest}'
