"""How much each patch takes from each other patch: the interaction indicators.

After Ma et al. 2022 (arXiv 2203.05922), whose formulas were not at hand: every formula here is our construction. Which
of them may be trusted is decided by experiment (`docs/patches.md`), not by this file.

An indicator is a matrix [query key] over the patches of one layer: diagonal zero, each row sums to 1 (a row without any
mass stays zero). It is made per image; maps are never averaged over images.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.errors import UsageError

__all__ = ["INDICATORS", "between_patches", "indicator", "mean_between_patches", "normalise_rows"]

INDICATORS = ("mean", "max", "var", "mean_std", "value", "removal", "gradient")
"""All indicators; `indicator` says what each is."""

DEFAULT_INDICATOR = "mean"
"""The one that the experiments of `docs/patches.md` choose."""


def indicator(
    weights: Float[Tensor, "image head query key"],
    prefix: int,
    name: str = DEFAULT_INDICATOR,
    *,
    v: Float[Tensor, "image head key channel"] | None = None,
    out: Float[Tensor, "image head query channel"] | None = None,
    gradient: Float[Tensor, "image head query key"] | None = None,
) -> Float[Tensor, "image patch other"]:
    """The interaction of each patch (row) with each other patch.

    P is `between_patches`. The indicators:

    - mean: mean of P over heads
    - max: largest P over heads
    - var: variance of P over heads
    - mean_std: mean times standard deviation over heads
    - value: mean over heads of P times |v_j|
    - removal: length of the change of the heads' joined output if the query could not see the key, exact and in closed
      form: per head A/(1 - A) |v_j - out_i|, root of the sum of squares over heads
    - gradient: mean over heads of the positive part of P times dp(label)/dA

    Args:
        weights: Post-softmax attention A over all tokens.
        prefix: Tokens before the patches.
        name: One of `INDICATORS`.
        v: Values of all tokens; for `value` and `removal`.
        out: Outputs of the heads before they are joined; for `removal`.
        gradient: A dp(label)/dA over all tokens; for `gradient`.

    Returns:
        Zero or more, diagonal zero, rows summing to 1; a row without any mass stays zero.

    Raises:
        UsageError: There is no indicator of this name, or it lacks what it needs.
    """
    if name not in INDICATORS:
        raise UsageError(f"There is no indicator {name!r}; choose from {', '.join(INDICATORS)}.")
    if name == "mean":
        return normalise_rows(mean_between_patches(weights, prefix))
    if name == "removal":
        return normalise_rows(_removal(weights, prefix, _require(v, name, "v"), _require(out, name, "out")))
    share = between_patches(weights, prefix)
    if name == "value":
        length = torch.linalg.vector_norm(_require(v, name, "v")[:, :, prefix:].to(share), dim=-1)
        return normalise_rows((share * length[:, :, None]).mean(1))
    if name == "gradient":
        pull = _require(gradient, name, "gradient")[..., prefix:, prefix:].to(share)
        return normalise_rows((pull / _patch_mass(weights, prefix)[..., None]).clamp(min=0).mean(1))
    return normalise_rows(_head_statistic(share, name))


def between_patches(
    weights: Float[Tensor, "image head query key"], prefix: int
) -> Float[Tensor, "image head patch other"]:
    """P: attention between patches alone, prefix tokens left out and rows scaled to sum to 1.

    Args:
        weights: Post-softmax attention over all tokens.
        prefix: Tokens before the patches.

    Returns:
        0 to 1; a row wholly on the prefix is zero.
    """
    return weights[..., prefix:, prefix:] / _patch_mass(weights, prefix)[..., None]


def normalise_rows(matrix: Float[Tensor, "*batch patch other"]) -> Float[Tensor, "*batch patch other"]:
    """Sets the diagonal to zero and scales rows to sum to 1, in place.

    Args:
        matrix: Interactions, zero or more; overwritten.

    Returns:
        The same tensor; rows without mass off the diagonal are zero.
    """
    matrix.diagonal(dim1=-2, dim2=-1).zero_()
    mass = matrix.sum(-1, keepdim=True)
    return matrix.div_(torch.where(mass > 0, mass, 1))


def mean_between_patches(
    weights: Float[Tensor, "image head query key"], prefix: int
) -> Float[Tensor, "image patch other"]:
    """Mean over heads of P, without ever holding P.

    Args:
        weights: Post-softmax over all tokens.
        prefix: Number of tokens before the patches.

    Returns:
        Rows sum to 1, the diagonal included.
    """
    factor = 1 / (_patch_mass(weights, prefix) * weights.shape[1])
    total = weights[:, 0, prefix:, prefix:] * factor[:, 0, :, None]
    for head in range(1, weights.shape[1]):
        total.addcmul_(weights[:, head, prefix:, prefix:], factor[:, head, :, None])
    return total


def _head_statistic(share: Float[Tensor, "image head patch other"], name: str) -> Float[Tensor, "image patch other"]:
    if name == "max":
        return share.amax(1)
    variance = share.var(1, correction=0)
    return variance if name == "var" else share.mean(1) * variance.sqrt()


def _removal(weights: Tensor, prefix: int, v: Tensor, out: Tensor) -> Float[Tensor, "image patch other"]:
    """Root of the sum over heads of (A / (1 - A))^2 |v_j - out_i|^2, the distances from one product; no gradient."""
    share = weights.detach()[..., prefix:, prefix:]
    v, out = v.detach()[:, :, prefix:].to(share), out.detach()[:, :, prefix:].to(share)
    one = torch.ones_like(v[..., :1])
    query_side = torch.cat([out, out.square().sum(-1, keepdim=True), one], -1)
    key_side = torch.cat([-2 * v, one, v.square().sum(-1, keepdim=True)], -1)
    square = query_side @ key_side.mT
    odds = torch.sub(share, 1 + torch.finfo(share.dtype).eps)
    torch.div(share, odds, out=odds)
    return square.mul_(odds).mul_(odds).sum(1).clamp_min_(0).sqrt_()


def _patch_mass(weights: Tensor, prefix: int) -> Float[Tensor, "image head patch"]:
    """What each patch gives to patches, never zero, so that a row wholly on the prefix becomes a zero row.

    Summed, not what the prefix leaves of 1: of a head that gives nearly all to the prefix that would be rounding."""
    return weights[..., prefix:, prefix:].sum(-1).clamp_min(torch.finfo(weights.dtype).tiny)


def _require(value: Tensor | None, name: str, argument: str) -> Tensor:
    if value is None:
        raise UsageError(f"The indicator {name!r} needs `{argument}`, which was not given.")
    return value
