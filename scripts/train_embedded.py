"""Train the embedded default: a small vision transformer that tells from which photograph a picture was cut.

    python scripts/train_embedded.py [--start FOLDER] [--out src/vitrail/embedded]
    python scripts/train_embedded.py --check src/vitrail/embedded

Two stages, both on crops of the training regions (`vitrail.data.photographs`); nothing is downloaded. The first learns
to tell crops apart, and leaves heads that attend nearly evenly. The second makes heads that differ:

- One head of each of the first four layers is made to look at near patches. A code of row and column is written into
  the 16 directions that the model uses least, and the queries and keys of that head are set to compare it.
- Crops pasted onto other pictures, the label being that of the pasted one, and views of half a photograph and more,
  their held-out blocks painted over.
- Where a crop was pasted is known, so the class token of `OBJECT_HEAD` is rewarded for looking there, and in all other
  heads for looking at itself: one head reads what the answer rests on. No outline of an object is used: `OUTLINES` are
  looked at by `--check` alone.

`--start` skips the first stage: the folder holds its result. The result is a folder that timm opens itself,
`timm.create_model("local-dir:src/vitrail/embedded", pretrained=True)`. `--check` prints accuracy, how differently heads
attend, what each costs and whether attention finds the objects of whole photographs.
"""

import argparse
import copy
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from embedded_pictures import PASTED, TRAINING_SHARES, Pictures, as_pixels
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from vitrail.data.photographs import (
    CLASS_NAMES,
    CROP_PX,
    OUTLINES,
    held_out_crops,
    object_mask,
    photographs,
    square_view,
    training_crop,
)
from vitrail.heads.objects import ON_OBJECT, SCORES, map_scores
from vitrail.models.open import Vit, open_vit
from vitrail.study.run import run_study
from vitrail.tap.tap import Readers

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

BATCH_SIZE = 96
PEAK_LEARNING_RATE = 1e-3
WARM_UP_STEPS = 100
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
EMA_DECAY = 0.99
GREY_SHARE = 0.3
ERASED_SHARE = 0.25
N_EVALUATED = 40 * len(CLASS_NAMES)
N_STUDIED = 320
STUDIED = "probability,head_probability,strength_entropy"

GRID = CROP_PX // 8
HEAD_WIDTH = 32
FREQUENCIES = torch.pi / GRID * torch.tensor([1.0, 2.0, 3.0, 4.0])
"""Of the code of a patch's row and column, radians a patch: up to a period of two patches."""

N_CODE = 4 * len(FREQUENCIES)
CODE_SHARE = 0.35
"""Length of the code relative to that of a patch's token. With 1 accuracy falls to a half before it is relearned."""

LOCAL_HEADS = {(0, 0): (0, 0, 0.9), (1, 0): (0, -1, 1.2), (2, 0): (-1, 0, 1.2), (3, 1): (0, 0, 0.5)}
"""(layer, head) -> rows and columns from a patch to where its head looks, and how sharply. These heads cost nothing, or
next to nothing, after the first stage."""

OBJECT_HEAD = (5, 0)
"""(layer, head) through which the class token reads the patches, and which is rewarded for looking at pasted crops."""

GUIDANCE = 0.3
"""Weight of -log(attention of the object head on the pasted crop)."""

QUIET = 0.02
"""Weight of -log(attention of the class token on itself), of each other head: otherwise many heads read the same, and
each of them can go."""

FINE_LEARNING_RATE = 7e-4
FINE_WARM_UP_STEPS = 15
FINE_EMA_DECAY = 0.95

console = Console()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.check is None:
        torch.manual_seed(options.seed)
        if options.start is None:
            model = train(options.steps, np.random.default_rng(options.seed))
        else:
            model = timm.create_model(f"local-dir:{options.start}", pretrained=True)
        torch.manual_seed(options.seed)
        save(fine_tune(model, options.fine_steps, np.random.default_rng(options.seed)), options.out)
    check(options.check or options.out)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="of the first stage")
    parser.add_argument("--fine-steps", type=int, default=1000, help="of the second stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="other than 1: rounding, and so the weights, differ")
    parser.add_argument("--start", type=Path, help="a folder with the result of the first stage, which is then skipped")
    parser.add_argument("--out", type=Path, default=Path("src/vitrail/embedded"))
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="train nothing, print the figures of this model")
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


def augmented(crops: Tensor) -> Tensor:
    """Random flips, brightness, contrast, saturation, loss of colour and one erased rectangle; normalised."""
    n = len(crops)
    return recoloured(torch.where(torch.rand(n, 1, 1, 1) < 0.5, crops.flip(3), crops))


def recoloured(crops: Tensor) -> Tensor:
    """`augmented` without the flip."""
    n = len(crops)
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


def warm_up_then_cosine(steps: int, warm_up: int = WARM_UP_STEPS) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(1, steps - warm_up)
        return 0.5 * (1 + math.cos(math.pi * done))

    return factor


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float = EMA_DECAY) -> None:
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


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


