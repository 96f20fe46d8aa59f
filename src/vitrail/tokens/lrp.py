"""Relevance of patches for a class by layer-wise relevance propagation, for plain models and hierarchies alike."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.contract.outlook import require_finite
from vitrail.models.gradients import gradients_enabled
from vitrail.models.open import Vit
from vitrail.tap.frozen import Frozen
from vitrail.tokens.levels import first_grid, sum_over_patches

__all__ = ["layerwise_relevance"]

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
        Unsupported: The tokens lie on no grid, or no gradient goes through the model.
        ModelError: The answer to an image is not finite (NaN or infinite).

    Example:
        >>> prepared = vit.prepare([photograph])
        >>> scores = layerwise_relevance(vit, prepared, vit.logits(prepared).argmax(-1).numpy())
        >>> scores.shape  # of a ViT of 14 x 14 patches
        torch.Size([1, 196])
    """
    grid = first_grid(vit)
    pixels = images.detach().clone().requires_grad_()
    with gradients_enabled():
        with Frozen():
            logits = vit.tap().read(pixels).float()
        require_finite(vit.name, logits)
        target = torch.as_tensor(classes, device=logits.device)[:, None]
        (gradient,) = torch.autograd.grad(logits.gather(1, target).sum(), pixels)
    there = pixels.detach().float()
    added = ((there - there.mean((2, 3), keepdim=True)) * gradient.float()).sum(1)
    return sum_over_patches(added, grid, vit.anatomy.blocks[0].patch_step)
