"""An index of tokens gives the answers of a search without it, grows, goes on after a stop, refuses other tokens."""

import json
import shutil

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from token_models import small_vit
from typer.testing import CliRunner

from vitrail import Preprocessing, data, match_patches, open_vit
from vitrail.cli.entry import app
from vitrail.errors import DataError, ModelError, UsageError
from vitrail.outputs import INDEX_MARKER
from vitrail.tokens import matches, token_index

HALF = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3)


def opened(**options):
    return open_vit(small_vit(img_size=32, **options).model, preprocessing=HALF)


@pytest.fixture(scope="module")
def vit():
    return opened()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(11):
        noise(number).save(folder / f"{number}.png")
    photo().save(folder / "itself.png")
    return folder


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def photo():
    return noise(99)


def search(vit, folder, index=None, **options):
    source = data.open_images(folder, labels=False)
    return match_patches(vit, photo(), source, data.scan(source), (1, 2), index=index, n_matches=3, **options)


@pytest.fixture
def views_read(monkeypatch):
    """How many views went through the model in each pass."""
    passes, read = [], matches._directions

    def count(vit, views, names, layer):
        passes.append(len(views))
        return read(vit, views, names, layer)

    monkeypatch.setattr(matches, "_directions", count)
    return passes


def test_a_search_with_an_index_answers_as_without_and_the_second_runs_the_model_over_no_image(
    vit, folder, tmp_path, views_read
):
    plain = search(vit, folder)
    views_read.clear()
    first = search(vit, folder, tmp_path / "index")
    assert views_read == [1, 1, 8, 4]  # the photograph, noise, the folder
    views_read.clear()
    second = search(vit, folder, tmp_path / "index")
    assert views_read == [1, 1]
    xr.testing.assert_identical(first, plain)
    xr.testing.assert_identical(second, plain)
    assert "itself.png" not in second["image"].values
    listing = [each.name for each in (tmp_path / "index").glob("*.npy")]
    assert len(listing) == 2  # noise and one part
    assert np.load(tmp_path / "index" / max(listing, key=len), mmap_mode="r").shape == (12, 16, 48)


def test_new_and_changed_images_alone_are_added_and_moved_ones_are_known(vit, folder, tmp_path, views_read):
    search(vit, folder, tmp_path / "index")
    views_read.clear()
    noise(50).save(folder / "new.png")
    noise(51).save(folder / "3.png")
    (folder / "4.png").rename(folder / "moved.png")
    (folder / "5.png").unlink()
    grown = search(vit, folder, tmp_path / "index")
    assert views_read == [1, 1, 2]
    xr.testing.assert_allclose(grown, search(vit, folder), atol=1e-5)
    assert "5.png" not in grown["image"].values


def test_building_that_is_stopped_goes_on_behind_the_last_part(vit, folder, tmp_path, views_read, monkeypatch):
    monkeypatch.setattr(token_index, "PART_BYTES", 1)  # a part a batch
    plain, stopped = search(vit, folder), data.load_image
    views_read.clear()

    def stop(source, entry):
        if entry.id == "9.png":
            raise KeyboardInterrupt
        return stopped(source, entry)

    monkeypatch.setattr(token_index, "load_image", stop)
    with pytest.raises(KeyboardInterrupt):
        search(vit, folder, tmp_path / "index")
    assert views_read == [1, 1, 8]
    monkeypatch.setattr(token_index, "load_image", stopped)
    views_read.clear()
    done = []
    xr.testing.assert_identical(search(vit, folder, tmp_path / "index", progress=lambda *n: done.append(n)), plain)
    assert views_read == [1, 1, 4]
    assert done == [(12, 12)]


def test_an_index_of_other_tokens_is_refused_with_what_differs(vit, folder, tmp_path):
    index = tmp_path / "index"
    search(vit, folder, index)
    with pytest.raises(UsageError, match=r"after L2, and it has another layer than what is searched now; name another"):
        search(vit, folder, index, layer=1)
    with pytest.raises(UsageError, match="another weight digest"):
        search(opened(qkv_bias=False), folder, index)
    other = open_vit(vit.model, preprocessing=Preprocessing((32, 32), (0.4,) * 3, (0.5,) * 3))
    with pytest.raises(UsageError, match="another preprocessing"):
        search(other, folder, index)
    hooked = opened()
    hooked.model.blocks[1].register_forward_hook(lambda _module, _inputs, output: -output)
    with pytest.raises(UsageError, match=r"something else of it was changed \(a hook, registers\)"):
        search(hooked, folder, index)


def test_a_folder_that_no_index_wrote_is_refused_and_stays_as_it_was(vit, folder, tmp_path):
    with pytest.raises(UsageError, match=r"holds other files \(0.png, .* and no index of tokens; name a new or empty"):
        search(vit, folder, folder)
    assert len(list(folder.iterdir())) == 12
    own = tmp_path / "own"
    own.mkdir()
    (own / INDEX_MARKER).write_text('{"mine": 1}')
    with pytest.raises(UsageError, match="is none of this version of Vitrail"):
        search(vit, folder, own)
    (own / INDEX_MARKER).write_text("no json")
    with pytest.raises(DataError, match="cannot be read"):
        search(vit, folder, own)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UsageError, match="is no folder"):
        search(vit, folder, file)
    assert file.read_text() == "mine"


