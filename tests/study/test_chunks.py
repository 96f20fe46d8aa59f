"""Chunks follow the device: one operation for all images where memory allows, smaller ones where it does not."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from tiny_studies import BATCH_SIZE, tiny_vit
from torch.utils._python_dispatch import TorchDispatchMode

from vitrail.analysis import (
    BASE,
    Calibrates,
    TakesMasks,
    analyses,
    declaration,
    make_collectors,
    measures,
    unavailable,
)
from vitrail.data import ImageEntry
from vitrail.errors import ModelError
from vitrail.models.open import Vit, open_vit
from vitrail.patterns.maps import comparable_layers, read_pattern_maps
from vitrail.patterns.model import KINDS, MapSample, PatternModel, PatternStatistics
from vitrail.study.batches import BatchRun, LoadedBatch
from vitrail.study.run import run_study
from vitrail.study.store import read_plan
from vitrail.tap.attention import LayerAttention, Readers
from vitrail.tap.budget import MAX_HALVINGS, budget_of, fixed_budget, halve
from vitrail.tap.edits import Edit
from vitrail.tap.maps import MapSource
from vitrail.wint.model import Shape, WinT

LARGE = 2**33
"""A budget that takes any batch of the tiny model."""

MODELS = ("classes", "features", "value", "windows")


@cache
def model(kind: str) -> Vit:
    """A tiny model; each kind has measures that those before it lack."""
    torch.manual_seed(0)
    if kind == "windows":
        return open_vit(WinT(Shape(image_px=(32, 32), width=24, depth=2, heads=2, n_classes=10)).eval())
    if kind == "value":
        return open_vit(tiny_vit(n_classes=1).model, task="regression")
    return tiny_vit(n_classes=0 if kind == "features" else 10)


def names_of(kind: str, analysis: str, options: dict[str, str]) -> list[str]:
    """The measures of an analysis that collectors compute of this model and of none before it."""
    names = [each.name for each in analyses()[analysis].measures if not each.derived]
    *earlier, own = (unavailable(model(each), names, options).keys() for each in MODELS[: MODELS.index(kind) + 1])
    return [name for name in names if name not in own and all(name in missing for missing in earlier)]


def cases() -> Iterator[tuple[str, dict[str, str]]]:
    """Every analysis of the register, with every value of its options that is no number."""
    for analysis in analyses().values():
        if analysis.name != BASE:  # which a whole batch of a study has
            yield analysis.name, {}
            for option in analysis.options:
                yield from ((analysis.name, {option.name: each}) for each in option.choices[1:] if not each.isdigit())


CASES = list(cases())


class CountOperations(TorchDispatchMode):
    """Counts what is dispatched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def measure(vit: Vit, names: list[str], options: dict[str, str], n_images: int) -> dict[str, np.ndarray]:
    """The measures of random images, all collectors on one pass."""
    images = torch.randn((16, 3, *vit.image_size), generator=torch.Generator().manual_seed(0))[:n_images]
    mask = np.arange(32 * 32).reshape(32, 32) // 300
    collectors = make_collectors(vit, names, options)
    for collector in collectors:
        if isinstance(collector, TakesMasks):
            collector.take_masks([mask] * n_images)
        if isinstance(collector, Calibrates):
            collector.calibrate(vit.tap(), images, 4)  # the others are padding, which counts in no mean
            collector.load_calibration(collector.calibration_statistics())
    readers = Readers.join([collector.readers() for collector in collectors])
    replay, logits = vit.tap().record(images, readers, keep=True)
    arrays: dict[str, np.ndarray] = {}
    for collector in collectors:
        arrays |= collector.finish(vit.tap(), replay, logits, logits.argmax(-1).numpy())
    return arrays


@pytest.mark.parametrize(("analysis", "options"), CASES)
def test_the_number_of_operations_does_not_depend_on_the_batch_size(analysis: str, options: dict[str, str]) -> None:
    options = options | {"masks": "given"}
    by_model = {kind: names for kind in MODELS if (names := names_of(kind, analysis, options))}
    assert by_model
    for kind, names in by_model.items():
        on_processor = measure(model(kind), names, options, 4)
        counts = {}
        with fixed_budget(LARGE):
            for n_images in (4, 16):
                with CountOperations() as operations:
                    arrays = measure(model(kind), names, options, n_images)
                counts[n_images] = operations.counts
        assert counts[4] == counts[16]
        assert arrays.keys() >= set(names)
        for name, values in on_processor.items():  # the same numbers, in other chunks
            assert_allclose(arrays[name][:4].astype(float), values.astype(float), atol=2e-5, rtol=2e-4, err_msg=name)


def test_every_measure_of_the_register_is_counted() -> None:
    """Those of all images that are left here are counted in the passes of patterns."""
    counted = {
        name
        for analysis, options in CASES
        for kind in MODELS
        for name in names_of(kind, analysis, options | {"masks": "given"})
    }
    left = measures().keys() - counted - set(analyses()[BASE].measure_names)
    assert {(declaration(name).analysis, declaration(name).derived) for name in left} == {("patterns", True)}


