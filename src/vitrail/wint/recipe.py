"""What a training run is: a TOML file that states what it is expected to give and what that costs.

Keys that are not ours, types that do not fit and values without meaning are refused with the keys that are. A recipe is
plain data: the same recipe and seed give the same weights, bit for bit on a CPU.
"""

import difflib
import math
import tomllib
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from vitrail.data.files import text
from vitrail.errors import UsageError
from vitrail.models.sources import resolve_name
from vitrail.wint.model import Architecture

__all__ = ["Data", "Distillation", "Model", "Optimiser", "Recipe", "Run", "Windows", "read_recipe", "recipe_from"]

OLD_TABLES = {"teacher": "distillation"}
OLD_KEYS = {
    "model": {"dropped_paths": "drop_path_rate"},
    "windows": {"first": "temperature", "last": "final_temperature", "until": "anneal_until", "rate": "lr_scale"},
    "distillation": {"folder": "teacher", "from_share": "warmup_share", "share": "batch_share"},
    "optimiser": {"rate": "lr", "last_rate": "min_lr", "warm_up_epochs": "warmup_epochs"},
}
"""Names of earlier recipes, still read: run folders go on, and files that users wrote still train."""


@dataclass(frozen=True)
class Data:
    """Images. `train`, `test`: a packed .npz, a folder of class folders, or hf:NAME:SPLIT; relative paths count from
    the recipe's folder. classes: how many there are, checked. limit: a fixed random subset of the training images.
    mean, std: of each channel, of values 0..1; a pretrained model needs its own.

    augmentation: "crop_flip" (whole batches: reflected border of `border_px`, random crop, flip), "timm" (image by
    image, `timm` holds options of timm's create_transform), "none".
    """

    train: str
    test: str
    classes: int
    image_px: int = 32
    limit: int | None = None
    test_limit: int | None = None
    mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    augmentation: str = "crop_flip"
    border_px: int = 4
    timm: dict[str, Any] = field(default_factory=dict)
    workers: int = 0


@dataclass(frozen=True)
class Model(Architecture):
    """A WinT of this architecture, or with `timm` that model of timm with window heads (windows = "predicted") or as it
    is ("none"), to which `timm_args` give its shape.

    start_from: a saved WinT whose weights to begin with; window heads and a classifier of other classes are drawn anew
    unless `keep_windows`.
    """

    start_from: str = ""
    keep_windows: bool = False
    timm: str = ""
    timm_args: dict[str, Any] = field(default_factory=dict)
    timm_weights: bool = False


@dataclass(frozen=True)
class Windows:
    """How windows are trained. Their edges' temperature (patches) falls from `temperature` to `final_temperature`, on a
    geometric path, over the share `anneal_until` of training. edges: "hard": sides are rounded in evaluation, and in
    training after the share `hard_from`, with the soft windows' gradient; "soft": edges keep the final temperature for
    good. cut: rows and columns of patches that soft edges let through by less than this are closed, in training and
    after it, so that a model cannot learn to look through its windows and blocks can be skipped; 0: none. lr_scale:
    learning rate of the window heads relative to the rest. area_weight: weight of the windows' mean area in the loss.
    """

    temperature: float = 1.0
    final_temperature: float = 0.15
    anneal_until: float = 0.7
    edges: str = "hard"
    hard_from: float = 0.7
    cut: float = 0.0
    lr_scale: float = 1.0
    area_weight: float = 0.0


@dataclass(frozen=True)
class Distillation:
    """Predicted windows are drawn to those of a frozen trained ViT: loss += weight * mean |b - b*| / (n - 1).

    teacher: a model as `open_vit` opens it; empty: none. area: percent of the grid that its windows have. The weight
    grows from 0 over the share `warmup_share` of training and is 0 after `until`. batch_share: part of each batch that
    the teacher is shown. shuffled: each image gets the windows of another, the control with right areas in wrong
    places. shared_budget: the windows of all heads and layers share that area (`vitrail.patches.head_windows`), instead
    of having it each.
    """

    teacher: str = ""
    weight: float = 0.5
    area: int = 25
    warmup_share: float = 0.0
    until: float = 1.0
    batch_share: float = 1.0
    shuffled: bool = False
    shared_budget: bool = False


@dataclass(frozen=True)
class Optimiser:
    """timm's optimiser `name`, with a warm-up and a cosine from `lr` down to `min_lr`."""

    name: str = "adamw"
    lr: float = 1e-3
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    clip: float = 0.0
    layer_decay: float | None = None


