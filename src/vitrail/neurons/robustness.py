"""Occlusion and shuffling: what a model still answers, and how far its tokens move, when patches are lost or displaced.

After Nguyen et al. 2022 (arXiv 2210.07646). Edits are made on the model's own input, after resizing, so that no edited
cell leaks into its neighbour; attention is computed anew for every edited image; random, salient and non-salient
patches are lost in the same amounts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from vitrail.errors import Unsupported, UsageError
from vitrail.neurons.amounts import AMOUNTS, cells_that_divide
from vitrail.neurons.levels import Levels, read_levels
from vitrail.vit.edits import Edit
from vitrail.vit.open import Vit
from vitrail.vit.preprocessing import Preprocessing
from vitrail.vit.tap import Readers, Replay, Tap

__all__ = [
    "LOSSES",
    "SELECTIONS",
    "Occlusion",
    "Response",
    "Shuffling",
    "cells_that_divide",
    "drop_orders",
    "lost_patches",
    "moved_patches",
    "paint",
    "probes",
    "respond",
    "run_without",
    "shuffle",
]

Images = Float[Tensor, "image channel row column"]
LOSSES = ("black", "mean", "removed")
"""How a patch is lost: painted black, painted in the image's mean colour, or taken out of the sequence of tokens."""
SELECTIONS = ("random", "salient", "non-salient")


@dataclass(frozen=True)
class Occlusion:
    """This share of the patches is lost."""

    selection: str
    loss: str
    amount: float


@dataclass(frozen=True)
class Shuffling:
    """The image is cut into cells x cells, which change places at random."""

    cells: int


Probe = Occlusion | Shuffling


@dataclass(frozen=True, eq=False)
class Response:
    """What one probe did to each image. Drift is 1 - cosine to the same content in the intact image, after each layer;
    `drift` averages over the patches that are left, `class_drift` is the class token's (NaN without one)."""

    correct: Bool[np.ndarray, "image"]
    probability: Float[np.ndarray, "image"]
    drift: Float[np.ndarray, "image layer"]
    class_drift: Float[np.ndarray, "image layer"]


# --- which patches ----------------------------------------------------------------------------------------------------


def drop_orders(
    salience: Float[np.ndarray, "image patch"], numbers: Sequence[int], seed: int = 0
) -> dict[str, Int[np.ndarray, "image patch"]]:
    """In which order patches are lost, by selection; the first of a row goes first.

    `salient` takes the highest salience first, `non-salient` the lowest, equals in random order. `numbers` are the
    images' own: an image's orders do not depend on the batch it is in.
    """
    ties = np.stack([np.random.default_rng((seed, number)).random(salience.shape[1]) for number in numbers])
    return {
        "random": ties.argsort(axis=1),
        "salient": np.lexsort((ties, -salience), axis=1),
        "non-salient": np.lexsort((ties, salience), axis=1),
    }


def lost_patches(order: Int[np.ndarray, "image patch"], amount: float) -> Bool[np.ndarray, "image patch"]:
    """The first `amount` (a share) of each row of `order`, marked in place; the same number in every image."""
    if not 0 <= amount < 1:
        raise UsageError(f"A share of {amount} patches cannot be lost; give 0 or more and less than 1.")
    marked = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(marked, order[:, : round(amount * order.shape[1])], True, axis=1)
    return marked


# --- edits of the model's input ---------------------------------------------------------------------------------------


