"""The families of the contract suite: a name, how a tiny random model of it is made, and at which image size."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from vitrail.contract.tiny_models.from_timm import STAGES, mvitv2, nest, shallow, timm_model, token_merging
from vitrail.contract.tiny_models.from_transformers import (
    bert,
    mae_on_every_patch,
    pvt,
    transformers_model,
    transformers_swin,
    yolos,
)
from vitrail.contract.tiny_models.other_models import (
    encoder_module,
    list_of_pairs,
    open_clip_tower,
    torchvision_resnet,
    torchvision_swin,
    torchvision_vit,
)

__all__ = ["FAMILIES", "Family"]


_NEAR_ZERO = 1e-3
"""Weights below this are taken to be switched off at the start of training (zeros, LayerScale of 1e-5)."""


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: What the support page calls it.
        make: Makes a tiny model of it with random weights.
        image_size: Pixels, one number or (rows, columns).
        refused: Name of the error that opening it must raise, for models that are no vision transformers.
    """

    name: str
    make: Callable[[], nn.Module]
    image_size: int | tuple[int, int] = 64
    refused: str | None = None

    def model(self) -> nn.Module:
        """Makes the tiny model in evaluation mode: the same weights each time, none of them without effect.

        Returns:
            The model in evaluation mode.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _fill_weights(self.make()).eval()


@torch.no_grad()
def _fill_weights(model: nn.Module) -> nn.Module:
    """Weights that new models start at zero (classifiers, layer scales, position tables) get values, so edits show."""
    for name, weight in model.named_parameters():
        if not weight.is_floating_point():
            continue
        small = float(weight.abs().max()) < _NEAR_ZERO if weight.numel() else False
        if name.endswith("weight") and weight.ndim >= 2:
            weight.normal_(0, 1.5 * weight[0].numel() ** -0.5)
        elif small and weight.ndim == 1 and "bias" not in name:
            weight.uniform_(0.5, 1)
        elif small:
            weight.normal_(0, 0.2)
    return model


def _timm(name: str, model: str, size: int | tuple[int, int] = 64, **options: object) -> Family:
    return Family(f"timm {name}", partial(shallow, model, size, **options), size)


def _other_timm(name: str, model: str, size: int = 64, **options: object) -> Family:
    return Family(f"timm {name}", partial(timm_model, model, **options), size)


def _hf(name: str, kind: str, size: int | tuple[int, int] = 64, **options: object) -> Family:
    return Family(f"transformers {name}", partial(transformers_model, kind, size, **options), size)


_PYRAMID = {"depths": (2, 2), "embed_dims": (16, 32), "num_heads": (2, 4), "mlp_ratios": (2, 2)}

FAMILIES: tuple[Family, ...] = (
    _timm("ViT", "vit_tiny_patch16_224"),
    _timm("ViT, 48 x 80 px", "vit_tiny_patch16_224", (48, 80)),
    _timm("ViT, 96 px", "vit_tiny_patch16_224", 96),
    _timm("ViT, no classifier", "vit_tiny_patch16_224", num_classes=0),
    _timm("DeiT distilled", "deit_tiny_distilled_patch16_224"),
    _timm("DINOv2", "vit_small_patch14_dinov2", 56),
    _timm("DINOv2 with registers", "vit_small_patch14_reg4_dinov2", 56),
    _timm("DINOv3", "vit_small_patch16_dinov3"),
    _timm("DINOv3, 48 x 80 px", "vit_small_patch16_dinov3", (48, 80)),
    _timm("EVA-02", "eva02_tiny_patch14_224", 56),
    _timm("BEiT v2", "beitv2_base_patch16_224"),
    _timm("CLIP", "vit_base_patch32_clip_224", 128),
    _timm("SigLIP", "vit_base_patch16_siglip_224"),
    _timm("SigLIP, mean pooled", "vit_base_patch16_siglip_gap_224"),
    _timm("relative-position ViT", "vit_relpos_small_patch16_224"),
    _timm("FlexiViT", "flexivit_small"),
    _timm("ViT 18x2", "vit_small_patch16_18x2_224"),
    Family("timm ViT, tokens merged", token_merging),
    _timm("NaFlexViT", "naflexvit_base_patch16_gap"),
    _timm("SAM", "samvit_base_patch16_224", 224),
    _timm("CaiT", "cait_xxs24_224"),
    _other_timm("Swin", "swin_tiny_patch4_window7_224", 112, img_size=112, **STAGES),
    _other_timm("Swin V2", "swinv2_tiny_window8_256", 128, img_size=128, **STAGES),
    _other_timm("XCiT", "xcit_nano_12_p16_224", 96, img_size=96, depth=3),
    _other_timm("DaViT", "davit_tiny", 112, depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4)),
    _timm("ResNet hybrid", "vit_small_r26_s32_224", 128),
    _timm("ConViT", "convit_tiny", embed_dim=48, num_heads=4, local_up_to_layer=2),
    _other_timm("Swin V2-CR", "swinv2_cr_tiny_224", 64, img_size=64, window_size=4, **STAGES),
    _other_timm("Hiera", "hiera_tiny_224", 64, img_size=(64, 64), stages=(1, 1, 2, 1), embed_dim=16, num_heads=1),
    _other_timm("Twins-SVT", "twins_svt_small", 112, img_size=112, wss=(7, 7), sr_ratios=(4, 2), **_PYRAMID),
    _other_timm("PVT v2", "pvt_v2_b0", 64, depths=(1, 1, 1, 1)),
    _other_timm("CrossViT", "crossvit_9_240", 240, embed_dim=(32, 48), num_heads=(2, 2), depth=((1, 2, 0), (1, 2, 0))),
    _other_timm("LeViT", "levit_128s", 96, img_size=96, depth=(1, 1, 1)),
    Family("timm MViTv2", mvitv2),
    Family("timm NesT", nest),
    _other_timm("EdgeNeXt", "edgenext_xx_small", 64),
    _hf("ViT", "ViTForImageClassification", num_labels=7),
    _hf("ViT, eager", "ViTForImageClassification", num_labels=7, attention="eager"),
    _hf("ViT, 48 x 80 px", "ViTForImageClassification", (48, 80), num_labels=7),
    _hf("DeiT", "DeiTForImageClassification", num_labels=7),
    _hf("DeiT distilled", "DeiTForImageClassificationWithTeacher", num_labels=7),
    _hf("DINOv2", "Dinov2ForImageClassification", num_labels=7),
    _hf("DINOv2 with registers", "Dinov2WithRegistersForImageClassification", num_labels=7, num_register_tokens=4),
    _hf("DINOv3", "DINOv3ViTModel", num_register_tokens=4),
    _hf("CLIP vision", "CLIPVisionModel"),
    _hf("SigLIP vision", "SiglipVisionModel"),
    _hf("BEiT", "BeitForImageClassification", num_labels=7, use_relative_position_bias=True),
    Family("transformers ViT-MAE", mae_on_every_patch),
    _hf("ViT-MAE, mask_ratio 0", "ViTMAEModel", mask_ratio=0.0),
    _hf("ViT-MAE, mask_ratio 0.75", "ViTMAEModel"),
    Family("transformers YOLOS", yolos),
    Family("transformers Swin", transformers_swin, 56),
    Family("transformers Swin, eager", partial(transformers_swin, "eager"), 56),
    Family("transformers PVT", pvt, 128),
    Family("torchvision vit_b_16", torchvision_vit),
    Family("torchvision swin_t", torchvision_swin, 56),
    Family("open_clip ViT-B-32", open_clip_tower, 128),
    Family("own module, nn.TransformerEncoder", encoder_module),
    Family("own module, list of pairs", list_of_pairs),
    Family("torchvision resnet", torchvision_resnet, 64, "NoAttention"),
    Family("timm MLP-Mixer", partial(timm_model, "mixer_s32_224"), 224, "NoAttention"),
    Family("transformers BERT", bert, 64, "Unsupported"),
)
