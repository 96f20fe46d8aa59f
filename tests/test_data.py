"""Image sources: ids, order, labels, and every bad file that a folder of photographs may hold."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vitrail import data
from vitrail.data import scanning
from vitrail.data.sources import natural_key
from vitrail.errors import BadImage, DataError, NoImages, UsageError

SHARED = Path(__file__).parents[2] / "shared" / "data"


def picture(mode: str = "RGB", size: tuple[int, int] = (24, 16), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, format_: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def folder_of(tmp_path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path


def ids(source: data.ImageSource) -> list[str]:
    return [item.id for item in source.items]


def png_claiming(columns: int, rows: int) -> bytes:
    """A valid header over almost no data: what a decompression bomb looks like before it is unfolded."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


class TestSources:
    def test_a_folder_gives_relative_ids_in_natural_order(self, tmp_path: Path) -> None:
        names = ["img10.png", "img2.png", "sub/img1.png", "Img3.png", "img02.png"]
        folder = folder_of(tmp_path, {name: encoded(picture()) for name in names})
        assert ids(data.open_images(folder)) == ["Img3.png", "img02.png", "img2.png", "img10.png", "sub/img1.png"]

    @given(st.lists(st.text(max_size=12)))
    def test_natural_order_is_a_total_order(self, names: list[str]) -> None:
        backwards = names[::-1]
        assert sorted(backwards, key=natural_key) == sorted(names, key=natural_key)

    def test_hidden_files_are_not_images(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, {".DS_Store": b"x", ".git/a.png": encoded(picture()), "a.png": encoded(picture())})
        assert ids(data.open_images(folder)) == ["a.png"]

    def test_what_vitrail_wrote_beside_images_is_named_and_is_none_of_them(self, tmp_path: Path) -> None:
        picture_bytes, drawn = encoded(picture()), PngInfo()
        drawn.add_text("Software", "vitrail")
        folder_of(tmp_path, dict.fromkeys(("cat/a.png", "dog/b.png"), picture_bytes))
        folder_of(tmp_path, {"study/.vitrail-study": b"", "study/figures/a.png": picture_bytes})
        folder_of(tmp_path, {"old/study.json": b"{}", "old/images.json": b"{}", "old/parts/0.json": b"{}"})
        folder_of(
            tmp_path, {"out/export.json": b'{"vitrail": "1", "format": "csv", "files": []}', "out/image.csv": b""}
        )
        folder_of(tmp_path, {"look/look.zarr/zarr.json": b"{}", "look/map.png": encoded(picture(), pnginfo=drawn)})
        source = data.open_images(tmp_path, class_names=["cat", "dog"])
        assert (ids(source), source.labels) == (["cat/a.png", "dog/b.png"], (0, 1))
        assert [(each.id, each.reason) for each in source.skipped] == [
            ("look/look.zarr", "arrays, and no folder of images"),
            ("look/map.png", "a figure that Vitrail drew"),
            ("old", "a study, and no folder of images"),
            ("out", "an export of Vitrail's, and no folder of images"),
            ("study", "a study, and no folder of images"),
        ]
        others = folder_of(tmp_path / "cat", {"export.json": b'{"annotations": []}', "study.json": b"{}"})
        assert "a.png" in ids(data.open_images(others))  # files of other programs that are called so
        assert ids(data.open_images(tmp_path / "study" / "figures")) == ["a.png"]  # a folder that is named itself

    def test_folders_to_leave_out_are_left_out_by_whatever_path(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "images", {name: encoded(picture()) for name in ("a.png", "masks/a.png")})
        (tmp_path / "link").symlink_to(folder / "masks")
        assert ids(data.open_images(folder, leave_out=[tmp_path / "link", tmp_path / "nowhere"])) == ["a.png"]
        assert ids(data.open_images(folder, leave_out=[folder])) == ["a.png", "masks/a.png"]

    def test_a_list_of_files_keeps_its_order_with_ids_below_the_shared_folder(self, tmp_path: Path) -> None:
        folder_of(tmp_path, {"b/2.png": encoded(picture()), "a/1.png": encoded(picture())})
        source = data.open_images([tmp_path / "b/2.png", tmp_path / "a/1.png"])
        assert ids(source) == ["b/2.png", "a/1.png"]

    def test_a_text_file_lists_files_relative_to_itself(self, tmp_path: Path) -> None:
        folder_of(tmp_path, {"b.png": encoded(picture()), "a.png": encoded(picture())})
        (tmp_path / "list.txt").write_text("# mine\nb.png\n\na.png\n", encoding="utf-8")
        assert ids(data.open_images(str(tmp_path / "list.txt"))) == ["b.png", "a.png"]

    def test_a_listed_file_that_is_missing_is_skipped_by_name(self, tmp_path: Path) -> None:
        folder_of(tmp_path, {"a.png": encoded(picture())})
        manifest = data.scan(data.open_images([tmp_path / "a.png", tmp_path / "gone.png"]))
        assert manifest.skipped == (data.Skipped("gone.png", "there is no such file"),)

    def test_one_file_is_a_source(self, tmp_path: Path) -> None:
        folder_of(tmp_path, {"a.png": encoded(picture())})
        assert ids(data.open_images(tmp_path / "a.png")) == ["a.png"]

    def test_an_image_listed_twice_is_refused(self, tmp_path: Path) -> None:
        folder_of(tmp_path, {"a.png": encoded(picture())})
        with pytest.raises(DataError, match=r"more than once: a\.png"):
            data.open_images([tmp_path / "a.png", tmp_path / "a.png"])

    def test_the_same_name_in_two_class_folders_gives_two_ids(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, {"cat/1.png": encoded(picture(seed=1)), "dog/1.png": encoded(picture(seed=2))})
        assert ids(data.open_images(folder)) == ["cat/1.png", "dog/1.png"]

    def test_unusual_names_are_kept_as_unicode(self, tmp_path: Path) -> None:
        names = ["früh stück.png", "写真.png", "a\nb.png", "🦒.png", "100% #1?.png"]
        folder = folder_of(tmp_path, {name: encoded(picture()) for name in names})
        manifest = data.scan(data.open_images(folder))
        assert sorted(entry.id for entry in manifest.images) == sorted(names)

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux allows file names that are not UTF-8")
    def test_a_name_that_is_not_utf8_is_escaped_in_the_id_and_still_readable(self, tmp_path: Path) -> None:
        raw = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
        with open(raw, "wb") as file:
            file.write(encoded(picture()))
        source = data.open_images(tmp_path)
        manifest = data.scan(source)
        assert [entry.id for entry in manifest.images] == ["caf\\xe9.png"]
        assert data.load_image(source, manifest.images[0]).size == (24, 16)

    def test_folders_that_link_to_each_other_are_read_once_each(self, tmp_path: Path) -> None:
        """Read along every order of the links, nine folders would be listed a million times."""
        names = [f"f{number}" for number in range(9)]
        for name in names:
            folder_of(tmp_path, {f"{name}/a.png": encoded(picture())})
            for other in names:
                if other != name:
                    (tmp_path / name / other).symlink_to(tmp_path / other)
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        source = data.open_images(tmp_path)
        assert ids(source) == [f"{name}/a.png" for name in names]
        reasons = [each.reason for each in source.skipped]
        assert reasons.count("a link to a folder that is read already") == 9 * 8
        assert [each.reason for each in source.skipped if each.id == "loop"] == ["a link that leads nowhere"]

    def test_folders_deeper_than_the_stack_and_than_a_path_may_be_are_no_traceback(self, tmp_path: Path) -> None:
        folder_of(tmp_path, {"top.png": encoded(picture())})
        here = os.open(tmp_path, os.O_RDONLY)
        for _ in range(2200):
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(here)
        source = data.open_images(tmp_path)
        assert ids(source) == ["top.png"]
        assert [each.reason for each in source.skipped] == ["the folder cannot be listed: File name too long"]
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)

    def test_links_are_followed_and_a_circle_of_links_ends(self, tmp_path: Path) -> None:
        elsewhere = folder_of(tmp_path / "elsewhere", {"a.png": encoded(picture())})
        folder = tmp_path / "set"
        folder.mkdir()
        (folder / "linked").symlink_to(elsewhere)
        (folder / "one.png").symlink_to(elsewhere / "a.png")
        (folder / "circle").symlink_to(folder)
        (folder / "dead.png").symlink_to(tmp_path / "nothing")
        source = data.open_images(folder)
        assert ids(source) == ["linked/a.png", "one.png"]
        assert {each.id: each.reason for each in source.skipped} == {
            "circle": "a link to a folder that is read already",
            "dead.png": "a link that leads nowhere",
        }

    def test_a_pipe_is_skipped_without_waiting_for_it(self, tmp_path: Path) -> None:
        folder_of(tmp_path, {"a.png": encoded(picture())})
        os.mkfifo(tmp_path / "pipe.png")
        assert data.open_images(tmp_path).skipped == (data.Skipped("pipe.png", "not a regular file"),)

    def test_a_source_that_does_not_exist_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="There is no file or folder"):
            data.open_images(tmp_path / "nothing")

    def test_an_empty_folder_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(NoImages, match="holds no images"):
            data.open_images(tmp_path)

    def test_an_object_that_is_no_source_is_refused(self) -> None:
        with pytest.raises(UsageError, match="asked of a int"):
            data.open_images(7)

    def test_a_limit_below_one_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="limit of 0"):
            data.open_images(tmp_path, limit=0)

    def test_a_limit_counts_usable_images(self, tmp_path: Path) -> None:
        files = {"0.jpg": b"no image", **{f"{n}.png": encoded(picture(seed=n)) for n in (1, 2, 3)}}
        manifest = data.scan(data.open_images(folder_of(tmp_path, files), limit=2))
        assert [entry.id for entry in manifest.images] == ["1.png", "2.png"]
        assert [each.id for each in manifest.skipped] == ["0.jpg"]

    def test_opening_images_does_not_import_torch(self) -> None:
        program = "import sys, vitrail.data; print('torch' in sys.modules, 'timm' in sys.modules)"
        answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert answer.stdout.split() == ["False", "False"]


