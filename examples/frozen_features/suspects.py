"""Ranks rows by how likely their label is wrong, and measures such a ranking."""

from typing import NamedTuple

import numpy as np

from optax_sam.diagnostics import auroc

from .train import probabilities


class Suspects(NamedTuple):
    """All rows, the most suspicious first.

    Attributes:
      row: row numbers.
      observed: class of the label.
      suggested: the likeliest other class.
      confidence: the network's probability of the suggested class.
      margin: this minus the probability of the observed class, in [−1, 1]; orders the rows.
    """

    row: np.ndarray
    observed: np.ndarray
    suggested: np.ndarray
    confidence: np.ndarray
    margin: np.ndarray


def rank(logits: np.ndarray, labels: np.ndarray) -> Suspects:
    """Ranks all rows.

    Args:
      logits: of the network that was trained on these rows, shape ``(n, classes)``.
      labels: observed, shape ``(n,)``.

    Returns:
      The suspects.
    """
    p = probabilities(logits.astype(np.float64))
    rows = np.arange(len(labels))
    observed = p[rows, labels]
    others = p.copy()
    others[rows, labels] = -1.0
    suggested = others.argmax(axis=1)
    confidence = p[rows, suggested]
    order = np.argsort(observed - confidence, kind="stable")
    return Suspects(
        order,
        labels[order],
        suggested[order],
        confidence[order],
        (confidence - observed)[order],
    )


def as_csv(suspects: Suspects, class_names: tuple[str, ...]) -> str:
    """A line per row, the most suspicious first."""
    lines = ["row,observed,suggested,confidence,margin"]
    names = [quoted(name) for name in class_names]
    for row, observed, suggested, confidence, margin in zip(*suspects, strict=True):
        lines.append(f"{row},{names[observed]},{names[suggested]},{confidence:.6f},{margin:.6f}")
    return "\n".join(lines) + "\n"


def quoted(name: str) -> str:
    """A name in a CSV cell."""
    if name.startswith(("=", "+", "-", "@")) and not name[1:].isdigit():
        name = "'" + name  # a spreadsheet would run it
    return '"' + name.replace('"', '""') + '"' if any(c in name for c in ',"\r\n') else name


def precision_at(scores: np.ndarray, wrong: np.ndarray, k: int) -> float:
    """Share of wrong labels among the k most suspicious rows."""
    return float(wrong[np.argsort(-scores, kind="stable")[:k]].mean())


def quality(scores: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """AUROC, and precision at 100 rows, at a tenth of the rows, and at the number of errors.

    All are NaN where a score is not a number: such rows have no order.
    """
    size = len(wrong)
    known = not np.isnan(scores).any()
    result = {"auroc": auroc(scores, wrong) if known else np.nan}
    for name, k in (
        ("precision_at_100", min(100, size)),
        ("precision_at_tenth", max(size // 10, 1)),
        ("precision_at_errors", max(int(wrong.sum()), 1)),
    ):
        result[name] = precision_at(scores, wrong, k) if known else np.nan
    return result
