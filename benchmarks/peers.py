"""How others read attention, brought to the same work: their maps of one batch, then Vitrail's four measures of them.

Each peer is built as a copy of a timm vision transformer (the same sizes; weights are random) and returns a function
from images to [layer] maps. Fused attention is off where a peer needs it to see maps.
"""

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from vitrail.heads.strength import Reach, reach
from vitrail.models.token_grid import TokenGrid

Maps = Callable[[Tensor], list[Tensor]]


def timm_maps(model: nn.Module) -> Maps:
    """`timm.utils.AttentionExtract` with hooks."""
    from timm.utils import AttentionExtract

    for block in model.blocks:
        block.attn.fused_attn = False
    extract = AttentionExtract(model, method="hook", hook_type="forward")
    return lambda images: list(extract(images).values())


def transformers_maps(model: nn.Module) -> Maps:
    """transformers' ViT of the same sizes, eager attention, `output_attentions`."""
    from transformers import ViTConfig, ViTForImageClassification

    patch_px = model.patch_embed.patch_size[0]
    config = ViTConfig(
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=model.blocks[0].attn.num_heads,
        intermediate_size=model.blocks[0].mlp.fc1.out_features,
        image_size=model.patch_embed.img_size[0],
        patch_size=patch_px,
        num_labels=model.num_classes,
    )
    config._attn_implementation = "eager"
    own = next(model.parameters())
    other = ViTForImageClassification(config).eval().to(own.device, own.dtype)
    return lambda images: list(other(images, output_attentions=True).attentions)


def nnsight_maps(model: nn.Module) -> Maps:
    """An nnsight trace that saves the map of each block."""
    from nnsight import NNsight

    for block in model.blocks:
        block.attn.fused_attn = False
    wrapped = NNsight(model)

    def run(images: Tensor) -> list[Tensor]:
        saved: list[Tensor] = []
        with wrapped.trace(images):
            for block in wrapped.blocks:
                saved.append(block.attn.attn_drop.output.save())
        return saved

    return run


PEERS: dict[str, Callable[[nn.Module], Maps]] = {
    "timm AttentionExtract, fused attention off": timm_maps,
    "transformers, eager, output_attentions": transformers_maps,
    "nnsight, fused attention off": nnsight_maps,
}


def plain_model(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """A timm model with random weights, the same in every process."""
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval().to(device, dtype)


def four_measures(peer: str, model: nn.Module) -> Callable[[Tensor], list[Reach]]:
    """Strength, entropy, distance and prefix share of all heads by way of a peer's maps.

    Raises:
        ImportError: The peer is not installed.
    """
    maps = PEERS[peer](model)
    tokens = TokenGrid(tuple(model.patch_embed.grid_size), model.num_prefix_tokens)

    @torch.no_grad()
    def run(images: Tensor) -> list[Reach]:
        layers = maps(images)
        assert len(layers) == len(model.blocks), f"{peer} returned {len(layers)} maps of {len(model.blocks)} layers"
        return [reach(weights, tokens) for weights in layers]

    return run
