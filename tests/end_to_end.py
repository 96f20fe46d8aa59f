"""Every analysis of a tiny model, from the study to the page: what the contract suite is to the tap, for all above it.

    python tests/end_to_end.py [FAMILY ...]         all families take about half an hour of one core

A study of all analyses is made of a few small photographs with masks; its figures are drawn, its report is written, one
of the photographs is looked at, and every array that the page asks for is asked for. Any error passes through.
"""

import asyncio
import io
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
import xarray as xr
from PIL import Image

from vitrail.analysis import BASE, analyses
from vitrail.app.server import create_app
from vitrail.contract.outlook import Outlook, study_outlook
from vitrail.contract.tiny_models import FAMILIES, Family
from vitrail.errors import VitrailError
from vitrail.figures.whole import draw_figures
from vitrail.live import LiveModel
from vitrail.models.open import Vit, open_vit
from vitrail.one_image import look
from vitrail.report import findings_of, write_report
from vitrail.study.run import run_study

__all__ = ["EndToEnd", "run_end_to_end", "study_all", "study_faults"]

_N_IMAGES = 3
_PHOTO_PX = 48
_MEAN = _STD = (0.5, 0.5, 0.5)
"""Random weights have no preprocessing of their own."""

_OK = 200
_SHORTEST_REASON = 20
"""Characters: less is no sentence."""

_SERVER = ("127.0.0.1", 8765)

_OF_SOME_IMAGES = ("object_map",)
"""Arrays of a few images of a study, which are drawn by their pixels: none of three may be among them."""

_UNLIKE_DEFAULT = (
    {"importance": "estimate", "maps": "bfloat16", "radius": "oracle", "lost_patches": "black", "window_area": "10"},
    {"ablation": "mean", "lost_patches": "removed", "window_area": "60"},
)
"""Options of further studies: together every option is tried at another value than its default."""


@dataclass
class EndToEnd:
    """What became of all analyses on one model.

    Attributes:
        family: The model's family.
        refusal: The error with which the model, or a study of it, was refused; None where all went through.
        outlook: What was said before the study was made; None where the model was refused.
        faults: Sentences about what went wrong without an error: arrays that are empty without a reason, answers of the
            page that are none, a study that holds something else than was said before.
        n_measures: Measures that the study holds.
        n_figures: Figures that were drawn, of the study and of the look at one image.
        n_answers: Answers that the page was given, refusals in a sentence among them.
    """

    family: Family
    refusal: VitrailError | None = None
    outlook: Outlook | None = None
    faults: list[str] = field(default_factory=list)
    n_measures: int = 0
    n_figures: int = 0
    n_answers: int = 0

    @property
    def ok(self) -> bool:
        """Whether all went through, or the model was refused as it should be and as was said before."""
        if self.outlook is None:
            return type(self.refusal).__name__ == self.family.refused
        return not self.faults and (self.refusal is None) == self.outlook.ok


def run_end_to_end(family: Family, folder: str | Path, *, quick: bool = False) -> EndToEnd:
    """Runs every analysis of a tiny model of a family, and all that shows their results.

    Args:
        family: The family.
        folder: A new or empty folder for photographs, study, figures and report.
        quick: Leaves out the studies with options unlike the defaults.

    Returns:
        What became of it; `result.ok` says whether all is well.

    Raises:
        Exception: Whatever goes wrong on the way, but for a refusal of the model or of the study.
    """
    folder, result = Path(folder), EndToEnd(family)
    photographs = write_photographs(folder)
    try:
        vit = open_vit(family.model(), image_size=family.image_size, mean=_MEAN, std=_STD)
        result.outlook = study_outlook(vit)
        study = study_all(vit, folder)
    except VitrailError as refusal:
        result.refusal = refusal
        return result
    draw_figures(study, folder / "figures", ["svg"])
    write_report(folder / "study", folder / "report.html")
    result.faults += study_faults(study, result.outlook)
    result.faults += _look(vit, photographs[0], folder)
    result.n_measures = len(result.outlook.measures)
    result.n_figures = sum(len(list((folder / name).iterdir())) for name in ("figures", "look"))
    page = _Page(create_app(folder / "study", LiveModel(vit)))
    result.faults += asyncio.run(_page_faults(page, vit, photographs[0]))
    result.n_answers = page.n_answers
    for number, options in enumerate(() if quick else _UNLIKE_DEFAULT):
        study_all(vit, folder, f"study_{number}", options)
    return result


