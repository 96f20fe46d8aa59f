"""Which patches of other images are most like a chosen one: a search through a folder, in bounded memory.

Patch tokens of a ViT as dense descriptors, after Amir et al. 2021 (arXiv 2112.05814). Two controls come with it, both
ours: how well other patches of the same photograph are matched, and how often the match merely lies at the same place.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
import xarray as xr
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitrail.arguments import whole_number, whole_numbers
from vitrail.contract.outlook import require_finite
from vitrail.data import ImageEntry, ImageSource, Manifest, PhotographLike, image_digest, load_image
from vitrail.errors import Unsupported, UsageError
from vitrail.grid import sides_in_patches
from vitrail.models.open import Vit, require_vit
from vitrail.stats import mean_interval
from vitrail.tap.modes import plain_modes
from vitrail.tap.tap import Readers
from vitrail.tokens.levels import layers_of_own_grid
from vitrail.tokens.token_index import TokenIndex

__all__ = ["match_findings", "match_patches"]

BATCH = 8
SHOWN_FROM = 0.9
"""Quantile of the cosines of the photograph and its best images, from which on a figure colours a patch: the few that
are alike."""


class _Candidate(NamedTuple):
    """An image to search: the digest of what the model sees of it, and the tokens of its patches."""

    entry: ImageEntry
    view_digest: str
    keys: Float[Tensor, "patch feature"]


class _Match(NamedTuple):
    """An image among the best; of equals the first in the folder is the better."""

    cosine: float
    minus_index: int
    entry: ImageEntry
    likeness: Float[np.ndarray, "patch"]


@plain_modes()
def match_patches(
    vit: Vit,
    photo: PhotographLike,
    source: ImageSource,
    manifest: Manifest,
    patch: Iterable[SupportsIndex],
    *,
    layer: SupportsIndex | None = None,
    n_matches: SupportsIndex = 11,
    index: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Finds the patches of a folder's images whose tokens are most like that of one patch of a photograph.

    The photograph itself, if it lies in the folder, is left out. Only the best images are held in memory.

    Args:
        vit: The model; the tokens of `layer` lie on a grid.
        photo: A photograph, as `vitrail.data.as_photograph` takes it.
        source: Images to search, from `vitrail.open_images`.
        manifest: The scan of `source`.
        patch: Row and column on the layer's grid, counted from 0.
        layer: Whose output is compared; None: the last that returns its patches on a grid.
        n_matches: How many images are kept whole, the best ones.
        index: A folder that keeps the tokens of the images (`vitrail.tokens.token_index`), new or of an earlier search
            with this model, layer and preprocessing: the model is run over images alone that it does not hold yet.
            None: over all, and nothing is kept.
        progress: Called with the images done and their number.

    Returns:
        `cosine` and `place` [image]: the largest cosine similarity of a patch of each image to the chosen one, -1 to
        1, and which patch it is, in raster order; `cosine_others` [image]: the same of the photograph's other patches
        in place of the chosen one, their mean. Of the best images in falling order `match_view` [match row column
        colour], `match_likeness` [match patch], cosine of each patch, and `match_place` [match], the most similar one;
        of the photograph `view` and `likeness`. In `attrs` also `view_in_patches`, how many patches long the sides
        of what the model sees are, and `shown_from`: the cosine from which on a figure colours a patch, nine tenths of
        all those kept lie below.

    Raises:
        UsageError: There is no such layer or patch, no match is to be kept, no image is left to search, or the index
            is of other tokens or no index.
        DataError: An image is not what was scanned, or the index is damaged.
        Unsupported: The layer returns no token for each patch of a grid.
        ModelError: The answer or the tokens of an image are not finite (NaN or infinite).

    Example:
        >>> source = vitrail.open_images("photos")  # doctest: +SKIP
        >>> matches = match_patches(vit, photo, source, vitrail.data.scan(source), patch=(3, 4))  # doctest: +SKIP
        >>> matches["cosine"].sortby("cosine", ascending=False)[:5]  # doctest: +SKIP
    """
    require_vit(vit)
    patch, n_matches = whole_numbers("The patch", patch, 2), whole_number("n_matches", n_matches)
    if n_matches < 1:
        raise UsageError(f"{n_matches} matches cannot be kept; give 1 or more.")
    layer = _layer(vit, None if layer is None else whole_number("layer", layer))
    grid = vit.anatomy.blocks[layer].grid
    assert grid is not None
    if not all(0 <= at < n for at, n in zip(patch, grid, strict=True)):
        raise UsageError(
            f"There is no patch {patch[0]},{patch[1]}: L{layer} has {grid[0]} rows and {grid[1]} columns of patches, "
            "counted from 0."
        )
    view = vit.view(photo)
    chosen, digest = patch[0] * grid[1] + patch[1], image_digest(view)
    queries = _directions(vit, [view], ["the photograph"], layer)[0]
    others = np.arange(len(queries)) != chosen
    if index is None:
        candidates = _read_candidates(vit, source, manifest, layer, progress)
    else:
        candidates = _indexed_candidates(vit, source, manifest, layer, index, progress)
    ids: list[str] = []
    columns: list[tuple[float, int, float]] = []
    best: list[_Match] = []
    for candidate in candidates:
        if candidate.view_digest == digest:
            continue
        cosines = (queries @ candidate.keys.to(queries).T).cpu().numpy()
        likeness = cosines[chosen]
        match = _Match(float(likeness.max()), -len(ids), candidate.entry, likeness)
        ids.append(candidate.entry.id)
        columns.append((match.cosine, int(likeness.argmax()), cosines[others].max(1).mean()))
        (heapq.heappush if len(best) < n_matches else heapq.heappushpop)(best, match)
    if not ids:
        raise UsageError("There is no image to search besides the photograph itself: give a folder of others.")
    best.sort(reverse=True)
    cosine, at, cosine_others = zip(*columns, strict=True)
    likeness = (queries @ queries[chosen]).cpu().numpy()
    match_likeness = np.stack([each.likeness for each in best])
    match_views = [np.asarray(vit.view(load_image(source, each.entry))) for each in best]
    return xr.Dataset(
        {
            "cosine": ("image", np.array(cosine, np.float32)),
            "place": ("image", np.array(at, np.int32)),
            "cosine_others": ("image", np.array(cosine_others, np.float32)),
            "match_view": (("match", "row", "column", "colour"), np.stack(match_views)),
            "match_likeness": (("match", "patch"), match_likeness),
            "match_place": ("match", match_likeness.argmax(1).astype(np.int32)),
            "view": (("row", "column", "colour"), np.asarray(view)),
            "likeness": ("patch", likeness),
        },
        coords={"image": ids, "match": [each.entry.id for each in best]},
        attrs={
            "name": vit.name,
            "layer": layer,
            "grid": list(grid),
            "view_in_patches": list(sides_in_patches(vit.image_size, grid, vit.anatomy.blocks[layer].patch_step)),
            "patch": list(patch),
            "shown_from": float(np.quantile(np.concatenate([likeness[None], match_likeness]), SHOWN_FROM)),
        },
    )


