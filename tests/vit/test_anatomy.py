"""What tracing finds: blocks, kinds, grids, prefix tokens, and when it says that it cannot tell."""

import pytest
import torch
from torch import nn

from vitrail.errors import NoAttention, Unsupported
from vitrail.vit.anatomy import discover
from vitrail.vit.attention import Readers
from vitrail.vit.check import describe
from vitrail.vit.families.from_timm import shallow
from vitrail.vit.open import open_vit


def _shape(anatomy):
    return list(dict.fromkeys((block.kind, block.prefix, block.grid) for block in anatomy.blocks))


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


def test_tokens_that_lie_in_another_order_than_the_image_have_no_grid(opened):
    anatomy = opened("timm Hiera").anatomy
    assert {block.grid for block in anatomy.blocks} == {None}
    assert any("not lie in raster order" in note for note in anatomy.notes)


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


class _Einsum(nn.Module):
    def __init__(self, equation):
        super().__init__()
        self.equation, self.num_heads = equation, 2
        self.patches = nn.Conv2d(3, 32, 16, 16)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT.unflatten(-1, (2, 16)).transpose(1, 2)
        weights = torch.einsum("bhqd,bhkd->bhqk", tokens, tokens).softmax(-1)
        return torch.einsum(self.equation, weights, tokens).mean(2).flatten(1)


def test_an_einsum_that_is_attention_is_followed_and_another_is_refused():
    images = torch.randn((3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    assert discover(_Around(_Einsum("bhqk,bhkd->bhqd")).eval(), images).blocks[0].heads == 2
    with pytest.raises(Unsupported, match="einsum"):
        discover(_Around(_Einsum("bhkq,bhkd->bhqd")).eval(), images)


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


def test_blocks_that_run_twice_in_a_pass_are_refused():
    with pytest.raises(Unsupported, match="runs 2 times"):
        open_vit(_UsedTwice().eval(), image_size=64)


def test_a_convolutional_network_a_mixer_and_a_text_model_are_refused_with_what_they_lack(fresh):
    for name in ("torchvision resnet", "timm MLP-Mixer"):
        with pytest.raises(NoAttention, match="no attention call"):
            open_vit(fresh(name), image_size=224)
    with pytest.raises(Unsupported, match="reads input_ids, so it is no vision model"):
        open_vit(fresh("transformers BERT"), image_size=64)


def test_an_image_size_that_the_model_does_not_take_is_refused_with_what_it_says(fresh):
    with pytest.raises(Unsupported, match=r"images of shape \[2, 3, 80, 80\].*check --image-size"):
        open_vit(fresh("timm ViT"), image_size=80)
