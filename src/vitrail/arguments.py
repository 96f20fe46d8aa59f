"""Arguments as a user gives them, in plain Python: numbers of NumPy and torch are no numbers to JSON."""

from operator import index
from typing import Any

from vitrail.errors import UsageError

__all__ = ["at_least_one", "whole_number", "whole_numbers"]


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


def at_least_one(what: str, n: Any) -> int:
    """A number of things, of which there must be one at least.

    Args:
        what: They are, in the plural.
        n: As it was given.

    Returns:
        The number.

    Raises:
        UsageError: It is no whole number, or less than 1.
    """
    number = whole_number(f"The number of {what}", n)
    if number < 1:
        raise UsageError(f"{number} {what} cannot be asked for; give 1 or more.")
    return number


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
