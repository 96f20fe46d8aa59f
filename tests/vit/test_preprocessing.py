"""From a photograph to the model's input, against the libraries' own transforms."""

import json

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from vitrail.errors import UsageError
from vitrail.vit.open import open_vit
from vitrail.vit.preprocessing import Preprocessing
from vitrail.vit.sources import Request, find


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (150, 211, 3), dtype=np.uint8)).resize((211, 150))


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_base_patch16_siglip_224", "vit_base_patch32_clip_224"],
)
def test_tensors_equal_timms_own_transform(name, photograph):
    found = find(f"timm:{name}", Request(weights="random"))
    theirs = create_transform(**resolve_model_data_config(found.module), is_training=False)
    ours = found.preprocessing.tensor([photograph])
    assert ours.shape == (1, 3, *found.preprocessing.size)
    assert_allclose(ours[0].numpy(), theirs(photograph).numpy(), atol=1e-6)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(48, 80), (64, 64)])
def test_crop_modes_equal_timms_for_square_and_other_sizes(mode, size, photograph):
    theirs = create_transform((3, *size), interpolation="bicubic", crop_pct=0.9, crop_mode=mode)
    ours = Preprocessing(size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.9, mode)
    assert_allclose(ours.tensor([photograph])[0].numpy(), theirs(photograph).numpy(), atol=1e-6)


def test_the_view_is_what_the_tensor_was_made_from(photograph):
    ours = Preprocessing((48, 80), (0.5,) * 3, (0.25,) * 3)
    view = ours.view(photograph)
    assert view.size == (80, 48)
    pixels = ours.pixels(ours.tensor([photograph]))[0]
    assert_allclose(pixels.permute(1, 2, 0).numpy(), np.asarray(view) / 255, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_photographs_of_other_colour_modes_are_seen_as_rgb(mode, photograph):
    ours = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3)
    converted = photograph.convert(mode)
    assert_array_equal(ours.tensor([converted]).numpy(), ours.tensor([converted.convert("RGB")]).numpy())


def test_settings_are_plain_data_and_come_back_equal():
    ours = Preprocessing((48, 80), (0.5,) * 3, (0.25,) * 3, "bilinear", 0.9, "border")
    read = json.loads(json.dumps(ours.as_dict()))
    again = Preprocessing(tuple(read.pop("size")), tuple(read.pop("mean")), tuple(read.pop("std")), **read)
    assert again == ours


@pytest.mark.parametrize("size", [0, -1, (0, 32)])
def test_a_size_without_pixels_is_refused(size):
    with pytest.raises(UsageError, match="has no meaning"):
        Preprocessing((1, 1), (0.5,) * 3, (0.5,) * 3).resized(size)


def test_the_settings_of_a_transformers_processor_are_taken_over(tmp_path, photograph):
    import transformers

    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=64
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    settings = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 64, "width": 64},
        "resample": 2, "do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6],
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    vit = open_vit(tmp_path)
    expected = Preprocessing((64, 64), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 1.0, "squash")
    assert vit.preprocessing == expected
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(photograph, return_tensors="pt")["pixel_values"]
    assert float((vit.prepare([photograph]) - theirs).abs().max()) < 0.05  # one grey level, from another resampler
    assert isinstance(theirs, torch.Tensor)
