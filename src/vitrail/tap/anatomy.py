"""Where the attention of a model is: blocks, heads, grid, prefix tokens, found by tracing, not configured.

Two forward passes of different batch size run on a throw-away clone whose modules report their path. What changes
between the two is the batch dimension; the chained children of a container that hold attention calls are the blocks;
the grid comes from the block's input or the patch embedding and is confirmed by changing the image's four corners.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrail.errors import NoAttention, Unsupported
from vitrail.tap.class_token import find_class_tokens
from vitrail.tap.clone import clone_sharing, images_accepted
from vitrail.tap.layout import (
    MIN_TOKEN_AXES,
    BatchAxis,
    CallLayout,
    NonPatches,
    TokenLayout,
    layout_of_input,
    layout_of_output,
    main_output,
)
from vitrail.tap.raster import Corners, Raster, corners_of, fits_raster, raster_of_corners, same_each_time
from vitrail.tap.trace import (
    ModuleRun,
    Trace,
    TracedCall,
    Tracer,
    Unit,
    branch_units,
    is_fed,
    units_of,
    without_side_products,
)

__all__ = ["MAPLESS_KINDS", "Anatomy", "Block", "Call", "Kind", "discover", "layer_ranges"]

Kind = Literal["token", "window", "class", "pooled", "channel", "unknown", "hidden"]
"""token: every token to every token; window: within windows; class: one query; pooled: queries and keys are other sets
of tokens; channel: between channels, not tokens; unknown: none of these, so no map is offered; hidden: an operator that
cannot be observed computes it, so there is nothing to read or edit."""

MAPLESS_KINDS: tuple[Kind, ...] = ("channel", "unknown", "hidden")
"""Kinds of attention that have no map between tokens."""

_HEAD_COUNT = ("num_heads", "heads", "num_attention_heads", "n_head", "n_heads", "nhead")

_ROW_SUM_TOLERANCE = 1e-2
"""Rows of a map sum to 1 up to the rounding of half precision (4e-3 in bfloat16); where heads are mixed after softmax
they are off by more than 1 (CaiT: 2.6)."""

_MAX_PREFIX = 16
"""Most tokens before the patches that are believed without further evidence: models have up to 1 class, 1 distillation
and 8 register tokens. More left over by a convolution's picture mean that it is another picture."""

_MAX_PREFIX_SHARE = 1 / 4
"""On large pictures, the share of the tokens that may be prefix: a picture of half the size leaves 3/4 over."""

_FIRST_PATCH_SHARE = 1 / 16
"""Side of the changed corner of the image, as a share: at most one patch of the usual 4 x 4 grids and larger."""

_MOVED_SHARE = 1e-3
"""Values have moved if they did by this share of the most that any did: what other kernels round is far below."""

_TINY = 1e-12
"""Keeps a share of nothing from being a division by zero."""


@dataclass(frozen=True)
class Call:
    """One attention call of a block.

    Attributes:
        path: Path of the module that makes it.
        kind: What is attended.
        layout: Where its heads are.
        head_dim: Channels of v in one head.
        windows: Number of windows an image is cut into (1: none).
        queries: Number of query tokens (slots of one window for kind "window").
        keys: Number of key tokens (slots of one window for kind "window").
        fused: Made by `scaled_dot_product_attention`.
        row_stochastic: Rows of the map sum to 1.
        first_head: Which of the layer's heads its head 0 is: a layer counts the heads of all its calls.
        repeat: How many calls of the block have run the same heads before it: 0, but for weights that are used several
            times in a block (a loop) and for heads that are the difference of two maps.
        follows: It works on what an earlier call of the block gave; else they run beside each other.
        softmaxes: Which of the block's softmaxes its map comes from; none for fused calls, and for a softmax outside.
    """

    path: str
    kind: Kind
    layout: CallLayout
    head_dim: int
    windows: int
    queries: int
    keys: int
    fused: bool
    row_stochastic: bool
    first_head: int = 0
    repeat: int = 0
    follows: bool = False
    softmaxes: tuple[int, ...] = ()

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.layout.heads

    @property
    def layer_heads(self) -> slice:
        """Its heads among those of the layer."""
        return slice(self.first_head, self.first_head + self.heads)


