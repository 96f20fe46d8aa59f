"""Figures of one image are drawn from its dataset, and what a model lacks is said in a line."""

import numpy as np
import pytest
import timm
import torch
import xarray as xr
from numpy.testing import assert_allclose
from PIL import Image
from typer.testing import CliRunner

from vitrail.analysis import analyses
from vitrail.cli import app
from vitrail.errors import StudyError, UsageError
from vitrail.figures.one_image import TOKEN_FIGURES
from vitrail.figures.tokens import view_panels
from vitrail.figures.whole import draw_figure, draw_figures
from vitrail.models.open import open_vit
from vitrail.one_image import look, missing_by_reason, save_look
from vitrail.report import findings_of
from vitrail.tokens import one_image

HEADS = {
    "overview",
    "importance_map",
    "importance_line",
    "entropy_by_layer",
    "strength_of_top_head",
    "attention_of_class_token",
    "attention_of_top_patch",
}
PATCHES = {"windows_of_patch", "window_coverage", "tendency_arrows", "tendency_flow", "hub_map"}
TOKENS = {"survival", "tokens", "relevance", "relevance_curves", "filters", "views"}


def small_vit(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5} | options
    model = timm.create_model(name, **shape)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
    return open_vit(model.eval(), image_size=shape["img_size"])


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


def drawn(vit, folder, measures=None, formats=("svg",), **options):
    """Stems of the figures of one image, and the dataset that they were drawn from."""
    dataset = look(vit, photo(), measures=measures, **options)
    return {path.stem for path in draw_figures(dataset, folder, formats, one_image=True)}, dataset


def test_every_analysis_is_drawn_and_each_step_is_said(vit, tmp_path):
    steps = []
    stems, dataset = drawn(vit, tmp_path, progress=steps.append)
    assert stems >= PATCHES | TOKENS | HEADS
    assert "tsne" not in stems  # no mask
    assert missing_by_reason(dataset) == {}
    assert steps == ["heads, patches and tokens", *(analysis.title.lower() for analysis in analyses().values())]


def test_the_chosen_patch_is_marked_where_its_pixels_are():
    """An image of 38 pixels in patches of 8: 6 pixels are left over, and the grid does not cover the view."""
    vit = small_vit(img_size=38, depth=1)
    dataset = look(vit, photo(), measures="tokens", patch=(3, 2))
    assert dataset.attrs["patch_steps"] == [[8, 8]]
    figure = draw_figure(dataset, "relevance", one_image=True)
    mark = figure.axes[0].patches[0]
    assert_allclose([*mark.get_xy(), mark.get_width(), mark.get_height()], [15.5, 23.5, 8, 8])  # pixels begin at -0.5


def test_patches_alone_are_drawn_alone(vit, tmp_path):
    assert drawn(vit, tmp_path, "patches")[0] == PATCHES


def test_tokens_alone_are_drawn_alone_and_a_mask_adds_the_layout_by_object(vit, tmp_path):
    assert drawn(vit, tmp_path, "tokens", mask=halves())[0] == TOKENS | {"tsne"}


def test_without_a_classifier_figures_of_the_prediction_are_left_out_with_the_reason(tmp_path):
    stems, dataset = drawn(small_vit(num_classes=0), tmp_path, "patches,tokens")
    assert stems >= PATCHES | {"tokens", "relevance", "filters", "views"}
    assert not {"survival", "relevance_curves"} & stems
    reasons = missing_by_reason(dataset)
    assert all("classifier" in reason for reason in reasons), reasons
    assert any("relevance_deletion" in names for names in reasons.values())


def test_without_a_class_token_everything_else_is_there(tmp_path):
    vit = small_vit(class_token=False, global_pool="avg")
    stems, dataset = drawn(vit, tmp_path)
    assert stems == PATCHES | TOKENS | {"made_images"} | HEADS - {"attention_of_class_token"}
    assert set(missing_by_reason(dataset)) == {"the model has no class token"}


