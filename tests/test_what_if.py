"""What the answer becomes if something changes: every step is a plain pass with the same edits, made by hand."""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import vitrail
from vitrail.contract.tiny_models import FAMILIES
from vitrail.errors import Unsupported, UsageError
from vitrail.heads.regions import Mode, region_mask
from vitrail.models.open import open_vit
from vitrail.tap.edits import Edit
from vitrail.tap.tap import Readers
from vitrail.tokens.robustness import why_not_removable
from vitrail.what_if import ARRAYS, HeadOff, WindowMove, steps
from vitrail.what_if.changes import parse_windows
from vitrail.windows.collect import predict_windows
from vitrail.wint.model import Shape, WinT, hard_mask, record_sides, window_heads

GRID = (4, 4)


def small_vit(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 7}
    model = timm.create_model(name, **shape | options)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=1.5 * weight.shape[1] ** -0.5)
    return open_vit(model.eval(), image_size=32)


def wint():
    torch.manual_seed(0)
    model = WinT(Shape(8, 24, 2, 2, windows="predicted", image_px=(32, 32), n_classes=7, start=((0.4,) * 4,)))
    with torch.no_grad():
        for head in window_heads(model):
            head.sides.weight.normal_(std=0.3)
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "windows" not in name:
                weight.normal_(std=1.5 * weight.shape[1] ** -0.5)
    return open_vit(model.eval(), mean=0.5, std=0.5)


