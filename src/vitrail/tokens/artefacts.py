"""Tokens of outlying length: which neurons and heads write them, and models in which they no longer do.

Cause. The length of a token is the sum of what every layer has added to it along its final direction; what an MLP adds
is the sum of what its neurons add, what attention adds is the sum of what each head adds through its own part of the
output projection, and biases. All sums are exact, so each neuron and head has its share of the length (our
construction). The ablation: the same neurons off for every token, or the same heads pruned.

Cure. A zero token, the register, is put behind the prefix tokens. The neurons that write outlying tokens give it their
strongest activation among the patches, and none to the patches themselves: test-time registers after Jiang et al. 2025
(arXiv 2506.08010); that such tokens hold what trained registers hold is of Darcet et al. 2023 (arXiv 2309.16588).
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vitrail.arguments import at_least_one, whole_numbers
from vitrail.contract.outlook import require_finite
from vitrail.contract.surgery import NoProjection, Projection, projections
from vitrail.errors import Unsupported, UsageError
from vitrail.models.noise import noise_images
from vitrail.models.open import Vit, open_vit, require_vit
from vitrail.models.task import TASKS
from vitrail.sentence import percent
from vitrail.tap.anatomy import Block
from vitrail.tap.attention import LayerAttention, Readers
from vitrail.tap.clone import CANNOT_RUN, clone_sharing, first_weight, require_images
from vitrail.tokens.levels import input_tokens
from vitrail.tokens.outliers import norm_outliers

__all__ = [
    "ArtefactHead",
    "ArtefactNeuron",
    "RegisterModel",
    "artefact_heads",
    "artefact_neurons",
    "layer_of_most_outliers",
    "mlp_widths",
    "outlying_patches",
    "strongest_heads",
    "with_registers",
    "without_neurons",
    "written_by_heads",
    "written_by_layers",
]

MAX_ERROR = 1e-2
"""Of what an MLP or attention adds, relative to its length: above it, that is not what its last linear layer gives,
times a factor a channel."""

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


class ArtefactHead(NamedTuple):
    """A head that writes outlying tokens.

    Attributes:
        layer: Zero-based index of its layer.
        head: Zero-based index among the heads of the layer.
        length: What it adds, through its own part of the output projection, to the length of an outlying token along
            that token's direction, mean over such tokens.
        share: The same as a share of that length.
    """

    layer: int
    head: int
    length: float
    share: float


def outlying_patches(vit: Vit, images: Float[Tensor, "image channel row column"]) -> list[Outliers]:
    """Patches whose token is far longer than the others of its image, layer by layer.

    Args:
        vit: The model; its layers have patches on a grid.
        images: Prepared images.

    Returns:
        True for the outlying patches of each layer, by `vitrail.tokens.outliers.norm_outliers` in each image.

    Raises:
        UsageError: These are no images for the model, or there is none.
        Unsupported: A layer has no patches on a grid.
        ModelError: The answer or the tokens of an image are not finite (NaN or infinite).
    """
    require_images(images)
    if not len(images):
        raise UsageError("Tokens of outlying length are looked for on images, and there is none; give at least one.")
    norms: dict[int, Float[Tensor, "image patch"]] = {}

    def read(layer: int, tokens: Tensor) -> None:
        norms[layer] = tokens[:, _prefix(vit, layer) :].float().norm(dim=-1).cpu()

    with torch.no_grad():
        logits = vit.tap().read(images, Readers(output=read))
    require_finite(vit.name, logits)
    for layer, each in norms.items():
        require_finite(vit.name, each, subject=f"What L{layer} of {vit.name} returns for")
    return [
        torch.stack([torch.from_numpy(norm_outliers(each)) for each in norms[layer].numpy()])
        for layer in range(vit.n_layers)
    ]


def layer_of_most_outliers(by_layer: Sequence[Outliers]) -> int | None:
    """The layer after which most patches have a token of outlying length.

    Args:
        by_layer: From `outlying_patches`.

    Returns:
        Its index, of equals the first; None where no token is outlying.
    """
    counts = [int(each.sum()) for each in by_layer]
    return max(range(len(counts)), key=counts.__getitem__) if max(counts) else None


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
    tokens = _tokens_of_layers(vit, images, layer, outliers)
    parts = [
        torch.stack([tokens.along_direction(tokens.by_attention(at)), tokens.along_direction(tokens.by_mlp(at))])
        for at in range(layer + 1)
    ]
    return torch.stack(parts)


def written_by_heads(
    vit: Vit, images: Float[Tensor, "image channel row column"], layer: int, outliers: Outliers
) -> Float[Tensor, "layer head"]:
    """What each head adds to the length of outlying tokens, along their direction after `layer`.

    A head adds what the output projection makes of its own channels. With the projection's bias the heads of a layer
    sum to what `written_by_layers` says of its attention.

    Args:
        vit: The model.
        images: Prepared images.
        layer: Index of the layer after which tokens are outlying.
        outliers: The outlying patches there; at least one.

    Returns:
        Heads of the layers up to `layer`, in units of the tokens, mean over outlying tokens; NaN where a layer has
        fewer heads than the widest.

    Raises:
        Unsupported: As for `written_by_layers`, or a layer attends in several calls, within windows or in an operator
            that cannot be observed, or what it adds is not what its output projection gives, times a factor a channel.
    """
    for at in range(layer + 1):
        _require_one_call(vit, at)
    heads: dict[int, Float[Tensor, "row head channel"]] = {}
    tokens = _tokens_of_layers(vit, images, layer, outliers, heads)
    by_call = projections(vit.model, vit.anatomy, noise_images(vit, 2))
    clone = clone_sharing(vit.model)
    parameters = dict(clone.named_parameters())
    written = torch.full((layer + 1, max(vit.n_heads[: layer + 1])), torch.nan)
    for at in range(layer + 1):
        weight, bias = _head_weights(
            at, clone.get_submodule(vit.anatomy.blocks[at].path), by_call[at, 0], parameters, heads[at]
        )
        scale = _channel_scale(
            f"What the attention of L{at} adds is not what its output projection gives",
            tokens.by_attention(at),
            torch.einsum("rhc,dhc->rd", heads[at], weight) + bias,
        )
        read = torch.einsum("rd,dhc->rhc", tokens.direction * scale, weight)
        written[at, : weight.shape[1]] = (heads[at][tokens.outlying] * read).sum(-1).mean(0).cpu()
    return written


def strongest_heads(written: Float[Tensor, "layer head"], length: float, n: int) -> list[ArtefactHead]:
    """The heads that add most to the length of outlying tokens.

    Args:
        written: From `written_by_heads`.
        length: Of an outlying token, mean.
        n: How many heads, at most.

    Returns:
        Those that add most first; heads that add nothing, or take away, are left out.
    """
    order = written.nan_to_num(-torch.inf).flatten().argsort(descending=True, stable=True)[:n].tolist()
    places = [divmod(each, written.shape[1]) for each in order]
    return [
        ArtefactHead(layer, head, float(written[layer, head]), float(written[layer, head]) / length)
        for layer, head in places
        if written[layer, head] > 0
    ]


def artefact_heads(
    vit: Vit, images: Float[Tensor, "image channel row column"], n: SupportsIndex = 5
) -> list[ArtefactHead]:
    """The heads that write the outlying tokens of some images.

    Looked for is the layer after which most patches are outlying, and of it and the layers before the heads that add
    most to the length of these patches' tokens.

    Args:
        vit: The model.
        images: Prepared images; a dozen are enough.
        n: How many heads, at most.

    Returns:
        Those that add most first; empty where no token is outlying.

    Raises:
        UsageError: There is no such number of heads, or there are no images.
        Unsupported: As for `written_by_heads`.
        ModelError: The answer or the tokens of an image are not finite (NaN or infinite).

    Example:
        >>> vitrail.artefact_heads(vit, vit.prepare(photographs))[0]  # doctest: +SKIP
    """
    require_vit(vit)
    n = at_least_one("heads", n)
    by_layer = outlying_patches(vit, images)
    layer = layer_of_most_outliers(by_layer)
    if layer is None:
        return []
    written = written_by_heads(vit, images, layer, by_layer[layer])
    return strongest_heads(written, _tokens_of_layers(vit, images, layer, by_layer[layer]).length, n)


def artefact_neurons(
    vit: Vit, images: Float[Tensor, "image channel row column"], n: SupportsIndex = 10
) -> list[ArtefactNeuron]:
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
        UsageError: There is no such number of neurons, or there are no images.
        Unsupported: As for `written_by_layers`, or the blocks do not add what an MLP gives as its last layer gives it,
            times a factor a channel.
        ModelError: The answer or the tokens of an image are not finite (NaN or infinite).
    """
    require_vit(vit)
    n = at_least_one("neurons", n)
    by_layer = outlying_patches(vit, images)
    layer = layer_of_most_outliers(by_layer)
    if layer is None:
        return []
    tokens = _tokens_of_layers(vit, images, layer, by_layer[layer])
    clone = clone_sharing(vit.model)
    linears = _last_linears(vit, clone)
    hidden = _hidden_rows(vit, clone, linears, images, layer, tokens.rows)
    ranked: list[ArtefactNeuron] = []
    for at in range(layer + 1):
        weight, bias = linears[at].weight.detach().float(), linears[at].bias
        scale = _channel_scale(
            f"What L{at} adds after its attention is not what its last linear layer gives",
            tokens.by_mlp(at),
            hidden[at] @ weight.T + (0 if bias is None else bias.detach().float()),
        )
        added = (hidden[at][tokens.outlying] * ((tokens.direction * scale) @ weight)).mean(0)
        top = added.topk(min(n, len(added)))
        ranked += [
            ArtefactNeuron(at, int(index), float(value), float(value) / tokens.length)
            for value, index in zip(top.values, top.indices, strict=True)
        ]
    return sorted(ranked, key=lambda each: -each.length)[:n]


