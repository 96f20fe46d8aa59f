"""Attention maps for measures: a few images at a time, in memory that is used again for every layer and batch.

Most of what a measure of maps costs is the second product of queries and keys with its softmax. Writing both into one
standing buffer, with the scale folded into the product, about halves that against fresh tensors (page faults, and a
copy of q).
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.tap.attention import LayerAttention
from vitrail.tap.budget import budget_of

__all__ = ["MapSource"]

MAX_BYTES = 64 * 2**20
"""Bound on the maps held at once on a processor."""


class MapSource:
    """Post-softmax attention of unedited passes.

    `precision` None: the product of q and k in the model's own precision, softmax in float32 or wider, as
    `LayerAttention.weights` gives it up to rounding. `torch.bfloat16`: everything in bfloat16, about a third cheaper.
    """

    def __init__(self, precision: torch.dtype | None = None) -> None:
        self._precision = precision
        self._memory: dict[torch.dtype, Tensor] = {}

    def parts(self, attention: LayerAttention) -> Iterator[Float[Tensor, "image head query key"]]:
        """The maps of all images in order, some at a time.

        Args:
            attention: Of a reader of the tap.

        Yields:
            Attention weights, overwritten when the next ones are asked for.
        """
        q, k = attention.q, attention.k
        max_bytes = budget_of(attention.v.device).bytes_for(MAX_BYTES)
        recomputed = attention.is_softmax_of_qk and attention.mask is None and attention.windows == 1
        if q is None or k is None or not recomputed:
            for _, weights in attention.weights_in_chunks(max_bytes):
                yield weights if self._precision is None else weights.to(self._precision)
            return
        step = max(1, max_bytes // (q.shape[2] * q.shape[3] * k.shape[3] * 4))
        for start in range(0, len(q), step):
            part = slice(start, start + step)
            yield self._softmax(q[part, 0], k[part, 0], attention.scale)

    def _softmax(
        self, q: Float[Tensor, "image head query channel"], k: Float[Tensor, "image head key channel"], scale: float
    ) -> Float[Tensor, "image head query key"]:
        shape = (*q.shape[:3], k.shape[2])
        narrow = self._precision or q.dtype
        wide = self._precision or torch.promote_types(q.dtype, torch.float32)
        scores, weights = self._buffer(shape, narrow, q.device), self._buffer(shape, wide, q.device)
        if budget_of(q.device).joins_images:
            q, k, products = q.flatten(0, 1)[None], k.flatten(0, 1)[None], scores.flatten(0, 1)[None]
        else:  # one image at a time: as views of a joint q, k, v they need no copy
            products = scores
        for queries, keys, product in zip(q.to(narrow), k.to(narrow), products, strict=True):
            # beta 0 ignores what lies in the buffer
            torch.baddbmm(product, queries, keys.mT, beta=0, alpha=scale, out=product)
        return torch.softmax(scores, -1, dtype=wide, out=weights)

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for one product; scores and weights of one precision share it."""
        size = math.prod(shape)
        memory = self._memory.get(dtype)
        if memory is None or memory.numel() < size or memory.device != device:
            memory = self._memory[dtype] = torch.empty(size, dtype=dtype, device=device)
        return memory[:size].view(shape)