def write_photographs(folder: Path) -> list[Path]:
    """Smooth random photographs of different shapes, and for each a mask with two objects.

    Args:
        folder: Where the folders `photographs` and `masks` are made.

    Returns:
        The photographs' files.
    """
    files = []
    for name in ("photographs", "masks"):
        (folder / name).mkdir(parents=True)
    for index in range(_N_IMAGES):
        size = (_PHOTO_PX + 8 * index, _PHOTO_PX)
        coarse = np.random.default_rng(index).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        files.append(folder / "photographs" / f"{index}.png")
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(files[-1])
        mask = np.zeros(size[::-1], np.uint8)
        mask[4:24, 4:24], mask[20:44, 28:44] = 1, 2
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
    return files


def study_all(
    vit: Vit, folder: Path, name: str = "study", options: Mapping[str, str] = MappingProxyType({})
) -> xr.Dataset:
    """A study of all analyses.

    Args:
        vit: The model.
        folder: Where `write_photographs` has written.
        name: Of the study's folder in it.
        options: Values that differ from the default.

    Returns:
        The study.
    """
    return run_study(
        vit,
        folder / "photographs",
        out=folder / name,
        measures=[analysis for analysis in analyses() if analysis != BASE],
        batch_size=_N_IMAGES,
        masks=folder / "masks",
        options=options,
    )


# --- what is left out ------------------------------------------------------------------------------------------------


def study_faults(study: xr.Dataset, outlook: Outlook) -> list[str]:
    """Where a study of all analyses is not what was said before it: left out, missing, or without a single number.

    Args:
        study: As `study_all` makes it.
        outlook: What was said of the model.

    Returns:
        A sentence for each fault.
    """
    return [*_left_out_otherwise(study, outlook), *_empty_arrays(study)]


def _left_out_otherwise(study: xr.Dataset, outlook: Outlook) -> Iterator[str]:
    """Whether the study holds and leaves out what the outlook said."""
    said = {name: reason for reason, names in outlook.left_out.items() for name in names}
    left_out = {name: reason for name, reason in study.attrs["left_out"].items() if not _analysis_of(name).only_for}
    if left_out != said:
        others = sorted(name for name in left_out.keys() | said.keys() if left_out.get(name) != said.get(name))
        yield f"the study leaves out other measures, or for other reasons, than was said before: {', '.join(others)}"
    missing = [name for name in outlook.measures if name not in study]
    if missing:
        yield f"measures that the study was said to hold are not there: {', '.join(missing)}"


def _analysis_of(name: str) -> Any:
    return next(each for each in analyses().values() if name in each.measure_names)


def _empty_arrays(dataset: xr.Dataset) -> Iterator[str]:
    """Arrays without a single number: they should have been left out, with the reason."""
    for name, array in dataset.data_vars.items():
        is_empty = array.dtype.kind == "f" and array.size and not np.isfinite(array.values).any()
        if is_empty and name not in _OF_SOME_IMAGES:
            yield f"{name} holds no number, and nothing says why"


def _look(vit: Vit, photograph: Path, folder: Path) -> Iterator[str]:
    """One image with all analyses: its arrays, sentences and figures."""
    mask = np.asarray(Image.open(folder / "masks" / photograph.name)).astype(np.int64)
    dataset = look(vit, Image.open(photograph).convert("RGB"), mask=mask)
    draw_figures(dataset, folder / "look", ["svg"], one_image=True)
    findings_of(dataset)
    yield from _empty_arrays(dataset)
    declared = {each.name for analysis in analyses().values() for each in analysis.image_measures}
    for name in sorted(declared - set(dataset.data_vars) - set(dataset.attrs["left_out"])):
        yield f"{name} is missing in the look at one image, and nothing says why"


# --- the page --------------------------------------------------------------------------------------------------------


class _Answer(NamedTuple):
    status: int
    body: bytes

    @property
    def is_refusal(self) -> bool:
        """Whether it says in a sentence why the model has no such thing."""
        return self.status in (404, 422) and len(json.loads(self.body)["error"]) > _SHORTEST_REASON


@dataclass
class _Page:
    """The application, asked without a browser and without a socket; counts its answers."""

    app: Any
    n_answers: int = 0

    async def ask(self, address: str, body: bytes | None = None) -> _Answer:
        self.n_answers += 1
        return await _ask(self.app, address, body)


