"""What a reader is handed at an attention call, and which events of a pass readers can ask for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from vitrail.errors import Unsupported
from vitrail.tap.anatomy import MAPLESS_KINDS, Block, Kind
from vitrail.tap.intercept import RawCall
from vitrail.tap.layout import MAP_AXES

__all__ = ["CallResult", "LayerAttention", "Readers"]


class CallResult(NamedTuple):
    """What an attention call gave after edits, in the model's own layout.

    Attributes:
        out: Heads' output, None where a native kernel answered.
        weights: The canonical map that an edit's region has changed, None where none did.
        bias: What edits added to the scores, None where nothing.
    """

    out: Tensor | None = None
    weights: Tensor | None = None
    bias: Tensor | None = None


class LayerAttention:
    """One attention call as a reader meets it.

    Tensors are in canonical order, [image, (window,) head, ..]. An image is a row of the batch: a run with `copies` has
    copies x image of them, copy-major. Tokens that are no patches come first, also those that the model has behind the
    patches (`Block.behind`), and the class token before all others. Everything is computed when it is asked for.

    Attributes:
        layer: Zero-based index of the block.
        call: Zero-based index of the attention call in its block.
        kind: What is attended (see `vitrail.tap.anatomy.Kind`).
        grid: (rows, columns) of the patches among the keys, or None.
        prefix: Number of keys that are no patches (class, distillation, register, detection tokens, prompts).
        mask: The additive mask as the model gave it, or None.
        scale: Factor on q k^T.
        is_softmax_of_qk: The unedited map is softmax(scale q k^T + mask): false where the model computes it by hand, or
            changes its scores by a function (`flex_attention`).
        row_stochastic: Rows of the map sum to 1 (false where heads are mixed after softmax).
        layer_heads: Which of the layer's heads these are: a layer counts the heads of all its attention calls.
        repeat: How many calls of the block have run these heads before (0, but for loops and differences of maps).
        follows: It works on what an earlier call of the block gave; else they run beside each other.
        is_last: The block's last call.

    Example:
        >>> maps = []
        >>> reader = Readers(attention=lambda attention: maps.append(attention.weights()))
        >>> logits = vit.tap().read(images, reader)
        >>> maps[3].shape  # of L3: image, head, query, key
        torch.Size([8, 12, 197, 197])
    """

    def __init__(
        self,
        layer: int,
        call: int,
        block: Block,
        raw: RawCall,
        rows: int,
        result: CallResult,
        slots: Callable[[], Tensor],
    ) -> None:
        """Made by the tap: `rows` is images times copies, `slots` measures the window slots when they are needed."""
        self.layer, self.call = layer, call
        self._block, self._spec = block, block.calls[call]
        self._raw, self._rows, self._result, self._slots = raw, rows, result, slots
        self.kind: Kind = self._spec.kind
        self.row_stochastic = self._spec.row_stochastic
        self.layer_heads, self.repeat = self._spec.layer_heads, self._spec.repeat
        self.follows = self._spec.follows
        self.is_last = call == len(block.calls) - 1
        self.scale, self.mask, self.is_softmax_of_qk = raw.scale, raw.mask, raw.is_softmax_of_qk
        self.grid = block.grid
        patches = block.grid[0] * block.grid[1] if block.grid else 0
        self.prefix = max(0, self._spec.keys - patches) if block.grid and self._spec.windows == 1 else 0

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
        """Queries, after any norm and rotary position; None where the model computes the map by hand."""
        return None if self._raw.q is None else self._spec.layout.canonical(self._raw.q, self._rows)

    @cached_property
    def k(self) -> Float[Tensor, "image window head token channel"] | None:
        """Keys, after any norm and rotary position; None where the model computes the map by hand."""
        return None if self._raw.k is None else self._spec.layout.canonical(self._raw.k, self._rows)

    @cached_property
    def v(self) -> Float[Tensor, "image window head token channel"]:
        """Values."""
        return self._spec.layout.canonical(self._raw.v, self._rows)

    @property
    def out(self) -> Float[Tensor, "image window head token channel"] | None:
        """What the heads give after edits, before the output projection; None where a native kernel answered."""
        return None if self._result.out is None else self._spec.layout.canonical(self._result.out, self._rows)

    def register_out_hook(
        self, hook: Callable[[Float[Tensor, "image window head query channel"]], None]
    ) -> RemovableHandle:
        """Registers a function that is called with the gradient of `out`, when one is taken after the pass.

        Args:
            hook: Given the gradient, in canonical order; it is called anew for every gradient that is taken.

        Returns:
            The handle that removes it. A hook that holds this call keeps all of its pass in memory until it is removed.

        Raises:
            Unsupported: A native kernel answered, or the model lets no gradient through.
        """
        out = self._result.out
        if out is None or not out.requires_grad:
            raise Unsupported(
                f"No gradient reaches the attention of L{self.layer}; enable gradients and let the images or the "
                "weights require one."
            )
        layout, rows = self._spec.layout, self._rows
        handle: RemovableHandle = out.register_hook(lambda gradient: hook(layout.canonical(gradient, rows)))
        return handle

    def weights(self) -> Float[Tensor, "image head query key"]:
        """Computes the attention map after softmax.

        Returns:
            Weights in 0 .. 1, float32 or wider, after edits.

        Raises:
            Unsupported: The attention is between channels, not understood, or within windows.
        """
        self._require_whole_map()
        return self._canonical_weights()[:, 0]

    def window_weights(self) -> Float[Tensor, "image window head query key"]:
        """Computes the attention map of each window; one window for models without windows.

        Returns:
            Weights in 0 .. 1, float32 or wider, after edits; query and key count slots of a window.

        Raises:
            Unsupported: The attention is between channels or not understood.
        """
        self._require_map()
        return self._canonical_weights()

    @property
    def slots(self) -> Int[Tensor, "window slot"]:
        """Which token sits in each slot of each window; -1 is padding. Measured, not configured."""
        return self._slots()

    def weights_on_grid(self) -> Float[Tensor, "image head query key"]:
        """Puts the maps of windows back on the image: query and key count tokens of the block.

        Returns:
            Weights in 0 .. 1; zero between tokens of different windows.

        Raises:
            Unsupported: There is no map, or tokens are not each in exactly one window slot.
        """
        if self.windows == 1:
            return self.weights()
        if self._spec.queries != self._spec.keys:
            raise Unsupported(
                f"L{self.layer} attends within {self.windows} windows from {self._spec.queries} queries to "
                f"{self._spec.keys} keys, so its maps do not join tokens with the same tokens."
            )
        slots, by_window = self.slots, self.window_weights()
        full = by_window.new_zeros((by_window.shape[0], self.heads, self._block.tokens, self._block.tokens))
        for window, members in enumerate(slots):
            real = (members >= 0).nonzero().flatten()
            tokens = members[real]
            full[:, :, tokens[:, None], tokens[None, :]] = by_window[:, window][:, :, real[:, None], real[None, :]]
        return full

    def weights_in_chunks(
        self, max_bytes: int = 256 * 2**20
    ) -> Iterator[tuple[slice, Float[Tensor, "image head query key"]]]:
        """Computes `weights()` for a few images at a time.

        Hand-written attention, score functions, masks and edited maps come in one piece: there the whole map exists
        already.

        Args:
            max_bytes: About how much memory the scores and weights of one piece may take.

        Yields:
            The slice of images and their weights.

        Raises:
            Unsupported: As `weights()` does.
        """
        self._require_whole_map()
        per_image = self.heads * self._spec.queries * self._spec.keys * 4 * 2
        step = max(1, max_bytes // per_image)
        changed = self._result.weights is not None or self._result.bias is not None
        if step >= self._rows or not self.is_softmax_of_qk or self._raw.mask is not None or changed:
            yield slice(0, self._rows), self.weights()
            return
        q, k = self.q, self.k
        assert q is not None
        assert k is not None
        for start in range(0, self._rows, step):
            part = slice(start, min(start + step, self._rows))
            scores = torch.matmul(q[part, 0] * self.scale, k[part, 0].mT)
            yield part, torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))

    def _require_map(self) -> None:
        if self.kind in MAPLESS_KINDS:
            raise Unsupported(
                f"L{self.layer} of this model attends between channels or in a way that is not understood "
                f"(kind {self.kind!r}), so it has no token map. Its heads can still be pruned."
            )

    def _require_whole_map(self) -> None:
        self._require_map()
        if self.windows > 1:
            raise Unsupported(
                f"L{self.layer} attends within {self.windows} windows; ask for `window_weights()`, or for "
                "`weights_on_grid()` to have them put back on the image grid."
            )

    def _canonical_weights(self) -> Tensor:
        weights = self._result.weights
        if weights is None:
            weights = self._spec.layout.canonical(self._raw.weights(self._result.bias), self._rows, MAP_AXES)
        # a model that computes its map by hand does so in its own precision
        return weights.to(torch.promote_types(weights.dtype, torch.float32))


@dataclass(frozen=True)
class Readers:
    """Functions that are called during a pass. Whatever a reader computes is invisible to the tap.

    Attributes:
        attention: Called with a `LayerAttention` at every attention call of a block.
        residual: Called with (layer, tokens [image token channel]) after attention has been added to the block's input,
            where the model's code has such a sum.
        output: Called with (layer, tokens [image token channel]), what the block returns.

    Example:
        >>> tokens = {}
        >>> logits = vit.tap().read(images, Readers(output=tokens.__setitem__))
        >>> tokens[0].shape  # what L0 returns
        torch.Size([8, 197, 192])
    """

    attention: Callable[[LayerAttention], None] | None = None
    residual: Callable[[int, Tensor], None] | None = None
    output: Callable[[int, Tensor], None] | None = None

    @staticmethod
    def join(several: Sequence["Readers"]) -> "Readers":
        """Combines several `Readers` into one that calls each of them in order.

        Args:
            several: Any number of `Readers`.

        Returns:
            `Readers` that read what any of them reads.
        """
        return Readers(
            _in_turn([readers.attention for readers in several]),
            _in_turn([readers.residual for readers in several]),
            _in_turn([readers.output for readers in several]),
        )


def _in_turn(functions: Sequence[Callable[..., None] | None]) -> Callable[..., None] | None:
    readers = [function for function in functions if function is not None]
    if not readers:
        return None

    def call_each(*args: Any) -> None:
        for function in readers:
            function(*args)

    return call_each
