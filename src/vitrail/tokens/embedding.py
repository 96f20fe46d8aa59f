"""Level 0: the patch embedding as filters over pixels, found in the model and confirmed by running it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import Unsupported
from vitrail.models.open import Vit
from vitrail.tokens.levels import level_zero

__all__ = ["Embedding", "find_embedding", "position_similarity"]

SUM_TOLERANCE = 1e-4
"""Level 0 is the sum of filters, bias and position if it differs from it by no more than this share of the largest
product: far above the rounding of a convolution in float32, far below what a norm in between changes."""

HALF_SUM_TOLERANCE = 5e-2
"""The same for float16 and bfloat16, whose two or three digits are lost twice: in the sum and in what is subtracted."""

NO_POSITION = 1e-6
"""Positions below this are what rounding leaves of none; learnt ones start near 0.02."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """The patch embedding of a model: z_0[i, j] = sum(filters[j] * patch i) + bias[j] + position[i, j].

    Attributes:
        filters: The kernel of each output channel.
        bias: Of each channel; 0 where the convolution has none.
        position: What each patch's token is for an all-zero image, less the bias. None where something between the
            filters and the first block (a norm) makes level 0 no sum of these; filters are then those before it.
        grid: (rows, columns) of patches.
        prefix: Tokens before the patches.
    """

    filters: Float[Tensor, "channel colour row column"]
    bias: Float[Tensor, "channel"]
    position: Float[Tensor, "patch channel"] | None
    grid: tuple[int, int]
    prefix: int

    @property
    def patch(self) -> tuple[int, int]:
        """Rows and columns of a patch in pixels."""
        return self.filters.shape[2], self.filters.shape[3]


@torch.no_grad()
def find_embedding(vit: Vit) -> Embedding:
    """The patch embedding of a model, found in its modules and confirmed by a pass of noise.

    Args:
        vit: The model.

    Returns:
        Filters, bias and positions.

    Raises:
        Unsupported: Patches do not come from one plain convolution.
    """
    block, (rows, columns) = vit.anatomy.blocks[0], vit.image_size
    convolution = _patch_convolution(vit.model, (rows, columns), block.grid)
    if convolution is None or block.grid is None:
        raise Unsupported(
            f"{vit.name} does not cut its {rows} x {columns} pixels into patches with one convolution (its first "
            f"tokens lie on grid {block.grid}), so there are no filters to show. Token measures work."
        )
    weight = convolution.weight.detach()
    bias = convolution.bias.detach() if convolution.bias is not None else weight.new_zeros(len(weight))
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn((1, 3, rows, columns), generator=generator).to(weight)
    replay, _ = vit.tap().record(torch.cat([torch.zeros_like(probe), probe]))
    blank, tokens = level_zero(vit.anatomy, replay)[:, block.prefix :]
    summed = F.conv2d(probe, weight, stride=weight.shape[2:])[0].flatten(1).T
    bound = SUM_TOLERANCE if weight.dtype in (torch.float32, torch.float64) else HALF_SUM_TOLERANCE
    is_sum = summed.shape == tokens.shape and (tokens - blank - summed).abs().max() <= bound * summed.abs().max()
    return Embedding(weight, bias, blank - bias if is_sum else None, block.grid, block.prefix)


def position_similarity(embedding: Embedding) -> Float[Tensor, "query key"]:
    """Cosine similarity between the position embeddings of all patches.

    Args:
        embedding: With positions.

    Returns:
        -1 to 1, symmetric, 1 on the diagonal.

    Raises:
        Unsupported: The model adds no positions at level 0.
    """
    if embedding.position is None or embedding.position.abs().max() < NO_POSITION:
        raise Unsupported("This model adds no position embedding to its patches at level 0 (or a norm hides it).")
    unit = F.normalize(embedding.position.float(), dim=-1)
    return unit @ unit.T


def _patch_convolution(model: nn.Module, size: tuple[int, int], grid: tuple[int, int] | None) -> nn.Conv2d | None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3 and module.groups == 1 and grid is not None:
            plain = module.kernel_size == module.stride and module.padding in ((0, 0), 0, "valid")
            covered = (grid[0] * module.kernel_size[0], grid[1] * module.kernel_size[1])
            if plain and covered == size:
                return module
    return None
