"""Which of a block's inputs are its tokens, and whether its attention is between tokens, where numbers coincide."""

import pytest
import torch
from torch import Tensor, nn

from vitrail.errors import Unsupported
from vitrail.models.open import open_vit
from vitrail.tap.anatomy import Anatomy, discover
from vitrail.tap.attention import Readers

IMAGES = torch.randn((3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
CHANNELS, HEADS = 32, 2


class _Block(nn.Module):
    """Attention of two heads of 16 channels between all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def attend(self, tokens: Tensor, mask: Tensor | float = 0.0) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        self.map = (q @ k.mT / 4 + mask).softmax(-1)
        attended: Tensor = tokens + self.proj((self.map @ v).transpose(1, 2).flatten(2))
        return attended


class _Model(nn.Module):
    """4 x 4 patches of 32 channels and one block."""

    def __init__(self, block: _Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.blocks = nn.Conv2d(3, CHANNELS, 16, 16), nn.ModuleList([block])
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.blocks[0](self.patches(images)).flatten(1)
        return answer


class _WithClassToken(_Block):
    """A picture of 16 patches and a class token inside: 17 tokens, heads of as many channels as there are patches."""

    def forward(self, picture: Tensor) -> Tensor:
        tokens = torch.cat([picture.new_ones(len(picture), 1, CHANNELS), picture.flatten(2).mT], 1)
        answer: Tensor = self.attend(tokens)[:, 1:].mT.unflatten(-1, picture.shape[2:])
        return answer


class _Pooled(_Block):
    """A stage that puts four patches together first: 4 tokens, heads of as many channels as patches it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Conv2d(CHANNELS, CHANNELS, 2, 2)

    def forward(self, picture: Tensor) -> Tensor:
        answer: Tensor = self.attend(self.pool(picture).flatten(2).mT).mT.unflatten(-1, (2, 2))
        return answer


class _Masked(_Block):
    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.attend(tokens, mask)


class _MaskedModel(_Model):
    """Fewer channels than tokens: the mask has more numbers than the tokens."""

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        tokens = torch.cat([tokens, tokens.new_zeros(len(tokens), 48, CHANNELS)], 1)
        mask = tokens.sum(-1)[:, None, None].expand(-1, 1, 64, 64)
        answer: Tensor = self.blocks[0](tokens, mask).mean(1)
        return answer


class _PartsModel(_Model):
    """Beside the tokens of an image a larger tensor of its parts, four rows for each image."""

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        parts = tokens.unflatten(1, (4, 4)).flatten(0, 1).repeat(1, 2, 1)
        answer: Tensor = self.blocks[0](parts, tokens).mean(1)
        return answer


class _WithParts(_Block):
    def forward(self, parts: Tensor, tokens: Tensor) -> Tensor:
        return self.attend(tokens + parts.unflatten(0, (-1, 4)).mean((1, 2))[:, None])


class _PackedModel(_Model):
    """All images in one sequence, whose masks keep them apart."""

    def forward(self, images: Tensor) -> Tensor:
        tokens, image = self.patches(images).flatten(2).mT, torch.arange(len(images)).repeat_interleave(16)
        mask = torch.where(image[:, None] == image, 0.0, -torch.inf)
        answer: Tensor = self.blocks[0](tokens.flatten(0, 1)[None], mask).unflatten(1, (len(images), 16)).mean(2)[0]
        return answer


class _FoldedModel(_Model):
    """Four rows an image, which do not depend on the image."""

    def forward(self, images: Tensor) -> Tensor:
        rows = self.patches(images).flatten(2).mT.unflatten(1, (4, 4)).flatten(0, 1) * 0
        answer: Tensor = self.blocks[0](rows, torch.zeros(())).unflatten(0, (-1, 4)).mean((1, 2))
        return answer


def anatomy_of(model: nn.Module) -> Anatomy:
    return discover(model, IMAGES)


def test_attention_between_as_many_tokens_as_a_head_has_channels_is_not_taken_for_one_between_channels() -> None:
    (block,) = anatomy_of(_Model(_WithClassToken())).blocks
    assert (block.kind, block.tokens, block.calls[0].queries, block.head_dim) == ("unknown", 16, 17, 16)
    model = _Model(_Pooled())
    vit = open_vit(model, image_size=64, mean=0.5, std=0.5, task="embedding")
    assert vit.anatomy.blocks[0].kind == "token"
    maps: list[Tensor] = []
    vit.tap().read(IMAGES, Readers(attention=lambda each: maps.append(each.weights())))
    model(IMAGES)
    torch.testing.assert_close(maps[0], model.blocks[0].map)


def test_a_mask_with_more_numbers_than_the_tokens_is_not_taken_for_them() -> None:
    (block,) = anatomy_of(_MaskedModel(_Masked())).blocks
    assert (block.layout.order, block.tokens, block.main_input) == ("NLC", 64, 0)


def test_tokens_of_parts_of_an_image_are_not_taken_for_those_of_the_image() -> None:
    (block,) = anatomy_of(_PartsModel(_WithParts())).blocks
    assert (block.tokens, block.main_input, block.kind, block.grid) == (16, 1, "token", (4, 4))


@pytest.mark.parametrize(
    ("model", "words"),
    [(_PackedModel, "all images as one sequence of 32 tokens"), (_FoldedModel, "the same whatever the image shows")],
)
def test_tokens_that_cannot_be_given_to_their_images_are_refused_with_the_reason(
    model: type[_Model], words: str
) -> None:
    with pytest.raises(Unsupported, match=words):
        anatomy_of(model(_Masked()))
