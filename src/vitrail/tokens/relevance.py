"""Which patches an answer rests on, by several methods, and curves that judge them.

raw        the class token's attention in the last layer, heads averaged
rollout    attention carried through all layers (Abnar and Zuidema 2020, arXiv 2005.00928); the same for every class
gradient   each layer's maps times their gradient for one class, positive part, carried through the layers (Chefer, Gur
           and Wolf 2021, arXiv 2103.15679, for one modality)
grad_sam   each layer's maps times their gradient for one class, positive part, averaged over layers (after Barkan et
           al. 2021, arXiv 2204.11073)
legrad     the gradient alone, positive part, averaged over layers (after Bousselham et al. 2024, arXiv 2404.03214)
lrp        what each patch adds to the logit of one class, with attention, norms and gains held still (after Ali et al.
           2022, arXiv 2202.07304; `lrp`)
random     nothing but chance: what the others have to beat

    self_similarity         cosine of each patch's last token with the image's own embedding (`label_free`)
    prototype_similarity    the same with a prototype, such as the mean embedding of a class

Raw attention, rollout and the two similarities need neither label nor gradient. Rollouts carry tokens from layer to
layer and need one grid through all of them. The others do not: what a key of any layer is given lies where the key
lies, also in hierarchies (Swin, PVT, MaxViT).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from vitrail.arguments import at_least_one
from vitrail.contract.outlook import require_finite
from vitrail.errors import Unsupported, UsageError
from vitrail.grid import n_patches
from vitrail.models.gradients import gradients_enabled, reason_against_gradients
from vitrail.models.open import Vit
from vitrail.tap.edits import Edit
from vitrail.tap.places import KeyPlaces
from vitrail.tap.tap import LayerAttention, Readers
from vitrail.tokens.flow import LayerSteps, flows, measure_windows, rollout
from vitrail.tokens.label_free import embedding_similarity, require_final_tokens
from vitrail.tokens.levels import first_grid, on_first_grid, require_one_grid
from vitrail.tokens.lrp import classes_of_images, layerwise_relevance, reason_against_lrp, require_classifier
from vitrail.tokens.robustness import drop_orders, paint, patches_to_drop

__all__ = [
    "CLASS_METHODS",
    "METHODS",
    "PROTOTYPE_METHODS",
    "Curves",
    "deletion_and_insertion",
    "gradient_rollout",
    "layer_gradients",
    "relevance",
    "unavailable_methods",
]

Images = Float[Tensor, "image channel row column"]
METHODS = (
    "raw", "rollout", "gradient", "grad_sam", "legrad", "lrp", "self_similarity", "prototype_similarity", "random",
)  # fmt: skip
CLASS_METHODS = ("gradient", "grad_sam", "legrad", "lrp")
"""Methods that explain one class; they need a classifier."""

PROTOTYPE_METHODS = ("prototype_similarity",)
"""Methods that compare with a prototype, which has to be given."""

N_STEPS = 10
"""Steps of deletion and insertion between nothing and everything."""


@torch.no_grad()
def relevance(
    vit: Vit,
    images: Images,
    classes: Int[np.ndarray, "image"],
    methods: Sequence[str] | None = None,
    seed: int = 0,
    *,
    prototype: Float[np.ndarray, "feature"] | Float[np.ndarray, "image feature"] | None = None,
) -> dict[str, Float[np.ndarray, "image patch"]]:
    """How much each patch matters to the prediction, by each method.

    Args:
        vit: The model.
        images: Prepared images.
        classes: The class of each image that those of `CLASS_METHODS` explain; the others do not know of classes.
        methods: Of `METHODS`; `unavailable_methods` names those that the model does not have. None: all, without those
            of `PROTOTYPE_METHODS` where no prototype is given.
        seed: Of `random`.
        prototype: What `prototype_similarity` compares with: one embedding, as `label_free.mean_embedding` makes it of
            images, or one for each image.

    Returns:
        Scores by method, of the patches of the first layer's grid; scales differ, only the order within an image means
        something.

    Raises:
        UsageError: There is no such method, it explains a class and there is not one for each image, or it compares
            with a prototype and none of that shape was given.
        Unsupported: The model does not have one of the methods.
        ModelError: The answer to an image is not finite (NaN or infinite).
    """
    if methods is None:
        methods = [method for method in METHODS if prototype is not None or method not in PROTOTYPE_METHODS]
    if not len(images):
        raise UsageError("Relevance was asked for of no image; give at least one.")
    undefined = [method for method in methods if method not in METHODS]
    if undefined:
        raise UsageError(f"There is no relevance {undefined[0]!r}; choose from {', '.join(METHODS)}.")
    if prototype is None and any(method in PROTOTYPE_METHODS for method in methods):
        raise UsageError(
            "prototype_similarity compares with a prototype; give prototype=, such as "
            "vitrail.tokens.label_free.mean_embedding(vit, photographs)."
        )
    reasons = unavailable_methods(vit)
    refused = [reasons[method] for method in methods if method in reasons]
    if refused:
        raise Unsupported(refused[0])
    from_maps = _from_maps(vit, images, methods)
    scores: dict[str, Float[np.ndarray, "image patch"]] = {}
    for method in methods:
        if method in from_maps:
            scores[method] = from_maps[method].cpu().numpy()
        elif method == "gradient":
            scores[method] = gradient_rollout(vit, images, classes).cpu().numpy()
        elif method in ("grad_sam", "legrad"):
            scores[method] = layer_gradients(vit, images, classes, times_map=method == "grad_sam").cpu().numpy()
        elif method == "lrp":
            scores[method] = layerwise_relevance(vit, images, classes).cpu().numpy()
        elif method in ("self_similarity", "prototype_similarity"):
            reference = prototype if method == "prototype_similarity" else None
            scores[method] = embedding_similarity(vit, images, reference).cpu().numpy()
        else:
            scores[method] = np.random.default_rng(seed).random((len(images), n_patches(first_grid(vit))))
    return scores


def unavailable_methods(vit: Vit) -> dict[str, str]:
    """The methods of relevance that a model does not have.

    Args:
        vit: The model.

    Returns:
        A sentence with the reason, by name of the method.
    """
    checks: dict[str, tuple[Callable[[Vit], object], ...]] = {
        "raw": (_require_raw,),
        "rollout": (_require_one_grid,),
        "gradient": (require_classifier, _require_whole_maps, _require_gradients),
        "grad_sam": (require_classifier, _places, _require_gradients),
        "legrad": (require_classifier, _places, _require_gradients),
        "lrp": (require_classifier, first_grid, _require_gradients, _require_path),
        "self_similarity": (require_final_tokens,),
        "prototype_similarity": (require_final_tokens,),
        "random": (first_grid,),
    }
    reasons: dict[str, str] = {}
    for method, required in checks.items():
        try:
            for each in required:
                each(vit)
        except Unsupported as reason:
            reasons[method] = str(reason)
    return reasons


def _require_one_grid(vit: Vit) -> tuple[int, int]:
    return require_one_grid(vit.anatomy)


def _require_gradients(vit: Vit) -> None:
    reason = reason_against_gradients(vit)
    if reason:
        raise Unsupported(f"{reason} Use raw attention or rollout.")


def _require_path(vit: Vit) -> None:
    reason = reason_against_lrp(vit)
    if reason:
        raise Unsupported(reason)


def _require_whole_maps(vit: Vit) -> None:
    """What gradient-weighted rollout takes one step a layer through."""
    blocks = vit.anatomy.blocks
    require_one_grid(vit.anatomy)
    if any(set(block.kinds) != {"token"} for block in blocks):
        raise Unsupported(
            f"{vit.name} attends within windows; gradient-weighted rollout needs whole maps; use lrp or grad_sam."
        )
    if any(call.follows for block in blocks for call in block.calls):
        raise Unsupported(
            f"{vit.name} has layers whose attention calls follow each other, and gradient-weighted rollout takes one "
            "step a layer; use rollout, lrp or grad_sam."
        )


# --- attention without gradients -------------------------------------------------------------------------------------


def _from_maps(vit: Vit, images: Images, methods: Sequence[str]) -> dict[str, Float[Tensor, "image patch"]]:
    """Raw attention and rollout, of one pass."""
    wanted = [method for method in ("raw", "rollout") if method in methods]
    if not wanted:
        return {}
    if not _has_one_grid(vit):
        return {"raw": _attention_received(vit, images)}
    prefix, index = vit.anatomy.blocks[0].prefix, vit.anatomy.class_index(0)
    steps, mean_map = _maps(vit, images)
    raw = mean_map[:, index, prefix:] if index is not None else mean_map[:, prefix:, prefix:].mean(1)
    return {"raw": raw} | ({"rollout": rollout(steps, prefix, index)} if "rollout" in wanted else {})


def _has_one_grid(vit: Vit) -> bool:
    try:
        require_one_grid(vit.anatomy)
    except Unsupported:
        return False
    return True


def _require_raw(vit: Vit) -> None:
    if not _has_one_grid(vit):
        first_grid(vit)
        last = len(vit.anatomy.blocks) - 1
        if not vit.anatomy.blocks[last].calls:
            raise Unsupported(f"L{last} of {vit.name} computes its attention in an operator that cannot be observed.")
        for call in range(len(vit.anatomy.blocks[last].calls)):
            vit.tap().key_places(last, call)


def _attention_received(vit: Vit, images: Images) -> Float[Tensor, "image patch"]:
    """What the keys of the last layer are given, where they lie: the mean over its calls, heads and queries."""
    tap, last = vit.tap(), len(vit.anatomy.blocks) - 1
    maps: list[Float[Tensor, "image row column"]] = []

    def read(attention: LayerAttention) -> None:
        if attention.layer == last:
            received = attention.window_weights().mean((2, 3)) / attention.windows
            maps.append(tap.key_places(last, attention.call).on_grid(received))

    require_finite(vit.name, tap.read(images, Readers(attention=read)))
    return on_first_grid(vit, torch.stack(maps).mean(0))


def _maps(vit: Vit, images: Images) -> tuple[list[Tensor], Tensor]:
    """The steps of all layers, and the last layer's map with heads averaged."""
    tap, steps = vit.tap(), LayerSteps()
    measure_windows(tap)
    require_finite(vit.name, tap.read(images, Readers(attention=steps.read)))
    assert steps.mean_map is not None
    return steps.all(), steps.mean_map


