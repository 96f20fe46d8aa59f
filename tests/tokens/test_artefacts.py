"""Tokens of outlying length: a planted neuron is named with its exact share, and registers take its tokens away."""

import copy

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from heads.head_models import timm_swin
from vitrail import open_vit
from vitrail.cli.entry import app
from vitrail.errors import Unsupported, UsageError
from vitrail.figures.artefacts import artefact_trial
from vitrail.models.open import Vit
from vitrail.pruning.removal import remove_heads
from vitrail.tap.tap import Readers
from vitrail.tokens.artefact_findings import artefact_findings
from vitrail.tokens.artefact_trial import try_registers
from vitrail.tokens.artefacts import artefact_neurons, outlying_patches, with_registers, written_by_layers

LAYER, NEURON, PATCHES = 1, 7, (0, 5)
"""Neuron 7 of L1 is planted to fire at two patches alone."""


def planted(**options: object) -> nn.Module:
    """Three layers with LayerScale; two positions carry a direction that one neuron answers with a long vector."""
    torch.manual_seed(3)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=3, num_heads=2, num_classes=5, init_values=0.5,
        **options,
    ).eval()  # fmt: skip
    mark, long = (torch.nn.functional.normalize(torch.randn(32), dim=0) for _ in range(2))
    with torch.no_grad():
        for patch in PATCHES:
            model.pos_embed[0, model.num_prefix_tokens + patch] += 3 * mark
        mlp = model.blocks[LAYER].mlp
        mlp.fc1.weight[NEURON], mlp.fc1.bias[NEURON] = 4 * mark, -10.0
        mlp.fc2.weight[:, NEURON] = 30 * long
    return model


