"""What a recipe asks for, made: the model with the weights it begins with, its teacher, optimiser and schedule."""

from typing import Any

import torch
from torch import nn

from vitrail.errors import UsageError
from vitrail.vit.open import open_vit
from vitrail.wint.batches import Batches
from vitrail.wint.folder import fitted, shape_of, weights_of
from vitrail.wint.model import Shape, WindowHead, WinT, attach, window_heads
from vitrail.wint.recipe import Recipe
from vitrail.wint.teacher import Teacher

__all__ = [
    "average_of",
    "built",
    "edges",
    "grid_of",
    "optimiser_of",
    "schedule_of",
    "teacher_of",
    "temperature",
    "timm_model",
]


def built(recipe: Recipe) -> nn.Module:
    """The model of a recipe with the weights it begins with; draws from torch's global generator.

    Raises `UsageError` or `WeightsMismatch` if `start_from` does not fit.
    """
    model, classes, size = recipe.model, recipe.data.classes, recipe.data.image_px
    start = tuple(tuple(sides) for sides in model.start)
    if model.timm:
        import timm

        if not timm.is_model(model.timm):
            raise UsageError(f"[model] timm = {model.timm!r} is no model of timm.")
        made = timm.create_model(
            model.timm, pretrained=model.timm_weights, num_classes=classes, img_size=size, **model.timm_args
        )
        return made if model.windows == "none" else attach(made, start, edges(recipe))  # type: ignore[no-any-return]
    keys = ("patch_px", "width", "depth", "heads", "mlp_ratio", "class_token", "dropped_paths", "windows")
    shape = Shape(
        image_px=(size, size), n_classes=classes, start=start, edges=edges(recipe),
        **{key: getattr(model, key) for key in keys},
    )  # fmt: skip
    module = WinT(shape)
    if model.start_from:
        state = weights_of(model.start_from)
        same_classes = shape_of(model.start_from).n_classes == classes
        module.load_state_dict(fitted(state, module, new_head=not same_classes, new_windows=not model.keep_windows))
    return module


def edges(recipe: Recipe) -> float:
    """The temperature of windows' edges in evaluation; 0: hard."""
    return recipe.windows.last if recipe.windows.edges == "soft" else 0.0


def temperature(recipe: Recipe, done: float) -> float:
    """How soft windows are when the share `done` of training is over."""
    windows = recipe.windows
    return float(windows.first * (windows.last / windows.first) ** min(1.0, done / windows.until))


def grid_of(module: nn.Module) -> tuple[int, int]:
    """Rows and columns of patches."""
    if isinstance(module, WinT):
        return module.shape.grid
    rows, columns = module.patch_embed.grid_size  # type: ignore[union-attr, misc]
    return int(rows), int(columns)


def teacher_of(recipe: Recipe, module: nn.Module, grid: tuple[int, int], device: str) -> Teacher | None:
    """Who guides the window heads; None without a folder, or without heads that predict."""
    heads = [head for head in window_heads(module) if isinstance(head, WindowHead)]
    if not recipe.teacher.folder or not heads:
        return None
    data, teaching = recipe.data, recipe.teacher
    vit = open_vit(teaching.folder, device=device)
    return Teacher(vit, teaching.area, len(heads), heads[0].n_windows, grid, data.mean, data.std)


def optimiser_of(recipe: Recipe, module: nn.Module) -> torch.optim.Optimizer:
    """timm's, with the window heads at their own rate."""
    from timm.optim import create_optimizer_v2
    from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay

    chosen = recipe.optimiser
    spared: set[str] = getattr(module, "no_weight_decay", set)()
    own = {id(parameter) for head in window_heads(module) for parameter in head.parameters()}

    def groups(_: nn.Module) -> list[dict[str, Any]]:
        if chosen.layer_decay is None:
            made = param_groups_weight_decay(module, chosen.weight_decay, no_weight_decay_list=spared)
        else:
            made = param_groups_layer_decay(
                module, chosen.weight_decay, no_weight_decay_list=spared, layer_decay=chosen.layer_decay
            )
        split = []
        for group in made:
            for is_window, scale in ((False, 1.0), (True, recipe.windows.rate)):
                members = [parameter for parameter in group["params"] if (id(parameter) in own) is is_window]
                if members:
                    split.append({**group, "params": members, "lr_scale": group.get("lr_scale", 1.0) * scale})
        return split

    optimiser: torch.optim.Optimizer = create_optimizer_v2(
        module, opt=chosen.name, lr=chosen.rate, weight_decay=chosen.weight_decay, param_group_fn=groups
    )
    return optimiser


def schedule_of(recipe: Recipe, optimiser: torch.optim.Optimizer, batches: Batches) -> Any:
    """timm's cosine by step: a function of the step, so it needs no state of its own."""
    from timm.scheduler import CosineLRScheduler

    warm_up = min(len(batches) - 1, round(recipe.optimiser.warm_up_epochs * batches.per_epoch))
    return CosineLRScheduler(
        optimiser, t_initial=len(batches), lr_min=recipe.optimiser.last_rate, warmup_t=warm_up,
        warmup_lr_init=recipe.optimiser.last_rate, t_in_epochs=False,
    )  # fmt: skip


def average_of(decay: float, module: nn.Module) -> Any:
    """timm's averaged weights, None for a decay of 0."""
    from timm.utils import ModelEmaV3

    return ModelEmaV3(module, decay=decay, use_warmup=True) if decay else None


def timm_model(recipe: Recipe) -> dict[str, Any] | None:
    """How a timm model with window heads is made again, for its folder; None for ours."""
    model, data = recipe.model, recipe.data
    if not model.timm:
        return None
    args = {"num_classes": data.classes, "img_size": data.image_px, **model.timm_args}
    return {"name": model.timm, "args": args, "start": model.start, "edges": edges(recipe)}