def gradient_rollout(vit: Vit, images: Images, classes: Int[np.ndarray, "image"]) -> Float[Tensor, "image patch"]:
    """Gradient-weighted rollout of one class for each image.

    R = R + mean over heads of max(map x gradient, 0) R, layer by layer, from R = identity. A factor of 1 on every
    attention weight has the derivative map x gradient, so no map needs to be stored.

    Args:
        vit: The model.
        images: Prepared images.
        classes: The class of each image that is explained.

    Returns:
        The class token's row less the identity, or the patches' mean row where there is no class token; zero or more.

    Raises:
        UsageError: There is not one class of the model for each image.
        Unsupported: The model has no classifier, has several grids, attends within windows, or lets no gradient
            through.
        ModelError: The answer to an image is not finite (NaN or infinite).
    """
    explained = classes_of_images(vit, classes, len(images))
    _require_whole_maps(vit)
    anatomy = vit.anatomy
    tokens = anatomy.blocks[0].tokens
    with gradients_enabled():
        factors = [
            torch.ones((len(images), block.heads, tokens, tokens), device=images.device, requires_grad=True)
            for block in anatomy.blocks
        ]
        edits = [Edit(layer, region=factor) for layer, factor in enumerate(factors)]
        logits = vit.tap().read(images, edits=edits).float()
        require_finite(vit.name, logits)
        target = torch.as_tensor(explained, device=logits.device)[:, None]
        gradients = torch.autograd.grad(logits.gather(1, target).sum(), factors)
    steps = [torch.eye(tokens, device=images.device) + each.float().clamp(min=0).mean(1) for each in gradients]
    carried = flows(steps)[-1] - torch.eye(tokens, device=images.device)
    prefix, index = anatomy.blocks[0].prefix, anatomy.class_index(0)
    return carried[:, index, prefix:] if index is not None else carried[:, prefix:, prefix:].mean(1)


