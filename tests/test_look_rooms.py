"""A look draws every room that a model has, and says in a line what it lacks."""

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose
from PIL import Image
from typer.testing import CliRunner

from vitrail.cli import app
from vitrail.errors import DataError, UsageError
from vitrail.figures.neurons import view_panels
from vitrail.live import look_figures
from vitrail.neuron_look import CloseUp, neuron_figures
from vitrail.vit.open import open_vit

PATCHES = {"windows_of_patch", "window_coverage", "tendency_arrows", "tendency_flow", "hub_map"}
ROOMS = ("patches", "neurons")
NEURONS = {"survival", "tokens", "relevance", "relevance_curves", "filters", "views"}


def small_vit(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    model = timm.create_model(name, **shape | options)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
    return open_vit(model.eval(), image_size=32)


def photo(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC)


def halves():
    ids = np.ones((36, 40), dtype=np.int64)
    ids[:, 20:] = 2
    return ids


@pytest.fixture(scope="module")
def vit():
    return small_vit()


def test_every_room_is_drawn_and_each_step_is_told(vit, tmp_path):
    steps, missing = [], []
    written = look_figures(vit, photo(), tmp_path, step=steps.append, left_out=missing.append)
    stems = {path.stem for path in written}
    assert stems >= PATCHES | NEURONS | {"overview", "importance_map"}
    assert "tsne" not in stems  # no mask
    assert missing == []
    assert steps[:2] == ["measuring", "drawing"]
    assert set(steps[2:]) == NEURONS - {"survival"}


def test_the_patches_room_alone_is_drawn_alone(vit, tmp_path):
    assert {path.stem for path in look_figures(vit, photo(), tmp_path, ("svg",), of_rooms=["patches"])} == PATCHES


def test_the_neurons_room_alone_is_drawn_alone_and_a_mask_adds_the_layout_by_object(vit, tmp_path):
    written = look_figures(vit, photo(), tmp_path, ("svg",), of_rooms=["neurons"], mask=halves())
    assert {path.stem for path in written} == NEURONS | {"tsne"}


def test_without_a_classifier_the_answers_figures_are_left_out_with_the_reason(tmp_path):
    missing = []
    written = look_figures(small_vit(num_classes=0), photo(), tmp_path, of_rooms=ROOMS, left_out=missing.append)
    stems = {path.stem for path in written}
    assert stems >= PATCHES | {"tokens", "relevance", "filters", "views"}
    assert not {"survival", "relevance_curves"} & stems
    assert [line for line in missing if line.startswith("relevance_curves: ")]
    assert all("no classifier" in line for line in missing)


def test_without_a_class_token_everything_is_there(tmp_path):
    missing = []
    vit = small_vit(class_token=False, global_pool="avg")
    stems = {path.stem for path in look_figures(vit, photo(), tmp_path, of_rooms=ROOMS, left_out=missing.append)}
    assert stems == PATCHES | NEURONS
    assert missing == []


def test_a_hierarchy_with_windows_is_drawn_as_far_as_its_tokens_can_be_followed(tmp_path):
    shape = {"img_size": 32, "window_size": 2, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 3), "num_classes": 4}
    torch.manual_seed(0)
    vit = open_vit(timm.create_model("swin_tiny_patch4_window7_224", **shape).eval(), image_size=32)
    missing = []
    stems = {path.stem for path in look_figures(vit, photo(), tmp_path, of_rooms=ROOMS, left_out=missing.append)}
    assert stems >= {"tokens", "views", "windows_of_patch"}
    assert not {"relevance", "relevance_curves"} & stems
    assert [line for line in missing if line.startswith("relevance: ") and "cannot be followed" in line]


def test_the_patch_is_the_one_that_was_asked_for_else_the_most_relevant_that_is_no_sink(vit):
    seen = CloseUp.of(vit, photo())
    scores = seen.relevance["gradient"]
    assert seen.patch == divmod(int(scores.argmax()), 4)
    assert CloseUp.of(vit, photo(), patch=(1, 3)).patch == (1, 3)
    sink = CloseUp.of(vit, photo())
    longest = int(scores.argmax())
    sink.tokens[2][longest] *= 1000
    assert sink.patch != divmod(longest, 4)


def test_curves_of_the_look_start_at_the_models_own_probability(vit):
    seen = CloseUp.of(vit, photo())
    figure = dict(neuron_figures(seen))["relevance_curves"]()
    whole = float(vit.logits(seen.images).softmax(-1).max())
    for axes, end in zip(figure.axes, (0, -1), strict=True):
        assert_allclose([line.get_ydata()[end] for line in axes.lines], whole, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"of_rooms": ["kitchen"]}, UsageError, "choose from heads, patches, neurons"),
        ({"of_rooms": []}, UsageError, "choose from heads"),
        ({"patch": (4, 0)}, UsageError, r"grid is \(4, 4\)"),
        ({"mask": np.ones((36, 39), dtype=np.int64)}, DataError, "36 x 39 pixels and the image 36 x 40"),
        ({"channel": 24, "of_rooms": ["neurons"]}, UsageError, "channels 0 to 23"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(vit, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        look_figures(vit, photo(), tmp_path, **options)


def test_the_command_takes_rooms_a_patch_and_a_mask(tmp_path):
    photo().save(tmp_path / "a.png")
    Image.fromarray(halves().astype(np.uint8)).save(tmp_path / "mask.png")
    command = ["look", "vitrail:photos", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--rooms", "neurons"]
    done = CliRunner().invoke(app, [*command, "--patch", "1,2", "--mask", str(tmp_path / "mask.png")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "a" / "tsne.png").stat().st_size > 5000
    wrong = CliRunner().invoke(app, [*command, "--patch", "one"])
    assert isinstance(wrong.exception, UsageError)
    twice = [*command[:3], str(tmp_path / "a.png"), *command[3:], "--mask", str(tmp_path / "mask.png")]
    assert "one by one" in str(CliRunner().invoke(app, twice).exception)


def test_a_clipped_scale_shows_what_a_few_pixels_would_outshine():
    view = np.full((3, 20, 20), 0.01)
    view[:, 0, 0] = 10
    _, plain = view_panels([view], [""])
    _, clipped = view_panels([view], [""], clip=0.99)
    assert np.abs(plain[0].picture[5, 5] - plain[0].picture.mean()).max() < 0.05
    assert np.abs(clipped[0].picture[5, 5] - np.array([0.97, 0.97, 0.97])).max() > 0.3
