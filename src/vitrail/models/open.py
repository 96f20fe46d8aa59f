"""Opening a vision transformer: `open_vit` finds it, describes it and gives a `Vit`."""

import hashlib
import textwrap
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from vitrail.arguments import whole_number
from vitrail.data import PhotographLike
from vitrail.errors import UsageError
from vitrail.markup import html_table
from vitrail.models.choose import OutputReader
from vitrail.models.preprocessing import HALF, ImageSize, Preprocessing, UnknownPreprocessing, override, read_sides
from vitrail.models.processors import read_preprocessing
from vitrail.models.sources import LoadedModel, Request, describe_module, load_model, split_python_name
from vitrail.models.task import Task, as_target, resolve_task
from vitrail.models.zero_shot import Prompts, parse_prompts
from vitrail.tap.anatomy import Anatomy, discover
from vitrail.tap.anatomy_table import anatomy_html
from vitrail.tap.clone import (
    ModuleState,
    WeightState,
    clone_sharing,
    image_channels,
    images_of_model,
    require_images,
    unwrap_compiled,
)
from vitrail.tap.modes import autocast_off, plain_modes
from vitrail.tap.tap import KnownTrials, Tap

__all__ = ["PRECISIONS", "Vit", "open_vit", "require_vit"]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Vit:
    """An opened vision transformer: the model as it is, its anatomy, and a tap per thread.

    Every pass is one of `model` as it then is: its weights, buffers, hooks and attributes may change after opening, its
    blocks and heads may not. Hooks of your own are called in these passes too, as they are: an object whose method is a
    hook sees them, unless it leads to modules of the model, of which a pass runs copies; then a copy of it does.
    `weight_digest` is of weights and buffers alone: studies of a model with a hook and without one have the same.

    Attributes:
        name: what it was opened with, such as "timm:deit_tiny_patch16_224".
        model: the user's own module, never edited (of a compiled one, the module inside; a copy where `open_vit` had to
            bring it to another device or precision).
        anatomy: blocks, heads, grid, prefix tokens, as found by tracing.
        task: what its output means: classes, labels, values, a feature vector.
        n_classes: classes or labels it tells apart; None for a model whose output is neither.
        read_output: picks the [image, value] tensor out of what the module returns.
        class_names: one per class, or None.
        weights_source: where the weights come from and, of a file that holds several, which were taken, in words.
        device, precision: where and in which type it runs.
        opened_with: the arguments of `open_vit` that open the same model again, as plain data; None for an own module.
    """

    def __init__(self, loaded: LoadedModel, device: str, precision: str, class_names: Sequence[str] | None) -> None:
        self.name = loaded.name
        self.model = loaded.module
        self._preprocessing = loaded.preprocessing
        self.task: Task = loaded.task or _task_of_count(loaded)
        self.n_classes = self.task.n_classes
        self.read_output = OutputReader(loaded.output)
        self.weights_source = loaded.weights_source
        self.device, self.precision = device, precision
        self.class_names = _match_class_names(class_names, loaded, self.n_classes)
        self.opened_with: dict[str, Any] | None = None
        self._taps = threading.local()
        self._trials = KnownTrials()
        self._digest: tuple[WeightState, str, str, list[float]] | None = None
        self._clone: tuple[ModuleState, nn.Module] | None = None

    @cached_property
    def anatomy(self) -> Anatomy:
        """Found by tracing the model once, when first asked for."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn((3, self.n_channels, *self.image_size), generator=generator)
        return discover(self.model, images.to(self.device, PRECISIONS[self.precision]))

    @property
    def image_size(self) -> tuple[int, int]:
        """(rows, columns) of the images that the model takes, in pixels."""
        return self._preprocessing.size

    @cached_property
    def n_channels(self) -> int:
        """Channels of the images that the model takes: 3 for photographs."""
        return image_channels(self.model)

    @property
    def preprocessing(self) -> Preprocessing:
        """The steps from a photograph to the model's input.

        Raises:
            UsageError: nobody stated them, so no photograph can be shown to this model.
        """
        if isinstance(self._preprocessing, UnknownPreprocessing):
            raise UsageError(
                f"How photographs are prepared for {self.name} is not known: {self._preprocessing.reason}. Give "
                "open_vit(.., mean=(..), std=(..)) the values that the model was trained with (--mean, --std), or "
                "preprocessing= a vitrail.Preprocessing, transforms of torchvision or a processor of transformers; "
                'for an untrained model, weights="random" says so.'
            )
        return self._preprocessing

    @property
    def preprocessing_source(self) -> str:
        """Where the preprocessing comes from, or that it is not known and why, in words."""
        if isinstance(self._preprocessing, UnknownPreprocessing):
            return f"unknown: {self._preprocessing.reason}"
        return self._preprocessing.source

    @property
    def n_layers(self) -> int:
        """Number of blocks with attention."""
        return len(self.anatomy.blocks)

    @property
    def n_heads(self) -> tuple[int, ...]:
        """Heads of each layer."""
        return tuple(block.heads for block in self.anatomy.blocks)

    @property
    def weight_digest(self) -> str:
        """SHA-256 over names, shapes and bytes of the state dict, as hex; anew where its tensors were written to."""
        return self._digests()[0]

    @property
    def buffer_digest(self) -> str:
        """The same over the buffers that the state dict lacks (`persistent=False`), such as a temperature, without
        their floating-point numbers: models compute sines and the like, whose last bits depend on the processor."""
        return self._digests()[1]

    @property
    def buffer_values(self) -> list[float]:
        """Of each buffer with floating-point numbers that the state dict lacks, by name: its root mean square, and two
        sums with random factors, which differ by rounding between processors and by more between buffers."""
        return self._digests()[2]

    def _digests(self) -> tuple[str, str, list[float]]:
        if self._digest is None or not self._digest[0].is_of(self.model):
            state = self.model.state_dict()
            buffers = {name: each for name, each in self.model.named_buffers() if name not in state}
            forms = dict(_form_of(name, each) for name, each in buffers.items())
            values = [value for _, each in sorted(buffers.items()) for value in _values_of(each)]
            self._digest = WeightState(self.model), _digest_of(state), _digest_of(forms), values
        return self._digest[1:]

    def prepare(self, images: Iterable[PhotographLike] | PhotographLike) -> Float[Tensor, "image channel row column"]:
        """Photographs as the model's input.

        Args:
            images: photographs of any size and colour mode, as `vitrail.data.as_photograph` takes them; or one.

        Returns:
            [image, channel, row, column] on the model's device and in its precision.

        Raises:
            UsageError: the preprocessing is not known, they are no photographs, or there is none.
            BadImage: one is broken, or its black and white are not defined.
        """
        return self._as_input(self.preprocessing.tensor(images))

    def view(self, image: PhotographLike) -> Image.Image:
        """The part of a photograph that the model sees: resized and cropped, not normalised.

        Args:
            image: a photograph of any size and colour mode: a picture of Pillow, a path, the bytes of a file, an array
                or a tensor, as `vitrail.data.as_photograph` takes them.

        Returns:
            An RGB image of `image_size`.

        Raises:
            UsageError: the preprocessing is not known, or it is no photograph.
            BadImage: it is broken, or its black and white are not defined.
        """
        return self.preprocessing.view(image)

    def prepare_views(self, views: Sequence[Image.Image]) -> Float[Tensor, "image channel row column"]:
        """Views as the model's input: `prepare` for images that were resized already.

        Args:
            views: images from `view`.

        Returns:
            [image, channel, row, column] on the model's device and in its precision.

        Raises:
            UsageError: the preprocessing is not known, or there is no view.
        """
        return self._as_input(self.preprocessing.normalize(views))

    def _as_input(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.device, PRECISIONS[self.precision])

    def tap(self) -> Tap:
        """This thread's tap, made on first use.

        Returns:
            The tap of the calling thread; taps of different threads do not disturb each other.
        """
        if not hasattr(self._taps, "tap"):
            self._taps.tap = Tap(self.model, self.anatomy, self.read_output, self._trials)
        tap: Tap = self._taps.tap
        return tap

    def tap_of_variant(self, model: nn.Module) -> Tap:
        """A tap of a variant of the model whose blocks are the same but for numbers, such as one with moved windows.

        Args:
            model: The variant, whose anatomy is that of this model.

        Returns:
            A new tap; what it may leave out of a run from the middle is tried once for all variants.
        """
        return Tap(model, self.anatomy, self.read_output, self._trials.for_variant(self.model, model))

    @torch.no_grad()
    def logits(self, images: Float[Tensor, "image channel row column"]) -> Float[Tensor, "image class"]:
        """The model's own answer, untapped: logits, or the pooled feature of a model without classifier.

        Args:
            images: [image, channel, row, column], as `prepare` gives them.

        Returns:
            [image, class] logits; [image, channel] for a model without classifier.

        Raises:
            UsageError: These are no images for the model.
        """
        require_images(images)
        state, plain = self._plain
        with images_of_model(plain, images, self.anatomy.image_shape), autocast_off():
            logits = self.read_output(plain(images))
        state.note_pass(self.model)
        return logits

    def look(self, image: PhotographLike, **options: Any) -> xr.Dataset:
        """Every analysis of one image: `vitrail.look` of this model.

        Args:
            image: the photograph, as `view` takes it.
            options: those of `vitrail.look`, such as `measures="heads"` or `patch=(3, 4)`.

        Returns:
            The arrays of a study with one image, and those of one image only.
        """
        from vitrail.one_image import look

        return look(self, image, **options)

    def what_if(self, image: PhotographLike, **changes: Any) -> xr.Dataset:
        """What the answer becomes if heads, patches or windows are changed: `vitrail.what_if.what_if` of this model.

        Args:
            image: the photograph, as `view` takes it.
            changes: `heads_off="L2H0,L3H1"`, `patches=[(3, 4)]` with `how="removed"`, `windows=[..]`, and the other
                options of `vitrail.what_if.what_if`.

        Returns:
            Answer, drift of tokens and attention, step by step.
        """
        from vitrail.what_if import what_if

        return what_if(self, image, **changes)

    def __getstate__(self) -> dict[str, Any]:
        """All but what a copy makes for itself when it is used."""
        return {name: value for name, value in vars(self).items() if name not in _OF_THIS_COPY}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _taps=threading.local(), _trials=KnownTrials(), _digest=None, _clone=None)

    @property
    def _plain(self) -> tuple[ModuleState, nn.Module]:
        """An untapped clone in evaluation mode, and the state of the user's module, which keeps its own mode."""
        if self._clone is None or not self._clone[0].is_of(self.model):
            self._clone = ModuleState(self.model), clone_sharing(self.model)
        return self._clone

    def __repr__(self) -> str:
        size = "x".join(map(str, self.image_size))
        heads = sorted(set(self.n_heads))
        return (
            f"Vit({self.name}: {self.n_layers} layers, {'/'.join(map(str, heads))} heads, {size} px, "
            f"{self.task}, {self.precision} on {self.device}; weights: {self.weights_source}; "
            f"preprocessing: {self.preprocessing_source})"
        )

    def _repr_html_(self) -> str:
        """Its anatomy as a table, for notebooks."""
        facts = [
            ("answers with", str(self.task)),
            ("input", f"{self.image_size[0]} x {self.image_size[1]} pixels"),
            ("weights", self.weights_source),
            ("preprocessing", self.preprocessing_source),
            ("runs", f"{self.precision} on {self.device}"),
        ]
        return html_table(self.name, facts) + anatomy_html(self.anatomy)


