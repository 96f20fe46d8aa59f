"""One image through an open model: the same numbers as the model's own pass and as a study."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import vitrail
from vitrail import live as live_module
from vitrail.errors import DataError, Unsupported, UsageError
from vitrail.heads.regions import region_modes
from vitrail.live import LiveModel
from vitrail.models.open import open_vit
from vitrail.tap.tap import Readers

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
    live = LiveModel(vit)
    for layer in (2, 0, 1):
        weights = live.attention(photo(), layer)
        assert weights.shape == (3, 13, 13)
        assert weights.dtype == np.float32
        assert_allclose(weights, seen[layer], atol=1e-6)
        assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_head_maps_are_the_class_tokens_rows_or_the_mean_over_patches_without_one(vit):
    maps = LiveModel(vit).head_maps(photo())
    assert maps.shape == (3, 3, 12)
    for layer in range(3):
        assert_allclose(maps[layer], LiveModel(vit).attention(photo(), layer)[:, 0, 1:], atol=1e-6)
    plain = LiveModel(small_vit(class_token=False, global_pool="avg"))
    assert_allclose(plain.head_maps(photo())[1], plain.attention(photo(), 1).mean(1), atol=1e-6)


def test_modes_are_the_region_modes_as_probabilities(vit):
    probabilities = LiveModel(vit).modes(photo(), 1, 2)
    with torch.no_grad():
        expected = region_modes(vit.tap(), vit.anatomy, vit.prepare([photo()]), 1, 2).logits[:, 0].softmax(-1)
    assert probabilities.shape == (6, 7)
    assert_allclose(probabilities, expected.numpy(), atol=1e-6)
    assert_allclose(probabilities.sum(1), 1, atol=1e-5)


def test_without_a_class_token_there_are_three_modes():
    probabilities = LiveModel(small_vit(class_token=False, global_pool="avg")).modes(photo(), 0, 1)
    assert probabilities.shape == (3, 7)
    assert_allclose(probabilities[1], probabilities[2], atol=1e-6)  # with no prefix the patch block is the whole map


def looked(vit, names="heads"):
    """One image as the library has it, without the image dimension."""
    return vitrail.look(vit, photo(), measures=names).isel(image=0)


def test_modes_agree_with_the_measures_of_the_image(vit):
    live, of_image = LiveModel(vit), looked(vit)
    label = int(of_image["label"])
    for layer, head in ((0, 0), (2, 1)):
        modes = live.modes(photo(), layer, head)
        assert label == of_image["prediction"] == of_image["top_class"][0] == modes[0].argmax()
        assert_allclose(modes[0].sum(), 1, atol=1e-5)
        assert_allclose(of_image["probability"], modes[0, label], atol=1e-6)
        assert_allclose(of_image["head_probability"][layer, head], modes[1, label], atol=1e-6)


def test_a_model_without_classifier_is_looked_at_and_says_why_it_has_no_modes():
    live = LiveModel(small_vit(num_classes=0))
    of_image = looked(live.vit)
    assert {"head_output_shift", "head_cls_shift", "strength_entropy"} <= set(of_image)
    assert not {"probability", "head_probability"} & set(of_image)
    assert of_image["label"] == -1
    with pytest.raises(Unsupported, match="has no classifier"):
        live.modes(photo(), 0, 0)


def test_windowed_attention_is_put_back_on_the_image_grid():
    torch.manual_seed(0)
    shape = {"img_size": 32, "window_size": 2, "depths": (1, 2), "embed_dim": 24, "num_heads": (2, 3), "num_classes": 4}
    live = LiveModel(open_vit(timm.create_model("swin_tiny_patch4_window7_224", **shape).eval()))
    weights = live.attention(photo(), 0)
    assert weights.shape == (2, 64, 64)
    assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert_array_equal((weights > 0).sum(-1), 4)
    assert looked(live.vit)["head_probability"].shape == (3, 3)


def test_the_same_image_is_run_once_and_old_ones_are_let_go(vit, monkeypatch):
    live, tap = LiveModel(vit), vit.tap()
    recorded = []
    plain = tap.record
    monkeypatch.setattr(tap, "record", lambda *args, **kwargs: recorded.append(1) or plain(*args, **kwargs))
    live.attention(photo(), 0)
    live.attention(photo(), 2)
    live.modes(photo(), 1, 1)
    assert len(recorded) == 1
    for seed in range(1, live_module.MAX_RECORDED_IMAGES + 1):
        live.attention(photo(seed), 0)
    live.attention(photo(live_module.MAX_RECORDED_IMAGES), 1)
    assert len(recorded) == 1 + live_module.MAX_RECORDED_IMAGES
    live.attention(photo(), 0)
    assert len(recorded) == 2 + live_module.MAX_RECORDED_IMAGES


def test_an_image_is_run_again_once_the_model_has_a_hook():
    vit = small_vit()
    live = LiveModel(vit)
    before = live.attention(photo(), 2)
    vit.model.blocks[0].register_forward_hook(lambda module, args, output: output * 0.1)
    after = live.attention(photo(), 2)
    assert np.abs(after - before).max() > 1e-3
    assert_array_equal(after, LiveModel(vit).attention(photo(), 2))


def test_images_of_one_picture_with_other_colours_are_two_images(vit):
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 4, (64, 64), dtype=np.uint8)).convert("P")
    other = pixels.copy()
    pixels.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    other.putpalette([255, 255, 255, 90, 0, 90, 0, 80, 0, 0, 0, 25])
    live = LiveModel(vit)
    first = live.head_maps(pixels)
    assert_array_equal(live.head_maps(other), LiveModel(vit).head_maps(other))
    assert abs(live.head_maps(other) - first).max() > 1e-3
    digests = [vitrail.look(vit, each, measures="patches").attrs["data_digest"] for each in (pixels, other)]
    assert digests[0] != digests[1]


def test_what_was_recorded_is_of_no_use_once_the_weights_are_trained():
    vit = small_vit()
    live = LiveModel(vit)
    before = live.modes(photo(), 1, 1)
    parts = live.parts("base")
    with torch.no_grad():
        vit.model.blocks[0].attn.proj.weight.mul_(2)
    after = live.modes(photo(), 1, 1)
    assert abs(after - before).max() > 1e-3
    assert_array_equal(after, LiveModel(vit).modes(photo(), 1, 1))
    assert live.parts("base") == parts
    with torch.no_grad():
        vit.model.blocks[0].attn.proj.weight.div_(2)
    assert_array_equal(live.modes(photo(), 1, 1), before)


def test_threads_get_the_answers_that_one_thread_gets(vit):
    live = LiveModel(vit)
    asked = [(seed, layer) for seed in range(3) for layer in range(3)]
    alone = [live.attention(photo(seed), layer) for seed, layer in asked]
    live = LiveModel(vit)
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
        ask(LiveModel(vit))


def test_a_mask_says_which_object_each_patch_lies_on_and_decides_no_other_image(vit):
    # 48 x 64 pixels in 3 x 4 patches: the left half of the photograph is one object, the right half the ground.
    image = Image.fromarray(np.random.default_rng(3).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    mask = np.zeros((48, 64), np.int32)
    mask[:, :32] = 7
    live, part = LiveModel(vit), ("token_xy", "class_token_xy", "patch_object")
    laid_out = live.look_part(image, "tokens", part, mask=mask)
    covered = live.vit.view(Image.fromarray(mask.astype(np.uint8) * 30)).resize((4, 3), Image.Resampling.BOX)
    assert_array_equal(laid_out.patch_object > 0, np.asarray(covered.convert("L")).ravel() > 0.4 * 210)
    assert np.isfinite(laid_out.token_xy.isel(layer=0)).all()
    assert "patch_object" not in live.look_part(image, "tokens", part)
    with pytest.raises(DataError, match="63 x 48"):
        live.look_part(image, "tokens", part, mask=mask[:, 1:])
