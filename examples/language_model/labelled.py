"""Texts with labels, some of them wrong: a table of yours, or lines of Python's standard library."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from optax_sam import label_noise

from . import data, tables
from .tables import Table, TextError

PACKAGES = (
    *("asyncio", "email", "http", "importlib"),
    *("logging", "multiprocessing", "unittest", "xml"),
)
PER_PACKAGE = 300
"""Texts of each class of the built-in set."""

NOISE_SEED = 0
"""Of the synthetic noise: runs with different seeds have the same wrong labels."""


class Texts(NamedTuple):
    """Labelled texts.

    Attributes:
      tokens: int16, shape ``(n, context)``, bytes, and −1 behind the end of a text.
      labels: int32, shape ``(n,)``, the classes that are learned.
      clean_labels: int32, shape ``(n,)``, the true classes, and −1 where they are not known. They are
        for evaluation only.
      rows: int64, shape ``(n,)``, where the texts stand in their table.
    """

    tokens: np.ndarray
    labels: np.ndarray
    clean_labels: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Texts":
        """The chosen texts."""
        return Texts(*(array[indices] for array in self))


class Labelled(NamedTuple):
    """A set of labelled texts; texts that look equal to the network are in the same part.

    Attributes:
      train: to learn from.
      validation: to evaluate on.
      class_names: the classes as the table names them.
      digest: SHA-256 of everything.
      notes: what the reader should know.
    """

    train: Texts
    validation: Texts
    class_names: tuple[str, ...]
    digest: str
    notes: tuple[str, ...]


def load(
    text: str,
    columns: tables.Columns,
    context: int,
    validation_share: float,
    noise_rate: float | None,
) -> Labelled:
    """Reads labelled texts.

    Args:
      text: ``stdlib``, or a CSV, Parquet or JSON lines file.
      columns: the names of the file's columns.
      context: bytes that the network sees; longer texts are cut.
      validation_share: share of the texts for validation.
      noise_rate: share of all labels that are replaced by another class; by default 0.4 of the built-in
        set's and none of a file's.

    Raises:
      TextError: for a table that cannot be used.
    """
    if text == "stdlib":
        table, noise_rate = standard_library(context), 0.4 if noise_rate is None else noise_rate
    else:
        table = tables.read(Path(text), columns)
    class_names, labels, clean_labels = _classes(table, text)
    if noise_rate is not None:
        noisy = label_noise.symmetric(labels, noise_rate, len(class_names), seed=NOISE_SEED)
        clean_labels = labels if table.clean_labels is None else clean_labels
        labels = noisy.labels
    texts = Texts(
        _tokens(table.texts, context), labels, clean_labels, np.arange(len(labels), dtype=np.int64)
    )
    # By what the network sees alone: what stands twice in a table is not learned and then asked.
    held_out = np.array([data.place(one) < validation_share for one in _seen(table.texts, context)])
    train, validation = (texts.take(np.flatnonzero(held_out == part)) for part in (False, True))
    for what, part in (("training", train), ("validation", validation)):
        if not len(part):
            raise TextError(
                f"--text: {text!r} has {len(texts)} texts, none of them for {what}. Give "
                "more texts, or another --validation-share."
            )
    notes = [f"{len(train):,} texts to learn, {len(validation):,} held out", *table.notes]
    if cut := sum(len(one.encode()) > context for one in table.texts):
        notes.append(f"{cut:,} are longer than --context {context} bytes: their ends are left out")
    return Labelled(
        train, validation, class_names, _digest(texts, held_out, class_names), tuple(notes)
    )


def standard_library(context: int) -> Table:
    """Windows of whole lines of eight packages: 300 of each, evenly chosen. The package is the label.

    Args:
      context: bytes that a window has at most.
    """
    windows: dict[str, list[str]] = {name: [] for name in PACKAGES}
    for path, content in data.read("stdlib", "*.py").items():
        package = path.split("/")[0]
        if package in windows:
            windows[package] += _windows_of_lines(content.decode("utf-8", "replace"), context)
    texts, labels = [], []
    for package, found in windows.items():
        count = min(PER_PACKAGE, len(found))
        texts += [found[i] for i in np.linspace(0, len(found) - 1, count).astype(int)]
        labels += [package] * count
    return Table(texts, np.array(labels), None, ())


def _windows_of_lines(content: str, size: int) -> list[str]:
    """Cuts at ends of lines; of a longer line, the beginning. What is nearly empty is left out."""
    windows, window = [], ""
    for line in content.splitlines(keepends=True):
        if len((window + line).encode()) > size:
            windows.append(window)
            window = ""
        window += line
    return [window for window in (*windows, window) if len(window.strip()) > size // 2]


def _classes(table: Table, text: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """The names of the classes, the labels and the clean labels as indices into them."""
    known = table.clean_labels
    given = [table.labels] if known is None else [table.labels, known.values[known.is_known]]
    names = np.unique(np.concatenate(given))
    if len(np.unique(table.labels)) < 2:
        raise TextError(f"--text: all labels in {text!r} are {names[0]!s}. Two classes are needed.")
    if len(names) > max(2, len(table.labels) // 2):
        raise TextError(
            f"--text: {text!r} has {len(names):,} different labels for {len(table.labels):,} texts. "
            "Name the column of the classes with --label-column."
        )
    labels = np.searchsorted(names, table.labels).astype(np.int32)
    clean_labels = np.full(len(labels), -1, np.int32)
    if known is not None:
        clean_labels[known.is_known] = np.searchsorted(names, known.values[known.is_known])
    return tuple(map(str, names)), labels, clean_labels


def _seen(texts: list[str], context: int) -> list[bytes]:
    """What the network sees of each text."""
    return [text.encode()[:context] for text in texts]


def _tokens(texts: list[str], context: int) -> np.ndarray:
    tokens = np.full((len(texts), context), -1, np.int16)
    for row, content in zip(tokens, _seen(texts, context), strict=True):
        row[: len(content)] = np.frombuffer(content, np.uint8)
    return tokens


def _digest(texts: Texts, held_out: np.ndarray, class_names: tuple[str, ...]) -> str:
    digest = hashlib.sha256(repr(class_names).encode())
    for array in (*texts, held_out):
        digest.update(
            f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()
        )
    return digest.hexdigest()


def batch_of(texts: Texts, indices: np.ndarray, size: int | None = None) -> data.Batch:
    """The chosen texts, filled up to ``size`` with texts without weight.

    Returns:
      A batch whose labels and weights have the shape ``(batch,)``.
    """
    chosen = texts.take(indices)
    missing = 0 if size is None else size - len(indices)
    return data.Batch(
        np.pad(chosen.tokens.astype(np.int32), ((0, missing), (0, 0))),
        np.pad(chosen.labels, (0, missing)),
        np.pad(np.ones(len(indices), np.float32), (0, missing)),
    )
