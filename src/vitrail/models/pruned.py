"""Opens a model from which heads were removed, with the library it comes from and nothing else.

    from load import load
    model = load()                      # of the folder in which this file lies

Layers keep different numbers of heads, which neither timm nor transformers can say in a configuration. So the library
makes the whole model, its attention modules get the sizes that "pruned" in config.json names, and then the weights.
Vitrail opens such a folder with this very file: `open_vit(FOLDER)`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["NoHeads", "load", "shrink", "whole_model"]


class NoHeads(nn.Module):
    """Attention of a layer that lost all heads: what is left is the bias of its output projection.

    `pair`: the library's attention returns (tokens, weights).
    """

    def __init__(self, bias: Tensor, pair: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.pair = pair

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The same for every token, whatever comes in.

        Args:
            tokens: [.., channel].
            *args: What else the library's attention is called with; without effect.
            **kwargs: The same.

        Returns:
            [.., channel], or a pair of it and None.
        """
        out = self.bias.to(tokens).expand(*tokens.shape[:-1], -1)
        return (out, None) if self.pair else out


def load(folder: str | Path | None = None, *, weights: bool = True) -> nn.Module:
    """The smaller model in evaluation mode; without `weights` untrained, with the same sizes.

    Args:
        folder: Folder with config.json and model.safetensors; None for the one in which this file lies.
        weights: Whether the weights are loaded; False leaves them random.

    Returns:
        The model in evaluation mode.
    """
    folder = Path(folder) if folder is not None else Path(__file__).parent
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    state = load_file(folder / "model.safetensors")
    model = whole_model(folder, config)
    shrink(model, config["pruned"], state)
    if weights:
        model.load_state_dict(state)
    return model.eval()


def whole_model(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """The model with all its heads, as the library makes it of a configuration; untrained.

    Args:
        folder: Folder with the configuration.
        config: What its config.json says.

    Returns:
        The model.
    """
    model: nn.Module
    if "model_type" in config:
        import transformers

        kind = getattr(transformers, config["architectures"][0], None)
        if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
            raise ValueError(f"{folder} names {config['architectures'][0]}, which is no model of transformers.")
        model = kind(transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False))
    else:
        import timm

        model = timm.create_model(f"local-dir:{folder}", pretrained=False)
    return model


def shrink(model: nn.Module, changes: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Gives each attention module named in `changes` the sizes that its weights in `state` have.

    A change is {"kept": [..], "linears": ["qkv", "proj"], "counts": {"num_heads": 2, ..}}, `kept` being the heads left
    of the whole model's; or {"kept": [], "pair": false} where no head is left.

    Args:
        model: The model with all its heads; edited in place.
        changes: By path of an attention module: {"kept": [..], "linears": ["qkv", "proj"], "counts": {"num_heads": 2,
            ..}}, `kept` being the heads left of the model with all heads; or {"kept": [], "pair": false} where no
            head is left.
        state: Weights of the smaller model by name.
    """
    for path, change in changes.items():
        if not change["kept"]:
            _put(model, path, NoHeads(torch.zeros_like(state[f"{path}.bias"]), change["pair"]))
            continue
        module = model.get_submodule(path)
        for name in change["linears"]:
            rows, columns = state[f"{path}.{name}.weight"].shape
            _put(module, name, nn.Linear(columns, rows, bias=f"{path}.{name}.bias" in state))
        for name, value in change["counts"].items():
            setattr(module, name, value)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
