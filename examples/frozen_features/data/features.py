"""What is trained on: features, labels, and what is known only for evaluation."""

import hashlib
from typing import NamedTuple

import numpy as np

CHUNK = 4096


class DataError(ValueError):
    """Data that cannot be used; the message says what, its value and the remedy."""


class Features(NamedTuple):
    """A data set.

    Attributes:
      inputs: shape ``(n, d)``, uint8, float16 or float32, as in the file: not standardized.
      labels: int32, shape ``(n,)``, indices into ``class_names``; the observed labels.
      class_names: the classes as the file names them.
      mean, deviation: float32, shape ``(d,)``, of the columns.
      soft_labels: float32, shape ``(n, classes)``, the shares of a row's answers; None without crowd.
      clean_labels: int32, shape ``(n,)``; never trained on.
      test_inputs, test_labels: shapes ``(m, d)`` and ``(m,)``; never trained on.
      columns: names of the features, of a table.
      notes: what the reader should know, such as the number of tied votes.
    """

    inputs: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    mean: np.ndarray
    deviation: np.ndarray
    soft_labels: np.ndarray | None = None
    clean_labels: np.ndarray | None = None
    test_inputs: np.ndarray | None = None
    test_labels: np.ndarray | None = None
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    def digest(self) -> str:
        """SHA-256 of all arrays, to tell whether two runs saw the same."""
        digest = hashlib.sha256()
        for value in self:
            if isinstance(value, np.ndarray):
                digest.update(f"{value.dtype}{value.shape}".encode())
                digest.update(np.ascontiguousarray(value).tobytes())
            else:
                digest.update(repr(value).encode())
        return digest.hexdigest()


def compact(inputs: np.ndarray, source: str) -> np.ndarray:
    """Checks features and keeps uint8, float16 and float32; other numbers become float32."""
    if inputs.ndim != 2 or 0 in inputs.shape:
        raise DataError(
            f"{source} has shape {inputs.shape}. It must be (rows, features), neither of them 0."
        )
    if inputs.dtype.kind not in "buif":
        raise DataError(f"{source} has dtype {inputs.dtype}. Convert it to numbers.")
    if inputs.dtype not in (np.uint8, np.float16, np.float32):
        with np.errstate(over="ignore"):  # what overflows is reported as not finite
            inputs = inputs.astype(np.float32)
    if inputs.dtype.kind == "f":
        for start in range(0, len(inputs), CHUNK):
            finite = np.isfinite(inputs[start : start + CHUNK])
            if not finite.all():
                row, column = np.argwhere(~finite)[0]
                value = inputs[start + row, column]
                raise DataError(
                    f"{source}: row {start + row}, column {column} is {value} in float32. "
                    "Remove the row, or fill in a number."
                )
    return inputs


