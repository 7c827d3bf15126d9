"""MNIST, Fashion-MNIST and others in the idx format, plain or compressed with gzip.

An idx file is two zero bytes, one byte for the type (8 is uint8), one for the number of axes, each
axis as a big-endian int32, and the values.

References:
  LeCun, Cortes and Burges, The MNIST Database of Handwritten Digits, 1998.
"""

import gzip
import math
import struct
from pathlib import Path

import numpy as np

from .dataset import Dataset, as_images, as_labels, assemble, count_classes
from .errors import listing, naming, refuse_expansion

UINT8 = 8
STEMS = {
    "images": ("train-images-idx3-ubyte", "train-images.idx3-ubyte"),
    "labels": ("train-labels-idx1-ubyte", "train-labels.idx1-ubyte"),
    "test_images": ("t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte"),
    "test_labels": ("t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"),
}
"""The four files; both spellings are in circulation."""


def find(folder: Path) -> dict[str, Path]:
    """Those of the four files that are in a folder, the plain one before the compressed one."""
    found = {}
    for part, stems in STEMS.items():
        names = (stem + ending for ending in ("", ".gz") for stem in stems)
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is not None:
            found[part] = path
    return found


def read(folder: Path) -> Dataset:
    """Reads the four files.

    Args:
      folder: the folder with the files.

    Returns:
      The data set, with one channel.

    Raises:
      FileNotFoundError: if one of the files is missing.
      ValueError: for a damaged file, or files that do not belong together.
    """
    paths = find(folder)
    for part, stems in STEMS.items():
        if part not in paths:
            raise FileNotFoundError(
                f"{folder / stems[0]} or {stems[0]}.gz is missing; the folder has "
                f"{listing(folder)}. Download the whole data set again."
            )
    images = as_images(_read_array(paths["images"], axes=3), str(paths["images"]))
    test_images = as_images(_read_array(paths["test_images"], axes=3), str(paths["test_images"]))
    labels = as_labels(
        _read_array(paths["labels"], axes=1), str(paths["labels"]), count=len(images)
    )
    num_classes = count_classes(labels, str(paths["labels"]))
    test_labels = as_labels(
        _read_array(paths["test_labels"], axes=1),
        str(paths["test_labels"]),
        len(test_images),
        num_classes,
    )
    return assemble("idx", (images, labels), (test_images, test_labels), num_classes, str(folder))


def _read_array(path: Path, axes: int) -> np.ndarray:
    expected = f"an idx file of uint8 with {axes} axes"
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as stream, naming(path, expected):
        zero, kind, found_axes = struct.unpack(">HBB", stream.read(4))
        if (zero, kind, found_axes) != (0, UINT8, axes):
            raise ValueError(f"its header says type {kind} and {found_axes} axes")
        shape = struct.unpack(f">{axes}i", stream.read(4 * axes))
        if min(shape) < 0:
            raise ValueError(f"its header says shape {shape}")
        refuse_expansion(math.prod(shape), path.stat().st_size)
        values = stream.read(math.prod(shape) + 1)  # one more, to notice a longer file
        if len(values) != math.prod(shape):
            relation = "fewer" if len(values) < math.prod(shape) else "more"
            raise ValueError(f"it has {relation} values than its shape {shape} needs")
        return np.frombuffer(values, np.uint8).reshape(shape)
