"""How much a head matters, exactly: prune each head of each layer in turn and measure what changes.

Copies of the images with one head pruned each run as one batch, and only the blocks from that layer on are run again,
so a sweep over all heads costs about half of running the model once per head.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.heads.metrics import Shift, flips, jensen_shannon, one_minus_cosine, shift
from vitrail.models.noise import noise_images
from vitrail.models.open import Vit
from vitrail.models.task import Task
from vitrail.tap.anatomy import Anatomy
from vitrail.tap.budget import budget_of
from vitrail.tap.edits import Edit
from vitrail.tap.tap import Readers, Replay, Tap

__all__ = [
    "LAYER_METRICS",
    "HeadArrays",
    "layers_without_residual",
    "model_metrics",
    "sweep",
    "visible_residuals",
]

MODEL_METRICS = (
    "head_probability",
    "head_divergence",
    "head_loss_change",
    "head_flip",
    "head_prediction",
    "head_output_shift",
    "head_value",
    "head_value_change",
)
LAYER_METRICS = ("head_cls_shift", "head_token_shift", "head_cls_shift_l2", "head_token_shift_l2")

BATCH_BYTES = 48 * 2**20
"""Bound on the activations of one batch on a processor: as many heads run together as fit, at least one.

A processor is slower on batches that leave its caches: on ViT-Tiny, 24 rows are fastest and 48 lose a fifth.
"""

FLOATS_PER_CHANNEL = 12
"""Alive in a block per token and channel, roughly: the MLP at four times the width twice, qkv, the residual stream."""


def sweep(
    tap: Tap,
    anatomy: Anatomy,
    replay: Replay,
    logits: Float[Tensor, "image class"],
    labels: Int[Tensor, "image"] | None,
    names: Sequence[str],
    residuals: Mapping[int, Float[Tensor, "image token channel"]],
    without_residual: Collection[int] = (),
    fills: Mapping[tuple[int, int], Float[Tensor, "window head query width"]] | None = None,
    *,
    task: Task,
) -> dict[str, np.ndarray]:
    """Leave-one-head-out over all layers.

    With layer metrics alone, runs stop at the residual. Where the plain pass did not show a layer's tokens, an unpruned
    reference copy runs in the same batch.

    Args:
        tap: Of the model.
        anatomy: Of the model.
        replay: Of the plain pass.
        logits: Of the plain pass.
        labels: Class of each image; None for a model without classifier.
        names: Of `MODEL_METRICS` and `LAYER_METRICS`.
        residuals: By layer, the plain tokens after attention and residual, where the plain pass showed them.
        without_residual: Layers that never show them (`layers_without_residual`): their layer metrics are NaN.
        fills: By layer and attention call, what replaces a pruned head's output (`means.MeanOutputs`); None: zero.
        task: What the output means.

    Returns:
        Arrays [image, layer, head] by measure name; NaN (False, -1) for heads that a layer does not have.
    """
    results = HeadArrays(names, len(logits), [block.heads for block in anatomy.blocks])
    wants_model = any(name in MODEL_METRICS for name in names)
    wants_layer = any(name in LAYER_METRICS for name in names)
    for layer in range(len(anatomy.blocks)):
        plain, wants_tokens = residuals.get(layer), wants_layer and layer not in without_residual
        if not wants_model and not wants_tokens:
            continue
        n_references = int(wants_tokens and plain is None)
        for heads in _head_batches(anatomy, layer, replay.images, n_references):
            edits = [
                edit
                for index, head in enumerate(heads)
                for edit in _edits_without_head(anatomy, layer, head, n_references + index, fills)
            ]
            copies, shifts = n_references + len(heads), dict[str, Tensor]()
            reader = (
                _residual_reader(layer, copies, plain, anatomy.class_index(layer), shifts) if wants_tokens else None
            )
            rows = tap.run_from(layer, replay, edits, copies, reader, until_residual=not wants_model)
            results.put(layer, heads, shifts)
            if wants_model:
                outputs = rows.reshape(copies, *logits.shape)[n_references:]
                results.put(layer, heads, model_metrics(logits, outputs, labels, task))
    return results.arrays


def _edits_without_head(
    anatomy: Anatomy, layer: int, head: int, copy: int, fills: Mapping[tuple[int, int], Tensor] | None
) -> list[Edit]:
    """Edits that prune a head on one copy, in every call that runs it."""
    if fills is None:
        return [Edit(layer, copy=copy, prune=(head,))]
    edits = []
    for call in anatomy.blocks[layer].calls_of(head):
        at = head - anatomy.blocks[layer].calls[call].first_head
        edits.append(Edit(layer, call, copy, prune=(at,), fill=fills[layer, call][:, [at]]))
    return edits


def layers_without_residual(tap: Tap, replay: Replay, layers: Iterable[int]) -> frozenset[int]:
    """Layers that are not seen to add attention to the tokens they were given, even where no native kernel hides it.

    Args:
        tap: Of the model.
        replay: Of a recorded pass.
        layers: Those to try, with a short pass each.

    Returns:
        Those of `layers` that show none.
    """

    def hides_residual(layer: int) -> bool:
        layers_read: list[int] = []
        tap.run_from(
            layer, replay, [Edit(layer, prune=(0,))], readers=Readers(residual=lambda at, _: layers_read.append(at))
        )
        return layer not in layers_read

    with_heads = [layer for layer in layers if tap.anatomy.blocks[layer].calls]  # the others have nothing to prune
    return frozenset(layer for layer in with_heads if hides_residual(layer))


_VISIBLE: WeakKeyDictionary[Vit, frozenset[int]] = WeakKeyDictionary()
"""Layers by model: asked for by each measure, and found by passes."""


def visible_residuals(vit: Vit) -> frozenset[int]:
    """Layers that are seen to add attention to the tokens they were given, tried on one image of noise; once a model.

    Args:
        vit: The opened model.

    Returns:
        Indices of layers.
    """
    if vit not in _VISIBLE:
        visible: set[int] = set()
        replay, _ = vit.tap().record(noise_images(vit), Readers(residual=lambda layer, _: visible.add(layer)))
        with_heads = {layer for layer, block in enumerate(vit.anatomy.blocks) if block.calls}
        hidden = layers_without_residual(vit.tap(), replay, sorted(with_heads - visible))
        _VISIBLE[vit] = frozenset(visible | (with_heads - hidden))
    return _VISIBLE[vit]


def _residual_reader(
    layer: int, copies: int, plain: Tensor | None, class_index: int | None, shifts: dict[str, Tensor]
) -> Readers:
    """Measures how far one layer's tokens moved while they are at hand, so that no copy of them is kept.

    Without `plain` the first copy has nothing pruned and is what the others are compared with.
    """

    def read(at: int, tokens: Float[Tensor, "row token channel"]) -> None:
        if at == layer:
            by_copy = tokens.reshape(copies, -1, *tokens.shape[1:])
            before, after = (by_copy[0], by_copy[1:]) if plain is None else (plain, by_copy)
            shifts.update(_layer_metrics(before, after, class_index))

    return Readers(residual=read)


def _head_batches(anatomy: Anatomy, layer: int, images: Tensor, n_references: int) -> Iterator[tuple[int, ...]]:
    """The heads of a layer in groups that run in one batch."""
    block = anatomy.blocks[layer]
    if not block.calls:
        return  # its attention is hidden: there is nothing to prune
    width = block.heads * block.head_dim
    per_copy = len(images) * block.tokens * width * FLOATS_PER_CHANNEL * images.element_size()
    together = max(1, budget_of(images.device).bytes_for(BATCH_BYTES) // per_copy - n_references)
    for start in range(0, block.heads, together):
        yield tuple(range(start, min(start + together, block.heads)))


def model_metrics(
    before: Float[Tensor, "image class"],
    after: Float[Tensor, "copy image class"],
    labels: Int[Tensor, "image"] | None,
    task: Task,
) -> dict[str, Tensor]:
    """What pruning does to the output, by the measures that the task has.

    Args:
        before: Output of the plain pass.
        after: Output with a head pruned, copy by copy.
        labels: Class of each image; None for a model without classifier.
        task: What the output means.

    Returns:
        [copy image] by measure name, in the unit of the measure.
    """
    result = _value_metrics(task, before, after)
    if task.kind == "embedding":
        result["head_output_shift"] = one_minus_cosine(before, after)
    if labels is None:
        return result
    plain = task.label_log_probability(before, labels)
    pruned = task.label_log_probability(after, labels.expand(after.shape[:-1]))
    return result | {
        "head_probability": pruned.exp(),
        "head_divergence": jensen_shannon(task.outcome_logits(before), task.outcome_logits(after)).mean(-1),
        "head_loss_change": plain - pruned,
        "head_flip": flips(before, after),
        "head_prediction": after.argmax(-1),
    }


def _value_metrics(
    task: Task, before: Float[Tensor, "image value"], after: Float[Tensor, "copy image value"]
) -> dict[str, Tensor]:
    """Value and size of its change; of several values of a regression, the Euclidean length of the change."""
    if task.has_value:
        value = task.value(after)
        return {"head_value": value, "head_value_change": (value - task.value(before)).abs()}
    if task.kind == "regression":
        return {"head_value_change": (after.float() - before.float()).norm(dim=-1)}
    return {}


def _layer_metrics(
    before: Float[Tensor, "image token channel"],
    after: Float[Tensor, "copy image token channel"],
    class_index: int | None,
) -> dict[str, Tensor]:
    """What pruning does to the layer's tokens; [copy image] by measure name. No class token, no shift of it."""
    moved: Shift = shift(before, after)
    metrics = {
        "head_token_shift": moved.one_minus_cosine.mean(-1),
        "head_token_shift_l2": moved.relative_l2.mean(-1),
    }
    if class_index is not None:
        metrics["head_cls_shift"] = moved.one_minus_cosine[..., class_index]
        metrics["head_cls_shift_l2"] = moved.relative_l2[..., class_index]
    return metrics


class HeadArrays:
    """Arrays [image, layer, head] by measure name, padded where a layer has fewer heads than the widest.

    Args:
        names: Of the measures.
        n_images: Number of images.
        heads: Heads of each layer.

    Attributes:
        arrays: The arrays, by name.
    """

    def __init__(self, names: Sequence[str], n_images: int, heads: Sequence[int]) -> None:
        shape = (n_images, len(heads), max(heads))
        self.arrays = {name: np.full(shape, _padding(name), dtype=_dtype(name)) for name in names}

    def put(self, layer: int, heads: Sequence[int], values: Mapping[str, Tensor]) -> None:
        """Stores values measured with each of some heads of a layer pruned.

        Args:
            layer: Index of the layer.
            heads: The heads, in the order of the copies.
            values: [copy image] by measure name; names without an array are passed over.
        """
        for name, array in self.arrays.items():
            if name in values:
                array[:, layer, list(heads)] = values[name].cpu().numpy().T.astype(array.dtype)


def _dtype(name: str) -> str:
    return {"head_flip": "bool", "head_prediction": "int32"}.get(name, "float32")


def _padding(name: str) -> float | int | bool:
    return {"head_flip": False, "head_prediction": -1}.get(name, np.nan)
