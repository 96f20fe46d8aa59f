"""A structural copy of a model that shares every tensor with the original.

The tap works on such a copy, so the user's modules are never touched, another thread that runs them is never
disturbed, and nothing can be left behind.
"""

import copy
import inspect
import traceback
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, compress, starmap
from operator import eq, is_
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from vitrail.errors import Unsupported, UsageError

__all__ = [
    "CANNOT_RUN",
    "ModuleState",
    "WeightState",
    "clone_sharing",
    "first_weight",
    "has_compiled_parts",
    "image_channels",
    "images_accepted",
    "images_of_model",
    "require_images",
    "unwrap_compiled",
]


def clone_sharing(model: nn.Module) -> nn.Module:
    """Copies the modules of a model, not its tensors nor the objects that its hooks alone use, in evaluation mode.

    Compiled modules, the model itself or parts of it, are unwrapped: what is observed is the uncompiled model. Gradient
    checkpointing is off in the copy: it runs blocks a second time in the backward pass, where no tap watches.

    Args:
        model: Any module.

    Returns:
        New module objects with the same parameters and buffers.

    Raises:
        Unsupported: The model is scripted, its activations are quantised, or its modules hold something that Python
            cannot copy.
    """
    model = unwrap_compiled(model)
    _refuse_quantised_activations(model)
    memo = {id(part): part for part in _reachable(model) if isinstance(part, torch.Tensor)} | _objects_of_hooks(model)
    try:
        for module in reversed([*model.modules()]):  # inner ones first
            if _COMPILED in module._modules:
                memo[id(module)] = copy.deepcopy(module._modules[_COMPILED], memo)
        clone: nn.Module = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise Unsupported(
            f"{type(model).__name__} cannot be tapped: its modules cannot be copied ({error}). "
            "Vitrail works on a copy that shares the weights; keep locks, streams and open files out of the modules."
        ) from error
    for module in clone.modules():
        for name in _CHECKPOINTING:
            if getattr(module, name, None) is True:
                setattr(module, name, False)
    return clone.eval()


def _refuse_quantised_activations(model: nn.Module) -> None:
    """Scales that are drawn from the whole batch make each image's numbers depend on what else is on it."""
    for path, module in model.named_modules():
        if type(module).__module__.startswith(_PACKED):
            raise Unsupported(
                f"{path or 'The model'} is a {type(module).__name__} with quantised activations: their scale comes "
                "from everything on the batch, so a head's number would depend on the images and heads beside it. "
                "Open the model as it was before, or quantise it with torchao, whose scales are each token's own."
            )


_PACKED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic.quantized")
"""Where torch keeps the modules whose weights are packed integers and whose inputs are quantised as they run."""


_Key = tuple[int, Any]
"""The identity of an object, sequence or dictionary, and name or number in it."""


