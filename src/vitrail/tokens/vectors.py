"""Tokens of one level seen directly: principal components as colour, norms and outliers, similarity to a patch."""

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Bool, Float
from torch import Tensor

from vitrail.errors import UsageError
from vitrail.tap.anatomy import Anatomy

__all__ = ["N_FOR_COLOURS", "ColourBasis", "colour_basis", "image_embeddings", "similarity", "token_norms"]


N_FOR_COLOURS = 4
"""Tokens that span three directions around their mean."""


@dataclass(frozen=True, eq=False)
class ColourBasis:
    """Three directions of token space and the range of each, the same for all images coloured with it.

    Attributes:
        mean: The mean token, which maps to the origin of the three directions.
        directions: Unit vectors.
        low: Coordinate that becomes colour 0.
        high: Coordinate that becomes colour 1.
        shares: Share of the tokens' variance along each direction, 0 to 1.
    """

    mean: Float[np.ndarray, "channel"]
    directions: Float[np.ndarray, "component channel"]
    low: Float[np.ndarray, "component"]
    high: Float[np.ndarray, "component"]
    shares: Float[np.ndarray, "component"]

    def colours(self, tokens: Float[np.ndarray, "*image token channel"]) -> Float[np.ndarray, "*image token colour"]:
        """Colours of tokens: their coordinates along the three directions.

        Args:
            tokens: In the space of the basis.

        Returns:
            Red, green and blue, 0 to 1.
        """
        along = (tokens - self.mean) @ self.directions.T
        return np.asarray(np.clip((along - self.low) / np.maximum(self.high - self.low, 1e-12), 0, 1))


def colour_basis(
    tokens: Float[np.ndarray, "image token channel"],
    tails: float = 0.01,
    weights: Bool[np.ndarray, "image token"] | None = None,
) -> ColourBasis:
    """The first three principal components of the patch tokens of a set of images, as people colour DINOv2.

    One basis for the set, so that a colour means the same in every image. The sign of a component is arbitrary: here
    its largest entry is positive.

    Args:
        tokens: Of all images of the set.
        tails: Share of the tokens at each end whose coordinates fall outside the range of colours.
        weights: The tokens to fit the basis on (a foreground); None: all.

    Returns:
        The basis.

    Raises:
        UsageError: Fewer than 4 tokens, which do not span three directions.
    """
    flat = (tokens[weights] if weights is not None else tokens.reshape(-1, tokens.shape[-1])).astype(np.float64)
    if len(flat) < N_FOR_COLOURS:
        raise UsageError(f"{len(flat)} tokens do not span three colours; take more images.")
    mean = flat.mean(axis=0)
    centred = flat - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / len(flat))
    directions = vectors[:, ::-1][:, :3].T
    signs = np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(axis=1)])
    directions = directions * signs[:, None]
    along = centred @ directions.T
    low, high = np.quantile(along, [tails, 1 - tails], axis=0)
    return ColourBasis(mean, directions, low, high, values[::-1][:3] / values.sum())


def token_norms(tokens: Float[Tensor, "*image token channel"]) -> Float[Tensor, "*image token"]:
    """L2 norm of every token.

    Args:
        tokens: In any precision.

    Returns:
        Lengths in float32.
    """
    norms: Tensor = tokens.float().norm(dim=-1)
    return norms


def similarity(
    tokens: Float[Tensor, "image token channel"], token: int, *, centred: bool = False
) -> Float[Tensor, "image token"]:
    """Cosine similarity of one token to all tokens of its image.

    Args:
        tokens: Of one level.
        token: Index of the token to compare with.
        centred: Subtracts the mean token of each image first: where all tokens share one strong direction, cosines are
            all near 1.

    Returns:
        -1 to 1.

    Raises:
        UsageError: There is no such token.
    """
    if not 0 <= token < tokens.shape[1]:
        raise UsageError(f"There is no token {token}; an image has tokens 0 to {tokens.shape[1] - 1} at this level.")
    tokens = tokens.float()
    tokens = tokens - tokens.mean(1, keepdim=True) if centred else tokens
    return F.cosine_similarity(tokens, tokens[:, token : token + 1], dim=-1)


def image_embeddings(tokens: Float[Tensor, "image token channel"], anatomy: Anatomy) -> Float[Tensor, "image feature"]:
    """One vector for each image: its class token, or the mean of its patch tokens, centred and scaled over features.

    The scaling is that of a final norm without its gains, so that a few channels of large values, and the length that
    grows from layer to layer, do not decide which images are near each other.

    Args:
        tokens: What the last layer returns.
        anatomy: Of the model.

    Returns:
        Vectors of mean 0 and standard deviation 1.

    Example:
        >>> tokens = {}
        >>> vit.tap().read(images, Readers(output=tokens.__setitem__))
        >>> embeddings = image_embeddings(tokens[vit.n_layers - 1], vit.anatomy)
        >>> alike = torch.cdist(embeddings, embeddings)
    """
    block, index = anatomy.blocks[-1], anatomy.class_index(len(anatomy.blocks) - 1)
    if index is not None:
        vector = tokens[:, index]
    elif tokens.shape[1] == block.tokens:
        vector = tokens[:, block.prefix :].mean(1)
    else:  # it returns other tokens than it was given, and none of them are known not to be patches
        vector = tokens.mean(1)
    return F.layer_norm(vector.float(), vector.shape[-1:])
