"""Reads a dictionary of arrays or tensors that ``torch.save`` wrote, without PyTorch.

Since PyTorch 1.6 such a file is a zip archive with a pickle ``data.pkl`` and one member of raw bytes
per storage, ``data/0``, ``data/1`` and so on. Before, it was five pickles in a row and then the
storages, each after its number of elements as a little-endian int64.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import naming, refuse_expansion
from .pickles import Unpickler, array, dictionary

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001


def read(path: Path) -> dict[str, Any]:
    """Reads one file of either layout.

    Args:
      path: the file.

    Returns:
      The dictionary; its arrays and tensors are NumPy arrays.

    Raises:
      ValueError: for a damaged file, another root object, or anything that is not plain data.
    """
    with open(path, "rb") as stream, naming(path, "a dictionary saved by torch.save"):
        if zipfile.is_zipfile(stream):
            return _read_zip(stream, path.stat().st_size)
        return _read_legacy(stream)


class _Storage:
    """The raw elements of a tensor; ``values`` are set when they are reached in the file."""

    __slots__ = ("count", "dtype", "values")  # no others, such as NumPy's __array_interface__

    def __init__(self, dtype: str, count: int):
        self.dtype, self.count = np.dtype(dtype), count
        self.values: np.ndarray | None = None

    def fill(self, data: bytes) -> None:
        self.values = array(data, self.dtype, (self.count,), "C")


class _TorchUnpickler(Unpickler):
    """Tensors name their storage by a key; the unpickler collects them."""

    def __init__(self, stream: BinaryIO):
        super().__init__(stream)
        self.storages: dict[str, _Storage] = {}

    def persistent_load(self, pid: tuple) -> _Storage:
        kind, dtype, key, _, count, *_ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to a {kind!r}")
        return self.storages.setdefault(key, _Storage(dtype, count))


def _read_zip(stream: BinaryIO, stored: int) -> dict[str, Any]:
    with zipfile.ZipFile(stream) as archive:
        refuse_expansion(sum(member.file_size for member in archive.infolist()), stored)
        members = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(members) != 1:
            raise pickle.UnpicklingError(f"it is a zip archive with {len(members)} data.pkl")
        folder = members[0].removesuffix(".pkl")
        unpickler = _TorchUnpickler(io.BytesIO(archive.read(members[0])))
        root = unpickler.load()
        for key, storage in unpickler.storages.items():
            storage.fill(archive.read(f"{folder}/{key}"))
    return dictionary(root)


def _read_legacy(stream: BinaryIO) -> dict[str, Any]:
    stream.seek(0)
    if Unpickler(stream).load() != LEGACY_MAGIC or Unpickler(stream).load() != LEGACY_VERSION:
        raise pickle.UnpicklingError("it does not start with PyTorch's magic number")
    Unpickler(stream).load()  # the byte order and word size of the machine that wrote it
    unpickler = _TorchUnpickler(stream)
    root = unpickler.load()
    for key in Unpickler(stream).load():
        storage = unpickler.storages[key]
        if int.from_bytes(stream.read(8), "little") != storage.count:
            raise pickle.UnpicklingError(f"the length of storage {key!r} is wrong")
        storage.fill(stream.read(storage.count * storage.dtype.itemsize))
    return dictionary(root)