class ModuleState:
    """What `clone_sharing` copies of a model, to tell whether a clone made then is still like it.

    That is everything but the numbers in tensors, which are shared, training flags, and objects that hooks alone use:
    which modules, parameters, buffers and hooks there are, and the attributes of modules and of all that these hold,
    such as the factors of LoRA layers. Objects are compared by identity, arrays of NumPy by their bytes, and without a
    loop in Python, since every pass asks. Tensors that hooks put on the model during a pass are no change.

    Args:
        model: The model as it is now; what it holds is kept alive.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap_compiled(model)
        dicts, self._sequences = list[tuple[dict[Any, Any], bool]](), list[Any]()
        self._objects, self._slots = list[Any](), list[tuple[Any, str]]()
        self._arrays, self._bytearrays = list[np.ndarray](), list[bytearray]()
        for part in _reachable(model, _objects_of_hooks(model)):
            if isinstance(part, _SHARED):
                continue
            if isinstance(part, dict):
                dicts.append((part, False))
            elif isinstance(part, (list, set, deque)):
                self._sequences.append(part)
            elif isinstance(part, np.ndarray):
                self._arrays.append(part)
            elif isinstance(part, bytearray):
                self._bytearrays.append(part)
            attributes = _attributes_of(part)
            if attributes is not None:
                dicts.append((attributes, isinstance(part, nn.Module)))
                self._objects.append(part)
            self._slots += [(part, name) for name in _slots_of(part)]
        self._empty = [part for part in (*(part for part, _ in dicts), *self._sequences) if not part]
        self._dicts = [part for part, _ in dicts if part]
        self._compared = [not (of_module and name == "training") for part, of_module in dicts for name in part]
        self._size, self._parts, self._contents = self._size_now(), list(self._parts_now()), list(self._contents_now())
        self._entries = self._entries_now()

    def is_of(self, model: nn.Module) -> bool:
        """Whether a clone made then is still like the model.

        Args:
            model: The model.

        Returns:
            True where nothing that a clone copies has changed, but for tensors that hooks have put there in passes.
        """
        return self._is_same(model) or (bool(_TENSORS_OF_PASSES) and self._adopt(ModuleState(model)))

    def note_pass(self, model: nn.Module) -> None:
        """Takes note, after a pass of a clone, of the tensors that hooks have put on the model itself.

        Args:
            model: The model, which was like the clone before the pass.
        """
        if not self._is_same(model):
            now = ModuleState(model)
            for key, value in self._changes(now):
                for leaf in tree_flatten(value)[0]:
                    if isinstance(leaf, torch.Tensor):
                        _note_tensor_of_pass(leaf, key)
            self._adopt(now)

    def _is_same(self, model: nn.Module) -> bool:
        return (
            unwrap_compiled(model) is self._model
            and not any(self._empty)
            and self._size_now() == self._size
            and all(map(is_, self._parts_now(), self._parts))
            and all(map(eq, self._contents_now(), self._contents))
        )

    def _adopt(self, now: "ModuleState") -> bool:
        """Becomes a later state where that differs by tensors of passes alone."""
        same = now._model is self._model and now._contents == self._contents
        if not same or not all(starmap(_is_of_passes, self._changes(now))):
            return False
        vars(self).update(vars(now))
        return True

    def _changes(self, now: "ModuleState") -> list[tuple[_Key, Any]]:
        """What a later state has where this one has something else, and None for each thing that it lacks."""
        owners = {owner for owner, _ in now._entries}
        lacking = [(key, None) for key in self._entries if key[0] in owners and key not in now._entries]
        return lacking + [each for each in now._entries.items() if self._entries.get(each[0], _ABSENT) is not each[1]]

    def _size_now(self) -> int:
        return sum(map(len, self._dicts)) + sum(map(len, self._sequences))

    def _parts_now(self) -> Iterator[Any]:
        return chain(
            map(type, self._objects),  # parametrisations exchange the class of a module
            chain.from_iterable(self._dicts),
            compress(chain.from_iterable(map(dict.values, self._dicts)), self._compared),
            chain.from_iterable(self._sequences),
            starmap(_slot, self._slots),
        )

    def _contents_now(self) -> Iterator[bytes]:
        return chain(map(np.ndarray.tobytes, self._arrays), map(bytes, self._bytearrays))

    def _entries_now(self) -> dict[_Key, Any]:
        """What dictionaries, sequences and objects hold: by the identity of these, and name or number in them."""
        compared = iter(self._compared)
        entries: dict[_Key, Any] = {
            (id(part), name): value for part in self._dicts for name, value in part.items() if next(compared)
        }
        entries |= {(id(part), number): value for part in self._sequences for number, value in enumerate(part)}
        entries |= {(id(part), ("slot", name)): _slot(part, name) for part, name in self._slots}
        return entries | {(id(part), "type"): type(part) for part in self._objects}


_ABSENT = object()

_TENSORS_OF_PASSES: dict[int, tuple[weakref.ref[torch.Tensor], set[_Key]]] = {}
"""Tensors that hooks have put on a model in passes of clones, by their identity, as long as they are kept; and where:
the user may put one elsewhere, to be used there."""


def _note_tensor_of_pass(tensor: torch.Tensor, key: _Key) -> None:
    identity = id(tensor)
    if identity not in _TENSORS_OF_PASSES:
        reference = weakref.ref(tensor, lambda _: _TENSORS_OF_PASSES.pop(identity, None))
        _TENSORS_OF_PASSES[identity] = reference, set()
    _TENSORS_OF_PASSES[identity][1].add(_place(key))


def _is_of_passes(key: _Key, value: Any) -> bool:
    """Whether a value is a tensor that a hook has put there in a pass, or holds such tensors alone."""
    leaves = tree_flatten(value)[0]
    noted = [_TENSORS_OF_PASSES.get(id(leaf)) for leaf in leaves]
    return bool(leaves) and all(
        each is not None and each[0]() is leaf and _place(key) in each[1]
        for leaf, each in zip(leaves, noted, strict=True)
    )


def _place(key: _Key) -> _Key:
    """Where something is kept: by name, or in a sequence, whose numbers move as a hook adds to it."""
    return (key[0], _ABSENT) if isinstance(key[1], int) else key


def _slot(part: Any, name: str) -> Any:
    return getattr(part, name, _ABSENT)


# --- what a deep copy comes to ---------------------------------------------------------------------------------------


def _reachable(value: Any, without: Container[int] = ()) -> Iterator[Any]:
    """Every object that a deep copy would come to, each once, but for some by identity; of what was compiled, what it
    was before."""
    reached: dict[int, Any] = {}
    waiting: list[Any] = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, nn.Module) and _COMPILED in part._modules:
            part = part._modules[_COMPILED]
        if id(part) not in reached and id(part) not in without:
            reached[id(part)] = part
            yield part
            waiting.extend(_parts_of(part))


def _parts_of(value: Any) -> Iterator[Any]:
    if isinstance(value, _SHARED):
        return
    if isinstance(value, MethodType):
        yield value.__self__
        return
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from value
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:
        yield from value.flat
    yield from (_attributes_of(value) or {}).values()
    yield from (_slot(value, name) for name in _slots_of(value))


def _attributes_of(value: Any) -> dict[str, Any] | None:
    """The attributes of an object; None for one that has none, as containers of Python's own."""
    if isinstance(value, MethodType) or type(value) in _CONTAINERS:
        return None
    attributes = getattr(value, "__dict__", None)
    return attributes if isinstance(attributes, dict) else None


