"""What test-time registers do to a model: outlying tokens, answers and attention, with a null.

Neurons are found on the first half of the images and tried on the second. The null: registers that listen to as many
other neurons of the same layers, drawn at random.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitrail.errors import Unsupported, UsageError
from vitrail.models.open import Vit
from vitrail.sentence import percent
from vitrail.stats import mean_interval, require_seed, share_interval
from vitrail.tap.attention import LayerAttention, Readers
from vitrail.tokens.artefacts import (
    ArtefactNeuron,
    artefact_neurons,
    mlp_widths,
    outlying_patches,
    with_registers,
    written_by_layers,
)
from vitrail.tokens.outliers import norm_outliers

__all__ = ["MODELS", "artefact_findings", "try_registers"]

MODELS = ("as it is", "registers", "random neurons")
"""The model, the same with registers, and with registers that listen to other neurons."""

BATCH = 8
N_EXAMPLES = 3
"""Images whose maps are kept for the figure."""

N_FINDING = 16
"""Images that neurons are found on, at most: the same few neurons write the outlying tokens of all."""


def try_registers(
    vit: Vit, views: Sequence[Image.Image], n_neurons: int = 8, n_registers: int = 1, seed: int = 0
) -> xr.Dataset:
    """Finds the neurons that write tokens of outlying length, moves what they write to registers, and compares.

    Args:
        vit: The model.
        views: Photographs as the model sees them (`Vit.view`), at least 2; half find the neurons, half show what
            registers do.
        n_neurons: How many neurons the registers listen to.
        n_registers: How many registers there are.
        seed: Of the neurons of the null.

    Returns:
        `outlier_share` [model image layer], share of patches; `output_shift` [model image], 1 - cosine to the output
        of the model as it is; for classes `same_top1` [model image]; `written` [part layer], what attention and MLP of
        each layer add to the length of an outlying token; `neuron_layer`, `neuron_index`, `neuron_share` [neuron]; of
        a few images `photo`, `token_norm` and `class_attention` [model example patch] of layer `worst_layer`.

    Raises:
        UsageError: Fewer than 2 images, the seed is out of range, or a layer has fewer other neurons than were found in
            it, so that there is no null.
        Unsupported: No token is outlying, the model has no MLPs that can be read, or it takes no registers, as for
            `with_registers`.

    Example:
        >>> trial = try_registers(vit, [vit.view(photo) for photo in photographs])  # doctest: +SKIP
        >>> trial["outlier_share"].mean("image").sel(model="registers")  # doctest: +SKIP
    """
    require_seed(seed)
    if len(views) < 2:
        raise UsageError("Artefacts are looked for on some images and registers tried on others: give at least 2.")
    finding, trying = views[: min(N_FINDING, len(views) // 2)], views[len(views) // 2 :]
    prepared = vit.prepare_views(list(finding))
    outliers = outlying_patches(vit, prepared)
    counts = [int(each.sum()) for each in outliers]
    if not max(counts):
        raise Unsupported(
            f"No token of {vit.name} has an outlying length on {len(finding)} images at {vit.image_size[0]} x "
            f"{vit.image_size[1]} px: there are no artefacts to cure. Larger images may show some (--image-size)."
        )
    worst = max(range(len(counts)), key=counts.__getitem__)
    neurons = artefact_neurons(vit, prepared, n_neurons)
    models = {
        "as it is": vit,
        "registers": with_registers(vit, neurons, n_registers),
        "random neurons": with_registers(vit, _other_neurons(vit, neurons, seed), n_registers),
    }
    parts = [_try(each, trying, worst) for each in models.values()]
    plain = parts[0]["output"]
    shift = [1 - torch.cosine_similarity(each["output"], plain, dim=-1) for each in parts]
    variables = {
        "outlier_share": (("model", "image", "layer"), np.stack([each["outlier_share"].numpy() for each in parts])),
        "output_shift": (("model", "image"), torch.stack(shift).clamp(min=0).numpy()),
        "written": (("layer", "part"), written_by_layers(vit, prepared, worst, outliers[worst]).cpu().numpy()),
        "neuron_layer": ("neuron", np.array([each.layer for each in neurons])),
        "neuron_index": ("neuron", np.array([each.neuron for each in neurons])),
        "neuron_share": ("neuron", np.array([each.share for each in neurons])),
        "token_norm": (("model", "example", "patch"), np.stack([each["token_norm"].numpy() for each in parts])),
        "class_attention": (("model", "example", "patch"), np.stack([each["attention"].numpy() for each in parts])),
        "photo": (
            ("example", "row", "column", "colour"),
            np.stack([np.asarray(image) for image in trying[:N_EXAMPLES]]),
        ),
    }
    if vit.task.n_classes is not None:
        same = [each["output"].argmax(-1) == plain.argmax(-1) for each in parts]
        variables["same_top1"] = (("model", "image"), torch.stack(same).numpy())
    written = variables.pop("written")
    dataset = xr.Dataset(variables, coords={"model": list(MODELS)})
    dataset["written"] = (("written_layer", "part"), written[1])
    grid = vit.anatomy.blocks[worst].grid
    dataset.attrs = {
        "name": vit.name, "worst_layer": worst, "grid": list(grid or ()), "n_found": len(finding),
        "n_registers": n_registers, "outlier_length": neurons[0].length / neurons[0].share,
        "class_token": vit.anatomy.class_token,
    }  # fmt: skip
    return dataset


def artefact_findings(trial: xr.Dataset) -> list[str]:
    """What a trial says.

    Args:
        trial: What `try_registers` gives.

    Returns:
        Sentences with numbers.
    """
    worst, n_images = int(trial.attrs["worst_layer"]), trial.sizes["image"]
    written, length = trial["written"].to_numpy(), float(trial.attrs["outlier_length"])
    layer, part = np.unravel_index(int(written.argmax()), written.shape)
    before = length - float(written.sum())  # what the token holds before L0: layers add the rest
    largest = (
        "They have the largest part of their length before L0, from patch embedding and position: "
        f"{percent(before / length)}."
        if before > written[layer, part]
        else f"The {('attention', 'MLP')[part]} of L{layer} writes the largest part of their length: "
        f"{percent(written[layer, part] / length)}."
    )
    layers, indices = trial["neuron_layer"].to_numpy(), trial["neuron_index"].to_numpy()
    shares = trial["neuron_share"].to_numpy()
    counts = {model: trial["outlier_share"].sel(model=model).to_numpy()[:, worst] for model in MODELS}
    n_patches = int(np.prod(trial.attrs["grid"]))
    n_outliers = n_patches * counts["as it is"].mean()
    sentences = [
        f"After L{worst}, the layer with the most tokens of outlying length, {n_outliers:.1f} of {n_patches} patches "
        f"have one, mean over {n_images} images.",
        f"{largest} Neuron {indices[0]} of L{layers[0]} alone writes {percent(shares[0])} of it, the {len(shares)} "
        f"strongest {percent(shares.sum())}.",
    ]
    left, null = (n_patches * counts[model].mean() for model in MODELS[1:])
    n_registers = int(trial.attrs["n_registers"])
    registers = "a register that takes" if n_registers == 1 else f"{n_registers} registers that take"
    sentences.append(
        f"With {registers} over what these neurons write, {left:.1f} patches are left with an outlying length; "
        f"{null:.1f} with as many other neurons of the same layers."
    )
    shift = trial["output_shift"].sel(model="registers").to_numpy()
    low, high, reason = mean_interval(shift.astype(np.float64))
    interval = "" if reason else f" (95 % interval {float(low):.3f} to {float(high):.3f})"
    sentences.append(f"The output turns by {shift.mean():.3f}{interval}, as 1 - cosine.")
    if "same_top1" in trial:
        same = trial["same_top1"].sel(model="registers").to_numpy()
        low, high, reason = share_interval(same)
        interval = "" if reason else f" (95 % interval {percent(float(low))} to {percent(float(high))})"
        sentences.append(f"The most probable class stays for {percent(same.mean())} of {n_images} images{interval}.")
    return sentences


def _try(vit: Vit, images: Sequence[Image.Image], worst: int) -> dict[str, Tensor]:
    """Outliers by layer and output of each image; of the first few the maps."""
    shares: list[Tensor] = []
    outputs: list[Tensor] = []
    norms: list[Tensor] = []
    attention: list[Tensor] = []
    for batch in _batches(images):
        prepared = vit.prepare_views(batch)
        lengths: dict[int, Tensor] = {}
        maps: list[Tensor] = []

        def read(each: LayerAttention, maps: list[Tensor] = maps) -> None:
            if each.layer == vit.n_layers - 1:
                maps.append(_class_attention(vit, each))

        def read_norms(layer: int, each: Tensor, lengths: dict[int, Tensor] = lengths) -> None:
            lengths[layer] = each[:, -_n_patches(vit) :].float().norm(dim=-1).cpu()

        with torch.no_grad():
            outputs.append(vit.tap().read(prepared, Readers(attention=read, output=read_norms)).float().cpu())
        by_layer = [_outlier_share(lengths[layer]) for layer in range(vit.n_layers)]
        shares.append(torch.stack(by_layer, 1))
        if len(norms) * BATCH < N_EXAMPLES:
            norms.append(lengths[worst])
            attention.append(maps[0])
    return {
        "outlier_share": torch.cat(shares),
        "output": torch.cat(outputs),
        "token_norm": torch.cat(norms)[:N_EXAMPLES],
        "attention": torch.cat(attention)[:N_EXAMPLES],
    }


def _outlier_share(norms: Float[Tensor, "image patch"]) -> Float[Tensor, "image"]:
    """Share of the patches of each image whose token is outlying."""
    return torch.tensor([float(norm_outliers(each).mean()) for each in norms.numpy()])


def _n_patches(vit: Vit) -> int:
    grid = vit.anatomy.blocks[0].grid
    assert grid is not None
    return grid[0] * grid[1]


def _class_attention(vit: Vit, attention: LayerAttention) -> Float[Tensor, "image patch"]:
    """What the class token takes from each patch, mean over heads; without one what patches get from all patches."""
    weights, n_patches = attention.weights().float(), _n_patches(vit)
    index = vit.anatomy.class_index(attention.layer)
    rows = weights[..., -n_patches:, -n_patches:].mean(-2) if index is None else weights[..., index, -n_patches:]
    mean: Tensor = rows.mean(1).cpu()
    return mean


def _other_neurons(vit: Vit, neurons: Sequence[ArtefactNeuron], seed: int) -> list[tuple[int, int]]:
    """As many of the same layers, none of them among the given ones."""
    generator, widths = np.random.default_rng(seed), mlp_widths(vit)
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


def _batches(images: Sequence[Image.Image]) -> Iterator[list[Image.Image]]:
    for start in range(0, len(images), BATCH):
        yield list(images[start : start + BATCH])