def layer_gradients(
    vit: Vit, images: Images, classes: Int[np.ndarray, "image"], *, times_map: bool = True
) -> Float[Tensor, "image patch"]:
    """Relevance of patches by the gradients of all attention maps, for hierarchies as for plain models.

    For each layer the positive part of map x (d logit / d map) is averaged over heads and queries: what the logit owes
    to the attention that a key is given. It lies where the key lies, spread evenly over the patches that it covers.
    Every layer's result is divided by its sum over patches, so that each counts the same, and averaged over layers.

    Unit: share of the whole, 0 to 1, summing to 1 over patches. High: the logit rests on attention to the patch. Low:
    it does not, or that attention lowers it.

    Source: our construction, after Grad-SAM (Barkan et al. 2021, arXiv 2204.11073; `times_map`) and LeGrad (Bousselham
    et al. 2024, arXiv 2404.03214; without). LeGrad takes at each layer the class's score of that layer's own tokens,
    which a hierarchy, whose layers differ in width, does not have; here it is the model's logit. Neither divides layers
    by their sums, and neither says where keys of windows and pooled keys lie.

    It cannot tell what patches take away from the class, nor what reaches it past attention (convolutions, MLPs). A key
    of a deep layer stands for all that was mixed into it before, wherever that came from.

    Args:
        vit: The model.
        images: Prepared images.
        classes: The class of each image that is explained.
        times_map: Weigh gradients by the maps, as Grad-SAM does; without, they are taken as they are: what the logit
            would gain if a key were attended to more.

    Returns:
        Zero or more, for each patch of the first layer's grid; layers without a map between tokens (attention between
        channels, hidden attention) or without a grid take no part.

    Raises:
        UsageError: There is not one class of the model for each image.
        Unsupported: The model has no classifier, no layer has keys whose place is known, or no gradient goes through.
        ModelError: The answer to an image is not finite (NaN or infinite).

    Example:
        >>> prepared = vit.prepare([photograph])
        >>> scores = layer_gradients(vit, prepared, vit.logits(prepared).argmax(-1).numpy())
        >>> scores.shape  # of a Swin with 56 x 56 patches in its first stage
        torch.Size([1, 3136])
    """
    explained = classes_of_images(vit, classes, len(images))
    gains = _Gains(_places(vit), times_map)
    with gradients_enabled():
        pixels = images.detach().clone().requires_grad_()
        try:
            logits = vit.tap().read(pixels, Readers(attention=gains.read)).float()
            require_finite(vit.name, logits)
            target = torch.as_tensor(explained, device=logits.device)[:, None]
            torch.autograd.grad(logits.gather(1, target).sum(), pixels)
        finally:
            gains.remove_hooks()
    by_layer = [on_first_grid(vit, gains.by_layer[layer]) for layer in sorted(gains.by_layer)]
    shares = [each / each.sum(1, keepdim=True).clamp(min=torch.finfo(each.dtype).tiny) for each in by_layer]
    return torch.stack(shares).mean(0)


