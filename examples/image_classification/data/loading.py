"""Finds out which format a path is in and reads it."""

from functools import partial
from pathlib import Path

from . import cifar, cifar_n, digits, idx, npz
from .dataset import Dataset
from .errors import listing

FORMATS = (
    "a folder with CIFAR-10 or CIFAR-100 (python version: data_batch_1, ... or train), a folder with "
    'idx files (train-images-idx3-ubyte, ..., plain or .gz), an .npz file, or "digits". '
    "Extract other archives first"
)


def load(path: str | Path, human_labels: str | Path | None = None) -> Dataset:
    """Loads a data set; the format is told by the files.

    Args:
      path: ``"digits"`` for the digits of scikit-learn, an ``.npz`` file (see :mod:`.npz`), or a
        folder: ``cifar-10-batches-py`` or ``cifar-100-python`` (see :mod:`.cifar`) or the one that
        contains it, or a folder with idx files (see :mod:`.idx`).
      human_labels: a label file of CIFAR-N (see :mod:`.cifar_n`). One that lies in a folder ``path``,
        or beside its images, is found without being named.

    Returns:
      The data set, completely checked.

    Raises:
      FileNotFoundError: if the path or one of its files does not exist.
      ValueError: for an unknown format or a damaged file.

    Example:
      >>> from examples.image_classification.data import load
      >>> load("digits").images.shape
      (1297, 8, 8, 1)
    """
    if path == "digits":
        dataset, folders = digits.read(), ()
    else:
        dataset, folders = _read(Path(path).expanduser())
    found = (cifar_n.find(folder, dataset.name) for folder in folders)
    label_file = human_labels or next(filter(None, found), None)
    return cifar_n.attach(dataset, Path(label_file).expanduser()) if label_file else dataset


def _read(path: Path) -> tuple[Dataset, tuple[Path, ...]]:
    """The data set, and the folders in which its human labels may lie."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give {FORMATS}.")
    if path.is_file():
        if path.suffix != ".npz":
            raise ValueError(f"{path} is a file of an unknown format. Give {FORMATS}.")
        return npz.read(path), ()
    readers = _readers(path)
    if len(readers) != 1:
        several = ", ".join(str(reader.args[0]) for reader in readers)
        found = f"several, in {several}" if readers else listing(path)
        raise ValueError(f"{path} must have one data set, got {found}. Give {FORMATS}.")
    return readers[0](), (path, readers[0].args[0])


def _readers(path: Path) -> list[partial]:
    """One reader for each data set of which any file lies in a folder, or where CIFAR extracts to."""
    readers = []
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-100-python"):
        for layout in (cifar.CIFAR10, cifar.CIFAR100):
            if any((folder / name).is_file() for name in layout.files):
                readers.append(partial(cifar.read, folder, layout))
        if idx.find(folder):
            readers.append(partial(idx.read, folder))
    return readers
