"""Large photographs: a few copies of one at a time, however many are read. The long form is `make faults`."""

import io
import sys
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from memory import HAS_PROC, peak_growth
from PIL import Image

from vitrail.data import decode_image, image_digest, open_images, scan
from vitrail.heads.strength import neighbours_per_hop
from vitrail.live import LiveModel
from vitrail.study.batches import load_batches

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from tiny_studies import tiny_vit

pytestmark = pytest.mark.skipif(not HAS_PROC, reason="the kernel of this system does not tell the largest memory")

SIDES = (5_000, 4_000)
PIXELS = SIDES[0] * SIDES[1]
BYTES_OF_RGB = 4
"""Of a pixel, as Pillow keeps it."""

SLACK = 40e6
"""Bytes that the interpreter and its libraries may take meanwhile."""


def encoded(mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, SIDES, 7 if mode == "I;16" else None).save(file, "PNG", compress_level=1)
    return file.getvalue()


@pytest.mark.parametrize(("mode", "bytes_of_a_pixel"), [("RGB", 3), ("RGBA", 4 + 3), ("I;16", 2 + 1 + 3)])
def test_decoding_takes_the_picture_and_what_is_made_of_it(mode: str, bytes_of_a_pixel: int) -> None:
    content = encoded(mode)
    assert peak_growth(lambda: decode_image(content)) < (bytes_of_a_pixel + 2) * PIXELS + SLACK


def test_transparency_in_strips_gives_the_pixels_of_the_whole() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (600, 31, 4), dtype=np.uint8)
    file = io.BytesIO()
    picture = Image.fromarray(pixels)
    picture.save(file, "PNG")
    whole = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode_image(file.getvalue())), np.asarray(whole))


def test_a_table_scales_16_bits_as_arithmetic_does() -> None:
    grey = np.random.default_rng(0).integers(0, 2**16, (40, 31), dtype=np.uint16)
    grey[0, :2] = 0, 2**16 - 1
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    expected = np.round(grey.astype(np.float64) / (2**16 - 1) * 255)
    np.testing.assert_array_equal(np.asarray(decode_image(file.getvalue()))[..., 0], expected)


def test_large_pictures_are_decoded_one_at_a_time() -> None:
    content, widths = encoded("RGB"), []

    def decode() -> None:
        threads = [Thread(target=lambda: widths.append(decode_image(content).width)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert peak_growth(decode) < BYTES_OF_RGB * PIXELS + SLACK
    assert widths == [SIDES[0]] * 3


def test_a_batch_of_large_photographs_holds_one_of_them_at_a_time(tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(encoded("RGB"))
    source, vit = open_images(tmp_path), tiny_vit()
    manifest = scan(source)

    def load() -> None:
        with load_batches(vit, source, [manifest.images]) as batches:
            assert [batch.prepared.shape[0] for batch in batches] == [4]

    assert peak_growth(load) < 2 * 3 * PIXELS + SLACK


def test_a_photograph_on_the_page_is_recognised_and_prepared_without_a_copy_of_it() -> None:
    live = LiveModel(tiny_vit())
    live.look_part(Image.new("RGB", (64, 48), "teal"), "base", ("view",), None, None)
    photograph = Image.linear_gradient("L").resize(SIDES).convert("RGB")
    looked: list[np.ndarray] = []

    def look() -> None:
        looked.append(live.look_part(photograph, "base", ("view",), None, None)["view"].to_numpy())

    assert peak_growth(look) < BYTES_OF_RGB * PIXELS / 4 + SLACK
    np.testing.assert_array_equal(looked[0], np.asarray(live.vit.view(photograph)))
    assert image_digest(photograph) == image_digest(photograph.copy())
    changed = photograph.copy()
    changed.putpixel((SIDES[0] - 1, SIDES[1] - 1), (1, 2, 3))
    assert image_digest(changed) != image_digest(photograph)


def test_neighbours_on_a_grid_of_3136_patches_are_counted_without_all_pairs_by_hop() -> None:
    grid, counts = (56, 56), []
    assert peak_growth(lambda: counts.append(neighbours_per_hop.__wrapped__(grid))) < SLACK  # 4.4 GB by pair and hop
    row, column = np.divmod(np.arange(56 * 56), 56)
    for patch in (0, 57, 56 * 28 + 30):
        hops = np.maximum(abs(row - row[patch]), abs(column - column[patch]))
        np.testing.assert_array_equal(counts[0][patch], np.bincount(hops, minlength=56))
