"""A sentence with numbers that knows what of a study it speaks of: the report prints it, the page links it."""

from collections.abc import Iterable
from typing import Any

__all__ = ["Sentence"]


class Sentence(str):
    """Text that names its evidence; a plain string everywhere else.

    Attributes:
        measure: The measure that its numbers are read from; empty if it speaks of none.
        layer: Index of the layer that it singles out, if any.
        head: Index of the head within that layer, if any.
        images: Positions of images in the study that show it, each with a few words.
        evidence: Parts of the text, each with the measure that it is read from, where that is not `measure`.
    """

    measure: str
    layer: int | None
    head: int | None
    images: tuple[tuple[int, str], ...]
    evidence: tuple[tuple[str, str], ...]

    def __new__(
        cls,
        text: str,
        *,
        measure: str = "",
        layer: int | None = None,
        head: int | None = None,
        images: Iterable[tuple[int, str]] = (),
        evidence: Iterable[tuple[str, str]] = (),
    ) -> "Sentence":
        """Make a sentence.

        Args:
            text: What it says.
            measure: Name of the measure that its numbers are read from.
            layer: Index of the layer that it singles out.
            head: Index of the head within that layer.
            images: Positions of images in the study that show it, each with a few words.
            evidence: Parts of the text, each with the name of the measure that it is read from.

        Returns:
            The sentence.
        """
        self = super().__new__(cls, text)
        self.measure, self.layer, self.head = measure, layer, head
        self.images, self.evidence = tuple(images), tuple(evidence)
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
            `text`, `measure`, `layer`, `head`, `images` (each with `image`, `words`), `evidence` (`text`, `measure`).
        """
        return {
            "text": str(self),
            "measure": self.measure,
            "layer": self.layer,
            "head": self.head,
            "images": [{"image": image, "words": words} for image, words in self.images],
            "evidence": [{"text": text, "measure": measure} for text, measure in self.evidence],
        }
