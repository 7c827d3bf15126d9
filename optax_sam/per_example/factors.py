r"""Gradients of weights as products of thin matrices, which are never multiplied out.

Where weights meet the data at T positions, their gradient is :math:`G = L^\top R` with one row of L and
of R for each position: the inputs and the derivatives in the outputs. Weights that are used in
several places (tied embeddings) have a sum of such terms, :math:`G = \sum_u L_u^\top R_u`, and

.. math::
   \|G\|^2 = \sum_{u, v} \langle L_u L_v^\top, R_u R_v^\top \rangle, \qquad
   X G = \sum_u (X L_u^\top) R_u,

from the inner products of rows (Gram matrices). They are cheaper than G itself when the positions are
few against the sizes of the weights.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_sam import _tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseRows:
    """A matrix, one row for each position, shape (T, K)."""

    matrix: jax.Array

    def times(self, products: jax.Array) -> jax.Array:
        """``products @ rows``."""
        if products.shape == (1, 1):  # a batch of 1 × 1 matrix products is twice as slow
            return products * wide(self.matrix)
        return _product(products, self.matrix)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OneHotRows:
    """Rows of the identity, as the inputs of a row lookup are.

    Attributes:
      indices: which rows, shape (T,); an index outside of the table is a row of zeros.
      count: the number of rows of the table.
      dtype: of the derivatives.
    """

    indices: jax.Array
    count: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def is_inside(self) -> jax.Array:
        """Which indices are rows of the table."""
        return (self.indices >= 0) & (self.indices < self.count)

    def times(self, products: jax.Array) -> jax.Array:
        """``products @ rows``: columns, added where the indices say."""
        kept = jnp.where(self.is_inside, products, 0)
        zeros = jnp.zeros((*products.shape[:-1], self.count), products.dtype)
        return zeros.at[:, self.indices].add(kept, mode="drop")


Rows = DenseRows | OneHotRows


def inner_products(left: Rows, right: Rows) -> jax.Array:
    """The inner products of the rows, shape (T, T')."""
    if isinstance(left, OneHotRows):
        if isinstance(right, OneHotRows):
            same = left.indices[:, None] == right.indices[None, :]
            return wide((same & left.is_inside[:, None]).astype(left.dtype))
        return inner_products(right, left).T
    if isinstance(right, OneHotRows):
        columns = jnp.clip(right.indices, 0, right.count - 1)
        return jnp.where(right.is_inside, wide(left.matrix)[:, columns], 0)
    if len(left.matrix) == len(right.matrix) == 1:
        return jnp.sum(wide(left.matrix) * wide(right.matrix), keepdims=True)
    return _product(left.matrix, right.matrix.T)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """``leftᵀ right``, what one use adds to a gradient."""

    left: Rows
    right: Rows


def squared_norm(terms: tuple[Term, ...]) -> jax.Array:
    """‖G‖² from Gram matrices."""
    total = jnp.zeros([])
    for number, term in enumerate(terms):
        for other in terms[: number + 1]:
            products = inner_products(term.left, other.left)
            products = products * inner_products(term.right, other.right)
            total = total + jnp.sum(products) * (1 if other is term else 2)
    # Rounding may leave a tiny negative number where the gradient vanishes.
    return jnp.maximum(total, 0)


def times_gradient(rows: Rows, terms: tuple[Term, ...], is_transposed: bool) -> jax.Array:
    """``X G`` (or ``X Gᵀ``) without forming G."""

    def times(term: Term) -> jax.Array:
        left, right = (term.right, term.left) if is_transposed else (term.left, term.right)
        return right.times(inner_products(rows, left))

    products: jax.Array = functools.reduce(jnp.add, map(times, terms))
    return products


def wide(array: jax.Array) -> jax.Array:
    """At least float32: half precision would overflow or lose bits in sums of squares."""
    return array.astype(_tree.accumulation_dtype(array))


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    """``left @ right`` in at least float32, without wide copies of what is narrow.

    They would be read and written; a product of two half-precision numbers is exact in float32.
    """
    dtype = _tree.accumulation_dtype([left, right])
    axes = (((1,), (0,)), ((), ()))
    return lax.dot_general(left, right, axes, preferred_element_type=dtype)