def with_registers(
    vit: Vit, neurons: Sequence[tuple[int, int] | ArtefactNeuron], n_registers: SupportsIndex = 1
) -> Vit:
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
    pairs, n_registers = _layers_and_indices(neurons), at_least_one("registers", n_registers)
    if not pairs:
        raise UsageError("Registers need at least one neuron to listen to; none was given.")
    module = RegisterModel(vit, pairs, n_registers)
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


def without_neurons(vit: Vit, neurons: Sequence[tuple[int, int] | ArtefactNeuron]) -> Vit:
    """The model with some neurons of its MLPs off for every token: what the MLP's last linear layer makes of them is 0.

    Args:
        vit: The model; it is left as it is.
        neurons: Layer and index of each neuron, as `artefact_neurons` gives them; at least one.

    Returns:
        A model of the same anatomy that shares all other weights; every analysis reads it as any other.

    Raises:
        UsageError: There are no neurons, or one does not exist.
        Unsupported: A block has no MLP that can be read.

    Example:
        >>> ablated = without_neurons(vit, artefact_neurons(vit, images, 1))  # doctest: +SKIP
        >>> [int(each.sum()) for each in outlying_patches(ablated, images)]  # doctest: +SKIP
    """
    pairs = _layers_and_indices(neurons)
    if not pairs:
        raise UsageError("No neuron was given; give layer and index of at least one to be switched off.")
    clone = clone_sharing(vit.model)
    linears = _last_linears(vit, clone)
    for layer, own in _neurons_by_layer(vit, pairs, linears).items():
        weight = linears[layer].weight.detach().clone()
        weight[:, own] = 0
        linears[layer].weight = nn.Parameter(weight, requires_grad=False)
    ablated = copy.copy(vit)
    ablated.model, ablated.opened_with = clone, None
    ablated.name = f"{vit.name} without {len(pairs)} neuron{'s' if len(pairs) > 1 else ''}"
    return ablated


