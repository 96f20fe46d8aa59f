"""From a photograph to the model's input, against the libraries' own pipelines."""

import io
import json
from dataclasses import replace
from functools import cache

import numpy as np
import pandas
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitrail.data import as_photograph, decode_image
from vitrail.data.channels import channels_of
from vitrail.errors import BadImage, ModelError, UsageError
from vitrail.models.open import open_vit
from vitrail.models.preprocessing import Preprocessing, override, photographs_of, read_sides
from vitrail.models.processors import read_preprocessing, timm_preprocessing
from vitrail.models.sources import Request, load_model

HALF = (0.5, 0.5, 0.5)
RANDOM = np.random.default_rng(0)
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CENTRED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
SIZES = {
    "portrait": (250, 412),
    "landscape": (451, 300),
    "square": (333, 333),
    "small": (121, 90),
    "huge": (1601, 1203),
}
GREY_LEVEL = 1.001 / 255


@cache
def photograph(name: str) -> Image.Image:
    """Smooth areas, hard edges and fine texture, of a size of `SIZES`."""
    width, height = SIZES[name]
    rng = np.random.default_rng(len(name))
    row, column = np.mgrid[:height, :width] / 100
    smooth = np.stack([np.sin(3 * row + column), np.cos(2 * column - row), np.sin(row * column)], -1)
    edges = ((column * 4).astype(int) + (row * 3).astype(int)) % 2
    pixels = 90 * smooth + 50 * edges[..., None] + 110 + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def assert_within_one_grey_level(vit, pipeline) -> None:
    """`vit.prepare` is the library's own pipeline on each photograph, before normalisation."""
    std = torch.tensor(vit.preprocessing.std).view(3, 1, 1)
    for name in SIZES:
        expected = pipeline(photograph(name))
        ours = vit.prepare([photograph(name)])[0]
        assert ours.shape == expected.shape, name
        assert_allclose((ours * std).numpy(), (expected * std).numpy(), rtol=0, atol=GREY_LEVEL, err_msg=name)


# --- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_base_patch16_siglip_224", "vit_base_patch32_clip_224"],
)
def test_timms_own_transform_for_models_by_name(name):
    found = load_model(f"timm:{name}", Request(weights="random"))
    theirs = create_transform(**resolve_model_data_config(found.module), is_training=False)
    for each in SIZES:
        ours = found.preprocessing.tensor([photograph(each)])
        assert_allclose(ours[0].numpy(), theirs(photograph(each)).numpy(), atol=1e-6)
    assert found.preprocessing.source.startswith(f"timm's pretrained_cfg of {name}")


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(48, 80), (64, 64), (63, 63)])
@pytest.mark.parametrize("crop_pct", [0.9, 0.95, 1.0])
def test_timms_own_transform_for_every_crop_mode(mode, size, crop_pct):
    config = {
        "input_size": (3, *size), "interpolation": "bilinear", "crop_pct": crop_pct, "crop_mode": mode,
        "mean": (0.4, 0.3, 0.6), "std": (0.2, 0.3, 0.25),
    }  # fmt: skip
    theirs = create_transform(**config)
    ours = timm_preprocessing(config, "test")
    for name in SIZES:
        assert_allclose(ours.tensor([photograph(name)])[0].numpy(), theirs(photograph(name)).numpy(), atol=1e-6)


# --- transformers ----------------------------------------------------------------------------------------------------


def _saved(folder, kind, processor, **options):
    import transformers

    kind = getattr(transformers, kind)
    torch.manual_seed(0)
    kind(kind.config_class(**{**({} if "depths" in options else TINY), **options})).save_pretrained(folder)
    text = processor if isinstance(processor, str) else json.dumps(processor)
    (folder / "preprocessor_config.json").write_text(text)
    return folder


RESCALED = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
DINOV2 = {
    **RESCALED, **IMAGENET, "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "do_convert_rgb": True,
}  # fmt: skip
SWIN = {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2]}

