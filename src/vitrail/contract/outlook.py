"""What a study of a model will hold, said before it is made: what it leaves out and why, or why there can be none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.analysis import analyses, is_of_other_models, unavailable
from vitrail.errors import ModelError
from vitrail.models.noise import noise_images
from vitrail.models.open import Vit
from vitrail.tap.tap import Tap

__all__ = ["Outlook", "reason_of_chance", "require_finite", "study_outlook"]

_CHANCE = 1e-3
"""Share of the largest logit: above the sums in varying order of a GPU in 16 bits, below dropout of a hundredth."""

_N_IMAGES = 2
"""Images of noise that the model answers twice."""


@dataclass(frozen=True)
class Outlook:
    """What a study of one model will hold.

    Attributes:
        measures: Names of the measures that it can hold, with images that have masks.
        left_out: Names of the measures that this model lacks, by the reason.
        refusal: Why a study of this model is refused altogether; empty where it is not.
    """

    measures: tuple[str, ...]
    left_out: Mapping[str, tuple[str, ...]]
    refusal: str = ""

    @property
    def ok(self) -> bool:
        """Whether a study can be made."""
        return not self.refusal

    def text(self) -> str:
        """Formats the outlook as lines to print.

        Returns:
            One line, and one more for each reason for which measures are left out.
        """
        if self.refusal:
            return f"A study is refused: the model {self.refusal}"
        n_left_out = sum(map(len, self.left_out.values()))
        lines = [f"A study holds {len(self.measures)} of {len(self.measures) + n_left_out} measures."]
        return "\n".join([*lines, *(f"left out: {', '.join(names)}: {why}" for why, names in self.left_out.items())])


@torch.no_grad()
def study_outlook(vit: Vit) -> Outlook:
    """Asks every analysis what it can measure of a model, and the model whether it answers alike twice.

    Args:
        vit: The opened model.

    Returns:
        What a study of all analyses would hold, with masks of objects given. Measures of another kind of output and
        analyses of special models are not counted among those that are left out.

    Example:
        >>> print(study_outlook(vit).text())
    """
    general = [each for each in analyses().values() if not each.only_for]
    names = [name for each in analyses().values() for name in each.measure_names]
    reasons = unavailable(vit, names, {"masks": "given"})
    expected = [name for each in general for name in each.measure_names if not is_of_other_models(name)]
    left_out: dict[str, tuple[str, ...]] = {}
    for name in (name for name in expected if name in reasons):
        left_out[reasons[name]] = (*left_out.get(reasons[name], ()), name)
    measures = tuple(name for name in names if name not in reasons)
    return Outlook(measures, left_out, _refusal(vit))


def _refusal(vit: Vit) -> str:
    noise = noise_images(vit, _N_IMAGES)
    if not vit.logits(noise).isfinite().all():
        return "answers images of noise with NaN or infinite numbers. Check the weights, or try float32."
    return reason_of_chance(vit.tap(), noise)


def require_finite(
    name: str, values: Float[Tensor, "image *rest"], images: Sequence[str] = (), subject: str = ""
) -> None:
    """Refuses an answer from which no number could be made.

    Args:
        name: Of the model.
        values: Its answer [image, class], or anything else that it computed for each image.
        images: What the images are called; without names an image of several is called by its index.
        subject: What the values are, in the words that go before the image; "": the answer of the model.

    Raises:
        ModelError: There are NaN or infinite numbers; the first image with one is named.

    Example:
        >>> require_finite(vit.name, vit.logits(images), ["cat.jpg", "dog.jpg"])  # doctest: +SKIP
    """
    if values.isfinite().all():
        return
    first = int((~values.isfinite().flatten(1).all(1)).nonzero()[0])
    image = "this image" if len(values) == 1 else f"the image at index {first}"
    raise ModelError(
        f"{subject or f'The answer of {name} to'} {images[first] if images else image} is not finite (NaN or "
        "infinite). Check the weights, or try float32 if another precision was asked for."
    )


@torch.no_grad()
def reason_of_chance(tap: Tap, images: Float[Tensor, "image channel row column"]) -> str:
    """Asks a model the same images twice.

    Args:
        tap: The tap of the model.
        images: Prepared images [image, channel, row, column].

    Returns:
        A sentence that goes on from the model's name; empty where both answers are the same up to rounding.
    """
    first, second = (tap.read(images).float() for _ in range(2))
    difference, largest = float((first - second).abs().max()), float(first.abs().max())
    if not difference > _CHANCE * largest:  # nor where both are NaN, which is another fault
        return ""
    return (
        f"answered the same {len(images)} images twice and differently (by {difference:.2g}, where the largest logit "
        f"is {largest:.2g}): something in it is random, such as dropout that stays on or tokens drawn by chance. "
        "Switch that off, as numbers would differ from run to run."
    )
