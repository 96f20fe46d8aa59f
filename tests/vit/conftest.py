"""Tiny models of the contract suite, opened once."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from vitrail.contract.tiny_models import FAMILIES
from vitrail.models.open import Vit, open_vit

_BY_NAME = {family.name: family for family in FAMILIES}


@pytest.fixture(scope="session")
def fresh():
    """A new tiny model by its family's name, always with the same weights."""

    def make(name: str) -> nn.Module:
        return _BY_NAME[name].model()

    return make


@pytest.fixture(scope="session")
def opened():
    """A `Vit` by its family's name; shared between tests, which must leave its weights alone."""

    @cache
    def vit(name: str) -> Vit:
        family = _BY_NAME[name]
        return open_vit(family.model(), image_size=family.image_size)

    return vit


@pytest.fixture(scope="session")
def noise():
    """Images of noise for a `Vit`."""

    def images(vit: Vit, count: int = 4) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.randn((count, 3, *vit.image_size), generator=generator)

    return images
