"""Where the attention of a model is: blocks, heads, grid, prefix tokens, found by tracing, not configured.

Two forward passes of different batch size run on a throw-away clone whose modules report their path. What changes
between the two is the batch dimension; the chained children of a container that hold attention calls are the blocks;
the grid comes from the block's input or the patch embedding and is confirmed by changing the image's four corners.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrail.errors import NoAttention, Unsupported
from vitrail.vit.clone import clone_sharing, images_accepted
from vitrail.vit.layout import CallLayout, TokenLayout
from vitrail.vit.trace import Seen, Trace, Tracer, Visit, units_of

__all__ = ["Anatomy", "Block", "Call", "Kind", "discover"]

Kind = Literal["token", "window", "class", "pooled", "channel", "unknown"]
"""token: every token to every token; window: within windows; class: one query; pooled: queries and keys are other sets
of tokens; channel: between channels, not tokens; unknown: none of these, so no map is offered."""

_HEAD_COUNT = ("num_heads", "heads", "num_attention_heads", "n_head", "n_heads", "nhead")
_CLASS_TOKEN = re.compile(r"(^|\.)(cls|class)_?(token|tok|embedding|embed|emb)s?$")


@dataclass(frozen=True)
class Call:
    """One attention call of a block. `queries` and `keys` count tokens (slots of one window for kind "window")."""

    path: str
    kind: Kind
    layout: CallLayout
    head_dim: int
    windows: int
    queries: int
    keys: int
    fused: bool
    row_stochastic: bool

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.layout.heads


@dataclass(frozen=True)
class Block:
    """One unit of the chain: its attention calls, and its tokens as prefix + grid (rows, columns) in raster order.

    `grid` is None where tokens lie on no raster that could be confirmed. `inputs` and `outputs` name, per leaf, the
    batch dimension and how many times the number of images it is long.
    """

    path: str
    calls: tuple[Call, ...]
    tokens: int
    prefix: int
    grid: tuple[int, int] | None
    layout: TokenLayout
    main_input: int
    inputs: tuple[tuple[int, int] | None, ...]
    outputs: tuple[tuple[int, int] | None, ...]

    @property
    def heads(self) -> int:
        """Heads of the block's first attention call."""
        return self.calls[0].heads

    @property
    def kind(self) -> Kind:
        """Kind of the block's first attention call."""
        return self.calls[0].kind

    @property
    def maps_on_grid(self) -> bool:
        """The first call's map joins tokens that lie on a known grid."""
        return self.grid is not None and self.kind in ("token", "window")


@dataclass(frozen=True)
class Anatomy:
    """All blocks in the order they run, for images of `image_shape` (channels, rows, columns).

    `pools` are attention calls outside the blocks; `notes` say what was uncertain.
    """

    blocks: tuple[Block, ...]
    pools: tuple[str, ...]
    class_token: bool
    image_shape: tuple[int, int, int]
    notes: tuple[str, ...] = ()

    @property
    def grid(self) -> tuple[int, int] | None:
        """The grid that all blocks share, else None."""
        grids = {block.grid for block in self.blocks}
        return next(iter(grids)) if len(grids) == 1 else None

    def class_index(self, layer: int) -> int | None:
        """Which token of the layer is the class token, if it has joined by then."""
        block = self.blocks[layer]
        return 0 if self.class_token and (block.prefix > 0 or block.kind == "class") else None


@torch.no_grad()
def discover(model: nn.Module, images: Tensor) -> Anatomy:
    """Traces the model on `images` [3 or more, channel, row, column] and describes it.

    Raises `NoAttention` where no token attention is seen, `Unsupported` where blocks cannot be told apart.
    """
    clone = clone_sharing(model)
    tracer = Tracer(clone)
    with images_accepted(model, images[:2].shape):
        two, three = tracer.run(images[:2]), tracer.run(images[:3])
    if not two.calls:
        raise NoAttention(
            f"{type(model).__name__} made no attention call in a forward pass: no scaled_dot_product_attention, no "
            "nn.MultiheadAttention and no softmax followed by a product. Vitrail looks at vision transformers."
        )
    if [call.path for call in two.calls] != [call.path for call in three.calls]:
        raise Unsupported(
            f"{type(model).__name__} takes another path for another batch size ({len(two.calls)} attention calls for 2 "
            f"images, {len(three.calls)} for 3), so its blocks cannot be followed."
        )
    units = units_of(tracer, two, images[:2])
    if any(path not in two.visits for path in units if path):
        tracer = Tracer(clone_sharing(model), keep=units)
        two, three = tracer.run(images[:2]), tracer.run(images[:3])
    return _Describer(tracer, two, three, units, images).anatomy()


