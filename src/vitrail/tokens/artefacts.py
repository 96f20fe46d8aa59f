"""Tokens of outlying length: which neurons write them, and a model that keeps them in a register instead.

Cause. The length of a token is the sum of what every layer has added to it along its final direction; what an MLP adds
is the sum of what its neurons add. Both sums are exact, so each neuron has its share of the length (our construction).

Cure. A zero token, the register, is put behind the prefix tokens. The neurons that write outlying tokens give it their
strongest activation among the patches, and none to the patches themselves: test-time registers after Jiang et al. 2025
(arXiv 2506.08010); that such tokens hold what trained registers hold is of Darcet et al. 2023 (arXiv 2309.16588).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitrail.errors import Unsupported, UsageError
from vitrail.models.open import Vit, open_vit
from vitrail.models.task import TASKS
from vitrail.sentence import percent
from vitrail.tap.anatomy import Block
from vitrail.tap.attention import Readers
from vitrail.tap.clone import CANNOT_RUN, clone_sharing, first_weight
from vitrail.tokens.levels import input_tokens
from vitrail.tokens.outliers import norm_outliers

__all__ = [
    "ArtefactNeuron",
    "RegisterModel",
    "artefact_neurons",
    "mlp_widths",
    "outlying_patches",
    "with_registers",
    "written_by_layers",
]

MAX_ERROR = 1e-2
"""Of an MLP's output, relative to its length: above it, the output is not the last layer's times a factor a channel."""

Outliers = Bool[Tensor, "image patch"]


class ArtefactNeuron(NamedTuple):
    """A neuron that writes outlying tokens.

    Attributes:
        layer: Zero-based index of the block whose MLP has it.
        neuron: Index among the inputs of the MLP's last linear layer.
        length: What it adds to the length of an outlying token along that token's direction, mean over such tokens.
        share: The same as a share of that length.
    """

    layer: int
    neuron: int
    length: float
    share: float


def outlying_patches(vit: Vit, images: Float[Tensor, "image channel row column"]) -> list[Outliers]:
    """Patches whose token is far longer than the others of its image, layer by layer.

    Args:
        vit: The model; its layers have patches on a grid.
        images: Prepared images.

    Returns:
        True for the outlying patches of each layer, by `vitrail.tokens.outliers.norm_outliers` in each image.
    """
    outliers: dict[int, Outliers] = {}

    def read(layer: int, tokens: Tensor) -> None:
        norms = tokens[:, _prefix(vit, layer) :].float().norm(dim=-1).cpu().numpy()
        outliers[layer] = torch.stack([torch.from_numpy(norm_outliers(each)) for each in norms])

    with torch.no_grad():
        vit.tap().read(images, Readers(output=read))
    return [outliers[layer] for layer in range(vit.n_layers)]


def written_by_layers(
    vit: Vit, images: Float[Tensor, "image channel row column"], layer: int, outliers: Outliers
) -> Float[Tensor, "layer part"]:
    """What each layer's attention and MLP add to the length of outlying tokens, along their direction after `layer`.

    Args:
        vit: The model.
        images: Prepared images.
        layer: Index of the layer after which tokens are outlying.
        outliers: The outlying patches there; at least one.

    Returns:
        Attention and MLP of the layers up to `layer`, in units of the tokens, mean over outlying tokens. With what the
        token holds before the first layer they sum to its length.

    Raises:
        Unsupported: A block does not add its attention to its input first, or the model changes its tokens between two
            blocks with attention, as a block without any does.
    """
    inputs, sums, outputs = _tokens_of_layers(vit, images, layer, outliers)
    direction = outputs[layer] / outputs[layer].norm(dim=-1, keepdim=True)
    parts = [
        torch.stack([((sums[at] - inputs[at]) * direction).sum(-1), ((outputs[at] - sums[at]) * direction).sum(-1)])
        for at in range(layer + 1)
    ]
    return torch.stack(parts).mean(-1)


def artefact_neurons(vit: Vit, images: Float[Tensor, "image channel row column"], n: int = 10) -> list[ArtefactNeuron]:
    """The neurons that write the outlying tokens of some images.

    Looked for is the layer after which most patches are outlying, and of it and the layers before the neurons that add
    most to the length of these patches' tokens.

    Args:
        vit: The model.
        images: Prepared images; a dozen are enough.
        n: How many neurons, at most.

    Returns:
        Those that add most first; empty where no token is outlying.

    Raises:
        Unsupported: As for `written_by_layers`, or the blocks do not add what an MLP gives as its last layer gives it,
            times a factor a channel.
    """
    by_layer = outlying_patches(vit, images)
    counts = [int(each.sum()) for each in by_layer]
    if not max(counts):
        return []
    layer = max(range(len(counts)), key=counts.__getitem__)
    outliers = by_layer[layer]
    mlps = _last_linears(vit, clone_sharing(vit.model), images)
    _, sums, outputs = _tokens_of_layers(vit, images, layer, outliers)
    lengths = outputs[layer].norm(dim=-1)
    direction = outputs[layer] / lengths[:, None]
    ranked: list[ArtefactNeuron] = []
    for at in range(layer + 1):
        linear, h = mlps[at].linear, _patches_in_mlp(vit, at, mlps[at].hidden)
        h = h[outliers.to(h.device)].float()
        scale = _channel_scale(vit, at, outputs[at] - sums[at], linear, h)
        added = (h * ((direction * scale) @ linear.weight.detach().float())).mean(0)
        top = added.topk(min(n, len(added)))
        mean_length = float(lengths.mean())
        ranked += [
            ArtefactNeuron(at, int(index), float(value), float(value) / mean_length)
            for value, index in zip(top.values, top.indices, strict=True)
        ]
    return sorted(ranked, key=lambda each: -each.length)[:n]


def with_registers(vit: Vit, neurons: Sequence[tuple[int, int] | ArtefactNeuron], n_registers: int = 1) -> Vit:
    """The model with registers that take over what its artefact neurons write; nothing is trained.

    Args:
        vit: The model; it is left as it is.
        neurons: Layer and index of each neuron, as `artefact_neurons` gives them.
        n_registers: Zero tokens that are put behind its prefix tokens.

    Returns:
        A model that shares the weights. Its layers have as many prefix tokens more, and every analysis reads it as any
        other; its output, the one that the model was opened for, is made of the tokens of the model itself.

    Raises:
        UsageError: There are no neurons or no registers, or a neuron does not exist.
        Unsupported: The model uses the tokens of its last block in no module that is given them all, or it does not run
            with more tokens than it has.
    """
    if not neurons or n_registers < 1:
        raise UsageError("Registers need at least one neuron to listen to and one token; neither can be none.")
    module = RegisterModel(vit, [(each[0], each[1]) for each in neurons], n_registers)
    try:
        _run(module, _blank_images(vit))
    except CANNOT_RUN as error:
        raise Unsupported(
            f"{vit.name} does not run with registers among its tokens ({type(error).__name__}: {str(error)[:120]}): "
            "its attention or its positions count on the number of tokens that it has."
        ) from error
    opened = open_vit(
        module,
        image_size=vit.image_size,
        device=vit.device,
        precision=vit.precision,
        n_classes=vit.n_classes,
        class_names=vit.class_names,
        task=vit.task.kind if vit.task.kind in TASKS else None,
        output=vit.read_output.output,
        target=vit.task.target,
        preprocessing=vit.preprocessing,
    )
    opened.name = f"{vit.name} with {n_registers} register{'s' if n_registers > 1 else ''}"
    return opened


def mlp_widths(vit: Vit) -> list[int]:
    """How many neurons each layer's MLP has.

    Args:
        vit: The model.

    Returns:
        Inputs of the MLP's last linear layer, by layer.
    """
    mlps = _last_linears(vit, clone_sharing(vit.model), _blank_images(vit))
    return [mlps[layer].linear.in_features for layer in range(vit.n_layers)]


class RegisterModel(nn.Module):
    """A model with test-time registers, as `with_registers` makes it; the weights are those of the model given.

    Args:
        vit: The model.
        neurons: Layer and index of each neuron that writes artefacts.
        n_registers: Number of registers.
    """

    def __init__(self, vit: Vit, neurons: Sequence[tuple[int, int]], n_registers: int) -> None:
        super().__init__()
        self.model = clone_sharing(vit.model)
        blocks = vit.anatomy.blocks
        layouts = {(block.layout, block.tokens, block.prefix, block.grid) for block in blocks}
        if len(layouts) > 1 or blocks[0].layout.order != "NLC" or blocks[0].grid is None:
            raise Unsupported("Registers need one grid of patches and tokens [image, token, channel] in all layers.")
        self._behind = blocks[0].behind
        self._at, self._n_registers = blocks[0].prefix - self._behind, n_registers
        after = _module_after_blocks(vit)
        mlps = _last_linears(vit, self.model, _blank_images(vit))
        for layer in sorted({layer for layer, _ in neurons}):
            if layer not in range(vit.n_layers):
                raise UsageError(f"There is no layer {layer}; this model has L0 to L{vit.n_layers - 1}.")
            linear = mlps[layer].linear
            chosen = torch.tensor(sorted(neuron for at, neuron in neurons if at == layer))
            for end in (int(chosen[0]), int(chosen[-1])):
                if not 0 <= end < linear.in_features:
                    raise UsageError(f"L{layer} has neurons 0 to {linear.in_features - 1}, no {end}.")
            linear.register_forward_pre_hook(lambda _, args, own=chosen: (self._move(args[0], own), *args[1:]))
        first = self.model.get_submodule(blocks[0].path)
        first.register_forward_pre_hook(_on_leaf(blocks[0], self._insert), with_kwargs=True)
        self.model.get_submodule(after).register_forward_pre_hook(lambda _, args: (self._remove(args[0]), *args[1:]))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model with the registers among its tokens.

        Args:
            args: As the model takes them.
            kwargs: The same.

        Returns:
            What the model returns.
        """
        return self.model(*args, **kwargs)

    def _insert(self, tokens: Tensor) -> Tensor:
        registers = tokens.new_zeros(len(tokens), self._n_registers, tokens.shape[-1])
        return torch.cat([tokens[:, : self._at], registers, tokens[:, self._at :]], 1)

    def _remove(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, : self._at], tokens[:, self._at + self._n_registers :]], 1)

    def _move(self, hidden: Tensor, neurons: Tensor) -> Tensor:
        """The registers get the strongest activation that a patch has; patches get none."""
        first, end = self._at + self._n_registers, hidden.shape[1] - self._behind
        own = hidden[:, first:end, neurons]
        strongest = own.gather(1, own.abs().argmax(1, keepdim=True))
        moved = hidden.clone()
        moved[:, first:end, neurons] = 0
        moved[:, self._at : first, neurons] = strongest.expand(-1, self._n_registers, -1)
        return moved


