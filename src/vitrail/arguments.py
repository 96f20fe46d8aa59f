"""Arguments as a user gives them, in plain Python: numbers of NumPy and torch are no numbers to JSON."""

from operator import index
from typing import Any

from vitrail.errors import UsageError

__all__ = ["whole_number", "whole_numbers"]


def whole_number(name: str, value: Any) -> int:
    """A whole number of Python, of NumPy or of torch.

    Args:
        name: What it is, for the refusal.
        value: As it was given.

    Returns:
        The number.

    Raises:
        UsageError: It is none.
    """
    try:
        return index(value)
    except TypeError as error:
        raise UsageError(f"{name} {value!r} has no meaning; give a whole number.") from error


def whole_numbers(name: str, values: Any, count: int | None = None) -> tuple[int, ...]:
    """Whole numbers of Python, of NumPy or of torch, in a sequence or an array.

    Args:
        name: What they are, for the refusal.
        values: As they were given.
        count: How many there must be; None for any number.

    Returns:
        The numbers.

    Raises:
        UsageError: One is none, or there are more or fewer.
    """
    try:
        numbers = tuple(map(index, values))
    except TypeError as error:
        raise UsageError(f"{name} {values!r} has no meaning; give whole numbers.") from error
    if count is not None and len(numbers) != count:
        raise UsageError(f"{name} {values!r} has no meaning; give {count} whole numbers.")
    return numbers
