"""Do tokens of one object find together? Six scores of clusters of object tokens, layer by layer.

After Nguyen et al. 2022 (arXiv 2210.07646), read off their notebook: DBSCAN with at least 3 members on the tokens of
object patches (Euclidean), then silhouette, purity, cosine within clusters and within objects, clusters per object and
the share of labels that own a cluster. They take the radius from the ground truth ("oracle"); ours by default takes it
from the distances themselves ("k-distance").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vitrail.errors import UsageError

__all__ = [
    "RADII",
    "SCORES",
    "Grouping",
    "cluster",
    "k_distance_radius",
    "label_free_silhouette",
    "object_silhouette",
    "oracle_radius",
    "score_grouping",
    "silhouette",
    "tsne",
]

RADII = ("k-distance", "oracle")
"""How the radius of DBSCAN is chosen: from the distances alone, or by looking at the objects."""

MIN_MEMBERS = 3
"""Tokens within the radius of a core, itself included; the notebook's value."""

NOISE = -1
"""Number of the cluster of a token that belongs to none."""

PERPLEXITY = 30.0
"""About how many neighbours t-SNE keeps together; scikit-learn's default."""

SAME_DIRECTION = 1e-6
"""Unit tokens whose coordinates all differ by less are the same, up to the rounding of float32."""

Tokens = Float[np.ndarray, "token channel"]
Owner = Int[np.ndarray, "token"]


@dataclass(frozen=True)
class Grouping:
    """The scores of one image at one level.

    Attributes:
        silhouette: (b - a) / max(a, b) with cosine distances over clustered tokens, -1 to 1; 0 for one cluster, -1 for
            none.
        purity: Share of all object tokens that are in a cluster and belong to the object that dominates it, 0 to 1.
        in_cluster: Mean cosine between two tokens of a cluster, averaged over clusters; NaN without clusters.
        in_object: Mean cosine between two tokens of an object, averaged over objects.
        clusters: Clusters per object; 1 is best.
        unique_label: Share of the labels that dominate at least one cluster, 0 to 1.
    """

    silhouette: float
    purity: float
    in_cluster: float
    in_object: float
    clusters: float
    unique_label: float


SCORES = tuple(Grouping.__dataclass_fields__)


def score_grouping(
    tokens: Tokens, owner: Owner, radius: str = "k-distance", labels: dict[int, int] | None = None
) -> Grouping:
    """Clusters the tokens of object patches, and scores how well clusters match objects.

    Args:
        tokens: Tokens of patches under objects.
        owner: The object of each token.
        radius: How the radius of DBSCAN is chosen, one of `RADII`.
        labels: The class of each object, for `unique_label`, where several objects can share one; None: every object is
            its own label.

    Returns:
        The scores.

    Raises:
        UsageError: There is no such radius, no token, or not an object for each token.
    """
    if not len(tokens) or len(tokens) != len(owner):
        raise UsageError(
            f"{len(tokens)} tokens and {len(owner)} objects that they belong to were given; give one each."
        )
    tokens = tokens.astype(np.float64)
    distances = _euclidean(tokens)
    clusters = cluster(distances, _radius(radius, tokens, distances, owner))
    cosines = _cosines(tokens)
    objects = np.unique(owner)
    n_clusters = int(clusters.max()) + 1 if len(clusters) else 0
    dominant = [_dominant(owner[clusters == each]) for each in range(n_clusters)]
    label = labels or {int(each): int(each) for each in objects}
    return Grouping(
        silhouette=silhouette(1 - cosines, clusters),
        purity=sum(count for _, count in dominant) / len(tokens),
        in_cluster=_mean([_within(cosines, clusters == each) for each in range(n_clusters)]),
        in_object=_mean([_within(cosines, owner == each) for each in objects]),
        clusters=n_clusters / len(objects),
        unique_label=len({label[each] for each, _ in dominant}) / len({label[int(each)] for each in objects}),
    )