def _read_candidates(
    vit: Vit, source: ImageSource, manifest: Manifest, layer: int, progress: Callable[[int, int], None] | None
) -> Iterator[_Candidate]:
    """Runs the model over all images."""
    for start in range(0, len(manifest.images), BATCH):
        entries = manifest.images[start : start + BATCH]
        views = [vit.view(load_image(source, entry)) for entry in entries]
        directions = _directions(vit, views, [entry.id for entry in entries], layer)
        yield from map(_Candidate, entries, map(image_digest, views), directions)
        if progress is not None:
            progress(start + len(entries), len(manifest.images))


def _indexed_candidates(
    vit: Vit,
    source: ImageSource,
    manifest: Manifest,
    layer: int,
    folder: str | Path,
    progress: Callable[[int, int], None] | None,
) -> Iterator[_Candidate]:
    """Reads tokens from disk, after those that are missing there were added."""
    index = TokenIndex(folder, vit, layer, partial(_directions, vit, layer=layer), BATCH)
    index.add(source, manifest.images, progress)
    for entry in manifest.images:
        # a copy: the map is read-only, and its part may be unmapped
        yield _Candidate(entry, index.view_digest(entry), torch.from_numpy(np.array(index.tokens(entry))))


def match_findings(matches: xr.Dataset) -> list[str]:
    """What a search found, against both controls.

    Args:
        matches: From `match_patches`.

    Returns:
        Sentences with numbers.
    """
    (row, column), (n_rows, n_columns) = matches.attrs["patch"], matches.attrs["grid"]
    n_images, cosine = matches.sizes["image"], matches["cosine"].to_numpy().astype(np.float64)
    places = matches["place"].to_numpy()
    order = np.argsort(-cosine, kind="stable")[:3]
    nearest = "; ".join(
        f"patch {places[i] // n_columns},{places[i] % n_columns} of {matches['image'].values[i]} ({cosine[i]:.2f})"
        for i in order
    )
    sentences = [f"Most like patch {row},{column} after L{matches.attrs['layer']}, by cosine similarity: {nearest}."]
    ahead = cosine - matches["cosine_others"].to_numpy()
    low, high, reason = mean_interval(ahead)
    interval = f"{reason}" if reason else f"95 % interval {float(low):+.3f} to {float(high):+.3f}"
    sentences.append(
        f"The best patch of an image reaches {cosine.mean():.3f}, mean over {n_images} images; for the photograph's "
        f"other patches {matches['cosine_others'].mean():.3f}: a difference of {ahead.mean():+.3f} ({interval})."
    )
    same = int((places == row * n_columns + column).sum())
    sentences.append(
        f"In {same} of {n_images} images it lies at the same place; {n_images / (n_rows * n_columns):.1f} would by "
        "chance. Many more mean that the token tells where it lies rather than what it shows."
    )
    return sentences


def _layer(vit: Vit, layer: int | None) -> int:
    on_grid = sorted(layers_of_own_grid(vit))
    if layer is None and on_grid:
        return on_grid[-1]
    if layer is not None and not 0 <= layer < vit.n_layers:
        raise UsageError(f"There is no layer {layer}: {vit.name} has layers 0 to {vit.n_layers - 1}.")
    if layer not in on_grid:
        where = "in no layer" if not on_grid else f"in {', '.join(f'L{each}' for each in on_grid)} only"
        raise Unsupported(f"Patches are matched by their tokens, and those of {vit.name} lie on a grid {where}.")
    return layer


def _directions(
    vit: Vit, views: Sequence[Image.Image], names: Sequence[str], layer: int
) -> Float[Tensor, "image patch channel"]:
    """The tokens of patches after a layer, each of length 1."""
    block = vit.anatomy.blocks[layer]
    outputs: list[Tensor] = []

    def read(at: int, tokens: Tensor) -> None:
        if at == layer:
            outputs.append(tokens)

    with torch.no_grad():
        logits = vit.tap().read(vit.prepare_views(views), Readers(output=read))
    require_finite(vit.name, logits, names)
    tokens = outputs[0][:, block.prefix :].float()
    require_finite(vit.name, tokens, names, f"What L{layer} of {vit.name} returns for")
    return F.normalize(tokens, dim=-1)
