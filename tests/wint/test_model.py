"""Windows and masks in closed form, the transformer with and without them, folders, and the rest of Vitrail on it."""

import json

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor, nn

from vitrail import open_vit
from vitrail.contract.check import check_vit
from vitrail.errors import UnknownModel, Unsupported, UsageError, WeightsMismatch
from vitrail.patches import windows as measured
from vitrail.wint.folder import fit_state, open_model, save
from vitrail.wint.model import (
    FLOOR,
    FULL,
    Shape,
    WindowHead,
    WinT,
    attach,
    attention_bias,
    hard_mask,
    moved_windows,
    record_sides,
    round_sides,
    set_temperature,
    soft_bias,
    soft_edges,
    soft_mask,
    window_heads,
    windowed_attention,
)

FINAL_TEMPERATURE = 0.15


def small(seed=0, **options) -> WinT:
    """A small random WinT whose windows depend on the tokens, in evaluation mode."""
    torch.manual_seed(seed)
    shape = {"image_px": (32, 32), "width": 24, "depth": 3, "heads": 2, "n_classes": 5, "start": ((0.3,) * 4,)}
    model = WinT(Shape(**shape | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.2 * parameter.shape[1] ** -0.5)
    return model


def small_timm(**options) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **shape | options).eval()


def noise(n_images=4, px=(32, 32), seed=3) -> Tensor:
    return torch.randn((n_images, 3, *px), generator=torch.Generator().manual_seed(seed))


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "heads", "depth"), [(192, 3, 12), (384, 6, 12)])
def test_one_window_a_layer_costs_two_percent_of_the_parameters(width, heads, depth):
    """ViT-Tiny and ViT-S: D -> D/4 -> 4 is D^2/4 of the 12 D^2 of a block, a 48th, beside what no block has."""
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=width, num_heads=heads, depth=depth)
    before = sum(parameter.numel() for parameter in vit.parameters())
    attach(vit)
    added = sum(parameter.numel() for parameter in vit.parameters()) - before
    hidden = width // 4
    assert added == depth * (width * hidden + hidden + hidden * 4 + 4)
    assert round(100 * added / before) == 2
    assert added / before < 1 / 48


# --- masks -----------------------------------------------------------------------------------------------------------


def test_a_hard_mask_holds_exactly_the_patches_of_the_box():
    sides = torch.zeros(12, 4)
    sides[5] = torch.tensor([1.0, 0.4, 2.0, 1.0])  # row 1, column 1 of a 3 x 4 grid: columns 0..3, rows 1..2
    mask = hard_mask(sides, (3, 4))
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[1:3, 0:4] = True
    assert_array_equal(mask[5].view(3, 4), expected)
    assert_array_equal(mask[torch.arange(12) != 5], torch.eye(12, dtype=torch.bool)[torch.arange(12) != 5])


def test_a_soft_mask_is_the_product_of_four_sigmoids():
    sides, temperature = torch.tensor([[1.3, 0.7, 0.2, 2.1]] * 12), 0.5
    mask = soft_mask(sides, (3, 4), temperature)
    query, key = (1, 2), (2, 0)
    edges = torch.tensor([1.3 - 2 + 0.5, 0.7 + 1 + 0.5, 0.2 + 2 + 0.5, 2.1 - 1 + 0.5])
    expected = (edges / temperature).sigmoid().prod()
    assert_allclose(mask[query[0] * 4 + query[1], key[0] * 4 + key[1]], expected, rtol=1e-6)
    assert_array_equal(mask.diagonal(), torch.ones(12))


