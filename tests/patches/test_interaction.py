"""Indicators: rows, diagonal, prefix, and what each of them is."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor
from torch.testing import assert_close

from vitrail.errors import UsageError
from vitrail.patches.interaction import INDICATORS, between_patches, indicator


def layer(prefix: int = 2, n_patches: int = 12, n_heads: int = 3) -> dict[str, Tensor]:
    """Attention weights, values, outputs and a gradient that fit together."""
    generator = torch.Generator().manual_seed(0)
    n_tokens = prefix + n_patches
    weights = (2 * torch.randn((2, n_heads, n_tokens, n_tokens), generator=generator)).softmax(-1)
    v = torch.randn((2, n_heads, n_tokens, 5), generator=generator)
    gradient = torch.randn(weights.shape, generator=generator)
    return {"weights": weights, "v": v, "out": weights @ v, "gradient": gradient}


@pytest.mark.parametrize("name", INDICATORS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_rows_sum_to_one_and_no_patch_interacts_with_itself(name: str, prefix: int) -> None:
    parts = layer(prefix)
    found = indicator(parts.pop("weights"), prefix, name, **parts)
    assert found.shape == (2, 12, 12)
    assert_close(found.sum(-1), torch.ones(2, 12))
    assert torch.all(found.diagonal(dim1=-2, dim2=-1) == 0)
    assert torch.all(found >= 0)


@pytest.mark.parametrize("name", INDICATORS)
def test_weights_are_left_as_they_are(name: str) -> None:
    parts = layer()
    before = {key: value.clone() for key, value in parts.items()}
    indicator(parts["weights"], 2, name, v=parts["v"], out=parts["out"], gradient=parts["gradient"])
    assert_close(parts, before)


def test_attention_between_patches_is_renormalised() -> None:
    weights = layer(2)["weights"]
    share = between_patches(weights, 2)
    assert_close(share.sum(-1), torch.ones(2, 3, 12))
    assert_close(share[0, 1, 4, 7] / share[0, 1, 4, 3], weights[0, 1, 6, 9] / weights[0, 1, 6, 5])


def test_mean_is_the_mean_over_heads_of_renormalised_attention() -> None:
    weights = layer(2)["weights"]
    expected = between_patches(weights, 2).mean(1)
    expected.diagonal(dim1=-2, dim2=-1).zero_()
    assert_close(indicator(weights, 2, "mean"), expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("name", ["max", "var", "mean_std", "value", "gradient"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_each_indicator_is_its_formula_in_numpy(name: str, prefix: int) -> None:
    """One pair of patches at a time: P over heads, its values' lengths, and dp/dA = (A dp/dA) / A."""
    parts = layer(prefix)
    weights, v, pull = (parts[each].double().numpy() for each in ("weights", "v", "gradient"))
    expected = np.zeros((2, 12, 12))
    for image, query, key in np.ndindex(expected.shape):
        i, j = prefix + query, prefix + key
        share = np.array([row[i, j] / row[i, prefix:].sum() for row in weights[image]])
        slope = pull[image, :, i, j] / weights[image, :, i, j]
        mean = share.sum() / 3
        variance = ((share - mean) ** 2).sum() / 3
        expected[image, query, key] = {
            "max": share.max(),
            "var": variance,
            "mean_std": mean * variance**0.5,
            "value": (share * (v[image, :, j] ** 2).sum(-1) ** 0.5).sum() / 3,
            "gradient": np.maximum(share * slope, 0).sum() / 3,
        }[name]
        expected[image, query, query] = 0
    expected /= expected.sum(-1, keepdims=True)
    assert_allclose(indicator(prefix=prefix, name=name, **parts), expected, rtol=1e-4, atol=1e-6)


def test_heads_that_agree_have_no_variance() -> None:
    weights = layer(1)["weights"][:, :1].expand(-1, 3, -1, -1)
    assert_close(indicator(weights, 1, "var"), torch.zeros(2, 12, 12))


def test_removal_is_what_closing_the_key_changes() -> None:
    parts = layer(1)
    weights, v, out = parts["weights"], parts["v"], parts["out"]
    found = indicator(weights, 1, "removal", v=v, out=out)
    change = torch.zeros_like(found)
    for key in range(12):
        closed = weights.clone()
        closed[..., 1 + key] = 0
        closed /= closed.sum(-1, keepdim=True)
        moved = ((closed @ v) - out)[:, :, 1:].square().sum((1, 3)).sqrt()
        moved[:, key] = 0
        change[..., key] = moved
    assert_close(found, change / change.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gap", [10.0, 16.0, 40.0, 80.0])
def test_a_head_that_gives_nearly_all_to_the_prefix_counts_as_one_head(gap: float) -> None:
    scores = torch.randn((1, 2, 17, 17), generator=torch.Generator().manual_seed(0))
    plain = scores.softmax(-1)
    scores[:, 0, :, 0] += gap
    weights = scores.softmax(-1)
    assert_close(between_patches(weights, 1), between_patches(plain, 1), atol=1e-5, rtol=0)
    for name in ("mean", "max", "var", "mean_std"):
        assert_close(indicator(weights, 1, name), indicator(plain, 1, name), atol=1e-5, rtol=0)


def test_a_row_wholly_on_the_prefix_has_no_interactions() -> None:
    weights = torch.zeros((1, 1, 4, 4))
    weights[..., 0] = 1
    assert_close(indicator(weights, 1), torch.zeros(1, 3, 3))


def test_an_unknown_indicator_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(UsageError, match="mean_std"):
        indicator(layer()["weights"], 2, "best")


@pytest.mark.parametrize("name", ["value", "removal", "gradient"])
def test_an_indicator_says_what_it_needs(name: str) -> None:
    with pytest.raises(UsageError, match="needs"):
        indicator(layer()["weights"], 2, name)
