"""Weights files: safetensors, also in shards, and the checkpoints of training programs. Nothing is ever unpickled.

A checkpoint may hold the weights several times (raw and averaged, student and teacher), under names with prefixes and
beside weights of other modules. `fit_weights` finds those of one model and says in words which it took.
"""

import argparse
import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import WeightsMismatch

__all__ = ["FittedWeights", "fit_weights", "split_weights", "write_tensors"]

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar")
"""Endings of files that hold weights."""

_PREFERENCE = (
    "state_dict_ema",  # timm's train.py; timm itself loads the averaged weights where there are any
    "model_ema",
    "ema_state_dict",
    "ema",
    "teacher",  # DINO, whose own evaluation takes the teacher
    "state_dict",
    "model",
    "model_state_dict",
    "module",
    "target_encoder",
    "encoder",
    "student",
)
"""Which weights are taken where a file holds several that fit and the user names none; others come after these."""

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Parts of names that torch's wrappers put in, at any depth."""

_MAX_DEPTH = 2
"""State dicts lie at the top of a file or at most this many dictionaries deep; deeper lies an optimizer's state."""

_N_NAMES = 3
"""Names listed of each kind in a refusal."""

_ANSI = re.compile(r"\x1b\[[0-9;]*m")

Adapt = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""A library's own conversion of other programs' names and shapes."""


@dataclass(frozen=True)
class FittedWeights:
    """The weights of one model, as a file has them.

    Attributes:
        tensors: By the model's own names.
        problems: Why they do not fit, in words; empty where they fit.
        n_classes: Number of classes that the file's classifier tells apart where only the classifier does not fit;
            0 where the file has none.
        source: Where they are from and what was chosen, in words.
    """

    tensors: dict[str, Tensor]
    problems: str
    n_classes: int | None
    source: str


def split_weights(weights: str | Path) -> tuple[Path, str | None]:
    """Parts FILE:KEY, which names one of several state dicts in a file.

    Args:
        weights: A file, a folder, or a file with a key.

    Returns:
        The path, and the key or None.
    """
    path = Path(weights)
    file, colon, key = str(weights).rpartition(":")
    if colon and key and not path.exists() and Path(file).exists():
        return Path(file), key
    return path, None


def fit_weights(weights: str | Path, module: nn.Module, n_classes: int | None, adapt: Adapt | None) -> FittedWeights:
    """Reads a file and finds the weights of a model in it.

    Args:
        weights: FILE or FILE:KEY; FILE may be the index of sharded safetensors, or a folder that holds it.
        module: The model; not edited.
        n_classes: Number of its classes; None where it has no classifier.
        adapt: The conversion of the model's library, for names and shapes of other programs.

    Returns:
        The weights; `problems` says whether they fit.

    Raises:
        WeightsMismatch: The file cannot be read without unpickling, or holds no such weights.
    """
    path, key = split_weights(weights)
    parts = _state_dicts(_read(path))
    if not parts:
        raise WeightsMismatch(f"{path} holds no tensors by name, so no weights.")
    own = module.state_dict()
    name, others = _choose(path, parts, key, own)
    fitted = _fit(path, parts[name], own, n_classes, adapt)
    sentences = [f"{name} of {path}" if name else str(path)]
    if others:
        sentences.append(
            f"it also holds {', '.join(others)}; name one as {path.name}:{others[0]} to take that instead"
            if key is None
            else f"of {', '.join([name, *others])}"
        )
    return FittedWeights(
        fitted.tensors, fitted.problems, fitted.n_classes, "; ".join([*sentences, *filter(None, [fitted.source])])
    )


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        path = index if index.is_file() else path / "model.safetensors"
    if not path.is_file():
        raise WeightsMismatch(f"There is no weights file {path}.")
    if path.name.endswith(".json"):
        return _read_shards(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, Mapping):
        raise WeightsMismatch(f"{path} holds a {type(content).__name__}, not tensors by name.")
    return content


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise WeightsMismatch(_unreadable(path, error)) from error


def _read_torch(path: Path) -> Any:
    """What `torch.save` wrote, if it is made of tensors, plain values and the `argparse.Namespace` of timm and DINO."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        objects = _unsafe_objects(path, str(error))
        if not objects:
            raise WeightsMismatch(_unreadable(path, error)) from error
        raise WeightsMismatch(
            f"{path} holds Python objects beside its tensors ({', '.join(objects)}), which only unpickling would open; "
            "Vitrail never unpickles. Where you trust the file, save the tensors alone, in Python: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=False)['state_dict'], 'weights.safetensors')."
        ) from error
    except Exception as error:
        raise WeightsMismatch(_unreadable(path, error)) from error


