"""The rooms a study collects from: which measures a model has, and what computes them.

A room is a package below `vitrail` with `OPTIONS` (its options and their values, the default first),
`collectors(vit, names, options)` and `skipped(vit, names, options)`; both pass over the measures of other rooms.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from vitrail.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from vitrail.heads.collect import Collector
    from vitrail.vit.open import Vit
    from vitrail.vit.tap import Tap

__all__ = ["Surveys", "TakesMasks", "collectors", "options_of_rooms", "skipped"]

PACKAGES = ("vitrail.heads", "vitrail.patches", "vitrail.neurons", "vitrail.wint")
"""Every room with measures of a study; its torch is loaded when it is asked for something."""


@runtime_checkable
class TakesMasks(Protocol):
    """A collector that is told the masks of each batch before its pass: for each image of the padded batch instance ids
    [row column], as large as the image, or None."""

    def take_masks(self, masks: Sequence[np.ndarray | None]) -> None: ...


@runtime_checkable
class Surveys(Protocol):
    """A collector that sees the whole data set before it measures the first image; what it finds is kept with the
    study. `survey` is handed every padded batch in order, of which the first `n_images` count."""

    def survey(self, tap: "Tap", images: "Tensor", n_images: int) -> None: ...

    def surveyed(self) -> dict[str, np.ndarray]: ...

    def take_survey(self, arrays: Mapping[str, np.ndarray]) -> None: ...


def collectors(vit: "Vit", names: Sequence[str], options: Mapping[str, str] | None = None) -> "list[Collector]":
    """What computes the measures `names`, of all rooms. Raises `UsageError` for an option that no room has."""
    of_rooms = _options(options)
    return [found for room in _rooms() for found in room.collectors(vit, names, of_rooms[room.__name__])]


def skipped(vit: "Vit", names: Sequence[str], options: Mapping[str, str] | None = None) -> dict[str, str]:
    """Measures among `names` that this model or these options cannot give, each with the reason."""
    of_rooms = _options(options)
    return {name: why for room in _rooms() for name, why in room.skipped(vit, names, of_rooms[room.__name__]).items()}


def options_of_rooms() -> dict[str, tuple[str, ...]]:
    """Every option of every room with its values, the default first."""
    return {option: values for room in _rooms() for option, values in room.OPTIONS.items()}


def _rooms() -> list[Any]:
    return [import_module(package) for package in PACKAGES]


def _options(options: Mapping[str, str] | None) -> dict[str, dict[str, str]]:
    """The options by room; an option goes to each room that has it."""
    given, known = dict(options or {}), options_of_rooms()
    for option, value in given.items():
        if option not in known:
            valid = "; ".join(f"{name}: {', '.join(values)}" for name, values in known.items())
            raise UsageError(f"There is no option {option}={value!r}. Options: {valid}.")
    return {
        room.__name__: {option: value for option, value in given.items() if option in room.OPTIONS} for room in _rooms()
    }