PUBLISHED = {
    "ViT, one number": (
        ("ViTForImageClassification", {"image_size": 224}),
        {"do_normalize": True, "do_resize": True, **CENTRED, "size": 224, "resample": 2},
        (224, 224),
    ),
    "ViT at 384": (
        ("ViTForImageClassification", {"image_size": 384}),
        {**RESCALED, **CENTRED, "image_processor_type": "ViTImageProcessor", "resample": 2,
         "size": {"height": 384, "width": 384}},
        (384, 384),
    ),
    "ViT at 224 shown at 384": (
        ("ViTForImageClassification", {"image_size": 224}),
        {**RESCALED, **CENTRED, "image_processor_type": "ViTImageProcessor", "resample": 2,
         "size": {"height": 384, "width": 384}},
        (384, 384),
    ),
    "DINOv2": (("Dinov2Model", {"image_size": 518, "patch_size": 14}), DINOV2, (224, 224)),
    "DINOv2 with registers": (
        ("Dinov2WithRegistersModel", {"image_size": 518, "patch_size": 14}), DINOV2, (224, 224),
    ),
    "DINOv3": (
        ("DINOv3ViTModel", {"image_size": 224}),
        {**RESCALED, **IMAGENET, "image_processor_type": "DINOv3ViTImageProcessorFast", "resample": 2,
         "size": {"height": 224, "width": 224}, "default_to_square": True, "data_format": "channels_first"},
        (224, 224),
    ),
    "DeiT: squash, then crop": (
        ("DeiTForImageClassification", {"image_size": 224}),
        {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, **IMAGENET, "resample": 3,
         "feature_extractor_type": "DeiTFeatureExtractor", "size": 256},
        (224, 224),
    ),
    "BEiT": (
        ("BeitForImageClassification", {"image_size": 224}),
        {"crop_size": 224, "do_center_crop": False, "do_normalize": True, "do_resize": True, **CENTRED, "resample": 2,
         "feature_extractor_type": "BeitFeatureExtractor", "size": 224},
        (224, 224),
    ),
    "CLIP": (
        ("CLIPVisionModel", {"image_size": 224, "patch_size": 32}),
        {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, **CLIP, "resample": 3,
         "feature_extractor_type": "CLIPFeatureExtractor", "size": 224},
        (224, 224),
    ),
    "CLIP at 336": (
        ("CLIPVisionModel", {"image_size": 336, "patch_size": 14}),
        {**RESCALED, **CLIP, "crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "resample": 3,
         "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}},
        (336, 336),
    ),
    "SigLIP": (
        ("SiglipVisionModel", {"image_size": 224}),
        {**RESCALED, **CENTRED, "image_processor_type": "SiglipImageProcessor", "resample": 3,
         "size": {"height": 224, "width": 224}},
        (224, 224),
    ),
    "ViT-MAE": (
        ("ViTMAEModel", {"image_size": 224}),
        {"do_normalize": True, "do_resize": True, **IMAGENET, "resample": 2, "size": 224,
         "feature_extractor_type": "ViTFeatureExtractor"},
        (224, 224),
    ),
    "Swin": (
        ("SwinForImageClassification", {"image_size": 224, **SWIN}),
        {"do_normalize": True, "do_resize": True, **IMAGENET, "resample": 3, "size": 224,
         "feature_extractor_type": "ViTFeatureExtractor"},
        (224, 224),
    ),
    "ConvNeXt-style, cropped": (
        ("Dinov2Model", {"image_size": 224, "patch_size": 14}),
        {"crop_pct": 0.875, "do_normalize": True, "do_resize": True, **IMAGENET, "resample": 3, "size": 224,
         "feature_extractor_type": "ConvNextFeatureExtractor"},
        (224, 224),
    ),
    "ConvNeXt-style, warped": (
        ("Dinov2Model", {"image_size": 384, "patch_size": 16}),
        {"crop_pct": None, "do_normalize": True, "do_resize": True, **IMAGENET, "resample": 3, "size": 384,
         "feature_extractor_type": "ConvNextFeatureExtractor"},
        (384, 384),
    ),
    "not normalised": (
        ("ViTForImageClassification", {"image_size": 224}),
        {**RESCALED, **CENTRED, "image_processor_type": "ViTImageProcessor", "do_normalize": False, "resample": 3,
         "size": {"height": 224, "width": 224}},
        (224, 224),
    ),
    "not rescaled": (
        ("ViTForImageClassification", {"image_size": 224}),
        {**RESCALED, "image_mean": [120.0] * 3, "image_std": [60.0] * 3, "image_processor_type": "ViTImageProcessor",
         "do_rescale": False, "resample": 3, "size": {"height": 224, "width": 224}},
        (224, 224),
    ),
    "odd rest beside the crop": (
        ("Dinov2Model", {"image_size": 224, "patch_size": 14}),
        {**DINOV2, "size": {"shortest_edge": 259}},
        (224, 224),
    ),
    "not square": (
        ("Dinov2Model", {"image_size": 224, "patch_size": 14}),
        {**DINOV2, "crop_size": {"height": 224, "width": 168}},
        (224, 168),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_processor_that_transformers_users_get(name, tmp_path):
    import transformers

    (kind, options), processor, size = PUBLISHED[name]
    vit = open_vit(_saved(tmp_path, kind, processor, **options))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert vit.image_size == size
    assert vit.preprocessing.source == f"image processor of {tmp_path}"
    assert_within_one_grey_level(vit, lambda image: theirs(image, return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize("name", ["DINOv2", "DeiT: squash, then crop", "SigLIP", "odd rest beside the crop"])
def test_the_pillow_backend_of_a_processor(name, tmp_path):
    import transformers

    (kind, options), processor, _ = PUBLISHED[name]
    folder = _saved(tmp_path, kind, processor, **options)
    theirs = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    vit = open_vit(folder, preprocessing=theirs)
    assert (vit.preprocessing.resampler, theirs.backend) == ("pillow", "pil")
    assert_within_one_grey_level(vit, lambda image: theirs(image, return_tensors="pt")["pixel_values"][0])


def test_another_size_keeps_the_share_that_is_cropped(tmp_path):
    import transformers

    vit = open_vit(_saved(tmp_path, "Dinov2Model", DINOV2, image_size=518, patch_size=14), image_size=448)
    theirs = transformers.AutoImageProcessor.from_pretrained(
        tmp_path, size={"shortest_edge": 512}, crop_size={"height": 448, "width": 448}
    )
    assert_within_one_grey_level(vit, lambda image: theirs(image, return_tensors="pt")["pixel_values"][0])
    assert vit.anatomy.grid == (32, 32)


def test_a_crop_larger_than_the_resized_picture_is_refused(tmp_path):
    _saved(tmp_path, "Dinov2Model", {**DINOV2, "crop_size": 518}, image_size=518, patch_size=14)
    with pytest.raises(ModelError, match=r"crop of 518 x 518 pixels is larger than the picture.*256 x 256"):
        open_vit(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"image_processor_type": "NoSuchProcessor"}', json.dumps({**DINOV2, "image_mean": [0.5, 0.5]})],
)
def test_a_broken_processor_is_an_error_that_names_the_file(text, tmp_path):
    _saved(tmp_path, "Dinov2Model", text, image_size=224, patch_size=14)
    with pytest.raises(ModelError, match=r"preprocessor_config\.json is no usable image processor.*preprocessing="):
        open_vit(tmp_path)
    vit = open_vit(tmp_path, preprocessing=Preprocessing((224, 224), HALF, HALF))
    assert vit.preprocessing.mean == HALF


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"do_resize": False}, "does not resize"),
        ({"do_center_crop": False}, "crops nothing"),
        ({"size": {"longest_edge": 224}}, "resizes in a way that Vitrail cannot state"),
        ({"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": True}, "does more than resize"),
    ],
)
def test_a_processor_that_cannot_be_reproduced_is_unknown_with_the_reason(changes, reason, tmp_path):
    vit = open_vit(_saved(tmp_path, "Dinov2Model", {**DINOV2, **changes}, image_size=56, patch_size=14))
    assert reason in vit.preprocessing_source
    with pytest.raises(UsageError, match=reason):
        vit.prepare([photograph("small")])


