"""Whole numbers of any library, and what is none."""

import numpy as np
import pytest
import torch

from vitrail.arguments import number_below, whole_number, whole_numbers
from vitrail.errors import UsageError


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_a_number_of_any_library_is_one_of_python(value):
    number = whole_number("The layer", value)
    assert (number, type(number)) == (3, int)


@pytest.mark.parametrize("value", [3.0, "3", None, np.float32(3), torch.tensor(3.0), (3,)])
def test_what_is_no_whole_number_is_refused_by_its_name(value):
    with pytest.raises(UsageError, match=r"The layer .* has no meaning; give a whole number"):
        whole_number("The layer", value)


def test_one_of_several_is_counted_from_0():
    assert [number_below(3, "level", value, "this model") for value in (0, np.int64(2))] == [0, 2]
    for value in (-1, 3):
        with pytest.raises(UsageError, match=rf"no level {value}: this model has levels 0 to 2"):
            number_below(3, "level", value, "this model")
    with pytest.raises(UsageError, match=r"level 1\.5 has no meaning"):
        number_below(3, "level", 1.5, "this model")


def test_several_are_counted():
    for values in ((1, 2), np.array([1, 2]), torch.tensor([1, 2]), range(1, 3)):
        assert whole_numbers("The patch", values, 2) == (1, 2)
    for values in (1, (1.0, 2.0), "12", None, np.array([1.5, 2])):
        with pytest.raises(UsageError, match=r"The patch .* has no meaning; give whole numbers"):
            whole_numbers("The patch", values, 2)
    with pytest.raises(UsageError, match=r"give 2 whole numbers"):
        whole_numbers("The patch", (1, 2, 3), 2)
