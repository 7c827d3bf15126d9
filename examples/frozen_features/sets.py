"""The data sets of the evidence, by name, each at a size that a slow processor can train many times."""

import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from optax_sam import label_noise

from .config import Config
from .data import DataError, Features, digits, load


class DataSet(NamedTuple):
    """Where a data set comes from, and how it is trained on.

    Attributes:
      file: in the folder of the data; None for scikit-learn's digits.
      column: the array with the labels; None for ``labels``.
      noise: synthetic noise in place of the file's labels: symmetric, or asymmetric (digits: the
        next digit; CIFAR-10: similar classes).
      rate: share of wrong labels of this noise.
      rows: a random part of so many rows, the same for every run; None for all.
      components: principal components, in place of the features; None for the features.
      epochs, hidden, batch_size: None for those of fit.py.
      decay: what the weight decays of all trials are multiplied by: few rows and few steps want more,
        as SGD's accuracy on held-out noisy labels showed in a first look at news and reviews.
    """

    file: str | None = None
    column: str | None = None
    noise: str | None = None
    rate: float = 0.0
    rows: int | None = None
    components: int | None = None
    epochs: int | None = None
    hidden: int | None = None
    batch_size: int | None = None
    decay: float = 1.0


CIFAR = DataSet("cifar10n_features.npz")
NEWS_FULL = DataSet("noisy_agnews.npz", decay=4.0)
REDUCED = CIFAR._replace(rows=5000, components=128, epochs=20, hidden=128, batch_size=64, decay=4.0)
NEWS = REDUCED._replace(file="noisy_agnews.npz")
REVIEWS = REDUCED._replace(file="sentiment_crowd.npz", rows=None, decay=8.0)

SETS = {
    "digits_symmetric_40": DataSet(noise="symmetric", rate=0.4),
    "digits_asymmetric_30": DataSet(noise="asymmetric", rate=0.3),
    "cifar10n_reduced_worse": REDUCED,
    "reviews_reduced": REVIEWS,
    "news_reduced": NEWS,
    "digits_symmetric_20": DataSet(noise="symmetric", rate=0.2),
    "digits_symmetric_60": DataSet(noise="symmetric", rate=0.6),
    "cifar10n_reduced_aggregate": REDUCED._replace(column="labels_aggre"),
    "cifar10n_reduced_random1": REDUCED._replace(column="labels_random1"),
    "cifar10n_reduced_symmetric_20": REDUCED._replace(noise="symmetric", rate=0.2),
    "cifar10n_reduced_symmetric_40": REDUCED._replace(noise="symmetric", rate=0.4),
    "cifar10n_reduced_symmetric_60": REDUCED._replace(noise="symmetric", rate=0.6),
    "cifar10n_reduced_asymmetric_20": REDUCED._replace(noise="asymmetric", rate=0.2),
    "cifar10n_reduced_asymmetric_40": REDUCED._replace(noise="asymmetric", rate=0.4),
    "cifar10n_reduced_asymmetric_60": REDUCED._replace(noise="asymmetric", rate=0.6),
    "news_full": NEWS_FULL,
    "cifar10n_random1": CIFAR._replace(column="labels_random1"),
    "cifar10n_worse": CIFAR,
}
"""By name; those at full size come last."""

FULL = ("news_full", "cifar10n_random1", "cifar10n_worse")

PEOPLE = (
    "cifar10n_reduced_aggregate",
    "cifar10n_reduced_random1",
    "cifar10n_reduced_worse",
    "reviews_reduced",
    "news_reduced",
    *FULL,
)

FAMILIES = {
    "people": PEOPLE,
    "synthetic": tuple(name for name in SETS if name not in PEOPLE),
}
"""Who made the noise: one table each."""


def heading(name: str) -> str:
    """The name of a data set in a table."""
    name = name.replace("cifar10n_reduced", "images").replace("cifar10n", "images full")
    return name.replace("_reduced", "").replace("_", " ")


