"""Which token sits in each slot of each attention window, measured on the block itself.

Window sizes and shifts are not read from a configuration: a block is run on its own input with some tokens moved, and
the values v in which that shows name the slots.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from vitrail.errors import Unsupported
from vitrail.tap.anatomy import Anatomy, Block
from vitrail.tap.clone import clone_sharing
from vitrail.tap.intercept import Captured, Interceptor, PassiveHandler, RawCall
from vitrail.tap.layout import repeat_images

__all__ = ["block_inputs", "measure_window_slots"]


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
    clone = clone_sharing(model)
    module = clone.get_submodule(block.path)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((1, *anatomy.image_shape), generator=generator).to(next(clone.parameters()))
    n_bits = block.tokens.bit_length()
    n_runs = 1 + n_bits  # the first moves nothing
    with torch._C._EnableTorchFunction():  # the caller may be a reader, which runs with torch functions off
        inputs = repeat_images(block_inputs(clone, module, block.run, image), block.inputs, 1, n_runs)
        leaves, form = tree_flatten(inputs)
        leaves[block.main_input] = _move_by_bits(leaves[block.main_input], block, n_bits)
        values = _values_of_call(module, call, tree_unflatten(leaves, form))
    v = block.calls[call].layout.canonical(values, n_runs)
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


def block_inputs(
    clone: nn.Module, module: nn.Module, run: int, image: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that a run of a module of the clone gets when the model runs on an image.

    Args:
        clone: The model.
        module: A module of it.
        run: Which of the module's runs in a pass.
        image: One prepared image [1 channel row column].

    Returns:
        The arguments.
    """
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args, kwargs))
        if len(inputs) > run:
            raise Captured

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        clone(image)
    except Captured:
        pass  # the hook has stopped the pass where it was meant to
    finally:
        hook.remove()
    return inputs[run]


class _ValuesOfCall(PassiveHandler):
    """Keeps v of one attention call and stops there."""

    def __init__(self, call: int) -> None:
        self.calls_before = call
        self.values: list[Tensor] = []

    def attention(self, call: RawCall) -> Tensor:
        """Lets earlier calls run and stops at the one asked for."""
        if self.calls_before == 0:
            self.values.append(call.v)
            raise Captured
        self.calls_before -= 1
        return super().attention(call)


def _values_of_call(module: nn.Module, call: int, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    handler = _ValuesOfCall(call)
    args, kwargs = inputs
    try:
        with Interceptor(handler):
            module(*args, **kwargs)
    except Captured:
        pass  # the handler has stopped the block at the call
    return handler.values[0]


def _move_by_bits(leaf: Tensor, block: Block, n_bits: int) -> Float[Tensor, "..."]:
    """Adds the same random vector, in run b + 1, to every token whose number from 1 has bit b."""
    tokens = block.layout.canonical(leaf).clone()
    generator = torch.Generator().manual_seed(1)
    push = torch.randn(tokens.shape[-1], generator=generator).to(tokens)
    number = torch.arange(1, block.tokens + 1, device=tokens.device)
    for bit in range(n_bits):
        tokens[1 + bit, (number >> bit & 1).bool()] += push
    return block.layout.original(tokens, leaf)
