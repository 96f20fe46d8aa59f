"""Which tensor of what a model returns is looked at: logits where it classifies, else one feature vector per image."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor

from vitrail.errors import Unsupported, UsageError

__all__ = ["OutputReader", "feature_or_logits"]


@dataclass(frozen=True)
class OutputReader:
    """Picks the [image, value] tensor out of what a model returns.

    Attributes:
        output: Name or index of one of several outputs; None for the model's only one.
    """

    output: str | int | None = None

    def __call__(self, returned: Any) -> Tensor:
        """The output as [image, value], averaged over tokens or positions where it has them.

        Raises:
            UsageError: There are several outputs and none was named, or there is none of this name.
            Unsupported: The output holds no tensor with a vector per image.
        """
        if self.output is None:
            return feature_or_logits(returned)
        outputs = _outputs(returned)
        if isinstance(self.output, int) and isinstance(returned, tuple):
            outputs |= _with_tensors(dict(enumerate(returned)))  # fields of a named tuple have places too
        if self.output not in outputs:
            available = _listing(outputs) or "one tensor, which needs no name"
            raise UsageError(f"The output {self.output!r} was asked for; this model returns {available}.")
        return feature_or_logits(outputs[self.output])


def feature_or_logits(output: Any) -> Tensor:
    """[image, class] logits, else a pooled [image, channel] feature, else the mean over tokens.

    Args:
        output: What the model's forward pass returned: a tensor, a tuple or mapping that holds one, or an output with
            fields that transformers names.

    Returns:
        [image, class] logits, or [image, channel].

    Raises:
        UsageError: There are several tensors whose names do not tell which one is meant.
        Unsupported: There is no tensor with a vector per image.
    """
    for name in ("logits", "image_embeds", "pooler_output"):
        value = _field(output, name)
        if isinstance(value, Tensor) and value.ndim == 2:
            return value
    for name in ("last_hidden_state", "logits"):
        value = _field(output, name)
        if isinstance(value, Tensor):
            return _pool(value)
    if isinstance(output, Tensor):
        return _pool(output)
    outputs = _outputs(output)
    if len(outputs) > 1 and not _is_of_transformers(output):
        raise UsageError(
            f"The model returns several outputs: {_listing(outputs)}. Say which one is looked at: "
            f"--output {next(iter(outputs))}, in Python open_vit(.., output={next(iter(outputs))!r})."
        )
    if outputs:
        return feature_or_logits(next(iter(outputs.values())))
    raise Unsupported(
        f"The model returns {type(output).__name__}, in which there are neither logits nor features of shape "
        "[image, class]. Wrap it in a module whose forward returns such a tensor."
    )


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _outputs(returned: Any) -> dict[str | int, Any]:
    """What a mapping, sequence or data class holds that is a tensor, or holds tensors itself, by name or index."""
    if isinstance(returned, Mapping):
        return _with_tensors(returned)
    if is_dataclass(returned) and not isinstance(returned, type):
        return _with_tensors({field.name: getattr(returned, field.name) for field in fields(returned)})
    if isinstance(returned, tuple) and hasattr(returned, "_fields"):
        return _with_tensors(dict(zip(returned._fields, returned, strict=True)))
    return _with_tensors(dict(enumerate(returned))) if isinstance(returned, (tuple, list)) else {}


def _with_tensors(items: Mapping[Any, Any]) -> dict[str | int, Any]:
    """Those that are tensors or hold some. A single number (a loss, the temperature of CLIP) is of no image."""
    return {
        key: value for key, value in items.items() if (value.ndim if isinstance(value, Tensor) else _outputs(value))
    }


def _listing(outputs: Mapping[str | int, Any]) -> str:
    return ", ".join(
        f"{key!r} {list(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
        for key, value in outputs.items()
    )


def _is_of_transformers(output: Any) -> bool:
    """Its first tensor is the main one by that library's convention (such as the depth of a depth estimator)."""
    return type(output).__module__.startswith("transformers.")


def _pool(value: Tensor) -> Tensor:
    if value.ndim == 1:  # one number for each image
        return value[:, None]
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
