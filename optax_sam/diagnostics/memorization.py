"""How much of the label noise a model has memorized."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_sam.diagnostics._labels import as_labels, predicted


class Memorization(NamedTuple):
    """The result of :func:`memorization`; NaN where there is no such example.

    Attributes:
      memorized: share of the wrongly labelled examples for which the model predicts the wrong label.
      recovered: share of them for which it predicts the true label (NaN without true labels).
      clean_fit: share of the correctly labelled examples that it predicts correctly.
    """

    memorized: jax.Array
    recovered: jax.Array
    clean_fit: jax.Array


def memorization(
    logits: ArrayLike,
    noisy_labels: ArrayLike,
    changed: ArrayLike,
    true_labels: ArrayLike | None = None,
) -> Memorization:
    """Accuracies on the wrongly and on the correctly labelled training examples.

    A row of logits with NaN predicts nothing: a network that has diverged has not memorized a label.

    Args:
      logits: shape ``(n, classes)``, of the training examples.
      noisy_labels: integers, shape ``(n,)``, the labels that were trained on.
      changed: bools, shape ``(n,)``, True where the label is wrong.
      true_labels: integers, shape ``(n,)``, if they are known.

    Returns:
      :class:`Memorization`.

    Raises:
      ValueError: if a shape does not fit, or a concrete label is outside of the classes.
      TypeError: if the labels are not integers, ``changed`` not bools, or the logits not real.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam.diagnostics import memorization
      >>> logits = jnp.array([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
      >>> result = memorization(logits, jnp.array([1, 0, 1]), jnp.array([True, True, False]))
      >>> float(result.memorized), float(result.clean_fit)
      (0.5, 1.0)

    References:
      Luong et al., arXiv 2411.17132, section 3, plot the accuracies on noisy and on clean examples.
    """
    logits, changed = jnp.asarray(logits), jnp.asarray(changed)
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (n, classes), got {logits.shape}.")
    if not (
        jnp.issubdtype(logits.dtype, jnp.floating) or jnp.issubdtype(logits.dtype, jnp.integer)
    ):
        raise TypeError(
            f"logits must be real numbers, got dtype {logits.dtype}. Pass the network's outputs before "
            "argmax."
        )
    size, classes = logits.shape
    if changed.shape != (size,):
        raise ValueError(
            f"changed must have shape ({size},), got {changed.shape}. It has one value per example."
        )
    if changed.dtype != jnp.bool_:
        raise TypeError(
            f"changed must be bools, got dtype {changed.dtype}. Pass changed.astype(bool), or "
            "noisy_labels != true_labels."
        )
    predictions = predicted(logits)
    follows_label = predictions == as_labels("noisy_labels", noisy_labels, size, classes)

    def share(hits: jax.Array, among: jax.Array) -> jax.Array:
        return jnp.sum(hits & among) / jnp.sum(among)

    recovered = jnp.asarray(jnp.nan)
    if true_labels is not None:
        is_true = predictions == as_labels("true_labels", true_labels, size, classes)
        recovered = share(is_true, changed)
    return Memorization(share(follows_label, changed), recovered, share(follows_label, ~changed))
