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

__all__ = ["load", "save", "storable"]

PLAIN = (Tensor, int, float, str, type(None))
"""Types of a state's values that a checkpoint gives back as they were."""


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
        optimiser: Whose state is kept by the parameters' names, beside the numbers of its groups.
        progress: Plain data; everything random is a function of the recipe's seed and of the step in it.
    """
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    if average is not None:
        tensors |= {f"average/{name}": tensor for name, tensor in average.state_dict().items()}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimiser/{key}/{name}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(optimiser.param_groups):
        groups.append({key: value for key, value in group.items() if isinstance(value, (int, float))})
        for key, value in group.items():
            if isinstance(value, Tensor):
                tensors[f"group/{key}/{index}"] = value
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    header = {"progress": json.dumps(progress), "optimiser": json.dumps({"groups": groups, "numbers": numbers})}
    write_atomically(path, lambda beside: write_tensors(beside, tensors, header))


def storable(optimiser: torch.optim.Optimizer) -> bool:
    """Says whether `save` can keep all that an optimiser remembers.

    Args:
        optimiser: One that has taken a step.

    Returns:
        Whether its state is by parameter, and tensors and numbers only.
    """
    state = optimiser.state_dict()["state"]  # also that of an optimiser within, which `optimiser.state` has not
    values = [value for each in optimiser.state.values() for value in each.values()]
    return len(optimiser.state) == len(state) and all(isinstance(value, PLAIN) for value in values)


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
            header = file.metadata()
            progress: dict[str, Any] = json.loads(header["progress"])
            plain = json.loads(header.get("optimiser", "{}"))  # earlier checkpoints have numbers as tensors, no groups
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        model.load_state_dict(_without_prefix("model/", tensors))
        if average is not None:
            average.load_state_dict(_without_prefix("average/", tensors))
        _load_optimiser(optimiser, model, tensors, plain)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedStudy(
            f"{path} is no checkpoint of this model ({type(error).__name__}: {str(error)[:200]}). Remove it to start."
        ) from error
    return progress


def _load_optimiser(
    optimiser: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
) -> None:
    for name, parameter in model.named_parameters():
        state = {
            key.split("/")[1]: _place(key.split("/")[1], tensor, parameter)
            for key, tensor in tensors.items()
            if key.startswith("optimiser/") and key.split("/", 2)[2] == name
        }
        state |= plain.get("numbers", {}).get(name, {})
        if state:
            optimiser.state[parameter] = state
    if "groups" not in plain:
        return
    for index, (group, numbers) in enumerate(zip(optimiser.param_groups, plain["groups"], strict=True)):
        group.update(numbers)
        for key, tensor in tensors.items():
            if key.startswith("group/") and key.endswith(f"/{index}"):
                name = key.split("/")[1]
                group[name] = _place(name, tensor, group["params"][0])


def _place(key: str, tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of the state where it was, as it was: PyTorch and timm keep the step on the CPU, the rest beside the
    parameter."""
    return tensor if key == "step" else tensor.to(parameter.device)


def _without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
