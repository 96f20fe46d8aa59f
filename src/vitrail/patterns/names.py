"""Names of attention patterns, from rules that anyone can check. No torch.

A rule looks at one number of a head's map and asks how far it lies above what even attention would give:
excess = (value - even) / (1 - even), so 0 is even attention and 1 is all of it, whatever the grid. The first rule that
holds gives the name. Numbers, rules and thresholds are our construction.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vitrail.errors import UsageError
from vitrail.sentence import percent

__all__ = [
    "LOCAL_HOPS",
    "NAMES",
    "RULES",
    "TOP_KEYS",
    "PatternName",
    "common_grid",
    "even_attention",
    "name_pattern",
    "pattern_indices",
    "rule_thresholds",
    "typical_values",
]

RULES = (
    "self",
    "shift_mass",
    "shift_x",
    "shift_y",
    "row",
    "column",
    "local",
    "sink",
    "uniformity",
    "class_mass",
)
"""What `vitrail.patterns.rules` measures of a map, in the order of the store's dimension `rule`.

All but the last are of attention between patches, each patch's share of it made to sum to 1; means over patches.
self        what a patch gives itself
shift_mass  what a patch gives the patch at the best step (shift_x to the right, shift_y down), the mean over patches
            that have such a neighbour; steps that fewer than half of the patches can take are not asked
