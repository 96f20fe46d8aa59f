"""The metrics of importance as pure functions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.testing import assert_close

from vitrail.heads.metrics import flips, jensen_shannon, one_minus_cosine, relative_l2, shift

logits = hnp.arrays(np.float32, (7,), elements=st.floats(-60, 60, width=32)).map(torch.from_numpy)


def jensen_shannon_of_entropies(a, b):
    """The textbook form H(m) - (H(p) + H(q)) / 2, in float64."""
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    entropy = lambda x: torch.special.entr(x).sum(-1)  # noqa: E731
    return ((entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2) / math.log(2)).float()


@settings(max_examples=60, deadline=None)
@given(logits, logits)
def test_jensen_shannon_is_symmetric_between_zero_and_one_and_the_textbook_value(a, b):
    found = jensen_shannon(a, b)
    assert_close(found, jensen_shannon(b, a), rtol=0, atol=0)
    assert 0 <= found <= 1
    assert_close(found, jensen_shannon_of_entropies(a, b), rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(logits)
def test_jensen_shannon_of_equal_predictions_is_exactly_zero(a):
    assert_close(jensen_shannon(a, a), torch.tensor(0.0), rtol=0, atol=0)


@pytest.mark.parametrize("step", [1e-1, 1e-2, 1e-3])
def test_jensen_shannon_of_unequal_predictions_keeps_its_digits_however_small(step):
    a = torch.tensor([0.3, -0.2, 1.0, 0.1])
    b = a + step * torch.tensor([1.0, -1.0, 0.5, 0.0])
    expected = jensen_shannon_of_entropies(a, b)
    assert expected > 0
    assert_close(jensen_shannon(a, b), expected, rtol=2e-3, atol=0)


def test_jensen_shannon_of_predictions_that_share_nothing_is_one_bit():
    a = torch.tensor([100.0, 0.0, 0.0])
    assert_close(jensen_shannon(a, a.flip(0)), torch.tensor(1.0), rtol=1e-6, atol=0)
    assert_close(jensen_shannon(1e30 * a, -1e30 * a), torch.tensor(1.0), rtol=1e-6, atol=0)


def test_one_minus_cosine_of_known_angles():
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0]])
    assert_close(one_minus_cosine(x, y), torch.tensor([0.0, 1.0, 2.0, 1 - math.sqrt(0.5)]), rtol=1e-6, atol=1e-7)


def test_one_minus_cosine_resolves_angles_below_the_rounding_of_a_cosine():
    angle = 1e-4
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle)])
    assert_close(one_minus_cosine(x, y), torch.tensor(angle**2 / 2), rtol=1e-3, atol=0)


def test_relative_l2_sees_length_where_the_cosine_does_not():
    before = torch.tensor([3.0, 4.0])
    assert_close(relative_l2(before, 2 * before), torch.tensor(1.0))
    assert_close(one_minus_cosine(before, 2 * before), torch.tensor(0.0), rtol=0, atol=1e-7)


def test_shift_broadcasts_one_baseline_over_many_copies():
    before, after = torch.randn(1, 2, 5, 8), torch.randn(3, 2, 5, 8)
    found = shift(before, after)
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    assert_close(found.one_minus_cosine, 1 - cosine, rtol=1e-4, atol=1e-6)
    assert_close(found.relative_l2, (after - before).norm(dim=-1) / before.norm(dim=-1))


def test_a_flip_is_another_most_probable_class():
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert flips(before, torch.tensor([[0.9, 0.0], [0.0, 0.1]])).tolist() == [False, True]
