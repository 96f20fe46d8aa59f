"""Relevance of patches without a label: how alike each patch's token is to the image's embedding, or to a prototype.

No classifier and no gradient is needed, so models of features (DINOv2, CLIP's image tower) have it as classifiers do.
What a patch shares with the embedding is asked of the last layer's token, into which attention has mixed other patches.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Float
from torch import Tensor

from vitrail.contract.outlook import require_finite
from vitrail.data import PhotographLike
from vitrail.errors import Unsupported, UsageError
from vitrail.grid import n_patches
from vitrail.models.noise import noise_images
from vitrail.models.open import Vit
from vitrail.models.preprocessing import photographs_of
from vitrail.tap.final_norm import FinalNorm, apply_norm, find_final_norm
from vitrail.tap.modes import plain_modes
from vitrail.tap.tap import Readers
from vitrail.tokens.levels import first_grid, layers_of_own_grid, on_first_grid

__all__ = [
    "FinalTokens",
    "embedding_similarity",
    "final_tokens",
    "mean_embedding",
    "require_final_tokens",
]

BATCH = 8


class FinalTokens(NamedTuple):
    """The last tokens of patches, and the image's embedding in the same space.

    Attributes:
        patches: Of the last layer whose patches lie on a grid, after the model's final norm where that layer is the
            last and a norm follows.
        embedding: The class token among them, or without one the mean of the patches.
    """

    patches: Float[Tensor, "image patch feature"]
    embedding: Float[Tensor, "image feature"]


_NORMS: WeakKeyDictionary[Vit, FinalNorm | None] = WeakKeyDictionary()
"""Each model's final norm: found by a pass."""


def require_final_tokens(vit: Vit) -> int:
    """The layer whose tokens label-free relevance compares.

    Args:
        vit: The model.

    Returns:
        Index of the last layer that returns its patches on a grid.

    Raises:
        Unsupported: No layer does, or the first one's patches lie on none.
    """
    first_grid(vit)
    layers = layers_of_own_grid(vit)
    if not layers:
        raise Unsupported(
            f"No layer of {vit.name} returns its patches on a grid, so their tokens are compared with nothing."
        )
    return max(layers)


@torch.no_grad()
def final_tokens(vit: Vit, images: Float[Tensor, "image channel row column"]) -> FinalTokens:
    """Reads the last tokens of patches and the embedding of each image.

    Args:
        vit: The model.
        images: Prepared images.

    Returns:
        Both in float32.

    Raises:
        Unsupported: No layer returns its patches on a grid.
        ModelError: A token has NaN or infinite numbers.

    Example:
        >>> tokens = final_tokens(vit, vit.prepare([photograph]))
        >>> tokens.patches.shape, tokens.embedding.shape  # of a ViT-Tiny at 224 px
        (torch.Size([1, 196, 192]), torch.Size([1, 192]))
    """
    layer = require_final_tokens(vit)
    tokens = _tokens_after(vit, images, layer)
    if layer == vit.n_layers - 1:
        if vit not in _NORMS:
            _NORMS[vit] = _final_norm(vit)
        norm = _NORMS[vit]
        if norm is not None:
            tokens = apply_norm(vit.model, norm, tokens)
    tokens = tokens.float()
    require_finite(vit.name, tokens.flatten(1))
    patches, index = tokens[:, vit.anatomy.blocks[layer].prefix :], vit.anatomy.class_index(layer)
    return FinalTokens(patches, tokens[:, index] if index is not None else patches.mean(1))


def embedding_similarity(
    vit: Vit,
    images: Float[Tensor, "image channel row column"],
    prototype: Float[np.ndarray, "feature"] | Float[np.ndarray, "image feature"] | None = None,
) -> Float[Tensor, "image patch"]:
    """Cosine similarity of each patch's last token to its image's own embedding, or to a prototype.

    Unit: cosine, -1 to 1. High: the token points where the embedding points: what the patch shows makes up the image
    (self) or is like the images of the prototype. Low: it is about something else.

    Source: our construction. Tokens as descriptors and the class token as the image's embedding after Caron et al. 2021
    (DINO, arXiv 2104.14294), prototypes as mean embeddings after Snell et al. 2017 (arXiv 1703.05175). Crabbé and van
    der Schaar 2022 (arXiv 2203.01928) ask the same question by gradients of the embedding's product with itself.

    It cannot tell what the embedding is made of: attention has mixed other patches into each token before, and a token
    may be like the embedding without having reached it. Models whose class token lies in another direction than their
    patches have low cosines throughout; only the order within an image means something.

    Args:
        vit: The model.
        images: Prepared images.
        prototype: One embedding for all images, such as `mean_embedding` gives, or one for each; None: the image's own.

    Returns:
        Of the patches of the first layer's grid; in a hierarchy a patch has the cosine of the last grid's patch that
        covers it, or their mean by area.

    Raises:
        UsageError: The prototype has another width than the tokens, is zero or is not finite.
        Unsupported: No layer returns its patches on a grid.
        ModelError: A token has NaN or infinite numbers.

    Example:
        >>> scores = embedding_similarity(vit, vit.prepare([photograph]))
        >>> scores.shape
        torch.Size([1, 196])
    """
    tokens = final_tokens(vit, images)
    embedding = tokens.embedding if prototype is None else _prototype_rows(prototype, tokens)
    cosines = F.cosine_similarity(tokens.patches, embedding[:, None], dim=-1)
    grid = vit.anatomy.blocks[require_final_tokens(vit)].grid
    assert grid is not None
    spread = on_first_grid(vit, cosines.reshape(-1, *grid))
    return spread * (n_patches(first_grid(vit)) / n_patches(grid))  # a mean by area, not a share of an amount


