"""The experiments behind docs/patterns.md, on real photographs and two ImageNet models; one command each.

    python experiments/patterns.py study  --model vit_tiny      the study itself, with what each stage took
    python experiments/patterns.py tables --model vit_tiny      coder against PCA, names by layer, clusters, dependence
    python experiments/patterns.py coders --model vit_tiny      other autoencoders against PCA on the same sample
    python experiments/patterns.py why    --model vit_tiny      why the heads that matter most matter (--heads STUDY)

`study` and `coders` keep what they have in --work and go on from there; `tables` and `why` read the finished study.
Models and photographs are looked for in --data; they come with no package.
"""

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from vitrail.data import open_images
from vitrail.figures.whole import draw_figures
from vitrail.heads.why import why_sentences, why_table
from vitrail.models.open import Vit, open_vit
from vitrail.patterns.coders import principal_axes, spread_share
from vitrail.patterns.maps import comparable_layers
from vitrail.patterns.model import MapSample, coder_shape, draw_held_out, draw_sample
from vitrail.patterns.names import NAMES
from vitrail.patterns.tables import all_patterns, pattern_clusters
from vitrail.study import run
from vitrail.study.patterns import Passes
from vitrail.study.progress import Progress
from vitrail.study.store import open_study, read_manifest, read_plan

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"vit_tiny": "vit_tiny_patch16_224", "deit_tiny": "deit_tiny_patch16_224"}


def opened(name: str, data: Path) -> Vit:
    return open_vit(f"timm:{MODELS[name]}", weights=data / f"models/{MODELS[name]}.safetensors")


def photographs(args: argparse.Namespace) -> object:
    """The whole folder, or some of it spread evenly over the classes."""
    folder = args.data / "imagenet-sample"
    if not args.images:
        return folder
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [paths[at] for at in np.linspace(0, len(paths) - 1, args.images).round().astype(int)]


# --- the study and its cost ------------------------------------------------------------------------------------------


