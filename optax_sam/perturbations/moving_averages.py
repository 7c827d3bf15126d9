"""Perturbations along, or without, an average of past gradients: VaSSO and Friendly-SAM."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam import _tree
from optax_sam._checks import check_like
from optax_sam._hyperparameters import check_number


class MovingAverageState(NamedTuple):
    """State of the moving averages of gradients.

    Attributes:
      count: int32 scalar, the number of gradients averaged so far.
      average: pytree like the parameters, the average m; zeros before the first gradient.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name; hides tuple.count
    average: chex.ArrayTree


def moving_average(theta: float) -> optax.GradientTransformation:
    r"""VaSSO's ascent direction: an exponential moving average that includes the current gradient.

    .. math:: m_0 = g_0, \qquad m_t = (1 - \theta) m_{t-1} + \theta g_t

    Args:
      theta: weight θ of the current gradient, 0 < θ ≤ 1. θ = 1 leaves the gradients as they are.

    Returns:
      An ``optax.GradientTransformation`` from gradients to averages; chain :func:`normalized` behind.

    Raises:
      ValueError: if ``theta`` is outside (0, 1].

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> stage = optax_sam.moving_average(theta=0.5)
      >>> m, state = stage.update(jnp.ones(1), stage.init(jnp.ones(1)))
      >>> stage.update(jnp.zeros(1), state)[0].tolist()
      [0.5]

    References:
      Li and Giannakis, Enhancing Sharpness-Aware Optimization Through Variance Suppression, NeurIPS
      2023, arXiv 2309.15639, algorithm 1.
    """
    check_number(
        "theta",
        theta,
        minimum=0,
        exclusive_minimum=True,
        maximum=1,
        remedy="At 0 the average would never change.",
    )

    def update(
        updates: optax.Updates, state: MovingAverageState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MovingAverageState]:
        del params
        average = _blend(state, updates, 1 - theta)
        return average, MovingAverageState(optax.safe_increment(state.count), average)

    return optax.GradientTransformation(_init, update)


def subtract_moving_average(sigma: float = 1.0, decay: float = 0.9) -> optax.GradientTransformation:
    r"""Friendly-SAM's ascent direction: the batch's own part of the gradient.

    .. math:: h_t = g_t - \sigma m_{t-1}, \qquad m_t = \lambda m_{t-1} + (1 - \lambda) g_t

    with :math:`m_0 = g_0`; the first step climbs along :math:`h_0 = g_0`, as SAM does.

    Args:
      sigma: how much σ of the average is subtracted. σ = 0 leaves the gradients as they are.
      decay: λ, 0 ≤ λ ≤ 1, how slowly the average forgets.

    Returns:
      An ``optax.GradientTransformation`` from gradients to h; chain :func:`normalized` behind.

    Raises:
      ValueError: if ``decay`` is outside [0, 1] or ``sigma`` not finite.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> stage = optax_sam.subtract_moving_average()
      >>> h, state = stage.update(jnp.ones(1), stage.init(jnp.ones(1)))
      >>> stage.update(jnp.full(1, 3.0), state)[0].tolist()
      [2.0]

    References:
      Li et al., Friendly Sharpness-Aware Minimization, CVPR 2024, arXiv 2403.12350, algorithm 1. The
      authors' code averages as here, without the current gradient; the paper's text includes it,
      which for σ = 1 is the same direction.
    """
    check_number("sigma", sigma)
    check_number("decay", decay, minimum=0, maximum=1)

    def update(
        updates: optax.Updates, state: MovingAverageState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MovingAverageState]:
        del params
        dtype = _tree.accumulation_dtype(updates)
        amount = jnp.where(state.count == 0, 0, jnp.asarray(sigma).astype(dtype))
        average = _blend(state, updates, decay)
        direction = _tree.linear(jnp.ones([], dtype), updates, -amount, state.average)
        return direction, MovingAverageState(optax.safe_increment(state.count), average)

    return optax.GradientTransformation(_init, update)


def _init(params: optax.Params) -> MovingAverageState:
    return MovingAverageState(count=jnp.zeros([], jnp.int32), average=_tree.zeros_like(params))


def _blend(state: MovingAverageState, updates: optax.Updates, decay: chex.Numeric) -> optax.Updates:
    """``decay * average + (1 - decay) * updates``, and just the updates at the first step."""
    check_like(
        "the average in the state",
        state.average,
        updates,
        of="updates",
        remedy="Make the state with tx.init(params) of the same params.",
    )
    dtype = _tree.accumulation_dtype(updates)
    keep = jnp.where(state.count == 0, 0, jnp.asarray(decay).astype(dtype))
    return _tree.linear(keep, state.average, 1 - keep, updates)
