"""Verification: masks reach the model, and an image without a label keeps the model's own answer as one."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from heads.head_models import drawn_wide, timm_swin, timm_vit
from vitrail import open_vit
from vitrail.errors import Unsupported, UsageError
from vitrail.models.open import Vit
from vitrail.patches import verify
from vitrail.tap.edits import Edit

N = 15
OPEN = torch.ones((3, N, N), dtype=torch.bool)
ALONE = torch.eye(N, dtype=torch.bool).expand(3, -1, -1)


@pytest.fixture(scope="module")
def vit() -> Vit:
    return open_vit(drawn_wide(timm_vit()), image_size=(48, 80))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 48, 80, generator=torch.Generator().manual_seed(0))


def test_without_labels_the_models_own_answer_is_the_label(vit: Vit, images: Tensor) -> None:
    with torch.no_grad():
        own = vit.logits(images)
        found = verify.score_under_masks(vit, images, {0: OPEN, 1: OPEN, 2: OPEN})
    assert found.correct.all()
    assert_close(found.probability, own.softmax(-1).amax(-1), atol=1e-5, rtol=1e-4)


def test_with_labels_those_count(vit: Vit, images: Tensor) -> None:
    with torch.no_grad():
        logits = vit.logits(images)
        wrong = (logits.argmax(-1) + 1) % logits.shape[-1]
        found = verify.score_under_masks(vit, images, {0: OPEN}, wrong)
    assert not found.correct.any()
    assert_close(found.probability, logits.softmax(-1).gather(1, wrong[:, None])[:, 0], atol=1e-5, rtol=1e-4)


def test_a_mask_for_all_heads_is_that_mask_for_each(vit: Vit, images: Tensor) -> None:
    per_head = ALONE[:, None].expand(-1, 3, -1, -1)
    with torch.no_grad():
        one = verify.score_under_masks(vit, images, {1: ALONE})
        each = verify.score_under_masks(vit, images, {1: per_head})
        plain = verify.score_under_masks(vit, images, {1: OPEN})
    assert_close(one.probability, each.probability)
    assert float((one.probability - plain.probability).abs().max()) > 1e-4


def test_masks_close_keys_before_softmax(vit: Vit, images: Tensor) -> None:
    mask = OPEN.clone()
    mask[..., [2, 7]] = False
    with torch.no_grad():
        closed = vit.tap().read(images, edits=verify.mask_edits(vit, {1: mask})[:1])
        bias = torch.zeros((16, 16))
        bias[1:, [3, 8]] = -torch.inf
        assert_close(closed, vit.tap().read(images, edits=[Edit(1, bias=bias)]), atol=1e-6, rtol=1e-5)


def test_a_mask_of_another_grid_is_refused_with_the_size_that_fits(vit: Vit, images: Tensor) -> None:
    with pytest.raises(UsageError, match="3 x 5 patches"):
        verify.score_under_masks(vit, images, {0: torch.ones((3, 16, 16), dtype=torch.bool)})


def test_a_layer_that_is_not_there_is_refused(vit: Vit, images: Tensor) -> None:
    with pytest.raises(Unsupported, match="L0 to L2"):
        verify.score_under_masks(vit, images, {3: OPEN})


def test_layers_with_windows_of_their_own_are_refused() -> None:
    vit = open_vit(timm_swin(), image_size=64)
    with pytest.raises(Unsupported, match="within windows of its own"):
        verify.mask_edits(vit, {0: torch.ones((1, 256, 256), dtype=torch.bool)})
