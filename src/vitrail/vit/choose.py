"""Which tensor of what a model returns is looked at: logits where it classifies, else one feature vector per image."""

from typing import Any

from torch import Tensor

from vitrail.errors import Unsupported

__all__ = ["classifies", "feature_or_logits"]


def classifies(output: Any) -> bool:
    """The output names its logits (transformers do); other models are told apart by whoever opens them."""
    return getattr(output, "logits", None) is not None


def feature_or_logits(output: Any) -> Tensor:
    """[image, class] logits, else a pooled [image, channel] feature, else the mean over tokens.

    Takes tensors, tuples (first item) and outputs with named fields. Raises `Unsupported` for anything else.
    """
    for name in ("logits", "image_embeds", "pooler_output"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor) and value.ndim == 2:
            return value
    value = getattr(output, "last_hidden_state", None)
    if isinstance(value, Tensor):
        return _pooled(value)
    if isinstance(output, (tuple, list)) and output:
        return feature_or_logits(output[0])
    if isinstance(output, Tensor):
        return _pooled(output)
    raise Unsupported(
        f"The model returns {type(output).__name__}, in which there are neither logits nor features of shape "
        "[image, class]. Wrap it in a module whose forward returns such a tensor."
    )


def _pooled(value: Tensor) -> Tensor:
    if value.ndim == 2:
        return value
    if value.ndim == 3:
        return value.mean(1)
    if value.ndim == 4:
        return value.mean((2, 3))
    raise Unsupported(
        f"The model returns a tensor of shape {list(value.shape)}; one vector per image is needed. "
        "Wrap it in a module whose forward returns [image, class]."
    )
