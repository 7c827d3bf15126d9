"""How much of the label noise a model has learned by heart."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_sam._checks import is_array_of, kinds


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

    Raises:
      TypeError: if an argument has another shape or dtype.

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
    if not is_array_of(logits, jnp.floating) or jnp.ndim(logits) != 2:
        raise TypeError(
            f"logits must be a floating array of shape (n, classes), got {kinds(logits)}. Pass the "
            "network's output for all training examples."
        )
    rows = {"noisy_labels": (noisy_labels, jnp.integer), "changed": (changed, jnp.bool_)}
    if true_labels is not None:
        rows["true_labels"] = (true_labels, jnp.integer)
    for name, (values, kind) in rows.items():
        if not is_array_of(values, kind) or values.shape != logits.shape[:1]:
            wanted = "bools" if kind is jnp.bool_ else "integers"
            raise TypeError(
                f"{name} must be an array of {wanted} of shape {logits.shape[:1]}, one per row of "
                f"the logits, got {kinds(values)}. optax_sam.label_noise returns "
                "NoisyLabels(labels, changed)."
            )
    predictions = jnp.argmax(logits, axis=-1)
    follows_label = predictions == noisy_labels

    def share(hits, among):
        return jnp.sum(hits & among) / jnp.sum(among)

    recovered = (
        jnp.asarray(jnp.nan) if true_labels is None else share(predictions == true_labels, changed)
    )
    return Memorization(share(follows_label, changed), recovered, share(follows_label, ~changed))
