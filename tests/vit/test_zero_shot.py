"""A whole CLIP model and prompts: the classifier that the libraries' own code makes of them."""

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
import transformers
from torch import nn

from vitrail.errors import Unsupported, UsageError
from vitrail.models.open import open_vit
from vitrail.models.zero_shot import zero_shot

VISION = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
WORDS = ("a", "cat", "dog", "photo", "of", "bird")
IMAGES = torch.randn((2, 3, 64, 64), generator=torch.Generator().manual_seed(0))


def _clip(kind="CLIP"):
    vision = VISION | {"image_size": 64, "patch_size": 16}
    text = TEXT | {"vocab_size": 40, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    text |= {"pad_token_id": 1}
    if kind == "Siglip":
        vision, text = vision | {"hidden_size": 32, "num_attention_heads": 2}, text | {"projection_size": 32}
    shared = {"projection_dim": 24} if kind == "CLIP" else {}
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text, **shared)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}Model")(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP folder as transformers writes it, with a vocabulary of six words."""
    path = tmp_path_factory.mktemp("clip")
    _clip().save_pretrained(path)
    tokens, pairs = ["<|startoftext|>", "<|endoftext|>"], []
    for word in WORDS:  # byte pairs put each word together from its letters
        parts = [*word[:-1], f"{word[-1]}</w>"]
        tokens += parts
        while len(parts) > 1:
            pairs.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            tokens.append(parts[0])
    numbers = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (path / "vocab.json").write_text(json.dumps(numbers))
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(pairs)) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>", "model_max_length": 12}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 64}, "do_resize": True}
    processor |= {"do_center_crop": True, "crop_size": {"height": 64, "width": 64}, "do_normalize": True}
    processor |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_rescale": True, "resample": 3}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def test_a_folder_and_a_file_of_prompts_give_the_libraries_own_logits(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffa cat\na photo of a dog\n\na bird\n")
    vit = open_vit(folder, prompts=prompts)
    assert (vit.task.kind, vit.class_names) == ("classes", ("a cat", "a photo of a dog", "a bird"))
    assert vit.preprocessing.mean == (0.1, 0.2, 0.3)
    assert vit.anatomy.grid == (4, 4)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        ["a cat", "a photo of a dog", "a bird"], padding=True, return_tensors="pt"
    )
    assert (tokens["input_ids"] >= 2).sum() == 9  # every word is known
    with torch.no_grad():
        expected = model(pixel_values=IMAGES, **tokens).logits_per_image
    torch.testing.assert_close(vit.tap().read(IMAGES), expected)
    again = open_vit(**vit.opened_with)
    assert again.weight_digest == vit.weight_digest


def test_prompts_of_one_class_are_averaged(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\ta cat\ncat\ta photo of a cat\ndog\ta dog\n")
    vit = open_vit(folder, prompts=prompts)
    assert vit.class_names == ("cat", "dog")
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        images = F.normalize(model.vision_model(IMAGES).pooler_output @ model.visual_projection.weight.T, dim=-1)
        rows = []
        for texts in (["a cat", "a photo of a cat"], ["a dog"]):
            hidden = model.text_model(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
            rows.append(F.normalize(F.normalize(hidden @ model.text_projection.weight.T, dim=-1).mean(0), dim=-1))
        expected = images @ torch.stack(rows).T * model.logit_scale.exp()
    torch.testing.assert_close(vit.logits(IMAGES), expected)


def test_siglip_asks_for_each_text_alone():
    model = _clip("Siglip")
    texts = torch.randn((3, 32), generator=torch.Generator().manual_seed(1))
    vit = open_vit(model, prompts=dict(zip(["cat", "dog", "bird"], texts, strict=True)), weights="random")
    assert vit.task.kind == "labels"
    with torch.no_grad():
        images = F.normalize(model.vision_model(IMAGES).pooler_output, dim=-1)
        expected = images @ F.normalize(texts, dim=-1).T * model.logit_scale.exp() + model.logit_bias
    torch.testing.assert_close(vit.logits(IMAGES), expected)


class _Elsewhere(nn.Module):
    """A model on a device where no tokens are made."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Linear(3, 4)
        self.logit_scale = nn.Parameter(torch.ones(()))
        self.text_projection = nn.Parameter(torch.empty(3, 4))

    def encode_text(self, tokens):
        assert tokens.device == self.text_projection.device
        return tokens.float() @ self.text_projection

    def encode_image(self, images):
        return self.visual(images)


def test_tokens_of_prompts_go_where_the_model_is():
    clip = _Elsewhere().to("meta")
    classifier, task = zero_shot(clip, {"cat": ["a cat"], "dog": ["a dog"]}, lambda texts: torch.ones(len(texts), 3))
    assert (task.n_classes, {each.device.type for each in classifier.parameters()}) == (2, {"meta"})


def test_an_open_clip_model_takes_prompts_with_its_own_tokenizer():
    vision = {"image_size": 64, "patch_size": 16, "width": 48, "layers": 2, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()
    vit = open_vit(model, prompts=["a cat", "a dog"], weights="random")
    with torch.no_grad():
        features = model.encode_image(IMAGES, normalize=True)
        texts = model.encode_text(open_clip.tokenize(["a cat", "a dog"]), normalize=True)
        expected = model.logit_scale.exp() * features @ texts.T
    torch.testing.assert_close(vit.logits(IMAGES), expected)


def test_what_is_missing_or_does_not_fit_is_said(fresh, folder, tmp_path):
    with pytest.raises(Unsupported, match=r"compares images with texts, which are missing.*--prompts"):
        open_vit(_clip())
    with pytest.raises(UsageError, match="tokenizer of this CLIPModel is not known"):
        open_vit(_clip(), prompts=["a cat", "a dog"])
    with pytest.raises(UsageError, match=r"have \[5\] numbers and the image features 24"):
        open_vit(_clip(), prompts={"cat": torch.ones(5), "dog": torch.ones(5)})
    with pytest.raises(Unsupported, match="Prompts make classes only of a model that compares images with texts"):
        open_vit(fresh("timm ViT"), prompts=["a cat", "a dog"])
    with pytest.raises(UsageError, match="name 1 class;"):
        open_vit(folder, prompts=["a cat"])
    with pytest.raises(UsageError, match="cannot be read"):
        open_vit(folder, prompts=tmp_path / "none.txt")
