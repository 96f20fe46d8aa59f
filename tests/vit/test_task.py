"""What a model's output means: found from its library, its configuration or its last layer, or asked for."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import timm
import torch
import transformers
from torch import nn

from vitrail.analysis import unavailable
from vitrail.contract.check import check_vit
from vitrail.errors import Unsupported, UsageError
from vitrail.models.choose import OutputReader
from vitrail.models.open import open_vit
from vitrail.models.task import module_task

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}


def _timm(name="vit_tiny_patch16_224", **options):
    shape = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
    return timm.create_model(name, **shape | options).eval()


def _transformers(**options):
    config = transformers.ViTConfig(**SMALL, image_size=64, **options)
    return transformers.ViTForImageClassification(config).eval()


@dataclass
class _Fields:
    features: torch.Tensor
    scores: torch.Tensor


class _Named(NamedTuple):
    features: torch.Tensor
    scores: torch.Tensor


class _Own(nn.Module):
    """A backbone and what people put on top of it."""

    def __init__(self, wrap, **layers):
        super().__init__()
        self.backbone = _timm(num_classes=0)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.wrap = wrap

    def forward(self, images):
        return self.wrap(self, self.backbone(images))


def _own(wrap, **layers):
    return _Own(wrap, **layers).eval()


def _task(model, **options):
    task = open_vit(model, image_size=64, **options).task
    return task.kind, task.n_outputs


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_labels": 5}, ("classes", 5)),
        ({"num_labels": 5, "problem_type": "single_label_classification"}, ("classes", 5)),
        ({"num_labels": 5, "problem_type": "multi_label_classification"}, ("labels", 5)),
        ({"num_labels": 5, "problem_type": "regression"}, ("regression", 5)),
        ({"num_labels": 1}, ("regression", 1)),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, ("labels", 1)),
    ],
)
def test_the_problem_type_of_a_transformers_classifier_is_its_task(options, expected):
    assert _task(_transformers(**options)) == expected


def test_the_same_holds_for_a_folder_and_inside_a_wrapper(tmp_path):
    model = _transformers(id2label={0: "dog", 1: "cat", 2: "car"}, problem_type="multi_label_classification")
    model.save_pretrained(tmp_path)
    vit = open_vit(tmp_path)
    assert (vit.task.kind, vit.n_classes, vit.class_names) == ("labels", 3, ("dog", "cat", "car"))
    wrapped = _own(lambda self, _: self.inner(self.images).logits, inner=model)
    wrapped.register_forward_pre_hook(lambda module, arguments: setattr(module, "images", arguments[0]))
    assert _task(wrapped) == ("labels", 3)
    assert open_vit(model, image_size=64).class_names == ("dog", "cat", "car")


def test_timm_says_it_by_its_number_of_classes():
    assert _task(_timm()) == ("classes", 7)
    assert _task(_timm(num_classes=0))[0] == "embedding"
    assert _task(_timm(num_classes=1)) == ("regression", 1)
    assert _task("timm:vit_base_patch32_clip_224.openai", weights="random")[0] == "embedding"
    assert _task(_timm("vit_base_patch32_clip_224.openai", num_classes=7)) == ("classes", 7)


def test_towers_and_features_are_no_classifiers(fresh):
    tower = open_vit(fresh("open_clip ViT-B-32"), image_size=128)
    assert (tower.task.kind, tower.n_classes) == ("embedding", None)
    assert _task(_own(lambda self, features: features))[0] == "embedding"  # as torch.hub's DINO
    assert _task(_own(lambda self, features: self.head(features), head=nn.Identity()))[0] == "embedding"


def test_a_detection_transformer_is_no_classifier_of_its_channels():
    config = transformers.YolosConfig(**SMALL, image_size=[64, 64], num_detection_tokens=10, num_labels=5)
    vit = open_vit(transformers.YolosForObjectDetection(config).eval(), image_size=64)
    assert (vit.task.kind, vit.n_classes) == ("none", None)
    reasons = unavailable(vit, ["head_probability", "head_output_shift", "head_cls_shift"])
    assert "YolosForObjectDetection" in reasons["head_output_shift"]
    assert "no classifier" in reasons["head_probability"]


@pytest.mark.parametrize("name", ["head", "fc", "classifier"])
def test_a_linear_layer_with_a_classifiers_name_gives_classes_and_says_so(name):
    vit = open_vit(_own(lambda self, x: getattr(self, name)(x), **{name: nn.Linear(48, 6)}), image_size=64)
    assert (vit.task.kind, vit.n_classes) == ("classes", 6)
    assert f"its output is that of its linear layer {name}" in repr(vit)
    one = _own(lambda self, x: getattr(self, name)(x), **{name: nn.Linear(48, 1)})
    assert _task(one) == ("regression", 1)


class _HeadWithIdentity(nn.Module):
    """As timm's ClassifierHead: what is switched off by nn.Identity comes after the linear layer."""

    def __init__(self, n_classes):
        super().__init__()
        self.fc = nn.Linear(32, n_classes) if n_classes else nn.Identity()
        self.flatten = nn.Identity()

    def forward(self, features):
        return self.flatten(self.fc(features))


