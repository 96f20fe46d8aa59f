"""Which token sits in each slot of each attention window, measured on the block itself.

Window sizes and shifts are not read from a configuration: a block is run on its own input with some tokens moved, and
the values v in which that shows name the slots.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from vitrail.errors import Unsupported
from vitrail.tap.anatomy import Anatomy, Block
from vitrail.tap.clone import clone_sharing, first_weight
from vitrail.tap.intercept import Captured, Interceptor, PassiveHandler, RawCall
from vitrail.tap.layout import repeat_images

__all__ = ["Inputs", "block_on_noise", "measure_window_slots", "values_when_moved"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module."""


@torch.no_grad()
def measure_window_slots(model: nn.Module, anatomy: Anatomy, layer: int, call: int = 0) -> Int[Tensor, "window slot"]:
    """Finds which token sits in each slot of each window of an attention call.

    In run b those tokens are moved whose number, counted from 1, has bit b; the runs in which v changes at a slot spell
    the number of its token.

    Args:
        model: The model; a copy that shares its weights is run.
        anatomy: Its anatomy.
        layer: Zero-based index of the block.
        call: Which attention call of the block.

    Returns:
        Token index at each slot, -1 for padding.

    Raises:
        Unsupported: The tokens are not each in exactly one slot (convolution or pooling inside the block).
    """
    block = anatomy.blocks[layer]
    number, n_bits = torch.arange(1, block.tokens + 1), block.tokens.bit_length()
    module, inputs = block_on_noise(model, anatomy, layer)
    v = values_when_moved(module, inputs, block, call, number >> torch.arange(n_bits)[:, None] & 1 == 1)
    changes: Tensor = (v[1:] - v[:1]).abs().amax(dim=(2, 4)) > 0
    powers = (1 << torch.arange(n_bits, device=v.device))[:, None, None]
    slots = (changes.long() * powers).sum(0) - 1
    tokens = slots[slots >= 0].sort().values
    if not torch.equal(tokens, torch.arange(block.tokens, device=tokens.device)):
        raise Unsupported(
            f"L{layer} ({block.path}) attends within windows, but its {block.tokens} tokens are not each in "
            "exactly one window slot (convolution or pooling inside the block): no maps on the grid."
        )
    return slots


def block_on_noise(model: nn.Module, anatomy: Anatomy, layer: int) -> tuple[nn.Module, Inputs]:
    """A block of a copy of a model, and what the block is given when the model runs on an image of noise.

    Args:
        model: The model; the copy shares its weights.
        anatomy: Its anatomy.
        layer: Zero-based index of the block.

    Returns:
        The block, and its positional and keyword arguments for one image.
    """
    block, clone = anatomy.blocks[layer], clone_sharing(model)
    module = clone.get_submodule(block.path)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((1, *anatomy.image_shape), generator=generator).to(first_weight(clone))
    inputs: list[Inputs] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args, kwargs))
        if len(inputs) > block.run:
            raise Captured

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch._C._EnableTorchFunction():  # the caller may be a reader, which runs with torch functions off
            clone(image)
    except Captured:
        pass  # the hook has stopped the pass where it was meant to
    finally:
        hook.remove()
    return module, inputs[block.run]


def values_when_moved(
    module: nn.Module,
    inputs: Inputs,
    block: Block,
    call: int,
    moved: Bool[Tensor, "run token"],
    *,
    silence_earlier: bool = False,
) -> Float[Tensor, "runs window head key channel"]:
    """The values v of an attention call as some of its block's tokens are moved, all by the same random vector.

    Args:
        module: The block.
        inputs: Its arguments for one image.
        block: Its anatomy.
        call: Which of its attention calls.
        moved: The tokens that are moved, in each run but the first, which moves none.
        silence_earlier: Earlier calls give zeros, so that they mix no tokens.

    Returns:
        v in canonical order, run 0 with nothing moved.
    """
    n_runs = 1 + len(moved)
    leaves, form = tree_flatten(repeat_images(inputs, block.inputs, 1, n_runs))
    leaf = leaves[block.main_input]
    tokens = block.layout.canonical(leaf).clone()
    push = torch.randn(tokens.shape[-1], generator=torch.Generator().manual_seed(1)).to(tokens)
    tokens[1:] += moved.to(tokens)[:, :, None] * push
    leaves[block.main_input] = block.layout.original(tokens, leaf)
    args, kwargs = tree_unflatten(leaves, form)
    handler = _ValuesOfCall(block, call, silence_earlier)
    try:
        with torch._C._EnableTorchFunction(), Interceptor(handler):
            module(*args, **kwargs)
    except Captured:
        pass  # the handler has stopped the block at the call
    return block.calls[call].layout.canonical(handler.values[0], n_runs)


class _ValuesOfCall(PassiveHandler):
    """Keeps v of one attention call and stops there; calls before it run, or give zeros."""

    def __init__(self, block: Block, call: int, silence_earlier: bool) -> None:
        self.block, self.call, self.silence_earlier = block, call, silence_earlier
        self.n_products = 0
        self.values: list[Tensor] = []

    def attention(self, call: RawCall) -> Tensor:
        """Counts calls and stops at the one asked for."""
        number = self.block.call_of_product(self.n_products)
        self.n_products += 1
        if number == self.call:
            self.values.append(call.v)
            raise Captured
        out = super().attention(call)
        return torch.zeros_like(out) if self.silence_earlier else out
