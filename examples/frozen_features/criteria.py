"""What can be measured of a trained network without clean labels, and, for comparison, with them."""

from typing import NamedTuple

import numpy as np

from .data import Features
from .train import probabilities

CRITERIA = {
    "held_out": "accuracy on held-out noisy labels",
    "canaries": "canaries: labels changed on purpose that are seen through",
    "small_loss": "separation of small and large losses",
    "gap": "memorization gap: training minus held-out accuracy, negative",
}
"""All are better when higher. The first one chooses, the others are compared with it."""

MEASURES = (*CRITERIA, "fitted", "clean_accuracy", "memorized", "clean_fit")


class Split(NamedTuple):
    """The parts of the rows during the search.

    Attributes:
      train: row numbers that are trained on, in random order: the first k are a subset.
      held_out: row numbers whose noisy labels choose.
      canaries: row numbers within ``train`` whose label was changed on purpose.
      labels: int32, shape ``(n,)``, with the canaries' labels changed.
    """

    train: np.ndarray
    held_out: np.ndarray
    canaries: np.ndarray
    labels: np.ndarray


def split(data: Features, validation_share: float, canary_share: float, seed: int) -> Split:
    """Splits the rows, in every class alike, and changes the canaries' labels."""
    random = np.random.default_rng([seed, 1])
    held_out = []
    for c in range(data.num_classes):
        rows = random.permutation(np.flatnonzero(data.labels == c))
        held_out.append(rows[: round(validation_share * len(rows))])
    chosen = np.sort(np.concatenate(held_out))
    train = random.permutation(np.setdiff1d(np.arange(len(data.labels)), chosen))
    canaries = np.sort(random.permutation(train)[: round(canary_share * len(train))])
    labels = data.labels.copy()
    shift = random.integers(1, data.num_classes, len(canaries))
    labels[canaries] = (labels[canaries] + shift) % data.num_classes
    return Split(train, chosen, canaries, labels)


def measure(
    data: Features,
    parts: Split,
    rows: np.ndarray,
    train_logits: np.ndarray,
    held_out_logits: np.ndarray,
    test_logits: np.ndarray | None,
) -> dict[str, float]:
    """Every measure of one network.

    Args:
      data: the data set.
      parts: its parts.
      rows: the rows that were trained on.
      train_logits: of these rows, shape ``(len(rows), classes)``.
      held_out_logits: of the held-out rows.
      test_logits: of the test rows, if there are any.

    Returns:
      ``MEASURES``; NaN for what is not known, and for all where logits of training or held-out rows
      are not finite. Of the test rows such logits make the clean accuracy unknown and nothing else:
      no test input takes part in a choice.
    """
    if not (np.isfinite(train_logits).all() and np.isfinite(held_out_logits).all()):
        return dict.fromkeys(MEASURES, np.nan)
    predicted, held_out = train_logits.argmax(-1), held_out_logits.argmax(-1)
    fitted = predicted == parts.labels[rows]
    canary = np.isin(rows, parts.canaries)
    accuracy = _share(held_out == data.labels[parts.held_out])
    p_observed = probabilities(train_logits)[np.arange(len(rows)), parts.labels[rows]]
    result = {
        "held_out": accuracy,
        "canaries": _share(predicted[canary] == data.labels[rows][canary]),
        "small_loss": separation(p_observed),
        "gap": accuracy - _share(fitted[~canary]),
        "fitted": _share(fitted[~canary]),
        "clean_accuracy": np.nan,
        "memorized": np.nan,
        "clean_fit": np.nan,
    }
    if data.clean_labels is not None:
        wrong = data.clean_labels[rows] != data.labels[rows]
        result["memorized"] = _share(fitted[wrong & ~canary])
        result["clean_fit"] = _share(fitted[~wrong & ~canary])
        result["clean_accuracy"] = _share(held_out == data.clean_labels[parts.held_out])
    if data.test_labels is not None and test_logits is not None:
        finite = np.isfinite(test_logits).all()
        hits = test_logits.argmax(-1) == data.test_labels
        result["clean_accuracy"] = _share(hits) if finite else np.nan
    return result


def separation(values: np.ndarray) -> float:
    """Share of the variance that the best threshold explains (Otsu's criterion), in [0, 1]."""
    values = np.sort(values.astype(np.float64))
    total = values.var()
    if not total > 0 or len(values) < 2:
        return 0.0
    count = np.arange(1, len(values))
    below = np.cumsum(values)[:-1]
    lower, upper = below / count, (values.sum() - below) / (len(values) - count)
    weight = count * (len(values) - count) / len(values) ** 2
    return float((weight * (upper - lower) ** 2).max() / total)


def comparable(value: float) -> float:
    """For a maximum: what is not a number comes last."""
    return -np.inf if np.isnan(value) else value


def _share(hits: np.ndarray) -> float:
    return float(hits.mean()) if hits.size else float("nan")
