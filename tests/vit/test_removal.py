"""Heads removed for real: the answers of the masked model, in Vitrail and in the model's own library."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers
from torch.testing import assert_close

from vitrail.errors import Unsupported, UsageError
from vitrail.models.choose import feature_or_logits
from vitrail.models.open import open_vit
from vitrail.pruning.masked import logits_without, predictions_without
from vitrail.pruning.removal import remove_heads, why_not_removable
from vitrail.pruning.saving import save_pruned

REMOVABLE = [
    "timm ViT", "timm ViT, 48 x 80 px", "timm ViT, no classifier", "timm DeiT distilled", "timm DINOv2 with registers",
    "timm CLIP", "timm SigLIP, mean pooled", "timm ViT 18x2",
    "transformers ViT", "transformers ViT, eager", "transformers DeiT",
    "transformers DINOv2 with registers", "transformers DINOv3",
]  # fmt: skip

REFUSED = {
    "torchvision vit_b_16": "MultiheadAttention", "open_clip ViT-B-32": "MultiheadAttention",
    "timm BEiT v2": "weights of its own", "timm relative-position ViT": "weights of its own",
    "timm Swin": "weights of its own", "timm CaiT": "weights of its own", "timm NesT": "counts on all",
    "timm XCiT": "other sizes", "timm DINOv3": "counts on all", "timm Hiera": "counts on all",
    "transformers CLIP vision": "no such linear maps", "transformers BEiT": "counts on all",
    "transformers ViT-MAE, mask_ratio 0.75": "answers in another way",
}  # fmt: skip


@torch.no_grad()
def removed_and_masked(vit, images, heads):
    removed = remove_heads(vit, heads)
    return feature_or_logits(removed.module(images)), logits_without(vit, images, heads), removed


def assert_within(found, expected):
    assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", REMOVABLE)
def test_the_smaller_model_answers_as_the_masked_one(name, opened, noise):
    vit = opened(name)
    heads = {(0, 1), (vit.n_layers - 1, 0), (1, 0), (1, 2)}
    found, expected, removed = removed_and_masked(vit, noise(vit), heads)
    assert_within(found, expected)
    assert (found - vit.logits(noise(vit))).abs().max() > 1e-4
    smaller = open_vit(removed.module, image_size=vit.image_size)
    lost = [sum(layer == at for at, _ in heads) for layer in range(vit.n_layers)]
    assert smaller.n_heads == tuple(n - gone for n, gone in zip(vit.n_heads, lost, strict=True))
    sizes = [sum(weight.numel() for weight in each.model.parameters()) for each in (vit, smaller)]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("name", ["timm ViT", "transformers ViT"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_may_lose_all_its_heads_and_is_then_no_layer_with_attention(name, layer, opened, noise):
    vit = opened(name)
    heads = {(layer, head) for head in range(vit.n_heads[layer])}
    found, expected, removed = removed_and_masked(vit, noise(vit), heads)
    assert_within(found, expected)
    assert open_vit(removed.module, image_size=vit.image_size).n_layers == vit.n_layers - 1


@pytest.mark.parametrize("name", list(REFUSED))
def test_attention_that_cannot_be_taken_apart_is_refused_with_the_reason(name, opened):
    assert REFUSED[name] in why_not_removable(opened(name))


def test_a_refusal_names_the_layer_and_the_layouts_that_work(opened):
    vit = opened("torchvision vit_b_16")
    with pytest.raises(Unsupported, match=r"Heads of L0 cannot be removed.*fused qkv.*can be masked"):
        remove_heads(vit, {(0, 0)})


def test_a_head_that_is_not_there_is_refused(opened):
    vit = opened("timm ViT")
    with pytest.raises(UsageError, match=r"L0H9 is not a head of this model.*L0 has H0 to H2"):
        remove_heads(vit, {(0, 9)})


def test_what_names_no_heads_or_a_head_twice_is_refused(opened, noise):
    vit = opened("timm ViT")
    for wrong, words in (([5], "names no heads"), ([(0, 1.5)], "names no heads"), ([(0, 1), (0, 1)], "a head twice")):
        for refuse in (remove_heads, lambda vit, heads: logits_without(vit, noise(vit), heads)):
            with pytest.raises(UsageError, match=words):
                refuse(vit, wrong)
        with pytest.raises(UsageError, match=words):
            predictions_without(vit, noise(vit), [wrong])
    named, paired = (logits_without(vit, noise(vit), heads) for heads in ("L0H1,L2H0", [(0, 1), (2, 0)]))
    assert torch.equal(named, paired)


def test_the_users_model_keeps_its_weights_and_shares_those_that_did_not_change(opened, noise):
    vit = opened("timm ViT")
    before = {name: value.clone() for name, value in vit.model.state_dict().items()}
    removed = remove_heads(vit, {(1, 0)}).module
    for name, value in vit.model.state_dict().items():
        assert_close(value, before[name], rtol=0, atol=0)
    assert removed.blocks[0].attn.qkv.weight is vit.model.blocks[0].attn.qkv.weight
    assert removed.blocks[1].attn.qkv.weight.shape[0] == vit.model.blocks[1].attn.qkv.weight.shape[0] * 2 // 3


@pytest.mark.parametrize("name", ["timm ViT", "torchvision vit_b_16"])
def test_predictions_without_heads_are_those_of_the_masked_model_whether_removed_or_not(name, opened, noise):
    vit, sets = opened(name), [(), ((0, 0),), ((0, 0), (1, 1)), ((1, 1), (0, 0))]
    found = predictions_without(vit, noise(vit), sets)
    for answers, heads in zip(found, sets, strict=True):
        assert answers.tolist() == logits_without(vit, noise(vit), heads).argmax(-1).tolist()


def test_predictions_of_a_model_without_classifier_are_refused(opened, noise):
    vit = opened("timm ViT, no classifier")
    with pytest.raises(Unsupported, match="no classifier"):
        predictions_without(vit, noise(vit), [()])


# --- on disk ---------------------------------------------------------------------------------------------------------

HEADS = {(0, 1), (1, 0), (1, 1), (1, 2), (2, 0)}

ALONE = """
import sys, torch
from load import load
model = load()
answer = model(torch.load(sys.argv[1], weights_only=True))
torch.save(getattr(answer, "logits", answer).detach(), sys.argv[2])
assert "vitrail" not in sys.modules
"""


def saved_timm(folder: Path):
    """A small random timm ViT of three layers, opened by its name."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, embed_dim=48, depth=3, num_heads=3, num_classes=5)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return open_vit(folder, class_names=["ant", "bee", "cat", "dog", "eel"])


