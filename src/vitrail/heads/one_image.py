"""Where every head of one image looks: rows and columns of the class token and of the patch most looked at."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.models.token_grid import token_grids
from vitrail.tap.tap import LayerAttention, Readers

if TYPE_CHECKING:
    from vitrail.one_image import OneImage

__all__ = ["head_look"]

NAMES = ("class_attention", "class_received", "peak_patch", "peak_attention", "peak_received")

WITHOUT_CLASS_ROWS = "no layer with a map between patches has the class token among its tokens"
"""Why a model with a class token has no row of it, as CaiT: the token joins after such layers."""


def head_look(one: "OneImage") -> dict[str, np.ndarray]:
    """Computes the arrays of one image that the analysis of heads declares.

    Args:
        one: the image with its plain pass.

    Returns:
        `class_attention`, `class_received`, `peak_attention` and `peak_received` [layer head token], `peak_patch`
        [layer head]; NaN (-1) for layers whose maps lie on no grid and for heads and tokens that a layer lacks. Without
        such layers nothing, with the reason in `one.left_out`.
    """
    vit = one.vit
    grids, refused = token_grids(vit)
    if not grids:
        one.leave_out(NAMES, f"no layer has a map between patches of one grid: {next(iter(refused.values()))}")
        return {}
    sizes = [tokens.n_tokens for tokens in grids.values()]
    shape = (vit.n_layers, max(vit.n_heads))
    rows = {name: np.full((*shape, max(sizes)), np.nan, np.float32) for name in NAMES if name != "peak_patch"}
    peak = np.full(shape, -1, np.int32)

    def read(attention: LayerAttention) -> None:
        layer = attention.layer
        tokens = grids.get((layer, attention.call))
        if tokens is None:
            return
        weights = attention.weights_on_grid()[0].float()
        prefix, patch = tokens.n_prefix, _most_attended(weights, tokens.n_prefix)
        peak[layer, tokens.heads] = patch.cpu().numpy()
        heads, here = torch.arange(len(weights)), (layer, tokens.heads, slice(tokens.n_tokens))
        rows["peak_attention"][here] = weights[heads, prefix + patch].cpu().numpy()
        rows["peak_received"][here] = weights[heads, :, prefix + patch].cpu().numpy()
        index = vit.anatomy.class_index(layer)
        if index is not None:
            rows["class_attention"][here] = weights[:, index].cpu().numpy()
            rows["class_received"][here] = weights[:, :, index].cpu().numpy()

    with torch.no_grad():
        vit.tap().read(one.pixels, Readers(attention=read))
    if np.isnan(rows["class_attention"]).all():
        names = ("class_attention", "class_received")
        one.leave_out(names, WITHOUT_CLASS_ROWS if vit.anatomy.class_token else "the model has no class token")
        rows = {name: values for name, values in rows.items() if name not in names}
    return {"peak_patch": peak, **rows}


def _most_attended(weights: Float[Tensor, "head query key"], prefix: int) -> Tensor:
    """For each head the patch that the other patches look at most."""
    patches = weights[:, prefix:, prefix:]
    others = patches.sum(1) - patches.diagonal(dim1=-2, dim2=-1)
    return others.argmax(-1)