def column_statistics(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of every column, in float64, in the memory of a few rows."""
    total = np.zeros(inputs.shape[1])
    for start in range(0, len(inputs), CHUNK):
        total += inputs[start : start + CHUNK].sum(axis=0, dtype=np.float64)
    mean = total / len(inputs)
    squares = np.zeros(inputs.shape[1])
    for start in range(0, len(inputs), CHUNK):
        squares += np.square(inputs[start : start + CHUNK] - mean).sum(axis=0)
    deviation = np.sqrt(squares / len(inputs))
    constant = deviation <= 1e-6 * np.maximum(np.abs(mean), 1e-30)
    return mean.astype(np.float32), np.where(constant, 1.0, deviation).astype(np.float32)


def assemble(
    inputs: np.ndarray,
    labels: np.ndarray,
    source: str,
    *,
    clean_labels: np.ndarray | None = None,
    test_inputs: np.ndarray | None = None,
    test_labels: np.ndarray | None = None,
    soft_labels: np.ndarray | None = None,
    columns: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> Features:
    """Fits the arrays of a file together.

    Args:
      inputs: features, shape ``(n, d)``.
      labels: classes by any integers or strings, shape ``(n,)``.
      source: the file, for error messages.
      clean_labels: correct classes, shape ``(n,)``.
      test_inputs: shape ``(m, d)``.
      test_labels: shape ``(m,)``.
      soft_labels: shares of the classes 0, 1, ..., shape ``(n, classes)``.
      columns: names of the features.
      notes: what the reader should know.

    Returns:
      The data set.

    Raises:
      DataError: for what does not fit.
    """
    inputs = compact(inputs, f"{source}: inputs")
    given = {"labels": labels, "clean_labels": clean_labels, "test_labels": test_labels}
    flat = {
        name: _flat(array, f"{source}: {name}")
        for name, array in given.items()
        if array is not None
    }
    for name in ("labels", "clean_labels"):
        if name in flat and len(flat[name]) != len(inputs):
            raise DataError(
                f"{source}: {name} has {len(flat[name]):,} rows and inputs has {len(inputs):,}. "
                "Each row needs one label."
            )
    if len({array.dtype.kind in "iu" for array in flat.values()}) > 1:
        kinds = ", ".join(f"{name} {array.dtype}" for name, array in flat.items())
        raise DataError(
            f"{source}: {kinds}. Name the classes by integers or by strings, everywhere."
        )
    if (test_inputs is None) != (test_labels is None):
        raise DataError(
            f"{source}: test_inputs and test_labels come together. Give both or neither."
        )
    if test_inputs is not None:
        test_inputs = compact(test_inputs, f"{source}: test_inputs")
        if test_inputs.shape[1] != inputs.shape[1] or len(test_inputs) != len(flat["test_labels"]):
            raise DataError(
                f"{source}: test_inputs has shape {test_inputs.shape}, inputs {inputs.shape} and "
                f"test_labels {flat['test_labels'].shape}. Rows and columns must agree."
            )
    if soft_labels is not None:  # numbered classes
        classes = np.arange(soft_labels.shape[1])
    else:
        classes = np.unique(np.concatenate([np.unique(array) for array in flat.values()]))
    observed = np.unique(flat["labels"])
    if len(observed) < 2:
        raise DataError(f"{source}: labels has only the class {observed[0]}. Two are needed.")
    if len(classes) > max(2, len(inputs) // 2):
        raise DataError(
            f"{source}: {len(classes):,} classes in {len(inputs):,} rows. Is this the label column?"
        )
    indices = {}
    for name, array in flat.items():
        position = np.searchsorted(classes, array).clip(max=len(classes) - 1)
        unknown = np.unique(array[classes[position] != array])
        if unknown.size:
            raise DataError(
                f"{source}: {name} has the class {unknown[0]}, which nobody answered. Correct it."
            )
        indices[name] = position.astype(np.int32)
    mean, deviation = column_statistics(inputs)
    return Features(
        inputs,
        indices["labels"],
        tuple(map(str, classes.tolist())),
        mean,
        deviation,
        soft_labels,
        indices.get("clean_labels"),
        test_inputs,
        indices.get("test_labels"),
        columns,
        notes,
    )


def _flat(labels: np.ndarray, source: str) -> np.ndarray:
    if labels.ndim != 1:
        raise DataError(f"{source} has shape {labels.shape}. It must be (rows,).")
    if labels.dtype.kind == "b":
        labels = labels.astype(np.uint8)
    if labels.dtype.kind == "S":
        try:
            labels = np.char.decode(labels, "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{source} holds bytes that are no UTF-8 ({error}). Store strings."
            ) from None
    if labels.dtype.kind not in "iuUST":
        raise DataError(f"{source} has dtype {labels.dtype}. Name classes by integers or strings.")
    if labels.dtype.kind in "iu" and labels.size and labels.min() < 0:
        row = int(np.argmin(labels))
        raise DataError(
            f"{source}: row {row} is {labels[row]}. A class is at least 0; remove rows without one."
        )
    # Of int64 and uint64 together NumPy would make floats.
    return labels.astype(np.int64) if labels.dtype.kind in "iu" else labels
