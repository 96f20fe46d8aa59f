"""Clusters of tokens and their scores, against scikit-learn on planted clusters; objects on patches."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image
from sklearn.cluster import DBSCAN
from sklearn.metrics import silhouette_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.metrics.pairwise import cosine_similarity

from vitrail.errors import UsageError
from vitrail.models.objects import coverage, in_view, object_share, patch_objects
from vitrail.models.preprocessing import Preprocessing
from vitrail.tokens.grouping import (
    cluster,
    k_distance_radius,
    label_free_silhouette,
    object_silhouette,
    oracle_radius,
    score_grouping,
    silhouette,
    tsne,
)


def planted(spread=0.3, sizes=(12, 9, 15), n_noise=4, seed=0):
    """Tokens around one direction per object, and some far from all."""
    rng = np.random.default_rng(seed)
    centres = 4 * np.linalg.qr(rng.normal(size=(24, 24)))[0][: len(sizes)]
    tokens = [centre + spread * rng.normal(size=(size, 24)) for centre, size in zip(centres, sizes, strict=True)]
    noise = rng.normal(scale=8, size=(n_noise, 24))
    owner = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    return np.concatenate([*tokens, noise]), np.concatenate([owner, rng.integers(1, len(sizes) + 1, n_noise)])


def distances_of(tokens):
    return np.linalg.norm(tokens[:, None] - tokens[None], axis=-1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("radius", [0.5, 1.5, 2.2, 3.0, 6.0, 60.0])
def test_clusters_are_those_of_scikit_learn(radius, seed):
    tokens, _ = planted(spread=0.4, seed=seed)
    expected = DBSCAN(eps=radius, min_samples=3).fit(tokens).labels_
    assert (cluster(distances_of(tokens), radius) == expected).all()


@pytest.mark.parametrize("radius", [2.2, 2.6, 3.0])
def test_silhouettes_are_those_of_scikit_learn(radius):
    tokens, _ = planted(spread=0.4)
    found = DBSCAN(eps=radius, min_samples=3).fit(tokens).labels_
    kept = found >= 0
    assert found.max() >= 1
    expected = silhouette_score(tokens[kept], found[kept], metric="cosine")
    assert silhouette(1 - cosine_similarity(tokens), found) == pytest.approx(expected, abs=1e-9)


def test_objects_that_lie_apart_have_a_high_silhouette_and_objects_at_random_none():
    tokens, owner = planted(n_noise=0)
    assert_allclose(object_silhouette(tokens, owner), silhouette_score(tokens, owner, metric="cosine"), atol=1e-9)
    assert object_silhouette(tokens, owner) > 0.7
    drawn = np.random.default_rng(1)
    random = [object_silhouette(tokens, drawn.permutation(owner)) for _ in range(20)]
    assert abs(np.mean(random)) < 0.1
    assert_allclose(object_silhouette(3 * tokens, owner * 7), object_silhouette(tokens, owner), atol=1e-9)


def test_tokens_without_known_objects_have_the_silhouette_of_their_clusters():
    tokens, _ = planted()
    clusters = cluster(distances_of(tokens), k_distance_radius(distances_of(tokens)))
    clustered = clusters >= 0
    expected = silhouette_score(tokens[clustered], clusters[clustered], metric="cosine")
    assert_allclose(label_free_silhouette(tokens), expected, atol=1e-6)
    assert label_free_silhouette(planted(n_noise=0)[0]) > 0.7
    noise = np.random.default_rng(0).normal(size=(40, 16))
    assert label_free_silhouette(noise) < 0.2


def test_a_silhouette_of_one_cluster_is_0_and_of_none_minus_1():
    distances = distances_of(planted()[0])
    assert silhouette(distances, np.zeros(40, dtype=int)) == 0
    assert silhouette(distances, np.full(40, -1)) == -1


@pytest.mark.parametrize("radius", ["k-distance", "oracle"])
def test_planted_objects_are_found_whole_and_pure(radius):
    tokens, owner = planted(n_noise=0)
    found = score_grouping(tokens, owner, radius)
    assert found.clusters == 1
    assert found.purity > 0.85
    assert found.unique_label == 1
    assert found.silhouette > 0.7
    assert found.in_object == pytest.approx(found.in_cluster, abs=0.1)


def test_purity_and_labels_are_those_of_scikit_learns_contingency_matrix():
    tokens, owner = planted()
    owner[[0, 1, 2, 14]] = [2, 3, 3, 1]  # some tokens look like another object's
    radius = k_distance_radius(distances_of(tokens))
    found = DBSCAN(eps=radius, min_samples=3).fit(tokens).labels_
    kept = found >= 0
    table = contingency_matrix(owner[kept], found[kept])  # object by cluster
    scores = score_grouping(tokens, owner)
    assert table.shape[1] >= 2
    assert scores.purity == pytest.approx(table.max(axis=0).sum() / len(owner))
    assert scores.clusters == pytest.approx(table.shape[1] / 3)
    assert scores.unique_label == pytest.approx(len(set(table.argmax(axis=0))) / 3)


def test_in_cluster_is_the_mean_cosine_of_scikit_learns_clusters():
    tokens, owner = planted(spread=0.6, n_noise=6)
    labels = DBSCAN(eps=k_distance_radius(distances_of(tokens)), min_samples=3).fit(tokens).labels_
    assert labels.max() >= 1
    assert (labels == -1).any()
    means = []
    for each in range(labels.max() + 1):
        cosines = cosine_similarity(tokens[labels == each])
        means.append(cosines[np.triu_indices(len(cosines), 1)].mean())
    found = score_grouping(tokens, owner)
    assert found.in_cluster == pytest.approx(np.mean(means), abs=1e-9)
    assert abs(found.in_cluster - found.in_object) > 1e-3  # not the same thing


def test_purity_counts_what_no_cluster_holds_as_impure():
    tokens, owner = planted(n_noise=4)
    assert score_grouping(tokens, owner, "oracle").purity <= 36 / 40


def test_tokens_without_objects_in_them_score_low():
    rng = np.random.default_rng(0)
    owner = np.repeat([1, 2, 3], 12)
    found = score_grouping(rng.normal(size=(36, 24)), owner)
    assert found.silhouette < 0.2
    assert abs(found.in_object) < 0.1


def test_in_object_is_the_mean_cosine_between_different_tokens_of_an_object():
    tokens, owner = planted(n_noise=0)
    means = []
    for each in (1, 2, 3):
        inner = cosine_similarity(tokens[owner == each])
        means.append(inner[np.triu_indices(len(inner), 1)].mean())
    assert score_grouping(tokens, owner).in_object == pytest.approx(np.mean(means), abs=1e-9)


def test_objects_of_one_class_share_a_label():
    tokens, owner = planted(n_noise=0)
    assert score_grouping(tokens, owner, labels={1: 7, 2: 7, 3: 7}).unique_label == 1
    merged = tokens.copy()
    merged[owner == 2] = tokens[owner == 1][:9]
    assert score_grouping(merged, owner).unique_label < 1


def test_the_oracle_radius_is_the_step_between_neighbours_in_an_object():
    tokens = np.array([[0.0], [1.0], [3.0], [10.0], [14.0]])
    assert oracle_radius(tokens, np.array([1, 1, 1, 2, 2])) == pytest.approx((1.5 + 4) / 2)


def test_the_k_distance_radius_lies_between_members_and_strangers():
    tokens, _ = planted(n_noise=6)
    distances = distances_of(tokens)
    within = np.sort(distances, axis=1)[:36, 3]
    assert within.mean() < k_distance_radius(distances) < distances[:36, 36:].min()


def test_scores_do_not_depend_on_the_scale_of_the_tokens():
    tokens, owner = planted()
    one, other = score_grouping(tokens, owner), score_grouping(1000 * tokens, owner)
    assert_allclose(list(vars(one).values()), list(vars(other).values()), rtol=1e-6)


def test_an_unknown_radius_is_refused():
    with pytest.raises(UsageError, match="k-distance, oracle"):
        score_grouping(*planted(), "guess")


def test_a_layout_is_the_same_twice_and_keeps_objects_together():
    tokens, owner = planted(n_noise=0)
    one, other = tsne(tokens), tsne(tokens)
    assert_allclose(one, other)
    distances = distances_of(one)
    same = owner[:, None] == owner
    assert distances[same].mean() < 0.5 * distances[~same].mean()


def test_tokens_that_are_all_the_same_lie_at_one_place_and_others_need_numbers():
    """scikit-learn crashes the process on them."""
    assert not tsne(np.full((10, 4), 0.3, dtype=np.float32)).any()
    for wrong in (np.ones((1, 4)), np.full((9, 4), np.nan), np.zeros((9, 4))):
        with pytest.raises(UsageError, match="2 tokens or more"):
            tsne(wrong.astype(np.float32))


def test_no_token_is_refused():
    tokens, owner = planted()
    with pytest.raises(UsageError, match="0 tokens and 0 objects"):
        score_grouping(tokens[:0], owner[:0])


# --- objects on the grid ---------------------------------------------------------------------------------------------


def test_a_patch_belongs_to_the_object_that_covers_most_of_it_if_that_is_enough():
    ids = np.zeros((8, 8), dtype=np.int64)
    ids[0:4, 0:4] = 5  # all of patch 0
    ids[0:4, 4:6] = 300  # half of patch 1
    ids[4:8, 0:1] = 5  # a quarter of patch 2
    assert patch_objects(ids, (2, 2), min_patches=1).tolist() == [5, 300, 0, 0]
    assert patch_objects(ids, (2, 2), min_patches=1, min_share=0.2).tolist() == [5, 300, 5, 0]


def test_small_objects_are_left_out():
    ids = np.zeros((40, 40), dtype=np.int64)
    ids[:10, :10] = 1
    ids[20:22, 20:22] = 2  # a quarter of a percent
    owner = patch_objects(ids, (20, 20), min_patches=1)
    assert set(owner) == {0, 1}
    assert (owner == 1).sum() == 25
    assert set(patch_objects(ids, (4, 4), min_patches=2)) == {0}


def test_coverage_sums_to_the_area():
    ids = np.random.default_rng(0).integers(0, 3, (32, 48))
    found, shares = coverage(ids, (4, 6))
    assert found.tolist() == [1, 2]
    assert_allclose(shares.mean(axis=1), [(ids == 1).mean(), (ids == 2).mean()])


def test_masks_are_resized_and_cropped_like_their_image_without_new_ids():
    ids = np.zeros((60, 100), dtype=np.int64)
    ids[:, 50:] = 700  # more than a byte holds
    ids[10:20, 30:40] = 3
    seen = in_view(ids, Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3, crop_pct=1.0))
    assert seen.shape == (32, 32)
    assert set(np.unique(seen)) == {0, 3, 700}
    assert (seen[:, 17:] == 700).all()
    assert (seen[:, :15] != 700).all()


def test_the_border_around_a_small_image_is_no_object():
    ids = np.zeros((40, 100), dtype=np.int64)
    ids[10:20, 30:40] = 3
    grey = Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3, crop_mode="border", crop_pct=1.0, fill=(128, 128, 128))
    assert grey.view(Image.new("RGB", (100, 40))).getpixel((0, 0)) == (128, 128, 128)
    seen = in_view(ids, grey)
    assert set(np.unique(seen)) == {0, 3}
    assert not object_share(seen, (8, 8)).reshape(8, 8)[[0, 1, 6, 7]].any()


def test_a_view_without_objects_has_none():
    assert not patch_objects(np.zeros((8, 8), dtype=np.int64), (2, 2)).any()
