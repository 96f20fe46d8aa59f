"""The arrays that a change returns, declared as those of a study are."""

from vitrail.measure import Measure
from vitrail.study.plan import N_TOP

__all__ = ["ARRAYS"]

FROM_TAP = "our construction: the model's own pass with the edits of each step"

ARRAYS = (
    Measure(
        name="top_class",
        title=f"the {N_TOP} most probable classes",
        dims=("step", "class"),
        unit="class",
        low="",
        high="",
        source="order of the logits",
        limits="Ties go to the first class.",
        dtype="int32",
    ),
    Measure(
        name="top_probability",
        title=f"probabilities of the {N_TOP} most probable classes",
        dims=("step", "class"),
        unit="1",
        low="",
        high="",
        source="softmax of the logits, or each label's sigmoid where labels are independent",
        limits="Softmax probabilities are seldom calibrated.",
    ),
    Measure(
        name="followed_probability",
        title="probability of each class that is among the most probable before or after",
        dims=("step", "rank"),
        unit="1",
        low="",
        high="",
        source="softmax of the logits, or each label's sigmoid where labels are independent; the coordinate `rank` has "
        "the classes",
        limits="Softmax probabilities are seldom calibrated.",
    ),
    Measure(
        name="prediction",
        title="prediction",
        dims=("step",),
        unit="class",
        low="",
        high="",
        source="argmax of the logits",
        limits="Ties go to the first class.",
        dtype="int32",
    ),
    Measure(
        name="probability",
        title="probability of the class that is predicted without changes",
        dims=("step",),
        unit="1",
        low="the answer hangs on what was changed",
        high="the answer does not need what was changed",
        source=FROM_TAP,
        limits="One image says nothing of others.",
    ),
    Measure(
        name="divergence",
        title="Jensen-Shannon divergence from the answer without changes",
        dims=("step",),
        unit="bits",
        low="0: no probability changes",
        high="1: the answers share nothing",
        source=FROM_TAP,
        limits="One image says nothing of others.",
    ),
    Measure(
        name="value",
        title="value",
        dims=("step",),
        unit="unit of the output",
        low="",
        high="",
        source=FROM_TAP,
        limits="In the unit that the model was trained on, which Vitrail does not know.",
    ),
    Measure(
        name="value_change",
        title="size of the change of the value",
        dims=("step",),
        unit="unit of the output",
        low="0: the value stays",
        high="what was changed decides much of the value",
        source=FROM_TAP,
        limits="Without a sign.",
    ),
    Measure(
        name="output_shift",
        title="shift of the output",
        dims=("step",),
        unit="1 - cosine",
        low="0: the feature vector keeps its direction",
        high="what was changed decides much of the feature vector",
        source=FROM_TAP,
        limits="One image says nothing of others.",
    ),
    Measure(
        name="token_drift",
        title="drift of tokens",
        dims=("step", "layer", "token"),
        unit="1 - cosine",
        low="0: the token does not notice",
        high="the token turns elsewhere",
        source="our construction: what each layer returns, against the same token without changes; a shuffled patch "
        "against the one with the same content. NaN for tokens that a layer lacks or that were taken out, and where "
        "it is not known which token is which, as after layers that merge tokens",
        limits="Length is not looked at; layer norms remove most of it.",
    ),
    Measure(
        name="attention_before",
        title="attention without changes",
        dims=("head", "query", "key"),
        unit="attention weight",
        low="the token does not look here",
        high="the token looks here",
        source="the chosen layer, after softmax",
        limits="Where a head looks is not what it passes on.",
    ),
    Measure(
        name="attention_after",
        title="attention after the last change",
        dims=("head", "query", "key"),
        unit="attention weight",
        low="the token does not look here",
        high="the token looks here",
        source="the chosen layer, after softmax and what was masked; NaN for tokens that were taken out",
        limits="A head that is off still has its map: what it gives is set to zero, not where it looks.",
    ),
)
"""What `what_if` may return; a model has those that its task gives."""
