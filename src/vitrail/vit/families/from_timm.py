"""Tiny random models of timm's families. Depth, width and image size are cut; the code that runs is timm's own."""

from typing import Any

from torch import nn

__all__ = ["NARROW", "STAGES", "mvitv2", "shallow", "timm_model"]

NARROW: dict[str, Any] = {"depth": 3, "embed_dim": 48, "num_heads": 3}
STAGES: dict[str, Any] = {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16}


def timm_model(name: str, **options: Any) -> nn.Module:
    """A model of timm's with random weights and, unless said otherwise, seven classes."""
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, **{"num_classes": 7, **options})
    return model


def shallow(name: str, size: int | tuple[int, int] = 64, **options: Any) -> nn.Module:
    """A plain ViT of 3 blocks, 3 heads and 48 channels."""
    return timm_model(name, img_size=size, **{**NARROW, **options})


def mvitv2() -> nn.Module:
    """MViTv2 of three stages of one block."""
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    model: nn.Module = MultiScaleVit(MultiScaleVitCfg(depths=(1, 1, 1), embed_dim=16), img_size=64, num_classes=7)
    return model
