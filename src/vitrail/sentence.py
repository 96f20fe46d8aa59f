"""A sentence with numbers that knows what of a study it speaks of: the report prints it, the page links it."""

from collections.abc import Iterable
from math import isfinite
from typing import Any, SupportsFloat

__all__ = ["Sentence", "percent"]

ROUNDING_ERROR = 1e-6
"""Of shares that are sums in float32."""


class Sentence(str):
    """Text that names its evidence; a plain string everywhere else.

    Attributes:
        measure: The measure that its numbers are read from; empty if it speaks of none.
        layer: Index of the layer that it singles out, if any.
        head: Index of the head within that layer, if any.
        images: Positions of images in the study that show it, each with a few words.
        caption: What those images are, such as "the label loses most in these"; empty where there are none.
        evidence: Parts of the text, each with the measure that it is read from, where that is not `measure`.
        by_layer: The number that the text gives of `layer`, for every layer; NaN where a layer has none. Empty where it
            is the mean of `measure`.
        by_layer_title: What these numbers are.
    """

    measure: str
    layer: int | None
    head: int | None
    images: tuple[tuple[int, str], ...]
    caption: str
    evidence: tuple[tuple[str, str], ...]
    by_layer: tuple[float, ...]
    by_layer_title: str

    def __new__(
        cls,
        text: str,
        *,
        measure: str = "",
        layer: int | None = None,
        head: int | None = None,
        images: Iterable[tuple[int, str]] = (),
        caption: str = "",
        evidence: Iterable[tuple[str, str]] = (),
        by_layer: Iterable[SupportsFloat] = (),
        by_layer_title: str = "",
    ) -> "Sentence":
        """Make a sentence.

        Args:
            text: What it says.
            measure: Name of the measure that its numbers are read from.
            layer: Index of the layer that it singles out.
            head: Index of the head within that layer.
            images: Positions of images in the study that show it, each with a few words.
            caption: What those images are.
            evidence: Parts of the text, each with the name of the measure that it is read from.
            by_layer: Numbers of all layers, of which the text gives that of `layer`.
            by_layer_title: What they are.

        Returns:
            The sentence.
        """
        self = super().__new__(cls, text)
        self.measure, self.layer, self.head = measure, layer, head
        self.images, self.caption, self.evidence = tuple(images), caption, tuple(evidence)
        self.by_layer, self.by_layer_title = tuple(map(float, by_layer)), by_layer_title
        return self

    @classmethod
    def of(cls, text: str) -> "Sentence":
        """A sentence as it is, or a plain string as a sentence that names nothing.

        Args:
            text: Either.

        Returns:
            The sentence.
        """
        return text if isinstance(text, Sentence) else cls(text)

    def to_json(self) -> dict[str, Any]:
        """What it says and names, in values that JSON can hold.

        Returns:
            `text`, `measure`, `layer`, `head`, `images` (each with `image`, `words`), `caption`, `evidence` (each with
            `text`, `measure`), `by_layer` (null for NaN), `by_layer_title`.
        """
        return {
            "text": str(self),
            "measure": self.measure,
            "layer": self.layer,
            "head": self.head,
            "images": [{"image": image, "words": words} for image, words in self.images],
            "caption": self.caption,
            "evidence": [{"text": text, "measure": measure} for text, measure in self.evidence],
            "by_layer": [number if isfinite(number) else None for number in self.by_layer],
            "by_layer_title": self.by_layer_title,
        }


def percent(share: SupportsFloat, digits: int = 0) -> str:
    """A share of 1 as text; none is rounded to nothing or all.

    Args:
        share: 0 to 1.
        digits: After the point.

    Returns:
        Text such as "12 %", "below 1 %" or "above 99 %"; "0 %" and "100 %" of what is so up to rounding errors alone.
    """
    value, step = float(share), 10.0 ** -(digits + 2)
    if ROUNDING_ERROR < value < step / 2:
        return f"below {100 * step:.{digits}f} %"
    if 1 - step / 2 <= value < 1 - ROUNDING_ERROR:
        return f"above {100 * (1 - step):.{digits}f} %"
    return f"{100 * value:.{digits}f} %"