def _places(vit: Vit) -> dict[tuple[int, int], KeyPlaces]:
    """Where keys lie, by layer and attention call, of all calls whose keys have a place."""
    first_grid(vit)
    tap, reasons = vit.tap(), list[str]()
    places: dict[tuple[int, int], KeyPlaces] = {}
    for layer, block in enumerate(vit.anatomy.blocks):
        for call in range(len(block.calls)):
            try:
                places[layer, call] = tap.key_places(layer, call)
            except Unsupported as reason:
                reasons.append(str(reason))
    if not places:
        raise Unsupported(reasons[0] if reasons else f"The attention of {vit.name} cannot be observed.")
    return places


class _Gains:
    """Sums, layer by layer, what the logit owes to keys, while gradients are taken.

    Args:
        places: By layer and attention call, where the keys lie; other calls are passed over.
        times_map: Weigh gradients by the maps.

    Attributes:
        by_layer: The sums on the grid of each layer, calls added.
    """

    def __init__(self, places: dict[tuple[int, int], KeyPlaces], times_map: bool) -> None:
        self.by_layer: dict[int, Float[Tensor, "image row column"]] = {}
        self._places, self._times_map = places, times_map
        self._hooks: list[RemovableHandle] = []

    def read(self, attention: LayerAttention) -> None:
        """Has the gradients of an attention call added when they are taken.

        Args:
            attention: The call.
        """
        places = self._places.get((attention.layer, attention.call))
        if places is not None:
            hook = attention.register_out_hook(lambda gradient: self._add(attention, places, gradient))
            self._hooks.append(hook)

    def remove_hooks(self) -> None:
        """Lets go of the pass."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _add(
        self, attention: LayerAttention, places: KeyPlaces, gradient: Float[Tensor, "image window head query channel"]
    ) -> None:
        """out = map @ v: the derivative by the weight of query q on key k is the product of the gradient at q and v at
        k. One image at a time, as the derivative is as large as the maps."""
        v, layer = attention.v, attention.layer
        maps = attention.window_weights() if self._times_map else [1.0] * len(v)
        means = [
            (weights * (each.float() @ values.float().mT)).clamp(min=0).mean((1, 2))
            for weights, each, values in zip(maps, gradient, v, strict=True)
        ]
        on_grid = places.on_grid(torch.stack(means) / attention.windows)
        self.by_layer[layer] = self.by_layer[layer] + on_grid if layer in self.by_layer else on_grid


@dataclass(frozen=True, eq=False)
class Curves:
    """Probability of the class as patches go (deletion) or come (insertion), most relevant first.

    A good map of relevance has a low area under deletion and a high one under insertion.

    Attributes:
        amounts: Shares of the patches, 0 to 1.
        deletion: Probability after that share was painted over.
        insertion: Probability with that share visible alone.
    """

    amounts: Float[np.ndarray, "amount"]
    deletion: Float[np.ndarray, "image amount"]
    insertion: Float[np.ndarray, "image amount"]

    @property
    def areas(self) -> tuple[Float[np.ndarray, "image"], Float[np.ndarray, "image"]]:
        """Area under deletion and insertion of each image, by trapezoids over amounts 0 to 1."""
        width = np.diff(self.amounts)
        both = [((curve[:, 1:] + curve[:, :-1]) / 2 * width).sum(axis=1) for curve in (self.deletion, self.insertion)]
        return both[0], both[1]


@torch.no_grad()
def deletion_and_insertion(
    vit: Vit,
    images: Images,
    classes: Int[np.ndarray, "image"],
    scores: Float[np.ndarray, "image patch"],
    n_steps: int = N_STEPS,
    seed: int = 0,
) -> Curves:
    """Deletion and insertion (Petsiuk et al. 2018, arXiv 1806.07421) on patches.

    Lost patches are painted in the image's mean colour, on the model's own input. The same amounts for every map; equal
    scores in random order.

    Args:
        vit: The model.
        images: Prepared images.
        classes: The class of each image whose probability is followed.
        scores: Relevance of each patch of the first layer's grid.
        n_steps: Amounts between none and all.
        seed: Of the order of equal scores.

    Returns:
        The curves.

    Raises:
        UsageError: The scores are not of the patches of the first layer's grid, or are no finite numbers, which have
            no order; there is no image, no step, or no class of the model for each image.
        Unsupported: The tokens lie on no grid, or the model has no classifier.
        ModelError: The answer to an image is not finite (NaN or infinite).
    """
    grid, step = first_grid(vit), vit.anatomy.blocks[0].patch_step
    if scores.shape != (len(images), n_patches(grid)):
        raise UsageError(
            f"Scores of shape {scores.shape} were passed for {len(images)} images on a grid of {grid[0]} x {grid[1]} "
            f"patches; pass {(len(images), n_patches(grid))}."
        )
    if not np.isfinite(scores).all():
        raise UsageError("Some scores are NaN or infinite, which have no order; pass finite scores of every patch.")
    if not len(images):
        raise UsageError("Curves were asked for of no image; give at least one.")
    followed, n_steps = classes_of_images(vit, classes, len(images)), at_least_one("steps", n_steps)
    amounts = np.linspace(0, 1, n_steps + 1)
    order = drop_orders(scores, range(len(images)), seed)["salient"]
    full, empty = _probability(vit, images, followed), _probability(vit, _blank(vit, images, grid), followed)
    deletion, insertion = [full], [empty]
    for amount in amounts[1:-1]:
        lost = patches_to_drop(order, amount)
        deletion.append(_probability(vit, paint(images, lost, grid, "mean", vit.preprocessing, step), followed))
        insertion.append(_probability(vit, paint(images, ~lost, grid, "mean", vit.preprocessing, step), followed))
    return Curves(amounts, np.stack([*deletion, empty], 1), np.stack([*insertion, full], 1))


def _blank(vit: Vit, images: Images, grid: tuple[int, int]) -> Images:
    all_patches = np.ones((len(images), grid[0] * grid[1]), dtype=bool)
    return paint(images, all_patches, grid, "mean", vit.preprocessing, vit.anatomy.blocks[0].patch_step)


def _probability(vit: Vit, images: Images, classes: Int[np.ndarray, "image"]) -> Float[np.ndarray, "image"]:
    logits = vit.tap().read(images)
    require_finite(vit.name, logits)
    probabilities = vit.task.probabilities(logits).cpu().numpy()
    return np.take_along_axis(probabilities, classes[:, None], axis=1)[:, 0]
