"""How much a head matters, exactly: prune each head of each layer in turn and look at what changes.

Heads of a layer ride stacked on the batch and only the blocks from that layer on are run again, so a sweep over all
heads costs about half of running the model once per head.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.heads.metrics import Shift, flips, jensen_shannon, label_log_probability, one_minus_cosine, shift
from vitrail.vit.anatomy import Anatomy
from vitrail.vit.edits import Edit
from vitrail.vit.tap import Readers, Replay, Tap

__all__ = [
    "LAYER_METRICS",
    "MODEL_METRICS",
    "HeadArrays",
    "layer_metrics",
    "model_metrics",
    "silent_layers",
    "sweep",
]

MODEL_METRICS = ("head_probability", "head_divergence", "head_loss_change", "head_flip", "head_prediction")
LAYER_METRICS = ("head_cls_shift", "head_token_shift", "head_cls_shift_l2", "head_token_shift_l2")

STACK_BYTES = {"cpu": 48 * 2**20, "other": 1024 * 2**20}
"""Bound on the activations of one stacked run: as many heads ride together as fit, at least one.

A processor is slower on batches that leave its caches: on ViT-Tiny, 24 rows ride best and 48 lose a fifth.
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
    silent: Collection[int] = (),
    fills: Mapping[int, Float[Tensor, "window head query width"]] | None = None,
) -> dict[str, np.ndarray]:
    """Leave-one-head-out over all layers: the measures `names` as arrays [image, layer, head].

    `replay` and `logits` come from the plain pass. `labels` is None for a model without classifier, whose
    `head_divergence` is then 1 - cosine of its output. `residuals` holds the plain tokens after attention and residual
    of each layer where the plain pass showed them; where it did not, an unpruned copy runs along. With layer metrics
    alone, runs stop at the residual. Layers in `silent` (`silent_layers`) never show it: their layer metrics are NaN.
    `fills` are what heads give by layer when they are pruned (`means.MeanOutputs`); zero without.
    """
    results = HeadArrays(names, len(logits), [block.heads for block in anatomy.blocks])
    wants_model = any(name in MODEL_METRICS for name in names)
    wants_layer = any(name in LAYER_METRICS for name in names)
    for layer in range(len(anatomy.blocks)):
        plain, wants_tokens = residuals.get(layer), wants_layer and layer not in silent
        if not wants_model and not wants_tokens:
            continue
        spare = int(wants_tokens and plain is None)
        for heads in _stacks(anatomy, layer, replay.images, spare):
            edits = [
                Edit(layer, copy=spare + index, prune=(head,), fill=None if fills is None else fills[layer][:, [head]])
                for index, head in enumerate(heads)
            ]
            copies, moved = spare + len(heads), dict[str, Tensor]()
            reader = _residual_reader(layer, copies, plain, anatomy.class_index(layer), moved) if wants_tokens else None
            rows = tap.run_from(layer, replay, edits, copies, reader, until_residual=not wants_model)
            results.put(layer, heads, moved)
            if wants_model:
                answers = rows.reshape(copies, *logits.shape)[spare:]
                results.put(layer, heads, model_metrics(logits, answers, labels))
    return results.arrays


def silent_layers(tap: Tap, replay: Replay, layers: Iterable[int]) -> frozenset[int]:
    """Those of `layers` whose code shows no sum of attention and residual, even where no native kernel hides it."""

    def is_silent(layer: int) -> bool:
        told: list[int] = []
        tap.run_from(layer, replay, [Edit(layer, prune=(0,))], readers=Readers(residual=lambda at, _: told.append(at)))
        return layer not in told

    return frozenset(layer for layer in layers if is_silent(layer))


def _residual_reader(
    layer: int, copies: int, plain: Tensor | None, class_index: int | None, found: dict[str, Tensor]
) -> Readers:
    """Measures how far one layer's tokens moved while they are at hand, so that no copy of them is kept.

    Without `plain` the first copy has nothing pruned and is what the others are compared with.
    """

    def read(at: int, tokens: Float[Tensor, "row token channel"]) -> None:
        if at == layer:
            by_copy = tokens.reshape(copies, -1, *tokens.shape[1:])
            before, after = (by_copy[0], by_copy[1:]) if plain is None else (plain, by_copy)
            found.update(layer_metrics(before, after, class_index))

    return Readers(residual=read)


def _stacks(anatomy: Anatomy, layer: int, images: Tensor, spare: int) -> Iterator[tuple[int, ...]]:
    """The heads of a layer in groups that ride together."""
    block = anatomy.blocks[layer]
    width = block.heads * block.calls[0].head_dim
    per_copy = len(images) * block.tokens * width * FLOATS_PER_CHANNEL * images.element_size()
    bound = STACK_BYTES["cpu" if images.device.type == "cpu" else "other"]
    together = max(1, bound // per_copy - spare)
    for start in range(0, block.heads, together):
        yield tuple(range(start, min(start + together, block.heads)))


def model_metrics(
    before: Float[Tensor, "image class"],
    after: Float[Tensor, "copy image class"],
    labels: Int[Tensor, "image"] | None,
) -> dict[str, Tensor]:
    """What pruning does to the answer; [copy image] by measure name. Without labels the output is a feature vector."""
    if labels is None:
        return {"head_divergence": one_minus_cosine(before, after)}
    plain = label_log_probability(before, labels)
    pruned = label_log_probability(after, labels.expand(after.shape[:-1]))
    return {
        "head_probability": pruned.exp(),
        "head_divergence": jensen_shannon(before, after),
        "head_loss_change": plain - pruned,
        "head_flip": flips(before, after),
        "head_prediction": after.argmax(-1),
    }


def layer_metrics(
    before: Float[Tensor, "image token channel"],
    after: Float[Tensor, "copy image token channel"],
    class_index: int | None,
) -> dict[str, Tensor]:
    """What pruning does to the layer's tokens; [copy image] by measure name. No class token, no shift of it."""
    moved: Shift = shift(before, after)
    found = {
        "head_token_shift": moved.one_minus_cosine.mean(-1),
        "head_token_shift_l2": moved.relative_l2.mean(-1),
    }
    if class_index is not None:
        found["head_cls_shift"] = moved.one_minus_cosine[..., class_index]
        found["head_cls_shift_l2"] = moved.relative_l2[..., class_index]
    return found


class HeadArrays:
    """Arrays [image, layer, head] by measure name, padded where a layer has fewer heads than the widest."""

    def __init__(self, names: Sequence[str], n_images: int, heads: Sequence[int]) -> None:
        shape = (n_images, len(heads), max(heads))
        self.arrays = {name: np.full(shape, _padding(name), dtype=_dtype(name)) for name in names}

    def put(self, layer: int, heads: Sequence[int], values: Mapping[str, Tensor]) -> None:
        """Stores [copy image] values measured with each of `heads` pruned, copies in their order."""
        for name, array in self.arrays.items():
            if name in values:
                array[:, layer, list(heads)] = values[name].cpu().numpy().T.astype(array.dtype)


def _dtype(name: str) -> str:
    return {"head_flip": "bool", "head_prediction": "int32"}.get(name, "float32")


def _padding(name: str) -> float | int | bool:
    return {"head_flip": False, "head_prediction": -1}.get(name, np.nan)
