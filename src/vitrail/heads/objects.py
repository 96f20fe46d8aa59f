"""Which heads find the objects of an image: attention maps against masks, and against the masks of other images.

Of each head two maps are scored: that of the class token (the mean over queries where a layer has none), against all
objects together; and the map of each object patch, against the rest of its own object. Three scores, which need no
threshold: whether the strongest patch lies on the object, the overlap of as many strongest patches as the object has
(IoU), and the area under the ROC curve. Equal weights count as if their order were drawn at random.

The null is the same map against the objects of other images, at the places where those lie: it knows where objects lie
in general, and that neighbours belong together.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.analysis import Collector
from vitrail.errors import Unsupported
from vitrail.grid import Grid, positions
from vitrail.models.objects import object_share, patch_objects
from vitrail.models.open import Vit
from vitrail.models.token_grid import token_grids
from vitrail.tap.budget import budget_of
from vitrail.tap.tap import LayerAttention, Readers, Replay, Tap

if TYPE_CHECKING:
    from vitrail.one_image import OneImage

__all__ = ["SCORES", "centre_scores", "class_maps", "head_maps", "map_scores", "object_collectors"]

SCORES = ("pointing", "iou", "auroc")
"""The scores of a map against objects."""

RULES = ("", "_null")
"""Against the objects of the image, and against those of other images: as they end a measure's name."""

ON_OBJECT = 0.5
"""Share of a patch that objects cover from which it counts as theirs."""

N_OTHERS = 4
"""Masks of other images that a map is compared with, at most: the last before it in its batch, so that no number
depends on images that follow. The other images of a study have masks of their own."""

PIECE_BYTES = 2 * 2**20
"""Maps that a processor scores at a time: with a dozen copies of them, they stay in its caches."""

EXAMPLES = 8
"""One image in so many, drawn by its pixels, keeps its maps for figures."""

Ids = Int[np.ndarray, "_ _"]


def map_scores(
    maps: Float[Tensor, "*row patch"],
    objects: Bool[Tensor, "*row patch"],
    counted: Bool[Tensor, "*row patch"] | None = None,
) -> Float[Tensor, "*row score"]:
    """Pointing accuracy, IoU and AUROC of maps.

    Args:
        maps: a weight for each patch; only their order counts.
        objects: the patches that should be strong.
        counted: the patches that are looked at; None for all.

    Returns:
        In the order of `SCORES`, each 0 to 1; NaN where all patches that are looked at are on objects, or none is. Of
        tied patches the expected number counts as strongest, had their order been drawn.
    """
    return _score_ranks(_rank(maps, torch.ones_like(maps, dtype=torch.bool) if counted is None else counted), objects)


class _Ranks(NamedTuple):
    """Of each patch: whether it counts, and how many of those that count are weaker, and no stronger, than it is."""

    counted: Bool[Tensor, "*row patch"]
    below: Float[Tensor, "*row patch"]
    upto: Float[Tensor, "*row patch"]


def _rank(maps: Float[Tensor, "*row patch"], counted: Bool[Tensor, "#*row patch"]) -> _Ranks:
    maps = torch.where(counted, _without_rounding(maps), -torch.inf)
    n_left_out = (~counted).sum(-1, keepdim=True)
    maps = maps.contiguous()
    order = maps.sort(-1).values.contiguous()
    below = (torch.searchsorted(order, maps) - n_left_out).float()
    upto = (torch.searchsorted(order, maps, right=True) - n_left_out).float()
    return _Ranks(counted, below, upto)


def _score_ranks(ranks: _Ranks, objects: Bool[Tensor, "#*row patch"]) -> Float[Tensor, "*row score"]:
    """The scores of maps whose patches are ranked against one set of objects."""
    counted, below, upto = ranks
    objects = objects & counted  # of fewer dimensions than the ranks where all maps of an image have the same
    n_counted, n_objects = counted.sum(-1), objects.sum(-1)

    def hits(n_strongest: Int[Tensor, "#*row"]) -> Float[Tensor, "*row"]:
        """Patches of objects among so many strongest ones; of a tie that does not fit in whole, the expected number."""
        share = ((upto - (n_counted - n_strongest)[..., None]) / (upto - below).clamp(min=1)).clamp(0, 1)
        return torch.where(objects, share, 0).sum(-1)

    on_objects = hits(n_objects)
    sums = torch.where(objects, (below + upto + 1) / 2, 0).sum(-1)
    above = (sums - n_objects * (n_objects + 1) / 2) / (n_objects * (n_counted - n_objects)).clamp(min=1)
    scores = torch.stack(
        [hits(torch.ones_like(n_objects)), on_objects / (2 * n_objects - on_objects).clamp(min=1), above], -1
    )
    scored = (n_objects > 0) & (n_objects < n_counted)
    return torch.where(scored[..., None], scores, torch.nan)


