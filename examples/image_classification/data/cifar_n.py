"""CIFAR-10N and CIFAR-100N: the labels that people on a crowdsourcing platform gave to CIFAR.

The published files are ``CIFAR-10_human.pt`` and ``CIFAR-100_human.pt`` in the image order of the
"python version" of CIFAR, and ``CIFAR-10_human_ordered.npy`` and ``CIFAR-100_human_ordered.npy`` in
the order of TensorFlow Datasets. Each also has the clean labels, so a wrong order is noticed.

References:
  Wei et al., Learning with Noisy Labels Revisited: A Study Using Real-World Human Annotations,
  ICLR 2022, arXiv 2110.12088.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import torch_files
from .dataset import Dataset, as_labels
from .errors import naming, require_file
from .pickles import Unpickler, dictionary

ANNOTATIONS = {
    "aggre_label": "aggregate",
    "worse_label": "worse",
    "random_label1": "random1",
    "random_label2": "random2",
    "random_label3": "random3",
    "noisy_label": "noisy_fine",
    "noise_label": "noisy_fine",  # in CIFAR-100_human_ordered.npy
}
"""Name of an annotation in the files, and its name in :class:`Dataset`."""

FILES = {
    "cifar10": ("CIFAR-10_human.pt", "CIFAR-10_human_ordered.npy"),
    "cifar100": ("CIFAR-100_human.pt", "CIFAR-100_human_ordered.npy"),
}


def find(folder: Path, name: str) -> Path | None:
    """The label file of data set ``name`` in a folder, the one in the images' usual order first."""
    candidates = (folder / file for file in FILES.get(name, ()))
    return next((path for path in candidates if path.is_file()), None)


def attach(dataset: Dataset, path: Path) -> Dataset:
    """Adds the human labels of a file to a data set, in place of any it has.

    Args:
      dataset: the data set.
      path: a ``.pt`` or ``.npy`` file of CIFAR-N.

    Returns:
      The data set with ``human_labels``.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a damaged file, one without human labels, or one whose clean labels are not
        those of the data set.
    """
    readers = {".pt": torch_files.read, ".npy": _read_npy}
    if path.suffix not in readers:
        raise ValueError(f"{path} is not a CIFAR-N label file: give a .pt or .npy file.")
    contents = readers[path.suffix](require_file(path))
    if "clean_label" not in contents:
        raise ValueError(
            f"{path} has {', '.join(map(str, contents)) or 'nothing'}, but no clean_label, by which "
            "the order of the images is checked. Use the published file."
        )
    human_labels = select(contents, dataset.labels, dataset.num_classes, path)
    if not human_labels:
        raise ValueError(
            f"{path} has {', '.join(map(str, contents))}, but no human labels "
            f"({', '.join(ANNOTATIONS)}). Use the published file."
        )
    return dataset._replace(human_labels=human_labels)


def select(
    contents: Mapping[str, Any], labels: np.ndarray, num_classes: int, path: Path
) -> dict[str, np.ndarray]:
    """Picks the human labels out of a file's contents and compares its clean labels, if any."""

    def read(key: str) -> np.ndarray:
        return as_labels(contents[key], f"{path}: {key}", labels.size, num_classes)

    if "clean_label" in contents and (wrong := int((read("clean_label") != labels).sum())):
        raise ValueError(
            f"{path}: clean_label differs from the data set's labels for {wrong} of {labels.size} "
            "images, so it belongs to other images or another order. For the python version of "
            "CIFAR use the .pt file; the _ordered.npy files follow TensorFlow Datasets."
        )
    return {name: read(key) for key, name in ANNOTATIONS.items() if key in contents}


def _read_npy(path: Path) -> dict[str, Any]:
    """An array file whose one element is a pickled dictionary."""
    with open(path, "rb") as stream, naming(path, "a dictionary saved by numpy.save"):
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise pickle.UnpicklingError(f"its array format has version {version}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        if shape != () or not dtype.hasobject:
            raise pickle.UnpicklingError(f"it is an array of shape {shape} and dtype {dtype}")
        return dictionary(Unpickler(stream).load())
