"""Tiny random models of timm's families. Depth, width and image size are cut; the code that runs is timm's own."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NARROW", "STAGES", "mvitv2", "nest", "shallow", "timm_model", "token_merging"]

NARROW: dict[str, Any] = {"depth": 3, "embed_dim": 48, "num_heads": 3}
STAGES: dict[str, Any] = {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16}


def timm_model(name: str, **options: Any) -> nn.Module:
    """Makes a model of timm with random weights and, unless options say otherwise, seven classes.

    Args:
        name: Name of the model in timm.
        **options: For `timm.create_model`.

    Returns:
        The model, in training mode as timm makes it.
    """
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, **{"num_classes": 7, **options})
    return model


def shallow(name: str, size: int | tuple[int, int] = 64, **options: Any) -> nn.Module:
    """Makes a plain ViT of 3 blocks, 3 heads and 48 channels.

    Args:
        name: Name of the model in timm.
        size: Image size in pixels, one number or (rows, columns).
        **options: For `timm.create_model`.

    Returns:
        The model with random weights.
    """
    return timm_model(name, img_size=size, **{**NARROW, **options})


def mvitv2() -> nn.Module:
    """MViTv2 of three stages of one block.

    Returns:
        The model, for 64 pixels and seven classes.
    """
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    model: nn.Module = MultiScaleVit(MultiScaleVitCfg(depths=(1, 1, 1), embed_dim=16), img_size=64, num_classes=7)
    return model


def nest() -> nn.Module:
    """NesT of two levels of two blocks, whose heads are interleaved in the channels of the projection.

    Returns:
        The model with random weights and seven classes.
    """
    from timm.models.nest import Nest

    model: nn.Module = Nest(
        img_size=64, num_levels=2, embed_dims=(24, 48), num_heads=(3, 6), depths=(2, 2), num_classes=7
    )
    return model


class _MergingBlock(nn.Module):
    """A block of timm that merges a few of its tokens with those most like them, after Bolya et al. 2022."""

    def __init__(self, block: nn.Module, n_merged: int) -> None:
        super().__init__()
        self.block, self.n_merged = block, n_merged

    def forward(self, tokens: Tensor) -> Tensor:
        block: Any = self.block
        tokens = tokens + block.attn(block.norm1(tokens))
        tokens = _merge(tokens, self.n_merged)
        merged: Tensor = tokens + block.mlp(block.norm2(tokens))
        return merged


def _merge(tokens: Tensor, n_merged: int) -> Tensor:
    """Every second token is a candidate, the class token aside; the likest become the mean with their partner."""
    candidates, partners = tokens[:, ::2], tokens[:, 1::2]
    directions = nn.functional.normalize(tokens, dim=-1)
    similarity = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)
    similarity[:, 0] = -torch.inf
    best, partner = similarity.max(-1)
    order = best.argsort(-1, descending=True)[..., None]
    left, gone = order[:, n_merged:].sort(1)[0], order[:, :n_merged]
    at = partner[..., None].gather(1, gone).expand(-1, -1, tokens.shape[-1])
    moved = candidates.gather(1, gone.expand(-1, -1, tokens.shape[-1]))
    partners = partners.scatter_reduce(1, at, moved, reduce="mean")
    return torch.cat([candidates.gather(1, left.expand(-1, -1, tokens.shape[-1])), partners], 1)


def token_merging(size: int = 64) -> nn.Module:
    """A plain ViT of 3 blocks, each of which merges two of its tokens: they get fewer from layer to layer.

    Args:
        size: Image size in pixels.

    Returns:
        The model with random weights and seven classes.
    """
    model: Any = shallow("vit_tiny_patch16_224", size)
    model.blocks = nn.Sequential(*(_MergingBlock(block, 2) for block in model.blocks))
    merging: nn.Module = model
    return merging
