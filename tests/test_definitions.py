"""The page of definitions: every measure is on it, and numbers follow from its text, the model and NumPy alone."""

import fnmatch
import re
import zlib
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.cluster import DBSCAN
from sklearn.metrics import roc_auc_score, silhouette_score

from vitrail import open_vit, run_study
from vitrail.analysis import analyses
from vitrail.measure import Measure

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "definitions.md"

SIDE, N_IMAGES, N_LAYERS, N_HEADS, PATCH_PX = 6, 3, 2, 2, 8
N = SIDE * SIDE
ROW, COLUMN = np.divmod(np.arange(N), SIDE)
HOPS = np.maximum(np.abs(ROW[:, None] - ROW), np.abs(COLUMN[:, None] - COLUMN))
DISTANCE = np.hypot(ROW[:, None] - ROW, COLUMN[:, None] - COLUMN)


def declared_measures() -> list[Measure]:
    return [
        measure
        for analysis in analyses().values()
        for measure in (*analysis.measures, *analysis.accompanying, *analysis.image_measures)
    ]


def test_every_measure_is_on_the_page() -> None:
    said = re.findall(r"`([^`\n]+)`", PAGE.read_text())
    names = [measure.name for measure in declared_measures()]
    endings = tuple(each.removeprefix("..") for each in said if each.startswith(".."))
    missing = [
        name
        for name in names
        if not any(fnmatch.fnmatchcase(name, each) for each in said) and not name.endswith(endings)
    ]
    assert not missing


def test_the_page_of_measures_ends_sources_so_they_have_no_full_stop() -> None:
    assert not [measure.name for measure in declared_measures() if measure.source.endswith(".")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A study, and what its numbers are computed from: the model's own maps, tokens and answers, and the masks."""
    folder = tmp_path_factory.mktemp("definitions")
    torch.manual_seed(3)
    size = {"img_size": SIDE * PATCH_PX, "patch_size": PATCH_PX, "embed_dim": 24, "depth": N_LAYERS}
    model = timm.create_model("vit_tiny_patch16_224", **size, num_heads=N_HEADS, num_classes=5).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.35 if "qkv" in name else 0.2)
    ids = np.zeros((SIDE * PATCH_PX, SIDE * PATCH_PX), np.uint8)
    ids[3:24, 2:20], ids[26:46, 22:48] = 1, 2
    for at, kind in product(range(N_IMAGES), ("images", "masks")):
        (folder / kind).mkdir(exist_ok=True)
        colours = np.random.default_rng(at).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(colours).resize(ids.shape, Image.Resampling.BICUBIC)
        (picture if kind == "images" else Image.fromarray(ids)).save(folder / kind / f"{at}.png")
    vit = open_vit(model, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=1.0)
    study = run_study(
        vit,
        folder / "images",
        out=folder / "study",
        measures="attention_strength,strength_entropy,attention_distance,prefix_share,patches,objects,tokens",
        masks=folder / "masks",
        batch_size=N_IMAGES,
    ).load()
    images = vit.prepare([Image.open(folder / "images" / f"{at}.png") for at in range(N_IMAGES)])
    maps, tokens = [], []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda _, args: maps.append(args[0].double().numpy()))
        block.register_forward_hook(lambda _, __, output: tokens.append(output.double().numpy()))
    with torch.no_grad():
        model(images)
        plain_maps, plain_tokens = np.stack(maps[:N_LAYERS], 1), np.stack(tokens[:N_LAYERS], 1)

        def answer(changed: torch.Tensor) -> np.ndarray:
            return model(changed).softmax(-1).numpy()

        yield study, images, plain_maps, plain_tokens, ids, answer


def between_patches(maps: np.ndarray) -> np.ndarray:
    block = maps[..., 1:, 1:]
    return block / block.sum(-1, keepdims=True)


def interactions(maps: np.ndarray) -> np.ndarray:
    mean = between_patches(maps).mean(-3) * (1 - np.eye(N))
    return mean / mean.sum(-1, keepdims=True)


def shares_of_patches(ids: np.ndarray) -> dict[int, np.ndarray]:
    cells = ids.reshape(SIDE, PATCH_PX, SIDE, PATCH_PX)
    return {each: (cells == each).mean((1, 3)).ravel() for each in (1, 2)}


def owners(ids: np.ndarray) -> np.ndarray:
    shares = shares_of_patches(ids)
    largest = np.where(shares[1] >= shares[2], 1, 2)
    return np.where(np.maximum(shares[1], shares[2]) >= 0.4, largest, 0)


