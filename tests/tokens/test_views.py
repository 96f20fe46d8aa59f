"""Views: level 0, the recursion and its closed form, the faithful view, agreement, display."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose
from token_models import small_images, small_vit

from vitrail import Readers, open_vit
from vitrail.errors import Unsupported, UsageError
from vitrail.tokens.display import rgb_image, sign_map
from vitrail.tokens.embedding import find_embedding, position_similarity
from vitrail.tokens.flow import STEPS, flow_row, flows, read_steps, rollout, step
from vitrail.tokens.levels import read_levels
from vitrail.tokens.robustness import paint
from vitrail.tokens.views import (
    agreement,
    faithful_view,
    flow_view,
    global_view,
    local_view,
    neuron_view,
)


def views_by_recursion(images, filter_, embedding, steps):
    """V(z_l[i]) of every token as pictures, [token colour row column]: the definition, for one image."""
    rows, columns = embedding.grid
    now = torch.zeros(embedding.prefix + rows * columns, *images.shape[1:])
    height, width = embedding.patch
    for patch in range(rows * columns):
        row, column = divmod(patch, columns)
        part = (slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
        now[embedding.prefix + patch][:, *part] = images[0][:, *part] * filter_
    for each in steps:
        now = torch.einsum("qk,kcyx->qcyx", each[0], now)
    return now


def test_level_0_adds_up_to_the_neuron_less_bias_and_position(vit, images):
    embedding = find_embedding(vit)
    neurons = read_levels(vit.tap(), images).tokens[0]
    for channel in (0, 17, 47):
        for patch in (0, 13, 31):
            summed = local_view(images, embedding.filters[channel], embedding.grid, patch).sum((1, 2, 3))
            left = neurons[:, 1 + patch, channel] - embedding.bias[channel] - embedding.position[patch, channel]
            assert_allclose(summed, left, atol=1e-4)


def test_positions_are_those_of_the_model(vit):
    assert_allclose(find_embedding(vit).position, vit.model.pos_embed[0, 1:].detach(), atol=1e-5)


def test_the_similarity_of_positions_is_1_with_themselves(vit):
    found = position_similarity(find_embedding(vit))
    assert_allclose(found.diagonal(), 1, atol=1e-5)
    assert found.min() < 0.5


@pytest.mark.parametrize("how", STEPS)
def test_recursion_equals_closed_form(vit, images, how):
    embedding, channel = find_embedding(vit), 20
    for level in range(vit.n_layers + 1):
        steps = read_steps(vit.tap(), images[:1], how, channel, level)[0] if level else []
        expected = views_by_recursion(images[:1], embedding.filters[channel], embedding, steps)
        for token in (0, 1, 14, 32):
            found = neuron_view(vit, images[:1], level, token, channel, how)[0]
            assert_allclose(found, expected[token], atol=1e-5 * float(expected.abs().max()))


def test_rows_of_the_flow_sum_to_1_at_every_level(vit, images):
    for how in STEPS:
        steps, _ = read_steps(vit.tap(), images, how, 20)
        for level, flow in enumerate(flows(steps)):
            assert_allclose(flow.sum(-1), 1, atol=1e-5, err_msg=f"{how} {level}")


def test_one_row_of_the_flow_is_that_of_the_whole(vit, images):
    steps, _ = read_steps(vit.tap(), images)
    assert_allclose(flow_row(steps, 7), flows(steps)[-1][:, 7], atol=1e-6)


def test_reading_the_flow_leaves_the_logits_as_they_are(vit, images):
    assert torch.equal(read_steps(vit.tap(), images)[1], vit.logits(images))


def test_the_owner_of_a_channel_is_the_head_it_lies_in(vit, images):
    maps = {}
    vit.tap().read(images, Readers(attention=lambda each: maps.update({each.layer: each.weights().detach()})))
    steps, _ = read_steps(vit.tap(), images, "owner", channel=37)
    assert_allclose(steps[1], step(maps[1], "owner", 37 // 16), atol=1e-6)


def test_the_view_of_a_black_patch_is_the_filter_times_the_normalised_black(vit):
    embedding = find_embedding(vit)
    lost = np.zeros((2, 32), dtype=bool)
    lost[:, 9] = True
    black = paint(small_images(2), lost, embedding.grid, "black", vit.preprocessing)
    normalised = torch.tensor([-m / s for m, s in zip(vit.preprocessing.mean, vit.preprocessing.std, strict=True)])
    expected = embedding.filters[5] * normalised[:, None, None]
    assert torch.equal(local_view(black, embedding.filters[5], embedding.grid, 9)[1], expected)


def test_the_global_view_holds_every_local_view_in_its_place(vit, images):
    embedding = find_embedding(vit)
    whole = global_view(images, embedding.filters[3], embedding.grid)
    for patch in range(32):
        row, column = divmod(patch, 8)
        part = whole[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        assert torch.equal(part, local_view(images, embedding.filters[3], embedding.grid, patch))


def test_the_faithful_view_of_level_0_is_the_plain_one_and_accounts_for_the_neuron(vit, images):
    faithful = faithful_view(vit, images[:1], 0, 5, 11)
    assert_allclose(faithful.pixels, neuron_view(vit, images[:1], 0, 5, 11)[0], atol=1e-6)
    assert faithful.missing < 1e-4


def test_the_faithful_view_is_the_neurons_own_derivative(vit, images):
    faithful = faithful_view(vit, images[:1], 2, 6, 30)
    at = (2, 10, 33)
    nudge = torch.zeros_like(images[:1])
    nudge[(0, *at)] = 1e-2
    up, down = (read_levels(vit.tap(), images[:1] + sign * nudge).tokens[2][0, 6, 30] for sign in (1, -1))
    expected = float(images[(0, *at)] * (up - down) / 2e-2)
    assert_allclose(float(faithful.pixels[at]), expected, rtol=2e-2, atol=1e-6)


def test_more_steps_make_the_faithful_view_complete(vit, images):
    one, many = (faithful_view(vit, 0.1 * images[:1], 3, 6, 30, steps) for steps in (1, 64))
    assert many.missing < 0.02
    assert many.missing < one.missing
    assert one.change == pytest.approx(many.change, rel=1e-4)


def test_agreement_is_1_with_itself_and_small_with_something_else():
    one, other = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    same, unlike = agreement(one, one, (4, 8)), agreement(one, other, (4, 8))
    assert (same.cosine, same.rank) == pytest.approx((1, 1))
    assert abs(unlike.cosine) < 0.1
    assert abs(unlike.rank) < 0.5
    assert math.isnan(agreement(one, torch.zeros_like(one), (4, 8)).cosine)


def test_the_picture_of_a_view_is_clipped_and_has_one_scale_for_its_colours():
    pixels = np.array([[[2.0, -1.0]], [[1.0, 0.0]], [[4.0, 0.5]]])
    assert_allclose(rgb_image(pixels), [[[0.5, 0.25, 1.0], [0, 0, 0.125]]])
    assert_allclose(rgb_image(pixels, scale=8.0), [[[0.25, 0.125, 0.5], [0, 0, 0.0625]]])
    assert_allclose(sign_map(pixels), [[1.0, -0.5 / 7]])
    assert_allclose(rgb_image(-np.ones((3, 2, 2))), 0)


@pytest.mark.parametrize(
    ("name", "options", "prefix"),
    [("vit_base_patch16_siglip_gap_224", {}, 0), ("vit_small_patch14_reg4_dinov2", {"init_values": None}, 5)],
)
def test_views_work_without_a_class_token_and_with_registers(name, options, prefix):
    vit, images = small_vit(name, **options), small_images(1)
    embedding = find_embedding(vit)
    assert embedding.prefix == prefix
    steps, _ = read_steps(vit.tap(), images)
    expected = views_by_recursion(images, embedding.filters[4], embedding, steps)[prefix + 3]
    assert_allclose(neuron_view(vit, images, 3, prefix + 3, 4)[0], expected, atol=1e-5)
    found = rollout(steps, prefix, vit.anatomy.class_index(0))
    assert found.shape == (1, 32)
    assert (found >= 0).all()


def test_rollout_is_the_published_product_in_numpy(vit, images):
    """Abnar and Zuidema: the mean over heads plus identity, rows scaled to 1, later layers on the left."""
    model, maps = copy.deepcopy(vit.model), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0].double().numpy()))
    with torch.no_grad():
        model(images)
    expected = np.eye(33)
    for weights in maps:
        mixed = weights.mean(1) + np.eye(33)
        expected = mixed / mixed.sum(-1, keepdims=True) @ expected
    steps, _ = read_steps(vit.tap(), images)
    assert_allclose(rollout(steps, 1, 0), expected[:, 0, 1:], rtol=1e-4, atol=1e-7)
    assert_allclose(rollout(steps, 1, None), expected[:, 1:, 1:].mean(1), rtol=1e-4, atol=1e-7)


def test_rollout_of_two_layers_by_hand():
    """A class token and two patches: L1's class token looks at patch 0 alone, which in L0 takes half of patch 1."""
    first, second = torch.eye(3), torch.eye(3)
    first[1], second[0] = torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.0, 1.0, 0.0])
    steps = [step(each[None, None]) for each in (first, second)]
    # a_0 of patch 0: (0, 0.75, 0.25); a_1 of the class token: (0.5, 0.5, 0)
    assert_allclose(rollout(steps, 1, 0), [[0.5 * 0.75, 0.5 * 0.25]])
    assert_allclose(rollout(steps, 1, None), [[(0.75 + 0) / 2, (0.25 + 1) / 2]])


