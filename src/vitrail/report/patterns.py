"""The attention patterns of a study: how heads are named, how far a map follows the image, and the standing map."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from vitrail.figures import patterns as figures
from vitrail.figures.style import head_name
from vitrail.patterns.tables import HeadPattern, all_patterns, pattern_clusters
from vitrail.report.parts import Drawing, Part, ReportData, Section, Table, readings
from vitrail.sentence import Sentence, percent

__all__ = ["patterns"]

SAME, OWN = 0.2, 0.8
"""Image dependence below which a head's maps are nearly the same, and above which they have little in common."""


def patterns(study: ReportData) -> Section | None:
    """Names, image dependence, clusters and the map, if the study holds patterns.

    Args:
        study: The study.

    Returns:
        The section; None where the study holds nothing for it.
    """
    names = study.measures_of("patterns")
    if not names:
        return None
    named = all_patterns(study.data) if "pattern_rule" in names else []
    return Section(
        "patterns", "Attention patterns", tuple(_findings(study, named)), lambda: _parts(study, named, names)
    )


def _findings(study: ReportData, named: list[HeadPattern]) -> Iterator[str]:
    if named:
        counts = Counter(each.naming.name for each in named)
        names = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        yield Sentence(f"By their mean numbers, the {len(named)} heads are named: {names}.", measure="pattern_rule")
    if "image_dependence" in study.data and study.n_images > 1:
        values = study.data["image_dependence"].to_numpy()
        finite = values[~np.isnan(values)]
        if len(finite):
            low = np.unravel_index(int(np.nanargmin(values)), values.shape)
            yield Sentence(
                f"{int((finite < SAME).sum())} of {len(finite)} heads have nearly the same map for all images (image "
                f"dependence below {SAME}), {int((finite > OWN).sum())} have another for every image (above {OWN}); "
                f"the steadiest is {head_name(int(low[0]), int(low[1]))} at {float(values[low]):.2f}.",
                measure="image_dependence",
                layer=int(low[0]),
                head=int(low[1]),
            )


def _parts(study: ReportData, named: list[HeadPattern], names: list[str]) -> Iterator[Part]:
    data = study.data
    if named:
        yield Drawing(figures.patterns_by_head(data))
    for kind in ("patch", "cls"):
        if f"pattern_{kind}_xy" in names:
            yield Drawing(figures.pattern_map(data, kind))
    if "patch_cluster_map" in data and data.sizes["cluster"]:
        yield Drawing(figures.cluster_maps(data))
        yield Table(
            "Clusters of patch patterns",
            ("cluster", "maps", "name", "because", "heads with most of their maps here"),
            [
                [
                    str(each.number),
                    f"{each.size:,}",
                    each.naming.label,
                    each.naming.rule,
                    ", ".join(f"{head_name(layer, head)} {percent(share)}" for layer, head, share in each.heads),
                ]
                for each in pattern_clusters(data)
            ],
            folded=True,
            words=(2, 3, 4),
        )
    if named:
        yield Table(
            f"All {len(named)} heads",
            ("head", "pattern", "because", "images with that name", "else", "image dependence"),
            [_row(study, each) for each in named],
            folded=True,
            words=(0, 1, 2, 4),
        )
    yield readings(study, [str(name) for name in data if data[name].attrs.get("room") == "patterns"])  # clusters too


def _row(study: ReportData, each: HeadPattern) -> list[str]:
    steady = "none" if each.image_dependence is None or study.n_images < 2 else f"{each.image_dependence:.2f}"
    other = f"{each.others[0][0]} {percent(each.others[0][1])}" if each.others else ""
    return [head_name(each.layer, each.head), each.naming.label, each.naming.rule, percent(each.share), other, steady]