class TestHuggingFace:
    @pytest.fixture
    def dataset(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        datasets = pytest.importorskip("datasets", reason="the extra `data` (Hugging Face datasets) is not installed")
        rows = {
            "photo": [{"bytes": encoded(picture(seed=n)), "path": None} for n in range(3)] + [None],
            "kind": [1, 0, 1, 0],
        }
        features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["dog", "cat"])})
        return datasets.Dataset.from_dict(rows, features=features)

    def test_rows_are_matched_to_classes_by_name_not_by_number(self, dataset: object) -> None:
        source = data.open_images(dataset, class_names=["cat", "bird", "dog"])
        assert source.labels == (0, 2, 0, 2)

    def test_rows_are_read_and_empty_ones_named(self, dataset: object) -> None:
        source = data.open_images(dataset)
        manifest = data.scan(source)
        assert [entry.id for entry in manifest.images] == ["0000000", "0000001", "0000002"]
        assert manifest.skipped == (data.Skipped("0000003", "Row 3 of the dataset holds no image."),)
        assert_array_equal(data.load_image(source, manifest.images[2]), picture(seed=2))

    def test_a_dataset_without_images_lists_its_columns(self) -> None:
        datasets = pytest.importorskip("datasets", reason="the extra `data` (Hugging Face datasets) is not installed")
        with pytest.raises(DataError, match=r"no image column.*'text'"):
            data.open_images(datasets.Dataset.from_dict({"text": ["a"]}))


