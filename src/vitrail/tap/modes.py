"""What the caller has switched on in torch for its own computing, kept from ours."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["autocast_off", "plain_modes"]

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def autocast_off() -> Iterator[None]:
    """Around whatever computes in the model's own precision, which results state.

    Returns:
        Nothing; a context manager.
    """
    with ExitStack() as stack:
        for device in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def plain_modes() -> Iterator[None]:
    """Around a function that makes its own tensors: no autocast, and `no_grad` in place of `inference_mode`.

    A tensor that is made in inference mode never carries a gradient, not even where gradients are switched on again.

    Returns:
        Nothing; a context manager, and a decorator.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        stack.enter_context(autocast_off())
        yield