def test_how_far_a_head_looks_follows_from_the_text(plain) -> None:
    study, _, maps, *_ = plain
    block = maps[..., 1:, 1:]
    for hop in range(SIDE):
        has = (hop == HOPS).any(1)
        of_patch = np.where(hop == HOPS, block, 0).sum(-1)[..., has] / (hop == HOPS).sum(1)[has]
        assert_allclose(study["attention_strength"][..., hop], of_patch.mean(-1), rtol=1e-4)
    share = study["attention_strength"].to_numpy() / study["attention_strength"].to_numpy().sum(-1, keepdims=True)
    assert_allclose(study["strength_entropy"], -(share * np.log(share)).sum(-1), rtol=1e-4)
    assert_allclose(study["attention_distance"], (block * DISTANCE).sum((-1, -2)) / block.sum((-1, -2)), rtol=1e-4)
    assert_allclose(study["prefix_share"], maps[..., 1:, 0].mean(-1), rtol=1e-4)


def test_boxes_and_shares_of_patches_follow_from_the_text(plain) -> None:
    study, _, maps, _, ids, _ = plain
    matrix = interactions(maps)
    boxes = [
        (top, left, bottom, right)
        for top, bottom in combinations(range(SIDE + 1), 2)
        for left, right in combinations(range(SIDE + 1), 2)
    ]
    inside = np.stack([(t <= ROW) & (b > ROW) & (le <= COLUMN) & (r > COLUMN) for t, le, b, r in boxes])
    area, held = inside.sum(1), matrix @ inside.T
    enough = held >= 0.5 - 1e-5
    assert_allclose(study["field_size"], np.where(enough, area, N).min(-1) / N, rtol=1e-6)
    upto = np.sort(matrix, -1)[..., ::-1].cumsum(-1)
    assert_allclose(study["strongest_share"], (1 + (upto < 0.5 - 1e-5).sum(-1)) / N, rtol=1e-6)
    assert_allclose(study["interaction_distance"], (matrix * DISTANCE).sum(-1), rtol=1e-4)
    best = np.where(area <= round(0.25 * N), held, 0).max(-1)
    query = np.arange(N)
    left, top, right, bottom = (study["window"][..., side].to_numpy() for side in range(4))
    between_sides = ((COLUMN[query] - left)[..., None] <= COLUMN) & ((COLUMN[query] + right)[..., None] >= COLUMN)
    window = between_sides & ((ROW[query] - top)[..., None] <= ROW) & ((ROW[query] + bottom)[..., None] >= ROW)
    assert (window.sum(-1) <= round(0.25 * N)).all()
    assert_allclose((matrix * window).sum(-1), best, rtol=1e-4)
    weight = matrix * window / (matrix * window).sum(-1, keepdims=True)
    pull = np.stack([weight @ COLUMN - COLUMN, weight @ ROW - ROW], -1)
    assert_allclose(study["tendency"], pull, atol=1e-3)
    covered = sum(shares_of_patches(ids).values())
    of_window = (window * covered).sum(-1) / window.sum(-1)
    assert_allclose(study["window_object_share"], of_window, atol=1e-5)


