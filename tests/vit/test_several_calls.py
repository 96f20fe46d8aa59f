"""Layers that make several attention calls: which heads they have, and what is measured and pruned of them.

Expected numbers come from plain PyTorch: weights set to zero in a deep copy, hooks, maps computed from q and k.
"""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from numpy.testing import assert_allclose
from timm.models.tnt import TNT
from torch import nn

from vitrail.contract.check import check_vit
from vitrail.errors import Unsupported
from vitrail.grid import distances
from vitrail.models.open import open_vit
from vitrail.models.token_grid import token_grids
from vitrail.one_image import measure_image
from vitrail.pruning.removal import remove_heads, why_not_removable
from vitrail.tap.attention import Readers
from vitrail.tap.edits import Edit
from vitrail.tokens.flow import read_steps

WIDTH, HEADS = 32, 4
HEAD = WIDTH // HEADS


def heads_apart(tokens, n=1):
    return tokens.unflatten(-1, (n, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens):
        out = F.scaled_dot_product_attention(*heads_apart(self.qkv(tokens), 3))
        return self.proj(out.transpose(1, 2).flatten(2))


class _Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), _Attention()

    def forward(self, tokens):
        return tokens + self.attn(self.norm(tokens))


class _Loop(nn.Module):
    """One attention, run three times."""

    def __init__(self):
        super().__init__()
        self.inner = _Plain()

    def forward(self, tokens):
        for _ in range(3):
            tokens = self.inner(tokens)
        return tokens


class _Sequence(nn.Module):
    """Two attentions, the second on what the first gave."""

    def __init__(self):
        super().__init__()
        self.one, self.two = _Plain(), _Plain()

    def forward(self, tokens):
        return self.two(self.one(tokens))


class _Difference(nn.Module):
    """A head is the difference of two maps of the same values, as in the Differential Transformer."""

    def __init__(self, fused):
        super().__init__()
        self.num_heads, self.fused = HEADS, fused
        self.qk, self.v, self.proj = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens):
        q1, q2, k1, k2 = heads_apart(self.qk(tokens), 4)
        (v,) = heads_apart(self.v(tokens))
        if self.fused:
            out = F.scaled_dot_product_attention(q1, k1, v) - 0.3 * F.scaled_dot_product_attention(q2, k2, v)
        else:
            scores = torch.stack([q1 @ k1.mT, q2 @ k2.mT], 2) * HEAD**-0.5
            weights = scores.softmax(-1)
            out = (weights[:, :, 0] - 0.3 * weights[:, :, 1]) @ v
        return tokens + self.proj(out.transpose(1, 2).flatten(2))


class _MapsFirst(nn.Module):
    """All maps are made before the first of them meets values; heads one by one, or two maps of all heads."""

    def __init__(self, *, by_head):
        super().__init__()
        self.num_heads, self.by_head = HEADS, by_head
        self.qkv, self.qk, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens):
        q, k, v = heads_apart(self.qkv(tokens), 3)
        if self.by_head:
            maps = [(q[:, head] @ k[:, head].mT * HEAD**-0.5).softmax(-1) for head in range(HEADS)]
            return tokens + self.proj(torch.cat([each @ v[:, head] for head, each in enumerate(maps)], -1))
        others = heads_apart(self.qk(tokens), 2)
        near, far = ((one @ two.mT * HEAD**-0.5).softmax(-1) for one, two in ((q, k), others))
        return tokens + self.proj((near @ v + far @ v.flip(-2)).transpose(1, 2).flatten(2))


class _HandedOn(nn.Module):
    """Blocks of which the second takes the map of the first."""

    def __init__(self, maps):
        super().__init__()
        self.num_heads, self.maps, self.first = HEADS, maps, not maps
        maps.append(None)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens):
        q, k, v = heads_apart(self.qkv(tokens), 3)
        if self.first:
            self.maps[0] = (q @ k.mT * HEAD**-0.5).softmax(-1)
        return tokens + self.proj((self.maps[0] @ v).transpose(1, 2).flatten(2))


class _Model(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, WIDTH, 16, 16), nn.Linear(WIDTH, 5)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, images):
        patches = self.patches(images).flatten(2).mT
        return self.head(self.blocks(torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1))[:, 0])


def model_of(*blocks):
    model = _Model(*blocks).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 1.5 * max(1, weight.shape[-1]) ** -0.5)
    return model


