"""The frozen path: a model held still is a linear map, so a view through it accounts for every neuron whole."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from numpy.testing import assert_allclose
from token_models import small_images, small_vit
from torch import Tensor, nn

from vitrail import Readers, open_vit
from vitrail.errors import Unsupported, UsageError
from vitrail.tap.frozen import Frozen
from vitrail.tokens.levels import read_levels
from vitrail.tokens.lrp import layerwise_relevance
from vitrail.tokens.views import faithful_view


def tokens_through(vit, images, level, around):
    kept = []
    with around:
        vit.tap().read(
            images, Readers(output=lambda layer, tokens: kept.append(tokens) if layer == level - 1 else None)
        )
    return kept[0]


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("token", [0, 6])
def test_a_frozen_view_accounts_for_a_neuron_at_every_level(vit, images, level, token):
    found = faithful_view(vit, images[:1], level, token, 30, path="frozen")
    assert found.missing < 1e-4
    value = read_levels(vit.tap(), images[:1]).tokens[level][0, token, 30]
    assert_allclose(found.change + found.bias, float(value), rtol=1e-4, atol=1e-5)
    assert_allclose(float(found.pixels.double().sum()) + found.bias, float(value), rtol=1e-3, atol=1e-4)


def test_what_is_held_still_is_linear_in_the_pixels(vit, images):
    frozen = Frozen()
    recorded = tokens_through(vit, images[:1], 3, frozen)
    mixed = 0.3 * images[:1] - 1.7 * images[1:2]
    first, other, both, nothing = (
        tokens_through(vit, each, 3, frozen.replay())
        for each in (images[:1], images[1:2], mixed, torch.zeros_like(mixed))
    )
    assert_allclose(first.detach(), recorded.detach(), atol=1e-5)
    expected = nothing + 0.3 * (first - nothing) - 1.7 * (other - nothing)
    assert_allclose(both.detach(), expected.detach(), rtol=1e-3, atol=1e-4)


def test_recording_changes_no_value_and_leaves_nothing_behind(vit, images):
    plain = read_levels(vit.tap(), images[:1]).tokens[3]
    recorded = tokens_through(vit, images[:1], 3, Frozen())
    assert_allclose(recorded.detach(), plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(read_levels(vit.tap(), images[:1]).tokens[3], plain)


def test_attention_does_not_turn_with_the_pixels_on_the_frozen_path(vit, images):
    """By hand for one block: weights, statistics and gains are numbers taken from the image."""
    model, image = vit.model, images[:1].clone().requires_grad_(True)
    block = model.blocks[0]
    z = model._pos_embed(model.patch_embed(image))

    def held(norm, x):
        centred = x - x.mean(-1, keepdim=True)
        rate = (centred.detach().square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        return centred * rate * norm.weight + norm.bias

    q, k, v = block.attn.qkv(held(block.norm1, z)).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    weights = ((q @ k.mT) * 16**-0.5).softmax(-1).detach()
    z = z + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    inner = block.mlp.fc1(held(block.norm2, z))
    gain = (nn.functional.gelu(inner) / inner).detach()
    z = z + block.mlp.fc2(inner * gain)
    (expected,) = torch.autograd.grad(z[0, 6, 30], image)
    found = faithful_view(vit, images[:1], 1, 6, 30, path="frozen")
    assert_allclose(found.pixels, (expected * image)[0].detach(), rtol=1e-3, atol=1e-5)


def of_timm(name, **options):
    shape = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 4}
    return timm.create_model(name, **{**shape, **options})


def of_swin():
    shape = {"img_size": 32, "window_size": 2, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 3), "num_classes": 4}
    return timm.create_model("swin_tiny_patch4_window7_224", **shape)


def of_torchvision():
    import torchvision

    return torchvision.models.VisionTransformer(32, 8, 2, 3, 48, 96, num_classes=4)


def of_transformers():
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **shape))


MODELS = {
    "gated MLP, rotary positions": lambda: of_timm("eva02_tiny_patch14_224"),
    "layer scale, registers": lambda: of_timm("vit_small_patch14_reg4_dinov2"),
    "relative bias": lambda: of_timm("beit_base_patch16_224"),
    "windows": of_swin,
    "nn.MultiheadAttention": of_torchvision,
    "transformers": of_transformers,
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_frozen_path_is_complete_whatever_library_the_model_is_from(kind):
    torch.manual_seed(0)
    vit, image = open_vit(MODELS[kind]().eval(), image_size=(32, 32)), small_images(1, (32, 32))
    found = faithful_view(vit, image, 2, 3, 7, path="frozen")
    assert found.missing < 1e-3
    assert float(found.pixels.abs().sum()) > 0


class ByName(nn.Module):
    """Gives operands by name: an activation, a product and a quotient."""

    def forward(self, x):
        active = F.gelu(input=x)
        return torch.div(input=torch.mul(other=active, input=x), other=1 + x.abs())


def test_operands_that_are_given_by_name_are_held_still_too():
    vit = small_vit()
    vit.model.blocks[0].mlp.act = ByName()
    found = faithful_view(vit, small_images(1), 1, 6, 30, path="frozen")
    assert found.missing < 1e-3


class InGroups(nn.Module):
    """A norm over groups of channels and all tokens, with a weight and a bias of its own."""

    def __init__(self, n_channels):
        super().__init__()
        self.norm = nn.GroupNorm(4, n_channels)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        return self.norm(x.mT).mT


def test_statistics_of_a_group_norm_are_held_still_too():
    vit = small_vit()
    vit.model.blocks[0].mlp.act = InGroups(vit.model.blocks[0].mlp.fc1.out_features)
    image = small_images(1)
    plain = read_levels(vit.tap(), image).tokens[1]
    recorded = tokens_through(vit, image, 1, Frozen())
    assert_allclose(recorded.detach(), plain, rtol=1e-4, atol=1e-4)
    assert faithful_view(vit, image, 1, 6, 30, path="frozen").missing < 1e-3


class Of(nn.Module):
    """A function in a module's place."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def frozen_view_with(function):
    """A frozen view of the same model and image with a function for the activation of its first block."""
    vit, image = small_vit(), small_images(1)
    vit.model.blocks[0].mlp.act = Of(function)
    plain = read_levels(vit.tap(), image).tokens[1]
    recorded = tokens_through(vit, image, 1, Frozen())
    assert_allclose(recorded.detach(), plain, rtol=1e-4, atol=1e-4)
    view = faithful_view(vit, image, 1, 6, 30, path="frozen")
    assert view.missing < 1e-3
    return view.pixels