# --- torchvision, open_clip ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_b_32", "swin_t", "swin_v2_t"])
def test_the_transforms_of_torchvisions_weights(name):
    from torchvision.models import get_model_weights

    vit = open_vit(f"tv:{name}", weights="random")
    assert_within_one_grey_level(vit, get_model_weights(name).DEFAULT.transforms())
    assert "torchvision" in vit.preprocessing.source


def test_a_module_of_torchvision_has_the_preprocessing_on_which_its_weights_agree():
    from torchvision import models

    swin = open_vit(models.swin_t())
    assert_within_one_grey_level(swin, models.Swin_T_Weights.DEFAULT.transforms())
    torch.manual_seed(0)
    vit = models.vit_b_16()
    with pytest.raises(UsageError, match=r"preprocessing=torchvision\.models\.ViT_B_16_Weights\.IMAGENET1K_V1"):
        _ = open_vit(vit).preprocessing
    transforms = models.ViT_B_16_Weights.IMAGENET1K_SWAG_LINEAR_V1.transforms()
    assert_within_one_grey_level(open_vit(vit, preprocessing=transforms), transforms)


@pytest.mark.parametrize("name", ["ViT-B-32/laion2b_s34b_b79k", "ViT-B-16-SigLIP/webli"])
def test_the_pipeline_of_open_clips_weights(name):
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    architecture, tag = name.split("/")
    stated = {key: value for key, value in open_clip.get_pretrained_cfg(architecture, tag).items() if value is not None}
    keys = ("mean", "std", "interpolation", "resize_mode")
    config = PreprocessCfg(size=224, **{key: stated[key] for key in keys if key in stated})
    vit = open_vit(f"openclip:{name}", weights="random")
    assert_within_one_grey_level(vit, image_transform_v2(config, is_train=False))
    assert vit.preprocessing.crop_mode == ("squash" if "SigLIP" in name else "center")


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [64, (48, 80)])
def test_the_pipeline_of_each_resize_mode_of_open_clip(mode, size):
    from dataclasses import asdict

    from open_clip.transform import PreprocessCfg, image_transform_v2

    from vitrail.models.processors import open_clip_preprocessing

    config = PreprocessCfg(size=size, interpolation="bilinear", resize_mode=mode, fill_color=9)
    theirs, ours = image_transform_v2(config, is_train=False), open_clip_preprocessing(asdict(config), "test")
    for name in SIZES:
        assert_allclose(ours.tensor([photograph(name)])[0].numpy(), theirs(photograph(name)).numpy(), atol=1e-6)


