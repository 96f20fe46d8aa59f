"""The attention patterns of a study: how heads are named, how far a map follows the image, and the standing map."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from vitrail.figures import patterns as figures
from vitrail.figures.style import head_name
from vitrail.heads.pattern_tables import HeadPattern, clusters, head_patterns
from vitrail.report.parts import Drawing, Part, Section, Studied, Table, percent, readings

__all__ = ["patterns"]

SAME, OWN = 0.2, 0.8
"""Image dependence below which a head's maps are nearly the same, and above which they have little in common."""


def patterns(study: Studied) -> Section | None:
    """Names, image dependence, clusters and the map, if the study holds patterns."""
    held = study.held("patterns")
    if not held:
        return None
    named = head_patterns(study.data) if "pattern_rule" in held else []
    return Section("patterns", "Attention patterns", tuple(_findings(study, named)), tuple(_parts(study, named, held)))


def _findings(study: Studied, named: list[HeadPattern]) -> Iterator[str]:
    if named:
        counts = Counter(each.named.name for each in named)
        told = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        yield f"By their mean numbers, the {len(named)} heads are named: {told}."
    if "image_dependence" in study.data and study.n_images > 1:
        values = study.data["image_dependence"].to_numpy()
        known = values[~np.isnan(values)]
        if len(known):
            low = np.unravel_index(int(np.nanargmin(values)), values.shape)
            yield (
                f"{int((known < SAME).sum())} of {len(known)} heads have nearly the same map for all images (image "
                f"dependence below {SAME}), {int((known > OWN).sum())} have another for every image (above {OWN}); the "
                f"steadiest is {head_name(int(low[0]), int(low[1]))} at {float(values[low]):.2f}."
            )


def _parts(study: Studied, named: list[HeadPattern], held: list[str]) -> Iterator[Part]:
    data = study.data
    if named:
        yield Drawing(figures.patterns_by_head(data))
    for kind in ("patch", "cls"):
        if f"pattern_{kind}_xy" in held:
            yield Drawing(figures.pattern_map(data, kind))
    if "patch_cluster_map" in data and data.sizes["cluster"]:
        yield Drawing(figures.cluster_maps(data))
        yield Table(
            "Clusters of patch patterns", ("cluster", "maps", "name", "because", "heads with most of their maps here"),
            [
                [str(each.number), f"{each.size:,}", each.named.label, each.named.rule,
                 ", ".join(f"{head_name(layer, head)} {percent(share)}" for layer, head, share in each.heads)]
                for each in clusters(data)
            ],
            folded=True, words=(2, 3, 4),
        )  # fmt: skip
    if named:
        yield Table(
            f"All {len(named)} heads",
            ("head", "pattern", "because", "images with that name", "else", "image dependence"),
            [_row(study, each) for each in named], folded=True, words=(0, 1, 2, 4),
        )  # fmt: skip
    yield readings(study, [str(name) for name in data if data[name].attrs.get("room") == "patterns"])  # clusters too


def _row(study: Studied, each: HeadPattern) -> list[str]:
    steady = "none" if each.image_dependence is None or study.n_images < 2 else f"{each.image_dependence:.2f}"
    other = f"{each.others[0][0]} {percent(each.others[0][1])}" if each.others else ""
    return [head_name(each.layer, each.head), each.named.label, each.named.rule, percent(each.share), other, steady]
