"""Relevance of patches for a class by layer-wise relevance propagation, for plain models and hierarchies alike."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.contract.outlook import require_finite
from vitrail.errors import Unsupported, UsageError
from vitrail.models.gradients import gradients_enabled, parameters_at_rest, reason_of_trial
from vitrail.models.noise import noise_images
from vitrail.models.open import Vit
from vitrail.tap.frozen import Frozen
from vitrail.tokens.levels import first_grid, sum_over_patches

__all__ = ["classes_of_images", "layerwise_relevance", "reason_against_lrp", "require_classifier"]

Images = Float[Tensor, "image channel row column"]


def layerwise_relevance(vit: Vit, images: Images, classes: Int[np.ndarray, "image"]) -> Float[Tensor, "image patch"]:
    """What each patch adds to the logit of a class, carried back through everything that the model does.

    Attention weights, statistics of norms and gains of activations (f(x) / x) are held as they are for the image
    (`vitrail.tap.frozen`). The logit is then linear in the pixels, plus a constant, and its derivative by them times
    how far they are from the image's mean colour is what they add. Convolutions, MLPs, values and projections are part
    of it, so it needs neither maps of attention nor one grid, and hierarchies (Swin, PVT, MaxViT) have it.

    Unit: logits, any sign, summing over patches (and pixels beyond the last one) to the logit less that of the image in
    its mean colour by the same linear map. High: the patch speaks for the class. Below 0: against it.

    Source: rules of layer-wise relevance propagation for transformers, with attention and norms held still (Ali et al.
    2022, arXiv 2202.07304) and activations as gains (the identity rule of Achtibat et al. 2024, arXiv 2402.05602); that
    the mean colour counts as nothing is ours, as deletion and insertion have it.

    It cannot tell how a patch decides where attention goes, only what is carried along it. What is not linear even with
    all of this held still (taking a maximum) goes in by its derivative.

    Args:
        vit: The model.
        images: Prepared images.
        classes: The class of each image that is explained.

    Returns:
        Of each patch of the first layer's grid.

    Raises:
        Unsupported: The model has no classifier, its tokens lie on no grid, or no gradient goes through it.
        UsageError: There is not one class of the model for each image.
        ModelError: The answer to an image is not finite (NaN or infinite).

    Example:
        >>> prepared = vit.prepare([photograph])
        >>> scores = layerwise_relevance(vit, prepared, vit.logits(prepared).argmax(-1).numpy())
        >>> scores.shape  # of a ViT of 14 x 14 patches
        torch.Size([1, 196])
    """
    explained, grid = classes_of_images(vit, classes, len(images)), first_grid(vit)
    with gradients_enabled(), parameters_at_rest(vit.model):
        pixels = images.detach().clone().requires_grad_()
        with Frozen():
            logits = vit.tap().read(pixels).float()
        require_finite(vit.name, logits)
        of_class = logits.gather(1, torch.as_tensor(explained, device=logits.device)[:, None]).sum()
        (gradient,) = torch.autograd.grad(of_class, pixels)
    there = pixels.detach().float()
    added = ((there - there.mean((2, 3), keepdim=True)) * gradient.float()).sum(1)
    return sum_over_patches(added, grid, vit.anatomy.blocks[0].patch_step)


_SAME = {torch.float32: 1e-3, torch.float64: 1e-3}
"""How far, beside the largest logit, logits of a pass that is held still may be from the model's own; else 0.1."""

_LEAST_LOGIT = 1e-6
"""Logits below this count as this large where differences are compared with them."""


def reason_against_lrp(vit: Vit) -> str:
    """Why relevance cannot be carried back through a model that lets gradients through. Tried on an image of noise,
    once as long as the model's modules stay as they are.

    Args:
        vit: The model.

    Returns:
        A sentence; empty where it can.
    """
    return reason_of_trial(vit, _try_lrp)


def _try_lrp(vit: Vit) -> str:
    try:
        with gradients_enabled(), parameters_at_rest(vit.model):
            pixels = noise_images(vit).requires_grad_()
            own = vit.tap().read(pixels.detach())
            with Frozen():
                logits = vit.tap().read(pixels)
            if not logits.requires_grad:
                return (
                    f"All that reaches the output of {vit.name} goes through statistics that lrp holds still; use "
                    "grad_sam."
                )
            torch.autograd.grad(logits.float().sum(), [pixels])
    except Unsupported as reason:
        return f"{reason} lrp needs one; use raw attention or rollout."
    apart = float((logits.detach().float() - own.float()).abs().max() / own.float().abs().max().clamp_min(_LEAST_LOGIT))
    if apart > _SAME.get(own.dtype, 0.1):
        return (
            f"{vit.name} does something that cannot be held still: its answers are off by {apart:.2g} of the largest "
            "logit when attention, norms and gains are. Use grad_sam."
        )
    return ""


def require_classifier(vit: Vit) -> None:
    """Refuses a model without classes.

    Args:
        vit: The model.

    Raises:
        Unsupported: It has no classifier.
    """
    if vit.n_classes is None:
        raise Unsupported(f"{vit.name} has no classifier, so no class has a gradient; use raw attention or rollout.")


def classes_of_images(vit: Vit, classes: object, n_images: int) -> Int[np.ndarray, "image"]:
    """The classes that are explained, one for each image.

    Args:
        vit: The model.
        classes: As a user gave them.
        n_images: How many images there are.

    Returns:
        Whole numbers.

    Raises:
        Unsupported: The model has no classifier.
        UsageError: There are more or fewer than images, or one is no whole number from 0 to n_classes - 1.
    """
    require_classifier(vit)
    given, n_classes = np.asarray(classes), int(vit.n_classes or 0)
    if given.shape != (n_images,):
        raise UsageError(f"{n_images} images need one class each, and classes of shape {given.shape} were given.")
    wrong = given if given.dtype.kind not in "iu" else given[(given < 0) | (given >= n_classes)]
    if len(wrong):
        raise UsageError(
            f"{wrong[0]} is no class of {vit.name}: classes are whole numbers from 0 to {n_classes - 1}, one an image."
        )
    return given.astype(np.int64)
