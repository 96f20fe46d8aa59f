"""Figures of heads: what is drawn equals the study, every axis carries its unit, and files repeat byte for byte."""

import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from drawn_studies import planted
from numpy.testing import assert_allclose, assert_array_equal

from vitrail.errors import UsageError
from vitrail.figures import heads
from vitrail.figures.style import MARK, save
from vitrail.figures.whole import draw_figures
from vitrail.heads.head_values import head_values, hops_of_layers, main_metric
from vitrail.stats import mean_interval


def axis_labels(figure):
    return [text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel()) if text]


def cells(figure):
    mesh = next(each for axes in figure.axes for each in axes.collections if type(each).__name__ == "QuadMesh")
    return np.ma.filled(mesh.get_array(), np.nan)


def one_line(text):
    return " ".join(text.split())


def test_the_heat_map_shows_the_mean_over_images_and_blanks_heads_that_a_layer_lacks():
    study = planted(fewer=(1,))
    shown = cells(heads.importance_map(study))
    expected = study["head_probability"].to_numpy().astype(float).mean(0)
    assert np.isnan(expected[1, 2])
    assert_allclose(shown, expected, rtol=1e-12)


@pytest.mark.parametrize("image", [2, "folder/2.png"])
def test_an_image_is_found_by_position_and_by_id(image):
    study = planted()
    shown = cells(heads.importance_map(study, "head_divergence", image))
    assert_allclose(shown, study["head_divergence"].to_numpy()[2], rtol=1e-6)


@pytest.mark.parametrize("draw", [heads.importance_map, heads.importance_line])
def test_a_name_that_would_cover_another_is_left_out_and_its_dot_is_not(draw):
    study = planted(n_layers=24, n_heads=16)
    values = np.full(study["head_probability"].shape, 0.8, dtype=np.float32)
    values[:, 1, 3:5] = 0.2, 0.21  # beside each other
    values[:, 20, 3] = 0.22
    study = study.assign(head_probability=(study["head_probability"].dims, values, study["head_probability"].attrs))
    figure = draw(study)
    axes = next(each for each in figure.axes if any(text.get_text() == "L1H3" for text in each.texts))
    named = [text.get_text() for text in axes.texts if "H" in text.get_text()]
    assert named == ["L1H3", "L20H3"]
    assert sum(line.get_color() == MARK and len(line.get_xdata()) == 1 for line in axes.lines) == 3


def test_whiskers_are_the_interval_of_the_mean():
    study = planted(n_images=12, fewer=(0,))
    shown = head_values(study, "head_probability")
    there = ~np.isnan(shown.values)
    low, high, _ = mean_interval(study["head_probability"].to_numpy().astype(float)[:, there], limits=(0.0, 1.0))
    assert_allclose(shown.low[there], low, rtol=1e-12)
    assert_allclose(shown.high[there], high, rtol=1e-12)
    assert np.isnan(shown.low[~there]).all()
    figure = heads.importance_map(study)
    whiskers = next(each for each in figure.axes[1].collections if type(each).__name__ == "LineCollection")
    ends = np.array([segment[:, 0] for segment in whiskers.get_segments()])
    assert_allclose(ends, np.stack([low, high], 1), rtol=1e-12)


def test_an_image_is_named_by_a_position_of_numpy_too():
    study = planted()
    assert_array_equal(head_values(study, "head_flip", np.int64(2)).values, head_values(study, "head_flip", 2).values)


def test_padded_flips_are_no_heads():
    shown = head_values(planted(fewer=(3,)), "head_flip")
    assert np.isnan(shown.values[3, 2])
    assert len(shown.heads) == 11


def test_without_a_plan_padding_is_told_from_the_other_measures():
    study = planted(fewer=(3,))
    study.attrs.clear()
    assert np.isnan(head_values(study, "head_flip").values[3, 2])
    assert_array_equal(hops_of_layers(study), [5, 5, 5, 5])


