"""The patch tokens of a folder's images on disk, so that a search does not run the model over them again.

    DIR/token-index.json    what the tokens are of: weights, layer, grid, preprocessing, precision
    DIR/noise.npy           the tokens of an image of noise, which tell a model that was changed otherwise
    DIR/images.json         the last scan of the images: files that were not touched since are not read again
    DIR/PART.npy, .json     the tokens of a few images [image patch feature], float32, and the digests of these images

An image is known by the digest of its content, so that one that was moved is still in the index and one that was
changed is not. Parts are written whole or not at all and never changed: a stop loses a part at most, and new images are
further parts. A part is named by the images in it, so two processes that write the same one write the same bytes.
"""

import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vitrail.contract.outlook import require_finite
from vitrail.data import (
    EarlierScan,
    ImageEntry,
    ImageSource,
    Manifest,
    image_digest,
    image_of_channels,
    load_image,
    scan,
)
from vitrail.errors import DataError, UsageError
from vitrail.models.open import Vit
from vitrail.outputs import INDEX_MARKER, local_folder, write_atomically

__all__ = ["TokenIndex", "indexed_scan"]

FORMAT = 1
"""Of the files; another one is not read."""

IMAGES, NOISE = "images.json", "noise.npy"

PART_BYTES = 2**26
"""Tokens that are in memory together while the index is made: 64 MB."""

N_MAPPED = 8
"""Parts that are mapped into memory at once."""

NOISE_TOLERANCE = {"float32": 1e-3, "float64": 1e-3}
"""How far the tokens of noise, of length 1, may lie from those of the index: devices add in other orders."""

NOISE_TOLERANCE_HALF = 5e-2

ABANDONED_S = 3600.0
"""After so long an unfinished file is taken for that of a process that was killed."""

ReadTokens = Callable[[Sequence[Image.Image], Sequence[str]], Tensor]
"""Views of images, and what the images are called, to the tokens of their patches [image patch feature], each of length
1."""


class _Row(NamedTuple):
    """Where the tokens of an image are, and the digest of what the model sees of it."""

    part: str
    row: int
    view: str


