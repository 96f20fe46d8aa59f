"""The plan of a study: everything that its numbers depend on, written before the first number is computed.

Two runs with the same plan give the same numbers, byte for byte on a CPU, so a study may be stopped and resumed under
its plan and under no other. No torch here: the plan of a finished study is read without it.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from vitrail.errors import PlanMismatch, StudyError

__all__ = ["Part", "Plan", "differences", "refuse_other_plan"]

FORMAT = 1
"""Of the folder. Raise it when the layout changes such that older readers would go wrong."""


class Part(NamedTuple):
    """Images `start` to `stop` (exclusive): one chunk of every array, complete or absent."""

    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """What the numbers of a study depend on. Fields hold what JSON can, so that a plan reads back equal to itself.

    `grid` (rows, columns) and `prefix` are those of all layers where they agree, else None; `grids` and `prefixes` have
    them by layer. `left_out` names the measures that the model cannot have, with the reason. `threads` are torch's:
    they decide the order of sums, so a resumed study goes on with those it began with.
    """

    model: str
    weight_digest: str
    n_classes: int | None
    class_names: list[str] | None
    n_layers: int
    n_heads: list[int]
    grid: list[int] | None
    prefix: int | None
    grids: list[list[int] | None]
    prefixes: list[int]
    class_token: bool
    preprocessing: dict[str, Any]
    data_digest: str
    n_images: int
    labels_from: str
    measures: dict[str, int]
    left_out: dict[str, str]
    options: dict[str, Any]
    precision: str
    batch_size: int
    part_size: int
    seed: int
    device: str
    threads: int
    versions: dict[str, str]
    format: int = FORMAT

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts in order; the last may be short."""
        starts = range(0, self.n_images, self.part_size)
        return tuple(
            Part(number, start, min(start + self.part_size, self.n_images)) for number, start in enumerate(starts)
        )

    def to_json(self) -> str:
        """The same text for the same plan, always."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Raises `StudyError` if this is not a plan that this version reads."""
        try:
            held = json.loads(text)
            version = held.get("format")
        except (ValueError, AttributeError) as error:
            raise StudyError(f"study.json is not a plan: {error}.") from error
        if version != FORMAT:
            raise StudyError(
                f"study.json has format {version}, and this Vitrail reads format {FORMAT}; use its version."
            )
        names = {field.name for field in fields(cls)}
        if set(held) != names:
            raise StudyError(
                f"study.json is not a plan: these fields are missing or unknown: {sorted(set(held) ^ names)}."
            )
        return cls(**held)


NAMES = {
    "weight_digest": "weights",
    "n_classes": "number of classes",
    "class_names": "class names",
    "data_digest": "images",
    "n_images": "number of images",
    "labels_from": "source of the labels",
    "measures": "measures",
    "left_out": "measures left out",
    "batch_size": "batch size",
    "part_size": "images in a part",
}
"""Fields whose own name is not what people call them."""


def differences(held: Plan, asked: Plan) -> list[str]:
    """What the folder holds and what this run asks for, a phrase for each difference; empty where there is none.

    The number of threads is not compared, as a run takes it from the folder.
    """
    found: list[str] = []
    for field in fields(Plan):
        old, new = getattr(held, field.name), getattr(asked, field.name)
        if old != new and field.name != "threads":
            found.extend(_difference(NAMES.get(field.name, field.name), old, new))
    return found


def _difference(name: str, old: Any, new: Any) -> Iterator[str]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        yield f"{name}: the folder has {_short(old)}, this run {_short(new)}"
        return
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            yield f"{name}, {key}: the folder has {_short(old.get(key))}, this run {_short(new.get(key))}"


def _short(value: Any, length: int = 60) -> str:
    if value is None:
        return "none"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= length else text[: length - 4] + " ..."


def refuse_other_plan(folder: str, held: Plan, asked: Plan) -> None:
    """Raises `PlanMismatch` that names every difference, if there is one."""
    found = differences(held, asked)
    if found:
        raise PlanMismatch(
            f"{folder} was begun with another plan:\n  "
            + "\n  ".join(found)
            + "\nGive the values that the folder has to go on with it, or another folder to begin anew."
        )