def test_the_line_starts_at_the_unpruned_model_and_goes_over_all_heads():
    study = planted(fewer=(0,))
    axes = heads.importance_line(study).axes[0]
    line = next(each for each in axes.lines if len(each.get_xdata()) == 12)
    values = study["head_probability"].to_numpy().astype(float).mean(0)
    expected = [study["probability"].to_numpy().astype(float).mean(), *values[~np.isnan(values)]]
    assert_array_equal(line.get_xdata(), np.arange(12))
    assert_allclose(line.get_ydata(), expected, rtol=1e-12)
    assert {"L0", "L1", "L2", "L3"} <= {text.get_text() for text in axes.texts}


def test_the_planted_head_is_ranked_first_and_named():
    study = planted(n_layers=12)
    assert head_values(study, "head_probability").ranked[0] == (0, 1)
    assert head_values(study, "head_divergence").ranked[0] == (0, 1)
    named = {text.get_text() for text in heads.importance_line(study).axes[0].texts}
    assert "L0H1" in named


def test_one_image_of_several_is_drawn_on_the_mean_of_all():
    study = planted()
    axes = heads.importance_line(study, image=1).axes[0]
    dashed = next(each for each in axes.lines if each.get_label() == "mean over 6 images")
    assert_allclose(dashed.get_ydata(), study["head_probability"].to_numpy().astype(float).mean(0).ravel(), rtol=1e-12)


def test_every_entropy_is_a_dot_below_the_ceiling():
    study = planted(n_hops=6)
    axes = heads.entropy_by_layer(study).axes[0]
    dots = next(each for each in axes.collections if type(each).__name__ == "PathCollection")
    expected = study["strength_entropy"].to_numpy().astype(float).mean(0).ravel()
    assert_allclose(dots.get_offsets()[:, 1], expected, rtol=1e-12)
    assert_array_equal(np.round(dots.get_offsets()[:, 0]), np.repeat(np.arange(4), 3))
    assert any("ln 6 = 1.79" in text.get_text() for text in axes.texts)
    assert axes.get_ylim()[1] > np.log(6)


def test_strength_has_the_mean_the_band_and_the_image():
    study = planted(n_images=20)
    axes = heads.strength_over_hops(study, 2, 1, image=3).axes[0]
    values = study["attention_strength"].to_numpy()[:, 2, 1].astype(float)
    lines = {each.get_label(): each.get_ydata() for each in axes.lines}
    assert_allclose(lines["mean"], values.mean(0), rtol=1e-12)
    assert_allclose(lines["this image"], values[3], rtol=1e-12)
    assert_allclose(lines["even attention to all tokens"], 1 / 26, rtol=1e-12)
    band = axes.collections[0].get_paths()[0].get_extents()
    low, high = np.quantile(values, (0.05, 0.95), axis=0)
    assert_allclose([band.ymin, band.ymax], [low.min(), high.max()], rtol=1e-6)


@pytest.mark.parametrize(
    ("draw", "units"),
    [
        (heads.importance_map, ("(index)", "(0 to 1)")),
        (lambda study: heads.importance_map(study, "head_loss_change"), ("(index)", "(nats)")),
        (lambda study: heads.importance_map(study, "head_flip"), ("(index)", "(share of images)")),
        (heads.importance_line, ("head index", "(0 to 1)")),
        (heads.entropy_by_layer, ("(index)", "(nats)", "(0 to 1)")),
        (lambda study: heads.strength_over_hops(study, 0, 0), ("(hops", "(mean attention weight per neighbour)")),
    ],
)
def test_every_axis_carries_its_unit_and_the_source_stands_below(draw, units):
    figure = draw(planted())
    labels = [one_line(label) for label in axis_labels(figure)]
    for label in labels:
        assert any(unit in label for unit in units), label
    below = one_line(figure.get_supxlabel())
    assert "Source: " in below
    assert "High" in below


