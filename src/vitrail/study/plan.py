"""The plan of a study: everything that its numbers depend on, written before the first number is computed.

Two runs with the same plan give the same numbers, byte for byte on a CPU, so a study may be stopped and resumed under
its plan and under no other. No torch here: the plan of a finished study is read without it.
"""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from math import isclose
from pathlib import PurePath
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin

from vitrail.analysis import all_options
from vitrail.data import LabelSource
from vitrail.errors import DamagedStudy, PlanMismatch, StudyError, UsageError, WeightsMismatch

__all__ = [
    "BATCH_SIZE",
    "N_TOP",
    "PART_IMAGES",
    "THUMBNAIL_PX",
    "ModelIdentity",
    "Part",
    "Plan",
    "differences",
    "growing_command",
    "images_in_part",
    "refuse_other_plan",
    "same_buffers",
]

FORMAT = 1
"""Of the folder. Raise it when the layout changes such that older readers would go wrong."""


BATCH_SIZE = 16
"""Images in a pass where nothing is said."""

PART_IMAGES = 64
"""About how many images make a part: what an interruption can cost, and the chunk length of every array."""


N_TOP = 5
"""Classes of `top_class`: as many as the page lists."""

THUMBNAIL_PX = 64
"""Longest side of a thumbnail."""


class Part(NamedTuple):
    """Images `start` to `stop` (exclusive): one chunk of every array, complete or absent.

    Attributes:
        number: Of the part, from 0.
        start: Position of its first image.
        stop: Position after its last.
    """

    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class ModelIdentity:
    """What tells a model from others, as a plan holds it: two of the same name can differ in any of these.

    Attributes:
        weight_digest: Of the weights.
        buffer_digest: Of the buffers that the state dict lacks, but for floating-point numbers; empty in older plans.
        target: Name of the number that is explained in place of a class; None for classes.
        target_values: What it gives for the same made-up outputs every time; None without a target, in older plans,
            and of a function that takes none of them. Such a target is told by its name alone.
        buffer_values: Of each buffer with floating-point numbers that the state dict lacks its root mean square and two
            sums with random factors. None in older plans.
    """

    weight_digest: str
    buffer_digest: str = ""
    target: str | None = None
    target_values: list[float] | None = None
    buffer_values: list[float] | None = None


