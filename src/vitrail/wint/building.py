"""What a recipe asks for: the model with the weights it starts from, optimiser, schedule and averaged weights."""

import difflib
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from vitrail.errors import Unsupported, UsageError
from vitrail.grid import Grid
from vitrail.wint import checkpoint
from vitrail.wint.batches import Batches
from vitrail.wint.folder import OPTIONS, fit_state, read_shape, read_weights
from vitrail.wint.model import Architecture, Shape, WinT, attach, window_heads
from vitrail.wint.recipe import Recipe

__all__ = [
    "build_average",
    "build_model",
    "build_optimiser",
    "build_schedule",
    "edge_temperature",
    "grid_of",
    "temperature_at",
    "timm_description",
]

TRAINING_OPTIONS = frozenset(
    ["attn_drop_rate", "drop_rate", "fix_init", "patch_drop_rate", "pos_drop_rate", "proj_drop_rate", "weight_init"]
)
"""Arguments of timm's ViTs that a trained model does without: a recipe may give them, a folder has none of them."""

OPTIONS_OF_DATA = frozenset(["img_size", "in_chans", "num_classes"])


def build_model(recipe: Recipe) -> nn.Module:
    """The model of a recipe with the weights that it starts from; draws from torch's global generator.

    Args:
        recipe: The training run.

    Returns:
        A `WinT`, or a timm ViT with window heads.

    Raises:
        UsageError: timm has no such model or argument, or the shape has no meaning.
        Unsupported: Window heads do not fit timm's model, or it has no grid of patches.
        WeightsMismatch: `start_from` does not fit.
    """
    model, classes, size = recipe.model, recipe.data.classes, recipe.data.image_px
    if model.timm:
        timm_vit = _build_timm(recipe)
        if model.windows != "none":
            attach(timm_vit, model.start, edge_temperature(recipe), recipe.windows.cut)
        return timm_vit
    architecture = {field.name: getattr(model, field.name) for field in fields(Architecture)}
    edges, cut = edge_temperature(recipe), recipe.windows.cut
    module = WinT(Shape(**architecture, image_px=(size, size), n_classes=classes, edges=edges, cut=cut))
    if model.start_from:
        saved, state = read_shape(model.start_from), read_weights(model.start_from)
        new_head, new_windows = saved.n_classes != classes, not model.keep_windows
        module.load_state_dict(fit_state(state, module, new_head=new_head, new_windows=new_windows, grid=saved.grid))
    return module


def _build_timm(recipe: Recipe) -> nn.Module:
    import timm

    model, data = recipe.model, recipe.data
    if not timm.is_model(model.timm):
        raise UsageError(f"[model] timm = {model.timm!r} is no model of timm.")
    valid = (OPTIONS | TRAINING_OPTIONS) - OPTIONS_OF_DATA
    unknown = sorted(model.timm_args.keys() - valid)
    if unknown:
        raise UsageError(
            f"[model] timm_args has {', '.join(unknown)}. Images and classes are those of [data]; valid keys: "
            f"{', '.join(sorted(valid))}."
        )
    options = {"num_classes": data.classes, "img_size": data.image_px, **model.timm_args}
    try:
        module: nn.Module = timm.create_model(model.timm, pretrained=model.timm_weights, **options)
    except (AssertionError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"[model] timm = {model.timm!r} could not be made with {options} ({type(error).__name__}: {error}). Check "
            "timm_args, image_px, and timm_weights = true, which needs the Hugging Face Hub."
        ) from error
    grid_of(module)
    return module


def edge_temperature(recipe: Recipe) -> float:
    """Gives the temperature of windows' edges in evaluation.

    Args:
        recipe: The training run.

    Returns:
        The sigmoid's unit in patches; 0: hard edges.
    """
    return recipe.windows.final_temperature if recipe.windows.edges == "soft" else 0.0


def temperature_at(recipe: Recipe, progress: float) -> float:
    """How soft windows are in training.

    Args:
        recipe: The training run.
        progress: The share of training that is over, 0 to 1.

    Returns:
        The sigmoid's unit in patches, on a geometric path.
    """
    windows = recipe.windows
    ratio = windows.final_temperature / windows.temperature
    return float(windows.temperature * ratio ** min(1.0, progress / windows.anneal_until))


def grid_of(module: nn.Module) -> Grid:
    """Finds the grid of a WinT or a timm ViT.

    Args:
        module: The model.

    Returns:
        Rows and columns of patches.

    Raises:
        Unsupported: It has none.
    """
    if isinstance(module, WinT):
        return module.shape.grid
    size: Any = getattr(getattr(module, "patch_embed", None), "grid_size", None)
    if size is None:
        raise Unsupported(f"{type(module).__name__} has no grid of patches; name a ViT of timm, as vit_* or deit_*.")
    return int(size[0]), int(size[1])


