"""Tables of experiments/tokens.py: made in parts, gone on with after a stop, joined to one that says of how many."""

import sys
from argparse import Namespace
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from token_models import small_vit

from vitrail import Preprocessing, data, open_vit

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
N_PHOTOGRAPHS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for number in range(N_PHOTOGRAPHS):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def tokens(monkeypatch, folder):
    """The script on a small model and photographs of noise, two in a part."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    spec = spec_from_file_location("token_experiments", EXPERIMENTS / "tokens.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.chunks, "__defaults__", (2,))
    monkeypatch.setattr(module, "LEVELS", (0, 1, 3))
    vit = open_vit(small_vit(img_size=32).model, preprocessing=Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3))
    source = data.open_images(folder, labels=False)
    labelled = [replace(each, label=number) for number, each in enumerate(data.scan(source).images)]
    monkeypatch.setattr(module, "opened", lambda *_: vit)
    monkeypatch.setattr(module, "photographs", lambda _data, limit: (source, labelled[:limit]))
    yield module
    sys.modules.pop("tiny_hierarchies", None)


def options(work, n_images=5, **others):
    return Namespace(
        **{"data": None, "work": work, "images": n_images, "precision": "float32", "finished": False, "neurons": 1}
        | {"models": ["small"], "relevance_precision": None}
        | others
    )


def test_a_run_that_was_stopped_goes_on_and_a_short_part_is_made_anew(tokens, tmp_path, folder, capsys):
    entries, made = list(range(5)), []

    def compute(start, some):
        if start == 2 and not made.count("stopped"):
            made.append("stopped")
            raise KeyboardInterrupt
        made.append((start, len(some)))
        return {"score": np.array(some) * 2.0, "photograph": np.array(some)}

    with pytest.raises(KeyboardInterrupt):
        tokens.computed_parts(options(tmp_path), "trial", entries, compute)
    files = tokens.computed_parts(options(tmp_path), "trial", entries, compute)
    assert made == [(0, 2), "stopped", (2, 2), (4, 1)]
    assert_array_equal(tokens.joined(files)["score"], [0, 2, 4, 6, 8])
    files = tokens.computed_parts(options(tmp_path), "trial", [*entries, 5], compute)
    assert made[4:] == [(4, 2)]
    assert_array_equal(tokens.joined(files)["score"], [0, 2, 4, 6, 8, 10])
    assert "trial: 6 of 6 photographs" in capsys.readouterr().out
    assert len(tokens.computed_parts(options(tmp_path, finished=True), "trial", list(range(9)), compute)) == 3
    assert made[5:] == []


def test_relevance_judges_the_label_free_methods_with_the_nearest_photographs_as_prototype_and_a_null(tokens, tmp_path):
    areas = tokens.relevance_areas(tokens.joined(tokens.relevance_of(options(tmp_path), "small")))
    assert list(areas) == [*tokens.METHODS, "random_prototype"]
    assert {len(values) for each in areas.values() for values in each.values()} == {5}
    assert_allclose(areas["random"]["that beyond random (paired)"], 0)
    embeddings = tokens.embeddings_of(options(tmp_path), "small", tokens.opened())
    assert len(embeddings) == N_PHOTOGRAPHS  # of all, however many are judged
    first = tokens.prototypes(embeddings, np.array([0]))[0]
    cosines = embeddings @ embeddings[0] / np.linalg.norm(embeddings, axis=1)
    assert_allclose(first, embeddings[[each for each in np.argsort(-cosines) if each][:5]].mean(0), rtol=1e-5)
    assert not np.allclose(first, tokens.prototypes(embeddings, np.array([0]), by_chance=True)[0])


def test_the_merged_table_holds_what_is_there_and_says_on_how_many_photographs(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "DOCS", tmp_path)
    with pytest.raises(SystemExit, match="has no part of small"):
        tokens.merged_command(options(tmp_path))
    with pytest.raises(SystemExit, match=r"has no part of relevance.md to tabulate; run this without --finished"):
        tokens.relevance_command(options(tmp_path, finished=True))
    assert not (tmp_path / "relevance.md").exists()
    tokens.relevance_command(options(tmp_path))
    assert "| prototype_similarity |" in (tmp_path / "relevance.md").read_text()
    tokens.views_command(options(tmp_path, n_images=4))
    assert "## small, 4 photographs, 1 neuron of each a level" in (tmp_path / "views.md").read_text()
    scores = tokens.joined(tokens.views_of(options(tmp_path, n_images=4), "small"))
    tokens.robustness_of(options(tmp_path), "float32", "small", 5)
    tokens.merged_command(options(tmp_path, models=["small", "absent"]))
    lines = (tmp_path / "robustness-relevance-views.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    table = {(what, of): cells for what, of, *cells in rows}
    assert table["top-1", "intact"][1] == "not there"
    assert "photographs" not in table["top-1", "intact"][0]
    assert "photographs" not in table["relevance: insertion", "prototype_similarity"][0]
    cosine = table["views, frozen: cosine with plain", "level 1"][0]
    assert cosine.startswith(f"{scores['cosine_frozen'][:, 1].mean():.3f} (")
    assert cosine.endswith("; 4 photographs")
    assert table["views, 16 steps: missing", "level 1"][0].endswith("; 1 photograph")
    tokens.relevance_of(options(tmp_path, n_images=4, precision="bfloat16"), "small")
    tokens.merged_command(options(tmp_path, relevance_precision="bfloat16"))
    merged = (tmp_path / "robustness-relevance-views.md").read_text()
    assert "in float32 (curves of relevance in bfloat16)" in merged
    assert "; 4 photographs |" in next(line for line in merged.splitlines() if line.startswith("| relevance: deletion"))
    (said,) = tokens.precision_of_relevance(options(tmp_path, n_images=4))[-1:]
    assert said == "| small, 4 photographs | 0.0000 | 0.0000 | 0.0000 | 0.0000 | 0.0000 |"  # here one model is both