def test_level_0_behind_a_norm_is_not_passed_off_as_a_sum():
    clip = small_vit("vit_base_patch32_clip_224")
    assert find_embedding(clip).position is None
    with pytest.raises(Unsupported, match="norm before its first block"):
        faithful_view(clip, small_images(1), 0, 3, 3)


def test_a_hierarchy_is_refused_from_the_layer_that_regroups_its_tokens():
    torch.manual_seed(0)
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(2, 2), embed_dim=24,
                             num_heads=(2, 3), num_classes=10).eval()  # fmt: skip
    vit = open_vit(swin, image_size=(64, 64))
    steps, _ = read_steps(vit.tap(), torch.randn(1, 3, 64, 64), levels=2)
    assert_allclose(flows(steps)[-1].sum(-1), 1, atol=1e-5)
    with pytest.raises(Unsupported, match=r"cannot be followed through it$"):
        read_steps(vit.tap(), torch.randn(1, 3, 64, 64))
    with pytest.raises(Unsupported, match="Ask for a level up to 2"):
        read_steps(vit.tap(), torch.randn(1, 3, 64, 64), levels=3)


def test_a_neuron_that_is_not_there_is_refused_with_those_that_are(vit, images):
    with pytest.raises(UsageError, match="channels 0 to 47"):
        neuron_view(vit, images, 1, 3, 48)
    with pytest.raises(UsageError, match="levels 0 to 3"):
        neuron_view(vit, images, 4, 3, 0)
    with pytest.raises(UsageError, match="tokens 0 to 32"):
        neuron_view(vit, images, 0, 33, 0)