def test_neither_do_the_passes_of_patterns_nor_a_whole_batch_of_a_study(vit: Vit, photos: Path, tmp_path: Path) -> None:
    run_study(vit, photos, out=tmp_path / "study", measures="patterns", batch_size=BATCH_SIZE)
    layers, plan = comparable_layers(vit), read_plan(tmp_path / "study")
    models = [PatternModel.load(tmp_path / "study" / "patterns" / f"{kind}.safetensors") for kind in KINDS]
    images = torch.randn((16, 3, *vit.image_size), generator=torch.Generator().manual_seed(0))
    counts: dict[int, list[Counter[str]]] = {}
    with fixed_budget(LARGE):
        for n_images in (4, 16):
            everything = np.ones((n_images, len(vit.n_heads), max(vit.n_heads)), dtype=bool)
            samples = [MapSample(model.coder.shape, everything) for model in models]
            placing = PatternStatistics(models, layers, vit.n_heads, n_images)
            maps = MapSource()

            def read(attention: LayerAttention) -> None:
                for part in read_pattern_maps(attention, layers, maps):  # noqa: B023
                    for reader in (*samples, placing):  # noqa: B023
                        reader.add(0, attention.layer, part)

            batch = LoadedBatch(
                [ImageEntry(str(number), None, 0, 1, "") for number in range(n_images)],
                images[:n_images],
                np.zeros((n_images, 8, 8, 3), np.uint8),
                [None] * n_images,
            )
            run = BatchRun(vit, replace(plan, batch_size=n_images))
            with CountOperations() as of_patterns, torch.no_grad():
                vit.tap().read(images[:n_images], Readers(attention=read))
            with CountOperations() as of_study:
                run(batch)
            counts[n_images] = [of_patterns.counts, of_study.counts]
    assert counts[4] == counts[16]


def test_a_processor_has_its_own_sizes_and_halving_ends() -> None:
    assert budget_of("cpu").bytes_for(1000) == 1000
    with fixed_budget(2**20):
        assert budget_of("cpu").bytes_for(1000) == 2**20
        assert [halve("cpu") for _ in range(MAX_HALVINGS + 1)] == [True] * MAX_HALVINGS + [False]
        assert budget_of("cpu").bytes_for(1000) == 2 ** (20 - MAX_HALVINGS - 1)
    assert budget_of("cpu").bytes_for(1000) == 1000


def test_memory_that_does_not_suffice_is_said_once_and_no_part_is_lost(
    vit: Vit, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_study(vit, photos, out=tmp_path / "whole", measures="prefix_share,pattern_rule", batch_size=BATCH_SIZE)
    softmax = torch.softmax

    def softmax_of_small_maps(scores: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if len(scores) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return softmax(scores, *arguments, **options)

    monkeypatch.setattr(torch, "softmax", softmax_of_small_maps)
    with fixed_budget(10_000), pytest.warns(RuntimeWarning, match=r"did not suffice \(CUDA out of memory") as warnings:
        study = run_study(
            vit, photos, out=tmp_path / "study", measures="prefix_share,pattern_rule", batch_size=BATCH_SIZE
        )
    assert len(warnings) == 1
    for name in ("prefix_share", "pattern_rule"):
        assert_allclose(study[name], whole[name], atol=1e-6)


def test_a_device_that_does_not_take_a_batch_at_all_says_what_to_do(
    vit: Vit, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("vitrail.study.batches.BatchRun._measure", no_memory)
    with (
        fixed_budget(LARGE),
        pytest.warns(RuntimeWarning, match="smaller chunks"),
        pytest.raises(ModelError, match=r"does not take a batch of 4 images.*Give a smaller --batch-size"),
    ):
        run_study(vit, photos, out=tmp_path / "study", measures="prefix_share", batch_size=BATCH_SIZE)


def test_a_device_that_is_gone_is_named_and_other_errors_stay_what_they_are(
    vit: Vit, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for message, error in (("CUDA error: unspecified launch failure\nhelp", ModelError), ("a bug", RuntimeError)):

        def fail(*_: Any, message: str = message, **__: Any) -> torch.Tensor:
            raise RuntimeError(message)

        monkeypatch.setattr("vitrail.study.batches.BatchRun._measure", fail)
        with pytest.raises(error, match=r"cpu does not answer any more \(CUDA error: .*same command again|a bug"):
            run_study(vit, photos, out=tmp_path / "study", measures="prefix_share", batch_size=BATCH_SIZE)


def test_a_map_that_is_changed_in_pieces_of_queries_gives_the_same_answer(vit: Vit) -> None:
    images = torch.randn((2, 3, *vit.image_size), generator=torch.Generator().manual_seed(0))
    n_tokens = vit.anatomy.blocks[1].tokens
    generator = torch.Generator().manual_seed(1)
    bias, region = torch.randn((2, n_tokens, n_tokens), generator=generator), torch.rand((n_tokens, n_tokens)) > 0.3
    edits = [Edit(0, region=region), Edit(1, bias=bias, region=region.float(), copy=1)]
    maps: dict[int | None, list[torch.Tensor]] = {}
    answers = {}
    for n_bytes in (None, 4 * 8 * n_tokens * 3):  # three queries at a time
        with fixed_budget(n_bytes):
            own = maps.setdefault(n_bytes, [])
            reader = Readers(attention=lambda attention, own=own: own.append(attention.weights()))  # type: ignore[misc]
            replay, _ = vit.tap().record(images)
            vit.tap().run_from(0, replay, edits=edits, copies=2, readers=reader)
            answers[n_bytes] = vit.tap().run_from(0, replay, edits=edits, copies=2)
    (whole, pieces), (one, other) = answers.values(), maps.values()
    assert_allclose(pieces, whole, atol=1e-5)
    for each, same in zip(one, other, strict=True):
        assert_allclose(same, each, atol=1e-6)
