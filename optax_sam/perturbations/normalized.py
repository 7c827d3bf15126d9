"""The perturbation of SAM."""

import jax
import jax.numpy as jnp
import optax

from optax_sam import _norms, _tree
from optax_sam._hyperparameters import Hyperparameter
from optax_sam._stages import KnownLength


def normalized(rho: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    r"""Climbs along the gradient to distance ρ: :math:`\epsilon = \rho \, g / \lVert g \rVert`.

    The norm is global, over all leaves, and accumulated in at least float32. A zero gradient gives
    ε = 0; NaN is passed on.

    Args:
      rho: the neighborhood's radius ρ ≥ 0, in units of the parameters; a number or a schedule of
        the step.

    Returns:
      An ``optax.GradientTransformation`` from gradients to ε.

    Raises:
      ValueError: if ``rho`` is a negative number or NaN.
      TypeError: if ``rho`` is neither a number nor a schedule.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> stage = optax_sam.normalized(rho=0.5)
      >>> g = jnp.array([3.0, 4.0])
      >>> perturbation, _ = stage.update(g, stage.init(g))
      >>> [round(float(x), 6) for x in perturbation]
      [0.3, 0.4]

    References:
      Foret et al., ICLR 2021, arXiv 2010.01412, equation (2) with p = 2. Most PyTorch codes add
      1e-12 to the norm; google-research/sam and ``optax.contrib`` divide by it unguarded.
    """
    radius = Hyperparameter("rho", rho, minimum=0)

    def init(params: optax.Params) -> optax.OptState:
        del params
        return radius.init()

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        length = _norms.norm(updates)
        rho, state = radius.read(state, length.dtype)
        return _tree.scale(updates, _tree.divide_or_zero(rho, length)), state

    def length(state: optax.OptState, gradient_norm: jax.Array) -> jax.Array:
        rho, _ = radius.read(state, gradient_norm.dtype)
        return jnp.abs(rho) * _tree.divide_or_zero(gradient_norm, gradient_norm)

    return KnownLength(init, update, length)