# --- modules of one's own --------------------------------------------------------------------------------------------


class _Wrapper(nn.Module):
    def __init__(self, model, before=None):
        super().__init__()
        self.net, self.before = model, before or nn.Identity()

    def forward(self, images):
        return self.net(self.before(images))


def _timm(name="deit_tiny_patch16_224"):
    import timm

    return timm.create_model(name, img_size=64, depth=2, num_classes=5).eval()


@pytest.mark.parametrize("wrap", [nn.DataParallel, _Wrapper, lambda model: _Wrapper(_Wrapper(model))])
def test_a_wrapper_has_the_preprocessing_and_the_size_of_the_model_inside(wrap):
    model = _timm()
    bare, vit = open_vit(model), open_vit(wrap(model))
    assert bare.preprocessing.mean == (0.485, 0.456, 0.406)
    assert vit.preprocessing == bare.preprocessing
    assert vit.image_size == (64, 64)
    assert "pretrained_cfg of deit_tiny_patch16_224" in vit.preprocessing_source
    assert vit.preprocessing_source in repr(vit)


def test_a_wrapper_that_changes_the_images_first_is_unknown():
    from torchvision.transforms import Normalize

    vit = open_vit(_Wrapper(_timm(), Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))))
    with pytest.raises(UsageError, match="_Wrapper changes the images before its net"):
        vit.prepare([photograph("small")])


