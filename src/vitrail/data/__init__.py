"""Image sources: folders, class folders, lists and tables of files, archives, datasets, the built-in crops.

    source = open_images("photos/", class_names=vit.class_names)     names, order and labels; nothing is decoded yet
    manifest = scan(source)                                          decodes each image once: usable, or skipped and why
    image = load_image(source, manifest.images[0])                   RGB; the content must still be what was scanned
    manifest = with_masks(manifest, "masks/")                        instance ids beside the images: `load_mask`

Ids are paths relative to the folder with forward slashes, in natural order: runs of digits compare as numbers, all else
by code point, so `img2.png` precedes `img10.png`. A list of files keeps its own order, with ids relative to the folder
that all of them share. A dataset's ids are its row numbers.

Labels come from names, never from positions: the name of the class folder (or of the dataset's class) is looked up
in the class names, and a WordNet id such as `n01440764` in them or in timm's ImageNet tables. If none is found and all
are numbers of classes, they are those; else there are no labels, and `labels_from` says why. If only some are found, or
one means two classes, that is an error.

No torch here. What a file may do to us is bounded: formats are a short fixed list, bytes and pixels are capped before
anything is decoded, and a file that cannot be used is a `BadImage` with its reason.
"""

from vitrail.data.channels import image_of_channels
from vitrail.data.decode import MAX_BYTES, MAX_PIXELS, PhotographLike, as_photograph, decode_image
from vitrail.data.images import ImageEntry, ImageSource, Manifest, Skipped
from vitrail.data.labels import LabelSource, class_title, read_class_names
from vitrail.data.masks import ids_of, load_mask, read_mask, with_masks
from vitrail.data.scanning import EarlierScan, image_digest, load_image, scan, stored_image
from vitrail.data.sources import open_images

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "EarlierScan",
    "ImageEntry",
    "ImageSource",
    "LabelSource",
    "Manifest",
    "PhotographLike",
    "Skipped",
    "as_photograph",
    "class_title",
    "decode_image",
    "ids_of",
    "image_digest",
    "image_of_channels",
    "load_image",
    "load_mask",
    "open_images",
    "read_class_names",
    "read_mask",
    "scan",
    "stored_image",
    "with_masks",
]
