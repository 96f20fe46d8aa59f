"""Where keys lie: against the measured slots of windows, and the geometry of shifts, pooling and MaxViT's windows."""

import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg

from vitrail import open_vit
from vitrail.grid import overlap_shares
from vitrail.tap.places import find_key_places


def single_tokens(places, grid):
    """The token that each key is, -1 for a key that lies nowhere; every key is one token."""
    assert set(places.rows.unique().tolist()) <= {0, 1}
    assert set(places.columns.unique().tolist()) <= {0, 1}
    token = places.rows.argmax(2) * grid[1] + places.columns.argmax(2)
    return torch.where(places.rows.sum(2) > 0, token, -1)


def test_keys_of_whole_maps_are_the_tokens_and_a_class_token_lies_nowhere():
    vit = open_vit(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=(32, 64)), image_size=(32, 64))
    places = vit.tap().key_places(0)
    assert_array_equal(single_tokens(places, (2, 4)), [[-1, *range(8)]])
    assert_array_equal(places.on_grid(torch.arange(9.0)[None, None])[0], [[1, 2, 3, 4], [5, 6, 7, 8]])


def test_keys_of_shifted_windows_lie_in_the_measured_slots_padding_nowhere():
    shape = {"img_size": 40, "patch_size": 2, "window_size": 8, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 3)}
    vit = open_vit(timm.create_model("swin_tiny_patch4_window7_224", **shape), image_size=40)
    for layer, block in enumerate(vit.anatomy.blocks):
        slots = vit.tap().window_slots(layer)
        assert (slots < 0).any()
        assert_array_equal(single_tokens(vit.tap().key_places(layer), block.grid), slots)


@torch.no_grad()
def test_pooled_keys_cover_the_patches_of_their_stride_also_where_weights_of_a_row_are_small():
    torch.manual_seed(0)
    model = timm.create_model("pvt_v2_b0", depths=(2, 1, 1, 1))
    model.stages[0].blocks[0].attn.sr.weight[:, :, 3] *= 0.25
    vit = open_vit(model, image_size=64)
    for layer in (0, 1):
        places = vit.tap().key_places(layer)  # 2 x 2 keys on 16 x 16 patches
        assert places.rows.shape == (1, 4, 16)
        first, second = [1 / 8] * 8 + [0] * 8, [0] * 8 + [1 / 8] * 8
        assert_allclose(places.rows[0], [first, first, second, second])
        assert_allclose(places.columns[0], [first, second, first, second])


def test_keys_behind_a_convolution_and_a_gate_over_the_image_hold_their_own_patch_and_few_others():
    """The second block of a stage of MaxViT: windows of 4 x 4 neighbours, then of every second patch, on 8 x 8.

    A neighbour may have a part, where the convolution weighs it as much.
    """
    config = MaxxVitCfg(
        embed_dim=(24,),
        depths=(2,),
        block_type=("M",),
        stem_width=(20, 20),
        conv_cfg=MaxxVitConvCfg(block_type="mbconv"),
        transformer_cfg=MaxxVitTransformerCfg(window_size=4, dim_head=12),
    )
    torch.manual_seed(0)
    model = MaxxVit(config, img_size=32, num_classes=5).eval()
    vit = open_vit(model, image_size=32)
    (neighbours, spread), block = (
        (find_key_places(model, vit.anatomy, 1, call) for call in (0, 1)),
        vit.anatomy.blocks[1],
    )
    assert block.grid == (8, 8)
    token = torch.arange(64).reshape(8, 8)
    by_neighbours = token.reshape(2, 4, 2, 4).permute(0, 2, 1, 3).reshape(4, 16)
    by_strides = token.reshape(4, 2, 4, 2).permute(1, 3, 0, 2).reshape(4, 16)
    for places, expected in ((neighbours, by_neighbours), (spread, by_strides)):
        assert (places.rows.gather(2, expected[..., None] // 8) >= 1 / 2).all()
        assert (places.columns.gather(2, expected[..., None] % 8) >= 1 / 2).all()
        assert ((places.rows > 0).sum(2).float().mean() * (places.columns > 0).sum(2).float().mean()) < 1.5


@given(st.integers(1, 40), st.integers(1, 40))
def test_shares_of_overlap_lose_nothing_and_undo_themselves_from_coarse_to_fine(n_parts, n_others):
    shares = overlap_shares(n_parts, n_others)
    assert_allclose(shares.sum(1), 1)
    assert_allclose(shares.sum(0), n_parts / n_others)
    if n_others % n_parts == 0:
        assert_allclose(shares @ overlap_shares(n_others, n_parts), torch.eye(n_parts), atol=1e-12)
