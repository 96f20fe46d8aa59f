"""Attention of a model that Vitrail has never seen: any `nn.Module` that looks at images.

Prints where the class token of each head looks, without an edit to the model and with fused attention left on.
"""

import torch
from torch import nn

import vitrail


class MyViT(nn.Module):
    """A vision transformer as anyone might write it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 48))
        self.position = nn.Parameter(torch.randn(1, 65, 48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.position
        return self.head(self.encoder(tokens)[:, 0])


torch.manual_seed(0)
vit = vitrail.open_vit(MyViT(), image_size=64)
print(vit)


def tell(attention: vitrail.LayerAttention) -> None:
    weights = attention.weights()  # [image head query key], computed now, gone when you let go of it
    strongest = weights[0, :, 0, attention.prefix :].argmax(-1)
    places = [divmod(int(patch), vit.anatomy.grid[1]) for patch in strongest]
    print(f"L{attention.layer}: the class token looks most at patches {places}")


with torch.no_grad():
    vit.tap().read(torch.randn(1, 3, 64, 64), vitrail.Readers(attention=tell))