def _without_rounding(maps: Float[Tensor, "*row patch"]) -> Float[Tensor, "*row patch"]:
    """Weights to 20 bits: even attention differs in the last of 24, in an order that is the same in every image."""
    mantissa, exponent = torch.frexp(maps.to(torch.float32))
    return torch.ldexp((mantissa * 2**20).round() / 2**20, exponent)


def class_maps(
    weights: Float[Tensor, "*batch head query key"], prefix: int, class_index: int | None
) -> Float[Tensor, "*batch head patch"]:
    """The map of each head that is shown of a whole image.

    Args:
        weights: attention after softmax, prefix tokens first.
        prefix: number of prefix tokens.
        class_index: the class token; None where there is none.

    Returns:
        Attention of the class token to each patch; without one what each patch receives from the other patches, mean
        over them.
    """
    if class_index is not None:
        return weights[..., class_index, prefix:]
    patches = weights[..., prefix:, prefix:]
    received = patches.sum(-2) - patches.diagonal(dim1=-2, dim2=-1)
    return received / max(patches.shape[-1] - 1, 1)


def centre_scores(objects: Bool[np.ndarray, "*batch patch"], grid: Grid) -> Float[np.ndarray, "*batch score"]:
    """What a blob in the middle of the view scores, which knows nothing of the image.

    Args:
        objects: the patches of objects.
        grid: rows and columns.

    Returns:
        In the order of `SCORES`.
    """
    row, column = positions(grid)
    off = np.hypot(row - (grid[0] - 1) / 2, column - (grid[1] - 1) / 2)
    blob = torch.from_numpy(np.broadcast_to(-off, objects.shape).copy())
    return map_scores(blob, torch.from_numpy(objects)).numpy()


def object_collectors(vit: Vit, names: Sequence[str], options: Mapping[str, str]) -> list[Collector]:
    """The collector of the scores of heads against objects.

    Args:
        vit: the model, some of whose layers join patches of one grid.
        names: of measures that this model has.
        options: none is used.

    Returns:
        One collector.
    """
    return [_ObjectCollector(vit, names)]


def head_maps(one: "OneImage") -> dict[str, np.ndarray]:
    """Computes the map of every head of one image that has a mask.

    Args:
        one: the image with its plain pass.

    Returns:
        `head_map` [layer head patch], attention weights; NaN for layers whose maps lie on no grid and for heads and
        patches that a layer lacks.

    Raises:
        Unsupported: the image has no mask, or no layer has a map between patches.
    """
    vit, (grids, refused) = one.vit, token_grids(one.vit)
    if one.instance_ids is None:
        raise Unsupported("it needs objects: give instance ids (mask=, --mask)")
    if not grids:
        raise Unsupported(f"no layer has a map between patches of one grid: {next(iter(refused.values()))}")
    n_patches = max(tokens.n_patches for tokens in grids.values())
    maps = np.full((vit.n_layers, max(vit.n_heads), n_patches), np.nan, np.float32)

    def read(attention: LayerAttention) -> None:
        tokens = grids.get((attention.layer, attention.call))
        if tokens is not None:
            weights = attention.weights_on_grid()[0].float()
            own = class_maps(weights, tokens.n_prefix, vit.anatomy.class_index(attention.layer))
            maps[attention.layer, tokens.heads, : own.shape[1]] = own.cpu().numpy()

    with torch.no_grad():
        vit.tap().read(one.pixels, Readers(attention=read))
    return {"head_map": maps}


