"""Every form of a model's name, every option, and what is refused."""

import json
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from safetensors.torch import save_file
from torch import nn

import vitrail
from vitrail.cli.entry import HUB_REQUESTS, main
from vitrail.contract.check import differences, footprint
from vitrail.errors import ModelError, NoAttention, StudyError, UnknownModel, Unsupported, UsageError, WeightsMismatch
from vitrail.models.open import open_vit
from vitrail.tap.attention import Readers

TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}


@torch.no_grad()
def _runs(vit, grid=None) -> torch.Tensor:
    """Logits under the tap are bitwise those without it, and every layer was read."""
    images = torch.randn((4, 3, *vit.image_size), generator=torch.Generator().manual_seed(0))
    images = images.to(next(vit.model.parameters()).dtype)
    layers = []
    logits = vit.tap().read(images, Readers(attention=lambda attention: layers.append(attention.layer)))
    assert_array_equal(logits.float().numpy(), vit.logits(images).float().numpy())
    assert layers == list(range(vit.n_layers))
    if grid:
        assert vit.anatomy.grid == grid
    return logits


# --- timm ------------------------------------------------------------------------------------------------------------


def test_a_timm_name_with_random_weights_another_size_and_class_count():
    vit = open_vit("timm:vit_tiny_patch16_224", weights="random", image_size=(48, 80), n_classes=5)
    assert vit.name == "timm:vit_tiny_patch16_224"
    assert (vit.n_layers, vit.n_classes, vit.image_size) == (12, 5, (48, 80))
    assert _runs(vit, (3, 5)).shape == (4, 5)
    assert "12 layers, 3 heads, 48x80 px, 5 classes" in repr(vit)


def test_no_classifier_gives_a_feature_vector():
    vit = open_vit("timm:vit_tiny_patch16_224", weights="random", image_size=32, n_classes=0)
    assert vit.n_classes is None
    assert _runs(vit).shape == (4, 192)


def test_a_weights_file_is_loaded_and_its_digest_tells_it_from_another(tmp_path, fresh):
    import timm

    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pth")
    options = {"image_size": 32, "n_classes": 5}
    one = open_vit("timm:vit_tiny_patch16_224", weights=tmp_path / "w.safetensors", **options)
    two = open_vit("timm:vit_tiny_patch16_224", weights=str(tmp_path / "w.pth"), **options)
    other = open_vit("timm:vit_tiny_patch16_224", weights="random", **options)
    assert one.weight_digest == two.weight_digest != other.weight_digest
    for name, value in model.state_dict().items():
        assert_array_equal(one.model.state_dict()[name].numpy(), value.numpy())


@torch.no_grad()
def test_the_digest_of_weights_follows_what_is_written_to_them(fresh):
    model = fresh("timm ViT")
    vit = open_vit(model, image_size=64)
    digests = [vit.weight_digest]
    model.head.bias.add_(1)
    digests.append(vit.weight_digest)
    model.head.bias.data = model.head.bias.data + 1
    digests.append(vit.weight_digest)
    model.head.bias = nn.Parameter(model.head.bias + 1)
    digests.append(vit.weight_digest)
    assert len(set(digests)) == 4
    assert digests[-1] == open_vit(model, image_size=64).weight_digest
    kept = vit._digest
    assert (vit.weight_digest, vit._digest) == (digests[-1], kept)


def test_random_weights_are_the_same_every_time_and_leave_the_callers_random_numbers_alone():
    options = {"weights": "random", "image_size": 32, "n_classes": 5}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one = open_vit("timm:vit_tiny_patch16_224", **options)
    assert_array_equal(torch.rand(3), expected)
    assert open_vit("timm:vit_tiny_patch16_224", **options).weight_digest == one.weight_digest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("norm.bias"), "1 missing: norm.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 not in the model: extra"),
        (lambda state: state.update({"norm.bias": torch.zeros(7)}), r"norm.bias is \[7\], not \[192\]"),
    ],
)
def test_a_weights_file_that_does_not_fit_is_refused_with_the_difference(change, says, tmp_path):
    import timm

    state = dict(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).state_dict())
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsMismatch, match=says):
        open_vit("timm:vit_tiny_patch16_224", weights=tmp_path / "w.safetensors", image_size=32, n_classes=5)


