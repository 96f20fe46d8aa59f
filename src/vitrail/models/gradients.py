"""Gradients through models that may let none through: run under `no_grad`, with sums in place, with other kernels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitrail.errors import Unsupported
from vitrail.models.noise import noise_images
from vitrail.models.open import Vit
from vitrail.tap.clone import ModuleState
from vitrail.tap.modes import autocast_off

__all__ = ["gradients_enabled", "parameters_at_rest", "reason_against_gradients", "reason_of_trial"]

_NO_GRADIENT = (
    "does not require grad",
    "not have been used in the graph",
    "inplace operation",
    "in-place operation",
    "nference tensor",
    "not support backward",
    "torch.utils.checkpoint",
    "incompatible with .grad()",
)
"""What torch says, in a RuntimeError like any other, where no gradient can be had."""

_MESSAGE_LENGTH = 200


@contextmanager
def gradients_enabled() -> Iterator[None]:
    """Around a pass of a tap and the gradients that are taken of it.

    Returns:
        Nothing; a context manager.

    Raises:
        Unsupported: The model lets no gradient through.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad(), autocast_off(), _LayoutOfNorms():
            yield
    except RuntimeError as error:
        message = " ".join(str(error).split())
        if not isinstance(error, NotImplementedError) and not any(words in message for words in _NO_GRADIENT):
            raise
        raise Unsupported(
            f"No gradient goes through this model, as where its forward runs under torch.no_grad, writes in place to "
            f"what the gradient needs, or runs parts of it again (checkpointing) (torch: {message[:_MESSAGE_LENGTH]})."
        ) from error


@contextmanager
def parameters_at_rest(model: nn.Module) -> Iterator[None]:
    """Around a pass, no gradient flows to parameters, nor to what is computed of them; then all is as it was.

    Args:
        model: The model.

    Returns:
        Nothing; a context manager.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class _LayoutOfNorms(TorchFunctionMode):
    """Gradients reach a batch or an instance norm laid out in memory as its input is.

    Of a single image on a CPU, torch's derivative of these is wrong without a word where they are not, as they are
    where its output is made tokens next (`flatten(2).transpose(1, 2)`; XCiT does that). Found in torch 2.14.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        normed = result[0] if func is torch.native_batch_norm else result
        if func in _NORMS and isinstance(normed, Tensor) and normed.requires_grad:
            given: Tensor = (args[0] if args else kwargs["input"]).detach()
            normed.register_hook(lambda gradient: torch.empty_like(given).copy_(gradient))
        return result


_NORMS = (F.batch_norm, torch.batch_norm, torch.native_batch_norm, F.instance_norm, torch.instance_norm)


_REASONS: WeakKeyDictionary[Vit, dict[Callable[[Vit], str], tuple[ModuleState, str]]] = WeakKeyDictionary()


def reason_against_gradients(vit: Vit) -> str:
    """Why no gradient of the output reaches the image that a model is given. Tried on an image of noise, once as long
    as the model's modules stay as they are.

    Args:
        vit: The model.

    Returns:
        A sentence; empty where one reaches them.
    """
    return reason_of_trial(vit, _try_gradients)


def reason_of_trial(vit: Vit, trial: Callable[[Vit], str]) -> str:
    """What a trial says of a model; it is run once as long as the model's modules stay as they are.

    Args:
        vit: The model.
        trial: Answers a sentence, empty where nothing is wrong.

    Returns:
        The sentence.
    """
    reasons = _REASONS.setdefault(vit, {})
    if trial not in reasons or not reasons[trial][0].is_of(vit.model):
        reasons[trial] = ModuleState(vit.model), trial(vit)
    return reasons[trial][1]


def _try_gradients(vit: Vit) -> str:
    try:
        with gradients_enabled():
            pixels = noise_images(vit).requires_grad_()
            (gradient,) = torch.autograd.grad(vit.tap().read(pixels).float().sum(), [pixels], allow_unused=True)
    except Unsupported as reason:
        return str(reason)
    return f"No gradient of the output of {vit.name} reaches its images." if gradient is None else ""