class TestLabels:
    def folder(self, tmp_path: Path, *names: str) -> Path:
        return folder_of(tmp_path, {f"{name}/{n}.png": encoded(picture()) for n, name in enumerate(names)})

    def test_class_folders_are_looked_up_by_name(self, tmp_path: Path) -> None:
        source = data.open_images(self.folder(tmp_path, "Dog", "polar_bear"), class_names=["cat", "polar bear", "dog"])
        assert source.labels == (2, 1)
        assert source.labels_from == "the names of the class folders"

    def test_a_line_may_hold_wordnet_id_and_several_names(self, tmp_path: Path) -> None:
        names = ["n01440764 tench, Tinca tinca", "n01443537, goldfish, Carassius auratus", "stingray"]
        folder = self.folder(tmp_path, "Tinca tinca", "n01443537", "stingray")
        assert data.open_images(folder, class_names=names).labels == (0, 1, 2)

    def test_wordnet_ids_are_found_in_timms_table_for_a_thousand_classes(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path, "n01440764", "n15075141")
        assert data.open_images(folder, n_classes=1000).labels == (0, 999)
        assert data.open_images(folder, n_classes=999).labels == (None, None)

    def test_names_that_match_nothing_leave_labels_out_with_the_reason(self, tmp_path: Path) -> None:
        source = data.open_images(self.folder(tmp_path, "2021", "2022"), class_names=["cat", "dog"])
        assert source.labels == (None, None)
        assert source.labels_from == "none of the folder names is a class of the model: 2021, 2022"

    def test_names_that_match_in_part_are_an_error_that_names_the_others(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path, "cat", "holiday")
        with pytest.raises(DataError, match=r"1 of 2 class folders match.*do not: holiday"):
            data.open_images(folder, class_names=["cat", "dog"])
        assert data.open_images(folder, class_names=["cat", "dog"], labels=False).labels == (None, None)

    def test_a_name_of_two_classes_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"crane = classes \[0, 1\]"):
            data.open_images(self.folder(tmp_path, "crane"), class_names=["crane, bird", "crane, machine"])

    def test_without_class_names_folders_are_not_numbered(self, tmp_path: Path) -> None:
        source = data.open_images(self.folder(tmp_path, "cat", "dog"))
        assert source.labels == (None, None)
        assert source.labels_from == "there are no class names to look the folders up in"

    def test_a_file_beside_class_folders_is_skipped_as_it_has_no_label(self, tmp_path: Path) -> None:
        folder = folder_of(self.folder(tmp_path, "cat"), {"stray.png": encoded(picture())})
        source = data.open_images(folder, class_names=["cat"])
        assert ids(source) == ["cat/0.png"]
        assert source.skipped == (data.Skipped("stray.png", "it belongs to no class, and others do"),)

    def test_a_file_beside_folders_that_are_no_classes_is_kept(self, tmp_path: Path) -> None:
        folder = folder_of(self.folder(tmp_path, "raw"), {"best.png": encoded(picture())})
        assert ids(data.open_images(folder, class_names=["cat"])) == ["best.png", "raw/0.png"]

    def test_a_file_beside_wordnet_folders_is_skipped_too(self, tmp_path: Path) -> None:
        folder = folder_of(self.folder(tmp_path, "n01440764"), {"README.md": b"about"})
        assert data.open_images(folder, n_classes=1000).labels == (0,)

    def test_a_whole_name_goes_before_one_of_several(self, tmp_path: Path) -> None:
        names = ["maillot, tank suit", "maillot"]
        assert data.open_images(self.folder(tmp_path, "maillot"), class_names=names).labels == (1,)

    def test_an_empty_line_in_class_names_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "names.txt").write_text("cat\n\ndog\n", encoding="utf-8")
        with pytest.raises(DataError, match="Line 2"):
            data.read_class_names(tmp_path / "names.txt")

    def test_the_title_of_a_class_is_its_first_name(self) -> None:
        lines = ["n01440764 tench, Tinca tinca", "n01440764, tench", "tench", "n01440764"]
        assert [data.class_title(line) for line in lines] == ["tench", "tench", "tench", "n01440764"]

    @pytest.mark.skipif(not SHARED.exists(), reason="the shared photographs are not on this machine")
    def test_the_thousand_photographs_get_the_thousand_labels(self) -> None:
        by_file = data.open_images(SHARED / "imagenet-sample", class_names=SHARED / "models/imagenet_classes.txt")
        by_table = data.open_images(SHARED / "imagenet-sample", n_classes=1000)
        assert by_file.labels == by_table.labels == tuple(range(1000))