class Stopwatch(Progress):
    """Says on standard output what each stage took; a run that was resumed times only its own stages."""

    began = time.perf_counter()

    def step(self, name: str) -> Callable[[int, int], None]:
        print(f"{time.perf_counter() - self.began:7.0f} s, {cpu_seconds():6.0f} s of processor: {name}", flush=True)
        return super().step(name)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def study(args: argparse.Namespace) -> None:
    run.Progress = Stopwatch  # type: ignore[misc]
    vit = opened(args.model, args.data)
    found = run.run_study(vit, photographs(args), out=args.work / args.model, measures="patterns")
    print(f"{time.perf_counter() - Stopwatch.began:7.0f} s, {cpu_seconds():6.0f} s of processor: done")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{found.sizes['image']} photographs, {torch.get_num_threads()} threads, {peak:.1f} GiB at the peak")


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(args: argparse.Namespace) -> None:
    found = open_study(args.work / args.model)
    about = found.attrs["patterns"]
    print("| patterns | maps learned from | held out | autoencoder | PCA | used | clusters | in none |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in ("patch", "cls"):
        told = about[kind]
        none = float((found[f"pattern_{kind}_cluster"] < 0).mean())
        print(
            f"| {kind} | {told['n_train']:,} | {told['n_held']:,} | {told['autoencoder_error']:.4f} | "
            f"{told['pca_error']:.4f} | {told['method']} | {told['n_clusters']} | {none:.0%} |"
        )
    _names(found)
    _clusters(found)
    for path in draw_figures(found, args.work / f"{args.model}-figures", only=["patterns"]):
        print(path)


def _names(found: xr.Dataset) -> None:
    patterns = all_patterns(found)
    print("\n| layer | heads: name (image dependence) | maps by name |\n|---|---|---|")
    for layer in range(found.sizes["layer"]):
        mine = [each for each in patterns if each.layer == layer]
        heads = ", ".join(f"{each.naming.label} ({each.image_dependence:.2f})" for each in mine)
        share = dict.fromkeys(NAMES, 0.0)
        for each in mine:
            for name, part in ((each.naming.name, each.share), *each.others):
                share[name] += part / len(mine)
        maps = ", ".join(f"{name} {part:.0%}" for name, part in share.items() if part >= 0.005)
        print(f"| {layer} | {heads} | {maps} |")


def _clusters(found: xr.Dataset) -> None:
    print("\n| cluster | maps | name | rule | heads |\n|---|---|---|---|---|")
    for each in pattern_clusters(found, 4):
        heads = ", ".join(f"L{layer}H{head} {share:.0%}" for layer, head, share in each.heads if share >= 0.05)
        print(f"| {each.number} | {each.size:,} | {each.naming.label} | {each.naming.rule} | {heads} |")


def why(args: argparse.Namespace) -> None:
    """Joins the patterns to a study of heads over the same photographs, where one is given."""
    found = open_study(args.work / args.model)
    if args.heads:
        heads = open_study(args.heads)
        assert heads["image"].equals(found["image"]), "the two studies are not of the same photographs"
        found = heads.assign(
            {name: found[name] for name in found if str(name).startswith("pattern_") or name == "image_dependence"}
        ).assign_attrs(patterns=found.attrs["patterns"])
    table = why_table(found)
    order = np.argsort(table["rank"].to_numpy(), axis=None)[: args.top]
    for at in order:
        layer, head = np.unravel_index(at, table["rank"].shape)
        print("\n".join(why_sentences(found, int(layer), int(head), table=table)), end="\n\n")


# --- other autoencoders ----------------------------------------------------------------------------------------------


def coders(args: argparse.Namespace) -> None:
    """PCA, and a convolutional autoencoder from a random start; held-out errors as shares of variance."""
    train, test, images = _sample(args)
    mean = torch.stack([piece.sum(0, dtype=torch.float64) for piece in train.split(256)]).sum(0).div(len(train)).float()
    axes = principal_axes(train, mean, 384)
    spread = _squares(test, lambda x: x - mean)
    rests = []
    for n_axes in (128, 384):
        rests.append(_squares(test, lambda x, v=axes[:, :n_axes]: (x - mean) - (x - mean) @ v @ v.T))
        print(f"PCA, {n_axes} components: {_share(rests[-1], spread, images)}", flush=True)
    rest = _convolutional(args, train, test, mean, spread)
    print(f"convolutional, {args.epochs} epochs: {_share(rest, spread, images)}", flush=True)
    print(f"more than PCA, 128 components: {_share(rest - rests[0], spread, images)}", flush=True)


def _share(rest: Tensor, spread: Tensor, images: np.ndarray) -> str:
    """Of the held-out maps' variance, with a 95 % interval over their images."""
    interval = spread_share(rest.numpy(), spread.numpy(), images)
    return f"{float(rest.sum() / spread.sum()):.4f} [{float(interval.low):.4f}, {float(interval.high):.4f}]"


def _sample(args: argparse.Namespace) -> tuple[Tensor, Tensor, np.ndarray]:
    """The study's own sample of patch blocks, filled by one pass and kept; and the image of each map held out."""
    folder, kept = args.work / args.model, args.work / f"{args.model}-sample.npy"
    plan, manifest = read_plan(folder), read_manifest(folder)
    vit = opened(args.model, args.data)
    ground = comparable_layers(vit)
    sample = MapSample(
        coder_shape("patch", ground), draw_sample("patch", ground, plan.n_heads, plan.n_images, plan.seed)
    )
    if kept.is_file():
        sample.x = torch.from_numpy(np.load(kept, allow_pickle=False))
    else:
        source = open_images(photographs(args), class_names=vit.class_names)
        with Progress(True) as shown:
            Passes(vit, source, manifest, plan, ground).run([sample.add], shown.step("sampling patterns"))
        np.save(kept, sample.x.numpy())
    clip = float(np.quantile(sample.x.flatten()[::97].float().numpy(), 0.999))
    held = torch.as_tensor(draw_held_out(plan.n_images, plan.seed)[sample.image])
    return sample.x[~held].clamp(max=clip), sample.x[held].clamp(max=clip), sample.image[held.numpy()]


def _squares(sample: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Of each map."""
    with torch.no_grad():
        return torch.cat([of(piece.float()).square().sum(1, dtype=torch.float64) for piece in sample.split(256)])


def convolutional() -> nn.Sequential:
    """For 14 x 14 patches: convolutions of stride 2 over the grid of queries, whose channels are the keys."""
    n_keys, narrow, wide = 196, 128, 256
    return nn.Sequential(
        nn.Conv2d(n_keys, narrow, 1), nn.GELU(), nn.Conv2d(narrow, narrow, 3, 2, 1), nn.GELU(),
        nn.Conv2d(narrow, wide, 3, 2, 1), nn.GELU(), nn.Flatten(), nn.Linear(wide * 16, 128),
        nn.Linear(128, wide * 16), nn.GELU(), nn.Unflatten(1, (wide, 4, 4)),
        nn.ConvTranspose2d(wide, narrow, 3, 2, 1), nn.GELU(), nn.ConvTranspose2d(narrow, narrow, 3, 2, 1, 1),
        nn.GELU(), nn.Conv2d(narrow, n_keys, 1),
    )  # fmt: skip


def _convolutional(args: argparse.Namespace, train: Tensor, test: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """What it loses of each map held out."""
    torch.manual_seed(0)
    net, kept = convolutional(), args.work / f"{args.model}-convolutional.npy"
    if kept.is_file():
        return torch.from_numpy(np.load(kept, allow_pickle=False))
    scale = float(_squares(train, lambda x: x - mean).sum() / train.numel()) ** 0.5
    per_epoch = len(train) // 64
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.epochs * per_epoch)

    def through(x: Tensor) -> Tensor:
        blocks = ((x - mean) / scale).view(-1, 14, 14, 196).permute(0, 3, 1, 2)
        return net(blocks).permute(0, 2, 3, 1).reshape(len(x), -1) * scale + mean

    for epoch in range(args.epochs):  # a fresh start each time: a stopped run of a few minutes is begun again
        for chosen in torch.randperm(len(train)).split(64)[:per_epoch]:
            x = train[chosen].float()
            loss = ((through(x) - x) / scale).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        rest = _squares(test, lambda x: x - through(x))
        error = float(rest.sum() / spread.sum())
        print(f"  epoch {epoch + 1}: {error:.4f}, {cpu_seconds():.0f} s of processor", flush=True)
    np.save(kept, rest.numpy())
    return rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("study", "tables", "coders", "why"))
    parser.add_argument("--model", choices=tuple(MODELS), default="vit_tiny")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--work", type=Path, default=ROOT / ".build/patterns")
    parser.add_argument("--heads", type=Path, help="a study of heads over the same photographs")
    parser.add_argument("--images", type=int, help="so many photographs, evenly spread over the classes")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--top", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    {"study": study, "tables": tables, "coders": coders, "why": why}[args.what](args)


if __name__ == "__main__":
    main()
