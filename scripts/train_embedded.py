"""Train the embedded default: a small vision transformer that tells from which photograph a crop was cut.

    python scripts/train_embedded.py [--steps 800] [--threads 1] [--out src/vitrail/embedded]

Crops and the split come from `vitrail.photos`; nothing is downloaded. One CPU core needs six minutes. The result is
a folder that timm opens itself, `timm.create_model("local-dir:src/vitrail/embedded", pretrained=True)`. At the end the
script prints the accuracy on both sides of the split and what each attention head is worth: the points of held-out
accuracy lost when that head alone is silenced.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

from vitrail.photos import CLASS_NAMES, CROP_PX, held_out_crops, training_crop

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {
    "img_size": CROP_PX,
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
    "mlp_ratio": 2.0,
}
MEAN = STD = (0.5, 0.5, 0.5)
TRAINING_SHARES = (0.16, 0.31)
"""Sides of the training crops relative to the photograph's shorter side: a little wider than the held-out crops'."""

BATCH_SIZE = 96
PEAK_LEARNING_RATE = 1e-3
WARM_UP_STEPS = 100
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
EMA_DECAY = 0.99
GREY_SHARE = 0.3
ERASED_SHARE = 0.25
N_EVALUATED = 40 * len(CLASS_NAMES)

console = Console()


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(options.seed)
    model = train(options.steps, rng)
    save(model, options.out)
    report(model, rng)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="other than 1: rounding, and so the weights, differ")
    parser.add_argument("--out", type=Path, default=Path("src/vitrail/embedded"))
    return parser.parse_args()


def train(steps: int, rng: np.random.Generator) -> nn.Module:
    """Train from scratch; returns the moving average of the weights, in evaluation mode."""
    model = timm.create_model(ARCHITECTURE, num_classes=len(CLASS_NAMES), **MODEL_ARGS)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_then_cosine(steps))
    criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    for _ in track(range(steps), description="training", console=console):
        crops, labels = training_batch(rng)
        loss = criterion(model(augmented(crops)), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        follow(average, model)
    return average


def training_batch(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random crops, (BATCH_SIZE, 3, 64, 64) in 0..1, and their labels, (BATCH_SIZE,)."""
    labels = rng.integers(len(CLASS_NAMES), size=BATCH_SIZE)
    crops = np.stack([np.asarray(training_crop(rng, int(label), TRAINING_SHARES)) for label in labels])
    return as_pixels(crops), torch.from_numpy(labels)


def as_pixels(crops: np.ndarray) -> Tensor:
    """Crops of bytes, (n, 64, 64, 3), as channels first in 0..1."""
    return torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255


def augmented(crops: Tensor) -> Tensor:
    """Random flips, brightness, contrast, saturation, loss of colour and one erased rectangle; normalised."""
    n = len(crops)
    crops = torch.where(torch.rand(n, 1, 1, 1) < 0.5, crops.flip(3), crops)
    crops = crops * uniform(n, 0.6, 1.4)
    crops = (crops - crops.mean((1, 2, 3), keepdim=True)) * uniform(n, 0.6, 1.4) + crops.mean((1, 2, 3), keepdim=True)
    grey = crops.mean(1, keepdim=True)
    saturation = uniform(n, 0.3, 1.5) * (torch.rand(n, 1, 1, 1) >= GREY_SHARE)
    crops = (grey + (crops - grey) * saturation).clamp(0, 1)
    return erased(normalised(crops))


def uniform(n: int, low: float, high: float) -> Tensor:
    return torch.empty(n, 1, 1, 1).uniform_(low, high)


def erased(crops: Tensor) -> Tensor:
    """With probability ERASED_SHARE, one rectangle of 16 to 32 px a side is set to the mean colour."""
    for index in torch.nonzero(torch.rand(len(crops)) < ERASED_SHARE).flatten().tolist():
        height, width = torch.randint(16, 33, (2,)).tolist()
        top = int(torch.randint(CROP_PX - height + 1, ()))
        left = int(torch.randint(CROP_PX - width + 1, ()))
        crops[index, :, top : top + height, left : left + width] = 0
    return crops


def normalised(crops: Tensor) -> Tensor:
    return (crops - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def warm_up_then_cosine(steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < WARM_UP_STEPS:
            return (step + 1) / WARM_UP_STEPS
        done = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
        return 0.5 * (1 + math.cos(math.pi * done))

    return factor


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module) -> None:
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - EMA_DECAY)


def save(model: nn.Module, folder: Path) -> None:
    """Write config.json and model.safetensors in the form of timm's `local-dir:` source."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(configuration(), indent=2) + "\n")


def configuration() -> dict[str, object]:
    return {
        "architecture": ARCHITECTURE,
        "num_classes": len(CLASS_NAMES),
        "model_args": MODEL_ARGS,
        "label_names": list(CLASS_NAMES),
        "pretrained_cfg": {
            "input_size": [3, CROP_PX, CROP_PX],
            "fixed_input_size": True,
            "mean": list(MEAN),
            "std": list(STD),
            "crop_pct": 1.0,
            "crop_mode": "center",
            "interpolation": "bicubic",
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "mit",
        },
    }


def report(model: nn.Module, rng: np.random.Generator) -> None:
    """Print accuracy on training and held-out crops and the loss of accuracy without each head."""
    held_out = held_out_crops(N_EVALUATED)
    crops = normalised(as_pixels(np.stack([np.asarray(crop.image) for crop in held_out])))
    labels = torch.tensor([crop.label for crop in held_out])
    batches = [training_batch(rng) for _ in range(5)]
    seen = torch.cat([normalised(batch) for batch, _ in batches])
    seen_labels = torch.cat([batch_labels for _, batch_labels in batches])
    whole = accuracy(model, crops, labels)
    console.print(f"training crops: {accuracy(model, seen, seen_labels):.1%} of {len(seen_labels)} (fresh positions)")
    console.print(f"held-out crops: {whole:.1%} of {len(labels)}")
    console.print(by_class(model, crops, labels))
    console.print(head_table(model, crops, labels, whole))


@torch.inference_mode()
def accuracy(model: nn.Module, crops: Tensor, labels: Tensor) -> float:
    return float((model(crops).argmax(1) == labels).float().mean())


@torch.inference_mode()
def by_class(model: nn.Module, crops: Tensor, labels: Tensor) -> Table:
    right = model(crops).argmax(1) == labels
    table = Table("photograph", "held-out accuracy")
    for label, name in enumerate(CLASS_NAMES):
        table.add_row(name, f"{float(right[labels == label].float().mean()):.0%}")
    return table


def head_table(model: nn.Module, crops: Tensor, labels: Tensor, whole: float) -> Table:
    table = Table("layer", *(f"H{head}" for head in range(MODEL_ARGS["num_heads"])))
    table.title = "points of held-out accuracy lost without the head"
    for layer in range(MODEL_ARGS["depth"]):
        lost = [
            whole - accuracy(without_head(model, layer, head), crops, labels) for head in range(MODEL_ARGS["num_heads"])
        ]
        table.add_row(f"L{layer}", *(f"{100 * points:+.1f}" for points in lost))
    return table


def without_head(model: nn.Module, layer: int, head: int) -> nn.Module:
    """A copy whose output projection in `layer` no longer reads `head`: the same as zeroing the head's output."""
    pruned = copy.deepcopy(model)
    width = MODEL_ARGS["embed_dim"] // MODEL_ARGS["num_heads"]
    with torch.no_grad():
        pruned.blocks[layer].attn.proj.weight[:, head * width : (head + 1) * width] = 0
    return pruned


if __name__ == "__main__":
    main()
