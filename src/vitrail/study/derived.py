"""Arrays of a study that need all of its images."""

from vitrail.study.batches import StudyRun
from vitrail.study.image_map import image_xy
from vitrail.study.store import open_study

__all__ = ["derive_image_map"]


def derive_image_map(run: StudyRun) -> None:
    """Computes and stores the map of the images, unless that is done or the study holds no head probabilities.

    Args:
        run: the study, all of whose parts are complete.
    """
    plan = run.folder.plan
    method = plan.options.get("image_map", "tsne")
    if run.folder.derived_is_missing and "head_probability" in plan.measures and method != "none":
        table = open_study(run.folder.folder, partial=True)["head_probability"]
        run.folder.write_derived({"image_xy": image_xy(table, plan.seed, method)})
