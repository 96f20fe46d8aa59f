"""Images of other channels than red, green and blue: arrays and TIFF files of several bands."""

import hashlib
import io

import numpy as np
import pytest
import tifffile
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from vitrail.data import decode_image, image_digest, open_images, scan
from vitrail.data.channels import channels_of, image_of_channels
from vitrail.data.geometry import resize_and_crop
from vitrail.errors import BadImage, NoImages

RANDOM = np.random.default_rng(0)
SETTINGS = {"size": (8, 8), "resize": (8, 8), "crop_mode": "squash", "interpolation": "box", "mean": (0.5,) * 5}


def _header(shape: tuple[int, ...]) -> bytes:
    """An array file that claims to be large, with 10 bytes of values."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue() + b"x" * 10


def _saved(values, **options):
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


def _tiff(values, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535), (">u2", 65535), (np.float32, 1), (np.float64, 1)], ids=str
)
def test_an_array_file_keeps_its_values_beside_a_picture_to_look_at(dtype, white):
    values = (RANDOM.random((6, 9, 5)) * white).astype(dtype)
    for stored in (values, np.moveaxis(values.repeat(4, 0).repeat(3, 1), -1, 0)):
        image = decode_image(_saved(stored))
        expected = values if stored is values else values.repeat(4, 0).repeat(3, 1)
        assert (image.mode, image.size) == ("RGB", expected.shape[1::-1])
        assert_allclose(channels_of(image), expected / white, rtol=1e-6)
    picture = np.asarray(decode_image(_saved(values)), dtype=float)
    first = values[..., 0].astype(float)
    assert_allclose(picture[..., 0], (first - first.min()) / (first.max() - first.min()) * 255, atol=0.51)


def test_bands_of_a_tiff_file_are_channels_and_its_photographs_stay_photographs():
    values = RANDOM.integers(0, 65536, (6, 9, 5), dtype=np.uint16)
    bands = decode_image(_tiff(values, photometric="minisblack", planarconfig="contig"))
    assert_allclose(channels_of(bands), values / 65535, rtol=1e-6)
    colours = RANDOM.integers(0, 256, (6, 9, 4), dtype=np.uint8)
    for photograph in (
        _tiff(colours[..., :3], photometric="rgb"),
        _tiff(colours, photometric="rgb", extrasamples=["unassalpha"]),
        _tiff(colours[..., 0], photometric="minisblack"),
    ):
        assert channels_of(decode_image(photograph)) is None


def test_a_broken_tiff_file_is_refused_in_a_sentence_and_nothing_else_is_said(caplog):
    content = bytearray(_tiff(RANDOM.integers(0, 256, (6, 9, 3), dtype=np.uint8), photometric="rgb"))
    content[12:14] = b"\x4f\x00"  # the type of the first tag: there is none of this number
    with pytest.raises(BadImage, match=r"TIFF|broken"):
        decode_image(bytes(content))
    assert caplog.records == []


def test_values_are_resized_and_cropped_as_the_picture_is():
    values = RANDOM.random((16, 16, 5)).astype(np.float32)
    view = resize_and_crop(image_of_channels(values), SETTINGS)
    assert view.size == (8, 8)
    assert_allclose(channels_of(view), values.reshape(8, 2, 8, 2, 5).mean((1, 3)), rtol=1e-5)
    corner = resize_and_crop(image_of_channels(values), SETTINGS | {"size": (4, 6), "resize": (16, 16)})
    assert_array_equal(channels_of(corner), values[6:10, 5:11])


def test_images_of_other_channels_than_the_model_takes_are_left_out_with_the_reason(tmp_path):
    np.save(tmp_path / "five.npy", RANDOM.random((8, 8, 5)))
    np.save(tmp_path / "table.npy", RANDOM.random((40, 30)))
    Image.new("RGB", (8, 8)).save(tmp_path / "photograph.png")
    five = scan(open_images(tmp_path), preprocessing=SETTINGS)
    assert [image.id for image in five.images] == ["five.npy"]
    assert {each.id: each.reason for each in five.skipped} == {
        "photograph.png": "it has 3 channels and the model takes 5",
        "table.npy": "it has 1 channel and the model takes 5",
    }
    three = scan(open_images(tmp_path), preprocessing=SETTINGS | {"mean": (0.5,) * 3})
    assert [image.id for image in three.images] == ["photograph.png"]
    with pytest.raises(NoImages, match="it has 5 channels and the model takes 4"):
        scan(open_images(tmp_path), preprocessing=SETTINGS | {"mean": (0.5,) * 4})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (_saved(np.zeros((4, 4, 5)))[:-9], "begins like an array file"),
        (_header((10**7, 10**7, 3)), "300,000,000,000,000 values"),
        (_header((10**30, 3)), "values in all its channels"),
        (_header((5000, 5000, 3)), "ends before its 75,000,000 values do"),
        (_saved(np.array([{}, {}]), allow_pickle=True), "begins like an array file"),
        (_saved(np.zeros((4, 4, 5), dtype=np.int64)), "int64, whose black and white are not defined"),
        (_saved(np.full((4, 4, 5), np.nan)), "not finite"),
        (_saved(np.zeros((40, 40, 40))), r"an array of shape \[40, 40, 40\]"),
        (_saved(np.zeros((0, 4, 3))), r"an array of shape \[0, 4, 3\]"),
    ],
    ids=["cut off", "huge", "of more values than fit a number", "short", "pickled", "int64", "NaN", "volume", "empty"],
)
def test_an_array_that_is_no_image_is_refused(content, says):
    with pytest.raises(BadImage, match=says):
        decode_image(content)


def test_images_that_are_shown_alike_have_one_digest_and_others_another():
    values = np.random.default_rng(0).random((8, 8, 4)).astype(np.float32)
    other = values.copy()
    other[..., 3] = 0
    indices = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4).convert("P")
    repainted = indices.copy()
    indices.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    repainted.putpalette([255, 255, 255, 9, 9, 9, 0, 255, 0, 0, 0, 255])
    images = [image_of_channels(values), image_of_channels(other), image_of_channels(values / 4), indices, repainted]
    assert images[0].tobytes() == images[2].tobytes()
    assert len({image_digest(image) for image in images}) == len(images)
    assert [image_digest(image.copy()) for image in images] == [image_digest(image) for image in images]
    tall = Image.fromarray(np.random.default_rng(1).integers(0, 255, (600, 3, 3), dtype=np.uint8))
    assert image_digest(tall) == hashlib.sha256(b"RGB (3, 600) " + tall.tobytes()).hexdigest()
