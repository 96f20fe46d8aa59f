"""What tokens of outlying length do to a model: their writers switched off, or listened to by registers, with a null.

Neurons and heads that write such tokens are looked for on some images and tried on others: the neurons off for every
token, the heads pruned (the plain ablation), and registers that take over what the neurons write. Each is compared with
as many other neurons or heads, drawn at random.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from vitrail.arguments import at_least_one
from vitrail.contract.outlook import require_finite
from vitrail.errors import Unsupported, UsageError
from vitrail.models.objects import patch_objects
from vitrail.models.open import Vit, require_vit
from vitrail.stats import require_seed
from vitrail.tap.attention import LayerAttention, Readers
from vitrail.tap.edits import Edit, prune_edits
from vitrail.tokens.artefacts import (
    ArtefactHead,
    ArtefactNeuron,
    artefact_neurons,
    layer_of_most_outliers,
    mlp_widths,
    outlying_patches,
    strongest_heads,
    with_registers,
    without_neurons,
    written_by_heads,
    written_by_layers,
)
from vitrail.tokens.grouping import label_free_silhouette, object_silhouette, score_grouping
from vitrail.tokens.outliers import REGISTER_MODELS, norm_outliers

__all__ = ["try_registers"]

SCORES = ("silhouette",)
"""How tokens group where no objects are known: `vitrail.tokens.grouping.label_free_silhouette`."""

OBJECT_SCORES = ("object_silhouette", "silhouette", "purity", "in_object")
"""The same of the tokens of objects: `vitrail.tokens.grouping.object_silhouette`, and three of its `Grouping`."""

BATCH = 8
N_EXAMPLES = 3
"""Images whose maps are kept for the figure."""

N_FINDING = 16
"""Images that neurons and heads are looked for on, at most: the same few write the outlying tokens of all."""

N_DRAWS = 3
"""Draws of other neurons and other heads that are switched off; the null is their mean."""

Ids = Int[np.ndarray, "_ _"]


def try_registers(
    vit: Vit,
    views: Sequence[Image.Image],
    n_neurons: int = 8,
    n_registers: int = 1,
    seed: int = 0,
    *,
    n_heads: int = 3,
    masks: Sequence[Ids | None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> xr.Dataset:
    """Names the neurons and heads that write tokens of outlying length, switches them off, and tries registers.

    Args:
        vit: The model.
        views: Photographs as the model sees them (`Vit.view`), at least 2. The second half is what the changed models
            are tried on; of the first half at most `N_FINDING`, the first ones, are what neurons and heads are looked
            for on.
        n_neurons: How many neurons are switched off, and listened to by the registers.
        n_registers: How many registers there are.
        seed: Of the neurons and heads of the null.
        n_heads: How many heads are switched off, at most; half of the heads up to the layer of the outlying tokens are
            the bound, as the null takes as many others.
        masks: Instance ids of the objects in each view [row column], None for a view without; None: no view has any.
        progress: Called with what is tried, the images done, and their number.

    Returns:
        By model, one of `vitrail.tokens.outliers.TRIED_MODELS`: `outlier_share` [model image layer], share of patches;
        `output_shift` [model image], 1 - cosine to the output of the model as it is; for classes `same_top1`
        [model image]; of the class token's attention in the last layer (without a class token that of the patches),
        mean over heads, `outlier_attention` [model image], the share on the patches that are outlying in the model as
        it is, `register_attention` [model image], the share on registers, and `attention_entropy` [model image], the
        entropy of its map over patches as a share of the largest possible; `grouping` [model image score] of the last
        layer's tokens, by `SCORES`, or by `OBJECT_SCORES` with masks, NaN for an image without two objects. `written`
        [written_layer part], what attention and MLP of each layer add to the length of an outlying token;
        `head_written` [written_layer written_head], what each head adds; `neuron_layer`, `neuron_index`,
        `neuron_share` [neuron] and `head_layer`, `head_index`, `head_share` [head] of those that were switched off,
        empty where heads cannot be told apart, with the reason in `attrs["no_heads"]`; of a few images `photo`,
        `token_norm` and `class_attention` [model example patch] of layer `worst_layer`. Of other neurons and heads
        off: means over `N_DRAWS` draws.

    Raises:
        UsageError: Fewer than 2 images, no neuron, register or head is asked for, the seed is out of range, a layer
            has fewer other neurons than were traced to it, so that there is no null, or masks of which no image to be
            tried on has two objects.
        Unsupported: No token is outlying, no neuron adds to the length of those that are, the model has no MLPs that
            can be read, or it takes no registers, as for `with_registers`.
        ModelError: The answer or the tokens of an image are not finite (NaN or infinite).

    Example:
        >>> trial = try_registers(vit, [vit.view(photo) for photo in photographs])  # doctest: +SKIP
        >>> trial["outlier_share"].mean("image").sel(model="registers")  # doctest: +SKIP
    """
    require_vit(vit)
    require_seed(seed)
    if len(views) < 2:
        raise UsageError("Artefacts are looked for on some images and registers tried on others: give at least 2.")
    n_neurons, n_registers = at_least_one("neurons", n_neurons), at_least_one("registers", n_registers)
    n_heads = at_least_one("heads", n_heads)
    half = len(views) // 2
    finding, trying = views[: min(N_FINDING, half)], views[half:]
    prepared = vit.prepare_views(list(finding))
    outliers = outlying_patches(vit, prepared)
    worst = layer_of_most_outliers(outliers)
    if worst is None:
        raise Unsupported(
            f"No token of {vit.name} has an outlying length on {len(finding)} images at {vit.image_size[0]} x "
            f"{vit.image_size[1]} px: there are no artefacts to cure. Larger images may show some (--image-size)."
        )
    owners = None if masks is None else _owners(vit, views, masks, half)
    neurons = artefact_neurons(vit, prepared, n_neurons)
    if neurons[0].length <= 0:
        raise Unsupported(
            f"No neuron of {vit.name} adds to the length of its outlying tokens after L{worst}, so none can be "
            "switched off or listened to: they are written by attention, or are long before L0."
        )
    length = neurons[0].length / neurons[0].share
    head_written, no_heads = _head_written(vit, prepared, worst, outliers[worst])
    n_all = int(head_written.isfinite().sum())
    heads = strongest_heads(head_written, length, min(n_heads, n_all // 2))
    outcomes: dict[str, list[_Outcome]] = {}
    for model, changed, edits in _changed_models(vit, neurons, heads, n_registers, head_written, seed):
        tell = None if progress is None else _progress_of(progress, model, len(trying))
        n_own = n_registers if model in REGISTER_MODELS[1:] else 0
        outcomes.setdefault(model, []).append(_try(changed, trying, worst, edits, owners, n_own, half, tell))
    plain = outcomes["as it is"][0]
    variables = _by_model(outcomes, plain, with_classes=vit.task.n_classes is not None)
    variables |= {
        "written": (("written_layer", "part"), written_by_layers(vit, prepared, worst, outliers[worst]).cpu().numpy()),
        "head_written": (("written_layer", "written_head"), head_written.numpy()),
        "photo": (
            ("example", "row", "column", "colour"),
            np.stack([np.asarray(image) for image in trying[:N_EXAMPLES]]),
        ),
    }
    for name, writers in (("neuron", neurons), ("head", heads)):
        variables[f"{name}_layer"] = ((name,), np.array([each[0] for each in writers], np.int64))
        variables[f"{name}_index"] = ((name,), np.array([each[1] for each in writers], np.int64))
        variables[f"{name}_share"] = ((name,), np.array([each.share for each in writers], np.float64))
    scores = list(SCORES if owners is None else OBJECT_SCORES)
    dataset = xr.Dataset(variables, coords={"model": list(outcomes), "score": scores})
    dataset.attrs = {
        "name": vit.name, "worst_layer": worst, "grid": list(vit.anatomy.blocks[worst].grid or ()),
        "n_found": len(finding), "n_registers": n_registers, "outlier_length": length, "no_heads": no_heads,
        "class_token": vit.anatomy.class_token,
    }  # fmt: skip
    return dataset


class _Outcome(NamedTuple):
    """What a model does to the images that it is tried on.

    Attributes:
        outlier_share: Share of patches whose token is outlying, after each layer.
        outlying: Which patches these are after the layer of the outlying tokens.
        token_norm: Lengths of the tokens there, of a few images.
        output: Of the model.
        attention: What the class token takes from each patch in the last layer.
        register_attention: What it takes from registers.
        grouping: Scores of the last layer's tokens.
    """

    outlier_share: Float[Tensor, "image layer"]
    outlying: Bool[Tensor, "image patch"]
    token_norm: Float[Tensor, "example patch"]
    output: Float[Tensor, "image value"]
    attention: Float[Tensor, "image patch"]
    register_attention: Float[Tensor, "image"]
    grouping: Float[np.ndarray, "image score"]


def _changed_models(
    vit: Vit,
    neurons: Sequence[ArtefactNeuron],
    heads: Sequence[ArtefactHead],
    n_registers: int,
    head_written: Float[Tensor, "layer head"],
    seed: int,
) -> Iterator[tuple[str, Vit, list[Edit]]]:
    """The models to try, one at a time, and the edits to try each with; the nulls of ablations in several draws."""
    generator = np.random.default_rng(seed)
    yield "as it is", vit, []
    yield "registers", with_registers(vit, neurons, n_registers), []
    yield "random neurons", with_registers(vit, _other_neurons(vit, neurons, generator), n_registers), []
    yield "neurons off", without_neurons(vit, neurons), []
    for _ in range(N_DRAWS):
        yield "other neurons off", without_neurons(vit, _other_neurons(vit, neurons, generator)), []
    if heads:
        own = [(each.layer, each.head) for each in heads]
        yield "heads off", vit, prune_edits(own)
        for _ in range(N_DRAWS):
            yield "other heads off", vit, prune_edits(_other_heads(own, head_written, generator))


def _by_model(
    outcomes: dict[str, list[_Outcome]], plain: _Outcome, *, with_classes: bool
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """The variables that every model has; draws of a null are averaged."""

    def stack(of: Callable[[_Outcome], Tensor]) -> np.ndarray:
        draws = [torch.stack([of(each).double() for each in tried]).mean(0) for tried in outcomes.values()]
        return torch.stack(draws).numpy()

    by_image = ("model", "image")
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        "outlier_share": ((*by_image, "layer"), stack(lambda each: each.outlier_share)),
        "output_shift": (by_image, stack(lambda each: _shift(each.output, plain.output))),
        "outlier_attention": (by_image, stack(lambda each: (each.attention * plain.outlying).sum(-1))),
        "register_attention": (by_image, stack(lambda each: each.register_attention)),
        "attention_entropy": (by_image, stack(lambda each: _entropy_share(each.attention))),
        "grouping": ((*by_image, "score"), stack(lambda each: torch.from_numpy(each.grouping))),
        "token_norm": (("model", "example", "patch"), stack(lambda each: each.token_norm)),
        "class_attention": (("model", "example", "patch"), stack(lambda each: each.attention[:N_EXAMPLES])),
    }
    if with_classes:
        top1 = plain.output.argmax(-1)
        variables["same_top1"] = (by_image, stack(lambda each: each.output.argmax(-1) == top1))
    return variables


def _shift(output: Float[Tensor, "image value"], plain: Float[Tensor, "image value"]) -> Float[Tensor, "image"]:
    shift: Tensor = (1 - torch.cosine_similarity(output, plain, dim=-1)).clamp(min=0)
    return shift


def _entropy_share(attention: Float[Tensor, "image patch"]) -> Float[Tensor, "image"]:
    """Entropy of each map, made to sum to 1, as a share of that of equal weights: 0 where one patch has all."""
    shares = attention / attention.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(shares).sum(-1) / np.log(shares.shape[-1])
    return entropy


# --- one model -------------------------------------------------------------------------------------------------------


def _try(
    vit: Vit,
    images: Sequence[Image.Image],
    worst: int,
    edits: Sequence[Edit],
    owners: Sequence[Int[np.ndarray, "patch"] | None] | None,
    n_registers: int,
    first: int,
    progress: Callable[[int], None] | None,
) -> _Outcome:
    """Runs a model; `first` is the index of the first of the images among all, for messages."""
    parts: list[_Outcome] = []
    n_patches = _n_patches(vit)
    for start in range(0, len(images), BATCH):
        views = list(images[start : start + BATCH])
        lengths: dict[int, Tensor] = {}
        maps: list[Tensor] = []
        last: list[Tensor] = []

        def read(each: LayerAttention, maps: list[Tensor] = maps) -> None:
            if each.layer == vit.n_layers - 1:
                maps.append(_class_attention(vit, each))

        def read_tokens(
            layer: int, each: Tensor, lengths: dict[int, Tensor] = lengths, last: list[Tensor] = last
        ) -> None:
            patches = each[:, -n_patches:].float()
            lengths[layer] = patches.norm(dim=-1).cpu()
            if layer == vit.n_layers - 1:
                last.append(patches.cpu())

        with torch.no_grad():
            output = vit.tap().read(vit.prepare_views(views), Readers(attention=read, output=read_tokens), edits)
        names = [f"the image at index {first + start + index}" for index in range(len(views))]
        require_finite(vit.name, output, names)
        outlying = {layer: _outlying(each) for layer, each in lengths.items()}
        shares = [outlying[layer].float().mean(-1) for layer in range(vit.n_layers)]
        of_views = None if owners is None else owners[start : start + BATCH]
        slots = _register_slots(vit, n_registers)
        part = _Outcome(
            torch.stack(shares, 1),
            outlying[worst],
            lengths[worst][: max(0, N_EXAMPLES - start)],
            output.float().cpu(),
            maps[0][:, -n_patches:],
            maps[0][:, slots].sum(-1),
            np.stack([_grouping(each, of_views, at) for at, each in enumerate(last[0].numpy())]),
        )
        parts.append(part)
        if progress is not None:
            progress(start + len(views))
    return _Outcome(
        torch.cat([each.outlier_share for each in parts]),
        torch.cat([each.outlying for each in parts]),
        torch.cat([each.token_norm for each in parts]),
        torch.cat([each.output for each in parts]),
        torch.cat([each.attention for each in parts]),
        torch.cat([each.register_attention for each in parts]),
        np.concatenate([each.grouping for each in parts]),
    )


def _grouping(
    tokens: Float[np.ndarray, "patch channel"], owners: Sequence[Int[np.ndarray, "patch"] | None] | None, image: int
) -> Float[np.ndarray, "score"]:
    """The scores of one image: of all its tokens, or of those of its objects, NaN where these are fewer than two."""
    if owners is None:
        return np.array([label_free_silhouette(tokens)])
    owner = owners[image]
    if owner is None:
        return np.full(len(OBJECT_SCORES), np.nan)
    inside = owner > 0
    scores = score_grouping(tokens[inside], owner[inside])
    return np.array(
        [object_silhouette(tokens[inside], owner[inside]), scores.silhouette, scores.purity, scores.in_object]
    )


def _owners(
    vit: Vit, views: Sequence[Image.Image], masks: Sequence[Ids | None], first: int
) -> list[Int[np.ndarray, "patch"] | None]:
    """Which object each patch of the last layer belongs to, of the views from `first` on; None for fewer than two."""
    if len(masks) != len(views):
        raise UsageError(f"{len(masks)} masks were given for {len(views)} images; give one for each, or None.")
    block = vit.anatomy.blocks[-1]
    assert block.grid is not None, "tokens of outlying length were looked for on a grid"
    owners: list[Int[np.ndarray, "patch"] | None] = []
    for view, ids in zip(views[first:], masks[first:], strict=True):
        if ids is not None and ids.shape != (view.height, view.width):
            raise UsageError(
                f"A mask has {ids.shape[0]} rows and {ids.shape[1]} columns and its view {view.height} and "
                f"{view.width}; bring it into the view with vitrail.models.objects.in_view."
            )
        owner = None if ids is None else patch_objects(ids, block.grid, block.patch_step)
        owners.append(None if owner is None or len(np.unique(owner[owner > 0])) < 2 else owner)
    if all(owner is None for owner in owners):
        raise UsageError(
            f"None of the {len(owners)} images that models are tried on has a mask with two objects of some size, so "
            "their grouping cannot be scored. Give more images, or leave the masks out: tokens are then grouped "
            "without objects."
        )
    return owners


def _head_written(
    vit: Vit, images: Tensor, layer: int, outliers: Bool[Tensor, "image patch"]
) -> tuple[Float[Tensor, "layer head"], str]:
    """What heads add, and why that is not known of this model, "" where it is."""
    try:
        return written_by_heads(vit, images, layer, outliers), ""
    except Unsupported as reason:
        return torch.full((layer + 1, 1), torch.nan), str(reason)


def _progress_of(progress: Callable[[str, int, int], None], model: str, n_images: int) -> Callable[[int], None]:
    return lambda done: progress(model, done, n_images)


def _outlying(norms: Float[Tensor, "image patch"]) -> Bool[Tensor, "image patch"]:
    """Which patches of each image have an outlying token."""
    return torch.stack([torch.from_numpy(norm_outliers(each)) for each in norms.numpy()])


def _n_patches(vit: Vit) -> int:
    grid = vit.anatomy.blocks[0].grid
    assert grid is not None
    return grid[0] * grid[1]


def _register_slots(vit: Vit, n_registers: int) -> list[int]:
    """Where the registers of a model lie in canonical order: they are the last in front of its patches."""
    block = vit.anatomy.blocks[-1]
    in_front = block.prefix - block.behind
    return [slot + (slot < block.layout.non_patches.first) for slot in range(in_front - n_registers, in_front)]


def _class_attention(vit: Vit, attention: LayerAttention) -> Float[Tensor, "image key"]:
    """What the class token takes from each token, mean over heads; without one what tokens get from all patches."""
    weights, n_patches = attention.weights().float(), _n_patches(vit)
    index = vit.anatomy.class_index(attention.layer)
    rows = weights[..., -n_patches:, :].mean(-2) if index is None else weights[..., index, :]
    mean: Tensor = rows.mean(1).cpu()
    return mean


# --- the null --------------------------------------------------------------------------------------------------------


def _other_neurons(
    vit: Vit, neurons: Sequence[ArtefactNeuron], generator: np.random.Generator
) -> list[tuple[int, int]]:
    """As many of the same layers, none of them among the given ones."""
    widths = mlp_widths(vit)
    chosen, most = Counter(each.layer for each in neurons), len(neurons)
    while any(2 * count > widths[layer] for layer, count in chosen.items()):  # fewer are the first of these
        most -= 1
        chosen[neurons[most].layer] -= 1
    if most < len(neurons):
        raise UsageError(
            f"Registers are compared with as many other neurons of the same layers, and L{neurons[most].layer} of "
            f"{vit.name} has {widths[neurons[most].layer]} neurons. Take {most} at most (--neurons)."
        )
    own = {(each.layer, each.neuron) for each in neurons}
    others: list[tuple[int, int]] = []
    for layer in sorted({each.layer for each in neurons}):
        free = [index for index in range(widths[layer]) if (layer, index) not in own]
        n = sum(each.layer == layer for each in neurons)
        others += [(layer, int(index)) for index in generator.choice(free, n, replace=False)]
    return others


def _other_heads(
    heads: Sequence[tuple[int, int]], written: Float[Tensor, "layer head"], generator: np.random.Generator
) -> list[tuple[int, int]]:
    """As many others of the same layers; where a layer has too few left, of any layer up to that of the outliers."""
    free = [(layer, head) for layer, head in written.isfinite().nonzero().tolist() if (layer, head) not in heads]
    order = [free[index] for index in generator.permutation(len(free))]
    others: list[tuple[int, int]] = []
    for layer, n in Counter(layer for layer, _ in heads).items():
        others += [each for each in order if each[0] == layer][:n]
    rest = [each for each in order if each not in others]
    return [*others, *rest[: len(heads) - len(others)]]
