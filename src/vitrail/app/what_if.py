"""What the answer of the live model becomes if heads, patches or windows are changed.

    POST /api/what_if                     the answer step by step, in JSON
    POST /api/what_if/{name}              token_drift, attention_before or attention_after of the last step, as numbers

Each has the changes in its body; what was computed for the same body comes from memory.
"""

import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from vitrail.app.answers import binary, json_answer, json_body, parse_index, read_body
from vitrail.app.study_arrays import StudyArrays
from vitrail.data import class_title
from vitrail.heads.correction import correct_mean, exact_values, how_corrected
from vitrail.heads.summary import LARGE_DROP
from vitrail.sentence import percent
from vitrail.stats import MAX_SEED, mean_interval

if TYPE_CHECKING:
    from vitrail.app.server import AppState

__all__ = ["routes"]

MAX_BODY_BYTES = 64 * 2**10
"""Every patch of a grid of 64 x 64 fits."""

MAX_STEPS = 32
"""With more changes than this only the last step is computed: each is a pass through the model."""

MAX_CHANGES = 5_000
"""Patches, heads and windows together: the patches of the largest grids, more than any model has heads."""

EXAMPLE = '{"image": "5", "heads_off": [[2, 0]], "patches": [17], "how": "mean", "windows": []}'
BINARY = {"token_drift": ("layer",), "attention_before": ("layer", "head"), "attention_after": ("layer", "head")}


def routes(state: "AppState") -> list[Route]:
    """The routes of changes.

    Args:
        state: What the server's routes share.

    Returns:
        Routes for the application.
    """

    async def answer(request: Request) -> Response:
        return await _answer(state, request)

    async def numbers(request: Request) -> Response:
        return await _numbers(state, request)

    return [
        Route("/api/what_if", answer, methods=["POST"]),
        Route("/api/what_if/{name}", numbers, methods=["POST"]),
    ]


async def _answer(state: "AppState", request: Request) -> Response:
    changes = await _parse(state, request)
    changed = await _compute(state, request, changes, None)
    cost = await run_in_threadpool(_cost_in_study, state.arrays, changes)
    names = state.plan.class_names
    steps = [_step(changed.isel(step=step), names) for step in range(changed.sizes["step"])]
    present = [np.empty(0)] * state.plan.n_layers
    if "token_drift" in changed:  # NaN: padding, and layers whose tokens cannot be followed
        present = [layer[~np.isnan(layer)] for layer in changed["token_drift"].to_numpy()[-1]]
    return json_answer(
        {
            "steps": steps,
            "classes": _before_and_after(changed, names),
            "drift": [float(layer.mean()) if layer.size else None for layer in present],
            "study": cost,
            "use_this": _with_folder(changed.attrs["use_this"], state.in_commands),
            "left_out": changed.attrs["left_out"],
        }
    )


def _with_folder(use_this: str, in_commands: str) -> str:
    """The command with the study's folder; Python lines, which name no study, as they are."""
    command = "vitrail prune "
    if not use_this.startswith(f"{command}STUDY"):
        return use_this
    return command + shlex.quote(in_commands) + use_this.removeprefix(f"{command}STUDY")


async def _numbers(state: "AppState", request: Request) -> Response:
    name = request.path_params["name"]
    if name not in BINARY:
        raise HTTPException(404, f"There is nothing called {name[:40]!r} here. There are: {', '.join(BINARY)}.")
    changes = await _parse(state, request)
    n_heads = state.plan.n_heads
    layer = parse_index(request, "layer", len(n_heads))
    if name == "token_drift":
        changed = await _compute(state, request, changes, None)
        if name not in changed:
            raise HTTPException(404, changed.attrs["left_out"][name])
        return binary(("token",), changed[name].to_numpy()[-1, layer])
    head = parse_index(request, "head", n_heads[layer])
    changed = await _compute(state, request, changes, layer)
    if name not in changed:
        raise HTTPException(404, changed.attrs["left_out"].get(name, f"L{layer} has no map between the same tokens."))
    return binary(("query", "key"), changed[name].to_numpy()[head])


async def _compute(state: "AppState", request: Request, changes: Mapping[str, Any], layer: int | None) -> xr.Dataset:
    image = changes["image"]
    arguments = {key: value for key, value in changes.items() if key != "image"}
    if layer is not None:
        arguments["attention_layer"] = layer
        arguments["cumulative"] = False
    key = ("what_if", image, json.dumps(arguments, sort_keys=True))
    return await state.ask_model(
        request, state.looks, key, lambda model: model.what_if(state.photograph(image), **arguments)
    )


# --- what a request asks for -----------------------------------------------------------------------------------------


async def _parse(state: "AppState", request: Request) -> dict[str, Any]:
    """The changes of a body, bounded, as arguments of `vitrail.what_if.what_if`, with the image looked up.

    Whether heads, patches and windows are there is for the model to say.
    """
    state.live.refuse_without_model()
    body = json_body(await read_body(request, MAX_BODY_BYTES), EXAMPLE)
    unknown = sorted(set(body) - {"image", "heads_off", "modes", "patches", "how", "windows", "seed"})
    if unknown:
        raise HTTPException(422, f"Unknown: {', '.join(unknown)[:80]}. Send {EXAMPLE}.")
    image = str(body.get("image", ""))[:40]
    state.require_image(image)
    heads = [(*pair, 2) for pair in _rows(body, "heads_off", 2)] + _rows(body, "modes", 3)
    patches = _rows({"patches": [[each] for each in _list(body, "patches")]}, "patches", 1)
    windows = [_window(window) for window in _list(body, "windows")]
    how, seed = body.get("how", "mean"), body.get("seed", 0)
    if not isinstance(how, str) or type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise HTTPException(422, f"`how` is a word and `seed` a number from 0. Send {EXAMPLE}.")
    n_changes = len(heads) + len(patches) + len(windows)
    if n_changes > MAX_CHANGES:
        raise HTTPException(422, f"{n_changes} changes were sent; at most {MAX_CHANGES} are made at once.")
    return {
        "image": image,
        "heads_off": heads,
        "patches": [patch for (patch,) in patches],
        "how": how[:20],
        "windows": windows,
        "cumulative": len(heads) + len(windows) <= MAX_STEPS,
        "seed": seed,
    }


