"""One image in the neurons room: tokens as colours, lengths and likeness, views of a neuron, what the answer rests on.

for name, draw in neuron_figures(CloseUp.of(vit, image)):
    draw()                  # the figure, or `Unsupported` with the reason why this model has none
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from vitrail.data import class_title
from vitrail.errors import DataError, Unsupported, UsageError
from vitrail.figures import neurons as figures
from vitrail.figures.neurons import Curve, Panel
from vitrail.neurons.embedding import Embedding, find_embedding
from vitrail.neurons.filters import auroc, filter_energy, salient_patches
from vitrail.neurons.flow import read_steps, rollout
from vitrail.neurons.grouping import group, layout
from vitrail.neurons.levels import read_levels, refuse_regrouped
from vitrail.neurons.objects import in_view, patch_objects
from vitrail.neurons.outliers import norm_outliers
from vitrail.neurons.relevance import deletion_and_insertion, relevance
from vitrail.neurons.tokens import colour_basis, similarity
from vitrail.neurons.views import Faithful, agreement, faithful_view, global_view, neuron_view
from vitrail.vit.open import Vit

__all__ = ["CloseUp", "neuron_figures"]

N_LEVELS = 4
N_RANDOM = 5
"""Random orders that relevance is compared with."""

N_AMOUNTS = 8
"""Steps of deletion and insertion."""

CLIP = 0.999
"""Of the pixels of a faithful view: a few outshine all others."""

METHODS = ("raw", "rollout", "gradient")


@dataclass(frozen=True, eq=False)
class CloseUp:
    """One image, prepared, with the patch (row, column) and the channel to look at; `ids` are instance ids of its view.

    Without a patch it is the one that the answer rests on most, those of outlying length aside, which are sinks of
    attention; without a channel the filter through which the salient patches stand out most.
    """

    vit: Vit
    name: str
    view: Image.Image
    images: Float[Tensor, "image channel row column"]
    given_patch: tuple[int, int] | None = None
    given_channel: int | None = None
    ids: Int[np.ndarray, "row column"] | None = None

    @classmethod
    def of(
        cls,
        vit: Vit,
        image: Image.Image,
        name: str = "image",
        patch: tuple[int, int] | None = None,
        channel: int | None = None,
        mask: Int[np.ndarray, "row column"] | None = None,
    ) -> "CloseUp":
        """Raises `UsageError` for a patch that is not on the grid, `DataError` for a mask of another size."""
        if mask is not None and mask.shape != (image.height, image.width):
            raise DataError(
                f"The mask has {mask.shape[0]} x {mask.shape[1]} pixels and the image {image.height} x {image.width}; "
                "a mask is as large as its image."
            )
        grid = vit.anatomy.blocks[0].grid
        if patch is not None and (grid is None or not (0 <= patch[0] < grid[0] and 0 <= patch[1] < grid[1])):
            raise UsageError(
                f"The patch at row {patch[0]}, column {patch[1]} was asked for; this model's grid is {grid} (rows, "
                "columns)."
            )
        ids = None if mask is None else in_view(mask, vit.preprocessing)
        return cls(vit, name, vit.view(image), vit.prepare([image]), patch, channel, ids)

    @property
    def grid(self) -> tuple[int, int]:
        """Of the first layer. Raises `Unsupported` where its tokens lie on none."""
        grid = self.vit.anatomy.blocks[0].grid
        if grid is None:
            raise Unsupported(f"The tokens of {self.vit.name} lie on no grid that could be found.")
        return grid

    @cached_property
    def label(self) -> int:
        """The model's own answer. Raises `Unsupported` without a classifier."""
        if self.vit.n_classes is None:
            raise Unsupported(f"{self.vit.name} has no classifier, so there is no answer to explain.")
        with torch.no_grad():
            return int(self.vit.logits(self.images).argmax(-1)[0])

    @property
    def answer(self) -> str:
        """Its name, short."""
        names = self.vit.class_names
        return class_title(names[self.label]) if names else f"class {self.label}"

    @cached_property
    def relevance(self) -> dict[str, Float[np.ndarray, "patch"]]:
        """By every method that the model has. Raises `Unsupported` where tokens cannot be followed."""
        methods = METHODS if self.vit.n_classes is not None else METHODS[:2]
        label = np.array([self.label if self.vit.n_classes is not None else 0])
        return {name: scores[0] for name, scores in relevance(self.vit, self.images, label, methods).items()}

    @cached_property
    def patch(self) -> tuple[int, int]:
        """Row and column of the patch to look at: given, or of highest relevance, or in the middle."""
        if self.given_patch is not None:
            return self.given_patch
        rows, columns = self.grid
        try:
            found = list(self.relevance.values())[-1].copy()
        except Unsupported:
            return rows // 2, columns // 2
        for tokens in self.tokens:
            if tokens is not None and len(tokens) == len(found):
                found[norm_outliers(np.linalg.norm(tokens, axis=-1))] = -np.inf
        return divmod(int(found.argmax()), columns)

    @cached_property
    def tokens(self) -> list[Float[np.ndarray, "patch channel"] | None]:
        """The patch tokens of every level; None where they lie on no grid."""
        levels, blocks = read_levels(self.vit.tap(), self.images).tokens, self.vit.anatomy.blocks
        of_level = [blocks[0], *blocks]
        return [
            tokens[0, block.prefix :].float().numpy() if block.grid and tokens.shape[1] == block.tokens else None
            for tokens, block in zip(levels, of_level, strict=True)
        ]

    def grid_of(self, level: int) -> tuple[int, int]:
        """The grid that the tokens of a level lie on."""
        grid = self.vit.anatomy.blocks[max(level - 1, 0)].grid
        assert grid is not None
        return grid

    @property
    def salient(self) -> tuple[np.ndarray, str]:
        """Which patches objects should stand on, and whence that is known."""
        if self.ids is not None:
            owner = patch_objects(self.ids, self.grid, min_area=0.0, min_patches=1)
            if (owner > 0).any():
                return owner > 0, "under objects of the mask"
        return salient_patches(self.relevance["rollout"][None])[0], "the quarter with the highest rollout"

    @property
    def pixels(self) -> Float[np.ndarray, "row column colour"]:
        """The view, 0 to 1."""
        return np.asarray(self.view.convert("RGB"), dtype=np.float64) / 255

    def photograph(self, title: str = "") -> Panel:
        """The view with the patch marked."""
        height, width = self.view.height / self.grid[0], self.view.width / self.grid[1]
        return Panel(self.pixels, title or self.name, (self.patch[0] * height, self.patch[1] * width, height, width))