# --- where things are ------------------------------------------------------------------------------------------------


def _prefix(vit: Vit, layer: int) -> int:
    block = vit.anatomy.blocks[layer]
    if block.grid is None:
        raise Unsupported(f"L{layer} has no patches on a grid; tokens of outlying length are looked for among patches.")
    return block.prefix


def _tokens_of_layers(
    vit: Vit, images: Tensor, layer: int, outliers: Outliers
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of the outlying patches: input, input plus attention, and output of each layer up to one."""
    sums: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def rows(at: int, tokens: Tensor) -> Tensor:
        return tokens[:, _prefix(vit, at) :][outliers.to(tokens.device)].float()

    readers = Readers(
        residual=lambda at, tokens: None if at > layer else sums.__setitem__(at, rows(at, tokens)),
        output=lambda at, tokens: None if at > layer else outputs.__setitem__(at, rows(at, tokens)),
    )
    with torch.no_grad():
        replay, _ = vit.tap().record(images, readers)
    missing = [at for at in range(layer + 1) if at not in sums]
    if missing:
        raise Unsupported(f"L{missing[0]} does not add its attention to its input alone; what either adds is not told.")
    steps = range(layer + 1)
    inputs = [rows(at, input_tokens(vit.anatomy, replay, at)) for at in steps]
    changed = [at for at in steps[1:] if not torch.equal(inputs[at], outputs[at - 1])]
    if changed:
        raise Unsupported(
            f"{vit.name} changes its tokens between L{changed[0] - 1} and L{changed[0]}, as blocks without attention "
            "do (a layer that lost all its heads is one): which part of their length is whose is not told."
        )
    return inputs, [sums[at] for at in steps], [outputs[at] for at in steps]


class _Mlp(NamedTuple):
    """The linear layer that ends the MLP of a block, its path, and what it was given."""

    path: str
    linear: nn.Linear
    hidden: Tensor


def _last_linears(vit: Vit, clone: nn.Module, images: Tensor) -> dict[int, _Mlp]:
    """The linear layer that each block calls last, by layer; a clone of the model is run, never the model itself."""
    paths = {module: path for path, module in clone.named_modules()}
    last: dict[int, _Mlp] = {}
    handles = []
    for layer, block in enumerate(vit.anatomy.blocks):
        for module in clone.get_submodule(block.path).modules():
            if isinstance(module, nn.Linear):
                handles.append(
                    module.register_forward_hook(
                        lambda module, args, _, at=layer: last.__setitem__(at, _Mlp(paths[module], module, args[0]))
                    )
                )
    _run(clone, images)
    for handle in handles:
        handle.remove()
    if len(last) < vit.n_layers or len({each.path for each in last.values()}) < vit.n_layers:
        raise Unsupported(
            f"{vit.name} has blocks without a linear layer of their own at their end: no MLP to look into."
        )
    return last


def _patches_in_mlp(vit: Vit, layer: int, hidden: Tensor) -> Float[Tensor, "image patch neuron"]:
    """What the MLP of a layer gives its last linear layer, of the patches."""
    block = vit.anatomy.blocks[layer]
    tokens = block.layout.canonical(hidden) if hidden.ndim == block.layout.n_axes else hidden
    if tokens.ndim != 3 or tokens.shape[1] != block.tokens:
        raise Unsupported(
            f"The MLP of L{layer} is given {list(hidden.shape)}, not the {block.tokens} tokens of its block each on "
            "its own: which of them are patches is not known."
        )
    return tokens[:, _prefix(vit, layer) :]


def _module_after_blocks(vit: Vit) -> str:
    """Path of the first module that is given all tokens of the last block after it has ended."""
    clone, block = clone_sharing(vit.model), vit.anatomy.blocks[-1]
    inside = set(clone.get_submodule(block.path).modules())
    state: dict[str, Any] = {"ended": False, "path": ""}
    clone.get_submodule(block.path).register_forward_hook(lambda *_: state.__setitem__("ended", True))

    def watch(path: str) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...]) -> None:
            first = args[0] if args else None
            if state["ended"] and not state["path"] and isinstance(first, Tensor):
                state["path"] = path if first.ndim == 3 and first.shape[1] == block.tokens else "?"

        return look

    for path, module in clone.named_modules():
        if path and module not in inside:
            module.register_forward_pre_hook(watch(path))
    _run(clone, _blank_images(vit))
    if state["path"] in ("", "?"):
        raise Unsupported(
            f"{vit.name} hands the tokens of its last block to no module of its own (such as a norm) as they are; a "
            "register could not be taken away again."
        )
    return str(state["path"])


@torch.no_grad()
def _run(clone: nn.Module, images: Tensor) -> None:
    clone(images)


def _blank_images(vit: Vit) -> Float[Tensor, "image channel row column"]:
    weight = first_weight(vit.model)
    return torch.zeros((2, *vit.anatomy.image_shape), dtype=weight.dtype, device=weight.device)


def _channel_scale(
    vit: Vit, layer: int, added: Float[Tensor, "row channel"], linear: nn.Linear, hidden: Float[Tensor, "row neuron"]
) -> Float[Tensor, "channel"]:
    """The factor of each channel (as of LayerScale) between the linear layer and what the block adds."""
    weight, bias = linear.weight.detach().float(), linear.bias
    given = hidden @ weight.T + (0 if bias is None else bias.detach().float())
    scale = (added * given).sum(0) / given.square().sum(0).clamp_min(torch.finfo(given.dtype).tiny)
    error = float((added - given * scale).norm() / added.norm().clamp_min(torch.finfo(given.dtype).tiny))
    if error > MAX_ERROR:
        raise Unsupported(
            f"What L{layer} adds after its attention is not what its last linear layer gives ({percent(error)} off): "
            "the neurons of its MLP have no shares of it."
        )
    return scale


def _on_leaf(block: Block, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A hook that changes the tokens among a block's arguments."""

    def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        leaves[block.main_input] = change(leaves[block.main_input])
        return pytree.tree_unflatten(leaves, spec)

    return hook