def _list(body: Mapping[str, Any], name: str) -> list[Any]:
    values = body.get(name, [])
    if not isinstance(values, list) or len(values) > MAX_CHANGES:
        raise HTTPException(422, f"`{name}` is a list of at most {MAX_CHANGES}. Send {EXAMPLE}.")
    return values


def _rows(body: Mapping[str, Any], name: str, length: int) -> list[tuple[int, ...]]:
    """A list of lists of so many whole numbers."""
    rows = _list(body, name)
    for row in rows:
        if not isinstance(row, list) or len(row) != length or not all(type(each) is int for each in row):
            raise HTTPException(422, f"`{name}` holds something that is not {length} whole numbers. Send {EXAMPLE}.")
    return [tuple(row) for row in rows]


def _window(window: Any) -> tuple[int, tuple[int, ...], int | None, int | None]:
    """Layer, sides, head and patch, as `vitrail.what_if.WindowMove`."""
    example = '{"layer": 3, "head": 1, "patch": 17, "sides": [2, 2, 5, 2]}, where head and patch may be null'
    if not isinstance(window, dict) or set(window) - {"layer", "head", "patch", "sides"}:
        raise HTTPException(422, f"A window is {example}.")
    layer, head, patch = (window.get(name) for name in ("layer", "head", "patch"))
    (sides,) = _rows({"sides": [window.get("sides")]}, "sides", 4)
    if type(layer) is not int or any(each is not None and type(each) is not int for each in (head, patch)):
        raise HTTPException(422, f"A window is {example}.")
    return layer, sides, head, patch


# --- what is answered ------------------------------------------------------------------------------------------------


def _step(one: xr.Dataset, names: list[str] | None) -> dict[str, Any]:
    numbers = ("probability", "divergence", "value", "value_change", "output_shift")
    step: dict[str, Any] = {"words": str(one["step"].item())}
    step |= {name: float(one[name]) for name in numbers if name in one}
    if "top_class" in one:
        step["classes"] = [
            {"class": int(each), "name": _class_name(int(each), names), "probability": float(probability)}
            for each, probability in zip(one["top_class"].to_numpy(), one["top_probability"].to_numpy(), strict=True)
        ]
    return step


def _before_and_after(changed: xr.Dataset, names: list[str] | None) -> list[dict[str, Any]]:
    """The best classes of the first and of the last step, with both probabilities."""
    if "top_class" not in changed:
        return []
    before, after = (changed["followed_probability"].to_numpy()[step].tolist() for step in (0, -1))
    return [
        {"class": each, "name": _class_name(each, names), "before": first, "after": last}
        for each, first, last in zip(changed["rank"].to_numpy().tolist(), before, after, strict=True)
    ]


def _class_name(number: int, names: list[str] | None) -> str:
    return class_title(names[number]) if names is not None and 0 <= number < len(names) else f"class {number}"


def _cost_in_study(arrays: StudyArrays, changes: Mapping[str, Any]) -> str | None:
    """What the same change costs over all images, where the study has measured it: one head that is off."""
    heads = changes["heads_off"]
    if changes["patches"] or changes["windows"] or len(heads) != 1 or heads[0][2] != 2:
        return None
    if not {"probability", "head_probability"} <= set(map(str, arrays.dataset)):
        return None
    layer, head, _ = heads[0]
    array = arrays.dataset["head_probability"]
    if not (0 <= layer < array.sizes["layer"] and 0 <= head < array.sizes["head"]):
        return None
    without = np.asarray(array.isel(layer=layer, head=head).values, dtype=np.float64)
    lost = arrays.load("probability").astype(np.float64) - without
    if np.isnan(lost).any():
        return None
    exact = exact_values(arrays.dataset, "drop")
    corrected = None if exact is None else correct_mean(lost, exact[:, layer, head])
    if exact is not None and corrected is not None:
        mean, low, high, words = *map(float, corrected), f", {how_corrected(arrays.dataset)}"
        n_images, lost = len(lost), exact[~np.isnan(exact[:, layer, head]), layer, head]
        of_them = f"the {len(lost):,} images whose heads were all pruned"
    else:
        mean, low, high, words = lost.mean(), *map(float, mean_interval(lost, limits=(-1.0, 1.0))[:2]), ""
        n_images, of_them = len(lost), "them"
    interval = f" (95 % interval {low:z.3f} to {high:z.3f}{words})" if np.isfinite(low + high) else ""
    return (
        f"Over the {n_images:,} images of the study the label loses {mean:z.3f} of its probability without "
        f"L{layer}H{head}{interval}, more than {LARGE_DROP} in {percent((lost > LARGE_DROP).mean(), 1)} of {of_them}."
    )