@plain_modes()
def mean_embedding(
    vit: Vit,
    photographs: Iterable[PhotographLike] | PhotographLike,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Float[np.ndarray, "feature"]:
    """A prototype: the mean embedding of images, such as those of a class or a folder.

    Source: prototypical networks (Snell et al. 2017, arXiv 1703.05175), with the embedding of `final_tokens`.

    Args:
        vit: The model.
        photographs: Any number of them, as `vitrail.data.as_photograph` takes them; a few are in memory at once.
        progress: Called with how many are done.

    Returns:
        The mean, in float32.

    Raises:
        UsageError: There is no photograph, or one is none.
        BadImage: One is broken.
        Unsupported: No layer returns its patches on a grid.
        ModelError: A token has NaN or infinite numbers.

    Example:
        >>> source = vitrail.open_images("dogs/", labels=False)  # doctest: +SKIP
        >>> entries = vitrail.data.scan(source).images  # doctest: +SKIP
        >>> dog = mean_embedding(vit, (vitrail.data.load_image(source, each) for each in entries))  # doctest: +SKIP
        >>> relevance(vit, images, classes, ["prototype_similarity"], prototype=dog)  # doctest: +SKIP
    """
    require_final_tokens(vit)
    total, n_done = np.zeros(0), 0
    for batch in _batches(photographs):
        embeddings = final_tokens(vit, vit.prepare(batch)).embedding.double().sum(0).cpu().numpy()
        total = embeddings if not n_done else total + embeddings
        n_done += len(batch)
        progress(n_done)
    if not n_done:
        raise UsageError("A prototype is the mean of images, and none was given; name a folder that has some.")
    return np.asarray(total / n_done, dtype=np.float32)


def _prototype_rows(prototype: object, tokens: FinalTokens) -> Float[Tensor, "#image feature"]:
    """One row, or one for each image; refuses what cannot be compared with the tokens."""
    n_images, n_channels = tokens.embedding.shape
    try:
        vectors = torch.as_tensor(np.asarray(prototype, dtype=np.float32)).to(tokens.embedding.device)
    except (TypeError, ValueError) as error:
        raise UsageError(f"A prototype is a vector of numbers, and a {type(prototype).__name__} is none.") from error
    shape = tuple(vectors.shape)
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.shape not in {(1, n_channels), (n_images, n_channels)}:
        raise UsageError(
            f"The prototype has shape {shape}, and the tokens have {n_channels} channels; give "
            "one vector of as many numbers, as vitrail.tokens.label_free.mean_embedding makes of images."
        )
    if not vectors.isfinite().all() or not vectors.any(-1).all():
        raise UsageError("The prototype is zero or not finite, so nothing is like it; make it of other images.")
    return vectors


def _batches(photographs: Iterable[PhotographLike] | PhotographLike) -> Iterator[list[PhotographLike]]:
    remaining = photographs_of(photographs)
    while batch := list(islice(remaining, BATCH)):
        yield batch


def _tokens_after(
    vit: Vit, images: Float[Tensor, "image channel row column"], layer: int
) -> Float[Tensor, "image token feature"]:
    outputs: list[Tensor] = []

    def read(at: int, tokens: Tensor) -> None:
        if at == layer:
            outputs.append(tokens.clone())  # some models go on to add to it in place

    vit.tap().read(images, Readers(output=read))
    return outputs[0]


def _final_norm(vit: Vit) -> FinalNorm | None:
    """Found with two images, so that no mean over the batch is taken for one over tokens."""
    images, blocks = noise_images(vit, 2), vit.anatomy.blocks
    tokens = _tokens_after(vit, images, len(blocks) - 1)
    return find_final_norm(vit.model, tuple(block.path for block in blocks), images, tokens, blocks[-1].prefix)