def build_optimiser(recipe: Recipe, module: nn.Module) -> torch.optim.Optimizer:
    """timm's optimiser, with the window heads at their own learning rate.

    Args:
        recipe: The training run.
        module: The model to be trained.

    Returns:
        An optimiser whose groups have `lr_scale`.

    Raises:
        UsageError: timm has no such optimiser here, or a checkpoint could not keep its state.
    """
    from timm.optim import create_optimizer_v2
    from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay

    settings = recipe.optimiser
    _try_optimiser(settings.name, next(module.parameters()).device)
    no_decay: set[str] = getattr(module, "no_weight_decay", set)()
    of_windows = {id(parameter) for head in window_heads(module) for parameter in head.parameters()}

    def groups(_: nn.Module) -> list[dict[str, Any]]:
        if settings.layer_decay is None:
            timm_groups = param_groups_weight_decay(module, settings.weight_decay, no_weight_decay_list=no_decay)
        else:
            timm_groups = param_groups_layer_decay(
                module, settings.weight_decay, no_weight_decay_list=no_decay, layer_decay=settings.layer_decay
            )
        split = []
        for group in timm_groups:
            for is_window, scale in ((False, 1.0), (True, recipe.windows.lr_scale)):
                members = [parameter for parameter in group["params"] if (id(parameter) in of_windows) is is_window]
                if members:
                    split.append({**group, "params": members, "lr_scale": group.get("lr_scale", 1.0) * scale})
        return split

    optimiser: torch.optim.Optimizer = create_optimizer_v2(
        module, opt=settings.name, lr=settings.lr, weight_decay=settings.weight_decay, param_group_fn=groups
    )
    return optimiser


def _try_optimiser(name: str, device: torch.device) -> None:
    """Takes a step with two small parameters, so that what cannot run or go on is refused at the start."""
    from timm.optim import create_optimizer_v2, list_optimizers

    parameters = [nn.Parameter(torch.ones(shape, device=device)) for shape in ((4, 4), (4,))]
    try:
        optimiser = create_optimizer_v2([{"params": parameters}], opt=name, lr=1e-3)
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.1)
        optimiser.step()
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        close = difflib.get_close_matches(name, list_optimizers(), 3)
        advice = f"Did you mean {' or '.join(close)}?" if close and name not in close else "Take adamw, say."
        raise UsageError(
            f"[optimiser] name = {name!r} cannot be run here ({type(error).__name__}: {error}). {advice}"
        ) from error
    if not checkpoint.storable(optimiser):
        raise UsageError(
            f"[optimiser] name = {name!r} keeps a state that a checkpoint cannot hold, so a run could not go on. Take "
            "another optimiser of timm, such as adamw."
        )


def build_schedule(recipe: Recipe, optimiser: torch.optim.Optimizer, batches: Batches) -> Any:
    """timm's warm-up and cosine by step: a function of the step, so it needs no state of its own.

    Args:
        recipe: The training run.
        optimiser: What the learning rate is set in.
        batches: The batches of the run, which say how many steps there are.

    Returns:
        timm's scheduler.
    """
    from timm.scheduler import CosineLRScheduler

    warmup_steps = min(len(batches) - 1, round(recipe.optimiser.warmup_epochs * batches.per_epoch))
    return CosineLRScheduler(
        optimiser,
        t_initial=len(batches),
        lr_min=recipe.optimiser.min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=recipe.optimiser.min_lr,
        t_in_epochs=False,
    )


def build_average(decay: float, module: nn.Module) -> Any:
    """Builds timm's averaged weights of a model.

    Args:
        decay: Of the average, by step.
        module: The model.

    Returns:
        The average; None for a decay of 0.
    """
    from timm.utils import ModelEmaV3

    return ModelEmaV3(module, decay=decay, use_warmup=True) if decay else None


def timm_description(recipe: Recipe) -> dict[str, Any] | None:
    """Describes how a timm model is made again, with or without window heads, for its folder.

    Args:
        recipe: The training run.

    Returns:
        timm's name and arguments but those that count in training alone, and the windows; None for a WinT of ours.
    """
    model, data = recipe.model, recipe.data
    if not model.timm:
        return None
    of_shape = {name: value for name, value in model.timm_args.items() if name in OPTIONS}
    args = {"num_classes": data.classes, "img_size": data.image_px, **of_shape}
    edges = {"edges": edge_temperature(recipe), "cut": recipe.windows.cut}
    return {"name": model.timm, "args": args, "windows": model.windows, "start": model.start, **edges}
