"""The model after each change, and what it answers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.arguments import whole_number
from vitrail.contract.outlook import require_finite
from vitrail.data import PhotographLike
from vitrail.dataset import MeasureDataset
from vitrail.errors import Unsupported, UsageError
from vitrail.grid import Grid, boxes_of_sides, pixels_moved, window_masks
from vitrail.heads.importance import model_metrics
from vitrail.heads.metrics import one_minus_cosine
from vitrail.heads.regions import Mode, mode_edits
from vitrail.models.open import Vit
from vitrail.stats import require_seed
from vitrail.study.plan import N_TOP
from vitrail.tap.anatomy import Anatomy, Block
from vitrail.tap.edits import Edit
from vitrail.tap.layer_maps import LayerMaps
from vitrail.tap.modes import plain_modes
from vitrail.tap.tap import Readers, Replay, Tap
from vitrail.tokens.levels import block_returned
from vitrail.tokens.robustness import move_pixels, paint, run_without
from vitrail.what_if.arrays import ARRAYS
from vitrail.what_if.changes import (
    HOW,
    HeadOff,
    WindowMove,
    grid_of,
    parse_heads_off,
    parse_patches,
    parse_windows,
    use_this,
)
from vitrail.wint.model import moved_windows, window_heads

__all__ = ["what_if"]

ATTENTION = ("attention_before", "attention_after")
_DRIFT = "token_drift"


@dataclass(frozen=True, eq=False)
class _State:
    """The model and the image after some changes.

    Attributes:
        words: what the last change was.
        tap, replay: a recorded pass of the changed image, without edits.
        edits: changes to attention.
        lost: patches that are taken out.
        sources: the patch of the intact image that each patch shows.
    """

    words: str
    tap: Tap
    replay: Replay
    tokens: Mapping[int, Tensor]
    edits: tuple[Edit, ...] = ()
    lost: Bool[np.ndarray, "patch"] | None = None
    sources: Int[np.ndarray, "patch"] | None = None


class _Outcome(NamedTuple):
    logits: Float[Tensor, "image class"]
    tokens: Mapping[int, Tensor]
    attention: Float[Tensor, "head query key"] | None


@plain_modes()
@torch.no_grad()
def what_if(
    vit: Vit,
    image: PhotographLike,
    *,
    heads_off: str | Sequence[Any] = (),
    patches: Sequence[Any] | np.ndarray = (),
    how: str = "mean",
    windows: Sequence[WindowMove | Sequence[Any]] = (),
    attention_layer: SupportsIndex | None = None,
    cumulative: bool = True,
    seed: SupportsIndex = 0,
) -> xr.Dataset:
    """Changes the model or the image, one thing after the other, and asks again.

    Args:
        vit: the model.
        image: the photograph, as `vitrail.data.as_photograph` takes it.
        heads_off: heads to switch off, as "L2H0,L3H1" or (layer, head); (layer, head, mode) for a part of its map.
        patches: which patches change, as indices row by row, as (row, column), or as a mask of the grid.
        how: what happens to them, one of `HOW`.
        windows: `WindowMove`s, or their fields in order, the patch as an index or as (row, column). In a WinT they take
            the tokens of predicted windows, which may shrink or grow; in any other ViT a head sees nothing outside of
            them.
        attention_layer: the layer whose maps are returned; None for the last.
        cumulative: a step for each change; otherwise one step with all of them.
        seed: of the places that shuffled patches take.

    Returns:
        The arrays of `ARRAYS` that the model's task gives, with a coordinate `step` that says in words what each step
        changed. `attrs`: `model`; `left_out`, the reason by the name of each array that is missing; `use_this`, the
        command or the Python lines that do the same elsewhere.

    Raises:
        UsageError: a head, mode, patch or window is not there, nothing is changed, or the seed is out of range.
        Unsupported: this model cannot be changed that way.
        ModelError: an answer of the model has NaN or infinite numbers.

    Example:
        >>> import vitrail
        >>> from vitrail.data.photographs import photographs
        >>> vit = vitrail.open_vit("vitrail:photos")
        >>> changed = vit.what_if(photographs()["cat"], heads_off="L0H0,L1H2")
        >>> changed["step"].values.tolist()
        ['unchanged', 'L0H0 off', 'L1H2 off']
    """
    seed = require_seed(seed)
    off, moves = parse_heads_off(vit, heads_off), parse_windows(vit, windows)
    mask = parse_patches(vit, patches)
    if how not in HOW:
        raise UsageError(f"Patches cannot be {how!r}; choose from {', '.join(HOW)}.")
    if not off and not moves and mask is None:
        raise UsageError("Nothing was changed: give heads_off, patches or windows.")
    layer = vit.n_layers - 1 if attention_layer is None else whole_number("attention_layer", attention_layer)
    if not 0 <= layer < vit.n_layers:
        raise UsageError(f"Attention of L{layer} was asked for; the model has L0 to L{vit.n_layers - 1}.")
    left_out: dict[str, str] = {}
    pixels = vit.prepare([image])
    intact = _record(vit.tap(), pixels, "unchanged")
    states = list(_states(vit, intact, pixels, mask, how, moves, off, seed, cumulative=cumulative))
    if not cumulative:
        states = [states[0], replace(states[-1], words="all changes")]
    outcomes = [_run(state, layer if state in (states[0], states[-1]) else None, left_out) for state in states]
    for outcome in outcomes:
        require_finite(vit.name, outcome.logits)
    arrays = {
        **_answers(vit, [outcome.logits for outcome in outcomes]),
        **_drift(vit, states, outcomes, left_out),
        **_attention(vit, layer, states[-1], outcomes, left_out),
    }
    declared = {measure.name: measure for measure in ARRAYS}
    variables = {
        name: (declared[name].dims, values.astype(declared[name].dtype), declared[name].attributes())
        for name, values in arrays.items()
    }
    followed = {"rank": _best_classes(arrays["top_class"])} if "top_class" in arrays else {}
    return MeasureDataset(
        variables,
        coords={"step": [state.words for state in states], **followed},
        attrs={
            "model": vit.name,
            "attention_layer": layer,
            "left_out": left_out,
            "use_this": use_this(vit, off, mask, how, moves, seed),
        },
    )


# --- the steps -------------------------------------------------------------------------------------------------------


def _record(tap: Tap, pixels: Tensor, words: str) -> _State:
    tokens: dict[int, Tensor] = {}
    replay, _ = tap.record(pixels, Readers(output=tokens.__setitem__))
    return _State(words, tap, replay, tokens)


def _states(
    vit: Vit,
    state: _State,
    pixels: Tensor,
    mask: Bool[np.ndarray, "patch"] | None,
    how: str,
    moves: Sequence[WindowMove],
    off: Sequence[HeadOff],
    seed: int,
    *,
    cumulative: bool,
) -> Iterable[_State]:
    """The intact model and the one after each change; without `cumulative` not after each window of a WinT."""
    yield state
    if mask is not None:
        state = _change_patches(vit, state, pixels, mask, how, seed)
        yield state
    has_windows = bool(window_heads(vit.model))
    numbers = range(len(moves))
    if has_windows and not cumulative:
        numbers = numbers[-1:]  # each is a pass of its own, and the last has them all
    for number in numbers:
        move = moves[number]
        if has_windows:
            model = moved_windows(
                vit.model, [(each.layer, each.sides, each.head, each.patch) for each in moves[: number + 1]]
            )
            moved = _record(vit.tap_of_variant(model), state.replay.images, _words_of_window(move))
            state = replace(moved, edits=state.edits, lost=state.lost, sources=state.sources)
        else:
            bias = _window_bias(vit, move, state.lost)
            state = replace(state, words=_words_of_window(move), edits=(*state.edits, Edit(move.layer, bias=bias)))
        yield state
    for each in off:
        edits = (replace(edit, copy=None) for edit in mode_edits(vit.anatomy, each.layer, each.head, [Mode(each.mode)]))
        part = "" if each.mode == Mode.EVERYTHING else f" without its {_PART_WORDS[Mode(each.mode)]}"
        words = f"L{each.layer}H{each.head}{part or ' off'}"
        state = replace(state, words=words, edits=(*state.edits, *edits))
        yield state


_PART_WORDS = {
    Mode.CROSS: "prefix rows and columns",
    Mode.PATCHES: "attention between patches",
    Mode.EDGE: "prefix rows and columns but the corner",
    Mode.CORNER: "corner of the prefix",
}


def _words_of_window(move: WindowMove) -> str:
    head = "all heads" if move.head is None else f"H{move.head}"
    patch = "every patch" if move.patch is None else f"patch {move.patch}"
    return f"L{move.layer} {head}, {patch}: window {' '.join(map(str, move.sides))}"


def _change_patches(
    vit: Vit, state: _State, pixels: Tensor, mask: Bool[np.ndarray, "patch"], how: str, seed: int
) -> _State:
    count = int(mask.sum())
    words = f"{count} patch{'es' * (count != 1)} {'in the mean colour' if how == 'mean' else how}"
    grid, step = grid_of(vit, 0), vit.anatomy.blocks[0].patch_step
    if how == "removed":
        if mask.all():
            raise UsageError("All patches were to be removed; leave at least one.")
        return replace(state, words=words, lost=mask)
    if how in ("mean", "black"):
        return _record(state.tap, paint(pixels, mask[None], grid, how, vit.preprocessing, step), words)
    sources = np.arange(len(mask))
    places = np.flatnonzero(mask)
    sources[places] = np.random.default_rng(seed).permutation(places)
    size = (pixels.shape[2], pixels.shape[3])
    moved = move_pixels(pixels, pixels_moved(size, grid, sources[None], step=step))
    return replace(_record(state.tap, moved, words), sources=sources)


def _window_bias(vit: Vit, move: WindowMove, lost: Bool[np.ndarray, "patch"] | None) -> Float[Tensor, "head query key"]:
    """What closes a head to the patches outside of a window."""
    block, grid = vit.anatomy.blocks[move.layer], grid_of(vit, move.layer)
    if any(call.kind != "token" or call.queries != block.tokens or call.keys != block.tokens for call in block.calls):
        raise Unsupported(
            f"L{move.layer} has attention of kind {block.kind!r}, so it has no map from patches to patches that a "
            "window could bound."
        )
    closed = ~_masks_of_sides(np.asarray(move.sides), grid)
    if move.patch is not None:
        closed &= (np.arange(len(closed)) == move.patch)[:, None]
    if lost is not None:
        closed[lost] = False  # a patch that is taken out may see everything: nobody sees it
    bias = torch.zeros((block.heads, block.tokens, block.tokens), device=vit.device)
    heads = slice(None) if move.head is None else slice(move.head, move.head + 1)
    bias[heads, block.prefix :, block.prefix :].masked_fill_(torch.as_tensor(closed, device=vit.device), -torch.inf)
    return bias


def _masks_of_sides(sides: Int[np.ndarray, "side"], grid: Grid) -> Bool[np.ndarray, "query patch"]:
    """Which patches lie in the window that reaches the same sides from every patch."""
    every = np.broadcast_to(sides, (grid[0] * grid[1], 4))
    return np.asarray(window_masks(np.stack(boxes_of_sides(every, grid), axis=-1), grid))


# --- running them ----------------------------------------------------------------------------------------------------


def _run(state: _State, layer: int | None, left_out: dict[str, str]) -> _Outcome:
    """The output, the tokens of every layer, and the maps of `layer` if one is named and has any."""
    tokens, maps, attention = dict(state.tokens), None, None
    try:
        maps = None if layer is None else LayerMaps(state.tap, layer)
    except Unsupported as reason:
        left_out.update(dict.fromkeys(ATTENTION, str(reason)))
    readers = Readers(output=tokens.__setitem__, attention=None if maps is None else maps.read)
    if state.lost is not None:
        logits = run_without(state.tap, state.replay, state.lost[None], readers, state.edits)
    else:
        layers = [edit.layer for edit in state.edits] + ([] if layer is None else [layer])
        first = min(layers, default=len(state.tap.anatomy.blocks) - 1)
        logits = state.tap.run_from(first, state.replay, state.edits, readers=readers)
    try:
        attention = None if maps is None else maps.joined()
    except Unsupported as reason:
        left_out.update(dict.fromkeys(ATTENTION, str(reason)))
    return _Outcome(logits, tokens, attention)


def _answers(vit: Vit, logits: Sequence[Float[Tensor, "image class"]]) -> dict[str, np.ndarray]:
    """What the task says of every step."""
    task, plain, steps = vit.task, logits[0], torch.stack(list(logits))
    label = plain.argmax(-1) if vit.n_classes is not None else None
    names = {f"head_{name}": name for name in ("probability", "divergence", "value", "value_change", "output_shift")}
    measured = model_metrics(plain, steps, label, task)
    arrays = {names[name]: values[:, 0].cpu().numpy() for name, values in measured.items() if name in names}
    if vit.n_classes is not None:
        probabilities = task.probabilities(steps[:, 0]).cpu().numpy()
        best = np.argsort(-steps[:, 0].float().cpu().numpy(), axis=-1, kind="stable")[:, :N_TOP]
        arrays["prediction"], arrays["top_class"] = best[:, 0], best
        arrays["top_probability"] = np.take_along_axis(probabilities, best, axis=-1)
        arrays["followed_probability"] = probabilities[:, _best_classes(best)]
    return arrays


def _best_classes(best: Int[np.ndarray, "step class"]) -> list[int]:
    """The best classes of the first step, then those that the last step adds."""
    return list(dict.fromkeys([*best[0].tolist(), *best[-1].tolist()]))


def _drift(
    vit: Vit, states: Sequence[_State], outcomes: Sequence[_Outcome], left_out: dict[str, str]
) -> dict[str, np.ndarray]:
    """`token_drift` [step layer token], where a layer's tokens can be followed."""
    intact, to_follow = outcomes[0].tokens, _blocks_to_follow(vit.anatomy, outcomes[0].tokens)
    if not to_follow:
        left_out[_DRIFT] = "no layer returns the tokens that it was given: which of them is which is not known"
        return {}
    shape = (len(states), len(vit.anatomy.blocks), max(each.shape[1] for each in intact.values()))
    drift = np.full(shape, np.nan, np.float32)
    for layer, block in to_follow.items():
        before = intact[layer]
        for step, (state, outcome) in enumerate(zip(states, outcomes, strict=True)):
            index = _tokens_of(block, before.shape[1], state)
            if index is None:
                continue
            after = outcome.tokens[layer][0]
            tokens, source = index
            if len(after) == before.shape[1]:  # otherwise the tokens themselves were taken out
                after = after[tokens]
            drift[step, layer, tokens] = one_minus_cosine(before[0, source], after).cpu().numpy()
    return {_DRIFT: drift}


