"""Edits against results written out by hand, and the ones that are refused."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from vitrail.errors import TapError, Unsupported, UsageError
from vitrail.tap.attention import Readers
from vitrail.tap.edits import Edit

VIT = "timm ViT"
BY_HAND = "transformers ViT, eager"
NATIVE = "torchvision vit_b_16"


@torch.no_grad()
def _seen(vit, images, edits=(), layer=1):
    """(weights, v, out, logits) of one layer."""
    kept = []

    def read(attention):
        if attention.layer == layer:
            kept.extend([attention.weights(), attention.v[:, 0], attention.out[:, 0]])

    logits = vit.tap().read(images, Readers(attention=read), edits)
    return (*kept, logits)


@pytest.mark.parametrize("name", [VIT, BY_HAND, NATIVE])
def test_pruning_zeroes_that_heads_output_and_no_other(name, opened, noise):
    vit = opened(name)
    images = noise(vit)
    weights, v, out, _ = _seen(vit, images, [Edit(1, prune=(0, 2))])
    assert_array_equal(out[:, [0, 2]].numpy(), 0)
    assert_allclose(out[:, 1].numpy(), (weights @ v)[:, 1].numpy(), atol=1e-5)


@pytest.mark.parametrize("name", [VIT, BY_HAND, NATIVE])
def test_a_region_multiplies_the_weights_and_does_not_renormalise(name, opened, noise):
    vit = opened(name)
    images = noise(vit)
    tokens = vit.anatomy.blocks[1].tokens
    region = torch.zeros((tokens, tokens), dtype=torch.bool)
    region[:, :3] = True
    plain, v, _, _ = _seen(vit, images, [Edit(1, region=torch.ones((tokens, tokens)))])
    weights, _, out, _ = _seen(vit, images, [Edit(1, region=region)])
    assert_allclose(weights.numpy(), (plain * region).numpy(), atol=1e-6)
    assert_allclose(out.numpy(), ((plain * region) @ v).numpy(), atol=1e-5)


def test_a_region_per_head_of_zeros_is_pruning(opened, noise):
    vit = opened(VIT)
    images = noise(vit)
    region = torch.ones((3, 17, 17))
    region[1] = 0
    by_region = vit.tap().read(images, edits=[Edit(2, region=region)])
    pruned = vit.tap().read(images, edits=[Edit(2, prune=(1,))])
    assert_allclose(by_region.detach().numpy(), pruned.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("name", [VIT, BY_HAND, NATIVE])
def test_a_bias_is_added_before_softmax(name, opened, noise):
    vit = opened(name)
    images = noise(vit)
    tokens, heads = vit.anatomy.blocks[1].tokens, vit.n_heads[1]
    bias = torch.randn((heads, tokens, tokens), generator=torch.Generator().manual_seed(3))
    plain, v, _, _ = _seen(vit, images, [Edit(1, bias=torch.zeros((tokens, tokens)))])
    weights, _, out, _ = _seen(vit, images, [Edit(1, bias=bias)])
    expected = torch.softmax(plain.log() + bias, -1)
    assert_allclose(weights.numpy(), expected.numpy(), atol=2e-6)
    assert_allclose(out.numpy(), (expected @ v).numpy(), atol=1e-5)


@pytest.mark.parametrize("name", [VIT, BY_HAND])
def test_a_bias_per_image_reaches_its_own_image_only(name, opened, noise):
    vit = opened(name)
    images = noise(vit)
    bias = torch.zeros((4, 3, 17, 17))
    bias[2] = torch.randn((3, 17, 17), generator=torch.Generator().manual_seed(3))
    zero, _, _, plain = _seen(vit, images, [Edit(1, bias=torch.zeros((17, 17)))])
    weights, _, _, logits = _seen(vit, images, [Edit(1, bias=bias)])
    assert_array_equal(weights[[0, 1, 3]].numpy(), zero[[0, 1, 3]].numpy())
    assert_allclose(weights[2].numpy(), torch.softmax(zero[2].log() + bias[2], -1).numpy(), atol=2e-6)
    assert float((logits - plain)[2].abs().max()) > 1e-3


@pytest.mark.parametrize("name", [VIT, BY_HAND, NATIVE])
def test_dropped_keys_are_attended_by_nobody_and_the_rest_is_renormalised(name, opened, noise):
    vit = opened(name)
    images = noise(vit)
    kept = [token for token in range(vit.anatomy.blocks[1].tokens) if token not in (4, 9)]
    plain, *_ = _seen(vit, images, [Edit(1, prune=(0,))])
    weights, *_ = _seen(vit, images, [Edit(1, drop_keys=(4, 9))])
    assert_array_equal(weights[..., [4, 9]].numpy(), 0)
    expected = plain[..., kept] / plain[..., kept].sum(-1, keepdim=True)
    assert_allclose(weights[..., kept].numpy(), expected.numpy(), atol=2e-6)


def test_dropped_queries_give_zeros_and_the_other_rows_stay(opened, noise):
    vit = opened(VIT)
    images = noise(vit)
    _, _, keys_only, _ = _seen(vit, images, [Edit(1, drop_keys=(4,))])
    _, _, both, _ = _seen(vit, images, [Edit(1, drop_keys=(4,), drop_queries=True)])
    assert_array_equal(both[:, :, 4].numpy(), 0)
    others = [token for token in range(17) if token != 4]
    assert_array_equal(both[:, :, others].numpy(), keys_only[:, :, others].numpy())


def test_a_gate_scales_the_output_of_each_head_of_each_image(opened, noise):
    vit = opened(VIT)
    images = noise(vit)
    gate = torch.rand((4, 3), generator=torch.Generator().manual_seed(3))
    _, _, plain, _ = _seen(vit, images)
    _, _, out, _ = _seen(vit, images, [Edit(1, gate=gate)])
    assert_allclose(out.numpy(), (plain * gate[:, :, None, None]).numpy(), atol=1e-6)


@pytest.mark.parametrize("name", [VIT, BY_HAND, NATIVE, "timm Swin", "timm CaiT", "timm PVT v2"])
@torch.no_grad()
def test_edits_of_several_copies_act_each_on_its_own(name, opened, noise):
    """Copy-major: rows 0..B-1 are copy 0. Copy 1 is not edited and gives the plain logits."""
    vit = opened(name)
    images = noise(vit, 2)
    tap = vit.tap()
    layer = vit.n_layers - 1
    replay, plain = tap.record(images)
    head = vit.n_heads[layer] - 1
    edits = [Edit(layer, copy=0, prune=(0,)), Edit(layer, copy=2, prune=(head,))]
    rows = tap.run_from(layer, replay, edits, copies=3).unflatten(0, (3, 2))
    scale = float(plain.abs().max())
    for copy, expected in (
        (0, tap.read(images, edits=[Edit(layer, prune=(0,))])),
        (1, plain),
        (2, tap.read(images, edits=[Edit(layer, prune=(head,))])),
    ):
        assert_allclose(rows[copy].numpy(), expected.numpy(), atol=1e-5 * scale)
    assert float((rows[0] - rows[1]).abs().max()) > 1e-3 * scale


@torch.no_grad()
def test_two_edits_of_one_call_act_together(opened, noise):
    vit = opened(VIT)
    images = noise(vit)
    together = vit.tap().read(images, edits=[Edit(0, prune=(0, 1))])
    apart = vit.tap().read(images, edits=[Edit(0, prune=(0,)), Edit(0, prune=(1,))])
    assert_array_equal(together.numpy(), apart.numpy())


@torch.no_grad()
def test_the_second_call_of_a_parallel_block_is_edited_on_its_own(opened, noise):
    vit = opened("timm ViT 18x2")
    images = noise(vit)
    first, second = (vit.tap().read(images, edits=[Edit(0, call, prune=(0,))]) for call in (0, 1))
    both = vit.tap().read(images, edits=[Edit(0, 0, prune=(0,)), Edit(0, 1, prune=(0,))])
    plain = vit.logits(images)
    for one, other in ((first, second), (first, both), (second, both), (first, plain), (second, plain)):
        assert float((one - other).abs().max()) > 1e-4


# --- refused ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_edit_before_the_starting_layer_touches_nothing_and_is_an_error(opened, noise):
    vit = opened(VIT)
    replay, _ = vit.tap().record(noise(vit))
    with pytest.raises(TapError, match="touched nothing: L0"):
        vit.tap().run_from(1, replay, [Edit(0, prune=(0,))])


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (Edit(3, prune=(0,)), "no L3: this model has L0 to L2"),
        (Edit(-1, prune=(0,)), "no L-1"),
        (Edit(0, prune=(3,)), "heads H0 to H2; an edit names H3"),
        (Edit(0, prune=(-1,)), "H-1"),
        (Edit(0, call=1, prune=(0,)), "makes 1 attention calls; there is no call 1"),
        (Edit(0, copy=1, prune=(0,)), "copy 1 of a run with 1 copies"),
    ],
)
def test_an_edit_of_what_is_not_there_is_refused_with_what_is(edit, says, opened, noise):
    vit = opened(VIT)
    with pytest.raises(UsageError, match=says):
        vit.tap().read(noise(vit), edits=[edit])
    assert torch._C._len_torch_function_stack() == 0


def edit_of(**given):
    """An edit of what a user may give; tests check types before a constructor is reached."""
    edit = Edit(0)
    vars(edit).update(given)
    edit.__post_init__()
    return edit


def test_heads_and_keys_are_named_by_numbers_of_any_kind_and_by_nothing_else():
    for numbers in ([0, 2], np.array([0, 2]), torch.tensor([0, 2]), (np.int64(0), np.int64(2))):
        edit = edit_of(prune=numbers, drop_keys=numbers)
        assert (edit.prune, edit.drop_keys) == ((0, 2), (0, 2))
    for numbers in (2, "02", (0.0, 2.0)):
        with pytest.raises(UsageError, match=r"prune .* has no meaning; give whole numbers"):
            edit_of(prune=numbers)


def test_layers_calls_and_copies_are_whole_numbers():
    for name in ("layer", "call", "copy"):
        with pytest.raises(UsageError, match=rf"{name} 0\.5 has no meaning; give a whole number"):
            edit_of(**{name: 0.5})


@torch.no_grad()
def test_a_bias_of_each_image_is_that_of_every_copy(opened, noise):
    vit = opened(VIT)
    images = noise(vit)
    replay, _ = vit.tap().record(images)
    bias = torch.randn((len(images), 3, 17, 17), generator=torch.Generator().manual_seed(0))
    copies = vit.tap().run_from(1, replay, [Edit(1, bias=bias), Edit(1, copy=0, prune=(0,))], copies=2)
    expected = vit.tap().read(images, edits=[Edit(1, bias=bias)])
    assert (copies.unflatten(0, (2, -1))[1] - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("shape", [(3, 3), (2, 17, 17), (17, 16), (5, 3, 17, 17)])
@pytest.mark.parametrize("name", ["bias", "region"])
def test_a_bias_or_region_that_does_not_fit_the_map_is_refused(name, shape, opened, noise):
    vit = opened(VIT)
    with pytest.raises(UsageError, match=rf"{name} of an edit of L1 is .* \[image head query key\]"):
        vit.tap().read(noise(vit), edits=[Edit(1, **{name: torch.ones(shape)})])


@pytest.mark.parametrize("key", [17, -1])
def test_a_dropped_key_that_is_not_there_is_refused(key, opened, noise):
    vit = opened(VIT)
    with pytest.raises(UsageError, match="L1 attends to tokens 0 to 16"):
        vit.tap().read(noise(vit), edits=[Edit(1, drop_keys=(3, key))])


@torch.no_grad()
def test_a_run_from_a_record_without_tokens_is_refused(opened, noise):
    vit = opened(VIT)
    replay, _ = vit.tap().record(noise(vit), keep=False)
    with pytest.raises(UsageError, match="keep=False"):
        vit.tap().run_from(1, replay)


@pytest.mark.parametrize("layer", [3, -1])
@torch.no_grad()
def test_a_run_from_a_layer_that_is_not_there_is_refused(layer, opened, noise):
    vit = opened(VIT)
    replay, _ = vit.tap().record(noise(vit))
    with pytest.raises(UsageError, match="L0 to L2"):
        vit.tap().run_from(layer, replay)


@pytest.mark.parametrize(
    ("name", "edit", "says"),
    [
        ("timm CaiT", Edit(0, bias=torch.zeros((16, 16))), "mixes its heads' maps"),
        ("timm CaiT", Edit(0, drop_keys=(1,)), "mixes its heads' maps"),
        ("timm Swin", Edit(0, bias=torch.zeros((49, 49))), "within windows"),
        ("timm Swin", Edit(0, drop_keys=(1,)), "within windows"),
        ("timm XCiT", Edit(0, region=torch.ones((12, 12))), "no token map"),
        ("timm XCiT", Edit(0, drop_keys=(1,)), "no token map"),
    ],
)
def test_edits_that_would_not_mean_what_they_say_are_refused(name, edit, says, opened, noise):
    vit = opened(name)
    with pytest.raises(Unsupported, match=says):
        vit.tap().read(noise(vit, 2), edits=[edit])


@torch.no_grad()
def test_a_map_between_channels_is_refused_and_its_heads_can_be_pruned(opened, noise):
    vit = opened("timm XCiT")
    images = noise(vit, 2)

    def read(attention):
        if attention.kind == "channel":
            with pytest.raises(Unsupported, match="between channels"):
                attention.weights()

    plain = vit.tap().read(images, Readers(attention=read))
    pruned = vit.tap().read(images, edits=[Edit(0, prune=(0,))])
    assert float((pruned - plain).abs().max()) > 1e-3
