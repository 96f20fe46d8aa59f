"""Hierarchies of the tests: random ones of timm, and one with weights set by hand whose class is one bright patch."""

import timm
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from torch import nn

from vitrail import open_vit


def opened(model, image_size=64):
    """A model with weights wide enough for attention that is not uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return open_vit(model.eval(), image_size=image_size, mean=0.5, std=0.5)


def swin(**options):
    shape = {"img_size": 32, "patch_size": 2, "window_size": 4, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 3)}
    return opened(timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **shape | options), 32)


def pvt(depths=(1, 1, 1, 1)):
    return opened(timm.create_model("pvt_v2_b0", depths=depths, num_classes=5))


def maxvit():
    transformer = MaxxVitTransformerCfg(window_size=4, dim_head=12)
    config = MaxxVitCfg(
        embed_dim=(24, 36),
        depths=(2, 2),
        block_type=("M", "M"),
        stem_width=(20, 20),
        conv_cfg=MaxxVitConvCfg(block_type="mbconv"),
        transformer_cfg=transformer,
    )
    return opened(MaxxVit(config, img_size=64, num_classes=5))


class _BrightnessLayer(nn.Module):
    """Adds to channel 1 of each token the mean of channel 0 over all tokens: attention with q = k = 0 is uniform."""

    def __init__(self):
        super().__init__()
        self.num_heads = 1

    def forward(self, tokens):
        brightness = tokens[:, None, :, :1]
        v = torch.cat([torch.zeros_like(brightness), brightness], -1)
        out = F.scaled_dot_product_attention(torch.zeros_like(v), torch.zeros_like(v), v)
        return tokens + out[:, 0]


class Brightness(nn.Module):
    """Two layers on 8 x 8 patches, two on 4 x 4; logit 1 is what channel 1 has gathered, logit 0 is 0.

    The derivative of logit 1 by the attention that any layer gives to a key is the brightness of the key, times a
    number that is the same for all keys of the layer.
    """

    def __init__(self):
        super().__init__()
        self.embed, self.merge = nn.Conv2d(3, 2, 4, 4), nn.Conv2d(2, 2, 2, 2, bias=False)
        self.fine = nn.ModuleList(_BrightnessLayer() for _ in range(2))
        self.coarse = nn.ModuleList(_BrightnessLayer() for _ in range(2))
        with torch.no_grad():
            for convolution in (self.embed, self.merge):
                convolution.weight.zero_()
            self.embed.bias.zero_()
            self.embed.weight[0] = 1 / 48
            for channel in range(2):
                self.merge.weight[channel, channel] = 1 / 4

    def forward(self, images):
        tokens = self.embed(images).flatten(2).mT
        for layer in self.fine:
            tokens = layer(tokens)
        tokens = self.merge(tokens.mT.unflatten(2, (8, 8))).flatten(2).mT
        for layer in self.coarse:
            tokens = layer(tokens)
        gathered = tokens[:, :, 1].mean(1)
        return torch.stack([torch.zeros_like(gathered), gathered], 1)


def brightness():
    return open_vit(Brightness().eval(), image_size=32, mean=0.5, std=0.5, n_classes=2)


def bright_images(patches, size=32):
    """Dark images, each with one bright patch of 4 x 4 pixels."""
    images = torch.full((len(patches), 3, size, size), -1.0)
    for image, patch in zip(images, patches, strict=True):
        row, column = divmod(patch, 8)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 30.0
    return images
