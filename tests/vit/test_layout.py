"""How a block's tokens are laid out, found from shapes; on images that are no squares too."""

import pytest
import torch

from vitrail.tap.layout import BatchAxis, TokenLayout, layout_of_input, layout_of_output, main_output

SQUARE, WIDE = (64, 64), (48, 80)
BATCH = BatchAxis(0, 1)


@pytest.mark.parametrize(
    ("shape", "n_channels", "sides", "order"),
    [
        ((2, 16, 16, 32), 32, SQUARE, "NHWC"),
        ((2, 32, 16, 16), 32, SQUARE, "NCHW"),
        ((2, 32, 16, 16), 16, SQUARE, "NCHW"),  # as many heads' channels as columns: the picture is the square
        ((2, 16, 16, 16), 16, SQUARE, "NHWC"),  # nothing tells
        ((2, 12, 20, 32), 32, WIDE, "NHWC"),
        ((2, 12, 20, 32), 64, WIDE, "NHWC"),  # a stage that widens its channels
        ((2, 32, 12, 20), 64, WIDE, "NCHW"),
        ((2, 20, 12, 20), 20, WIDE, "NCHW"),  # as many channels as columns: the picture has the image's shape
        ((2, 2, 3, 64), 32, WIDE, "NHWC"),  # 1.5 by 2.5 patches rounded up
        ((2, 64, 2, 3), 32, WIDE, "NCHW"),
    ],
)
def test_a_picture_is_what_has_the_shape_of_the_image(
    shape: tuple[int, ...], n_channels: int, sides: tuple[int, int], order: str
) -> None:
    assert layout_of_input(torch.zeros(shape), BATCH, n_channels, sides) == TokenLayout(order)  # type: ignore[arg-type]


def test_what_a_block_returns_is_laid_out_as_what_it_takes_unless_its_shape_says_otherwise() -> None:
    tokens, layout = torch.zeros(2, 16, 16, 32), TokenLayout("NHWC")
    assert layout_of_output(tokens + 1, BATCH, tokens, layout, 32, SQUARE) is layout
    assert layout_of_output(torch.zeros(2, 64, 8, 8), BATCH, tokens, layout, 32, SQUARE) == TokenLayout("NCHW")
    assert layout_of_output(torch.zeros(2, 64, 32), BATCH, tokens, layout, 32, SQUARE) == TokenLayout("NLC")


def test_the_tokens_among_what_a_block_returns_are_no_map_and_belong_to_the_images() -> None:
    tokens, maps = torch.zeros(2, 17, 8), torch.zeros(2, 3, 17, 17)
    leaves = [torch.zeros(500, 17, 8), tokens, maps]
    assert main_output(leaves, [None, BATCH, BATCH], TokenLayout("NLC"), {(3, 17, 17)}) == (tokens, BATCH)
    assert main_output([maps], [BATCH], TokenLayout("NHWC"), {(3, 17, 17)}) is None
    picture = torch.zeros(2, 4, 4, 8)
    assert main_output([picture], [BATCH], TokenLayout("NLC"), set()) == (picture, BATCH)
