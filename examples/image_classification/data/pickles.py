"""Reads a pickled dictionary of arrays without running anything from the file.

A pickle is a program: it names functions of any module, and the standard unpickler imports and
calls them. Here a name is looked up in a closed table, and behind each name stands a class of this
file that only keeps data. Not even NumPy's own unpickling is used, because it trusts its input; an
array is made from its bytes after the shape and the dtype have been checked.
"""

import math
import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import naming


def read(path: Path) -> dict[str, Any]:
    """Reads a file that is one pickled dictionary, of Python 2 or 3.

    Args:
      path: the file.

    Returns:
      The dictionary; its arrays are NumPy arrays, its keys are text.

    Raises:
      ValueError: for a damaged file, another root object, or a name outside the table.
    """
    with open(path, "rb") as stream, naming(path, "a pickled dictionary of arrays"):
        return dictionary(Unpickler(stream).load())


def dictionary(root) -> dict[str, Any]:
    """The root object of a pickle, which must be a dictionary, as a plain one."""
    root = _plain(root)
    if not isinstance(root, dict):
        raise pickle.UnpicklingError(f"its root is a {type(root).__name__}, not a dictionary")
    # Pickles of Python 2 that Python 3 has read and written again have keys in bytes.
    return {
        key.decode("latin1") if isinstance(key, bytes) else key: _plain(value)
        for key, value in root.items()
    }


class Unpickler(pickle._Unpickler):
    """An unpickler that knows the names in ``STAND_INS`` and no others.

    It is the one in Python: the one in C reserves as much memory as a damaged file asks for.
    """

    def __init__(self, stream: BinaryIO):
        super().__init__(stream, encoding="latin1")  # the bytes in pickles of Python 2

    def find_class(self, module: str, name: str) -> Any:
        try:
            return STAND_INS[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which is not needed to store arrays and is not run"
            ) from None


class _Immutable(type):
    """Stand-ins cannot be changed, so that no pickle has an effect on the next one."""

    def __setattr__(cls, name, value):
        raise pickle.UnpicklingError(f"it tries to change {cls.__name__}.{name}")


class _DataType(metaclass=_Immutable):
    """``numpy.dtype``: a code such as ``i8``; the byte order comes with the state."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, *_):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple):
        self.order = state[1]

    @property
    def is_object(self) -> bool:
        return bool(re.fullmatch("O[48]?", self.code))

    def numpy(self) -> np.dtype:
        if not re.fullmatch("b1|[iu][1248]|f[248]", self.code) or self.order not in "<>|=":
            raise pickle.UnpicklingError(f"it has an array of dtype {self.order}{self.code}")
        return np.dtype(self.order + self.code)


class _Array(metaclass=_Immutable):
    """``numpy.ndarray``: empty at first, with shape, dtype and bytes in the state."""

    __slots__ = ("value",)

    def __init__(self, *_):
        self.value = None

    def __setstate__(self, state: tuple):
        _, shape, dtype, fortran_order, data = state
        if dtype.is_object:  # a list of the elements; np.save wraps a dictionary in one
            self.value = data[0] if shape == () else data
        else:
            self.value = array(data, dtype.numpy(), shape, "F" if fortran_order else "C")


class _ArrayFromBuffer(metaclass=_Immutable):
    """``numpy._core.numeric._frombuffer``: an array in protocol 5."""

    def __new__(cls, data, dtype: _DataType, shape: tuple, order: str):
        return array(data, dtype.numpy(), shape, order)


class _Scalar(metaclass=_Immutable):
    """``numpy._core.multiarray.scalar``: one number; some label files are lists of them."""

    def __new__(cls, dtype: _DataType, data):
        return array(data, dtype.numpy(), (), "C").item()


class _Bytes(metaclass=_Immutable):
    """``_codecs.encode``: how protocol 2 of Python 3 writes bytes."""

    def __new__(cls, text: str, encoding: str):
        return text.encode("latin1")


class _Tensor(metaclass=_Immutable):
    """``torch._utils._rebuild_tensor_v2``: a view of a storage that may be filled in later."""

    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(self, storage, offset: int, shape: tuple, strides: tuple, *_):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    @property
    def value(self) -> np.ndarray:
        contiguous = tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        if self.strides != contiguous:
            raise pickle.UnpicklingError(f"it has a tensor with strides {self.strides}")
        part = self.storage.values[self.offset : self.offset + math.prod(self.shape)]
        return part.reshape(self.shape)


def array(data, dtype: np.dtype, shape: tuple, order: str) -> np.ndarray:
    """An array from its bytes; ValueError if they are not exactly as many as the shape needs."""
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _plain(value):
    return value.value if isinstance(value, _Array | _Tensor) else value


STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _Scalar,
    ("numpy.core.numeric", "_frombuffer"): _ArrayFromBuffer,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DataType,
    ("_codecs", "encode"): _Bytes,
    ("collections", "OrderedDict"): dict,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    # A storage class is only asked for its dtype.
    ("torch", "ByteStorage"): "u1",
    ("torch", "CharStorage"): "i1",
    ("torch", "ShortStorage"): "<i2",
    ("torch", "IntStorage"): "<i4",
    ("torch", "LongStorage"): "<i8",
    ("torch", "FloatStorage"): "<f4",
    ("torch", "DoubleStorage"): "<f8",
}
