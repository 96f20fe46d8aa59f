"""The experiments behind docs/patches.md, on real photographs and two ImageNet models; one command each.

    python experiments/patches.py windows  --model vit_tiny            accuracy under windows and their controls
    python experiments/patches.py head_windows --model vit_tiny        the rule that is offered, on the same photographs
    python experiments/patches.py variants --model vit_tiny            adaptive areas, other indicators, boxes per head
    python experiments/patches.py sinks    --model vit_tiny            windows that need not stretch to hold sinks
    python experiments/patches.py referee  --model vit_tiny            which indicator agrees with causal removal
    python experiments/patches.py removal  --model vit_tiny            dropping hubs, random and other patches
    python experiments/patches.py overlap  --model vit_tiny            hubs against norms, sinks, detail, objects
    python experiments/patches.py field    --model vit_tiny            tendencies and distances with their nulls
    python experiments/patches.py speed    --model vit_tiny            the cost of the collector

    python experiments/patches.py curves                               figures of the first and of removal, both models
    python experiments/patches.py pictures                             figures on scikit-image's photographs

Each prints a markdown table, and with --write puts it into docs/patches. What takes long writes what it has after every
batch to --cache and goes on from there; --held makes tables of what is there, and runs nothing.
Models and photographs are looked for in --data; they come with no package.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from patches_common import MODELS, OTHER_MODELS, ROOT, Batch, Photographs, interval, opened, parts, table
from patches_figures import curves_experiment, pictures_experiment
from patches_removal import (
    DROPPED,
    dropped_logits,
    field_experiment,
    orders,
    overlap_experiment,
    removal_experiment,
    tokens_at,
)
from patches_windows import head_windows_experiment, sinks_experiment, variants_experiment, windows_experiment
from torch import Tensor

from vitrail.analysis import analyses, make_collectors
from vitrail.patches.interaction import INDICATORS
from vitrail.stats import spearman
from vitrail.tap.attention import Readers
from vitrail.tap.edits import Edit
from vitrail.tap.tap import Replay

# --- the causal referee ----------------------------------------------------------------------------------------------

EFFECTS = ("pair: token", "pair: class token", "pair: p", "key: class token", "key: p")
REFEREE_LAYERS = (0, 2, 4, 6, 8, 10)
N_PAIRS = 8
"""Pairs, and keys, whose effect on the answer is measured per image and layer."""


def referee_experiment(options: argparse.Namespace) -> str:
    """Rank agreement of each indicator with what masking really changes; float32, for the changes are small."""
    photographs = Photographs(options.data, options.images)

    def part(start: int) -> dict[str, np.ndarray]:
        vit = opened(options.model, options.data, "float32")
        batch = Batch(vit, *photographs.batch(vit, start, options.batch), seed=start)
        return {"spearman": np.stack([_agreement(batch, layer) for layer in REFEREE_LAYERS], 1)}

    by_image = parts(options, part)["spearman"].mean(1)  # image indicator effect
    title = f"{MODELS[options.model]}, {len(by_image)} photographs, layers {REFEREE_LAYERS}; Spearman, mean [95 %]\n\n"
    rows = [[name, *map(_signless, by_image[:, index].T)] for index, name in enumerate(INDICATORS)]
    ahead = by_image[:, INDICATORS.index("removal")] - by_image[:, INDICATORS.index("mean")]
    rows.append(["removal ahead of mean", *map(_signless, ahead.T)])
    return title + table(["indicator", *EFFECTS], rows)


def _signless(values: np.ndarray) -> str:
    mean, low, high = interval(values / 100)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _agreement(batch: Batch, layer: int) -> np.ndarray:
    """Spearman correlations [image indicator effect] of one layer."""
    replay, logits = batch.vit.tap().record(batch.images)
    effects = _effects(batch, layer, replay, logits)
    found = np.empty((len(batch.images), len(INDICATORS), len(EFFECTS)))
    for index, name in enumerate(INDICATORS):
        matrix = batch.indicators(name)[layer]
        for image in range(len(matrix)):
            for column, (effect, (query, key)) in enumerate(effects):
                strength = (
                    matrix[image].sum(0)[key[image]] if query is None else matrix[image][query[image], key[image]]
                )
                found[image, index, column] = spearman(strength.numpy(), effect[image].numpy())
    return found


Effect = tuple[Tensor, tuple[Tensor | None, Tensor]]
"""What changed, and which query and key were parted (no query: all of them); [image pair] each."""


def _effects(batch: Batch, layer: int, replay: Replay, logits: Tensor) -> list[Effect]:
    n_images, n_patches = len(batch.images), batch.grid[0] * batch.grid[1]
    draw = functools.partial(torch.randint, generator=batch.generator)
    everyone = torch.arange(n_patches).expand(n_images, -1)
    other = (everyone + draw(1, n_patches, (n_images, n_patches))) % n_patches
    query = draw(0, n_patches, (n_images, N_PAIRS))
    key = (query + draw(1, n_patches, (n_images, N_PAIRS))) % n_patches
    own = _token_change(batch, layer, replay, other)
    pair_class, pair_p = _answer_change(batch, layer, replay, logits, query, key)
    key_class, key_p = _answer_change(batch, layer, replay, logits, None, key)
    return [
        (own, (everyone, other)), (pair_class, (query, key)), (pair_p, (query, key)),
        (key_class, (None, key)), (key_p, (None, key)),
    ]  # fmt: skip


def _token_change(batch: Batch, layer: int, replay: Replay, key: Tensor) -> Tensor:
    """How far each patch's token moves, relative to its length, if it cannot see one key of its own; [image patch]."""
    bias = torch.zeros((len(key), 1, *batch.weights(layer).shape[-2:]))
    bias[:, 0, batch.prefix :, batch.prefix :].scatter_(-1, key[..., None], -torch.inf)
    seen: list[Tensor] = []
    keep = Readers(residual=lambda at, tokens: seen.append(tokens.clone()) if at == layer else None)
    batch.vit.tap().run_from(layer, replay, [Edit(layer, bias=bias, copy=1)], 2, keep, until_residual=True)
    before, after = seen[0][:, batch.prefix :].unflatten(0, (2, -1))
    return (after - before).norm(dim=-1) / before.norm(dim=-1)


