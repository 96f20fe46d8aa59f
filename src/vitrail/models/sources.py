"""Where models come from: timm, transformers, torchvision, open_clip, a folder. Nothing is ever unpickled.

Each source gives a `LoadedModel`: the module, how its images are prepared, how many classes it tells apart.
"""

import importlib
import importlib.util
import inspect
import json
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import UnknownModel, Unsupported, UsageError, WeightsMismatch
from vitrail.models.checkpoint import SUFFIXES, FittedWeights, fit_weights, split_weights
from vitrail.models.choose import OutputReader
from vitrail.models.preprocessing import Preprocessing, UnknownPreprocessing
from vitrail.models.processors import (
    module_preprocessing,
    open_clip_preprocessing,
    timm_preprocessing,
    torchvision_preprocessing,
    transformers_preprocessing,
)
from vitrail.models.task import Task, library_task, module_task
from vitrail.models.zero_shot import Prompts, Tokenize, ZeroShot, is_image_text_model, zero_shot
from vitrail.tap.clone import unwrap_compiled

__all__ = [
    "LoadedModel",
    "ModelWithOptions",
    "Request",
    "describe_module",
    "load_model",
    "resolve_name",
    "split_python_name",
]

BUILT_ELSEWHERE = {"vitrail_wint": "vitrail.wint.folder"}
"""Architectures of config.json that a module of ours builds by its `load_folder(folder, config, request)`: named, not
imported, because it lies above this layer."""


BUILT_IN = "vitrail:photos"
"""The small model that comes with Vitrail."""


@dataclass(frozen=True)
class Request:
    """What the user asked for. `weights`: None for the library's own, "random", or a file.

    `preprocessing`: given by the user, so that the model's own need not be read. `prompts`: by class, of a whole CLIP
    model that is to be a classifier.
    """

    image_size: int | tuple[int, int] | None = None
    weights: str | Path | None = None
    n_classes: int | None = None
    preprocessing: Preprocessing | None = None
    output: str | int | None = None
    prompts: Prompts | None = None

    @property
    def sides(self) -> tuple[int, int] | None:
        """(rows, columns) in pixels, if a size was asked for."""
        return None if self.image_size is None else _sides(self.image_size)

    @property
    def pretrained(self) -> bool:
        """The library's own weights are wanted."""
        return self.weights is None

    @property
    def file(self) -> Path | None:
        """A weights file, if one was named."""
        return None if self.weights in (None, "random") else split_weights(str(self.weights))[0]


@dataclass
class LoadedModel:
    """A model as its library gives it.

    `n_classes` is None where it has no classifier; it counts where there is no `task`. `output`: the one of several
    outputs that the user named. `tokenize`: of a model that compares images with texts.
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing | UnknownPreprocessing
    n_classes: int | None
    class_names: tuple[str, ...] | None = None
    adapt_state: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    weights_source: str = ""
    task: Task | None = None
    output: str | int | None = None
    tokenize: Tokenize | None = None


def load_model(name: str, request: Request) -> LoadedModel:
    """The model a name leads to, with its weights.

    Args:
        name: As for `open_vit`.
        request: What the user asked for.

    Returns:
        The model, named as it was asked for.

    Raises:
        UnknownModel: The name leads nowhere, or a library is not installed.
        WeightsMismatch: The weights file does not fit.
        Unsupported: The model does not read images.
    """
    if request.file is not None:
        loaded = _load_file(name, request, str(request.weights))
    else:
        loaded = _build(name, request)
        loaded.weights_source = "random" if request.weights == "random" else f"those of {name}"
    if request.prompts is not None and not isinstance(loaded.module, ZeroShot):
        loaded.module, loaded.task = zero_shot(loaded.module, request.prompts, loaded.tokenize)
        loaded.class_names = tuple(request.prompts)
    loaded.name = name
    return loaded


def _build(name: str, request: Request) -> LoadedModel:
    """The model as its source makes it, with the library's weights or random ones: the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _build_unseeded(name, request)


