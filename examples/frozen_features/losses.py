"""Losses on class distributions; those from the literature on wrong labels beside cross-entropy.

Each is built from one strength, which may be traced: ``LOSSES[name].build(strength)(logits, labels)``
gives one loss per example. Labels have shape ``(batch, classes)``; those of ELR have the past
predictions behind them, shape ``(batch, 2 * classes)``.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(strength: jax.Array) -> Loss:
    """Cross-entropy; it has no strength."""
    del strength

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.asarray(optax.softmax_cross_entropy(logits, labels))

    return loss


def label_smoothing(strength: jax.Array) -> Loss:
    """Cross-entropy with labels mixed with the uniform distribution by ``strength``."""

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        smooth = (1 - strength) * labels + strength / labels.shape[-1]
        return jnp.asarray(optax.softmax_cross_entropy(logits, smooth))

    return loss


def generalized_cross_entropy(strength: jax.Array) -> Loss:
    """GCE, (1 − p^q) / q (Zhang and Sabuncu, NeurIPS 2018); q → 0 is cross-entropy, 1 is MAE."""

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        log_p = (jax.nn.log_softmax(logits) * labels).sum(-1)
        return -jnp.expm1(strength * log_p) / strength

    return loss


def smooth_generalized_cross_entropy(strength: jax.Array) -> Loss:
    """GCE of every class, weighted with labels that are mixed with the uniform distribution by 0.2."""

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        smooth = 0.8 * labels + 0.2 / labels.shape[-1]
        return -(smooth * jnp.expm1(strength * jax.nn.log_softmax(logits))).sum(-1) / strength

    return loss


def symmetric_cross_entropy(strength: jax.Array) -> Loss:
    """SCE, α · CE + reverse CE with log 0 = −4 (Wang et al., ICCV 2019); the strength is α."""

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        wrong = 1 - (jax.nn.softmax(logits) * labels).sum(-1)
        return jnp.asarray(strength * optax.softmax_cross_entropy(logits, labels) + 4.0 * wrong)

    return loss


def early_learning(strength: jax.Array) -> Loss:
    """ELR, CE + λ log(1 − ⟨p, t⟩) (Liu et al., NeurIPS 2020); t averages past predictions."""

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        labels, past = jnp.split(labels, 2, axis=-1)
        agreement = (jax.nn.softmax(logits) * past).sum(-1)
        pull = jnp.log(jnp.maximum(1 - agreement, 1e-4))
        return jnp.asarray(optax.softmax_cross_entropy(logits, labels) + strength * pull)

    return loss


class Row(NamedTuple):
    """One loss.

    Attributes:
      label: name in tables and figures.
      build: from the strength, the loss.
      strength: the one that fit.py takes.
    """

    label: str
    build: Callable[[jax.Array], Loss]
    strength: float


LOSSES = {
    "cross_entropy": Row("cross-entropy", cross_entropy, 0.0),
    "label_smoothing": Row("smoothing", label_smoothing, 0.3),
    "gce": Row("GCE", generalized_cross_entropy, 0.5),
    "smooth_gce": Row("smooth GCE", smooth_generalized_cross_entropy, 0.5),
    "sce": Row("SCE", symmetric_cross_entropy, 0.5),
    "elr": Row("ELR", early_learning, 3.0),
}
