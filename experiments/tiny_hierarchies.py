"""Small hierarchies trained on CIFAR-10, for tables that need one with weights; about 20 minutes each on one thread."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from vitrail import Vit, open_vit
from vitrail.wint.batches import read_images

SIDE = 32
N_STEPS, BATCH, LR = 1600, 64, 2e-3
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def swin() -> SwinTransformer:
    """Three stages of two layers on grids of 16 x 16, 8 x 8 and 4 x 4 patches; the second layer of a stage shifts."""
    shape = {"img_size": SIDE, "patch_size": 2, "window_size": 4, "num_classes": 10}
    return SwinTransformer(**shape, embed_dim=48, depths=(2, 2, 2), num_heads=(2, 4, 8))


def pvt() -> PyramidVisionTransformerV2:
    """Three stages of two layers on grids of 8 x 8, 4 x 4 and 2 x 2 patches; the first two attend to pooled keys."""
    widths, heads = (48, 96, 192), (2, 4, 8)
    return PyramidVisionTransformerV2(
        num_classes=10, depths=(2, 2, 2), embed_dims=widths, num_heads=heads, sr_ratios=(4, 2, 1), mlp_ratios=(4, 4, 4)
    )


def maxvit() -> MaxxVit:
    """Two stages of two blocks, which pool 16 x 16 patches to 8 x 8 and 4 x 4; windows first, then across them."""
    config = MaxxVitCfg(
        embed_dim=(48, 96),
        depths=(2, 2),
        block_type=("M", "M"),
        stem_width=24,
        conv_cfg=MaxxVitConvCfg(block_type="mbconv"),
        transformer_cfg=MaxxVitTransformerCfg(window_size=4, dim_head=24),
    )
    return MaxxVit(config, img_size=SIDE, num_classes=10)


HIERARCHIES: dict[str, Callable[[], nn.Module]] = {"swin": swin, "pvt": pvt, "maxvit": maxvit}


def trained(name: str, data: Path, weights: Path) -> Vit:
    """A trained model of `HIERARCHIES`; trains it where the file of weights is not there."""
    torch.manual_seed(0)
    model = HIERARCHIES[name]()
    if not weights.exists():
        train(model, data)
        weights.parent.mkdir(parents=True, exist_ok=True)
        unfinished = weights.with_suffix(".unfinished")
        save_file(model.state_dict(), unfinished)
        unfinished.replace(weights)
    model.load_state_dict(load_file(weights))
    return open_vit(model.eval(), image_size=SIDE, mean=MEAN, std=STD)


def train(model: nn.Module, data: Path) -> None:
    """`N_STEPS` steps of AdamW with one cycle of the learning rate; images are shifted and mirrored."""
    torch.manual_seed(0)
    images = read_images(str(data / "cifar10" / "train.npz"))
    pixels = normalised(images.pixels(SIDE))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, N_STEPS)
    order = torch.cat([torch.randperm(len(pixels)) for _ in range(1 + N_STEPS * BATCH // len(pixels))])
    model.train()
    for step in range(N_STEPS):
        index = order[step * BATCH : (step + 1) * BATCH]
        loss = nn.functional.cross_entropy(model(shifted(pixels[index])), images.labels[index], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {N_STEPS}: loss {loss:.3f}", flush=True)


def normalised(pixels):
    """uint8 images as the model is given them."""
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def shifted(pixels):
    """A batch mirrored and moved by up to four pixels, by chance."""
    down, right = torch.randint(-4, 5, (2,)).tolist()
    moved = pixels.roll((down, right), (2, 3))
    return moved.flip(3) if torch.rand(()) < 0.5 else moved