def _build_unseeded(name: str, request: Request) -> LoadedModel:
    source, _, rest = name.partition(":")
    python = split_python_name(name)
    if source in _SOURCES and rest:
        loaded = _SOURCES[source](rest, request)
    elif python is not None:
        loaded = describe_module(unwrap_compiled(_run_python(*python)), request)
    elif name == BUILT_IN or (Path(name).is_dir() and (Path(name) / "config.json").is_file()):
        loaded = _from_folder(name, request)
    else:
        raise UnknownModel(_unknown_name(name))
    return loaded


def _load_file(name: str, request: Request, weights: str | Path) -> LoadedModel:
    """The model with the weights of a file; where the user states no number of classes, it is the file's."""
    loaded = _build(name, request)
    fitted = _fit(loaded, weights)
    if fitted.n_classes is not None and request.n_classes is None:
        own = loaded.n_classes
        loaded = _build(name, replace(request, n_classes=fitted.n_classes))
        fitted = _fit(loaded, weights)
        classes = f"{loaded.n_classes} classes" if loaded.n_classes else "no classifier"
        fitted = replace(fitted, source=f"{fitted.source}; {classes}, as in the file, where {name} has {own}")
    if fitted.problems:
        raise WeightsMismatch(
            f"{weights} does not fit {name}: {fitted.problems}. Check the architecture, --classes and --image-size."
        )
    _weights_owner(loaded.module).load_state_dict(fitted.tensors)
    loaded.weights_source = fitted.source
    return loaded


def _fit(loaded: LoadedModel, weights: str | Path) -> FittedWeights:
    n_classes = loaded.n_classes
    if loaded.task is not None and loaded.task.kind in ("classes", "labels"):
        n_classes = loaded.task.n_outputs
    return fit_weights(weights, _weights_owner(loaded.module), n_classes, loaded.adapt_state)


def _weights_owner(module: nn.Module) -> nn.Module:
    """The library's own model, whose names a file has."""
    return module.model if isinstance(module, ModelWithOptions) else module


def _unknown_name(name: str) -> str:
    path = Path(name)
    if path.suffix == ".py":
        return f"{name} is a Python file; name the function in it that returns the model: {name}:FUNCTION."
    if path.suffix in SUFFIXES:
        return (
            f"{name} holds weights, not an architecture. Name the architecture and give the file apart, for example: "
            f"timm:vit_tiny_patch16_224 --weights {name}"
        )
    if path.is_dir():
        return f"The folder {name} has no config.json that says what model it holds (timm's or transformers' own form)."
    return (
        f"{name!r} leads to no model. Write timm:NAME, hf:NAME, tv:NAME, openclip:NAME, FILE.py:FUNCTION, a folder "
        "with a config.json, or vitrail:photos for the small model that comes with Vitrail; for example "
        "timm:deit_tiny_patch16_224."
    )