@pytest.fixture(scope="module")
def vit() -> Vit:
    return open_vit(planted())


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def tokens_by_hand(model: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Input, input plus attention, hidden layer of the MLP and output of each block, in plain PyTorch."""
    x = model._pos_embed(model.patch_embed(images))
    steps = []
    for block in model.blocks:
        middle = x + block.ls1(block.attn(block.norm1(x)))
        hidden = block.mlp.act(block.mlp.fc1(block.norm2(middle)))
        output = middle + block.ls2(block.mlp.fc2(hidden))
        steps.append((x, middle, hidden, output))
        x = output
    return steps


def test_the_planted_patches_are_outlying_from_the_planted_layer_on(vit: Vit, images: Tensor) -> None:
    by_layer = outlying_patches(vit, images)
    assert [sorted(set(each.nonzero()[:, 1].tolist())) for each in by_layer[LAYER:]] == [list(PATCHES)] * 2


def test_each_layer_and_neuron_has_its_exact_part_of_the_length(vit: Vit, images: Tensor) -> None:
    steps = tokens_by_hand(vit.model, images)
    outlying = torch.zeros(4, 16, dtype=torch.bool)
    outlying[:, list(PATCHES)] = True
    at = [[each[:, 1:][outlying] for each in step] for step in steps[: LAYER + 1]]
    final = at[LAYER][3]
    unit = final / final.norm(dim=-1, keepdim=True)
    written = written_by_layers(vit, images, LAYER, outlying)
    expected = [
        [float(((end - start) * unit).sum(-1).mean()) for start, end in ((step[0], step[1]), (step[1], step[3]))]
        for step in at
    ]
    assert_allclose(written, expected, rtol=1e-4, atol=1e-4)
    start = float((at[0][0] * unit).sum(-1).mean())
    assert_allclose(float(written.sum()) + start, float(final.norm(dim=-1).mean()), rtol=1e-4)
    block = vit.model.blocks[LAYER]
    by_neuron = at[LAYER][2] * ((unit * block.ls2.gamma) @ block.mlp.fc2.weight)
    best = artefact_neurons(vit, images, 3)
    assert (best[0].layer, best[0].neuron) == (LAYER, NEURON)
    assert_allclose(best[0].length, float(by_neuron[:, NEURON].detach().mean()), rtol=1e-3)
    assert_allclose(best[0].share, best[0].length / float(final.norm(dim=-1).mean()), rtol=1e-4)
    assert best[0].share > 0.8


@torch.no_grad()
def test_registers_are_those_written_by_hand_and_take_the_outliers_away(vit: Vit, images: Tensor) -> None:
    before = {name: each.clone() for name, each in vit.model.state_dict().items()}
    cured = with_registers(vit, [(LAYER, NEURON)], 2)
    model = copy.deepcopy(vit.model)
    x = model._pos_embed(model.patch_embed(images))
    x = torch.cat([x[:, :1], torch.zeros(4, 2, 32), x[:, 1:]], 1)
    for layer, block in enumerate(model.blocks):
        x = x + block.ls1(block.attn(block.norm1(x)))
        hidden = block.mlp.act(block.mlp.fc1(block.norm2(x)))
        if layer == LAYER:
            own = hidden[:, 3:, NEURON]
            hidden[:, 1:3, NEURON] = own.gather(1, own.abs().argmax(1, keepdim=True)).expand(-1, 2)
            hidden[:, 3:, NEURON] = 0
        x = x + block.ls2(block.mlp.fc2(hidden))
    expected = model.forward_head(model.norm(torch.cat([x[:, :1], x[:, 3:]], 1)))
    assert_allclose(cured.logits(images), expected, atol=1e-5)
    assert {block.prefix for block in cured.anatomy.blocks} == {3}
    assert cured.anatomy.class_token
    assert not any(each[:, list(PATCHES)].any() for each in outlying_patches(cured, images)[LAYER:])
    other = with_registers(vit, [(LAYER, NEURON + 1)], 2)
    assert outlying_patches(other, images)[LAYER][:, list(PATCHES)].all()
    assert all(torch.equal(vit.model.state_dict()[name], each) for name, each in before.items())
    shared = cured.model.model.blocks[0].mlp.fc1.weight
    assert shared.data_ptr() == vit.model.blocks[0].mlp.fc1.weight.data_ptr()


@torch.no_grad()
def test_a_model_without_prefix_tokens_has_its_registers_in_front_of_the_patches(images: Tensor) -> None:
    model = planted(class_token=False, global_pool="avg")
    vit = open_vit(model)
    assert {block.prefix for block in vit.anatomy.blocks} == {0}
    cured = with_registers(vit, [(LAYER, NEURON)], 2)
    x = torch.cat([torch.zeros(4, 2, 32), model._pos_embed(model.patch_embed(images))], 1)
    for layer, block in enumerate(model.blocks):
        x = x + block.ls1(block.attn(block.norm1(x)))
        hidden = block.mlp.act(block.mlp.fc1(block.norm2(x)))
        if layer == LAYER:
            own = hidden[:, 2:, NEURON]
            hidden[:, :2, NEURON] = own.gather(1, own.abs().argmax(1, keepdim=True)).expand(-1, 2)
            hidden[:, 2:, NEURON] = 0
        x = x + block.ls2(block.mlp.fc2(hidden))
    assert_allclose(cured.logits(images), model.forward_head(model.norm(x[:, 2:])), atol=1e-5)
    assert {block.prefix for block in cured.anatomy.blocks} == {2}
    assert not cured.anatomy.class_token
    before, after = (torch.stack(outlying_patches(each, images))[..., list(PATCHES)] for each in (vit, cured))
    assert before[LAYER].all()
    assert torch.equal(after[LAYER], before[LAYER - 1])  # what was long before that layer still is
    assert not after[LAYER].all()


def test_a_trial_finds_on_one_half_and_tries_on_the_other(vit: Vit) -> None:
    random = np.random.default_rng(0)
    views = [Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(8)]
    trial = try_registers(vit, views, n_neurons=2)
    assert trial.sizes["image"] == trial.attrs["n_found"] == 4
    left = trial["outlier_share"].isel(layer=LAYER).mean("image")
    assert float(left.sel(model="as it is")) >= 2 / 16
    assert float(left.sel(model="registers")) < float(left.sel(model="random neurons"))
    plain = vit.logits(vit.prepare_views(views[4:]))
    cured = with_registers(
        vit, list(zip(trial["neuron_layer"].values.tolist(), trial["neuron_index"].values.tolist(), strict=True))
    )
    turned = cured.logits(vit.prepare_views(views[4:]))
    assert (
        trial["same_top1"].sel(model="registers").to_numpy() == (plain.argmax(-1) == turned.argmax(-1)).numpy()
    ).all()
    shift = 1 - torch.cosine_similarity(plain, turned)
    assert_allclose(trial["output_shift"].sel(model="registers"), shift, atol=1e-5)
    said = artefact_findings(trial)[1]
    assert f"The MLP of L{LAYER} writes the largest part of their length" in said
    finding = vit.prepare_views(views[:4])
    returned: list[Tensor] = []
    with torch.no_grad():
        vit.tap().read(finding, Readers(output=lambda _, tokens: returned.append(tokens)))
    length = float(returned[LAYER][:, 1:][outlying_patches(vit, finding)[LAYER]].norm(dim=-1).mean())
    of_mlp = float(trial["written"].to_numpy()[LAYER, 1]) / length
    assert f": {100 * of_mlp:.0f} %. Neuron {NEURON} of L{LAYER} alone writes " in said
    assert f"{100 * float(trial['neuron_share'][0]):.0f} % of it" in said
    titles = [axes.get_title(loc) for axes in artefact_trial(trial).axes for loc in ("left", "center")]
    assert any("registers: up to" in text for text in titles)


def test_what_has_no_artefacts_or_no_registers_says_so(vit: Vit, images: Tensor) -> None:
    plain = open_vit(timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=2).eval())
    views = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue", "grey")]
    with pytest.raises(Unsupported, match="no artefacts to cure"):
        try_registers(plain, views)
    with pytest.raises(UsageError, match="at least 2"):
        try_registers(vit, views[:1])
    with pytest.raises(UsageError, match="L0 to L2"):
        with_registers(vit, [(3, 0)])
    with pytest.raises(UsageError, match="neurons 0 to 127"):
        with_registers(vit, [(0, 128)])
    with pytest.raises(UsageError, match="at least one neuron"):
        with_registers(vit, [])
    with pytest.raises(Unsupported, match="one grid of patches"):
        with_registers(open_vit(timm_swin(), image_size=(64, 64)), [(0, 0)])


@torch.no_grad()
def test_a_block_without_attention_is_credited_to_no_layer(vit: Vit, images: Tensor) -> None:
    pruned = open_vit(remove_heads(vit, [(LAYER, 0), (LAYER, 1)]).module, mean=0.5, std=0.5)
    assert [block.path for block in pruned.anatomy.blocks] == ["blocks.0", "blocks.2"]
    outlying = outlying_patches(pruned, images)[1]  # the MLP of blocks.1 writes them
    assert outlying[:, list(PATCHES)].all()
    for answer in (lambda: written_by_layers(pruned, images, 1, outlying), lambda: artefact_neurons(pruned, images)):
        with pytest.raises(Unsupported, match="changes its tokens between L0 and L1, as blocks without attention do"):
            answer()


def test_length_that_tokens_have_before_the_first_layer_is_said_to_be_theirs(vit: Vit) -> None:
    model = copy.deepcopy(vit.model)
    with torch.no_grad():
        model.pos_embed[0, [1 + patch for patch in PATCHES]] += 40
        model.blocks[LAYER].mlp.fc2.weight[:, NEURON] = 0
    views = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue", "grey")]
    said = artefact_findings(try_registers(open_vit(model), views, n_neurons=2))[1]
    before = "They have the largest part of their length before L0, from patch embedding and position: above 99 %."
    assert said.startswith(before)


class TwoOutputs(nn.Module):
    """The planted model with a second output beside its logits."""

    def __init__(self, n_values: int) -> None:
        super().__init__()
        self.model, self.aux = planted(), nn.Linear(32, n_values)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.model.forward_features(images)
        return {"logits": self.model.forward_head(tokens), "aux": self.aux(tokens[:, 0])}


@pytest.mark.parametrize("n_values", [5, 3])
def test_registers_leave_the_output_and_the_target_as_they_were_chosen(n_values: int, images: Tensor) -> None:
    opened = open_vit(
        TwoOutputs(n_values).eval(), image_size=64, output="aux", mean=0.5, std=0.5, target=lambda output: output[:, 1]
    )
    cured = with_registers(opened, [(LAYER, NEURON)])
    with torch.no_grad():
        assert_allclose(cured.logits(images), cured.model(images)["aux"], rtol=1e-6)
    assert cured.read_output.output == "aux"
    assert cured.task.has_value
    assert cured.task.kind == opened.task.kind


class Prompted(nn.Module):
    """The planted model with two prompts behind its patches."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.prompts = planted(), nn.Parameter(0.02 * torch.randn(1, 2, 32))
        self.head = nn.Linear(32, 5)

    def forward(self, images: Tensor, registers: int = 0) -> Tensor:
        """With registers: what `with_registers` is to make of it, by hand."""
        x = self.model._pos_embed(self.model.patch_embed(images))
        empty = torch.zeros(len(x), registers, 32)
        x = torch.cat([x[:, :1], empty, x[:, 1:], self.prompts.expand(len(x), -1, -1)], 1)
        for layer, block in enumerate(self.model.blocks):
            if not registers:
                x = block(x)
                continue
            x = x + block.ls1(block.attn(block.norm1(x)))
            hidden = block.mlp.act(block.mlp.fc1(block.norm2(x)))
            if layer == LAYER:
                own = hidden[:, 1 + registers : -2, NEURON].clone()
                hidden[:, 1 + registers : -2, NEURON] = 0
                hidden[:, 1 : 1 + registers, NEURON] = own.gather(1, own.abs().argmax(1, keepdim=True))
            x = x + block.ls2(block.mlp.fc2(hidden))
        return self.head(self.model.norm(x)[:, 0])


@torch.no_grad()
def test_registers_and_neurons_of_a_model_with_prompts_behind_its_patches(images: Tensor) -> None:
    model = Prompted().eval()
    vit = open_vit(model, image_size=64, mean=0.5, std=0.5)
    assert (vit.anatomy.blocks[0].prefix, vit.anatomy.blocks[0].behind) == (3, 2)
    best = artefact_neurons(vit, images, 1)[0]
    assert (best.layer, best.neuron) == (LAYER, NEURON)
    assert 0.8 < best.share < 1.2
    cured = with_registers(vit, [(LAYER, NEURON)], 2)
    assert_allclose(cured.logits(images), model(images, registers=2), atol=1e-5)
    assert [(each.prefix, each.behind, each.grid) for each in cured.anatomy.blocks] == [(5, 2, (4, 4))] * 3


def test_the_model_in_training_is_neither_run_nor_changed(vit: Vit, images: Tensor) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), planted())
    model[1].blocks[LAYER].mlp.drop1.p = 0.5
    opened = open_vit(model, image_size=64, mean=0.5, std=0.5)
    expected = artefact_neurons(opened, images, 3)
    model.train()
    opened = open_vit(model, image_size=64, mean=0.5, std=0.5)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    random, called = torch.get_rng_state(), []
    model[1].register_forward_hook(lambda *_: called.append(torch.is_grad_enabled()))
    assert artefact_neurons(opened, images, 3) == expected
    with_registers(opened, expected)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(model.state_dict()[name], each) for name, each in before.items())
    assert model.training
    assert not any(module._forward_hooks for module in model[1].modules() if module is not model[1])


