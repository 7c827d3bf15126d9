"""Features in an ``.npz`` file; the headers of its arrays are checked before any data is read."""

import errno
import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .answers import count_votes
from .features import DataError, Features, assemble, compact

OPTIONAL = ("clean_labels", "test_inputs", "test_labels")


class Header(NamedTuple):
    """An array's shape and dtype, and the bytes that they take."""

    shape: tuple[int, ...]
    dtype: np.dtype
    size: int


def read(path: Path, limit: int, label_array: str = "labels") -> Features:
    """Reads ``inputs``, the labels and what there is of ``clean_labels`` and the test arrays.

    Args:
      path: the file.
      limit: bytes of memory that the arrays may take.
      label_array: name of the labels.

    Returns:
      The data set; two-dimensional labels are a crowd's answers, −1 for none.

    Raises:
      DataError: for a damaged file, missing arrays, pickles, or too much data.
    """
    arrays = read_arrays(path, ("inputs", label_array), OPTIONAL, limit)
    labels, soft = arrays[label_array], None
    notes: tuple[str, ...] = ()
    if labels.ndim == 2:
        votes = count_votes(labels, f"{path}: {label_array}", limit)
        labels, soft = votes.labels, votes.shares
        crowd = f"{arrays[label_array].shape[1]} annotators"
        notes = (f"{crowd}: majority vote; {votes.ties:,} ties drawn by lot",)
    return assemble(
        arrays["inputs"],
        labels,
        str(path),
        clean_labels=arrays.get("clean_labels"),
        test_inputs=arrays.get("test_inputs"),
        test_labels=arrays.get("test_labels"),
        soft_labels=soft,
        notes=notes,
    )


def read_inputs(path: Path, limit: int) -> np.ndarray:
    """Only the features."""
    return compact(read_arrays(path, ("inputs",), (), limit)["inputs"], f"{path}: inputs")


def read_arrays(
    path: Path,
    required: tuple[str, ...],
    optional: tuple[str, ...],
    limit: int,
    remedy: str | None = None,
) -> dict[str, np.ndarray]:
    """Reads the named arrays, each as long as its header says.

    Args:
      path: the file.
      required: names of arrays that must be there.
      optional: names of arrays that may be there.
      limit: bytes of memory that all may take.
      remedy: for a file that is damaged or lacks an array.

    Returns:
      The arrays by name.

    Raises:
      DataError: for a damaged file, missing arrays, pickles, or too much data.
      OSError: if the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            for name in required:
                if name not in names:
                    raise DataError(
                        f"{path} has no array {name!r}, only {', '.join(sorted(names)) or 'none'}. "
                        f"{remedy or 'Rename the arrays.'}"
                    )
            wanted = [name for name in (*required, *optional) if name in names]
            headers = {name: _read_header(archive, name, path) for name in wanted}
            total = sum(header.size for header in headers.values())
            if total > limit:
                raise DataError(
                    f"{path}: its arrays take {total / 2**30:.1f} GiB, more than the "
                    f"{limit / 2**30:.1f} of --memory-limit-gib. Raise it, or store float16 or uint8."
                )
            return {name: _read_array(archive, name) for name in wanted}
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(
            f"{path}: its arrays do not fit into the memory that is free. Free some, or store float16 "
            "or uint8."
        ) from error
    except OSError as error:
        # Of a decoder, or a place before the beginning of the file.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise _damaged(path, error, remedy) from error
    except Exception as error:  # a damaged archive is met as almost any exception
        raise _damaged(path, error, remedy) from error


def _damaged(path: Path, error: Exception, remedy: str | None) -> DataError:
    return DataError(
        f"{path} is damaged or not an .npz file without pickles: {str(error).rstrip('.')}. "
        f"{remedy or 'Write it again with numpy.savez.'}"
    )


def _read_header(archive: zipfile.ZipFile, name: str, path: Path) -> Header:
    with archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise ValueError(f"{name} has format version {version}")
        shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise DataError(f"{path}: {name} holds pickled objects. Store numbers or strings.")
    return Header(shape, dtype, math.prod(shape) * dtype.itemsize)


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
        if stream.read(1):  # the end also checks the checksum
            raise ValueError(f"{name} has more data than its shape says")
        return array