@pytest.mark.parametrize("temperature", [1.0, FINAL_TEMPERATURE, 0.02])
@pytest.mark.parametrize("grid", [(3, 4), (14, 14)])
def test_the_soft_bias_is_the_logarithm_of_the_soft_mask_gradients_and_all(grid, temperature):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, grid[0] * grid[1], 4)
    sides = (torch.rand(shape, generator=generator, dtype=torch.float64) * max(grid)).requires_grad_()
    mask = soft_mask(sides, grid, temperature)
    expected, open_enough = mask.clamp(min=1e-300).log(), mask > FLOOR
    bias = soft_bias(sides, grid, temperature)
    assert_allclose(bias[open_enough].detach(), expected[open_enough].detach(), rtol=0, atol=1e-9)
    assert bool((bias.detach()[~open_enough] <= np.log(FLOOR) + 1e-6).all())
    into_bias = torch.randn(bias.shape, generator=generator, dtype=torch.float64) * open_enough
    gradients = [torch.autograd.grad((each * into_bias).sum(), sides)[0] for each in (bias, expected)]
    assert bool(gradients[0].isfinite().all())
    assert_allclose(gradients[0], gradients[1], rtol=0, atol=1e-8 * float(gradients[1].abs().max()))


sides_strategy = st.lists(st.floats(0, 7, width=32), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(sides_strategy)
def test_soft_masks_become_hard_ones_as_the_temperature_falls(sides):
    """At the final temperature an edge that lies `gap` patches from the middle between two patches is off by at most
    sigmoid(-gap / T); with four edges the bound is four times that."""
    given_sides = torch.tensor(sides).expand(64, 4)
    gap = float((torch.tensor(sides) + 0.5 - (torch.tensor(sides) + 0.5).round()).abs().min())
    bound = 4 / (1 + np.exp(gap / FINAL_TEMPERATURE))
    difference = soft_mask(given_sides, (8, 8), FINAL_TEMPERATURE) - hard_mask(given_sides, (8, 8)).float()
    assert float(difference.abs().max()) <= bound + 1e-6


@pytest.mark.parametrize("side", [0.0, 1.0, 3.0])
def test_at_the_final_temperature_whole_sides_leave_a_mask_within_14_percent_of_the_hard_one(side):
    sides = torch.full((64, 4), side)
    difference = (soft_mask(sides, (8, 8), FINAL_TEMPERATURE) - hard_mask(sides, (8, 8)).float()).abs()
    assert 0.03 < float(difference.max()) < 4 / (1 + np.exp(0.5 / FINAL_TEMPERATURE))


@settings(max_examples=40, deadline=None)
@given(sides_strategy, st.integers(2, 6), st.integers(2, 6))
def test_masks_of_a_mirrored_grid_are_mirrored(sides, rows, columns):
    left, top, right, bottom = sides
    n_patches = rows * columns
    mask = soft_mask(torch.tensor([sides] * n_patches), (rows, columns), 0.4)
    mirrored = soft_mask(torch.tensor([[right, top, left, bottom]] * n_patches), (rows, columns), 0.4)
    both = mask.view(rows, columns, rows, columns).flip(1, 3).reshape(n_patches, n_patches)
    assert_allclose(mirrored, both, atol=1e-6)


def test_hard_masks_are_the_boxes_of_the_patches_room():
    sides = torch.rand((2, 15, 4), generator=torch.Generator().manual_seed(1)) * 3
    whole = round_sides(sides).long()
    row, column = torch.arange(15) // 5, torch.arange(15) % 5
    box = torch.stack(
        [row - whole[..., 1], column - whole[..., 0], row + whole[..., 3] + 1, column + whole[..., 2] + 1], -1
    )
    assert_array_equal(hard_mask(sides, (3, 5)), measured.in_box(box, (3, 5)))


# --- window heads ----------------------------------------------------------------------------------------------------


def test_windows_start_where_they_are_told_whatever_the_tokens():
    head = WindowHead(16, ((0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 0.5, 0.5)))
    sides = head(torch.randn(3, 20, 16), (4, 5))
    assert sides.shape == (3, 2, 20, 4)
    longest = torch.tensor([4.0, 3, 4, 3])
    assert_allclose(sides[1, 0, 7].detach(), torch.tensor([0.1, 0.2, 0.3, 0.4]) * longest, rtol=1e-5)


@pytest.mark.parametrize("start", [((0.3,) * 4,), ((0.2,) * 4, (0.6,) * 4)], ids=["one for all heads", "one a head"])
@pytest.mark.parametrize("temperature", [1.0, FINAL_TEMPERATURE])
def test_gradients_reach_every_side_in_every_layer(start, temperature):
    model = small(start=start, class_token=False).train()
    set_temperature(model, temperature)
    with record_sides(model) as sides:
        logits = model(noise())
    for layer in sides:
        layer.retain_grad()
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    for layer in sides:
        assert layer.grad is not None
        assert layer.grad.abs().sum((0, 2)).min() > 0
    for head in window_heads(model):
        assert head.hidden.weight.grad is not None
        assert head.hidden.weight.grad.abs().sum() > 0


def test_with_a_class_token_the_last_layer_has_windows_that_nobody_reads():
    """The class token sees all patches, and the classifier reads nothing else after the last layer."""
    model = small().train()
    with record_sides(model) as sides:
        logits = model(noise())
    before_last, last = torch.autograd.grad(logits.sum(), [sides[-2], sides[-1]])
    assert float(before_last.abs().max()) > 0
    assert float(last.abs().max()) == 0


def test_soft_and_hard_windows_give_nearly_the_same_logits_at_the_final_temperature():
    """Sides near a half differ most; over random windows the logits stay within a tenth of their spread."""
    model, images = small(), noise(16)
    hard = model(images).detach()
    for head in window_heads(model):
        head.hard = False
    set_temperature(model, FINAL_TEMPERATURE)
    soft = model(images).detach()
    set_temperature(model, 1.0)
    softer = model(images).detach()
    spread = float(hard.std())
    error, at_start = (float((logits - hard).square().mean().sqrt()) / spread for logits in (soft, softer))
    assert error < 0.1
    assert error < 0.5 * at_start


def test_hard_windows_in_training_are_those_of_evaluation_and_still_learn():
    """The last part of training: logits as in evaluation, however much a closed patch would draw; gradients as soft."""
    model, images = small(cut=0.001), noise()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(8.0)  # a floor under closed patches is outbid by scores like these
    wanted = model(images).detach()
    model.train()
    set_temperature(model, 1.0)
    soft = model(images).detach()
    set_temperature(model, 1.0, hard=True)
    with record_sides(model) as sides:
        hard = model(images)
    assert_allclose(hard.detach(), wanted, atol=1e-5)
    assert float((soft - wanted).abs().max()) > 0.01
    (gradient,) = torch.autograd.grad(hard.square().sum(), [sides[0]])
    assert float(gradient.abs().max()) > 0
    set_temperature(model, 1.0, hard=False)
    assert_allclose(model(images).detach(), soft)


@torch.no_grad()
def test_soft_edges_are_kept_in_evaluation_and_in_a_folder(tmp_path):
    """`edges` is the temperature that a model answers with for good."""
    soft, images = small(edges=FINAL_TEMPERATURE), noise()
    other = small()
    wanted = soft(images)
    for head in window_heads(other):
        head.hard = False
    set_temperature(other, FINAL_TEMPERATURE)
    assert torch.equal(other(images), wanted)
    set_temperature(soft, 1.0)  # of training
    assert torch.equal(soft(images), wanted)
    save(soft, tmp_path / "model")
    assert torch.equal(open_vit(tmp_path / "model").logits(images), wanted)
    for head in window_heads(soft):
        head.hard = True
    assert torch.equal(soft(images), small()(images))


def test_a_start_that_has_no_meaning_is_refused():
    with pytest.raises(UsageError, match="four shares"):
        WindowHead(16, ((0.0, 0.5, 0.5, 0.5),))
    with pytest.raises(UsageError, match="four shares"):
        WindowHead(16, ((0.5,) * 4, (0.5,) * 3))
    for sides in ((1.0,) * 3, (1.0, 1.0, 1.0, -1.0)):
        with pytest.raises(UsageError, match="four sides of 0 or more"):
            small(windows="fixed", start=(sides,))
    for wrong in ({"heads": 0}, {"depth": 0}, {"patch_px": 0}, {"mlp_ratio": 0.0}, {"image_px": (0, 0)}):
        with pytest.raises(UsageError, match="make no model"):
            small(**wrong)
    with pytest.raises(UsageError, match=r"drop_path_rate = 1\.0"):
        small(drop_path_rate=1.0)
    with pytest.raises(UsageError, match="1 or 2, one a head"):
        small(start=((0.3,) * 4,) * 3)
    for edges in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="patches soft"):
            small(edges=edges)
    with pytest.raises(UsageError, match="n_classes = -1"):
        small(n_classes=-1)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="temperature"):
            set_temperature(small(), temperature)
    with pytest.raises(UsageError, match=r"cut at 1\.5"):
        Shape(cut=1.5)
    with pytest.raises(UsageError, match="predicted, fixed or none"):
        small(windows="sliding")
    with pytest.raises(UsageError, match="temperature"):
        set_temperature(small(), 0.0)


