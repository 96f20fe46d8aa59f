"""Models that take something else than one photograph of three channels: opened, or refused with the true reason."""

import copy
import warnings

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from torch import nn

import vitrail
from vitrail.analysis import unavailable
from vitrail.contract.check import check_vit
from vitrail.errors import Unsupported, UsageError
from vitrail.models.open import open_vit
from vitrail.tap.attention import Readers
from vitrail.tap.clone import image_channels
from vitrail.tap.edits import Edit
from vitrail.tokens.levels import require_one_grid

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
GENERATOR = torch.Generator().manual_seed(0)


def _timm(channels):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3, num_classes=7, in_chans=channels
        ).eval()


def test_a_model_of_grey_images_is_studied_on_the_brightness_of_photographs(tmp_path):
    model = _timm(1)
    with pytest.raises(UsageError, match=r"takes 1 channel, and timm's pretrained_cfg .* is of 3"):
        _ = open_vit(model).preprocessing
    vit = open_vit(model, mean=0.4, std=0.2, crop=1.0)
    assert (vit.n_channels, vit.preprocessing.mean) == (1, (0.4,))
    photograph = Image.radial_gradient("L").convert("RGB").resize((64, 64))
    expected = (torch.from_numpy(np.asarray(photograph.convert("L")).copy())[None, None] / 255 - 0.4) / 0.2
    torch.testing.assert_close(vit.prepare([photograph]), expected)
    assert check_vit(vit, quick=True).ok
    study = vitrail.run_study(vit, "photos", out=tmp_path / "s", limit=2, batch_size=2, measures="heads,patches,tokens")
    assert study.head_probability.notnull().all()
    assert vitrail.look(vit, photograph).head_probability.notnull().all()


def test_a_model_of_many_channels_is_studied_on_arrays(tmp_path):
    model = _timm(5)
    vit = open_vit(model, mean=[0.1, 0.2, 0.3, 0.4, 0.5], std=[0.3] * 5, crop=1.0)
    assert check_vit(vit, quick=True).ok
    arrays = torch.rand((2, 64, 64, 5), generator=GENERATOR)
    (tmp_path / "images").mkdir()
    for index, array in enumerate(arrays):
        np.save(tmp_path / "images" / f"{index}.npy", array.numpy())
    study = vitrail.run_study(vit, tmp_path / "images", out=tmp_path / "s", measures="heads", batch_size=2)
    images = (arrays.permute(0, 3, 1, 2) - torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).view(-1, 1, 1)) / 0.3
    with torch.no_grad():
        probabilities = model(images).softmax(-1)
        np.testing.assert_allclose(study.top_probability[:, 0], probabilities.amax(1), rtol=1e-5)
        label = probabilities.argmax(1)
        model.blocks[1].attn.proj.weight[:, 16:32] = 0  # L1H1
        without = model(images).softmax(-1).gather(1, label[:, None])[:, 0]
    np.testing.assert_allclose(study.head_probability[:, 1, 1], without, atol=1e-6)
    with pytest.raises(UsageError, match="takes images of 5 channels and photographs have 3"):
        vit.prepare([Image.new("RGB", (64, 64))])
    with pytest.raises(UsageError, match="mean has 3 numbers and this model's images 5 channels"):
        open_vit(model, mean=[0.5] * 3, std=[0.5] * 5)


def test_a_first_convolution_that_reads_features_does_not_count_the_channels_of_images():
    assert image_channels(nn.Sequential(nn.Conv2d(64, 8, 3), nn.Conv2d(8, 8, 3))) == 3
    assert image_channels(nn.Sequential(nn.Linear(9, 9), nn.Conv2d(12, 8, 3))) == 12


