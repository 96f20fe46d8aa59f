"""The standing map of patterns: where a sample of heads lies, which cluster each is in, and where another head goes.

Layout and clusters are made from a bounded sample of latents. Every head, of the sample or not, of the study or of a
new image, is then placed by one and the same rule, so a head that is placed again lands where it was. No torch.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, Int32
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

__all__ = ["NOISE", "PatternLayout", "fit_layout", "principal_plane"]

NOISE = -1
"""The cluster of heads that are in none."""

PERPLEXITY = 30
"""About how many neighbours t-SNE keeps together; openTSNE's default."""

MIN_HEADS = 10
"""Below so many heads there is no t-SNE and there are no clusters: two principal axes, and all are in cluster 0."""

MIN_SHARE, MIN_MEMBERS = 1 / 100, 10
"""A cluster holds at least a hundredth of the sample, and ten heads."""

BARNES_HUT_HEADS = 3000
"""From so many heads on, repulsion by interpolation is quicker than by a tree."""

PLACE_HEADS = 16384
"""Heads that are placed together: a bound on the memory of their affinities."""

DISTANCE_HEADS = 512
"""Heads whose distances to the sample are held at once."""

START_SPREAD = 1e-4
"""Standard deviation of the layout at the start along its first axis, as openTSNE recommends: small enough that
neighbours, not the principal axes, decide where points go."""

LEAST_SPREAD = 1e-12
"""Bound on what the spread of the principal axes is divided by, for samples that do not vary."""


@dataclass(frozen=True)
class PatternLayout:
    """The standing map: the sample's positions and clusters.

    Attributes:
        latents: Of the sample.
        xy: Where each head of the sample lies, in layout units.
        cluster: Its cluster, from 0, the largest; -1 for none.
    """

    latents: Float32[np.ndarray, "sample latent"]
    xy: Float32[np.ndarray, "sample xy"]
    cluster: Int32[np.ndarray, "sample"]

    @property
    def n_clusters(self) -> int:
        """How many clusters the map has."""
        return int(self.cluster.max(initial=NOISE)) + 1

    def place(
        self, latents: Float[np.ndarray, "head latent"]
    ) -> tuple[Float32[np.ndarray, "head xy"], Int32[np.ndarray, "head"]]:
        """Where heads with these latents lie on the map, and their clusters.

        Cluster: that of the nearest head of the sample. Position: openTSNE's `transform`, which starts at the median of
        the nearest heads' positions and lets each new head move under the attraction of its neighbours and the
        repulsion of all, while the sample stands still; below 10 heads the nearest head's own position.

        Args:
            latents: Of the heads.

        Returns:
            Positions in layout units, and numbers of clusters, -1 for none.
        """
        latents = np.asarray(latents, dtype=np.float32)
        if not len(latents):
            return np.zeros((0, 2), np.float32), np.zeros(0, np.int32)
        with threadpool_limits(limits=1):
            cluster = self.nearest_cluster(latents)
            if self._embedding is None:
                return self.xy[self._nearest(latents)], cluster
            pieces = [
                np.asarray(self._embedding.transform(latents[at : at + PLACE_HEADS]))
                for at in range(0, len(latents), PLACE_HEADS)
            ]
        return np.concatenate(pieces).astype(np.float32), cluster

    def nearest_cluster(self, latents: Float[np.ndarray, "head latent"]) -> Int32[np.ndarray, "head"]:
        """The cluster of the nearest head of the sample.

        Args:
            latents: Of the heads.

        Returns:
            Numbers of clusters, -1 for none.
        """
        return np.asarray(self.cluster[self._nearest(np.asarray(latents, dtype=np.float32))])

    def _nearest(self, latents: Float32[np.ndarray, "head latent"]) -> Int[np.ndarray, "head"]:
        """By |s|^2 - 2 s l, which is the squared distance up to what all heads of the sample share."""
        pieces = [latents[at : at + DISTANCE_HEADS] for at in range(0, len(latents), DISTANCE_HEADS)]
        return np.concatenate([(self._square - 2 * (piece @ self.latents.T)).argmin(1) for piece in pieces])

    @cached_property
    def _square(self) -> Float32[np.ndarray, "sample"]:
        return np.asarray(np.square(self.latents).sum(1))

    @cached_property
    def _embedding(self) -> Any:
        """The map as openTSNE holds it, made again from latents and places; None where it is no t-SNE."""
        if not _has_layout(self.latents):
            return None
        from openTSNE import TSNEEmbedding

        return TSNEEmbedding(
            self.xy.astype(np.float64),
            _affinities(self.latents),
            negative_gradient_method=_method(self.latents),
            n_jobs=1,
            random_state=0,
        )