def saved_transformers(folder: Path):
    """The same of transformers."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=48, num_labels=5
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return open_vit(folder, class_names=["ant", "bee", "cat", "dog", "eel"], mean=0.4, std=0.3)


@pytest.fixture(scope="module", params=[saved_timm, saved_transformers])
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    vit = request.param(folder / "whole")
    save_pruned(vit, remove_heads(vit, HEADS), folder / "smaller")
    return vit, folder / "smaller"


def test_the_folder_opens_in_vitrail_and_answers_as_the_masked_model(written, noise):
    vit, folder = written
    again = open_vit(folder)
    assert again.n_heads == (2, 2)  # the middle layer lost all of its heads
    assert again.preprocessing == vit.preprocessing
    assert again.n_classes == vit.n_classes
    assert again.class_names == vit.class_names
    assert_within(again.logits(noise(vit)), logits_without(vit, noise(vit), HEADS))


def test_the_folder_opens_with_its_own_library_alone(written, noise, tmp_path):
    vit, folder = written
    torch.save(noise(vit), tmp_path / "images.pt")
    command = [sys.executable, "-c", ALONE, str(tmp_path / "images.pt"), str(tmp_path / "answers.pt")]
    subprocess.run(command, cwd=folder, check=True)
    assert_within(torch.load(tmp_path / "answers.pt", weights_only=True), logits_without(vit, noise(vit), HEADS))


def test_a_library_that_is_not_told_of_the_heads_refuses_the_weights(written):
    _, folder = written
    if "model_type" in json.loads((folder / "config.json").read_text()):
        with pytest.raises(RuntimeError, match="size"):
            transformers.ViTForImageClassification.from_pretrained(folder)
    else:
        with pytest.raises(RuntimeError, match="size mismatch"):
            timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_heads_can_be_removed_again_and_the_record_counts_the_whole_models_heads(written, noise, tmp_path):
    vit, folder = written
    once = open_vit(folder)
    save_pruned(once, remove_heads(once, {(0, 0)}), tmp_path / "again")
    twice = open_vit(tmp_path / "again")
    assert_within(twice.logits(noise(vit)), logits_without(vit, noise(vit), HEADS | {(0, 0)}))
    kept = [
        change["kept"] for change in json.loads((tmp_path / "again" / "config.json").read_text())["pruned"].values()
    ]
    assert kept == [[2], [], [1, 2]]


def test_a_folder_with_other_files_is_not_written_to(opened, tmp_path):
    vit = opened("timm ViT")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        save_pruned(vit, remove_heads(vit, {(0, 0)}), tmp_path)


def test_a_pruned_folder_opens_only_as_it_was_written(written):
    _, folder = written
    with pytest.raises(UsageError, match="leave out --image-size"):
        open_vit(folder, image_size=96)


def test_a_module_of_no_library_can_be_made_smaller_but_not_written(opened, tmp_path):
    vit = opened("transformers ViT, 48 x 80 px")
    if hasattr(vit.model, "config"):
        vit = open_vit(_Wrapped(vit.model), image_size=vit.image_size)
    removed = remove_heads(vit, {(0, 0)})
    with pytest.raises(Unsupported, match="neither timm nor transformers"):
        save_pruned(vit, removed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class _Wrapped(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images)