def hubs_and_sinks(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    left, rounds = np.ones(N, bool), []
    for _ in range(5):
        present = rows * left
        share = (rows >= (present.mean(1) + present.std(1))[:, None]).mean(0)
        rounds.append(left & (share > 0.5) & (share > share[left].mean() + 2 * share[left].std()))
        left &= ~rounds[-1]
    return ~left, rounds[0]


def test_hubs_follow_from_the_text(plain) -> None:
    study, _, maps, *_ = plain
    matrix = interactions(maps)
    for image, layer in product(range(N_IMAGES), range(N_LAYERS)):
        hubs, sinks = hubs_and_sinks(matrix[image, layer])
        at = {"image": image, "layer": layer}
        assert_array_equal(study["hub"][at], hubs)
        assert_array_equal(study["sink"][at], sinks)
        taken = matrix[image, layer][:, sinks].sum() / matrix[image, layer].sum()
        assert float(study["sink_share"][at]) == pytest.approx(taken, abs=1e-5)
    assert study["sink"].any()


def test_objects_follow_from_the_text(plain) -> None:
    study, _, maps, _, ids, _ = plain
    on, owner = sum(shares_of_patches(ids).values()) >= 0.5, owners(ids)
    assert (owner > 0).sum() > on.sum() / 2
    for image, layer, head in product(range(N_IMAGES), range(N_LAYERS), range(N_HEADS)):
        row = maps[image, layer, head, 0, 1:]
        strongest = np.argsort(-row)[: on.sum()]
        hits = on[strongest].sum()
        at = {"image": image, "layer": layer, "head": head}
        assert float(study["object_pointing"][at]) == on[row.argmax()]
        assert float(study["object_iou"][at]) == pytest.approx(hits / (2 * on.sum() - hits), rel=1e-5)
        assert float(study["object_auroc"][at]) == pytest.approx(roc_auc_score(on, row), rel=1e-4)
        others = []
        for patch in np.flatnonzero(owner):
            rest = np.arange(N) != patch
            others.append(roc_auc_score((owner == owner[patch])[rest], maps[image, layer, head, 1 + patch, 1:][rest]))
        assert float(study["object_patch_auroc"][at]) == pytest.approx(np.mean(others), rel=1e-4)
    assert np.isnan(study["object_auroc_null"][0]).all()  # the first image of a batch has none before it
    assert_allclose(study["object_auroc_null"][1:], study["object_auroc"][1:], rtol=1e-5)  # one mask for all images


def test_groups_of_tokens_follow_from_the_text(plain) -> None:
    study, _, _, tokens, ids, _ = plain
    owner = owners(ids)
    for image, layer in product(range(N_IMAGES), range(N_LAYERS)):
        inside, own = tokens[image, layer, 1:][owner > 0], owner[owner > 0]
        distances = np.linalg.norm(inside[:, None] - inside, axis=-1)
        third = np.sort(np.sort(distances, axis=1)[:, 3])
        radius = third[(np.linspace(third[0], third[-1], len(third)) - third).argmax()]
        clusters = DBSCAN(eps=radius, min_samples=3, metric="precomputed").fit_predict(distances)
        n_clusters = clusters.max() + 1
        most = [np.bincount(own[clusters == each]).max() for each in range(n_clusters)]
        at = {"image": image, "layer": layer}
        assert float(study["grouping_clusters"][at]) == n_clusters / 2
        assert float(study["grouping_purity"][at]) == pytest.approx(sum(most) / len(own), rel=1e-5)
        if n_clusters > 1:
            clustered = clusters >= 0
            expected = silhouette_score(inside[clustered], clusters[clustered], metric="cosine")
            assert float(study["grouping_silhouette"][at]) == pytest.approx(expected, abs=1e-4)
        unit = inside / np.linalg.norm(inside, axis=1, keepdims=True)
        alike = [(unit[own == each] @ unit[own == each].T)[~np.eye((own == each).sum(), dtype=bool)] for each in (1, 2)]
        expected = np.mean([each.mean() for each in alike])
        assert float(study["grouping_in_object"][at]) == pytest.approx(expected, abs=1e-4)


def test_lost_and_shuffled_patches_follow_from_the_text(plain) -> None:
    study, images, _, _, ids, answer = plain
    labels = study["label"].to_numpy()
    digests = [zlib.crc32(each.float().numpy().tobytes()) for each in images]
    covered = sum(shares_of_patches(ids).values())
    for number, amount in enumerate((0.25, 0.5, 0.75)):
        for name in ("random", "salient", "non_salient"):
            changed = images.clone()
            for image, digest in enumerate(digests):
                order = np.random.default_rng((0, digest)).random(N)
                keys = {"random": (order,), "salient": (order, -covered), "non_salient": (order, covered)}
                for patch in np.lexsort(keys[name])[: round(amount * N)]:
                    row, column = (PATCH_PX * each for each in divmod(int(patch), SIDE))
                    changed[image, :, row : row + PATCH_PX, column : column + PATCH_PX] = images[image].mean(
                        (1, 2), keepdim=True
                    )
            expected = answer(changed)[np.arange(N_IMAGES), labels]
            assert_allclose(study[f"occlusion_{name}"][:, number], expected, rtol=1e-4)
    half = SIDE * PATCH_PX // 2
    changed = images.clone()
    for image, digest in enumerate(digests):
        for place, cell in enumerate(np.random.default_rng((0, digest, 2)).permutation(4)):
            (to_row, to_column), (row, column) = ([half * each for each in divmod(int(at), 2)] for at in (place, cell))
            changed[image, :, to_row : to_row + half, to_column : to_column + half] = images[
                image, :, row : row + half, column : column + half
            ]
    assert_allclose(study["shuffle_probability"][:, 0], answer(changed)[np.arange(N_IMAGES), labels], rtol=1e-4)
