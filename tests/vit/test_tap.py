"""The tap beside other threads, modes, precisions, gradients, compilers and failing readers."""

import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

from vitrail.contract.check import check_vit, differences, footprint
from vitrail.contract.tiny_models import FAMILIES, Family, run_contract
from vitrail.contract.tiny_models.other_models import torchvision_vit
from vitrail.errors import NoAttention, TapError, Unsupported, UsageError
from vitrail.models.open import open_vit, require_vit
from vitrail.tap.attention import Readers
from vitrail.tap.clone import require_images
from vitrail.tap.edits import Edit
from vitrail.tap.tap import Tap

VIT = "timm ViT"
NATIVE = "torchvision vit_b_16"
MODES = torch._C._len_torch_function_stack


def _listening() -> tuple[Readers, list[int]]:
    layers: list[int] = []
    return Readers(attention=lambda attention: layers.append(attention.layer)), layers


def _equal(one: torch.Tensor, other: torch.Tensor) -> None:
    assert_array_equal(one.detach().float().numpy(), other.detach().float().numpy())


# --- threads and nesting ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_two_tapping_threads_and_an_untapped_one_do_not_disturb_each_other(fresh, noise):
    vit = open_vit(torchvision_vit(), image_size=64)
    images = noise(vit)
    plain = vit.logits(images)
    pruned = vit.tap().read(images, edits=[Edit(1, prune=(2,))])
    seen: dict[str, list[torch.Tensor]] = {"read": [], "edit": []}

    def tapping(name: str, edits: list[Edit]) -> None:
        with torch.no_grad():
            for _ in range(20):
                readers, layers = _listening()
                seen[name].append(vit.tap().read(images, readers, edits))
                assert layers == [0, 1, 2]

    threads = [
        threading.Thread(target=tapping, args=("read", [])),
        threading.Thread(target=tapping, args=("edit", [Edit(1, prune=(2,))])),
    ]
    for thread in threads:
        thread.start()
    untapped = [vit.model(images) for _ in range(20)]
    for thread in threads:
        thread.join()
    assert len(seen["read"]) == len(seen["edit"]) == 20
    for logits in (*untapped, *seen["read"]):
        _equal(logits, plain)
    for logits in seen["edit"]:
        _equal(logits, pruned)


def test_each_thread_has_its_own_tap(opened):
    vit, taps = opened(VIT), []
    thread = threading.Thread(target=lambda: taps.append(vit.tap()))
    thread.start()
    thread.join()
    assert taps[0] is not vit.tap()
    assert vit.tap() is vit.tap()


@torch.no_grad()
def test_a_reader_that_runs_its_own_model_is_told_so_and_another_model_may_run(opened, noise):
    vit, other = opened(VIT), opened("transformers ViT")
    images, elsewhere = noise(vit), []
    with pytest.raises(TapError, match="already being tapped"):
        vit.tap().read(images, Readers(attention=lambda attention: vit.tap().read(images)))
    assert MODES() == 0

    def look_elsewhere(attention):
        readers, layers = _listening()
        elsewhere.append(other.tap().read(images, readers))
        assert layers == [0, 1, 2]

    _equal(vit.tap().read(images, Readers(attention=look_elsewhere)), vit.logits(images))
    for logits in elsewhere:
        _equal(logits, other.logits(images))
    assert len(elsewhere) == 3


# --- exceptions ------------------------------------------------------------------------------------------------------


class _BrokenError(Exception):
    pass


@pytest.mark.parametrize("name", [VIT, NATIVE, "timm Swin", "transformers ViT, eager"])
@pytest.mark.parametrize("what", ["attention", "output", "residual"])
@torch.no_grad()
def test_an_exception_in_a_reader_reaches_the_caller_and_leaves_nothing(name, what, opened, noise):
    vit = opened(name)
    images = noise(vit, 2)
    plain, before = vit.logits(images), footprint(vit.model)

    def fail(*_):
        raise _BrokenError

    with pytest.raises(_BrokenError):
        vit.tap().read(images, Readers(**{what: fail}))
    assert MODES() == 0
    assert differences(before, footprint(vit.model)) == []
    readers, layers = _listening()
    _equal(vit.tap().read(images, readers), plain)
    assert layers == list(range(vit.n_layers))


@torch.no_grad()
def test_a_keyboard_interrupt_in_a_reader_leaves_nothing(opened, noise):
    vit = opened(NATIVE)
    images = noise(vit)

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vit.tap().read(images, Readers(attention=interrupt))
    assert MODES() == 0
    _equal(vit.tap().read(images), vit.logits(images))


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [VIT, NATIVE, "timm Swin", "timm CaiT", "open_clip ViT-B-32"])
def test_gradients_of_the_input_are_bitwise_those_without_the_tap(name, opened, noise):
    vit = opened(name)
    plain, tapped = noise(vit, 2).requires_grad_(), noise(vit, 2).requires_grad_()
    readers, layers = _listening()
    vit.model(plain).square().sum().backward()
    vit.tap().read(tapped, readers).square().sum().backward()
    assert layers == list(range(vit.n_layers))
    assert float(plain.grad.abs().max()) > 0
    _equal(plain.grad, tapped.grad)
    vit.model.zero_grad()


