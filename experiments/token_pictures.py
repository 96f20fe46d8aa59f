"""Figures of docs/tokens.md, one command each; `photographs` draws those of single pictures, `curves` those of tables.

    python experiments/token_pictures.py photographs --data ../shared/data
    python experiments/token_pictures.py curves --relevance-precision bfloat16      after experiments/tokens.py

The pictures are the cat, coffee and astronaut that scikit-image carries; the masked one is of coco-masks.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data as photographs

from tokens import DOCS, MODELS, joined, masked_photographs, opened
from vitrail.figures.style import save
from vitrail.figures.tokens import (
    Curve,
    Panel,
    coloured,
    curves,
    overlaid,
    panels,
    position_grid,
    scatter_of_tokens,
    token_map,
    view_panels,
)
from vitrail.models.objects import in_view, patch_objects
from vitrail.stats import mean_interval
from vitrail.tokens.embedding import find_embedding, position_similarity
from vitrail.tokens.excite import TopImages, maximise_activation
from vitrail.tokens.filters import auroc, filter_energy, salient_patches
from vitrail.tokens.flow import read_steps, rollout
from vitrail.tokens.grouping import SCORES, tsne
from vitrail.tokens.levels import read_levels
from vitrail.tokens.outliers import norm_outliers
from vitrail.tokens.relevance import relevance
from vitrail.tokens.vectors import colour_basis, similarity, token_norms
from vitrail.tokens.views import agreement, faithful_view, global_view, neuron_view

PATCHES = {"cat": (4, 5), "coffee": (7, 6), "astronaut": (2, 6)}
"""Row and column of a patch to look at in each photograph: an eye, the cup, the face."""


OWN = Path(__file__).parents[1] / ".build" / "tokens"
"""Pictures that show photographs of a data set stay out of the documentation: the photographs are not ours to give."""


def stored(figure, path: Path) -> None:
    """Written with 256 colours, which is a third of the bytes and looks the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def pictures() -> dict[str, Image.Image]:
    return {name: Image.fromarray(getattr(photographs, name)()) for name in PATCHES}


def pixels_of(vit, image: Image.Image) -> np.ndarray:
    return np.asarray(vit.view(image), dtype=float) / 255


def chosen_filter(vit, images: torch.Tensor, embedding) -> int:
    """The filter that on these photographs lets the patches of high rollout stand out most."""
    return int(rollout_scores(vit, images, embedding).mean(0).argmax())


def rollout_scores(vit, images: torch.Tensor, embedding) -> np.ndarray:
    steps, _ = read_steps(vit.tap(), images)
    salient = salient_patches(rollout(steps, embedding.prefix, vit.anatomy.class_index(0)).numpy())
    energy = filter_energy(images, embedding.filters).numpy()
    return auroc(energy, np.broadcast_to(salient[:, None], energy.shape))


def mark_of(name: str, scale: int = 1) -> tuple[float, float, float, float]:
    row, column = PATCHES[name]
    return row * scale, column * scale, scale, scale


def photographs_command(arguments: argparse.Namespace) -> None:
    vit = opened(arguments.data, MODELS[0])
    photos = pictures()
    images = vit.prepare(list(photos.values()))
    for draw in (draw_positions, draw_filters, draw_colours, draw_similarity, draw_relevance, draw_norms, draw_views):
        draw(vit, photos, images)
        print(draw.__name__, flush=True)
    draw_scatter(vit, arguments.data)
    print("draw_scatter", flush=True)
    draw_excited(vit, arguments.data)


def draw_views(vit, photos, images) -> None:
    """Photograph, and the plain and faithful views of one neuron over levels."""
    embedding, levels = find_embedding(vit), (0, 1, 2, 4, 8, 12)
    channel = chosen_filter(vit, images, embedding)
    for place, (name, photo) in enumerate(photos.items()):
        row, column = PATCHES[name]
        token, image = embedding.prefix + row * embedding.grid[1] + column, images[place : place + 1]
        plain = [neuron_view(vit, image, level, token, channel, embedding=embedding)[0] for level in levels]
        faithful = [faithful_view(vit, image, level, token, channel, path="frozen") for level in levels]
        agreed = [agreement(one, other.pixels, embedding.grid) for one, other in zip(plain, faithful, strict=True)]
        top, signed = view_panels([each.numpy() for each in plain], [f"level {level}" for level in levels])
        _, true = view_panels([each.pixels.numpy() for each in faithful], [""] * len(levels), clip=0.999)
        true = [Panel(each.picture, f"faithful: cos {a.cosine:.2f}") for each, a in zip(true, agreed, strict=True)]
        first = Panel(pixels_of(vit, photo), f"{name}, token {token}", mark_of(name, 16))
        whole, whole_signed = view_panels(
            [global_view(image, embedding.filters[channel], embedding.grid)[0].numpy()], ["G_0"]
        )
        rows = [[first, *top], [whole[0], *signed], [whole_signed[0], *true]]
        figure = panels(
            rows,
            f"Neuron {channel} of one patch through the levels: {name}",
            "Top: the plain view as published, clip(V / max V). Middle: the same, signed (orange: positive). Bottom: "
            "what each pixel adds to the neuron with attention, norms and activations held still, its scale ending at "
            "99.9 % of the pixels; cos is its agreement with the plain view. G_0: all patches.",
        )
        stored(figure, DOCS / f"views-{name}.png")


