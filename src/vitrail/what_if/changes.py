"""What can be changed, checked against the model, and how to have the same elsewhere."""

from collections.abc import Sequence
from operator import index
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from vitrail.errors import Unsupported, UsageError
from vitrail.grid import Grid
from vitrail.heads.regions import Mode, require_mode
from vitrail.models.open import Vit
from vitrail.pruning.ranking import parse_heads

__all__ = [
    "HOW",
    "HeadOff",
    "WindowMove",
    "grid_of",
    "parse_heads_off",
    "parse_patches",
    "parse_window",
    "parse_windows",
    "use_this",
]

HOW = ("mean", "black", "removed", "shuffled")
"""What happens to patches: painted in the image's mean colour or in black, taken out of the sequence, or put in each
other's places."""

MAX_PROMPTS = 300
"""Characters of prompts that are written into the lines that do the same elsewhere; features have thousands."""

HOW_PATCHES = "Patches are given as indices, as (row, column) or as a mask of the grid."


class HeadOff(NamedTuple):
    """A head that is switched off, or a part of its map.

    Attributes:
        layer: counted from 0.
        head: counted from 0 within the layer.
        mode: the part that is set to zero, as in `vitrail.heads.regions`; everything by default.
    """

    layer: int
    head: int
    mode: int = Mode.EVERYTHING


class WindowMove(NamedTuple):
    """A window within which patches attend to patches; prefix tokens see everything and are seen by all.

    Attributes:
        layer: counted from 0.
        sides: patches left, top, right, bottom of the query, from 0.
        head: the head; None for all of the layer.
        patch: the query, an index on the layer's grid; None for all queries.
    """

    layer: int
    sides: tuple[int, int, int, int]
    head: int | None = None
    patch: int | None = None


def parse_heads_off(vit: Vit, heads: str | Sequence[Any]) -> list[HeadOff]:
    """The heads that are switched off.

    Args:
        vit: the model.
        heads: as "L2H0,L3H1", or (layer, head) or (layer, head, mode) each.

    Returns:
        The heads in order.

    Raises:
        UsageError: a head or mode is not there, or one is named twice.
        Unsupported: a layer does not have that mode.
    """
    try:
        heads_off = [HeadOff(*map(index, each)) for each in (parse_heads(heads) if isinstance(heads, str) else heads)]
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{heads!r} names no heads; give 'L0H4,L3H1', or (layer, head) or (layer, head, mode) of each."
        ) from error
    for off in heads_off:
        _check_head(vit, off.layer, off.head)
        if off.mode not in list(Mode) or off.mode == Mode.NOTHING:
            raise UsageError(f"A head has no part {off.mode}; choose a mode from 2 to 6 (vitrail.heads.regions).")
        require_mode(vit.anatomy, off.layer, Mode(off.mode), off.head)
    if len(set(heads_off)) < len(heads_off):
        raise UsageError("A head is to be switched off twice; name each once.")
    return heads_off


def _check_head(vit: Vit, layer: int, head: int) -> None:
    if not 0 <= layer < vit.n_layers:
        raise UsageError(f"L{layer} was asked for; the model has L0 to L{vit.n_layers - 1}.")
    if not 0 <= head < vit.n_heads[layer]:
        raise UsageError(f"L{layer}H{head} was asked for; L{layer} has heads 0 to {vit.n_heads[layer] - 1}.")


def parse_patches(vit: Vit, patches: Sequence[Any] | np.ndarray) -> Bool[np.ndarray, "patch"] | None:
    """The patches that change.

    Args:
        vit: the model.
        patches: indices row by row, (row, column) each, or a mask of the first layer's grid.

    Returns:
        A mask of the grid, row by row; None where there are none.

    Raises:
        UsageError: a patch lies outside of the grid.
    """
    try:
        values = np.asarray(patches)
    except ValueError as error:  # rows of unequal length
        raise UsageError(HOW_PATCHES) from error
    if values.size == 0:
        return None
    grid = grid_of(vit, 0)
    n_patches = grid[0] * grid[1]
    if values.dtype.kind == "b":
        if values.size != n_patches:
            raise UsageError(f"A mask of {values.size} patches was given; the grid is {grid[0]} x {grid[1]}.")
        mask = values.reshape(-1)
    else:
        if values.dtype.kind not in "iu" or values.ndim not in (1, 2) or (values.ndim == 2 and values.shape[1] != 2):
            raise UsageError(HOW_PATCHES)
        rows = values // grid[1] if values.ndim == 1 else values[:, 0]
        columns = values % grid[1] if values.ndim == 1 else values[:, 1]
        if not ((rows >= 0) & (rows < grid[0]) & (columns >= 0) & (columns < grid[1])).all():
            raise UsageError(f"A patch outside of the grid of {grid[0]} x {grid[1]} was asked for.")
        mask = np.zeros(n_patches, dtype=bool)
        mask[rows * grid[1] + columns] = True
    return np.asarray(mask) if mask.any() else None


