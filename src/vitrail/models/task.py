"""What a model's output means: classes, labels, values or a feature vector. Measures of importance follow it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitrail.errors import ModelError, Unsupported, UsageError
from vitrail.models.choose import OutputReader
from vitrail.tap.clone import clone_sharing, first_weight, image_channels, images_accepted

__all__ = ["TASKS", "Target", "Task", "as_target", "library_task", "module_task", "resolve_task"]

CLASSES, LABELS, REGRESSION, EMBEDDING, NONE, UNKNOWN = (
    "classes",
    "labels",
    "regression",
    "embedding",
    "none",
    "unknown",
)

TASKS = (CLASSES, LABELS, REGRESSION, EMBEDDING, NONE)
"""Those that can be declared: one class of many (softmax), any number of labels (a sigmoid each), values, a feature
vector, and an output that none of these describes."""

_CLASSIFIER_NAMES = frozenset(
    {"classification_head", "classifier", "fc", "head", "heads", "linear_head", "logits", "mlp_head", "to_logits"}
)
"""What people call the layer that gives the logits."""

_SIGMOID = {torch.sigmoid, Tensor.sigmoid, Tensor.sigmoid_, nn.functional.sigmoid, torch.special.expit}

_SUM_TOLERANCE = 1e-3
"""Rows of probabilities sum to 1 up to this; half precision rounds sums of many classes so."""

_WITHOUT = {
    REGRESSION: "the model has no classifier, its outputs are values",
    EMBEDDING: "the model has no classifier, its output is a feature vector",
    NONE: "the model has no classifier",
}


@dataclass(frozen=True, eq=False)
class Target:
    """A number that is read off the model's output in place of a class, given by the user.

    Attributes:
        name: What it is called in a plan.
        function: Takes the output [image, value] and returns [image].
        vector: The numbers of a target that is the cosine with a vector; None for any other function.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    vector: list[float] | None = None

    def __call__(self, output: Float[Tensor, "*batch value"]) -> Float[Tensor, "*batch"]:
        """The number of each image.

        Args:
            output: The model's output [.., value].

        Raises:
            UsageError: The function does not return one finite number per image.
        """
        rows = output.flatten(0, -2)
        values = self.function(rows)
        if not isinstance(values, Tensor) or values.shape != rows.shape[:1]:
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise UsageError(
                f"The target {self.name} gave {shape} for an output of shape {list(rows.shape)}; it takes [image, "
                f"value] and returns a tensor [image], here [{len(rows)}]."
            )
        if not values.isfinite().all():
            raise UsageError(f"The target {self.name} is not finite (NaN or infinite) for some images.")
        return values.float().reshape(output.shape[:-1])


