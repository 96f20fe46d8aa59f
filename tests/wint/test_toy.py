"""A task whose label needs a local window, from the examples: the colour around one white patch."""

import importlib.util
from pathlib import Path

import pytest
import torch

from vitrail.wint.model import FULL, record_sides, round_sides


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).resolve().parents[2] / "examples" / "windows_are_learnt.py"
    spec = importlib.util.spec_from_file_location("windows_are_learnt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_counting_colours_tells_nothing(example):
    images, labels = example.pictures(20, torch.Generator().manual_seed(1))
    patches = images[:, :, ::2, ::2]
    for colour in example.COLOURS[:3]:
        count = (patches == colour.view(1, 3, 1, 1)).all(1).sum((1, 2))
        assert count.tolist() == [21] * 20
    assert set(labels.tolist()) == {0, 1, 2}


def test_a_label_that_needs_a_local_window_is_learnt_better_with_windows(example):
    """Three colours, so 0.33 by chance; windows begin 2 patches long and end about as long."""
    with_windows, model = example.learnt(windows="predicted", start=((0.3,) * 4,))
    without, _ = example.learnt(windows="none", start=FULL)
    assert with_windows > 0.95
    assert without < 0.7
    with record_sides(model) as sides, torch.no_grad():
        model(example.pictures(50, torch.Generator().manual_seed(5))[0])
    assert 1 <= float(round_sides(sides[0]).mean()) <= 3
