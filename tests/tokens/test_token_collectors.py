"""The room in a study: which measures a model gives, masks handed out, resumed bytes, refusals."""

import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose
from PIL import Image
from token_models import small_images, small_vit

from vitrail import open_study, open_vit, run_study
from vitrail.analysis import analyses, make_collectors, unavailable
from vitrail.data import load_mask, open_images, scan, with_masks
from vitrail.errors import DataError, Unsupported, UsageError
from vitrail.models.objects import in_view, patch_objects
from vitrail.tap.tap import Readers
from vitrail.tokens.grouping import score_grouping
from vitrail.tokens.levels import read_levels
from vitrail.tokens.vectors import image_embeddings

GROUPING = [name for name in analyses()["tokens"].measure_names if name.startswith("grouping_")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Five images of 96 x 48 pixels with three objects each, and masks of four of them."""
    root, rng = tmp_path_factory.mktemp("masked"), np.random.default_rng(0)
    (root / "images").mkdir()
    (root / "masks").mkdir()
    for number in range(5):
        ids = np.zeros((48, 96), dtype=np.uint8)
        for each in (1, 2, 3):
            ids[6:42, 24 * each - 12 : 24 * each + 6] = each
        colours = rng.integers(0, 256, (4, 3))
        noise = rng.integers(-20, 20, (48, 96, 3))
        Image.fromarray((colours[ids] + noise).clip(0, 255).astype(np.uint8)).save(root / "images" / f"{number}.png")
        if number != 3:
            Image.fromarray(ids).save(root / "masks" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    vit, out = small_vit(), tmp_path_factory.mktemp("study") / "neurons"
    return vit, run_study(
        vit, folders / "images", out=out, measures="neurons", batch_size=2, masks=folders / "masks"
    ).load()


def test_importing_the_analysis_loads_no_torch():
    code = "import sys, vitrail.tokens; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_measure_of_the_analysis_is_in_a_study_with_masks(finished):
    _, study = finished
    assert set(analyses()["tokens"].measure_names) <= set(study)
    assert study["token_norm"].dims == ("image", "layer", "token")
    assert study["occlusion_drift"].shape == (5, 3, 3)
    assert study["shuffle_probability"].shape == (5, 2)  # 2 x 2 and 4 x 4 cells divide a grid of 4 x 8
    assert study["grouping_purity"].attrs["unit"] == "1"


def test_scores_in_a_study_are_those_of_the_image_alone(finished, folders):
    vit, study = finished
    image = Image.open(folders / "images" / "1.png")
    owner = patch_objects(
        in_view(np.asarray(Image.open(folders / "masks" / "1.png")).astype(int), vit.preprocessing), (4, 8)
    )
    levels = read_levels(vit.tap(), vit.prepare([image])).tokens
    for layer in range(3):
        expected = score_grouping(levels[layer + 1][0, 1:].numpy()[owner > 0], owner[owner > 0])
        for name in GROUPING:
            found = float(study[name].sel(image="1.png")[layer])
            assert found == pytest.approx(getattr(expected, name.removeprefix("grouping_")), abs=1e-4)
        assert_allclose(study["token_norm"].sel(image="1.png")[layer], levels[layer + 1][0].norm(dim=-1), rtol=1e-4)


def test_the_embedding_is_the_class_token_after_the_last_layer_as_a_norm_without_gains_has_it(finished, folders):
    vit, study = finished
    assert study["image_embedding"].dims == ("image", "feature")
    kept = {}
    handle = vit.model.blocks[-1].register_forward_hook(lambda _module, _args, tokens: kept.update(last=tokens))
    with torch.no_grad():
        vit.model(vit.prepare([Image.open(folders / "images" / "1.png")]))
    handle.remove()
    token = kept["last"][0, 0].numpy().astype(np.float64)
    expected = (token - token.mean()) / np.sqrt(token.var() + 1e-5)
    assert_allclose(study["image_embedding"].sel(image="1.png"), expected, atol=1e-5)


@pytest.mark.parametrize("class_token", [True, False])
@torch.no_grad()
def test_a_model_without_a_class_token_has_the_mean_of_its_patches(class_token):
    pooled = {} if class_token else {"class_token": False, "global_pool": "avg", "fc_norm": False}
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, **pooled).eval()
    vit = open_vit(model, mean=(0.5,) * 3, std=(0.5,) * 3)
    images, tokens = torch.randn(3, 3, 32, 32), {}
    vit.tap().read(images, Readers(output=tokens.__setitem__))
    vector = (tokens[1][:, 0] if class_token else tokens[1].mean(1)).double()
    expected = (vector - vector.mean(1, keepdim=True)) / (vector.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    assert_allclose(image_embeddings(tokens[1], vit.anatomy), expected, atol=1e-5)


def test_an_image_without_a_mask_has_no_grouping_and_is_named(finished):
    _, study = finished
    for name in GROUPING:
        assert np.isnan(study[name].sel(image="3.png")).all()
        assert np.isfinite(study[name].sel(image="2.png")).all()
    assert np.isfinite(study["occlusion_salient"]).all()


def test_an_image_of_fewer_than_two_objects_has_no_grouping(folders, tmp_path):
    """One object; one and another too small to count; two. Only the last is scored, and means are of it alone."""
    ids = np.asarray(Image.open(folders / "masks" / "0.png"))
    one, small = np.where(ids == 1, 1, 0), np.where(ids == 1, 1, 0)
    small[6:10, 40:44] = 2  # a third of a percent of the image
    for name, each in (("0", one), ("1", small), ("2", np.where(ids == 3, 0, ids))):
        Image.fromarray(each.astype(np.uint8)).save(tmp_path / f"{name}.png")
    study = run_study(small_vit(), folders / "images", out=tmp_path / "s", measures=GROUPING, masks=tmp_path)
    for name in GROUPING:
        assert np.isnan(study[name].sel(image=["0.png", "1.png"])).all()
        assert np.isfinite(study[name].sel(image="2.png")).all()


def test_a_study_with_masks_keeps_what_objects_cover_of_each_patch(finished, folders):
    vit, study = finished
    seen = in_view(np.asarray(Image.open(folders / "masks" / "1.png")).astype(int), vit.preprocessing) > 0
    rows, columns = (size // cells for size, cells in zip(seen.shape, (4, 8), strict=True))
    by_hand = [
        seen[rows * row : rows * (row + 1), columns * column : columns * (column + 1)].mean()
        for row in range(4)
        for column in range(8)
    ]
    assert study["object_share"].attrs["unit"] == "1"
    assert_allclose(study["object_share"].sel(image="1.png"), by_hand, atol=1e-6)
    assert 0 < np.mean(by_hand) < 1
    assert np.isnan(study["object_share"].sel(image="3.png")).all()


def test_losing_patches_and_order_moves_tokens(finished):
    _, study = finished
    drift = study["occlusion_drift"].mean("image").to_numpy()
    assert (np.diff(drift, axis=1) > 0).all()  # the more is lost
    assert (study["shuffle_drift"] > 0).all()


def test_a_study_without_masks_leaves_grouping_out_with_the_reason(folders, tmp_path):
    vit = small_vit()
    run_study(vit, folders / "images", out=tmp_path / "s", measures=["neurons"], batch_size=5)
    study = open_study(tmp_path / "s")
    assert "grouping_purity" not in study
    assert "instance ids" in study.attrs["left_out"]["grouping_purity"]
    with pytest.raises(Unsupported, match="give a folder of instance ids"):
        run_study(vit, folders / "images", out=tmp_path / "t", measures="grouping_purity")


def test_other_masks_are_another_study(folders, tmp_path):
    one = scan(open_images(folders / "images"))
    masked = with_masks(one, folders / "masks")
    assert masked.digest != one.digest
    assert masked.masks_from == "4 of 5 images have a mask; without: 3.png"
    assert type(masked).from_json(masked.to_json()) == masked


def test_masks_are_read_as_they_are_and_refused_when_changed(folders, tmp_path):
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((folders / "masks" / name).read_bytes())
    entries = with_masks(scan(open_images(folders / "images")), tmp_path).images
    assert (load_mask(entries[0]) == np.asarray(Image.open(folders / "masks" / "0.png"))).all()
    assert load_mask(entries[4]) is None
    Image.fromarray(np.zeros((48, 96), dtype=np.uint8)).save(tmp_path / "0.png")
    with pytest.raises(DataError, match="has changed"):
        load_mask(entries[0])


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda path: Image.new("RGB", (96, 48)).save(path), "mode RGB"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\nnothing"), "broken"),
        (lambda path: path.write_bytes(b"GIF89a"), "no PNG"),
    ],
)
def test_what_is_no_mask_is_refused_with_the_reason(folders, tmp_path, write, told):
    write(tmp_path / "0.png")
    with pytest.raises(DataError, match=told) as refusal:
        with_masks(scan(open_images(folders / "images")), tmp_path)
    assert str(tmp_path / "0.png") in str(refusal.value)


def test_a_mask_of_16_bits_keeps_its_ids(folders, tmp_path):
    ids = np.zeros((48, 96), dtype=np.uint16)
    ids[10:20] = 40_000
    Image.fromarray(ids).save(tmp_path / "0.png")
    assert load_mask(with_masks(scan(open_images(folders / "images")), tmp_path).images[0]).max() == 40_000


def test_a_mask_of_another_size_than_its_image_is_refused(folders, tmp_path):
    Image.fromarray(np.ones((20, 20), dtype=np.uint8)).save(tmp_path / "0.png")
    with pytest.raises(DataError, match="as large as its image"):
        run_study(small_vit(), folders / "images", out=tmp_path / "s", measures="neurons", masks=tmp_path)
    assert not (tmp_path / "s").exists()  # in the scan, before the plan holds the mask's digest


def test_masks_are_as_large_as_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    Image.new("RGB", (96, 48)).save(tmp_path / "images" / "0.png", exif=exif)
    manifest = scan(open_images(tmp_path / "images"))
    Image.new("L", (48, 96)).save(tmp_path / "masks" / "0.png")
    assert with_masks(manifest, tmp_path / "masks").images[0].mask is not None
    Image.new("L", (96, 48)).save(tmp_path / "masks" / "0.png")
    with pytest.raises(DataError, match=r"0\.png has 96 x 48 pixels and its image 48 x 96"):
        with_masks(manifest, tmp_path / "masks")


def test_a_folder_without_masks_is_refused(folders, tmp_path):
    with pytest.raises(DataError, match=r"0\.png should have 0\.png"):
        with_masks(scan(open_images(folders / "images")), tmp_path)
    with pytest.raises(DataError, match="no folder of masks"):
        with_masks(scan(open_images(folders / "images")), tmp_path / "nowhere")


def test_measures_that_a_model_cannot_give_are_named_with_the_reason():
    features = small_vit("vit_base_patch16_siglip_gap_224", num_classes=0)
    reasons = unavailable(features, analyses()["tokens"].measure_names, {"masks": "given"})
    assert "no classifier" in reasons["occlusion_random"]
    assert "token_norm" not in reasons
    assert "grouping_purity" not in reasons


def test_a_hierarchy_gives_norms_grouping_and_shuffling_and_says_why_no_occlusion():
    torch.manual_seed(0)
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(2, 2), embed_dim=24,
                             num_heads=(2, 3), num_classes=10).eval()  # fmt: skip
    vit = open_vit(swin, image_size=(64, 64))
    reasons = unavailable(vit, analyses()["tokens"].measure_names, {"masks": "given"})
    assert set(reasons) == {name for name in analyses()["tokens"].measure_names if name.startswith("occlusion_")}
    found = {}
    tap, images = vit.tap(), small_images(2, (64, 64))
    parts = make_collectors(vit, ["token_norm", "shuffle_drift"])
    from vitrail import Readers

    replay, logits = tap.record(images, Readers.join([part.readers() for part in parts]))
    for part in parts:
        found |= part.finish(tap, replay, logits, np.array([0, 1]))
    assert found["token_norm"].shape == (2, 4, 256)
    assert np.isnan(found["token_norm"][:, 2, 64:]).all()
    assert np.isfinite(found["shuffle_drift"]).all()


def test_an_unknown_option_is_refused_with_those_that_exist(vit):
    with pytest.raises(UsageError, match="k-distance, oracle"):
        make_collectors(vit, ["token_norm"], {"radius": "guess"})
