"""Label, prediction and probability of every image, and what the store keeps beside them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vitrail.analysis import BASE, Analysis, Need, Option
from vitrail.measure import Measure
from vitrail.study.plan import N_TOP, THUMBNAIL_PX

if TYPE_CHECKING:
    from vitrail.models.open import Vit

__all__ = ["BASE_ANALYSIS", "MASKS"]


MEASURES = (
    Measure(
        name="label",
        title="label",
        dims=("image",),
        unit="class",
        low="",
        high="",
        source="the data set's label, else the model's own top-1 prediction",
        limits="With the model's own prediction as label, accuracy means nothing.",
        dtype="int32",
        is_quantity=False,
        depends_on=("label",),
    ),
    Measure(
        name="prediction",
        title="prediction",
        dims=("image",),
        unit="class",
        low="",
        high="",
        source="argmax of the logits, nothing pruned",
        limits="Ties go to the first class.",
        needs=("classifier",),
        dtype="int32",
        is_quantity=False,
        depends_on=(),
    ),
    Measure(
        name="probability",
        title="probability of the label",
        dims=("image",),
        unit="1",
        value_range=(0.0, 1.0),
        low="the model does not see the label",
        high="the model is sure of the label",
        source="softmax of the logits, or the label's sigmoid where labels are independent; nothing pruned",
        limits="Softmax probabilities are seldom calibrated.",
        needs=("classifier",),
        depends_on=("label",),
    ),
    Measure(
        name="value",
        title="value",
        dims=("image",),
        unit="unit of the output",
        low="",
        high="",
        source="the only output of a regression, or the user's target read off the output; nothing pruned",
        limits="In the unit that the model was trained on, which Vitrail does not know.",
        needs=("value",),
        depends_on=(),
    ),
)

ACCOMPANYING = (
    Measure(
        name="thumbnail",
        title="thumbnail",
        dims=("image", "row", "column", "channel"),
        unit="8-bit RGB",
        low="",
        high="",
        source=(f"what the model sees, resized to at most {THUMBNAIL_PX} px"),
        limits="For looking at only.",
        dtype="uint8",
        is_quantity=False,
        depends_on=(),
    ),
    Measure(
        name="top_class",
        title=(f"the {N_TOP} most probable classes"),
        dims=("image", "class"),
        unit="class",
        low="",
        high="",
        source="order of the logits, nothing pruned",
        limits="Ties go to the first class.",
        needs=("classifier",),
        dtype="int32",
        is_quantity=False,
        depends_on=(),
    ),
    Measure(
        name="top_probability",
        title=(f"probabilities of the {N_TOP} most probable classes"),
        dims=("image", "class"),
        unit="1",
        value_range=(0.0, 1.0),
        low="",
        high="",
        source="softmax of the logits, or each label's sigmoid where labels are independent; nothing pruned",
        limits="Softmax probabilities are seldom calibrated; those of independent labels do not sum to 1.",
        needs=("classifier",),
        depends_on=(),
    ),
    Measure(
        name="object_share",
        title="share of a patch that objects cover",
        dims=("image", "patch"),
        unit="1",
        value_range=(0.0, 1.0),
        low="0: background",
        high="1: the patch lies wholly under objects",
        source="the masks, resized and cropped as the image, on the grid of the first layer; nothing of the model",
        limits="Which object it is. NaN for an image without a mask.",
        needs=("token_grid", "masks"),
        depends_on=("masks",),
    ),
    Measure(
        name="image_xy",
        title="map of the images",
        dims=("image", "xy"),
        unit="layout units",
        low="",
        high="",
        source="t-SNE of each image's head_probability over all heads (below 5 images: principal components); above "
        "5,000 images of so many drawn at random, each other at the mean of the 5 that are most like it; with "
        "`--image-map pca` principal components",
        limits="Near means alike; distances between far groups and sizes of groups mean nothing.",
        needs=("classifier",),
        is_quantity=False,
        depends_on=("image_map",),
    ),
)


IMAGE_MEASURES = (
    Measure(
        name="view",
        title="what the model sees of the photograph",
        dims=("row", "column", "channel"),
        unit="8-bit RGB",
        low="",
        high="",
        source="resized and cropped as the model was trained, before normalisation",
        limits="For looking at only.",
        dtype="uint8",
        is_quantity=False,
        depends_on=(),
    ),
)


def _look(one: Any) -> Mapping[str, Any]:
    import numpy as np

    return {"view": np.asarray(one.view.convert("RGB"))}


def _no_classifier(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    return "" if vit.n_classes is not None else vit.task.without("a classifier")


def _no_value(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    return "" if vit.task.has_value else vit.task.without("one value per image (a regression, or target=)")


def _no_values(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    has_values = vit.task.has_value or vit.task.kind == "regression"
    return "" if has_values else vit.task.without("a value (a regression, or target=)")


def _no_embedding(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    return "" if vit.task.kind == "embedding" else vit.task.without("a feature vector as output")


def _no_class_token(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    if vit.anatomy.class_token:
        return ""
    if all(block.grid is None for block in vit.anatomy.blocks):
        return "no class token can be told from patches, which lie on no grid that could be found"
    return "the model has no class token"


def _no_grid(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    from vitrail.models.token_grid import token_grids

    on_grid, refused = token_grids(vit)
    return "" if on_grid else f"no layer has a map between patches of one grid: {next(iter(refused.values()))}"


def _no_shares(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    from vitrail.models.token_grid import share_grids, token_grids

    if share_grids(vit)[0]:
        return ""
    return next(share_grids(vit)[1][layer] for layer in token_grids(vit)[0])


def _no_token_grid(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    return "" if vit.anatomy.blocks[0].grid else "the model's patches lie on no grid that could be found"


def _no_masks(vit: "Vit", options: Mapping[str, str], measure: Measure) -> str:
    given = options["masks"] == "given"
    return "" if given else "it needs objects: give a folder of instance ids (masks=FOLDER, --masks FOLDER)"


IMAGE_MAP = Option("image_map", ("tsne", "pca", "none"), "The map of the images by their head probabilities.")

MASKS = Option("masks", ("none", "given"), "Whether a folder of instance ids was given.", hidden=True)


def _derive(run: Any) -> None:
    from vitrail.study.derived import derive_image_map

    derive_image_map(run)


BASE_ANALYSIS = Analysis(
    name=BASE,
    title="Predictions",
    question="What does the model say of each image?",
    measures=MEASURES,
    accompanying=ACCOMPANYING,
    image_measures=IMAGE_MEASURES,
    look=_look,
    derive=_derive,
    options=(MASKS, IMAGE_MAP),
    needs=(
        Need("classifier", "a classifier", _no_classifier),
        Need(
            "value", "one value per image: a regression's only output, or a `target`", _no_value, of_other_models=True
        ),
        Need("values", "values: a regression, or a `target`", _no_values, of_other_models=True),
        Need("embedding", "a feature vector as output", _no_embedding, of_other_models=True),
        Need("class_token", "a class token", _no_class_token),
        Need("grid", "attention between patches of one grid", _no_grid),
        Need("shares", "attention weights that are shares: heads not mixed after the softmax", _no_shares),
        Need("token_grid", "patches on a grid", _no_token_grid),
        Need("masks", "masks of the objects (`--masks`)", _no_masks),
    ),
)