def mlp_widths(vit: Vit) -> list[int]:
    """How many neurons each layer's MLP has.

    Args:
        vit: The model.

    Returns:
        Inputs of the MLP's last linear layer, by layer.
    """
    return [linear.in_features for linear in _last_linears(vit, clone_sharing(vit.model)).values()]


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
        linears = _last_linears(vit, self.model)
        for layer, chosen in _neurons_by_layer(vit, neurons, linears).items():
            linears[layer].register_forward_pre_hook(lambda _, args, own=chosen: (self._move(args[0], own), *args[1:]))
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


class _LayerTokens(NamedTuple):
    """The tokens of some patches in every layer up to one: of the outlying patches, and of all of the first image.

    Attributes:
        rows: Which patches these are; the other tensors have one row for each.
        outlying: Which of the rows are outlying.
        inputs: What each block was given.
        sums: The same with the block's attention added.
        outputs: What each block returned.
    """

    rows: Outliers
    outlying: Bool[Tensor, "row"]
    inputs: list[Float[Tensor, "row channel"]]
    sums: list[Float[Tensor, "row channel"]]
    outputs: list[Float[Tensor, "row channel"]]

    @property
    def direction(self) -> Float[Tensor, "outlier channel"]:
        """That of each outlying token after the last of these layers."""
        last = self.outputs[-1][self.outlying]
        unit: Tensor = last / last.norm(dim=-1, keepdim=True)
        return unit

    @property
    def length(self) -> float:
        """Of an outlying token after the last of these layers, mean."""
        return float(self.outputs[-1][self.outlying].norm(dim=-1).mean())

    def by_attention(self, layer: int) -> Float[Tensor, "row channel"]:
        """What the attention of a layer adds."""
        return self.sums[layer] - self.inputs[layer]

    def by_mlp(self, layer: int) -> Float[Tensor, "row channel"]:
        """What the MLP of a layer adds."""
        return self.outputs[layer] - self.sums[layer]

    def along_direction(self, added: Float[Tensor, "row channel"]) -> Float[Tensor, ""]:
        """The part of a sum along the outlying tokens' direction, mean over these tokens."""
        return (added[self.outlying] * self.direction).sum(-1).mean()