def fit_layout(latents: Float[np.ndarray, "sample latent"], seed: int = 0) -> PatternLayout:
    """Lays out and clusters a sample of heads by their latents.

    Layout: t-SNE (openTSNE, perplexity 30, start at the principal axes). Near means alike; distances between far groups
    and their sizes mean nothing. Clusters: HDBSCAN on the latents, numbered from the largest; heads in sparse regions
    are in none (-1). Source: after Li et al. 2023 for the map; clusters are our construction.

    Args:
        latents: Of the sample.
        seed: Of the layout.

    Returns:
        The map. With fewer than 10 different heads the first two principal axes, and all heads in cluster 0.
    """
    latents = np.asarray(latents, dtype=np.float32)
    with threadpool_limits(limits=1):
        if not _has_layout(latents):
            return PatternLayout(latents, principal_plane(latents), np.zeros(len(latents), np.int32))
        return PatternLayout(latents, _layout(latents, seed), _clusters(latents))


def _has_layout(latents: Float32[np.ndarray, "sample latent"]) -> bool:
    return len(latents) >= MIN_HEADS and len(np.unique(latents, axis=0)) >= MIN_HEADS


def _layout(latents: Float32[np.ndarray, "sample latent"], seed: int) -> Float32[np.ndarray, "sample xy"]:
    from openTSNE import TSNEEmbedding

    start = principal_plane(latents).astype(np.float64)
    start *= START_SPREAD / max(float(start[:, 0].std()), LEAST_SPREAD)
    embedding = TSNEEmbedding(
        start, _affinities(latents), negative_gradient_method=_method(latents), n_jobs=1, random_state=seed
    )
    # The two phases and their settings are the defaults of openTSNE's own TSNE.
    embedding.optimize(n_iter=250, exaggeration=12, momentum=0.5, inplace=True)
    embedding.optimize(n_iter=500, momentum=0.8, inplace=True)
    return np.asarray(embedding, dtype=np.float32)


def _method(latents: Float32[np.ndarray, "sample latent"]) -> str:
    """Repulsion by a tree where that is quicker than by interpolation."""
    return "bh" if len(latents) < BARNES_HUT_HEADS else "fft"


def _affinities(latents: Float32[np.ndarray, "sample latent"]) -> Any:
    from openTSNE.affinity import PerplexityBasedNN

    perplexity = min(PERPLEXITY, (len(latents) - 1) / 3)
    return PerplexityBasedNN(latents, perplexity=perplexity, method="exact", n_jobs=1, random_state=0)


def _clusters(latents: Float32[np.ndarray, "sample latent"]) -> Int32[np.ndarray, "sample"]:
    """The leaves of the tree: by excess of mass, what follows the image joins the sinks and the local heads in one."""
    from sklearn.cluster import HDBSCAN

    size = max(MIN_MEMBERS, round(MIN_SHARE * len(latents)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a default that is given here all the same
        numbers = HDBSCAN(size, min_samples=MIN_MEMBERS, cluster_selection_method="leaf", copy=True).fit_predict(
            latents
        )
    names, counts = np.unique(numbers[numbers != NOISE], return_counts=True)
    rank = {int(name): at for at, name in enumerate(names[np.argsort(-counts, kind="stable")])}
    return np.array([rank.get(int(each), NOISE) for each in numbers], dtype=np.int32)


def principal_plane(table: Float[np.ndarray, "row column"]) -> Float32[np.ndarray, "row xy"]:
    """The first two principal components of the rows of a table.

    Args:
        table: Any unit.

    Returns:
        Coordinates in the same unit, the largest entry of each component positive; zeros where there are fewer than
        two.
    """
    table = np.asarray(table, dtype=np.float64)
    left, sizes, _ = np.linalg.svd(table - table.mean(0), full_matrices=False)
    plane = left[:, :2] * sizes[:2]
    largest = np.abs(plane).argmax(axis=0)
    plane = plane * np.where(np.take_along_axis(plane, largest[None], axis=0) < 0, -1.0, 1.0)
    return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1]))).astype(np.float32)
