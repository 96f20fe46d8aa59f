"""Who writes tokens of outlying length, and what is left without them: planted heads and neurons, against PyTorch."""

import copy

import numpy as np
import pytest
import timm
import torch
import xarray as xr
from numpy.testing import assert_allclose
from PIL import Image
from sklearn.metrics import silhouette_score
from torch import Tensor, nn
from typer.testing import CliRunner

from heads.head_models import timm_swin
from tokens.test_artefacts import LAYER, NEURON, PATCHES, planted, tokens_by_hand
from vitrail import Preprocessing, artefact_heads, artefact_neurons, open_vit
from vitrail.cli.entry import app
from vitrail.errors import Unsupported, UsageError
from vitrail.figures.artefacts import artefact_trial
from vitrail.models.open import Vit
from vitrail.tokens.artefact_findings import artefact_effects, artefact_findings
from vitrail.tokens.artefact_trial import OBJECT_SCORES, try_registers
from vitrail.tokens.artefacts import (
    _layers_and_indices,
    outlying_patches,
    without_neurons,
    written_by_heads,
    written_by_layers,
)
from vitrail.tokens.outliers import REGISTER_MODELS, TRIED_MODELS

HEAD, WIDTH = 1, 16
"""Head 1 of L1 is planted to write the outlying tokens; channels of a head."""

HALF = Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3)


def directions(n: int) -> Tensor:
    """Orthogonal ones, of length 1."""
    return torch.linalg.qr(torch.randn(32, n, generator=torch.Generator().manual_seed(8)))[0].T


def planted_head() -> nn.Module:
    """Marked patches attend to each other in one head alone, whose part of the projection makes their tokens long."""
    torch.manual_seed(3)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=3, num_heads=2, num_classes=5, init_values=0.5
    ).eval()
    mark, value, long, other = directions(4)
    with torch.no_grad():
        for patch in range(16):  # all of about the same length
            model.pos_embed[0, 1 + patch] += 3 * mark + 3 * value if patch in PATCHES else 18**0.5 * other
        own = slice(HEAD * WIDTH, (HEAD + 1) * WIDTH)
        attn = model.blocks[LAYER].attn
        for part in range(3):
            attn.qkv.weight[part * 32 : part * 32 + 32][own] = 0
        attn.qkv.weight[HEAD * WIDTH], attn.qkv.bias[HEAD * WIDTH] = 4 * mark, -8.0
        attn.qkv.weight[32 + HEAD * WIDTH] = 4 * mark
        attn.qkv.weight[64 + HEAD * WIDTH] = value
        attn.proj.weight[:, own] = 0
        attn.proj.weight[:, HEAD * WIDTH] = 30 * long
        attn.proj.bias += 0.1
    return model


def planted_everywhere() -> nn.Module:
    """The planted neuron's tokens also draw the class token's attention in the last layer, in its first head.

    Patches of the upper and of the lower half carry a direction each: two objects.
    """
    model, (upper, lower) = planted(), directions(2)
    long = model.blocks[LAYER].mlp.fc2.weight[:, NEURON].detach() / 30
    with torch.no_grad():
        model.pos_embed[0, 1:9] += 2 * upper
        model.pos_embed[0, 9:] += 2 * lower
        qkv = model.blocks[-1].attn.qkv
        qkv.weight[:WIDTH], qkv.weight[32 : 32 + WIDTH] = 0, 0
        qkv.bias[0], qkv.weight[32] = 8.0, 4 * long
    return model


def noise_views(n: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(n)]


def halves() -> np.ndarray:
    """Object 1 above, object 2 below."""
    ids = np.ones((64, 64), np.int64)
    ids[32:] = 2
    return ids


@pytest.fixture(scope="module")
def head_vit() -> Vit:
    return open_vit(planted_head(), preprocessing=HALF)


@pytest.fixture(scope="module")
def neuron_vit() -> Vit:
    return open_vit(planted_everywhere(), preprocessing=HALF)


@pytest.fixture(scope="module")
def head_trial(head_vit) -> xr.Dataset:
    return try_registers(head_vit, noise_views(8), n_neurons=2, n_heads=1)


@pytest.fixture(scope="module")
def neuron_trial(neuron_vit) -> xr.Dataset:
    return try_registers(
        neuron_vit, noise_views(16), n_neurons=1, n_heads=1, masks=[None] * 8 + [halves()] * 7 + [None]
    )


