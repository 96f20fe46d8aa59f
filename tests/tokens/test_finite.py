"""Weights that give NaN: every function of tokens that takes a model and images says so, and gives no number."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from vitrail import data, match_patches, open_vit
from vitrail.cli.entry import app
from vitrail.errors import ModelError, UsageError
from vitrail.models.open import Vit
from vitrail.tokens.artefact_trial import try_registers
from vitrail.tokens.artefacts import artefact_neurons, outlying_patches
from vitrail.tokens.excite import maximise_activation
from vitrail.tokens.relevance import METHODS, deletion_and_insertion, gradient_rollout, layer_gradients, relevance
from vitrail.tokens.robustness import Occlusion, respond
from vitrail.tokens.views import faithful_view, neuron_view

NOT_FINITE = r"is not finite \(NaN or infinite\)\. Check the weights"


def tiny(weight: float = float("nan")) -> nn.Module:
    """Two layers, one weight of whose first MLP is as given."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3
    ).eval()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = weight
    return model


def no_numbers() -> nn.Module:
    return tiny()


class OverflowsOnWhite(nn.Module):
    """Answers with infinity to bright images alone."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny(0.1)

    def forward(self, images: Tensor) -> Tensor:
        bright = images.mean((1, 2, 3)) > 0.9
        return self.model(images) / torch.where(bright, 0.0, 1.0)[:, None]


@pytest.fixture(scope="module")
def vit() -> Vit:
    return open_vit(tiny(), mean=0.5, std=0.5)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colours")
    for name in ("black", "grey", "white"):
        Image.new("RGB", (32, 32), name).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("method", [method for method in METHODS if method != "random"])
def test_relevance_of_a_model_without_numbers_is_refused(vit, images, method) -> None:
    with pytest.raises(ModelError, match=rf"to the image at index 0 {NOT_FINITE}"):
        relevance(vit, images, np.array([0, 1]), [method], prototype=np.ones(48, np.float32))


@pytest.mark.parametrize(
    "ask",
    [
        lambda vit, images: gradient_rollout(vit, images, np.array([0, 1])),
        lambda vit, images: layer_gradients(vit, images, np.array([0, 1])),
        lambda vit, images: deletion_and_insertion(vit, images, np.array([0, 1]), np.ones((2, 16))),
        lambda vit, images: respond(
            vit, images, np.array([0, 1]), np.ones((2, 16)), [0, 1], [Occlusion("random", "mean", 0.5)]
        ),
        lambda vit, images: neuron_view(vit, images, 1, 3, 0),
        lambda vit, images: faithful_view(vit, images[:1], 1, 3, 0),
        lambda vit, images: faithful_view(vit, images[:1], 1, 3, 0, path="frozen"),
        lambda vit, _: maximise_activation(vit, 1, 0, n_steps=1),
        outlying_patches,
        artefact_neurons,
    ],
)
def test_no_function_of_tokens_passes_nan_on(vit, images, ask) -> None:
    with pytest.raises(ModelError, match=NOT_FINITE):
        ask(vit, images)


def test_scores_that_are_no_numbers_are_refused(images) -> None:
    with pytest.raises(UsageError, match="NaN or infinite, which have no order"):
        deletion_and_insertion(open_vit(tiny(0.1)), images, np.array([0, 1]), np.full((2, 16), np.nan))


def test_a_search_names_the_image_whose_answer_is_not_finite(folder) -> None:
    vit = open_vit(OverflowsOnWhite().eval(), image_size=32, mean=0.5, std=0.5)
    source = data.open_images(folder, labels=False)
    with pytest.raises(ModelError, match=rf"to white\.png {NOT_FINITE}"):
        match_patches(vit, Image.new("RGB", (32, 32), "blue"), source, data.scan(source), (1, 1))
    with pytest.raises(ModelError, match=rf"to the photograph {NOT_FINITE}"):
        match_patches(vit, Image.new("RGB", (32, 32), "white"), source, data.scan(source), (1, 1))


def test_artefacts_of_a_model_without_numbers_are_not_said_to_be_none(vit) -> None:
    with pytest.raises(ModelError, match=NOT_FINITE):
        try_registers(vit, [Image.new("RGB", (32, 32), colour) for colour in ("red", "grey")])


def test_the_commands_say_it_in_a_sentence(folder, tmp_path) -> None:
    (tmp_path / "mine.py").write_text("from tokens.test_finite import no_numbers\n")
    model = [f"{tmp_path / 'mine.py'}:no_numbers", "--mean", "0.5", "--std", "0.5"]
    matches = ["matches", model[0], str(folder / "grey.png"), str(folder), "--patch", "1,1", *model[1:]]
    for command in (matches, ["artefacts", model[0], str(folder), *model[1:]]):
        result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "drawn.png")])
        assert isinstance(result.exception, ModelError), result.output
        assert "is not finite" in str(result.exception)
        assert not (tmp_path / "drawn.png").exists()
