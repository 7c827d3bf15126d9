"""Labels from a crowd: the class with most answers, and the shares of all answers."""

import math
from typing import NamedTuple

import numpy as np

from .features import DataError

COUNT_BYTES = 32
"""Per row and class: the counts, twice as they are put together, the lots and the shares."""


class Votes(NamedTuple):
    """What a crowd said.

    Attributes:
      labels: int64, shape ``(n,)``, the class with most answers; a tie is drawn by lot.
      shares: float32, shape ``(n, classes)``, of a row's answers.
      ties: how many rows were drawn by lot.
    """

    labels: np.ndarray
    shares: np.ndarray
    ties: int


def count_votes(answers: np.ndarray, source: str, limit: float = math.inf) -> Votes:
    """Counts the answers.

    Args:
      answers: integers, shape ``(n, annotators)``, −1 for none.
      source: the file, for error messages.
      limit: bytes of memory that the counts may take.

    Returns:
      The votes; the same answers always give the same ones.

    Raises:
      DataError: for what is no class, for rows that nobody answered, and for too many counts.
    """
    if answers.dtype.kind not in "iu":
        raise DataError(
            f"{source} has dtype {answers.dtype}. Answers are integers, with -1 for none."
        )
    lowest, highest = (int(answers.min()), int(answers.max())) if answers.size else (-1, -1)
    if lowest < -1:
        raise DataError(f"{source} has the answer {lowest}. Use -1 for none.")
    if highest < 1:
        raise DataError(f"{source} has no class but {highest}. Two are needed.")
    if highest >= 10_000:
        raise DataError(f"{source} has the class {highest}. Number the classes from 0.")
    size = COUNT_BYTES * len(answers) * (highest + 1)
    if size > limit:
        raise DataError(
            f"{source}: counts of {len(answers):,} rows and {highest + 1:,} classes take "
            f"{size / 2**30:.1f} GiB, more than the {limit / 2**30:.1f} of --memory-limit-gib. Raise "
            "it, or number the classes from 0."
        )
    counts = np.stack([(answers == c).sum(axis=1) for c in range(highest + 1)], axis=1)
    silent = np.flatnonzero(counts.sum(axis=1) == 0)
    if silent.size:
        raise DataError(
            f"{source}: nobody answered {silent.size:,} rows, the first is {silent[0]}. Remove them."
        )
    most = counts == counts.max(axis=1, keepdims=True)
    lot = np.random.default_rng(0).random(counts.shape)
    labels = np.where(most, lot, -1.0).argmax(axis=1)
    shares = (counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)
    return Votes(labels, shares, int((most.sum(axis=1) > 1).sum()))