@torch.no_grad()
def heads_by_hand(model: nn.Module, x: Tensor, layer: int) -> Tensor:
    """What each head of a block adds, [image token head channel], in plain PyTorch."""
    block = model.blocks[layer]
    q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, WIDTH)).permute(2, 0, 3, 1, 4)
    out = (q @ k.mT / WIDTH**0.5).softmax(-1) @ v
    weight = block.attn.proj.weight.unflatten(1, (2, WIDTH))
    return block.ls1.gamma * torch.einsum("ihtc,dhc->ithd", out, weight)


def test_each_head_has_its_exact_part_of_the_length(head_vit) -> None:
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    outlying = outlying_patches(head_vit, images)[LAYER]
    assert set(outlying.nonzero()[:, 1].tolist()) == set(PATCHES)
    steps = tokens_by_hand(head_vit.model, images)
    final = steps[LAYER][3][:, 1:][outlying]
    unit = final / final.norm(dim=-1, keepdim=True)
    expected = [
        (heads_by_hand(head_vit.model, steps[at][0], at)[:, 1:][outlying] * unit[:, None]).sum(-1).mean(0).tolist()
        for at in range(LAYER + 1)
    ]
    written = written_by_heads(head_vit, images, LAYER, outlying)
    assert_allclose(written, expected, rtol=1e-3, atol=1e-4)
    for at, block in enumerate(head_vit.model.blocks[: LAYER + 1]):
        bias = float((unit * (block.ls1.gamma * block.attn.proj.bias)).sum(-1).mean().detach())
        by_attention = float(written_by_layers(head_vit, images, LAYER, outlying)[at, 0])
        assert_allclose(float(written[at].sum()) + bias, by_attention, rtol=1e-3, atol=1e-4)
    best = artefact_heads(head_vit, images, 2)
    assert (best[0].layer, best[0].head) == (LAYER, HEAD)
    assert best[0].share > 0.8
    assert_allclose(best[0].length / best[0].share, float(final.norm(dim=-1).mean()), rtol=1e-4)


def test_layers_that_share_the_weight_of_their_projection_have_biases_of_their_own() -> None:
    model = planted_head()
    with torch.no_grad():
        for block in model.blocks[1:]:
            block.attn.proj.bias.normal_()
    apart = open_vit(copy.deepcopy(model))
    for vit in (apart, open_vit(model)):
        for block in vit.model.blocks[1:]:
            weight = vit.model.blocks[0].attn.proj.weight
            block.attn.proj.weight = nn.Parameter(weight.detach().clone()) if vit is apart else weight
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    outlying = torch.zeros(2, 16, dtype=torch.bool)
    outlying[:, list(PATCHES)] = True
    assert_allclose(written_by_heads(vit, images, LAYER, outlying), written_by_heads(apart, images, LAYER, outlying))


def test_without_the_planted_head_the_outliers_are_gone_and_without_others_or_neurons_they_are_not(head_trial) -> None:
    assert [head_trial[f"head_{each}"].values.tolist() for each in ("layer", "index")] == [[LAYER], [HEAD]]
    left = 16 * head_trial["outlier_share"].isel(layer=LAYER).mean("image")
    assert float(left.sel(model="as it is")) >= 2
    assert float(left.sel(model="heads off")) < 1
    for model in ("other heads off", "neurons off", "other neurons off", "registers"):
        assert float(left.sel(model=model)) >= 2, model
    said = " ".join(artefact_findings(head_trial))
    assert f"Of the heads L{LAYER}H{HEAD} writes most of it" in said
    assert f"With the head off, {float(left.sel(model='heads off')):.1f} patches are left" in said
    assert "After the last layer the silhouette of clusters of tokens is" in said


def test_the_heads_of_the_ablation_are_pruned_as_by_hand(head_vit, head_trial) -> None:
    pruned = copy.deepcopy(head_vit.model)
    with torch.no_grad():
        pruned.blocks[LAYER].attn.proj.weight[:, HEAD * WIDTH : (HEAD + 1) * WIDTH] = 0
    images = head_vit.prepare_views(noise_views(8)[4:])
    with torch.no_grad():
        plain, changed = head_vit.model(images), pruned(images)
    expected = 1 - torch.cosine_similarity(plain, changed)
    assert_allclose(head_trial["output_shift"].sel(model="heads off"), expected, atol=1e-5)
    same = plain.argmax(-1) == changed.argmax(-1)
    assert head_trial["same_top1"].sel(model="heads off").values.astype(bool).tolist() == same.tolist()


