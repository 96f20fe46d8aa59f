"""The causal referee of `experiments/patches.py`: what masking really changes, in a model of planted interactions.

Each patch of the first layer looks at the patch behind it in raster order and next to nowhere else.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn

from vitrail import open_vit

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SIDE, WIDTH = 4, 36
N = SIDE * SIDE
NEXT = (torch.arange(N) + 1) % N
"""The patch that each patch looks at."""


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    """The script, under a name that no package of the tests has."""
    spec = importlib.util.spec_from_file_location("patches_experiment", EXPERIMENTS / "patches.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXPERIMENTS))
    return module


def planted() -> nn.Module:
    """Two layers of one head. Channels 0 to 16 hold a token's place, the others its pixels; L0 reads places alone."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8 * SIDE, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=1, num_classes=5,
    ).eval()  # fmt: skip
    places = slice(0, N + 1)
    with torch.no_grad():
        model.patch_embed.proj.weight[places] = 0
        model.patch_embed.proj.bias.zero_()
        model.cls_token.zero_()
        model.pos_embed.zero_()
        model.pos_embed[0, :, places] = torch.eye(N + 1)
        first = model.blocks[0]
        first.norm1 = nn.Identity()
        q, k, v = first.attn.qkv.weight.view(3, WIDTH, WIDTH)
        first.attn.qkv.bias.zero_()
        q.zero_()
        k.zero_()
        q[1 + NEXT, 1 + torch.arange(N)] = 7 * WIDTH**0.5  # a score of 7, where others have 0
        k[places, places] = torch.eye(N + 1)
        v.normal_(std=0.5)
        first.attn.proj.weight.copy_(torch.eye(WIDTH))
        first.attn.proj.bias.zero_()
    return model


@pytest.fixture(scope="module")
def batch(experiment: ModuleType):
    vit = open_vit(planted(), mean=0.5, std=0.5)
    images = torch.randn((3, 3, 8 * SIDE, 8 * SIDE), generator=torch.Generator().manual_seed(0))
    return experiment.Batch(vit, images, torch.zeros(3, dtype=torch.long), seed=0)


def masked_by_hand(model: nn.Module, images: Tensor, query: int | None, key: int) -> tuple[Tensor, Tensor]:
    """Tokens after L0's attention and residual, and logits, with a key (-1: none) closed for a query or all."""
    x = model._pos_embed(model.patch_embed(images))
    attention = model.blocks[0].attn
    q, k, v = attention.qkv(x).view(len(x), N + 1, 3, WIDTH).unbind(2)
    scores = q @ k.mT * WIDTH**-0.5
    rows = slice(None) if query is None else 1 + query
    if key >= 0:
        scores[:, rows, 1 + key] = -torch.inf
    x = x + attention.proj(scores.softmax(-1) @ v)
    tokens = x
    x = x + model.blocks[0].mlp(model.blocks[0].norm2(x))
    x = model.norm(model.blocks[1](x))
    return tokens[:, 1:], model.forward_head(x)


@torch.no_grad()
def test_closing_the_planted_key_moves_the_token_and_closing_another_does_not(experiment, batch) -> None:
    replay, _ = batch.vit.tap().record(batch.images)
    planted_key = NEXT.expand(3, -1)
    other_key = (NEXT + 5).remainder(N).expand(3, -1)
    of_planted, of_other = (experiment._token_change(batch, 0, replay, key) for key in (planted_key, other_key))
    assert (of_planted > 20 * of_other).all()
    before, _ = masked_by_hand(batch.vit.model, batch.images, None, -1)
    for query in (0, 6, 15):
        after, _ = masked_by_hand(batch.vit.model, batch.images, query, int(NEXT[query]))
        expected = (after - before)[:, query].norm(dim=-1) / before[:, query].norm(dim=-1)
        assert_allclose(of_planted[:, query], expected, rtol=1e-4)


@torch.no_grad()
def test_what_the_answer_changes_by_is_what_masking_by_hand_gives(experiment, batch) -> None:
    replay, logits = batch.vit.tap().record(batch.images)
    answer = logits.argmax(-1)
    query = torch.tensor([[0, 6], [3, 9], [15, 2]])
    key = NEXT[query]
    _, before = masked_by_hand(batch.vit.model, batch.images, None, -1)
    for queries in (query, None):
        _, change = experiment._answer_change(batch, 0, replay, logits, queries, key)
        for image in range(3):
            for pair in range(2):
                at = None if queries is None else int(query[image, pair])
                _, after = masked_by_hand(batch.vit.model, batch.images, at, int(key[image, pair]))
                p = [each[image].softmax(-1)[answer[image]] for each in (before, after)]
                assert_allclose(change[image, pair], (p[0] - p[1]).abs(), rtol=1e-3, atol=1e-7)


@torch.no_grad()
def test_the_referee_prefers_indicators_that_know_the_planted_key(experiment, batch) -> None:
    """Half of its keys are the planted ones. An indicator whose rows are dealt out anew knows nothing."""
    everyone = torch.arange(N).expand(3, -1)
    steps = torch.where(torch.arange(N) % 2 == 0, 1, torch.randint(2, N, (N,), generator=batch.generator))
    other = (everyone + steps) % N
    replay, _ = batch.vit.tap().record(batch.images)
    effect = experiment._token_change(batch, 0, replay, other)
    agreement = {}
    for name in ("mean", "removal"):
        matrix = batch.indicators(name)[0]
        strength = matrix.gather(-1, other[..., None])[..., 0]
        dealt = matrix[:, torch.randperm(N, generator=batch.generator)].gather(-1, other[..., None])[..., 0]
        agreement[name] = [
            np.mean([experiment.spearman(each[image].numpy(), effect[image].numpy()) for image in range(3)])
            for each in (strength, dealt)
        ]
    assert min(knows for knows, _ in agreement.values()) > 0.8
    is_planted = (other == NEXT)[0]
    assert effect[:, is_planted].min() > 20 * effect[:, ~is_planted].max()
    assert max(dealt for _, dealt in agreement.values()) < 0.5
    by_experiment = experiment._agreement(batch, 0)
    assert by_experiment.shape == (3, len(experiment.INDICATORS), len(experiment.EFFECTS))
    without_order = np.isnan(by_experiment).all((0, 2))  # one head has no variance, so its rows are all zero
    by_name = dict(zip(experiment.INDICATORS, without_order, strict=True))
    assert {name for name, each in by_name.items() if each} == {"var", "mean_std"}
    assert np.isfinite(by_experiment[:, ~without_order, 0]).all()
