"""Trace and spectrum of the Hessian, by random probes; the work is matfree's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_sam import _tree
from optax_sam._checks import check_leaves
from optax_sam._hyperparameters import check_integer
from optax_sam.convolutions import inside_control_flow
from optax_sam.diagnostics._compiled import compiled_for_loss
from optax_sam.diagnostics.curvature import check_coordinates, hessian_of


class Trace(NamedTuple):
    """The result of :func:`hessian_trace`, two scalars.

    Attributes:
      value: the estimate.
      standard_error: its standard error.
    """

    value: jax.Array
    standard_error: jax.Array


class Spectrum(NamedTuple):
    """The result of :func:`hessian_spectrum`: the density as weighted points.

    Attributes:
      eigenvalues: shape ``(samples, steps)``, ascending.
      weights: shape ``(samples, steps)``, the share of all eigenvalues near each; they add up to 1.
    """

    eigenvalues: jax.Array
    weights: jax.Array


def hessian_trace(
    loss_fn: Callable[..., Any], params: chex.ArrayTree, *, samples: int = 16, seed: int = 0
) -> Trace:
    r"""The trace of the Hessian, :math:`E[z^\top H z]` over random signs z (Hutchinson).

    Half of it times σ² is how much the loss rises on average under Gaussian noise of deviation σ on
    the parameters, for small σ. Costs a :func:`hessian_vector_product` per sample, one after the other.
    Needs ``pip install 'optax_sam[curvature]'``.

    Args:
      loss_fn: ``params -> loss`` or ``(loss, aux)``, or an :class:`optax_sam.Objective`. A plain
        function is compiled anew in each call, an ``Objective`` or a ``jax.tree_util.Partial`` once.
      params: the parameters w.
      samples: how many z, at least 2.
      seed: of the z.

    Returns:
      :class:`Trace`.

    Raises:
      ImportError: without matfree.
      ValueError: if ``samples`` is below 2.
      TypeError: if ``loss_fn`` does not return a scalar loss.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam.diagnostics import hessian_trace
      >>> float(hessian_trace(lambda w: w[0] ** 2 - 3 * w[1] ** 2, jnp.ones(2)).value)
      -4.0

    References:
      Hutchinson, A Stochastic Estimator of the Trace of the Influence Matrix, 1989. Krämer et al.,
      matfree, https://github.com/pnkraemer/matfree.
    """
    _require_matfree()
    check_leaves(params)
    check_coordinates(params)
    samples = check_integer("samples", samples, minimum=2)
    seed = check_integer("seed", seed, minimum=0)
    result: Trace = _trace(loss_fn, params, seed, samples=samples)
    return result


def hessian_spectrum(
    loss_fn: Callable[..., Any],
    params: chex.ArrayTree,
    *,
    samples: int = 4,
    steps: int = 30,
    seed: int = 0,
) -> Spectrum:
    """The density of the Hessian's eigenvalues, by stochastic Lanczos quadrature.

    A random vector has a part along every eigenvector, and Lanczos sorts the parts by eigenvalue. Costs
    ``samples * steps`` times :func:`hessian_vector_product`, and the memory of ``steps`` copies of the
    parameters. Needs ``pip install 'optax_sam[curvature]'``.

    Args:
      loss_fn: ``params -> loss`` or ``(loss, aux)``, or an :class:`optax_sam.Objective`. A plain
        function is compiled anew in each call, an ``Objective`` or a ``jax.tree_util.Partial`` once.
      params: the parameters w.
      samples: random starts, at least 1.
      steps: of Lanczos, at least 1; never more than there are parameters.
      seed: of the starts.

    Returns:
      :class:`Spectrum`.

    Raises:
      ImportError: without matfree.
      ValueError: if a count is below 1.
      TypeError: if ``loss_fn`` does not return a scalar loss.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam.diagnostics import hessian_spectrum
      >>> loss_fn = lambda w: w[0] ** 2 - 3 * w[1] ** 2
      >>> hessian_spectrum(loss_fn, jnp.ones(2), samples=1).eigenvalues.round(4).tolist()
      [[-6.0, 2.0]]

    References:
      Ghorbani, Krishnan, Xiao, An Investigation into Neural Net Optimization via Hessian Eigenvalue
      Density, ICML 2019, arXiv 1901.10159. Krämer et al., matfree.
    """
    _require_matfree()
    check_leaves(params)
    check_coordinates(params)
    samples = check_integer("samples", samples, minimum=1)
    steps = check_integer("steps", steps, minimum=1)
    seed = check_integer("seed", seed, minimum=0)
    steps = min(steps, _tree.size(params))
    result: Spectrum = _spectrum(loss_fn, params, seed, samples=samples, steps=steps)
    return result


def _hutchinson(
    loss_fn: Callable[..., Any], params: chex.ArrayTree, seed: jax.Array, *, samples: int
) -> Trace:
    from matfree import stochtrace

    product, like = _operator(loss_fn, params)
    one = stochtrace.estimator_monte_carlo(
        stochtrace.monte_carlo_trace(), sampler=stochtrace.sampler_signs(like, num=1)
    )
    keys = jax.random.split(jax.random.key(seed), samples)
    values = lax.map(lambda key: one(product, key), keys)
    return Trace(jnp.mean(values), jnp.std(values, ddof=1) / jnp.sqrt(samples))


def _lanczos_quadrature(
    loss_fn: Callable[..., Any],
    params: chex.ArrayTree,
    seed: jax.Array,
    *,
    samples: int,
    steps: int,
) -> Spectrum:
    from matfree import decomp, stochtrace

    product, like = _operator(loss_fn, params)
    decompose = decomp.tridiag_sym(steps, reortho="full", custom_vjp=False)
    start = stochtrace.sampler_normal(like, num=1)

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        vector = jax.tree.map(lambda leaf: leaf[0], start(key))
        small = decompose(product, vector).J_small
        # Once the vectors span all that the Hessian makes of them the rest is 0 / 0. It counts nothing.
        is_rest = ~jnp.isfinite(small) & jnp.isfinite(small[0, 0])
        values, vectors = jnp.linalg.eigh(jnp.where(is_rest, 0, small))
        return values, jnp.square(vectors[0])

    keys = jax.random.split(jax.random.key(seed), samples)
    values, weights = lax.map(one, keys)
    return Spectrum(values, weights / samples)


def _operator(
    loss_fn: Callable[..., Any], params: chex.ArrayTree
) -> tuple[Callable[..., Any], list[jax.Array]]:
    """The Hessian on vectors of at least float32, for a loop, and a vector like those."""
    params = _tree.as_arrays(params)
    dtype = _tree.accumulation_dtype(params)
    product, _ = hessian_of(loss_fn, params)
    like = [jnp.zeros(leaf.shape, dtype) for leaf in _tree.floating_leaves(params)]
    return inside_control_flow(product), like


_trace = compiled_for_loss(_hutchinson, "samples")
_spectrum = compiled_for_loss(_lanczos_quadrature, "samples", "steps")


def _require_matfree() -> None:
    try:
        import matfree  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "trace and spectrum of the Hessian need matfree: pip install 'optax_sam[curvature]'."
        ) from error