class _Volumes(nn.Module):
    """A ViT of volumes, as MONAI's with spatial_dims=3."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv3d(1, 48, 16, 16)
        self.layer = nn.TransformerEncoderLayer(48, 3, 96, batch_first=True)

    def forward(self, volumes):
        return self.layer(self.patches(volumes).flatten(2).mT).mean(1)


def test_volumes_and_frames_are_refused_as_such():
    with pytest.raises(Unsupported, match=r"takes volumes or several frames .its patches is a convolution in three"):
        open_vit(_Volumes(), image_size=32)
    config = transformers.TimesformerConfig(**SMALL, image_size=64, patch_size=16, num_frames=4, num_labels=5)
    with pytest.raises(Unsupported, match=r"takes volumes or several frames .its configuration states num_frames"):
        open_vit(transformers.TimesformerForVideoClassification(config), image_size=64)


class _Siamese(nn.Module):
    def __init__(self, *, stacked):
        super().__init__()
        self.encoder, self.stacked = _timm(3), stacked
        self.head = nn.Linear(14, 2)
        self.register_buffer("reference", torch.randn((1, 3, 64, 64), generator=GENERATOR))

    def forward(self, images):
        reference = self.reference.expand(len(images), -1, -1, -1)
        if self.stacked:
            features = torch.cat(self.encoder(torch.cat([images, reference])).chunk(2), 1)
        else:
            features = torch.cat([self.encoder(images), self.encoder(reference)], 1)
        return self.head(features)


def test_two_pictures_stacked_on_the_batch_are_refused_and_one_after_the_other_are_read():
    with pytest.raises(Unsupported, match="stacks several pictures on the batch, as siamese models do"):
        open_vit(_Siamese(stacked=True).eval(), image_size=64, weights="random")
    model = _Siamese(stacked=False).eval()
    vit = open_vit(model, image_size=64, weights="random")
    runs = [(f"encoder.blocks.{block}", run) for run in (0, 1) for block in (0, 1)]
    assert [(block.path, block.run) for block in vit.anatomy.blocks] == runs
    assert [block.fed for block in vit.anatomy.blocks] == [False, True, False, True]
    assert [note.partition(":")[0] for note in vit.anatomy.notes] == ["L2 does not work on what the layer before gives"]
    assert require_one_grid(vit.anatomy, 2) == (4, 4)
    with pytest.raises(Unsupported, match="L2 does not work on what L1 gives"):
        require_one_grid(vit.anatomy)
    assert "L2 does not work on what L1 gives" in unavailable(vit, ["occlusion_drift"])["occlusion_drift"]
    images = torch.randn((2, 3, 64, 64), generator=GENERATOR)
    with torch.no_grad():
        torch.testing.assert_close(vit.tap().read(images), model(images))
    model.forward = lambda first, second: model.head(torch.cat([model.encoder(first), model.encoder(second)], 1))
    with pytest.raises(Unsupported, match="forward takes first and second, and Vitrail opens models of one image"):
        open_vit(model, image_size=64)


def test_siglip_of_any_shape_is_given_its_patches():
    config = transformers.Siglip2VisionConfig(**SMALL, num_patches=16, patch_size=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Siglip2VisionModel(config).eval()
    images = torch.randn((2, 3, 48, 80), generator=GENERATOR)
    vit = open_vit(model, image_size=(48, 80), weights="random")
    assert [(block.prefix, block.grid) for block in vit.anatomy.blocks] == [(0, (3, 5))] * 2
    patches = torch.stack(
        [
            torch.stack(
                [image[:, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16].permute(1, 2, 0).flatten() for c in range(5)]
            )
            for image in images
            for r in range(3)
        ]
    ).view(2, 15, -1)
    with torch.no_grad():
        expected = model(
            pixel_values=patches, pixel_attention_mask=torch.ones(2, 15), spatial_shapes=torch.tensor([[3, 5]] * 2)
        )
    tokens = {}
    torch.testing.assert_close(vit.tap().read(images, Readers(output=tokens.__setitem__)), expected.pooler_output)
    assert tokens[1].shape == (2, 15, 48)


def test_the_image_tower_of_a_language_model_is_named_and_opens():
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SMALL, image_size=64, patch_size=16),
        text_config=transformers.LlamaConfig(**text, vocab_size=100),
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with pytest.raises(Unsupported, match=r"Open its image tower alone: open_vit\(model.model.vision_tower\)"):
        open_vit(model, image_size=64)
    vit = open_vit(model.model.vision_tower, weights="random")
    assert [(block.prefix, block.grid) for block in vit.anatomy.blocks] == [(1, (4, 4))] * 2


class _IntegerLinear(nn.Module):
    """As bitsandbytes and torchao store weights: integers, and a scale for each row."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale.detach())
        self.bias = linear.bias

    def forward(self, tokens):
        return nn.functional.linear(tokens, self.weight * self.scale, self.bias)


def test_integer_weights_are_read_and_quantised_activations_are_refused():
    model = _timm(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch asks to quantise by torchao
        dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(Unsupported, match=r"blocks.0.attn.qkv is a Linear with quantised activations"):
        open_vit(dynamic)
    for block in model.blocks:
        block.attn.qkv, block.attn.proj = _IntegerLinear(block.attn.qkv), _IntegerLinear(block.attn.proj)
    vit = open_vit(model)
    images = torch.randn((2, 3, 64, 64), generator=GENERATOR)
    without = vit.tap().read(images, edits=[Edit(1, prune=(2,))])
    assert len(vit.weight_digest) == 64
    with torch.no_grad():
        torch.testing.assert_close(vit.tap().read(images), model(images))
        model.blocks[1].attn.proj.weight[:, 32:] = 0
        torch.testing.assert_close(without, model(images))