class _Objects(NamedTuple):
    """The objects of a batch on one grid, and those of other images that each is compared with.

    Images without a mask, and those where all patches or none lie on objects, have no patch on any. `on` says which
    patches lie on objects and `owner` on which, 0 for none. Both begin with the image's own; the others are those of
    the last images before it that have objects, without a patch where there are fewer.
    """

    on: Bool[Tensor, "set image patch"]
    owner: Int[Tensor, "set image patch"]


class _ObjectCollector:
    """Scores of every head's maps against masks, read off each attention map while the plain pass makes it."""

    replays = False

    def __init__(self, vit: Vit, names: Sequence[str]) -> None:
        self.measures = tuple(names)
        self._vit, self._grids = vit, token_grids(vit)[0]
        self._first_grid = next(iter(self._grids.values())).grid
        self._objects: dict[Grid, _Objects] = {}
        self._maps: dict[tuple[int, int], Float[Tensor, "image head patch"]] = {}
        self._patch_scores: dict[tuple[int, int], Float[Tensor, "rule image head score"]] = {}

    def take_masks(self, masks: Sequence[Ids | None]) -> None:
        """Instance ids of the coming batch, as the model sees it."""
        device, blocks = self._vit.device, self._vit.anatomy.blocks
        steps = {tokens.grid: blocks[layer].patch_step for (layer, _), tokens in self._grids.items()}
        self._objects = {grid: _objects_on_grid(masks, grid, step, device) for grid, step in steps.items()}

    def readers(self) -> Readers:
        """Reads every attention whose map joins the patches of one grid."""
        return Readers(attention=self._read)

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> dict[str, np.ndarray]:
        """[image layer head], [image layer] and [image] scores; NaN without a mask, objects, or a map on a grid."""
        blocks, n_images = self._vit.anatomy.blocks, len(logits)
        shape = (len(RULES), n_images, len(blocks))
        of_heads = (*shape, max(block.heads for block in blocks), len(SCORES))
        by_kind = {"": np.full(of_heads, np.nan, np.float32), "patch": np.full(of_heads, np.nan, np.float32)}
        by_kind["layer"] = np.full((*shape, len(SCORES)), np.nan, np.float32)
        for (layer, call), tokens in self._grids.items():
            here = (slice(None), slice(None), layer, tokens.heads)
            by_kind[""][here] = self._score(self._maps[layer, call], tokens.grid)
            by_kind["patch"][here] = self._patch_scores[layer, call].cpu().numpy()
        for layer, tokens in {layer: tokens for (layer, _), tokens in self._grids.items()}.items():
            maps = [each for (of, _), each in self._maps.items() if of == layer]
            by_kind["layer"][:, :, layer] = self._score(torch.cat(maps, 1).mean(1), tokens.grid)
        arrays = {name: self._array(name, by_kind, replay.images) for name in self.measures}
        self._maps, self._patch_scores = {}, {}
        return arrays

    def _array(
        self, name: str, by_kind: Mapping[str, np.ndarray], images: Float[Tensor, "image channel row column"]
    ) -> Float[np.ndarray, "image ..."]:
        if name == "object_map":
            return self._example_maps(images)
        kind, score, rule = _words(name)
        if kind == "centre":
            own = self._objects[self._first_grid].on[0]
            return centre_scores(own.cpu().numpy(), self._first_grid)[:, SCORES.index(score)]
        return by_kind[kind][RULES.index(rule), ..., SCORES.index(score)]

    def _score(self, maps: Float[Tensor, "image *head patch"], grid: Grid) -> Float[np.ndarray, "rule image *head _"]:
        ranks = _rank(maps, torch.ones_like(maps, dtype=torch.bool))
        on = self._objects[grid].on
        return _by_rules([_score_ranks(ranks, each if maps.ndim == 2 else each[:, None]) for each in on]).cpu().numpy()

    def _example_maps(
        self, images: Float[Tensor, "image channel row column"]
    ) -> Float[np.ndarray, "image layer head _"]:
        """Maps of the example images; NaN for all others."""
        blocks = self._vit.anatomy.blocks
        n_patches = max(tokens.n_patches for tokens in self._grids.values())
        shape = (len(images), len(blocks), max(block.heads for block in blocks), n_patches)
        array = np.full(shape, np.nan, dtype=np.float32)
        drawn = [zlib.crc32(each.tobytes()) % EXAMPLES == 0 for each in images.float().cpu().numpy()]
        examples = np.flatnonzero(drawn & self._objects[self._first_grid].on[0].any(-1).cpu().numpy())
        for (layer, call), tokens in self._grids.items():
            maps = self._maps[layer, call].cpu().numpy()
            array[examples, layer, tokens.heads, : tokens.n_patches] = maps[examples]
        return array

    def _read(self, attention: LayerAttention) -> None:
        key = attention.layer, attention.call
        if key not in self._grids:
            return
        prefix, owner = self._grids[key].n_prefix, self._objects[self._grids[key].grid].owner
        class_index = self._vit.anatomy.class_index(attention.layer)
        max_bytes = budget_of(owner.device).bytes_for(PIECE_BYTES)
        maps, scores = [], []
        for images, weights in _chunks(attention, max_bytes):
            maps.append(class_maps(weights, prefix, class_index))
            scores.append(_score_patch_maps(weights[..., prefix:, prefix:], owner[:, images], max_bytes))
        self._maps[key] = torch.cat(maps)
        self._patch_scores[key] = torch.cat(scores, 1)