def _answer_change(
    batch: Batch, layer: int, replay: Replay, logits: Tensor, query: Tensor | None, key: Tensor
) -> tuple[Tensor, Tensor]:
    """Relative change of the last class token, and |change| of p(own answer), for each pair; [image pair]."""
    copies = key.shape[1]
    edits = []
    for copy in range(copies):
        bias = torch.zeros((len(key), 1, *batch.weights(layer).shape[-2:]))
        image = torch.arange(len(key))
        row = slice(None) if query is None else batch.prefix + query[:, copy]
        bias[image, 0, row, batch.prefix + key[:, copy]] = -torch.inf
        edits.append(Edit(layer, bias=bias, copy=copy))
    last: list[Tensor] = []
    keep = Readers(output=lambda at, tokens: last.append(tokens[:, 0].clone()) if at == batch.n_layers - 1 else None)
    tap = batch.vit.tap()
    changed = tap.run_from(layer, replay, edits, copies, keep).unflatten(0, (copies, -1))
    tap.run_from(batch.n_layers - 1, replay, readers=keep)
    after, before = last[0].unflatten(0, (copies, -1)), last[1]
    answer = logits.argmax(-1)
    p = [each.softmax(-1)[..., torch.arange(len(key)), answer] for each in (changed, logits)]
    return ((after - before).norm(dim=-1) / before.norm(dim=-1)).T, (p[0] - p[1]).abs().T


# --- speed -----------------------------------------------------------------------------------------------------------


