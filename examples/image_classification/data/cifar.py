"""CIFAR-10 and CIFAR-100 in the "python version" of their authors: one pickle per batch of images.

CIFAR-10 is ``data_batch_1`` to ``data_batch_5``, ``test_batch`` and ``batches.meta``; CIFAR-100 is
``train``, ``test`` and ``meta``. A batch is a dictionary whose ``data`` has one image a row: 1,024
red, then green, then blue values, each row by row.

References:
  Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import pickles
from .dataset import Dataset, as_images, as_labels, assemble
from .errors import REMEDY, require_file


class Layout(NamedTuple):
    """Files of a data set and keys in them."""

    name: str
    num_classes: int
    train: tuple[str, ...]
    test: str
    meta: str
    label_key: str
    class_names_key: str

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.meta)


CIFAR10 = Layout(
    name="cifar10",
    num_classes=10,
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test="test_batch",
    meta="batches.meta",
    label_key="labels",
    class_names_key="label_names",
)

CIFAR100 = Layout(
    name="cifar100",
    num_classes=100,
    train=("train",),
    test="test",
    meta="meta",
    label_key="fine_labels",
    class_names_key="fine_label_names",
)


def read(folder: Path, layout: Layout) -> Dataset:
    """Reads all batches.

    Args:
      folder: ``cifar-10-batches-py`` or ``cifar-100-python``.
      layout: ``CIFAR10`` or ``CIFAR100``.

    Returns:
      The data set, without human labels.

    Raises:
      FileNotFoundError: if a batch is missing.
      ValueError: for a damaged batch or another number of classes.
    """
    paths = {name: require_file(folder / name) for name in layout.files}
    meta = paths[layout.meta]
    class_names = _entry(pickles.read(meta), layout.class_names_key, meta)
    if not isinstance(class_names, list) or len(class_names) != layout.num_classes:
        found = (
            f"{len(class_names)} classes" if isinstance(class_names, list) else repr(class_names)
        )
        raise ValueError(
            f"{meta}: {layout.class_names_key} has {found}, expected the names of "
            f"{layout.num_classes} classes. {REMEDY}"
        )
    batches = [_read_batch(paths[name], layout) for name in layout.train]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    test = _read_batch(paths[layout.test], layout)
    return assemble(layout.name, (images, labels), test, layout.num_classes, str(folder))


def _read_batch(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    contents = pickles.read(path)
    data = _entry(contents, "data", path)
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072:
        found = data.shape if isinstance(data, np.ndarray) else f"a {type(data).__name__}"
        raise ValueError(f"{path}: data has shape {found}, expected (n, 3072). {REMEDY}")
    images = as_images(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), f"{path}: data")
    labels = _entry(contents, layout.label_key, path)
    source = f"{path}: {layout.label_key}"
    return images, as_labels(labels, source, len(images), layout.num_classes)


def _entry(contents: dict, key: str, path: Path):
    if key not in contents:
        raise ValueError(
            f"{path} has {', '.join(map(str, contents)) or 'nothing'}, but no {key}. {REMEDY}"
        )
    return contents[key]