def test_a_model_of_one_channel(vit: Vit) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=5, in_chans=1
    ).eval()
    with torch.no_grad():
        model.pos_embed[0, [1, 6]] += 40
    opened = open_vit(model, mean=0.5, std=0.5)
    views = [opened.view(Image.new("RGB", (70, 80), colour)) for colour in ("red", "green", "blue", "grey")]
    assert try_registers(opened, views, n_neurons=2).sizes["image"] == 2


def test_more_neurons_than_leave_a_null_and_positions_by_number_are_refused_with_the_reason(vit: Vit) -> None:
    views = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue", "grey")]
    with pytest.raises(UsageError, match=r"L\d of .* has 128 neurons. Take \d+ at most \(--neurons\)") as refused:
        try_registers(vit, views, n_neurons=250)
    most = int(str(refused.value).split("Take ")[1].split()[0])
    assert 64 <= most < 250
    assert try_registers(vit, views, n_neurons=most).sizes["neuron"] == most
    with pytest.raises(UsageError, match="neurons 0 to 127, no -1"):
        with_registers(vit, [(0, -1)])
    relative = timm.create_model("vit_relpos_small_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=2).eval()
    with pytest.raises(Unsupported, match="does not run with registers among its tokens"):
        with_registers(open_vit(relative), [(0, 0)])


def test_the_command_prints_findings_and_draws(tmp_path) -> None:
    (tmp_path / "mine.py").write_text("from tokens.test_artefacts import planted\n")
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    drawn = tmp_path / "drawn" / "a.png"
    arguments = ["artefacts", f"{tmp_path / 'mine.py'}:planted", str(tmp_path), "--out", str(drawn)]
    result = CliRunner().invoke(app, [*arguments, "--neurons", "1"])
    assert result.exit_code == 0, result.output
    assert f"L{LAYER} neuron {NEURON}: " in result.output
    with Image.open(drawn) as picture:
        assert picture.size[0] > 400