def draw_filters(vit, photos, images) -> None:
    embedding = find_embedding(vit)
    scores = rollout_scores(vit, images, embedding)
    rows = []
    for place, (name, photo) in enumerate(photos.items()):
        order = np.argsort(scores[place])
        picked = [*order[::-1][:3], *order[:2]]
        views = [
            global_view(images[place : place + 1], embedding.filters[each], embedding.grid)[0].numpy()
            for each in picked
        ]
        titles = [f"filter {each}: {scores[place, each]:.2f}" for each in picked]
        rows.append([Panel(pixels_of(vit, photo), name), *view_panels(views, titles)[0]])
    figure = panels(
        rows,
        "Filters that let the salient patches stand out most (three) and least (two)",
        "Global views G_0 at level 0, and AUROC of their energy; salient: the quarter of patches with the "
        "highest class-token rollout, as these photographs have no masks.",
    )
    stored(figure, DOCS / "filters.png")


def draw_positions(vit, photos, images) -> None:
    embedding = find_embedding(vit)
    picture = position_grid(position_similarity(embedding).numpy(), embedding.grid, 2)
    figure = panels([[Panel(picture)]], "Position embeddings: cosine similarity of every second patch to all", side=4.0)
    stored(figure, DOCS / "positions.png")


def draw_colours(vit, photos, images) -> None:
    levels, grid = read_levels(vit.tap(), images).tokens, find_embedding(vit).grid
    shown = (1, 4, 8, 12)
    rows = [[Panel(pixels_of(vit, photo), name)] for name, photo in photos.items()]
    for level in shown:
        patches = levels[level][:, 1:].numpy()
        basis = colour_basis(patches, weights=~norm_outliers(np.linalg.norm(patches, axis=-1)))
        for place, row in enumerate(rows):
            row.append(
                Panel(coloured(basis.colours(patches[place]), grid), f"after L{level - 1}: {basis.shares.sum():.0%}")
            )
    figure = panels(
        rows,
        "Principal components of patch tokens as colour, one basis for the three photographs",
        "The first three components as red, green and blue; the share of variance they hold. Tokens with outlying "
        "norms take no part in the basis.",
    )
    stored(figure, DOCS / "colours.png")


def draw_similarity(vit, photos, images) -> None:
    levels, grid = read_levels(vit.tap(), images).tokens, find_embedding(vit).grid
    rows = []
    for place, (name, photo) in enumerate(photos.items()):
        token = 1 + PATCHES[name][0] * grid[1] + PATCHES[name][1]
        row = [Panel(pixels_of(vit, photo), name, mark_of(name, 16))]
        for level in (1, 4, 8, 12):
            found = similarity(levels[level][place : place + 1], token)[0, 1:].numpy()
            row.append(
                Panel(token_map(found, grid, high=1.0), f"after L{level - 1}: {found.min():.2f} to 1", mark_of(name))
            )
        rows.append(row)
    figure = panels(rows, "Cosine similarity of one patch's token to all others", "Yellow: alike.")
    stored(figure, DOCS / "similarity.png")


def draw_relevance(vit, photos, images) -> None:
    embedding = find_embedding(vit)
    classes = vit.logits(images).argmax(-1).numpy()
    found = relevance(vit, images, classes, ("raw", "rollout", "gradient"))
    names = class_names()
    rows = []
    for place, (name, photo) in enumerate(photos.items()):
        pixels = pixels_of(vit, photo)
        title = f"{name}: {names[classes[place]]}"
        rows.append(
            [
                Panel(pixels, title),
                *(Panel(overlaid(pixels, scores[place], embedding.grid), method) for method, scores in found.items()),
            ]
        )
    figure = panels(
        rows,
        "Relevance of patches for the model's first answer",
        "Clear to orange: lowest to the 98 % quantile of the image.",
        side=1.7,
    )
    stored(figure, DOCS / "relevance.png")


