"""Arguments as a user gives them, in plain Python: numbers of NumPy and torch are no numbers to JSON."""

from operator import index
from typing import Any

from vitrail.errors import UsageError

__all__ = ["at_least_one", "number_below", "whole_number", "whole_numbers"]


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


def number_below(count: int, name: str, number: Any, owner: str) -> int:
    """The number of one of several things that are counted from 0.

    Args:
        count: How many there are.
        name: What it is, in the singular.
        number: As it was given.
        owner: What has them, for the refusal.

    Returns:
        The number.

    Raises:
        UsageError: It is no whole number from 0 to count - 1.
    """
    whole = whole_number(name, number)
    if not 0 <= whole < count:
        raise UsageError(f"There is no {name} {whole}: {owner} has {name}s 0 to {count - 1}.")
    return whole


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