def test_two_models_inside_must_agree():
    class Pair(nn.Module):
        def __init__(self, one, other):
            super().__init__()
            self.one, self.other = one, other

        def forward(self, images):
            return self.one(images) + self.other(images)

    same = open_vit(Pair(_timm(), _timm()))
    assert same.preprocessing == open_vit(_timm()).preprocessing
    with pytest.raises(UsageError, match="state different ones"):
        _ = open_vit(Pair(_timm(), _timm("vit_tiny_patch16_224"))).preprocessing


def test_a_transformers_module_finds_the_processor_beside_its_weights(tmp_path):
    import transformers

    _saved(tmp_path, "Dinov2Model", DINOV2, image_size=518, patch_size=14)
    model = transformers.Dinov2Model.from_pretrained(tmp_path)
    expected = open_vit(tmp_path).preprocessing
    for module in (model, _Wrapper(model)):
        vit = open_vit(module)
        assert vit.preprocessing == expected
        assert vit.image_size == (224, 224)


def test_what_nobody_states_is_refused_until_it_is_given(fresh):
    model = fresh("own module, list of pairs")
    vit = open_vit(model, image_size=64)
    assert "preprocessing: unknown" in repr(vit)
    for use in (lambda: vit.prepare([photograph("small")]), lambda: vit.view(photograph("small"))):
        with pytest.raises(UsageError, match=r"not known: _ListOfPairs states none.*mean=.*--mean, --std"):
            use()
    with pytest.raises(UsageError, match="not known"):
        _ = open_vit(model, image_size=64, mean=0.5).preprocessing
    given = open_vit(model, image_size=64, mean=0.4, std=(0.2, 0.3, 0.4), crop=0.875, interpolation="bilinear")
    config = {
        "input_size": (3, 64, 64), "interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center",
        "mean": (0.4,) * 3, "std": (0.2, 0.3, 0.4),
    }  # fmt: skip
    assert_within_one_grey_level(given, create_transform(**config))
    assert given.preprocessing_source == "given: mean, std, interpolation, crop"
    assert "assumed: bicubic" in open_vit(model, image_size=64, mean=0.5, std=0.5).preprocessing_source
    untrained = open_vit(model, image_size=64, weights="random")
    assert untrained.preprocessing.mean == HALF
    assert "assumed, as the weights are random" in untrained.preprocessing_source


def test_a_folder_without_a_processor_is_refused_unless_its_weights_are_random(tmp_path):
    folder = _saved(tmp_path, "ViTForImageClassification", {}, image_size=32)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match=r"has no preprocessor_config\.json"):
        open_vit(folder).prepare([photograph("small")])
    assert "assumed" in open_vit(folder, weights="random").preprocessing_source
    assert open_vit(folder, mean=0.5, std=0.5).prepare([photograph("small")]).shape == (1, 3, 32, 32)


def test_a_weights_file_for_a_module_is_refused(tmp_path):
    with pytest.raises(UsageError, match="load them into the module"):
        open_vit(_timm(), weights=tmp_path / "w.safetensors")


# --- the description itself ------------------------------------------------------------------------------------------


def test_what_is_given_stands_in_the_place_of_the_models_own():
    vit = open_vit(_timm(), mean=0.1, crop="squash:0.8")
    own = open_vit(_timm()).preprocessing
    assert vit.preprocessing == replace(own, mean=(0.1,) * 3, crop_mode="squash", crop_pct=0.8)
    assert vit.preprocessing_source == f"given: mean, crop; the rest: {own.source}"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"std": (0.5, 0.5)}, "give one number for each"),
        ({"std": 0.0}, "no std of 0"),
        ({"mean": float("nan")}, "give one number for each"),
        ({"crop": "circle"}, "crop 'circle' has no meaning"),
        ({"crop": 0.0}, "no meaning"),
        ({"crop": 1.5}, "larger than the picture"),
        ({"interpolation": "cubic"}, "no interpolation 'cubic'; choose from nearest"),
    ],
)
def test_values_without_meaning_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        override(Preprocessing((32, 32), HALF, HALF), **options)
    with pytest.raises(UsageError, match="takes a Preprocessing"):
        read_preprocessing("resize to 224")