def photo(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def vit():
    return small_vit()


@torch.no_grad()
def by_hand(vit, pixels, edits, layer=None):
    """Logits, tokens of every layer and the maps of one, from one whole pass."""
    tokens, maps = {}, {}
    readers = Readers(output=tokens.__setitem__, attention=lambda each: maps.__setitem__(each.layer, each.weights()[0]))
    logits = vit.tap().read(pixels, readers, edits)
    return logits, tokens, maps.get(layer)


def check_step(changed, step, logits, tokens, plain_logits, plain_tokens):
    probabilities, before = logits.softmax(-1)[0], plain_logits.softmax(-1)[0]
    label = int(before.argmax())
    mixed = (probabilities + before) / 2
    divergence = sum((p * (p / mixed).log2()).sum() / 2 for p in (probabilities, before))
    assert_allclose(changed["probability"][step], probabilities[label], atol=1e-6)
    assert_allclose(changed["top_probability"][step], probabilities.sort(descending=True).values[:5], atol=1e-6)
    assert_array_equal(changed["top_class"][step], probabilities.argsort(descending=True)[:5])
    followed = set(changed["top_class"].values[[0, -1]].ravel().tolist())
    assert set(changed["rank"].values.tolist()) == followed
    assert_allclose(changed["followed_probability"][step], probabilities[changed["rank"].values.tolist()], atol=1e-6)
    assert_allclose(changed["divergence"][step], divergence, atol=1e-6)
    for layer, after in tokens.items():
        expected = 1 - F.cosine_similarity(plain_tokens[layer][0], after[0], dim=-1)
        assert_allclose(changed["token_drift"][step, layer], expected, atol=1e-5)


def test_heads_and_parts_of_heads_add_up_as_plain_edits_do(vit):
    off = [(1, 0), HeadOff(0, 1), (2, 1, Mode.CROSS)]
    changed = vit.what_if(photo(), heads_off=off, attention_layer=2)
    assert changed["step"].values.tolist() == [
        "unchanged",
        "L1H0 off",
        "L0H1 off",
        "L2H1 without its prefix rows and columns",
    ]
    pixels = vit.prepare([photo()])
    region = torch.ones(2, 17, 17)
    region[1] = region_mask(Mode.CROSS, 17, 1)
    edits = [Edit(1, prune=(0,)), Edit(0, prune=(1,)), Edit(2, region=region)]
    plain = by_hand(vit, pixels, [], 2)
    for step in range(4):
        logits, tokens, attention = by_hand(vit, pixels, edits[:step], 2)
        check_step(changed, step, logits, tokens, plain[0], plain[1])
    assert_allclose(changed["attention_before"], plain[2], atol=1e-6)
    assert_allclose(changed["attention_after"], attention, atol=1e-6)
    at_once = vit.what_if(photo(), heads_off=off, attention_layer=2, cumulative=False)
    assert at_once["step"].values.tolist() == ["unchanged", "all changes"]
    assert_array_equal(at_once["probability"], changed["probability"][[0, -1]])
    assert_array_equal(at_once["attention_after"], changed["attention_after"])
    assert changed["probability"][0] == changed["top_probability"][0, 0]
    assert changed["divergence"][0] == 0
    assert np.abs(changed["token_drift"][0]).max() == 0
    assert {str(name) for name in changed} <= {measure.name for measure in ARRAYS}
    assert vit.what_if(photo(), heads_off="L1H0,L0H1").attrs["use_this"] == (
        "vitrail prune STUDY --heads L1H0,L0H1 --out NEW_FOLDER"
    )


def test_what_changed_is_written_as_netcdf(vit, tmp_path):
    pytest.importorskip("h5netcdf", reason="h5netcdf writes netCDF, and is not installed")
    changed = vit.what_if(photo(), heads_off="L0H1")
    changed.to_netcdf(tmp_path / "changed.nc")
    with xr.open_dataset(tmp_path / "changed.nc", engine="h5netcdf") as read:
        assert read["step"].values.tolist() == changed["step"].values.tolist()
        assert_array_equal(read["token_drift"], changed["token_drift"])
        assert json.loads(read.attrs["left_out"]) == changed.attrs["left_out"]


def test_painted_patches_are_those_of_painted_pixels(vit):
    pixels = vit.prepare([photo()])
    painted = pixels.clone()
    painted[:, :, 8:16, 16:24] = pixels.mean((2, 3))[..., None, None]
    painted[:, :, 0:8, 0:8] = pixels.mean((2, 3))[..., None, None]
    plain = by_hand(vit, pixels, [])
    changed = vit.what_if(photo(), patches=[(1, 2), (0, 0)], heads_off="L1H1")
    check_step(changed, 1, *by_hand(vit, painted, [])[:2], *plain[:2])
    check_step(changed, 2, *by_hand(vit, painted, [Edit(1, prune=(1,))])[:2], *plain[:2])
    for same in ([6, 0], np.arange(16).reshape(4, 4) % 6 == 0):
        mask = np.isin(np.arange(16), [0, 6]).reshape(4, 4) if not isinstance(same, list) else same
        assert_array_equal(vit.what_if(photo(), patches=mask)["probability"], changed["probability"][:2])


def test_removed_patches_are_those_that_nobody_can_attend_to(vit):
    lost = [3, 5, 10]
    pixels = vit.prepare([photo()])
    tokens_lost = tuple(1 + patch for patch in lost)
    region = torch.ones(2, 17, 17)
    region[0] = region_mask(Mode.PATCHES, 17, 1)
    nobody = [Edit(layer, drop_keys=tokens_lost) for layer in range(3)]
    plain = by_hand(vit, pixels, [], 1)
    changed = vit.what_if(
        photo(),
        patches=lost,
        how="removed",
        windows=[(1, (0, 0, 1, 1))],
        heads_off=[(2, 0, Mode.PATCHES)],
        attention_layer=1,
    )
    window = window_bias(sides=(0, 0, 1, 1))
    window[:, [*tokens_lost]] = 0
    steps = [[], nobody, [*nobody, Edit(1, bias=window)], [*nobody, Edit(1, bias=window), Edit(2, region=region)]]
    left = [token for token in range(17) if token not in tokens_lost]
    for step, edits in enumerate(steps[1:], 1):
        logits, tokens, attention = by_hand(vit, pixels, edits, 1)
        assert_allclose(changed["probability"][step], logits.softmax(-1)[0, plain[0].argmax()], atol=1e-5)
        drift = 1 - F.cosine_similarity(plain[1][2][0], tokens[2][0], dim=-1)
        assert_allclose(changed["token_drift"][step, 2, left], drift[left], atol=1e-5)
        assert np.isnan(changed["token_drift"][step, :, list(tokens_lost)]).all()
    after = changed["attention_after"].values
    assert_allclose(after[:, left][:, :, left], attention[:, left][:, :, left], atol=1e-5)
    assert np.isnan(after[:, :, list(tokens_lost)]).all()


def test_shuffled_patches_are_compared_with_the_place_that_they_come_from(vit):
    lost = [1, 2, 7, 12]
    changed = vit.what_if(photo(), patches=lost, how="shuffled", seed=3)
    sources = np.arange(16)
    sources[lost] = np.random.default_rng(3).permutation(lost)
    assert (sources[lost] != lost).any()
    pixels = vit.prepare([photo()])
    cut = pixels.clone()
    for place, source in enumerate(sources):
        (row, column), (old_row, old_column) = divmod(place, 4), divmod(int(source), 4)
        block = pixels[:, :, old_row * 8 : old_row * 8 + 8, old_column * 8 : old_column * 8 + 8]
        cut[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = block
    plain, (logits, tokens, _) = by_hand(vit, pixels, []), by_hand(vit, cut, [])
    assert_allclose(changed["probability"][1], logits.softmax(-1)[0, plain[0].argmax()], atol=1e-6)
    order = np.concatenate([[0], 1 + sources])
    expected = 1 - F.cosine_similarity(plain[1][1][0][order], tokens[1][0], dim=-1)
    assert_allclose(changed["token_drift"][1, 1], expected, atol=1e-5)


def window_bias(sides, patch=None):
    """Closed where a patch lies outside of the window that begins at the query."""
    left, top, right, bottom = sides
    bias = torch.zeros(17, 17)
    for query in range(16):
        for key in range(16):
            down, across = key // 4 - query // 4, key % 4 - query % 4
            inside = -top <= down <= bottom and -left <= across <= right
            if not inside and (patch is None or query == patch):
                bias[1 + query, 1 + key] = -torch.inf
    return bias


def test_a_window_on_a_head_of_any_vit_is_a_mask_of_its_scores(vit):
    pixels = vit.prepare([photo()])
    changed = vit.what_if(photo(), windows=[(1, (1, 0, 1, 2), 1), WindowMove(2, (0, 0, 0, 0), None, 9)])
    first, second = torch.zeros(2, 17, 17), window_bias((0, 0, 0, 0), 9)
    first[1] = window_bias((1, 0, 1, 2))
    plain = by_hand(vit, pixels, [])
    edits = [Edit(1, bias=first), Edit(2, bias=second)]
    for step in (1, 2):
        check_step(changed, step, *by_hand(vit, pixels, edits[:step])[:2], *plain[:2])
    assert "what_if(image, windows=[(1, (1, 0, 1, 2), 1, None)" in changed.attrs["use_this"]
    numbers = [(np.int64(1), np.array([1, 0, 1, 2]), np.int64(1)), (2, (0.0,) * 4, None, (2, np.int64(1)))]
    again = vit.what_if(photo(), windows=numbers)
    assert_array_equal(again["probability"], changed["probability"])
    assert again.attrs["use_this"] == changed.attrs["use_this"]


def test_the_lines_that_do_the_same_open_the_model_as_it_was_opened(vit, tmp_path):
    named = open_vit("timm:vit_tiny_patch16_224", weights="random", image_size=64, mean=0.4)
    lines = named.what_if(photo(), patches=[1]).attrs["use_this"].splitlines()
    assert lines[2].startswith("vit = vitrail.open_vit('timm:vit_tiny_patch16_224', image_size=64, weights='random', ")
    again = eval(lines[2].removeprefix("vit = "), {"vitrail": vitrail})
    assert again.preprocessing == named.preprocessing
    assert again.opened_with == named.opened_with
    own = vit.what_if(photo(), patches=[1]).attrs["use_this"].splitlines()
    assert own[2] == "vit = ...  # your own model, opened as it was here"
    named.opened_with |= {"prompts": {"cat": [0.1] * 200}, "precision": "bfloat16"}
    lines = named.what_if(photo(), patches=[1]).attrs["use_this"].splitlines()
    assert lines[2].startswith("prompts = ...")
    assert "precision='bfloat16', prompts=prompts, " in lines[3]


def test_the_last_step_alone_of_a_wint_is_one_pass_for_all_its_windows(monkeypatch):
    windows, words = [(layer, (0, 0, 1, 1), None, patch) for layer in range(2) for patch in range(3)], []
    real = steps._record
    monkeypatch.setattr(steps, "_record", lambda tap, pixels, word: words.append(word) or real(tap, pixels, word))
    vit = wint()
    at_once = vit.what_if(photo(), windows=windows, heads_off="L1H0", cumulative=False)
    assert len(words) == 2
    assert_array_equal(
        at_once["probability"], vit.what_if(photo(), windows=windows, heads_off="L1H0")["probability"][[0, -1]]
    )


def test_the_windows_of_a_wint_shrink_and_grow():
    vit = wint()
    pixels = vit.prepare([photo()])
    sides = [each.clone() for each in predict_windows(vit, pixels)]
    assert not hard_mask(sides[0], GRID).all()
    changed = vit.what_if(photo(), windows=[(0, (3, 3, 3, 3), 1), (0, (0, 0, 0, 0), 0, 5)], attention_layer=0)
    for step, moved in enumerate(([], [(1, slice(None), 3.0)], [(1, slice(None), 3.0), (0, slice(5, 6), 0.0)])):
        masks = [each.expand(-1, 2, -1, -1).clone() for each in sides]
        for head, queries, side in moved:
            masks[0][:, head, queries] = side
        expected, attention = run_with_masks(vit.model, pixels, [hard_mask(each, GRID) for each in masks[:1]])
        label = int(changed["prediction"][0])
        assert_allclose(changed["probability"][step], expected.softmax(-1)[0, label], atol=1e-5)
    assert_allclose(changed["attention_after"], attention, atol=1e-5)
    with record_sides(vit.model) as again, torch.no_grad():
        vit.model(pixels)
    for before, after in zip(sides, again, strict=True):  # the model itself was not touched
        assert_array_equal(before, after)


@torch.no_grad()
def run_with_masks(model, pixels, masks):
    """A WinT whose first layers have these windows, written out; its logits, and the maps of the first layer."""
    tokens = model.patch_embed(pixels).flatten(2).mT
    tokens = torch.cat([model.cls_token.expand(len(tokens), -1, -1), tokens], 1) + model.positions
    maps = []
    for layer, block in enumerate(model.blocks):
        if layer >= len(masks):
            tokens = block(tokens)
            continue
        attention = block.attn
        q, k, v = attention.qkv(block.norm1(tokens)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        scores[:, :, 1:, 1:].masked_fill_(~masks[layer], -torch.inf)
        maps.append(scores.softmax(-1)[0])
        tokens = tokens + attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.norm2(tokens))
    return model.head(model.norm(tokens)[:, 0]), maps[0]


def test_a_feature_vector_has_its_shift_and_no_classes():
    vit = small_vit(num_classes=0)
    changed = vit.what_if(photo(), heads_off="L1H0")
    plain, after = (by_hand(vit, vit.prepare([photo()]), edits)[0] for edits in ([], [Edit(1, prune=(0,))]))
    assert_allclose(changed["output_shift"], [0, 1 - F.cosine_similarity(plain, after)[0]], atol=1e-6)
    assert not {"probability", "top_class", "divergence"} & set(changed)


def test_what_a_model_lacks_is_left_out_or_refused():
    torch.manual_seed(0)
    shape = {"img_size": 32, "window_size": 2, "depths": (1, 1), "embed_dim": 24, "num_heads": (2, 3), "num_classes": 4}
    swin = open_vit(timm.create_model("swin_tiny_patch4_window7_224", **shape).eval(), weights="random")
    changed = swin.what_if(photo(), heads_off="L1H2", attention_layer=0)
    assert changed["token_drift"].shape == (2, 2, 64)
    assert np.isnan(changed["token_drift"][1, 1, 16:]).all()
    with pytest.raises(Unsupported, match="taken out only where"):
        swin.what_if(photo(), patches=[1], how="removed")
    with pytest.raises(Unsupported, match="no map from patches"):
        swin.what_if(photo(), windows=[(0, (1, 1, 1, 1))])


def test_tokens_that_are_merged_are_not_compared_with_others_of_the_same_number():
    family = next(each for each in FAMILIES if each.name == "timm ViT, tokens merged")
    vit = open_vit(family.model(), image_size=64, mean=0.5, std=0.5)
    changed = vit.what_if(photo(), heads_off="L0H0", attention_layer=0)
    assert "which of them is which is not known" in changed.attrs["left_out"]["token_drift"]
    assert set(changed.attrs["left_out"]) == {"token_drift"}
    assert_array_equal(changed["attention_before"], changed["attention_after"])  # a head that is off keeps its map
    changed = vit.what_if(photo(), patches=[1, 2], how="removed", attention_layer=2)
    assert "L2 joins 11 tokens after the changes and 13 before" in changed.attrs["left_out"]["attention_after"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Nothing was changed"),
        ({"heads_off": "L3H0"}, "L0 to L2"),
        ({"heads_off": [(0, 2)]}, "heads 0 to 1"),
        ({"heads_off": [(0, 1), (0, 1)]}, "twice"),
        ({"heads_off": [(0, 1, 9)]}, "no part 9"),
        ({"heads_off": "zebra"}, "names no head"),
        ({"heads_off": ["L0H0", "L1H1"]}, "names no heads; give"),
        ({"heads_off": (0, 1)}, "names no heads; give"),
        ({"heads_off": [("0", "1")]}, "names no heads; give"),
        ({"patches": [(0, 1), 3]}, "indices"),
        ({"patches": [16]}, "outside of the grid"),
        ({"patches": [(0, 4)]}, "outside of the grid"),
        ({"patches": [0.5]}, "indices"),
        ({"patches": np.ones(9, dtype=bool)}, "4 x 4"),
        ({"patches": [1], "how": "blurred"}, "choose from"),
        ({"patches": list(range(16)), "how": "removed"}, "at least one"),
        ({"windows": [(0, (1, 1, 1))]}, "Sides"),
        ({"windows": [(0, (1, 1, 1, -1))]}, "whole numbers"),
        ({"windows": [(0, (1, 1, 1, 0.5))]}, "whole numbers"),
        ({"windows": [(0, 3)]}, "is no window"),
        ({"windows": [(0, (1, 1, 1, 1), 0, 16)]}, "Patch 16"),
        ({"windows": [(0, (1, 1, 1, 1), 0, (2, 4))]}, r"Patch \(2, 4\)"),
        ({"windows": [(0, (1, 1, 1, 1), 0, 3.5)]}, "is no window"),
        ({"windows": [(0, (1, 1, 1, 1), 0, (1, 2, 3))]}, "is no window"),
        ({"windows": [(0, (1, 1, 1, 1), "H0")]}, "is no window"),
        ({"windows": [("1", (1, 1, 1, 1))]}, "is no window"),
        ({"windows": [(0, (1, 1, 1, float("inf")))]}, "is no window"),
        ({"windows": [(9, (1, 1, 1, 1))]}, "L0 to L2"),
        ({"heads_off": "L0H0", "attention_layer": 3}, "L0 to L2"),
    ],
)
def test_what_has_no_meaning_is_refused_in_a_sentence(vit, changes, words):
    with pytest.raises(UsageError, match=words):
        vit.what_if(photo(), **changes)


def test_windows_that_are_no_list_are_refused(vit):
    with pytest.raises(UsageError, match="5 is no list of windows"):
        parse_windows(vit, 5)


class _Pyramid(torch.nn.Module):
    """Attention between all tokens of 4 x 4 patches, then of 2 x 2."""

    class Block(torch.nn.Module):
        def __init__(self, pools):
            super().__init__()
            self.num_heads, self.pools = 2, pools
            self.qkv, self.proj = torch.nn.Linear(24, 72), torch.nn.Linear(24, 24)

        def forward(self, picture):
            tokens = picture.flatten(2).mT
            parts = self.qkv(tokens).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
            mixed = self.proj(F.scaled_dot_product_attention(*parts.unbind(0)).transpose(1, 2).flatten(2))
            picture = picture + mixed.mT.reshape(picture.shape)
            return F.avg_pool2d(picture, 2) if self.pools else picture

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 24, 8, 8)
        self.blocks = torch.nn.Sequential(self.Block(pools=True), self.Block(pools=False))
        self.head = torch.nn.Linear(24, 7)

    def forward(self, images):
        return self.head(self.blocks(self.embed(images)).mean((2, 3)))


def test_patches_of_a_pyramid_of_whole_maps_can_be_painted_and_not_removed():
    torch.manual_seed(0)
    vit = open_vit(_Pyramid().eval(), image_size=32, mean=0.5, std=0.5)
    assert [(block.kind, block.tokens) for block in vit.anatomy.blocks] == [("token", 16), ("token", 4)]
    with pytest.raises(Unsupported, match="L0 is given 16, and L1 attends to 4; paint them"):
        vit.what_if(photo(), patches=[0, 1], how="removed")
    assert "paint them" in why_not_removable(vit)
    painted = vit.what_if(photo(), patches=[0, 1], how="black")
    pixels = vit.prepare([photo()])
    pixels[:, :, :8, :16] = -1
    assert_allclose(painted["top_probability"][-1, 0], vit.logits(pixels).softmax(-1).max(), rtol=1e-5)