def _tokens_of_layers(
    vit: Vit, images: Tensor, layer: int, outliers: Outliers, heads: dict[int, Tensor] | None = None
) -> _LayerTokens:
    """The tokens that sums are made of; `heads` receives what the heads of each layer give, [row head channel].

    All patches of one image are among the rows, as the factor of a channel cannot be told from a few tokens.
    """
    rows = outliers.clone()
    rows[0] = True
    sums: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def patch_rows(at: int, tokens: Tensor) -> Tensor:
        return tokens[:, _prefix(vit, at) :][rows.to(tokens.device)].float()

    def read_heads(attention: LayerAttention) -> None:
        if heads is not None and attention.layer <= layer:
            out = attention.out
            if out is None:
                raise Unsupported(
                    f"A native kernel computes the attention of L{attention.layer}, which shows what its heads give "
                    "to nobody: which of them write outlying tokens is not told."
                )
            heads[attention.layer] = patch_rows(attention.layer, out[:, 0].transpose(1, 2))

    readers = Readers(
        attention=None if heads is None else read_heads,
        residual=lambda at, tokens: None if at > layer else sums.__setitem__(at, patch_rows(at, tokens)),
        output=lambda at, tokens: None if at > layer else outputs.__setitem__(at, patch_rows(at, tokens)),
    )
    with torch.no_grad():
        replay, logits = vit.tap().record(images, readers)
    require_finite(vit.name, logits)
    missing = [at for at in range(layer + 1) if at not in sums]
    if missing:
        raise Unsupported(f"L{missing[0]} does not add its attention to its input alone; what either adds is not told.")
    steps = range(layer + 1)
    inputs = [patch_rows(at, input_tokens(vit.anatomy, replay, at)) for at in steps]
    changed = [at for at in steps[1:] if not torch.equal(inputs[at], outputs[at - 1])]
    if changed:
        raise Unsupported(
            f"{vit.name} changes its tokens between L{changed[0] - 1} and L{changed[0]}, as blocks without attention "
            "do (a layer that lost all its heads is one): which part of their length is whose is not told."
        )
    outlying = outliers[rows].to(inputs[0].device)
    return _LayerTokens(rows, outlying, inputs, [sums[at] for at in steps], [outputs[at] for at in steps])


def _require_one_call(vit: Vit, layer: int) -> None:
    """Refuses a layer whose heads do not run in one call on all tokens: what each adds to a token is not told."""
    block = vit.anatomy.blocks[layer]
    if len(block.calls) != 1 or block.calls[0].windows > 1 or block.calls[0].queries != block.tokens:
        how = (
            "attends within windows"
            if any(call.windows > 1 for call in block.calls)
            else f"makes {len(block.calls)} attention calls that can be observed, not one for all its tokens"
        )
        raise Unsupported(f"L{layer} of {vit.name} {how}: what each head adds to a token is not told.")


def _head_weights(
    layer: int,
    block: nn.Module,
    projection: Projection | NoProjection,
    parameters: dict[str, nn.Parameter],
    heads: Tensor,
) -> tuple[Float[Tensor, "out head channel"], Float[Tensor, "out"] | float]:
    """Each head's part of the output projection, and the projection's bias."""
    if isinstance(projection, NoProjection):
        raise Unsupported(f"L{layer} has no output projection with a part for each head: {projection.reason}.")
    weight = parameters[projection.weight].detach().float().flatten(1)
    n_heads, width = heads.shape[1:]
    columns = projection.channels.to(weight.device).nonzero()[:, 1]
    if weight.shape[1] != projection.channels.shape[1] or len(columns) != n_heads * width:
        raise Unsupported(f"{projection.weight} of L{layer} does not take each channel of each head once.")
    shared = parameters[projection.weight]  # named once, of the first of the modules that have it
    own = next((each for each in block.modules() if getattr(each, "weight", None) is shared), None)
    named = parameters.get(f"{projection.weight.removesuffix('weight')}bias")
    bias = named if own is None else getattr(own, "bias", None)
    return weight[:, columns].unflatten(1, (n_heads, width)), 0.0 if bias is None else bias.detach().float()