@dataclass(frozen=True)
class Run:
    """batch_size: images a step over all devices together; each takes its part in `accumulate` pieces.

    precision: "no" (float32), "bf16", "fp16", as Accelerate names them. compile: torch.compile fuses the model's
    operations, which takes up to a minute at first and, on a CPU, a C++ compiler. ema: decay of the averaged weights
    that are evaluated and exported; 0: none. A checkpoint is written after every epoch, and every `checkpoint_steps`
    if above 0.
    """

    epochs: float = 10
    batch_size: int = 64
    accumulate: int = 1
    seed: int = 0
    precision: str = "no"
    compile: bool = False
    ema: float = 0.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    evaluate_epochs: int = 1
    log_steps: int = 20
    checkpoint_steps: int = 0
    tensorboard: bool = False


@dataclass(frozen=True)
class Recipe:
    """One training run. `expected` and `cost` are for people: accuracy and time, on what machine."""

    title: str
    expected: str
    cost: str
    data: Data
    model: Model = Model()
    windows: Windows = Windows()
    distillation: Distillation = Distillation()
    optimiser: Optimiser = Optimiser()
    run: Run = Run()

    def as_dict(self) -> dict[str, Any]:
        """Gives plain data.

        Returns:
            Tables of keys, as the run's recipe.json holds them.
        """
        return asdict(self)


def read_recipe(path: str | Path, note: Callable[[str], None] | None = None) -> Recipe:
    """The recipe in a TOML file; its relative paths count from its folder.

    Args:
        path: The file.
        note: Called with a sentence for each key that has another name now.

    Returns:
        The recipe, checked.

    Raises:
        UsageError: The file is no recipe; the message has the valid keys.
    """
    path = Path(path)
    try:
        content = tomllib.loads(text(path))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}.") from error
    return recipe_from(content, path.parent, note)


def recipe_from(content: Mapping[str, Any], folder: Path = Path(), note: Callable[[str], None] | None = None) -> Recipe:
    """The recipe that plain data describes.

    Args:
        content: Tables of keys, as in a TOML file or a run's recipe.json.
        folder: Where relative paths count from.
        note: Called with a sentence for each key that has another name now.

    Returns:
        The recipe, checked.

    Raises:
        UsageError: Keys, types or values have no meaning; the message has the valid keys.
    """
    recipe: Recipe = _parse(Recipe, _rename_old_keys(content, note or (lambda _: None)), "the recipe")
    _check(recipe)
    return replace(
        recipe,
        data=replace(recipe.data, train=_path(recipe.data.train, folder), test=_path(recipe.data.test, folder)),
        model=replace(recipe.model, start_from=_model(recipe.model.start_from, folder)),
        distillation=replace(recipe.distillation, teacher=_model(recipe.distillation.teacher, folder)),
    )


def _rename_old_keys(content: Mapping[str, Any], note: Callable[[str], None]) -> dict[str, Any]:
    tables = _rename(content, OLD_TABLES, "[{}]", note)
    for table, names in OLD_KEYS.items():
        if isinstance(tables.get(table), Mapping):
            tables[table] = _rename(tables[table], names, f"[{table}] {{}}", note)
    return tables


def _rename(
    content: Mapping[str, Any], names: Mapping[str, str], form: str, note: Callable[[str], None]
) -> dict[str, Any]:
    for old, new in names.items():
        if old in content and new in content:
            raise UsageError(f"{form.format(old)} is the old name of {form.format(new)}, and both are given; keep one.")
        if old in content:
            note(f"{form.format(old)} is called {form.format(new)} now; it is read as that.")
    return {names.get(key, key): value for key, value in content.items()}


def _parse(kind: Any, content: Any, where: str) -> Any:
    if not isinstance(content, Mapping):
        raise UsageError(f"{where} must be a table, not {content!r}.")
    hints = get_type_hints(kind)
    valid = {each.name: each for each in fields(kind)}
    for key in content:
        if key not in valid:
            close = difflib.get_close_matches(key, valid, 1)
            suggestion = f" Did you mean {close[0]!r}?" if close else ""
            raise UsageError(f"{where} has no key {key!r}.{suggestion} Valid keys: {', '.join(valid)}.")
    missing = [
        name
        for name, each in valid.items()
        if name not in content and each.default is MISSING and each.default_factory is MISSING
    ]
    if missing:
        raise UsageError(f"{where} lacks {', '.join(missing)}. Valid keys: {', '.join(valid)}.")
    return kind(**{key: _parse_value(hints[key], value, f"{where}: {key}") for key, value in content.items()})


