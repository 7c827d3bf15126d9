"""Text as windows of bytes: no tokenizer, nothing to download."""

import functools
import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np

LEFT_OUT = {
    *("site-packages", "dist-packages"),  # not part of the library
    *("test", "tests", "idlelib", "__pycache__"),  # on some systems packages of their own
    *("encodings", "pydoc_data"),  # tables of characters; the text of ``manual``
}


class Windows(NamedTuple):
    """Pieces of text.

    Attributes:
      tokens: uint8, shape ``(n, context + 1)``; behind the end of a file, zeros.
      lengths: int32, shape ``(n,)``, how many bytes of a window there are to predict.
    """

    tokens: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)


class Batch(NamedTuple):
    """What a step is given; all have the shape ``(batch, context)``; see labelled.py for classes.

    Attributes:
      inputs: int32, bytes.
      labels: int32, the next bytes.
      weights: float32, 1, and 0 where there is nothing to predict.
    """

    inputs: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


class Text(NamedTuple):
    """A text, cut into windows of which no file has some in both parts.

    Attributes:
      train: to learn from.
      validation: to evaluate on.
      digest: SHA-256 of both.
    """

    train: Windows
    validation: Windows
    digest: str


def load(text: str, pattern: str, context: int, validation_share: float) -> Text:
    """Reads a text; see ``--text`` in config.py.

    Args:
      text: ``stdlib``, ``manual``, or the path of a file or folder.
      pattern: of a folder, the names of the files that count.
      context: bytes that the network sees at once.
      validation_share: share of the files for validation; of a single file, its end.

    Raises:
      ValueError: if there is no text, or too little for both parts.
      OSError: if a file cannot be read.
    """
    files = read(text, pattern)
    digest = hashlib.sha256()
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    if len(files) == 1:
        ((name, content),) = files.items()
        cut = round((1 - validation_share) * len(content))
        files = {f"{name}, beginning": content[:cut], f"{name}, end": content[cut:]}
        chosen = {f"{name}, end"}
    else:
        chosen = {name for name in files if place(name.encode()) < validation_share}
    for name, content in files.items():
        digest.update(f"{name} {name in chosen} {len(content)}\n".encode() + content)
        parts[name in chosen].append(content)
    train, validation = (cut_windows(part, context) for part in parts)
    for what, windows in (("training", train), ("validation", validation)):
        if not len(windows):
            raise ValueError(
                f"--text: {text!r} has {len(files)} files, none of them for {what}. Give more text, "
                "or another --validation-share."
            )
    return Text(train, validation, digest.hexdigest())


def read(text: str, pattern: str) -> dict[str, bytes]:
    """The files of a text by their names, sorted."""
    if text == "manual":
        from pydoc_data.topics import topics

        return {name: topics[name].encode() for name in sorted(topics)}
    if text == "stdlib":
        root, pattern = Path(sysconfig.get_paths()["stdlib"]), "*.py"
    else:
        root = Path(text)
    if root.is_file():
        return {root.name: root.read_bytes()}
    if not root.is_dir():
        raise ValueError(
            f"--text: {text!r} is no file and no folder. Name one, or stdlib or manual."
        )
    files = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob(pattern))
        if path.is_file() and (text != "stdlib" or not LEFT_OUT & set(path.relative_to(root).parts))
    }
    if not files:
        raise ValueError(f"--text: no file in {text!r} has a name like {pattern!r}. See --pattern.")
    return files


def place(name: bytes) -> float:
    """A number in [0, 1) by the file's name alone: new files move no other one to the other part."""
    return int.from_bytes(hashlib.sha256(name).digest()[:6]) / 2**48


def cut_windows(files: list[bytes], context: int) -> Windows:
    """Cuts every file into windows that overlap by one byte, so each byte is predicted once.

    Of the first byte of a file nothing is predicted. The last window is filled up with zeros.
    """
    pieces = [
        content[start : start + context + 1]
        for content in files
        for start in range(0, len(content) - 1, context)
    ]
    tokens = np.zeros((len(pieces), context + 1), np.uint8)
    for row, piece in zip(tokens, pieces, strict=True):
        row[: len(piece)] = np.frombuffer(piece, np.uint8)
    return Windows(tokens, np.array([len(piece) - 1 for piece in pieces], np.int32))


def batch_of(windows: Windows, indices: np.ndarray, size: int | None = None) -> Batch:
    """The chosen windows, filled up to ``size`` with windows without weight."""
    tokens = windows.tokens[indices].astype(np.int32)
    context = tokens.shape[1] - 1
    weights = (np.arange(context) < windows.lengths[indices, None]).astype(np.float32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], weights)
    missing = 0 if size is None else size - len(indices)
    return Batch(*(np.pad(array, ((0, missing), (0, 0))) for array in batch))


def training_batch(windows: Windows, batch_size: int, seed: int, step: int) -> Batch:
    """The batch of a step, counted from 0."""
    return batch_of(windows, training_indices(len(windows), batch_size, seed, step))


def training_indices(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The indices of a step's batch: a function of the seed, so there is no state to lose.

    Every pass over the text has an order of its own; what is left of it behind its last whole batch
    is left out.
    """
    passed, place = divmod(step, count // batch_size)
    return _order(count, seed, passed)[place * batch_size : (place + 1) * batch_size]


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, passed: int) -> np.ndarray:
    """The order of a pass, kept for all of its steps."""
    order = np.random.default_rng([seed, passed]).permutation(count)
    order.flags.writeable = False
    return order


def evaluation_batches(windows: Windows, count: int, batch_size: int) -> list[Batch]:
    """At most ``count`` windows, evenly chosen."""
    chosen = evenly_chosen(len(windows), count)
    return [
        batch_of(windows, chosen[start : start + batch_size], batch_size)
        for start in range(0, len(chosen), batch_size)
    ]


def evenly_chosen(total: int, count: int) -> np.ndarray:
    """The indices of at most ``count`` of them."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(int))
