"""A task whose label needs a local window: the colour around one white patch, with all colours equally frequent."""

import torch
from torch import Tensor, nn

from vitrail.wint.model import FULL, Shape, WinT, recorded_sides, rounded, set_temperature

SIDE, N_STEPS, BATCH = 8, 200, 64
COLOURS = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]])


def pictures(n_images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Patches of three colours, 21 of each, and a white one; the label is the colour of the eight around it."""
    labels = torch.randint(3, (n_images,), generator=generator)
    places = torch.randint(1, SIDE - 1, (n_images, 2), generator=generator)
    colour = torch.empty((n_images, SIDE, SIDE), dtype=torch.int64)
    for image, (label, (row, column)) in enumerate(zip(labels.tolist(), places.tolist(), strict=True)):
        around = torch.zeros((SIDE, SIDE), dtype=torch.bool)
        around[row - 1 : row + 2, column - 1 : column + 2] = True
        others = torch.tensor([each for each in range(3) for _ in range(13 if each == label else 21)])
        colour[image][~around] = others[torch.randperm(len(others), generator=generator)]
        colour[image][around] = label
        colour[image, row, column] = 3
    pixels = COLOURS[colour].permute(0, 3, 1, 2)
    return pixels.repeat_interleave(2, 2).repeat_interleave(2, 3), labels


def learnt(**windows) -> tuple[float, WinT]:
    """Accuracy on fresh pictures after training, and the model."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    shape = {"image_px": (16, 16), "patch_px": 2, "n_classes": 3, "width": 32, "depth": 2, "heads": 2, "mlp_ratio": 2.0}
    model = WinT(Shape(**shape, class_token=False, **windows)).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(N_STEPS):
        set_temperature(model, 0.15 ** min(1.0, step / N_STEPS / 0.7))
        images, labels = pictures(BATCH, generator)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
    images, labels = pictures(400, torch.Generator().manual_seed(99))
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean()), model


def test_a_label_that_needs_a_local_window_is_learnt_better_with_windows():
    """In 200 steps: three colours, so 0.33 by chance; windows begin 2 patches long and end about as long."""
    with_windows, model = learnt(windows="predicted", start=((0.3,) * 4,))
    without, _ = learnt(windows="none", start=FULL)
    assert with_windows > 0.95
    assert without < 0.7
    with recorded_sides(model) as sides, torch.no_grad():
        model(pictures(50, torch.Generator().manual_seed(5))[0])
    assert 1 <= float(rounded(sides[0]).mean()) <= 3