class _Describer:
    """Puts the two traces together into an `Anatomy`."""

    def __init__(self, tracer: Tracer, two: Trace, three: Trace, units: dict[str, list[int]], images: Tensor) -> None:
        self.model, self.tracer, self.two, self.three, self.units, self.images = (
            tracer.model, tracer, two, three, units, images,
        )  # fmt: skip
        self.notes: list[str] = []

    def anatomy(self) -> Anatomy:
        """The anatomy, with its blocks in the order they run."""
        class_token = any(_CLASS_TOKEN.search(name) for name, _ in self.model.named_parameters())
        blocks: list[Block] = []
        for path, indices in sorted(self.units.items(), key=lambda item: item[1]):
            if path:
                pairs = [(self.two.calls[index], self.three.calls[index]) for index in indices]
                blocks.append(self._block(path, pairs, blocks[-1] if blocks else None))
        blocks = self._confirmed(blocks)
        self._check_prefix(blocks)
        return Anatomy(
            tuple(blocks),
            tuple(self.two.calls[index].path for index in self.units.get("", [])),
            class_token and any(block.prefix or block.kind == "class" for block in blocks),
            (self.images.shape[1], self.images.shape[2], self.images.shape[3]),
            tuple(self.notes),
        )

    def _block(self, path: str, pairs: list[tuple[Seen, Seen]], previous: Block | None) -> Block:
        visits = self.two.visits.get(path, [])
        if len(visits) != 1:
            raise Unsupported(
                f"The block {path} runs {len(visits)} times in one forward pass; a block that is used several times "
                "cannot be told from its other runs."
            )
        visit, other = visits[0], self.three.visits[path][0]
        inputs = _batch_dimensions(visit.inputs, other.inputs)
        outputs = _batch_dimensions(visit.outputs, other.outputs)
        main = _main_leaf(visit.inputs, inputs, path)
        layouts = [self._call_layout(one, two) for one, two in pairs]
        inner = layouts[0].heads * pairs[0][0].v[-1]
        layout = _token_layout(tuple(visit.inputs[main].shape), inputs[main], inner)
        tokens = layout.canonical(visit.inputs[main]).shape[1]
        tokens_out = _tokens_out(visit.outputs, outputs, layout, inner)
        calls = tuple(
            self._call(one, call_layout, tokens, tokens_out)
            for (one, _), call_layout in zip(pairs, layouts, strict=True)
        )
        grid = self._grid(visit, main, layout, tokens, previous, pairs[0][0].order)
        prefix = tokens - grid[0] * grid[1] if grid else 0
        return Block(path, calls, tokens, prefix, grid, layout, main, inputs, outputs)

    def _call_layout(self, one: Seen, two: Seen) -> CallLayout:
        lead, lead_three = one.weights[:-2], two.weights[:-2]
        fixed = [axis for axis in range(1, len(lead)) if lead[axis] == lead_three[axis]]
        for heads in self._head_counts(one):
            axes = [axis for axis in fixed if lead[axis] == heads]
            if axes:
                return CallLayout(heads, axes[0] if len(axes) == 1 else self._head_axis(one, axes))
            per_image = lead[0] // 2
            if len(lead) == 1 and per_image % heads == 0:
                return CallLayout(heads, folded=True)
        if len(lead) == 2 and fixed:
            return CallLayout(lead[1])
        raise Unsupported(
            f"The attention in {one.path or 'the model'} has weights of shape {list(one.weights)} for 2 images and no "
            f"attribute that says how many heads it has ({', '.join(_HEAD_COUNT)}). Give the module one of them."
        )

    def _head_axis(self, call: Seen, axes: list[int]) -> int:
        """With as many windows as heads: a changed patch changes v in every head, but in few windows."""
        difference = self._change_of_v(call)
        spread = []
        for axis in axes:
            along = difference.movedim(axis, 0).flatten(1).sum(1)
            spread.append(float(along.max() / along.sum().clamp_min(1e-12)))
        return axes[spread.index(min(spread))]

    def _head_counts(self, call: Seen) -> Iterator[int]:
        for path in reversed(call.stack):
            module = self.model.get_submodule(path)
            for name in _HEAD_COUNT:
                value = getattr(module, name, None)
                if isinstance(value, int) and value > 0:
                    yield value

    def _call(self, seen: Seen, layout: CallLayout, n_in: int, n_out: int) -> Call:
        queries, keys = seen.weights[-2:]
        head_dim = seen.v[-1]
        lead = 1
        for size in seen.weights[:-2]:
            lead *= size
        windows = lead // (2 * layout.heads)
        kind = _kind(n_in, n_out, windows, queries, keys, head_dim)
        if kind == "token" and head_dim == n_in and not self._mixes_tokens(seen):
            kind = "channel"
        return Call(
            seen.path, kind, layout, head_dim, windows, queries, keys, seen.fused, row_stochastic=seen.row_error < 1e-2
        )

    def _mixes_tokens(self, seen: Seen) -> bool:
        """With as many tokens as channels in a head: does changing one patch change a row of v, or a column?"""
        difference = self._change_of_v(seen).flatten(0, -3).sum(0)
        rows, columns = difference.amax(1), difference.amax(0)
        return bool(rows.max() / rows.sum().clamp_min(1e-12) >= columns.max() / columns.sum().clamp_min(1e-12))

    def _change_of_v(self, call: Seen) -> Tensor:
        """How much each element of v moves when the image's first patch does: the leading dimension is halved."""
        changed = self.images[:2].clone()
        side = max(1, changed.shape[-1] // 16)
        changed[1] = changed[0]
        changed[1, :, :side, :side] += 1
        v = self.tracer.value_at(call.order, changed)
        return (v[v.shape[0] // 2 :] - v[: v.shape[0] // 2]).abs()

    def _grid(
        self, visit: Visit, main: int, layout: TokenLayout, tokens: int, previous: Block | None, order: int
    ) -> tuple[int, int] | None:
        shape = visit.inputs[main].shape
        if layout.order in ("NHWC", "NCHW"):
            return (shape[1], shape[2]) if layout.order == "NHWC" else (shape[2], shape[3])
        pair = _integer_pair(visit.inputs, tokens)
        if pair:
            return pair
        if previous is not None and previous.grid:
            halved = ((previous.grid[0] + 1) // 2, (previous.grid[1] + 1) // 2)
            if previous.tokens == tokens:
                return previous.grid
            if previous.kind == "pooled" and halved[0] * halved[1] == tokens:
                return halved
        inside = tuple(f"{path}." for path in self.units if path)
        for when, path, grid in reversed(self.two.grids):
            if when < order and not path.startswith(inside) and 0 <= tokens - grid[0] * grid[1] <= max(16, tokens // 4):
                return grid
        return None

    def _confirmed(self, blocks: list[Block]) -> list[Block]:
        """Checks the first block's grid by changing the image's corners; finds it so where nothing else told it."""
        first = blocks[0]
        corners, certain = self._corners(first)
        if first.grid is None and certain:
            found = _grid_from_corners(corners, first.tokens)
            if found:
                prefix, grid = found
                return [
                    replace(block, prefix=prefix, grid=grid) if block.tokens == first.tokens else block
                    for block in blocks
                ]
        if first.grid is None:
            self.notes.append(
                f"{first.path}: {first.tokens} tokens lie on no grid that could be found; no grid measures."
            )
            return blocks
        rows, columns = first.grid
        expected = [first.prefix + index for index in (0, columns - 1, (rows - 1) * columns, rows * columns - 1)]
        if certain and all(_near(a, b, first.prefix, columns) for a, b in zip(corners, expected, strict=True)):
            return blocks
        if not certain and not self._same_each_time(first):
            self.notes.append(f"{first.path}: tokens are drawn or shuffled at random in each pass; no grid measures.")
            return [replace(block, prefix=0, grid=None) for block in blocks]
        if not certain:
            self.notes.append(f"{first.path}: the {rows}x{columns} grid could not be confirmed at the image's corners.")
            return blocks
        self.notes.append(
            f"{first.path}: tokens do not lie in raster order (the image's corners are tokens {corners}, "
            f"not {expected}); no grid measures."
        )
        return [replace(block, prefix=0, grid=None) for block in blocks]

    def _corners(self, block: Block) -> tuple[list[int], bool]:
        """The tokens that move when a corner of the image does, and whether each corner moves mainly one token."""
        height, width = self.images.shape[-2:]
        rows, columns = block.grid or (max(1, height // 4), max(1, width // 4))
        high, wide = max(1, height // rows // 2), max(1, width // columns // 2)
        batch = self.images[:1].repeat(5, 1, 1, 1)
        batch[1, :, :high, :wide] += 1
        batch[2, :, :high, -wide:] += 1
        batch[3, :, -high:, :wide] += 1
        batch[4, :, -high:, -wide:] += 1
        leaf = self.tracer.run(batch).visits[block.path][0].inputs[block.main_input]
        tokens = block.layout.canonical(leaf).float()
        if tokens.shape[1] != block.tokens or tokens.shape[0] != 5:
            return [], False
        moved = (tokens[1:] - tokens[:1]).norm(dim=-1)
        share = moved.amax(1) / moved.sum(1).clamp_min(1e-12)
        return [int(index) for index in moved.argmax(1)], bool((share > 0.3).all())

    def _same_each_time(self, block: Block) -> bool:
        """The same image twice on a batch gives the same tokens (ViT-MAE shuffles them, even where it drops none)."""
        leaf = self.tracer.run(self.images[:1].repeat(2, 1, 1, 1)).visits[block.path][0].inputs[block.main_input]
        one, two = block.layout.canonical(leaf).flatten(1).unflatten(0, (2, -1))
        return torch.allclose(one, two, rtol=1e-2, atol=1e-3 * float(one.abs().max()))

    def _check_prefix(self, blocks: list[Block]) -> None:
        stated = getattr(self.model, "num_prefix_tokens", None)
        if isinstance(stated, int) and blocks[0].grid and any(block.prefix != stated for block in blocks):
            traced = sorted({block.prefix for block in blocks})
            self.notes.append(f"The model states {stated} prefix tokens; traced, its blocks have {traced}.")


def _kind(n_in: int, n_out: int, windows: int, queries: int, keys: int, head_dim: int) -> Kind:
    if windows > 1:
        return "window" if queries == keys else "pooled"
    if queries == keys == n_in:
        return "token"
    if head_dim in (n_in, n_out) and queries == keys:
        return "channel"
    if queries == 1 and keys > 1:
        return "class"
    if queries == keys == n_out:
        return "token"
    return "pooled" if queries != keys else "unknown"


def _batch_dimensions(two: list[Any], three: list[Any]) -> tuple[tuple[int, int] | None, ...]:
    """Per leaf: which dimension is the batch, and how many times the number of images it is long."""
    return tuple(_batch_dimension(a, b) for a, b in zip(two, three, strict=True))


def _batch_dimension(two: Any, three: Any) -> tuple[int, int] | None:
    if not isinstance(two, Tensor) or not isinstance(three, Tensor) or two.ndim != three.ndim:
        return None
    for axis, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)):
        if a != b and a % 2 == 0 and a // 2 * 3 == b:
            return axis, a // 2
    return None


def _main_leaf(leaves: list[Any], spec: tuple[tuple[int, int] | None, ...], path: str) -> int:
    sizes = [
        leaf.numel() if entry and leaf.is_floating_point() and leaf.ndim >= 3 else 0
        for leaf, entry in zip(leaves, spec, strict=True)
    ]
    if not any(sizes):
        raise Unsupported(f"The block {path} takes no batch of token vectors as input, so it cannot be followed.")
    return sizes.index(max(sizes))


def _token_layout(shape: tuple[int, ...], batch: tuple[int, int] | None, inner: int) -> TokenLayout:
    if len(shape) == 3:
        return TokenLayout("LNC" if batch and batch[0] == 1 else "NLC")
    if shape[-1] == inner or (shape[1] != inner and shape[1] == shape[2]):
        return TokenLayout("NHWC")
    return TokenLayout("NCHW")


def _tokens_out(leaves: list[Any], spec: tuple[tuple[int, int] | None, ...], layout: TokenLayout, inner: int) -> int:
    candidates = [(leaf, entry) for leaf, entry in zip(leaves, spec, strict=True) if entry and leaf.ndim >= 3]
    if not candidates:
        return 0
    leaf, entry = max(candidates, key=lambda item: item[0].numel())
    form = layout if leaf.ndim == len(layout.order) else _token_layout(tuple(leaf.shape), entry, inner)
    return int(form.canonical(leaf).shape[1])


def _integer_pair(leaves: list[Any], tokens: int) -> tuple[int, int] | None:
    for one, two in pairwise(leaves):
        if type(one) is int and type(two) is int and one > 0 and one * two == tokens:
            return one, two
    for leaf in leaves:
        if isinstance(leaf, torch.Size) and len(leaf) == 2 and leaf[0] * leaf[1] == tokens:
            return int(leaf[0]), int(leaf[1])
    return None


def _near(found: int, expected: int, prefix: int, columns: int) -> bool:
    """At most one patch apart: a stem whose kernels overlap may move the neighbour more."""
    row, column = divmod(found - prefix, columns)
    wanted_row, wanted_column = divmod(expected - prefix, columns)
    return max(abs(row - wanted_row), abs(column - wanted_column)) <= 1


def _grid_from_corners(corners: list[int], tokens: int) -> tuple[int, tuple[int, int]] | None:
    left_top, right_top, left_bottom, right_bottom = corners
    columns = right_top - left_top + 1
    if columns < 1 or (left_bottom - left_top) % columns:
        return None
    rows = (left_bottom - left_top) // columns + 1
    fits = rows * columns + left_top == tokens and right_bottom == tokens - 1
    return (left_top, (rows, columns)) if fits else None
