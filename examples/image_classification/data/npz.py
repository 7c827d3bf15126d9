"""Any data set in one ``.npz`` file: images as uint8 arrays or as JPEG bytes, and integer labels.

The arrays may have the names of Keras (``x_train``, ``y_train``, ``x_test``, ``y_test``), of MedMNIST
(``train_images``, ...) or ``images``, ``labels``, ``test_images`` and ``test_labels``. In place of an
image array, ``train_jpeg`` may hold the bytes of all JPEG files in a row, and ``train_offsets`` where
each begins and the last ends (likewise ``test_jpeg``). Optional: ``class_names``, and human labels
under the names of CIFAR-N (``worse_label``, ...). A file with CIFAR-10's class names is CIFAR-10.
"""

import io
import math
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from . import cifar_n
from .dataset import Dataset, as_images, as_labels, assemble, count_classes
from .errors import REMEDY, naming, refuse_expansion

IMAGES = {"train": ("x_train", "train_images", "images"), "test": ("x_test", "test_images")}
LABELS = {
    "train": ("y_train", "train_labels", "train_label", "labels"),
    "test": ("y_test", "test_labels", "test_label"),
}
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10_CLASSES += ["dog", "frog", "horse", "ship", "truck"]


def read(path: Path) -> Dataset:
    """Reads the file.

    Args:
      path: the ``.npz`` file.

    Returns:
      The data set, with the human labels in the file.

    Raises:
      ValueError: for a damaged file, missing or ambiguous arrays, or arrays that do not fit together.
    """
    contents = _read_arrays(path)
    images, test_images = (_images(contents, split, path) for split in ("train", "test"))
    label_keys = {split: _one_of(contents, names, path) for split, names in LABELS.items()}
    sources = {split: f"{path}: {key}" for split, key in label_keys.items()}
    class_names = contents.get("class_names", np.array([])).ravel().tolist()
    num_classes = len(class_names) or None
    labels = as_labels(contents[label_keys["train"]], sources["train"], len(images), num_classes)
    num_classes = num_classes or count_classes(labels, sources["train"])
    test_labels = as_labels(
        contents[label_keys["test"]], sources["test"], len(test_images), num_classes
    )
    dataset = assemble(
        "cifar10" if class_names == CIFAR10_CLASSES else "npz",
        (images, labels),
        (test_images, test_labels),
        num_classes,
        str(path),
    )
    return dataset._replace(human_labels=cifar_n.select(contents, labels, num_classes, path))


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as stream, naming(path, "an .npz file of arrays without pickles"):
        if stream.read(6) == np.lib.format.MAGIC_PREFIX:
            raise ValueError("it is a single array")
        _check_headers(stream, path.stat().st_size)
        with np.load(stream, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}


def _check_headers(stream: BinaryIO, stored: int) -> None:
    """Refuses arrays of another size than their headers say, and such as no file of images has."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    unpacked = 0
    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            with archive.open(member) as content:
                version = np.lib.format.read_magic(content)
                if version not in readers:
                    raise ValueError(f"{member.filename} has a header of version {version}")
                shape, _, dtype = readers[version](content)
                size = content.tell() + math.prod(shape) * dtype.itemsize
            if dtype.hasobject:
                raise ValueError(f"{member.filename} is pickled, which needs allow_pickle")
            if size != member.file_size:
                raise ValueError(
                    f"{member.filename} has {member.file_size:,} bytes where its shape needs {size:,}"
                )
            unpacked += size
    refuse_expansion(unpacked, stored)
    stream.seek(0)


def _one_of(contents: dict, names: tuple[str, ...], path: Path) -> str:
    found = [name for name in names if name in contents]
    if len(found) != 1:
        raise ValueError(
            f"{path} must have exactly one of {', '.join(names)}, got {', '.join(contents)}. "
            "Rename the arrays."
        )
    return found[0]


def _images(contents: dict, split: str, path: Path) -> np.ndarray:
    if f"{split}_jpeg" in contents:
        return _decode(contents, split, path)
    key = _one_of(contents, IMAGES[split], path)
    return as_images(contents[key], f"{path}: {key}")


def _decode(contents: dict, split: str, path: Path) -> np.ndarray:
    """Images from JPEG bytes; all must have one size."""
    from PIL import Image  # only for such files

    source = f"{path}: {split}_jpeg"
    data, offsets = contents[f"{split}_jpeg"], contents.get(f"{split}_offsets", np.array([]))
    if (
        data.dtype != np.uint8
        or data.ndim != 1
        or not np.issubdtype(offsets.dtype, np.integer)
        or offsets.ndim != 1
        or offsets.size < 2
        or offsets[0] != 0
        or offsets[-1] != data.size
        or (offsets[1:] <= offsets[:-1]).any()
    ):
        raise ValueError(
            f"{source} and {split}_offsets must be a row of {data.size} uint8 values and integers "
            f"that rise from 0 to {data.size}, got {offsets.size} of dtype {offsets.dtype}. {REMEDY}"
        )
    images = None
    for index, (start, stop) in enumerate(pairwise(offsets)):
        try:
            file = Image.open(io.BytesIO(data[start:stop].tobytes()), formats=["JPEG"])
            if images is None:
                refuse_expansion((offsets.size - 1) * math.prod(file.size) * 4, data.size)
            image = np.asarray(file)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{source}: image {index} is damaged: {error}. {REMEDY}") from error
        if images is None:
            images = np.empty((offsets.size - 1, *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise ValueError(
                f"{source}: image {index} has shape {image.shape} and the first one "
                f"{images.shape[1:]}, expected one shape. {REMEDY}"
            )
        images[index] = image
    return as_images(images, source)