def _unsafe_objects(path: Path, message: str) -> list[str]:
    """Names of the classes and functions in a file that are neither tensors nor plain values."""
    try:
        objects = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError, pickle.UnpicklingError):  # a file of an old form, of which torch names the first
        objects = set(re.findall(r"GLOBAL ([\w.]+)", message))
    return sorted(objects - {"argparse.Namespace"})


def _unreadable(path: Path, error: Exception) -> str:
    reason = " ".join(_ANSI.sub("", str(error)).split())[:200]
    return (
        f"{path} cannot be read as weights ({type(error).__name__}: {reason}). Vitrail reads safetensors and files of "
        "torch.save that hold tensors and plain values, and never unpickles."
    )


def _read_shards(index: Path) -> Mapping[str, Tensor]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(file) for file in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsMismatch(
            f"{index} is no index of sharded safetensors: it needs a 'weight_map' from names to files."
        ) from error
    tensors: dict[str, Any] = {}
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise WeightsMismatch(f"{index} names the shard {file!r}, which is no safetensors file beside it.")
        if not (index.parent / file).is_file():
            raise WeightsMismatch(f"{index} names the shard {file}, which is not in {index.parent}.")
        tensors |= _read_safetensors(index.parent / file)
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise WeightsMismatch(f"The shards of {index} lack {len(absent)} of its tensors: {_list(absent)}.")
    return tensors


def _state_dicts(content: Mapping[Any, Any], depth: int = 0) -> dict[str, dict[str, Tensor]]:
    """Dictionaries of tensors by name, by their key in the file; "" for the file itself."""
    nested: dict[str, dict[str, Tensor]] = {}
    if depth < _MAX_DEPTH:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Mapping):
                for inner, tensors in _state_dicts(value, depth + 1).items():
                    nested[f"{key}.{inner}" if inner else key] = tensors
    if nested:
        return nested
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return {"": tensors} if tensors else {}


# --- choosing and fitting --------------------------------------------------------------------------------------------


def _choose(
    path: Path, parts: dict[str, dict[str, Tensor]], key: str | None, own: Mapping[str, Tensor]
) -> tuple[str, list[str]]:
    """The state dict to take, and others in the file that fit the model as well."""
    scores = {name: max(_prefixes(_unwrap(tensors), own).values(), default=0) for name, tensors in parts.items()}
    best = max(scores.values())
    fitting = [name for name in parts if scores[name] == best]
    if key is None:
        order = {name: index for index, name in enumerate(_PREFERENCE)}
        fitting.sort(key=lambda name: order.get(name, len(order)))
        return fitting[0], fitting[1:]
    if key in parts:
        return key, [name for name in fitting if name != key]
    for name in fitting:
        inside = {each: value for each, value in parts[name].items() if each.startswith(f"{key}.")}
        if inside:
            parts[key] = inside
            return key, []
    keys = [name for name in parts if name] or sorted({name.partition(".")[0] for name in parts[""]})
    raise WeightsMismatch(f"{path} holds no weights under {key!r}; it has {', '.join(keys[:12])}.")


def _unwrap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {name: name for name in tensors}
    for wrapper in _WRAPPERS:
        names = {name: bare.replace(wrapper, "") for name, bare in names.items()}
    return {names[name]: value for name, value in tensors.items()}


