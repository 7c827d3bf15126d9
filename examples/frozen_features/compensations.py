"""Readings of NCSAM's noise compensation: where its paper, its code and a sceptic may differ.

The published rule is one row; the others change one thing at a time. The sign and the size of κ are
traced, so every trial of a reading runs in one compiled program.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_sam


class Reading(NamedTuple):
    """One way to add s · g* to SAM's perturbation.

    Attributes:
      normalized: scale g* to the length ρ first, so that κ is a share of ρ.
      projection: project the sum to the ball of radius ρ.
      examples: who is flipped: ``"sampled"`` near the decision boundary (the paper), ``"smallest"``
        gaps, or ``"random"``.
      second: flip to the class with the second largest logit, observed or not; otherwise to the
        likeliest class that is not the observed one (the paper).
      flip_ratio: share of the batch that is flipped.
      scheduled: κ grows along the paper's curve and is full at half of the training.
      warmup: share of the training before the compensation begins.
    """

    normalized: bool = False
    projection: bool = True
    examples: str = "sampled"
    second: bool = False
    flip_ratio: float = 0.4
    scheduled: bool = True
    warmup: float = 0.0


READINGS = {
    "paper": Reading(),
    "not projected": Reading(projection=False),
    "normalized, not projected": Reading(normalized=True, projection=False),
    "smallest gaps": Reading(normalized=True, projection=False, examples="smallest"),
    "warm-up": Reading(normalized=True, projection=False, warmup=0.25),
    "second largest": Reading(normalized=True, projection=False, second=True),
    "random examples": Reading(normalized=True, projection=False, examples="random"),
    "fewer flips": Reading(normalized=True, projection=False, flip_ratio=0.1),
    "more flips": Reading(normalized=True, projection=False, flip_ratio=0.6),
    "constant": Reading(scheduled=False),
    "normalized": Reading(normalized=True),
}


def strength_at(reading: Reading, kappa: Any, progress: Any) -> Any:
    """The strength s of a reading at a progress in [0, 1]."""
    if reading.scheduled:
        kappa = kappa * jnp.minimum(2 * (3 - 2 * progress) * progress**2, 1)
    return jnp.where(progress < reading.warmup, 0.0, kappa)


def compensated(
    reading: Reading, rho: Any, strength: Any, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """NCSAM in a reading: SAM at ρ g/‖g‖ + s g*.

    Args:
      reading: a row of ``READINGS``.
      rho: the radius, may be traced.
      strength: s, may be traced and negative.
      seed: of the examples that are drawn.

    Returns:
      A transformation as of :func:`optax_sam.ncsam`.
    """
    stages = [optax_sam.normalized(rho), _compensation(reading, rho, strength, seed)]
    if reading.projection:
        stages.append(optax_sam.project_to_ball(rho))
    return optax_sam.sharpness_aware(optax.chain(*stages))


def _compensation(
    reading: Reading, rho: Any, strength: Any, seed: int
) -> optax.GradientTransformationExtraArgs:
    def init(params: optax.Params) -> jax.Array:
        del params
        return jnp.zeros([], jnp.int32)

    def update(
        updates: optax.Updates,
        count: jax.Array,
        params: optax.Params | None = None,
        *,
        loss_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, jax.Array]:
        del extra_args
        logits = loss_fn.logits(params)
        chosen = _examples(reading, logits, jax.random.fold_in(jax.random.key(seed), count))
        flipped = loss_fn.with_labels(_flipped(reading, logits, loss_fn.labels)).subset(chosen)
        gradient = jax.grad(flipped)(params)
        scale = strength
        if reading.normalized:
            scale = strength * rho / jnp.maximum(optax.tree.norm(gradient), 1e-12)
        return jax.tree.map(lambda e, g: e + scale * g, updates, gradient), count + 1

    return optax.GradientTransformationExtraArgs(init, update)


def _examples(reading: Reading, logits: jax.Array, key: jax.Array) -> jax.Array:
    count = round(reading.flip_ratio * len(logits))
    if reading.examples == "random":
        return jax.random.permutation(key, len(logits))[:count]
    largest, _ = jax.lax.top_k(logits, 2)
    gaps = largest[:, 0] - largest[:, 1]
    if reading.examples == "smallest":
        return jnp.argsort(gaps)[:count]
    # The largest of log p + Gumbel noise are a sample without replacement, in proportion to p.
    return jax.lax.top_k(jax.random.gumbel(key, gaps.shape) - jnp.log1p(gaps), count)[1]


def _flipped(reading: Reading, logits: jax.Array, labels: jax.Array) -> jax.Array:
    if reading.second:
        return jax.lax.top_k(logits, 2)[1][:, 1]
    observed = jnp.arange(logits.shape[-1]) == labels[:, None]
    return jnp.argmax(jnp.where(observed, -jnp.inf, logits), axis=-1)
