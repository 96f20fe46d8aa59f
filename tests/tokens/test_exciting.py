"""What excites neurons: peaks are those of plain PyTorch, the planted photograph leads, and look makes an image."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image

import vitrail
from heads.head_models import timm_vit
from tokens.hierarchies import pvt
from vitrail import open_study, open_vit, run_study
from vitrail.contract.check import differences, footprint
from vitrail.errors import UsageError
from vitrail.figures.exciting import exciting_photographs, made_images
from vitrail.report.exciting import exciting
from vitrail.report.parts import ReportData
from vitrail.tokens.excite import maximise_activation
from vitrail.tokens.peaks import peak_images, peak_layer, selective_neurons, selectivity

N_IMAGES = 12


@pytest.fixture(scope="module")
def vit():
    return open_vit(timm_vit(), image_size=(48, 80))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vit):
    folder = tmp_path_factory.mktemp("exciting")
    (folder / "photos").mkdir()
    for index in range(N_IMAGES):
        pixels = np.random.default_rng(index).integers(0, 256, (48, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{index}.png")
    run_study(vit, folder / "photos", out=folder / "study", measures="exciting", batch_size=4)
    return folder


def test_peaks_are_the_highest_values_of_what_the_last_layer_returns(vit, folder):
    study = open_study(folder / "study")
    images = vit.prepare([Image.open(folder / "photos" / f"{index}.png") for index in range(N_IMAGES)])
    returned = []
    handle = vit.model.blocks[-1].register_forward_hook(lambda _, __, output: returned.append(output))
    with torch.no_grad():
        vit.model(images)
    handle.remove()
    patches = returned[0][:, 1:]
    assert_allclose(study["neuron_peak"], patches.amax(1), atol=1e-5)
    np.testing.assert_array_equal(study["neuron_peak_patch"], patches.argmax(1))


def test_the_most_selective_neuron_and_its_photographs_are_named(folder):
    study = open_study(folder / "study").load()
    peaks = np.zeros((N_IMAGES, study.sizes["token_channel"]), np.float32)
    peaks[:, 1:] = np.random.default_rng(0).normal(size=(N_IMAGES, study.sizes["token_channel"] - 1))
    peaks[7, 5] = 40
    planted = study.assign(neuron_peak=(("image", "token_channel"), peaks, study["neuron_peak"].attrs))
    assert selective_neurons(planted)[0] == 5
    assert peak_images(planted, 5)[0] == 7
    assert selectivity(planted)[0] == 0
    expected = (40 - np.median(peaks[:, 5])) / peaks[:, 5].std()
    assert_allclose(selectivity(planted)[5], expected, rtol=1e-5)
    labels = [axes.get_ylabel() for axes in exciting_photographs(planted).axes]
    assert "neuron 5" in labels
    section = exciting(ReportData.of(folder / "study"))
    assert f"Of {study.sizes['token_channel']} neurons" in section.findings[0]


def test_the_patch_is_marked_on_the_grid_of_the_layer_that_was_read(folder, tmp_path):
    study = run_study(pvt(), folder / "photos", out=tmp_path / "study", measures="exciting", limit=3)
    read = study.attrs["own_grid_layers"]
    assert read
    assert study.attrs["grids"][max(read)] != study.attrs["grids"][-1]
    layer = peak_layer(study)
    assert (layer.name, layer.grid) == (f"L{max(read)}", tuple(study.attrs["grids"][max(read)]))
    panel = exciting_photographs(study).axes[0]
    assert panel.get_images()[0].get_extent()[2] == layer.grid[0] - 0.5
    assert f"neurons of L{max(read)}" in exciting(ReportData.of(tmp_path / "study")).findings[0]
    older = study.assign_attrs(own_grid_layers=None)
    assert peak_layer(older).grid is None
    assert "last layer that returns" in peak_layer(older).name
    exciting_photographs(older)
    assert peak_layer(older.assign_attrs(grids=[[4, 4]] * 4)).grid == (4, 4)


def test_look_makes_an_image_for_the_neuron_that_is_asked_for(vit, folder):
    photo = Image.open(folder / "photos" / "0.png")
    looked = vitrail.look(vit, photo, measures=["exciting"], channel=3)
    assert looked["exciting_image"].shape == (2, 48, 80, 3)
    assert int(looked["excited_neuron"]) == 3
    made = looked["exciting_image"].to_numpy()[-1]
    noise = np.random.default_rng(0).uniform(0.45, 0.55, made.shape).astype(np.float32)
    mean, std = (np.array(getattr(vit.preprocessing, name), np.float32) for name in ("mean", "std"))
    returned = []
    handle = vit.model.blocks[-1].register_forward_hook(lambda _, __, output: returned.append(output))
    with torch.no_grad():
        vit.model(torch.from_numpy(((np.stack([made, noise]) - mean) / std).transpose(0, 3, 1, 2)).float())
    handle.remove()
    of_made, of_noise = returned[0][:, 1:, 3].mean(1)
    assert of_made > of_noise + 0.5
    assert "neuron 3" in made_images(looked).get_suptitle()
    for channel in (48, -1):
        with pytest.raises(UsageError, match=f"Neuron {channel} was asked for; .* neurons 0 to 47"):
            vitrail.look(vit, photo, measures=["exciting"], channel=channel)


def test_a_look_writes_no_gradient_into_the_model_and_trains_nothing(folder):
    vit = open_vit(timm_vit(), image_size=(48, 80))
    steps = []
    for weight in vit.model.parameters():
        weight.register_post_accumulate_grad_hook(steps.append)
    before = footprint(vit.model)
    looked = vitrail.look(vit, Image.open(folder / "photos" / "0.png"))
    assert "exciting_image" in looked
    assert differences(before, footprint(vit.model)) == []
    assert steps == []


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_the_image_is_the_same_where_the_caller_has_switched_gradients_off(vit, switched_off):
    expected = maximise_activation(vit, 2, 3, n_steps=8)
    assert expected.after > expected.before + 0.1
    with switched_off():
        made = maximise_activation(vit, 2, 3, n_steps=8)
    np.testing.assert_array_equal(made.pixels, expected.pixels)
    assert (made.before, made.after) == (expected.before, expected.after)


@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_a_model_of_any_precision_has_its_image(vit, precision):
    expected = maximise_activation(vit, 2, 3, n_steps=8)
    made = maximise_activation(open_vit(timm_vit(), image_size=(48, 80), precision=precision), 2, 3, n_steps=8)
    assert made.pixels.dtype == np.float32
    assert made.after > made.before + 0.1
    if precision == "float64":
        assert_allclose(made.pixels, expected.pixels, atol=1e-4)


def test_the_default_type_of_torch_changes_no_image(vit):
    expected = maximise_activation(vit, 2, 3, n_steps=2)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        made = maximise_activation(vit, 2, 3, n_steps=2)
    finally:
        torch.set_default_dtype(before)
    np.testing.assert_array_equal(made.pixels, expected.pixels)
