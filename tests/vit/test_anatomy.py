"""What tracing finds: blocks, kinds, grids, prefix tokens, and when it says that it cannot tell."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import nn
from torch.nn.attention import flex_attention
from transformers import SegformerConfig, SegformerForImageClassification

from vitrail.contract.check import check_vit, describe
from vitrail.contract.tiny_models.from_timm import shallow
from vitrail.errors import NoAttention, Unsupported
from vitrail.models.open import open_vit
from vitrail.tap import intercept
from vitrail.tap.anatomy import discover
from vitrail.tap.attention import Readers
from vitrail.tap.edits import Edit
from vitrail.tap.maps import MapSource


def _shape(anatomy):
    return list(dict.fromkeys((block.kind, block.prefix, block.grid) for block in anatomy.blocks))


@pytest.mark.parametrize(
    ("size", "width", "heads", "tokens"),
    [
        (128, 64, 4, 16),  # as many tokens as channels in a head
        (32, 8, 2, 1),  # one token, and as many channels in a head as the stage is given tokens
        (32, 4, 1, 1),
    ],
)
def test_tokens_whose_number_agrees_with_that_of_channels_are_no_channels(size, width, heads, tokens):
    torch.manual_seed(0)
    configuration = SegformerConfig(
        hidden_sizes=[16, 16, 16, width], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, heads], num_labels=5
    )
    model = SegformerForImageClassification(configuration).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    vit = open_vit(model, image_size=size, mean=0.5, std=0.5)
    call = vit.anatomy.blocks[-1].calls[0]
    assert (call.kind, call.queries, call.keys, call.head_dim) == ("token", tokens, tokens, width // heads)
    maps = {}
    vit.tap().read(
        torch.randn(2, 3, size, size), Readers(attention=lambda each: maps.update({each.layer: each.weights()}))
    )
    assert maps[3].shape == (2, heads, tokens, tokens)


def test_a_class_token_beside_patches_that_are_pooled_on_the_way_is_no_patch():
    torch.manual_seed(0)
    configuration = MultiScaleVitCfg(depths=(1, 2, 1, 1), embed_dim=16, use_cls_token=True)
    vit = open_vit(MultiScaleVit(configuration, img_size=64, num_classes=7).eval(), image_size=64)
    assert [(block.tokens, block.prefix, block.grid) for block in vit.anatomy.blocks] == [
        (257, 1, (16, 16)),
        (257, 1, (16, 16)),
        (65, 1, (8, 8)),
        (65, 1, (8, 8)),
        (17, 1, (4, 4)),
    ]
    finding = check_vit(vit, quick=True).finding("maps on the grid")
    assert (
        "L1: attention is between another number of tokens than the layer is given" in finding.sentence
    )  # to 65 tokens


@pytest.mark.parametrize(
    ("name", "expected", "heads"),
    [
        ("timm ViT", [("token", 1, (4, 4))], (3, 3, 3)),
        ("timm ViT, 48 x 80 px", [("token", 1, (3, 5))], (3, 3, 3)),
        ("timm DeiT distilled", [("token", 2, (4, 4))], (3, 3, 3)),
        ("timm DINOv2 with registers", [("token", 5, (4, 4))], (3, 3, 3)),
        ("timm DINOv3, 48 x 80 px", [("token", 5, (3, 5))], (3, 3, 3)),
        ("timm SigLIP", [("token", 0, (4, 4))], (3, 3, 3)),
        ("timm NaFlexViT", [("token", 4, (4, 4))], (3, 3, 3)),
        ("timm CaiT", [("token", 0, (4, 4)), ("class", 0, (4, 4))], (3,) * 5),
        ("timm Swin", [("window", 0, (28, 28)), ("window", 0, (14, 14))], (2, 2, 4, 4)),
        ("timm SAM", [("token", 0, (14, 14))], (3, 3, 3)),
        ("timm XCiT", [("channel", 0, (6, 6)), ("class", 1, (6, 6))], (4,) * 5),
        ("timm ConViT", [("token", 0, (4, 4)), ("token", 1, (4, 4))], (4, 4, 4)),
        ("timm Hiera", None, (1, 2, 4, 4, 8)),
        ("transformers DeiT distilled", [("token", 2, (4, 4))], (3, 3, 3)),
        ("transformers ViT-MAE", [("token", 1, (4, 4))], (3, 3, 3)),
        ("torchvision swin_t", [("window", 0, (14, 14)), ("token", 0, (7, 7))], (2, 2, 4, 4)),
        ("own module, list of pairs", [("token", 0, (4, 4))], (3, 3, 3)),
    ],
)
def test_kinds_prefix_and_grid_of_each_layer(name, expected, heads, opened):
    vit = opened(name)
    assert vit.n_heads == heads
    if expected is not None:
        assert _shape(vit.anatomy) == expected


def test_a_parallel_block_makes_two_calls_and_a_pooling_head_stays_outside(opened):
    assert [len(block.calls) for block in opened("timm ViT 18x2").anatomy.blocks] == [2, 2, 2]
    assert opened("timm SigLIP").anatomy.pools == ("attn_pool",)
    assert "outside the blocks: attention in attn_pool" in describe(opened("timm SigLIP").anatomy)


def test_the_class_token_is_where_the_layer_has_it(opened):
    assert opened("timm ViT").anatomy.class_index(0) == 0
    assert opened("timm SigLIP").anatomy.class_index(0) is None
    cait = opened("timm CaiT").anatomy
    assert cait.class_index(0) is None
    assert cait.class_index(3) == 0
    crossvit = opened("timm CrossViT").anatomy  # two branches, each with a token of its own: cls_token_0, cls_token_1
    assert [crossvit.class_index(layer) for layer in range(10)] == [0] * 10


class _ReadsTokens(nn.Module):
    """A ViT whose first token has a name that says nothing; `read` says which tokens the answer is made of."""

    def __init__(self, read):
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, 24, 8, 8), nn.Parameter(torch.randn(1, 1, 24))
        self.position = nn.Parameter(torch.randn(1, 17, 24))
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(24, 3, 48, 0.0, batch_first=True) for _ in range(2)))
        self.norm, self.head, self.read = nn.LayerNorm(24), nn.Linear(24, 5), read

    def forward(self, images):
        tokens = torch.cat([self.first.expand(len(images), 1, 24), self.patches(images).flatten(2).mT], 1)
        return self.head(self.read(self.norm(self.blocks(tokens + self.position))))


@pytest.mark.parametrize(
    ("read", "has_class_token"),
    [
        (lambda tokens: tokens[:, 0], True),
        (lambda tokens: tokens[:, 1:].mean(1), False),  # the first token is a register
        (lambda tokens: tokens.mean(1), False),
        (lambda tokens: tokens[:, 0] * 0, False),  # an answer that reads nothing
        (lambda tokens: tokens[:, 5], False),
    ],
)
def test_a_token_that_the_answer_is_read_from_alone_is_the_class_token_whatever_its_name(read, has_class_token):
    torch.manual_seed(0)
    anatomy = discover(_ReadsTokens(read).eval(), torch.randn(3, 3, 32, 32))
    assert [block.prefix for block in anatomy.blocks] == [1, 1]
    assert anatomy.class_token is has_class_token


def test_tokens_that_lie_in_another_order_than_the_image_have_no_grid(opened):
    anatomy = opened("timm Hiera").anatomy
    assert {block.grid for block in anatomy.blocks} == {None}
    assert any("not lie in raster order" in note for note in anatomy.notes)


class _Overlapping(nn.Module):
    """A ViT whose patches come from overlapping kernels, so that a corner of the image moves several tokens."""

    def __init__(self, arrange):
        super().__init__()
        strides = ((3, 12, 4), (12, 24, 2), (24, 24, 2))
        self.stem = nn.Sequential(*(nn.Conv2d(one, two, 5, step, 2) for one, two, step in strides))
        self.others, self.arrange = nn.Parameter(torch.randn(1, 3, 24)), arrange
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(24, 3, 48, 0.0, batch_first=True) for _ in range(2)))
        self.head = nn.Linear(24, 5)

    def forward(self, images):
        patches = self.stem(images).flatten(2).mT
        return self.head(self.blocks(self.arrange(patches, self.others.expand(len(images), -1, -1))).mean(1))


_BY_WINDOWS = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).flatten()
"""The patches of a 4 x 4 grid, window by window."""


@pytest.mark.parametrize(
    ("arrange", "expected"),
    [
        (lambda patches, others: torch.cat([others, patches], 1), [(3, 0, (4, 4))] * 2),
        (lambda patches, others: torch.cat([patches, others], 1), [(3, 3, (4, 4))] * 2),
        (lambda patches, others: patches[:, _BY_WINDOWS], [(0, 0, None)] * 2),
        (lambda patches, others: torch.cat([others[:, :1], patches[:, _BY_WINDOWS]], 1), [(0, 0, None)] * 2),
        (lambda patches, others: others.repeat(1, 6, 1) + 0 * patches[:, :1], [(0, 0, None)] * 2),  # latents
    ],
)
def test_patches_of_overlapping_kernels_lie_where_the_corners_say(arrange, expected):
    torch.manual_seed(2)
    anatomy = discover(_Overlapping(arrange).eval(), torch.randn(3, 3, 64, 64))
    assert [(block.prefix, block.behind, block.grid) for block in anatomy.blocks] == expected
    assert bool(anatomy.notes) is (expected[0][2] is None)


@pytest.mark.parametrize("name", ["transformers ViT-MAE, mask_ratio 0", "transformers ViT-MAE, mask_ratio 0.75"])
def test_tokens_drawn_or_shuffled_at_random_have_no_grid(name, opened):
    anatomy = opened(name).anatomy
    assert anatomy.grid is None
    assert len(anatomy.notes) == 1


@torch.no_grad()
def test_as_many_tokens_as_channels_in_a_head_is_still_attention_between_tokens():
    """16 patches, heads of 16 channels: shapes alone cannot tell."""
    model = shallow("vit_base_patch16_siglip_gap_224")
    vit = open_vit(model.eval(), image_size=64)
    block = vit.anatomy.blocks[0]
    assert block.tokens == block.calls[0].head_dim == 16
    assert {b.kind for b in vit.anatomy.blocks} == {"token"}


def test_as_many_tokens_as_channels_are_told_apart_where_layers_before_have_mixed_them():
    """16 tokens, heads of 16 channels: in the last stage of a hierarchy, and where attention is between channels."""
    transformers = pytest.importorskip("transformers")
    stages = {"hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 3, 4], "depths": [1] * 4}
    for seed in range(3):
        torch.manual_seed(seed)
        config = transformers.SegformerConfig(**stages, num_labels=5)
        last = open_vit(transformers.SegformerForImageClassification(config).eval(), image_size=128).anatomy.blocks[-1]
        assert (last.calls[0].queries, last.calls[0].head_dim, last.kind) == (16, 16, "token")
        between_channels = shallow("xcit_nano_12_p16_224")
        first = open_vit(between_channels.eval(), image_size=64).anatomy.blocks[0]
        assert (first.tokens, first.calls[0].head_dim, first.kind) == (16, 16, "channel")


@torch.no_grad()
def test_as_many_windows_as_heads_are_told_apart(opened):
    """The second stage of this Twins has 4 windows and 4 heads, both as dimensions of the same tensor."""
    anatomy = opened("timm Twins-SVT").anatomy
    call = anatomy.blocks[2].calls[0]
    assert (call.windows, call.heads) == (4, 4)
    assert call.layout.axis == 2


@torch.no_grad()
def test_rows_of_a_map_are_the_patches_that_the_grid_says(opened, noise):
    """Changing the pixels of patch (row 1, column 3) changes v of the first layer at token 1 + 1*5 + 3 only."""
    vit = opened("timm ViT, 48 x 80 px")
    images = noise(vit, 1).repeat(2, 1, 1, 1)
    images[1, :, 16:32, 48:64] += 1
    moved = []

    def read(attention):
        if attention.layer == 0:
            moved.extend((attention.v[1] - attention.v[0]).abs().amax((0, 1, 3)).nonzero().flatten().tolist())

    vit.tap().read(images, Readers(attention=read))
    assert moved == [1 + 1 * 5 + 3]


class _Folded(nn.Module):
    """Heads folded into the batch, and no attribute that says how many."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 16, 16)
        self.qkv = nn.Linear(32, 96)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).flatten(1, 2)
        out = (q @ k.mT).softmax(-1) @ v
        return out.unflatten(0, (-1, 4)).transpose(1, 2).flatten(2).mean(1)


