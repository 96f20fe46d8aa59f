"""`vitrail doctor`: what is installed here and what of it works, to read or to paste into a bug report."""

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

import vitrail
from vitrail.cli.entry import app

_READING = ("numpy", "xarray", "zarr", "matplotlib", "starlette", "uvicorn", "pillow", "scipy")
"""What opening, serving and reporting a finished study needs."""

_MODELS = ("torch", "torchvision", "timm", "accelerate", "safetensors", "scikit-learn", "openTSNE")
"""What running a model needs as well."""

_EXTRAS = {
    "transformers": "hf",
    "open_clip_torch": "openclip",
    "datasets": "data",
    "pillow-heif": "heic",
    "pydicom": "dicom",
    "tensorboard": "train",
}
"""Libraries that some models or files need, and the extra that brings each."""


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print versions, devices and what is missing. Exits with 1 if a study could not be made here."""
    found = _environment()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        for name, value in found.items():
            text = value if isinstance(value, str) else ", ".join(f"{key} {each}" for key, each in value.items())
            typer.echo(f"{name:<12} {text}")
    if found["missing"] != "nothing":
        raise typer.Exit(1)


def _environment() -> dict[str, str | dict[str, str]]:
    """Collects what a bug report should say; imports torch only to ask for devices."""
    from vitrail.app.static_files import STATIC

    reading, models = _versions(_READING), _versions(_MODELS)
    extras = _versions(_EXTRAS)
    missing = [name for name, each in {**reading, **models}.items() if each == "missing"]
    absent = sorted({_EXTRAS[name] for name, each in extras.items() if each == "missing"})
    return {
        "vitrail": vitrail.__version__,
        "python": f"{platform.python_version()} at {sys.executable}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} processors",
        "reading": reading,
        "models": models,
        "extras": {name: each for name, each in extras.items() if each != "missing"},
        "devices": _devices() if models["torch"] != "missing" else "none without torch",
        "page": "built" if (STATIC / "index.html").is_file() else "not built: install from a clone with a network",
        "not here": f"pip install 'vitrail[{','.join(absent)}]'" if absent else "nothing",
        "missing": f"{', '.join(missing)}: pip install 'vitrail[models]'" if missing else "nothing",
    }


def _versions(names: tuple[str, ...] | dict[str, str]) -> dict[str, str]:
    """Version of each distribution, or "missing"."""

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "missing"

    return {name: of(name) for name in names}


def _devices() -> str:
    """The devices that `--device` can name here."""
    import torch

    names = [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
    names += ["mps"] if torch.backends.mps.is_available() else []
    return ", ".join(["cpu", *names])
