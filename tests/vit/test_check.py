"""The check beside models that make honest promises look broken, and beside taps that break them unseen."""

import copy

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from timm.models.nest import Nest
from timm.models.pit import PoolingVisionTransformer
from torch import nn

from vitrail import run_study
from vitrail.contract.check import check_vit
from vitrail.contract.surgery import NoProjection, projections, run_without_head
from vitrail.errors import Unsupported, UsageError
from vitrail.models.open import open_vit
from vitrail.pruning.removal import remove_heads, why_not_removable
from vitrail.tap.attention import Readers
from vitrail.tap.edits import Edit
from vitrail.tap.tap import Tap

VIT = "timm ViT"


@pytest.fixture
def nest():
    """NesT with two levels; its heads are interleaved in the channels of the projection."""
    torch.manual_seed(0)
    model = Nest(img_size=64, embed_dims=(24, 48), num_heads=(3, 6), depths=(2, 2), num_levels=2, num_classes=7)
    return _spread(model)


@torch.no_grad()
def _spread(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model.eval()


def _with_layer_scale(value: float) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=48, num_heads=3, num_classes=7, init_values=value
    )
    return _spread(model)


@pytest.mark.parametrize("value", [1e-5, 1e-9])
def test_a_small_layer_scale_breaks_no_promise(value):
    report = check_vit(open_vit(_with_layer_scale(value), image_size=64))
    assert report.ok, report.text()
    assert report.finding("edits act").holds is True


def test_an_edit_that_does_nothing_is_broken_however_small_the_layer_scale(monkeypatch):
    vit = open_vit(_with_layer_scale(1e-9), image_size=64)
    correct = Tap._apply_edits

    def ignore_pruning(self, state, position, raw):
        result = correct(self, state, position, raw)
        return result._replace(out=raw.run(None, None))

    monkeypatch.setattr(Tap, "_apply_edits", ignore_pruning)
    report = check_vit(vit, quick=True)
    assert report.finding("edits act").holds is False
    assert not report.ok


def test_norms_without_gain_and_logits_of_zero_break_no_promise(fresh):
    """Without gain attention has no input; with logits of zero no effect leaves a trace in them."""
    norms, logits = fresh(VIT), fresh(VIT)
    for block in norms.blocks:
        nn.init.zeros_(block.norm1.weight)
        nn.init.zeros_(block.norm1.bias)
        nn.init.zeros_(block.attn.qkv.bias)
    nn.init.zeros_(logits.head.weight)
    nn.init.zeros_(logits.head.bias)
    silent = check_vit(open_vit(norms, image_size=64))
    assert silent.ok, silent.text()
    assert silent.finding("edits act").holds is None
    flat = check_vit(open_vit(logits, image_size=64))
    assert flat.ok, flat.text()
    assert flat.finding("edits act").holds is True


@torch.no_grad()
def test_the_channels_of_interleaved_heads_are_found(nest):
    """timm's NesT reshapes [.., channel, head] to channels, so head h has the channels h, h + heads, .."""
    vit = open_vit(nest, image_size=64)
    images = torch.randn((2, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    for (layer, _), projection in projections(nest, vit.anatomy, images).items():
        assert not isinstance(projection, NoProjection)
        heads = vit.anatomy.blocks[layer].heads
        for head in range(heads):
            channels = projection.channels[head].nonzero().flatten().tolist()
            assert channels == list(range(head, projection.channels.shape[1], heads))
    report = check_vit(vit)
    assert report.ok, report.text()
    assert report.finding("prune = surgery").holds is True


@torch.no_grad()
def test_a_run_without_a_head_is_that_of_a_copy_with_its_columns_zeroed(fresh, noise):
    model = fresh(VIT)
    vit = open_vit(model, image_size=64)
    images = noise(vit)
    projection = projections(model, vit.anatomy, images)[1, 0]
    cut = copy.deepcopy(model)
    cut.blocks[1].attn.proj.weight[:, 16:32] = 0
    assert_allclose(run_without_head(model, [projection], 1, images).numpy(), cut(images).numpy(), atol=1e-6)
    assert float((cut(images) - model(images)).abs().max()) > 1e-2


def test_blocks_that_share_their_attention_weights_break_no_promise(fresh):
    model = fresh(VIT)
    model.blocks[1].attn.qkv, model.blocks[1].attn.proj = model.blocks[0].attn.qkv, model.blocks[0].attn.proj
    report = check_vit(open_vit(model, image_size=64))
    assert report.ok, report.text()


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 16, bias=False) for _ in range(3))

    def forward(self, x):
        return (self.q(x) @ self.k(x).mT / 4).softmax(-1) @ self.v(x)


