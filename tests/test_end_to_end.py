"""A study of all analyses holds what was said before it: the short form of `end_to_end.py`."""

from pathlib import Path

import numpy as np
import pytest

from end_to_end import study_all, study_faults, write_photographs
from vitrail.contract.outlook import study_outlook
from vitrail.contract.tiny_models import FAMILIES
from vitrail.models.open import Vit, open_vit

MERGED = "timm ViT, tokens merged"
NAMES = (MERGED, "timm PVT v2", "transformers PVT")
"""Families whose tokens get fewer from layer to layer: where measures are most often missing."""


def opened(name: str) -> Vit:
    family = next(each for each in FAMILIES if each.name == name)
    return open_vit(family.model(), image_size=family.image_size, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("end_to_end")
    write_photographs(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_study_holds_what_was_said_before_it_and_no_array_without_a_number(name: str, folder: Path) -> None:
    vit = opened(name)
    study, outlook = study_all(vit, folder, name), study_outlook(vit)
    assert study_faults(study, outlook) == []
    if name != MERGED:
        return
    study["token_norm"][:] = np.nan
    assert study_faults(study, outlook) == ["token_norm holds no number, and nothing says why"]
    del study["token_norm"], study.attrs["left_out"]["shuffle_drift"]
    other, missing = study_faults(study, outlook)
    assert other.endswith("than was said before: shuffle_drift")
    assert missing.endswith("not there: token_norm")