def is_there(name: str, folder: Path | None) -> bool:
    """Whether the file of a data set is in the folder; digits are always there."""
    file = SETS[name].file
    return file is None or (folder is not None and (folder / file).is_file())


def load_set(name: str, folder: Path | None) -> Features:
    """A data set by its name.

    Raises:
      DataError: without the folder, the file or the arrays that it needs.
    """
    chosen = SETS[name]
    if chosen.file is None:
        kind = "pair_flip" if chosen.noise == "asymmetric" else "symmetric"
        return digits.load(chosen.rate, kind=kind)
    if folder is None:
        raise DataError(f"--data: {name!r} needs a folder. Name the one with {chosen.file}.")
    path = folder / chosen.file
    data = load(path, label_column=chosen.column)
    for array in ("clean_labels", "test_inputs", "test_labels"):
        if getattr(data, array) is None:
            raise DataError(f"{path} has no array {array!r}, which {name!r} needs. Add it.")
    if chosen.noise is not None and data.clean_labels is not None:
        data = data._replace(labels=_synthetic(data.clean_labels, chosen.noise, chosen.rate))
    if chosen.components is not None:
        data = reduced(data, projection(path, chosen.components))
    return data if chosen.rows is None else subset(data, chosen.rows)


def digest_of(name: str, folder: Path | None) -> str:
    """SHA-256 of a data set's file, to tell whether two runs saw the same; digits never change."""
    file = SETS[name].file
    if file is None or folder is None:
        return "scikit-learn"
    with open(folder / file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fitted(name: str, data: Features, epochs: int | None = None) -> Config:
    """The settings of the training on a data set."""
    chosen = SETS[name]
    epochs = chosen.epochs if epochs is None else epochs
    config = Config(epochs=epochs, hidden=chosen.hidden, batch_size=chosen.batch_size)
    return config.fitted_to(data)


def _synthetic(clean: np.ndarray, noise: str, rate: float) -> np.ndarray:
    if noise == "symmetric":
        return label_noise.symmetric(clean, rate, 10, seed=0).labels
    classes = label_noise.CIFAR10_CLASS_MAP
    return label_noise.asymmetric(clean, rate, classes, 10, seed=0).labels


@functools.cache
def projection(path: Path, components: int) -> np.ndarray:
    """The leading principal axes of a file's standardized features; no label is looked at."""
    return principal_axes(load(path), components)


def principal_axes(data: Features, components: int) -> np.ndarray:
    """Columns: the leading eigenvectors of the correlation matrix of all rows.

    Args:
      data: the data set.
      components: at most as many as there are features.

    Returns:
      float32, shape ``(d, components)``, the one with the largest variance first.
    """
    features = data.inputs.shape[1]
    products = np.zeros((features, features))
    for start in range(0, len(data.inputs), 4096):
        block = (data.inputs[start : start + 4096].astype(np.float32) - data.mean) / data.deviation
        products += block.T @ block
    axes = np.linalg.eigh(products)[1]
    # An eigenvector's sign is arbitrary: make its largest entry positive.
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(features)])
    return np.ascontiguousarray(axes[:, ::-1][:, :components], np.float32)


def reduced(data: Features, axes: np.ndarray) -> Features:
    """The data with principal components as features; training standardizes each, as any column."""

    def project(inputs: np.ndarray) -> np.ndarray:
        result: np.ndarray = ((inputs.astype(np.float32) - data.mean) / data.deviation) @ axes
        return result

    inputs = project(data.inputs)
    test = None if data.test_inputs is None else project(data.test_inputs)
    return data._replace(
        inputs=inputs, test_inputs=test, mean=inputs.mean(axis=0), deviation=inputs.std(axis=0)
    )


def subset(data: Features, rows: int) -> Features:
    """A random part of the rows, always the same; the test rows stay, and so does the scale."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(data.labels))[:rows])
    parts = {
        name: getattr(data, name)[chosen]
        for name in ("inputs", "labels", "clean_labels", "soft_labels")
        if getattr(data, name) is not None
    }
    return data._replace(**parts)