def _blocks_to_follow(anatomy: Anatomy, intact: Mapping[int, Tensor]) -> dict[int, Block]:
    """Layers whose tokens are the same ones in every pass, each with the block that says where they lie.

    Which token is which is known on a grid, and as long as no layer returns another number of tokens than it was given:
    where tokens are merged (or pooled in an order that is not known) it may differ from pass to pass.
    """
    to_follow: dict[int, Block] = {}
    is_known = True
    for layer, own in enumerate(anatomy.blocks):
        n_tokens = intact[layer].shape[1]
        returned = block_returned(anatomy, layer, n_tokens)
        on_grid = returned is not None and returned.grid is not None
        is_picture = own.output_layout.token_axis is None
        is_known = on_grid or is_picture or n_tokens == 1 or (is_known and n_tokens == own.tokens)
        if is_known:
            to_follow[layer] = returned if returned is not None and on_grid else own
    return to_follow


def _tokens_of(block: Block, n_tokens: int, state: _State) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens that are still there, and those of the intact image with the same content; None on another grid."""
    tokens = np.arange(n_tokens)
    if state.sources is None and state.lost is None:
        return tokens, tokens
    n_patches = len(state.sources if state.sources is not None else state.lost)  # type: ignore[arg-type]
    if block.grid is None or n_tokens != block.prefix + n_patches:
        return None
    source = tokens.copy()
    if state.sources is not None:
        source[block.prefix :] = block.prefix + state.sources
    if state.lost is not None:
        tokens = np.concatenate([np.arange(block.prefix), block.prefix + np.flatnonzero(~state.lost)])
    return tokens, source[tokens]


def _attention(
    vit: Vit, layer: int, last: _State, outcomes: Sequence[_Outcome], left_out: dict[str, str]
) -> dict[str, np.ndarray]:
    before, after = outcomes[0].attention, outcomes[-1].attention
    if before is None or after is None:
        return {}
    full = after
    tokens = _tokens_of(vit.anatomy.blocks[layer], before.shape[-1], last)
    if last.lost is not None and tokens is not None:
        index = torch.as_tensor(tokens[0], device=after.device)
        left = after if after.shape[-1] == len(index) else after[:, index][:, :, index]
        full = torch.full_like(before, torch.nan)
        full[:, index[:, None], index] = left
    if full.shape != before.shape:
        reason = (
            f"L{layer} joins {after.shape[-1]} tokens after the changes and {before.shape[-1]} before; which of these "
            "they are is not known, as the layers before merge their tokens."
        )
        left_out.update(dict.fromkeys(ATTENTION, reason))
        return {}
    return {"attention_before": before.cpu().numpy(), "attention_after": full.cpu().numpy()}