@dataclass(frozen=True)
class Block:
    """One unit of the chain of blocks.

    Attributes:
        path: Path of its module.
        run: Which of the module's runs in a pass it is: 0, but for a module that is several blocks (shared weights).
        calls: Its attention calls, in the order they run; none where its attention is hidden.
        tokens: Number of tokens it is given.
        prefix: Number of tokens that are no patches; in canonical order they come first.
        grid: (rows, columns) of the patches, which lie in raster order; None where they lie on no raster that could be
            confirmed.
        layout: How its tokens are laid out.
        main_input: Which leaf of its arguments holds the tokens.
        inputs: For each leaf of its arguments the batch dimension, None for a leaf without one.
        outputs: The same for each leaf of what it returns.
        output_layout: How the tokens that it returns are laid out: a stage may take rows x columns x channels and
            return channels x rows x columns.
        patch_step: (rows, columns) of pixels from one patch to the next, where a convolution of the image makes the
            patches; None where that is not known, as in later stages of a hierarchy.
        in_place: Tensors that it is given, sums up or returns are changed in place, by itself or after it.
        fed: It works on what the block before it gave; the first block does not, nor the first of a second encoder, nor
            that of a run for another picture.
        class_token: The class token is among its tokens, the first of them in canonical order, or its only query.
        side_products: Which of its products with maps, in the order they run, are no attention calls: nothing that the
            block returns moves with them, as where the model keeps a map's mean position for plots.
    """

    path: str
    run: int
    calls: tuple[Call, ...]
    tokens: int
    prefix: int
    grid: tuple[int, int] | None
    layout: TokenLayout
    main_input: int
    inputs: tuple[BatchAxis | None, ...]
    outputs: tuple[BatchAxis | None, ...]
    output_layout: TokenLayout
    patch_step: tuple[int, int] | None
    in_place: bool
    fed: bool
    class_token: bool = False
    side_products: tuple[int, ...] = ()

    def call_of_product(self, product: int) -> int | None:
        """Which attention call a product with a map is.

        Args:
            product: Which of the block's products with maps, in the order they run.

        Returns:
            Index of the call; None for a product that is none.
        """
        if product in self.side_products:
            return None
        return product - sum(side < product for side in self.side_products)

    @property
    def behind(self) -> int:
        """How many of the tokens that are no patches the model has behind the patches (detection tokens, prompts)."""
        return self.layout.non_patches.behind

    @property
    def heads(self) -> int:
        """Heads of all the block's attention calls, each counted once however often it runs; 0 where it is hidden."""
        return max((call.layer_heads.stop for call in self.calls), default=0)

    @property
    def attentions(self) -> tuple[tuple[int, ...], ...]:
        """Its attention calls, those together that run the same heads."""
        first_heads = dict.fromkeys(call.first_head for call in self.calls)
        return tuple(
            tuple(number for number, call in enumerate(self.calls) if call.first_head == first) for first in first_heads
        )

    def calls_of(self, head: int) -> tuple[int, ...]:
        """The attention calls that run a head.

        Args:
            head: Zero-based index among the heads of the layer.

        Returns:
            Indices of calls; several where the block runs the head several times.
        """
        return tuple(
            number for number, call in enumerate(self.calls) if call.first_head <= head < call.layer_heads.stop
        )

    @property
    def head_dim(self) -> int:
        """Channels of a head in the block's first attention call; 0 where its attention is hidden."""
        return self.calls[0].head_dim if self.calls else 0

    @property
    def kind(self) -> Kind:
        """Kind of the block's first attention call."""
        return self.calls[0].kind if self.calls else "hidden"

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each attention call; one, "hidden", where there is none."""
        return tuple(call.kind for call in self.calls) or ("hidden",)

    @property
    def maps_on_grid(self) -> bool:
        """Whether the map of every call joins the tokens that the block is given, which lie on a known grid."""
        joins = (call.kind == "window" or (call.kind == "token" and call.queries == self.tokens) for call in self.calls)
        return self.grid is not None and all(joins)


@dataclass(frozen=True)
class Anatomy:
    """Where the attention of a model is.

    Attributes:
        blocks: All blocks, in the order they run.
        pools: Module paths of attention calls outside the blocks.
        image_shape: (channels, rows, columns) of the images that were traced, in pixels.
        notes: What was uncertain, as sentences.
    """

    blocks: tuple[Block, ...]
    pools: tuple[str, ...]
    image_shape: tuple[int, int, int]
    notes: tuple[str, ...] = ()

    @property
    def grid(self) -> tuple[int, int] | None:
        """The grid that all blocks share, else None."""
        grids = {block.grid for block in self.blocks}
        return next(iter(grids)) if len(grids) == 1 else None

    @property
    def class_token(self) -> bool:
        """Whether the model has a class token."""
        return any(block.class_token for block in self.blocks)

    @property
    def outside(self) -> tuple[str, ...]:
        """Which attention is in no layer, as sentences."""
        return tuple(
            f"Attention in {path or 'the model'} is outside the blocks: no layer has it." for path in self.pools
        )

    def class_index(self, layer: int) -> int | None:
        """Which token of the layer is the class token; None where the model has none or it joins later.

        Args:
            layer: Zero-based index of the block.

        Returns:
            Position of the token in canonical order, or None.
        """
        return 0 if self.blocks[layer].class_token else None

    def _repr_html_(self) -> str:
        """A row for each run of equal blocks, for notebooks."""
        from vitrail.tap.anatomy_table import anatomy_html  # it reads this module

        return anatomy_html(self)


@torch.no_grad()
def discover(model: nn.Module, images: Tensor) -> Anatomy:
    """Traces a model and describes where its attention is.

    Args:
        model: Any module that takes a batch of images; it is copied, not changed.
        images: Three images or more [image, channel, row, column], of the size that is to be used.

    Returns:
        The anatomy, for images of that size.

    Raises:
        NoAttention: The model makes no attention call.
        Unsupported: The model does not take such images, its blocks cannot be told apart, or it takes another path for
            another batch size.
    """
    clone = clone_sharing(model)
    tracer = Tracer(clone)
    with images_accepted(model, images[:2].shape):
        two, three = tracer.run(images[:2]), tracer.run(images[:3])
    if not two.calls:
        raise NoAttention(
            f"{type(model).__name__} made no attention call in a forward pass: no scaled_dot_product_attention, no "
            "nn.MultiheadAttention and no softmax followed by a product. Vitrail looks at vision transformers; linear "
            "attention (of EfficientViT, MobileViTv2, Performers), which multiplies keys and values first, has no map."
        )
    if [call.path for call in two.calls] != [call.path for call in three.calls]:
        raise Unsupported(
            f"{type(model).__name__} takes another path for another batch size ({len(two.calls)} attention calls for 2 "
            f"images, {len(three.calls)} for 3), so its blocks cannot be followed."
        )
    units = units_of(tracer, two, images[:2])
    paths = {unit.path for unit in units if unit}
    if any(path not in two.runs for path in paths):
        tracer.watch(paths)
        two, three = tracer.run(images[:2]), tracer.run(images[:3])
    if tracer.in_place:  # what was recorded has been written to; from now on the tracer copies it
        two, three = tracer.run(images[:2]), tracer.run(images[:3])
    calls, side_products = without_side_products(tracer, two, images[:2], units)
    return _Describer(tracer, two, three, calls, side_products, images).anatomy()


class _Describer:
    """Puts the two traces together into an `Anatomy`."""

    def __init__(
        self,
        tracer: Tracer,
        two: Trace,
        three: Trace,
        units: dict[Unit | None, list[int]],
        side_products: dict[Unit, tuple[int, ...]],
        images: Tensor,
    ) -> None:
        self.model, self.tracer, self.images = tracer.model, tracer, images
        self.two, self.three, self.units, self.side_products = two, three, units, side_products
        self.notes: list[str] = []
        self.follows: dict[tuple[Any, ...], tuple[bool, ...]] = {}
        self.own_images: dict[tuple[type[nn.Module], CallLayout], CallLayout] = {}

    def anatomy(self) -> Anatomy:
        """Describes blocks, in the order they run, and what is outside them."""
        blocks: list[Block] = []
        units = {unit: indices for unit, indices in self.units.items() if unit}
        steps = {unit: self.two.calls[indices[0]].step for unit, indices in units.items()}
        paths = list(dict.fromkeys(unit.path for unit in units))
        steps |= {Unit(path, 0): self.two.runs[path][0].step for path in self._hidden_blocks(paths)}
        for unit in sorted(steps, key=steps.__getitem__):
            pairs = [(self.two.calls[index], self.three.calls[index]) for index in units.get(unit, [])]
            blocks.append(self._block(unit, pairs, blocks[-1] if blocks else None))
            if not pairs:
                self.notes.append(
                    f"{unit.path} (L{len(blocks) - 1}) computes its attention in an operator that cannot be observed; "
                    "it keeps its number and has no heads here."
                )
        self.notes += _notes_on_calls(blocks)
        self._note_streams(blocks)
        blocks = self._confirm_grids(blocks)
        self._check_prefix(blocks)
        places = find_class_tokens(self.tracer, blocks, self.images[:2])
        blocks = [_with_class_token(block, place) for block, place in zip(blocks, places, strict=True)]
        return Anatomy(
            tuple(blocks),
            tuple(self.two.calls[index].path for index in self.units.get(None, [])),
            (self.images.shape[1], self.images.shape[2], self.images.shape[3]),
            tuple(self.notes),
        )

    def _hidden_blocks(self, units: list[str]) -> list[str]:
        """Siblings of the blocks, of the same class and with a head count, that make no attention call.

        Siblings of the same class without a head count (stages of convolutions) make none: they are noted, no layers.
        """
        hidden: list[str] = []
        for parent in dict.fromkeys(path.rpartition(".")[0] for path in units if self.tracer.container_of(path)):
            container = self.model.get_submodule(parent)
            classes = {type(self.model.get_submodule(path)) for path in units if path.rpartition(".")[0] == parent}
            for name, child in container.named_children():
                path = f"{parent}.{name}".lstrip(".")
                if any(unit == path or unit.startswith(f"{path}.") for unit in units):
                    continue
                if type(child) not in classes - {nn.Sequential} or len(self.two.runs.get(path, ())) != 1:
                    continue
                if any(_head_attributes(module) for module in child.modules()):
                    hidden.append(path)
                else:
                    self.notes.append(f"{path} makes no attention call, so it is no layer here.")
        return hidden

    def _block(self, unit: Unit, pairs: list[tuple[TracedCall, TracedCall]], previous: Block | None) -> Block:
        run, other = self.two.runs[unit.path][unit.run], self.three.runs[unit.path][unit.run]
        inputs = _batch_dimensions(run.inputs, other.inputs)
        outputs = _batch_dimensions(run.outputs, other.outputs)
        layouts = [self._call_layout(one, two) for one, two in pairs]
        maps = {(each.heads, *one.weights[-2:]) for each, (one, _) in zip(layouts, pairs, strict=True)}
        main = _main_leaf(run.inputs, inputs, unit.path, maps | {(1, *shape[1:]) for shape in maps})
        self._require_own_rows(unit, run, main, inputs[main])
        layouts = [self._of_own_images(one, each) for each, (one, _) in zip(layouts, pairs, strict=True)]
        inner = layouts[0].heads * pairs[0][0].v[-1] if pairs else 0
        sides = (self.images.shape[-2], self.images.shape[-1])
        if previous is not None and not pairs and previous.layout.n_axes == run.inputs[main].ndim:
            layout = previous.layout
        else:
            layout = layout_of_input(run.inputs[main], inputs[main], inner, sides)
        tokens = layout.canonical(run.inputs[main]).shape[1]
        returned = main_output(run.outputs, outputs, layout, maps)
        output_layout, tokens_out = layout, 0
        if returned is not None:
            output_layout = layout_of_output(*returned, run.inputs[main], layout, inner, sides)
            tokens_out = output_layout.canonical(returned[0]).shape[1]
        calls = _numbered_heads(
            [
                self._call(one, call_layout, tokens, tokens_out)
                for (one, _), call_layout in zip(pairs, layouts, strict=True)
            ],
            [(one.frames[-1].run, one.projection) for one, _ in pairs],
            self._input_channels,
        )
        follows = self._follows(unit, [one for one, _ in pairs])
        softmaxes = [self._softmaxes_in(unit, one) for one, _ in pairs]
        calls = tuple(
            replace(call, follows=one, softmaxes=two) for call, one, two in zip(calls, follows, softmaxes, strict=True)
        )
        grid = self._grid(run, main, layout, tokens, previous, pairs[0][0].step if pairs else run.step)
        prefix = tokens - grid[0] * grid[1] if grid else 0
        return Block(
            unit.path,
            unit.run,
            calls,
            tokens,
            prefix,
            grid,
            layout,
            main,
            inputs,
            outputs,
            output_layout,
            patch_step=self._patch_step(grid),
            in_place=unit in self.tracer.in_place,
            fed=previous is not None
            and is_fed(self.tracer, self.two, self.images[:2], Unit(previous.path, previous.run), unit),
            side_products=self.side_products.get(unit, ()),
        )

    def _note_streams(self, blocks: list[Block]) -> None:
        """Says where another chain of blocks begins, and which layers are branches of the tokens that go on."""
        starts = [layer for layer, block in enumerate(blocks) if not block.fed]
        units = [Unit(block.path, block.run) for block in blocks]
        past = branch_units(self.tracer, self.two, self.images[:2], units)
        branches = [layer for layer, unit in enumerate(units) if unit in past]
        for start, stop in pairwise([*starts, len(blocks)]):  # after the last of a chain, nothing tells
            branches += [stop - 1] * (stop - start > 1 and set(range(start, stop - 1)) <= {*branches})
        if len(starts) > 1:
            self.notes.append(
                f"{layer_ranges(starts[1:])} {'does' if len(starts) == 2 else 'do'} not work on what the layer before "
                "gives: the model has several encoders, or runs one for several pictures. Measures of the whole model "
                "are of the last; what is followed from layer to layer is left out."
            )
        if branches:
            self.notes.append(
                f"{layer_ranges(branches)}: the model adds what these layers return to other tokens outside them, as "
                "where attention and MLP are modules in turns. Measures of tokens are of what they return, not of the "
                "sum that goes on."
            )

    def _require_own_rows(self, unit: Unit, run: ModuleRun, main: int, batch: BatchAxis | None) -> None:
        """Refuses blocks whose batch holds several pictures for each image, or whose sequence holds several images."""
        if batch is None or batch.per_image == 1:
            return
        if batch.axis == 1 and run.inputs[main].shape[0] == 1:
            raise Unsupported(
                f"{unit.path} gets all images as one sequence of {run.inputs[main].shape[1]} tokens for 2 images, as "
                "models do that pack images of different sizes: which tokens are whose is not known to Vitrail."
            )
        if batch.axis != 0:
            return
        changed = self.images[:2].clone()
        changed[0] = self.images[2]
        other = self.tracer.run(changed).runs[unit.path][unit.run].inputs[main]
        moved = (other - run.inputs[main]).abs().flatten(1).amax(1) > 0
        if moved[: batch.per_image].all() and not moved[batch.per_image :].any():
            return  # the rows of an image lie side by side: its windows
        if not moved.any():
            raise Unsupported(
                f"{unit.path} gets {batch.per_image} rows for each image, and the same whatever the image shows, so it "
                "cannot be told whose they are. Check the weights."
            )
        raise Unsupported(
            f"{unit.path} gets {batch.per_image} rows for each image, which do not lie side by side: the model stacks "
            "several pictures on the batch, as siamese models do. Open the encoder of one picture alone, or run the "
            "pictures one after the other in forward."
        )

    def _follows(self, unit: Unit, calls: list[TracedCall]) -> tuple[bool, ...]:
        """Of each call whether its values move with the output of the call before; asked once per kind of block."""
        if len(calls) < 2:
            return (False,) * len(calls)
        kind = (type(self.model.get_submodule(unit.path)), *(call.path.removeprefix(unit.path) for call in calls))
        if kind not in self.follows:
            images = self.images[:2]
            moved = [
                not torch.equal(self.tracer.values_of(two, images), self.tracer.values_of(two, images, disturb=one))
                for one, two in pairwise(calls)
            ]
            self.follows[kind] = (False, *moved)
        return self.follows[kind]

    def _softmaxes_in(self, unit: Unit, call: TracedCall) -> tuple[int, ...]:
        """Which of a block's softmaxes the map of a call comes from."""
        own = [
            number
            for number, frames in enumerate(self.two.softmaxes)
            if next((frame.unit for frame in reversed(frames) if frame.unit in self.units), None) == unit
        ]
        return tuple(own.index(number) for number in call.softmaxes if number in own)

    def _input_channels(self, weight: str) -> int:
        """Channels that a linear map or convolution takes."""
        return int(self.model.get_parameter(weight).shape[1])

    def _call_layout(self, one: TracedCall, two: TracedCall) -> CallLayout:
        lead, lead_three = one.weights[:-2], two.weights[:-2]
        fixed = [axis for axis in range(len(lead)) if lead[axis] == lead_three[axis]]
        for heads in self._head_counts(one):
            axes = [axis for axis in fixed if lead[axis] == heads]
            if axes:
                return CallLayout(heads, axes[0] if len(axes) == 1 else self._head_axis(one, axes))
            pairs = [axis for axis in fixed if axis + 1 in fixed and lead[axis] * lead[axis + 1] == heads]
            if len(pairs) == 1:  # groups of heads that share keys and values
                return CallLayout(heads, pairs[0], span=2)
            per_image = lead[0] // 2
            if len(lead) == 1 and per_image % heads == 0:
                return CallLayout(heads, folded=True)
        if len(lead) == 2 and fixed:
            n_tokens = {shape[1] for frame in one.frames for shape in frame.inputs if len(shape) == MIN_TOKEN_AXES}
            if lead[1] in n_tokens and one.weights[-2] not in n_tokens:
                return CallLayout(1, folded=True)  # each token weighs things of its own (a mixture its experts)
            return CallLayout(lead[fixed[-1]], fixed[-1])
        if lead == (2,):
            return CallLayout(1, folded=True)  # one map an image: one head, which nothing needs to count
        raise Unsupported(
            f"The attention in {one.path or 'the model'} has weights of shape {list(one.weights)} for 2 images and no "
            f"attribute that says how many heads it has ({', '.join(_HEAD_COUNT)}). Give the module one of them."
        )

    def _of_own_images(self, call: TracedCall, layout: CallLayout) -> CallLayout:
        """The layout with heads in front of the images where the model has them there; asked once per kind of module.

        Another first image moves values of the first image alone, or the layout mixes images.
        """
        lead = torch.Size(call.weights[:-2])
        if lead == (2, layout.heads) or lead.numel() % (2 * layout.heads):
            return layout
        kind = type(self.model.get_submodule(call.path)), replace(layout, heads=1)
        if kind not in self.own_images:
            self.own_images[kind] = self._layout_of_own_images(call, layout)
        return replace(layout, axis=self.own_images[kind].axis)

    def _layout_of_own_images(self, call: TracedCall, layout: CallLayout) -> CallLayout:
        images = self.images[:2]
        plain = self.tracer.values_of(call, images)
        moved = (self.tracer.values_of(call, torch.cat([self.images[2:3], images[1:]])) - plain).abs()
        moved = moved > _MOVED_SHARE * moved.max()
        heads_first = [replace(layout, axis=0)] if layout.folded and layout.heads > 1 else []
        for each in [layout, *heads_first]:
            if not each.canonical(moved, 2)[1].any():
                return each
        if not torch.equal(self.tracer.values_of(call, images), plain):
            return layout  # drawn at random, so that nothing is told
        raise Unsupported(
            f"The attention in {call.path or 'the model'} has values of shape {list(call.v)} for 2 images, and another "
            "first image moves those of both where the images are expected, so it is not known which are whose. Let "
            "the batch be the first dimension."
        )

    def _head_axis(self, call: TracedCall, axes: list[int]) -> int:
        """With as many windows as heads: a changed patch changes v in every head, but in few windows."""
        difference = self._change_of_v(call)
        spread = []
        for axis in axes:
            along = difference.movedim(axis, 0).flatten(1).sum(1)
            spread.append(float(along.max() / along.sum().clamp_min(_TINY)))
        return axes[spread.index(min(spread))]

    def _head_counts(self, call: TracedCall) -> Iterator[int]:
        for path in reversed(call.stack):
            yield from _head_attributes(self.model.get_submodule(path))

    def _call(self, traced: TracedCall, layout: CallLayout, n_in: int, n_out: int) -> Call:
        queries, keys = traced.weights[-2:]
        head_dim = traced.v[-1]
        lead = 1
        for size in traced.weights[:-2]:
            lead *= size
        windows = lead // (2 * layout.heads)
        # maps between channels have a row for each channel of what the module is given
        by_channel = any(layout.heads * queries in shape[1:] for shape in traced.frames[-1].inputs)
        kind = _kind(n_in, n_out, windows, queries, keys, head_dim, by_channel=by_channel)
        if kind in ("token", "channel") and queries == keys == head_dim:
            kind = "token" if self._mixes_tokens(traced) else "channel"
        elif kind == "channel" and self._rows_are_tokens(traced):  # the sizes agree by chance, as with one token left
            kind = _kind(n_in, n_out, windows, queries, keys, head_dim, by_channel=False)
        return Call(
            traced.path,
            kind,
            layout,
            head_dim,
            windows,
            queries,
            keys,
            traced.fused,
            row_stochastic=traced.row_error < _ROW_SUM_TOLERANCE,
        )

    def _mixes_tokens(self, traced: TracedCall) -> bool:
        """With as many tokens as channels in a head: do rows of v tell which token was changed, or columns?

        The token is one that a module around the call is given. Where none is given a sequence, a patch of the image is
        changed: deep in a hierarchy, whose layers before have mixed the tokens, that says less.
        """
        by_token = self._rows_are_tokens(traced)
        if by_token is not None:
            return by_token
        first, last = (self._change_of_v(traced, last=last).flatten(0, -3).sum(0) for last in (False, True))
        rows, columns = ((_shares(first.sum(axis)) - _shares(last.sum(axis))).abs().sum() for axis in (1, 0))
        return bool(rows >= columns)

    def _rows_are_tokens(self, traced: TracedCall) -> bool | None:
        """Whether another token in front of a sequence that a module around the call is given moves a row of v.

        Attention between channels has a column for each token. None where no such module is given a sequence.
        """
        for frame in reversed(traced.frames):
            first = next((shape for shape in frame.inputs if len(shape) == MIN_TOKEN_AXES), ())
            if not first or first[1] not in traced.v[-2:]:
                continue
            plain, turned = (self.tracer.values_of(traced, self.images[:2], turn=each) for each in (None, frame))
            moved = _shares((turned - plain).abs().flatten(0, -3).sum(0))
            rows, columns = (float(moved.sum(axis).amax()) for axis in (1, 0))
            if rows != columns:
                return rows > columns
        return None

    def _change_of_v(self, call: TracedCall, *, last: bool = False) -> Tensor:
        """How much each element of v moves when the first or last patch does; [half the leading dimension, ..]."""
        changed = self.images[:2].clone()
        side = max(1, int(changed.shape[-1] * _FIRST_PATCH_SHARE))
        patch = slice(-side, None) if last else slice(side)
        changed[1] = changed[0]
        changed[1, :, patch, patch] += 1
        v = self.tracer.values_of(call, changed)
        return (v[v.shape[0] // 2 :] - v[: v.shape[0] // 2]).abs()

    def _grid(
        self, run: ModuleRun, main: int, layout: TokenLayout, tokens: int, previous: Block | None, step: int
    ) -> tuple[int, int] | None:
        shape = run.inputs[main].shape
        if layout.order in ("NHWC", "NCHW"):
            return (shape[1], shape[2]) if layout.order == "NHWC" else (shape[2], shape[3])
        prefix = previous.prefix if previous is not None else 0
        pair = _integer_pair(run.inputs, tokens) or _integer_pair(run.inputs, tokens - prefix)
        if pair:
            return pair
        if previous is not None and previous.grid:
            halved = ((previous.grid[0] + 1) // 2, (previous.grid[1] + 1) // 2)
            if previous.tokens == tokens:
                return previous.grid
            if previous.kind == "pooled" and halved[0] * halved[1] in (tokens, tokens - prefix):
                return halved
        inside = tuple(f"{unit.path}." for unit in self.units if unit)
        most = max(_MAX_PREFIX, int(tokens * _MAX_PREFIX_SHARE))
        for each in reversed(self.two.convolutions):
            n_patches = each.grid[0] * each.grid[1]
            if each.step < step and not each.path.startswith(inside) and 0 <= tokens - n_patches <= most:
                return each.grid
        return None

    def _patch_step(self, grid: tuple[int, int] | None) -> tuple[int, int] | None:
        """Steps of the convolution that reads the image and puts out a picture of that grid."""
        return next((each.stride for each in self.two.convolutions if each.stride and each.grid == grid), None)

    def _confirm_grids(self, blocks: list[Block]) -> list[Block]:
        """Checks the grids by changing the image's corners; where tokens join or leave, attention is off meanwhile."""
        confirmed = self._confirm_first_grid(blocks)
        for index, block in enumerate(confirmed):
            before = confirmed[index - 1]
            if index == 0 or block.grid is None or block.layout.token_axis is None:
                continue
            same = block.fed and (block.tokens, block.grid) == (blocks[index - 1].tokens, blocks[index - 1].grid)
            if same and before.grid is None:
                confirmed[index] = replace(block, prefix=0, grid=None)
                continue
            if same or (block.fed and (block.tokens, block.grid) == (before.tokens, before.grid)):
                confirmed[index] = _with_non_patches(block, before.layout.non_patches)
                continue
            corners = self._corners(block, without_attention=True)
            told = corners is not None and (corners.certain or (block.prefix > 0 and not corners.still))
            if corners is not None and told:  # without attention, nothing of the image may arrive
                confirmed[index] = self._on_raster_of(block, corners)
        return confirmed

    def _confirm_first_grid(self, blocks: list[Block]) -> list[Block]:
        """What the first block's corners say also of blocks with as many tokens, and of all where it is no raster."""
        first = blocks[0]
        corners = self._corners(first)
        certain = corners is not None and corners.certain
        if first.grid is None:
            raster = raster_of_corners(corners, first.tokens) if corners is not None and certain else None
            if raster is None:
                self.notes.append(
                    f"{first.path}: {first.tokens} tokens lie on no grid that could be found; no grid measures."
                )
                return blocks
            return [_on_raster(block, raster) if block.tokens == first.tokens else block for block in blocks]
        unit = Unit(first.path, first.run)
        if not certain and not same_each_time(self.tracer, self.images, unit, first.layout, first.main_input):
            self.notes.append(f"{first.path}: tokens are drawn or shuffled at random in each pass; no grid measures.")
            return [replace(block, prefix=0, grid=None) for block in blocks]
        confirmed = first if corners is None else self._on_raster_of(first, corners)
        if confirmed.grid is None:
            return [replace(block, prefix=0, grid=None) for block in blocks]
        if corners is None or (not certain and raster_of_corners(corners, first.tokens) is None):
            rows, columns = first.grid
            self.notes.append(f"{first.path}: the {rows}x{columns} grid could not be confirmed at the image's corners.")
        return [confirmed, *blocks[1:]]

    def _on_raster_of(self, block: Block, corners: Corners) -> Block:
        """The block with its patches where the corners say they are; without a grid where that is no raster.

        Where the corners say nothing, patches that fill the grid keep it, and those among other tokens have none.
        """
        assert block.grid is not None
        exact, expected = raster_of_corners(corners, block.tokens), Raster(block.prefix, block.grid)
        if exact is not None and exact.grid == block.grid:
            return _on_raster(block, exact)
        if fits_raster(corners, expected) or (corners.diffuse and not block.prefix):
            return block
        self.notes.append(
            f"{block.path}: tokens do not lie in raster order (the image's corners are not tokens "
            f"{list(expected.corners)}); no grid measures."
        )
        return replace(block, prefix=0, grid=None)

    def _corners(self, block: Block, *, without_attention: bool = False) -> Corners | None:
        return corners_of(
            self.tracer,
            self.images,
            Unit(block.path, block.run),
            block.layout,
            block.main_input,
            block.grid,
            block.patch_step,
            without_attention=without_attention,
        )

    def _check_prefix(self, blocks: list[Block]) -> None:
        stated = getattr(self.model, "num_prefix_tokens", None)
        traced = sorted({block.prefix - block.behind for block in blocks})
        if isinstance(stated, int) and blocks[0].grid and traced != [stated]:
            self.notes.append(f"The model states {stated} prefix tokens; traced, its blocks have {traced}.")


def _on_raster(block: Block, raster: Raster) -> Block:
    """The block with its patches on a raster, and its tokens in canonical order."""
    block = replace(block, prefix=raster.in_front + raster.behind, grid=raster.grid)
    return _with_non_patches(block, NonPatches(raster.in_front, raster.behind))


def _with_non_patches(block: Block, non_patches: NonPatches) -> Block:
    """The block with its tokens in canonical order, and those of its attention calls that attend to all of them."""
    if not non_patches.move_tokens:
        return block
    calls = tuple(
        replace(call, layout=replace(call.layout, non_patches=non_patches))
        if call.windows == 1 and call.keys == block.tokens
        else call
        for call in block.calls
    )
    layout, output_layout = (replace(each, non_patches=non_patches) for each in (block.layout, block.output_layout))
    return replace(block, calls=calls, layout=layout, output_layout=output_layout)


def _with_class_token(block: Block, place: int | None) -> Block:
    """The block with the class token first; `place` is which of its tokens that are no patches it is."""
    if place is None:
        return block
    non_patches = NonPatches(block.prefix - block.behind, block.behind, place)
    return replace(_with_non_patches(block, non_patches), class_token=True)


def _numbered_heads(
    calls: list[Call], runs: list[tuple[int, str | None]], input_channels: Callable[[str], int]
) -> tuple[Call, ...]:
    """Counts the heads of a block's calls through; calls that run the same heads share their numbers.

    Heads are the same where a module runs again (a loop), and where one run of it makes several calls whose heads
    together fill the projection once (a difference of two maps). Calls whose heads lie side by side in the projection,
    or that have projections of their own, have heads of their own.
    """
    numbered: list[Call] = []
    for index, call in enumerate(calls):
        run, projection = runs[index]
        same = [
            before
            for before, (other_run, other_projection) in zip(numbered, runs, strict=False)
            if (before.path, before.heads, before.head_dim) == (call.path, call.heads, call.head_dim)
            and (
                run != other_run
                or (
                    projection is not None
                    and projection == other_projection
                    and input_channels(projection) == call.heads * call.head_dim
                )
            )
        ]
        first = same[0].first_head if same else max((each.layer_heads.stop for each in numbered), default=0)
        numbered.append(replace(call, first_head=first, repeat=len(same)))
    return tuple(numbered)


def _notes_on_calls(blocks: Sequence[Block]) -> list[str]:
    """Which heads are whose in layers with several attention calls, a sentence for each run of layers alike."""
    notes: list[str] = []
    for what, run in groupby(enumerate(blocks), lambda item: _what_calls(item[1])):
        layers = [layer for layer, _ in run]
        if what:
            notes.append(f"{layer_ranges(layers)}: {what}.")
    return notes


def _what_calls(block: Block) -> str:
    """Which heads are whose in a block with several calls, by paths below the block; empty for one call."""
    if len(block.calls) < 2:
        return ""
    parts = []
    for attention in block.attentions:
        call = block.calls[attention[0]]
        heads = f"H{call.first_head}-H{call.layer_heads.stop - 1}" if call.heads > 1 else f"H{call.first_head}"
        below = call.path.removeprefix(f"{block.path}.") if call.path != block.path else "the block itself"
        often = (
            f", which runs {len(attention)} times: pruned in every run, their maps are those of the first"
            if len(attention) > 1
            else ""
        )
        parts.append(f"{heads} are those of {below}{often}")
    return "; ".join(parts)


def layer_ranges(layers: Sequence[int]) -> str:
    """Names layers by their runs.

    Args:
        layers: Zero-based indices.

    Returns:
        Such as "L0-L2, L5" for [0, 1, 2, 5].
    """
    runs = [
        [layer for _, layer in run]
        for _, run in groupby(enumerate(sorted(set(layers))), lambda item: item[1] - item[0])
    ]
    return ", ".join(f"L{run[0]}" if len(run) == 1 else f"L{run[0]}-L{run[-1]}" for run in runs)


def _head_attributes(module: nn.Module) -> list[int]:
    """What a module's attributes say about how many heads it has."""
    values = [getattr(module, name, None) for name in _HEAD_COUNT]
    return [value for value in values if isinstance(value, int) and value > 0]


def _shares(amounts: Tensor) -> Tensor:
    return amounts / amounts.sum().clamp_min(_TINY)


def _kind(n_in: int, n_out: int, windows: int, queries: int, keys: int, head_dim: int, *, by_channel: bool) -> Kind:
    if windows > 1:
        return "window" if queries == keys else "pooled"
    if queries == keys == n_in:
        return "token"
    if head_dim in (n_in, n_out) and queries == keys and by_channel:
        return "channel"
    if queries == 1 and keys > 1:
        return "class"
    if queries == keys == n_out:
        return "token"
    return "pooled" if queries != keys else "unknown"


def _batch_dimensions(two: list[Any], three: list[Any]) -> tuple[BatchAxis | None, ...]:
    """The batch dimension of each leaf: the one that differs between a pass of two images and one of three."""
    return tuple(_batch_dimension(a, b) for a, b in zip(two, three, strict=True))


def _batch_dimension(two: Any, three: Any) -> BatchAxis | None:
    if not isinstance(two, Tensor) or not isinstance(three, Tensor) or two.ndim != three.ndim:
        return None
    for axis, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)):
        if a != b and a % 2 == 0 and a // 2 * 3 == b:
            return BatchAxis(axis, a // 2)
    return None


def _main_leaf(
    leaves: list[Any], axes: tuple[BatchAxis | None, ...], path: str, masks: Collection[tuple[int, ...]]
) -> int:
    """The largest tensor that a block is given.

    A mask of its maps, and tokens of parts of an image (the pixels of each patch in TNT), which may be larger, only if
    there is no other.
    """
    sizes = [
        leaf.numel() if batch and leaf.is_floating_point() and leaf.ndim >= MIN_TOKEN_AXES else 0
        for leaf, batch in zip(leaves, axes, strict=True)
    ]
    is_mask = [isinstance(leaf, Tensor) and leaf.ndim > MIN_TOKEN_AXES and leaf.shape[-3:] in masks for leaf in leaves]
    is_part = [batch is not None and batch.per_image > 1 for batch in axes]
    for excluded in (is_mask, is_part):
        others = [0 if exclude else size for exclude, size in zip(excluded, sizes, strict=True)]
        sizes = others if any(others) else sizes
    if not any(sizes):
        raise Unsupported(f"The block {path} takes no batch of token vectors as input, so it cannot be followed.")
    return sizes.index(max(sizes))


def _integer_pair(leaves: list[Any], tokens: int) -> tuple[int, int] | None:
    for one, two in pairwise(leaves):
        if type(one) is int and type(two) is int and one > 0 and one * two == tokens:
            return one, two
    for leaf in leaves:
        if isinstance(leaf, torch.Size) and len(leaf) == 2 and leaf[0] * leaf[1] == tokens:
            return int(leaf[0]), int(leaf[1])
    return None