@pytest.mark.parametrize(("n_images", "n_layers", "n_heads", "n_hops"), [(1, 1, 1, 1), (1, 3, 2, 4), (3, 48, 25, 4)])
def test_any_size_can_be_drawn(n_images, n_layers, n_heads, n_hops, tmp_path):
    study = planted(n_images, n_layers, n_heads, n_hops)
    figure = heads.study_overview(study)
    assert save(figure, tmp_path / "overview.svg").stat().st_size > 0
    assert_array_equal(cells(figure).shape, (n_layers, n_heads))


def test_the_overview_leaves_out_what_the_study_does_not_hold():
    with_all, only_reach = heads.study_overview(planted()), heads.study_overview(planted(only=["strength_entropy"]))
    assert len(with_all.axes) == 6
    assert len(only_reach.axes) == 1
    with pytest.raises(UsageError, match="holds no measure of heads"):
        heads.study_overview(planted(only=["label"]))


@pytest.mark.parametrize("kind", ["svg", "png", "pdf"])
def test_the_same_figure_gives_the_same_bytes(kind, tmp_path):
    written = [save(heads.importance_map(planted()), tmp_path / f"{name}.{kind}").read_bytes() for name in "ab"]
    assert written[0] == written[1]
    assert b"2026" not in written[0][:600]


def test_the_whole_set_is_written_in_every_format(tmp_path):
    study = planted(
        n_layers=2, only=["label", "probability", "head_probability", "attention_strength", "strength_entropy"]
    )
    written = draw_figures(study, tmp_path, ("svg", "png"))
    assert {path.name for path in written} == {path.name for path in tmp_path.iterdir()}
    stems = {path.stem for path in written}
    assert {
        "overview",
        "importance_map_head_probability",
        "importance_line",
        "entropy_by_layer",
        "strength_of_top_heads",
    } <= stems
    assert len(written) == 2 * len(stems)


def test_settings_of_the_session_are_left_alone(tmp_path):
    before = dict(mpl.rcParams)
    save(heads.study_overview(planted()), tmp_path / "overview.png")
    assert dict(mpl.rcParams) == before


def test_no_torch_and_no_pyplot_is_loaded():
    code = (
        "import sys, vitrail.figures.heads, vitrail.figures.one_image;"
        "sys.exit(', '.join(n for n in ('torch', 'timm', 'matplotlib.pyplot') if n in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert (done.returncode, done.stderr) == (0, "")


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": str(Path(heads.__file__).parents[2])}


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda s, _: heads.importance_map(s, "head_colour"), "holds, per head: head_probability"),
        (lambda s, _: heads.importance_map(s, image=6), "has images 0 to 5"),
        (lambda s, _: heads.importance_map(s, image=-1), "has images 0 to 5"),
        (lambda s, _: heads.importance_map(s, image="none.png"), "named like: folder/0.png"),
        (lambda s, _: heads.strength_over_hops(s, 4, 0), "has layers 0 to 3"),
        (lambda s, _: heads.strength_over_hops(s, 0, 2), "the head is not there"),
        (lambda s, _: heads.strength_over_hops(s.drop_vars("attention_strength"), 0, 0), "does not hold attention_str"),
        (lambda s, _: heads.importance_map(s.isel(image=slice(0))), "holds no images"),
        (lambda s, t: draw_figures(s, t, ("jpg",)), "as jpg; choose from png, svg, pdf"),
        (lambda s, t: draw_figures(s, t, ()), "choose from png, svg, pdf"),
        (lambda s, t: save(heads.importance_map(s), t / "map.gif"), "it can be png, svg, pdf"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_what_can(ask, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        ask(planted(fewer=(0,)), tmp_path)


def test_importance_falls_back_to_what_a_model_without_classifier_has():
    assert main_metric(planted(only=["label", "head_divergence", "head_cls_shift"])) == "head_divergence"
    assert main_metric(planted(only=["label", "strength_entropy"])) is None
