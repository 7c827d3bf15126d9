"""What a data set is, the checks that every format goes through, and stratified subsets.

A reader hands its raw arrays to :func:`as_images` and :func:`as_labels` and the checked ones to
:func:`assemble`; nothing is returned before all of it has been checked.
"""

from typing import NamedTuple

import numpy as np

from .errors import REMEDY


class Dataset(NamedTuple):
    """Images with clean labels, split into a training and a test set.

    Attributes:
      name: ``"cifar10"``, ``"cifar100"``, ``"idx"``, ``"npz"`` or ``"digits"``.
      images: uint8, shape ``(n, height, width, channels)``, the training images.
      labels: int32, shape ``(n,)``, the clean training labels.
      test_images: uint8, shape ``(m, height, width, channels)``.
      test_labels: int32, shape ``(m,)``.
      num_classes: number of classes; the labels lie in ``[0, num_classes)``.
      human_labels: name of an annotation to its training labels, int32, shape ``(n,)``: real
        people's mistakes. CIFAR-10N has ``worse``, ``aggregate``, ``random1``, ``random2`` and
        ``random3``, CIFAR-100N has ``noisy_fine``; empty for other data.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    human_labels: dict[str, np.ndarray]


def as_images(values, source: str) -> np.ndarray:
    """Checks images and gives gray ones, shape ``(n, height, width)``, their channel axis.

    Args:
      values: uint8, shape ``(n, height, width)`` or ``(n, height, width, channels)`` with 1, 3 or 4
        channels.
      source: the file, and the array in it, for the error message.

    Returns:
      uint8, shape ``(n, height, width, channels)``, contiguous.

    Raises:
      ValueError: for another type or shape, or for no images.
    """
    if not isinstance(values, np.ndarray):
        raise ValueError(
            f"{source}: the images are a {type(values).__name__}, not an array. {REMEDY}"
        )
    if values.dtype != np.uint8:
        raise ValueError(
            f"{source}: the images have dtype {values.dtype}, expected uint8 in [0, 255]. "
            "Save the original pixel values."
        )
    images = values[..., None] if values.ndim == 3 else values
    if images.ndim != 4 or 0 in images.shape or images.shape[3] not in (1, 3, 4):
        raise ValueError(
            f"{source}: the images have shape {values.shape}, expected (n, height, width) or "
            "(n, height, width, channels) with n ≥ 1 and 1, 3 or 4 channels. "
            "Move a leading channel axis to the end."
        )
    return np.ascontiguousarray(images)


def as_labels(
    values, source: str, count: int | None = None, num_classes: int | None = None
) -> np.ndarray:
    """Checks integer class labels.

    Args:
      values: integers, shape ``(n,)`` or ``(n, 1)``, as an array or a list.
      source: the file, and the array in it, for the error message.
      count: the number of images they belong to, if known.
      num_classes: the number of classes, if known.

    Returns:
      int32, shape ``(n,)``.

    Raises:
      ValueError: for another type, shape or number, or for labels outside the classes.
    """
    try:
        labels = np.asarray(values)
    except ValueError as error:  # a ragged list
        raise ValueError(f"{source}: the labels are not one list of integers. {REMEDY}") from error
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{source}: the labels have dtype {labels.dtype} and shape {labels.shape}, expected "
            "integers of shape (n,). Take the argmax of one-hot labels."
        )
    if count is not None and labels.size != count:
        raise ValueError(f"{source}: {labels.size} labels for {count} images. {REMEDY}")
    limit = np.iinfo(np.int32).max if num_classes is None else num_classes
    if labels.size and not 0 <= labels.min() <= labels.max() < limit:
        raise ValueError(
            f"{source}: the labels go from {labels.min()} to {labels.max()}, expected the range "
            f"[0, {limit}). {REMEDY}"
        )
    return labels.astype(np.int32)


def count_classes(labels: np.ndarray, source: str) -> int:
    """The number of classes of a format that does not say it: every class has a training image.

    Without that rule one damaged label would silently add classes.

    Raises:
      ValueError: for a gap between the classes.
    """
    present = np.unique(labels)
    num_classes = int(present.max()) + 1
    if present.size != num_classes:
        raise ValueError(
            f"{source}: the training labels have {present.size} different values, up to "
            f"{num_classes - 1}, expected every class from 0 to the last. "
            "Renumber the classes without a gap."
        )
    return num_classes


def assemble(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    num_classes: int,
    source: str,
) -> Dataset:
    """Joins a checked training and test set: images of one size, and something to tell apart."""
    if num_classes < 2:
        raise ValueError(f"{source}: {num_classes} class, expected at least 2. {REMEDY}")
    sizes = [images.shape[1:] for images, _ in (train, test)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{source}: the training images have size {sizes[0]} and the test images {sizes[1]}, "
            f"expected one size. {REMEDY}"
        )
    return Dataset(name, *train, *test, num_classes, human_labels={})


def subset(dataset: Dataset, count: int, seed: int = 0) -> Dataset:
    """Takes a stratified subset of the training set; the test set stays whole.

    Each class has its share of ``count`` up to one image. The images keep their order, and with one
    seed a smaller subset is part of a larger one.

    Args:
      dataset: the data set.
      count: number of training images, at least one per class and at most all.
      seed: seed of the random choice.

    Returns:
      The data set with ``count`` training images, their labels and their human labels.

    Raises:
      ValueError: for another count.
    """
    total = dataset.labels.size
    if not dataset.num_classes <= count <= total:
        raise ValueError(
            f"--subset: {count!r} is not valid. It lies in [{dataset.num_classes}, {total}], from one "
            "training image per class to all."
        )
    order = np.random.default_rng(seed).permutation(total)
    # Each image's place within its class, as a share: the `count` smallest are the sample.
    place = np.empty(total)
    for label in range(dataset.num_classes):
        members = order[dataset.labels[order] == label]
        place[members] = (np.arange(members.size) + 0.5) / max(members.size, 1)
    chosen = np.sort(order[np.argsort(place[order], kind="stable")[:count]])
    return dataset._replace(
        images=dataset.images[chosen],
        labels=dataset.labels[chosen],
        human_labels={name: labels[chosen] for name, labels in dataset.human_labels.items()},
    )