def in_place(function, *others):
    """The same as a statement: what it returns is not used."""

    def call(x):
        y = x.clone()
        function(y, *(other(x) for other in others))
        return y

    return call


SAME = {
    "relu in place": (F.relu, in_place(F.relu_)),
    "relu by its argument": (F.relu, in_place(lambda y: F.relu(y, inplace=True))),
    "product in place": (lambda x: x * x.roll(1, -1), in_place(Tensor.mul_, lambda x: x.roll(1, -1))),
    "square by power": (lambda x: F.relu(x) * F.relu(x), lambda x: F.relu(x) ** 2),
    "square": (lambda x: F.relu(x) * F.relu(x), lambda x: torch.square(F.relu(x))),
    "power by name": (lambda x: x * x * x, lambda x: torch.pow(input=x, exponent=3)),
    "relu6": (lambda x: F.hardtanh(x, 0.0, 6.0), F.relu6),
    "unit length": (lambda x: x / x.norm(dim=-1, keepdim=True), lambda x: F.normalize(x, dim=-1)),
    "cosine": (
        lambda x: (F.normalize(x, dim=-1) * F.normalize(x.roll(1, 1), dim=-1)).sum(-1, keepdim=True).expand_as(x),
        lambda x: F.cosine_similarity(x, x.roll(1, 1), dim=-1)[..., None].expand_as(x),
    ),
    "layer norm": (lambda x: F.layer_norm(x, x.shape[-1:]), lambda x: torch.layer_norm(x, x.shape[-1:])),
    "group norm": (lambda x: F.group_norm(x.mT, 4).mT, lambda x: torch.group_norm(x.mT, 4).mT),
    "instance norm": (lambda x: F.group_norm(x.mT, x.shape[-1]).mT, lambda x: F.instance_norm(x.mT).mT),
    "mean square by power": (
        lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6),
        lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).pow(-0.5),
    ),
}


