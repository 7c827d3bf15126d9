"""Projection of a perturbation to the neighborhood."""

import jax.numpy as jnp
import optax

from optax_sam import _norms, _tree
from optax_sam._hyperparameters import Hyperparameter


def project_to_ball(rho: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    r"""Shortens a perturbation to length ρ if it is longer.

    .. math:: \epsilon \, \min(1, \rho / \lVert \epsilon \rVert)

    It is ``optax.clip_by_global_norm`` with a schedule, and with the norm in at least float32.

    Args:
      rho: the radius ρ ≥ 0; a number or a schedule of the step.

    Returns:
      An ``optax.GradientTransformation`` from perturbations to perturbations.

    Raises:
      ValueError: if ``rho`` is a negative number.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> stage = optax_sam.project_to_ball(rho=1.0)
      >>> e = jnp.array([3.0, 4.0])
      >>> [round(float(x), 6) for x in stage.update(e, stage.init(e))[0]]
      [0.6, 0.8]

    References:
      Xu, Deng, Pang, NCSAM, arXiv 2601.19947v3, equation (16).
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
        # A vector already inside keeps its bits: no multiplication by a rounded 1.
        factor = jnp.where(length > rho, _tree.divide_or_zero(rho, length), 1)
        return _tree.scale(updates, factor), state

    return optax.GradientTransformation(init, update)
