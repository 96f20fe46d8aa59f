"""Tiny random models of transformers' vision families, made from configurations, nothing downloaded."""

from typing import Any

from torch import nn

__all__ = ["bert", "mae_on_every_patch", "pvt", "transformers_model", "transformers_swin", "yolos"]

NARROW: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
}


def transformers_model(kind: str, size: int | tuple[int, int] = 64, **options: Any) -> nn.Module:
    """Makes a model of 3 layers, 3 heads and 48 channels from a configuration.

    Args:
        kind: Name of a model class, "ViTForImageClassification".
        size: Image size in pixels, one number or (rows, columns).
        **options: Settings of the configuration; `attention="eager"` for attention written by hand.

    Returns:
        The model with random weights.
    """
    import transformers

    model_class = getattr(transformers, kind)
    attention = options.pop("attention", "sdpa")
    settings = {**NARROW, "patch_size": 16, "image_size": size, **options}
    config = model_class.config_class(**settings)
    config._attn_implementation = attention
    model: nn.Module = model_class(config)
    return model.eval()


def transformers_swin(attention: str = "sdpa") -> nn.Module:
    """Makes a Swin of two stages of two blocks, at 56 pixels.

    Args:
        attention: "sdpa" or "eager".

    Returns:
        The model with random weights.
    """
    import transformers

    config = transformers.SwinConfig(
        image_size=56, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=7, num_labels=7
    )
    config._attn_implementation = attention
    model: nn.Module = transformers.SwinForImageClassification(config)
    return model.eval()


def mae_on_every_patch() -> nn.Module:
    """ViT-MAE as `open_vit("hf:...")` gives it.

    Returns:
        The model inside `ModelWithOptions`.
    """
    from vitrail.models.sources import ModelWithOptions

    return ModelWithOptions(transformers_model("ViTMAEModel"), every_patch=True)


def yolos(attention: str = "sdpa") -> nn.Module:
    """YOLOS: a ViT with detection tokens behind its patches.

    Args:
        attention: "sdpa" or "eager".

    Returns:
        The model with random weights, for 64 pixels.
    """
    return transformers_model(
        "YolosForObjectDetection", attention=attention, image_size=[64, 64], num_detection_tokens=6, num_labels=7
    )


def pvt() -> nn.Module:
    """PVT: a pyramid whose first stages attend to pooled tokens, with a class token in the last one.

    Returns:
        The model with random weights, for 128 pixels and seven classes.
    """
    import transformers

    config = transformers.PvtConfig(
        image_size=128,
        hidden_sizes=[16, 32, 48, 64],
        num_attention_heads=[1, 2, 3, 4],
        depths=[1, 1, 1, 1],
        num_labels=7,
    )
    model: nn.Module = transformers.PvtForImageClassification(config)
    return model.eval()


def bert() -> nn.Module:
    """A text model, which is to be refused.

    Returns:
        The model with random weights.
    """
    import transformers

    config = transformers.BertConfig(vocab_size=50, **NARROW)
    model: nn.Module = transformers.BertModel(config)
    return model.eval()
