"""Checkpoints as training programs write them: which weights are taken, what is said, and what is refused."""

import argparse
import json
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from numpy.testing import assert_array_equal
from safetensors.torch import save_file
from torch import nn

from vitrail.errors import WeightsMismatch
from vitrail.models.checkpoint import fit_weights
from vitrail.models.open import open_vit

NAME, SIZE = "timm:vit_tiny_patch16_224", 32


class _Tiny(nn.Module):
    """A body and a classifier of five classes."""

    def __init__(self, n_classes: int = 5) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, n_classes)


def _state(seed: int = 0, **options) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(_Tiny(**options).state_dict())


def _prefix(state, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def _fit(weights, n_classes: int | None = 5):
    return fit_weights(weights, _Tiny(), n_classes, None)


def _assert_same(tensors, state) -> None:
    assert tensors.keys() == state.keys()
    for name, value in state.items():
        assert_array_equal(tensors[name].numpy(), value.numpy())


FORMS = {
    "plain": lambda state: state,
    "timm's train.py": lambda state: {
        "epoch": 3,
        "arch": "tiny",
        "state_dict": OrderedDict(state),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(4, 4)}}, "param_groups": [{"params": [0]}]},
        "args": argparse.Namespace(lr=0.1, mean=None, layers=[1, 2]),
        "metric": 0.5,
    },
    "Lightning": lambda state: {
        "pytorch-lightning_version": "2.4",
        "state_dict": {**_prefix(state, "model."), "criterion.weight": torch.ones(3)},
        "hyper_parameters": {"lr": 1e-3},
        "optimizer_states": [{"state": {}}],
    },
    "Lightning, deeper": lambda state: {"state_dict": _prefix(state, "net.encoder.")},
    "DataParallel": lambda state: {"model": _prefix(state, "module.")},
    "compiled": lambda state: _prefix(state, "_orig_mod."),
    "compiled by block and DataParallel": lambda state: {
        "module." + name.replace("blocks.", "blocks._orig_mod."): value for name, value in state.items()
    },
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".pth.tar"])
@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_training_programs_give_the_models_own_names(form, suffix, tmp_path):
    state = _state()
    torch.save(FORMS[form](state), tmp_path / f"w{suffix}")
    fitted = _fit(tmp_path / f"w{suffix}")
    assert fitted.problems == ""
    _assert_same(fitted.tensors, state)


def test_a_checkpoint_of_torchs_older_form_is_read_too(tmp_path):
    content = {"state_dict": OrderedDict(_state()), "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    _assert_same(_fit(tmp_path / "w.pth").tensors, _state())


def test_tensors_of_other_modules_are_left_out_and_named(tmp_path):
    torch.save(FORMS["Lightning"](_state()), tmp_path / "w.ckpt")
    assert "under 'model.', without 1 of other modules (criterion.weight)" in _fit(tmp_path / "w.ckpt").source


@pytest.mark.parametrize(
    ("content", "taken", "other"),
    [
        ({"state_dict": _state(1), "state_dict_ema": _state(2)}, "state_dict_ema", "state_dict"),
        ({"student": _state(1), "teacher": _state(2), "optimizer": {"state": {}}}, "teacher", "student"),
        ({"model": _state(1), "model_ema": _state(2)}, "model_ema", "model"),
    ],
)
def test_of_several_weights_the_averaged_are_taken_and_said_and_the_others_can_be_named(
    content, taken, other, tmp_path
):
    path = tmp_path / "w.pth"
    torch.save(content, path)
    fitted = _fit(path)
    _assert_same(fitted.tensors, content[taken])
    assert fitted.source.startswith(f"{taken} of {path}; it also holds {other}; name one as w.pth:{other}")
    fitted = _fit(f"{path}:{other}")
    _assert_same(fitted.tensors, content[other])
    assert fitted.source.startswith(f"{other} of {path}")
    with pytest.raises(WeightsMismatch, match=rf"no weights under 'absent'; it has {next(iter(content))}"):
        _fit(f"{path}:absent")


def test_a_loss_with_tensors_of_its_own_is_not_taken_for_the_model(tmp_path):
    torch.save({"teacher_loss": {"center": torch.ones(1, 3)}, "weights": _state()}, tmp_path / "w.pth")
    _assert_same(_fit(tmp_path / "w.pth").tensors, _state())


def test_a_model_that_lies_twice_in_one_dictionary_must_be_named(tmp_path):
    path = tmp_path / "w.ckpt"
    torch.save({"state_dict": {**_prefix(_state(1), "model."), **_prefix(_state(2), "ema.")}}, path)
    with pytest.raises(WeightsMismatch, match=r"several times, under model, ema\. Name one: w\.ckpt:model"):
        _fit(path)
    _assert_same(_fit(f"{path}:ema").tensors, _state(2))


def test_half_precision_is_taken_to_the_models_own_exactly(tmp_path):
    half = {name: value.half() for name, value in _state().items()}
    torch.save(half, tmp_path / "w.pth")
    model = _Tiny()
    model.load_state_dict(fit_weights(tmp_path / "w.pth", model, 5, None).tensors)
    for name, value in model.state_dict().items():
        assert value.dtype is torch.float32
        assert_array_equal(value.numpy(), half[name].numpy().astype("float32"))


def test_quantised_weights_are_refused_by_their_type(tmp_path):
    torch.save(_state() | {"head.weight": torch.ones(5, 4, dtype=torch.int8)}, tmp_path / "w.pth")
    assert r"head.weight is [5, 4] int8, not [5, 4]" in _fit(tmp_path / "w.pth").problems


# --- shards ----------------------------------------------------------------------------------------------------------


def _shards(folder: Path, **changes: str) -> Path:
    state = _state()
    names = list(state)
    save_file({name: state[name] for name in names[:3]}, folder / "model-00001.safetensors")
    save_file({name: state[name] for name in names[3:]}, folder / "model-00002.safetensors")
    weight_map = {name: f"model-0000{1 if name in names[:3] else 2}.safetensors" for name in names} | changes
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / "model.safetensors.index.json"


def test_sharded_safetensors_are_read_by_their_index_or_folder(tmp_path):
    index = _shards(tmp_path)
    _assert_same(_fit(index).tensors, _state())
    _assert_same(_fit(tmp_path).tensors, _state())


@pytest.mark.parametrize(
    ("shard", "says"),
    [
        ("model-00003.safetensors", "names the shard model-00003.safetensors, which is not in"),
        ("../model-00001.safetensors", "no safetensors file beside it"),
        ("model-00001.bin", "no safetensors file beside it"),
        ("model-00002.safetensors", r"lack 1 of its tensors: extra"),
    ],
)
def test_an_index_whose_shards_do_not_hold_its_tensors_is_refused(shard, says, tmp_path):
    with pytest.raises(WeightsMismatch, match=says):
        _fit(_shards(tmp_path, extra=shard))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(text, tmp_path):
    (tmp_path / "w.index.json").write_text(text)
    with pytest.raises(WeightsMismatch, match="no index of sharded safetensors"):
        _fit(tmp_path / "w.index.json")


# --- refusals --------------------------------------------------------------------------------------------------------


class _Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new_form", [True, False])
def test_a_file_with_other_objects_is_refused_by_their_names_and_never_unpickled(new_form, tmp_path):
    content = {"state_dict": _state(), "trap": _Trap(tmp_path / "sprung")}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=new_form)
    with pytest.raises(WeightsMismatch) as refusal:
        _fit(tmp_path / "w.pth")
    assert f"beside its tensors ({os.mkdir.__module__}.mkdir)" in str(refusal.value)
    assert "never unpickles" in str(refusal.value)
    assert "\x1b" not in str(refusal.value)
    assert not (tmp_path / "sprung").exists()


