"""A structural copy of a model that shares every tensor with the original.

The tap works on such a copy, so the user's modules are never touched, another thread that runs them is never
disturbed, and nothing can be left behind.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vitrail.errors import Unsupported

__all__ = ["clone_sharing", "same_tensors"]


def clone_sharing(model: nn.Module) -> nn.Module:
    """New module objects, the same parameters and buffers, in evaluation mode.

    A compiled model is unwrapped first: what is observed is the uncompiled model. Raises `Unsupported` for scripted
    modules and for modules that hold something Python cannot copy.
    """
    model = _uncompiled(model)
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
    theirs = dict(_uncompiled(model).named_parameters(remove_duplicate=False))
    return ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)


def _uncompiled(model: nn.Module) -> nn.Module:
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