IMAGES = torch.randn((3, 3, 64, 64), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def without_columns(model, path, head, width=HEAD):
    """The logits of a copy whose projection takes nothing from a head."""
    cut = copy.deepcopy(model)
    cut.get_submodule(path).weight[:, head * width : (head + 1) * width] = 0
    return cut(IMAGES)


@torch.no_grad()
def pruned(vit, *edits):
    return vit.tap().read(IMAGES, edits=list(edits)).numpy()


@pytest.fixture(scope="module")
def parallel(fresh):
    model = fresh("timm ViT 18x2")
    return model, open_vit(model, image_size=64)


def test_heads_of_calls_beside_each_other_are_all_heads_of_the_layer(parallel):
    model, vit = parallel
    assert vit.n_heads == (6, 6, 6)
    assert [call.first_head for call in vit.anatomy.blocks[1].calls] == [0, 3]
    assert not any(call.follows or call.repeat for block in vit.anatomy.blocks for call in block.calls)
    assert "L0-L2: H0-H2 are those of attns.0.attn; H3-H5 are those of attns.1.attn." in vit.anatomy.notes
    expected = without_columns(model, "blocks.1.attns.1.attn.proj", 1, width=16)
    assert_allclose(pruned(vit, Edit(1, prune=(4,))), expected.numpy(), atol=1e-5)
    assert_allclose(pruned(vit, Edit(1, 1, prune=(1,))), expected.numpy(), atol=1e-5)


@torch.no_grad()
def test_every_measure_covers_the_heads_of_all_calls(parallel):
    model, vit = parallel
    names = ["head_probability", "attention_distance", "head_token_shift", "interaction_distance"]
    arrays = measure_image(vit, IMAGES, [*names, "pattern_rule", "head_region_probability"])[0]
    maps, tokens = {}, []

    def keep(number):
        def hook(module, args):
            q, k, _ = module.qkv(args[0]).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4).unbind(0)
            maps[number] = (q @ k.mT / 4).softmax(-1)

        return hook

    hooks = [each.attn.register_forward_pre_hook(keep(number)) for number, each in enumerate(model.blocks[1].attns)]
    hooks.append(model.blocks[1].ffns[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0])))
    label = model(IMAGES).argmax(-1)
    patches = torch.cat([maps[0], maps[1]], 1)[..., 1:, 1:]
    far = torch.as_tensor(distances((4, 4)), dtype=torch.float32)
    expected = (patches * far).sum((-1, -2)) / patches.sum((-1, -2))
    assert_allclose(arrays["attention_distance"][:, 1], expected.numpy(), rtol=1e-4)

    share = (patches / patches.sum(-1, keepdim=True)).mean(1)
    share.diagonal(dim1=1, dim2=2).zero_()
    share /= share.sum(-1, keepdim=True)
    assert_allclose(arrays["interaction_distance"][:, 1], (share * far).sum(-1).numpy(), rtol=1e-4)

    cut = copy.deepcopy(model)
    cut.blocks[1].attns[1].attn.proj.weight[:, 32:48] = 0
    probability = cut(IMAGES).softmax(-1).gather(1, label[:, None])[:, 0]
    for hook in hooks:
        hook.remove()
    assert_allclose(arrays["head_probability"][:, 1, 5], probability.numpy(), rtol=1e-4)
    shift = 1 - F.cosine_similarity(*tokens, dim=-1).mean(1)
    assert_allclose(arrays["head_token_shift"][:, 1, 5], shift.numpy(), rtol=1e-3, atol=1e-6)
    for name in ("pattern_rule", "head_region_probability"):
        assert np.isfinite(arrays[name][:, 1, :6]).all()