def test_a_hierarchy_with_windows_is_drawn_as_far_as_its_tokens_can_be_followed(tmp_path):
    shape = {"img_size": 32, "window_size": 2, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 3), "num_classes": 4}
    torch.manual_seed(0)
    vit = open_vit(timm.create_model("swin_tiny_patch4_window7_224", **shape).eval(), image_size=32)
    stems, dataset = drawn(vit, tmp_path)
    assert stems >= {"tokens", "views", "windows_of_patch", "relevance", "relevance_curves"}
    assert "filters" not in stems
    assert not any("relevance" in names for names in missing_by_reason(dataset).values())
    assert any(
        "cannot be followed" in reason
        for reason, names in missing_by_reason(dataset).items()
        if "filter_auroc" in names
    )


def test_the_patch_is_the_one_that_was_asked_for_else_the_most_relevant_that_is_no_sink(vit, monkeypatch):
    dataset = look(vit, photo(), measures="tokens")
    scores = dataset["relevance"].sel(relevance_method="gradient").to_numpy()
    assert dataset.attrs["patch"] == list(divmod(int(scores.argmax()), 4))
    assert look(vit, photo(), measures="tokens", patch=(1, 3)).attrs["patch"] == [1, 3]
    longest = int(scores.argmax())
    monkeypatch.setattr(one_image, "norm_outliers", lambda norms: np.arange(len(norms)) == longest)
    assert look(vit, photo(), measures="tokens").attrs["patch"] != list(divmod(longest, 4))


def test_curves_are_drawn_from_the_models_own_probability(vit):
    dataset = look(vit, photo(), measures="tokens")
    figure = dict(TOKEN_FIGURES)["relevance_curves"](dataset)
    unedited = float(vit.logits(vit.prepare([photo()])).softmax(-1).max())
    for axes, end in zip(figure.axes, (0, -1), strict=True):
        assert_allclose([line.get_ydata()[end] for line in axes.lines], unedited, rtol=1e-4)


def test_findings_of_one_image_are_those_of_a_report(vit):
    sentences = findings_of(look(vit, photo()))
    assert any("the most important head for this image" in sentence or "head" in sentence for sentence in sentences)
    assert len(sentences) > 5


def test_a_look_is_saved_and_read_and_something_else_is_not_overwritten(vit, tmp_path):
    dataset = look(vit, photo(), measures="heads,tokens")
    for _ in range(2):
        saved = xr.open_zarr(save_look(dataset, tmp_path / "look.zarr"), consolidated=False)
        assert set(saved) == set(dataset)
        assert_allclose(saved["head_probability"], dataset["head_probability"])
        assert saved["relevance"].attrs["title"] == dataset["relevance"].attrs["title"]
        assert [str(each) for each in saved["relevance_method"].to_numpy().tolist()[:3]] == [
            "raw",
            "rollout",
            "gradient",
        ]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not overwritten"):
        save_look(dataset, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    of_study = dataset.assign_attrs(n_images=2)  # such as a user saves what was made of a study
    of_study[["probability"]].drop_vars("image").to_zarr(tmp_path / "means.zarr", consolidated=False)
    with pytest.raises(UsageError, match="not overwritten"):
        save_look(dataset, tmp_path / "means.zarr")
    (tmp_path / "look.zarr" / "notes.txt").write_text("mine")
    with pytest.raises(StudyError, match="did not write"):
        save_look(dataset, tmp_path / "look.zarr")
    assert (tmp_path / "look.zarr" / "notes.txt").read_text() == "mine"


def test_the_command_takes_analyses_a_patch_and_a_mask(tmp_path):
    photo().save(tmp_path / "a.png")
    Image.fromarray(halves().astype(np.uint8)).save(tmp_path / "mask.png")
    command = ["look", "vitrail:photos", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--measures", "neurons"]
    done = CliRunner().invoke(app, [*command, "--patch", "1,2", "--mask", str(tmp_path / "mask.png")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "a" / "tsne.png").stat().st_size > 5000
    page = (tmp_path / "out" / "a" / "look.html").read_text(encoding="utf-8")
    assert "<h1>a.png through vitrail:photos</h1>" in page
    assert page.count('<img alt="') - 1 == len(list((tmp_path / "out" / "a").glob("*.png")))  # and the photograph
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
