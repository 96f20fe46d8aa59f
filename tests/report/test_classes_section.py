"""The section of heads by class, from made-up studies with known answers."""

from types import SimpleNamespace

import numpy as np
import xarray as xr

from vitrail.data import LabelSource
from vitrail.report.classes import classes
from vitrail.report.parts import ReportData

NAMES = ["cat", "dog", "owl"]


class SimulatedStudy(ReportData):
    """Only what the section reads: the arrays, and whose the labels are."""

    def __init__(self, data, labels):
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "plan", SimpleNamespace(labels=labels))


def study_of(labels, planted=0.0, source=LabelSource.GIVEN):
    """Class 1 loses `planted` of its probability without L1H0; all else is noise."""
    label = np.array(labels)
    drop = np.random.default_rng(0).normal(0, 0.01, (len(label), 2, 3))
    drop[label == 1, 1, 0] += planted
    data = xr.Dataset(
        {
            "label": ("image", label),
            "probability": ("image", np.full(len(label), 0.9)),
            "head_probability": (("image", "layer", "head"), 0.9 - drop),
        },
        attrs={"class_names": NAMES, "labels": source},
    )
    return SimulatedStudy(data, source)


def test_a_class_that_needs_a_head_is_named_and_the_head_starred():
    study = study_of([0] * 12 + [1] * 12, planted=0.3)
    section = classes(study)
    assert section.findings[0].startswith("1 of 2 classes with several images need a head more")
    lost = 0.9 - study.data["head_probability"].to_numpy()[12:, 1, 0].mean()
    assert f"dog, which loses {lost:.3f} of probability without L1H0" in section.findings[0]
    starred = [row[:3] for row in section.parts[0].rows if row[2].endswith("*")]
    assert starred == [["dog", "12", "L1H0 *"]]


def test_a_head_of_a_class_is_named_also_where_others_matter_more_to_every_class():
    study = study_of([0] * 20 + [1] * 20, planted=0.1)
    study.data["head_probability"][:, 0] -= 0.3  # the three heads of the first layer come first in both classes
    section = classes(study)
    assert section.findings[0].startswith("1 of 2 classes with several images need a head more")
    assert "without L1H0" in section.findings[0]
    rows = [row[2] for row in section.parts[0].rows]
    assert rows[-1] == "L1H0 *" or rows[3] == "L1H0 *"
    assert len(rows) == 7


def test_without_a_difference_between_classes_no_head_is_starred():
    section = classes(study_of([0] * 12 + [1] * 12))
    assert section.findings[0].startswith("No head is shown to matter more")
    assert not any(row[2].endswith("*") for row in section.parts[0].rows)


def test_classes_with_one_image_are_counted_and_left_out():
    section = classes(study_of([0] * 12 + [1] * 12 + [2], source=LabelSource.PREDICTED))
    assert {row[0] for row in section.parts[0].rows} == {"cat", "dog"}
    assert "Left out: 1 classes with one image. The images have no labels" in section.parts[0].reading


def test_nothing_is_said_of_one_class_or_of_single_images():
    assert classes(study_of([0] * 12)) is None
    assert classes(study_of([0, 1, 2])) is None