# --- full windows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_token", [True, False])
def test_with_full_windows_it_is_the_vit_bitwise(class_token):
    vit = small(windows="none", class_token=class_token)
    wint = WinT(Shape(**{**vit.shape.__dict__, "windows": "predicted", "start": FULL})).eval()
    wint.load_state_dict(vit.state_dict(), strict=False)
    assert torch.equal(wint(noise()), vit(noise()))
    fixed = WinT(Shape(**{**vit.shape.__dict__, "windows": "fixed", "start": ((7.0,) * 4,)})).eval()
    fixed.load_state_dict(vit.state_dict())
    assert torch.equal(fixed(noise()), vit(noise()))


def test_models_of_one_seed_share_all_weights_but_the_windows():
    states = []
    for windows, start in (("none", FULL), ("predicted", ((0.3,) * 4,)), ("fixed", ((2.0,) * 4,))):
        torch.manual_seed(4)
        states.append(WinT(Shape(windows=windows, start=start)).state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        assert torch.equal(tensor, states[2][name])


def test_windows_change_the_answer_and_the_far_patches_do_not_count():
    """One layer without class token: the output of a patch does not change when patches outside its window do."""
    torch.manual_seed(0)
    model = small(depth=1, class_token=False, windows="fixed", start=((1.0,) * 4,))
    kept = {}
    model.blocks[0].register_forward_hook(lambda module, given, out: kept.update(tokens=out))
    images = noise(1)
    model(images)
    before = kept["tokens"].detach()
    images[..., 12:] += 1.0  # columns 3.. of the 8 x 8 grid
    model(images)
    moved = (kept["tokens"].detach() - before).abs().sum(-1).view(8, 8)
    assert float(moved[:, :2].max()) == 0
    assert float(moved[:, 2:].min()) > 0


def test_full_fixed_windows_can_be_moved():
    model = small(windows="fixed", start=((7.0,) * 4,))
    narrow = small(windows="fixed", start=((6.0,) * 4,))
    narrow.load_state_dict(model.state_dict())
    alone = [moved_windows(each, [(0, (0, 0, 0, 0), None, None)])(noise()) for each in (model, narrow)]
    plain = small(windows="none")
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(noise()), plain(noise()))
    assert not torch.allclose(alone[0], model(noise()))
    wider = moved_windows(narrow, [(layer, (7, 7, 7, 7), None, None) for layer in range(3)])
    assert_allclose(wider(noise()).detach(), model(noise()).detach(), atol=1e-5)


