"""The heads room: which heads matter, and how far they look.

metrics      how far apart two predictions or two sets of tokens are
importance   leave-one-head-out, exactly
estimate     the same from one backward pass
means        the mean output of a head, which may stand in its place
ranking      rankings of heads and their cumulative pruning curves (no torch)
pruning      answers without several heads
regions      which part of one head's map matters: the six region modes
strength     attention over distance
patterns     what maps look alike: coders, standing map and clusters; pattern_maps, pattern_coders, pattern_map below it
pattern_rules, pattern_names  the numbers and the rules that patterns are named from
why          why a head matters: its table and its sentences (no torch)
summary      a study's heads in one table (no torch)
collect      the above as collectors that share one pass
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vitrail.errors import UsageError
from vitrail.measure import MEASURES, ROOMS

if TYPE_CHECKING:
    from vitrail.heads.collect import Collector
    from vitrail.vit.open import Vit

__all__ = ["OPTIONS", "collectors", "skipped"]

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "importance": ("exact", "estimate"),
    "ablation": ("zero", "mean"),
    "maps": ("model", "bfloat16"),
}
"""Options of `collectors` and their values, the default first."""

OWN = ("heads", "regions", "patterns")
"""Words for `--measures` whose measures this room computes."""

REACH = ("attention_strength", "strength_entropy", "attention_distance", "prefix_share")


def collectors(vit: "Vit", names: Sequence[str], options: Mapping[str, str] | None = None) -> "list[Collector]":
    """What computes those of the measures `names` that belong to this room and that the model has.

    `options`: `importance="exact"` prunes every head in turn, `"estimate"` predicts the model metrics from one backward
    pass (layer metrics stay exact). `ablation="mean"` puts the head's mean output over the data set in its place, not
    zero, for which all images are passed through once before. `maps="bfloat16"` computes attention maps in bfloat16 for
    the measures of distance, `"model"` in the model's own precision. Measures left out are named, with the reason, by
    `skipped`. Raises `UsageError` for an unknown option.
    """
    import torch

    from vitrail.heads.collect import (
        EstimateCollector,
        MeanSweepCollector,
        ReachCollector,
        RegionCollector,
        RuleCollector,
        SweepCollector,
        layouts_on_grid,
    )
    from vitrail.heads.estimate import ESTIMATED
    from vitrail.heads.pattern_maps import pattern_ground

    left_out = skipped(vit, names, options)
    asked = [name for name in dict.fromkeys(names) if name not in left_out]
    wanted = [name for name in asked if name in ROOMS["heads"]]
    estimated = [name for name in wanted if name in ESTIMATED] if _option(options, "importance") == "estimate" else []
    swept = [name for name in wanted if name not in REACH and name not in estimated]
    read = [name for name in wanted if name in REACH]
    found: list[Collector] = []
    precision = torch.bfloat16 if _option(options, "maps") == "bfloat16" else None
    if read:
        found.append(ReachCollector(vit.anatomy, read, layouts_on_grid(vit)[0], precision))
    if swept:
        kind = MeanSweepCollector if _option(options, "ablation") == "mean" else SweepCollector
        found.append(kind(vit.anatomy, swept, vit.n_classes is not None))
    if estimated:
        found.append(EstimateCollector(vit.anatomy, estimated))
    if "head_region_probability" in asked:
        found.append(RegionCollector(vit.anatomy))
    if "pattern_rule" in asked:
        found.append(RuleCollector(vit.anatomy, pattern_ground(vit), precision))
    return found


def skipped(vit: "Vit", names: Sequence[str], options: Mapping[str, str] | None = None) -> dict[str, str]:
    """Measures among `names` that this model or these options cannot give, each with the reason."""
    wants_grid = any(name in (*REACH, *ROOMS["regions"], *ROOMS["patterns"]) for name in names)
    lacks = {
        "classifier": ""
        if vit.n_classes is not None
        else "the model has no classifier, its output is a feature vector",
        "class_token": "" if vit.anatomy.class_token else "the model has no class token",
        "grid": _no_grid(vit) if wants_grid else "",
    }
    no_patterns = _no_patterns(vit) if set(names) & set(ROOMS["patterns"]) else ""
    reasons: dict[str, str] = {}
    for name in names:
        if not any(name in ROOMS[room] for room in OWN):
            continue
        why = next((lacks[need] for need in sorted(MEASURES[name].needs) if lacks.get(need)), "")
        why = why or _not_estimated(name, options) or (name in ROOMS["patterns"] and no_patterns) or ""
        if why:
            reasons[name] = why
    return reasons


def _no_grid(vit: "Vit") -> str:
    from vitrail.heads.collect import layouts_on_grid

    found, refused = layouts_on_grid(vit)
    return "" if found else f"no layer has a map between patches of one grid: {next(iter(refused.values()))}"


def _no_patterns(vit: "Vit") -> str:
    from vitrail.heads.pattern_maps import pattern_ground

    ground = pattern_ground(vit)
    return "" if ground.grids else f"no layer has maps to compare: {next(iter(ground.refused.values()))}"


def _not_estimated(name: str, options: Mapping[str, str] | None) -> str:
    if _option(options, "importance") != "estimate":
        return ""
    from vitrail.heads.estimate import ESTIMATED, NOT_ESTIMATED

    if name in ESTIMATED and _option(options, "ablation") == "mean":
        return 'the estimate turns heads down to zero, not to their mean; use importance="exact" or ablation="zero"'
    reason = NOT_ESTIMATED.get(name, "")
    return f'no estimate: {reason}; use importance="exact"' if reason else ""


def _option(options: Mapping[str, str] | None, name: str) -> str:
    """The value of an option; all of them are checked."""
    options = options or {}
    for option, value in options.items():
        if option not in OPTIONS or value not in OPTIONS[option]:
            valid = "; ".join(f"{known}: {', '.join(values)}" for known, values in OPTIONS.items())
            raise UsageError(f"Heads have no option {option}={value!r}. Options: {valid}.")
    return options.get(name, OPTIONS[name][0])
