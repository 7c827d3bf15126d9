"""The global norm of a tree, right wherever it is a number of its dtype."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_sam import _tree
from optax_sam._axes import to_varying_like

Leaves = list[jax.Array]


def norm(tree: chex.ArrayTree) -> jax.Array:
    """The global 2-norm, accumulated in at least float32, with derivative 0 (not NaN) at 0.

    It is right wherever the norm itself is a number of that dtype. NaN is passed on.
    """
    length: jax.Array = _norm(_tree.floating_leaves(tree))
    return length


class _Pass(NamedTuple):
    """What a pass over the leaves gave.

    Attributes:
      squared: the sum of squares of ``factor`` times the coordinates.
      factor: which it was.
      next_factor: which the next pass needs; 0 where this was the last one.
    """

    squared: jax.Array
    factor: jax.Array
    next_factor: jax.Array


@jax.custom_jvp
def _length(leaves: Leaves) -> jax.Array:
    dtype = _tree.accumulation_dtype(leaves)
    limits = np.finfo(dtype)
    # Above the lower bound, squares too small for the dtype are less than the sum's rounding error.
    lower_bound = max(_tree.size(leaves), 1) * float(limits.tiny) / float(limits.eps)
    # Half of the root of the largest number: XLA may take the factor out of the sum, squared, and an
    # infinite square times a sum of zeros would be NaN.
    large = 2.0 ** (limits.maxexp // 2)

    def once(last: _Pass) -> _Pass:
        factor = last.next_factor
        squared = _sum_of_squares(factor, leaves)
        is_exact = (squared >= lower_bound) & (squared <= limits.max)
        other = jnp.where(squared < 1, large / 2, 1 / large).astype(dtype)
        return _Pass(squared, factor, jnp.where(is_exact | (factor != 1), 0, other))

    # A second pass where the first one left the dtype's range. It is a loop, not a branch, because
    # compiling a sum over a thousand leaves twice would take as long as compiling the loss.
    one = jnp.ones([], dtype)
    first = to_varying_like(_Pass(0 * one, one, one), leaves)
    last = jax.lax.while_loop(lambda last: last.next_factor != 0, once, first)
    length: jax.Array = jnp.sqrt(last.squared) / last.factor
    return length


_norm = jax.jit(_length)  # so that a tree is traced once however often its norm is taken


@_length.defjvp
def _derivative(primals: tuple[Leaves], tangents: tuple[Leaves]) -> tuple[jax.Array, jax.Array]:
    (leaves,), (changes,) = primals, tangents
    length = _norm(leaves)
    units = [_tree.divide_or_zero(leaf.astype(length.dtype), length) for leaf in leaves]
    return length, _tree.dot(units, changes).astype(length.dtype)


def _sum_of_squares(factor: jax.Array, leaves: Leaves) -> jax.Array:
    squares = [jnp.sum(jnp.square(leaf.astype(factor.dtype) * factor)) for leaf in leaves]
    return sum(squares, jnp.zeros([], factor.dtype))