@torch.no_grad()
def test_neurons_off_are_zeros_for_every_token(neuron_vit) -> None:
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = {name: each.clone() for name, each in neuron_vit.model.state_dict().items()}
    ablated = without_neurons(neuron_vit, [(LAYER, NEURON)])
    by_hand = copy.deepcopy(neuron_vit.model)
    by_hand.blocks[LAYER].mlp.fc2.weight[:, NEURON] = 0
    assert_allclose(ablated.logits(images), by_hand(images), atol=1e-5)
    assert_allclose(ablated.tap().read(images), by_hand(images), atol=1e-5)
    assert (ablated.logits(images) - neuron_vit.logits(images)).abs().max() > 1e-3
    assert not outlying_patches(ablated, images)[LAYER][:, list(PATCHES)].any()
    assert all(torch.equal(neuron_vit.model.state_dict()[name], each) for name, each in before.items())
    assert ablated.model.blocks[0].mlp.fc1.weight.data_ptr() == neuron_vit.model.blocks[0].mlp.fc1.weight.data_ptr()
    assert ablated.opened_with is None
    assert ablated.weight_digest != neuron_vit.weight_digest
    with pytest.raises(UsageError, match="neurons 0 to 127, no 128"):
        without_neurons(neuron_vit, [(0, 128)])
    with pytest.raises(UsageError, match="at least one"):
        without_neurons(neuron_vit, [])
    for wrong in (5, [(1, 2.5)], (LAYER, NEURON), ["71"], [(1, 2, 3)]):
        with pytest.raises(UsageError, match="has no meaning"):
            _layers_and_indices(wrong)  # what the types of the public function leave to those who do not check them


def test_without_the_planted_neuron_the_outliers_are_gone_and_without_others_or_heads_they_are_not(
    neuron_trial,
) -> None:
    assert neuron_trial["model"].values.tolist() == list(TRIED_MODELS)
    left = 16 * neuron_trial["outlier_share"].isel(layer=LAYER).mean("image")
    assert float(left.sel(model="neurons off")) < 1
    for model in ("as it is", "other neurons off", "heads off", "other heads off"):
        assert float(left.sel(model=model)) >= 2, model
    off, null = (float(left.sel(model=each)) for each in ("neurons off", "other neurons off"))
    said = " ".join(artefact_findings(neuron_trial))
    assert (
        f"With the neuron off for every token, {off:.1f} patches are left with an outlying length, {null:.1f} with"
        in said
    )
    assert f"difference {off - null:+.1f}, " in said


def test_registers_take_the_attention_that_lay_on_outlying_tokens(neuron_vit, neuron_trial) -> None:
    images = neuron_vit.prepare_views(noise_views(16)[8:])
    steps = tokens_by_hand(neuron_vit.model, images)
    block = neuron_vit.model.blocks[-1]
    with torch.no_grad():
        q, k, _ = block.attn.qkv(block.norm1(steps[-1][0])).unflatten(-1, (3, 2, WIDTH)).permute(2, 0, 3, 1, 4)
        rows = (q[:, :, :1] @ k.mT / WIDTH**0.5).softmax(-1)[:, :, 0].mean(1)
    outlying = outlying_patches(neuron_vit, images)[LAYER]
    by_hand = (rows[:, 1:] * outlying).sum(-1)
    attention = neuron_trial["outlier_attention"]
    assert_allclose(attention.sel(model="as it is"), by_hand, rtol=1e-4)
    shares = rows[:, 1:] / rows[:, 1:].sum(-1, keepdim=True)
    entropy = -(shares * shares.log()).sum(-1) / np.log(16)
    assert_allclose(neuron_trial["attention_entropy"].sel(model="as it is"), entropy, rtol=1e-3)
    plain, cured, other = (float(attention.sel(model=model).mean()) for model in REGISTER_MODELS)
    assert plain > 0.5
    assert cured < 0.2
    assert_allclose(other, plain, atol=0.02)
    register = neuron_trial["register_attention"].mean("image")
    assert float(register.sel(model="registers")) > 0.4
    assert float(register.sel(model="as it is")) == 0
    entropies = neuron_trial["attention_entropy"].mean("image")
    assert float(entropies.sel(model="registers")) > float(entropies.sel(model="as it is")) + 0.1
    assert_allclose(float(entropies.sel(model="random neurons")), float(entropies.sel(model="as it is")), atol=0.02)
    said = " ".join(artefact_findings(neuron_trial))
    assert f"with registers {100 * cured:.0f} % (difference {100 * (cured - plain):+.1f} points, 95 % interval " in said


