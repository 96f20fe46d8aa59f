"""What maps of heads look like, by name: of all images, of one, and of the clusters of maps.

    GET /api/patterns               the rules, every head's pattern over all images, and the clusters
    GET /api/patterns/{image}       every head's pattern in one image
    GET /api/patterns/map/{kind}    how densely maps lie on the standing map, and where its clusters are

Names and the landscape are those of the report's figures, computed once.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from vitrail.app.answers import json_answer, number_or_none
from vitrail.patterns.density import KINDS, pattern_clusters_at, pattern_density, pattern_positions
from vitrail.patterns.names import NAMES, RULES, PatternName, even_attention, name_pattern, rule_thresholds
from vitrail.patterns.tables import all_patterns, pattern_clusters, pattern_grid

if TYPE_CHECKING:
    from vitrail.app.server import AppState

__all__ = ["routes"]

N_CLUSTER_HEADS = 3
"""Heads that are named of a cluster."""


def routes(state: "AppState") -> list[Route]:
    """The routes of the patterns.

    Args:
        state: What the server's routes share.

    Returns:
        Routes for the application.
    """

    @cache
    def describe() -> dict[str, Any]:
        return _describe(state)

    async def patterns(_request: Request) -> Response:
        _refuse_without(state)
        return json_answer(await run_in_threadpool(describe))

    @cache
    def landscape(kind: str) -> dict[str, Any]:
        return _landscape(state, kind)

    async def of_map(request: Request) -> Response:
        kind = request.path_params["kind"]
        if kind not in KINDS or f"pattern_{kind}_xy" not in state.dataset:
            raise HTTPException(404, f"This study holds no map of {kind[:40]!r} patterns; kinds: {', '.join(KINDS)}.")
        return json_answer(await run_in_threadpool(landscape, kind))

    async def of_image(request: Request) -> Response:
        _refuse_without(state)
        values = await run_in_threadpool(_rules_of, state, request.path_params["image"])
        grid = pattern_grid(state.dataset)
        heads = [
            {"layer": layer, "head": head, **_words(name_pattern(values[layer, head], grid))}
            for layer, head in np.ndindex(*values.shape[:2])
            if not np.isnan(values[layer, head, 0])
        ]
        return json_answer({"heads": heads})

    return [
        Route("/api/patterns", patterns),
        Route("/api/patterns/map/{kind}", of_map),
        Route("/api/patterns/{image}", of_image),
    ]


def _rules_of(state: "AppState", image: str) -> np.ndarray:
    """The numbers of one image's maps, [layer head rule]."""
    if not image.startswith("u"):
        return np.asarray(state.arrays.read_slice("pattern_rule", {"image": image})[1])
    arrays = state.uploads.get(image).arrays
    if "pattern_rule" not in arrays:
        raise HTTPException(404, "The patterns of this photograph have not been computed.")
    return arrays["pattern_rule"]


def _refuse_without(state: "AppState") -> None:
    if "pattern_rule" not in state.dataset:
        raise HTTPException(404, "This study holds no patterns. Study it with --measures patterns.")


def _describe(state: "AppState") -> dict[str, Any]:
    dataset = state.dataset
    has_clusters = "pattern_patch_cluster" in dataset
    heads = [
        {
            "layer": pattern.layer,
            "head": pattern.head,
            **_words(pattern.naming),
            "share": number_or_none(pattern.share),
            "values": [number_or_none(value) for value in pattern.values],
            "image_dependence": pattern.image_dependence,
        }
        for pattern in all_patterns(dataset)
    ]
    clusters = [
        {"number": each.number, "size": each.size, **_words(each.naming), "heads": each.heads}
        for each in (pattern_clusters(dataset, N_CLUSTER_HEADS) if has_clusters else ())
    ]
    even = [number_or_none(value) for value in even_attention(pattern_grid(dataset))]
    holds = [number_or_none(value) for value in rule_thresholds(pattern_grid(dataset))]
    return {"names": NAMES, "rules": RULES, "even": even, "holds": holds, "heads": heads, "clusters": clusters}


def _landscape(state: "AppState", kind: str) -> dict[str, Any]:
    dataset = state.dataset
    xy = pattern_positions(dataset, kind)
    density, cluster = pattern_density(xy), f"pattern_{kind}_cluster"
    clusters = pattern_clusters_at(xy, dataset[cluster].to_numpy()) if cluster in dataset else {}
    return {
        "n_maps": density.n_maps,
        "x": density.x[[0, -1]].tolist(),
        "y": density.y[[0, -1]].tolist(),
        "shape": density.height.shape,
        "height": density.height.round(3).ravel().tolist(),
        "clusters": [{"number": number, "x": float(x), "y": float(y)} for number, (x, y) in clusters.items()],
    }


def _words(naming: PatternName) -> dict[str, str]:
    return {"name": naming.name, "label": naming.label, "rule": naming.rule}
