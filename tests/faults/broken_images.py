"""Images broken at random in the ways files break, and images made to harm: the same ones for the same seed."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

__all__ = ["FORMATS", "PER_SEED", "broken_images"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

N_BYTES_OF_HEADER = 64
"""Sizes, offsets and depths of all six formats lie among the first bytes."""


def broken_images(seed: int) -> Iterator[tuple[str, bytes]]:
    """Makes the broken images of a seed.

    Args:
        seed: Any number.

    Yields:
        A name that says what was done, and the file's bytes: `PER_SEED` of them.
    """
    rng = np.random.default_rng(seed)
    for kind in FORMATS:
        whole = _encoded(kind, rng)
        for name, damage in _DAMAGES.items():
            yield f"{kind.lower()}_{name}", damage(whole, rng)
    for name, make in _MADE_TO_HARM.items():
        yield name, make(rng)


def _encoded(kind: str, rng: np.random.Generator) -> bytes:
    """A small photograph of a random size, mode and content."""
    rows, columns = (int(side) for side in rng.integers(16, 96, 2))
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    mode = rng.choice(["RGB", "L", "P" if kind in ("PNG", "GIF", "BMP", "TIFF") else "RGB"])
    picture = Image.fromarray(coarse).resize((columns, rows), Image.Resampling.BICUBIC).convert(str(mode))
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


# --- damages of a whole file ---


def _flip_bits(content: bytes, rng: np.random.Generator) -> bytes:
    changed = np.frombuffer(content, np.uint8).copy()
    place = rng.integers(0, len(changed), 1 + len(changed) // 200)
    changed[place] ^= np.left_shift(1, rng.integers(0, 8, len(place))).astype(np.uint8)
    return changed.tobytes()


def _change_header(content: bytes, rng: np.random.Generator) -> bytes:
    changed = np.frombuffer(content, np.uint8).copy()
    place = rng.integers(0, min(N_BYTES_OF_HEADER, len(changed)), 4)
    changed[place] = rng.integers(0, 256, len(place), dtype=np.uint8)
    return changed.tobytes()


def _huge_sizes(content: bytes, rng: np.random.Generator) -> bytes:
    """Four bytes of the header say as much as they can."""
    start = int(rng.integers(4, N_BYTES_OF_HEADER - 4))
    return content[:start] + b"\xff\xff\xff\x7f" + content[start + 4 :]


def _truncate(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(1, len(content)))]


def _zero_span(content: bytes, rng: np.random.Generator) -> bytes:
    start, stop = sorted(int(at) for at in rng.integers(0, len(content), 2))
    return content[:start] + bytes(stop - start) + content[stop:]


def _repeat_span(content: bytes, rng: np.random.Generator) -> bytes:
    start, stop = sorted(int(at) for at in rng.integers(0, len(content), 2))
    return content[:stop] + content[start:stop] * int(rng.integers(1, 5)) + content[stop:]


def _insert_noise(content: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(0, len(content)))
    return content[:at] + rng.bytes(int(rng.integers(1, 400))) + content[at:]


def _other_ending(content: bytes, rng: np.random.Generator) -> bytes:
    """The first half of one file and the second of another format's."""
    other = _encoded(str(rng.choice(FORMATS)), rng)
    return content[: len(content) // 2] + other[len(other) // 2 :]


_DAMAGES: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "bits_flipped": _flip_bits,
    "header_changed": _change_header,
    "sizes_huge": _huge_sizes,
    "truncated": _truncate,
    "span_zeroed": _zero_span,
    "span_repeated": _repeat_span,
    "noise_inserted": _insert_noise,
    "ending_of_another": _other_ending,
}


# --- files made to harm ---


def _png(columns: int, rows: int, data: bytes, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)
    parts = [_chunk(b"IHDR", header), *chunks, _chunk(b"IDAT", data), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _noise_after_magic(rng: np.random.Generator) -> bytes:
    magic = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\x00", b"RIFF\x00\x00\x00\x00WEBP")
    return magic[int(rng.integers(len(magic)))] + rng.bytes(int(rng.integers(0, 3000)))


def _bomb(rng: np.random.Generator) -> bytes:
    """A file of kilobytes that says it has up to 4 thousand million pixels."""
    side = int(rng.integers(10_000, 65_000))
    return _png(side, side, zlib.compress(bytes(1_000_000)))


def _sliver_with_text(rng: np.random.Generator) -> bytes:
    """One row, as wide as is allowed, and a compressed text that unfolds to megabytes."""
    columns = int(rng.integers(20_000, 70_000))
    text = _chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(8_000_000)))
    return _png(columns, 1, zlib.compress(bytes(columns + 1)), text)


_MADE_TO_HARM: dict[str, Callable[[np.random.Generator], bytes]] = {
    "noise_after_magic": _noise_after_magic,
    "bomb": _bomb,
    "sliver_with_text": _sliver_with_text,
}

PER_SEED = len(FORMATS) * len(_DAMAGES) + len(_MADE_TO_HARM)