def position_code(row: Tensor, column: Tensor) -> Tensor:
    """Sines and cosines of row, then of column, [.., N_CODE]."""
    return torch.cat([f(place[..., None] * FREQUENCIES) for place in (row, column) for f in (torch.sin, torch.cos)], -1)


def shift(rows: float, columns: float) -> Tensor:
    """The matrix R with R code(row, column) = code(row + rows, column + columns)."""
    matrix, n, index = torch.zeros(N_CODE, N_CODE), len(FREQUENCIES), torch.arange(len(FREQUENCIES))
    for start, by in ((0, rows), (2 * n, columns)):
        cosine, sine = torch.cos(FREQUENCIES * by), torch.sin(FREQUENCIES * by)
        matrix[start + index, start + index] = matrix[start + n + index, start + n + index] = cosine
        matrix[start + index, start + n + index] = sine
        matrix[start + n + index, start + index] = -sine
    return matrix


@torch.no_grad()
def add_local_heads(model: nn.Module, pictures: Pictures) -> None:
    """Write a code of position where the model has hardly anything, and let `LOCAL_HEADS` compare it."""
    crops = [pictures.crop(index % len(CLASS_NAMES), TRAINING_SHARES) for index in range(8 * len(CLASS_NAMES))]
    pixels = normalised(as_pixels(np.stack(crops)))
    width, x, moment = MODEL_ARGS["embed_dim"], tokens_of(model, pixels), torch.zeros(())
    for block in model.blocks:
        normed = block.norm1(x)
        moment = moment + torch.einsum("ntc,ntd->cd", normed, normed) / normed.shape[:2].numel()
        x = block(x)
    # The mean over channels is lost in a norm, so no direction may have a part in it.
    least = torch.linalg.eigh(moment + 1e3 * torch.ones(width, width) / width).eigenvectors[:, :N_CODE]
    row, column = torch.meshgrid(torch.arange(float(GRID)), torch.arange(float(GRID)), indexing="ij")
    code = position_code(row.flatten(), column.flatten())
    tokens = tokens_of(model, pixels)[:, 1:]
    length = (tokens - tokens.mean(-1, keepdim=True)).pow(2).sum(-1).mean().sqrt()
    model.pos_embed[0, 1:] += CODE_SHARE * length / math.sqrt(2 * len(FREQUENCIES)) * code @ least.T
    x = tokens_of(model, pixels)
    for layer, block in enumerate(model.blocks):
        reader = least / block.norm1.weight[:, None]
        read = (block.norm1(x)[:, 1:] - block.norm1.bias) @ reader
        size = torch.einsum("ntk,tk->", read, code) / len(pixels) / code.pow(2).sum()
        for (_, head), (rows, columns, sharpness) in ((k, v) for k, v in LOCAL_HEADS.items() if k[0] == layer):
            gain = math.sqrt(sharpness * math.sqrt(HEAD_WIDTH)) / size
            for start, matrix in ((0, shift(rows, columns)), (width, torch.eye(N_CODE))):
                own = slice(start + head * HEAD_WIDTH, start + (head + 1) * HEAD_WIDTH)
                block.attn.qkv.weight[own] *= 0.25
                block.attn.qkv.bias[own] *= 0.25
                block.attn.qkv.weight[own][:N_CODE] += gain * matrix @ reader.T
        x = block(x)


def tokens_of(model: nn.Module, pixels: Tensor) -> Tensor:
    return model._pos_embed(model.patch_embed(pixels))


