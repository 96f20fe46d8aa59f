"""Every error Vitrail raises on purpose.

    VitrailError
    ├── ModelError            a model cannot be opened or understood
    │   ├── UnknownModel      the name leads nowhere, or a library for it is not installed
    │   ├── WeightsMismatch   the weights file does not fit the architecture
    │   ├── NoAttention       nothing in the forward pass is token attention (a CNN, a mixer)
    │   └── Unsupported       this model cannot answer this question (no class token, channel maps, ...)
    ├── TapError              a promise of the tap was broken while a model ran; the numbers are not returned
    ├── DataError             images or labels cannot be used
    │   ├── BadImage          one file: broken, not an image, too large, animated
    │   └── NoImages          nothing usable is left
    ├── StudyError            a study folder cannot be used
    │   ├── PlanMismatch      the folder holds another plan; the message names the difference
    │   └── DamagedStudy      a part does not read back as it was written
    ├── TrainingDiverged      a loss or weight is infinite or no number
    ├── MissingLibrary        a model is to be opened where only finished studies can be read
    └── UsageError            an argument has no meaning here; the message lists those that have

A message says what was asked, what was found and what to do.
"""

__all__ = [
    "BadImage",
    "DamagedStudy",
    "DataError",
    "MissingLibrary",
    "ModelError",
    "NoAttention",
    "NoImages",
    "PlanMismatch",
    "StudyError",
    "TapError",
    "TrainingDiverged",
    "UnknownModel",
    "Unsupported",
    "UsageError",
    "VitrailError",
    "WeightsMismatch",
    "explain_missing_library",
]


class VitrailError(Exception):
    """Base of all of them: `except VitrailError` catches what Vitrail says on purpose, and no bug."""


class ModelError(VitrailError):
    """A model cannot be opened or understood."""


class UnknownModel(ModelError):
    """The name leads to no model, or the library that holds it is not installed."""


class WeightsMismatch(ModelError):
    """The weights file does not fit the architecture."""


class NoAttention(ModelError):
    """No attention between tokens was seen in one forward pass."""


class Unsupported(ModelError):
    """The model is understood, and cannot answer this question."""


class TapError(VitrailError):
    """What the tap promises did not hold in this pass, so its numbers are withheld."""


class DataError(VitrailError):
    """Images or labels cannot be used."""


class BadImage(DataError):
    """One file cannot be used as an image."""


class NoImages(DataError):
    """No usable image is left."""


class StudyError(VitrailError):
    """A study folder cannot be used."""


class PlanMismatch(StudyError):
    """The folder was begun with another plan."""


class DamagedStudy(StudyError):
    """A part does not read back as it was written."""


class TrainingDiverged(VitrailError):
    """A loss is infinite or no number, so the weights are worth nothing."""


class UsageError(VitrailError):
    """An argument that has no meaning here."""


class MissingLibrary(VitrailError, ImportError):
    """A library that running models needs is not installed; finished studies open without it."""


_OF_MODELS = frozenset({"accelerate", "openTSNE", "safetensors", "skimage", "sklearn", "timm", "torch", "torchvision"})
"""Modules that come with the extra `models`."""


def explain_missing_library(error: ModuleNotFoundError) -> MissingLibrary | None:
    """Says what to install where a model's library is missing.

    Args:
        error: What an import raised.

    Returns:
        The error to raise in its place, or None where the module is none of those that models need.
    """
    name = (error.name or "").partition(".")[0]
    if name not in _OF_MODELS:
        return None
    return MissingLibrary(
        f"This needs {name}, which is not installed here: pip install 'vitrail[models]'. "
        "Finished studies are opened, reported and compared without it.",
        name=name,
    )
