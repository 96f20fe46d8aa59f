"""Files as people have them: deep values, rare formats, tables of labels, archives, folders named by index."""

import csv
import io
import json
import os
import sys
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, TiffImagePlugin

from vitrail import data
from vitrail.data.geometry import resized_sides
from vitrail.data.photographs import CLASS_NAMES
from vitrail.errors import BadImage, DataError, UsageError
from vitrail.study.table import study_summary

CENTER = {"size": (224, 224), "resize": (256, 256), "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"}


def picture(seed: int = 0, size: tuple[int, int] = (24, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def smooth_picture() -> Image.Image:
    """Slopes, which lossy formats keep."""
    rows, columns = np.mgrid[0:64, 0:96]
    return Image.fromarray(np.stack([2 * rows, 2 * columns, rows + columns], -1).astype(np.uint8))


def encoded(image: Image.Image, format_: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def labels(source: data.ImageSource) -> dict[str, int | None]:
    return dict(zip([item.id for item in source.items], source.labels, strict=True))


class TestDeepValues:
    @pytest.mark.parametrize(("bits", "format_"), [(12, "PNG"), (12, "TIFF"), (10, "TIFF"), (14, "PNG"), (16, "PNG")])
    def test_greys_are_scaled_by_their_own_range_and_the_manifest_says_so(
        self, bits: int, format_: str, tmp_path: Path
    ) -> None:
        values = np.linspace(0, 2**bits - 1, 64).round().astype(np.uint16).reshape(8, 8)
        write(tmp_path, {"a.png": encoded(Image.fromarray(values), format_)})
        assert_allclose(
            np.asarray(data.decode_image(tmp_path / "a.png"))[..., 0], values / (2**bits - 1) * 255, atol=0.5
        )
        (entry,) = data.scan(data.open_images(tmp_path)).images
        assert (entry.scaling is None) == (bits == 16)
        assert bits == 16 or str(entry.scaling).startswith(f"{bits}-bit values in 16 bits")

    def test_a_tiff_that_states_its_white_is_believed(self) -> None:
        values = np.array([[0, 1000], [2000, 4000]], np.uint16)
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[281] = 8000
        image = data.decode_image(encoded(Image.fromarray(values), "TIFF", tiffinfo=tags))
        assert_allclose(np.asarray(image)[..., 0], values / 8000 * 255, atol=0.5)

    def test_dark_colours_of_16_bits_are_refused_and_bright_ones_read(self) -> None:
        ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
        colours = np.stack([ramp, ramp, ramp], -1)
        assert np.asarray(data.decode_image(png_of_16_bits(colours))).max() == 255
        with pytest.raises(BadImage, match="none is above a quarter of white"):
            data.decode_image(png_of_16_bits(colours // 16))


def png_of_16_bits(colours: np.ndarray) -> bytes:
    """Pillow cannot write one."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows, columns, _ = colours.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


class TestSizeAfterResizing:
    def test_a_strip_that_grows_without_bound_is_skipped_and_named(self, tmp_path: Path) -> None:
        strip = Image.new("L", (60_000, 1))
        write(tmp_path, {"strip.png": encoded(strip), "good.png": encoded(picture())})
        tracemalloc.start()
        manifest = data.scan(data.open_images(tmp_path), preprocessing=CENTER)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert [entry.id for entry in manifest.images] == ["good.png"]
        assert manifest.skipped[0].id == "strip.png"
        assert "60000 x 1 pixels become 15360000 x 256" in manifest.skipped[0].reason
        assert peak < 50_000_000

    def test_a_side_never_becomes_nothing(self) -> None:
        assert resized_sides(60_000, 1, {**CENTER, "crop_mode": "border"}) == (256, 1)

    def test_the_size_of_a_jpeg_is_that_of_its_file_and_not_of_the_draft(self, tmp_path: Path) -> None:
        write(tmp_path, {"strip.jpg": encoded(Image.new("RGB", (60_000, 8)), "JPEG"), "good.png": encoded(picture())})
        manifest = data.scan(data.open_images(tmp_path), preprocessing=CENTER)
        assert "60000 x 8 pixels" in manifest.skipped[0].reason

    def test_the_largest_image_can_be_raised(self, tmp_path: Path) -> None:
        write(tmp_path, {"a.png": encoded(picture()), "b.png": encoded(picture(size=(4, 4)))})
        low = data.scan(data.open_images(tmp_path, max_pixels=100))
        assert [each.id for each in low.skipped] == ["a.png"]
        source = data.open_images(write(tmp_path / "large", {"c.png": encoded(Image.new("1", (10_000, 9_000)))}))
        with pytest.raises(DataError, match="at most 80,000,000"):
            data.scan(source)
        source = data.open_images(tmp_path / "large", max_pixels=90_000_000)
        manifest = data.Manifest.from_json(data.scan(source).to_json())
        assert data.stored_image(manifest, manifest.images[0]).size == (10_000, 9_000)
        assert data.load_image(source, manifest.images[0]).size == (10_000, 9_000)


class TestManifest:
    def test_a_file_name_that_is_no_utf8_survives(self) -> None:
        entry = data.ImageEntry("\udcff.png", "/photos/\udcff.png", 3, 10, "0" * 64)
        manifest = data.Manifest("photos", "folders", (entry, replace(entry, id="b.png")), ())
        assert data.Manifest.from_json(manifest.to_json()) == manifest

    @pytest.mark.parametrize(("value", "name"), [('"3"', "a.png"), ('"3"', "\udcff.png"), ("[]", "a.png")])
    def test_a_value_of_another_type_is_refused(self, value: str, name: str) -> None:
        entry = data.ImageEntry(name, None, 3, 10, "0" * 64)
        text = data.Manifest(None, "folders", (entry,), ()).to_json()
        with pytest.raises(ValueError, match="label"):
            data.Manifest.from_json(text.replace('"label": 3', f'"label": {value}'))


class TestFormats:
    @pytest.mark.parametrize("format_", ["AVIF", "JPEG2000"])
    def test_formats_that_pillow_has_are_read(self, format_: str) -> None:
        smooth = smooth_picture()
        options = {"quality": 95} if format_ == "AVIF" else {}
        assert_allclose(np.asarray(data.decode_image(encoded(smooth, format_, **options))), np.asarray(smooth), atol=8)

    @pytest.mark.parametrize(
        ("content", "module", "extra"),
        [
            (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100, "pillow_heif", "heic"),
            (b"\0" * 128 + b"DICM" + b"\0" * 100, "pydicom", "dicom"),
        ],
    )
    def test_a_format_without_its_library_names_the_extra(
        self, content: bytes, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(BadImage, match=rf"pip install 'vitrail\[{extra}\]'"):
            data.decode_image(content)

    def test_heic_is_read(self) -> None:
        heif = pytest.importorskip("pillow_heif", reason="the extra 'heic' is not installed")
        smooth = smooth_picture()
        buffer = io.BytesIO()
        heif.from_pillow(smooth).save(buffer, quality=95)
        assert_allclose(np.asarray(data.decode_image(buffer.getvalue())), np.asarray(smooth), atol=8)
        with pytest.raises(BadImage):
            data.decode_image(buffer.getvalue()[:200])

    def test_dicom_is_read_as_its_window_shows_it(self, tmp_path: Path) -> None:
        pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
        values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 60
        image = data.decode_image(dicom(values, WindowCenter=2000, WindowWidth=1000, RescaleSlope=1))
        expected = np.clip((values - 1999.5) / 999 + 0.5, 0, 1) * 255  # DICOM part 3, C.11.2.1.2.1
        assert_allclose(np.asarray(image)[..., 0], expected, atol=1)
        few = np.full((8, 8), 1000, np.uint16) + np.arange(8, dtype=np.uint16) * 14  # a picture that fills no window
        wide = np.asarray(data.decode_image(dicom(few, WindowCenter=[2048, 9], WindowWidth=[4096, 9])))[..., 0]
        assert_allclose(wide, (few - 2047.5) / 4095 * 255 + 127.5, atol=0.5)
        negative = data.decode_image(dicom(few, WindowCenter=-2048, WindowWidth=4096, RescaleSlope=-1))
        assert_allclose(np.asarray(negative)[..., 0], 255.0 - wide, atol=1)
        inverted = data.decode_image(dicom(values, "MONOCHROME1"))
        assert_allclose(np.asarray(inverted)[..., 0], 255 - values / values.max() * 255, atol=0.5)
        write(tmp_path, {"a.dcm": dicom(values), "b.dcm": dicom(few, WindowCenter=2048, WindowWidth=4096)})
        own, window = (str(entry.scaling) for entry in data.scan(data.open_images(tmp_path)).images)
        assert "own range: 0 is black and 3780 white" in own
        assert "window: centre 2048, width 4096" in window

    def test_dicom_with_a_table_of_shades_has_those_of_the_table(self) -> None:
        pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
        from pydicom.dataset import Dataset

        table = Dataset()
        table.LUTDescriptor, table.LUTData = [4, 0, 8], [0, 50, 100, 200]
        table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
        values = np.arange(1, 4, dtype=np.uint16)[None].repeat(2, 0)
        image = data.decode_image(dicom(values, VOILUTSequence=[table]))
        assert np.asarray(image)[0, :, 0].tolist() == [50, 100, 200]

    def test_dicom_in_colours_has_the_colours_that_were_stored(self) -> None:
        pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
        from pydicom.pixels import convert_color_space

        colours = np.full((8, 8, 3), (200, 100, 50), np.uint8)
        colours[0] = (10, 250, 90)
        for photometric in ("RGB", "YBR_FULL"):
            stored = colours if photometric == "RGB" else convert_color_space(colours, "RGB", photometric)
            image = data.decode_image(dicom(stored, photometric, PlanarConfiguration=0))
            assert_allclose(np.asarray(image).astype(int), colours, atol=2)
        with pytest.raises(BadImage, match="YBR_PARTIAL_422, which pydicom does not"):
            data.decode_image(dicom(colours, "YBR_PARTIAL_422", PlanarConfiguration=0))

    @pytest.mark.parametrize("bits", [8, 16])
    def test_dicom_with_a_palette_has_the_colours_of_the_palette(self, bits: int) -> None:
        pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
        high = 2**bits - 1
        palettes = {"Red": [high, 0], "Green": [0, high], "Blue": [0, high]}
        fields: dict[str, object] = {}
        for name, entries in palettes.items():
            fields[f"{name}PaletteColorLookupTableDescriptor"] = [2, 0, bits]
            fields[f"{name}PaletteColorLookupTableData"] = np.array(entries, f"<u{bits // 8}").tobytes()
        image = data.decode_image(dicom(np.array([[0, 1, 1]], np.uint16), "PALETTE COLOR", **fields))
        assert np.asarray(image).tolist() == [[[255, 0, 0], [0, 255, 255], [0, 255, 255]]]


def dicom(values: np.ndarray, photometric: str = "MONOCHROME2", **fields: object) -> bytes:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    bits = 8 * values.itemsize
    dataset.Rows, dataset.Columns = values.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = (
        values.size // (dataset.Rows * dataset.Columns),
        photometric,
    )
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits, bits - 1, 0
    dataset.PixelData = values.astype(f"<u{values.itemsize}").tobytes()
    for name, value in fields.items():
        setattr(dataset, name, value)
    if "RescaleSlope" in fields:
        dataset.RescaleIntercept = 0
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


class TestLabels:
    def test_folders_named_by_index_are_classes_if_all_are(self, tmp_path: Path) -> None:
        write(tmp_path, {f"{index}/a.png": encoded(picture()) for index in range(12)})
        expected = {f"{index}/a.png": index for index in range(12)}
        for options in ({"n_classes": 12}, {"class_names": [f"class {letter}" for letter in "abcdefghijkl"]}):
            source = data.open_images(tmp_path, **options)
            assert labels(source) == expected
            assert source.labels_from == "the numbers of the class folders, taken as indices of the classes"
        assert set(labels(data.open_images(tmp_path, n_classes=11)).values()) == {None}

    def test_an_accent_that_is_written_apart_from_its_letter_is_the_same_name(self, tmp_path: Path) -> None:
        write(tmp_path, {f"{name}/a.png": encoded(picture()) for name in ("cafe\u0301", "tea")})
        source = data.open_images(tmp_path, class_names=["Caf\u00e9", "tea"])
        assert source.labels == (0, 1)

    def test_names_go_before_indices(self, tmp_path: Path) -> None:
        write(tmp_path, {f"{name}/a.png": encoded(picture()) for name in ("0", "1", "10")})
        source = data.open_images(tmp_path, class_names=["10", "1", "0", *map(str, range(2, 10))])
        assert labels(source) == {"0/a.png": 2, "1/a.png": 1, "10/a.png": 0}

    @pytest.mark.parametrize("layout", ["titles", "bare", "object", "list"])
    def test_a_table_gives_labels(self, layout: str, tmp_path: Path) -> None:
        rows = [("b.png", "dog"), ("sub/a.png", "cat")]
        write(tmp_path, {name: encoded(picture()) for name, _ in rows})
        if layout in ("titles", "bare"):
            table = tmp_path / "labels.csv"
            with open(table, "w", newline="", encoding="utf-8") as file:
                lines = [("Label", "split", "Image"), *((label, "val", name) for name, label in rows)]
                csv.writer(file).writerows(lines if layout == "titles" else rows)
        else:
            table = tmp_path / "labels.json"
            entries = [{"file_name": name, "label": label} for name, label in rows]
            table.write_text(json.dumps(dict(rows) if layout == "object" else entries), encoding="utf-8")
        source = data.open_images(table, class_names=["cat", "dog"])
        assert labels(source) == {"b.png": 1, "sub/a.png": 0}
        assert source.labels_from == f"the names in {table.name}"

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.csv", "a.png,bird\n", "None of the labels in a.csv is a class of the model: bird"),
            ("a.csv", "a.png,cat\nb.png,bird\n", "1 of 2 labels in a.csv match"),
            ("a.csv", "a.png\n", "Line 1 of .* has 1 cells"),
            ("a.json", "{", "cannot be read as JSON"),
            ("a.json", "3", "no table of labels"),
            ("a.json", '[{"label": 1}]', "an entry without a file"),
            ("a.json", '{"a.png": [1]}', "a label is a class name or the index"),
        ],
    )
    def test_a_table_that_is_none_is_refused(self, name: str, text: str, message: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            data.open_images(tmp_path / name, class_names=["cat", "dog"])


class TestArchives:
    def test_a_webdataset_is_read_in_place(self, tmp_path: Path) -> None:
        members = {"s/0001.jpg": encoded(picture(1), "JPEG"), "s/0001.cls": b"1", "s/0001.json": b"{}"}
        members |= {"s/0000.seg.png": encoded(picture(0)), "s/0000.cls": b"0\n"}
        with tarfile.open(tmp_path / "shard.tar", "w") as archive:
            for name, content in members.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        source = data.open_images(tmp_path / "shard.tar", class_names=["cat", "dog"])
        assert labels(source) == {"s/0001.jpg": 1, "s/0000.seg.png": 0}
        manifest = data.scan(source)
        assert_array_equal(data.stored_image(manifest, manifest.images[1]), picture(0))

    def test_a_compressed_archive_is_refused(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w:gz"):
            pass
        with pytest.raises(DataError, match="uncompressed tar"):
            data.open_images(tmp_path / "a.tar")

    @pytest.mark.parametrize("kind", ["saved", "parquet", "plain parquet"])
    def test_rows_of_datasets_are_read_from_disk(self, kind: str, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
        cells = [{"bytes": encoded(picture(seed)), "path": None} for seed in range(3)]
        columns = {"picture": cells, "label": [1, 0, 1]}
        if kind == "plain parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table({"picture": [cell["bytes"] for cell in cells], "label": [1, 0, 1]}), tmp_path / "d")
            (tmp_path / "d").rename(tmp_path / "d.parquet")
        else:
            features = datasets.Features(
                {"picture": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
            )
            dataset = datasets.Dataset.from_dict(columns, features=features)
            if kind == "saved":
                dataset.save_to_disk(str(tmp_path / "d"))
            else:
                dataset.to_parquet(str(tmp_path / "d.parquet"))
        path = tmp_path / ("d" if kind == "saved" else "d.parquet")
        source = data.open_images(path, class_names=["cat", "dog"])
        assert source.labels == (1, 0, 1)
        manifest = data.scan(source)
        assert_array_equal(data.stored_image(manifest, manifest.images[2]), picture(2))

    def test_damaged_datasets_are_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("datasets", reason="the extra 'data' is not installed")
        write(tmp_path, {"a.parquet": b"PAR1 no", "saved/state.json": b"{", "saved/dataset_info.json": b"{}"})
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            data.open_images(tmp_path / "a.parquet")
        with pytest.raises(DataError, match="a saved dataset, cannot be read"):
            data.open_images(tmp_path / "saved")


class TestNames:
    def test_a_folder_called_photos_is_not_shadowed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert data.open_images("photos", limit=2).name == "photos"
        write(tmp_path, {"photos/a.png": encoded(picture())})
        with pytest.raises(UsageError, match=r"write \./photos for that, or vitrail:photos"):
            data.open_images("photos")
        assert list(labels(data.open_images("./photos"))) == ["a.png"]
        built_in = data.scan(data.open_images("vitrail:photos", limit=2))
        assert len(data.stored_image(built_in, built_in.images[1]).size) == 2

    def test_whole_photographs_follow_65_crops_and_a_limit_cuts_the_same_list(self) -> None:
        ids = [item.id for item in data.open_images("vitrail:photos").items]
        assert ids[65:78] == [f"{name}/whole" for name in CLASS_NAMES]
        assert [sum(id_.startswith(f"{name}/0") for id_ in ids[:65]) for name in CLASS_NAMES] == [5] * 13
        assert not any(id_.endswith("whole") for id_ in ids[78:])
        assert len(ids) == 333
        for limit in (65, 70, 340):
            some = [item.id for item in data.open_images("vitrail:photos", limit=limit).items][:limit]
            assert len(some) == limit
            assert some[: len(ids)] == ids[:limit]

    @pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/x", "a\0b", "loop"])
    def test_a_name_that_leads_nowhere_is_an_error_in_a_sentence(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        if sys.platform != "win32":
            os.symlink("loop", "loop")
        with pytest.raises(DataError, match="There is no file or folder"):
            data.open_images(name)

    @pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
    def test_a_link_to_itself_is_skipped_wherever_it_is_listed(self, tmp_path: Path) -> None:
        write(tmp_path, {"a.png": encoded(picture())})
        os.symlink("loop.png", tmp_path / "loop.png")
        for source in (tmp_path, [tmp_path / "a.png", tmp_path / "loop.png"]):
            manifest = data.scan(data.open_images(source))
            assert [each.id for each in manifest.skipped] == ["loop.png"]

    def test_markup_in_names_is_printed_as_it_is(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import xarray as xr
        from rich.console import Console

        from vitrail.study import table
        from vitrail.study.plan import Plan

        name = "[red]a[/b].png"
        plan = object.__new__(Plan)  # only what the summary reads
        plan.__dict__.update(model="[bold]m", labels="given", labels_from="[i]", left_out={}, notes=())
        manifest = data.Manifest(None, "", (), (data.Skipped(name, "[blink]broken[/]"),))
        monkeypatch.setattr(table, "read_plan", lambda folder: plan)
        monkeypatch.setattr(table, "read_manifest", lambda folder: manifest)
        monkeypatch.setattr(table, "_most_important", lambda study: [])
        console = Console(record=True, width=200, file=io.StringIO())
        for item in study_summary(xr.Dataset(coords={"image": ["a"]}), tmp_path):
            console.print(item)
        text = console.export_text()
        assert f"{name}: [blink]broken[/]" in text
        assert "[bold]m: 1 images" in text

    def test_images_of_one_name_are_drawn_into_folders_of_their_own(self) -> None:
        from vitrail.cli.models import _folder_names

        paths = [Path("a/x.jpg"), Path("b/x.jpg"), Path("x-2.png"), Path("y.png")]
        assert _folder_names(paths) == ["x", "x-2", "x-2-2", "y"]
