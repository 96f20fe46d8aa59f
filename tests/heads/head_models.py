"""Small models of the tests: random ones of timm, and a toy whose label one planted head carries."""

import timm
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

PLANTED = (1, 2)


def timm_vit(name="vit_tiny_patch16_224", img_size=(48, 80), **options):
    """A small random timm ViT of three layers with three heads, whose heads matter."""
    small = {"depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
    torch.manual_seed(0)
    return drawn_wide(timm.create_model(name, img_size=img_size, **small | options).eval())


def timm_swin():
    """A small random Swin: two layers of two heads on 16 x 16 patches, two of three on 8 x 8, windows of 4 x 4."""
    shape = {"img_size": 64, "window_size": 4, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 3)}
    torch.manual_seed(0)
    return drawn_wide(timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **shape).eval())


def torchvision_vit():
    """A small random torchvision ViT, whose attention a native kernel computes."""
    torch.manual_seed(0)
    return drawn_wide(VisionTransformer(48, 16, 3, 4, 48, 96, num_classes=10).eval())


def drawn_wide(model):
    """The model with weights wide enough for attention that is not uniform."""
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "gamma" in parameter_name:
                parameter.normal_(std=0.5)
            elif parameter.ndim == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
            elif parameter.ndim == 3:  # class token, registers, positions
                parameter.normal_()
    return model


class PlantedAttention(nn.Module):
    """Four heads of four channels; random and faint."""

    def __init__(self, width=16, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.qkv.weight, std=0.3)
        nn.init.normal_(self.proj.weight, std=0.02)

    def forward(self, tokens):
        n_images, n_tokens, width = tokens.shape
        qkv = self.qkv(tokens).reshape(n_images, n_tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(out.transpose(1, 2).reshape(n_images, n_tokens, width))


class PlantedBlock(nn.Module):
    """Attention and residual, nothing else."""

    def __init__(self):
        super().__init__()
        self.attn = PlantedAttention()

    def forward(self, tokens):
        return tokens + self.attn(tokens)


class StackedBlock(PlantedBlock):
    """The same, with a sum that is not written as an addition."""

    def forward(self, tokens):
        return torch.stack([tokens, self.attn(tokens)]).sum(0)


class PlantedViT(nn.Module):
    """Tells bright images from dark ones, through head 2 of layer 1 and nothing else.

    Patches write their brightness to channel 0; the planted head carries channel 0 of all patches to channel 8 of the
    class token; the classifier reads channel 8.
    """

    def __init__(self, block=PlantedBlock):
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed = nn.Conv2d(3, 16, 4, stride=4, bias=False)
        self.cls_token = nn.Parameter(0.5 * torch.randn(1, 1, 16))
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(16, 2, bias=False)
        with torch.no_grad():
            self.patch_embed.weight.normal_(std=0.02)
            self.patch_embed.weight[0] = 1 / 48
            self.cls_token[..., [0, 8]] = 0
            self._plant()
            self.head.weight.zero_()
            self.head.weight[:, 8] = torch.tensor([2.0, -2.0])

    def _plant(self):
        layer, head = PLANTED
        attention, channels = self.blocks[layer].attn, slice(4 * head, 4 * head + 4)
        q, k, v = attention.qkv.weight.view(3, 16, 16)
        for rows in (q, k, v):
            rows[channels] = 0  # every token looks everywhere
        v[4 * head, 0] = 1.0
        attention.proj.weight[:, channels] = 0
        attention.proj.weight[8, 4 * head] = 1.0

    def forward(self, images):
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens[:, 0])


def bright_and_dark_images(n_images=8):
    """Images [n 3 16 16] whose brightness is +1 or -1 in turn, with texture; labels 0 and 1."""
    labels = torch.arange(n_images) % 2
    noise = torch.randn(n_images, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return noise + (1 - 2 * labels)[:, None, None, None], labels
