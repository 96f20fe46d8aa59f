"""The ends of a report: what was studied and how, what is missing, how to cite the methods."""

from collections.abc import Iterator, Sequence
from pathlib import PurePath

import numpy as np

from vitrail.heads.summary import bootstrap_interval
from vitrail.measure import ROOMS
from vitrail.report.parts import Part, Section, Studied, Table, Text, percent

__all__ = ["citations", "main_findings", "studied"]

SKIPPED_SHOWN = 20
PER_SECTION = 4
"""Findings of each section that also stand at the head."""

HOME = {"regions": "heads", "patterns": "heads", "windows": "patches"}
"""The room whose paper is behind another's."""

OF_ANY_VIT = tuple(room for room in ROOMS if room != "windows")
"""Windows of its own only a WinT has."""

PAPERS = {
    "heads": (
        "Yiran Li, Junpeng Wang, Xin Dai, Liang Wang, Chin-Chia Michael Yeh, Yan Zheng, Wei Zhang, Kwan-Liu Ma: How "
        "Does Attention Work in Vision Transformers? A Visual Analytics Attempt. IEEE Transactions on Visualization "
        "and Computer Graphics, 2023. arXiv 2303.13731"
    ),
    "patches": (
        "Jie Ma, Yalong Bai, Bineng Zhong, Wei Zhang, Ting Yao, Tao Mei: Visualizing and Understanding Patch "
        "Interactions in Vision Transformer. IEEE Transactions on Neural Networks and Learning Systems, 2023. "
        "arXiv 2203.05922"
    ),
    "neurons": (
        "Van-Anh Nguyen, Khanh Pham Dinh, Long Tung Vuong, Thanh-Toan Do, Quan Hung Tran, Dinh Phung, Trung Le: Vision "
        "Transformer Visualization: What Neurons Tell and How Neurons Behave? 2022. arXiv 2210.07646"
    ),
}


def main_findings(study: Studied, sections: Sequence[Section]) -> Section:
    """The first sentences of every section."""
    found = [_accuracy(study), *(sentence for each in sections for sentence in each.findings[:PER_SECTION])]
    return Section("findings", "Main findings", [sentence for sentence in found if sentence])


def _accuracy(study: Studied) -> str:
    if study.plan.n_classes is None:
        return "Accuracy is not known: the model has no classifier."
    if not study.has_labels:
        return f"Accuracy is not known; the label of an image is {study.plan.labels_from}."
    right = (study.data["label"].to_numpy() == study.data["prediction"].to_numpy()).astype(np.float64)
    if len(right) < 2:
        return f"The model is {'right' if right[0] else 'wrong'} about this image."
    low, high = (float(each[0]) for each in bootstrap_interval(right[:, None]))
    interval = f"95 % interval {percent(low, 1)} to {percent(high, 1)}"
    return f"The model is right about {percent(float(right.mean()), 1)} of the {len(right):,} images ({interval})."


def studied(study: Studied) -> Section:
    """The plan, the images, what was left out and skipped."""
    return Section("studied", "What was studied, and how", (), tuple(_facts(study)))


def _facts(study: Studied) -> Iterator[Part]:
    plan, manifest = study.plan, study.manifest
    sizes = sorted({tuple(grid) if grid else None for grid in plan.grids}, key=str)
    grids = ", ".join(f"{grid[0]} x {grid[1]} patches" if grid else "no grid" for grid in sizes)
    heads = f"{plan.n_heads[0]}" if len(set(plan.n_heads)) == 1 else f"{min(plan.n_heads)} to {max(plan.n_heads)}"
    view = plan.preprocessing
    source = PurePath(manifest.source).name if manifest.source else "handed over in memory"
    yield Table("", ("", ""), [
        ["model", plan.model],
        ["weights", f"sha256 {plan.weight_digest[:16]}"],
        ["shape", f"{plan.n_layers} layers of {heads} heads, {grids}, {'a' if plan.class_token else 'no'} class token"],
        ["input", f"{view['size'][0]} x {view['size'][1]} pixels, {view['interpolation']}, "
                  f"mean {_numbers(view['mean'])}, deviation {_numbers(view['std'])}"],
        ["images", f"{plan.n_images:,} ({source}), digest {plan.data_digest[:16]}"],
        ["labels", plan.labels_from],
        ["masks", "instance ids for grouping and salience" if manifest.masks_from else "none"],
        ["precision", f"{plan.precision} on {plan.device}, {plan.threads} thread{'s' if plan.threads != 1 else ''}"],
        ["batch size, seed", f"{plan.batch_size}, {plan.seed}"],
        ["options", ", ".join(f"{name}: {value}" for name, value in plan.options.items()) or "the defaults"],
        ["versions", ", ".join(f"{name} {version}" for name, version in plan.versions.items())],
    ], words=(0, 1))  # fmt: skip
    if plan.left_out:
        reasons = dict.fromkeys(plan.left_out.values())
        rows = [[", ".join(name for name in plan.left_out if plan.left_out[name] == why), why] for why in reasons]
        yield Table("Measures left out", ("measures", "reason"), rows, words=(0, 1))
    if manifest.skipped:
        shown = manifest.skipped[:SKIPPED_SHOWN]
        more = len(manifest.skipped) - len(shown)
        yield Table(
            f"Files that were skipped ({len(manifest.skipped):,})", ("file", "reason"),
            [[each.id, each.reason] for each in shown],
            f"And {more:,} more, all in the study's images.json." if more else "", words=(0, 1),
        )  # fmt: skip
    missing = [room for room in OF_ANY_VIT if not study.held(room)]
    if missing:
        yield Text(
            f"This study holds nothing of {' and '.join(missing)}. To have everything, study the same images again:"
        )
        yield Text(_command(study), code=True)
    elif any(name.startswith("grouping_") for name in plan.left_out):
        yield Text("Grouping needs the objects of each image, as PNGs of instance ids named like the images:")
        yield Text(f"{_command(study)} --masks FOLDER", code=True)


def _command(study: Studied) -> str:
    precision = "" if study.plan.precision == "float32" else f" --precision {study.plan.precision}"
    return f"vitrail study {study.plan.model} IMAGES --measures {','.join(OF_ANY_VIT)}{precision} --out NEW_FOLDER"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def citations(study: Studied) -> Section:
    """The papers that the methods come from, and how to remake the report."""
    held = {HOME.get(room, room) for room in ROOMS if study.held(room)}
    rows = [[room, paper] for room, paper in PAPERS.items() if room in held or not held]
    return Section("cite", "How to cite the methods", (), (
        Text("Measures follow these papers; what is our own construction is called so beside each measure. Please "
             "cite the papers of the measures you use, and Vitrail "
             f"{study.plan.versions.get('vitrail', '')} as the software."),
        Table("", ("", ""), rows, words=(0, 1)),
        Text("Every number here is read from the study, which any tool that reads Zarr can open. The report is made "
             "again by:"),
        Text("vitrail report STUDY --out report.html", code=True),
    ))  # fmt: skip