class TestDecoding:
    def test_every_format_and_mode_becomes_rgb(self) -> None:
        cases = [("PNG", mode) for mode in ("1", "L", "P", "RGB", "LA", "RGBA")]
        cases += [("JPEG", mode) for mode in ("L", "RGB", "CMYK")]
        cases += [("WEBP", "RGB"), ("WEBP", "RGBA"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "CMYK")]
        for format_, mode in cases:
            image = data.decode_image(encoded(picture(mode), format_))
            assert (image.mode, image.size) == ("RGB", (24, 16)), (format_, mode)

    def test_exif_rotation_is_applied(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: rotate a quarter clockwise to view
        image = data.decode_image(encoded(picture(), "PNG", exif=exif))
        assert_array_equal(image, picture().transpose(Image.Transpose.ROTATE_270))

    def test_sixteen_bits_are_scaled_not_clipped(self) -> None:
        grey = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
        for format_ in ("PNG", "TIFF"):
            image = data.decode_image(encoded(Image.fromarray(grey), format_))
            assert_array_equal(np.asarray(image)[..., 0], [[0, 100], [200, 255]])

    def test_transparency_lies_on_white(self) -> None:
        image = Image.new("RGBA", (1, 3))
        image.putdata([(0, 0, 0, 0), (0, 0, 0, 255), (255, 0, 0, 128)])
        assert_allclose(
            np.asarray(data.decode_image(encoded(image)))[:, 0], [[255] * 3, [0] * 3, [255, 127, 127]], atol=1
        )

    def test_a_transparent_palette_colour_lies_on_white(self) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putdata([0, 1])
        decoded = data.decode_image(encoded(image, "PNG", transparency=0))
        assert_array_equal(np.asarray(decoded)[0], [[255, 255, 255], [40, 50, 60]])

    def test_cmyk_keeps_its_colours(self) -> None:
        red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
        decoded = np.asarray(data.decode_image(encoded(red, "JPEG", quality=95)))
        assert_allclose(decoded.mean((0, 1)), [254, 0, 0], atol=4)

    def test_bytes_and_paths_decode_alike(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(encoded(picture()))
        assert_array_equal(data.decode_image(tmp_path / "a.png"), data.decode_image(encoded(picture())))


def bad_files() -> dict[str, tuple[bytes, str]]:
    frames = {"save_all": True, "append_images": [picture(seed=1)]}
    jpeg = encoded(picture(size=(64, 64)), "JPEG", quality=95)
    return {
        "animated.gif": (encoded(picture("P"), "GIF", **frames), "animated"),
        "animated.webp": (encoded(picture(), "WEBP", **frames), "animated"),
        "animated.png": (encoded(picture(), "PNG", **frames), "animated"),
        "pages.tif": (encoded(picture(), "TIFF", **frames), "several pages"),
        "empty.jpg": (b"", "the file is empty"),
        "text.jpg": (b"these are words, not pixels", "not an image in a format"),
        "page.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image in a format"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "almost.jpg": (jpeg[:-40], "truncated"),
        "headonly.jpg": (jpeg[:20], "cannot be opened"),
        "truncated.png": (encoded(picture(size=(64, 64)))[:-2000], "truncated"),
        "truncated.webp": (encoded(picture(size=(64, 64)), "WEBP")[:200], "cannot be opened"),
        "truncated.gif": (encoded(picture("P", (64, 64)), "GIF")[:1200], "truncated"),
        "truncated.bmp": (encoded(picture(), "BMP")[:-200], "truncated"),
        "truncated.tif": (encoded(picture(), "TIFF")[:-200], "broken|cannot be opened"),
        "float.tif": (encoded(picture("F"), "TIFF"), "32 bits"),
        "int.tif": (encoded(picture("I"), "TIFF"), "32 bits"),
        "bomb.png": (png_claiming(60_000, 60_000), "60000 x 60000 pixels, and at most 80,000,000"),
        "warned.png": (png_claiming(10_000, 10_000), "10000 x 10000 pixels"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a format"),
    }


BAD = bad_files()


class TestBadFiles:
    @pytest.mark.parametrize("name", BAD)
    def test_is_refused_with_a_reason(self, name: str) -> None:
        content, reason = BAD[name]
        with pytest.raises(BadImage, match=reason):
            data.decode_image(content)

    def test_a_folder_of_them_is_skipped_one_by_one_and_the_good_one_stays(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, {name: content for name, (content, _) in BAD.items()})
        (folder / "good.png").write_bytes(encoded(picture()))
        manifest = data.scan(data.open_images(folder))
        assert [entry.id for entry in manifest.images] == ["good.png"]
        assert {each.id for each in manifest.skipped} == set(BAD)
        assert all(each.reason for each in manifest.skipped)

    def test_a_source_whose_images_all_fail_is_an_error_with_reasons(self, tmp_path: Path) -> None:
        with pytest.raises(NoImages, match=r"None of the 1 images can be used\.\n  text\.jpg: not an image"):
            data.scan(data.open_images(folder_of(tmp_path, {"text.jpg": BAD["text.jpg"][0]})))

    def test_a_file_over_the_cap_is_not_read(self, tmp_path: Path) -> None:
        with open(tmp_path / "huge.png", "wb") as file:
            file.truncate(10**12)  # sparse: a terabyte that takes no room
        with pytest.raises(BadImage, match="1,000,000,000,000 bytes"):
            data.decode_image(tmp_path / "huge.png")

    def test_caps_can_be_lowered_for_uploads(self) -> None:
        content = encoded(picture())
        with pytest.raises(BadImage, match=f"{len(content):,} bytes, and at most 10 "):
            data.decode_image(content, max_bytes=10)
        with pytest.raises(BadImage, match="24 x 16 pixels, and at most 100 "):
            data.decode_image(content, max_pixels=100)

    def test_an_unreadable_file_is_skipped_by_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder_of(tmp_path, {"a.png": encoded(picture()), "secret.png": encoded(picture())})
        read = Path.read_bytes

        def refuse(path: Path) -> bytes:  # what the system does to anyone but root, who runs tests in containers
            if path.name == "secret.png":
                raise PermissionError(13, "Permission denied", str(path))
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", refuse)
        manifest = data.scan(data.open_images(tmp_path))
        assert manifest.skipped == (data.Skipped("secret.png", "the file cannot be read: Permission denied"),)

    @settings(max_examples=150, deadline=None)
    @given(
        st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]),
        st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6),
        st.integers(0, 400),
    )
    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's remarks on damaged metadata
    def test_damaged_bytes_decode_or_are_refused_and_nothing_else(
        self, format_: str, damage: list[tuple[int, int]], cut: int
    ) -> None:
        content = bytearray(encoded(picture(), format_))
        for place, value in damage:
            content[place % len(content)] = value
        try:
            image = data.decode_image(bytes(content[: len(content) - cut]), max_pixels=10**6)
        except BadImage as reason:
            assert len(str(reason)) > 10  # noqa: PT017 - either outcome is right, any other exception is not
        else:
            assert image.mode == "RGB"


