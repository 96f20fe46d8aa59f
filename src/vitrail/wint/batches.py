"""Images for training: a batch is a function of (recipe, step), so a run can be stopped and go on at any step, and
several devices together see what one would.

They come from packed .npz files (`blob`, `offset`, `label`, `classes`: encoded images end to end), folders of class
folders and Hugging Face datasets.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitrail.data import decode_image, open_images
from vitrail.data.files import BROKEN_ARCHIVE
from vitrail.errors import BadImage, DataError, UsageError
from vitrail.wint.recipe import Data, Recipe

__all__ = ["Batches", "Images", "derive_seed", "normalise", "read_images"]

ORDER, CROPS, PICTURES, MIXING, SUBSET, DROPS = range(6)
"""What a seed is derived for; numbers enter the seeds, so they stay."""

RESAMPLING = Image.Resampling.BICUBIC


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images that are decoded when asked for. `contents[i]()` gives bytes or an RGB image; `ids` name them."""

    name: str
    contents: Sequence[Callable[[], bytes | Image.Image]]
    labels: Int[Tensor, "image"]
    class_names: tuple[str, ...]
    ids: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.contents)

    def image(self, index: int) -> Image.Image:
        """Decodes one image.

        Args:
            index: Which.

        Returns:
            An RGB image.

        Raises:
            BadImage: It cannot be read; the sentence names it.
        """
        try:
            content = self.contents[index]()
            return decode_image(content) if isinstance(content, bytes) else content
        except BadImage as error:
            raise BadImage(f"{self.ids[index] if self.ids else f'image {index}'} of {self.name}: {error}") from error

    def subset(self, limit: int | None) -> "Images":
        """Takes a fixed random subset, whatever the seed of a run.

        Args:
            limit: How many images; None for all.

        Returns:
            These images, in their order.

        Raises:
            UsageError: The limit is below 1.
        """
        if limit is None or limit >= len(self):
            return self
        if limit < 1:
            raise UsageError(f"A limit of {limit} images leaves nothing to train on.")
        indices = torch.randperm(len(self), generator=torch.Generator().manual_seed(SUBSET))[:limit].sort().values
        numbers = indices.tolist()
        contents, ids = [self.contents[i] for i in numbers], [self.ids[i] for i in numbers] if self.ids else ()
        return Images(self.name, contents, self.labels[indices], self.class_names, ids)

    def pixels(self, size: int, progress: Callable[[int, int], None] | None = None) -> UInt8[Tensor, "image 3 px px"]:
        """Decodes all images: the short side resized, the middle cut out.

        Args:
            size: Rows and columns of pixels.
            progress: Called with the images done and their number.

        Returns:
            Bytes.
        """
        decoded = torch.empty((len(self), 3, size, size), dtype=torch.uint8)
        for index in range(len(self)):
            decoded[index] = torch.from_numpy(np.array(_crop_square(self.image(index), size))).permute(2, 0, 1)
            if progress is not None:
                progress(index + 1, len(self))
        return decoded


def read_images(source: str) -> Images:
    """Opens labelled images.

    Args:
        source: A packed .npz, a folder of class folders, whose files beside these are of no class and left out, or
            hf:NAME:SPLIT.

    Returns:
        The images, decoded when asked for.

    Raises:
        DataError: They cannot be read or have no labels.
    """
    if source.endswith(".npz"):
        return _read_packed(Path(source))
    items = [item for item in open_images(source, labels=False).items if item.class_name is not None]
    classes = tuple(sorted({str(item.class_name) for item in items}))
    if len(classes) < 2:
        raise DataError(f"{source} has no classes to learn; give a folder of class folders, or a labelled dataset.")
    number = {name: index for index, name in enumerate(classes)}
    contents = [
        partial(Path.read_bytes, item.content) if isinstance(item.content, Path) else item.content for item in items
    ]
    labels = torch.tensor([number[str(item.class_name)] for item in items])
    return Images(source, contents, labels, classes, [item.id for item in items])


def _read_packed(path: Path) -> Images:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as pack:
            blob, offset, label = pack["blob"], pack["offset"], pack["label"]
            classes = tuple(str(name) for name in pack["classes"])
    except (OSError, ValueError, KeyError, *BROKEN_ARCHIVE) as error:
        raise DataError(f"{path} cannot be read as packed images (blob, offset, label, classes): {error}.") from error
    if not len(label):
        raise DataError(f"{path} holds no images.")
    if len(offset) != len(label) + 1 or int(label.min()) < 0 or int(label.max()) >= len(classes):
        raise DataError(f"{path} is damaged: {len(label)} labels up to {label.max()}, {len(offset)} offsets.")
    contents = [partial(_byte_range, blob, int(offset[index]), int(offset[index + 1])) for index in range(len(label))]
    return Images(str(path), contents, torch.from_numpy(label.astype(np.int64)), classes)


def _byte_range(blob: UInt8[np.ndarray, "byte"], start: int, stop: int) -> bytes:
    return blob[start:stop].tobytes()


def _crop_square(image: Image.Image, size: int) -> Image.Image:
    if image.size != (size, size):
        short = min(image.size)
        left, top = (image.width - short) / 2, (image.height - short) / 2
        image = image.resize((size, size), RESAMPLING, (left, top, left + short, top + short))
    return image


def normalise(
    pixels: UInt8[Tensor, "image 3 row column"] | Float[Tensor, "image 3 row column"],
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
) -> Float[Tensor, "image 3 row column"]:
    """Turns pixels into what a model is given.

    Args:
        pixels: 0..255.
        mean: Of each channel, of values 0..1.
        std: The same.

    Returns:
        Floats, about -2 to 2.
    """
    centre, unit = (255 * torch.tensor(list(each)).view(3, 1, 1) for each in (mean, std))
    return pixels.float().sub(centre).div_(unit)