@dataclass(frozen=True)
class Task:
    """What the output of a model means.

    Attributes:
        kind: One of `TASKS`, or "unknown".
        source: Where that comes from, in words.
        n_outputs: Numbers per image: classes, labels, values or channels; None where nobody counted them.
        target: A number of the user's, read off the output.
        last_step: "softmax" or "sigmoid" where the output is probabilities already; empty where it is logits or other
            numbers.
    """

    kind: str
    source: str
    n_outputs: int | None = None
    target: Target | None = None
    last_step: str = ""

    @property
    def n_classes(self) -> int | None:
        """Classes or labels; None where the output is neither."""
        return self.n_outputs if self.kind in (CLASSES, LABELS) else None

    @property
    def multi_label(self) -> bool:
        """Each output is a label of its own, of which any number may hold."""
        return self.kind == LABELS

    @property
    def has_value(self) -> bool:
        """One number per image is explained: the target, or the only output of a regression."""
        return self.target is not None or (self.kind == REGRESSION and self.n_outputs == 1)

    def without(self, what: str) -> str:
        """Why the model lacks something that its output would have to give, as a phrase.

        Args:
            what: What is lacking.

        Raises:
            UsageError: Nobody knows what the output means.

        Returns:
            A phrase.
        """
        self.require_known()
        if what == "a classifier":
            return _WITHOUT[self.kind]
        return f"{what} is needed, and the task of this model is {self.kind} ({self.source})"

    def require_known(self) -> None:
        """Raises `UsageError` where nobody knows what the output means."""
        if self.kind == UNKNOWN:
            raise UsageError(
                f"What the output of this model means is not known: {self.source}. Give --task, in Python "
                'open_vit(.., task=..): "classes" (softmax), "labels" (a sigmoid each), "regression" (values), '
                '"embedding" (a feature vector) or "none".'
            )

    def log_probabilities(self, logits: Float[Tensor, "*batch class"]) -> Float[Tensor, "*batch class"]:
        """ln P of each class by softmax, or of each label by its sigmoid, in nats.

        Args:
            logits: [.., class].

        Returns:
            Nats, at most 0.
        """
        logits = logits.float()
        return torch.nn.functional.logsigmoid(logits) if self.multi_label else logits.log_softmax(-1)

    def probabilities(self, logits: Float[Tensor, "*batch class"]) -> Float[Tensor, "*batch class"]:
        """Probability of each class by softmax, or of each label by its sigmoid.

        Args:
            logits: [.., class].

        Returns:
            0 to 1.
        """
        logits = logits.detach().float()
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)

    def outcome_logits(self, logits: Float[Tensor, "*batch class"]) -> Float[Tensor, "*batch question outcome"]:
        """Logits whose softmax over outcomes gives the answer to each question that the model answers.

        One question with all classes as outcomes, or one for each label with the outcomes yes and no.

        Args:
            logits: [.., class].

        Returns:
            Logits of each question's outcomes.
        """
        logits = logits.float()
        return torch.stack([logits / 2, -logits / 2], -1) if self.multi_label else logits[..., None, :]

    def label_log_probability(
        self, logits: Float[Tensor, "*batch class"], labels: Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch"]:
        """ln P(label), in nats: the cross-entropy, or a label's binary cross-entropy, with its sign turned.

        Args:
            logits: [.., class].
            labels: Index of the class or label.

        Returns:
            Nats, at most 0.
        """
        return self.log_probabilities(logits).gather(-1, labels.long()[..., None])[..., 0]

    def value(self, output: Float[Tensor, "*batch value"]) -> Float[Tensor, "*batch"]:
        """The number that is explained, of a task that has one.

        Args:
            output: The model's output [.., value].

        Returns:
            The number, in the unit of the output or target.
        """
        assert self.has_value
        return self.target(output) if self.target is not None else output.float()[..., 0]

    def __str__(self) -> str:
        words = {
            CLASSES: f"{self.n_outputs} classes",
            LABELS: f"{self.n_outputs} labels",
            REGRESSION: "a value" if self.n_outputs == 1 else f"{self.n_outputs or 'some'} values",
            EMBEDDING: "no classes, a feature vector",
            NONE: "no classes",
            UNKNOWN: "task not known",
        }[self.kind]
        target = f", target {self.target.name}" if self.target is not None else ""
        return f"{words} ({self.source}){target}"


def as_target(target: Any) -> Target | None:
    """A user's target: a function of the output, or a vector whose cosine with the output is looked at.

    Args:
        target: A callable [image, value] -> [image], or a vector of numbers; None for none.

    Raises:
        UsageError: It is neither.

    Returns:
        The target; None for none.
    """
    if target is None or isinstance(target, Target):
        return target
    if callable(target):
        return Target(getattr(target, "__qualname__", type(target).__name__), target)
    try:
        vector = torch.as_tensor(np.asarray(target, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"target={type(target).__name__} has no meaning; give a vector, or a function [image, value] -> [image]."
        ) from error
    if vector.ndim != 1 or not vector.isfinite().all() or not vector.any():
        raise UsageError(f"A target of shape {list(vector.shape)} has no direction; give one vector, not zero.")

    def cosine(output: Tensor) -> Tensor:
        if output.shape[-1] != len(vector):
            raise UsageError(f"The target has {len(vector)} numbers and the model's output {output.shape[-1]}.")
        return torch.nn.functional.cosine_similarity(output.float(), vector.to(output.device), dim=-1)

    import hashlib

    digest = hashlib.sha256(vector.numpy().tobytes()).hexdigest()[:12]
    return Target(f"cosine with a given vector ({digest})", cosine, vector.tolist())


def resolve_task(
    stated: Task, task: str | None, n_classes: int | None, class_names: Sequence[str] | None, target: Target | None
) -> Task:
    """The task of a model, after what its user says.

    Args:
        stated: What the model or its library says.
        task: What the user says, one of `TASKS`; None for nothing.
        n_classes: As the user gives it; 0 for a feature vector.
        class_names: As the user gives them.
        target: The user's.

    Raises:
        UsageError: What the user says has no meaning, or does not fit the output.

    Returns:
        The task, with names and target.
    """
    if task is not None and task not in TASKS:
        raise UsageError(f"There is no task {task!r}; choose from {', '.join(TASKS)}.")
    if task is None:
        task, source = _implied(stated, n_classes, class_names)
    else:
        source = "given"
    width = stated.n_outputs
    if task in (CLASSES, LABELS):
        if n_classes == 0:
            raise UsageError(f'n_classes=0 says that there are no classes, and task="{task}" that there are.')
        if n_classes is not None and width is not None and n_classes != width:
            raise UsageError(f"n_classes={n_classes} was given, and the model's output has {width} numbers per image.")
        width = width or n_classes or (len(class_names) if class_names is not None else None)
        if width is None or (task == CLASSES and width < 2):
            raise UsageError(
                f'task="{task}" was given, and the output has {width or "no known number of"} numbers per image '
                f'({stated.source}). For one number choose "labels" (its sigmoid) or "regression".'
            )
        if stated.last_step:
            raise UsageError(
                f"The model returns probabilities: its last step is a {stated.last_step}, and Vitrail, which takes "
                f"logits, would take another. Open it without that {stated.last_step}, or with "
                'task="none" for what needs no classes.'
            )
    elif n_classes:
        raise UsageError(f'n_classes={n_classes} has no meaning with task="{task}"; leave one of them out.')
    return replace(stated, kind=task, source=source, n_outputs=width, target=target)


def _implied(stated: Task, n_classes: int | None, class_names: Sequence[str] | None) -> tuple[str, str]:
    """Kind and source where no task is given: classes that are counted or named say that there are classes."""
    if n_classes == 0:
        return (stated.kind, stated.source) if stated.kind == NONE else (EMBEDDING, "n_classes=0 was given")
    if stated.kind in (UNKNOWN, REGRESSION) and n_classes is not None and n_classes > 1:
        return CLASSES, "n_classes was given"
    if stated.kind == UNKNOWN and class_names is not None:
        return CLASSES, "class names were given"
    return stated.kind, stated.source


# --- what libraries say ----------------------------------------------------------------------------------------------


def library_task(module: nn.Module) -> Task | None:
    """The task that a model's library or its own configuration states; None for a module of unknown origin.

    Args:
        module: A model of timm, transformers, torchvision or open_clip, or one that counts its classes itself.

    Returns:
        The task; None where nobody states it.
    """
    if _is_of(module, "open_clip"):
        return Task(EMBEDDING, "open_clip's image tower")
    if _is_of(module, "transformers") and hasattr(module, "config"):
        return _transformers_task(module)
    if isinstance(getattr(module, "pretrained_cfg", None), dict) and hasattr(module, "num_classes"):
        return _timm_task(module)
    return None


def _is_of(module: nn.Module, library: str) -> bool:
    return any(each.__module__.partition(".")[0] == library for each in type(module).__mro__)


def _transformers_task(module: Any) -> Task:
    config = module.config
    name = next(each.__name__ for each in type(module).__mro__ if each.__module__.startswith("transformers."))
    if "ForImageClassification" in name:
        count = int(getattr(config, "num_labels", 0))
        if count == 0:
            return Task(EMBEDDING, f"{name} without labels")
        problem = getattr(config, "problem_type", None)
        kinds = {"multi_label_classification": LABELS, "regression": REGRESSION, "single_label_classification": CLASSES}
        if problem in kinds:
            return Task(kinds[problem], f"its configuration's problem_type {problem}", count)
        return Task(REGRESSION if count == 1 else CLASSES, f"{name} with {count} label{'s' * (count != 1)}", count)
    purpose = re.search(r"(For[A-Z]\w*|With\w*Head)$", name)
    if purpose:
        return Task(NONE, f"{name} is no classifier of images")
    return Task(EMBEDDING, f"{name} gives features")


def _timm_task(module: Any) -> Task:
    config: dict[str, Any] = module.pretrained_cfg
    count = int(module.num_classes)
    if count == 0:
        return Task(EMBEDDING, "timm's num_classes 0")
    if count == 1:
        return Task(REGRESSION, "timm's num_classes 1: one output tells no classes apart", 1)
    if count == config.get("num_classes") and _is_projection(config):
        return Task(EMBEDDING, f"the projection of {config['architecture']}.{config.get('tag', '')}", count)
    return Task(CLASSES, f"timm's num_classes {count}", count)


def _is_projection(config: dict[str, Any]) -> bool:
    """timm calls the width of an image tower's projection its number of classes (CLIP, Perception Encoder)."""
    from timm.data import infer_imagenet_subset

    name, tag = str(config.get("architecture", "")), str(config.get("tag", ""))
    is_tower = re.search(r"clip|_pe_|eva02_.*merged", f"{name}.{tag}") is not None
    return is_tower and "ft_" not in tag and not config.get("label_names") and infer_imagenet_subset(config) is None


# --- a module of one's own -------------------------------------------------------------------------------------------


@torch.no_grad()
def module_task(module: nn.Module, size: tuple[int, int], reader: OutputReader) -> Task:
    """The task of a module handed over: what its library says, else what one pass shows of its last layer.

    Args:
        module: Any module that takes [image, 3, row, column].
        size: (rows, columns) of its images, in pixels.
        reader: Picks the output.

    Raises:
        UsageError: It returns several outputs, none of which was named.
        Unsupported: It cannot be run on such images, or returns nothing that can be looked at.

    Returns:
        The task.
    """
    stated = library_task(module)
    if stated is not None and stated.kind != UNKNOWN and reader.output is None:
        return stated
    weight = first_weight(module)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((1, image_channels(module), *size), generator=generator).to(weight.device, weight.dtype)
    clone = clone_sharing(module)
    returned: list[tuple[str, nn.Module, Any]] = []
    hooks = [
        inner.register_forward_hook(lambda inner, _, output, path=path: returned.append((path, inner, output)))
        for path, inner in clone.named_modules()
        if path and (isinstance(inner, (nn.Linear, nn.Identity)) or library_task(inner) is not None)
    ]
    sigmoids = _Sigmoids()
    try:
        with images_accepted(module, images.shape), sigmoids:
            whole = clone(images)
    finally:
        for hook in hooks:
            hook.remove()
    output = reader(whole)
    if len(output) != len(images):
        raise Unsupported(
            f"The model returns {len(output)} rows for {len(images)} image; one vector per image is needed. Wrap it in "
            "a module whose forward returns [image, class]."
        )
    same = [(path, inner) for path, inner, raw in returned if _same(raw, output)]
    task = _task_of_layers(module, same, output, pooled=not isinstance(whole, Tensor) or whole.ndim != 2)
    return replace(task, last_step=_last_step(output, sigmoids.results))


class _Sigmoids(TorchFunctionMode):
    """Keeps what sigmoids give."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _SIGMOID:
            self.results.append(result)
        return result


def _last_step(output: Tensor, sigmoids: Sequence[Tensor]) -> str:
    """The function that makes the output probabilities: rows that sum to 1 are no logits."""
    if any(_same(each, output) for each in sigmoids):
        return "sigmoid"
    sums_to_one = bool(((output.float().sum(-1) - 1).abs() <= _SUM_TOLERANCE).all())
    return "softmax" if output.shape[-1] > 1 and sums_to_one and bool((output >= 0).all()) else ""


def _same(returned: Any, output: Tensor) -> bool:
    """A layer's output is the model's, unchanged."""
    try:
        tensor = OutputReader()(returned)
    except (ModelError, UsageError):
        return False
    return tensor.shape == output.shape and torch.equal(tensor, output)


def _task_of_layers(module: nn.Module, same: Sequence[tuple[str, nn.Module]], output: Tensor, *, pooled: bool) -> Task:
    """The task, from the layers whose output is that of the whole model."""
    name, width = type(module).__name__, int(output.shape[-1])
    for path, inner in same:
        stated = library_task(inner)
        if stated is not None:
            return replace(stated, source=f"{stated.source}, its {path}")
    counted = getattr(module, "num_classes", None)
    if counted == 0:
        return Task(EMBEDDING, f"{name}.num_classes is 0", width)
    heads = [(path, inner) for path, inner in same if _CLASSIFIER_NAMES & set(path.split("."))]
    if heads and all(isinstance(inner, nn.Identity) for _, inner in heads):
        return Task(EMBEDDING, f"its {heads[0][0]} is nn.Identity", width)
    if width == 1:
        return Task(REGRESSION, f"{name} has one output", 1)
    if counted == width and isinstance(counted, int):
        return Task(CLASSES, f"{name}.num_classes is {width}", width)
    if heads:
        linear = [path for path, inner in heads if not isinstance(inner, nn.Identity)]
        return Task(CLASSES, f"its output is that of its linear layer {linear[-1]}", width)
    if pooled and not same:
        return Task(EMBEDDING, "the mean over the tokens or positions of its output", width)
    return Task(UNKNOWN, f"{name} returns {width} numbers per image, and nothing says what they are", width)