class _Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images)


def test_folded_heads_without_a_count_are_refused_and_one_attribute_helps():
    images = torch.randn((3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    model = _Around(_Folded()).eval()
    with pytest.raises(Unsupported, match="no attribute that says how many heads"):
        discover(model, images)
    model.inner.num_heads = 4
    assert [block.heads for block in discover(model, images).blocks] == [4]


class _ByHand(nn.Module):
    """Attention of two heads that ends in a product of the caller's; keeps its map."""

    def __init__(self, product, n_heads):
        super().__init__()
        self.product, self.num_heads = product, n_heads
        self.proj = nn.Linear(32, 32)

    def forward(self, tokens):
        heads = tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        self.map, out = self.product(heads)  # [image, head, query, key], [image, query, head, channel]
        return tokens + self.proj(out.flatten(2))


class _ModelByHand(nn.Module):
    def __init__(self, product, n_heads=2):
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, 32, 16, 16), nn.ModuleList([_ByHand(product, n_heads)])
        self.requires_grad_(False).eval()

    def forward(self, images):
        return self.blocks[0](self.patches(images).flatten(2).mT).mean(1)


def _map_of(tokens):
    return (tokens @ tokens.mT / 4).softmax(-1)


def _einsum(equation, *, first="map", shared=False):
    """As TransformerLens, einops and lucidrains write it; [image, query, head, channel] whatever the equation gives."""

    def product(tokens):
        inputs, _, output = equation.partition("->")
        axes = inputs.split(",")[first == "map"]
        values = tokens[:, 0] if shared else tokens
        order = [("bkd" if shared else "bhkd").index(axis) for axis in axes]
        weights = _map_of(tokens)
        pair = (weights, values.permute(order)) if first == "map" else (values.permute(order), weights)
        out = torch.einsum(equation, *pair)
        return weights, out.permute(["bqhd".index(axis) for axis in output]) if output != "bqhd" else out

    return product


@torch.no_grad()
def _logits_and_map(model, images):
    return model(images), model.blocks[0].map


@pytest.mark.parametrize(
    ("equation", "first", "shared"),
    [
        ("bhqk,bhkd->bqhd", "map", False),
        ("bkhd,bhqk->bqhd", "values", False),
        ("bhqk,bkd->bqhd", "map", True),
    ],
)
def test_attention_written_as_an_einsum_is_read_and_edited(equation, first, shared):
    images = torch.randn((3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    model = _ModelByHand(_einsum(equation, first=first, shared=shared))
    vit = open_vit(model, image_size=64, weights="random")
    maps, outputs = [], []
    reader = Readers(attention=lambda each: (maps.append(each.weights()), outputs.append(each.out)))
    logits, weights = _logits_and_map(model, images)
    torch.testing.assert_close(vit.tap().read(images, reader), logits)
    torch.testing.assert_close(maps[0], weights)
    assert outputs[0].shape == (3, 1, 2, 16, 16)  # image, window, head, query, channel
    without = vit.tap().read(images, edits=[Edit(0, prune=(1,))])
    with torch.no_grad():
        model.blocks[0].proj.weight[:, 16:] = 0
        torch.testing.assert_close(without, model(images))


def _sdpa_by_name(tokens):
    out = F.scaled_dot_product_attention(query=tokens, key=tokens, value=tokens)
    return _map_of(tokens), out.transpose(1, 2)


def _matmul_by_name(tokens):
    weights = _map_of(tokens)
    return weights, torch.matmul(other=tokens, input=weights).transpose(1, 2)


@pytest.mark.parametrize("product", [_sdpa_by_name, _matmul_by_name])
def test_attention_whose_operands_are_given_by_name_is_read_and_edited(product):
    images = torch.randn((3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    model = _ModelByHand(product)
    vit = open_vit(model, image_size=64, weights="random")
    maps = []
    logits, weights = _logits_and_map(model, images)
    read = vit.tap().read(images, Readers(attention=lambda each: maps.append(each.weights())))
    torch.testing.assert_close(read, logits, rtol=0, atol=0)
    torch.testing.assert_close(maps[0], weights)
    without = vit.tap().read(images, edits=[Edit(0, prune=(1,))])
    with torch.no_grad():
        model.blocks[0].proj.weight[:, 16:] = 0
        torch.testing.assert_close(without, model(images))


def test_flex_attention_is_read_and_edited_with_its_score_function(monkeypatch):
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # no compiler in a test

    def product(tokens):
        heads = tokens.contiguous()
        out = flex_attention.flex_attention(heads, heads, heads, score_mod=lambda s, b, h, q, k: s - (q - k).abs())
        places = torch.arange(heads.shape[2])
        return (heads @ heads.mT / 4 - (places[:, None] - places).abs()).softmax(-1), out.transpose(1, 2)

    images = torch.randn((3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    model = _ModelByHand(product)
    vit = open_vit(model, image_size=64, weights="random")
    maps = []
    logits, weights = _logits_and_map(model, images)

    def keep(attention):
        chunks = attention.weights_in_chunks(max_bytes=1)
        parts = [part.clone() for part in MapSource().parts(attention)]
        maps.extend([attention.weights(), torch.cat([part for _, part in chunks]), torch.cat(parts)])

    read = vit.tap().read(images, Readers(attention=keep))
    torch.testing.assert_close(read, logits, rtol=0, atol=0)
    for each in maps:
        torch.testing.assert_close(each, weights)
    without = vit.tap().read(images, edits=[Edit(0, prune=(1,))])
    with torch.no_grad():
        model.blocks[0].proj.weight[:, 16:] = 0
        torch.testing.assert_close(without, model(images))


def _mixed_by_einsum(tokens):
    mixing = torch.tensor([[1.0, -0.5], [0.25, 2.0]])
    weights = torch.einsum("b h i j, h g -> b g i j", _map_of(tokens), mixing)
    return weights, (weights @ tokens).transpose(1, 2)


def test_heads_mixed_by_an_einsum_after_the_softmax_are_still_maps():
    images = torch.randn((3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    model = _ModelByHand(_mixed_by_einsum)
    vit = open_vit(model, image_size=64, weights="random")
    maps = []
    logits, weights = _logits_and_map(model, images)
    read = vit.tap().read(images, Readers(attention=lambda each: maps.append(each.weights())))
    torch.testing.assert_close(read, logits, rtol=0, atol=0)
    torch.testing.assert_close(maps[0], weights)
    assert not vit.anatomy.blocks[0].calls[0].row_stochastic


def _heads_first(tokens):
    """[head, image, ..], as where a stack of heads is taken apart along the channels first."""
    heads = tokens.transpose(0, 1)
    weights = _map_of(heads)
    return weights.transpose(0, 1), (weights @ heads).permute(1, 2, 0, 3)


def _heads_folded_first(tokens):
    """[head * image, ..], as the Set Transformer has them: `torch.cat(q.split(channels, 2), 0)`."""
    heads = tokens.transpose(0, 1).flatten(0, 1)
    weights = _map_of(heads)
    parts = [each.unflatten(0, (2, -1)) for each in (weights, torch.bmm(weights, heads))]
    return parts[0].transpose(0, 1), parts[1].permute(1, 2, 0, 3)


@pytest.mark.parametrize("product", [_heads_first, _heads_folded_first])
def test_heads_in_front_of_the_images_are_those_of_each_image(product):
    images = torch.randn((3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    model = _ModelByHand(product)
    vit = open_vit(model, image_size=64, weights="random", task="classes")
    maps = []
    logits, weights = _logits_and_map(model, images)
    read = vit.tap().read(images, Readers(attention=lambda each: maps.append(each.weights())))
    torch.testing.assert_close(read, logits, rtol=0, atol=0)
    torch.testing.assert_close(maps[0], weights)
    without = vit.tap().run_from(0, vit.tap().record(images)[0], [Edit(0, copy=1, prune=(1,))], copies=2)
    with torch.no_grad():
        model.blocks[0].proj.weight[:, 16:] = 0
        torch.testing.assert_close(without, torch.cat([logits, model(images)]))


def _windows_in_front(tokens):
    """Four windows in front of the images, in one dimension with them."""
    windows = tokens.unflatten(2, (4, 4)).permute(2, 0, 1, 3, 4).flatten(0, 1)
    weights = _map_of(windows)
    return weights, (weights @ windows).unflatten(0, (4, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)


def test_windows_in_front_of_the_images_are_refused():
    images = torch.randn((3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    with pytest.raises(Unsupported, match="it is not known which are whose"):
        discover(_ModelByHand(_windows_in_front), images)


def test_positions_added_to_the_values_are_refused():
    """Relative positions of Shaw et al.: each pair of a query and a key has values of its own."""
    images = torch.randn((3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    positions = torch.randn((16, 16, 16), generator=torch.Generator().manual_seed(1))

    def product(tokens):
        weights = _map_of(tokens)
        return weights, (weights @ tokens + torch.einsum("bhij,ijd->bhid", weights, positions)).transpose(1, 2)

    with pytest.raises(Unsupported, match="values of their own for each pair of a query and a key"):
        discover(_ModelByHand(product), images)


def test_an_einsum_that_sums_another_axis_than_the_softmax_is_refused():
    images = torch.randn((3, 3, 64, 64), generator=torch.Generator().manual_seed(0))

    def product(tokens):
        weights = _map_of(tokens)
        return weights, torch.einsum("bhkq,bhkd->bhqd", weights, tokens).transpose(1, 2)

    with pytest.raises(Unsupported, match="einsum"):
        discover(_ModelByHand(product), images)


def _grouped(tokens):
    """Two groups of two heads, each group with one set of keys and values, heads on an axis of their own."""
    q, kv = tokens.unflatten(1, (2, 2)), tokens[:, ::2, None]
    weights = (q @ kv.mT / 4).softmax(-1)
    return weights.flatten(1, 2), (weights @ kv).flatten(1, 2).transpose(1, 2)


def _multi_query(tokens):
    weights = (tokens @ tokens[:, :1].mT / 4).softmax(-1)
    return weights, (weights @ tokens[:, :1]).transpose(1, 2)


def _multi_query_fused(tokens):
    """The kernel broadcasts one set of keys and values to all heads."""
    kv = tokens[:, :1]
    weights = (tokens @ kv.mT / 4).softmax(-1)
    return weights, F.scaled_dot_product_attention(tokens, kv, kv, scale=1 / 4).transpose(1, 2)


def _learned_queries_fused(tokens):
    """One set of queries for all images."""
    q = torch.randn((1, *tokens.shape[1:]), generator=torch.Generator().manual_seed(1))
    weights = (q @ tokens.mT / 4).softmax(-1)
    return weights, F.scaled_dot_product_attention(q, tokens, tokens, scale=1 / 4).transpose(1, 2)


@pytest.mark.parametrize("product", [_grouped, _multi_query, _multi_query_fused, _learned_queries_fused])
def test_heads_that_share_keys_and_values_are_heads_of_their_own(product):
    images = torch.randn((3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    model = _ModelByHand(product, n_heads=4)
    vit = open_vit(model, image_size=64, weights="random")
    assert vit.n_heads == (4,)
    maps = []
    logits, weights = _logits_and_map(model, images)
    torch.testing.assert_close(vit.tap().read(images, Readers(attention=lambda each: maps.append(each))), logits)
    torch.testing.assert_close(maps[0].weights(), weights)
    torch.testing.assert_close(maps[0].weights() @ maps[0].v[:, 0], maps[0].out[:, 0])
    torch.testing.assert_close(torch.cat([part.clone() for part in MapSource().parts(maps[0])]), weights)
    without = vit.tap().read(images, edits=[Edit(0, prune=(2,))])
    with torch.no_grad():
        model.blocks[0].proj.weight[:, 16:24] = 0
        torch.testing.assert_close(without, model(images))


class _Mixture(nn.Module):
    """A block whose MLP is four experts, weighed by a softmax for each token; `how` the sum over experts is written."""

    def __init__(self, how):
        super().__init__()
        self.how, self.num_heads = how, 2
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.gate, self.experts = nn.Linear(32, 4), nn.Linear(32, 4 * 32)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        gate, experts = self.gate(x).softmax(-1), self.experts(x).unflatten(-1, (4, 32))
        if self.how == "einsum":
            return x + torch.einsum("bne,bned->bnd", gate, experts)
        return x + (gate[..., None, :] @ experts).squeeze(-2)


@pytest.mark.parametrize(("how", "n_heads"), [("einsum", 2), ("matmul", 3)])
def test_experts_that_each_token_weighs_are_not_counted_as_heads_by_token(how, n_heads):
    torch.manual_seed(0)
    model = _ModelByHand(_sdpa_by_name)
    model.blocks = nn.ModuleList([_Mixture(how)])
    vit = open_vit(model.eval(), image_size=64, weights="random")
    assert vit.n_heads == (n_heads,)
    assert vit.anatomy.blocks[0].kind == "token"
    images = torch.randn((3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(vit.tap().read(images, edits=[]), model(images), rtol=0, atol=0)
        without = vit.tap().read(images, edits=[Edit(0, prune=(1,))])
        model.blocks[0].proj.weight[:, 16:] = 0
        torch.testing.assert_close(without, model(images))


class _OneHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 16, 16)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT
        return (_map_of(tokens) @ tokens).mean(1)


def test_one_head_needs_nothing_that_counts_it():
    assert open_vit(_Around(_OneHead()).eval(), image_size=64, weights="random").n_heads == (1,)


class _UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 16, 16)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(32, 2, 64, batch_first=True) for _ in range(2)])

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT
        for _ in range(2):
            for block in self.blocks:
                tokens = block(tokens)
        return tokens.mean(1)


class _Held(nn.Module):
    """The same blocks, held in a list, as attributes or some of them in a list."""

    def __init__(self, how):
        super().__init__()
        self.how, self.patches = how, nn.Conv2d(3, 32, 16, 16)
        blocks = [nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True) for _ in range(4)]
        if how == "attributes":
            self.one, self.two, self.three, self.four = blocks
        else:
            self.one, self.four = (None, None) if how == "list" else (blocks[0], blocks[3])
            self.blocks = nn.ModuleList(blocks if how == "list" else blocks[1:3])

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT
        between = [self.two, self.three] if self.how == "attributes" else self.blocks
        for block in (self.one, *between, self.four):
            tokens = tokens if block is None else block(tokens)
        return tokens.mean(1)


@pytest.mark.parametrize(
    ("how", "paths"),
    [
        ("list", ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
        ("attributes", ["one", "two", "three", "four"]),
        ("both", ["one", "blocks.0", "blocks.1", "four"]),
    ],
)
def test_blocks_are_blocks_whatever_holds_them(how, paths):
    torch.manual_seed(0)
    model = _Held(how).eval()
    vit = open_vit(model, image_size=64, weights="random")
    blocks = vit.anatomy.blocks
    assert [block.path for block in blocks] == paths
    assert [(block.prefix, block.grid, len(block.calls)) for block in blocks] == [(0, (4, 4), 1)] * 4
    assert vit.anatomy.pools == ()
    images, read = torch.randn((2, 3, 64, 64), generator=torch.Generator().manual_seed(0)), {}
    vit.tap().read(images, Readers(output=read.__setitem__))
    with torch.no_grad():
        tokens = model.patches(images).flatten(2).mT
        for path in paths:
            tokens = model.get_submodule(path)(tokens)
    torch.testing.assert_close(read[3], tokens)


class _Pairs(nn.Module):
    """Attention and MLP in turns, and a pool of the same class as the attention."""

    def __init__(self):
        super().__init__()
        self.patches, self.query = nn.Conv2d(3, 32, 16, 16), nn.Parameter(torch.randn(1, 1, 32))
        attention = [nn.MultiheadAttention(32, 2, batch_first=True) for _ in range(3)]
        self.layers = nn.ModuleList(nn.ModuleList([each, nn.Linear(32, 32)]) for each in attention[:2])
        self.pool = attention[2]

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT
        for attention, mlp in self.layers:
            tokens = tokens + attention(tokens, tokens, tokens)[0]
            tokens = tokens + mlp(tokens)
        return self.pool(self.query.expand(len(images), 1, -1), tokens, tokens)[0][:, 0]


def test_a_pool_of_the_class_of_the_layers_is_none():
    anatomy = open_vit(_Pairs().eval(), image_size=64).anatomy
    assert [block.path for block in anatomy.blocks] == ["layers.0.0", "layers.1.0"]
    assert anatomy.pools == ("pool",)
    assert anatomy.outside == ("Attention in pool is outside the blocks: no layer has it.",)
    assert [note.partition(":")[0] for note in anatomy.notes] == ["L0-L1"]
    assert "adds what these layers return to other tokens outside them" in anatomy.notes[0]


class _Mirrored(_UsedTwice):
    """One encoder that is shown the image and then its mirror image."""

    def encode(self, images):
        tokens = self.patches(images).flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.mean(1)

    def forward(self, images):
        return self.encode(images) + self.encode(images.flip(-1))


def test_layers_of_a_mirror_image_do_not_have_the_grid_of_the_image():
    anatomy = open_vit(_Mirrored().eval(), image_size=64).anatomy
    assert [(block.grid, block.fed) for block in anatomy.blocks] == [
        ((4, 4), False),
        ((4, 4), True),
        (None, False),
        (None, True),
    ]


class _Positions(_UsedTwice):
    """Positions are added on the way to each block."""

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens + torch.linspace(0, 1, 32))
        return tokens.mean(1)


def test_a_sum_on_the_way_to_the_next_block_does_not_make_a_branch():
    anatomy = open_vit(_Positions().eval(), image_size=64).anatomy
    assert [block.fed for block in anatomy.blocks] == [False, True]
    assert anatomy.notes == ()


def test_a_block_that_runs_again_is_a_layer_each_time():
    anatomy = open_vit(_UsedTwice().eval(), image_size=64).anatomy
    assert [(block.path, block.run) for block in anatomy.blocks] == [
        ("blocks.0", 0),
        ("blocks.1", 0),
        ("blocks.0", 1),
        ("blocks.1", 1),
    ]


def test_a_model_is_opened_without_a_whole_map_of_a_fused_call(fresh, monkeypatch):
    made, softmax_weights = [], intercept._softmax_weights

    def counted(*args):
        weights = softmax_weights(*args)
        made.append(weights.nbytes)
        return weights

    whole = open_vit(fresh("timm ViT")).anatomy.blocks
    monkeypatch.setattr(intercept, "_softmax_weights", counted)
    monkeypatch.setattr(intercept, "PIECE_BYTES", 2048)
    assert open_vit(fresh("timm ViT")).anatomy.blocks == whole
    assert made
    assert max(made) <= 2048


def test_a_convolutional_network_a_mixer_and_a_text_model_are_refused_with_what_they_lack(fresh):
    for name in ("torchvision resnet", "timm MLP-Mixer"):
        with pytest.raises(NoAttention, match="no attention call"):
            open_vit(fresh(name), image_size=224)
    with pytest.raises(Unsupported, match="reads input_ids, so it is no vision model"):
        open_vit(fresh("transformers BERT"), image_size=64)


def test_an_image_size_that_the_model_does_not_take_is_refused_with_what_it_says(fresh):
    with pytest.raises(Unsupported, match=r"images of shape \[2, 3, 80, 80\].*check --image-size"):
        open_vit(fresh("timm ViT"), image_size=80)


class _Stage(nn.Module):
    """Attention between the positions of a picture, which goes on with twice the channels and half the sides."""

    def __init__(self, channels, n_heads):
        super().__init__()
        self.qkv, self.num_heads = nn.Conv2d(channels, 6 * channels, 1, 2), n_heads

    def forward(self, picture):
        q, k, v = self.qkv(picture).flatten(2).unflatten(1, (3, self.num_heads, -1)).mT.unbind(1)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return out.mT.flatten(1, 2).unflatten(-1, (picture.shape[-2] // 2, -1))


def test_channels_as_many_as_the_columns_of_a_picture_are_not_taken_for_them():
    """The second stage gets 16 channels of 32 x 32 and attends with 32."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(_Stage(8, 2), _Stage(16, 2)), nn.AdaptiveAvgPool2d(1))
    blocks = open_vit(nn.Sequential(model, nn.Flatten()).eval(), image_size=64, weights="random").anatomy.blocks
    assert [(block.layout.order, block.grid) for block in blocks] == [("NCHW", (64, 64)), ("NCHW", (32, 32))]
