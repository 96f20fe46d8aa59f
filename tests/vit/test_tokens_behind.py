"""Tokens behind the patches, or in front of the class token: read and edited with the patches where they are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitrail
from vitrail.tap.attention import Readers
from vitrail.tap.edits import Edit
from vitrail.tokens.vectors import image_embeddings

N_PROMPTS = 5
N_PATCHES = 16


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3
        self.qkv, self.proj = nn.Linear(48, 144), nn.Linear(48, 48)
        self.map: Tensor | None = None
        self.without: tuple[int, ...] = ()

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        self.map = (q @ k.mT / 4).softmax(-1)
        out = (self.map @ v).transpose(1, 2)
        out[:, :, list(self.without)] = 0  # head axis
        projected: Tensor = self.proj(out.flatten(2))
        return projected


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(48), _Attention()

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.attn(self.norm(tokens))


class _Prompted(nn.Module):
    """A ViT with prompts behind its patches, in front of them or of all tokens, from one of its blocks on.

    Its class token may join nothing; then the answer is of the mean.
    """

    def __init__(self, *, where: str = "behind", first: int = 0, name: str = "cls_token", joins: bool = True) -> None:
        super().__init__()
        self.where, self.first, self.name, self.joins = where, first, name, joins
        self.register_parameter(name, nn.Parameter(torch.randn(1, 1, 48)))
        self.positions = nn.Parameter(torch.randn(1, N_PATCHES + 1, 48))
        self.prompts = nn.Parameter(torch.randn(1, N_PROMPTS, 48))
        self.patches = nn.Conv2d(3, 48, 16, 16)
        self.blocks = nn.ModuleList(_Block() for _ in range(3))
        self.head = nn.Linear(48, 7)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        class_token = getattr(self, self.name).expand(len(images), -1, -1)
        tokens = torch.cat([class_token, patches], 1) + self.positions if self.joins else patches
        for index, block in enumerate(self.blocks):
            if index == self.first:
                prompts = self.prompts.expand(len(images), -1, -1)
                parts = {
                    "behind": [tokens, prompts],
                    "between": [tokens[:, :1], prompts, tokens[:, 1:]],
                    "before": [prompts, tokens],
                }
                tokens = torch.cat(parts[self.where], 1)
            tokens = block(tokens)
        read = tokens[:, N_PROMPTS if self.where == "before" else 0] if self.joins else tokens.mean(1)
        logits: Tensor = self.head(read)
        return logits


def _prompted(**options: str | int) -> _Prompted:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _Prompted(**options).eval()  # type: ignore[arg-type]


def _opened(model: nn.Module) -> vitrail.Vit:
    return vitrail.open_vit(model, image_size=64, weights="random")


IN_FRONT_FIRST = [0, *range(N_PATCHES + 1, N_PATCHES + 1 + N_PROMPTS), *range(1, N_PATCHES + 1)]
"""The model's tokens in canonical order, with prompts behind: the class token, prompts, patches."""

CLASS_FIRST = [N_PROMPTS, *range(N_PROMPTS), *range(N_PROMPTS + 1, N_PROMPTS + 1 + N_PATCHES)]
"""The same with prompts in front of the class token."""


def test_prompts_behind_the_patches_are_told_from_patches_and_maps_have_them_in_front() -> None:
    model = _prompted()
    vit = _opened(model)
    assert vit.anatomy.notes == ()
    assert [(block.prefix, block.behind, block.grid) for block in vit.anatomy.blocks] == [(6, 5, (4, 4))] * 3
    maps: list[Tensor] = []
    tokens: list[Tensor] = []
    images = torch.randn(2, 3, 64, 64)
    reader = Readers(
        attention=lambda attention: maps.append(attention.weights()), output=lambda _, out: tokens.append(out)
    )
    logits = vit.tap().read(images, reader)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images))
    for block, weights in zip(model.blocks, maps, strict=True):
        expected = block.attn.map[..., IN_FRONT_FIRST, :][..., IN_FRONT_FIRST]
        torch.testing.assert_close(weights, expected)
    assert tokens[0].shape == (2, 22, 48)


