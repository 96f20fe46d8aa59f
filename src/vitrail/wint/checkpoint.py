"""Where a run stands, in one safetensors file: weights, averaged weights, the optimiser's state, step and best result.

One file, replaced whole: a run that is killed leaves the last complete checkpoint. Nothing is pickled.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vitrail.errors import DamagedStudy
from vitrail.models.checkpoint import write_tensors
from vitrail.outputs import write_atomically

__all__ = ["load", "save"]


def save(
    path: Path,
    model: nn.Module,
    average: nn.Module | None,
    optimiser: torch.optim.Optimizer,
    progress: Mapping[str, Any],
) -> None:
    """Writes a checkpoint.

    Args:
        path: The file, replaced whole.
        model: The weights that are trained.
        average: The averaged weights.
        optimiser: Whose state is kept by the parameters' names.
        progress: Plain data; everything random is a function of the recipe's seed and of the step in it.
    """
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    if average is not None:
        tensors |= {f"average/{name}": tensor for name, tensor in average.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser/{key}/{name}"] = torch.as_tensor(value)
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    header = {"progress": json.dumps(progress)}
    write_atomically(path, lambda beside: write_tensors(beside, tensors, header))


def load(
    path: Path, model: nn.Module, average: nn.Module | None, optimiser: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Puts a checkpoint back.

    Args:
        path: The file.
        model: Gets its weights.
        average: Gets the averaged weights.
        optimiser: Gets its state.

    Returns:
        The progress that was saved; None where there is no checkpoint yet.

    Raises:
        DamagedStudy: The file does not read back as a checkpoint of this model.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            progress: dict[str, Any] = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        model.load_state_dict(_without_prefix("model/", tensors))
        if average is not None:
            average.load_state_dict(_without_prefix("average/", tensors))
        _load_optimiser(optimiser, model, tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedStudy(
            f"{path} is no checkpoint of this model ({type(error).__name__}: {str(error)[:200]}). Remove it to start."
        ) from error
    return progress


def _load_optimiser(optimiser: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        state = {
            key.split("/")[1]: tensor
            for key, tensor in tensors.items()
            if key.startswith("optimiser/") and key.split("/", 2)[2] == name
        }
        if state:
            optimiser.state[parameter] = {
                # PyTorch keeps the step on the CPU
                key: value if key == "step" else value.to(parameter)
                for key, value in state.items()
            }


def _without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