def fine_tune(model: nn.Module, steps: int, rng: np.random.Generator) -> nn.Module:
    """Make heads differ; returns the moving average of the weights, in evaluation mode."""
    pictures = Pictures(rng)
    add_local_heads(model, pictures)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=FINE_LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_then_cosine(steps, FINE_WARM_UP_STEPS))
    criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    for step in track(range(steps), description="making heads differ", console=console):
        pixels, labels, cover = pictures.batch()
        flipped = torch.rand(len(pixels), 1, 1, 1) < 0.5
        pixels = torch.where(flipped, pixels.flip(3), pixels)
        cover = torch.where(flipped[:PASTED, 0], cover.flip(2), cover)
        logits, missed, loud = logits_and_missed(
            model, recoloured(pixels), functional.avg_pool2d(cover, CROP_PX // GRID).flatten(1)
        )
        loss = criterion(logits, labels) + GUIDANCE * missed + QUIET * loud
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        follow(average, model, min(FINE_EMA_DECAY, (1 + step) / (10 + step)))
    return average


def logits_and_missed(model: nn.Module, pixels: Tensor, cover: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logits, -log of what the object head pays to the pasted crops, and -log of what others pay to themselves."""
    x, missed, loud = tokens_of(model, pixels), torch.zeros(()), torch.zeros(())
    n, n_tokens, width = x.shape
    n_heads = MODEL_ARGS["num_heads"]
    for layer, block in enumerate(model.blocks):
        q, k, v = block.attn.qkv(block.norm1(x)).reshape(n, n_tokens, 3, n_heads, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v)
        paid = (q[:, :, :1] @ k.transpose(2, 3) * HEAD_WIDTH**-0.5).softmax(-1)[:, :, 0]
        for head in range(n_heads):
            if (layer, head) == OBJECT_HEAD:
                missed = missed - torch.log((paid[:PASTED, head, 1:] * cover).sum(-1) + 1e-3).mean()
            else:
                loud = loud - torch.log(paid[:, head, 0] + 1e-3).mean()
        x = x + block.attn.proj(out.transpose(1, 2).reshape(n, n_tokens, width))
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[:, 0]), missed, loud


def check(folder: Path) -> None:
    """Print accuracy, how differently heads attend, what each costs, and whether attention finds objects."""
    vit = open_vit(str(folder))
    held_out = held_out_crops(N_EVALUATED)
    right = vit.logits(vit.prepare([crop.image for crop in held_out])).argmax(1).numpy()
    right = right == np.array([crop.label for crop in held_out])
    console.print(f"held-out crops: {right.mean():.1%} of {len(held_out)}")
    table = Table("photograph", "held-out accuracy")
    for label, name in enumerate(CLASS_NAMES):
        table.add_row(name, f"{right[label :: len(CLASS_NAMES)].mean():.0%}")
    console.print(table)
    wholes = vit.logits(vit.prepare(list(photographs().values()))).argmax(1)
    console.print(f"whole photographs: {int((wholes == torch.arange(len(CLASS_NAMES))).sum())} of {len(CLASS_NAMES)}")

    with tempfile.TemporaryDirectory() as out:
        study = run_study(vit, "vitrail:photos", out=out, limit=N_STUDIED, measures=STUDIED).load()
    lost = (study["probability"] - study["head_probability"]).mean("image")
    spread = study["strength_entropy"].mean("image")
    keys = row_entropy(vit, [crop.image for crop in held_out[:N_STUDIED]])
    console.print(by_head("probability of the label that is lost without the head", lost.values))
    console.print(by_head(f"entropy over hops, nats; the most is {math.log(GRID):.2f}", spread.values))
    console.print(by_head(f"entropy over keys, nats; the most is {math.log(GRID**2 + 1):.2f}", keys))
    for name, values, most in (("hops", spread.values, GRID), ("keys", keys, GRID**2 + 1)):
        console.print(f"entropies over {name} span {np.ptp(values) / math.log(most):.2f} of their range")
    console.print(f"the costliest head costs {float(lost.max()):.3f}")

    scores, null = object_scores(vit)
    for index, name in enumerate(SCORES):
        console.print(by_head(f"{name} against the objects of {', '.join(OUTLINES)}", scores.mean(2)[..., index]))
        console.print(by_head(f"{name} against the objects of the other photographs", null.mean(2)[..., index]))


@torch.inference_mode()
def attention_maps(vit: Vit, images: list[Image.Image]) -> list[Tensor]:
    """Attention of each layer, [image, head, query, key]."""
    maps: list[Tensor] = []
    vit.tap().read(vit.prepare(images), Readers(attention=lambda attention: maps.append(attention.weights())))
    return maps


def row_entropy(vit: Vit, images: list[Image.Image]) -> np.ndarray:
    """Entropy of attention over keys, nats, mean over queries and images; [layer, head]."""
    return np.stack(
        [torch.special.entr(weights).sum(-1).mean((0, 2)).numpy() for weights in attention_maps(vit, images)]
    )


def object_scores(vit: Vit) -> tuple[np.ndarray, np.ndarray]:
    """Pointing accuracy and AUROC of the class token's attention in whole photographs, on a square view.

    Returns:
        Against the object of each photograph, [layer, head, photograph, score], and the same against the mean of the
        other photographs' objects.
    """
    wholes, n = photographs(), len(OUTLINES)
    masks = [np.asarray(object_mask(name, (CROP_PX, CROP_PX))) / 255 for name in OUTLINES]
    shares = functional.avg_pool2d(torch.tensor(np.stack(masks)), CROP_PX // GRID).flatten(1)
    objects = shares >= ON_OBJECT
    scores = []
    for weights in attention_maps(vit, [square_view(wholes[name]) for name in OUTLINES]):
        maps = weights[:, :, None, 0, 1:].expand(-1, -1, n, -1).contiguous()
        scores.append(map_scores(maps, objects[None, None].expand_as(maps)).permute(1, 0, 2, 3))
    against = torch.stack(scores).numpy()  # layer, head, photograph, object of, score
    own = np.eye(n, dtype=bool)
    others = against[:, :, ~own].reshape(*against.shape[:3], n - 1, -1)
    return against[:, :, own], others.mean(3)


def by_head(title: str, values: np.ndarray) -> Table:
    """A table of one number a head, [layer, head]."""
    table = Table("layer", *(f"H{head}" for head in range(values.shape[1])), title=title)
    for layer, row in enumerate(values):
        table.add_row(f"L{layer}", *(f"{value:.2f}" for value in row))
    return table


if __name__ == "__main__":
    main()