def test_a_whole_module_is_refused_with_its_class(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(WeightsMismatch, match=r"objects beside its tensors \(torch\.nn\.modules\.linear\.Linear"):
        _fit(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "says"),
    [([1, 2], "holds a list, not tensors by name"), ({"epoch": 3}, "no tensors by name"), ({}, "no tensors by name")],
)
def test_a_file_without_weights_is_refused_with_what_it_holds(content, says, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsMismatch, match=says):
        _fit(tmp_path / "w.pth")


def test_weights_of_another_model_are_refused_with_names_of_both(tmp_path):
    torch.save({"conv.weight": torch.ones(2), "conv.bias": torch.ones(2)}, tmp_path / "w.pth")
    problems = _fit(tmp_path / "w.pth").problems
    assert problems == (
        "it holds 2 tensors (conv.weight, conv.bias) and none of the model's 6 "
        "(blocks.0.weight, blocks.0.bias, blocks.1.weight ...)"
    )


# --- through open_vit ------------------------------------------------------------------------------------------------


def _vit(n_classes: int, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", img_size=SIZE, num_classes=n_classes)


def test_a_changed_classifier_gives_its_number_of_classes(tmp_path):
    model = _vit(7)
    torch.save({"state_dict": _prefix(model.state_dict(), "model.")}, tmp_path / "w.ckpt")
    vit = open_vit(NAME, weights=tmp_path / "w.ckpt", image_size=SIZE)
    assert vit.n_classes == 7
    assert "7 classes, as in the file" in vit.weights_source
    assert "weights: state_dict of" in repr(vit)
    _assert_same(vit.model.state_dict(), model.state_dict())
    with pytest.raises(WeightsMismatch, match=r"head.weight is \[7, 192\], not \[3, 192\]"):
        open_vit(NAME, weights=tmp_path / "w.ckpt", image_size=SIZE, n_classes=3)


def test_the_backbone_of_dinos_teacher_opens_without_a_classifier(tmp_path):
    state = _vit(0).state_dict()
    content = {
        part: {**_prefix(weights, "module.backbone."), "module.head.mlp.0.weight": torch.ones(8, 192)}
        for part, weights in (("student", _vit(0, seed=4).state_dict()), ("teacher", state))
    }
    torch.save(content | {"args": argparse.Namespace(arch="vit_tiny"), "epoch": 1}, tmp_path / "checkpoint.pth")
    vit = open_vit(NAME, weights=tmp_path / "checkpoint.pth", image_size=SIZE)
    assert vit.n_classes is None
    assert "teacher of" in vit.weights_source
    assert "without 1 of other modules (module.head.mlp.0.weight)" in vit.weights_source
    assert "no classifier, as in the file" in vit.weights_source
    _assert_same(vit.model.state_dict(), state)


def test_position_embeddings_that_the_library_resamples_are_named(tmp_path):
    save_file(_vit(5).state_dict(), tmp_path / "w.safetensors")
    vit = open_vit(NAME, weights=tmp_path / "w.safetensors", image_size=48)
    assert "resampled by the model's library: pos_embed from [1, 5, 192] to [1, 10, 192]" in vit.weights_source


def test_a_transformers_model_takes_a_changed_classifier_from_a_bin_file(tmp_path):
    import transformers

    options = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    config = transformers.ViTConfig(image_size=SIZE, patch_size=16, **options)
    config.save_pretrained(tmp_path / "model")
    config.num_labels = 4
    model = transformers.ViTForImageClassification(config)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    text = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(text | {"architectures": [type(model).__name__]}))
    vit = open_vit(tmp_path / "model", weights=tmp_path / "pytorch_model.bin")
    assert vit.n_classes == 4
    _assert_same(vit.model.state_dict(), model.state_dict())