def _prefixes(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Counter[str]:
    """For each prefix how many of the model's own names the file has behind it."""
    counts: Counter[str] = Counter()
    for name in tensors:
        bare, prefix = name, ""
        while bare:
            if bare in own:
                counts[prefix] += 1
            head, dot, bare = bare.partition(".")
            prefix += head + dot
    return counts


def _fit(
    path: Path, tensors: dict[str, Tensor], own: Mapping[str, Tensor], n_classes: int | None, adapt: Adapt | None
) -> FittedWeights:
    raw = _unwrap(tensors)
    prefix = _one_prefix(path, _prefixes(raw, own))
    bare = {name.removeprefix(prefix): value for name, value in raw.items() if name.startswith(prefix)}
    best, best_count = bare, _count_problems(bare, own)
    for start in (bare, raw) if adapt is not None and best_count else ():
        try:
            adapted = adapt(start)  # type: ignore[misc]
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError):
            continue  # the library does not know this form: what is refused is the file as it is
        if _count_problems(adapted, own) < best_count:
            best, best_count = adapted, _count_problems(adapted, own)
    notes = []
    if prefix and len(bare) < len(raw):
        outside = [name for name in raw if not name.startswith(prefix)]
        notes.append(f"tensors under {prefix!r}, without {len(outside)} of other modules ({_list(outside)})")
    resampled = [
        f"{name} from {list(bare[name].shape)} to {list(value.shape)}"
        for name, value in best.items()
        if name in bare and bare[name].numel() != value.numel()
    ]
    if resampled:
        notes.append(f"resampled by the model's library: {_list(resampled)}")
    problems = _describe_problems(best, own) if best_count else ""
    return FittedWeights(best, problems, _classes_of(best, own, n_classes), "; ".join(notes))


def _one_prefix(path: Path, counts: Counter[str]) -> str:
    if not counts:
        return ""
    most = max(counts.values())
    prefixes = [prefix for prefix, count in counts.items() if count == most]
    if "" in prefixes:
        return ""
    if len(prefixes) > 1:
        names = [prefix.rstrip(".") for prefix in prefixes]
        raise WeightsMismatch(
            f"{path} holds the model several times, under {', '.join(names)}. Name one: {path.name}:{names[0]}."
        )
    return prefixes[0]


def _count_problems(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> int:
    return len(tensors.keys() ^ own.keys()) + sum(
        not _same_form(tensors[name], own[name]) for name in own if name in tensors
    )


def _same_form(tensor: Tensor, own: Tensor) -> bool:
    """The same shape, and numbers of the same kind: integers in place of floats are a quantised model's."""
    return tensor.shape == own.shape and tensor.is_floating_point() == own.is_floating_point()


def _classes_of(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], n_classes: int | None) -> int | None:
    if n_classes is None or tensors.keys() - own.keys():
        return None
    missing = own.keys() - tensors.keys()
    other = [name for name in own if name in tensors and not _same_form(tensors[name], own[name])]
    if any(own[name].ndim == 0 or len(own[name]) != n_classes for name in (*missing, *other)):
        return None
    if missing:
        return 0 if not other else None
    sizes = {len(tensors[name]) for name in other if tensors[name].shape[1:] == own[name].shape[1:]}
    return sizes.pop() if len(sizes) == 1 else None


def _describe_problems(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    if not tensors.keys() & own.keys():
        return f"it holds {len(tensors)} tensors ({_list(tensors)}) and none of the model's {len(own)} ({_list(own)})"
    forms = [
        f"{name} is {_form(tensors[name])}, not {_form(own[name])}"
        for name in own
        if name in tensors and not _same_form(tensors[name], own[name])
    ]
    kinds = (
        ([name for name in own if name not in tensors], "missing"),
        ([name for name in tensors if name not in own], "not in the model"),
        (forms, "of another shape"),
    )
    return "; ".join(f"{len(items)} {what}: {_list(items)}" for items, what in kinds if items)


def _form(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{list(tensor.shape)}{kind}"


def _list(items: Any) -> str:
    names = list(items)
    return f"{', '.join(names[:_N_NAMES])}{' ...' if len(names) > _N_NAMES else ''}"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Writes a file of safetensors.

    Args:
        path: The file.
        tensors: By name; contiguous, on the CPU, no two of them of one storage.
        header: Texts by name, which go into the file's header.

    Raises:
        OSError: The disk does not take it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, None if header is None else dict(header))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
