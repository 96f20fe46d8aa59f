"""Relevance without a label: by hand, planted, in hierarchies, refused, against random prototypes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
import xarray as xr
from hierarchies import maxvit, pvt, swin
from numpy.testing import assert_allclose
from PIL import Image
from token_models import small_images, small_vit
from torch import nn
from typer.testing import CliRunner

import vitrail
from vitrail import Preprocessing, open_vit
from vitrail.cli.entry import app
from vitrail.contract.tiny_models import FAMILIES
from vitrail.errors import ModelError, Unsupported, UsageError
from vitrail.live import LiveModel
from vitrail.tokens.label_free import embedding_similarity, final_tokens, mean_embedding
from vitrail.tokens.relevance import METHODS, deletion_and_insertion, relevance, unavailable_methods

NO_CLASS = np.zeros(3, dtype=int)


def with_gains(vit):
    """The final norm has gains of its own, so that tokens before and after it are told apart."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in vit.model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator))
    return vit


def cosines(patches, embeddings):
    return torch.cosine_similarity(patches, embeddings[:, None], dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_classes": 0}, {"reg_tokens": 2}])
def test_similarity_to_self_is_that_of_normed_patches_to_the_normed_class_token(options):
    vit, images = with_gains(small_vit(**options)), small_images()
    tokens = vit.model.forward_features(images)
    patches = tokens[:, vit.model.num_prefix_tokens :]
    found = relevance(vit, images, NO_CLASS, ["self_similarity"])["self_similarity"]
    assert_allclose(found, cosines(patches, tokens[:, 0]), atol=1e-5)


@torch.no_grad()
def test_without_a_class_token_it_is_to_the_mean_of_the_patches_after_the_norm_that_follows_pooling():
    vit, images = with_gains(small_vit(class_token=False, global_pool="avg")), small_images()
    tokens = vit.model.fc_norm(vit.model.forward_features(images))
    found = relevance(vit, images, NO_CLASS, ["self_similarity"])["self_similarity"]
    assert_allclose(found, cosines(tokens, tokens.mean(1)), atol=1e-5)


@torch.no_grad()
def test_similarity_to_a_prototype_is_to_one_vector_or_to_one_for_each_image(vit, images):
    patches = vit.model.forward_features(images)[:, 1:]
    prototypes = torch.randn(3, 48, generator=torch.Generator().manual_seed(2))
    each = relevance(vit, images, NO_CLASS, ["prototype_similarity"], prototype=prototypes.numpy())
    assert_allclose(each["prototype_similarity"], cosines(patches, prototypes), atol=1e-5)
    one = relevance(vit, images, NO_CLASS, ["prototype_similarity"], prototype=prototypes[0].numpy())
    assert_allclose(one["prototype_similarity"], cosines(patches, prototypes[:1]), atol=1e-5)


@torch.no_grad()
def test_in_a_hierarchy_patches_of_the_first_grid_have_the_cosine_of_the_last_grids_patch_over_them():
    vit, images = with_gains(swin()), small_images(2, (32, 32))
    tokens = vit.model.forward_features(images).flatten(1, 2)  # 8 x 8 patches, normed
    expected = cosines(tokens, tokens.mean(1)).reshape(2, 8, 8).repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert_allclose(embedding_similarity(vit, images), expected.flatten(1), atol=1e-5)


@pytest.mark.parametrize("make", [pvt, maxvit])
def test_other_hierarchies_have_cosines_of_the_first_grid(make):
    vit = make()
    images, grid = small_images(2, vit.image_size), vit.anatomy.blocks[0].grid
    scores = embedding_similarity(vit, images).numpy()
    assert scores.shape == (2, grid[0] * grid[1])
    assert (np.abs(scores) <= 1 + 1e-5).all()
    assert (scores.std(1) > 0).all()


def test_the_prototype_of_images_is_the_mean_of_their_class_tokens():
    model = small_vit(img_size=32).model
    vit = open_vit(model, preprocessing=Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3))
    pixels = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)
    counted = []
    prototype = mean_embedding(vit, (Image.fromarray(each) for each in pixels), progress=counted.append)
    images = torch.from_numpy(pixels.astype(np.float32) / 255 * 2 - 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert_allclose(prototype, vit.model.forward_features(images)[:, 0].mean(0), rtol=1e-4, atol=1e-5)
    assert counted == [8, 11]
    one = Image.fromarray(pixels[0])
    assert_allclose(mean_embedding(vit, one), mean_embedding(vit, [one]))
    with pytest.raises(UsageError, match=r"mean of images, and none was given; name a folder"):
        mean_embedding(vit, [])


# --- planted ---------------------------------------------------------------------------------------------------------


class ColourLayer(nn.Module):
    """Attention of no consequence: a hundredth of the mean token is added."""

    def __init__(self):
        super().__init__()
        self.num_heads = 1

    def forward(self, tokens):
        v = tokens[:, None]
        return tokens + 0.01 * F.scaled_dot_product_attention(torch.zeros_like(v), torch.zeros_like(v), v)[:, 0]


class Colours(nn.Module):
    """Tokens are the mean colours of 8 x 8 patches; logit 1 is the redness of the reddest patch."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 3, 4, 4, bias=False)
        self.blocks = nn.ModuleList(ColourLayer() for _ in range(2))
        with torch.no_grad():
            self.embed.weight.copy_(torch.eye(3)[:, :, None, None].expand(3, 3, 4, 4) / 16)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens)
        redness = (tokens[..., 0] - tokens[..., 1:].mean(-1)).amax(1)
        return torch.stack([torch.zeros_like(redness), 4 * redness], 1)


PATCHES = [5, 22, 40, 57]


def planted_images(least=0.0):
    """Patches of weak colours at random; one of each image is red."""
    colours = least + (0.4 - least) * torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    for image, patch in enumerate(PATCHES):
        colours[image, :, patch // 8, patch % 8] = torch.tensor([1.0, 0.05, 0.05])
    return colours.repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.fixture(scope="module")
def colours():
    return open_vit(Colours().eval(), preprocessing=Preprocessing((32, 32), (0.0,) * 3, (1.0,) * 3), n_classes=2)


def test_a_planted_patch_is_like_the_prototype_of_its_kind_and_random_prototypes_do_not_tell_it(colours):
    images, classes = planted_images(), np.ones(4, dtype=int)
    red = mean_embedding(colours, [Image.new("RGB", (32, 32), (200 + 10 * n, 5 * n, 0)) for n in range(3)])
    scores = relevance(colours, images, classes, ["prototype_similarity"], prototype=red)["prototype_similarity"]
    assert scores.argmax(1).tolist() == PATCHES

    def gap(scores):
        low, high = deletion_and_insertion(colours, images, classes, scores, 4).areas
        return (high - low).mean()

    null = np.random.default_rng(0).normal(size=(20, 4, 3)).astype(np.float32)
    gaps = [gap(embedding_similarity(colours, images, prototypes).numpy()) for prototypes in null]
    assert gap(scores) > max(gaps)
    assert abs(np.mean(gaps)) < 3 * np.std(gaps) / len(gaps) ** 0.5


def test_a_patch_unlike_the_rest_of_its_image_is_least_like_the_images_own_embedding(colours):
    assert embedding_similarity(colours, planted_images(least=0.3)).argmin(1).tolist() == PATCHES


# --- refused, and in a look ------------------------------------------------------------------------------------------


def test_what_is_no_prototype_is_refused(vit, images):
    with pytest.raises(UsageError, match="prototype_similarity compares with a prototype; give prototype="):
        relevance(vit, images, NO_CLASS, ["prototype_similarity"])
    refused = {"48 channels": np.ones(47, np.float32), "zero or not finite": np.zeros(48, np.float32)}
    for words, prototype in refused.items():
        with pytest.raises(UsageError, match=words):
            embedding_similarity(vit, images, prototype)
    with pytest.raises(UsageError, match="zero or not finite"):
        embedding_similarity(vit, images, np.full(48, np.nan, np.float32))
    assert set(relevance(vit, images, NO_CLASS)) == {*METHODS} - {"prototype_similarity"}


def test_tokens_that_are_no_numbers_are_refused(images):
    vit = small_vit()
    vit.model.blocks[1].mlp.fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="is not finite"):
        final_tokens(vit, images)


def test_models_whose_tokens_lie_on_no_grid_say_so_and_models_of_no_classes_are_compared(images):
    nest = next(family for family in FAMILIES if family.name == "timm NesT")
    without = open_vit(nest.model(), image_size=nest.image_size)
    reasons = unavailable_methods(without)
    assert "no patch has a relevance" in reasons["self_similarity"]
    with pytest.raises(Unsupported, match="no patch has a relevance"):
        relevance(without, torch.zeros(1, *without.anatomy.image_shape), NO_CLASS[:1], ["self_similarity"])
    assert "gradient" in unavailable_methods(small_vit(num_classes=0))
    assert not {"self_similarity", "prototype_similarity"} & set(unavailable_methods(small_vit(num_classes=0)))


def test_a_look_and_the_page_have_the_similarities_the_prototype_where_it_is_given(colours):
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    prototype = np.array([1, 0, 0], np.float32)
    images = colours.prepare([photo])
    expected = embedding_similarity(colours, images, prototype)[0]
    looked = vitrail.look(colours, photo, measures="tokens", prototype=prototype)
    live = LiveModel(colours, prototype).look_part(photo, "tokens", ("relevance",))
    for dataset in (looked, live):
        scores = dataset["relevance"].sel(relevance_method="prototype_similarity")
        assert_allclose(scores, expected, atol=1e-6)
    own = looked["relevance"].sel(relevance_method="self_similarity")
    assert_allclose(own, embedding_similarity(colours, images)[0], atol=1e-6)
    plain = LiveModel(colours).look_part(photo, "tokens", ("relevance",))
    assert "prototype_similarity" not in plain["relevance_method"]
    assert "self_similarity" in plain["relevance_method"]


def test_the_command_compares_with_the_mean_embedding_of_a_folder(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "kind"
    folder.mkdir()
    for path in (tmp_path / "photo.png", folder / "a.png", folder / "b.png"):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    command = ["look", "vitrail:photos", str(tmp_path / "photo.png"), "--measures", "tokens", "--save"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out"), "--prototype", str(folder)])
    assert done.exit_code == 0, done.output
    vit = open_vit("vitrail:photos")
    prototype = mean_embedding(vit, [Image.open(folder / name) for name in ("a.png", "b.png")])
    expected = embedding_similarity(vit, vit.prepare([Image.open(tmp_path / "photo.png")]), prototype)[0]
    looked = xr.open_zarr(tmp_path / "out" / "photo" / "look.zarr", consolidated=False)
    assert_allclose(looked["relevance"].sel(relevance_method="prototype_similarity"), expected, atol=1e-5)
    refused = CliRunner().invoke(
        app, ["open", "vitrail:photos", str(folder / "a.png"), "--no-live", "--prototype", "x"]
    )
    assert isinstance(refused.exception, UsageError)
    assert "--no-live leaves out" in str(refused.exception)