def class_names() -> list[str]:
    lines = (ARGUMENTS.data / "models" / "imagenet_classes.txt").read_text().splitlines()
    return [line.split(maxsplit=1)[-1].split(",")[0] for line in lines]


def draw_norms(vit, photos, images) -> None:
    levels, grid = read_levels(vit.tap(), images).tokens, find_embedding(vit).grid
    norms = token_norms(levels[12])[:, 1:].numpy()
    outliers = norm_outliers(norms)
    rows = [
        [
            Panel(pixels_of(vit, photo), name),
            Panel(
                token_map(norms[place], grid, norms.min(), norms.max()),
                f"{norms[place].min():.0f} to {norms[place].max():.0f}",
            ),
            Panel(token_map(outliers[place].astype(float), grid, 0, 1), f"{outliers[place].sum()} outliers"),
        ]
        for place, (name, photo) in enumerate(photos.items())
    ]
    stored(
        panels(
            rows,
            "Norms of patch tokens after the last layer",
            "Outliers: more than 6 robust standard deviations above the median of the three photographs.",
        ),
        DOCS / "norms.png",
    )


def draw_scatter(vit, data: Path) -> None:
    """The photograph of coco-masks with most objects of different categories."""
    best = max(
        masked_with_owner(vit, data), key=lambda each: len({each[2].get(number) for number in set(each[1]) - {0}})
    )
    image, owner, categories, name = best
    prepared = vit.prepare([image])
    levels, embedding = read_levels(vit.tap(), prepared).tokens, find_embedding(vit)
    steps, _ = read_steps(vit.tap(), prepared)
    sizes = rollout(steps, 1, 0)[0].numpy()
    layouts = {}
    for level in (1, 6, 12):
        tokens = levels[level][0].numpy()
        layouts[f"after L{level - 1}"] = tsne(np.concatenate([tokens[1:], tokens[:1]]))
    names = {0: "background"} | {int(each): f"{categories[int(each)]} {each}" for each in np.unique(owner) if each}
    figure = scatter_of_tokens(
        layouts,
        owner,
        sizes,
        names,
        f"t-SNE of the tokens of {name}",
        "Each layer laid out on its own, cosine distance, seed 0; areas follow class-token rollout. Distances between "
        "far groups and sizes of groups mean nothing.",
    )
    stored(figure, DOCS / "tsne.png")
    pixels = pixels_of(vit, image)
    stored(
        panels(
            [[Panel(pixels, name), Panel(token_map(owner.astype(float), embedding.grid), "objects")]],
            "The photograph of the t-SNE",
            side=2.2,
        ),
        OWN / "tsne-photo.png",
    )


def masked_with_owner(vit, data: Path) -> Iterator[tuple]:
    for image, ids, categories, name in masked_photographs(data):
        yield image, patch_objects(in_view(ids, vit.preprocessing), vit.anatomy.grid), categories, name


def draw_excited(vit, data: Path, level: int = 6, n_channels: int = 4) -> None:
    top, kept = TopImages(192, keep=4), {}
    for number, (image, _, _, _) in enumerate(masked_photographs(data)):
        kept[number] = image
        patches = read_levels(vit.tap(), vit.prepare([image])).tokens[level][:, 1:].clone()
        patches[torch.as_tensor(norm_outliers(token_norms(patches).numpy()))] = -torch.inf  # sinks excite all they can
        top.add(patches, [number])
    rows = []
    for channel in np.argsort(-top.activation.min(axis=1))[:n_channels]:
        made = maximise_activation(vit, level, int(channel), n_steps=48)
        row = [Panel(made.pixels, f"made: {made.before:.1f} to {made.after:.1f}")]
        for rank in range(4):
            place = divmod(int(top.patch[channel, rank]), 14)
            row.append(
                Panel(
                    pixels_of(vit, kept[int(top.image[channel, rank])]),
                    f"{top.activation[channel, rank]:.1f}",
                    (place[0] * 16, place[1] * 16, 16, 16),
                )
            )
        rows.append(row)
    figure = panels(
        rows,
        f"What excites {n_channels} channels at level {level}",
        "Left: an image made by gradient ascent on the mean over patches. Right: the four of 100 "
        "photographs with the most excited patch (marked), patches of outlying norm left out.",
    )
    stored(figure, OWN / "excited.png")


# --- curves


def curves_command(arguments: argparse.Namespace) -> None:
    of_curves = arguments.relevance_precision or arguments.precision
    for model in MODELS:
        files = sorted(arguments.work.glob(f"robustness-{model}-{arguments.precision}-????.npz"))
        if files:
            draw_robustness(model, joined(files))
        plain = arguments.work / f"grouping-{model}-plain.npz"
        if plain.exists():
            draw_grouping(model, arguments.work)
        pieces = [
            dict(np.load(file)) for file in sorted(arguments.work.glob(f"relevance-{model}-{of_curves}-????.npz"))
        ]
        if pieces:
            draw_relevance_curves(model, pieces)


