"""Windows as block-sparse attention: the closed form of its mask, its numbers, what it costs."""

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from vitrail.errors import UsageError
from vitrail.wint.model import CLOSED, WinT, attach, attention_bias, hard_mask, soft_bias, soft_mask
from vitrail.wint.sparse import (
    BLOCK,
    CUT,
    block_mask,
    block_sparse,
    hard_edges,
    open_share,
    soft_reach,
    sparse_attention,
    tile_order,
    window_mode,
)
from wint.test_evaluate import small

GRIDS = [((24, 40), 1), ((20, 23), 0), ((16, 16), 0), ((8, 8), 5)]


def random_sides(grid, n_images=2, n_windows=2, longest=6.0) -> Tensor:
    return torch.rand((n_images, n_windows, grid[0] * grid[1], 4), generator=torch.Generator().manual_seed(1)) * longest


def random_tokens(grid, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of two images and two heads."""
    shape = (3, 2, 2, prefix + grid[0] * grid[1], 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).unbind(0)


def as_dense(mask: BlockMask, n_tokens: int, block: int = BLOCK) -> Tensor:
    """The mask of a block mask cell by cell: full blocks are open, the others as their rule says."""
    n_images, n_windows, n_blocks = mask.kv_num_blocks.shape
    query, key = torch.arange(n_tokens)[:, None], torch.arange(n_tokens)
    dense = torch.zeros((n_images, n_windows, n_tokens, n_tokens), dtype=torch.bool)
    for image in range(n_images):
        for window in range(n_windows):
            rule = mask.mask_mod(torch.tensor(image), torch.tensor(window), query, key).expand(n_tokens, n_tokens)
            for row in range(n_blocks):
                rows = slice(row * block, (row + 1) * block)
                lists = (mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)
                for (counts, indices), inside in zip(lists, (rule, torch.ones_like(rule)), strict=True):
                    for column in indices[image, window, row, : counts[image, window, row]].tolist():
                        columns = slice(column * block, (column + 1) * block)
                        dense[image, window, rows, columns] = inside[rows, columns]
    return dense


def in_tile_order(sides: Tensor, grid, prefix: int) -> Tensor:
    """The hard mask of all tokens, prefix tokens open, rows and columns in tile order."""
    between = hard_mask(sides, grid)
    whole = nn.functional.pad(between, (prefix, 0, prefix, 0), value=True)
    order = tile_order(grid, prefix).order
    return whole[..., order, :][..., order]


@pytest.mark.parametrize(("grid", "prefix"), GRIDS)
def test_tiles_hold_each_token_once_and_are_compact(grid, prefix):
    order = tile_order(grid, prefix)
    n_patches = grid[0] * grid[1]
    assert sorted(order.order.tolist()) == list(range(n_patches + prefix))
    assert torch.equal(order.order[order.inverse], torch.arange(n_patches + prefix))
    assert order.order[n_patches:].tolist() == list(range(prefix))
    patch = order.order[:n_patches] - prefix
    for start in range(0, n_patches, BLOCK):
        part = patch[start : start + BLOCK]
        row, column = part // grid[1], part % grid[1]
        extents = int(row.max() - row.min()) + 1, int(column.max() - column.min()) + 1
        assert extents[0] <= 16
        assert extents[0] * extents[1] <= 3 * BLOCK


@pytest.mark.parametrize(("grid", "prefix"), GRIDS)
def test_the_mask_is_the_dense_one(grid, prefix):
    sides = random_sides(grid)
    mask = block_mask(sides, grid, prefix)
    dense = as_dense(mask, prefix + grid[0] * grid[1])
    assert torch.equal(dense, in_tile_order(sides, grid, prefix))


def any_of(cells: Tensor, block: int) -> Tensor:
    return cells.unflatten(-1, (-1, block)).any(-1).unflatten(-2, (-1, block)).any(-2)


def all_of(cells: Tensor, block: int) -> Tensor:
    return cells.unflatten(-1, (-1, block)).all(-1).unflatten(-2, (-1, block)).all(-2)


def as_blocks(counts: Tensor, indices: Tensor) -> Tensor:
    """Lists of blocks as a matrix."""
    matrix = torch.zeros(indices.shape, dtype=torch.bool)
    for place in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        matrix[(*place, indices[tuple(place)][: counts[tuple(place)]].long())] = True
    return matrix


@pytest.mark.parametrize("block", [16, BLOCK])
def test_the_closed_form_opens_what_brute_force_opens(block):
    """Nothing that a query sees is closed and nothing that it does not see is full; few blocks are open for nothing."""
    grid = (24, 40)
    for sides in (random_sides(grid), torch.full((1, 1, 960, 4), 3.0)):
        order = tile_order(grid, 0, block).order
        between = hard_mask(sides, grid)[..., order, :][..., order]
        brute_open, brute_full = (
            reduce(nn.functional.pad(between, (0, -960 % block) * 2, value=value), block)
            for reduce, value in ((any_of, False), (all_of, True))
        )
        mask = block_mask(sides, grid, 0, block)
        is_open = as_blocks(mask.kv_num_blocks, mask.kv_indices)
        is_full = as_blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
        is_open |= is_full
        assert not bool((brute_open & ~is_open).any())
        assert not bool((is_full & ~brute_full).any())
        assert float((is_open & ~brute_open).float().mean()) < 0.05


def dense_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(seen.shape).masked_fill(~seen, -torch.inf))


@pytest.mark.parametrize("n_windows", [1, 2])
@pytest.mark.parametrize(("grid", "prefix"), GRIDS)
def test_attention_is_that_of_the_dense_mask(grid, prefix, n_windows):
    sides = random_sides(grid, n_windows=n_windows)
    q, k, v = random_tokens(grid, prefix)
    seen = nn.functional.pad(hard_mask(sides, grid), (prefix, 0, prefix, 0), value=True)
    assert_allclose(sparse_attention(q, k, v, sides, grid, prefix), dense_attention(q, k, v, seen), atol=1e-5)


@pytest.mark.parametrize(("grid", "prefix"), GRIDS)
def test_windows_shared_by_a_tile_are_whole_blocks(grid, prefix):
    sides = random_sides(grid)
    n_tokens = prefix + grid[0] * grid[1]
    mask = block_mask(sides, grid, prefix, tile_windows=True)
    dense = as_dense(mask, n_tokens)
    assert bool(dense.diagonal(dim1=-2, dim2=-1).all())
    blocks = dense[..., : n_tokens // BLOCK * BLOCK, : n_tokens // BLOCK * BLOCK]
    blocks = blocks.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    assert torch.equal(blocks.any(-1).any(-2), blocks.all(-1).all(-2))
    q, k, v = random_tokens(grid, prefix)
    inverse = tile_order(grid, prefix).inverse
    wanted = dense_attention(q, k, v, dense[..., inverse, :][..., inverse])
    assert_allclose(sparse_attention(q, k, v, sides, grid, prefix, tile_windows=True), wanted, atol=1e-5)


@pytest.mark.parametrize("n_side", [56, 112])
@pytest.mark.parametrize("kind", ["squares of a tenth", "random"])
def test_tile_windows_open_no_more_than_1_3_times_their_area(n_side, kind):
    n_patches, reach = n_side**2, (0.1**0.5 * n_side - 1) / 2
    sides = torch.full((1, 1, n_patches, 4), reach)
    if kind == "random":
        sides = sides * 2 * torch.rand(sides.shape, generator=torch.Generator().manual_seed(0))
    row, column = torch.arange(n_patches) // n_side, torch.arange(n_patches) % n_side
    left, top, right, bottom = (sides[0, 0] + 0.5).floor().unbind(-1)
    width = (column + right).clamp(max=n_side - 1) - (column - left).clamp(min=0) + 1
    height = (row + bottom).clamp(max=n_side - 1) - (row - top).clamp(min=0) + 1
    area = float((width * height).mean()) / n_patches
    assert 0.8 * area < open_share(block_mask(sides, (n_side,) * 2, 0, tile_windows=True)) <= 1.3 * area
    # windows of single queries cannot: already their hull over a tile of 8 x 16 is larger than each of them
    exact = open_share(block_mask(sides, (n_side,) * 2, 0))
    assert area < exact < 0.45


class Counted(TorchDispatchMode):
    """Counts operations, and the numbers in the largest tensor that one of them makes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        tensors = [each for each in pytree.tree_leaves(result) if isinstance(each, Tensor)]
        self.largest = max(
            [self.largest, *(each.untyped_storage().nbytes() // each.element_size() for each in tensors)]
        )
        return result


def test_making_a_mask_touches_tokens_and_blocks_and_no_pair_of_tokens():
    """Its time is printed by `experiments/wint.py sparse`; here what it follows from, on any machine."""
    counts = []
    for n_side in (56, 112):
        sides = 35 * torch.rand((1, 1, n_side**2, 4), generator=torch.Generator().manual_seed(0))
        tile_order((n_side, n_side), 0)
        with Counted() as counted:
            block_mask(sides, (n_side, n_side), 0)
        n_blocks = -(-(n_side**2) // BLOCK)
        assert counted.largest <= 4 * max(n_blocks * BLOCK, 2 * n_blocks**2)
        counts.append(counted.operations)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("start", [((0.2,) * 4,), ((0.2,) * 4, (0.5,) * 4)], ids=["one for all heads", "one a head"])
def test_a_model_gives_the_same_logits_through_blocks(class_token, start):
    model = small(class_token=class_token, start=start)
    images = torch.randn((3, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(images)
        with block_sparse(model) as sparse:
            assert_allclose(sparse(images), dense, atol=1e-5)
        assert torch.equal(model(images), dense)


@pytest.mark.parametrize("n_windows", [1, 2])
@pytest.mark.parametrize(("grid", "prefix"), GRIDS)
def test_soft_windows_in_blocks_are_those_of_the_dense_mask(grid, prefix, n_windows):
    sides = random_sides(grid, n_windows=n_windows)
    q, k, v = random_tokens(grid, prefix)
    for cut in (CUT, 0.02):
        bias = attention_bias(soft_bias(sides, grid, 0.15, cut), prefix, q)
        dense = scaled_dot_product_attention(q, k, v, attn_mask=bias)
        assert_allclose(sparse_attention(q, k, v, sides, grid, prefix, edges=0.15, cut=cut), dense, atol=1e-5)


def test_a_cut_closes_the_lines_that_are_less_open_and_leaves_the_others_as_they_are():
    grid = (16, 16)
    sides = 6 * torch.rand((1, 1, 256, 4), generator=torch.Generator().manual_seed(0))
    reached = hard_mask(sides + soft_reach(0.15), grid)
    whole, cut = soft_bias(sides, grid, 0.15), soft_bias(sides, grid, 0.15, CUT)
    seen = cut > CLOSED / 2
    assert not bool((seen & ~reached).any())
    assert float((reached & ~seen).float().mean()) < 0.01  # both edges of a narrow window count, the box has one
    assert_allclose(cut[seen], whole[seen], rtol=0, atol=1e-6)
    assert float(whole[~seen].max()) < np.log(CUT) + 1e-6
    assert bool((seen & ~hard_mask(sides, grid)).any())
    assert bool((soft_mask(sides, grid, 0.15)[hard_mask(sides, grid)] > 0.03).all())


def test_a_model_with_cut_soft_edges_gives_its_own_logits_through_blocks_and_one_without_nearly():
    images = torch.randn((3, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    for model, within in ((small(edges=0.15, cut=0.01), 1e-5), (small(edges=0.15), 1e-2)):
        with torch.no_grad(), window_mode(model, "sparse"):
            through_blocks = model(images)
        with torch.no_grad():
            assert_allclose(through_blocks, model(images), atol=within)


def test_soft_edges_are_hardened_where_that_is_asked_for():
    soft, hard = small(edges=0.15), small()
    images = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, before = hard(images), soft(images)
        with hard_edges(soft):
            assert torch.equal(soft(images), wanted)
        with block_sparse(soft, harden=True):
            assert_allclose(soft(images), wanted, atol=1e-5)
        assert torch.equal(soft(images), before)


def refuse(model: WinT, match: str) -> None:
    with pytest.raises(UsageError, match=match), block_sparse(model):
        pass


def test_block_sparse_attention_is_for_windows_in_evaluation():
    refuse(small(windows="none"), "in evaluation")
    refuse(small().train(), r"in evaluation: call model\.eval\(\)")
    refuse(attach(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)).eval(), "heads on a timm model")
    with (
        pytest.raises(UsageError, match=r"this model's are soft.*--windows tiles"),
        block_sparse(small(edges=0.15), tile_windows=True),
    ):
        pass
    with pytest.raises(UsageError, match="has none"), hard_edges(small(windows="none")):
        pass
    with pytest.raises(UsageError, match="up to 256"):
        tile_order((8, 257), 0)
