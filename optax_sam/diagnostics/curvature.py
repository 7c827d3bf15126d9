"""The Hessian of the loss, through its products with vectors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_sam import _norms, _tree
from optax_sam._checks import check_leaves, check_like
from optax_sam._hyperparameters import check_integer
from optax_sam.convolutions import inside_control_flow
from optax_sam.diagnostics._compiled import compiled_for_loss
from optax_sam.evaluations import value_and_gradients

Vector = list[jax.Array]  # the floating leaves of a tree like the parameters


class Eigenvalue(NamedTuple):
    """The result of :func:`largest_eigenvalue`.

    Attributes:
      value: λ, a scalar.
      vector: v, a pytree like the parameters, of norm 1; the direction of the largest curvature.
      residual: ‖Hv − λv‖, a scalar: some eigenvalue is at most so far from λ.
    """

    value: jax.Array
    vector: chex.ArrayTree
    residual: jax.Array


def hessian_vector_product(
    loss_fn: Callable[..., Any], params: chex.ArrayTree, vector: chex.ArrayTree
) -> chex.ArrayTree:
    r"""The product of the Hessian with a vector, :math:`\nabla^2 L(w) \, v`, without the Hessian.

    Forward-mode differentiation of the gradient: the cost of 2 to 2.5 gradients.

    Args:
      loss_fn: ``params -> loss`` or ``(loss, aux)``, or an :class:`optax_sam.Objective`. A plain
        function is compiled anew in each call, an ``Objective`` or a ``jax.tree_util.Partial`` once.
      params: the parameters w.
      vector: v, a pytree like ``params``.

    Returns:
      A pytree like ``params``; zeros for integer leaves.

    Raises:
      ValueError: if ``vector`` is not like ``params``.
      TypeError: if ``loss_fn`` does not return a scalar loss.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam.diagnostics import hessian_vector_product
      >>> loss_fn = lambda w: w[0] ** 2 * w[1]
      >>> hessian_vector_product(loss_fn, jnp.ones(2), jnp.array([1.0, 0.0])).tolist()
      [2.0, 2.0]

    References:
      Pearlmutter, Fast Exact Multiplication by the Hessian, Neural Computation 6, 1994.
    """
    check_leaves(params)
    check_like(
        "vector", vector, params, of="params", remedy="It is a direction in parameter space."
    )
    product: chex.ArrayTree = _product(loss_fn, params, vector)
    return product


def largest_eigenvalue(
    loss_fn: Callable[..., Any], params: chex.ArrayTree, *, steps: int = 30, seed: int = 0
) -> Eigenvalue:
    """The largest eigenvalue of the Hessian, and its direction, by the method of Lanczos.

    It finds the largest one also where a negative one is larger in size, which power iteration does
    not, and needs far fewer products. The vectors of a plain Lanczos iteration lose their orthogonality
    in floating point. That only repeats the largest eigenvalue, which does no harm here, and so a few
    copies of the parameters are all that it needs to keep. It costs ``2 * steps + 1`` times
    :func:`hessian_vector_product`, because the direction is put together in a second pass.

    Args:
      loss_fn: ``params -> loss`` or ``(loss, aux)``, or an :class:`optax_sam.Objective`, of which
        ``microbatch_size`` bounds the memory over a whole data set. A plain function is compiled anew
        in each call, an ``Objective`` or a ``jax.tree_util.Partial`` once.
      params: the parameters w.
      steps: at least 1; see whether ``residual`` is small against ``value``.
      seed: of the random start.

    Returns:
      :class:`Eigenvalue`.

    Raises:
      ValueError: if ``steps`` is below 1, or ``params`` have no floating coordinate.
      TypeError: if ``loss_fn`` does not return a scalar loss.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam.diagnostics import largest_eigenvalue
      >>> result = largest_eigenvalue(lambda w: w[0] ** 2 - 5 * w[1] ** 2, jnp.ones(2))
      >>> round(float(result.value), 4), jnp.abs(result.vector).round(4).tolist()
      (2.0, [1.0, 0.0])

    References:
      Golub, Van Loan, Matrix Computations, 4th edition, chapter 10.
    """
    check_leaves(params)
    steps = check_integer("steps", steps, minimum=1)
    seed = check_integer("seed", seed, minimum=0)
    check_coordinates(params)
    result: Eigenvalue = _largest(loss_fn, params, seed, steps=min(steps, _tree.size(params)))
    return result


def check_coordinates(params: chex.ArrayTree) -> None:
    """Refuses parameters that have nothing to differentiate."""
    if not _tree.size(params):
        kinds = [str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(params)]
        raise ValueError(
            f"params must have floating coordinates, got leaves of dtypes {kinds}. The Hessian is that "
            "of the loss in real parameters."
        )


def hessian_of(
    loss_fn: Callable[..., Any], params: chex.ArrayTree
) -> tuple[Callable[[Vector], Vector], Callable[[Vector], chex.ArrayTree]]:
    """The Hessian as a function of the floating leaves, and what makes a tree of them.

    The vectors are in at least float32, whatever the parameters are.
    """
    leaves, treedef = jax.tree.flatten(params)
    floating = _tree.floating_leaves(params)

    def tree_of(vector: Vector, others: Callable[[Any], Any]) -> chex.ArrayTree:
        parts = iter(vector)
        merged = [next(parts) if _tree.is_floating(leaf) else others(leaf) for leaf in leaves]
        return jax.tree.unflatten(treedef, merged)

    def gradient(floating: Vector) -> Vector:
        tree = tree_of(floating, lambda leaf: leaf)
        return _tree.floating_leaves(value_and_gradients(loss_fn, tree)[1])

    def product(vector: Vector) -> Vector:
        like = [v.astype(leaf.dtype) for v, leaf in zip(vector, floating, strict=True)]
        _, result = jax.jvp(gradient, (floating,), (like,))
        return [part.astype(v.dtype) for part, v in zip(result, vector, strict=True)]

    return product, lambda vector: tree_of(vector, jnp.zeros_like)


def _hessian_vector_product(
    loss_fn: Callable[..., Any], params: chex.ArrayTree, vector: chex.ArrayTree
) -> chex.ArrayTree:
    params = _tree.as_arrays(params)
    product, tree_of = hessian_of(loss_fn, params)
    parts = zip(jax.tree.leaves(params), jax.tree.leaves(vector), strict=True)
    chosen = [jnp.asarray(v).astype(leaf.dtype) for leaf, v in parts if _tree.is_floating(leaf)]
    return tree_of(product(chosen))


_product = compiled_for_loss(_hessian_vector_product)


def _lanczos(
    loss_fn: Callable[..., Any], params: chex.ArrayTree, seed: jax.Array, *, steps: int
) -> Eigenvalue:
    params = _tree.as_arrays(params)
    dtype = _tree.accumulation_dtype(params)
    product, tree_of = hessian_of(loss_fn, params)
    product = inside_control_flow(product)
    floating = _tree.floating_leaves(params)
    keys = jax.random.split(jax.random.key(seed), len(floating))
    start = [
        jax.random.normal(key, leaf.shape, dtype) for key, leaf in zip(keys, floating, strict=True)
    ]
    start = _unit(start)
    zeros: Vector = _tree.zeros_like(start)

    def step(carry: Any, weight: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        """One vector of the basis; the sum of all, weighted, and the diagonals of the projection."""
        previous, current, coupling, total = carry
        total = _add_scaled(total, weight, current)
        new = product(current)
        diagonal = _tree.dot(current, new)
        rest = _add_scaled(_add_scaled(new, -diagonal, current), -coupling, previous)
        next_coupling = _norms.norm(rest)
        carry = (current, _unit(rest), next_coupling, total)
        return carry, (diagonal, next_coupling)

    def one_pass(_: Any, carry: tuple[jax.Array, Vector]) -> tuple[jax.Array, Vector]:
        weights, _ = carry
        first = (zeros, start, jnp.zeros([], dtype), zeros)
        (*_, total), (diagonals, couplings) = lax.scan(step, first, weights)
        return _top_of_tridiagonal(diagonals, couplings[:-1]), total

    # Twice through the same compiled loop: the second time with the weights that the first one found,
    # and with the same rounding.
    _, vector = lax.fori_loop(0, 2, one_pass, (jnp.zeros(steps, dtype), zeros))
    vector = _unit(vector)
    image = product(vector)
    value = _tree.dot(vector, image)
    residual = _norms.norm(_add_scaled(image, -value, vector))
    like = [part.astype(leaf.dtype) for part, leaf in zip(vector, floating, strict=True)]
    return Eigenvalue(value, tree_of(like), residual)


_largest = compiled_for_loss(_lanczos, "steps")


def _top_of_tridiagonal(diagonals: jax.Array, couplings: jax.Array) -> jax.Array:
    """The eigenvector of the largest eigenvalue of a symmetric tridiagonal matrix.

    After a coupling of exactly zero the basis is complete; what comes behind it stays out of the way.
    """
    ended = jnp.concatenate([jnp.zeros(1, bool), jnp.cumsum(couplings == 0) > 0])
    bound = jnp.max(jnp.abs(diagonals)) + 2 * jnp.max(couplings, initial=0)
    below = -2 * bound - np.finfo(bound.dtype).tiny
    diagonals = jnp.where(ended, below, diagonals)
    matrix = jnp.diag(diagonals) + jnp.diag(couplings, 1) + jnp.diag(couplings, -1)
    vectors: jax.Array = jnp.linalg.eigh(matrix)[1]
    return vectors[:, -1]


def _add_scaled(left: Vector, factor: jax.Array, right: Vector) -> Vector:
    return [a + factor.astype(b.dtype) * b for a, b in zip(left, right, strict=True)]


def _unit(vector: Vector) -> Vector:
    length = _norms.norm(vector)
    wide = [_tree.divide_or_zero(part.astype(length.dtype), length) for part in vector]
    return [unit.astype(part.dtype) for unit, part in zip(wide, vector, strict=True)]
