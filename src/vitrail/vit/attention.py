"""What a reader is handed at an attention call, and which events readers can ask for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.errors import Unsupported
from vitrail.vit.anatomy import Block, Call, Kind
from vitrail.vit.intercept import RawCall

__all__ = ["LayerAttention", "Readers"]


class LayerAttention:
    """One attention call as a reader meets it. Tensors are canonical, [image, (window,) head, ..]; an image is a row
    of the batch, so with `copies` there are copies x image of them, copy-major.

    Attributes:
        layer, call: zero-based indices of the block and of the call in it.
        kind: what is attended (see `vitrail.vit.anatomy.Kind`).
        grid: (rows, columns) of the patches among the keys, or None.
        prefix: number of keys before the patches (class, distillation, register tokens).
        q, k: [image, window, head, token, channel], None where the model computes the map by hand.
        v: [image, window, head, token, channel].
        mask: the additive mask as the model gave it, or None. scale: factor on q k^T.
        out: heads' output [image, window, head, query, channel] after edits; None where a native kernel answered.
        row_stochastic: rows sum to 1 (false under talking heads).
    """

    def __init__(
        self, layer: int, call: int, spec: Call, block: Block, raw: RawCall, rows: int, out: Tensor | None,
        final: Tensor | None, bias: Tensor | None, slots: Callable[[], Tensor],
    ) -> None:  # fmt: skip
        self.layer, self.call, self._spec, self._block = layer, call, spec, block
        self._raw, self._rows, self._final, self._bias, self._slots = raw, rows, final, bias, slots
        self._out = out
        self.kind: Kind = spec.kind
        self.row_stochastic = spec.row_stochastic
        self.scale, self.mask = raw.scale, raw.mask
        self.grid = block.grid
        patches = block.grid[0] * block.grid[1] if block.grid else 0
        self.prefix = max(0, spec.keys - patches) if block.grid and spec.windows == 1 else 0

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self._spec.heads

    @property
    def windows(self) -> int:
        """Number of windows an image is cut into (1: none)."""
        return self._spec.windows

    @cached_property
    def q(self) -> Float[Tensor, "image window head token channel"] | None:
        """Queries, after any norm and rotary position."""
        return None if self._raw.q is None else self._spec.layout.canonical(self._raw.q, self._rows)

    @cached_property
    def k(self) -> Float[Tensor, "image window head token channel"] | None:
        """Keys, after any norm and rotary position."""
        return None if self._raw.k is None else self._spec.layout.canonical(self._raw.k, self._rows)

    @cached_property
    def v(self) -> Float[Tensor, "image window head token channel"]:
        """Values."""
        return self._spec.layout.canonical(self._raw.v, self._rows)

    @property
    def out(self) -> Float[Tensor, "image window head token channel"] | None:
        """What the heads give, before the output projection."""
        return None if self._out is None else self._spec.layout.canonical(self._out, self._rows)

    def weights(self) -> Float[Tensor, "image head query key"]:
        """Post-softmax attention, float32 or wider, computed now. Raises `Unsupported` where it is no such map."""
        if self.kind in ("channel", "unknown"):
            raise Unsupported(
                f"L{self.layer} of this model attends between channels or in a way that is not understood "
                f"(kind {self.kind!r}), so it has no token map. Its heads can still be pruned."
            )
        if self.windows > 1:
            raise Unsupported(
                f"L{self.layer} attends within {self.windows} windows; ask for `window_weights()`, or for "
                "`weights_on_grid()` to have them put back on the image grid."
            )
        return self._canonical_weights()[:, 0]

    def window_weights(self) -> Float[Tensor, "image window head query key"]:
        """Post-softmax attention per window; one window for models without windows."""
        if self.kind in ("channel", "unknown"):
            return self.weights().unsqueeze(1)
        return self._canonical_weights()

    @property
    def slots(self) -> Int[Tensor, "window slot"]:
        """Which token sits in each slot of each window; -1 is padding. Measured, not configured."""
        return self._slots()

    def weights_on_grid(self) -> Float[Tensor, "image head query key"]:
        """Token x token maps for windowed attention too: zero between tokens of different windows."""
        if self.windows == 1:
            return self.weights()
        slots, inside = self.slots, self.window_weights()
        full = inside.new_zeros((inside.shape[0], self.heads, self._block.tokens, self._block.tokens))
        for window, members in enumerate(slots):
            real = (members >= 0).nonzero().flatten()
            tokens = members[real]
            full[:, :, tokens[:, None], tokens[None, :]] = inside[:, window][:, :, real[:, None], real[None, :]]
        return full

    def weights_in_chunks(
        self, max_bytes: int = 256 * 2**20
    ) -> Iterator[tuple[slice, Float[Tensor, "image head query key"]]]:
        """`weights()` for a few images at a time, so that no more than about `max_bytes` are held."""
        per_image = self.heads * self._spec.queries * self._spec.keys * 4 * 2
        step = max(1, max_bytes // per_image)
        if step >= self._rows or not self._raw.fused or self._raw.mask is not None or self._final is not None:
            yield slice(0, self._rows), self.weights()
            return
        q, k = self.q, self.k
        assert q is not None
        assert k is not None
        for start in range(0, self._rows, step):
            part = slice(start, min(start + step, self._rows))
            scores = torch.matmul(q[part, 0] * self.scale, k[part, 0].mT)
            yield part, torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))

    def _canonical_weights(self) -> Tensor:
        if self._final is not None:
            return self._final
        return self._spec.layout.canonical(self._raw.weights(self._bias), self._rows)


@dataclass(frozen=True)
class Readers:
    """What is told to whom during a pass. Everything a reader does is invisible to the tap.

    attention: called with a `LayerAttention` at every attention call of a block.
    residual: (layer, tokens [image token channel]) after attention + residual, where the model's code shows that sum.
    output: (layer, tokens [image token channel]) what the block returns.
    """

    attention: Callable[[LayerAttention], None] | None = None
    residual: Callable[[int, Tensor], None] | None = None
    output: Callable[[int, Tensor], None] | None = None

    @staticmethod
    def joined(several: Sequence["Readers"]) -> "Readers":
        """One `Readers` that tells all of them, in order."""
        return Readers(
            _each([readers.attention for readers in several]),
            _each([readers.residual for readers in several]),
            _each([readers.output for readers in several]),
        )


def _each(functions: Sequence[Callable[..., None] | None]) -> Callable[..., None] | None:
    given = [function for function in functions if function is not None]
    if not given:
        return None

    def tell(*args: Any) -> None:
        for function in given:
            function(*args)

    return tell
