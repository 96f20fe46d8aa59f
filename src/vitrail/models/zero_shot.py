"""A whole CLIP model and a prompt for each class make a classifier: zero-shot classification.

The classes' text features are computed once; the logits are the model's own: the cosine of image and text, times the
model's scale.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import Unsupported, UsageError
from vitrail.models.choose import feature_or_logits
from vitrail.models.task import Task
from vitrail.tap.clone import clone_sharing

__all__ = ["Prompts", "Tokenize", "ZeroShot", "is_image_text_model", "parse_prompts", "zero_shot"]

Prompts = Mapping[str, "Sequence[str] | Tensor"]
"""By class: its prompts, or its text features [channel]."""

Tokenize = Callable[[list[str]], Any]
"""Texts -> the arguments of the model's text encoder."""

_TEXTS_AT_ONCE = 256
"""Prompts that are encoded together, which bounds the memory of thousands of classes."""


class ZeroShot(nn.Module):
    """A classifier of images whose classes are texts.

    Args:
        clip: The whole model, of transformers or open_clip.
        text_features: One unit vector for each class [class, channel].
    """

    text_features: Tensor

    def __init__(self, clip: nn.Module, text_features: Float[Tensor, "class channel"]) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("text_features", text_features)

    def forward(self, images: Float[Tensor, "image channel row column"]) -> Float[Tensor, "image class"]:
        """Compares images with the classes' texts.

        Args:
            images: Prepared images.

        Returns:
            Logits, as the model itself gives them for these images and texts.
        """
        clip: Any = self.clip
        logits: Tensor = clip.logit_scale.exp() * F.normalize(_image_features(clip, images), dim=-1)
        logits = logits @ self.text_features.T
        bias = getattr(clip, "logit_bias", None)
        return logits if bias is None else logits + bias


def is_image_text_model(module: nn.Module) -> bool:
    """Whether a module has an encoder of images and one of texts, and compares the two.

    Args:
        module: Any module.

    Returns:
        True for CLIP, SigLIP and others of transformers and open_clip as a whole.
    """
    towers = ("get_image_features", "get_text_features"), ("encode_image", "encode_text")
    return hasattr(module, "logit_scale") and any(
        callable(getattr(module, image, None)) and callable(getattr(module, text, None)) for image, text in towers
    )


def parse_prompts(prompts: Any) -> Prompts:
    """Reads prompts in any of the forms that a user may give.

    Args:
        prompts: A file with a prompt a line, or "CLASS<tab>PROMPT" (several lines of a class are averaged); a sequence
            of prompts; or a mapping of class to prompt, prompts or text features.

    Returns:
        By class, its prompts or its text features.

    Raises:
        UsageError: The file cannot be read, or fewer than two classes are named.
    """
    if isinstance(prompts, (str, Path)):
        by_class: dict[str, list[str] | Tensor] = {**_read_file(Path(prompts))}
    elif isinstance(prompts, Mapping):
        by_class = {str(name): _as_texts_or_features(name, value) for name, value in prompts.items()}
    else:
        by_class = {str(text): [str(text)] for text in prompts}
    if len(by_class) < 2:
        raise UsageError(
            f"The prompts name {len(by_class)} class{'es' * (len(by_class) != 1)}; a classifier needs two "
            "or more. Give one prompt a line, or CLASS<tab>PROMPT."
        )
    return by_class


def _read_file(file: Path) -> dict[str, list[str]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()  # Notepad and Excel begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"The prompts in {file} cannot be read: {error}. Give a text file, one prompt a line."
        ) from error
    by_class: dict[str, list[str]] = {}
    for line in lines:
        name, tab, text = line.partition("\t")
        if line.strip():
            by_class.setdefault(name.strip(), []).append((text if tab else name).strip())
    return by_class


def _as_texts_or_features(name: Any, value: Any) -> list[str] | Tensor:
    if isinstance(value, str):
        return [value]
    if isinstance(value, (list, tuple)) and value and all(isinstance(text, str) for text in value):
        return list(value)
    try:
        features = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"The prompt of {name!r} is neither text nor a vector of text features.") from error
    if features.ndim != 1 or not features.isfinite().all() or not features.any():
        raise UsageError(f"The text features of {name!r} have shape {list(features.shape)}; give one finite vector.")
    return features


@torch.no_grad()
def zero_shot(clip: nn.Module, prompts: Prompts, tokenize: Tokenize | None) -> tuple[ZeroShot, Task]:
    """Makes a classifier of a whole CLIP model.

    Args:
        clip: The model.
        prompts: By class, its prompts or text features.
        tokenize: Of the model; None where it is not known, and text features are needed.

    Returns:
        The classifier, and its task: classes where the model compares texts with each other (softmax), labels where it
        asks for each text alone whether it fits (SigLIP's sigmoid).

    Raises:
        Unsupported: The model does not compare images with texts.
        UsageError: Texts were given and the tokenizer is not known, or features do not fit the model.
    """
    if not is_image_text_model(clip):
        raise Unsupported(
            f"Prompts make classes only of a model that compares images with texts (CLIP, SigLIP), which "
            f"{type(clip).__name__} is not. Leave out the prompts (--prompts)."
        )
    encoder = clone_sharing(clip)  # in evaluation mode: the user's own stays in its mode
    rows = []
    for texts in prompts.values():
        if isinstance(texts, Tensor):
            rows.append(F.normalize(texts, dim=-1))
        elif tokenize is None:
            raise UsageError(
                f"The tokenizer of this {type(clip).__name__} is not known, so {texts[0]!r} cannot be encoded. "
                "Open the model by its name or folder, or give text features: prompts={class: vector}."
            )
        else:
            rows.append(_mean_direction(encoder, list(texts), tokenize))
    widths = {len(row) for row in rows}
    own = _image_width(clip)
    if widths != {own}:
        raise UsageError(f"The text features have {sorted(widths)} numbers and the image features {own}.")
    weight = next(clip.parameters())
    sigmoid = getattr(clip, "logit_bias", None) is not None
    classifier = ZeroShot(clip, torch.stack(rows).to(weight.device, weight.dtype))
    source = f"{type(clip).__name__}'s comparison with {len(rows)} prompts"
    return classifier, Task("labels" if sigmoid else "classes", source, len(rows))


def _mean_direction(clip: Any, texts: list[str], tokenize: Tokenize) -> Float[Tensor, "channel"]:
    """The mean of the prompts' unit vectors, as a unit vector: what CLIP's own ensembles of prompts are."""
    parts, device = [], next(clip.parameters()).device
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        tokens = tokenize(texts[start : start + _TEXTS_AT_ONCE]).to(device)
        if hasattr(clip, "encode_text"):
            features = clip.encode_text(tokens)
        else:
            features = feature_or_logits(clip.get_text_features(**tokens))
        parts.append(F.normalize(features.float(), dim=-1))
    return F.normalize(torch.cat(parts).mean(0), dim=-1)


def _image_features(clip: Any, images: Tensor) -> Tensor:
    if hasattr(clip, "encode_image"):
        features: Tensor = clip.encode_image(images)
        return features
    return feature_or_logits(clip.get_image_features(pixel_values=images))


def _image_width(clip: Any) -> int:
    """Channels of the space that images and texts share."""
    if hasattr(clip, "encode_image"):
        return int(getattr(clip.visual, "output_dim", 0) or clip.text_projection.shape[-1])
    width: Any = getattr(clip.config, "projection_dim", None)
    return int(width or clip.config.vision_config.hidden_size)
