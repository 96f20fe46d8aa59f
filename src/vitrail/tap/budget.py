"""How much memory a chunk of work may take: a little on a processor, much on a GPU.

A processor is slower on chunks that leave its caches, so each kind of chunk has a size of its own there. A GPU waits
for Python between chunks, so there a chunk is as large as a share of its memory: for usual batches the number of
operations does not depend on the batch size. The share is one of all memory, not of what happens to be free, so that
two runs on the same kind of GPU cut the same chunks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Budget", "budget_of", "fixed_budget", "halve"]

GPU_SHARE = 16
"""A chunk takes one in so many parts of a GPU's memory: several are alive at once, beside the model and its
activations."""

OTHER_BYTES = 2**30
"""A chunk on a device that does not say how much memory it has."""

MAX_HALVINGS = 10
"""A thousandth of the memory: smaller chunks would not help where these do not fit."""


@dataclass(frozen=True)
class Budget:
    """What a chunk may take.

    Attributes:
        n_bytes: On a GPU; None on a processor, where each kind of chunk has its own size.
        n_halvings: How often it was found too large.
    """

    n_bytes: int | None
    n_halvings: int = 0

    @property
    def joins_images(self) -> bool:
        """Whether one operation on all images is quicker than one on each."""
        return self.n_bytes is not None

    def bytes_for(self, on_processor: int) -> int:
        """Size of a chunk.

        Args:
            on_processor: Its size on a processor.

        Returns:
            Bytes, at least 1.
        """
        return max(1, (on_processor if self.n_bytes is None else self.n_bytes) >> self.n_halvings)


@dataclass
class _State:
    """What was found about the budgets of this process.

    Attributes:
        fixed: Bytes that hold for every device; None: each has its own.
        halvings: By device, how often its memory did not suffice.
    """

    fixed: int | None
    halvings: dict[str, int]


_STATE = _State(None, {})


def budget_of(device: torch.device | str) -> Budget:
    """The budget of a device.

    Args:
        device: Where the chunk is computed.

    Returns:
        Its budget now.
    """
    device = torch.device(device)
    return Budget(_bytes_of(device), _STATE.halvings.get(device.type, 0))


def halve(device: torch.device | str) -> bool:
    """Halves the budget of a device whose memory did not suffice.

    Args:
        device: Where memory ran out.

    Returns:
        False where chunks are too small already for that to help.
    """
    kind = torch.device(device).type
    n_halvings = _STATE.halvings.get(kind, 0)
    _STATE.halvings[kind] = n_halvings + 1
    return n_halvings < MAX_HALVINGS


@contextmanager
def fixed_budget(n_bytes: int | None) -> Iterator[None]:
    """Gives every device the same budget, not halved yet.

    Args:
        n_bytes: Of a chunk; None: what each device has by itself.

    Yields:
        Nothing; what was before holds again when the context ends.
    """
    before = _STATE.fixed, _STATE.halvings
    _STATE.fixed, _STATE.halvings = n_bytes, {}
    try:
        yield
    finally:
        _STATE.fixed, _STATE.halvings = before


def _bytes_of(device: torch.device) -> int | None:
    if _STATE.fixed is not None:
        return _STATE.fixed
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // GPU_SHARE
    return OTHER_BYTES