@pytest.mark.parametrize("name", ["cls_token", "summary"])
def test_a_class_token_behind_others_is_the_first_in_canonical_order(name: str) -> None:
    """Registers in front of it, and queries that join in front of it later, as in EoMT."""
    model = _prompted(where="before", name=name)
    vit = _opened(model)
    assert [vit.anatomy.class_index(layer) for layer in range(3)] == [0, 0, 0]
    maps: list[Tensor] = []
    images = torch.randn(2, 3, 64, 64)
    logits = vit.tap().read(images, Readers(attention=lambda attention: maps.append(attention.weights())))
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images))
    for block, weights in zip(model.blocks, maps, strict=True):
        torch.testing.assert_close(weights, block.attn.map[..., CLASS_FIRST, :][..., CLASS_FIRST])
    later = _opened(_prompted(where="before", first=1, name=name)).anatomy
    assert [block.layout.non_patches.first for block in later.blocks] == [0, N_PROMPTS, N_PROMPTS]
    assert [later.class_index(layer) for layer in range(3)] == [0, 0, 0]


def test_registers_are_no_class_token_where_one_is_named_that_joins_nothing() -> None:
    anatomy = _opened(_prompted(where="before", joins=False)).anatomy
    assert [(block.prefix, block.behind) for block in anatomy.blocks] == [(N_PROMPTS, 0)] * 3
    assert not anatomy.class_token


def test_the_vector_of_an_image_without_class_token_is_the_mean_of_its_patches() -> None:
    vit = _opened(_prompted(joins=False))
    assert (vit.anatomy.blocks[0].behind, vit.anatomy.class_token) == (N_PROMPTS, False)
    returned: dict[int, Tensor] = {}
    vit.tap().read(torch.randn(2, 3, 64, 64), Readers(output=returned.__setitem__))
    expected = nn.functional.layer_norm(returned[2][:, N_PROMPTS:].mean(1), (48,))
    torch.testing.assert_close(image_embeddings(returned[2], vit.anatomy), expected)


@pytest.mark.parametrize(("where", "order"), [("behind", IN_FRONT_FIRST), ("before", CLASS_FIRST)])
def test_edits_act_on_the_tokens_they_name(where: str, order: list[int]) -> None:
    model = _prompted(where=where)
    vit = _opened(model)
    images = torch.randn(2, 3, 64, 64)
    bias = torch.randn(22, 22)
    edits = (Edit(1, prune=(2,)), Edit(2, bias=bias))
    logits = vit.tap().read(images, edits=edits)
    at = torch.tensor(order)
    in_model = torch.empty(22, 22)
    in_model[at[:, None], at] = bias  # canonical -> the model's own order
    model.blocks[1].attn.without = (2,)
    plain = model.blocks[2].attn

    def biased(tokens: Tensor) -> Tensor:
        q, k, v = plain.qkv(tokens).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        out: Tensor = plain.proj((((q @ k.mT / 4) + in_model).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out

    plain.forward = biased
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images))


def test_prompts_that_join_later_are_found_too() -> None:
    vit = _opened(_prompted(first=1))
    assert [(block.prefix, block.behind, block.grid) for block in vit.anatomy.blocks] == [
        (1, 0, (4, 4)),
        (6, 5, (4, 4)),
        (6, 5, (4, 4)),
    ]


def test_a_study_does_not_depend_on_where_the_model_has_its_prompts(tmp_path: Path) -> None:
    """Attention does not know the order of tokens, so prompts anywhere make the same model."""
    studies = [
        vitrail.run_study(
            _opened(_prompted(where=where)),
            "photos",
            out=tmp_path / where,
            limit=2,
            batch_size=2,
            measures="heads,regions,patches,tokens",
        )
        for where in ("between", "behind", "before")
    ]
    for other in studies[1:]:
        assert studies[0].data_vars.keys() == other.data_vars.keys()
        for name in set(studies[0].data_vars) - {"image_xy"}:  # of two images, a direction whose sign is free
            np.testing.assert_allclose(
                other[name].values, studies[0][name].values, rtol=2e-3, atol=2e-4, err_msg=str(name)
            )