def test_attention_inside_patches_and_between_them_gives_heads_of_both():
    torch.manual_seed(0)
    widths = {"embed_dim": 384, "num_heads_outer": 6, "inner_dim": 24, "num_heads_inner": 4}
    model = timm.create_model("tnt_s_legacy_patch16_224", img_size=64, depth=2, num_classes=5, **widths).eval()
    for weight in model.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    vit, images = open_vit(model, image_size=64), torch.randn(2, 3, 64, 64)
    assert vit.n_heads == (10, 10)
    assert (vit.anatomy.blocks[1].grid, vit.anatomy.blocks[1].prefix) == ((4, 4), 1)
    report = check_vit(vit, quick=True)
    assert report.ok
    assert report.finding("maps on the grid").sentence == (
        "all 2 layers have maps that join patches; "
        "not those of L0-L1 H0-H3: which tokens are in a window could not be found"
    )
    arrays = measure_image(vit, images, ["head_probability", "attention_strength"])[0]
    label = model(images).argmax(-1)
    for head, projection, columns in ((1, "attn_in", slice(6, 12)), (5, "attn_out", slice(64, 128))):
        cut = copy.deepcopy(model)
        with torch.no_grad():
            cut.get_submodule(f"blocks.1.{projection}.proj").weight[:, columns] = 0
            probability = cut(images).softmax(-1).gather(1, label[:, None])[:, 0]
        assert_allclose(arrays["head_probability"][:, 1, head], probability.numpy(), rtol=1e-4, err_msg=projection)
    assert np.isfinite(arrays["attention_strength"][:, :, 4:]).all()  # those inside patches join no two patches
    assert np.isnan(arrays["attention_strength"][:, :, :4]).all()