def parse_window(vit: Vit, window: WindowMove | Sequence[Any]) -> WindowMove:
    """A window that is moved.

    Args:
        vit: the model.
        window: a `WindowMove`, or its fields in order; its patch may be (row, column).

    Returns:
        The window, in plain integers.

    Raises:
        UsageError: it is no window, or its layer, head or patch is not there.
    """
    try:
        move = WindowMove(*window)
        layer, head = index(move.layer), None if move.head is None else index(move.head)
        sides = tuple(int(side) for side in move.sides)
        fits = len(sides) == 4 and all(
            side >= 0 and side == value for side, value in zip(sides, move.sides, strict=True)
        )
        patch = _parse_patch(move.patch)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"{window!r} is no window; give (layer, (left, top, right, bottom), head, patch), the patch as an index or "
            "as (row, column)."
        ) from error
    if not fits:
        raise UsageError(f"Sides {move.sides} were asked for; give left, top, right, bottom as whole numbers from 0.")
    _check_head(vit, layer, 0 if head is None else head)
    grid = grid_of(vit, layer)
    row, column = patch if isinstance(patch, tuple) else divmod(patch or 0, grid[1])
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise UsageError(f"Patch {move.patch} was asked for; the grid of L{layer} is {grid[0]} x {grid[1]}.")
    left, top, right, bottom = sides
    return WindowMove(layer, (left, top, right, bottom), head, None if patch is None else row * grid[1] + column)


def parse_windows(vit: Vit, windows: Any) -> list[WindowMove]:
    """The windows that are moved.

    Args:
        vit: the model.
        windows: a list of what `parse_window` takes.

    Returns:
        The windows in their order.

    Raises:
        UsageError: it is no list, or one of them is no window of the model.
    """
    try:
        listed = list(windows)
    except TypeError as error:
        raise UsageError(
            f"{windows!r} is no list of windows; give (layer, (left, top, right, bottom)) of each."
        ) from error
    return [parse_window(vit, window) for window in listed]


def _parse_patch(patch: Any) -> int | tuple[int, int] | None:
    """A patch as an index or (row, column), whatever numbers say it."""
    if patch is None or np.ndim(patch) == 0:
        return None if patch is None else index(patch)
    row, column = patch
    return index(row), index(column)


def grid_of(vit: Vit, layer: int) -> Grid:
    """The grid of a layer.

    Args:
        vit: the model.
        layer: counted from 0.

    Returns:
        Rows and columns of patches.

    Raises:
        Unsupported: its tokens lie on none.
    """
    grid = vit.anatomy.blocks[layer].grid
    if grid is None:
        raise Unsupported(f"The tokens of L{layer} of {vit.name} lie on no grid that could be found.")
    return grid


def use_this(
    vit: Vit,
    off: Sequence[HeadOff],
    mask: Bool[np.ndarray, "patch"] | None,
    how: str,
    moves: Sequence[WindowMove],
    seed: int,
) -> str:
    """What does the same elsewhere.

    Args:
        vit: the model.
        off: heads that are switched off.
        mask: mask of the patches that change, or None.
        how: what happens to them.
        moves: windows that are moved.
        seed: of the places of shuffled patches.

    Returns:
        The command that removes the heads for good, where nothing else was changed; otherwise Python lines.
    """
    if off and mask is None and not moves and all(each.mode == Mode.EVERYTHING for each in off):
        heads = ",".join(f"L{each.layer}H{each.head}" for each in off)
        return f"vitrail prune STUDY --heads {heads} --out NEW_FOLDER"
    arguments: list[str] = []
    if off:
        arguments.append(f"heads_off={[tuple(map(int, each)) for each in off]}")
    if mask is not None:
        arguments.append(
            f"patches={np.flatnonzero(mask).tolist()}, how={how!r}" + (f", seed={seed}" if how == "shuffled" else "")
        )
    if moves:
        arguments.append(f"windows={[tuple(each) for each in moves]}")
    return "\n".join(
        [
            "import vitrail",
            "",
            *_opening(vit),
            'image = vitrail.decode_image("photo.jpg")',
            f"changed = vit.what_if(image, {', '.join(arguments)})",
        ]
    )


def _opening(vit: Vit) -> list[str]:
    """Python lines that open the model as it was opened, as far as they can be written."""
    if vit.opened_with is None:
        return ["vit = ...  # your own model, opened as it was here"]
    options = {name: value for name, value in vit.opened_with.items() if value is not None}
    if options.get("precision") == "float32":
        del options["precision"]
    if vit.preprocessing_source.startswith("given"):
        options["preprocessing"] = vit.preprocessing.as_dict()
    model, texts = options.pop("model"), {name: repr(value) for name, value in options.items()}
    lines = []
    if len(texts.get("prompts", "")) > MAX_PROMPTS:
        texts["prompts"] = "prompts"
        lines.append("prompts = ...  # those that it was opened with")
    arguments = "".join(f", {name}={text}" for name, text in texts.items())
    target = "" if vit.task.target is None else "  # and its target="
    return [*lines, f"vit = vitrail.open_vit({model!r}{arguments}){target}"]