def test_weights_that_would_have_to_be_unpickled_are_refused(tmp_path):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "w.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    for name in ("w.pth", "broken.safetensors"):
        with pytest.raises(WeightsMismatch, match="never unpickles"):
            open_vit("timm:vit_tiny_patch16_224", weights=tmp_path / name, image_size=32)
    with pytest.raises(WeightsMismatch, match="no weights file"):
        open_vit("timm:vit_tiny_patch16_224", weights=tmp_path / "absent.safetensors", image_size=32)


def test_a_local_timm_folder_opens_with_its_class_names(tmp_path):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": {"img_size": 32, "depth": 2},
        "label_names": ["sea", "sky", "sand"],
        "pretrained_cfg": {
            "input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 3,
            "interpolation": "bicubic", "crop_pct": 1.0, "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    vit = open_vit(tmp_path)
    assert vit.class_names == ("sea", "sky", "sand")
    assert vit.image_size == (32, 32)
    _runs(vit, (2, 2))
    for name, value in model.state_dict().items():
        assert_array_equal(vit.model.state_dict()[name].numpy(), value.numpy())


# --- transformers ----------------------------------------------------------------------------------------------------


def _saved(folder, kind, **options):
    import transformers

    kind = getattr(transformers, kind)
    model = kind(kind.config_class(**{**TINY, "image_size": 32, "patch_size": 16, **options}))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("kind", "classes"),
    [
        ("ViTForImageClassification", 3),
        ("Dinov2ForImageClassification", 3),
        ("CLIPVisionModel", None),
        ("SiglipVisionModel", None),
        ("DINOv3ViTModel", None),
    ],
)
def test_a_saved_transformers_folder_opens_with_its_own_weights(kind, classes, tmp_path):
    labels = {"id2label": {0: "sea", 1: "sky", 2: "sand"}} if classes else {}
    model = _saved(tmp_path, kind, **labels)
    vit = open_vit(tmp_path)
    assert type(vit.model) is type(model)
    assert vit.n_classes == classes
    assert vit.class_names == (("sea", "sky", "sand") if classes else None)
    for name, value in model.state_dict().items():
        assert_array_equal(vit.model.state_dict()[name].numpy(), value.numpy())
    _runs(vit, (2, 2))


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_tower_with_a_classifier_opens_with_its_classes(kind, tmp_path):
    import transformers

    text = {**TINY, "vocab_size": 50, "max_position_embeddings": 8}
    towers = {"text_config": text, "vision_config": {**TINY, "image_size": 32, "patch_size": 16}}
    labels = {"id2label": {0: "sea", 1: "sky", 2: "sand"}}
    model = getattr(transformers, f"{kind}ForImageClassification")(
        getattr(transformers, f"{kind}Config")(**towers, **labels)
    ).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    vit = open_vit(tmp_path)
    assert (vit.n_classes, vit.class_names) == (3, ("sea", "sky", "sand"))
    with torch.no_grad():
        assert_array_equal(vit.logits(images).numpy(), model(images).logits.numpy())
    assert open_vit(f"hf:{tmp_path}", n_classes=3).n_classes == 3
    assert open_vit(f"hf:{tmp_path}", weights="random", n_classes=5).n_classes == 5
    features = open_vit(f"hf:{tmp_path}", n_classes=0)
    assert (features.n_classes, str(features.task.kind)) == (None, "embedding")


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "Dinov2ForImageClassification", "CLIPVisionModel"])
def test_a_transformers_model_opens_at_another_image_size(kind, tmp_path):
    _saved(tmp_path, kind)
    vit = open_vit(f"hf:{tmp_path}", image_size=(48, 80))
    assert vit.image_size == (48, 80)
    _runs(vit, (3, 5))


def test_masked_autoencoders_opened_by_name_see_every_patch_in_its_place(tmp_path):
    _saved(tmp_path, "ViTMAEModel")
    vit = open_vit(f"hf:{tmp_path}", image_size=64)
    assert vit.anatomy.notes == ()
    _runs(vit, (4, 4))