def _library(module: str, extra: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnknownModel(
            f"{name} needs the library {module}, which is not installed here: pip install 'vitrail[{extra}]'"
        ) from error


# --- modules of the user's own ---------------------------------------------------------------------------------------


def describe_module(module: nn.Module, request: Request) -> LoadedModel:
    """Finds the preprocessing and the task of a module of the user's own.

    Args:
        module: Any module; it or a model inside may have the configuration of a library.
        request: What the user asked for; its weights are left alone.

    Returns:
        The module with what its configuration states, without a name.

    Raises:
        Unsupported: The module cannot be run on images of its size, or needs texts.
    """
    if request.prompts is not None:
        classifier, task = zero_shot(module, request.prompts, _module_tokenizer(module))
        loaded = describe_module(classifier, replace(request, prompts=None))
        loaded.task, loaded.class_names = task, tuple(request.prompts)
        return loaded
    if is_image_text_model(module) and getattr(module, "main_input_name", "pixel_values") != "pixel_values":
        raise Unsupported(
            f"{type(module).__name__} compares images with texts, which are missing. Give a prompt for each class "
            "(prompts=, --prompts FILE), which makes it a classifier, or open its image tower alone: "
            "open_vit(model.vision_model)."
        )
    module = _takes_images(module)
    loaded = LoadedModel("", module, request.preprocessing or module_preprocessing(module, request.sides), None)
    timm_config: Any = getattr(module, "pretrained_cfg", None)
    if isinstance(timm_config, dict):
        loaded.class_names = tuple(timm_config.get("label_names") or ()) or None
    loaded.class_names = loaded.class_names or _transformers_class_names(module)
    loaded.task = module_task(module, loaded.preprocessing.size, OutputReader(request.output))
    return loaded


def resolve_name(name: str, folder: Path) -> str:
    """Makes a model's name absolute where it is a path.

    Args:
        name: As `load_model` takes it.
        folder: Where relative paths count from.

    Returns:
        The same model, named from anywhere.
    """
    is_path = name.partition(":")[0] not in _SOURCES and name != BUILT_IN
    return str((folder / name).absolute()) if is_path else name


def split_python_name(name: str) -> tuple[Path, str] | None:
    """Parts FILE.py:FUNCTION.

    Args:
        name: A model's name.

    Returns:
        The file and the function; None for a name of another form.
    """
    file, _, function = name.rpartition(":")
    return (Path(file), function) if file.endswith(".py") and function.isidentifier() else None


def _run_python(file: Path, function: str) -> nn.Module:
    """The module that a function of the user's own file returns; files beside it can be imported."""
    name = f"{file}:{function}"
    if not file.is_file():
        raise UnknownModel(f"There is no file {file}, of which {function} was to return the model.")
    spec = importlib.util.spec_from_file_location(f"vitrail_model_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = code
    sys.path.insert(0, str(file.absolute().parent))
    try:
        spec.loader.exec_module(code)
        make = getattr(code, function, None)
        module = make() if callable(make) else None
    except Exception as error:
        raise UnknownModel(f"{name} raised {_where(file, error)}") from error
    finally:
        sys.path.remove(str(file.absolute().parent))
    if not callable(make):
        functions = [key for key, value in vars(code).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise UnknownModel(f"{file} has no function {function!r}; it has {', '.join(functions) or 'none'}.")
    if not isinstance(module, nn.Module):
        raise UnknownModel(f"{name} returned {type(module).__name__}; Vitrail needs a torch.nn.Module.")
    return module


def _where(file: Path, error: Exception) -> str:
    """The error of the user's code, with the last line of the file on the way to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}{f' at line {lines[-1]}' if lines else ''}: {message or 'no message'}."


# --- timm ------------------------------------------------------------------------------------------------------------


def _from_timm(name: str, request: Request) -> LoadedModel:
    import timm

    bare = name.partition(".")[0]
    if not name.startswith(("hf-hub:", "hf_hub:")) and not timm.is_model(bare):
        raise UnknownModel(f"timm has no model {bare!r}.{_similar(bare, timm.list_models())}")
    options: dict[str, Any] = {}
    if request.image_size is not None:
        options["img_size"] = request.image_size
    if request.n_classes is not None:
        options["num_classes"] = request.n_classes
    module = _construct(
        lambda: timm.create_model(name, pretrained=request.pretrained, **options), f"timm:{name}", request
    )
    return _from_timm_module(module, request)


def _from_timm_module(module: nn.Module, request: Request) -> LoadedModel:
    from timm.data import resolve_model_data_config

    config = getattr(module, "pretrained_cfg", {})
    tag = ".".join(str(config[key]) for key in ("architecture", "tag") if config.get(key))
    preprocessing = timm_preprocessing(resolve_model_data_config(module), f"timm's pretrained_cfg of {tag}")
    if request.image_size is not None:
        preprocessing = preprocessing.with_size(request.image_size)
    names = config.get("label_names")
    classes = int(getattr(module, "num_classes", 0)) or None
    code = sys.modules[type(module).__module__]
    filter_fn = getattr(code, "checkpoint_filter_fn", None)
    adapt = (lambda state: filter_fn(state, module)) if filter_fn else None
    return LoadedModel(
        "", module, preprocessing, classes, tuple(names) if names else None, adapt, task=library_task(module)
    )


def _similar(name: str, names: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, 3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


_REASON_CHARACTERS = 300
"""Of a library's own words in our sentence: enough for the cause, without lists of all known names."""

_UNREACHED = ("couldn't connect to", "locate the file on the Hub", "outgoing traffic has been disabled")
"""What the libraries say, some of them without the Hub's own error, where its files are neither here nor to be had."""


def _reason(error: BaseException) -> str:
    """Why a library could not make a model: the Hub's answer in our words, else the library's own, cut."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    names = {type(cause).__name__ for cause in causes}
    if names & {"RepositoryNotFoundError", "GatedRepoError"}:
        return "the Hugging Face Hub has no such model, or keeps it for accounts that were let in: see `hf auth login`"
    said = " ".join(str(error).split())
    if names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"} or any(words in said for words in _UNREACHED):
        return "its files are not on this computer, and the Hugging Face Hub cannot be reached"
    cut = said if len(said) <= _REASON_CHARACTERS else said[:_REASON_CHARACTERS].rsplit(" ", 1)[0] + " .."
    return f"{type(error).__name__}: {cut}"


def _construct(make: Callable[[], Any], name: str, request: Request) -> nn.Module:
    """Runs a library's constructor; what it says about downloads, arguments or names becomes one sentence."""
    try:
        module = make()
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError, AssertionError) as error:
        advice = (
            "If its weights cannot be downloaded here, give a file with --weights FILE, or --weights random for an "
            "untrained model."
            if request.pretrained
            else "Check the name and the options."
        )
        raise UnknownModel(f"{name} could not be made ({_reason(error)}). {advice}") from error
    assert isinstance(module, nn.Module)
    return module


# --- transformers ----------------------------------------------------------------------------------------------------


def _module_tokenizer(module: nn.Module) -> Tokenize | None:
    """That of open_clip's own models, or of the folder that a transformers model came from; None if none is known."""
    name = str(getattr(module, "name_or_path", ""))
    if hasattr(module, "encode_text"):
        import open_clip

        has_clip_vocabulary = getattr(module, "vocab_size", 0) == open_clip.SimpleTokenizer().vocab_size
        context: Any = getattr(module, "context_length", 0)
        return open_clip.SimpleTokenizer(context_length=int(context)) if has_clip_vocabulary else None
    return _transformers_tokenizer(name, module.config) if name and Path(name).is_dir() else None


def _transformers_tokenizer(name: str, config: Any) -> Tokenize:
    """Texts padded as the text encoders of CLIP and SigLIP were trained: to their full length."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise UnknownModel(
            f"The tokenizer of {name} cannot be read ({' '.join(str(error).split())[:200]}). Put its files beside the "
            "weights, or give text features: prompts={class: vector}."
        ) from error
    length = int(config.text_config.max_position_embeddings)

    def tokenize(texts: list[str]) -> Any:
        return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")

    return tokenize


_TOWERS = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2": "Siglip2VisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "vit_mae": "ViTMAEModel",
}
"""The image towers of models that hold more, which are opened unless a classifier was trained on theirs."""

_CLASSIFYING = "ForImageClassification"
"""How transformers calls models with a classifier of images."""


def _from_transformers(name: str, request: Request) -> LoadedModel:
    transformers = _library("transformers", "hf", f"hf:{name}")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "custom code" in str(error):
            raise Unsupported(
                f"hf:{name} brings Python code of its own, which Vitrail never runs. Read that code, load the model "
                "with transformers yourself, and open it as a module: open_vit(model)."
            ) from error
        raise UnknownModel(
            f"transformers finds no model {name!r} ({_reason(error)}). "
            "Give a folder that holds config.json and model.safetensors, or check the name and the network."
        ) from error
    kind = _transformers_class(transformers, config, request)
    if request.n_classes and not request.pretrained:
        config.num_labels = request.n_classes
    if request.prompts is not None:
        return _whole_image_text_model(transformers, name, config, request)
    if request.pretrained:
        module = _construct(lambda: kind.from_pretrained(name, use_safetensors=True), f"hf:{name}", request)
    else:
        vision = getattr(config, "vision_config", None)
        own = vision if isinstance(vision, kind.config_class) else config
        module = _construct(lambda: kind(own), f"hf:{name}", request)
    if getattr(module, "main_input_name", "pixel_values") != "pixel_values":
        raise Unsupported(
            f"hf:{name} reads {module.main_input_name}, not images: it is no vision model. Vitrail looks at images."
        )
    loaded = _from_transformers_module(transformers, name, module, request)
    loaded.module = _with_call_options(_takes_images(module), loaded.preprocessing.size)
    return loaded


def _whole_image_text_model(transformers: ModuleType, name: str, config: Any, request: Request) -> LoadedModel:
    """Both towers, for prompts."""
    kind = transformers.AutoModel._model_mapping.get(type(config), None)
    if kind is None or not hasattr(config, "text_config"):
        raise Unsupported(
            f"Prompts make classes only of a model that compares images with texts (CLIP, SigLIP); hf:{name} is "
            f"{config.model_type!r}. Leave out the prompts (--prompts)."
        )
    make = (lambda: kind.from_pretrained(name, use_safetensors=True)) if request.pretrained else lambda: kind(config)
    module = _construct(make, f"hf:{name}", request)
    loaded = _from_transformers_module(transformers, name, module, request)
    loaded.tokenize = _transformers_tokenizer(name, config)
    return loaded


class ModelWithOptions(nn.Module):
    """A transformers model called with options that its configuration cannot hold.

    every_patch: ViT-MAE gets every patch in its place; by itself it drops three quarters and shuffles what is left,
    and shuffles even where its configuration says to drop none.
    """

    def __init__(self, model: nn.Module, *, every_patch: bool = False, **options: Any) -> None:
        super().__init__()
        self.model, self.options, self.every_patch = model, options, every_patch
        config: Any = model.config
        if every_patch:
            config.mask_ratio = 0.0
        self.config = config

    def forward(self, images: Tensor) -> Any:
        """What the model returns for [image, channel, row, column].

        Args:
            images: [image, channel, row, column].

        Returns:
            The model's own output.
        """
        options = dict(self.options)
        if self.every_patch:
            patch = self.config.patch_size
            order = torch.arange(images.shape[-2] // patch * (images.shape[-1] // patch), device=images.device)
            options["noise"] = order.float().expand(len(images), -1)
        return self.model(images, **options)


class PatchedImages(nn.Module):
    """SigLIP 2 NaFlex called with images: by itself it takes patches, a mask of real ones and each picture's grid."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        self.config = config
        self.patch = int(config.patch_size)
        self.image_size = math.isqrt(config.num_patches) * self.patch

    def forward(self, images: Tensor) -> Any:
        """What the model returns for [image, channel, row, column].

        Args:
            images: [image, channel, row, column].

        Returns:
            The model's own output.
        """
        cut = images.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)
        grid = cut.shape[2:4]
        patches = cut.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # the channels of a pixel last
        mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=images.device)
        shapes = torch.tensor(grid, device=images.device).expand(len(images), 2)
        return self.model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes)


