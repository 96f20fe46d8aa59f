"""A second study of the same images beside the one that is open: what differs, with intervals.

    GET /api/compare                          the studies that were handed over, by name
    GET /api/compare/{study}                  what differs: sentences, a table of measures, the images that changed most
    GET /api/compare/{study}/image/{image}    every measure of one image in both
    GET /api/compare/{study}/image/{image}/{measure}   what the other study holds of the image; of one head: ?head=
    GET /api/compare/{study}/{variable}       one variable of `vitrail.compare`, as numbers

`{study}` counts the studies of `--with` from 0. A comparison resamples images and deals out signs, which takes seconds,
so it is made when first asked for, once, and kept.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from vitrail.app.answers import binary, json_answer, number_or_none
from vitrail.app.description import describe_views
from vitrail.app.once import Once
from vitrail.app.study_arrays import MAX_INDEX_DIGITS, StudyArrays
from vitrail.comparison import compare, open_pair
from vitrail.comparison.align import alike_measures
from vitrail.comparison.findings import ALPHA, comparison_findings, measures_by_effect
from vitrail.comparison.pairs import Pair
from vitrail.sentence import Sentence

if TYPE_CHECKING:
    from vitrail.app.server import AppState

__all__ = ["routes"]

N_IMAGES = 24
"""Images that changed most: four rows of thumbnails."""

COLUMNS = ("mean_a", "mean_b", "mean_difference", "low", "high", "p")


def routes(state: "AppState") -> list[Route]:
    """The routes of comparisons.

    Args:
        state: What the server's routes share.

    Returns:
        Routes for the application.
    """
    once = Once()

    def comparison_of(request: Request) -> tuple[Pair, xr.Dataset]:
        number = _study(state, request)
        pair_and_numbers: tuple[Pair, xr.Dataset] = once.get(
            str(number), lambda: (open_pair(state.folder, state.others[number]), _compare(state, number))
        )
        return pair_and_numbers

    async def studies(_request: Request) -> Response:
        return json_answer({"studies": [folder.resolve().name for folder in state.others]})

    async def differences(request: Request) -> Response:
        return json_answer(await run_in_threadpool(lambda: _differences(*comparison_of(request))))

    async def image(request: Request) -> Response:
        index = state.image_index(request.path_params["image"])
        return json_answer(await run_in_threadpool(lambda: _of_image(*comparison_of(request), index)))

    async def other_array(request: Request) -> Response:
        index = state.image_index(request.path_params["image"])
        pair, _ = await run_in_threadpool(comparison_of, request)
        head = request.query_params.get("head")
        return binary(*await run_in_threadpool(_of_other, pair, index, request.path_params["measure"], head))

    async def variable(request: Request) -> Response:
        name = request.path_params["variable"]
        _, compared = await run_in_threadpool(comparison_of, request)
        if name not in compared.data_vars or compared[name].dtype.kind not in "bif":
            raise HTTPException(404, f"The comparison has no numbers called {name[:60]!r}.")
        values = compared[name]
        return binary([str(dim) for dim in values.dims], values.to_numpy())

    return [
        Route("/api/compare", studies),
        Route("/api/compare/{study}", differences),
        Route("/api/compare/{study}/image/{image}", image),
        Route("/api/compare/{study}/image/{image}/{measure}", other_array),
        Route("/api/compare/{study}/{variable}", variable),
    ]


def _study(state: "AppState", request: Request) -> int:
    text = request.path_params["study"]
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_INDEX_DIGITS and int(text) < len(state.others)):
        raise HTTPException(
            404,
            f"There is no study {text[:20]!r} to compare with; {len(state.others)} were handed over. "
            "Give them as: vitrail open STUDY --with OTHER.",
        )
    return int(text)


def _compare(state: "AppState", number: int) -> xr.Dataset:
    return compare(state.folder, state.others[number])


def _differences(pair: Pair, compared: xr.Dataset) -> dict[str, Any]:
    attrs = compared.attrs
    change = compared["change"].to_numpy()
    order = np.argsort(-change, kind="stable")[: min(N_IMAGES, np.count_nonzero(~np.isnan(change)))]  # NaN comes last
    return {
        "names": [attrs["name_a"], attrs["name_b"]],
        "models": [attrs["model_a"], attrs["model_b"]],
        "n_shared": attrs["n_shared"],
        "n_compared": attrs["n_compared"],
        "same_heads": bool(attrs["same_heads"]),
        "heads_correspond": bool(attrs["heads_correspond"] and attrs["heads_correspond"]["p"] < ALPHA),
        "alpha": ALPHA,
        "labels": attrs["labels"],
        "left_out": attrs["left_out"],
        "other": {
            "grids": pair.b.plan.grids,
            "views": describe_views(pair.b.data.attrs),
            "depths": pair.b.plan.depths,
            "prefixes": pair.b.plan.prefixes,
            "class_token": pair.b.plan.class_token,
            "n_heads": pair.b.plan.n_heads,
            "measures": alike_measures(pair),
        },
        "depth": _numbers(compared["depth"].to_numpy()) if "depth" in compared.coords else [],
        "findings": [Sentence.of(each).to_json() for each in comparison_findings(compared)],
        "measures": [_measure(compared, name) for name in measures_by_effect(compared)],
        "images": [
            {"image": int(pair.a.rows[at]), "change": float(change[at]), "same": _same(compared, int(at))}
            for at in order
        ],
    }


def _measure(compared: xr.Dataset, name: str) -> dict[str, Any]:
    row = compared.sel(measure=name)
    by_layer = f"{name}_difference"
    effect, n_images = float(row["standardised"]), int(row["difference"].notnull().sum())
    return {
        "name": name,
        "title": str(row["title"].item()),
        "unit": str(row["unit"].item()),
        "by_layer": by_layer in compared and compared[by_layer].dims == ("layer",),
        "by_head": f"{name}_head_difference" in compared,
        **{column: number_or_none(row[column]) for column in COLUMNS},
        "standardised": 0.0 if np.isnan(effect) and n_images > 1 else number_or_none(effect),  # no image differs
        "alike": bool(np.isinf(effect)),
    }


def _of_image(pair: Pair, compared: xr.Dataset, image: int) -> Mapping[str, Any]:
    """How far each measure of one image differs, in its unit; none where the other study does not have the image."""
    rows = np.flatnonzero(pair.a.rows == image)
    if not len(rows):
        return {"compared": False, "differences": {}}
    at = int(rows[0])
    values = compared["difference"].to_numpy()[at]
    names = compared["measure"].values.tolist()
    return {
        "compared": True,
        "change": number_or_none(compared["change"][at]),
        "same": _same(compared, at),
        "differences": {name: number_or_none(value) for name, value in zip(names, values, strict=True)},
    }


def _of_other(pair: Pair, image: int, measure: str, head: str | None) -> tuple[tuple[str, ...], np.ndarray]:
    """What the other study holds of an image of the one that is open, of one head or all; its dimensions first."""
    rows = np.flatnonzero(pair.a.rows == image)
    if not len(rows):
        raise HTTPException(404, "This image is not among those that both studies have and that were compared.")
    other = StudyArrays(pair.b.data)
    of_head = {"head": head} if head is not None and "head" in other.array(measure).dims else {}
    return other.read_slice(measure, {"image": str(pair.b.rows[rows[0]]), **of_head})


def _same(compared: xr.Dataset, at: int) -> bool | None:
    return bool(compared["same_prediction"][at]) if "same_prediction" in compared else None


def _numbers(values: np.ndarray) -> list[float | None]:
    return [number_or_none(value) for value in values]