def test_a_weights_file_for_a_transformers_model_may_carry_its_own_names(tmp_path):
    model = _saved(tmp_path / "model", "ViTMAEModel")
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    vit = open_vit(f"hf:{tmp_path / 'model'}", weights=tmp_path / "w.safetensors")
    _runs(vit)


def test_a_transformers_folder_that_holds_only_a_pickle_is_refused(tmp_path):
    _saved(tmp_path, "ViTForImageClassification")
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        open_vit(tmp_path)


def test_a_text_model_in_a_folder_is_refused_before_it_runs(tmp_path):
    import transformers

    transformers.BertModel(transformers.BertConfig(vocab_size=50, **TINY)).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="no vision model"):
        open_vit(f"hf:{tmp_path}")


def test_code_that_a_folder_brings_is_never_run_and_nobody_is_asked(tmp_path, monkeypatch):
    mark = tmp_path / "it-ran"
    code = "from transformers import PreTrainedConfig\nclass Mine(PreTrainedConfig):\n    model_type = 'mine'\n"
    (tmp_path / "mine.py").write_text(f"open({str(mark)!r}, 'w').close()\n{code}")
    own = {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoConfig": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question that nobody may be there to answer"))
    with pytest.raises(Unsupported, match=r"code of its own, which Vitrail never runs.*open_vit\(model\)"):
        open_vit(f"hf:{tmp_path}", weights="random")
    calls = [
        (path.name, line.strip())
        for path in Path(vitrail.__file__).parent.rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"\bAuto\w+\.from_pretrained\(", line) and "trust_remote_code=False" not in line
    ]
    assert (calls, mark.exists()) == ([], False)


# --- torchvision, open_clip ------------------------------------------------------------------------------------------


def test_a_torchvision_name_opens_with_random_weights():
    vit = open_vit("tv:vit_b_32", weights="random", image_size=64, n_classes=4)
    assert (vit.n_layers, vit.n_classes) == (12, 4)
    _runs(vit, (2, 2))


def test_an_open_clip_name_opens_its_image_tower():
    vit = open_vit("openclip:ViT-B-32", weights="random", image_size=64)
    assert (vit.n_layers, vit.n_classes) == (12, None)
    assert vit.preprocessing.mean[0] == pytest.approx(0.48145466)
    _runs(vit, (2, 2))


# --- modules of one's own --------------------------------------------------------------------------------------------


def test_a_module_of_ones_own_is_not_touched(fresh):
    model = fresh("timm ViT").train()
    model.blocks[0].eval()
    before = footprint(model)
    vit = open_vit(model, image_size=64, precision="bfloat16", class_names=np.array(list("abcdefg")))
    _runs(vit)
    assert vit.model is not model
    assert differences(before, footprint(model)) == []
    assert not any("forward" in vars(module) for module in model.modules())
    assert next(model.parameters()).dtype is torch.float32
    assert vit.class_names == tuple("abcdefg")


def test_a_module_of_ones_own_is_used_as_it_is_where_it_may_be(fresh):
    model = fresh("own module, list of pairs")
    vit = open_vit(model, image_size=64)
    assert vit.model is model
    assert vit.n_classes == 7
    assert vit.name == "module:_ListOfPairs"
    _runs(vit, (4, 4))


def test_a_module_without_parameters_is_refused_for_what_it_lacks():
    with pytest.raises(NoAttention):
        open_vit(nn.Identity(), image_size=64)


def test_a_module_whose_output_is_no_vector_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images):
            return {"maps": images * self.weight}

    with pytest.raises(ModelError):
        open_vit(Odd(), image_size=32)


# --- names and options that lead nowhere -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timm:vit_tiny_patch16_22", "Did you mean vit_tiny_patch16_224"),
        ("tv:vit_b_61", "Did you mean vit_b_16"),
        ("openclip:ViT-B-31", "Did you mean ViT-B-32"),
        ("vit_tiny_patch16_224", "leads to no model. Write timm:NAME"),
        ("keras:vit", "leads to no model"),
        ("timm:", "leads to no model"),
        ("weights.safetensors", "holds weights, not an architecture"),
    ],
)
def test_an_unknown_name_is_refused_with_what_to_write(name, says):
    with pytest.raises(UnknownModel, match=says):
        open_vit(name, weights="random")


