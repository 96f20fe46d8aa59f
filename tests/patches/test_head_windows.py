"""Windows of every head under one budget: the budget is kept, area goes where it matters, and no labels are used."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from heads.head_models import drawn_wide, timm_swin, timm_vit
from vitrail import open_vit
from vitrail.errors import Unsupported, UsageError
from vitrail.models.open import Vit
from vitrail.patches import windows
from vitrail.patches.budget import head_prices
from vitrail.patches.head_windows import common_grid, head_windows, query_weights, window_edits

GRID = (3, 5)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return drawn_wide(timm_vit())


@pytest.fixture(scope="module")
def vit(model: nn.Module) -> Vit:
    return open_vit(model, image_size=(48, 80))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 48, 80, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def prices(vit: Vit, images: Tensor) -> Tensor:
    with torch.no_grad():
        return head_prices(vit, images)


def under(vit: Vit, images: Tensor, boxes: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return vit.tap().read(images, edits=window_edits(vit, boxes))


def divergence(plain: Tensor, other: Tensor) -> float:
    return float((plain.softmax(-1) * (plain.log_softmax(-1) - other.log_softmax(-1))).sum(-1).mean())


@pytest.mark.parametrize("area", [0.1, 0.25, 0.6])
def test_the_mean_area_of_each_image_keeps_to_the_budget(vit: Vit, images: Tensor, prices: Tensor, area: float) -> None:
    boxes = head_windows(vit, images, prices, area)
    assert [tuple(each.shape) for each in boxes] == [(3, 3, 15, 4)] * 3
    sizes = torch.stack([windows.areas(each).float().mean((1, 2)) for each in boxes])
    assert torch.all(sizes.mean(0) <= windows.n_patches_of(area, GRID) + 1e-4)
    assert float(sizes.mean()) > 0.7 * windows.n_patches_of(area, GRID)


def test_the_whole_grid_changes_nothing(vit: Vit, images: Tensor, prices: Tensor) -> None:
    boxes = head_windows(vit, images, prices, 1.0)
    assert_close(under(vit, images, boxes), vit.logits(images), atol=1e-4, rtol=1e-3)


def test_windows_keep_the_prediction_better_than_the_same_boxes_elsewhere(
    vit: Vit, images: Tensor, prices: Tensor
) -> None:
    boxes, plain = head_windows(vit, images, prices, 0.3), vit.logits(images)
    own = divergence(plain, under(vit, images, boxes))
    generator = torch.Generator().manual_seed(1)
    moved = [[windows.random_boxes(each, GRID, generator) for each in boxes] for _ in range(5)]
    assert own < 0.5 * min(divergence(plain, under(vit, images, each)) for each in moved)


def test_area_goes_to_the_only_head_that_has_a_price(vit: Vit, images: Tensor) -> None:
    prices = torch.zeros(3, 3)
    prices[1, 2] = 1.0
    boxes = head_windows(vit, images, prices, 0.25)
    sizes = torch.stack([windows.areas(each).float().mean((0, 2)) for each in boxes])
    assert float(sizes[1, 2]) > 6
    sizes[1, 2] = 0
    assert torch.all(sizes == 0)


def test_an_image_has_its_windows_whatever_company_it_is_in(vit: Vit, images: Tensor, prices: Tensor) -> None:
    together = head_windows(vit, images, prices, 0.25)
    alone = head_windows(vit, images[1:2], prices, 0.25)
    same = [(own[1] == other[0]).all(-1).float().mean() for own, other in zip(together, alone, strict=True)]
    assert float(torch.stack(same).mean()) > 0.98  # rounding of another batch may turn a tie


def test_weights_are_gradients_by_the_tokens_of_each_layer(model: nn.Module, vit: Vit, images: Tensor) -> None:
    tokens: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: tokens.append(out)) for block in model.blocks]
    logits = model(images)
    for hook in hooks:
        hook.remove()
    expected = [torch.zeros(3, 15) for _ in tokens]
    probability = logits.detach().softmax(-1)
    for image in range(3):
        for label in probability[image].argsort(descending=True)[:4]:
            gradients = torch.autograd.grad(logits.log_softmax(-1)[image, label], tokens, retain_graph=True)
            for total, gradient in zip(expected, gradients, strict=True):
                total[image] += probability[image, label] * gradient[image, 1:].square().sum(-1)
    for layer, (weight, total) in enumerate(zip(query_weights(vit, images), expected, strict=True)):
        if layer == 2:
            assert torch.all(weight == 1)  # the class token alone is read
        else:
            assert_close(weight, (total / total.mean(-1, keepdim=True)).sqrt(), atol=1e-4, rtol=1e-3)


def test_a_model_without_classes_has_windows_too(images: Tensor) -> None:
    vit = open_vit(drawn_wide(timm_vit(num_classes=0)), image_size=(48, 80))
    with torch.no_grad():
        boxes = head_windows(vit, images[:1], head_prices(vit, images), 0.4)
    output = under(vit, images[:1], boxes)
    assert float(torch.cosine_similarity(output, vit.logits(images[:1]))) > 0.9


def test_what_cannot_have_windows_is_refused(vit: Vit, images: Tensor, prices: Tensor) -> None:
    assert common_grid(vit) == (GRID, 1)
    with pytest.raises(Unsupported, match="windows of its own"):
        common_grid(open_vit(timm_swin(), image_size=(64, 64)))
    with pytest.raises(UsageError, match="share above 0"):
        head_windows(vit, images, prices, 0.0)
    pyramid = timm.create_model("pvt_v2_b0", num_classes=5).eval()
    with pytest.raises(Unsupported):
        common_grid(open_vit(pyramid, image_size=64))