def line_of(name: str, x: Sequence[float], columns: Sequence[np.ndarray], dashed: bool = False) -> Curve:
    mean = np.array([np.nanmean(each) for each in columns])
    ends = np.array([mean_interval(np.asarray(each))[:2] for each in columns])
    return Curve(name, np.asarray(x, dtype=float), mean, ends[:, 0], ends[:, 1], dashed)


def draw_robustness(model: str, found: dict[str, np.ndarray]) -> None:
    asked = json.loads(str(found["probes"]))
    parts = {}
    for loss in ("black", "mean", "removed"):
        parts[f"lost: {loss}"] = []
        for selection in ("random", "salient", "non-salient"):
            places = [
                i for i, each in enumerate(asked) if (each.get("selection"), each.get("loss")) == (selection, loss)
            ]
            amounts = [0.0, *(asked[i]["amount"] for i in places)]
            columns = [found["intact_correct"], *(found["correct"][:, i] for i in places)]
            parts[f"lost: {loss}"].append(line_of(selection, amounts, [each.astype(float) for each in columns]))
    n = len(found["correct"])
    figure = curves(
        parts,
        f"Top-1 as patches are lost: {model}, {n} photographs",
        "share of patches lost",
        "top-1",
        "Bands: 95 %. Salient: highest class-token rollout. The same amounts for all.",
    )
    stored(figure, DOCS / f"robustness-{model}.png")
    layers = np.arange(found["drift"].shape[2])
    drift = {}
    for loss in ("mean", "removed"):
        drift[f"half lost: {loss}"] = [
            line_of(each["selection"], layers, found["drift"][:, i].T)
            for i, each in enumerate(asked)
            if each.get("amount") == 0.5 and each.get("loss") == loss
        ]
    drift["shuffled"] = [
        line_of(f"{each['cells']} x {each['cells']}", layers, found["drift"][:, i].T)
        for i, each in enumerate(asked)
        if "cells" in each
    ]
    figure = curves(
        drift,
        f"Drift of the tokens that are left: {model}",
        "after layer",
        "1 - cosine to intact",
        "Mean over patches, each against the same content in the intact image.",
    )
    stored(figure, DOCS / f"drift-{model}.png")


def draw_grouping(model: str, work: Path) -> None:
    held = {
        cells: dict(np.load(work / f"grouping-{model}-{cells}.npz"))["scores"]
        for cells in ("plain", 2, 7, 14)
        if (work / f"grouping-{model}-{cells}.npz").exists()
    }
    for radius, name in enumerate(("k-distance", "oracle")):
        parts = {
            score: [
                line_of(
                    "plain" if cells == "plain" else f"{cells} x {cells}",
                    np.arange(values.shape[2]),
                    values[:, radius, :, at].T,
                )
                for cells, values in held.items()
            ]
            for at, score in enumerate(SCORES)
        }
        first = {each: parts[each] for each in ("silhouette", "purity", "in_cluster", "in_object")}
        figure = curves(
            first,
            f"Grouping by layer: {model}, {name} radius, {len(held['plain'])} photographs",
            "after layer",
            "score",
            "Bands: 95 %. Plain, and with shuffled cells.",
        )
        stored(figure, DOCS / f"grouping-{model}-{name}.png")


def draw_relevance_curves(model: str, pieces: list[dict[str, np.ndarray]]) -> None:
    whole = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    parts = {
        kind: [
            line_of(method, np.linspace(0, 1, 11), whole[f"{method} {kind}"].T)
            for method in ("gradient", "lrp", "grad_sam", "raw", "rollout")
        ]
        + [line_of("random", np.linspace(0, 1, 11), whole[f"random {kind}"].T, dashed=True)]
        for kind in ("deletion", "insertion")
    }
    n = len(next(iter(whole.values())))
    figure = curves(
        parts,
        f"Which relevance to believe: {model}, {n:,} photographs",
        "share of patches",
        "probability of the label",
        "Deletion: the most relevant patches go first (lower is better). Insertion: they come first (higher).",
    )
    stored(figure, DOCS / f"relevance-curves-{model}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("photographs", "curves"))
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--precision", default="float32", help="of the passes that experiments/tokens.py made")
    parser.add_argument("--relevance-precision", help="of the curves of relevance, if it is another one")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "vitrail-neurons")
    ARGUMENTS = parser.parse_args()
    DOCS.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    {"photographs": photographs_command, "curves": curves_command}[ARGUMENTS.command](ARGUMENTS)
