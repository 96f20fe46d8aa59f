"""Does the patch of another photograph that is most like one of an object lie on an object of the same category?

    python experiments/matches.py [--data ../shared/data]        # docs/tokens/matches.md

For each object of the photographs with masks the patch nearest to its centre is searched in every other photograph that
holds its category. Beside the share of hits: what a patch drawn at random would hit, and what the patch at the same
place hits. Means over photographs with 95 % intervals, layer by layer.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from tokens import DOCS, MODELS, ROOT, interval, masked_photographs, opened, row
from vitrail import open_vit
from vitrail.models.objects import in_view, patch_objects
from vitrail.tokens.levels import read_levels

SMALL = "vit_small_patch14"


def directions(vit, data: Path):
    """Of each photograph the unit tokens [level patch channel] and the category of each patch, "" for none."""
    prefix = vit.anatomy.blocks[0].prefix
    for image, ids, categories, _ in masked_photographs(data):
        owner = patch_objects(in_view(ids, vit.preprocessing), vit.anatomy.grid)
        levels = torch.stack(read_levels(vit.tap(), vit.prepare([image])).tokens[1:])[:, 0, prefix:].float()
        names = np.array([categories.get(int(each), "") for each in owner])
        yield torch.nn.functional.normalize(levels, dim=-1), owner, names


def central_patches(owner: np.ndarray, grid: tuple[int, int]) -> list[int]:
    """Of each object its patch that lies nearest to the object's centre."""
    places = np.stack(np.unravel_index(np.arange(len(owner)), grid), 1)
    found = []
    for each in sorted(set(owner.tolist()) - {0}):
        own = np.flatnonzero(owner == each)
        distance = np.linalg.norm(places[own] - places[own].mean(0), axis=1)
        found.append(int(own[distance.argmin()]))
    return found


def hits(vit, data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Shares of hits [photograph level], of random patches and of the same place [photograph], and pairs in all."""
    photographs = list(directions(vit, data))
    matched, random, same, n_pairs = [], [], [], 0
    for i, (tokens, owner, names) in enumerate(photographs):
        pairs = [
            (query, j)
            for query in central_patches(owner, vit.anatomy.grid)
            for j, (_, _, others) in enumerate(photographs)
            if j != i and names[query] in others
        ]
        if not pairs:
            continue
        best = [torch.einsum("lc,lpc->lp", tokens[:, query], photographs[j][0]).argmax(1).numpy() for query, j in pairs]
        matched.append(
            np.mean([photographs[j][2][at] == names[query] for (query, j), at in zip(pairs, best, strict=True)], 0)
        )
        random.append(np.mean([np.mean(photographs[j][2] == names[query]) for query, j in pairs]))
        same.append(np.mean([photographs[j][2][query] == names[query] for query, j in pairs]))
        n_pairs += len(pairs)
    return np.array(matched), np.array(random), np.array(same), n_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with models/ and coco-masks/"
    )
    arguments = parser.parse_args()
    lines = ["# Matches: the most similar patch of another photograph, and the category it lies on", ""]
    for model in (*MODELS, SMALL):
        small = model == SMALL
        vit = open_vit(arguments.data / "models" / model, image_size=224) if small else opened(arguments.data, model)
        matched, random, same, n_pairs = hits(vit, arguments.data)
        best = int(matched.mean(0).argmax())
        lines += [
            f"## {model}",
            "",
            f"{n_pairs:,} searches from objects of {len(matched)} photographs. At random: {interval(random)}; at the "
            f"same place: {interval(same)}. Best after L{best} (chosen on these photographs): "
            f"{interval(matched[:, best])}, ahead of the same place by {interval(matched[:, best] - same)}.",
            "",
            row(["after", *(f"L{layer}" for layer in range(matched.shape[1]))]),
            row(["---"] * (matched.shape[1] + 1)),
            row(["hits", *(f"{share:.2f}" for share in matched.mean(0))]),
            "",
        ]
        print(*lines[-7:], sep="\n", flush=True)
    (DOCS / "matches.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