def test_the_tokens_of_a_layer_are_those_of_the_image_where_it_also_returns_those_of_its_patches():
    model = TNT(img_size=64, embed_dim=24, inner_dim=12, depth=2, num_heads_inner=2, num_heads_outer=2, num_classes=5)
    vit = open_vit(model.eval(), image_size=64, mean=0.5, std=0.5)
    images = torch.randn((3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    returned, found = [], {}
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: returned.append(output))
    with torch.no_grad():
        model(images)
    vit.tap().read(images, Readers(output=found.__setitem__))
    for layer, (pixels, patches) in enumerate(returned[:2]):
        assert pixels.numel() > patches.numel()
        assert_allclose(found[layer].detach(), patches, atol=1e-6)


def test_heads_of_several_attention_modules_are_removed_each_from_its_own(parallel):
    model, vit = parallel
    assert why_not_removable(vit) == ""
    smaller = remove_heads(vit, {(1, 4)}).module
    assert smaller.blocks[1].attns[0].attn.num_heads == 3
    assert smaller.blocks[1].attns[1].attn.num_heads == 2
    with torch.no_grad():
        expected = without_columns(model, "blocks.1.attns.1.attn.proj", 1, width=16)
        assert_allclose(smaller(IMAGES).numpy(), expected.numpy(), atol=1e-5)


def test_a_head_that_runs_several_times_is_pruned_in_every_run():
    model = model_of(_Plain(), _Loop())
    vit = open_vit(model, image_size=64, n_classes=5)
    assert vit.n_heads == (HEADS, HEADS)
    assert [call.repeat for call in vit.anatomy.blocks[1].calls] == [0, 1, 2]
    assert any("which runs 3 times" in note for note in vit.anatomy.notes)
    expected = without_columns(model, "blocks.1.inner.attn.proj", 2).numpy()
    assert_allclose(pruned(vit, Edit(1, prune=(2,))), expected, rtol=1e-4, atol=1e-5)
    arrays = measure_image(vit, IMAGES, ["head_probability"])[0]
    label = arrays["label"]
    probability = torch.as_tensor(expected).softmax(-1).numpy()[np.arange(3), label]
    assert_allclose(arrays["head_probability"][:, 1, 2], probability, rtol=1e-4)
    report = check_vit(vit)
    assert report.ok, report.text()


def test_calls_that_follow_each_other_are_steps_one_after_the_other():
    vit = open_vit(model_of(_Sequence(), _Loop()), image_size=64, n_classes=5)
    assert vit.n_heads == (2 * HEADS, HEADS)
    assert [[call.follows for call in block.calls] for block in vit.anatomy.blocks] == [
        [False, True],
        [False, True, True],
    ]
    maps = []
    steps, _ = read_steps(vit.tap(), IMAGES)
    vit.tap().read(IMAGES, Readers(attention=lambda attention: maps.append(attention.weights().mean(1).detach())))
    one, two, *loop = [(each + torch.eye(17)) / 2 for each in maps]
    assert_allclose(steps[0].numpy(), (two @ one).numpy(), atol=1e-6)
    assert_allclose(steps[1].numpy(), (loop[2] @ loop[1] @ loop[0]).numpy(), atol=1e-6)


class _Decoder(nn.Module):
    """Seven queries of its own that attend to each other, then to the image, as a detection transformer's do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.patch = nn.Conv2d(3, WIDTH, 16, 16)
        self.position = nn.Parameter(torch.randn(1, 16, WIDTH) / 4)
        self.encoder = nn.ModuleList([_Plain(), _Plain()])
        self.queries = nn.Parameter(torch.randn(1, 7, WIDTH))
        self.decoder = nn.ModuleList([_DecoderBlock(), _DecoderBlock()])

    def forward(self, images):
        memory = self.patch(images).flatten(2).transpose(1, 2) + self.position
        for block in self.encoder:
            memory = block(memory)
        tokens = self.queries.expand(len(images), -1, -1)
        for block in self.decoder:
            tokens = block(tokens, memory)
        return tokens.flatten(1)


class _DecoderBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.cross = (nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(2))

    def forward(self, tokens, memory):
        tokens = tokens + self.own(tokens, tokens, tokens, need_weights=False)[0]
        return tokens + self.cross(tokens, memory, memory, need_weights=False)[0]


def test_both_calls_of_a_decoder_block_are_read_and_pruned_and_its_maps_are_on_no_grid():
    model = _Decoder().eval()
    vit = open_vit(model, image_size=64, n_classes=0)
    assert vit.n_heads == (HEADS, HEADS, 2 * HEADS, 2 * HEADS)
    assert any("H4-H7 are those of cross" in note for note in vit.anatomy.notes)
    maps, inputs = {}, {}

    def read(attention):
        maps[attention.layer, attention.call] = attention.weights().detach()

    vit.tap().read(IMAGES, Readers(attention=read))
    cross = model.decoder[1].cross
    handle = cross.register_forward_pre_hook(lambda _, args: inputs.update(query=args[0], key=args[1]))
    model(IMAGES)
    handle.remove()
    weight, bias = (each.unflatten(0, (3, WIDTH)) for each in (cross.in_proj_weight, cross.in_proj_bias))
    q, k = (
        F.linear(inputs[name], weight[at], bias[at]).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
        for at, name in enumerate(("query", "key"))
    )
    assert maps[3, 1].shape == (len(IMAGES), HEADS, 7, 16)
    assert_allclose(maps[3, 1].numpy(), (q @ k.mT / HEAD**0.5).softmax(-1).detach().numpy(), atol=1e-6)
    for head, path in ((1, "decoder.1.own.out_proj"), (HEADS + 2, "decoder.1.cross.out_proj")):
        expected = without_columns(model, path, head % HEADS).numpy()
        assert_allclose(pruned(vit, Edit(3, prune=(head,))), expected, rtol=1e-4, atol=1e-5)
    refused = token_grids(vit)[1]
    assert set(token_grids(vit)[0]) == {(0, 0), (1, 0)}
    assert "'pooled'" in refused[3, 1]
    assert (3, 0) in refused


@pytest.mark.parametrize("fused", [True, False])
def test_a_head_that_is_a_difference_of_two_maps_is_one_head(fused):
    model = model_of(_Plain(), _Difference(fused))
    vit = open_vit(model, image_size=64, n_classes=5)
    assert vit.n_heads == (HEADS, HEADS)
    assert [call.repeat for call in vit.anatomy.blocks[1].calls] == ([0, 1] if fused else [0])
    expected = without_columns(model, "blocks.1.proj", 3).numpy()
    assert_allclose(pruned(vit, Edit(1, prune=(3,))), expected, rtol=1e-4, atol=1e-5)
    report = check_vit(vit)
    assert report.ok, report.text()


@pytest.mark.parametrize("by_head", [True, False])
def test_maps_that_are_all_made_before_their_products_are_all_read_and_edited(by_head):
    model = model_of(_MapsFirst(by_head=by_head), _MapsFirst(by_head=by_head))
    vit = open_vit(model, image_size=64, weights="random", task="classes")
    assert vit.n_heads == (HEADS, HEADS)
    assert [len(block.calls) for block in vit.anatomy.blocks] == [HEADS if by_head else 2] * 2
    for layer in (0, 1):
        for head in range(HEADS):
            expected = without_columns(model, f"blocks.{layer}.proj", head).numpy()
            assert_allclose(pruned(vit, Edit(layer, prune=(head,))), expected, atol=1e-5)
    maps = []
    reader = Readers(attention=lambda attention: maps.append((attention.layer, attention.call, attention.weights())))
    vit.tap().read(IMAGES, reader, [Edit(0, call=1, drop_keys=(3,))])
    assert [(layer, call) for layer, call, weights in maps if not weights[..., 3].any()] == [(0, 1)]


def test_a_map_that_another_block_has_made_is_not_that_blocks_own():
    maps = []
    vit = open_vit(model_of(_HandedOn(maps), _HandedOn(maps)), image_size=64, weights="random", task="classes")
    assert vit.n_heads == (HEADS, 0)
    assert any("blocks.1 (L1)" in note for note in vit.anatomy.notes)
    read = []
    vit.tap().read(IMAGES, Readers(attention=lambda attention: read.append(attention.layer)))
    assert read == [0]


class _OneSoftmax(nn.Module):
    """One softmax of all heads, and a product for each."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj = HEADS, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens):
        q, k, v = heads_apart(self.qkv(tokens), 3)
        weights = (q @ k.mT * HEAD**-0.5).softmax(-1)
        return tokens + self.proj(torch.cat([weights[:, head] @ v[:, head] for head in range(HEADS)], -1))


def test_a_softmax_of_several_calls_takes_no_bias_of_one_of_them():
    model = model_of(_OneSoftmax(), _OneSoftmax())
    vit = open_vit(model, image_size=64, weights="random", task="classes")
    assert vit.n_heads == (HEADS, HEADS)
    expected = without_columns(model, "blocks.1.proj", 2).numpy()
    assert_allclose(pruned(vit, Edit(1, prune=(2,))), expected, atol=1e-5)
    with pytest.raises(Unsupported, match="L0 uses one softmax for several attention calls"):
        vit.tap().read(IMAGES, edits=[Edit(0, drop_keys=(3,))])


class _SideProduct(nn.Module):
    """A map that is also multiplied with something that the model keeps, or with values of a second stream.

    `gain` is what the second stream enters with.
    """

    def __init__(self, what, *, first=False, gain=0.0):
        super().__init__()
        self.num_heads, self.what, self.first = HEADS, what, first
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.other, self.gain = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.full((1,), gain))

    def forward(self, tokens):
        q, k, v = heads_apart(self.qkv(tokens), 3)
        weights = (q @ k.mT * HEAD**-0.5).softmax(-1)
        if self.first:
            self.kept = self.side(weights, v, tokens)
        out = weights @ v
        if not self.first:
            self.kept = self.side(weights, v, tokens)
        out = self.proj(out.transpose(1, 2).flatten(2))
        if self.what == "stream":
            out = out + self.gain * self.kept.transpose(1, 2).flatten(2)
        return tokens + out

    def side(self, weights, v, tokens):
        if self.what == "norms":
            return weights @ v.norm(dim=-1, keepdim=True)
        if self.what == "places":
            places = torch.stack([torch.arange(v.shape[-2]).float()] * 2, -1)
            return weights @ places.expand(*v.shape[:-1], 2)
        if self.what == "values":
            return torch.einsum("bhqk,bhkd->bhqd", weights, v)
        if self.what == "received":
            return weights.mT @ v
        (values,) = heads_apart(self.other(tokens))
        return weights @ values