def _slots_of(value: Any) -> list[str]:
    """The names of the attributes that an object has in slots."""
    return [
        name
        for each in type(value).__mro__
        if "__slots__" in vars(each)
        for name, member in vars(each).items()
        if isinstance(member, MemberDescriptorType)
    ]


def _objects_of_hooks(model: nn.Module) -> dict[int, Any]:
    """By identity, the objects of the user's own that hooks are, or are methods of, and what these hold.

    A clone's passes call them as they are, so that a recorder records. The model's own objects are copied with it, and
    so are those that lead to its modules: in a clone they lead to the clone's.
    """
    modules = [module for module in model.modules() if _COMPILED not in module._modules]
    by_module = [hooks for module in modules for name in _HOOKS if (hooks := vars(module).get(name))]
    hooks = [hook for each in by_module for hook in each.values() if not isinstance(hook, _SHARED)]
    if not hooks:
        return {}
    own = {id(part) for part in _reachable(unwrap_compiled(model), {id(each) for each in by_module})}
    module_ids = {id(module) for module in modules}
    shared: dict[int, Any] = {}
    reached: set[int] = set()
    while hooks:
        part = hooks.pop()
        if isinstance(part, _SHARED) or id(part) in own or id(part) in reached:
            continue
        reached.add(id(part))
        parts = [*_reachable(part)]
        if isinstance(part, MethodType) or any(id(each) in module_ids for each in parts):
            hooks.extend(_parts_of(part))
        else:
            shared.update((id(each), each) for each in parts if id(each) not in own)
    return shared


class WeightState:
    """Which tensors a model's weights and buffers are, and how often each has been written to: their values unread.

    A write through `tensor.data`, which torch does not count, goes unnoticed; weights made under
    `torch.inference_mode`, whose writes it does not count either, are taken for others every time.

    Args:
        model: The model as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = [(weakref.ref(tensor), _mark(tensor)) for tensor in _weights(model)]

    def is_of(self, model: nn.Module) -> bool:
        """Whether a model still has these weights.

        Args:
            model: The model.

        Returns:
            True where every tensor is the same object and has not been written to since.
        """
        now = list(_weights(model))
        return len(now) == len(self._tensors) and all(
            reference() is tensor and not tensor.is_inference() and mark == _mark(tensor)
            for tensor, (reference, mark) in zip(now, self._tensors, strict=True)
        )


def _weights(model: nn.Module) -> Iterator[torch.Tensor]:
    return chain(model.parameters(), model.buffers())


def _mark(tensor: torch.Tensor) -> tuple[int, torch.dtype, int]:
    """What changes when a tensor is written to, or is given another memory (as `model.half()` gives it)."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter)  # quantised weights have no memory of their own
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.dtype, tensor.data_ptr() if plain else 0


