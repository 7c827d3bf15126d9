"""Wrong training labels: simulated ones of :mod:`optax_sam.label_noise`, or real people's."""

import hashlib
from typing import NamedTuple

import numpy as np

from optax_sam import label_noise

from .dataset import Dataset

HUMAN = "human:"
"""Prefix of the noise that takes a human annotation, as in ``human:worse``."""

CIFAR100_SUPERCLASSES = (
    (4, 30, 55, 72, 95),  # aquatic mammals
    (1, 32, 67, 73, 91),  # fish
    (54, 62, 70, 82, 92),  # flowers
    (9, 10, 16, 28, 61),  # food containers
    (0, 51, 53, 57, 83),  # fruit and vegetables
    (22, 39, 40, 86, 87),  # household electrical devices
    (5, 20, 25, 84, 94),  # household furniture
    (6, 7, 14, 18, 24),  # insects
    (3, 42, 43, 88, 97),  # large carnivores
    (12, 17, 37, 68, 76),  # large man-made outdoor things
    (23, 33, 49, 60, 71),  # large natural outdoor scenes
    (15, 19, 21, 31, 38),  # large omnivores and herbivores
    (34, 63, 64, 66, 75),  # medium-sized mammals
    (26, 45, 77, 79, 99),  # non-insect invertebrates
    (2, 11, 35, 46, 98),  # people
    (27, 29, 44, 78, 93),  # reptiles
    (36, 50, 65, 74, 80),  # small mammals
    (47, 52, 56, 59, 96),  # trees
    (8, 13, 48, 58, 90),  # vehicles 1
    (41, 69, 81, 85, 89),  # vehicles 2
)
"""The 5 classes in each of the 20 superclasses of CIFAR-100."""

CLASS_MAPS = {
    "cifar10": label_noise.CIFAR10_CLASS_MAP,
    "cifar100": {
        label: classes[(place + 1) % 5]
        for classes in CIFAR100_SUPERCLASSES
        for place, label in enumerate(classes)
    },
    "digits": {2: 7, 3: 8, 5: 6, 6: 5, 7: 1},
}
"""What each class is mistaken for in asymmetric noise (Patrini et al., CVPR 2017): on CIFAR-100 the
next class of the same superclass, circularly."""


class NoisyLabels(NamedTuple):
    """Training labels, some of them wrong.

    Attributes:
      labels: int32, shape ``(n,)``.
      changed: bool, shape ``(n,)``, True where the label is wrong.
      digest: SHA-256 of the labels and the mask; two runs with one digest saw the same labels.
    """

    labels: np.ndarray
    changed: np.ndarray
    digest: str


def noisy_labels(dataset: Dataset, noise: str, rate: float, seed: int) -> NoisyLabels:
    """Makes the training labels of one run; the test labels always stay clean.

    Args:
      dataset: the data set.
      noise: a key of ``NOISE``, or ``"human:"`` and a human annotation of the data set.
      rate: share of wrong labels (of each mapped class if asymmetric). ``"none"`` and human labels
        ignore it.
      seed: seed of the simulated noise.

    Returns:
      :class:`NoisyLabels`.

    Raises:
      ValueError: for an unknown noise, an annotation that the data set lacks, a rate outside [0, 1],
        or asymmetric noise for data without a published map of confused classes.
    """
    if noise.startswith(HUMAN):
        labels = _human(dataset, noise.removeprefix(HUMAN))
        changed = labels != dataset.labels
    elif noise in NOISE:
        labels, changed = NOISE[noise](dataset, rate, seed)
    else:
        raise ValueError(f"noise must be {', '.join(NOISE)} or {HUMAN}<annotation>, got {noise!r}.")
    content = labels.astype("<i4").tobytes() + np.packbits(changed).tobytes()
    return NoisyLabels(labels, changed, hashlib.sha256(content).hexdigest())


def _none(dataset: Dataset, rate: float, seed: int):
    return dataset.labels.copy(), np.zeros(dataset.labels.shape, bool)


def _symmetric(dataset: Dataset, rate: float, seed: int):
    return label_noise.symmetric(dataset.labels, rate, dataset.num_classes, seed=seed)


def _asymmetric(dataset: Dataset, rate: float, seed: int):
    if dataset.name not in CLASS_MAPS:
        raise ValueError(
            f"asymmetric noise has a map of confused classes for {', '.join(CLASS_MAPS)}, not for "
            f"{dataset.name!r} data. Take pair_flip, which mistakes each class for the next one."
        )
    class_map = CLASS_MAPS[dataset.name]
    return label_noise.asymmetric(dataset.labels, rate, class_map, dataset.num_classes, seed=seed)


def _pair_flip(dataset: Dataset, rate: float, seed: int):
    return label_noise.pair_flip(dataset.labels, rate, dataset.num_classes, seed=seed)


def _instance_dependent(dataset: Dataset, rate: float, seed: int):
    return label_noise.instance_dependent(
        dataset.images, dataset.labels, rate, dataset.num_classes, seed=seed
    )


NOISE = {
    "none": _none,
    "symmetric": _symmetric,
    "asymmetric": _asymmetric,
    "pair_flip": _pair_flip,
    "instance_dependent": _instance_dependent,
}


def _human(dataset: Dataset, annotation: str) -> np.ndarray:
    if annotation not in dataset.human_labels:
        raise ValueError(
            f"this {dataset.name} data has the human annotations "
            f"{', '.join(dataset.human_labels) or '(none)'}, not {annotation!r}. "
            "Put the label file of CIFAR-N beside the data or name it with --human-labels."
        )
    return dataset.human_labels[annotation].copy()
