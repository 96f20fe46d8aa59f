"""One image through an open model: the same numbers as the model's own pass and as a study."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from vitrail import live as live_module
from vitrail.errors import Unsupported, UsageError
from vitrail.heads.regions import region_modes
from vitrail.live import Live, look_figures
from vitrail.vit.open import open_vit
from vitrail.vit.tap import Readers

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3}


def small_vit(**options):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=(48, 64), **SMALL, **{"num_classes": 7, **options})
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=1.5 * weight.shape[1] ** -0.5)
    return open_vit(model.eval())


def photo(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((90, 70), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def vit():
    return small_vit()


def test_attention_is_what_a_reader_of_the_plain_pass_sees(vit):
    seen = {}

    def read(attention):
        seen[attention.layer] = attention.weights()[0].numpy().copy()

    with torch.no_grad():
        vit.tap().read(vit.prepare([photo()]), Readers(attention=read))
    live = Live(vit)
    for layer in (2, 0, 1):
        found = live.attention(photo(), layer)
        assert found.shape == (3, 13, 13)
        assert found.dtype == np.float32
        assert_allclose(found, seen[layer], atol=1e-6)
        assert_allclose(found.sum(-1), 1, atol=1e-5)


def test_modes_are_the_region_modes_as_probabilities(vit):
    found = Live(vit).modes(photo(), 1, 2)
    with torch.no_grad():
        expected = region_modes(vit.tap(), vit.anatomy, vit.prepare([photo()]), 1, 2).logits[:, 0].softmax(-1)
    assert found.shape == (6, 7)
    assert_allclose(found, expected.numpy(), atol=1e-6)
    assert_allclose(found.sum(1), 1, atol=1e-5)


def test_without_a_class_token_there_are_three_modes():
    found = Live(small_vit(class_token=False, global_pool="avg")).modes(photo(), 0, 1)
    assert found.shape == (3, 7)
    assert_allclose(found[1], found[2], atol=1e-6)  # with no prefix the patch block is the whole map


def test_look_holds_every_measure_and_agrees_with_the_modes(vit):
    live = Live(vit)
    found = live.look(photo())
    assert found["head_probability"].shape == (3, 3)
    assert found["attention_strength"].shape == (3, 3, 4)
    assert_allclose(found["probabilities"].sum(), 1, atol=1e-5)
    label = int(found["label"])
    assert label == found["prediction"] == found["top_class"][0] == found["probabilities"].argmax()
    assert_allclose(found["probability"], found["probabilities"][label])
    for layer, head in ((0, 0), (2, 1)):
        without = live.modes(photo(), layer, head)[1, label]
        assert_allclose(found["head_probability"][layer, head], without, atol=1e-6)


def test_a_model_without_classifier_is_looked_at_and_says_why_it_has_no_modes():
    live = Live(small_vit(num_classes=0))
    found = live.look(photo())
    assert {"head_divergence", "head_cls_shift", "strength_entropy"} <= set(found)
    assert not {"probability", "probabilities", "head_probability"} & set(found)
    assert found["label"] == -1
    with pytest.raises(Unsupported, match="has no classifier"):
        live.modes(photo(), 0, 0)


def test_windowed_attention_is_put_back_on_the_image_grid():
    torch.manual_seed(0)
    shape = {"img_size": 32, "window_size": 2, "depths": (1, 2), "embed_dim": 24, "num_heads": (2, 3), "num_classes": 4}
    live = Live(open_vit(timm.create_model("swin_tiny_patch4_window7_224", **shape).eval()))
    found = live.attention(photo(), 0)
    assert found.shape == (2, 64, 64)
    assert_allclose(found.sum(-1), 1, atol=1e-5)
    assert_array_equal((found > 0).sum(-1), 4)
    assert live.look(photo())["head_probability"].shape == (3, 3)


def test_the_same_image_is_run_once_and_old_ones_are_let_go(vit, monkeypatch):
    live, tap = Live(vit), vit.tap()
    recorded = []
    plain = tap.record
    monkeypatch.setattr(tap, "record", lambda *args, **kwargs: recorded.append(1) or plain(*args, **kwargs))
    live.attention(photo(), 0)
    live.attention(photo(), 2)
    live.modes(photo(), 1, 1)
    assert len(recorded) == 1
    for seed in range(1, live_module.REMEMBERED + 1):
        live.attention(photo(seed), 0)
    live.attention(photo(live_module.REMEMBERED), 1)
    assert len(recorded) == 1 + live_module.REMEMBERED
    live.attention(photo(), 0)
    assert len(recorded) == 2 + live_module.REMEMBERED


def test_threads_get_the_answers_that_one_thread_gets(vit):
    live = Live(vit)
    asked = [(seed, layer) for seed in range(3) for layer in range(3)]
    alone = [live.attention(photo(seed), layer) for seed, layer in asked]
    live = Live(vit)
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda pair: live.attention(photo(pair[0]), pair[1]), asked))
    for one, other in zip(alone, together, strict=True):
        assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda live: live.attention(photo(), 3), "the model has L0 to L2"),
        (lambda live: live.attention(photo(), -1), "the model has L0 to L2"),
        (lambda live: live.modes(photo(), 0, 3), "L0 has heads 0 to 2"),
        (lambda live: live.modes(photo(), 9, 0), "the model has L0 to L2"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(vit, ask, words):
    with pytest.raises(UsageError, match=words):
        ask(Live(vit))


def test_a_look_is_a_study_of_one_image(vit):
    study = Live(vit).study_of(photo(), "cat.png")
    assert study.sizes["image"] == 1
    assert study["head_probability"].attrs["unit"] == "1"
    assert study.attrs["grids"] == [[3, 4]] * 3
    assert study["image"].to_numpy().tolist() == ["cat.png"]


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"num_classes": 0}])
def test_all_figures_of_one_image_are_drawn_in_one_call(options, tmp_path):
    written = look_figures(small_vit(**options), photo(), tmp_path, ("svg",), name="cat.png")
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}
    stems = [path.stem for path in written]
    assert {"overview", "importance_map", "importance_line", "entropy_by_layer"} <= set(stems)
    assert sum(stem.startswith("attention_") for stem in stems) == (1 if "class_token" in options else 2)


def test_figures_in_an_unknown_format_are_refused_before_the_model_runs(vit, tmp_path):
    with pytest.raises(UsageError, match="choose from png, svg, pdf"):
        look_figures(vit, photo(), tmp_path, ("jpg",))