_SHARED = (str, int, float, type(None), torch.Tensor, type, FunctionType, BuiltinFunctionType, ModuleType)
"""What a clone does not copy."""

_CONTAINERS = (dict, OrderedDict, defaultdict, list, tuple, set, frozenset, deque)
"""Types without attributes."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module has the hooks that are called in passes."""

_COMPILED = "_orig_mod"
"""Where `torch.compile`'s wrapper holds the module that it was given."""

_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing", "use_checkpoint")
"""Switches of gradient checkpointing in timm and open_clip, in transformers, and in Swin's own code."""

_MESSAGE_LENGTH = 200
"""Characters of a library's message that are quoted: the sentence, not the listing that some append."""

CANNOT_RUN = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model raises that does not take what it is given."""


@contextmanager
def images_accepted(model: nn.Module, shape: Sequence[int]) -> Iterator[None]:
    """Around a model's first run, turns what it raises into a sentence.

    Args:
        model: The model.
        shape: [image, channel, row, column] of the images that it is given.

    Returns:
        Nothing; a context manager.

    Raises:
        Unsupported: The model cannot be run on such images.
    """
    try:
        yield
    except CANNOT_RUN as error:
        raise Unsupported(
            f"{type(model).__name__} cannot be run on images of shape {list(shape)} ({_message_of(error)}). "
            f"{_why_no_images(model)}"
        ) from error


def _message_of(error: BaseException) -> str:
    message = " ".join((str(error) or _failed_line(error)).split())[:_MESSAGE_LENGTH]
    return f"{type(error).__name__}: {message}"


def _failed_line(error: BaseException) -> str:
    """The line of code that raised an error without a message, as an assertion does."""
    frames = traceback.extract_tb(error.__traceback__)
    return (frames[-1].line or "") if frames else ""


def _why_no_images(model: nn.Module) -> str:
    """What a model takes in place of images, as far as it says so, and what to do."""
    reads = getattr(model, "main_input_name", "pixel_values")
    if reads not in ("pixel_values", "pixel_values_videos"):
        tower = next((path for path, inner in model.named_modules() if path and _reads(inner) == "pixel_values"), None)
        rest = f" Open its image tower alone: open_vit(model.{tower})." if tower else ""
        if "grid_thw" in inspect.signature(model.forward).parameters:
            return (
                "It takes the patches of all images in one sequence (grid_thw), not images on a batch, so its images "
                "cannot be told apart. Open a tower that takes [image, channel, row, column]."
            )
        return f"It reads {reads}, so it is no vision model; Vitrail opens models that take images.{rest}"
    needed = [
        name
        for name, each in inspect.signature(model.forward).parameters.items()
        if each.default is each.empty and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) > 1:
        return (
            f"Its forward takes {' and '.join(needed)}, and Vitrail opens models of one image. Wrap it in a module "
            f"that holds the rest: forward(self, images): return self.model(images, self.{needed[1]})."
        )
    frames = next((name for name in ("num_frames", "frames") if hasattr(getattr(model, "config", None), name)), None)
    volumes = next((path for path, inner in model.named_modules() if isinstance(inner, nn.Conv3d)), None)
    if frames is not None or volumes is not None:
        why = f"its {volumes} is a convolution in three dimensions" if volumes else f"its configuration states {frames}"
        return (
            f"It takes volumes or several frames ({why}), and Vitrail opens models of single images, [image, channel, "
            "row, column]. To look at a still, wrap it in a module that repeats the image: "
            "forward(self, images): return self.model(images[:, None].expand(-1, self.frames, -1, -1, -1))."
        )
    return "Vitrail opens models that take [image, channel, row, column]; check --image-size."


def _reads(module: nn.Module) -> str | None:
    """What a model of transformers says that it takes."""
    return getattr(module, "main_input_name", None) if hasattr(module, "config") else None


_USUAL_CHANNELS, _MOST_CHANNELS = 3, 16


def require_images(images: object) -> None:
    """Refuses what no model is run on.

    Args:
        images: As a user gave them.

    Raises:
        UsageError: It is no tensor of four axes.
    """
    if not isinstance(images, torch.Tensor) or images.ndim != len(_IMAGE_AXES):
        given = list(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise UsageError(
            f"A model is run on a tensor [{', '.join(_IMAGE_AXES)}], and {given} was given; vit.prepare([photograph]) "
            "makes one."
        )


@contextmanager
def images_of_model(
    model: nn.Module,
    images: torch.Tensor,
    image_shape: tuple[int, ...],
    is_of_reader: Callable[[BaseException], bool] = lambda error: False,
) -> Iterator[None]:
    """Around a run, says so where it fails on images of another type or size, or on another device, than it was opened
    for.

    Args:
        model: What is run.
        images: What it is given.
        image_shape: (channels, rows, columns) of the images that it was opened for, in pixels.
        is_of_reader: Whether an error is that of a reader, which no images have caused.

    Returns:
        Nothing; a context manager.

    Raises:
        UsageError: The model raised an error on such images.
    """
    try:
        yield
    except CANNOT_RUN as error:
        weight = first_weight(model)
        if isinstance(error, torch.OutOfMemoryError) or is_of_reader(error):
            raise
        if tuple(images.shape[1:]) != tuple(image_shape):
            given, opened = (" x ".join(map(str, shape)) for shape in (images.shape[1:], image_shape))
            raise UsageError(
                f"{type(model).__name__} failed ({_message_of(error)}). The images are {given} (channel, row, column), "
                f"and the model was opened for {opened}: give images as vit.prepare makes them, or open the model with "
                "image_size=."
            ) from error
        same = (images.dtype, images.device) == (weight.dtype, weight.device)
        if same or not isinstance(error, RuntimeError | TypeError):
            raise
        raise UsageError(
            f"{type(model).__name__} failed ({_message_of(error)}). The images are {images.dtype} on {images.device}, "
            f"and the weights {weight.dtype} on {weight.device}: if that is why, give images as vit.prepare makes "
            "them, and open a model anew once it was moved or cast."
        ) from error


_IMAGE_AXES = ("image", "channel", "row", "column")


def image_channels(model: nn.Module) -> int:
    """How many channels the images of a model have: as many as its first convolution takes.

    Args:
        model: Any module.

    Returns:
        The number of channels; 3 for a model without a convolution that states none.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            if module.in_channels <= _MOST_CHANNELS:
                return module.in_channels
            break  # a stem without a convolution gives it features: it does not read the image
    config = getattr(model, "config", None)
    stated = getattr(getattr(config, "vision_config", config), "num_channels", None)
    return stated if isinstance(stated, int) else _USUAL_CHANNELS


def first_weight(model: nn.Module) -> torch.Tensor:
    """A weight whose device and precision are those of the model's images.

    Args:
        model: Any module.

    Returns:
        The first parameter or, without any, buffer of floating-point numbers; a number on the CPU where there is none.
    """
    return next((weight for weight in _weights(model) if weight.is_floating_point()), torch.zeros(()))


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s wrapper, or the model itself.

    Args:
        model: Any module.

    Returns:
        The module that was compiled; parts that were compiled on their own stay as they are.

    Raises:
        Unsupported: The model is scripted or traced.
    """
    inner = getattr(model, _COMPILED, model)
    if isinstance(inner, torch.jit.ScriptModule):
        raise Unsupported(
            f"{type(inner).__name__} is a scripted or traced model, whose Python code is gone. "
            "Open the model it was made from."
        )
    assert isinstance(inner, nn.Module)
    return inner


def has_compiled_parts(model: nn.Module) -> bool:
    """Whether the model or a module in it runs compiled, whose sums may be in another order.

    Args:
        model: Any module.

    Returns:
        True where at least one part runs compiled.
    """
    return any(
        _COMPILED in module._modules or module._compiled_call_impl is not None  # `module.compile()` in place
        for module in model.modules()
    )
