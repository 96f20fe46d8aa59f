"""Tokens behind the patches (prompts, detection tokens): read and edited with the patches where they are."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import vitrail
from vitrail.tap.attention import Readers
from vitrail.tap.edits import Edit

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
    """A ViT with prompts behind its patches, or in front of them, from one of its blocks on."""

    def __init__(self, *, behind: bool, first: int = 0) -> None:
        super().__init__()
        self.behind, self.first = behind, first
        self.cls_token = nn.Parameter(torch.randn(1, 1, 48))
        self.positions = nn.Parameter(torch.randn(1, N_PATCHES + 1, 48))
        self.prompts = nn.Parameter(torch.randn(1, N_PROMPTS, 48))
        self.patches = nn.Conv2d(3, 48, 16, 16)
        self.blocks = nn.ModuleList(_Block() for _ in range(3))
        self.head = nn.Linear(48, 7)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.positions
        for index, block in enumerate(self.blocks):
            if index == self.first:
                prompts = self.prompts.expand(len(images), -1, -1)
                parts = [tokens, prompts] if self.behind else [tokens[:, :1], prompts, tokens[:, 1:]]
                tokens = torch.cat(parts, 1)
            tokens = block(tokens)
        logits: Tensor = self.head(tokens[:, 0])
        return logits


def _prompted(**options: bool | int) -> _Prompted:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _Prompted(**options).eval()  # type: ignore[arg-type]


def _opened(model: nn.Module) -> vitrail.Vit:
    return vitrail.open_vit(model, image_size=64, weights="random")


IN_FRONT_FIRST = [0, *range(N_PATCHES + 1, N_PATCHES + 1 + N_PROMPTS), *range(1, N_PATCHES + 1)]
"""The model's tokens in canonical order: the class token, prompts, patches."""


def test_prompts_behind_the_patches_are_told_from_patches_and_maps_have_them_in_front() -> None:
    model = _prompted(behind=True)
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


def test_edits_act_on_the_tokens_they_name() -> None:
    model = _prompted(behind=True)
    vit = _opened(model)
    images = torch.randn(2, 3, 64, 64)
    bias = torch.randn(22, 22)
    edits = (Edit(1, prune=(2,)), Edit(2, bias=bias))
    logits = vit.tap().read(images, edits=edits)
    order = torch.tensor(IN_FRONT_FIRST)
    in_model = torch.empty(22, 22)
    in_model[order[:, None], order] = bias  # canonical -> the model's own order
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
    vit = _opened(_prompted(behind=True, first=1))
    assert [(block.prefix, block.behind, block.grid) for block in vit.anatomy.blocks] == [
        (1, 0, (4, 4)),
        (6, 5, (4, 4)),
        (6, 5, (4, 4)),
    ]


def test_a_study_does_not_depend_on_where_the_model_has_its_prompts(tmp_path: Path) -> None:
    """Attention does not know the order of tokens, so prompts in front or behind make the same model."""
    studies = [
        vitrail.run_study(
            _opened(_prompted(behind=behind)),
            "photos",
            out=tmp_path / f"{behind}",
            limit=2,
            batch_size=2,
            measures="heads,regions,patches,tokens",
        )
        for behind in (False, True)
    ]
    assert studies[0].data_vars.keys() == studies[1].data_vars.keys()
    for name in set(studies[0].data_vars) - {"image_xy"}:  # of two images, a direction whose sign is free
        np.testing.assert_allclose(
            studies[1][name].values, studies[0][name].values, rtol=2e-3, atol=2e-4, err_msg=str(name)
        )