def speed_experiment(options: argparse.Namespace) -> str:
    """Processor time of the collectors over the plain pass, interleaved."""
    vit = opened(options.model, options.data, "float32")
    n_images = min(16, options.batch)
    images, labels = Photographs(options.data, n_images).batch(vit, 0, n_images)
    tap = vit.tap()

    def collected(names: Sequence[str]) -> Callable[[], Any]:
        def run() -> None:
            (collector,) = make_collectors(vit, names)
            replay, logits = tap.record(images, collector.readers())
            collector.finish(tap, replay, logits, labels.numpy())

        return run

    runs: dict[str, Callable[[], Any]] = {"plain pass": lambda: tap.record(images)}
    runs["attention weights alone"] = lambda: tap.record(images, Readers(attention=lambda seen: seen.weights()))
    runs |= {name: collected([name]) for name in analyses()["patches"].measure_names} | {
        "all of the room": collected(analyses()["patches"].measure_names)
    }
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(7):
        for name, run in runs.items():
            began = time.process_time()
            run()
            spent[name].append(time.process_time() - began)
    plain = np.array(spent["plain pass"])
    rows = [
        [name, f"{min(took) / n_images * 1000:.1f}", f"{min(took) / plain.min():.2f}", f"{np.median(took / plain):.2f}"]
        for name, took in spent.items()
    ]
    name = (MODELS | OTHER_MODELS)[options.model]
    rooms = table([name, "ms an image", "ratio, best", "ratio, median of paired"], rows)
    if options.model in OTHER_MODELS:
        return rooms
    return f"{rooms}\n\nThe pass that follows when tokens are really dropped:\n\n{_dropping_cost(options)}"


def _dropping_cost(options: argparse.Namespace) -> str:
    """Processor time of the pass with tokens dropped over that with all, interleaved."""
    vit = opened(options.model, options.data, "float32")
    batch = Batch(vit, *Photographs(options.data, 16).batch(vit, 0, 16), seed=0)
    order = orders(batch)["random"]
    cases = [(0, 0), *((start, count) for start in DROPPED for count in (40, 60, 100, 140))]
    spent: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for _ in range(7):
        for start, count in cases:
            began = time.process_time()
            dropped_logits(batch, tokens_at(batch, start), order, count, start)
            spent[start, count].append(time.process_time() - began)
    whole = np.array(spent[0, 0])
    rows = [
        [f"L{start}", str(count), f"{min(took) / 16 * 1000:.1f}", f"{np.median(took / whole):.2f}"]
        for (start, count), took in spent.items()
    ]
    return table(["before", "tokens dropped", "ms an image", "ratio, median of paired"], rows)


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], str]] = {
    "windows": windows_experiment,
    "head_windows": head_windows_experiment,
    "variants": variants_experiment,
    "sinks": sinks_experiment,
    "referee": referee_experiment,
    "removal": removal_experiment,
    "overlap": overlap_experiment,
    "field": field_experiment,
    "speed": speed_experiment,
    "curves": curves_experiment,
    "pictures": pictures_experiment,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--model", choices=(*MODELS, *OTHER_MODELS), default="vit_tiny")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--cache", type=Path, default=ROOT / ".build/patches")
    parser.add_argument("--held", action="store_true", help="tables of the parts that are held; nothing new is run")
    parser.add_argument("--write", action="store_true", help="write the table to docs/patches, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        text = EXPERIMENTS[options.experiment](options)
    print(text)
    if options.write:
        command = f"python experiments/patches.py {options.experiment} --model {options.model}"
        command += "" if options.experiment == "speed" else f" --images {options.images}"
        command += "" if options.batch == parser.get_default("batch") else f" --batch {options.batch}"
        file = ROOT / f"docs/patches/{options.experiment}-{options.model}.md"
        file.write_text(f"    {command} --write\n\n{text}\n")


if __name__ == "__main__":
    main()