@dataclass(frozen=True)
class Plan:
    """What the numbers of a study depend on. Fields hold what JSON can, so that a plan reads back equal to itself.

    Attributes:
        model: Name that opens the model.
        weight_digest: Of the weights.
        n_classes: Of the classifier; None without one.
        class_names: Of the classes; None where nobody knows them.
        n_layers: Layers with attention.
        n_heads: Heads of each layer.
        grid: (rows, columns) of patches of all layers where they agree, else None.
        prefix: Tokens before the patches, where all layers agree, else None.
        grids: The grid of each layer; None for a layer without.
        prefixes: The prefix of each layer.
        class_token: The model has one.
        preprocessing: From photograph to input.
        data_digest: Of the images, their labels and masks.
        n_images: How many there are.
        labels_from: The sentence that says how the labels came about.
        measures: Version of each measure that is computed.
        left_out: Why each measure that the model cannot have is left out.
        options: Of the analyses, those that differ from the default.
        precision: Of the passes.
        batch_size: Images in a pass.
        part_size: Images in a part.
        seed: Of all that is random.
        device: Type of device.
        threads: Of torch, which decide the order of sums; a resumed study goes on with those it began with.
        versions: Of the packages that can change a number.
        labels: A `LabelSource`.
        task: What the output means (`vitrail.models.task.TASKS`).
        output: Which of several outputs is looked at.
        target: Name of the number that is explained in place of a class; None for classes.
        weights_from: Where the weights come from; decides no number.
        notes: What is particular about the model's attention; decides no number.
        device_name: Of a GPU, as two kinds of GPU round differently; empty for a processor and in older plans.
        patch_steps: (rows, columns) of pixels from one patch of each layer to the next, None for a layer of which that
            is not known; decides no number. None in older plans.
        block_numbers: Which of the model's blocks each layer is, blocks without attention counted too, as a pruned
            model may have; decides no number. None where that is not known, and in older plans.
        n_blocks: How many blocks there are, None with `block_numbers`.
        own_grid_layers: Layers that return the patches that they are given, on a grid; decides no number. None where no
            measure needs such a layer, and in older plans.
        buffer_digest: As in `ModelIdentity`.
        target_values: As in `ModelIdentity`.
        buffer_values: As in `ModelIdentity`.
        format: Of the folder.
    """

    model: str
    weight_digest: str
    n_classes: int | None
    class_names: list[str] | None
    n_layers: int
    n_heads: list[int]
    grid: list[int] | None
    prefix: int | None
    grids: list[list[int] | None]
    prefixes: list[int]
    class_token: bool
    preprocessing: dict[str, Any]
    data_digest: str
    n_images: int
    labels_from: str
    measures: dict[str, int]
    left_out: dict[str, str]
    options: dict[str, Any]
    precision: str
    batch_size: int
    part_size: int
    seed: int
    device: str
    threads: int
    versions: dict[str, str]
    labels: str
    task: str = ""
    output: str | int | None = None
    target: str | None = None
    weights_from: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    device_name: str = ""
    patch_steps: list[list[int] | None] | None = None
    block_numbers: list[int] | None = None
    n_blocks: int | None = None
    own_grid_layers: list[int] | None = None
    buffer_digest: str = ""
    target_values: list[float] | None = None
    buffer_values: list[float] | None = None
    format: int = FORMAT

    @property
    def depths(self) -> list[float]:
        """Where each layer lies between the input (0) and the output (1): the middle of its block among all blocks."""
        numbers, n_blocks = self.block_numbers, self.n_blocks
        if numbers is None or n_blocks is None:
            numbers, n_blocks = list(range(self.n_layers)), self.n_layers
        return [(number + 0.5) / n_blocks for number in numbers]

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts in order; the last may be short."""
        starts = range(0, self.n_images, self.part_size)
        return tuple(
            Part(number, start, min(start + self.part_size, self.n_images)) for number, start in enumerate(starts)
        )

    def require_model(self, model: ModelIdentity) -> None:
        """Refuses another model than that of the study.

        Args:
            model: One that was opened beside the study.

        Raises:
            WeightsMismatch: Its weights or buffers are not those that were studied.
            UsageError: It explains another target.
        """
        if model.weight_digest != self.weight_digest:
            raise WeightsMismatch(
                f"{self.model} was studied with other weights ({self.weight_digest[:12]}) than those of the model that "
                f"was opened ({model.weight_digest[:12]}). Open it with the studied weights (--weights FILE), or the "
                "study without a model."
            )
        if not same_buffers(self, model, self.precision):
            raise WeightsMismatch(
                f"{self.model} was studied with other buffers than those of the model that was opened: numbers that "
                "its state dict lacks (persistent=False), such as a temperature. Open it as it was then, or the study "
                "without a model."
            )
        if self.target != model.target or not _same_target_values(self, model, self.precision):
            studied, opened = (
                f"the target {target}" if target is not None else "no target" for target in (self.target, model.target)
            )
            raise UsageError(
                f"{self.model} was studied with {studied}, and the model that was opened has "
                f"{'another function of that name' if self.target == model.target else opened}. Open it with the same "
                "target, in Python open_vit(.., target=..), or the study without a model."
            )

    def to_json(self) -> str:
        """The plan as text, with a digest that tells a plan which was changed by hand.

        Returns:
            The same text for the same plan, always.
        """
        content = asdict(self)
        return json.dumps({**content, "digest": _digest(content)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that a text describes.

        Args:
            text: From `to_json`; one without a digest is of an older version and is taken as it is.

        Returns:
            The plan.

        Raises:
            StudyError: The text is not a plan that this version reads.
            DamagedStudy: The plan was changed after it was written.
        """
        content = _json_object(text)
        if content.get("format") != FORMAT:
            raise StudyError(
                f"study.json has format {content.get('format')}, and this Vitrail reads format {FORMAT}; use its "
                "version."
            )
        digest = content.pop("digest", None)
        if digest is not None and digest != _digest(content):
            raise DamagedStudy(
                "study.json was changed after the study had begun (its digest is of another plan), so it no longer "
                "says what the numbers depend on. Restore it from a copy, or begin anew in another folder."
            )
        if "labels" not in content and isinstance(content.get("labels_from"), str):
            content["labels"] = LabelSource.of_sentence(content["labels_from"]).value
        if "task" not in content:  # an older version, which knew classes and feature vectors
            content["task"] = "embedding" if content.get("n_classes") is None else "classes"
            content |= {"output": None, "target": None}
        unknown: dict[str, Any] = dict.fromkeys(
            ("patch_steps", "block_numbers", "n_blocks", "own_grid_layers", "target_values", "buffer_values")
        )
        later = {"weights_from": "", "notes": [], "device_name": "", "buffer_digest": "", **unknown}
        content = {**later, **content}
        names = {field.name for field in fields(cls)}
        if set(content) != names:
            raise StudyError(
                f"study.json is not a plan: these fields are missing or unknown: {sorted(set(content) ^ names)}."
            )
        _refuse_wrong_types(content)
        return cls(**content)


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StudyError(f"study.json is not a plan: {error}.") from error
    if not isinstance(content, dict):
        raise StudyError(f"study.json is not a plan: it holds a {type(content).__name__}, not an object.")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def _refuse_wrong_types(content: dict[str, Any]) -> None:
    """Refuses fields that hold something else than a plan does, as one without a digest may."""
    for field in fields(Plan):
        if not _fits(content[field.name], field.type):
            raise StudyError(f"study.json is not a plan: {field.name} cannot be {_short(content[field.name])}.")
    if content["labels"] not in list(LabelSource):
        raise StudyError(f"study.json is not a plan: labels cannot be {_short(content['labels'])}.")
    for name in ("batch_size", "part_size"):
        if content[name] < 1:
            raise StudyError(f"study.json is not a plan: {name} is {content[name]}, and is 1 or more.")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value of JSON has the type of a field."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is UnionType:
        return any(_fits(value, each) for each in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(each, arguments[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(each, arguments[1]) for each in value.values())
    return annotation is Any or type(value) is annotation


def images_in_part(batch_size: int, part_images: int) -> int:
    """How many images make a part, which has full batches alone.

    Args:
        batch_size: Images in a pass.
        part_images: About how many are to make a part.

    Returns:
        A multiple of `batch_size`.
    """
    return batch_size * max(1, round(part_images / batch_size))


def growing_command(plan: Plan, images: Sequence[str], measures: Sequence[str], out: str) -> str:
    """Writes the command that adds measures to a study, or makes another of its model.

    Args:
        plan: The study's.
        images: Words that name the images.
        measures: Of measures or analyses; none for those that a study has at least.
        out: The folder.

    Returns:
        For a shell, with what the study was given beside the defaults, as far as its plan says so (not the size of its
        images); WEIGHTS stands for the file of weights, and FOLDER for that of masks, where they were given.

    Example:
        growing_command(plan, ["IMAGES"], ["patches"], "study")
        # vitrail study timm:vit_tiny_patch16_224 IMAGES --weights WEIGHTS --measures patches --out study
    """
    words = ["vitrail", "study", plan.model, *images]
    if plan.weights_from and not plan.weights_from.startswith("those of "):
        words += ["--weights", "random" if plan.weights_from == "random" else "WEIGHTS"]
    if plan.options.get("masks") == "given" and "--masks" not in words:
        words += ["--masks", "FOLDER"]
    size = plan.batch_size
    words += ["--batch-size", str(size)] if size != BATCH_SIZE else []
    words += ["--part-images", str(plan.part_size)] if plan.part_size != images_in_part(size, PART_IMAGES) else []
    words += ["--seed", str(plan.seed)] if plan.seed else []
    declared = all_options()
    for name, value in plan.options.items():
        if name in declared and not declared[name].hidden:
            words += [f"--{name.replace('_', '-')}", str(value)]
    usual_task = "embedding" if plan.n_classes is None else "classes"
    is_told = plan.task == usual_task and ".py:" not in plan.model
    words += ["--task", plan.task] if plan.task not in ("", "unknown") and not is_told else []
    words += ["--output", str(plan.output)] if plan.output is not None else []
    words += ["--device", plan.device] if plan.device != "cpu" else []
    words += ["--measures", ",".join(measures)] if measures else []
    words += ["--precision", plan.precision] if plan.precision != "float32" else []
    return shlex.join([*words, "--out", out])


NAMES = {
    "weight_digest": "weights",
    "buffer_digest": "buffers that the state dict lacks",
    "buffer_values": "buffers that the state dict lacks",
    "n_classes": "number of classes",
    "class_names": "class names",
    "data_digest": "images",
    "n_images": "number of images",
    "measures": "measures",
    "left_out": "measures left out",
    "batch_size": "batch size",
    "part_size": "images in a part",
    "device_name": "name of the device",
}
"""Fields whose own name is not what people call them."""


DEVICES = ("device: ", "name of the device: ")
"""How differences of the device begin."""

MIXED_DEVICES = " With --allow-mixed it goes on here; numbers then agree up to rounding only."

NOT_COMPARED = (
    "threads",
    "weights_from",
    "notes",
    "patch_steps",
    "block_numbers",
    "n_blocks",
    "own_grid_layers",
    "labels_from",
)
"""Fields that may differ: a run takes the number of threads from the folder, and the others decide no number, as
digests tell weights and labels."""


SOURCES = ("timm", "hf", "tv", "openclip", "vitrail", "module")
"""How names of models begin that are no places on a disk."""

_VALUES_OF_BUFFER = 3
"""How many numbers of a buffer an identity has."""

BUFFER_ROUNDING = {"bfloat16": 0.01, "float16": 1e-3}
"""By how much numbers of a buffer may differ between processors, as a share of the greatest of them."""

TARGET_ROUNDING = {"bfloat16": 0.05, "float16": 0.01}
"""By how much the values of one target may differ between processors, as a share of the greatest of them."""


def differences(existing: Plan, requested: Plan) -> list[str]:
    """In what two plans differ.

    Args:
        existing: The plan of the folder.
        requested: The plan of this run.

    Returns:
        A phrase for each difference, with both values; fields of `NOT_COMPARED` are left out.
    """
    phrases: list[str] = []
    for field in fields(Plan):
        old, new = getattr(existing, field.name), getattr(requested, field.name)
        if field.name == "options":
            old, new = _with_defaults(old, new), _with_defaults(new, old)
        if old != new and field.name not in NOT_COMPARED and not _is_equal(field.name, existing, requested):
            phrases.extend(_difference(NAMES.get(field.name, field.name), old, new))
    return phrases


def _with_defaults(options: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Options, with the default of each that only the other plan holds, whose word may be "none"."""
    return {name: option.default for name, option in all_options().items() if name in others} | options


def _is_equal(name: str, existing: Plan, requested: Plan) -> bool:
    """Whether two plans agree in a field whose values differ: as rounding goes, or as far as older plans tell."""
    if name == "model":
        same_weights = existing.weight_digest == requested.weight_digest
        return same_weights and _is_local(existing.model) and _is_local(requested.model)
    if name == "device_name":
        return "" in (existing.device_name, requested.device_name)
    if name == "buffer_digest":
        return same_buffers(existing, requested, existing.precision)
    if name == "buffer_values":
        is_told = existing.buffer_digest != requested.buffer_digest
        return is_told or same_buffers(existing, requested, existing.precision)
    if name == "target_values":
        is_told = existing.target != requested.target
        return is_told or _same_target_values(existing, requested, existing.precision)
    return False


def _is_local(model: str) -> bool:
    """Whether a model's name is that of a folder or a Python file, which may lie elsewhere by now."""
    source, _, place = model.partition(":")
    return source not in SOURCES or (source == "hf" and (place.startswith(".") or PurePath(place).is_absolute()))


def same_buffers(one: Plan | ModelIdentity, other: Plan | ModelIdentity, precision: str) -> bool:
    """Whether models have the same buffers outside their state dicts, up to the rounding of other processors.

    Args:
        one: A model.
        other: Another.
        precision: Of the buffers, as plans have it.

    Returns:
        True also where an older plan does not tell.
    """
    if one.buffer_values is None or other.buffer_values is None or "" in (one.buffer_digest, other.buffer_digest):
        return True
    pairs = [*zip(one.buffer_values, other.buffer_values, strict=False)]
    share = BUFFER_ROUNDING.get(precision, 1e-4)
    return (
        one.buffer_digest == other.buffer_digest
        and len(one.buffer_values) == len(other.buffer_values)
        and all(
            _is_close(pairs[start : start + _VALUES_OF_BUFFER], share)
            for start in range(0, len(pairs), _VALUES_OF_BUFFER)
        )
    )


def _is_close(pairs: Sequence[tuple[float, float]], share: float) -> bool:
    """Whether numbers differ by no more than a share of their greatest."""
    size = max((abs(a) for a, _ in pairs), default=0.0)
    return all(isclose(a, b, rel_tol=share, abs_tol=share * size) for a, b in pairs)


def _same_target_values(one: Plan | ModelIdentity, other: Plan | ModelIdentity, precision: str) -> bool:
    """Whether targets of one name are one function, up to the rounding of other processors; True where nobody knows."""
    if one.target_values is None or other.target_values is None:
        return True
    pairs = [*zip(one.target_values, other.target_values, strict=False)]
    share = TARGET_ROUNDING.get(precision, 1e-3)
    return len(one.target_values) == len(other.target_values) and _is_close(pairs, share)


def _difference(name: str, old: Any, new: Any) -> Iterator[str]:
    if name == "target_values":
        yield "target: the folder has another function of this name, by what it gives for the same outputs"
        return
    if not (isinstance(old, dict) and isinstance(new, dict)):
        yield f"{name}: the folder has {_short(old)}, this run {_short(new)}"
        return
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            yield f"{name}, {key}: the folder has {_short(old.get(key))}, this run {_short(new.get(key))}"


def _short(value: Any, length: int = 60) -> str:
    if value is None:
        return "none"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= length else text[: length - 4] + " ..."


def refuse_other_plan(folder: str, existing: Plan, requested: Plan) -> None:
    """Refuses a plan that is not the folder's.

    Args:
        folder: Named in the message.
        existing: The plan of the folder.
        requested: The plan of this run.

    Raises:
        PlanMismatch: The plans differ; the message has every difference.
    """
    phrases = differences(existing, requested)
    if phrases:
        raise PlanMismatch(
            f"{folder} was begun with another plan:\n  "
            + "\n  ".join(phrases)
            + "\nGive the values that the folder has to go on with it, or another folder to begin anew."
            + (MIXED_DEVICES if any(phrase.startswith(DEVICES) for phrase in phrases) else "")
        )
