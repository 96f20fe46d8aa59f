"""WinT on a task whose label needs a local window: accuracy with and without windows, and a picture of the windows.

    python examples/windows_are_learnt.py [windows_are_learnt.png]

Patches have three colours, 21 of each, and one is white; the label is the colour of the eight patches around the white
one. Counting colours tells nothing: who wants to know must look near the white patch. 200 steps of 64 pictures, half a
minute: about 1.0 with windows that begin two patches long, 0.4 without (0.33 is chance).
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.figures.style import save
from vitrail.figures.wint import windows_by_layer
from vitrail.windows.window_maps import windows_as_study
from vitrail.wint.model import FULL, Shape, WinT, record_sides, set_temperature

SIDE, N_STEPS, BATCH = 8, 200, 64
COLOURS = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1]])


def main() -> None:
    with_windows, model = learnt(windows="predicted", start=((0.3,) * 4,))
    without, _ = learnt(windows="none", start=FULL)
    print(f"accuracy with windows {with_windows:.3f}, without {without:.3f}")
    images, _ = pictures(1, torch.Generator().manual_seed(3))
    with record_sides(model) as sides, torch.no_grad():
        model(images)
    white = int(images[0, :, ::2, ::2].sum(0).flatten().argmax())
    study = windows_as_study(torch.stack([layer[0] for layer in sides]).numpy(), (SIDE, SIDE))
    figure = windows_by_layer(study, white)
    print(save(figure, sys.argv[1] if len(sys.argv) > 1 else "windows_are_learnt.png"))


def pictures(n_images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures [image, 3, 16, 16] of 8 x 8 patches, and their labels."""
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


def learnt(seed: int = 0, **windows: Any) -> tuple[float, WinT]:
    """Accuracy on fresh pictures after training, and the model."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    shape: dict[str, Any] = {"patch_px": 2, "n_classes": 3, "width": 32, "depth": 2, "heads": 2, "mlp_ratio": 2.0}
    model = WinT(Shape(image_px=(2 * SIDE, 2 * SIDE), **shape, class_token=False, **windows)).train()
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


if __name__ == "__main__":
    main()
