"""What a training run is: a TOML file that states what it is expected to give and what that costs.

Keys that are not ours, types that do not fit and values without meaning are refused with the keys that are. A recipe is
plain data: the same recipe and seed give the same weights, bit for bit on a CPU.
"""

import difflib
import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from vitrail.data.files import text
from vitrail.errors import UsageError

__all__ = ["Data", "Model", "Optimiser", "Recipe", "Run", "Teaching", "Windows", "read_recipe", "recipe_from"]


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
class Model:
    """A WinT of this shape, or with `timm` that model of timm with window heads.

    windows: "predicted", "fixed" (start in patches) or "none". start: four sides of each window, one window for all
    heads or one a head; of predicted windows as shares of the longest. start_from: a saved WinT whose weights to begin
    with; window heads and a classifier of other classes are drawn anew unless `keep_windows`.
    """

    patch_px: int = 4
    width: int = 96
    depth: int = 6
    heads: int = 4
    mlp_ratio: float = 4.0
    class_token: bool = True
    dropped_paths: float = 0.0
    windows: str = "predicted"
    start: list[list[float]] = field(default_factory=lambda: [[0.38, 0.38, 0.38, 0.38]])
    start_from: str = ""
    keep_windows: bool = False
    timm: str = ""
    timm_args: dict[str, Any] = field(default_factory=dict)
    timm_weights: bool = False


@dataclass(frozen=True)
class Windows:
    """How windows are trained. The temperature falls from `first` to `last` (a geometric path) over the share `until`
    of training. edges: "hard": sides are rounded in evaluation, and in training after the share `hard_from`, with the
    soft windows' gradient; "soft": edges keep the temperature `last` for good, which needs a dense mask. rate: learning
    rate of the window heads relative to the rest."""

    first: float = 1.0
    last: float = 0.15
    until: float = 0.7
    edges: str = "hard"
    hard_from: float = 0.7
    rate: float = 1.0


@dataclass(frozen=True)
class Teaching:
    """Windows of a frozen trained ViT guide the predicted ones: loss += weight * mean |b - b*| / (n - 1).

    folder: the teacher as `open_vit` opens it; empty: none. area: percent of the grid that its windows have. The weight
    grows from 0 over the share `from_share` of training and is 0 after `until`. share: part of each batch that is
    taught. shuffled: each image gets the windows of another, the control with right areas in wrong places.
    """

    folder: str = ""
    weight: float = 0.5
    area: int = 25
    from_share: float = 0.0
    until: float = 1.0
    share: float = 1.0
    shuffled: bool = False


@dataclass(frozen=True)
class Optimiser:
    """timm's optimiser `name`, with a warm-up and a cosine down to `last_rate`."""

    name: str = "adamw"
    rate: float = 1e-3
    last_rate: float = 1e-5
    weight_decay: float = 0.05
    warm_up_epochs: float = 1.0
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
    teacher: Teaching = Teaching()
    optimiser: Optimiser = Optimiser()
    run: Run = Run()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as the run's folder holds it."""
        return asdict(self)


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a TOML file. Raises `UsageError` with the valid keys if it is none."""
    path = Path(path)
    try:
        content = tomllib.loads(text(path))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}.") from error
    return recipe_from(content, path.parent)


def recipe_from(content: Mapping[str, Any], folder: Path = Path()) -> Recipe:
    """The recipe that plain data describes; relative paths count from `folder`."""
    recipe: Recipe = _made(Recipe, content, "the recipe")
    _checked(recipe)
    data, model, teacher = recipe.data, recipe.model, recipe.teacher
    return Recipe(
        **{
            **{each.name: getattr(recipe, each.name) for each in fields(Recipe)},
            "data": Data(**{**vars(data), "train": _path(data.train, folder), "test": _path(data.test, folder)}),
            "model": Model(**{**vars(model), "start_from": _path(model.start_from, folder)}),
            "teacher": Teaching(**{**vars(teacher), "folder": _path(teacher.folder, folder)}),
        }
    )


def _made(kind: Any, content: Any, where: str) -> Any:
    if not isinstance(content, Mapping):
        raise UsageError(f"{where} must be a table, not {content!r}.")
    hints = get_type_hints(kind)
    known = {each.name: each for each in fields(kind)}
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            raise UsageError(f"{where} has no key {key!r}.{meant} Valid keys: {', '.join(known)}.")
    missing = [
        name for name, each in known.items()
        if name not in content and each.default is MISSING and each.default_factory is MISSING
    ]  # fmt: skip
    if missing:
        raise UsageError(f"{where} lacks {', '.join(missing)}. Valid keys: {', '.join(known)}.")
    return kind(**{key: _value(hints[key], value, f"{where}: {key}") for key, value in content.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return _made(hint, value, f"[{where.rpartition(': ')[2]}]")
    if isinstance(hint, types.UnionType):
        return _value(get_args(hint)[0], value, where)
    kind = get_origin(hint) or hint
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"{where} = {value!r} is a {type(value).__name__}; it must be a {kind.__name__}.")
    if kind is list and get_args(hint):
        return [_value(get_args(hint)[0], each, where) for each in value]
    return value


def _checked(recipe: Recipe) -> None:
    data, run, windows, teacher = recipe.data, recipe.run, recipe.windows, recipe.teacher
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
        f"[run] epochs = {run.epochs}; give more than 0": run.epochs > 0,
        f"[windows] first = {windows.first}, last = {windows.last}; both are above 0": min(windows.first, windows.last)
        > 0,
        f"[windows] until = {windows.until}; give a share above 0, at most 1": 0 < windows.until <= 1,
        f"[windows] edges = {windows.edges!r}; choose hard or soft": windows.edges in ("hard", "soft"),
        f"[windows] hard_from = {windows.hard_from}; give a share": 0 <= windows.hard_from <= 1,
        f"[teacher] area = {teacher.area} percent; give 1 to 100": 1 <= teacher.area <= 100,
        f"[teacher] share = {teacher.share}; give a share above 0, at most 1": 0 < teacher.share <= 1,
        '[teacher] a teacher needs [model] windows = "predicted"': not teacher.folder
        or recipe.model.windows == "predicted",
        "[run] mixup and cutmix need an even batch_size": not (run.mixup or run.cutmix) or run.batch_size % 2 == 0,
    }
    for problem, holds in rules.items():
        if not holds:
            raise UsageError(f"The recipe cannot be run: {problem}.")


def _path(text: str, folder: Path) -> str:
    return text if not text or text.startswith(("hf:", "timm:", "tv:", "vitrail:")) else str((folder / text).absolute())