def cluster(distances: Float[np.ndarray, "token token"], radius: float, min_members: int = MIN_MEMBERS) -> Owner:
    """DBSCAN (Ester et al. 1996) on a matrix of distances.

    A token with `min_members` tokens within `radius`, itself included, is a core; cores in reach of each other are one
    cluster, and other tokens join the first cluster that has a core in their reach.

    Args:
        distances: Symmetric, zero on the diagonal.
        radius: In the unit of the distances.
        min_members: Tokens within the radius of a core.

    Returns:
        Number of the cluster of each token, from 0; -1 for noise.
    """
    near = distances <= radius
    core = near.sum(axis=1) >= min_members
    clusters = np.full(len(distances), NOISE)
    number = 0
    for start in map(int, np.flatnonzero(core)):
        if clusters[start] != NOISE:
            continue
        members = _reachable(near, core, start)
        clusters[members & (clusters == NOISE)] = number
        number += 1
    return clusters


def _reachable(near: np.ndarray, core: np.ndarray, start: int) -> np.ndarray:
    """Everything in reach of the cores that are linked to `start`."""
    members: np.ndarray[Any, Any] = near[start].copy()
    while True:
        grown: np.ndarray[Any, Any] = near[members & core].any(axis=0)
        if (grown == members).all():
            return members
        members = grown


def silhouette(distances: Float[np.ndarray, "token token"], clusters: Owner) -> float:
    """Mean silhouette (Rousseeuw 1987) of the clustered tokens.

    Args:
        distances: Symmetric.
        clusters: Number of the cluster of each token; -1 for noise, which does not count.

    Returns:
        -1 to 1; 0 for one cluster, -1 for none (as theirs).
    """
    n_clusters = int(clusters.max()) + 1 if len(clusters) else 0
    if n_clusters < 2:
        return n_clusters - 1.0
    clustered = clusters >= 0
    own, inner = clusters[clustered], distances[np.ix_(clustered, clustered)].copy()
    np.fill_diagonal(inner, 0)
    member = (own[:, None] == np.arange(n_clusters)).astype(float)
    sizes, sums = member.sum(axis=0), inner @ member
    rows = np.arange(len(own))
    a = sums[rows, own] / np.maximum(sizes[own] - 1, 1)
    others = sums / sizes
    others[rows, own] = np.inf
    b = others.min(axis=1)
    widest = np.maximum(a, b)
    scores = np.where((sizes[own] > 1) & (widest > 0), (b - a) / np.where(widest > 0, widest, 1), 0)
    return float(scores.mean())


def object_silhouette(tokens: Tokens, owner: Owner) -> float:
    """How far the tokens of an object lie apart from those of the others: the silhouette of the objects themselves.

    No clusters are looked for, so a change of the tokens changes this score and not who is compared with whom.

    Args:
        tokens: Tokens of patches under objects.
        owner: The object of each token; at least two objects.

    Returns:
        Mean silhouette by cosine distance, -1 to 1; high: objects lie apart, 0: they are mixed.
    """
    clusters = np.unique(owner, return_inverse=True)[1]
    return silhouette(1 - _cosines(tokens.astype(np.float64)), clusters)


def label_free_silhouette(tokens: Tokens) -> float:
    """How well tokens fall into clusters where no objects are known: DBSCAN by the knee of distances, then silhouette.

    Args:
        tokens: Tokens of all patches of an image.

    Returns:
        Mean silhouette of the clustered tokens by cosine distance, -1 to 1; 0 for one cluster, -1 for none.
    """
    tokens = tokens.astype(np.float64)
    distances = _euclidean(tokens)
    return silhouette(1 - _cosines(tokens), cluster(distances, k_distance_radius(distances)))


def oracle_radius(tokens: Tokens, owner: Owner) -> float:
    """The notebook's radius, which looks at the ground truth.

    Args:
        tokens: In raster order.
        owner: The object of each token.

    Returns:
        The distance between tokens that follow each other in an object, averaged over each object and then over
        objects.
    """
    steps = [np.linalg.norm(np.diff(tokens[owner == each], axis=0), axis=1).mean() for each in np.unique(owner)]
    return float(np.mean(steps))


