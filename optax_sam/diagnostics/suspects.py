"""Which labels are suspect, and how good such a ranking is where the truth is known."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_sam.diagnostics.dynamics import Recording, training_dynamics

# Higher is more suspicious.
_SIGNS = {"margin": -1, "loss": 1, "confidence": -1, "agreement": -1, "forgetting_events": 1}


class Suspects(NamedTuple):
    """The result of :func:`rank_suspects`: all recorded examples, the most suspicious first.

    Attributes:
      examples: int array, shape ``(m,)``, rows of the data set.
      labels: int array, shape ``(m,)``, their labels.
      suggestions: int array, shape ``(m,)``, the likeliest other class when last recorded.
      scores: float array, shape ``(m,)``, higher is more suspicious; NaN is first.
    """

    examples: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    suggestions: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any]


def rank_suspects(recording: Recording, by: str = "margin") -> Suspects:
    """Ranks the examples by how likely their label is wrong. No correct label is needed.

    A wrong label is learned late and against the others, so its margin stays low over the epochs. The
    better the training resists memorization, the better is the ranking. If the wrong labels are
    memorized from an early epoch on, it fails. Examples with NaN come first: their logits were no
    numbers, or the network has no class of their label.

    Args:
      recording: what was recorded over the training.
      by: which statistic of :class:`TrainingDynamics` makes the order: ``"margin"`` (AUM), ``"loss"``,
        ``"confidence"``, ``"agreement"``, or ``"forgetting_events"``, where examples whose label was
        never predicted come first.

    Returns:
      :class:`Suspects`, on the host. Examples that were never recorded are left out.

    Raises:
      ValueError: if ``by`` is no such statistic.
      TypeError: if ``recording`` is no :class:`Recording`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam.diagnostics import rank_suspects, record_batch, start_recording
      >>> logits = jnp.array([[4.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
      >>> recording = record_batch(start_recording([0, 1, 1]), logits, jnp.arange(3))
      >>> suspects = rank_suspects(recording)
      >>> suspects.examples.tolist(), suspects.suggestions.tolist(), suspects.scores.tolist()
      ([2, 1, 0], [0, 0, 1], [3.0, -1.0, -4.0])

    References:
      Pleiss et al., NeurIPS 2020, arXiv 2001.10528, section 3.
    """
    if by not in _SIGNS:
        raise ValueError(f"by must be one of {tuple(_SIGNS)}, got {by!r}.")
    dynamics = training_dynamics(recording)
    scores = _SIGNS[by] * np.asarray(getattr(dynamics, by), float)
    agreement = np.asarray(dynamics.agreement)
    if by == "forgetting_events":
        scores[agreement == 0] = np.inf
    recorded = np.flatnonzero(np.asarray(dynamics.times))
    candidates = scores[recorded]
    examples = recorded[np.lexsort((-candidates, ~np.isnan(candidates)))]
    return Suspects(
        examples,
        np.asarray(recording.labels)[examples],
        np.asarray(recording.rival)[examples],
        scores[examples],
    )


def auroc(scores: ArrayLike, wrong: ArrayLike) -> float:
    """Probability that a wrong label has a higher score than a right one; ties count half.

    The area under the receiver operating characteristic: 1 if all wrong labels come first, 0.5 for a
    random order.

    Args:
      scores: real, shape ``(n,)``, higher is more suspicious.
      wrong: bools, shape ``(n,)``, True where the label is wrong.

    Returns:
      A number in [0, 1]; NaN if all labels are wrong, or none, or a score is NaN.

    Raises:
      ValueError: if the shapes are not ``(n,)``.
      TypeError: if the scores are not real, or ``wrong`` not bools.

    Example:
      >>> from optax_sam.diagnostics import auroc
      >>> auroc([3.0, 2.0, 1.0, 1.0], [True, False, True, False])
      0.625

    References:
      Hanley, McNeil, The meaning and use of the area under a ROC curve, Radiology 143, 1982.
    """
    scores, wrong = np.asarray(scores), np.asarray(wrong)
    if scores.ndim != 1 or scores.shape != wrong.shape:
        raise ValueError(
            f"scores and wrong must both have shape (n,), got {scores.shape} and {wrong.shape}. Of "
            "suspects pass suspects.scores and wrong[suspects.examples]."
        )
    if not any(jnp.issubdtype(scores.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(
            f"scores must be real numbers, got dtype {scores.dtype}. Pass suspects.scores."
        )
    if wrong.dtype != np.bool_:
        raise TypeError(
            f"wrong must be bools, got dtype {wrong.dtype}. Pass labels != true_labels, or "
            "wrong.astype(bool)."
        )
    count = int(wrong.sum())
    if count in (0, wrong.size) or np.isnan(scores).any():
        return float("nan")
    _, position, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[position]
    above = ranks[wrong].sum() - count * (count + 1) / 2
    return float(above / (count * (wrong.size - count)))