async def _page_faults(page: _Page, vit: Vit, photograph: Path) -> list[str]:
    """Asks for everything that the page shows."""
    description = json.loads((await page.ask("/api/study")).body)
    faults = []
    sentences = ["/api/findings", *(f"/api/findings/{name}" for name in analyses())]
    for path in ("/api/images", "/api/live", "/thumb/0", "/photo/0", *sentences, *_array_paths(description)):
        if (await page.ask(path)).status != _OK:
            faults.append(f"the page is refused {path}")
    for path in (*_live_paths(description), *_look_paths()):
        answer = await page.ask(path)
        if answer.status != _OK and not answer.is_refusal:
            faults.append(f"the page is given no reason at {path}: {answer.body[:200]!r}")
    for body in _changes(vit):
        for path in ("/api/what_if", "/api/what_if/token_drift?layer=0", "/api/what_if/attention_after?layer=0&head=0"):
            answer = await page.ask(path, json.dumps(body).encode())
            if answer.status != _OK and not answer.is_refusal:
                faults.append(f"the page is given no reason at {path} of {body}: {answer.body[:200]!r}")
    answer = await page.ask("/api/look", photograph.read_bytes())
    if answer.status != _OK:
        faults.append(f"a photograph that is dropped on the page is refused: {answer.body[:200]!r}")
    page.app.state.live.close()
    return faults


def _look_paths() -> Iterator[str]:
    for analysis in analyses().values():
        yield f"/api/look/0?analysis={analysis.name}"
        yield f"/api/look/0/stream?analyses={analysis.name}"
        for measure in (*analysis.measures, *analysis.image_measures):
            yield f"/api/look/0/{measure.name}"


def _changes(vit: Vit) -> Iterator[dict[str, Any]]:
    """Bodies of questions what the model would answer if a head, patches or a window were changed."""
    yield {"image": "0", "heads_off": [[0, 0], [vit.n_layers - 1, 0]]}
    for how in ("mean", "black", "removed", "shuffled"):
        yield {"image": "0", "patches": [0, 1], "how": how}
    yield {"image": "0", "windows": [{"layer": 0, "sides": [0, 0, 1, 1]}]}


def _array_paths(description: Mapping[str, Any]) -> Iterator[str]:
    for name, measure in description["measures"].items():
        yield f"/api/array/{name}"
        if "head" in measure["dims"]:
            yield f"/api/array/{name}?layer=0&head=0"
        if measure["dims"][0] == "image":
            yield f"/api/summary/{name}"
            if "head" in measure["dims"]:
                yield f"/api/summary/{name}?over=head"


def _live_paths(description: Mapping[str, Any]) -> Iterator[str]:
    yield "/api/live/maps/0"
    for layer, n_heads in enumerate(description["n_heads"]):
        for head in sorted({0, n_heads - 1} if n_heads else ()):
            query = urlencode({"layer": layer, "head": head})
            yield f"/api/live/attention/0?{query}"
            yield f"/api/live/modes/0?{query}"
            yield f"/api/why?{query}"


async def _ask(app: Any, address: str, body: bytes | None = None) -> _Answer:
    """One request to the application; a POST where there is a body. Errors of the application pass through."""
    path, _, query = address.partition("?")
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET" if body is None else "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"host", b":".join(str(part).encode() for part in _SERVER))],
        "client": _SERVER,
        "server": _SERVER,
    }
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body or b"", "more_body": False}]
    status, content = 0, io.BytesIO()

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        content.write(message.get("body", b""))

    await app(scope, receive, send)
    return _Answer(status, content.getvalue())


def main(names: list[str]) -> None:
    """Tries families, all of them where none is named; a fault of any is an error."""
    families = {family.name: family for family in FAMILIES}
    faulty = []
    for name in names or families:
        with tempfile.TemporaryDirectory() as folder:
            result = run_end_to_end(families[name], folder)
        counts = f"{result.n_measures} measures, {result.n_figures} figures, {result.n_answers} answers"
        went_through = counts if result.refusal is None else f"refused: {result.refusal}"
        print(f"{name}: {went_through if result.ok else result.faults or result.refusal}", flush=True)
        faulty += [] if result.ok else [name]
    if faulty:
        raise SystemExit(f"Faults in {', '.join(faulty)}.")


if __name__ == "__main__":
    main(sys.argv[1:])