@pytest.mark.parametrize("path", ["gradient", "frozen"])
@pytest.mark.parametrize(
    ("level", "token", "channel", "words"),
    [
        (9, 0, 0, "no level 9: .* levels 0 to 3"), (-1, 0, 0, "no level -1"),
        (2, 99, 0, "no token 99: .* tokens 0 to "), (2, -1, 0, "no token -1"), (0, 99, 0, "no token 99"),
        (2, 0, 999, "no channel 999: .* channels 0 to "), (2, 0, -1, "no channel -1"), (0, 0, -1, "no channel -1"),
    ],
)  # fmt: skip
def test_a_faithful_view_of_a_neuron_that_is_not_there_is_refused(level, token, channel, words, path, vit, images):
    with pytest.raises(UsageError, match=words):
        faithful_view(vit, images[:1], level, token, channel, path=path)


def test_a_step_that_is_not_there_is_refused(vit, images):
    with pytest.raises(UsageError, match="mean or raw"):
        step(torch.ones(1, 2, 3, 3), "sum")
    with pytest.raises(UsageError, match="needs the channel"):
        read_steps(vit.tap(), images, "owner")


def test_views_read_from_a_view_of_flow_are_linear_in_it(vit, images):
    embedding = find_embedding(vit)
    one, other = torch.rand(2, 3, 32)
    filter_ = embedding.filters[0]
    both = flow_view(images, filter_, embedding.grid, one + other)
    parts = flow_view(images, filter_, embedding.grid, one) + flow_view(images, filter_, embedding.grid, other)
    assert_allclose(both, parts, atol=1e-6)