def derive_seed(*numbers: int) -> int:
    """Derives a seed that depends on all the numbers; neighbours give unrelated seeds.

    Args:
        numbers: Seed of the run, what the seed is for, step, ...

    Returns:
        A number below 2^63.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Batches by step: `batches[step]` is this process's part of it, images and labels (soft ones under mixup).

    The order of an epoch, crops and mixing depend on seed and step alone. All processes take as many images of a batch.
    Where that is an even number each takes them from both ends, so that the partners that timm's mixup joins, first and
    last, stay together.
    """

    def __init__(self, recipe: Recipe, images: Images, pixels: Tensor | None, rank: int = 0, world: int = 1) -> None:
        self.recipe, self.images, self.pixels = recipe, images, pixels
        size = recipe.run.batch_size
        if size % (world * recipe.run.accumulate) or (self._mixes and size // world % 2):
            raise UsageError(
                f"A batch of {size} cannot be shared by {world} processes in {recipe.run.accumulate} pieces each"
                f"{' of an even number, as mixup needs' if self._mixes else ''}."
            )
        self.per_epoch = len(images) // size
        if self.per_epoch == 0:
            raise UsageError(f"{len(images)} training images do not fill one batch of {size}.")
        self.n_steps = max(1, round(recipe.run.epochs * self.per_epoch))
        position = torch.arange(size)
        pair = position.minimum(size - 1 - position)
        owner = position * world // size if size // world % 2 else pair * world // (size // 2)
        self.mine = (owner == rank).nonzero().flatten()
        self._transform: Any = _timm_transform(recipe.data) if pixels is None else None

    def __len__(self) -> int:
        return self.n_steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        seed = self.recipe.run.seed
        indices = self._batch_indices(step)
        labels = self.images.labels[indices]
        if self.pixels is None:
            images = torch.stack([self._transform_image(step, int(index)) for index in indices])
        elif self.recipe.data.augmentation == "crop_flip":
            generator = torch.Generator().manual_seed(derive_seed(seed, CROPS, step))
            images = self._normalise(self._crop_and_flip(self.pixels[indices], generator))
        else:
            images = self._normalise(self.pixels[indices])
        if not self._mixes:
            return images, labels
        with temporary_seed(derive_seed(seed, MIXING, step)):
            mixed: tuple[Tensor, Tensor] = self._mixup(images, labels)
        return mixed

    def from_step(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches from a step to the last, prepared by `workers` processes.

        Args:
            first: The step of the first batch.

        Returns:
            Images and labels, step by step.
        """
        loader = DataLoader(
            self, batch_size=None, sampler=range(first, self.n_steps), num_workers=self.recipe.data.workers
        )
        yield from loader

    def _normalise(self, pixels: Tensor) -> Tensor:
        return normalise(pixels, self.recipe.data.mean, self.recipe.data.std)

    def _batch_indices(self, step: int) -> Int[Tensor, "image"]:
        epoch, position = divmod(step, self.per_epoch)
        size = self.recipe.run.batch_size
        return self._order(epoch)[position * size : (position + 1) * size][self.mine]

    def _order(self, epoch: int) -> Int[Tensor, "image"]:
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.recipe.run.seed, ORDER, epoch))
            self._epoch, self._permuted = epoch, torch.randperm(len(self.images), generator=generator)
        return self._permuted

    def _crop_and_flip(self, pixels: UInt8[Tensor, "image 3 row column"], generator: torch.Generator) -> Tensor:
        """Random crops of the image with a reflected border, half of them flipped, by one index operation a batch."""
        border, size, (rows, columns) = self.recipe.data.border_px, self.recipe.run.batch_size, pixels.shape[-2:]
        top, left = torch.randint(0, 2 * border + 1, (2, size), generator=generator)[:, self.mine]
        flipped = (torch.rand(size, generator=generator) < 0.5)[self.mine]
        row = top[:, None] + torch.arange(rows)
        column = left[:, None] + torch.where(flipped[:, None], torch.arange(columns).flip(0), torch.arange(columns))
        wide = F.pad(pixels.float(), (border,) * 4, mode="reflect")
        image, channel = torch.arange(len(pixels))[:, None, None, None], torch.arange(3)[None, :, None, None]
        return wide[image, channel, row[:, None, :, None], column[:, None, None, :]]

    def _transform_image(self, step: int, index: int) -> Tensor:
        with temporary_seed(derive_seed(self.recipe.run.seed, PICTURES, step, index)):
            out: Tensor = self._transform(self.images.image(index))
        return out

    @property
    def _mixes(self) -> bool:
        return self.recipe.run.mixup > 0 or self.recipe.run.cutmix > 0

    @cached_property
    def _mixup(self) -> Any:
        from timm.data import Mixup

        run = self.recipe.run
        return Mixup(run.mixup, run.cutmix, label_smoothing=run.label_smoothing, num_classes=self.recipe.data.classes)


def _timm_transform(data: Data) -> Any:
    from timm.data import create_transform

    try:
        return create_transform(
            data.image_px, is_training=True, mean=tuple(data.mean), std=tuple(data.std), **data.timm
        )
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"[data] timm = {data.timm} is not taken by timm's create_transform ({type(error).__name__}: {error}). Its "
            "documentation lists options and their values."
        ) from error


@contextmanager
def temporary_seed(seed: int) -> Iterator[None]:
    """Within, the global generators that timm's transforms draw from start at `seed`; afterwards they are as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