@pytest.mark.parametrize(("what", "first"), [("norms", False), ("places", True), ("values", False), ("received", True)])
def test_a_product_with_a_map_that_nothing_of_the_answer_moves_with_is_no_attention_call(what, first):
    model = model_of(_SideProduct(what, first=first), _SideProduct(what, first=first))
    vit = open_vit(model, image_size=64, weights="random", task="classes")
    assert vit.n_heads == (HEADS, HEADS)
    assert [len(block.calls) for block in vit.anatomy.blocks] == [1, 1]
    assert vit.anatomy.blocks[0].side_products == ((0,) if first else (1,))
    assert not any("those of" in note for note in vit.anatomy.notes)
    shapes = []
    reader = Readers(attention=lambda attention: shapes.append(tuple(attention.out.shape)))
    vit.tap().read(IMAGES, reader)
    assert shapes == [(len(IMAGES), 1, HEADS, 17, HEAD)] * 2
    for layer, head in ((0, 1), (1, 3)):
        expected = without_columns(model, f"blocks.{layer}.proj", head).numpy()
        assert_allclose(pruned(vit, Edit(layer, prune=(head,))), expected, atol=1e-5)
    weights = []
    reader = Readers(attention=lambda attention: weights.append(attention.weights().detach()))
    vit.tap().read(IMAGES, reader, [Edit(1, drop_keys=(3,))])
    assert [bool(each[..., 3].any()) for each in weights] == [True, False]
    report = check_vit(vit, quick=True)
    assert report.ok, report.text()