class _HeadModules(nn.Module):
    """A module for each head, whose outputs meet in one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(32), nn.Linear(32, 32)
        self.heads = nn.ModuleList(_Head() for _ in range(2))

    def forward(self, x):
        y = self.norm(x)
        return x + self.proj(torch.cat([head(y) for head in self.heads], -1))


class _GateAfter(nn.Module):
    """A gate that is computed from the tokens after attention; a tensor that the first block keeps for the others."""

    def __init__(self, kept: dict[str, torch.Tensor] | None = None) -> None:
        super().__init__()
        self.kept, self.first, self.num_heads = kept, kept == {}, 2
        if kept is not None:
            kept["out"] = torch.zeros(1)
        self.norm, self.qkv, self.gate, self.proj = nn.LayerNorm(32), *(nn.Linear(32, n) for n in (96, 32, 32))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = self.qkv(y).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.kept is None:
            return x + self.proj(out * self.gate(y).sigmoid())
        if self.first:
            self.kept["out"] = out
        return x + self.proj(out + self.kept["out"])


class _Blocks(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.patches, self.blocks, self.head = nn.Conv2d(3, 32, 16, 16), nn.Sequential(*blocks), nn.Linear(32, 5)

    def forward(self, images):
        return self.head(self.blocks(self.patches(images).flatten(2).mT).mean(1))


@pytest.mark.parametrize("block", [_HeadModules, _GateAfter])
def test_the_projection_is_the_weight_that_takes_what_all_heads_give(block):
    torch.manual_seed(0)
    model = _Blocks(block(), block()).eval()
    vit = open_vit(model, image_size=64, weights="random")
    assert vit.n_heads == (2, 2)
    images = torch.randn((2, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    for (layer, number), projection in projections(model, vit.anatomy, images).items():
        assert not isinstance(projection, NoProjection)
        assert projection.weight == f"blocks.{layer}.proj.weight"
        first = vit.anatomy.blocks[layer].calls[number].first_head
        for head, channels in enumerate(projection.channels, first):
            assert channels.nonzero().flatten().tolist() == [*range(16 * head, 16 * head + 16)]
    report = check_vit(vit)
    assert report.ok, report.text()
    assert report.finding("prune = surgery").holds is True


def test_what_blocks_keep_for_later_ones_is_no_broken_promise():
    torch.manual_seed(0)
    kept: dict[str, torch.Tensor] = {}
    report = check_vit(open_vit(_Blocks(_GateAfter(kept), _GateAfter(kept)).eval(), image_size=64, weights="random"))
    assert report.ok, report.text()
    assert report.finding("prune = surgery").holds is None
    assert report.finding("heads batched").holds is True


class _Adapter(nn.Module):
    """A low-rank path beside a linear map, as adapters of fine-tuning are."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(0.3)
        self.down, self.up = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.dropout(x)))


def test_adapters_beside_the_projection_break_no_promise(fresh):
    model = fresh(VIT)
    torch.manual_seed(0)
    for block in model.blocks:
        block.attn.proj = _Adapter(block.attn.proj)
    report = check_vit(open_vit(model.eval(), image_size=64))
    assert report.ok, report.text()
    assert report.finding("prune = surgery").holds is True


@torch.no_grad()
def test_attention_compiled_block_by_block_is_observed_uncompiled(fresh, noise):
    """The compiler must not run under the tap, and the tap must not be built anew for every pass."""
    eager, model, compilations = fresh(VIT), fresh(VIT), []

    def compiler(graph, _):
        compilations.append(graph)
        return graph.forward

    for block in model.blocks:
        block.attn = torch.compile(block.attn, backend=compiler)
    vit = open_vit(model, image_size=64)
    images = noise(vit)
    tap = vit.tap()
    clone = tap._clone
    assert_array_equal(tap.read(images).numpy(), eager(images).numpy())
    assert tap._clone is clone
    assert compilations == []
    report = check_vit(vit, quick=True)
    assert report.ok, report.text()
    assert "your compiled module gives them to" in report.finding("logits unchanged").sentence


