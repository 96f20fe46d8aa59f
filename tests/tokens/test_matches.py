"""Patches of other images that are like a chosen one: where a copy was planted it is found, against plain PyTorch."""

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose
from PIL import Image
from typer.testing import CliRunner

from heads.head_models import timm_swin
from vitrail import Preprocessing, data, match_patches, open_vit
from vitrail.cli.entry import app
from vitrail.contract.tiny_models import FAMILIES
from vitrail.errors import Unsupported, UsageError
from vitrail.figures.matches import patch_matches
from vitrail.models.open import Vit
from vitrail.tokens.matches import match_findings

NEST = next(family for family in FAMILIES if family.name == "timm NesT")
PATCH, COPIED_TO = (1, 2), {"a.png": (3, 0), "b.png": (0, 3)}


def without_positions() -> torch.nn.Module:
    """Tokens know nothing of their place, and the first layer's attention is shut: equal patches have equal tokens."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=5
    ).eval()
    with torch.no_grad():
        model.pos_embed.zero_()
        model.blocks[0].attn.proj.weight.zero_()
    return model


@pytest.fixture(scope="module")
def vit() -> Vit:
    return open_vit(without_positions(), preprocessing=Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(photo, tmp_path_factory):
    """Ten images of noise, two of them with a copy of the chosen patch, and the photograph itself."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(1)
    row, column = PATCH
    part = np.asarray(photo)[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
    for name in "abcdefghij":
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        to = COPIED_TO.get(f"{name}.png")
        if to:
            pixels[to[0] * 16 : to[0] * 16 + 16, to[1] * 16 : to[1] * 16 + 16] = part
        Image.fromarray(pixels).save(folder / f"{name}.png")
    photo.save(folder / "itself.png")
    return folder


def search(vit, photo, folder, **options):
    source = data.open_images(folder, labels=False)
    return match_patches(vit, photo, source, data.scan(source), options.pop("patch", PATCH), **options)


@pytest.fixture(scope="module")
def found(vit, photo, folder):
    return search(vit, photo, folder, layer=0, n_matches=3)


def test_planted_copies_are_found_where_they_were_put(found):
    assert set(found["match"].values[:2]) == set(COPIED_TO)
    assert_allclose(found["cosine"].sel(image=list(COPIED_TO)), 1, atol=1e-5)
    assert {name: divmod(int(found["place"].sel(image=name)), 4) for name in COPIED_TO} == COPIED_TO
    assert found["cosine"].sel(image="c.png") < 0.999
    assert found["cosine_others"].max() < 0.999


def test_the_photograph_itself_is_left_out(found):
    assert "itself.png" not in found["image"].values
    assert found.sizes["image"] == 10
    assert found.sizes["match"] == 3


@torch.no_grad()
def test_numbers_are_those_of_plain_pytorch(vit, photo, folder, found):
    model, images = without_positions(), []
    names = sorted(path.name for path in folder.glob("?.png"))
    for image in (photo, *(Image.open(folder / name) for name in names)):
        images.append(torch.from_numpy(np.asarray(image).astype(np.float32) / 255 * 2 - 1).permute(2, 0, 1))
    tokens = model.blocks[0](model._pos_embed(model.patch_embed(torch.stack(images))))[:, 1:]
    queries, keys = tokens[0], tokens[1:]
    cosines = torch.cosine_similarity(queries[None, :, None], keys[:, None], dim=-1)
    chosen = PATCH[0] * 4 + PATCH[1]
    others = [patch for patch in range(16) if patch != chosen]
    by_name = found.sel(image=names)
    assert_allclose(by_name["cosine"], cosines[:, chosen].amax(-1), atol=1e-5)
    assert_allclose(by_name["place"], cosines[:, chosen].argmax(-1))
    assert_allclose(by_name["cosine_others"], cosines[:, others].amax(-1).mean(-1), atol=1e-5)


def test_the_best_come_first_and_fewer_images_than_asked_are_no_error(vit, photo, folder):
    everything = search(vit, photo, folder, layer=1, n_matches=40)
    best = everything["match_likeness"].max("patch").to_numpy()
    assert everything.sizes["match"] == 10
    assert_allclose(best, np.sort(everything["cosine"].to_numpy())[::-1])


def test_the_default_layer_is_the_last_with_a_grid(vit, photo, folder):
    assert search(vit, photo, folder).attrs["layer"] == 1
    swin = open_vit(timm_swin(), preprocessing=Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3))
    assert search(swin, photo, folder, patch=(0, 0)).attrs["layer"] == swin.n_layers - 1


def test_sentences_hold_both_controls_and_the_figure_is_drawn(found):
    first, second, third = match_findings(found)
    assert "patch 3,0 of a.png (1.00)" in first
    assert f"mean over 10 images; for the photograph's other patches {found['cosine_others'].mean():.3f}" in second
    assert "0.6 would by chance" in third
    assert len([axes for axes in patch_matches(found).axes if axes.images]) == 4


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"patch": (4, 0)}, UsageError, "4 rows and 4 columns"),
        ({"layer": 7}, UsageError, "layers 0 to 1"),
        ({"patch": (1, 2, 3)}, UsageError, "patch .* has no meaning; give 2 whole numbers"),
        ({"n_matches": 0}, UsageError, "0 matches cannot be kept; give 1 or more"),
    ],
)
def test_what_is_not_there_is_refused(vit, photo, folder, options, error, words):
    with pytest.raises(error, match=words):
        search(vit, photo, folder, **options)


def test_tokens_without_a_grid_and_a_folder_of_the_photograph_alone_are_refused(vit, photo, tmp_path):
    photo.save(tmp_path / "itself.png")
    with pytest.raises(UsageError, match="besides the photograph itself"):
        search(vit, photo, tmp_path)
    with pytest.raises(Unsupported, match="lie on a grid"):
        search(open_vit(NEST.model()), photo, tmp_path, layer=0)


def test_constant_images_match_everywhere_alike_and_give_finite_numbers(vit, tmp_path):
    for name, colour in (("red", (255, 0, 0)), ("black", (0, 0, 0)), ("grey", (127, 127, 127))):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    alike = search(vit, Image.new("RGB", (64, 64), (255, 255, 255)), tmp_path, layer=0)
    assert alike.sizes["image"] == 3
    assert_allclose(alike["match_likeness"], np.broadcast_to(alike["match_likeness"][:, :1], (3, 16)), atol=1e-5)
    assert_allclose(alike["cosine_others"], alike["cosine"], atol=1e-5)
    assert "nan" not in " ".join(match_findings(alike))
    same = Image.new("RGB", (64, 64), (255, 0, 0))
    assert sorted(search(vit, same, tmp_path, layer=0)["image"].values) == ["black.png", "grey.png"]


def test_the_command_prints_and_draws(photo, folder, tmp_path):
    where = [str(folder / "itself.png"), str(folder), "--patch", "1,2", "--out", str(tmp_path / "m.png")]
    done = CliRunner().invoke(app, ["matches", "vitrail:photos", *where])
    assert done.exit_code == 0, done.output
    assert "Most like patch 1,2 after L5" in done.output
    assert (tmp_path / "m.png").stat().st_size > 10_000