class TestManifest:
    @pytest.fixture
    def opened(self, tmp_path: Path) -> tuple[data.ImageSource, data.Manifest]:
        source = data.open_images(folder_of(tmp_path, {f"{n}.png": encoded(picture(seed=n)) for n in range(3)}))
        return source, data.scan(source)

    def test_an_image_loads_as_it_was_scanned(self, opened: tuple[data.ImageSource, data.Manifest]) -> None:
        source, manifest = opened
        for read in (partial_load(source), lambda entry: data.stored_image(manifest, entry)):
            assert_array_equal(read(manifest.images[1]), picture(seed=1))

    def test_a_changed_file_is_an_error_that_names_it(self, opened: tuple[data.ImageSource, data.Manifest]) -> None:
        source, manifest = opened
        Path(str(manifest.images[1].path)).write_bytes(encoded(picture(seed=9)))
        with pytest.raises(DataError, match=r"Image 1\.png has changed"):
            data.load_image(source, manifest.images[1])

    def test_a_file_gone_missing_is_an_error_that_names_it(
        self, opened: tuple[data.ImageSource, data.Manifest]
    ) -> None:
        source, manifest = opened
        Path(str(manifest.images[2].path)).unlink()
        with pytest.raises(DataError, match=r"Image 2\.png could be read.*there is no such file"):
            data.load_image(source, manifest.images[2])

    def test_the_digest_follows_content_and_order_but_not_the_place(self, tmp_path: Path) -> None:
        files = {f"{n}.png": encoded(picture(seed=n)) for n in range(3)}
        here, there = (data.scan(data.open_images(folder_of(tmp_path / place, files))) for place in ("here", "there"))
        changed = data.scan(data.open_images(folder_of(tmp_path / "changed", {**files, "2.png": files["0.png"]})))
        assert here.digest == there.digest
        assert here.digest != changed.digest

    def test_a_later_scan_reads_only_files_that_are_newer_or_have_another_size(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = {f"{name}.png": encoded(picture(seed=seed)) for seed, name in enumerate("abcd")}
        source = data.open_images(folder_of(tmp_path, files))
        first = data.scan(source)
        (tmp_path / "b.png").write_bytes(encoded(picture(size=(30, 20))))
        os.utime(tmp_path / "c.png", (4e9, 4e9))
        read: list[str] = []
        file_bytes = scanning.file_bytes
        monkeypatch.setattr(
            scanning, "file_bytes", lambda path, most: (read.append(path.name), file_bytes(path, most))[1]
        )
        soon = os.stat(tmp_path / "d.png").st_mtime + 60
        second = data.scan(source, earlier=data.EarlierScan(first, soon))
        assert sorted(read) == ["b.png", "c.png"]
        assert second == data.scan(source)
        assert second.digest != first.digest
        read.clear()
        data.scan(source, earlier=data.EarlierScan(first, soon - 60))  # as new as the files, by a clock of seconds
        assert len(read) == 4

    def test_progress_counts_to_the_end(self, opened: tuple[data.ImageSource, data.Manifest]) -> None:
        seen: list[tuple[int, int]] = []
        data.scan(opened[0], progress=lambda done, total: seen.append((done, total)))
        assert seen == [(1, 3), (2, 3), (3, 3)]


def partial_load(source: data.ImageSource) -> Callable[[data.ImageEntry], Image.Image]:
    return lambda entry: data.load_image(source, entry)


def test_a_file_or_a_list_of_one_folder_has_no_label_by_the_folders_number(tmp_path: Path) -> None:
    """A photograph in 2024/07 is none of class 7; several folders are classes, as in a folder of them."""
    for name in ("3/a.png", "3/b.png", "5/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "list.txt").write_text("3/a.png\n3/b.png\n")
    for source in (
        tmp_path / "3" / "a.png",
        tmp_path / "list.txt",
        [tmp_path / "3" / "a.png", tmp_path / "3" / "b.png"],
    ):
        opened = data.open_images(source, n_classes=13)
        assert set(opened.labels) == {None}
        assert opened.labels_from == "the images do not lie in class folders"
    assert data.open_images([tmp_path / "3" / "a.png", tmp_path / "5" / "a.png"], n_classes=13).labels == (3, 5)


def test_a_table_of_another_kind_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "coco.json").write_text(json.dumps({"images": [{"file_name": f"{n}.jpg"} for n in range(3000)]}))
    with pytest.raises(DataError, match="a label is a class name") as refused:
        data.open_images(tmp_path / "coco.json")
    assert len(str(refused.value)) < 600