def _parse_value(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return _parse(hint, value, f"[{where.rpartition(': ')[2]}]")
    if isinstance(hint, types.UnionType):
        return None if value is None else _parse_value(get_args(hint)[0], value, where)
    kind = get_origin(hint) or hint
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple and type(value) is list:
        value = tuple(value)
    if type(value) is not kind:
        name = "list" if kind is tuple else kind.__name__
        raise UsageError(f"{where} = {value!r} is a {type(value).__name__}; it must be a {name}.")
    if kind in (list, tuple) and get_args(hint):
        return kind(_parse_value(get_args(hint)[0], each, where) for each in value)
    return value


def _check(recipe: Recipe) -> None:
    data, run, windows, distillation = recipe.data, recipe.run, recipe.windows, recipe.distillation
    optimiser = recipe.optimiser
    temperatures = (windows.temperature, windows.final_temperature)
    rules = {
        f"[data] augmentation = {data.augmentation!r}; choose crop_flip, timm or none": data.augmentation
        in ("crop_flip", "timm", "none"),
        f"[data] classes = {data.classes}; give 2 or more": data.classes >= 2,
        f"[data] mean = {data.mean}, std = {data.std}; give three numbers each, std above 0": len(data.mean) == 3
        and len(data.std) == 3
        and min(data.std) > 0,
        f"[run] precision = {run.precision!r}; choose no, bf16 or fp16": run.precision in ("no", "bf16", "fp16"),
        f"[run] batch_size = {run.batch_size}, accumulate = {run.accumulate}; each is 1 or more, and one divides the "
        "other": run.accumulate >= 1 and run.batch_size >= 1 and run.batch_size % run.accumulate == 0,
        f"[run] epochs = {run.epochs}; give more than 0": 0 < run.epochs < math.inf,
        f"[windows] temperature = {temperatures[0]}, final_temperature = {temperatures[1]}; both are above 0": min(
            temperatures
        )
        > 0,
        f"[windows] anneal_until = {windows.anneal_until}; give a share above 0, at most 1": 0
        < windows.anneal_until
        <= 1,
        f"[windows] edges = {windows.edges!r}; choose hard or soft": windows.edges in ("hard", "soft"),
        f"[windows] hard_from = {windows.hard_from}; give a share": 0 <= windows.hard_from <= 1,
        f"[windows] cut = {windows.cut}; give a share from 0 to below 0.1": 0 <= windows.cut < 0.1,
        f"[windows] area_weight = {windows.area_weight}; give 0 or more": windows.area_weight >= 0,
        f"[distillation] area = {distillation.area} percent; give 1 to 100": 1 <= distillation.area <= 100,
        f"[distillation] batch_share = {distillation.batch_share}; give a share above 0, at most 1": 0
        < distillation.batch_share
        <= 1,
        '[model] timm has windows = "predicted" or "none"': not recipe.model.timm
        or recipe.model.windows in ("predicted", "none"),
        "[model] start_from is a WinT of ours; with timm, timm_weights = true begins with weights of timm": not (
            recipe.model.timm and recipe.model.start_from
        ),
        '[distillation] a teacher needs [model] windows = "predicted"': not distillation.teacher
        or recipe.model.windows == "predicted",
        "[run] mixup and cutmix need an even batch_size": not (run.mixup or run.cutmix) or run.batch_size % 2 == 0,
        f"[data] border_px = {data.border_px}; give 0 or more, less than image_px = {data.image_px}": data.augmentation
        != "crop_flip"
        or 0 <= data.border_px < data.image_px,
        f"[run] label_smoothing = {run.label_smoothing}; give a share": 0 <= run.label_smoothing <= 1,
        f"[run] ema = {run.ema}; give a share below 1": 0 <= run.ema < 1,
        f"[optimiser] layer_decay = {optimiser.layer_decay}; give a share above 0": optimiser.layer_decay is None
        or 0 < optimiser.layer_decay <= 1,
    }
    least = {
        "[data] image_px": (data.image_px, 1),
        "[data] workers": (data.workers, 0),
        "[run] seed": (run.seed, 0),
        "[run] evaluate_epochs": (run.evaluate_epochs, 1),
        "[run] log_steps": (run.log_steps, 1),
        "[run] checkpoint_steps": (run.checkpoint_steps, 0),
        "[run] mixup": (run.mixup, 0),
        "[run] cutmix": (run.cutmix, 0),
        "[windows] lr_scale": (windows.lr_scale, 0),
        "[optimiser] lr": (optimiser.lr, 0),
        "[optimiser] min_lr": (optimiser.min_lr, 0),
        "[optimiser] weight_decay": (optimiser.weight_decay, 0),
        "[optimiser] warmup_epochs": (optimiser.warmup_epochs, 0),
        "[optimiser] clip": (optimiser.clip, 0),
    }
    rules |= {f"{key} = {value}; give {low} or more": low <= value < math.inf for key, (value, low) in least.items()}
    for problem, holds in rules.items():
        if not holds:
            raise UsageError(f"The recipe cannot be run: {problem}.")


def _path(source: str, folder: Path) -> str:
    return source if not source or source.startswith(("hf:", "vitrail:")) else str((folder / source).absolute())


def _model(name: str, folder: Path) -> str:
    return resolve_name(name, folder) if name else ""