def test_the_view_is_what_the_tensor_is_made_from():
    for resampler in ("pillow", "torchvision"):
        ours = Preprocessing((48, 80), HALF, (0.25,) * 3, resampler=resampler)
        view = ours.view(photograph("portrait"))
        assert view.size == (80, 48)
        pixels = ours.pixels(ours.normalize([view]))[0]
        assert_allclose(pixels.permute(1, 2, 0).numpy(), np.asarray(view) / 255, atol=1e-6)
        assert_array_equal(ours.normalize([view]).numpy(), ours.tensor([photograph("portrait")]).numpy())


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_photographs_of_other_colour_modes_are_seen_as_rgb(mode):
    ours = Preprocessing((32, 32), HALF, HALF)
    converted = photograph("small").convert(mode)
    assert_array_equal(ours.tensor([converted]).numpy(), ours.tensor([converted.convert("RGB")]).numpy())


def test_settings_are_plain_data_and_come_back_equal():
    ours = Preprocessing((48, 80), HALF, (0.25,) * 3, "bilinear", 0.9, "border", resize=(50, 90), source="a test")
    again = Preprocessing.from_dict(json.loads(json.dumps(ours.as_dict())))
    assert again == ours
    assert again.source == "a test"


def test_settings_of_earlier_studies_are_read():
    earlier = {
        "size": [60, 60], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9,
        "crop_mode": "center",
    }  # fmt: skip
    assert Preprocessing.from_dict(earlier) == Preprocessing((60, 60), HALF, HALF, "bicubic", 0.9, "center")
    with pytest.raises(UsageError, match="This is no preprocessing"):
        Preprocessing.from_dict({"size": [3, 3], "flavour": "sweet"})


@pytest.mark.parametrize("size", [0, -1, (0, 32)])
def test_a_size_without_pixels_is_refused(size):
    with pytest.raises(UsageError, match="has no meaning"):
        Preprocessing((1, 1), HALF, HALF).with_size(size)


@pytest.mark.parametrize("option", ["--mean", "--std"])
def test_numbers_on_the_command_line_are_read_or_refused(option):
    from typer.testing import CliRunner

    from vitrail.cli import app

    arguments = ["check", "timm:deit_tiny_patch16_224", "--weights", "random", option]
    refused = CliRunner().invoke(app, [*arguments, "grey"])
    assert isinstance(refused.exception, UsageError)
    assert f"{option} 'grey' has no meaning" in str(refused.exception)
    short = CliRunner().invoke(app, [*arguments, "0.4,0.5"])
    assert "give one number for each" in str(short.exception)


# --- what a notebook has at hand --------------------------------------------------------------------------------------


def _halves(first: int, second: int) -> Image.Image:
    """16 x 16 pixels of one grey on the left, of another on the right."""
    values = np.full((16, 16), first, np.uint8)
    values[:, 8:] = second
    return Image.fromarray(values)


