"""How much of the label noise a model has learned by heart."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


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
    logits: jax.Array,
    noisy_labels: jax.Array,
    changed: jax.Array,
    true_labels: jax.Array | None = None,
) -> Memorization:
    """Accuracies on the wrongly and on the correctly labelled training examples.

    Args:
      logits: shape ``(n, classes)``, of the training examples.
      noisy_labels: integers, shape ``(n,)``, the labels that were trained on.
      changed: bools, shape ``(n,)``, True where the label is wrong.
      true_labels: integers, shape ``(n,)``, if they are known.

    Returns:
      :class:`Memorization`.

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
    predictions = jnp.argmax(logits, axis=-1)
    follows_label = predictions == noisy_labels

    def share(hits, among):
        return jnp.sum(hits & among) / jnp.sum(among)

    recovered = (
        jnp.asarray(jnp.nan) if true_labels is None else share(predictions == true_labels, changed)
    )
    return Memorization(share(follows_label, changed), recovered, share(follows_label, ~changed))