class TokenIndex:
    """The tokens of images in a folder that this index alone writes.

    Args:
        folder: A new or empty folder, or one that an index of the same tokens was begun in.
        vit: The model.
        layer: Whose output the tokens are; they lie on a grid.
        read: Gives the tokens [image patch feature] of views of images that have these names, each of length 1.
        batch_size: Images in a pass.

    Raises:
        UsageError: The folder holds something else, or the index is of another model, layer or preprocessing.
        DataError: A file of the index is damaged.
    """

    def __init__(self, folder: str | Path, vit: Vit, layer: int, read: ReadTokens, batch_size: int) -> None:
        self.folder = _own_folder(folder)
        self._vit, self._read, self._batch_size = vit, read, batch_size
        grid = vit.anatomy.blocks[layer].grid
        assert grid is not None
        self._maps: OrderedDict[str, np.ndarray] = OrderedDict()
        self._require_same(
            {
                "vitrail": "token index",
                "format": FORMAT,
                "model": vit.name,
                "weight_digest": vit.weight_digest,
                "buffer_digest": vit.buffer_digest,
                "layer": layer,
                "grid": list(grid),
                "precision": vit.precision,
                "preprocessing": json.loads(json.dumps(_without_source(asdict(vit.preprocessing)))),
            }
        )

    def add(
        self, source: ImageSource, entries: Sequence[ImageEntry], progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Runs the model over the images that are not in the index yet, and writes their tokens.

        Args:
            source: Of the images.
            entries: From its scan.
            progress: Called with the images done and their number.

        Raises:
            DataError: An image is not what was scanned.
            ModelError: A token has NaN or infinite numbers; nothing is written of its part.
            OSError: The disk does not take a part; those before it are there.
        """
        missing = list({each.digest: each for each in entries if each.digest not in self._rows}.values())
        n_done = len(entries) - len(missing)
        start = 0
        while start < len(missing):
            some = missing[start : start + self._part_size]
            self._write_part(source, some)
            start += len(some)
            if progress is not None:
                progress(n_done + start, len(entries))

    def tokens(self, entry: ImageEntry) -> Float[np.ndarray, "patch feature"]:
        """The tokens of an image, from disk.

        Args:
            entry: One that `add` was given.

        Returns:
            A part of a memory map; read it, do not keep it.

        Raises:
            DataError: The part is damaged or gone.
        """
        row = self._rows[entry.digest]
        if row.part not in self._maps:
            self._maps[row.part] = self._map(row.part)
        self._maps.move_to_end(row.part)
        while len(self._maps) > N_MAPPED:
            self._maps.popitem(last=False)
        tokens: np.ndarray = self._maps[row.part][row.row]
        if not np.isfinite(tokens).all():
            raise self._damaged(row.part)
        return tokens

    def view_digest(self, entry: ImageEntry) -> str:
        """What the model sees of an image, as `vitrail.data.image_digest` names it.

        Args:
            entry: One that `add` was given.

        Returns:
            The digest.
        """
        return self._rows[entry.digest].view

    # --- what is there -----------------------------------------------------------------------------------------------

    def _require_same(self, identity: dict[str, Any]) -> None:
        """Refuses an index of other tokens; begins one where there is none."""
        marker, noise = self.folder / INDEX_MARKER, self._noise
        if not marker.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_json(marker, identity)
        stored = _read_json(marker)
        other = [name for name, value in identity.items() if name != "model" and stored.get(name) != value]
        if other:
            names = ", ".join(name.replace("_", " ") for name in other)
            raise UsageError(
                f"The index in {self.folder} is of {stored.get('model')} after L{stored.get('layer')}, and it has "
                f"another {names} than what is searched now; name another folder for --index."
            )
        if not (self.folder / NOISE).exists() and not self._rows:  # it was stopped while it was begun
            _write_array(self.folder / NOISE, noise)
        try:
            noise_then = np.load(self.folder / NOISE, allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise DataError(
                f"{self.folder / NOISE} cannot be read ({error}); name a new folder for --index."
            ) from error
        tolerance = NOISE_TOLERANCE.get(self._vit.precision, NOISE_TOLERANCE_HALF)
        if noise_then.shape != noise.shape or not np.abs(noise_then - noise).max() <= tolerance:  # NaN is other, too
            raise UsageError(
                f"The index in {self.folder} is of {stored.get('model')} with these weights, and it now gives other "
                "tokens to the same image: something else of it was changed (a hook, registers). Name another folder "
                "for --index."
            )

    @cached_property
    def _noise(self) -> Float[np.ndarray, "patch feature"]:
        shape, rng = (*self._vit.image_size, self._vit.n_channels), np.random.default_rng(0)
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        image = Image.fromarray(pixels) if shape[-1] == 3 else image_of_channels(pixels)
        tokens = self._read([self._vit.view(image)], ["an image of noise"])
        require_finite(self._vit.name, tokens, ["an image of noise"])
        return tokens[0].float().cpu().numpy()

    @cached_property
    def _rows(self) -> dict[str, _Row]:
        """By the digest of each image."""
        rows: dict[str, _Row] = {}
        for file in sorted(self.folder.glob("*.json")):
            if file.name in (INDEX_MARKER, IMAGES):
                continue
            try:
                listing = json.loads(file.read_bytes())["images"]
                rows |= {digest: _Row(file.stem, row, view) for row, (digest, view) in enumerate(listing)}
            except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
                raise self._damaged(file.stem) from error
        return rows

    def _map(self, part: str) -> Float[np.ndarray, "image patch feature"]:
        try:
            tokens: np.ndarray = np.load(self.folder / f"{part}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise self._damaged(part) from error
        n_rows = sum(row.part == part for row in self._rows.values())
        if (
            tokens.dtype != np.float32
            or tokens.ndim != 3
            or tokens.shape[1:] != self._noise.shape
            or n_rows > len(tokens)
        ):
            raise self._damaged(part)
        return tokens

    def _damaged(self, part: str) -> DataError:
        return DataError(
            f"Part {part} of the index in {self.folder} is damaged; remove {part}.json and {part}.npy there, and the "
            "next search makes it again."
        )

    # --- what is added -----------------------------------------------------------------------------------------------

    @property
    def _part_size(self) -> int:
        """Images of a part: whole batches, as many as fit, 64 at most."""
        per_batch = self._noise.nbytes * self._batch_size
        return self._batch_size * int(np.clip(PART_BYTES // per_batch, 1, 64 // self._batch_size))

    def _write_part(self, source: ImageSource, entries: Sequence[ImageEntry]) -> None:
        parts, views = list[np.ndarray](), list[str]()
        for start in range(0, len(entries), self._batch_size):
            some = entries[start : start + self._batch_size]
            pictures, names = [self._vit.view(load_image(source, each)) for each in some], [each.id for each in some]
            tokens = self._read(pictures, names)
            require_finite(self._vit.name, tokens, names)
            parts.append(tokens.float().cpu().numpy())
            views.extend(map(image_digest, pictures))
        name = hashlib.sha256("\n".join(each.digest for each in entries).encode()).hexdigest()[:24]
        _remove_abandoned(self.folder)
        _write_array(self.folder / f"{name}.npy", np.concatenate(parts))
        listing = [[entry.digest, view] for entry, view in zip(entries, views, strict=True)]
        _write_json(self.folder / f"{name}.json", {"images": listing})  # last: with it the part is there
        self._rows.update({digest: _Row(name, row, view) for row, (digest, view) in enumerate(listing)})


@contextmanager
def indexed_scan(
    folder: str | Path, source: ImageSource, progress: Callable[[int, int], None] | None = None
) -> Iterator[Manifest]:
    """Scans images as `vitrail.data.scan` does, without reading files again that an index knows.

    Args:
        folder: Of the index, which may be there already.
        source: From `vitrail.open_images`.
        progress: Called with the images done and their number.

    Yields:
        The scan, which the index keeps when the context ends, if it is there then; after a `DataError` it keeps none,
        and the next one reads all files.

    Raises:
        UsageError: The folder holds something else.
        DataError: The earlier scan cannot be read.
        NoImages: No image can be used.
    """
    path, started = _own_folder(folder), time.time()
    file, earlier = path / IMAGES, None
    if file.exists():
        try:
            earlier = EarlierScan(Manifest.from_json(file.read_text(encoding="utf-8")), file.stat().st_mtime)
        except ValueError as error:
            raise DataError(f"{file} cannot be read ({error}); remove it, and the images are read anew.") from error
    manifest = scan(source, progress, earlier=earlier)

    def write(unfinished: Path) -> None:
        """As old as the scan's beginning: an image that was touched while others were read is read again."""
        unfinished.write_text(manifest.to_json(), encoding="utf-8")
        os.utime(unfinished, (started, started))

    is_right = True
    try:
        yield manifest
    except DataError:  # a file may be another than it was though it looks untouched, as in folders that changed names
        is_right = False
        file.unlink(missing_ok=True)
        raise
    finally:
        if is_right and (path / INDEX_MARKER).exists():
            write_atomically(file, write)


def _own_folder(folder: str | Path) -> Path:
    """Refuses a folder that holds something else than an index."""
    path = local_folder(folder)
    names = sorted(each.name for each in path.iterdir()) if path.is_dir() else []
    others = [name for name in names if not name.startswith(f".{INDEX_MARKER}.")]  # a process was killed at once
    if INDEX_MARKER not in names and others:
        raise UsageError(
            f"{path} holds other files ({', '.join(others[:3])}) and no index of tokens; name a new or empty "
            "folder for --index."
        )
    if INDEX_MARKER in names:
        marker = _read_json(path / INDEX_MARKER)
        if marker.get("vitrail") != "token index" or marker.get("format") != FORMAT:
            raise UsageError(
                f"{path / INDEX_MARKER} is none of this version of Vitrail; name a new or empty folder for --index."
            )
    return path


def _without_source(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "source"}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read ({error}); name a new folder for --index.") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds no index of tokens; name a new folder for --index.")
    return content


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_atomically(file, lambda path: path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def _write_array(file: Path, array: np.ndarray) -> None:
    def write(path: Path) -> None:
        with path.open("wb") as opened:
            np.save(opened, np.ascontiguousarray(array), allow_pickle=False)

    write_atomically(file, write)


def _remove_abandoned(folder: Path) -> None:
    """Removes what this index was writing when its process was killed."""
    for path in folder.glob(".*.*"):
        name, _, process = path.name[1:].rpartition(".")
        if process.isdigit() and name.endswith((".npy", ".json")) and time.time() - path.stat().st_mtime > ABANDONED_S:
            path.unlink(missing_ok=True)