def _encoded(image: Image.Image, suffix: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


def _half_clear(mode: str) -> Image.Image:
    image = _halves(0, 0).convert(mode)
    image.putalpha(_halves(255, 0))
    return image


PICTURES = {
    "16 bits": Image.fromarray(np.asarray(_halves(40, 200)).astype(np.uint16) * 257),
    "12 of 16 bits": Image.fromarray(np.asarray(_halves(40, 200)).astype(np.uint16) * 16),
    "grey with transparency": _half_clear("LA"),
    "colours with transparency": _half_clear("RGBA"),
    "palette": _halves(40, 200).convert("P"),
    "two values": _halves(0, 255).convert("1"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_shown_to_the_model_as_its_file_is(name):
    preprocessing = Preprocessing((16, 16), HALF, HALF, crop_mode="squash")
    expected = preprocessing.view(decode_image(_encoded(PICTURES[name], "PNG")))
    assert_array_equal(preprocessing.view(PICTURES[name]), expected)
    assert np.ptp(np.asarray(expected).astype(int)) > 100


def test_a_picture_is_turned_as_its_orientation_says():
    content = _encoded(photograph("small"), "JPEG", exif=_turned())
    with Image.open(io.BytesIO(content)) as opened:
        turned = as_photograph(opened)
    assert turned.size == photograph("small").size[::-1]
    assert_array_equal(turned, decode_image(content))


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_paths_bytes_arrays_and_tensors_are_photographs(tmp_path):
    picture = photograph("small")
    path, values = tmp_path / "small.png", np.asarray(picture)
    path.write_bytes(_encoded(picture, "PNG"))
    assert as_photograph(picture) is picture
    channels_first = torch.from_numpy(values.copy()).permute(2, 0, 1)
    for given in (str(path), path, path.read_bytes(), values, values / 255, channels_first, channels_first / 255):
        assert_array_equal(as_photograph(given), picture)
    half = channels_first.div(255).half().requires_grad_()
    assert_allclose(np.asarray(as_photograph(half)).astype(int), values.astype(int), atol=1)
    grey = values[..., 0]
    for given in (grey, grey[..., None], torch.from_numpy(grey.copy())[None]):
        assert_array_equal(np.asarray(as_photograph(given))[..., 1], grey)
    assert channels_of(as_photograph(RANDOM.random((6, 9, 5)))).shape == (6, 9, 5)
    preprocessing = Preprocessing((16, 16), HALF, HALF)
    assert_array_equal(preprocessing.tensor(values[None]), preprocessing.tensor([picture]))


@pytest.mark.parametrize(
    ("given", "refusal"),
    [
        (None, "NoneType is no photograph"),
        ([photograph("small")], "list is no photograph; give one picture"),
        (Image.fromarray(np.ones((8, 8), np.float32)), "32 bits, whose black and white are not defined"),
        (Image.fromarray(np.ones((8, 8), np.int32)), "32 bits, whose black and white are not defined"),
        (RANDOM.normal(size=(3, 8, 8)), "What is prepared already goes to vit.logits"),
        (np.ones((8, 8, 3), np.int64), "array of int64 from 1 to 1 is no photograph"),
        (np.zeros((2, 3, 8, 8), np.uint8), "an image is"),
        (np.zeros((0, 8, 3), np.uint8), "an image is"),
        (np.array([["a", "b"], ["c", "d"]]), "array of <U1 with shape"),
        (np.array([[None, 1], [2, 3]], dtype=object), "array of object with shape"),
        (np.zeros((4, 4), "datetime64[s]"), "is no photograph"),
        (np.ones((8, 8), complex), "array of complex128 with shape"),
        (np.ones((8, 8), bool), "array of bool with shape"),
        (np.array(["a.jpg", "b.jpg"]), "Paths are given one by one, or in a list"),
        (torch.rand((3, 8, 8), device="meta"), "A Tensor could not be read as an array"),
        (torch.rand(8, 8).to_sparse(), "A Tensor could not be read as an array"),
        ("nowhere.png", "nowhere.png: there is no such file"),
        (b"text", "not an image in a format that is read here"),
    ],
)
def test_what_is_no_photograph_is_refused_in_a_sentence(given, refusal):
    with pytest.raises((UsageError, BadImage), match=refusal):
        as_photograph(given)


def _animation() -> bytes:
    frames = [Image.new("L", (8, 8), value) for value in (0, 120, 240)]
    return _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def _closed(content: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(content))
    picture.close()
    return picture


@pytest.mark.parametrize(
    ("picture", "refusal"),
    [
        (lambda content: Image.open(io.BytesIO(content[: len(content) // 2])), "broken or truncated"),
        (_closed, "broken or truncated"),
        (lambda content: Image.open(io.BytesIO(_animation())), "animated or has several pages"),
        (lambda content: Image.new("La", (8, 8)), "broken or truncated: conversion from La"),
        (lambda content: Image.new("RGB", (0, 8)), "0 columns and 8 rows"),
    ],
)
def test_a_picture_that_is_broken_or_has_several_frames_is_refused_as_its_file_is(picture, refusal):
    picture = picture(_encoded(photograph("small"), "JPEG"))
    with pytest.raises(BadImage, match=refusal):
        as_photograph(picture)


def test_a_jpeg_that_carries_further_pictures_is_its_first():
    first, second = photograph("small"), Image.new("RGB", (8, 8))
    content = _encoded(first, "MPO", save_all=True, append_images=[second])
    assert_array_equal(as_photograph(Image.open(io.BytesIO(content))), decode_image(content))


def test_one_photograph_is_a_batch_of_one_and_none_is_refused():
    preprocessing, picture = Preprocessing((16, 16), HALF, HALF), photograph("small")
    expected = preprocessing.tensor([picture])
    for given in (picture, np.asarray(picture), torch.from_numpy(np.array(picture)), [np.asarray(picture)]):
        assert_array_equal(preprocessing.tensor(given), expected)
    content = _encoded(picture, "PNG")
    for given in (bytearray(content), memoryview(content), [bytearray(content)]):
        assert_array_equal(preprocessing.tensor(given), expected)
    with pytest.raises(UsageError, match="give one or more"):
        preprocessing.tensor([])
    for given in (None, 5, np.array("a.jpg")):
        with pytest.raises(UsageError, match="no photograph and holds none"):
            photographs_of(given)  # tests check types before it is reached


def test_a_column_of_paths_holds_several_photographs(tmp_path):
    preprocessing, paths = Preprocessing((16, 16), HALF, HALF), [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        path.write_bytes(_encoded(photograph("small"), "PNG"))
    expected = preprocessing.tensor(paths)
    for column in (np.array([*map(str, paths)]), pandas.Series([*map(str, paths)])):
        assert_array_equal(preprocessing.tensor(column), expected)


def test_numbers_of_numpy_and_torch_become_those_of_python():
    plain = Preprocessing((16, 24), (0.25, 0.5, 0.5), HALF, crop_pct=0.5, resize=(32, 48), fill=(1, 2, 3))
    of_libraries = replace(plain)
    vars(of_libraries).update(  # tests check types before a constructor is reached
        size=np.array([16, 24]),
        mean=torch.tensor([0.25, 0.5, 0.5]),
        std=np.float32(HALF),
        crop_pct=np.float32(0.5),
        resize=tuple(np.int64([32, 48])),
        fill=np.uint8([1, 2, 3]),
    )
    of_libraries.__post_init__()
    assert json.dumps(of_libraries.as_dict()) == json.dumps(plain.as_dict())
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=np.int64(5))
    given = {"image_size": np.int64(32), "mean": np.float32(0.5), "std": np.float32(HALF), "n_classes": np.int64(5)}
    vit = open_vit(model, **given)
    assert (vit.image_size, vit.preprocessing.mean, vit.preprocessing.std) == ((32, 32), HALF, HALF)
    assert type(vit.n_classes) is int
    assert open_vit(model, image_size=32, mean=iter(HALF), std=(0.5 for _ in range(3))).preprocessing.std == HALF
    with pytest.raises(UsageError, match=r"image size 64\.5 has no meaning; give a whole number"):
        read_sides(64.5)
    with pytest.raises(UsageError, match=r"give 2 whole numbers"):
        read_sides((1, 2, 3))


def test_the_argument_that_is_wrong_is_named_and_whole_numbers_may_have_a_point():
    plain = Preprocessing((32, 32), HALF, HALF, resize=(40, 40))

    def with_settings(**settings):
        other = replace(plain)
        vars(other).update(settings)  # tests check types before a constructor is reached
        other.__post_init__()
        return other

    for name, value in (("resize", (1, 2, 3)), ("size", (32,)), ("fill", (0.5, 0, 0))):
        with pytest.raises(UsageError, match=f"^{name} "):
            with_settings(**{name: value})
    with pytest.raises(UsageError, match="size to resize to of 0 x 40 pixels"):
        with_settings(resize=(0, 40))
    pointed = with_settings(size=(32.0, 32.0), resize=(40.0, 40.0), fill=(0.0, 0.0, 0.0))
    assert json.dumps(pointed.as_dict()) == json.dumps(plain.as_dict())
