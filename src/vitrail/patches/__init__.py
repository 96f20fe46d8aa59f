"""The patches room: which patches interact, in which windows, around which hubs, and which way they are pulled.

interaction  how much each patch takes from each other: the indicators
windows      for each query the box of patches that holds most of it
budget       windows per head, their areas bought where they change the answer most
verify       what becomes of the answer if patches see only what masks leave open
hubs         patches that nearly every query keeps
field        the responsive field: tendency, size, distance, and their nulls
integral     sums over boxes, which windows and fields are found with
collect      the above for a study, from the one plain pass (its options and measures need no torch)

All formulas are our construction, after Ma et al. 2022 (arXiv 2203.05922); `docs/patches.md` has the experiments.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vitrail.errors import UsageError
from vitrail.measure import ROOMS

if TYPE_CHECKING:
    from vitrail.patches.collect import PatchCollector
    from vitrail.vit.open import Vit

__all__ = ["OPTIONS", "collectors", "skipped"]

OPTIONS: Mapping[str, tuple[str, ...]] = {"window_area": ("25", "10", "15", "20", "36", "44", "60")}
"""Options of `collectors` and their values, the default first. `window_area`: percent of the grid that a window has."""


def collectors(vit: "Vit", names: Sequence[str], options: Mapping[str, str] | None = None) -> "list[PatchCollector]":
    """What computes those of the measures `names` that belong to this room and that the model has.

    Measures left out are named, with the reason, by `skipped`. Raises `UsageError` for an unknown option.
    """
    from vitrail.patches.collect import PatchCollector, grids_of_layers

    area = _window_area(options)
    left_out = skipped(vit, names, options)
    wanted = [name for name in dict.fromkeys(names) if name in ROOMS["patches"] and name not in left_out]
    return [PatchCollector(vit.n_layers, wanted, grids_of_layers(vit)[0], area)] if wanted else []


def skipped(vit: "Vit", names: Sequence[str], options: Mapping[str, str] | None = None) -> dict[str, str]:
    """Measures among `names` that this model cannot give, each with the reason."""
    _window_area(options)
    of_room = [name for name in names if name in ROOMS["patches"]]
    if not of_room:
        return {}
    from vitrail.patches.collect import grids_of_layers

    found, refused = grids_of_layers(vit)
    if found:
        return {}
    return dict.fromkeys(of_room, f"no layer has a map between patches of one grid: {next(iter(refused.values()))}")


def _window_area(options: Mapping[str, str] | None) -> float:
    for option, value in (options or {}).items():
        if option not in OPTIONS or value not in OPTIONS[option]:
            valid = "; ".join(f"{name}: {', '.join(values)}" for name, values in OPTIONS.items())
            raise UsageError(f"Patches have no option {option}={value!r}. Options: {valid}.")
    return int((options or {}).get("window_area", OPTIONS["window_area"][0])) / 100
