"""Copies of large arrays whose last dimension is the image, so that one head of every image is read in one piece.

The store has the values of an image together. One head of all images is then spread over every chunk, and a click on it
would read the whole array each time. A copy costs one such reading, and space in the temporary folder.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np

from vitrail.app.lru_cache import LRUCache

__all__ = ["Columns"]

MAX_BYTES = 8 * 2**30
"""Space that all copies together may take; those used last stay. An array of more than half of it is not copied."""

WRITTEN_BYTES = 16 * 2**20
"""Zeros that are written at a time where the system (macOS) has no call that allocates."""

log = logging.getLogger(__name__)


class Columns:
    """The copies of one study's arrays. Every method may be called from any thread."""

    def __init__(self) -> None:
        """Copy nothing yet."""
        self._copies: LRUCache[np.ndarray] = LRUCache(MAX_BYTES)
        self._refused: set[str] = set()

    def get(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        blocks: Callable[[], Iterator[tuple[int, np.ndarray]]],
    ) -> np.ndarray | None:
        """The copy of an array, made if it is missing.

        Args:
            name: The array.
            shape: Its sizes, the images first.
            dtype: Of its numbers.
            blocks: Reads it: the first image of each block, and the values.

        Returns:
            The array with the images last, read from the disk where it is looked at; None where there is no room.
        """
        if name in self._refused or int(np.prod(shape)) * dtype.itemsize > MAX_BYTES // 2:
            return None
        try:
            return self._copies.get_or_create(name, lambda: _copy(shape, dtype, blocks))
        except OSError as error:
            log.warning("%s is read from the study each time: %s", name, error)
            self._refused.add(name)
            return None


def _copy(
    shape: tuple[int, ...], dtype: np.dtype, blocks: Callable[[], Iterator[tuple[int, np.ndarray]]]
) -> np.ndarray:
    with tempfile.TemporaryFile(prefix="vitrail-columns-") as file:  # which is gone once the array is
        _allocate(file, int(np.prod(shape)) * dtype.itemsize)
        copy = np.memmap(file, dtype, "w+", shape=(*shape[1:], shape[0]))
    for start, values in blocks():
        copy[..., start : start + len(values)] = np.moveaxis(values, 0, -1)
    return copy


def _allocate(file: IO[bytes], n_bytes: int) -> None:
    """Takes all room at once: writing to a sparse file on a full disk ends the process (SIGBUS) and raises nothing."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, n_bytes)
        return
    for start in range(0, n_bytes, WRITTEN_BYTES):
        file.write(bytes(min(WRITTEN_BYTES, n_bytes - start)))
    file.flush()
