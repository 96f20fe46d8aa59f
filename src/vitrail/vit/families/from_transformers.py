"""Tiny random models of transformers' vision families, made from configurations, nothing downloaded."""

from typing import Any

from torch import nn

__all__ = ["bert", "mae_on_every_patch", "transformers_model", "transformers_swin"]

NARROW: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
}


def transformers_model(kind: str, size: int | tuple[int, int] = 64, **options: Any) -> nn.Module:
    """`kind` is the name of a model class, "ViTForImageClassification"; 3 layers, 3 heads, 48 channels."""
    import transformers

    model_class = getattr(transformers, kind)
    attention = options.pop("attention", "sdpa")
    settings = {**NARROW, "patch_size": 16, "image_size": size, **options}
    config = model_class.config_class(**settings)
    config._attn_implementation = attention
    model: nn.Module = model_class(config)
    return model.eval()


def transformers_swin(attention: str = "sdpa") -> nn.Module:
    """Swin of two stages of two blocks, at 56 pixels."""
    import transformers

    config = transformers.SwinConfig(
        image_size=56, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=7, num_labels=7
    )
    config._attn_implementation = attention
    model: nn.Module = transformers.SwinForImageClassification(config)
    return model.eval()


def mae_on_every_patch() -> nn.Module:
    """ViT-MAE as `open_vit("hf:...")` gives it."""
    from vitrail.vit.sources import WithOptions

    return WithOptions(transformers_model("ViTMAEModel"), every_patch=True)


def bert() -> nn.Module:
    """A text model, which is to be refused."""
    import transformers

    config = transformers.BertConfig(vocab_size=50, **NARROW)
    model: nn.Module = transformers.BertModel(config)
    return model.eval()