def test_objects_lie_apart_again_with_registers_and_not_with_registers_for_other_neurons(
    neuron_vit, neuron_trial
) -> None:
    grouping = neuron_trial["grouping"]
    assert grouping["score"].values.tolist() == list(OBJECT_SCORES)
    assert np.isnan(grouping.isel(image=-1)).all(), "no mask, no score"
    tokens = tokens_by_hand(neuron_vit.model, neuron_vit.prepare_views(noise_views(16)[8:]))[-1][3][0, 1:]
    by_hand = silhouette_score(tokens.numpy(), np.repeat([1, 2], 8), metric="cosine")
    assert_allclose(float(grouping.sel(model="as it is", score="object_silhouette")[0]), by_hand, atol=1e-4)
    plain, cured, other = (
        float(grouping.sel(model=model, score="object_silhouette").mean("image")) for model in REGISTER_MODELS
    )
    assert cured > plain + 0.05
    assert_allclose(other, plain, atol=0.02)
    said = " ".join(artefact_findings(neuron_trial))
    assert f"the silhouette of tokens by object is {plain:.3f}, mean over 7 images with two objects" in said


def test_effects_are_means_over_images_with_their_intervals(neuron_trial) -> None:
    effects = artefact_effects(neuron_trial)
    worst = int(neuron_trial.attrs["worst_layer"])
    for model in neuron_trial["model"].values.tolist():
        of_model = neuron_trial.sel(model=model)
        by_hand = {
            "outliers": of_model["outlier_share"][:, worst] * neuron_trial.sizes["patch"],
            "same_top1": of_model["same_top1"],
            "outlier_attention": of_model["outlier_attention"],
            "attention_entropy": of_model["attention_entropy"],
            "object_silhouette": of_model["grouping"].sel(score="object_silhouette"),
        }
        assert set(effects["effect"].values) == set(by_hand)
        for name, values in by_hand.items():
            told = effects.sel(model=model, effect=name)
            assert_allclose(told["mean"], np.nanmean(values), rtol=1e-6)
            assert not told["low"] > told["mean"]
            assert not told["high"] < told["mean"]


def test_an_effect_that_is_0_in_every_image_has_the_interval_of_a_share_if_it_is_one_alone(neuron_trial) -> None:
    zeros = neuron_trial.assign({name: 0 * neuron_trial[name] for name in ("grouping", "same_top1", "outlier_share")})
    effects = artefact_effects(zeros.assign(grouping=zeros["grouping"].fillna(0))).sel(model="as it is")
    assert float(effects["high"].sel(effect="same_top1")) > 0
    assert effects["high"].sel(effect=["outliers", "object_silhouette"]).isnull().all()


def test_the_figure_draws_writers_ablations_and_effects(neuron_trial) -> None:
    figure = artefact_trial(neuron_trial)
    titles = {axes.get_title(loc) for axes in figure.axes for loc in ("left", "center")}
    for title in ("written by heads", "outlying patches", "same class", "attention on them", "entropy of the map"):
        assert any(title in text for text in titles), (title, titles)
    assert any("silhouette by object" in text for text in titles)
    without_photographs = artefact_trial(neuron_trial.isel(example=slice(0)))
    assert len(without_photographs.axes) == len(figure.axes) - 5 * neuron_trial.sizes["example"]


def test_where_no_head_adds_to_their_length_none_is_named_or_switched_off() -> None:
    model = planted()
    with torch.no_grad():
        model.pos_embed[0, [1 + patch for patch in PATCHES]] += 40
        model.blocks[LAYER].mlp.fc2.weight[:, NEURON] = 0
    trial = try_registers(open_vit(model, preprocessing=HALF), noise_views(4), n_neurons=2, n_heads=1)
    assert (trial["head_written"].isel(written_layer=0) < 0).all()
    assert trial.sizes["head"] == 0
    assert trial["model"].values.tolist() == list(TRIED_MODELS[:5])
    assert "No head adds to their length" in artefact_findings(trial)[2]


