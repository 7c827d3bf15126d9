"""The shares of the SANER paper's three sets of coordinates."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_sam import _tree
from optax_sam._checks import check_leaves, check_like, kinds
from optax_sam._hyperparameters import check_number
from optax_sam.combinations._coordinates import coordinate_sets


class CoordinateShares(NamedTuple):
    """Shares of the coordinates; they add up to 1.

    Attributes:
      a: r ≥ 1, the perturbed gradient is at least as large.
      b: 0 < r < 1, it is down-weighted.
      c: r ≤ 0, it changed sign, or the clean gradient is zero.
    """

    a: jax.Array
    b: jax.Array
    c: jax.Array


def coordinate_shares(
    clean_grads: chex.ArrayTree,
    perturbed_grads: chex.ArrayTree,
    ratio_epsilon: float | None = None,
) -> CoordinateShares:
    """Shares of coordinates by r = g'/g.

    Args:
      clean_grads: g, at the parameters.
      perturbed_grads: g', at the perturbed parameters.
      ratio_epsilon: see :func:`optax_sam.down_weight`.

    Returns:
      :class:`CoordinateShares`.

    Raises:
      ValueError: if the trees have no floating coordinate, or differ in structure or shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam.diagnostics import coordinate_shares
      >>> shares = coordinate_shares(jnp.ones(4), jnp.array([2.0, 0.5, 0.5, -1.0]))
      >>> float(shares.a), float(shares.b), float(shares.c)
      (0.25, 0.5, 0.25)

    References:
      Luong et al., arXiv 2411.17132, section 4.
    """
    check_leaves(clean_grads, "clean_grads")
    check_like(
        "perturbed_grads",
        perturbed_grads,
        clean_grads,
        of="clean_grads",
        remedy="Both are gradients of the same parameters.",
    )
    if ratio_epsilon is not None:
        check_number("ratio_epsilon", ratio_epsilon, minimum=0)
    size = _tree.size(clean_grads)
    if size == 0:
        raise ValueError(
            f"clean_grads must have floating coordinates, got {kinds(clean_grads)}. Pass the "
            "gradients of the parameters."
        )
    pairs = zip(
        _tree.floating_leaves(clean_grads), _tree.floating_leaves(perturbed_grads), strict=True
    )
    sets = [coordinate_sets(clean, perturbed, ratio_epsilon) for clean, perturbed in pairs]
    a, b, c = (sum(jnp.sum(mask) for mask in masks) for masks in zip(*sets, strict=True))
    return CoordinateShares(jnp.asarray(a / size), jnp.asarray(b / size), jnp.asarray(c / size))
