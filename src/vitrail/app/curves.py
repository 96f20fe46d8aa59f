"""The pruning curves that `vitrail curves` wrote into a study.

    GET /api/curves     accuracy over the number of heads pruned, by ranking, with the orders at random

A study without them answers with no rankings; `has_curves` of `/api/study` says so before anything is asked.
"""

from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from vitrail.app.answers import json_answer, number_or_none
from vitrail.errors import DamagedStudy
from vitrail.pruning.ranking import Area, Curves, area_table, read_curves

if TYPE_CHECKING:
    from pathlib import Path

    from vitrail.app.server import AppState

__all__ = ["has_curves", "routes"]


def has_curves(folder: "Path") -> bool:
    """Whether a study has pruning curves of its own images.

    Args:
        folder: Its folder.

    Returns:
        False also where their file is damaged: the command that makes them again is what is shown then.
    """
    try:
        return read_curves(folder) is not None
    except DamagedStudy:
        return False


def routes(state: "AppState") -> list[Route]:
    """The route of the pruning curves.

    Args:
        state: What the server's routes share.

    Returns:
        Routes for the application.
    """

    async def curves(_request: Request) -> Response:
        return json_answer(await run_in_threadpool(lambda: _describe(read_curves(state.folder))))

    return [Route("/api/curves", curves)]


def _describe(curves: Curves | None) -> dict[str, Any]:
    if curves is None or not curves.least:
        return {"rankings": []}
    chance = curves.random_accuracy()
    n_orders, _, n_random_images = curves.random.shape
    return {
        "counts": curves.counts.tolist(),
        "rankings": [
            {
                "name": name,
                "least": curves.accuracy("least", name).tolist(),
                "most": curves.accuracy("most", name).tolist(),
                "area": _area(area),
            }
            for name, area in area_table(curves).items()
        ],
        "random": {
            "low": chance.lowest.tolist(),
            "mean": chance.mean.tolist(),
            "high": chance.highest.tolist(),
            "orders": n_orders,
            "images": n_random_images,
        },
        "correctness": curves.labels.correctness,
        "images": next(iter(curves.least.values())).shape[1],
    }


def _area(area: Area) -> dict[str, float | None]:
    """The area between a ranking's two curves, with its interval over images and how far chance may reach."""
    value, low, high = area.between
    numbers = {"value": value, "low": low, "high": high, "chance": area.chance, "beaten": area.beaten}
    return {key: number_or_none(number) for key, number in numbers.items()}
