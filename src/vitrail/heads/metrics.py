"""How far apart two answers are: predictions before and after pruning, tokens before and after.

All take any precision and answer in float32. Formulas avoid the subtraction of nearly equal numbers, because most heads
change almost nothing: a divergence of 1e-9 bits is a number here, not noise around zero.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Shift", "flips", "jensen_shannon", "one_minus_cosine", "relative_l2", "shift"]


def flips(before: Float[Tensor, "*#batch class"], after: Float[Tensor, "*#batch class"]) -> Bool[Tensor, "*batch"]:
    """Whether the most probable class is another one.

    Args:
        before: Logits.
        after: Logits; the shapes broadcast.

    Returns:
        True where the prediction changes.
    """
    return before.argmax(-1) != after.argmax(-1)


def jensen_shannon(a: Float[Tensor, "*#batch class"], b: Float[Tensor, "*#batch class"]) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence of two predictions.

    With s = p + q and x = ln p - ln q each class adds s/4 (x tanh(x/2) - 2 ln cosh(x/2)) nats, which is never negative;
    near x = 0 this loses no digits to cancellation, unlike entropies.

    Args:
        a: Logits.
        b: Logits; the shapes broadcast.

    Returns:
        Bits, 0 (the same prediction) to 1; symmetric.
    """
    a, b = a.float().log_softmax(-1), b.float().log_softmax(-1)
    x = (a - b).abs()
    near = x * torch.tanh(x / 2) + torch.log1p(-torch.tanh(x / 2).square())
    far = 2 * (math.log(2) - x * torch.sigmoid(-x) - torch.log1p(torch.exp(-x)))
    nats = (a.exp() + b.exp()) / 4 * torch.where(x < 1, near, far)
    return (nats.sum(-1) / math.log(2)).clamp(max=1.0)


class Shift(NamedTuple):
    """How far each token moved.

    Attributes:
        one_minus_cosine: Of its direction, 0 to 2.
        relative_l2: Length of the change over the length before.
    """

    one_minus_cosine: Float[Tensor, "*batch"]
    relative_l2: Float[Tensor, "*batch"]


def shift(before: Float[Tensor, "*#batch channel"], after: Float[Tensor, "*#batch channel"]) -> Shift:
    """How far tokens moved.

    1 - cos is computed from the length of the difference, (|d|^2 - (|a| - |b|)^2) / (2 |a| |b|): two directions 1e-4
    apart differ by 5e-9, less than one rounding of a cosine near 1.

    Args:
        before: Tokens.
        after: Tokens; the shapes broadcast.

    Returns:
        1 - cos, 0 to 2, and |after - before| / |before|; NaN for zero vectors.
    """
    before, after = before.float(), after.float()
    change = torch.linalg.vector_norm(after - before, dim=-1)
    length, other = torch.linalg.vector_norm(before, dim=-1), torch.linalg.vector_norm(after, dim=-1)
    one_minus_cosine = (change.square() - (length - other).square()) / (2 * length * other)
    return Shift(one_minus_cosine.clamp(0.0, 2.0), change / length)


def one_minus_cosine(
    a: Float[Tensor, "*#batch channel"], b: Float[Tensor, "*#batch channel"]
) -> Float[Tensor, "*batch"]:
    """1 - cosine of two vectors; see `shift`.

    Args:
        a: Vectors along the last dimension.
        b: The same; the shapes broadcast.

    Returns:
        0 (same direction) to 2 (opposite).
    """
    return shift(a, b).one_minus_cosine


def relative_l2(
    before: Float[Tensor, "*#batch channel"], after: Float[Tensor, "*#batch channel"]
) -> Float[Tensor, "*batch"]:
    """Length of the change over the length before; see `shift`.

    Args:
        before: Vectors along the last dimension.
        after: The same; the shapes broadcast.

    Returns:
        Zero or more.
    """
    return shift(before, after).relative_l2