@pytest.mark.parametrize(
    ("move", "words"),
    [
        ((0, (1, 1), None, None), "four sides of 0 or more"),
        ((0, (1, 1, 1, -1), None, None), "four sides of 0 or more"),
        ((0, (1, 1, 1, float("nan")), None, None), "four sides of 0 or more"),
        ((3, (1, 1, 1, 1), None, None), "no layer 3: the model has layers 0 to 2"),
        ((0, (1, 1, 1, 1), 2, None), "no head 2: L0 has heads 0 to 1"),
        ((0, (1, 1, 1, 1), None, 64), "no window 64: L0 has windows 0 to 63"),
    ],
)
def test_a_move_of_a_window_that_is_not_there_is_refused(move, words):
    with pytest.raises(UsageError, match=words):
        moved_windows(small(), [move])


def test_a_window_of_a_timm_model_moves_too():
    model = attach(small_timm(), ((0.2,) * 4,) * 3)
    moved = moved_windows(model, [(1, (0, 0, 0, 0), 2, None)])
    image = noise(px=(64, 64))
    assert not torch.allclose(moved(image), model(image))
    with pytest.raises(UsageError, match="no head 3: L1 has heads 0 to 2"):
        moved_windows(model, [(1, (0, 0, 0, 0), 3, None)])