def test_folders_without_a_readable_configuration_are_refused(tmp_path):
    with pytest.raises(UnknownModel, match=r"no config\.json"):
        open_vit(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnknownModel, match="cannot be read as JSON"):
        open_vit(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnknownModel, match="neither a timm 'architecture' nor a 'model_type'"):
        open_vit(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    with pytest.raises(WeightsMismatch, match=r"no model\.safetensors"):
        open_vit(tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"precision": "float8"}, "float32, bfloat16, float16, float64"),
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"class_names": ["one"]}, "1 class names were given for a model of 7 classes"),
    ],
)
def test_options_without_meaning_are_refused_with_those_that_have(options, says, fresh):
    with pytest.raises(UsageError, match=says):
        open_vit(fresh("timm ViT"), image_size=64, **options)


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float64", torch.float64)])
def test_precision_is_that_of_weights_and_images(precision, dtype, fresh):
    vit = open_vit(fresh("timm ViT"), image_size=64, precision=precision)
    assert next(vit.model.parameters()).dtype is dtype
    assert _runs(vit).dtype is dtype


# --- real weights ----------------------------------------------------------------------------------------------------


def test_real_weights_open_and_every_promise_holds(shared):
    from vitrail.contract.check import check_vit

    weights = shared / "data" / "models" / "deit_tiny_patch16_224.safetensors"
    vit = open_vit("timm:deit_tiny_patch16_224", weights=weights)
    report = check_vit(vit, quick=True)
    assert report.ok, report.text()
    assert_array_equal([report.finding("logits unchanged").figure, report.finding("prune = surgery").figure], 0)


# --- a function in a file of one's own -------------------------------------------------------------------------------

SOURCE = """
import timm
from beside import DEPTH

def small():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=DEPTH, num_classes=4)

def larger():
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=DEPTH, num_classes=4)

def number():
    return 3

def broken():
    raise ValueError("no such depth")
"""


@pytest.fixture
def own_file(tmp_path):
    (tmp_path / "beside.py").write_text("DEPTH = 2\n")
    (tmp_path / "my_model.py").write_text(SOURCE)
    return tmp_path / "my_model.py"


def timm_folder(folder: Path) -> Path:
    """A folder in timm's own form, of one block."""
    import timm

    folder.mkdir()
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "model_args": shape,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **shape)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def test_a_folder_opens_again_from_another_folder(tmp_path, monkeypatch):
    timm_folder(tmp_path / "own")
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    vit = open_vit("own")
    assert open_vit("vitrail:photos").opened_with["model"] == "vitrail:photos"
    monkeypatch.chdir(tmp_path / "photos")
    assert open_vit(vit.opened_with["model"]).weight_digest == vit.weight_digest


def test_a_function_in_a_file_gives_the_model_the_same_each_time(own_file, tmp_path):
    vit, again = open_vit(f"{own_file}:small"), open_vit(f"{own_file}:small")
    assert (vit.n_layers, vit.n_classes, vit.name) == (2, 4, f"{own_file}:small")
    assert vit.weight_digest == again.weight_digest
    assert vit.opened_with["model"] == f"{own_file}:small"
    _runs(vit, (2, 2))
    state = {name: value + 1 for name, value in vit.model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    other = open_vit(f"{own_file}:small", weights=tmp_path / "w.safetensors")
    assert_array_equal(other.model.state_dict()["norm.bias"].numpy(), state["norm.bias"].numpy())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_model.py", "name the function in it that returns the model: .*my_model.py:FUNCTION"),
        ("my_model.py:large", "has no function 'large'; it has small, larger, number, broken"),
        ("my_model.py:number", "returned int; Vitrail needs a torch.nn.Module"),
        ("my_model.py:broken", "raised ValueError at line 15: no such depth"),
        ("absent.py:small", "There is no file .*absent.py"),
    ],
)
def test_a_function_that_gives_no_model_is_refused_with_the_reason(name, says, own_file):
    with pytest.raises(UnknownModel, match=says):
        open_vit(str(own_file.parent / name))