def _last_linears(vit: Vit, clone: nn.Module) -> dict[int, nn.Linear]:
    """The linear layer that each block calls last, by layer; a clone of the model is run, never the model itself."""
    last: dict[int, nn.Linear] = {}
    handles = []
    for layer, block in enumerate(vit.anatomy.blocks):
        for module in clone.get_submodule(block.path).modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_hook(lambda module, *_, at=layer: last.__setitem__(at, module)))
    _run(clone, _blank_images(vit))
    for handle in handles:
        handle.remove()
    if len(last) < vit.n_layers or len({id(each) for each in last.values()}) < vit.n_layers:
        raise Unsupported(
            f"{vit.name} has blocks without a linear layer of their own at their end: no MLP to look into."
        )
    return {layer: last[layer] for layer in range(vit.n_layers)}


def _hidden_rows(
    vit: Vit, clone: nn.Module, linears: dict[int, nn.Linear], images: Tensor, layer: int, rows: Outliers
) -> dict[int, Float[Tensor, "row neuron"]]:
    """What the MLPs of the layers up to one give their last linear layer, of some patches."""
    hidden: dict[int, Float[Tensor, "row neuron"]] = {}

    def keep(at: int, given: Tensor) -> None:
        hidden[at] = _patches_in_mlp(vit, at, given)[rows.to(given.device)].float()

    handles = [
        linears[at].register_forward_pre_hook(lambda _, args, at=at: keep(at, args[0])) for at in range(layer + 1)
    ]
    _run(clone, images)
    for handle in handles:
        handle.remove()
    return hidden


def _layers_and_indices(neurons: Any) -> list[tuple[int, int]]:
    """Layer and index of each neuron; refuses what is no pair of whole numbers."""
    try:
        listed = list(neurons)
    except TypeError as error:
        raise UsageError(f"{neurons!r} has no meaning; give a list of neurons, each a layer and an index.") from error
    pairs = []
    for each in listed:
        own = each[:2] if isinstance(each, ArtefactNeuron) else each
        layer, neuron = whole_numbers("A neuron's layer and index", own, 2)
        pairs.append((layer, neuron))
    return pairs


def _neurons_by_layer(
    vit: Vit, neurons: Sequence[tuple[int, int]], linears: dict[int, nn.Linear]
) -> dict[int, Int[Tensor, "neuron"]]:
    """The neurons of each layer, growing; refuses those that do not exist."""
    by_layer: dict[int, Int[Tensor, "neuron"]] = {}
    for layer in sorted({each[0] for each in neurons}):
        if layer not in linears:
            raise UsageError(f"There is no layer {layer}; this model has L0 to L{vit.n_layers - 1}.")
        chosen = torch.tensor(sorted(each[1] for each in neurons if each[0] == layer))
        for end in (int(chosen[0]), int(chosen[-1])):
            if not 0 <= end < linears[layer].in_features:
                raise UsageError(f"L{layer} has neurons 0 to {linears[layer].in_features - 1}, no {end}.")
        by_layer[layer] = chosen
    return by_layer


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
    failure: str, added: Float[Tensor, "row channel"], given: Float[Tensor, "row channel"]
) -> Float[Tensor, "channel"]:
    """The factor of each channel (as of LayerScale) between what a linear layer gives and what the block adds."""
    scale = (added * given).sum(0) / given.square().sum(0).clamp_min(torch.finfo(given.dtype).tiny)
    error = float((added - given * scale).norm() / added.norm().clamp_min(torch.finfo(given.dtype).tiny))
    if error > MAX_ERROR:
        raise Unsupported(f"{failure} ({percent(error)} off): its parts have no shares of it.")
    return scale


def _on_leaf(block: Block, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A hook that changes the tokens among a block's arguments."""

    def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        leaves[block.main_input] = change(leaves[block.main_input])
        return pytree.tree_unflatten(leaves, spec)

    return hook
