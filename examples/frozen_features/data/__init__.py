"""Reads features and labels: ``.npz``, CSV, Parquet, or digits with synthetic noise."""

from pathlib import Path

import numpy as np

from . import digits, npz, tables
from .features import DataError, Features

__all__ = ["DataError", "Features", "load", "load_inputs"]

TABLES = (".csv", ".parquet")


def load(
    path: Path | None,
    *,
    label_column: str | None = None,
    clean_label_column: str | None = None,
    ignore_columns: tuple[str, ...] = (),
    memory_limit_gib: float = 4.0,
) -> Features:
    """Reads a file and checks all of it.

    Args:
      path: an ``.npz``, ``.csv`` or ``.parquet`` file; None for digits with 40 % wrong labels.
      label_column: where the labels are; by default the column ``label`` of a table, or the array
        ``labels``.
      clean_label_column: of a table, a column with correct labels, for evaluation only.
      ignore_columns: of a table, columns that are no features.
      memory_limit_gib: what would take more memory than this is refused before it is read.

    Returns:
      The features.

    Raises:
      DataError: with the argument or array at fault, its value and the remedy.
    """
    if path is None or path.suffix.lower() == ".npz":
        _refuse("--clean-label-column", clean_label_column, "An .npz has the array clean_labels.")
        _refuse("--ignore-columns", ignore_columns, "It is for tables.")
    if path is None:
        _refuse("--label-column", label_column, "It is for a file; name one.")
        return digits.load()
    limit = _checked_limit(path, memory_limit_gib)
    if path.suffix.lower() == ".npz":
        return npz.read(path, limit, label_column or "labels")
    return tables.read(path, limit, label_column or "label", clean_label_column, ignore_columns)


def load_inputs(path: Path, columns: tuple[str, ...], memory_limit_gib: float = 4.0) -> np.ndarray:
    """Only the features of a file, shape ``(n, d)``; a table is read by the names of its columns."""
    limit = _checked_limit(path, memory_limit_gib)
    if path.suffix.lower() == ".npz":
        return npz.read_inputs(path, limit)
    return tables.read_inputs(path, limit, columns)


def _refuse(flag: str, value: object, remedy: str) -> None:
    """Refuses a flag that would do nothing."""
    if value:
        raise DataError(f"{flag}: {value!r} would do nothing here. {remedy}")


def _checked_limit(path: Path, memory_limit_gib: float) -> int:
    if not memory_limit_gib > 0:
        raise DataError(
            f"--memory-limit-gib: {memory_limit_gib!r} is not valid. It is a positive number of GiB."
        )
    if path.suffix.lower() not in (".npz", *TABLES):
        raise DataError(
            f"{path}: unknown kind of file {path.suffix!r}. Give .npz, .csv or .parquet."
        )
    if not path.is_file():
        raise DataError(f"{path}: there is no such file. Check the path.")
    return int(memory_limit_gib * 2**30)