def k_distance_radius(distances: Float[np.ndarray, "token token"], k: int = MIN_MEMBERS) -> float:
    """The knee of the sorted distances to the k-th neighbour: the point farthest below the chord between their ends.

    Ester et al. 1996 propose the curve and leave the knee to the eye; the chord is our construction (after Satopaa et
    al. 2011, kneedle).

    Args:
        distances: Symmetric, zero on the diagonal.
        k: Which neighbour.

    Returns:
        A radius in the unit of the distances.
    """
    sorted_distances = np.sort(np.sort(distances, axis=1)[:, min(k, len(distances) - 1)])
    if len(sorted_distances) < 3 or sorted_distances[0] == sorted_distances[-1]:
        return float(sorted_distances[-1])
    chord = np.linspace(sorted_distances[0], sorted_distances[-1], len(sorted_distances))
    return float(sorted_distances[(chord - sorted_distances).argmax()])


def tsne(tokens: Tokens, seed: int = 0) -> Float[np.ndarray, "token xy"]:
    """t-SNE of tokens by cosine distance; distances between far groups and sizes of groups mean nothing.

    Args:
        tokens: At least 2.
        seed: Of the initial positions.

    Returns:
        Positions in arbitrary units; the same for the same tokens and seed. Tokens of one direction lie at one place.

    Raises:
        UsageError: There are fewer than 2 tokens, or one is not finite (NaN or infinite) or has no length.
    """
    if len(tokens) < 2 or not np.isfinite(tokens).all() or not np.linalg.norm(tokens, axis=1).all():
        raise UsageError("A layout is made of 2 tokens or more, each of finite numbers and with a length above 0.")
    from sklearn.manifold import TSNE  # half a second to import, and needed only here
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    if np.ptp(unit, axis=0).max() <= SAME_DIRECTION:  # scikit-learn divides by their spread, and crashes the process
        return np.zeros((len(tokens), 2), dtype=np.float32)
    perplexity = min(PERPLEXITY, (len(tokens) - 1) / 3)  # scikit-learn asks for fewer neighbours than tokens
    with threadpool_limits(limits=1):  # the order of sums decides the layout
        xy = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(unit)
    return np.asarray(xy, dtype=np.float32)


def _radius(radius: str, tokens: Tokens, distances: np.ndarray, owner: Owner) -> float:
    if radius not in RADII:
        raise UsageError(f"There is no radius {radius!r}; choose from {', '.join(RADII)}.")
    return oracle_radius(tokens, owner) if radius == "oracle" else k_distance_radius(distances)


def _euclidean(tokens: Tokens) -> Float[np.ndarray, "token token"]:
    squares = (tokens**2).sum(axis=1)
    distances: np.ndarray[Any, Any] = np.sqrt(np.maximum(squares[:, None] + squares - 2 * tokens @ tokens.T, 0))
    np.fill_diagonal(distances, 0)
    return distances


def _cosines(tokens: Tokens) -> Float[np.ndarray, "token token"]:
    unit = tokens / np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), 1e-12)
    return np.asarray(unit @ unit.T)


def _dominant(owners: Owner) -> tuple[int, int]:
    """The object most members belong to, and how many do."""
    objects, counts = np.unique(owners, return_counts=True)
    return int(objects[counts.argmax()]), int(counts.max())


def _within(cosines: np.ndarray, members: np.ndarray) -> float:
    """Mean cosine between two different members."""
    n = int(members.sum())
    inner = cosines[np.ix_(members, members)]
    return float((inner.sum() - np.trace(inner)) / (n * (n - 1))) if n > 1 else float("nan")


def _mean(values: Sequence[float]) -> float:
    present = [value for value in values if not np.isnan(value)]
    return float(np.mean(present)) if present else float("nan")
