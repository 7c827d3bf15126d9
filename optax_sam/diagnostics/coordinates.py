"""The shares of the SANER paper's three sets of coordinates."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_sam import _tree
from optax_sam._checks import kinds
from optax_sam._hyperparameters import check_number
from optax_sam.combinations._coordinates import coordinate_sets


class CoordinateShares(NamedTuple):
    """Shares of the coordinates; they add up to 1.

    Attributes:
      a: r ≥ 1, the perturbed gradient is at least as large.
      b: 0 < r < 1, it is down-weighted.
      c: r ≤ 0, it changed sign, or the clean gradient is zero, or one of the two is NaN.
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
      ValueError: if the trees do not match in structure, shapes or dtypes of their leaves, or have no
        floating coordinate.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam.diagnostics import coordinate_shares
      >>> shares = coordinate_shares(jnp.ones(4), jnp.array([2.0, 0.5, 0.5, -1.0]))
      >>> float(shares.a), float(shares.b), float(shares.c)
      (0.25, 0.5, 0.25)

    References:
      Luong et al., arXiv 2411.17132, section 4.
    """
    if ratio_epsilon is not None:
        check_number("ratio_epsilon", ratio_epsilon, minimum=0)
    _check_match(clean_grads, perturbed_grads)
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
    # Floats, as int32 holds no more than two billion coordinates.
    dtype = _tree.accumulation_dtype(clean_grads)
    counts = [
        sum(jnp.sum(mask, dtype=dtype) for mask in masks) for masks in zip(*sets, strict=True)
    ]
    return CoordinateShares(*(jnp.asarray(count / float(size)) for count in counts))


def _check_match(clean_grads: chex.ArrayTree, perturbed_grads: chex.ArrayTree) -> None:
    clean_structure: Any = jax.tree.structure(clean_grads)
    perturbed_structure: Any = jax.tree.structure(perturbed_grads)
    if clean_structure != perturbed_structure:
        raise ValueError(
            f"clean_grads and perturbed_grads have different structures: {clean_structure} and "
            f"{perturbed_structure}. Both are gradients of the same parameters."
        )
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(clean_grads),
        jax.tree.leaves(perturbed_grads),
        strict=True,
    )
    for (path, clean), perturbed in leaves:
        place = jax.tree_util.keystr(path) or "the gradient"
        for what, of in (("shape", jnp.shape), ("dtype", jnp.result_type)):
            if of(clean) != of(perturbed):
                raise ValueError(
                    f"{place} has {what} {of(clean)} in clean_grads, {of(perturbed)} in "
                    "perturbed_grads. Both are gradients of the same parameters."
                )