@pytest.mark.parametrize(("n_classes", "kind", "words"), [(5, "classes", "head.fc"), (0, "embedding", "nn.Identity")])
def test_an_identity_behind_the_classifier_does_not_make_it_a_feature_vector(n_classes, kind, words):
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(nn.Conv2d(3, 32, 16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    model.add_module("head", _HeadWithIdentity(n_classes))
    task = module_task(model.eval(), (64, 64), OutputReader())
    assert task.kind == kind
    assert words in task.source


def test_an_output_that_nothing_explains_is_asked_for_where_it_matters():
    model = _own(lambda self, x: self.last(x), last=nn.Linear(48, 6))
    vit = open_vit(model, image_size=64)
    assert check_vit(vit, quick=True).ok
    assert "task not known" in repr(vit)
    with pytest.raises(UsageError, match=r'6 numbers per image.*"classes"'):
        unavailable(vit, ["head_probability"])
    assert _task(model, task="labels") == ("labels", 6)
    assert _task(model, n_classes=6) == ("classes", 6)
    assert _task(model, class_names=list("abcdef")) == ("classes", 6)
    assert _task(model, n_classes=0)[0] == "embedding"
    assert _task(model, task="regression") == ("regression", 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "class"}, "choose from classes, labels"),
        ({"task": "classes", "n_classes": 0}, "n_classes=0 says"),
        ({"task": "embedding", "n_classes": 7}, "no meaning"),
        ({"n_classes": 5}, "has 7 numbers per image"),
        ({"target": torch.zeros(7)}, "no direction"),
        ({"target": "dog"}, "no meaning"),
    ],
)
def test_what_does_not_fit_the_output_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        open_vit(_timm(), image_size=64, **options)


@pytest.mark.parametrize(
    ("wrap", "last_step"),
    [
        (lambda self, x: self.head(x).softmax(-1), "softmax"),
        (lambda self, x: self.head(x).exp() / self.head(x).exp().sum(-1, keepdim=True), "softmax"),
        (lambda self, x: torch.sigmoid(self.head(x)), "sigmoid"),
        (lambda self, x: {"scores": nn.functional.softmax(self.head(x), 1)}, "softmax"),
    ],
)
def test_probabilities_are_no_logits(wrap, last_step):
    """Another softmax or sigmoid of them gave wrong probabilities, and wrong importance of heads."""
    model = _own(wrap, head=nn.Linear(48, 7))
    for options in ({"task": "classes"}, {"task": "labels"}):
        with pytest.raises(UsageError, match=f"its last step is a {last_step}"):
            open_vit(model, image_size=64, **options)
    model.num_classes = 7
    with pytest.raises(UsageError, match=f"without that {last_step}"):
        open_vit(model, image_size=64)
    assert _task(model, task="none")[0] == "none"


@pytest.mark.parametrize(
    "wrap", [lambda self, x: self.head(x).log_softmax(-1), lambda self, x: self.head(x * x.sigmoid())]
)
def test_log_probabilities_are_logits_and_a_sigmoid_inside_says_nothing(wrap):
    assert _task(_own(wrap, head=nn.Linear(48, 7)), task="classes") == ("classes", 7)


def test_one_output_cannot_be_classes():
    with pytest.raises(UsageError, match='"labels"'):
        open_vit(_timm(num_classes=1), image_size=64, task="classes")
    assert _task(_timm(num_classes=1), task="labels") == ("labels", 1)


def test_a_single_number_beside_the_features_is_no_output_of_its_own():
    model = _own(lambda self, x: (x, None, self.head.weight[0, 0].exp()), head=nn.Linear(48, 7))
    vit = open_vit(model, image_size=64, task="embedding")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(vit.logits(images), model(images)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("wrap", "listed", "output"),
    [
        (lambda self, x: (x, self.head(x)), r"0 \[1, 48\], 1 \[1, 7\]", 1),
        (lambda self, x: {"features": x, "scores": self.head(x)}, r"'features' .*'scores' \[1, 7\]", "scores"),
        (lambda self, x: _Fields(x, self.head(x)), r"'features' .*'scores' \[1, 7\]", "scores"),
        (lambda self, x: _Named(x, self.head(x)), r"'features' .*'scores' \[1, 7\]", "scores"),
        (lambda self, x: _Named(x, self.head(x)), r"'features' .*'scores' \[1, 7\]", 1),
    ],
)
def test_several_outputs_are_listed_at_opening_and_one_is_named(wrap, listed, output):
    model = _own(wrap, head=nn.Linear(48, 7))
    with pytest.raises(UsageError, match=listed):
        open_vit(model, image_size=64)
    with pytest.raises(UsageError, match="'no'"):
        open_vit(model, image_size=64, output="no")
    vit = open_vit(model, image_size=64, output=output)
    assert vit.n_classes == 7
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        returned = model(images)
        expected = returned[output] if not hasattr(returned, "scores") else returned.scores
        torch.testing.assert_close(vit.logits(images), expected, rtol=0, atol=0)
    assert check_vit(vit, quick=True).ok


def test_one_number_for_each_image_is_a_value():
    """As a mean squared error needs it, `head(x).squeeze(-1)`."""
    model = _own(lambda self, x: self.head(x).squeeze(-1), head=nn.Linear(48, 1))
    vit = open_vit(model, image_size=64)
    assert (vit.task.kind, vit.task.n_outputs) == ("regression", 1)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(vit.logits(images), model(images)[:, None], rtol=0, atol=0)
    assert check_vit(vit, quick=True).ok
    with pytest.raises(Unsupported, match="7 rows for 1 image"):
        open_vit(_own(lambda self, x: self.head(x)[0], head=nn.Linear(48, 7)), image_size=64)
