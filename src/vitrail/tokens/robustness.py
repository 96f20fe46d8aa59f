"""Occlusion and shuffling: what a model still answers, and how far its tokens move, when patches are lost or displaced.

After Nguyen et al. 2022 (arXiv 2210.07646). Edits are made on the model's own input, after resizing, so that no edited
cell leaks into its neighbour; attention is computed anew for every edited image; random, salient and non-salient
patches are lost in the same amounts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from vitrail.contract.outlook import require_finite
from vitrail.errors import Unsupported, UsageError
from vitrail.grid import Grid, patch_edges, pixels_moved, positions
from vitrail.models.noise import noise_images
from vitrail.models.open import Vit
from vitrail.models.preprocessing import Preprocessing
from vitrail.tap.edits import Edit
from vitrail.tap.tap import Readers, Replay, Tap
from vitrail.tokens.amounts import AMOUNTS, cells_that_divide
from vitrail.tokens.levels import Levels, block_returned, read_levels

__all__ = [
    "SELECTIONS",
    "Occlusion",
    "Response",
    "Shuffling",
    "all_probes",
    "cell_permutations",
    "drop_orders",
    "move_pixels",
    "paint",
    "patch_sources",
    "patches_to_drop",
    "respond",
    "run_without",
    "shuffle",
    "why_not_removable",
]

Images = Float[Tensor, "image channel row column"]
LOSSES = ("black", "mean", "removed")
"""How a patch is lost: painted black, painted in the image's mean colour, or taken out of the sequence of tokens."""
SELECTIONS = ("random", "salient", "non-salient")
"""Which patches are lost first."""

UNREAD_TOLERANCE = 1e-3
"""Logits that differ by more than this share of the largest once masked patches are blanked show that the model reads
them: far above rounding, far below what a pooled patch changes."""


@dataclass(frozen=True)
class Occlusion:
    """A share of the patches is lost.

    Attributes:
        selection: Which go first, one of `SELECTIONS`.
        loss: How they go, one of `LOSSES`.
        amount: Share of the patches, 0 or more and less than 1.
    """

    selection: str
    loss: str
    amount: float


@dataclass(frozen=True)
class Shuffling:
    """The image is cut into cells x cells, which change places at random.

    Attributes:
        cells: Cells along a side.
    """

    cells: int


Probe = Occlusion | Shuffling


class _Pairs(NamedTuple):
    """For each patch of the edited image the patch of the intact one with the same content, and whether it counts."""

    sources: Int[np.ndarray, "image patch"]
    left: Bool[np.ndarray, "image patch"]


@dataclass(frozen=True, eq=False)
class Response:
    """What one probe did to each image.

    Drift is 1 - cosine between a token and the one with the same content in the intact image, after each layer. On a
    coarser grid than the first layer's, a patch is left if nothing of it is lost.

    Attributes:
        correct: The label is still the prediction.
        probability: Of the label, 0 to 1.
        drift: Mean drift of the patches that are left, 0 to 2; NaN where cells or lost patches do not fit the grid.
        class_drift: Drift of the class token; NaN without one.
    """

    correct: Bool[np.ndarray, "image"]
    probability: Float[np.ndarray, "image"]
    drift: Float[np.ndarray, "image layer"]
    class_drift: Float[np.ndarray, "image layer"]


# --- which patches ----------------------------------------------------------------------------------------------------


def drop_orders(
    salience: Float[np.ndarray, "image patch"], numbers: Sequence[int], seed: int = 0
) -> dict[str, Int[np.ndarray, "image patch"]]:
    """In which order patches are lost, by selection.

    Args:
        salience: Of each patch; `salient` takes the highest first, `non-salient` the lowest, equals in random order.
        numbers: The images' own: an image's orders do not depend on the batch it is in.
        seed: Of the random order.

    Returns:
        Indices of patches by selection; the first of a row goes first.
    """
    ties = np.stack([np.random.default_rng((seed, number)).random(salience.shape[1]) for number in numbers])
    return {
        "random": ties.argsort(axis=1),
        "salient": np.lexsort((ties, -salience), axis=1),
        "non-salient": np.lexsort((ties, salience), axis=1),
    }


