"""How far two runs of the same sums may differ."""

import torch

__all__ = ["rounding_bound"]

_SINGLE = 1e-5
"""float32 and wider: another batch size picks other kernels, which moved logits by up to 2e-6 of the largest on the
model families tried (only the classifier differed on plain ViTs); five times that."""

_HALF = 2e-2
"""bfloat16 keeps 8 bits, so one rounding is 4e-3 of a value; a few of them add up over the blocks of a model."""


def rounding_bound(dtype: torch.dtype) -> float:
    """Largest difference that another order of the same sums may make, relative to the largest value compared.

    Args:
        dtype: Number format in which the model ran.

    Returns:
        A share of the largest absolute value, between 0 and 1.
    """
    return _SINGLE if dtype in (torch.float32, torch.float64) else _HALF
