"""The three groups of coordinates of the SANER paper."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class GradientGroups(NamedTuple):
    """Boolean masks of one leaf; every coordinate is in exactly one group.

    Attributes:
      a: r ≥ 1, the perturbed gradient is magnified.
      b: 0 < r < 1, it is down-weighted: where noisy gradients dominate.
      c: r ≤ 0, it changed sign (also: the clean gradient is zero).
    """

    a: jax.Array
    b: jax.Array
    c: jax.Array


def gradient_groups(
    clean: jax.Array, perturbed: jax.Array, ratio_epsilon: float | None = None
) -> GradientGroups:
    """Groups the coordinates of one leaf by r = g'/g.

    Without ``ratio_epsilon`` the conditions are decided without a division: the same sign, and
    |g'| < |g|. With it, r = g'/(g + ratio_epsilon) as in the authors' code: the signed offset
    biases coordinates of its own size.
    """
    if ratio_epsilon is None:
        same_sign = jnp.sign(clean) * jnp.sign(perturbed) > 0
        smaller = jnp.abs(perturbed) < jnp.abs(clean)
        return GradientGroups(same_sign & ~smaller, same_sign & smaller, ~same_sign)
    ratio = perturbed / (clean + jnp.asarray(ratio_epsilon).astype(clean.dtype))
    down = (ratio > 0) & (ratio < 1)
    return GradientGroups(ratio >= 1, down, ~(ratio >= 1) & ~down)
