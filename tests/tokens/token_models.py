"""Small random models of the tests, and images for them."""

import timm
import torch

from vitrail import open_vit


def small_vit(name="vit_tiny_patch16_224", img_size=(32, 64), **options):
    """A random timm ViT of three layers with three heads of 16 channels, on patches of 8 x 8 by default."""
    small = {"depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 10, "patch_size": 8}
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=img_size, **small | options).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # wide enough for attention that is not uniform
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3 if parameter.ndim == 2 else 0.5)
    return open_vit(model, image_size=img_size)


def small_images(n_images=3, size=(32, 64)):
    return torch.randn(n_images, 3, *size, generator=torch.Generator().manual_seed(1))