def test_a_gate_has_the_gradient_that_pruning_shows_for_a_head_that_enters_linearly(fresh, noise):
    """d logits / d gate, taken by central differences."""
    vit = open_vit(fresh(VIT).double(), image_size=64, precision="float64")
    images = noise(vit, 2).double()
    gate = torch.ones((2, 3), dtype=torch.float64, requires_grad=True)
    vit.tap().read(images, edits=[Edit(1, gate=gate)])[:, 0].sum().backward()
    step = torch.zeros((2, 3), dtype=torch.float64)
    step[:, 1] = 1e-5
    with torch.no_grad():
        up, down = (vit.tap().read(images, edits=[Edit(1, gate=torch.ones_like(step) + s)]) for s in (step, -step))
    assert_allclose(gate.grad[:, 1].numpy(), ((up - down)[:, 0] / 2e-5).numpy(), rtol=1e-5, atol=1e-9)
    vit.model.zero_grad()


# --- modes and precisions --------------------------------------------------------------------------------------------


class _Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_mode_of_the_users_own_around_the_tap_sees_the_model_and_stays(opened, noise):
    vit, mode = opened(VIT), _Counting()
    images = noise(vit)
    plain = vit.logits(images)
    readers, layers = _listening()
    with mode, torch.device("cpu"):
        tapped = vit.tap().read(images, readers)
        assert MODES() == 2
    assert layers == [0, 1, 2]
    assert mode.calls > 20
    _equal(tapped, plain)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_reading_is_exact_in_every_gradient_mode(context, opened, noise):
    vit = opened(NATIVE)
    images = noise(vit)
    with context():
        readers, layers = _listening()
        _equal(vit.tap().read(images, readers), vit.model(images))
    assert layers == [0, 1, 2]


@pytest.mark.parametrize("name", [VIT, NATIVE, "timm Swin", "transformers ViT", "transformers ViT, eager", "timm CaiT"])
@torch.no_grad()
def test_logits_are_bitwise_the_same_under_autocast_to_bfloat16(name, opened, noise):
    vit = opened(name)
    images, sums = noise(vit), []

    def read(attention):
        if attention.row_stochastic:
            sums.append(attention.window_weights().float().sum(-1))

    with torch.autocast("cpu", torch.bfloat16):
        plain = vit.logits(images)
        tapped = vit.tap().read(images, Readers(attention=read))
    _equal(tapped, plain)
    assert sums
    for rows in sums:
        assert_allclose(rows.numpy(), 1, atol=2e-2)


@pytest.mark.parametrize("name", [VIT, "torchvision vit_b_16", "transformers ViT, eager"])
def test_every_promise_holds_with_bfloat16_weights(name, fresh):
    model = fresh(name)
    vit = open_vit(model, image_size=64, precision="bfloat16")
    report = check_vit(vit)
    assert report.ok, report.text()
    assert_allclose(report.finding("logits unchanged").figure, 0)
    assert next(model.parameters()).dtype is torch.float32


# --- unusual modules -------------------------------------------------------------------------------------------------