_OF_THIS_COPY = ("_taps", "_trials", "_digest", "_clone")


def require_vit(vit: object) -> None:
    """Refuses what is no opened model, as a module.

    Args:
        vit: As a user gave it.

    Raises:
        UsageError: It is none.
    """
    if not isinstance(vit, Vit):
        raise UsageError(
            f"An opened model is needed, and a {type(vit).__name__} was given: vit = vitrail.open_vit(..) opens "
            "modules and names."
        )


@plain_modes()
def open_vit(
    model: str | Path | nn.Module,
    *,
    image_size: ImageSize | None = None,
    weights: str | Path | None = None,
    device: str = "cpu",
    precision: str = "float32",
    n_classes: SupportsIndex | None = None,
    class_names: Iterable[str] | None = None,
    task: str | None = None,
    output: str | int | None = None,
    target: Any = None,
    prompts: Any = None,
    preprocessing: Any = None,
    mean: SupportsFloat | Iterable[SupportsFloat] | None = None,
    std: SupportsFloat | Iterable[SupportsFloat] | None = None,
    interpolation: str | None = None,
    crop: float | str | None = None,
) -> Vit:
    """Opens a vision transformer, unedited.

    Args:
        model: "timm:NAME", "hf:NAME", "tv:NAME", "openclip:NAME/TAG", a folder with a config.json (timm's or
            transformers' form), "vitrail:photos" (the small model that comes with Vitrail), "FILE.py:FUNCTION" (runs
            that file and calls the function without arguments; it returns the module), or any `nn.Module` that takes
            [image, 3, row, column].
        image_size: pixels, one number or (rows, columns), where it is not the model's own.
        weights: a file: safetensors, the index.json of safetensors in shards, or a .pth, .pt, .ckpt or .bin file of
            tensors, as timm's train.py, Lightning, DINO and others write them. Of several state dicts in a file the
            averaged ones (state_dict_ema, teacher) are taken, as timm and DINO do; "FILE:KEY" names another.
            `weights_source` says which were taken. None for the library's own; "random" for an untrained model, also
            to say so of a module handed over, whose photographs may then be prepared in any way.
        device: as torch names it.
        precision: "float32", "bfloat16", "float16" or "float64".
        n_classes: of a new or own classifier; 0: none, the output is a feature vector. None with a weights file: as
            many as the classifier in the file has.
        class_names: one per class.
        task: what the output means, where the model's library or configuration does not say so or says otherwise:
            "classes" (softmax), "labels" (a sigmoid each), "regression" (values), "embedding" (a feature vector) or
            "none". A module of unknown origin needs it for measures of importance, unless `n_classes` is given or its
            last layer is a linear one with a name such as `head`, `fc` or `classifier`.
        output: name or index of one of several outputs.
        target: a number that is explained in place of a class: a function of the output, [image, value] -> [image],
            or a vector whose cosine with the output is taken (of another image, of a text, the mean of a class). A
            study tells it from others by its name and by what it gives for fixed outputs.
        prompts: of a whole CLIP or SigLIP model, which they make a classifier: a file with a prompt a line, or
            "CLASS<tab>PROMPT" (prompts of one class are averaged); a sequence of prompts; or a mapping of class to
            prompt, prompts or text features.
        preprocessing: how photographs are prepared, where the model's library, configuration or image processor does
            not say so or says otherwise: a `Preprocessing`, its `as_dict`, timm's data configuration, the transforms()
            of torchvision's weights or an image processor of transformers.
        mean: per channel or one number, on values 0..1; in place of the model's own.
        std: per channel or one number, on values 0..1; in place of the model's own.
        interpolation: such as "bicubic"; in place of the model's own.
        crop: "center", "squash" or "border", a share such as 0.875, or both: "squash:0.875".

    Returns:
        The opened model. Where its preprocessing is not known, it runs on tensors and refuses photographs.

    Raises:
        UnknownModel: the name leads nowhere.
        WeightsMismatch: the weights file does not fit.
        ModelError: the image processor beside the weights is broken.
        NoAttention: it is no vision transformer.
        Unsupported: it cannot be followed.
        UsageError: an argument has no meaning here.

    Example:
        >>> import vitrail
        >>> vit = vitrail.open_vit("vitrail:photos")
        >>> vit.image_size
        (64, 64)
    """
    if precision not in PRECISIONS:
        raise UsageError(f"There is no precision {precision!r}; choose from {', '.join(PRECISIONS)}.")
    image_size = None if image_size is None else _plain_size(image_size)
    n_classes = None if n_classes is None else whole_number("n_classes", n_classes)
    stated = None if preprocessing is None else read_preprocessing(preprocessing)
    names = None if class_names is None else tuple(map(str, class_names))
    by_class = None if prompts is None else parse_prompts(prompts)
    request = Request(image_size, weights, n_classes, stated, output, by_class)
    if isinstance(model, nn.Module):
        loaded = _own_module(unwrap_compiled(model), request)
    else:
        loaded = load_model(str(model), request)
    loaded.output = output
    loaded.task = resolve_task(
        loaded.task or _task_of_count(loaded), task, n_classes, names or loaded.class_names, as_target(target)
    )
    if stated is not None:
        loaded.preprocessing = stated if image_size is None else stated.with_size(image_size)
    elif isinstance(loaded.preprocessing, UnknownPreprocessing) and weights == "random":
        half = HALF[:1] * image_channels(loaded.module)
        loaded.preprocessing = Preprocessing(
            loaded.preprocessing.size, half, half, source="assumed, as the weights are random: mean = std = 0.5"
        )
    loaded.preprocessing = override(
        loaded.preprocessing,
        mean=_per_channel("mean", mean, loaded.module),
        std=_per_channel("std", std, loaded.module),
        interpolation=interpolation,
        crop=crop,
    )
    _move(loaded, device, precision, own=isinstance(model, nn.Module))
    vit = Vit(loaded, device, precision, names)
    if not isinstance(model, nn.Module):
        vit.opened_with = {
            "model": _absolute_name(str(model)),
            "image_size": image_size,
            "weights": str(weights if weights in (None, "random") else Path(weights).absolute()) if weights else None,
            "precision": precision,
            "n_classes": n_classes,
            "task": task,
            "output": output,
            "prompts": _as_plain_data(by_class),
            "target": loaded.task.target.vector if loaded.task.target is not None else None,
        }
    _ = vit.anatomy  # a model that cannot be followed is refused here, not in the middle of a study
    return vit


