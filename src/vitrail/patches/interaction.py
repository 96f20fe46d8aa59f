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

__all__ = ["DEFAULT", "INDICATORS", "between_patches", "indicator", "normalised"]

INDICATORS = ("mean", "max", "var", "mean_std", "value", "removal", "gradient")
"""All indicators; `indicator` says what each is."""

DEFAULT = "mean"
"""The one that the experiments of `docs/patches.md` choose."""


def indicator(
    weights: Float[Tensor, "image head query key"],
    prefix: int,
    name: str = DEFAULT,
    *,
    v: Float[Tensor, "image head key channel"] | None = None,
    out: Float[Tensor, "image head query channel"] | None = None,
    gradient: Float[Tensor, "image head query key"] | None = None,
) -> Float[Tensor, "image patch other"]:
    """The interaction of each patch (row) with each other patch, diagonal zero, rows summing to 1.

    `weights` are post-softmax over all tokens, the first `prefix` of which are no patches. P is `between_patches`.

    - mean: mean of P over heads
    - max: largest P over heads
    - var: variance of P over heads
    - mean_std: mean times standard deviation over heads
    - value: mean over heads of P times |v_j|
    - removal: length of the change of the heads' joined output if the query could not see the key, exact and in closed
      form: per head A/(1 - A) |v_j - out_i|, root of the sum of squares over heads; needs `v` and `out`
    - gradient: mean over heads of the positive part of P times dp(label)/dA; `gradient` is A dp/dA, [head query key]
      over all tokens

    Raises `UsageError` for another name, or where what the indicator needs is not given.
    """
    if name not in INDICATORS:
        raise UsageError(f"There is no indicator {name!r}; choose from {', '.join(INDICATORS)}.")
    if name == "mean":
        return normalised(_mean(weights, prefix))
    if name == "removal":
        return normalised(_removal(weights, prefix, _needed(v, name, "v"), _needed(out, name, "out")))
    share = between_patches(weights, prefix)
    if name == "value":
        length = torch.linalg.vector_norm(_needed(v, name, "v")[:, :, prefix:].to(share), dim=-1)
        return normalised((share * length[:, :, None]).mean(1))
    if name == "gradient":
        pull = _needed(gradient, name, "gradient")[..., prefix:, prefix:].to(share)
        return normalised((pull / _patch_mass(weights, prefix)[..., None]).clamp(min=0).mean(1))
    return normalised(_over_heads(share, name))


def between_patches(
    weights: Float[Tensor, "image head query key"], prefix: int
) -> Float[Tensor, "image head patch other"]:
    """P: attention between patches alone, prefix tokens left out and rows renormalised."""
    return weights[..., prefix:, prefix:] / _patch_mass(weights, prefix)[..., None]


def normalised(matrix: Float[Tensor, "*batch patch other"]) -> Float[Tensor, "*batch patch other"]:
    """The matrix with its diagonal set to zero and rows summing to 1 (zero rows stay zero); changes it in place."""
    matrix.diagonal(dim1=-2, dim2=-1).zero_()
    mass = matrix.sum(-1, keepdim=True)
    return matrix.div_(torch.where(mass > 0, mass, 1))


def _mean(weights: Tensor, prefix: int) -> Tensor:
    """Mean over heads of P without ever holding P."""
    factor = 1 / (_patch_mass(weights, prefix) * weights.shape[1])
    total = weights[:, 0, prefix:, prefix:] * factor[:, 0, :, None]
    for head in range(1, weights.shape[1]):
        total.addcmul_(weights[:, head, prefix:, prefix:], factor[:, head, :, None])
    return total


def _over_heads(share: Float[Tensor, "image head patch other"], name: str) -> Float[Tensor, "image patch other"]:
    if name == "max":
        return share.amax(1)
    variance = share.var(1, correction=0)
    return variance if name == "var" else share.mean(1) * variance.sqrt()


def _removal(weights: Tensor, prefix: int, v: Tensor, out: Tensor) -> Float[Tensor, "image patch other"]:
    """Root of the sum over heads of (A / (1 - A))^2 |v_j - out_i|^2, the distances from one product."""
    share = weights[..., prefix:, prefix:]
    v, out = v[:, :, prefix:].to(share), out[:, :, prefix:].to(share)
    one = torch.ones_like(v[..., :1])
    asked = torch.cat([out, out.square().sum(-1, keepdim=True), one], -1)
    given = torch.cat([-2 * v, one, v.square().sum(-1, keepdim=True)], -1)
    square = asked @ given.mT
    odds = torch.sub(share, 1 + torch.finfo(share.dtype).eps)
    torch.div(share, odds, out=odds)
    return square.mul_(odds).mul_(odds).sum(1).clamp_min_(0).sqrt_()


def _patch_mass(weights: Tensor, prefix: int) -> Float[Tensor, "image head patch"]:
    """What each patch gives to patches, never zero, so that a row wholly on the prefix becomes a zero row."""
    rows = weights[..., prefix:, :]
    whole = rows.sum(-1)
    mass = whole - rows[..., :prefix].sum(-1) if prefix else whole
    return mass.clamp_min(torch.finfo(weights.dtype).tiny)


def _needed(given: Tensor | None, name: str, argument: str) -> Tensor:
    if given is None:
        raise UsageError(f"The indicator {name!r} needs `{argument}`, which was not given.")
    return given
