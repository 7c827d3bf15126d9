"""WSAM's combination."""

from typing import Any

import jax.numpy as jnp
import optax

from optax_sam import _tree
from optax_sam._hyperparameters import Hyperparameter
from optax_sam.combinations._clean_gradients import require_clean_gradients


def extrapolate(gamma: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Weighs the sharpness against the loss: SGD, SAM, and all between and beyond them.

    .. math:: d = g + \frac{\gamma}{1 - \gamma} (g' - g)

    Args:
      gamma: 0 ≤ γ < 1; a number or a schedule. γ = 0 is SGD, γ = ½ is SAM, above it extrapolates.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` on g'. Its ``update`` needs the extra argument
      ``clean_grads`` (g); others are accepted and ignored.

    Raises:
      ValueError: if ``gamma`` is a number outside [0, 1); from ``update``, if ``clean_grads`` is
        missing or not like the updates.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> stage = optax_sam.extrapolate(gamma=0.75)
      >>> g, perturbed = jnp.array([1.0]), jnp.array([2.0])
      >>> stage.update(perturbed, stage.init(g), clean_grads=g)[0].tolist()
      [4.0]

    References:
      Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term,
      KDD 2023, arXiv 2305.15817, equation (6), in the coupled form. :func:`optax_sam.decouple` behind
      it gives the authors' decoupled form; without momentum the two are equal.
    """
    weight = Hyperparameter("gamma", gamma, minimum=0, maximum=1, exclusive_maximum=True)

    def init(params: optax.Params) -> optax.OptState:
        del params
        return weight.init()

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        clean_grads: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        clean_grads = require_clean_gradients(clean_grads, updates, "extrapolate")
        gamma, state = weight.read(state, _tree.accumulation_dtype(updates))
        ratio = gamma / (1 - gamma)
        # Not g + ratio (g' - g): this form is g' exactly at ratio 1 and g exactly at 0.
        return _tree.linear(ratio, updates, jnp.ones_like(ratio) - ratio, clean_grads), state

    return optax.GradientTransformationExtraArgs(init, update)