def neuron_figures(seen: CloseUp) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The figures by name; each is drawn when called, and raises `Unsupported` where the model has none."""
    yield "tokens", lambda: _tokens(seen)
    yield "relevance", lambda: _relevance(seen)
    yield "relevance_curves", lambda: _relevance_curves(seen)
    yield "filters", lambda: _filters(seen)
    yield "views", lambda: _views(seen)
    if seen.ids is not None:
        yield "tsne", lambda: _tsne(seen)


def _levels(seen: CloseUp) -> list[int]:
    """A few levels, the first and last layer among them, whose tokens lie on a grid."""
    known = [level for level, tokens in enumerate(seen.tokens) if level > 0 and tokens is not None]
    if not known:
        raise Unsupported(f"The tokens of {seen.vit.name} lie on no grid in any layer.")
    return [known[at] for at in np.unique(np.linspace(0, len(known) - 1, N_LEVELS).round().astype(int))]


def _tokens(seen: CloseUp) -> Any:
    """Colours, lengths, and likeness to the patch, level by level."""
    rows = [[seen.photograph("colours")], [seen.photograph("lengths")], [seen.photograph("likeness to this patch")]]
    for level in _levels(seen):
        tokens, grid, title = seen.tokens[level], seen.grid_of(level), f"after L{level - 1}"
        assert tokens is not None
        norms = np.linalg.norm(tokens, axis=-1)
        outlying = norm_outliers(norms)
        basis = colour_basis(tokens[None], weights=~outlying[None])
        rows[0].append(Panel(figures.coloured(basis.colours(tokens), grid), f"{title}: {basis.shares.sum():.0%}"))
        stands = f", {outlying.sum()} stand out" if outlying.any() else ""
        shown = figures.token_map(norms, grid, high=float(norms[~outlying].max()))
        rows[1].append(Panel(shown, f"{norms.min():.0f} to {norms.max():.0f}{stands}"))
        place = [seen.patch[axis] * grid[axis] // seen.grid[axis] for axis in (0, 1)]
        alike = similarity(torch.as_tensor(tokens)[None], place[0] * grid[1] + place[1])[0].numpy()
        rows[2].append(
            Panel(figures.token_map(alike, grid, high=1.0), f"{alike.min():.2f} to 1", (place[0], place[1], 1, 1))
        )
    return figures.panels(
        rows, f"Patch tokens through the layers: {seen.name}",
        "Top: the first three principal components of this image's tokens as red, green and blue, with the share of "
        "variance they hold; tokens of outlying length take no part. Middle: L2 norms, yellow is long; what lies 6 "
        "robust standard deviations above the median stands out; the scale ends below it. Bottom: cosine similarity of "
        "the marked patch to all others, yellow is alike.",
    )  # fmt: skip


def _relevance(seen: CloseUp) -> Any:
    found = seen.relevance
    told = f"for {seen.answer}" if seen.vit.n_classes is not None else "for the output"
    panels = [Panel(figures.overlaid(seen.pixels, scores, seen.grid), method) for method, scores in found.items()]
    return figures.panels(
        [[seen.photograph(), *panels]], f"Which patches matter {told}: {seen.name}",
        "Clear to orange: lowest to the 98 % quantile of the image. raw: attention of the last layer; rollout: "
        "attention through all layers, the same for every class; gradient: attention times its gradient for this class "
        "(Chefer et al. 2021). Which to believe is told by deletion and insertion.",
        side=1.9,
    )  # fmt: skip


def _relevance_curves(seen: CloseUp) -> Any:
    """Deletion and insertion of each method and of random orders, for this image, in one batch."""
    label, found = seen.label, seen.relevance
    random = np.random.default_rng(0).random((N_RANDOM, len(next(iter(found.values())))))
    scores = np.concatenate([np.stack(list(found.values())), random])
    n = len(scores)
    curves = deletion_and_insertion(seen.vit, seen.images.repeat(n, 1, 1, 1), np.full(n, label), scores, N_AMOUNTS)
    low, high = curves.areas
    beyond = high - low - (high - low)[len(found) :].mean()
    parts: dict[str, list[Curve]] = {}
    for name, values in (("deletion", curves.deletion), ("insertion", curves.insertion)):
        lines = [
            Curve(f"{method} ({gain:+.2f})", curves.amounts, values[at])
            for at, (method, gain) in enumerate(zip(found, beyond, strict=False))
        ]
        chance = values[len(found) :]
        lines.append(
            Curve(f"{N_RANDOM} random orders", curves.amounts, chance.mean(0), chance.min(0), chance.max(0), True)
        )
        parts[name] = lines
    return figures.curves(
        parts, f"Which relevance to believe here: {seen.name}, {seen.answer}", "share of patches",
        "probability of the answer",
        "Deletion: the most relevant patches are painted over first (lower is better). Insertion: they come first "
        "(higher is better). In brackets: area between the two, beyond the mean of random orders, whose range is the "
        "band. After Petsiuk et al. 2018; one image decides nothing about a method.",
        limits=(0, 1),
    )  # fmt: skip


def _filters(seen: CloseUp) -> Any:
    embedding = find_embedding(seen.vit)
    salient, whence = seen.salient
    scores = _filter_scores(seen, embedding, salient)
    order = np.argsort(-scores)
    picked = [*order[:3], *order[-2:]] if len(order) > 4 else list(order)
    views = [global_view(seen.images, embedding.filters[each], embedding.grid)[0].numpy() for each in picked]
    published, both = figures.view_panels(views, [f"filter {each}: {scores[each]:.2f}" for each in picked])
    return figures.panels(
        [[seen.photograph(), *published], [Panel(figures.token_map(1.0 * salient, seen.grid), "salient"), *both]],
        f"Filters through which salient patches stand out most and least: {seen.name}",
        f"Global views of level 0 (after Nguyen et al. 2022) and the AUROC of their energy; salient: {whence}. 0.5: no "
        "better than chance. Below: signed, orange for positive.",
    )  # fmt: skip


def _filter_scores(seen: CloseUp, embedding: Embedding, salient: np.ndarray) -> Float[np.ndarray, "channel"]:
    energy = filter_energy(seen.images, embedding.filters).cpu().numpy()
    return np.asarray(np.nan_to_num(auroc(energy, np.broadcast_to(salient, energy.shape))[0], nan=0.5))


def _views(seen: CloseUp) -> Any:
    """One neuron through the levels: plain as published and signed, and faithful."""
    embedding = find_embedding(seen.vit)
    channel, levels = _channel(seen, embedding), _view_levels(seen, embedding)
    token = embedding.prefix + seen.patch[0] * embedding.grid[1] + seen.patch[1]
    plain = [neuron_view(seen.vit, seen.images, level, token, channel, embedding=embedding)[0] for level in levels]
    faithful = [_faithful(seen.vit, seen.images, level, token, channel) for level in levels]
    top, signed = figures.view_panels([each.numpy() for each in plain], [f"level {level}" for level in levels])
    _, true = figures.view_panels([each.pixels.numpy() for each, _ in faithful], [""] * len(levels), clip=CLIP)
    titled = [
        Panel(panel.picture, f"{path}: cos {agreement(one, found.pixels, embedding.grid).cosine:.2f}")
        for panel, one, (found, path) in zip(true, plain, faithful, strict=True)
    ]
    whole, whole_signed = figures.view_panels(
        [global_view(seen.images, embedding.filters[channel], embedding.grid)[0].numpy()], ["G_0"]
    )
    return figures.panels(
        [[seen.photograph(), *top], [whole[0], *signed], [whole_signed[0], *titled]],
        f"Channel {channel} of the marked patch through the levels: {seen.name}",
        "Top: the plain view (after Nguyen et al. 2022), clip(V / max V). Middle: the same, signed, orange for "
        "positive. Bottom: what each pixel adds to the neuron with attention, norms and activations held still (ours), "
        "which is complete; cos is how far the two agree. Every picture has its own scale; that of the bottom row ends "
        "at 99.9 % of the pixels. G_0: all patches at level 0.",
    )  # fmt: skip


def _channel(seen: CloseUp, embedding: Embedding) -> int:
    if seen.given_channel is not None:
        return seen.given_channel
    try:
        return int(_filter_scores(seen, embedding, seen.salient[0]).argmax())
    except Unsupported:  # no rollout: the filter that the patch itself excites most
        energy = filter_energy(seen.images, embedding.filters)[0, :, seen.patch[0] * embedding.grid[1] + seen.patch[1]]
        return int(energy.argmax())


def _view_levels(seen: CloseUp, embedding: Embedding) -> list[int]:
    """A few levels up to the last to which tokens can be followed; level 0 where it is a sum of pixels."""
    deepest = 0
    for level in range(1, seen.vit.n_layers + 1):
        try:
            refuse_regrouped(seen.vit.anatomy, level)
        except Unsupported:
            break
        deepest = level
    chosen = {1, *np.linspace(0, deepest, N_LEVELS).round().astype(int).tolist()}
    least = 0 if embedding.position is not None else 1
    levels = sorted(level for level in chosen if least <= level <= deepest)
    if not levels:
        raise Unsupported(f"The tokens of {seen.vit.name} cannot be followed through its first layer.")
    return levels


def _faithful(
    vit: Vit, images: Float[Tensor, "image channel row column"], level: int, token: int, channel: int
) -> tuple[Faithful, str]:
    try:
        return faithful_view(vit, images, level, token, channel, path="frozen"), "frozen"
    except Unsupported:
        return faithful_view(vit, images, level, token, channel), "gradient"


def _tsne(seen: CloseUp) -> Any:
    """Tokens of a few layers laid out, coloured by object, with how they group."""
    assert seen.ids is not None
    owner = patch_objects(seen.ids, seen.grid)
    if not (owner > 0).any():
        raise Unsupported("The mask has no object of 2 % of the view and 3 patches, so there is nothing to colour.")
    levels = [level for level in _levels(seen) if seen.grid_of(level) == seen.grid]
    layouts, scores = {}, []
    for level in dict.fromkeys((levels[0], levels[len(levels) // 2], levels[-1])):
        tokens = seen.tokens[level]
        assert tokens is not None
        layouts[f"after L{level - 1}"] = layout(tokens)
        inside = owner > 0
        if len(np.unique(owner[inside])) > 1:
            scores.append(f"L{level - 1} {group(tokens[inside], owner[inside]).silhouette:.2f}")
    names = {0: "background"} | {int(each): f"object {each}" for each in np.unique(owner) if each}
    grouped = f"Silhouette of clusters of object tokens: {', '.join(scores)}." if scores else "One object: no grouping."
    return figures.scatter_of_tokens(
        layouts, owner, _sizes(seen, len(owner)), names, f"t-SNE of the patch tokens: {seen.name}",
        "Each layer laid out on its own, cosine distance, seed 0; areas follow rollout where there is one. Distances "
        "between far groups and sizes of groups mean nothing.", grouped,
    )  # fmt: skip


def _sizes(seen: CloseUp, n_patches: int) -> Float[np.ndarray, "patch"]:
    try:
        steps, _ = read_steps(seen.vit.tap(), seen.images)
    except Unsupported:
        return np.ones(n_patches)
    anatomy = seen.vit.anatomy
    sizes: Float[np.ndarray, "patch"] = rollout(steps, anatomy.blocks[0].prefix, anatomy.class_index(0))[0].numpy()
    return sizes