class _WeightsWanted(nn.Module):
    """A block that asks `nn.MultiheadAttention` for its weights, so the product is a bmm of folded heads."""

    def __init__(self, width: int = 32, *, batch_first: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.blocks = nn.ModuleList(nn.MultiheadAttention(width, 4, batch_first=batch_first) for _ in range(3))
        self.head = nn.Linear(width, 5)
        self.batch_first = batch_first

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        for block in self.blocks:
            tokens = tokens + block(tokens, tokens, tokens, need_weights=True)[0]
        return self.head(tokens.mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_attention_that_returns_its_weights_keeps_every_promise(batch_first):
    row = run_contract(Family("weights wanted", lambda: _WeightsWanted(batch_first=batch_first)))
    assert row.ok, row.report.text()
    assert row.anatomy.grid == (4, 4)
    assert {block.heads for block in row.anatomy.blocks} == {4}
    assert row.anatomy.blocks[0].layout.order == ("NLC" if batch_first else "LNC")


@torch.no_grad()
def test_the_averaged_weights_that_the_module_returns_are_the_mean_of_the_heads_read(noise):
    model = _WeightsWanted(batch_first=True).eval()
    vit = open_vit(model, image_size=64)
    images, maps = noise(vit), []
    vit.tap().read(images, Readers(attention=lambda attention: maps.append(attention.weights())))
    tokens = model.patches(images).flatten(2).transpose(1, 2)
    _, averaged = model.blocks[0](tokens, tokens, tokens, need_weights=True)
    assert_allclose(maps[0].mean(1).numpy(), averaged.numpy(), atol=1e-6)


@torch.no_grad()
def test_a_compiled_model_is_observed_uncompiled(fresh, noise):
    model = fresh(VIT)
    vit = open_vit(torch.compile(model), image_size=64)
    images = noise(vit)
    readers, layers = _listening()
    _equal(vit.tap().read(images, readers), model(images))
    assert layers == [0, 1, 2]


def test_a_scripted_model_is_refused_with_what_to_do(fresh):
    class Plain(nn.Module):
        def forward(self, images):
            return images.mean((2, 3))

    with pytest.warns((DeprecationWarning, FutureWarning), match="jit.trace"):
        scripted = torch.jit.trace(Plain(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(Unsupported, match="Open the model it was made from"):
        open_vit(scripted, image_size=8)


@torch.no_grad()
def test_weights_replaced_after_opening_are_seen(fresh, noise):
    model = fresh(VIT)
    vit = open_vit(model, image_size=64)
    images = noise(vit)
    before, digest = vit.tap().read(images), vit.weight_digest
    _equal(vit.logits(images), before)
    state = {name: value + 0.01 * torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    after = vit.tap().read(images)
    _equal(after, model(images))
    assert float((after - before).abs().max()) > 1e-3
    _equal(vit.logits(images), after)
    assert vit.weight_digest != digest


class _Steered(nn.Module):
    """A ViT whose answer a buffer, plain attributes, what a list or an array holds and an object's state change."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale, self.shifts, self.by_name = inner, 1.0, [0.0], {"last": {"gain": 1.0}}
        self.factors, self.switches = np.ones(1), bytearray([1])
        self.settings, self.named = _Settings(1.0), _Named()
        self.named.gain = 1.0
        self.register_buffer("temperature", torch.tensor(1.0))

    def forward(self, images):
        logits = self.inner(images) * self.temperature * self.scale * self.by_name["last"]["gain"]
        logits = logits * float(self.factors[0]) * self.switches[0] * self.settings.gain * self.named.gain
        return logits + self.shifts[-1]


class _Ablation:
    def __init__(self):
        self.gain = 1.0

    def hook(self, module, args, output):
        return output * self.gain


SEPARATE = _Ablation()


def _add_hook(model):
    model.handle = model.inner.blocks[1].register_forward_hook(lambda module, args, output: output * 0.5)


@dataclass(slots=True)
class _Settings:
    gain: float


class _Named(dict):
    """A dictionary with attributes."""


CHANGES = {
    "a hook is added": _add_hook,
    "it is removed": lambda model: model.handle.remove(),
    "a hook's object is changed": lambda model: setattr(model.ablation, "gain", 0.25),
    "a buffer is replaced": lambda model: setattr(model, "temperature", torch.tensor(3.0)),
    "a buffer is written to": lambda model: model.temperature.fill_(2.0),
    "an attribute": lambda model: setattr(model, "scale", 2.0),
    "what a list holds": lambda model: model.shifts.append(1.0),
    "what an inner dictionary holds": lambda model: model.by_name["last"].update(gain=0.5),
    "what an array holds": lambda model: model.factors.__setitem__(0, 3.0),
    "what an array of bytes holds": lambda model: model.switches.__setitem__(0, 2),
    "a slot of an object": lambda model: setattr(model.settings, "gain", 0.5),
    "an attribute of a dictionary": lambda model: setattr(model.named, "gain", 0.25),
    "an object that a hook alone uses": lambda model: setattr(SEPARATE, "gain", 0.25),
    "a module is taken out": lambda model: setattr(model.inner.blocks[0], "mlp", nn.Identity()),
    "pruned": lambda model: prune.l1_unstructured(model.inner.head, "weight", amount=0.1),
    "pruned again": lambda model: prune.l1_unstructured(model.inner.head, "weight", amount=0.8),
    "a parametrisation": lambda model: parametrize.register_parametrization(model.inner.head, "bias", _Doubled()),
}


class _Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@torch.no_grad()
def test_whatever_is_changed_after_opening_is_followed(fresh, noise):
    model = _Steered(fresh(VIT)).eval()
    ablation = _Ablation()
    model.inner.blocks[2].register_forward_hook(ablation.hook)
    model.inner.blocks[2].register_forward_hook(SEPARATE.hook)
    model.ablation = ablation
    vit = open_vit(model, image_size=64)
    images, before = noise(vit), vit.tap().read(noise(vit))
    for change, apply in CHANGES.items():
        apply(model)
        expected = model(images)
        assert not torch.equal(expected, before), change
        assert torch.equal(vit.logits(images), expected), change
        assert torch.equal(vit.tap().read(images), expected), change
        replay, logits = vit.tap().record(images)
        assert_allclose(vit.tap().run_from(1, replay), logits, rtol=1e-5, atol=1e-5)
        before = expected


class _Recorder:
    """Keeps what blocks return, as a method, as a callable, or beside the model that it is made for."""

    def __init__(self, model=None):
        self.model, self.n, self.outputs = model, 0, []

    def hook(self, module, args, output):
        self.n += 1
        self.outputs.append(output)

    __call__ = hook


@torch.no_grad()
def test_objects_whose_methods_are_hooks_see_the_passes(fresh, noise):
    model = fresh(VIT)
    recorders = [_Recorder() for _ in range(3)] + [_Recorder(model)]
    hooks = [recorders[0].hook, recorders[1], partial(recorders[2].hook), recorders[3].hook]
    for block, hook in zip([*model.blocks, model.blocks[0]], hooks, strict=True):
        block.register_forward_hook(hook)
    vit = open_vit(model, image_size=64)
    images, tap = noise(vit), vit.tap()
    for recorder in recorders:
        recorder.n = 0
        recorder.outputs.clear()
    clone = tap._clone
    logits = tap.read(images)
    _equal(vit.logits(images), logits)
    assert [recorder.n for recorder in recorders[:3]] == [2, 2, 2]
    assert [len(recorder.outputs) for recorder in recorders] == [2, 2, 2, 2]
    assert tap._clone is clone


@torch.no_grad()
def test_a_hook_that_keeps_tensors_on_the_model_is_no_change_of_it_and_a_hook_that_sets_a_number_is(fresh, noise):
    model = _Steered(fresh(VIT)).eval()
    model.kept = []

    def keep(module, args, output):
        model.last, model.pair, model.n_passes = output, (output, args[0]), n_passes[-1]
        model.kept.append(output)

    n_passes, stem_runs = [0], []
    model.inner.blocks[0].register_forward_hook(keep)
    model.inner.patch_embed.register_forward_hook(lambda *_: stem_runs.append(1))
    vit = open_vit(model, image_size=64)
    images, tap = noise(vit), vit.tap()
    replay, logits = tap.record(images)
    tap.run_from(1, replay)
    vit.logits(images)
    tapped, plain, n_runs = tap._clone, vit._plain, len(stem_runs)
    for _ in range(2):
        assert_allclose(tap.run_from(1, replay), logits, rtol=1e-5, atol=1e-5)
        tap.read(images)
        vit.logits(images)
    assert (tap._clone, vit._plain) == (tapped, plain)
    assert len(stem_runs) == n_runs + 6  # one for each of these passes
    model.last = torch.zeros(1)
    tap.read(images)
    assert tap._clone is not tapped
    tapped = tap._clone
    n_passes.append(1)
    tap.read(images)
    tap.read(images)
    assert tap._clone is not tapped
    model.scale = 3.0
    _equal(tap.read(images), 3 * logits)


@torch.no_grad()
def test_a_tensor_that_a_hook_kept_is_a_change_where_the_user_puts_it(fresh, noise):
    model = fresh(VIT)

    def keep(module, args, output):
        model.kept = output.mean(0, keepdim=True)

    model.blocks[0].register_forward_hook(keep)
    model.blocks[2].steer = None
    model.blocks[2].register_forward_pre_hook(
        lambda module, args: None if module.steer is None else (args[0] + module.steer,)
    )
    vit = open_vit(model, image_size=64)
    images, tap = noise(vit), vit.tap()
    plain = tap.read(images)
    tap.read(images)
    model.blocks[2].steer = model.kept
    steered = tap.read(images)
    assert not torch.allclose(steered, plain)
    assert_allclose(steered, model(images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_clone_is_kept_as_long_as_nothing_but_numbers_and_the_mode_change(fresh, noise):
    model = fresh(VIT)
    vit = open_vit(model, image_size=64)
    images = noise(vit)
    before, tap = vit.tap().read(images), vit.tap()
    tapped, plain = tap._clone, vit._plain
    model.train()
    for weight in model.parameters():
        weight.mul_(1.1)
    after = tap.read(images)
    assert not torch.equal(after, before)
    assert torch.equal(vit.logits(images), after)
    assert (tap._clone, vit._plain) == (tapped, plain)


@torch.no_grad()
def test_a_model_in_training_mode_is_read_in_evaluation_mode_and_stays_in_training(fresh, noise):
    model = fresh(VIT)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    vit = open_vit(model, image_size=64)
    images = noise(vit)
    _equal(vit.tap().read(images), vit.logits(images))
    assert all(module.training for module in model.modules())
    _equal(vit.tap().read(images), model.eval()(images))


@torch.no_grad()
def test_the_weights_are_shared_not_copied(opened):
    vit = opened(VIT)
    theirs = {parameter.data_ptr() for parameter in vit.model.parameters()}
    assert {parameter.data_ptr() for parameter in vit.tap()._clone.parameters()} == theirs


def test_images_of_another_type_than_the_weights_are_refused_with_what_to_do(fresh, noise):
    vit = open_vit(fresh(VIT), image_size=64)
    images = noise(vit).double()
    for run in (vit.logits, vit.tap().read, vit.tap().record):
        with pytest.raises(UsageError, match=r"images are torch\.float64 on cpu, and the weights torch\.float32"):
            run(images)
    vit.model.half()
    with pytest.raises(UsageError, match="open a model anew once it was moved or cast"):
        vit.logits(noise(vit).float())


@pytest.mark.parametrize("kind", [VIT, "transformers ViT", "torchvision vit_b_16"])
@pytest.mark.parametrize("shape", [(2, 3, 32, 64), (2, 1, 64, 64)])
def test_images_of_another_size_than_the_model_takes_are_refused_with_what_to_do(kind, shape, opened):
    vit = opened(kind)
    for run in (vit.logits, vit.tap().read, vit.tap().record):
        with pytest.raises(UsageError, match=rf"are {shape[1]} x {shape[2]} x 64 .* was opened for 3 x 64 x 64: "):
            run(torch.zeros(shape))


@pytest.mark.parametrize("given", [torch.zeros(3, 64, 64), [1], None, "cat.png"])
def test_what_is_no_batch_of_images_is_refused(given):
    with pytest.raises(UsageError, match=r"tensor \[image, channel, row, column\], and .* was given"):
        require_images(given)


def test_a_module_is_refused_where_an_opened_model_is_needed(fresh):
    with pytest.raises(UsageError, match=r"a VisionTransformer was given: vit = vitrail\.open_vit"):
        require_vit(fresh(VIT))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda vit: pickle.loads(pickle.dumps(vit))])
def test_an_opened_model_is_copied_and_pickled(fresh, noise, copied):
    vit = open_vit(fresh(VIT), image_size=64)
    images = noise(vit)
    with torch.no_grad():
        expected = vit.tap().read(images)
        other = copied(vit)
        _equal(other.tap().read(images), expected)
        _equal(other.logits(images), expected)
    assert other.weight_digest == vit.weight_digest
    assert other.model is not vit.model


# --- readers ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_residual_and_output_are_the_tokens_a_hook_on_the_model_sees(fresh, noise):
    model = fresh(VIT)
    vit = open_vit(model, image_size=64)
    images, residual, output, hooked, norm_inputs = noise(vit), {}, {}, {}, {}
    vit.tap().read(images, Readers(residual=residual.__setitem__, output=output.__setitem__))
    for layer, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, layer=layer: hooked.__setitem__(layer, out))
        block.norm2.register_forward_hook(lambda _, args, __, layer=layer: norm_inputs.__setitem__(layer, args[0]))
    model(images)
    for layer in range(3):
        _equal(output[layer], hooked[layer])
        _equal(residual[layer], norm_inputs[layer])


@torch.no_grad()
def test_a_stage_that_returns_another_order_of_axes_than_it_takes_returns_its_tokens(fresh, noise):
    name = "timm PVT v2"  # its first stage takes rows x columns x channels and returns channels x rows x columns
    model = fresh(name)
    vit = open_vit(model, image_size=64)
    images, output, hooked = noise(vit, 2), {}, []
    vit.tap().read(images, Readers(output=output.__setitem__))
    for stage in model.stages:
        stage.register_forward_hook(lambda _, __, out: hooked.append(out))
    model(images)
    assert output[0].shape == (2, vit.anatomy.blocks[0].tokens, 32)
    for layer, picture in enumerate(hooked):
        _equal(output[layer], picture.permute(0, 2, 3, 1).flatten(1, 2))


@torch.no_grad()
def test_a_block_that_hands_on_its_maps_too_returns_its_tokens(fresh, noise):
    name = "transformers Swin, eager"  # maps of its windows have more numbers than its tokens
    model = fresh(name)
    vit = open_vit(model, image_size=56)
    images, output, hooked = noise(vit, 2), {}, {}
    vit.tap().read(images, Readers(output=output.__setitem__))
    for layer, block in enumerate(vit.anatomy.blocks):
        hook = lambda _, __, out, layer=layer: hooked.__setitem__(layer, out[0])  # noqa: E731
        model.get_submodule(block.path).register_forward_hook(hook)
    model(images)
    assert [tuple(each.shape[:2]) for each in output.values()] == [(2, block.tokens) for block in vit.anatomy.blocks]
    for layer in range(vit.n_layers):
        _equal(output[layer], hooked[layer])


@torch.no_grad()
def test_copies_of_many_images_do_not_rely_on_what_a_single_image_showed(fresh, noise):
    """The residual is added outside of its blocks: a single row is broadcast to all copies, several are not."""
    vit = open_vit(fresh("own module, list of pairs"), image_size=64)
    for n_images in (1, 3):
        replay, logits = vit.tap().record(noise(vit, n_images))
        rows = vit.tap().run_from(1, replay, [Edit(1, copy=1, prune=(0,))], copies=2)
        expected = [logits, vit.tap().read(replay.images, edits=[Edit(1, prune=(0,))])]
        assert_allclose(rows.numpy(), torch.cat(expected).numpy(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_map_of_a_textbook_block_is_softmax_of_scaled_products(fresh, noise):
    model = fresh(VIT)
    vit = open_vit(model, image_size=64)
    images, seen = noise(vit), []
    vit.tap().read(images, Readers(attention=lambda a: seen.append((a.weights(), a.scale))))
    caught = []
    handle = model.blocks[0].attn.register_forward_hook(lambda _, args, __: caught.append(args[0]))
    model(images)
    handle.remove()
    attn = model.blocks[0].attn
    q, k, _ = attn.qkv(caught[0]).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    expected = torch.softmax(q @ k.mT / 4, -1)
    assert_allclose(seen[0][1], 0.25)
    assert_allclose(seen[0][0].numpy(), expected.numpy(), atol=1e-6)


@torch.no_grad()
def test_chunks_of_a_map_are_the_map(opened, noise):
    vit = opened(VIT)
    images, worst = noise(vit), []

    def read(attention):
        whole = attention.weights()
        pieces = list(attention.weights_in_chunks(max_bytes=1))
        assert len(pieces) == 4
        worst.extend(float((piece - whole[part]).abs().max()) for part, piece in pieces)

    vit.tap().read(images, Readers(attention=read))
    assert_allclose(worst, 0, atol=1e-6)


@torch.no_grad()
def test_chunks_of_an_edited_map_are_the_edited_map(opened, noise):
    vit = opened(VIT)
    maps = {}

    def read(attention):
        pieces = [piece for _, piece in attention.weights_in_chunks(max_bytes=1)]
        maps[attention.layer] = (torch.cat(pieces), attention.weights())

    vit.tap().read(noise(vit), Readers(attention=read), [Edit(1, drop_keys=(4,))])
    pieces, full = maps[1]
    assert_array_equal(full[..., 4].numpy(), 0)
    assert_array_equal(pieces.numpy(), full.numpy())


@torch.no_grad()
def test_chunks_of_a_map_within_windows_are_refused_not_those_of_the_first_window(opened, noise):
    vit = opened("transformers Swin")

    def read(attention):
        if attention.windows > 1:
            with pytest.raises(Unsupported, match="within 4 windows"):
                list(attention.weights_in_chunks(max_bytes=1))

    vit.tap().read(noise(vit), Readers(attention=read))


@torch.no_grad()
def test_maps_of_windows_put_on_the_grid_give_the_blocks_own_output(opened, noise):
    """Zero between windows, rows that sum to 1, and the shifted layer joins other tokens than the unshifted."""
    vit = opened("timm Swin")
    joined = {}

    def read(attention):
        if attention.windows > 1:
            full = attention.weights_on_grid()
            assert_allclose(full.sum(-1).numpy(), 1, atol=1e-5)
            joined[attention.layer] = full[0, 0] > 0

    vit.tap().read(noise(vit, 1), Readers(attention=read))
    assert int(joined[0].sum()) == 28 * 28 * 49
    assert not torch.equal(joined[0], joined[1])
    assert bool(joined[0][0, 6 * 28 + 6])
    assert not bool(joined[0][0, 7])


# --- the check itself can fail ---------------------------------------------------------------------------------------


def test_the_check_names_the_promise_that_a_broken_tap_breaks(fresh, monkeypatch):
    vit = open_vit(fresh(VIT), image_size=64)
    correct = Tap._apply_edits

    def prune_next_head(self, state, position, raw):
        edits, layout = state.edits_of(position), self.anatomy.blocks[position.layer].calls[position.n_calls].layout
        result = correct(self, state, position, raw)
        if not edits:
            return result._replace(out=result.out * (1 + 1e-6))
        canonical = layout.canonical(raw.run(None, None), state.n_rows).clone()
        canonical[:, :, [(head + 1) % 3 for head in edits[0].prune]] = 0
        return result._replace(out=layout.original(canonical, raw.v))

    monkeypatch.setattr(Tap, "_apply_edits", prune_next_head)
    report = check_vit(vit, quick=True)
    assert not report.ok
    assert report.finding("logits unchanged").holds is False
    assert report.finding("prune = surgery").holds is False
    assert "BROKEN" in report.text()


def test_a_report_reads_as_text(opened):
    report = check_vit(opened(VIT), quick=True)
    assert report.ok
    assert "L0-L2" in report.text()
    assert "1 + 4x4" in report.text()
    assert f"preprocessing: {report.preprocessing}" in report.text().splitlines()
    assert f"weights: {report.weights}" in report.text().splitlines()
    assert len(report.text().splitlines()) == 3 + 2 + 2 + len(report.findings) + 2


def test_a_model_without_attention_has_no_tap():
    with pytest.raises(NoAttention, match="no attention call"):
        open_vit(next(family for family in FAMILIES if family.refused == "NoAttention").model(), image_size=64)


@pytest.mark.parametrize("what", ["attention", "output", "residual"])
@torch.no_grad()
def test_what_a_reader_raises_is_not_said_to_be_the_images(what, fresh):
    """A model of transformers casts the images that it is given, so those of another type are taken."""
    vit = open_vit(fresh("transformers ViT"), image_size=64, precision="bfloat16")
    images = torch.randn(2, 3, 64, 64)
    vit.logits(images)

    def fail(*_):
        raise RuntimeError("no room for more maps")

    with pytest.raises(RuntimeError, match="no room for more maps"):
        vit.tap().read(images, Readers(**{what: fail}))
    vit.model.register_forward_hook(fail)
    with pytest.raises(
        UsageError, match=r"RuntimeError: no room for more maps\)\. The images are torch\.float32 on cpu"
    ):
        vit.logits(images)


def test_what_a_reader_says_is_heard_also_inside_a_product() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 2), img_size=56, num_classes=3).eval()
    tap = open_vit(model).tap()

    def fail(_: object) -> None:
        raise TypeError("the reader's own words")

    with pytest.raises(TapError, match="the reader's own words"), torch.no_grad():
        tap.read(torch.zeros(1, 3, 56, 56), Readers(attention=fail))


# --- models that write to their tokens -------------------------------------------------------------------------------


class _Sums(nn.Module):
    """Sums of two tensors, in place where that is said, else new ones; those of some names only where they are said."""

    def __init__(self, where: str, *, in_place: bool) -> None:
        super().__init__()
        self.where, self.in_place = where, in_place

    def forward(self, name: str, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if name != self.where:
            return left if name in ("position", "between") else left + right
        return left.add_(right) if self.in_place else left + right


class _SummingBlock(nn.Module):
    def __init__(self, sums: _Sums) -> None:
        super().__init__()
        self.sums, self.num_heads = sums, 2
        self.position = nn.Parameter(torch.randn(17, 32))
        self.norm, self.qkv, self.proj = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.sums("position", x, self.position)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.sums("first sum", x, self.proj(attended))
        return self.sums("second sum", x, self.mlp(x))


def _keep_in(tokens: dict[tuple[str, int], torch.Tensor], kind: str) -> Callable[[int, torch.Tensor], None]:
    return lambda layer, each: tokens.__setitem__((kind, layer), each)


class _SummingModel(nn.Module):
    def __init__(self, where: str, *, in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sums = _Sums(where, in_place=in_place)
        self.patches, self.head = nn.Conv2d(3, 32, 16, 16), nn.Linear(32, 5)
        self.class_token = nn.Parameter(torch.randn(1, 1, 32))
        self.blocks = nn.ModuleList(_SummingBlock(self.sums) for _ in range(3))
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = self.sums("between", block(x), torch.ones(32))
        return self.head(x[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("where", ["position", "first sum", "second sum", "between"])
def test_a_model_that_writes_to_its_tokens_gives_the_numbers_of_one_that_does_not(where, noise):
    answers = []
    for in_place in (True, False):
        vit = open_vit(_SummingModel(where, in_place=in_place), image_size=64, weights="random")
        tap, images, tokens = vit.tap(), noise(vit, 2), {}
        readers = Readers(residual=_keep_in(tokens, "residual"), output=_keep_in(tokens, "output"))
        replay, logits = tap.record(images, readers)
        _equal(logits, vit.logits(images))
        for layer, copies in [(2, 1), (0, 2), (1, 1), (1, 2), (0, 1)]:
            rows = tap.run_from(layer, replay, copies=copies)
            assert_allclose(rows.numpy(), torch.cat([logits] * copies).numpy(), rtol=1e-4, atol=1e-5)
        edits = [Edit(1, prune=(0,)), Edit(2, prune=(1,))]
        pruned = tap.run_from(1, replay, edits)
        assert_allclose(pruned.numpy(), tap.read(images, edits=edits).numpy(), rtol=1e-4, atol=1e-5)
        answers.append((vit.anatomy, tokens, pruned))
    (anatomy, tokens, pruned), (plain_anatomy, plain_tokens, plain_pruned) = answers
    assert any(block.in_place for block in anatomy.blocks)
    assert (anatomy.notes, anatomy.grid, anatomy.class_token) == (plain_anatomy.notes, (4, 4), True)
    assert len(plain_tokens) == (3 if where == "position" else 6)  # whose residual is then no sum with its own input
    for key, each in plain_tokens.items():
        _equal(tokens[key], each)
    assert_allclose(pruned.numpy(), plain_pruned.numpy(), rtol=1e-4, atol=1e-5)


def test_gradients_by_tokens_that_are_written_to_are_those_by_the_tokens_as_they_were_returned(noise):
    gradients = []
    for in_place in (True, False):
        vit = open_vit(_SummingModel("between", in_place=in_place), image_size=64, weights="random")
        tokens: dict[int, torch.Tensor] = {}
        logits = vit.tap().read(noise(vit, 2), Readers(output=tokens.__setitem__))
        gradients.append(torch.autograd.grad(logits[:, 0].sum(), list(tokens.values())))
    for one, other in zip(*gradients, strict=True):
        _equal(one, other)


@torch.no_grad()
def test_tokens_are_copied_for_no_model_that_leaves_them_alone(opened, noise):
    vit = opened(VIT)
    assert not any(block.in_place for block in vit.anatomy.blocks)
    handed: dict[int, torch.Tensor] = {}
    replay, _ = vit.tap().record(noise(vit), Readers(output=handed.__setitem__))
    assert replay.blocks[1].args[0] is replay.blocks[0].output
    assert handed[0].data_ptr() == replay.blocks[0].output.data_ptr()


class _Asserting(_SummingModel):
    """Insists on all its tokens after the blocks."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        assert x.shape[1] == 17, "tokens"
        return self.head(x[:, 0])


@torch.no_grad()
def test_a_model_that_insists_on_all_its_tokens_is_given_them(noise):
    vit = open_vit(_Asserting(""), image_size=64, weights="random")
    replay, _ = vit.tap().record(noise(vit))
    edits = [Edit(1, prune=(0,))]
    rows = vit.tap().run_from(1, replay, edits)
    assert_allclose(rows.numpy(), vit.tap().read(replay.images, edits=edits).numpy(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_runs_from_a_block_that_never_give_the_models_answer_are_withheld(noise):
    class Drawing(_SummingModel):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            answer = super().forward(images)
            return answer + torch.randn_like(answer)

    vit = open_vit(Drawing(""), image_size=64, weights="random")
    replay, _ = vit.tap().record(noise(vit))
    with pytest.raises(TapError, match="do not give the model's own answer"):
        vit.tap().run_from(1, replay, copies=2)
    finding = check_vit(vit, quick=True).finding("heads batched")
    assert finding.holds is False
    assert "do not give the model's own answer" in finding.sentence


class _KeepingBlock(nn.Module):
    """Takes something of what the first block kept on the model: its values, or what its heads gave."""

    def __init__(self, kept: dict[str, torch.Tensor], kind: str) -> None:
        super().__init__()
        self.kept, self.kind, self.num_heads = kept, kind, 2
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, *, first: bool) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        v = self._with_kept("values", v, first=first)
        out = self._with_kept("outputs", nn.functional.scaled_dot_product_attention(q, k, v), first=first)
        return x + self.proj(out.transpose(1, 2).flatten(2))

    def _with_kept(self, kind: str, each: torch.Tensor, *, first: bool) -> torch.Tensor:
        if kind != self.kind:
            return each
        if first:
            self.kept[kind] = each
        return each + self.kept[kind]


class _KeepingModel(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.head = nn.Conv2d(3, 32, 16, 16), nn.Linear(32, 5)
        kept: dict[str, torch.Tensor] = {}
        self.blocks = nn.ModuleList(_KeepingBlock(kept, kind) for _ in range(3))
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).mT
        for index, block in enumerate(self.blocks):
            x = block(x, first=index == 0)
        return self.head(x.mean(1))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["values", "outputs"])
@pytest.mark.parametrize("n_images", [1, 3])
def test_runs_from_a_block_have_what_earlier_blocks_keep_on_the_model(kind, n_images, noise):
    """Each run has it of its own pass, whatever the run before it pruned and however many copies it had."""
    vit = open_vit(_KeepingModel(kind), image_size=64, weights="random", task="classes")
    tap, images = vit.tap(), noise(vit, n_images)
    replay, logits = tap.record(images)
    for layer in (0, 1, 2, 0, 2):
        edits = [Edit(layer, copy=copy, prune=(copy,)) for copy in range(2)]
        rows = tap.run_from(layer, replay, [*edits, Edit(2, prune=(1,))], copies=3)
        pruned = [tap.read(images, edits=[Edit(layer, prune=(copy,)), Edit(2, prune=(1,))]) for copy in range(2)]
        expected = torch.cat([*pruned, tap.read(images, edits=[Edit(2, prune=(1,))])])
        assert_allclose(rows.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)
        assert_allclose(tap.run_from(layer, replay).numpy(), logits.numpy(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_trial_that_was_interrupted_is_made_again(error, noise, monkeypatch):
    vit = open_vit(_KeepingModel("values"), image_size=64, weights="random", task="classes")
    tap, images = vit.tap(), noise(vit)
    replay, _ = tap.record(images)
    expected = tap.read(images, edits=[Edit(2, prune=(0,))])
    with monkeypatch.context() as patched:
        patched.setattr(tap, "read", mock.Mock(side_effect=error))
        with pytest.raises(error):
            tap.run_from(2, replay)
    tap.read(images.flip(0))
    assert_allclose(tap.run_from(2, replay, [Edit(2, prune=(0,))]), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_was_tried_is_tried_once_for_all_taps_of_a_model_and_again_after_a_change(noise, monkeypatch):
    vit = open_vit(_KeepingModel("values"), image_size=64, weights="random", task="classes")
    images, n_trials = noise(vit), []
    trial = Tap._run_without_heads_of
    monkeypatch.setattr(Tap, "_run_without_heads_of", lambda *args: (n_trials.append(1), trial(*args)))
    replay, _ = vit.tap().record(images)
    expected = vit.tap().run_from(2, replay, [Edit(2, prune=(0,))])
    n_first = len(n_trials)
    assert n_first > 0
    other = copy.deepcopy(vit.model)
    taps = [Tap(vit.model, vit.anatomy, vit.read_output, vit._trials), vit.tap_of_variant(other)]
    for tap in taps:
        _equal(tap.run_from(2, tap.record(images)[0], [Edit(2, prune=(0,))]), expected)
    assert len(n_trials) == n_first
    vit.model.setting = 1
    vit.tap().run_from(2, replay)
    assert len(n_trials) == 2 * n_first


@torch.no_grad()
def test_a_model_that_can_no_longer_be_copied_is_refused_each_time_until_it_can(fresh, noise):
    model = _Steered(fresh(VIT)).eval()
    vit = open_vit(model, image_size=64)
    images, tap = noise(vit), vit.tap()
    before = tap.read(images)
    model.scale, model.lock = 10.0, threading.Lock()
    for run in (tap.read, tap.record, vit.logits, tap.read):
        with pytest.raises(Unsupported, match="cannot be copied"):
            run(images)
    del model.lock
    _equal(tap.read(images), model(images))
    assert not torch.equal(tap.read(images), before)
