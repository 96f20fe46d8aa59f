"""Tiny random models of torchvision and open_clip, and two written by hand as people write them."""

from functools import partial

import torch
from torch import Tensor, nn

__all__ = [
    "encoder_module",
    "list_of_pairs",
    "open_clip_tower",
    "torchvision_resnet",
    "torchvision_swin",
    "torchvision_vit",
]


def torchvision_vit(size: int = 64) -> nn.Module:
    """vit_b_16's code with 3 layers, 4 heads and 48 channels.

    Args:
        size: Image size in pixels.

    Returns:
        The model with random weights and seven classes.
    """
    from torchvision.models import VisionTransformer

    model: nn.Module = VisionTransformer(
        image_size=size, patch_size=16, num_layers=3, num_heads=4, hidden_dim=48, mlp_dim=96, num_classes=7
    )
    return model.eval()


def torchvision_swin() -> nn.Module:
    """swin_t's code with two stages of two blocks.

    Returns:
        The model with random weights and seven classes.
    """
    from torchvision.models.swin_transformer import SwinTransformer

    model: nn.Module = SwinTransformer(
        patch_size=[4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[7, 7], num_classes=7
    )
    return model.eval()


def torchvision_resnet() -> nn.Module:
    """A convolutional network, which is to be refused.

    Returns:
        The model with random weights and seven classes.
    """
    from torchvision.models.resnet import BasicBlock, ResNet

    model: nn.Module = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7)
    return model.eval()


def open_clip_tower() -> nn.Module:
    """The image tower of ViT-B-32 with 3 layers and 48 channels.

    Returns:
        The tower with random weights; its output is a feature vector.
    """
    from open_clip.transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        image_size=128,
        patch_size=32,
        width=48,
        layers=3,
        heads=4,
        mlp_ratio=2.0,
        output_dim=24,
        act_layer=nn.GELU,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )
    return model.eval()


class _Encoder(nn.Module):
    """Patches, a class token, `nn.TransformerEncoder`: what a tutorial ends with."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (size // 16) ** 2 + 1, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(width, 7)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), tokens], 1) + self.positions
        logits: Tensor = self.head(self.encoder(tokens)[:, 0])
        return logits


def encoder_module(size: int = 64) -> nn.Module:
    """An own module around `nn.TransformerEncoder`; with an even number of heads, so that native kernels serve it.

    Args:
        size: Image size in pixels.

    Returns:
        The module in evaluation mode.
    """
    return _Encoder(size, 48).eval()


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.attend = nn.Softmax(dim=-1)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.attend(torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5)
        out: Tensor = self.to_out(torch.matmul(weights, v).transpose(1, 2).flatten(2))
        return out


class _ListOfPairs(nn.Module):
    """Attention and feed-forward as pairs in a `ModuleList`, patches cut by reshaping: no block, no convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Linear(3 * 16 * 16, width)
        self.layers = nn.ModuleList(nn.ModuleList([_Attention(width, 3), _feed_forward(width)]) for _ in range(3))
        self.head = nn.Linear(width, 7)

    def forward(self, images: Tensor) -> Tensor:
        cut = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1)
        tokens = self.patches(cut.flatten(3).flatten(1, 2))
        for pair in self.layers:
            assert isinstance(pair, nn.ModuleList)
            tokens = pair[0](tokens) + tokens
            tokens = pair[1](tokens) + tokens
        logits: Tensor = self.head(tokens.mean(1))
        return logits


def _feed_forward(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def list_of_pairs() -> nn.Module:
    """An own module in the style of lucidrains' vit-pytorch.

    Returns:
        The module in evaluation mode.
    """
    return _ListOfPairs(48).eval()