def paint(
    images: Images,
    lost: Bool[np.ndarray, "image patch"],
    grid: tuple[int, int],
    colour: str,
    preprocessing: Preprocessing,
) -> Images:
    """Prepared images with the lost patches in black (as the normalisation has it) or the image's mean colour."""
    rows, columns = images.shape[2] // grid[0], images.shape[3] // grid[1]
    if colour == "black":
        values = [-mean / std for mean, std in zip(preprocessing.mean, preprocessing.std, strict=True)]
        fill = torch.tensor(values, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
    else:
        fill = images.float().mean((2, 3), keepdim=True).to(images)
    mask = torch.as_tensor(lost, device=images.device).view(-1, 1, *grid)
    return torch.where(mask.repeat_interleave(rows, 2).repeat_interleave(columns, 3), fill, images)


def shuffle(images: Images, cells: int, places: Int[np.ndarray, "image cell"]) -> Images:
    """Images cut into cells x cells; place c of the result shows cell `places[image, c]`."""
    height, width = images.shape[2] // cells, images.shape[3] // cells
    cut = images.unflatten(3, (cells, width)).unflatten(2, (cells, height)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    index = torch.as_tensor(places, device=images.device)
    moved = cut[torch.arange(len(images), device=images.device)[:, None], index]
    joined: Tensor = moved.unflatten(1, (cells, cells)).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
    return joined


def moved_patches(
    places: Int[np.ndarray, "image cell"], cells: int, grid: tuple[int, int]
) -> Int[np.ndarray, "image patch"]:
    """Which patch of the intact image each patch of the shuffled one shows. `cells` must divide the grid."""
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    height, width = grid[0] // cells, grid[1] // cells
    source = places[:, row // height * cells + column // width]
    shown: np.ndarray[Any, Any] = (
        (source // cells * height + row % height) * grid[1] + source % cells * width + column % width
    )
    return shown


def cell_places(cells: int, numbers: Sequence[int], seed: int = 0) -> Int[np.ndarray, "image cell"]:
    """Random places for the cells of each image, its own for each image number."""
    return np.stack([np.random.default_rng((seed, number, cells)).permutation(cells**2) for number in numbers])


# --- taking patches out of the sequence -------------------------------------------------------------------------------


def run_without(
    tap: Tap, replay: Replay, lost: Bool[np.ndarray, "image patch"], readers: Readers | None = None
) -> Float[Tensor, "image class"]:
    """Logits with the lost patches taken out before the first block, the same number in every image.

    Positions stay with their patches. Where positions enter in attention itself (relative or rotary), or the model
    needs its full grid, lost patches stay in the sequence and nobody may look at them: a class token cannot tell the
    difference. Raises `Unsupported` where neither is possible (windows; patches pooled under such positions).
    """
    block = tap.anatomy.blocks[0]
    kept = np.stack([np.flatnonzero(~each) for each in lost]) + block.prefix
    prefix = np.tile(np.arange(block.prefix), (len(kept), 1))
    index = torch.as_tensor(np.concatenate([prefix, kept], axis=1), device=replay.images.device)
    if any(each.kind != "token" for each in tap.anatomy.blocks):
        raise Unsupported("Patches can be taken out only where every layer attends between all tokens; paint them.")
    try:
        return tap.run_from(0, _gathered(replay, tap, index), readers=readers)
    except (RuntimeError, ValueError, IndexError):
        logits, other = _closed(tap, replay, lost, readers), _closed(tap, _blanked(replay, tap, lost), lost, None)
        if (logits - other).abs().max() > 1e-3 * logits.abs().max():
            raise Unsupported(
                "This model ties attention to a full grid and pools its patches, so none can be taken out; paint them."
            ) from None
        return logits


def _gathered(replay: Replay, tap: Tap, index: Int[Tensor, "image kept"]) -> Replay:
    block, recorded = tap.anatomy.blocks[0], replay.blocks[0]
    leaves, form = tree_flatten((recorded.args, recorded.kwargs))
    leaf = leaves[block.main_input]
    tokens = block.layout.canonical(leaf)
    chosen = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
    leaves[block.main_input] = block.layout.original(chosen, leaf)
    args, kwargs = tree_unflatten(leaves, form)
    return replace(replay, blocks=[replace(recorded, args=args, kwargs=kwargs), *replay.blocks[1:]])


def _blanked(replay: Replay, tap: Tap, lost: Bool[np.ndarray, "image patch"]) -> Replay:
    """With nothing in the lost patches: an answer that differs still reads them."""
    block, recorded = tap.anatomy.blocks[0], replay.blocks[0]
    leaves, form = tree_flatten((recorded.args, recorded.kwargs))
    tokens = block.layout.canonical(leaves[block.main_input]).clone()
    tokens[:, block.prefix :][torch.as_tensor(lost, device=tokens.device)] = 0
    leaves[block.main_input] = block.layout.original(tokens, leaves[block.main_input])
    args, kwargs = tree_unflatten(leaves, form)
    return replace(replay, blocks=[replace(recorded, args=args, kwargs=kwargs), *replay.blocks[1:]])


def _closed(
    tap: Tap, replay: Replay, lost: Bool[np.ndarray, "image patch"], readers: Readers | None
) -> Float[Tensor, "image class"]:
    """Nobody attends to the lost patches, in any layer."""
    edits = []
    for layer, block in enumerate(tap.anatomy.blocks):
        bias = torch.zeros((len(lost), 1, 1, block.tokens), device=replay.images.device)
        bias[:, 0, 0, block.prefix :].masked_fill_(torch.as_tensor(lost, device=bias.device), -torch.inf)
        edits.append(Edit(layer, bias=bias.expand(-1, -1, block.tokens, -1)))
    return tap.run_from(0, replay, edits, readers=readers)


# --- responses --------------------------------------------------------------------------------------------------------


def probes(
    grid: tuple[int, int],
    amounts: Sequence[float] = AMOUNTS,
    losses: Sequence[str] = LOSSES,
    selections: Sequence[str] = SELECTIONS,
) -> list[Probe]:
    """Every selection, loss and amount, and every shuffling that divides the grid."""
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
    asked: Sequence[Probe],
    seed: int = 0,
    intact: Levels | None = None,
) -> list[Response]:
    """The response of each image to each of the probes `asked`; `intact` saves a pass where it is known already."""
    tap, grid = vit.tap(), _grid(vit)
    intact = intact or read_levels(tap, images)
    orders = drop_orders(salience, numbers, seed)
    prober = _Prober(vit, images, labels, intact, grid)
    return [
        prober.occluded(lost_patches(orders[probe.selection], probe.amount), probe.loss)
        if isinstance(probe, Occlusion)
        else prober.shuffled(probe.cells, cell_places(probe.cells, numbers, seed))
        for probe in asked
    ]


class _Prober:
    """Runs probes of one batch and compares their tokens with the intact ones."""

    def __init__(
        self, vit: Vit, images: Images, labels: Int[np.ndarray, "image"], intact: Levels, grid: tuple[int, int]
    ) -> None:
        self._vit, self._tap, self._images, self._labels = vit, vit.tap(), images, labels
        self._intact, self._grid = intact, grid
        self._drift: dict[int, tuple[Tensor, Tensor]] = {}

    def occluded(self, lost: Bool[np.ndarray, "image patch"], loss: str) -> Response:
        kept = torch.as_tensor(np.stack([np.flatnonzero(~each) for each in lost]), device=self._images.device)
        if loss == "removed":
            readers = Readers(output=lambda layer, tokens: self._compare(layer, tokens, kept, kept))
            return self._response(run_without(self._tap, self._intact.replay, lost, readers))
        painted = paint(self._images, lost, self._grid, loss, self._vit.preprocessing)
        readers = Readers(output=lambda layer, tokens: self._compare(layer, tokens, kept, kept))
        return self._response(self._tap.read(painted, readers))

    def shuffled(self, cells: int, places: Int[np.ndarray, "image cell"]) -> Response:
        sources = torch.as_tensor(moved_patches(places, cells, self._grid), device=self._images.device)
        here = torch.arange(sources.shape[1], device=self._images.device).expand_as(sources)
        readers = Readers(output=lambda layer, tokens: self._compare(layer, tokens, here, sources))
        return self._response(self._tap.read(shuffle(self._images, cells, places), readers))

    def _compare(self, layer: int, tokens: Tensor, here: Tensor, there: Tensor) -> None:
        """`here` are patches of the edited image, `there` the same content in the intact one."""
        block, before = self._tap.anatomy.blocks[layer], self._intact.tokens[layer + 1]
        on_grid = block.grid == self._grid and before.shape[1] == block.tokens
        if not on_grid:  # another grid (a hierarchy): every token, in its place
            same = tokens.shape[1] == before.shape[1]
            drift = (
                1 - F.cosine_similarity(tokens.float(), before.float(), dim=-1)
                if same
                else tokens.new_full((1, 1), torch.nan)
            )
            self._drift[layer] = drift.mean(1).expand(len(before)), drift.new_full((len(before),), torch.nan)
            return
        left_out = tokens.shape[1] != before.shape[1]
        own = tokens[:, block.prefix :] if left_out else _picked(tokens, here + block.prefix)
        drift = 1 - F.cosine_similarity(own.float(), _picked(before, there + block.prefix).float(), dim=-1)
        index = self._tap.anatomy.class_index(layer)
        of_class = (
            1 - F.cosine_similarity(tokens[:, index].float(), before[:, index].float(), dim=-1)
            if index is not None
            else drift.new_full((len(drift),), torch.nan)
        )
        self._drift[layer] = drift.mean(1), of_class

    def _response(self, logits: Float[Tensor, "image class"]) -> Response:
        layers = sorted(self._drift)
        drift = torch.stack([self._drift[layer][0] for layer in layers], 1).float().cpu().numpy()
        of_class = torch.stack([self._drift[layer][1] for layer in layers], 1).float().cpu().numpy()
        self._drift = {}
        answers = logits.float().softmax(-1).cpu().numpy()
        probability = np.take_along_axis(answers, self._labels[:, None], axis=1)[:, 0]
        return Response(answers.argmax(1) == self._labels, probability, drift, of_class)


def _picked(tokens: Float[Tensor, "image token channel"], index: Int[Tensor, "image kept"]) -> Tensor:
    return tokens[torch.arange(len(tokens), device=tokens.device)[:, None], index]


def _grid(vit: Vit) -> tuple[int, int]:
    grid = vit.anatomy.blocks[0].grid
    if grid is None or vit.n_classes is None:
        raise Unsupported(f"{vit.name} has no grid of patches or no classifier, so losing patches cannot be scored.")
    return grid