class NormalisedHeads(nn.Module):
    """Attention whose heads meet in a norm in front of the projection, as in EVA-02: no head has a part of its own."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn, self.norm = attn, nn.LayerNorm(32)
        attn.proj = nn.Sequential(self.norm, attn.proj)

    def forward(self, x: Tensor, **options) -> Tensor:
        return self.attn(x, **options)


def test_heads_that_cannot_be_told_apart_are_left_out_with_the_reason() -> None:
    model = planted()
    for block in model.blocks:
        block.attn = NormalisedHeads(block.attn)
    trial = try_registers(open_vit(model.eval(), preprocessing=HALF), noise_views(4), n_neurons=1)
    assert trial["model"].values.tolist() == list(TRIED_MODELS[:5])
    assert "no projection" in trial.attrs["no_heads"]
    said = artefact_findings(trial)
    assert f"Which heads write them is not told. {trial.attrs['no_heads']}" in said
    assert not any("the 1 strongest" in sentence for sentence in said)
    assert not any("heads off" in sentence for sentence in said)
    assert "written by heads" not in {axes.get_title() for axes in artefact_trial(trial).axes}


def test_attention_within_windows_has_no_parts_of_heads() -> None:
    swin = open_vit(timm_swin(), image_size=(64, 64))
    patches = swin.anatomy.blocks[0].grid
    outlying = torch.zeros(1, patches[0] * patches[1], dtype=torch.bool)
    outlying[0, 0] = True
    with pytest.raises(Unsupported, match="attends within windows: what each head adds"):
        written_by_heads(swin, torch.zeros(1, 3, 64, 64), 0, outlying)


def test_the_command_groups_by_masks_and_names_heads(tmp_path) -> None:
    (tmp_path / "mine.py").write_text("from tokens.test_artefact_writers import planted_head\n")
    (tmp_path / "images" / "masks").mkdir(parents=True)
    for index, view in enumerate(noise_views(4)):
        view.save(tmp_path / "images" / f"{index}.png")
        Image.fromarray(halves().astype(np.uint8)).save(tmp_path / "images" / "masks" / f"{index}.png")
    model, images = f"{tmp_path / 'mine.py'}:planted_head", tmp_path / "images"
    options = ["--masks", str(images / "masks"), "--heads", "1", "--neurons", "1", "--mean", "0.5", "--std", "0.5"]
    result = CliRunner().invoke(app, ["artefacts", model, str(images), *options, "--out", str(tmp_path / "a.png")])
    assert result.exit_code == 0, result.output
    assert f"L{LAYER}H{HEAD}: " in result.output
    assert "the silhouette of tokens by object is" in result.output
    assert "mean over 2 images with two objects" in result.output, "masks are no images"
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 400


def test_masks_and_heads_that_are_none_are_refused(neuron_vit) -> None:
    views = noise_views(4)
    with pytest.raises(UsageError, match="3 masks were given for 4 images"):
        try_registers(neuron_vit, views, masks=[halves()] * 3)
    with pytest.raises(UsageError, match="A mask has 32 rows and 64 columns and its view 64 and 64"):
        try_registers(neuron_vit, views, masks=[halves()[:32]] * 4)
    with pytest.raises(UsageError, match=r"None of the 2 images .* two objects of some size"):
        try_registers(neuron_vit, views, masks=[halves(), halves(), np.ones((64, 64), np.int64), None])
    with pytest.raises(UsageError, match="0 heads cannot be asked for"):
        try_registers(neuron_vit, views, n_heads=0)


@pytest.mark.parametrize("n", [0, -1])
def test_numbers_of_writers_without_meaning_are_refused(neuron_vit, n) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for ask in (artefact_heads, artefact_neurons):
        with pytest.raises(UsageError, match=r"heads|neurons"):
            ask(neuron_vit, images, n)
        with pytest.raises(UsageError, match="there is none"):
            ask(neuron_vit, images[:0])
    with pytest.raises(UsageError, match="neurons"):
        try_registers(neuron_vit, noise_views(2), n)
    with pytest.raises(UsageError, match="registers"):
        try_registers(neuron_vit, noise_views(2), 1, n)


def test_a_model_whose_neurons_add_nothing_to_outlying_tokens_has_none_to_switch_off() -> None:
    model = planted_head()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc2.weight.zero_()
            block.mlp.fc2.bias.zero_()
    with pytest.raises(Unsupported, match=r"No neuron of .* adds to the length of its outlying tokens after L"):
        try_registers(open_vit(model, preprocessing=HALF), noise_views(4), 2)