def _digest_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_as_numbers(tensor).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _form_of(name: str, buffer: Tensor) -> tuple[str, Tensor]:
    """A buffer by its name and type, with zeros in place of its finite floating-point numbers."""
    numbers = _floating_point_numbers(buffer)
    if numbers is None:
        return name, buffer
    return f"{name} of {buffer.dtype}", torch.where(numbers.isfinite(), 0, numbers)


def _values_of(buffer: Tensor) -> list[float]:
    """The root mean square of a buffer's finite numbers, and two sums with random factors, as far from 0."""
    numbers = _floating_point_numbers(buffer)
    if numbers is None or not numbers.numel():
        return []
    numbers = torch.where(numbers.isfinite(), numbers, 0).flatten()
    factors = torch.randn((2, len(numbers)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = len(numbers) ** -0.5
    return [float(numbers.norm() * scale), *(factors @ numbers * scale).tolist()]


def _floating_point_numbers(buffer: Tensor) -> Tensor | None:
    """In float64; real and imaginary parts of complex numbers; None of a buffer of whole numbers."""
    numbers = _as_numbers(buffer).cpu()
    if numbers.is_complex():
        numbers = torch.view_as_real(numbers)
    return numbers.double() if numbers.is_floating_point() else None


def _as_numbers(tensor: Tensor) -> Tensor:
    """The numbers of a parameter or buffer; of quantised weights (a class of their own) what they stand for."""
    plain = tensor.detach()
    plain = plain if type(plain) is Tensor else plain.dequantize()
    return plain.to_dense().resolve_conj().resolve_neg()


def _plain_size(size: Any) -> int | tuple[int, int]:
    """An image size in numbers of Python; one number stays one, as some libraries take no two."""
    rows, columns = read_sides(size)
    return rows if np.ndim(size) == 0 else (rows, columns)


def _per_channel(name: str, values: Any, module: nn.Module) -> Sequence[Any] | None:
    """One number for each channel of the model's images."""
    if values is None:
        return None
    channels = image_channels(module)
    is_one = np.ndim(values) == 0 and not isinstance(values, Iterator)
    by_channel = [values] * channels if is_one else list(values)
    if len(by_channel) != channels:
        raise UsageError(
            f"{name} has {len(by_channel)} numbers and this model's images {channels} channel{'s' * (channels != 1)}; "
            f"give one number for each (--{name}), or one for all."
        )
    return by_channel


def _as_plain_data(prompts: Prompts | None) -> dict[str, Any] | None:
    if prompts is None:
        return None
    return {name: each.tolist() if isinstance(each, Tensor) else list(each) for name, each in prompts.items()}


def _absolute_name(name: str) -> str:
    """With the whole path of what lies on this disk, so that the model opens from other folders too."""
    python = split_python_name(name)
    if python is not None:
        return f"{python[0].absolute()}:{python[1]}"
    source, colon, place = name.rpartition(":")
    is_folder = source in ("", "hf") and place and Path(place).is_dir()
    return f"{source}{colon}{Path(place).absolute()}" if is_folder else name


def _own_module(module: nn.Module, request: Request) -> LoadedModel:
    if request.file is not None:
        raise UsageError(
            f"weights={str(request.file)!r} was given with a module, which has weights already: load them into the "
            "module before it is opened."
        )
    loaded = describe_module(module, request)
    loaded.name = f"module:{type(module).__name__}"
    loaded.weights_source = "random" if request.weights == "random" else "those of the module"
    return loaded


def _task_of_count(loaded: LoadedModel) -> Task:
    """Of a folder or library that says only how many classes there are."""
    if loaded.n_classes is None:
        return Task("embedding", "it has no classifier")
    return Task("classes", f"{loaded.n_classes} classes stated by {loaded.name or 'its source'}", loaded.n_classes)


def _move(loaded: LoadedModel, device: str, precision: str, *, own: bool) -> None:
    """On the device and in the precision asked for; a module of the user's own is copied first if it must change."""
    try:
        torch_device = torch.device(device)
        torch.empty(0, device=torch_device)
    except (RuntimeError, AssertionError) as error:
        here = ["cpu", *([torch.accelerator.current_accelerator()] if torch.accelerator.is_available() else [])]
        raise UsageError(
            f"There is no device {device!r} here; there is {' and '.join(map(str, here))} "
            f"({textwrap.shorten(str(error).splitlines()[0], 120, placeholder=' ..')})."
        ) from error
    dtype = PRECISIONS[precision]
    weights = [weight for weight in loaded.module.parameters() if weight.is_floating_point()]
    if all(weight.dtype == dtype and weight.device.type == torch_device.type for weight in weights):
        return
    if own:
        import copy

        loaded.module = copy.deepcopy(loaded.module)
    loaded.module.to(torch_device, dtype)


def _match_class_names(
    class_names: Sequence[str] | None, loaded: LoadedModel, n_classes: int | None
) -> tuple[str, ...] | None:
    names = tuple(class_names) if class_names is not None else loaded.class_names
    if names is None or n_classes is None:
        return None
    if len(names) != n_classes:
        if class_names is None:
            return None
        raise UsageError(f"{len(names)} class names were given for a model of {n_classes} classes.")
    return names