def test_a_study_never_runs_a_python_file_that_it_names(own_file, tmp_path):
    from PIL import Image

    from vitrail import run_study
    from vitrail.study.reopen import reopen

    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32), (90, 20, 160)).save(tmp_path / "images" / "one.png")
    vit = open_vit(f"{own_file}:small", mean=0.5, std=0.5)
    run_study(vit, tmp_path / "images", out=tmp_path / "study", measures=["head_divergence"])
    own_file.write_text("raise SystemExit")
    with pytest.raises(UnknownModel, match=r"runs a Python file only when you name it"):
        reopen(tmp_path / "study")


def test_the_model_of_a_study_opens_again_where_the_user_names_it(own_file, tmp_path):
    from PIL import Image

    from vitrail import run_study
    from vitrail.study.reopen import reopen

    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32), (90, 20, 160)).save(tmp_path / "images" / "one.png")
    named = open_vit(f"{own_file}:small", mean=0.5, std=0.25)
    handed = open_vit(named.model, mean=0.5, std=0.25)
    batch = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    for vit, study in ((named, tmp_path / "named"), (handed, tmp_path / "handed")):
        run_study(vit, tmp_path / "images", out=study, measures=["head_divergence"])
        again = reopen(study, model=f"{own_file}:small")
        assert again.preprocessing == vit.preprocessing
        assert torch.equal(again.logits(batch), vit.logits(batch))
        assert reopen(study, model=vit) is vit
    with pytest.raises(UnknownModel, match=r"handed to the study as a Python object.*--model FILE\.py:FUNCTION"):
        reopen(tmp_path / "handed")
    other = open_vit("vitrail:photos")
    with pytest.raises(WeightsMismatch, match="studied with other weights"):
        reopen(tmp_path / "handed", model=other)
    own_file.write_text(SOURCE.replace("def small():", "def small():\n    __import__('torch').manual_seed(5)"))
    with pytest.raises(WeightsMismatch, match="studied with other weights"):
        reopen(tmp_path / "named", model=f"{own_file}:small")
    with pytest.raises(WeightsMismatch, match=r"larger is not the model of this study, .* Opened as that was, it says"):
        reopen(tmp_path / "named", model=f"{own_file}:larger")


def test_a_model_that_has_moved_since_its_study_is_found_where_it_is_named(tmp_path):
    from PIL import Image

    from vitrail import run_study
    from vitrail.study.reopen import reopen

    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32), (90, 20, 160)).save(tmp_path / "images" / "one.png")
    folder = timm_folder(tmp_path / "own")
    run_study(open_vit(folder), tmp_path / "images", out=tmp_path / "study", measures=["head_divergence"])
    folder.rename(tmp_path / "moved")
    with pytest.raises(UnknownModel, match=r"own, is not where it was\. Name it where it is now, with --model\."):
        reopen(tmp_path / "study")
    assert reopen(tmp_path / "study", model=tmp_path / "moved").n_layers == 1
    (tmp_path / "study" / "model.json").write_text(json.dumps(["broken"]))
    with pytest.raises(StudyError, match="does not say how the model was opened"):
        reopen(tmp_path / "study")


def test_a_study_with_a_target_opens_with_the_same_target_alone(tmp_path):
    from PIL import Image

    from vitrail import run_study
    from vitrail.study.reopen import reopen

    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64), (90, 20, 160)).save(tmp_path / "images" / "one.png")
    folder = timm_folder(tmp_path / "own")
    n_outputs = open_vit(folder).logits(torch.zeros(1, 3, *open_vit(folder).image_size)).shape[-1]
    direction = [1.0] + [0.5] * (n_outputs - 1)
    first = open_vit(folder, target=lambda output: output[:, 0])
    for vit, study in ((first, "function"), (open_vit(folder, target=direction), "vector"), (open_vit(folder), "none")):
        run_study(vit, tmp_path / "images", out=tmp_path / study, measures=["prefix_share"])
    assert reopen(tmp_path / "vector").task.target.vector == direction
    assert reopen(tmp_path / "function", model=first) is first
    for model in (None, folder):
        with pytest.raises(UnknownModel, match=r"the target .*<lambda>, which is not stored .* `model=vit`"):
            reopen(tmp_path / "function", model=model)
    second = open_vit(folder, target=lambda output: output[:, 1])
    with pytest.raises(UsageError, match="was opened has another function of that name"):
        reopen(tmp_path / "function", model=second)
    with pytest.raises(UsageError, match="studied with no target"):
        reopen(tmp_path / "none", model=first)
    with pytest.raises(UsageError, match="the model that was opened has no target"):
        vitrail.show(tmp_path / "function", open_vit(folder))