row, column what stays in the patch's own row, column of the grid
local       what stays within 2 hops (Chebyshev), itself included
sink        the share that the 5 most attended patches take
uniformity  entropy of a patch's attention over ln(number of patches): 1 is even
class_mass  what patches give the class token, of all that they give
"""

TOP_KEYS = 5
"""Patches whose attention is summed for `sink`."""

LOCAL_HOPS = 2
"""Hops that count as near for `local`."""

THRESHOLDS = {
    "self": 0.4,
    "shift": 0.3,
    "row band": 0.4,
    "column band": 0.4,
    "local": 0.5,
    "sink": 0.4,
    "uniform": 0.95,
}
"""How much excess over even attention (for uniform: how much uniformity) a name asks for."""

BAND_LEAD = 0.15
"""A row band keeps so much more excess in rows than in columns, and the other way round."""

NAMES = ("self", "shift", "row band", "column band", "local", "sink", "uniform", "content")
"""Every name, in the order in which the rules are tried; what no rule takes is content."""


MAX_PATCHES = 400
"""Maps of more patches are pooled: 20 x 20 patches make an input of 160,000 numbers, which is what a pattern needs."""


def common_grid(grids: Iterable[Sequence[int]]) -> tuple[int, int]:
    """The grid that maps are brought to, so that they can be compared.

    Args:
        grids: (rows, columns) of each layer's patches.

    Returns:
        The smallest number of rows and of columns, halved until there are at most 400 patches.
    """
    rows, columns = (min(sides) for sides in zip(*grids, strict=True))
    while rows * columns > MAX_PATCHES:
        rows, columns = -(-rows // 2), -(-columns // 2)
    return rows, columns


class PatternName(NamedTuple):
    """The name of a pattern.

    Attributes:
        name: One of `NAMES`, or "none".
        label: The name with the step, for a shift.
        rule: The sentence with the numbers behind it.
    """

    name: str
    label: str
    rule: str


def even_attention(grid: tuple[int, int]) -> Float[np.ndarray, "rule"]:
    """What each number of `RULES` is for a head that attends to all patches alike.

    Args:
        grid: (rows, columns) of patches.

    Returns:
        Values in the order of `RULES`; class_mass has none and is NaN.
    """
    rows, columns = grid
    n_patches = rows * columns
    near = [np.abs(np.subtract.outer(np.arange(side), np.arange(side))) <= LOCAL_HOPS for side in grid]
    local = near[0].sum() * near[1].sum() / n_patches**2
    even = {
        "self": 1 / n_patches,
        "shift_mass": 1 / n_patches,
        "shift_x": 0.0,
        "shift_y": 0.0,
        "row": 1 / rows,
        "column": 1 / columns,
        "local": float(local),
        "sink": min(TOP_KEYS, n_patches) / n_patches,
        "uniformity": 1.0,
        "class_mass": np.nan,
    }
    return np.array([even[rule] for rule in RULES])


def rule_thresholds(grid: tuple[int, int]) -> Float[np.ndarray, "rule"]:
    """From which value on each number of `RULES` gives its name; bands must also lead the other direction.

    Args:
        grid: (rows, columns) of patches.

    Returns:
        Values in the order of `RULES`; NaN for numbers that no rule asks for.
    """
    even = dict(zip(RULES, even_attention(grid), strict=True))
    names = {"shift_mass": "shift", "row": "row band", "column": "column band", "uniformity": "uniform"}
    found = np.full(len(RULES), np.nan)
    for at, rule in enumerate(RULES):
        asked = THRESHOLDS.get(names.get(rule, rule))
        if asked is not None:
            found[at] = asked if rule == "uniformity" else even[rule] + asked * (1 - even[rule])
    return found


def pattern_indices(values: Float[np.ndarray, "*map rule"], grid: tuple[int, int]) -> Int[np.ndarray, "*map"]:
    """The name that each map takes.

    Args:
        values: Numbers of maps, in the order of `RULES`.
        grid: (rows, columns) of patches.

    Returns:
        Index into `NAMES`; -1 for maps without numbers.
    """
    of = dict(zip(RULES, np.moveaxis(np.asarray(values, dtype=np.float64), -1, 0), strict=True))
    even = dict(zip(RULES, map(float, even_attention(grid)), strict=True))
    excess = {rule: (of[rule] - even[rule]) / (1 - even[rule] if even[rule] < 1 else np.inf) for rule in RULES}
    lead = excess["row"] - excess["column"]
    holds = {
        "self": excess["self"] >= THRESHOLDS["self"],
        "shift": excess["shift_mass"] >= THRESHOLDS["shift"],
        "row band": (excess["row"] >= THRESHOLDS["row band"]) & (lead >= BAND_LEAD),
        "column band": (excess["column"] >= THRESHOLDS["column band"]) & (-lead >= BAND_LEAD),
        "local": excess["local"] >= THRESHOLDS["local"],
        "sink": excess["sink"] >= THRESHOLDS["sink"],
        "uniform": of["uniformity"] >= THRESHOLDS["uniform"],
        "content": np.ones(np.shape(lead), dtype=bool),
    }
    first = np.argmax(np.stack([holds[name] for name in NAMES]), axis=0)
    return np.asarray(np.where(np.isnan(of["self"]), -1, first))


def name_pattern(values: Float[np.ndarray, "rule"], grid: tuple[int, int]) -> PatternName:
    """The name of a map, or of `typical_values` of several.

    Args:
        values: Its numbers, in the order of `RULES`.
        grid: (rows, columns) of patches.

    Returns:
        The name; "none" for a map without numbers (a head whose patches attend to no patch, or that its layer lacks).

    Raises:
        UsageError: Another number of values.
    """
    if np.shape(values) != (len(RULES),):
        raise UsageError(f"A pattern is named from {len(RULES)} numbers ({', '.join(RULES)}); got {np.shape(values)}.")
    at = int(pattern_indices(values, grid))
    if at < 0:
        return PatternName("none", "none", "there is no attention between patches to name")
    value = dict(zip(RULES, map(float, values), strict=True))
    even = dict(zip(RULES, map(float, even_attention(grid)), strict=True))
    step = f" ({_offset(value['shift_x'])}, {_offset(value['shift_y'])})" if NAMES[at] == "shift" else ""
    return PatternName(NAMES[at], NAMES[at] + step, _sentence(NAMES[at], value, even))


def _offset(steps: float) -> str:
    return f"{steps:+.0f}" if steps else "0"


def typical_values(values: Float[np.ndarray, "map rule"]) -> Float[np.ndarray, "rule"]:
    """What several maps are on average; for the step the one that most of them take.

    Args:
        values: Numbers of maps, in the order of `RULES`; maps with NaN do not count.

    Returns:
        Values in the order of `RULES`; NaN of no maps.
    """
    present = np.asarray(values, dtype=np.float64)
    present = present[~np.isnan(present[:, 0])]
    if not len(present):
        return np.full(len(RULES), np.nan)
    means = present.mean(0)
    step = [RULES.index("shift_x"), RULES.index("shift_y")]
    steps, counts = np.unique(present[:, step], axis=0, return_counts=True)
    means[step] = steps[counts.argmax()]
    return np.asarray(means)


def _sentence(name: str, value: dict[str, float], even: dict[str, float]) -> str:
    def share(rule: str) -> str:
        return f"{percent(value[rule])} (even attention: {percent(even[rule], 1)})"

    sentences = {
        "self": f"a patch gives itself {share('self')}",
        "shift": f"a patch gives {share('shift_mass')} to the patch {_step(value['shift_x'], value['shift_y'])}",
        "row band": f"{share('row')} stays in the patch's own row, {percent(value['column'])} in its column",
        "column band": f"{share('column')} stays in the patch's own column, {percent(value['row'])} in its row",
        "local": f"{share('local')} stays within {LOCAL_HOPS} patches",
        "sink": f"the {TOP_KEYS} most attended patches take {share('sink')}",
        "uniform": f"the entropy of a patch's attention is {percent(value['uniformity'])} of the largest",
        "content": (
            f"none of the rules holds; {share('local')} stays within {LOCAL_HOPS} patches, the {TOP_KEYS} most "
            f"attended patches take {share('sink')}, its entropy is {percent(value['uniformity'])} of the largest"
        ),
    }
    return sentences[name]


def _step(x: float, y: float) -> str:
    across = f"{abs(x):.0f} to the {'right' if x > 0 else 'left'}" if x else ""
    down = f"{abs(y):.0f} {'down' if y > 0 else 'up'}" if y else ""
    return " and ".join(part for part in (across, down) if part)
