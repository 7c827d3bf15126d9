"""The three sets of coordinates of the SANER paper."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class CoordinateSets(NamedTuple):
    """Boolean masks of one leaf; every coordinate is in exactly one set.

    Attributes:
      a: r ≥ 1, the perturbed gradient is magnified.
      b: 0 < r < 1, it is down-weighted: where noisy gradients dominate.
      c: r ≤ 0, it changed sign (also: the clean gradient is zero, or one of the two is NaN).
    """

    a: jax.Array
    b: jax.Array
    c: jax.Array


def coordinate_sets(
    clean: jax.Array, perturbed: jax.Array, ratio_epsilon: float | None = None
) -> CoordinateSets:
    """Sorts the coordinates of one leaf into sets by r = g'/g.

    Without ``ratio_epsilon`` the conditions are decided without a division: the same sign, and
    |g'| < |g|. With it, r = g'/(g + ratio_epsilon) as in the authors' code: the signed offset
    biases coordinates of its own size.
    """
    if ratio_epsilon is None:
        same_sign = jnp.sign(clean) * jnp.sign(perturbed) > 0
        smaller = jnp.abs(perturbed) < jnp.abs(clean)
        return CoordinateSets(same_sign & ~smaller, same_sign & smaller, ~same_sign)
    ratio = perturbed / (clean + jnp.asarray(ratio_epsilon).astype(clean.dtype))
    down = (ratio > 0) & (ratio < 1)
    return CoordinateSets(ratio >= 1, down, ~(ratio >= 1) & ~down)