def test_a_pretrained_timm_model_starts_unchanged_bitwise():
    model = small_timm()
    before = model(noise(px=(64, 64)))
    assert attach(model) is model
    assert len(window_heads(model)) == 3
    assert torch.equal(model(noise(px=(64, 64))), before)


def test_soft_full_windows_change_a_pretrained_model_little():
    """Sides start at 0.982 (n - 1): at temperature 1 the farthest patch is open by 60 %, so training starts near it."""
    model = small_timm()
    before = model(noise(px=(64, 64))).detach()
    attach(model).train()
    change = (model(noise(px=(64, 64))) - before).detach()
    assert 0 < float(change.abs().max()) < 0.02 * float(before.std())


def test_window_heads_on_timm_act_and_can_be_observed():
    model = attach(small_timm(), ((0.2,) * 4,) * 3)
    for head in window_heads(model):
        nn.init.normal_(head.sides.weight)
    report = check_vit(open_vit(model))
    assert report.ok, report.text()


def test_models_that_are_no_plain_timm_vit_are_refused():
    with pytest.raises(Unsupported, match="no blocks"):
        attach(nn.Linear(3, 3))
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(1, 1), embed_dim=8, num_heads=(1, 1)
    )
    with pytest.raises(Unsupported, match="timm's VisionTransformer"):
        attach(swin)
    with pytest.raises(UsageError, match="one a head"):
        attach(small_timm(), ((0.2,) * 4,) * 2)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", ["predicted", "none", "fixed"])