def _words(name: str) -> tuple[str, str, str]:
    """Kind of map, score and rule in the name of a measure."""
    rule = RULES[1] if name.endswith(RULES[1]) else RULES[0]
    *kind, score = name.removeprefix("object_").removesuffix(rule).split("_")
    return "".join(kind), score, rule


def _objects_on_grid(
    masks: Sequence[Ids | None], grid: Grid, step: tuple[int, int] | None, device: torch.device | str
) -> _Objects:
    """The objects of each image, and of up to `N_OTHERS` before it."""
    on = np.zeros((1 + N_OTHERS, len(masks), grid[0] * grid[1]), dtype=bool)
    owner = np.zeros(on.shape, dtype=np.int64)
    earlier: list[int] = []
    for image, ids in enumerate(masks):
        covered = np.zeros(0, dtype=bool) if ids is None else object_share(ids, grid, step) >= ON_OBJECT
        if ids is None or covered.all() or not covered.any():
            continue
        on[0, image], owner[0, image] = covered, patch_objects(ids, grid, step)
        for number, other in enumerate(earlier[-N_OTHERS:], start=1):
            on[number, image], owner[number, image] = on[0, other], owner[0, other]
        earlier.append(image)
    return _Objects(torch.from_numpy(on).to(device), torch.from_numpy(owner).to(device))


def _chunks(attention: LayerAttention, max_bytes: int) -> Iterator[tuple[slice, Float[Tensor, "image head query key"]]]:
    if attention.windows > 1:
        yield slice(None), attention.weights_on_grid()
    else:
        yield from attention.weights_in_chunks(max_bytes)


def _by_rules(scores: Sequence[Float[Tensor, "image *head score"]]) -> Float[Tensor, "rule image *head score"]:
    """Scores against the objects of the image, and the mean of those against the objects of other images."""
    own, *others = scores
    return torch.stack([own, torch.stack(others).nanmean(0)])


def _score_patch_maps(
    between: Float[Tensor, "image head query key"], owner: Int[Tensor, "set image patch"], max_bytes: int
) -> Float[Tensor, "rule image head score"]:
    """Mean over the patches of objects: the map of each against the other patches of its object."""
    n_patches = between.shape[-1]
    step = max(1, max_bytes // (between[:, :, 0].numel() * between.element_size()))
    scores: list[list[Float[Tensor, "image head query score"]]] = [[] for _ in owner]
    for start in range(0, n_patches, step):
        queries = torch.arange(start, min(start + step, n_patches), device=between.device)
        ranks = _rank(between[:, :, queries], queries[:, None] != torch.arange(n_patches, device=between.device))
        for each, own in zip(owner, scores, strict=True):
            theirs = each[:, queries, None]
            own.append(_score_ranks(ranks, ((theirs == each[:, None]) & (theirs > 0))[:, None]))
    return _by_rules([torch.cat(each, 2).nanmean(2) for each in scores])
