"""Collectors of tokens: norms, grouping and robustness of each image of a study."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.analysis import Collector
from vitrail.models.objects import object_share, patch_objects
from vitrail.models.open import Vit
from vitrail.tap.tap import Readers, Replay, Tap
from vitrail.tokens import robustness
from vitrail.tokens.amounts import AMOUNTS, cells_that_divide
from vitrail.tokens.flow import LayerSteps, rollout
from vitrail.tokens.grouping import Grouping, score_grouping
from vitrail.tokens.levels import Levels, level_zero
from vitrail.tokens.robustness import Occlusion, Response, Shuffling
from vitrail.tokens.vectors import image_embeddings, token_norms

__all__ = ["token_collectors"]

Ids = Int[np.ndarray, "_ _"]
Arrays = dict[str, np.ndarray]


GROUPING_SCORES = {f"grouping_{each.name}": each.name for each in fields(Grouping)}
"""The score of each measure of grouping."""


def token_collectors(vit: Vit, names: Sequence[str], options: Mapping[str, str]) -> list[Collector]:
    """Collectors of the measures of tokens.

    Args:
        vit: the model.
        names: of measures that this model has.
        options: `radius` (of DBSCAN, for grouping), `lost_patches` (how occlusion loses them) and `masks` ("given"
            where `take_masks` will be called before each batch).

    Returns:
        Collectors that share one plain pass.
    """
    plain = [each for each in (_NormCollector, _EmbeddingCollector) if each.measures[0] in names]
    scores = [name for name in names if name in GROUPING_SCORES]
    robust = [name for name in names if name not in scores and all(name not in each.measures for each in plain)]
    result: list[Collector] = [each(vit) for each in plain]
    if scores:
        result.append(_GroupingCollector(vit, scores, options["radius"]))
    if robust:
        result.append(_RobustnessCollector(vit, robust, options["lost_patches"], options["masks"] == "given"))
    return result


class _NormCollector:
    """`token_norm`: the length of every token after each layer."""

    replays = False

    measures: tuple[str, ...] = ("token_norm",)

    def __init__(self, vit: Vit) -> None:
        self._anatomy = vit.anatomy
        self._norms: dict[int, Tensor] = {}

    def readers(self) -> Readers:
        """Reads what every block returns."""
        return Readers(output=self._read)

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> Arrays:
        """[image, layer, token]; NaN for tokens that a layer does not have."""
        widest = max(norms.shape[1] for norms in self._norms.values())
        array = np.full((len(logits), len(self._anatomy.blocks), widest), np.nan, dtype=np.float32)
        for layer, norms in self._norms.items():
            array[:, layer, : norms.shape[1]] = norms.cpu().numpy()
        self._norms.clear()
        return {"token_norm": array}

    def _read(self, layer: int, tokens: Tensor) -> None:
        self._norms[layer] = token_norms(tokens.detach())


class _EmbeddingCollector:
    """`image_embedding`: the class token after the last layer, or the mean of its patch tokens."""

    replays = False

    measures: tuple[str, ...] = ("image_embedding",)

    def __init__(self, vit: Vit) -> None:
        self._anatomy = vit.anatomy
        self._embedding: Tensor | None = None

    def readers(self) -> Readers:
        """Reads what the last block returns."""
        return Readers(output=self._read)

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> Arrays:
        """[image, feature]."""
        assert self._embedding is not None, "no pass reached the last block"
        array = self._embedding.cpu().numpy()
        self._embedding = None
        return {"image_embedding": array}

    def _read(self, layer: int, tokens: Tensor) -> None:
        if layer == len(self._anatomy.blocks) - 1:
            self._embedding = image_embeddings(tokens.detach(), self._anatomy)


class _GroupingCollector:
    """`grouping_*`: how tokens of one object find together after each layer. `take_masks` comes before each pass."""

    replays = False

    def __init__(self, vit: Vit, measures: Sequence[str], radius: str) -> None:
        self.measures = tuple(measures)
        self._vit, self._radius = vit, radius
        self._ids: Sequence[Ids | None] = ()
        self._tokens: dict[int, Float[np.ndarray, "image patch channel"]] = {}

    def take_masks(self, masks: Sequence[Ids | None]) -> None:
        """Instance ids of the coming batch, as the model sees it."""
        self._ids = masks

    def readers(self) -> Readers:
        """Reads what every block returns."""
        return Readers(output=self._read)

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> Arrays:
        """[image, layer] of each score; NaN for images without two objects, and layers whose tokens lie on no grid."""
        assert len(self._ids) == len(logits), "no masks were handed out for this batch"
        blocks = self._vit.anatomy.blocks
        arrays = {name: np.full((len(logits), len(blocks)), np.nan, dtype=np.float32) for name in self.measures}
        for layer, patches in self._tokens.items():
            grid, step = blocks[layer].grid, blocks[layer].patch_step
            assert grid is not None
            for image, ids in enumerate(self._ids):
                scores = None if ids is None else self._score(patches[image], patch_objects(ids, grid, step))
                for name in self.measures if scores else ():
                    arrays[name][image, layer] = getattr(scores, GROUPING_SCORES[name])
        self._tokens = {}
        return arrays

    def _score(self, patches: Float[np.ndarray, "patch channel"], owner: Int[np.ndarray, "patch"]) -> Grouping | None:
        inside = owner > 0
        if len(np.unique(owner[inside])) < 2:
            return None
        return score_grouping(patches[inside], owner[inside], self._radius)

    def _read(self, layer: int, tokens: Tensor) -> None:
        block = self._vit.anatomy.blocks[layer]
        if block.grid is not None and tokens.shape[1] == block.tokens:
            self._tokens[layer] = tokens[:, block.prefix :].detach().float().cpu().numpy()


class _RobustnessCollector:
    """`occlusion_*` and `shuffle_*`: answers and tokens when patches are lost or displaced.

    Salient are the patches that objects cover where the image has a mask, else those with the highest rollout.
    """

    replays = True

    def __init__(self, vit: Vit, measures: Sequence[str], loss: str, with_masks: bool) -> None:
        self.measures = tuple(measures)
        self._vit, self._loss, self._with_masks = vit, loss, with_masks
        self._ids: Sequence[Ids | None] = ()
        self._steps = LayerSteps()
        self._tokens: dict[int, Tensor] = {}
        grid = vit.anatomy.blocks[0].grid
        assert grid is not None
        self._grid = grid
        self._cells = cells_that_divide(grid)

    def take_masks(self, masks: Sequence[Ids | None]) -> None:
        """Instance ids of the coming batch, as the model sees it."""
        self._ids = masks if self._with_masks else ()

    def readers(self) -> Readers:
        """Reads what every block returns, and the maps for rollout where occlusion is asked for."""
        return Readers(attention=self._steps.read if self._occludes else None, output=self._read_tokens)

    def finish(
        self, tap: Tap, replay: Replay, logits: Float[Tensor, "image class"], labels: Int[np.ndarray, "image"]
    ) -> Arrays:
        """[image, amount] or [image, cells] of each answer, and the same by layer of each drift."""
        layers = range(len(self._tokens))
        tokens = (level_zero(tap.anatomy, replay), *(self._tokens[layer] for layer in layers))
        numbers = [zlib.crc32(image.tobytes()) for image in replay.images.float().cpu().numpy()]
        probes: list[Occlusion | Shuffling] = [*self._occlusions()]
        probes += [Shuffling(cells) for cells in self._cells if self._shuffles]
        responses = robustness.respond(
            self._vit, replay.images, labels, self._salience(len(logits)), numbers, probes,
            intact=Levels(tokens, logits, replay),
        )  # fmt: skip
        self._steps, self._tokens = LayerSteps(), {}
        by_probe = dict(zip(probes, responses, strict=True))
        return {name: self._array(name, by_probe) for name in self.measures}

    @property
    def _occludes(self) -> bool:
        return any(name.startswith("occlusion_") for name in self.measures)

    @property
    def _shuffles(self) -> bool:
        return any(name.startswith("shuffle_") for name in self.measures)

    def _occlusions(self) -> list[Occlusion]:
        selections = [each for each in robustness.SELECTIONS if f"occlusion_{_word(each)}" in self.measures]
        if "occlusion_drift" in self.measures and "random" not in selections:
            selections.append("random")
        return [Occlusion(selection, self._loss, amount) for selection in selections for amount in AMOUNTS]

    def _array(self, name: str, responses: dict[Occlusion | Shuffling, Response]) -> Float[np.ndarray, "image ..."]:
        probability: Callable[[Response], np.ndarray] = lambda response: response.probability  # noqa: E731
        drift: Callable[[Response], np.ndarray] = lambda response: response.drift  # noqa: E731
        take = drift if name.endswith("_drift") else probability
        if name.startswith("shuffle_"):
            probes: list[Occlusion | Shuffling] = [Shuffling(cells) for cells in self._cells]
        else:
            word = "random" if name == "occlusion_drift" else name.removeprefix("occlusion_")
            selection = next(each for each in robustness.SELECTIONS if _word(each) == word)
            probes = [Occlusion(selection, self._loss, amount) for amount in AMOUNTS]
        return np.stack([take(responses[probe]) for probe in probes], axis=-1).astype(np.float32)

    def _salience(self, n_images: int) -> Float[np.ndarray, "image patch"]:
        n_patches = self._grid[0] * self._grid[1]
        if not self._occludes:
            return np.zeros((n_images, n_patches))
        block = self._vit.anatomy.blocks[0]
        steps = self._steps.all()
        salience = (
            rollout(steps, block.prefix, self._vit.anatomy.class_index(0)).float().cpu().numpy().astype(np.float64)
        )
        for image, ids in enumerate(self._ids):
            if ids is not None:
                salience[image] = object_share(ids, self._grid, block.patch_step)
        return salience

    def _read_tokens(self, layer: int, tokens: Tensor) -> None:
        self._tokens[layer] = tokens.detach().clone()  # some blocks go on to add to it in place


def _word(selection: str) -> str:
    """A selection as it stands in a measure's name."""
    return selection.replace("-", "_")