@pytest.mark.parametrize("kind", SAME)
def test_what_is_the_same_is_held_still_alike(kind):
    one, other = (frozen_view_with(function) for function in SAME[kind])
    assert_allclose(other, one, rtol=1e-3, atol=1e-6)


def test_a_gain_computed_of_a_trained_parameter_is_no_signal():
    """1 + 0 changes nothing, whether it is trained or not."""
    vit, image = small_vit(), small_images(1)
    expected = faithful_view(vit, image, 1, 6, 30, path="frozen").pixels
    mlp = vit.model.blocks[0].mlp
    mlp.gain = nn.Parameter(torch.zeros(1))
    mlp.act = Of(lambda x: F.gelu(x) * (1 + mlp.gain))
    assert_allclose(faithful_view(vit, image, 1, 6, 30, path="frozen").pixels, expected, rtol=1e-4, atol=1e-7)
    assert mlp.gain.requires_grad


class InFloat32(nn.Module):
    """A layer norm whose weights stay in float32 when the model is cast."""

    def __init__(self, norm):
        super().__init__()
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weights = (norm.weight.detach().clone(), norm.bias.detach().clone())

    def forward(self, x):
        return F.layer_norm(x, self.shape, *self.weights, self.eps)


def test_norms_with_weights_in_float32_take_images_in_half_precision():
    vit, image = small_vit(), small_images(1)
    expected = layerwise_relevance(vit, image, np.array([2]))
    for block in vit.model.blocks:
        block.norm1, block.norm2 = InFloat32(block.norm1), InFloat32(block.norm2)
    half = open_vit(vit.model, preprocessing=vit.preprocessing, precision="bfloat16")
    found = layerwise_relevance(half, image.bfloat16(), np.array([2]))
    assert float((found - expected).abs().max()) < 0.1 * float(expected.abs().max())


class Largest(nn.Module):
    """Of each channel and its neighbour the larger: not linear, and nothing that is held still."""

    def forward(self, x):
        return torch.maximum(x, x.roll(1, -1))


def test_what_is_not_linear_even_when_held_still_is_refused():
    vit = small_vit()
    vit.model.blocks[0].mlp.act = Largest()
    broken = open_vit(vit.model, image_size=(32, 64))
    with pytest.raises(Unsupported, match="path='gradient'"):
        faithful_view(broken, small_images(1), 2, 6, 30, path="frozen")


def test_a_path_that_is_not_there_and_steps_on_a_frozen_one_are_refused(vit, images):
    with pytest.raises(UsageError, match="choose gradient"):
        faithful_view(vit, images[:1], 1, 6, 30, path="straight")
    with pytest.raises(UsageError, match="frozen with one step"):
        faithful_view(vit, images[:1], 1, 6, 30, 4, path="frozen")


def test_a_frozen_rms_norm_uses_the_epsilon_that_it_is_given():
    """Small values, so that epsilon counts; both as `nn.RMSNorm` calls it and with the default of the dtype."""
    x, weight = torch.tensor([[0.01, -0.02, 0.03, 0.02]]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    for eps, args in ((1e-2, (weight, 1e-2)), (torch.finfo(torch.float32).eps, (weight,))):
        with Frozen():
            normed = F.rms_norm(x, (4,), *args)
        expected = x / (x.pow(2).mean() + eps).sqrt() * weight
        assert_allclose(normed.numpy(), expected.numpy(), rtol=1e-5)


def test_in_bfloat16_what_is_linear_is_let_pass_by_its_rounding_and_what_is_not_is_refused():
    vit, image = small_vit(), small_images(1)
    half = open_vit(vit.model.bfloat16(), preprocessing=vit.preprocessing, precision="bfloat16")
    missing = [
        faithful_view(half, image.bfloat16(), level, 6, channel, path="frozen").missing
        for level in (1, 2, 3)
        for channel in range(0, 48, 6)
    ]
    assert max(missing) > 1e-2  # more than is let pass in float32
    half.model.blocks[0].mlp.act = Largest()
    broken = open_vit(half.model, preprocessing=vit.preprocessing, precision="bfloat16")
    with pytest.raises(Unsupported, match="path='gradient'"):
        faithful_view(broken, image.bfloat16(), 2, 6, 30, path="frozen")