def test_damaged_parts_are_named_and_made_again_when_they_are_removed(vit, folder, tmp_path):
    index = tmp_path / "index"
    plain = search(vit, folder, index)
    part = next(each for each in index.glob("*.npy") if each.stem != "noise")
    whole = part.read_bytes()
    tokens = np.load(part)
    tokens[3, 2] = np.nan
    for content in (whole[:-2000], b"", whole[:128] + tokens.tobytes()):
        part.write_bytes(content)
        with pytest.raises(DataError, match=rf"Part {part.stem} of the index .* damaged; remove {part.stem}.json"):
            search(vit, folder, index)
    part.with_suffix(".json").write_text("[")
    with pytest.raises(DataError, match="damaged; remove"):
        search(vit, folder, index)
    part.with_suffix(".json").unlink()
    xr.testing.assert_identical(search(vit, folder, index), plain)
    assert part.read_bytes() == whole


def test_folders_that_changed_names_are_read_anew_by_the_search_after_one_that_finds_it(vit, tmp_path, monkeypatch):
    from vitrail.data import scanning

    monkeypatch.setattr(scanning, "CLOCK_STEP_S", -60.0)  # as if the files had lain there for a minute
    for name, seed in (("images", 0), ("others", 100)):
        (tmp_path / name).mkdir()
        for number in range(6):
            noise(seed + number).save(tmp_path / name / f"{number}.bmp")  # all of one size

    def indexed():
        source = data.open_images(tmp_path / "images", labels=False)
        with token_index.indexed_scan(tmp_path / "index", source) as manifest:
            return match_patches(vit, photo(), source, manifest, (1, 2), index=tmp_path / "index", n_matches=3)

    first = indexed()
    xr.testing.assert_identical(indexed(), first)
    (tmp_path / "images").rename(tmp_path / "before")
    (tmp_path / "others").rename(tmp_path / "images")
    with pytest.raises(DataError, match="has changed"):
        indexed()
    xr.testing.assert_allclose(indexed(), search(vit, tmp_path / "images"), atol=1e-5)


def test_noise_that_is_no_number_is_that_of_another_model(vit, folder, tmp_path):
    search(vit, folder, tmp_path / "index")
    file = tmp_path / "index" / "noise.npy"
    np.save(file, np.full_like(np.load(file), np.nan))
    with pytest.raises(UsageError, match="gives other tokens to the same image"):
        search(vit, folder, tmp_path / "index")


def test_tokens_that_are_no_numbers_are_never_written(folder, tmp_path):
    broken = opened()
    index = token_index.TokenIndex(
        tmp_path / "index", broken, 2, lambda views, names: torch.ones(len(views), 16, 48), 8
    )
    index._read = lambda views, names: torch.full((len(views), 16, 48), float("nan"))
    source = data.open_images(folder, labels=False)
    with pytest.raises(ModelError, match="is not finite"):
        index.add(source, data.scan(source).images)
    assert {each.name for each in (tmp_path / "index").iterdir()} == {INDEX_MARKER, "noise.npy"}


def test_memory_holds_a_part_and_few_maps_whatever_the_folder(vit, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(token_index, "PART_BYTES", 1)
    monkeypatch.setattr(token_index, "N_MAPPED", 1)
    source = data.open_images(folder, labels=False)
    entries = data.scan(source).images
    plain = search(vit, folder)
    index = tmp_path / "index"
    xr.testing.assert_identical(search(vit, folder, index), plain)
    opened_index = token_index.TokenIndex(
        index, vit, 2, lambda views, names: matches._directions(vit, views, names, 2), 8
    )
    for entry in entries:
        assert isinstance(opened_index.tokens(entry), np.memmap)
        assert len(opened_index._maps) == 1


def test_an_index_below_the_images_is_no_image(vit, folder):
    search(vit, folder, folder / "index")
    source = data.open_images(folder, labels=False)
    manifest = data.scan(source)
    assert len(manifest.images) == 12
    assert any("an index of tokens" in each.reason for each in manifest.skipped)


def test_the_command_keeps_an_index_and_reads_untouched_files_once(folder, tmp_path, monkeypatch):
    photo().save(tmp_path / "photo.png")
    arguments = ["matches", "vitrail:photos", str(tmp_path / "photo.png"), str(folder), "--patch", "0,0"]
    arguments += ["--index", str(tmp_path / "index"), "--out", str(tmp_path / "figure.png")]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    listing = json.loads((tmp_path / "index" / "images.json").read_text())
    assert len(listing["images"]) == 12
    from vitrail.data import scanning

    monkeypatch.setattr(scanning, "CLOCK_STEP_S", -60.0)  # as if the files had lain there for a minute
    read = []
    monkeypatch.setattr(scanning, "_examine_one", lambda item, *_args, **_options: read.append(item.id))
    second = CliRunner().invoke(app, arguments)
    assert second.exit_code == 0, second.output
    assert read == []
    assert second.stdout == first.stdout
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "index")
    plain = CliRunner().invoke(app, arguments[:6] + arguments[8:])
    assert plain.stdout == first.stdout
