"""The six region modes of a head's map."""

import pytest
import timm
import torch
from head_models import timm_vit
from torch.testing import assert_close

from vitrail import open_vit
from vitrail.errors import Unsupported, UsageError
from vitrail.heads.regions import (
    Mode,
    mode_edits,
    modes_offered,
    region_mask,
    region_modes,
    require_mode,
    why_not_all_modes,
)

BOUND = 1e-5
"""Of the largest logit: another batch size, and weights @ v instead of the fused kernel."""


@pytest.fixture(scope="module")
def vit():
    return open_vit(timm_vit(), image_size=(48, 80))


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 48, 80, generator=torch.Generator().manual_seed(0))


def modes_of(vit, images, layer, head):
    found = region_modes(vit.tap(), vit.anatomy, images, layer, head)
    return {mode: found.logits[index] for index, mode in enumerate(found.modes)}


def assert_within(actual, expected, bound=BOUND):
    assert_close(actual, expected, rtol=0, atol=bound * float(expected.abs().max()))


def without_head(model, layer, head):
    """The model with a head's columns of the output projection set to zero: surgery, no tap."""
    import copy

    model = copy.deepcopy(model)
    attention = model.blocks[layer].attn
    size = attention.proj.weight.shape[1] // attention.num_heads
    with torch.no_grad():
        attention.proj.weight[:, head * size : (head + 1) * size] = 0
    return model


def test_masks_add_up_as_the_paper_says():
    pruned = {mode: 1 - region_mask(mode, n_tokens=7, prefix=2) for mode in Mode}
    assert_close(pruned[Mode.CROSS], pruned[Mode.EDGE] + pruned[Mode.CORNER])
    assert_close(pruned[Mode.EVERYTHING], pruned[Mode.CROSS] + pruned[Mode.PATCHES])
    assert_close(pruned[Mode.NOTHING], torch.zeros(7, 7))
    assert_close(pruned[Mode.CORNER].sum(), torch.tensor(4.0))
    assert_close(pruned[Mode.PATCHES].sum(), torch.tensor(25.0))


def test_mode_1_is_the_plain_pass_bitwise(vit, images):
    assert torch.equal(modes_of(vit, images, 1, 2)[Mode.NOTHING], vit.logits(images))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_mode_2_is_surgery_on_the_output_projection(vit, images, layer):
    with torch.no_grad():
        expected = without_head(timm_vit(), layer, 2)(images)
        plain = timm_vit()(images)
    found = modes_of(vit, images, layer, 2)[Mode.EVERYTHING]
    assert_within(found, expected)
    assert (found - plain).abs().max() > 1e-3


def test_every_other_mode_changes_the_answer_in_a_middle_layer(vit, images):
    found = modes_of(vit, images, 1, 0)
    for mode in (Mode.EVERYTHING, Mode.CROSS, Mode.PATCHES, Mode.EDGE, Mode.CORNER):
        assert (found[mode] - found[Mode.NOTHING]).abs().max() > 1e-3 * found[Mode.NOTHING].abs().max()


def test_modes_agree_with_a_map_masked_by_hand(vit, images):
    """Recomputes the block's attention from the tap's own q, k, v, masks it, and continues by hand."""
    model, layer, head = timm_vit(), 2, 1
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for block in model.blocks[:layer]:
            tokens = block(tokens)
        block, attention = model.blocks[layer], model.blocks[layer].attn
        n_images, n_tokens, width = tokens.shape
        q, k, v = attention.qkv(block.norm1(tokens)).view(n_images, n_tokens, 3, 3, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        weights[:, head] *= region_mask(Mode.EDGE, n_tokens, 1)
        tokens = tokens + attention.proj((weights @ v).transpose(1, 2).reshape(n_images, n_tokens, width))
        tokens = tokens + block.mlp(block.norm2(tokens))
        expected = model.forward_head(model.norm(tokens))
    assert_within(modes_of(vit, images, layer, head)[Mode.EDGE], expected)


def test_in_the_last_layer_only_the_class_row_reaches_the_classifier(vit, images):
    found = modes_of(vit, images, 2, 1)
    assert_within(found[Mode.PATCHES], found[Mode.NOTHING])
    assert_within(found[Mode.CROSS], found[Mode.EVERYTHING])


def test_registers_belong_to_the_prefix():
    vit = open_vit(timm_vit("vit_small_patch14_reg4_dinov2", (42, 70), num_classes=5), image_size=(42, 70))
    assert vit.anatomy.blocks[0].prefix == 5
    assert modes_offered(vit.anatomy, 0) == tuple(Mode)


def test_without_a_class_token_three_modes_remain_and_say_why():
    model = timm_vit("vit_base_patch16_siglip_gap_224", (48, 80), depth=2)
    vit = open_vit(model, image_size=(48, 80))
    images = torch.randn(4, 3, 48, 80)
    found = region_modes(vit.tap(), vit.anatomy, images, 0, 0)
    assert found.modes == (Mode.NOTHING, Mode.EVERYTHING, Mode.PATCHES)
    assert "no class token" in found.missing
    assert_close(found.logits[2], found.logits[1], rtol=0, atol=0)
    with pytest.raises(Unsupported, match="no class token"):
        require_mode(vit.anatomy, 0, Mode.CORNER)


def test_a_head_that_is_not_there_is_refused_with_the_heads_that_are(vit, images):
    with pytest.raises(UsageError, match="heads 0 to 2"):
        region_modes(vit.tap(), vit.anatomy, images, 0, 3)
    with pytest.raises(UsageError, match="layers 0 to 2"):
        region_modes(vit.tap(), vit.anatomy, images, 3, 0)


def test_a_full_set_of_modes_has_no_reason_to_give(vit):
    assert why_not_all_modes(vit.anatomy, 0) == ""


def test_heads_within_the_pixels_of_a_patch_have_no_modes_of_patches():
    shape = {"img_size": 64, "depth": 1, "embed_dim": 48, "inner_dim": 12, "num_heads_outer": 3, "num_heads_inner": 2}
    torch.manual_seed(0)
    vit = open_vit(timm.create_model("tnt_s_patch16_224", num_classes=5, **shape).eval(), image_size=64)
    assert modes_offered(vit.anatomy, 0, 0) == (Mode.NOTHING, Mode.EVERYTHING)
    assert modes_offered(vit.anatomy, 0, 2) == tuple(Mode)
    images = torch.randn((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    assert region_modes(vit.tap(), vit.anatomy, images, 0, 0).modes == (Mode.NOTHING, Mode.EVERYTHING)


@pytest.mark.parametrize(("layer", "head", "words"), [(9, 0, "Layer 9"), (0, 9, "9")])
def test_a_part_of_a_head_that_is_not_there_is_refused(layer, head, words):
    with pytest.raises(UsageError, match=words):
        mode_edits(open_vit(timm_vit()).anatomy, layer, head, [Mode.CROSS])
