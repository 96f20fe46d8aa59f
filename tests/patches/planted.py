"""Synthetic attention with known windows, hubs and neighbourhoods."""

import torch
from torch import Tensor

from vitrail.patches import windows


def planted_boxes(grid: tuple[int, int], shape: tuple[int, int], n_images: int, seed: int = 0) -> Tensor:
    """Boxes of one shape at random places, [image patch side]."""
    generator = torch.Generator().manual_seed(seed)
    n_patches = grid[0] * grid[1]
    boxes = torch.tensor([0, 0, *shape]).expand(n_images, n_patches, 4)
    return windows.random_boxes(boxes, grid, generator)


def attention_in(
    mask: Tensor, n_heads: int, prefix: int, inside: float = 3.0, noise: float = 0.5, seed: int = 1
) -> Tensor:
    """Softmax attention [image head query key] whose scores are `inside` higher within a mask [image patch other]."""
    generator = torch.Generator().manual_seed(seed)
    n_images, n_patches = mask.shape[:2]
    scores = noise * torch.randn((n_images, n_heads, prefix + n_patches, prefix + n_patches), generator=generator)
    scores[..., prefix:, prefix:] += inside * mask[:, None]
    return scores.softmax(-1)


def neighbourhood(grid: tuple[int, int], radius: int) -> Tensor:
    """Attention [patch other] spread evenly over all patches at most `radius` away in rows and in columns."""
    patch = torch.arange(grid[0] * grid[1])
    row, column = patch // grid[1], patch % grid[1]
    near = ((row[:, None] - row).abs() <= radius) & ((column[:, None] - column).abs() <= radius)
    return near / near.sum(-1, keepdim=True)
