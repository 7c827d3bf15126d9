"""The perturbation of LE-SAM."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam import _norms, _tree
from optax_sam._hyperparameters import Hyperparameter
from optax_sam._stages import KnownLength


def loss_budget(
    sigma: optax.ScalarOrSchedule, rho_max: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    r"""Climbs along the gradient until the loss has risen by σ, or to distance ρ_max.

    .. math::
       \epsilon = \rho_t \frac{g}{\lVert g \rVert}, \qquad
       \rho_t = \min\Big(\frac{\sigma}{\lVert g \rVert}, \rho_\mathrm{max}\Big)

    To first order the loss rises by :math:`\langle g, \epsilon \rangle = \rho_t \lVert g \rVert`.
    A zero gradient gives ε = 0.

    Args:
      sigma: the budget σ ≥ 0, in units of the loss; a number or a schedule of the step.
      rho_max: the largest radius ρ_max ≥ 0, in units of the parameters; a number or a schedule.

    Returns:
      An ``optax.GradientTransformation`` from gradients to ε.

    Raises:
      ValueError: if ``sigma`` or ``rho_max`` is a negative number.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> stage = optax_sam.loss_budget(sigma=1.0, rho_max=0.5)
      >>> steep, shallow = jnp.array([3.0, 4.0]), jnp.array([0.3, 0.4])
      >>> [round(float(x), 6) for x in stage.update(steep, stage.init(steep))[0]]
      [0.12, 0.16]
      >>> [round(float(x), 6) for x in stage.update(shallow, stage.init(shallow))[0]]
      [0.3, 0.4]

    References:
      Wang, Liu, Xie, Gao, Fix the Loss, Not the Radius, ICML 2026, arXiv 2605.10183.
    """
    budget = Hyperparameter("sigma", sigma, minimum=0)
    radius = Hyperparameter("rho_max", rho_max, minimum=0)

    def read(state: tuple[Any, Any], length: jax.Array) -> tuple[jax.Array, tuple[Any, Any]]:
        """ρ_t, and the state of the next step."""
        rise, rise_state = budget.read(state[0], length.dtype)
        largest, largest_state = radius.read(state[1], length.dtype)
        rho = jnp.minimum(_tree.divide_or_zero(rise, length), largest)
        return rho, (rise_state, largest_state)

    def init(params: optax.Params) -> tuple[Any, Any]:
        del params
        return budget.init(), radius.init()

    def update(
        updates: optax.Updates, state: tuple[Any, Any], params: optax.Params | None = None
    ) -> tuple[optax.Updates, tuple[Any, Any]]:
        del params
        length = _norms.norm(updates)
        rho, state = read(state, length)
        return _tree.scale(updates, _tree.divide_or_zero(rho, length)), state

    def length_of(state: tuple[Any, Any], gradient_norm: jax.Array) -> jax.Array:
        return read(state, gradient_norm)[0]

    return KnownLength(init, update, length_of)