def patches_to_drop(order: Int[np.ndarray, "image patch"], amount: float) -> Bool[np.ndarray, "image patch"]:
    """The patches that are lost if a share of them is.

    Args:
        order: Indices of patches, the first of a row goes first.
        amount: Share of the patches, 0 or more and less than 1.

    Returns:
        True for lost patches, the same number in every image.

    Raises:
        UsageError: The share is not 0 or more and less than 1.
    """
    if not 0 <= amount < 1:
        raise UsageError(f"A share of {amount} patches cannot be lost; give 0 or more and less than 1.")
    is_lost = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(is_lost, order[:, : round(amount * order.shape[1])], True, axis=1)
    return is_lost


# --- edits of the model's input ---------------------------------------------------------------------------------------


def paint(
    images: Images,
    lost: Bool[np.ndarray, "image patch"],
    grid: tuple[int, int],
    colour: str,
    preprocessing: Preprocessing,
    step: tuple[int, int] | None = None,
) -> Images:
    """Paints patches over.

    Args:
        images: Prepared images.
        lost: The patches to paint.
        grid: (rows, columns) of patches.
        colour: "black", as the normalisation has it, or "mean" for the image's mean colour.
        preprocessing: Of the model.
        step: (rows, columns) of pixels from one patch to the next (`Block.patch_step`), as far as known.

    Returns:
        New images.
    """
    if colour == "black":
        values = [-mean / std for mean, std in zip(preprocessing.mean, preprocessing.std, strict=True)]
        fill = torch.tensor(values, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
    else:
        fill = images.float().mean((2, 3), keepdim=True).to(images)
    mask = lost.reshape(-1, 1, *grid)
    for axis in (2, 3):
        widths = np.diff(patch_edges(images.shape[axis], grid[axis - 2], step and step[axis - 2]))
        mask = mask.repeat(widths, axis)
        beyond = [(0, (images.shape[axis] - widths.sum()) * (each == axis)) for each in range(mask.ndim)]
        mask = np.pad(mask, beyond)
    return torch.where(torch.as_tensor(mask, device=images.device), fill, images)


def shuffle(
    images: Images,
    cells: int,
    permutations: Int[np.ndarray, "image cell"],
    grid: Grid | None = None,
    step: tuple[int, int] | None = None,
) -> Images:
    """Cuts images into cells and lets these change places.

    Args:
        images: Prepared images.
        cells: Cells along a side.
        permutations: The cell that each place of the result shows.
        grid: (rows, columns) of patches, which `cells` divides; None cuts the whole image.
        step: (rows, columns) of pixels from one patch to the next, as far as known.

    Returns:
        New images.
    """
    size = (images.shape[2], images.shape[3])
    return move_pixels(images, pixels_moved(size, (cells, cells), permutations, grid, step))


def move_pixels(images: Images, sources: Int[np.ndarray, "image pixel"]) -> Images:
    """Images whose pixels show others of the same image.

    Args:
        images: Prepared images.
        sources: The pixel that each shows, row by row.

    Returns:
        New images.
    """
    index = torch.as_tensor(sources, device=images.device)[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, index).view(images.shape)


def patch_sources(
    permutations: Int[np.ndarray, "image cell"], cells: int, grid: tuple[int, int]
) -> Int[np.ndarray, "image patch"]:
    """The patch of the intact image that each patch of the shuffled one shows.

    Args:
        permutations: As `shuffle`.
        cells: Cells along a side, which divide the grid.
        grid: (rows, columns) of patches.

    Returns:
        Indices of patches.
    """
    row, column = positions(grid)
    height, width = grid[0] // cells, grid[1] // cells
    source = permutations[:, row // height * cells + column // width]
    patches: np.ndarray[Any, Any] = (
        (source // cells * height + row % height) * grid[1] + source % cells * width + column % width
    )
    return patches


def cell_permutations(cells: int, numbers: Sequence[int], seed: int = 0) -> Int[np.ndarray, "image cell"]:
    """Random places for the cells of each image.

    Args:
        cells: Cells along a side.
        numbers: The images' own: a permutation does not depend on the batch.
        seed: Of all permutations.

    Returns:
        A permutation of the cells for each image.
    """
    return np.stack([np.random.default_rng((seed, number, cells)).permutation(cells**2) for number in numbers])


# --- taking patches out of the sequence -------------------------------------------------------------------------------


def run_without(
    tap: Tap,
    replay: Replay,
    lost: Bool[np.ndarray, "image patch"],
    readers: Readers | None = None,
    edits: Sequence[Edit] = (),
) -> Float[Tensor, "image class"]:
    """Logits with patches taken out of the sequence before the first block.

    Positions stay with their patches. Where positions enter in attention itself (relative or rotary), or the model
    needs its full grid, lost patches stay in the sequence and no token may attend to them: a class token cannot tell
    the difference.

    Args:
        tap: Of the model.
        replay: Of a recorded pass of the intact images.
        lost: The patches to take out, the same number in every image.
        readers: What to read on the way.
        edits: Changes to attention calls, between all tokens; those with maps only for a single image.

    Returns:
        Logits.

    Raises:
        Unsupported: Neither is possible (windows; patches pooled under such positions).
    """
    block = tap.anatomy.blocks[0]
    left = np.stack([np.flatnonzero(~each) for each in lost]) + block.prefix
    prefix = np.tile(np.arange(block.prefix), (len(left), 1))
    index = torch.as_tensor(np.concatenate([prefix, left], axis=1), device=replay.images.device)
    if any(set(each.kinds) != {"token"} for each in tap.anatomy.blocks):
        raise Unsupported("Patches can be taken out only where every layer attends between all tokens; paint them.")
    selected = [_select_in_edit(edit, index[0]) for edit in edits]
    try:
        return tap.run_from(0, _select_tokens(replay, tap, index), selected, readers=readers)
    except (RuntimeError, ValueError, IndexError, UsageError):  # the last: maps that are made for all tokens
        logits, other = (
            _run_masked(tap, replay, lost, readers, edits),
            _run_masked(tap, _blank_tokens(replay, tap, lost), lost, None, edits),
        )
        if (logits - other).abs().max() > UNREAD_TOLERANCE * logits.abs().max():
            raise Unsupported(
                "This model ties attention to a full grid and pools its patches, so none can be taken out; paint them."
            ) from None
        return logits


@torch.no_grad()
def why_not_removable(vit: Vit) -> str:
    """Tries whether patches can be taken out of the sequence, on one image of noise and its last patch.

    Args:
        vit: A model whose patches lie on a grid.

    Returns:
        The reason why not; empty where they can.
    """
    grid = vit.anatomy.blocks[0].grid
    if grid is None:
        return "its patches lie on no grid that could be found"
    replay, _ = vit.tap().record(noise_images(vit))
    lost = np.arange(grid[0] * grid[1])[None] == grid[0] * grid[1] - 1
    try:
        run_without(vit.tap(), replay, lost)
    except Unsupported as reason:
        return str(reason)
    return ""


def _select_tokens(replay: Replay, tap: Tap, index: Int[Tensor, "image kept"]) -> Replay:
    block, recorded = tap.anatomy.blocks[0], replay.blocks[0]
    leaves, form = tree_flatten((recorded.args, recorded.kwargs))
    leaf = leaves[block.main_input]
    tokens = block.layout.canonical(leaf)
    chosen = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
    leaves[block.main_input] = block.layout.original(chosen, leaf)
    args, kwargs = tree_unflatten(leaves, form)
    return replace(replay, blocks=[replace(recorded, args=args, kwargs=kwargs), *replay.blocks[1:]])


def _select_in_edit(edit: Edit, index: Int[Tensor, "kept"]) -> Edit:
    """The edit between the tokens that are left."""
    maps = {name: each for name in ("region", "bias") if (each := getattr(edit, name)) is not None}
    return replace(
        edit, **{name: each[..., index.to(each.device), :][..., index.to(each.device)] for name, each in maps.items()}
    )


def _blank_tokens(replay: Replay, tap: Tap, lost: Bool[np.ndarray, "image patch"]) -> Replay:
    """With nothing in the lost patches: an answer that differs still reads them."""
    block, recorded = tap.anatomy.blocks[0], replay.blocks[0]
    leaves, form = tree_flatten((recorded.args, recorded.kwargs))
    tokens = block.layout.canonical(leaves[block.main_input]).clone()
    tokens[:, block.prefix :][torch.as_tensor(lost, device=tokens.device)] = 0
    leaves[block.main_input] = block.layout.original(tokens, leaves[block.main_input])
    args, kwargs = tree_unflatten(leaves, form)
    return replace(replay, blocks=[replace(recorded, args=args, kwargs=kwargs), *replay.blocks[1:]])


def _run_masked(
    tap: Tap,
    replay: Replay,
    lost: Bool[np.ndarray, "image patch"],
    readers: Readers | None,
    edits: Sequence[Edit] = (),
) -> Float[Tensor, "image class"]:
    """Nobody attends to the lost patches, in any layer."""
    masks, n_tokens = list(edits), tap.anatomy.blocks[0].tokens
    for layer, block in enumerate(tap.anatomy.blocks):
        if {block.tokens, *(n for call in block.calls for n in (call.queries, call.keys))} != {n_tokens}:
            raise Unsupported(
                f"Patches can be taken out only where all layers attend between the same tokens; L0 is given {n_tokens}"
                f", and L{layer} attends to {block.calls[-1].keys}; paint them."
            )
        bias = torch.zeros((len(lost), 1, 1, block.tokens), device=replay.images.device)
        bias[:, 0, 0, block.prefix :].masked_fill_(torch.as_tensor(lost, device=bias.device), -torch.inf)
        masks.append(Edit(layer, bias=bias.expand(-1, -1, block.tokens, -1)))
    return tap.run_from(0, replay, masks, readers=readers)


# --- responses --------------------------------------------------------------------------------------------------------


def all_probes(
    grid: tuple[int, int],
    amounts: Sequence[float] = AMOUNTS,
    losses: Sequence[str] = LOSSES,
    selections: Sequence[str] = SELECTIONS,
) -> list[Probe]:
    """Every selection, loss and amount, and every shuffling that divides the grid.

    Args:
        grid: (rows, columns) of patches.
        amounts: Shares of the patches.
        losses: Of `LOSSES`.
        selections: Of `SELECTIONS`.

    Returns:
        Occlusions, then shufflings.
    """
    occlusions: list[Probe] = [
        Occlusion(selection, loss, amount) for selection in selections for loss in losses for amount in amounts
    ]
    return [*occlusions, *(Shuffling(cells) for cells in cells_that_divide(grid))]


@torch.no_grad()
def respond(
    vit: Vit,
    images: Images,
    labels: Int[np.ndarray, "image"],
    salience: Float[np.ndarray, "image patch"],
    numbers: Sequence[int],
    probes: Sequence[Probe],
    seed: int = 0,
    intact: Levels | None = None,
) -> list[Response]:
    """The response of each image to each probe.

    Args:
        vit: The model, with a classifier.
        images: Prepared images.
        labels: The class of each image whose probability is followed.
        salience: Of each patch, for the selections `salient` and `non-salient`.
        numbers: The images' own, which seed what is random.
        probes: What to try.
        seed: Of what is random.
        intact: The pass of the unedited images where it has been run already; None runs it.

    Returns:
        One response for each probe.

    Raises:
        Unsupported: The model has no classifier or no grid of patches, or patches cannot be taken out of it.
        ModelError: The answer to an image, edited or not, is not finite (NaN or infinite).
    """
    tap, grid = vit.tap(), _grid(vit)
    intact = intact or read_levels(tap, images)
    require_finite(vit.name, intact.logits)
    orders = drop_orders(salience, numbers, seed)
    prober = _Prober(vit, images, labels, intact, grid)
    return [
        prober.occlude(patches_to_drop(orders[probe.selection], probe.amount), probe.loss)
        if isinstance(probe, Occlusion)
        else prober.shuffle_cells(probe.cells, cell_permutations(probe.cells, numbers, seed))
        for probe in probes
    ]


class _Prober:
    """Runs probes of one batch and compares their tokens with the intact ones."""

    def __init__(
        self, vit: Vit, images: Images, labels: Int[np.ndarray, "image"], intact: Levels, grid: tuple[int, int]
    ) -> None:
        self._vit, self._tap, self._images, self._labels = vit, vit.tap(), images, labels
        self._intact, self._grid, self._step = intact, grid, vit.anatomy.blocks[0].patch_step
        self._drift: dict[int, tuple[Tensor, Tensor]] = {}

    def occlude(self, lost: Bool[np.ndarray, "image patch"], loss: str) -> Response:
        """Loses the marked patches and compares those that are left."""
        readers = Readers(
            output=lambda layer, tokens: self._compare(
                layer, tokens, lambda grid: _intact_pairs(lost, self._grid, grid)
            )
        )
        if loss == "removed":
            return self._response(run_without(self._tap, self._intact.replay, lost, readers))
        painted = paint(self._images, lost, self._grid, loss, self._vit.preprocessing, self._step)
        return self._response(self._tap.read(painted, readers))

    def shuffle_cells(self, cells: int, permutations: Int[np.ndarray, "image cell"]) -> Response:
        """Shuffles the cells and compares each patch with the one that shows the same in the intact image."""
        readers = Readers(
            output=lambda layer, tokens: self._compare(
                layer, tokens, lambda grid: _shuffle_pairs(permutations, cells, grid)
            )
        )
        shuffled = shuffle(self._images, cells, permutations, self._grid, self._step)
        return self._response(self._tap.read(shuffled, readers))

    def _compare(self, layer: int, tokens: Tensor, pairs_on: Callable[[Grid], _Pairs | None]) -> None:
        """Drift of one layer. NaN where its tokens lie on no grid, or on one that the edit does not cut evenly."""
        before = self._intact.tokens[layer + 1]
        drift = of_class = before.new_full((len(before),), torch.nan, dtype=torch.float32)
        block = block_returned(self._tap.anatomy, layer, before.shape[1])
        if block is not None and block.grid is not None:
            pairs = pairs_on(block.grid)
            if pairs is not None:
                drift = _mean_drift(tokens[:, block.prefix :], before[:, block.prefix :], pairs)
            index = self._tap.anatomy.class_index(layer)
            if index is not None:
                of_class = 1 - F.cosine_similarity(tokens[:, index].float(), before[:, index].float(), dim=-1)
        self._drift[layer] = drift, of_class

    def _response(self, logits: Float[Tensor, "image class"]) -> Response:
        require_finite(self._vit.name, logits)
        layers = sorted(self._drift)
        drift = torch.stack([self._drift[layer][0] for layer in layers], 1).float().cpu().numpy()
        of_class = torch.stack([self._drift[layer][1] for layer in layers], 1).float().cpu().numpy()
        self._drift = {}
        probabilities = self._vit.task.probabilities(logits).cpu().numpy()
        probability = np.take_along_axis(probabilities, self._labels[:, None], axis=1)[:, 0]
        return Response(logits.argmax(1).cpu().numpy() == self._labels, probability, drift, of_class)


def _intact_pairs(lost: Bool[np.ndarray, "image patch"], full: Grid, grid: Grid) -> _Pairs | None:
    """Every patch with itself, where nothing of it is lost; None for a grid that does not divide the full one."""
    if full[0] % grid[0] or full[1] % grid[1]:
        return None
    rows, columns = full[0] // grid[0], full[1] // grid[1]
    left = ~lost.reshape(len(lost), grid[0], rows, grid[1], columns).any(axis=(2, 4)).reshape(len(lost), -1)
    return _Pairs(np.tile(np.arange(left.shape[1]), (len(lost), 1)), left)


def _shuffle_pairs(permutations: Int[np.ndarray, "image cell"], cells: int, grid: Grid) -> _Pairs | None:
    """Every patch with the one it shows; None where a cell's edge runs through a patch of the grid."""
    if not cells_that_divide(grid, [cells]):
        return None
    sources = patch_sources(permutations, cells, grid)
    return _Pairs(sources, np.ones(sources.shape, dtype=bool))


def _mean_drift(
    tokens: Float[Tensor, "image patch channel"], before: Float[Tensor, "image intact channel"], pairs: _Pairs
) -> Float[Tensor, "image"]:
    """Mean over the patches that are left of 1 - cosine to the same content; NaN where none is left."""
    sources, left = (torch.as_tensor(each, device=before.device) for each in pairs)
    images = torch.arange(len(before), device=before.device)[:, None]
    if tokens.shape[1] != before.shape[1]:  # taken out of the sequence: the same number from every image
        sources = sources[left].view(len(before), -1)
        left = torch.ones_like(sources, dtype=torch.bool)
    drift = 1 - F.cosine_similarity(tokens.float(), before[images, sources].float(), dim=-1)
    return torch.where(left, drift, 0).sum(1) / left.sum(1)


def _grid(vit: Vit) -> tuple[int, int]:
    grid = vit.anatomy.blocks[0].grid
    if grid is None or vit.n_classes is None:
        raise Unsupported(f"{vit.name} has no grid of patches or no classifier, so losing patches cannot be scored.")
    return grid