_OPERATORS = torch.library.Library("vitrail_test", "DEF")
_OPERATORS.define("hidden_attention(Tensor q, Tensor k, Tensor v) -> Tensor")
_OPERATORS.impl(
    "hidden_attention",
    lambda q, k, v: (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v,
    "CompositeExplicitAutograd",
)


def _keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients_of_hidden(ctx, gradient):
    inputs = [each.detach().requires_grad_() for each in ctx.saved_tensors]
    with torch.enable_grad():
        q, k, v = inputs
        return torch.autograd.grad((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v, inputs, gradient)


torch.library.register_autograd("vitrail_test::hidden_attention", _gradients_of_hidden, setup_context=_keep_inputs)


class _HiddenAttention(nn.Module):
    """timm's attention with its kernel behind an operator that no mode of Python sees into."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = attention.qkv, attention.proj, attention.num_heads

    def forward(self, tokens, **_):
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(torch.ops.vitrail_test.hidden_attention(q, k, v).transpose(1, 2).flatten(2))


@torch.no_grad()
def test_a_block_whose_attention_is_hidden_keeps_its_number_and_is_named(fresh, noise):
    model = fresh(VIT)
    model.blocks[1].attn = _HiddenAttention(model.blocks[1].attn)
    vit = open_vit(model, image_size=64)
    assert [block.path for block in vit.anatomy.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert vit.n_heads == (3, 0, 3)
    assert any("blocks.1 (L1)" in note for note in vit.anatomy.notes)
    report = check_vit(vit)
    assert report.ok, report.text()
    assert "L1: attention is computed where it cannot be observed" in report.finding("maps on the grid").sentence
    images, layers = noise(vit), []
    vit.tap().read(images, Readers(attention=lambda attention: layers.append(attention.layer)))
    assert layers == [0, 2]
    cut = copy.deepcopy(model)
    cut.blocks[2].attn.proj.weight[:, :16] = 0
    assert_allclose(vit.tap().read(images, edits=[Edit(2, prune=(0,))]).numpy(), cut(images).numpy(), atol=1e-6)
    with pytest.raises(Unsupported, match=r"L1 \(blocks.1\) computes its attention in an operator"):
        vit.tap().read(images, edits=[Edit(1, prune=(0,))])


@torch.no_grad()
def test_heads_beside_a_layer_whose_attention_is_hidden_can_be_removed_and_its_own_are_refused(fresh, noise):
    model = fresh(VIT)
    model.blocks[1].attn = _HiddenAttention(model.blocks[1].attn)
    vit = open_vit(model, image_size=64)
    assert why_not_removable(vit) == ""
    cut = copy.deepcopy(model)
    cut.blocks[2].attn.proj.weight[:, :16] = 0
    smaller = remove_heads(vit, {(2, 0)}).module
    assert_allclose(smaller(noise(vit)).numpy(), cut(noise(vit)).numpy(), atol=1e-6)
    with pytest.raises(UsageError, match=r"L1H0 is not a head of this model.*the heads of L1 cannot be observed"):
        remove_heads(vit, {(1, 0)})


def test_a_study_keeps_the_number_of_a_layer_whose_attention_is_hidden(fresh, tmp_path):
    model = fresh(VIT)
    model.blocks[1].attn = _HiddenAttention(model.blocks[1].attn)
    pixels = torch.randint(0, 255, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "images").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(tmp_path / "images" / f"{index}.png")
    vit = open_vit(model, image_size=64)
    study = run_study(vit, tmp_path / "images", out=tmp_path / "study", measures=["head_divergence"])
    divergence = study["head_divergence"].values
    assert_array_equal(np.isfinite(divergence).all((0, 2)), [True, False, True])
    assert_array_equal(np.isnan(divergence[:, 1]), True)
    estimate = {"measures": ["head_loss_change"], "options": {"importance": "estimate"}}
    estimated = run_study(vit, tmp_path / "images", out=tmp_path / "estimate", **estimate)
    assert_array_equal(np.isfinite(estimated["head_loss_change"].values).all((0, 2)), [True, False, True])


class _RoundedByBatch(nn.Module):
    """Answers that move a little on large batches, as convolutions do whose kernels sum otherwise there."""

    def __init__(self, model: nn.Module, by: float) -> None:
        super().__init__()
        self.model, self.by = model, by

    def forward(self, images):
        logits = self.model(images)
        return logits * (1 + self.by * (len(logits) > 4))


def test_answers_that_move_with_the_batch_break_no_promise_and_it_is_said(fresh):
    finding = check_vit(open_vit(_RoundedByBatch(fresh(VIT), 3e-5), image_size=64)).finding("heads batched")
    assert finding.holds is True
    assert 2e-5 < finding.figure < 4e-5
    assert "your model's own answers differ by 3e-05 on a batch 3 times as large" in finding.sentence


def test_heads_that_mix_on_a_batch_are_broken_though_answers_move_with_the_batch(fresh, monkeypatch):
    vit = open_vit(_RoundedByBatch(fresh(VIT), 3e-5), image_size=64)
    correct = Tap.run_from

    def mixed(self, layer, replay, edits=(), copies=1, **options):
        logits = correct(self, layer, replay, edits, copies, **options)
        return logits.roll(1, 0) if copies > 1 else logits

    monkeypatch.setattr(Tap, "run_from", mixed)
    assert check_vit(vit).finding("heads batched").holds is False


def test_attention_that_is_not_understood_is_not_called_one_between_channels():
    model = PoolingVisionTransformer(
        img_size=64, patch_size=8, stride=4, base_dims=(12, 12, 12), depth=(1, 1, 1), heads=(2, 4, 4), num_classes=7
    )
    vit = open_vit(_spread(model), image_size=64)
    assert {block.kind for block in vit.anatomy.blocks} == {"unknown"}  # a stage of one block, given two tensors
    for name in ("rows sum to 1", "weights @ v"):
        sentence = check_vit(vit, quick=True).finding(name).sentence
        assert sentence == "L0-L2 attend in a way that is not understood, so there are no maps"