def _takes_images(module: nn.Module) -> nn.Module:
    """The model, behind one that cuts images into patches where it takes nothing else."""
    takes_patches = "spatial_shapes" in inspect.signature(module.forward).parameters
    is_of_images = getattr(module, "main_input_name", "") == "pixel_values"
    return PatchedImages(module) if takes_patches and is_of_images else module


def _with_call_options(module: nn.Module, size: tuple[int, int]) -> nn.Module:
    """The model, called with options where ViT-MAE or another image size needs them."""
    options: dict[str, Any] = {}
    own: Any = getattr(getattr(module.config, "vision_config", module.config), "image_size", None)
    if (
        own is not None
        and _sides(own) != size
        and "interpolate_pos_encoding" in inspect.signature(module.forward).parameters
    ):
        options["interpolate_pos_encoding"] = True
    every_patch = getattr(module.config, "model_type", "") == "vit_mae"
    return ModelWithOptions(module, every_patch=every_patch, **options) if options or every_patch else module


def _sides(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _transformers_class(transformers: ModuleType, config: Any, request: Request) -> Any:
    stated = (getattr(config, "architectures", None) or [""])[0]
    if config.model_type in _TOWERS and (request.n_classes == 0 or not stated.endswith(_CLASSIFYING)):
        return getattr(transformers, _TOWERS[config.model_type])
    if stated and hasattr(transformers, stated) and request.n_classes != 0:
        return getattr(transformers, stated)
    classes = transformers.AutoModel._model_mapping
    if type(config) not in classes:
        raise Unsupported(f"transformers has no model class for {config.model_type!r}.")
    return classes[type(config)]


def _from_transformers_module(transformers: ModuleType, name: str, module: nn.Module, request: Request) -> LoadedModel:
    config: Any = module.config
    preprocessing: Preprocessing | UnknownPreprocessing
    if request.preprocessing is not None:
        preprocessing = request.preprocessing
    else:
        vision: Any = getattr(config, "vision_config", config)
        preprocessing = transformers_preprocessing(transformers, name, _sides(getattr(vision, "image_size", 224)))
    if request.sides is not None:
        preprocessing = preprocessing.with_size(request.sides)
    task = library_task(module)
    return LoadedModel("", module, preprocessing, None, _transformers_class_names(module), task=task)


def _transformers_class_names(module: nn.Module) -> tuple[str, ...] | None:
    """The names that a transformers model's configuration gives its classes; None where it gives none.

    Args:
        module: Any module.
    """
    labels = getattr(getattr(module, "config", None), "id2label", None) or {}
    names = tuple(str(labels[index]) for index in sorted(labels))
    return names if names and names[0] != "LABEL_0" else None


# --- torchvision, open_clip, folders ---------------------------------------------------------------------------------


def _from_torchvision(name: str, request: Request) -> LoadedModel:
    models = _library("torchvision.models", "all", f"tv:{name}")
    if name not in models.list_models(module=models):
        raise UnknownModel(f"torchvision has no classification model {name!r}.{_similar(name, models.list_models())}")
    options: dict[str, Any] = {}
    if isinstance(request.image_size, int) and name.startswith("vit"):
        options["image_size"] = request.image_size
    if request.n_classes:
        options["num_classes"] = request.n_classes
    weights = models.get_model_weights(name).DEFAULT
    module = _construct(
        lambda: models.get_model(name, weights=weights if request.pretrained else None, **options),
        f"tv:{name}",
        request,
    )
    preprocessing = torchvision_preprocessing(weights.transforms(), f"transforms of torchvision's {weights}")
    if request.image_size is not None:
        preprocessing = preprocessing.with_size(request.image_size)
    if request.n_classes == 0:
        _drop_classifier(module, f"tv:{name}")
    classes = len(weights.meta["categories"]) if request.n_classes is None else request.n_classes or None
    names = tuple(weights.meta["categories"]) if request.n_classes is None else None
    task = Task("classes", f"torchvision's classifier {name}", classes)
    return LoadedModel("", module, preprocessing, classes, names, task=task)


def _drop_classifier(module: nn.Module, name: str) -> None:
    """Torchvision's models take a number of classes, and 0 leaves a linear layer without outputs."""
    for attribute in ("heads", "head", "classifier", "fc"):
        if isinstance(getattr(module, attribute, None), nn.Module):
            setattr(module, attribute, nn.Identity())
            return
    raise Unsupported(f"It is not known which part of {name} is its classifier, so it cannot be opened without one.")


def _from_open_clip(name: str, request: Request) -> LoadedModel:
    open_clip = _library("open_clip", "openclip", f"openclip:{name}")
    architecture, _, tag = name.partition("/")
    if architecture not in open_clip.list_models():
        raise UnknownModel(f"open_clip has no model {architecture!r}.{_similar(architecture, open_clip.list_models())}")
    if request.pretrained and not tag:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise UsageError(f"Say which weights: openclip:{architecture}/TAG with TAG one of {', '.join(tags[:6])}.")
    clip = _construct(
        lambda: open_clip.create_model(
            architecture, pretrained=tag if request.pretrained else None, force_image_size=request.image_size
        ),
        f"openclip:{name}",
        request,
    )
    tower: Any = clip.visual
    preprocessing = _open_clip_tag(open_clip, architecture, tag, tower)
    assert isinstance(tower, nn.Module)
    if request.prompts is not None:
        return LoadedModel("", clip, preprocessing, None, tokenize=open_clip.get_tokenizer(architecture))
    return LoadedModel("", tower, preprocessing, None, task=library_task(tower))


def _open_clip_tag(
    open_clip: ModuleType, architecture: str, tag: str, tower: Any
) -> Preprocessing | UnknownPreprocessing:
    """That of the weights named by the tag; without a tag, the one on which all weights of the architecture agree."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    stated = merge_preprocess_dict(PreprocessCfg(), getattr(tower, "preprocess_cfg", {}))
    tags = [tag] if tag else open_clip.list_pretrained_tags_by_model(architecture)
    by_tag = {
        each: open_clip_preprocessing(
            merge_preprocess_dict(stated, open_clip.get_pretrained_cfg(architecture, each) or {})
            | {"size": tower.image_size},
            f"open_clip's {architecture}/{each}",
        )
        for each in tags
    }
    if not by_tag:
        return open_clip_preprocessing(stated | {"size": tower.image_size}, f"open_clip's default for {architecture}")
    first = next(iter(by_tag.values()))
    if any(each != first for each in by_tag.values()):
        names = ", ".join(f"openclip:{architecture}/{each}" for each in by_tag)
        return UnknownPreprocessing(
            first.size, f"weights of this architecture have different ones; name one of {names}"
        )
    return first


def _from_folder(name: str, request: Request) -> LoadedModel:
    import timm

    folder = Path(__file__).parents[1] / "embedded" if name == BUILT_IN else Path(name)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UnknownModel(f"{folder / 'config.json'} cannot be read as JSON: {error}.") from error
    if "pruned" in config:
        return _from_pruned_folder(folder, config, request)
    if "model_type" in config:
        return _from_transformers(str(folder), request)
    if config.get("architecture") in BUILT_ELSEWHERE:
        build = importlib.import_module(BUILT_ELSEWHERE[config["architecture"]])
        built: LoadedModel = build.load_folder(folder, config, request)
        return built
    if "architecture" not in config:
        raise UnknownModel(f"{folder / 'config.json'} names neither a timm 'architecture' nor a 'model_type'.")
    options = {"num_classes": request.n_classes} if request.n_classes is not None else {}
    if request.image_size is not None:
        options["img_size"] = request.image_size  # type: ignore[assignment]
    if request.pretrained and (folder / "model.safetensors.index.json").is_file():
        return _load_file(name, replace(request, weights=folder), folder)
    if request.pretrained and not (folder / "model.safetensors").is_file():
        raise WeightsMismatch(
            f"{folder} has no model.safetensors. Give another file in it with --weights FILE (safetensors, .pth, .pt, "
            ".ckpt, .bin)."
        )
    module = _construct(
        lambda: timm.create_model(f"local-dir:{folder}", pretrained=request.pretrained, **options), name, request
    )
    loaded = _from_timm_module(module, request)
    names = config.get("label_names")
    loaded.class_names = tuple(map(str, names)) if names else loaded.class_names
    return loaded


def _from_pruned_folder(folder: Path, config: dict[str, Any], request: Request) -> LoadedModel:
    """A model that `vitrail prune` wrote, opened by the loader that lies beside it."""
    from vitrail.models.pruned import load

    if request.image_size is not None or request.n_classes is not None:
        raise UsageError(
            f"{folder} holds a model with heads removed, which opens as it was written: leave out --image-size and "
            "--classes."
        )
    module = _construct(lambda: load(folder, weights=request.pretrained), str(folder), request)
    if "model_type" in config:
        loaded = _from_transformers_module(_library("transformers", "hf", str(folder)), str(folder), module, request)
    else:
        loaded = _from_timm_module(module, request)
        names = config.get("label_names")
        loaded.class_names = tuple(map(str, names)) if names else loaded.class_names
    if "preprocessing" in config:  # exactly that of the whole model, also where the library's own form cannot state it
        loaded.preprocessing = Preprocessing.from_dict(config["preprocessing"])
    return loaded


_SOURCES: dict[str, Callable[[str, Request], LoadedModel]] = {
    "timm": _from_timm,
    "hf": _from_transformers,
    "tv": _from_torchvision,
    "openclip": _from_open_clip,
}
