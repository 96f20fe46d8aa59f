"""What the report says of windows and objects: planted windows that follow them, and windows that do not."""

import numpy as np
import pytest

from report.tiny_reports import planted_study
from vitrail.grid import box_means, sides_of_boxes
from vitrail.report.parts import ReportData
from vitrail.report.patches import patches

GRID, N_IMAGES, N_LAYERS = (6, 6), 24, 2


def planted(follow: int | None, *, without: slice = slice(0)) -> ReportData:
    """Objects of 3 x 3 patches anywhere; in the layer `follow` all windows are the object, elsewhere any 3 x 3 box.

    Patches of the images `without` interact with no other and have no window."""
    random = np.random.default_rng(0)
    corner = random.integers(0, 4, (N_IMAGES, 2))
    objects = np.concatenate([corner, corner + 3], axis=1)
    covered = np.zeros((N_IMAGES, *GRID), dtype=np.float32)
    for cells, (top, left, bottom, right) in zip(covered, objects, strict=True):
        cells[top:bottom, left:right] = 1
    covered = covered.reshape(N_IMAGES, -1)
    corners = random.integers(0, 4, (N_IMAGES, N_LAYERS, 36, 2))
    boxes = np.concatenate([corners, corners + 3], axis=-1)
    if follow is not None:
        boxes[:, follow] = objects[:, None]
    sides = np.stack(sides_of_boxes(boxes, GRID), axis=-1).astype(np.float32)
    shares = box_means(covered[:, None], boxes, GRID).astype(np.float32)
    sides[without], shares[without] = np.nan, np.nan
    covered[-1], shares[-1] = np.nan, np.nan  # without a mask
    arrays = {"window": sides, "window_object_share": shares, "object_share": covered}
    return planted_study(arrays, grids=[list(GRID)] * N_LAYERS)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_layer_whose_windows_follow_objects_is_named_with_what_other_windows_give(layer: int) -> None:
    (sentence,) = [each for each in patches(planted(layer)).findings if "follow the image" in each]
    assert f"Of the windows of object patches 100 % lies on objects in L{layer}" in sentence
    assert "23 images with objects" in sentence
    by_others = float(sentence.split("same places it is ")[1].split(" %")[0])
    assert 15 < by_others < 60  # two boxes of 3 x 3 at random on a 6 x 6 grid


def test_images_without_windows_give_others_none() -> None:
    (sentence,) = [each for each in patches(planted(0, without=slice(0, 24, 3))).findings if "follow the image" in each]
    by_others = float(sentence.split("same places it is ")[1].split(" %")[0])
    assert 15 < by_others < 45


def test_windows_that_know_nothing_of_objects_are_not_said_to_follow_them() -> None:
    (sentence,) = [each for each in patches(planted(None)).findings if "follow objects" in each]
    assert sentence.startswith("Windows are not shown to follow objects")
