"""What the plan says of a model: where its layers lie among its blocks."""

import timm
import torch
from torch import nn

from vitrail.models.open import open_vit
from vitrail.models.pruned import NoHeads
from vitrail.study.planning import _block_numbers

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "num_classes": 5}


def test_a_block_without_attention_keeps_its_number() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **VIT, depth=4).eval()
    assert _block_numbers(open_vit(model, image_size=32)) == ([0, 1, 2, 3], 4)
    model.blocks[1].attn = NoHeads(torch.zeros(24), pair=False)
    vit = open_vit(model, image_size=32)
    assert vit.n_layers == 3
    assert _block_numbers(vit) == ([0, 2, 3], 4)


class _Looped(nn.Module):
    """The same block, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("vit_tiny_patch16_224", **VIT, depth=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.model.patch_embed(images)
        for _ in range(2):
            tokens = self.model.blocks(tokens)
        return self.model.head(tokens.mean(1))


def test_a_block_that_runs_twice_has_no_number() -> None:
    torch.manual_seed(0)
    vit = open_vit(_Looped().eval(), image_size=32)
    assert vit.n_layers == 4
    assert _block_numbers(vit) == (None, None)