def test_random_weights_are_the_same_each_time():
    digests = {open_vit("timm:vit_tiny_patch16_224", weights="random", image_size=32).weight_digest for _ in range(2)}
    assert len(digests) == 1


def test_a_timm_folder_with_sharded_weights_opens(tmp_path):
    import timm

    state = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=2).state_dict()
    names = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(state)}
    for file in sorted(set(names.values())):
        save_file({name: state[name] for name in state if names[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "model_args": {"img_size": 32, "depth": 2},
        "pretrained_cfg": {"input_size": [3, 32, 32], "num_classes": 3, "first_conv": "patch_embed.proj"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    vit = open_vit(tmp_path)
    for name, value in state.items():
        assert_array_equal(vit.model.state_dict()[name].numpy(), value.numpy())


def test_a_torchvision_model_without_a_classifier_gives_features():
    vit = open_vit("tv:vit_b_32", weights="random", image_size=64, n_classes=0)
    assert vit.n_classes is None
    assert _runs(vit, (2, 2)).shape == (4, 768)


@pytest.mark.parametrize("name", ["timm ViT", "transformers ViT"])
def test_gradients_through_the_tap_are_those_without_gradient_checkpointing(name, fresh):
    from vitrail.tap.edits import Edit

    gradients = []
    for checkpointing in (False, True):
        model = fresh(name)
        if checkpointing:
            names = ("set_grad_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
            next(getattr(model, name) for name in names if hasattr(model, name))()
            model.train()
        vit = open_vit(model, image_size=64)
        images = torch.randn((2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
        gate = torch.ones((2, vit.n_heads[1]), requires_grad=True)
        with torch.enable_grad():
            vit.tap().read(images, edits=[Edit(1, gate=gate)])[:, 0].sum().backward()
        gradients.append(gate.grad.numpy())
        assert model.training == checkpointing
    assert abs(gradients[0]).max() > 1e-4
    assert_array_equal(gradients[0], gradients[1])


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "hf:no/such-model", "openclip:ViT-B-32/openai"])
def test_a_model_whose_files_cannot_be_had_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip({"timm": "timm", "hf": "transformers", "openclip": "open_clip"}[name.partition(":")[0]])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UnknownModel, match="are not on this computer, and the Hugging Face Hub cannot be reached"
    ) as refused:
        open_vit(name)
    assert len(str(refused.value)) < 300


def test_a_hub_that_does_not_answer_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger(HUB_REQUESTS)
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logging.getLogger(), "filters", [])
    monkeypatch.setattr(sys, "argv", ["vitrail", "--version"])
    with pytest.raises(SystemExit):
        main()
    for retry in range(5):
        logger.warning("'[Errno -2] Name or service not known' thrown, retry %d", retry)
    assert capfd.readouterr().err == "The Hugging Face Hub does not answer; asking again, for half a minute at most.\n"


CHOOSY = """
from torch import nn

class Choosy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 16, 16)

    def forward(self, images):
        assert images.shape[-1] % 48 == 0
        return self.embed(images).mean((2, 3))
"""


def test_an_assertion_without_a_message_is_told_by_its_line(tmp_path):
    (tmp_path / "choosy.py").write_text(CHOOSY)
    with pytest.raises(Unsupported, match=r"\(AssertionError: assert images\.shape\[-1\] % 48 == 0\)"):
        open_vit(f"{tmp_path / 'choosy.py'}:Choosy", image_size=64, mean=(0.5,) * 3, std=(0.5,) * 3, weights="random")
