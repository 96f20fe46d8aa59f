"""A structural copy of a model that shares every tensor with the original.

The tap works on such a copy, so the user's modules are never touched, another thread that runs them is never
disturbed, and nothing can be left behind.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vitrail.errors import Unsupported

__all__ = ["clone_sharing", "images_accepted", "same_tensors", "uncompiled"]


def clone_sharing(model: nn.Module) -> nn.Module:
    """New module objects, the same parameters and buffers, in evaluation mode.

    A compiled model is unwrapped first: what is observed is the uncompiled model. Raises `Unsupported` for scripted
    modules and for modules that hold something Python cannot copy.
    """
    model = uncompiled(model)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in _tensors(model)}
    try:
        clone: nn.Module = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise Unsupported(
            f"{type(model).__name__} cannot be tapped: its modules cannot be copied ({error}). "
            "Vitrail works on a copy that shares the weights; keep locks, streams and open files out of the modules."
        ) from error
    return clone.eval()


def same_tensors(model: nn.Module, clone: nn.Module) -> bool:
    """The clone still shares all its parameters with the model (false after `load_state_dict(assign=True)`)."""
    ours = dict(clone.named_parameters(remove_duplicate=False))
    theirs = dict(uncompiled(model).named_parameters(remove_duplicate=False))
    return ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)


_CANNOT_RUN = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def images_accepted(model: nn.Module, shape: Sequence[int]) -> Iterator[None]:
    """Around a model's first run: what it raises on images of that shape becomes `Unsupported` with a sentence."""
    try:
        yield
    except _CANNOT_RUN as error:
        said = " ".join(str(error).split())[:200]
        reads = getattr(model, "main_input_name", "pixel_values")
        other = "" if reads == "pixel_values" else f" It reads {reads}, so it is no vision model."
        raise Unsupported(
            f"{type(model).__name__} cannot be run on images of shape {list(shape)} ({type(error).__name__}: {said})."
            f"{other} Vitrail opens models that take [image, channel, row, column]; check --image-size."
        ) from error


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s wrapper, or the model itself. Raises `Unsupported` for scripted ones."""
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, torch.jit.ScriptModule):
        raise Unsupported(
            f"{type(inner).__name__} is a scripted or traced model, whose Python code is gone. "
            "Open the model it was made from."
        )
    assert isinstance(inner, nn.Module)
    return inner


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor that hangs on a module: parameters, buffers and plain attributes."""
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from (item for item in value if isinstance(item, torch.Tensor))
            elif isinstance(value, dict):
                yield from (item for item in value.values() if isinstance(item, torch.Tensor))
