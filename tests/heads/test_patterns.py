"""Attention patterns: numbers and names on closed forms, coders and clusters on planted families, placing again."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from head_models import timm_swin, timm_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from planted_patterns import FAMILIES, GRID, N_PATCHES, local, many_patterns, planted, sink, uniform, with_noise
from sklearn.metrics import adjusted_rand_score

from vitrail import open_vit
from vitrail.analysis import analyses, make_collectors, measures, unavailable
from vitrail.errors import StudyError, UsageError
from vitrail.grid import n_patches
from vitrail.patterns.coders import Shape, coder_inputs, fit_coder, principal_axes
from vitrail.patterns.layout import NOISE, fit_layout
from vitrail.patterns.maps import ComparableLayers, PatternMaps, comparable_layers, pool_block
from vitrail.patterns.model import (
    MapSample,
    PatternModel,
    PatternStatistics,
    draw_held_out,
    draw_sample,
    fit_patterns,
    place_heads,
)
from vitrail.patterns.names import (
    NAMES,
    RULES,
    common_grid,
    even_attention,
    name_pattern,
    pattern_indices,
    rule_thresholds,
    typical_values,
)
from vitrail.patterns.rules import rule_values, step_mass
from vitrail.stats import mean_interval

BLOCK = Shape("patch", GRID, N_PATCHES**2, 128)
GROUND = ComparableLayers(GRID, {0: (GRID, 0)}, None, {})


def numbers_of(maps, grid=GRID):
    return rule_values(torch.as_tensor(np.asarray(maps, dtype=np.float32)), grid).numpy()


def pictures(maps, images=slice(0, 1)):
    """One image whose heads are these maps."""
    return PatternMaps(images, torch.as_tensor(maps)[None], None, None)


class TestRules:
    @pytest.mark.parametrize("label", FAMILIES)
    def test_each_planted_family_takes_its_own_name(self, label):
        assert name_pattern(numbers_of(FAMILIES[label]), GRID).label == label

    @pytest.mark.parametrize("grid", [GRID, (1, 1), (1, 4)])
    def test_a_map_of_zeros_has_no_numbers(self, grid):
        assert np.isnan(numbers_of(np.zeros((2, n_patches(grid), n_patches(grid))), grid)).all()

    def test_on_a_grid_of_one_patch_there_is_no_step(self):
        numbers = dict(zip(RULES, numbers_of(np.ones((1, 1)), (1, 1)), strict=True))
        assert (numbers["self"], numbers["shift_mass"], numbers["shift_x"], numbers["shift_y"]) == (1, 0, 0, 0)

    @pytest.mark.parametrize("rule", ["self", "shift_mass", "row", "column", "local", "sink", "uniformity"])
    @pytest.mark.parametrize("grid", [GRID, (7, 12)])
    def test_a_number_gives_its_name_from_its_threshold_on(self, rule, grid):
        name = {"shift_mass": "shift", "row": "row band", "column": "column band", "uniformity": "uniform"}
        values, at = even_attention(grid), RULES.index(rule)
        values[RULES.index("uniformity")] = 0.5
        named = []
        for step in (-1e-6, 1e-6):
            values[at] = rule_thresholds(grid)[at] + step
            named.append(NAMES[int(pattern_indices(values, grid))])
        assert named == ["content", name.get(rule, rule)]

    def test_families_keep_their_names_under_noise(self):
        maps, label = planted(12)
        names = [name_pattern(values, GRID).label for values in numbers_of(maps)]
        assert names == [list(FAMILIES)[at] for at in label]

    def test_even_attention_has_the_numbers_that_are_said_of_it(self):
        found = numbers_of(uniform())
        even = even_attention(GRID)
        steps = [RULES.index(name) for name in ("shift_x", "shift_y")]
        others = [at for at in range(len(RULES) - 1) if at not in steps]
        assert_allclose(found[others], even[others], rtol=1e-5)

    def test_the_numbers_do_not_depend_on_what_goes_to_the_prefix(self):
        maps = planted(1)[0]
        assert_allclose(numbers_of(maps * 0.3), numbers_of(maps), rtol=1e-4, atol=1e-6)

    def test_a_map_of_zeros_is_none_and_a_row_of_zeros_gives_nothing(self):
        assert name_pattern(numbers_of(np.zeros((N_PATCHES, N_PATCHES))), GRID).name == "none"
        half = np.eye(N_PATCHES)
        half[::2] = 0
        assert_allclose(numbers_of(half)[RULES.index("self")], 0.5)

    def test_a_single_patch_has_no_step_and_no_uniformity(self):
        found = dict(zip(RULES, numbers_of(np.ones((1, 1)), (1, 1)), strict=True))
        assert found["self"] == 1
        assert found["shift_mass"] == 0
        assert math.isnan(found["uniformity"])

    @pytest.mark.parametrize("grid", [(1, 9), (3, 5), (6, 2)])
    def test_steps_on_any_grid_sum_to_what_rows_sum_to(self, grid):
        n_patches = grid[0] * grid[1]
        share = torch.rand(4, n_patches, n_patches, generator=torch.Generator().manual_seed(0))
        share /= share.sum(-1, keepdim=True)
        steps = step_mass(share, grid)
        assert steps.shape == (4, 2 * grid[0] - 1, 2 * grid[1] - 1)
        assert_allclose(steps.sum((1, 2)), 1.0, rtol=1e-5)

    @settings(max_examples=20, deadline=None)
    @given(st.integers(-2, 2), st.integers(-2, 2))
    def test_the_step_of_a_shift_is_found_in_both_directions(self, across, down):
        from planted_patterns import shift

        found = dict(zip(RULES, numbers_of(shift(across, down)), strict=True))
        if (across, down) != (0, 0):
            assert (found["shift_x"], found["shift_y"]) == (across, down)
            assert_allclose(found["shift_mass"], 1.0, rtol=1e-5)

    def test_naming_many_is_naming_each(self):
        values = numbers_of(planted(2)[0])
        assert [NAMES[at] for at in pattern_indices(values, GRID)] == [name_pattern(v, GRID).name for v in values]

    def test_what_is_typical_takes_the_commonest_step(self):
        values = numbers_of([FAMILIES["shift (+1, 0)"], FAMILIES["shift (-1, 0)"], FAMILIES["shift (+1, 0)"]])
        assert name_pattern(typical_values(values), GRID).label == "shift (+1, 0)"
        assert np.isnan(typical_values(values[:0])).all()

    def test_another_number_of_values_is_refused(self):
        with pytest.raises(UsageError, match=f"named from {len(RULES)} numbers"):
            name_pattern(np.zeros(3), GRID)


class TestGround:
    def test_maps_of_more_than_400_patches_are_pooled_and_that_is_said(self):
        assert common_grid([(24, 32)]) == (12, 16)
        ground = ComparableLayers((12, 16), {0: ((24, 32), 1)}, 0, {})
        assert ground.note == "maps on grids of 24 x 32 were pooled to 12 x 16 patches"

    def test_pooling_keeps_what_a_patch_gives_in_all(self):
        block = torch.rand(3, 35, 35, generator=torch.Generator().manual_seed(0))
        coarse = pool_block(block, (5, 7), (2, 3))
        assert coarse.shape == (3, 6, 6)
        first = [0, 1, 2, 7, 8, 9, 14, 15, 16]  # rows 0 to 2, columns 0 to 2 fall into the first cell
        assert_allclose(coarse[:, 0].sum(-1), block[:, first].sum(-1).mean(-1), rtol=1e-5)

    def test_pooling_a_shift_by_whole_cells_is_a_shift(self):
        from planted_patterns import shift

        coarse = pool_block(torch.as_tensor(shift(2, 0), dtype=torch.float32), GRID, (4, 4))
        assert name_pattern(numbers_of(coarse, (4, 4)), (4, 4)).label == "shift (+1, 0)"

    def test_attention_within_windows_has_no_patterns_and_says_so(self):
        vit = open_vit(timm_swin())
        left_out = unavailable(vit, analyses()["patterns"].measure_names)
        assert set(left_out) == set(analyses()["patterns"].measure_names)
        assert "within windows" in left_out["pattern_patch_xy"]

    def test_without_a_class_token_there_are_patch_patterns_alone(self):
        vit = open_vit(timm_vit(class_token=False, global_pool="avg"), image_size=(48, 80))
        left_out = unavailable(vit, analyses()["patterns"].measure_names)
        assert left_out == dict.fromkeys(["pattern_cls_xy", "pattern_cls_cluster"], "the model has no class token")
        assert comparable_layers(vit).class_index is None

    def test_rules_of_a_batch_are_rules_of_each_map(self):
        vit, images = open_vit(timm_vit(), image_size=(48, 80)), torch.randn(3, 3, 48, 80)
        (collector,) = make_collectors(vit, list(analyses()["patterns"].measure_names))
        tap, kept = vit.tap(), {}
        replay, logits = tap.record(images, collector.readers())
        found = collector.finish(tap, replay, logits, np.zeros(3, dtype=np.int64))["pattern_rule"]
        from vitrail import Readers

        tap.read(images, Readers(attention=lambda a: kept.update({a.layer: a.weights().detach()})))
        for layer, weights in kept.items():
            expected = rule_values(weights[..., 1:, 1:], (3, 5), weights[..., 1:, 0].mean(-1))
            assert_allclose(found[:, layer], expected, rtol=1e-4, atol=1e-6)


class TestCoder:
    def test_an_autoencoder_beats_pca_where_there_are_more_patterns_than_components(self):
        maps = torch.as_tensor(many_patterns(1200))
        held = np.arange(len(maps)) % 5 == 0
        coder = fit_coder(coder_inputs(maps, BLOCK).half(), np.arange(len(maps)), held, BLOCK)
        assert coder.method == "autoencoder"
        assert coder.fit.autoencoder_error < 0.95 * coder.fit.pca_error
        x = coder_inputs(maps[held], BLOCK).clamp(max=coder.clip)  # the errors are what decoding shows
        rest = (x - coder.decode(coder.encode(maps[held]))).square().sum() / (x - coder.mean).square().sum()
        assert_allclose(rest, coder.fit.autoencoder_error, rtol=0.02)

    def test_on_the_named_families_its_held_out_error_is_below_that_of_pca(self):
        """Ten families in four numbers, less than their nine differences. With 128 there is nothing to gain."""
        maps = torch.as_tensor(planted(40)[0])
        draw = np.arange(len(maps)) // len(FAMILIES)
        is_held_out = np.arange(draw.max() + 1) % 5 == 0
        held = is_held_out[draw]  # every family, all of one draw together
        few = replace(BLOCK, n_latents=4)
        coder = fit_coder(coder_inputs(maps, few).half(), draw, is_held_out, few)
        assert coder.method == "autoencoder"
        assert coder.fit.autoencoder_error < 0.95 * coder.fit.pca_error
        x = coder_inputs(maps[held], few).clamp(max=coder.clip)
        rest, spread = (x - coder.decode(coder.encode(maps[held]))).square().sum(1), (x - coder.mean).square().sum(1)
        assert_allclose(rest.sum() / spread.sum(), coder.fit.autoencoder_error, rtol=0.02)

        pca = copy.deepcopy(coder)  # the interval is over draws, not over their ten maps each
        pca.net, pca.axes = None, coder.axes[:, : few.n_latents]
        less = (x - pca.decode(pca.encode(maps[held]))).square().sum(1) - rest
        by_draw = less.view(-1, len(FAMILIES)).sum(1) / spread.view(-1, len(FAMILIES)).sum(1).mean()
        found = mean_interval(by_draw.numpy().astype(np.float64))
        assert_allclose((coder.fit.gain_low, coder.fit.gain_high), (found.low, found.high), rtol=0.03)
        assert 0 < coder.fit.gain_low < coder.fit.pca_error - coder.fit.autoencoder_error < coder.fit.gain_high

    def test_pca_is_used_where_it_is_as_good(self):
        noise = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
        coder = fit_coder(noise, np.arange(600), np.arange(600) % 5 == 0, Shape("patch", (2, 4), 64, 3))
        assert coder.method == "pca"
        assert coder.fit.pca_error < coder.fit.autoencoder_error / 0.99
        assert coder.fit.why == "PCA, as it describes held-out images as well"
        assert coder.fit.gain_low < coder.fit.pca_error - coder.fit.autoencoder_error < coder.fit.gain_high

    def test_principal_axes_are_those_of_the_whole_sample(self):
        x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.1, 40)
        axes = principal_axes(x.half(), x.mean(0), 5)
        _, _, expected = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)
        assert_allclose((axes.T.double() @ expected[:5].T).diagonal().abs(), 1.0, atol=1e-3)

    def test_one_image_and_constant_maps_are_coded_by_pca_that_nothing_judges(self):
        alone = coder_inputs(torch.as_tensor(planted(1)[0]), BLOCK)
        one = fit_coder(alone, np.zeros(10, dtype=int), np.zeros(1, dtype=bool), BLOCK)
        assert one.method == "pca"
        assert one.fit.why == "PCA, unjudged: there is no second image to hold out"
        assert math.isnan(one.fit.pca_error)
        assert math.isnan(one.fit.gain_low)
        same = torch.as_tensor(uniform(), dtype=torch.float32).expand(20, -1, -1)
        flat = fit_coder(coder_inputs(same, BLOCK), np.arange(20), np.arange(20) < 4, BLOCK)
        assert "do not differ from the mean map" in flat.fit.why
        assert_allclose(flat.encode(same), 0.0, atol=1e-5)


@pytest.fixture(scope="module")
def model():
    """Fitted on 40 maps of each planted family."""
    maps, _ = planted(40)
    return fit_patterns(filled(maps), GROUND, draw_held_out(len(maps), 0), seed=0)


def test_a_single_map_is_a_model_too():
    keep = np.ones((1, 1, 1), dtype=bool)
    sample = MapSample(BLOCK, keep)
    sample.add(0, 0, pictures(planted(1)[0][:1]))
    alone = fit_patterns(sample, GROUND, draw_held_out(1, 0), seed=0)
    found = place_heads(alone, 0, torch.as_tensor(planted(1, seed=1)[0][:2]))
    assert_array_equal(found.cluster, 0)
    assert np.isfinite(found.xy).all()


class TestMap:
    def test_clusters_recover_the_planted_families(self, model):
        maps, label = planted(20, seed=1)
        cluster = model.layout.place(model.coder.encode(torch.as_tensor(maps)).numpy())[1]
        assert adjusted_rand_score(label, cluster) > 0.9
        assert (cluster != NOISE).mean() > 0.9

    def test_heads_of_the_sample_land_at_their_spot_again(self, model):
        xy, _ = model.layout.place(model.layout.latents)
        size = np.ptp(model.layout.xy, axis=0).max()
        assert np.quantile(np.linalg.norm(xy - model.layout.xy, axis=1), 0.95) < 0.05 * size

    def test_a_heads_place_does_not_depend_on_what_else_is_placed(self, model):
        together = model.layout.place(model.layout.latents[:50])[0]
        alone = model.layout.place(model.layout.latents[7:8])[0]
        assert_allclose(alone[0], together[7], atol=1e-3 * np.ptp(model.layout.xy))

    def test_a_model_reads_back_as_it_was_written(self, model, tmp_path):
        (tmp_path / "patch.safetensors").write_bytes(model.to_bytes())
        again = PatternModel.load(tmp_path / "patch.safetensors")
        maps = torch.as_tensor(planted(1, seed=2)[0])
        assert again.to_bytes() == model.to_bytes()
        assert_array_equal(again.coder.encode(maps), model.coder.encode(maps))
        found, expected = place_heads(again, 0, maps), place_heads(model, 0, maps)
        assert_array_equal(found.cluster, expected.cluster)
        assert_allclose(found.xy, expected.xy, atol=1e-4)

    def test_what_cannot_be_placed_is_refused_with_a_reason(self, model, tmp_path):
        with pytest.raises(UsageError, match="L3 were to be placed"):
            place_heads(model, 3, torch.as_tensor(planted(1)[0]))
        with pytest.raises(UsageError, match=r"got \(1, 5, 5\)"):
            place_heads(model, 0, torch.zeros(1, 5, 5))
        with pytest.raises(StudyError, match="holds no fitted patterns"):
            PatternModel.load(tmp_path / "none.safetensors")
        for damaged in (model.to_bytes()[:-100], b"no tensors"):
            (tmp_path / "damaged.safetensors").write_bytes(damaged)
            with pytest.raises(StudyError, match="holds no fitted patterns"):
                PatternModel.load(tmp_path / "damaged.safetensors")

    def test_few_heads_lie_on_their_principal_plane_in_one_cluster(self):
        few = fit_layout(np.eye(4, 6))
        assert few.xy.shape == (4, 2)
        assert_array_equal(few.cluster, 0)
        xy, cluster = few.place(np.eye(4, 6))
        assert_array_equal(xy, few.xy)
        assert_array_equal(cluster, 0)
        assert fit_layout(np.zeros((30, 5))).n_clusters == 1


def filled(maps):
    """A sample in which each map is an image with one head."""
    sample = MapSample(BLOCK, np.ones((len(maps), 1, 1), dtype=bool))
    for image, each in enumerate(maps):
        sample.add(image, 0, pictures(each[None]))
    return sample


class TestSample:
    def test_images_are_held_out_whole(self):
        held = draw_held_out(50, 3)
        assert held.sum() == 10
        assert_array_equal(held, draw_held_out(50, 3))
        assert not draw_held_out(1, 0).any()
        assert draw_held_out(2, 0).sum() == 1

    def test_the_sample_is_bounded_and_leaves_out_heads_that_are_not_there(self, monkeypatch):
        ground = ComparableLayers(GRID, {0: (GRID, 1), 2: (GRID, 1)}, 0, {})
        every = draw_sample("patch", ground, [2, 3, 1], 10, 0)
        assert every.sum() == 10 * (2 + 1)
        assert not every[:, 1].any()
        assert not every[:, 2, 1:].any()
        monkeypatch.setattr("vitrail.patterns.model.MAX_SAMPLE", 7)
        assert draw_sample("patch", ground, [2, 3, 1], 10, 0).sum() == 7

    def test_batches_and_padding_do_not_change_the_sample(self):
        maps = planted(2)[0].reshape(5, 4, N_PATCHES, N_PATCHES)
        keep = np.random.default_rng(0).random((5, 1, 4)) < 0.6
        whole, pieces = MapSample(BLOCK, keep), MapSample(BLOCK, keep)
        whole.add(0, 0, PatternMaps(slice(0, 5), torch.as_tensor(maps), None, None))
        for first in (0, 3):
            batch = torch.as_tensor(np.concatenate([maps, maps[-1:]])[first : first + 3])
            pieces.add(first, 0, PatternMaps(slice(0, 2), batch[:2], None, None))
            pieces.add(first, 0, PatternMaps(slice(2, 3), batch[2:], None, None))
        assert_array_equal(whole.x, pieces.x)


class TestImageDependence:
    def placing(self, maps):
        """Over images whose one head has these maps."""
        placing = PatternStatistics([], GROUND, [1], len(maps))
        for image, each in enumerate(maps):
            placing.add(image, 0, pictures(each[None].astype(np.float32)))
        return placing.image_dependence()[0, 0]

    def test_it_is_one_less_the_mean_correlation_of_all_pairs(self):
        rng = np.random.default_rng(0)
        maps = np.stack([with_noise(local(), rng, 0.4) for _ in range(6)])
        correlation = np.corrcoef(maps.reshape(6, -1))
        expected = 1 - correlation[~np.eye(6, dtype=bool)].mean()
        assert_allclose(self.placing(maps), expected, rtol=1e-4)

    def test_the_same_map_for_all_images_is_0(self):
        assert_allclose(self.placing(np.stack([local()] * 4)), 0.0, atol=1e-5)

    def test_maps_with_nothing_in_common_are_near_1(self):
        maps = np.stack([sink(at) for at in range(6)])
        assert_allclose(self.placing(maps), 1 + 1 / (N_PATCHES - 1), rtol=1e-3)

    def test_one_image_or_constant_maps_have_none(self):
        assert math.isnan(self.placing(np.stack([local()])))
        assert math.isnan(self.placing(np.stack([uniform()] * 3)))
        assert_allclose(self.placing(np.stack([uniform(), local(), local()])), 0.0, atol=1e-5)


def test_every_derived_measure_is_one_of_patterns():
    assert {name for name, measure in measures().items() if measure.derived} < set(analyses()["patterns"].measure_names)