@pytest.mark.parametrize("gain", [1.0, 0.0])
def test_a_second_stream_of_values_has_heads_of_its_own_also_where_it_enters_with_a_weight_of_zero(gain):
    model = model_of(_SideProduct("stream"), _SideProduct("stream"))
    for block in model.blocks:
        nn.init.constant_(block.gain, gain)
    vit = open_vit(model, image_size=64, weights="random", task="classes")
    assert vit.n_heads == (2 * HEADS, 2 * HEADS)
    assert not any(block.side_products for block in vit.anatomy.blocks)
    cut = copy.deepcopy(model)
    with torch.no_grad():
        cut.blocks[1].other.weight[HEAD : 2 * HEAD] = 0
        cut.blocks[1].other.bias[HEAD : 2 * HEAD] = 0
        expected = cut(IMAGES).numpy()
    assert_allclose(pruned(vit, Edit(1, prune=(HEADS + 1,))), expected, atol=1e-5)


class _FirstMap(nn.Module):
    """Blocks with attention of their own that also take the map of the first, which is kept on the model."""

    def __init__(self, maps):
        super().__init__()
        self.num_heads, self.maps, self.first = HEADS, maps, not maps
        maps.append(None)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens):
        q, k, v = heads_apart(self.qkv(tokens), 3)
        weights = (q @ k.mT * HEAD**-0.5).softmax(-1)
        out = weights @ v
        if self.first:
            self.maps[0] = weights
        else:
            out = out + self.maps[0] @ v
        return tokens + self.proj(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_runs_from_a_block_have_the_map_that_the_first_block_keeps():
    maps = []
    vit = open_vit(model_of(*(_FirstMap(maps) for _ in range(3))), image_size=64, weights="random", task="classes")
    assert vit.n_heads == (HEADS,) * 3
    tap = vit.tap()
    replay, logits = tap.record(IMAGES)
    expected = pruned(vit, Edit(2, prune=(0,)))
    for _ in range(2):
        tap.read(IMAGES.flip(0))
        assert_allclose(tap.run_from(2, replay, [Edit(2, prune=(0,))]).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert_allclose(tap.run_from(1, replay).numpy(), logits.numpy(), rtol=1e-4, atol=1e-5)
    report = check_vit(vit, quick=True)
    assert report.ok, report.text()


def test_a_module_that_is_several_layers_is_pruned_in_the_layer_that_is_named():
    block = _Plain()
    model = model_of(_Plain(), block, block)
    vit = open_vit(model, image_size=64, n_classes=5)
    assert [(each.path, each.run) for each in vit.anatomy.blocks] == [("blocks.0", 0), ("blocks.1", 0), ("blocks.1", 1)]
    runs = []

    def zero_in_second_run(_, args):
        runs.append(args[0])
        if len(runs) == 2:
            closed = args[0].clone()
            closed[..., :HEAD] = 0
            return (closed,)
        return None

    cut = copy.deepcopy(model)
    cut.blocks[1].attn.proj.register_forward_pre_hook(zero_in_second_run)
    with torch.no_grad():
        expected = cut(IMAGES).numpy()
    assert_allclose(pruned(vit, Edit(2, prune=(0,))), expected, rtol=1e-4, atol=1e-5)
    replay, plain = vit.tap().record(IMAGES)
    assert_allclose(vit.tap().run_from(2, replay, [Edit(2, prune=(0,))]).numpy(), expected, rtol=1e-4, atol=1e-5)
    every_token = Readers(output=lambda layer, tokens: None)
    assert torch.equal(vit.tap().run_from(2, replay, readers=every_token), plain)
    assert check_vit(vit).ok
    assert "the same module serves L2" in why_not_removable(vit)


def test_interleaved_heads_are_masked_and_not_removed(opened, noise):
    vit = opened("timm NesT")
    with pytest.raises(Unsupported, match="counts on all"):
        remove_heads(vit, {(0, 1)})
    assert check_vit(vit, quick=True).ok
