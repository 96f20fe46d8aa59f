"""Level 0: the patch embedding as filters over pixels, found in the model and confirmed by running it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.errors import Unsupported
from vitrail.neurons.levels import entering
from vitrail.vit.open import Vit

__all__ = ["Embedding", "find_embedding", "position_similarity"]


@dataclass(frozen=True, eq=False)
class Embedding:
    """z_0[i, j] = sum(filters[j] * patch i) + bias[j] + position[i, j].

    filters    [channel colour row column], the kernel of each output channel
    bias       [channel]
    position   [patch channel]: what the patches hold of an all-zero image, less the bias. None where something between
               the filters and the first block (a norm) makes level 0 no sum of these; filters are then those before it.
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
    """The patch embedding of a model. Raises `Unsupported` where patches do not come from one plain convolution."""
    block, (rows, columns) = vit.anatomy.blocks[0], vit.preprocessing.size
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
    blank, seen = entering(vit.anatomy, replay)[:, block.prefix :]
    summed = F.conv2d(probe, weight, stride=weight.shape[2:])[0].flatten(1).T
    bound = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    is_sum = summed.shape == seen.shape and (seen - blank - summed).abs().max() <= bound * summed.abs().max()
    return Embedding(weight, bias, blank - bias if is_sum else None, block.grid, block.prefix)


def position_similarity(embedding: Embedding) -> Float[Tensor, "query key"]:
    """Cosine similarity between the position embeddings of all patches. Raises `Unsupported` where there are none."""
    if embedding.position is None or embedding.position.abs().max() < 1e-6:
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