@pytest.mark.parametrize("class_token", [True, False])
def test_saved_and_opened_again_it_gives_equal_logits(tmp_path, windows, class_token):
    model = small(windows=windows, class_token=class_token)
    save(model, tmp_path, class_names=list("abcde"))
    vit = open_vit(tmp_path)
    assert torch.equal(vit.logits(noise()), model(noise()))
    assert vit.class_names == tuple("abcde")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_timm_model_with_windows_is_saved_and_opened_again(tmp_path):
    model = attach(small_timm(), ((0.2,) * 4,))
    made_of = {
        "name": "vit_tiny_patch16_224",
        "args": {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 10},
        "start": ((0.2,) * 4,),
    }
    with pytest.raises(UnknownModel, match="timm_model"):
        save(model, tmp_path)
    save(model, tmp_path, timm_model=made_of, mean=(0.4, 0.4, 0.4))
    vit = open_vit(tmp_path)
    assert torch.equal(vit.logits(noise(px=(64, 64))), model(noise(px=(64, 64))))
    assert vit.preprocessing.mean == (0.4, 0.4, 0.4)
    assert vit.preprocessing.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("timm_model", "words"),
    [
        (
            {"name": "hf-hub:somebody/something"},
            "names the timm model 'hf-hub:somebody/something', which timm does not",
        ),
        (
            {"name": "vit_tiny_patch16_224", "args": {"checkpoint_path": "/tmp/x.pth", "depth": 2}},
            r"\['checkpoint_path'\]",
        ),
        ({"name": "vit_tiny_patch16_224", "args": {"pretrained_cfg": {"url": "http://x"}}}, r"\['pretrained_cfg'\]"),
        ({"name": "vit_tiny_patch16_224", "args": ["depth"]}, "the arguments list"),
        (["vit_tiny_patch16_224"], "should describe a timm model"),
        ({"name": "vit_tiny_patch16_224", "windows": "fixed"}, "windows = 'fixed'; there are predicted and none"),
    ],
)
def test_a_folder_can_make_timm_load_nothing_else(tmp_path, timm_model, words, monkeypatch):
    save(small(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vitrail_wint", "timm": timm_model}))
    monkeypatch.setattr(timm, "create_model", lambda *_args, **_options: pytest.fail("timm was called"))
    with pytest.raises(UnknownModel, match=words):
        open_vit(tmp_path)


def test_it_opens_on_any_other_grid(tmp_path):
    save(small(), tmp_path)
    vit = open_vit(tmp_path, image_size=(40, 64))
    assert vit.anatomy.grid == (10, 16)
    assert vit.logits(noise(px=(40, 64))).shape == (4, 5)
    with record_sides(vit.model) as sides, torch.no_grad():
        vit.model(noise(px=(40, 64)))
    assert float(sides[0][..., 0].max()) <= 15
    assert float(sides[0][..., 1].max()) <= 9


@pytest.mark.parametrize("kind", ["ours", "timm"])
@pytest.mark.parametrize(("px", "other"), [((32, 72), (64, 144)), ((32, 64), (64, 128)), ((32, 72), (48, 48))])
def test_positions_of_any_grid_are_resampled_by_rows_and_columns(tmp_path, kind, px, other):
    """A ramp down the rows of a grid that is no square stays one, whatever the new number of patches."""
    rows, columns = px[0] // 4, px[1] // 4
    args = {"img_size": px, "patch_size": 4, "depth": 1, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
    ours = kind == "ours"
    model = small(image_px=px) if ours else attach(small_timm(**args), ((0.2,) * 4,))
    positions = model.positions if ours else model.pos_embed
    with torch.no_grad():
        positions[:, -rows * columns :] = torch.linspace(-1, 1, rows).repeat_interleave(columns)[:, None]
    save(model, tmp_path, timm_model={"name": "vit_tiny_patch16_224", "args": args, "start": ((0.2,) * 4,)})
    opened = open_vit(tmp_path, image_size=other).model
    resampled = (opened.positions if ours else opened.pos_embed).detach()
    new_rows, new_columns = other[0] // 4, other[1] // 4
    ramp = resampled[0, -new_rows * new_columns :, 0].view(new_rows, new_columns)
    assert float(ramp.std(1).max()) < 1e-5
    assert bool((ramp.mean(1).diff() > 0).all())


def test_weights_whose_grid_nobody_knows_are_refused():
    model = small()
    state = {**model.state_dict(), "positions": torch.zeros(1, 1 + 8 * 16, 24)}
    with pytest.raises(WeightsMismatch, match="128 patches, which are no square"):
        fit_state(state, model)
    assert fit_state(state, model, grid=(8, 16))["positions"].shape == (1, 65, 24)


def test_another_class_count_draws_a_new_classifier(tmp_path):
    save(small(), tmp_path)
    assert open_vit(tmp_path, n_classes=7).logits(noise()).shape == (4, 7)
    assert open_vit(tmp_path, n_classes=0).logits(noise()).shape == (4, 24)


def test_folders_that_cannot_be_opened_say_why(tmp_path):
    save(small(), tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"depth": 3', '"depth": 2'))
    with pytest.raises(WeightsMismatch, match="blocks"):
        open_vit(tmp_path)
    (tmp_path / "config.json").write_text(text.replace('"depth": 3', '"deepness": 3'))
    with pytest.raises(UnknownModel, match="deepness"):
        open_vit(tmp_path)
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsMismatch, match=r"no model\.safetensors"):
        open_model(tmp_path)


# --- the rest of Vitrail on it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_token", [True, False])
def test_it_opens_in_vitrail_and_every_promise_of_the_tap_holds(class_token):
    report = check_vit(open_vit(small(class_token=class_token)))
    assert report.ok, report.text()


def test_attention_that_the_tap_reads_lies_in_the_predicted_windows():
    vit = open_vit(small(start=((0.15,) * 4, (0.4,) * 4)))
    seen = {}
    from vitrail import Readers

    with record_sides(vit.model) as sides, torch.no_grad():
        vit.model.eval()(noise())
    vit.tap().read(noise(), Readers(attention=lambda call: seen.update({call.layer: call.weights().detach()})))
    for layer, predicted in enumerate(sides):
        between = seen[layer][:, :, 1:, 1:]
        open_patches = hard_mask(predicted, (8, 8))
        assert float(between.masked_fill(open_patches, 0).abs().max()) == 0
        assert float(between.masked_fill(~open_patches, 1).min()) > 0
        assert float(seen[layer][:, :, :, 0].min()) > 0


def test_the_floor_is_the_cost_of_a_closed_row_and_of_a_closed_column():
    far = soft_bias(torch.zeros(64, 4), (8, 8), 0.02).view(8, 8, 8, 8)
    assert_allclose(float(far[0, 0, 0, 5]), np.log(FLOOR), rtol=1e-4)
    assert_allclose(float(far[0, 0, 5, 5]), 2 * np.log(FLOOR), rtol=1e-4)


@pytest.mark.parametrize(("prefix", "n_windows"), [(0, 3), (1, 3), (2, 1)])
@pytest.mark.parametrize(("temperature", "cut"), [(1.0, 0.0), (FINAL_TEMPERATURE, 0.0), (FINAL_TEMPERATURE, 1e-3)])
def test_windows_as_channels_of_queries_and_keys_are_windows_as_a_mask(prefix, n_windows, temperature, cut):
    generator = torch.Generator().manual_seed(0)
    grid, n_heads = (4, 5), 3

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = (draw(2, n_heads, prefix + 20, 8) for _ in range(3))
    sides = (torch.rand((2, n_windows, 20, 4), generator=generator, dtype=torch.float64) * 4).requires_grad_()
    bias = attention_bias(soft_bias(sides, grid, temperature, cut), prefix, q)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    taken = windowed_attention(q, k, v, soft_edges(sides, grid, temperature, cut), grid)
    assert_allclose(taken.detach(), expected.detach(), rtol=0, atol=1e-6)
    into = torch.randn(taken.shape, generator=generator, dtype=torch.float64)
    for one in (q, k, v, sides):
        ours, theirs = (
            torch.autograd.grad((each * into).sum(), one, retain_graph=True)[0] for each in (taken, expected)
        )
        assert_allclose(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("windows", ["predicted", "fixed", "none"])
def test_a_model_in_training_answers_as_with_masks_in_its_attention(windows):
    """Training on a CPU takes other products than evaluation (`windowed_attention`); in float32 and bfloat16."""
    torch.manual_seed(0)
    model = WinT(Shape(width=32, depth=2, heads=2, windows=windows, start=((0.3, 0.2, 0.4, 0.3),), edges=0.5)).train()
    for window_head in (each for each in model.modules() if isinstance(each, WindowHead)):
        window_head.temperature.fill_(0.5)
    images = noise()
    trained = model(images).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images).detach()
    model.eval()
    with torch.no_grad():
        assert_allclose(trained, model(images), rtol=0, atol=1e-5)
        assert_allclose(rounded.float(), trained, rtol=0, atol=0.05 * float(trained.std()))
