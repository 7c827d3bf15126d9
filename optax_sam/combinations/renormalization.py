"""Stable SAM's combination."""

from typing import Any

import chex
import optax

from optax_sam import _norms, _tree
from optax_sam.combinations._clean_gradients import require_clean_gradients


def renormalize() -> optax.GradientTransformationExtraArgs:
    r"""Gives the perturbed gradient the length of the clean one: Stable SAM.

    .. math:: d = \frac{\lVert g \rVert}{\lVert g' \rVert} \, g'

    Both norms are global, over all leaves. Where g' is zero, d is zero.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` on g'. Its ``update`` needs the extra argument
      ``clean_grads`` (g); others are accepted and ignored.

    Raises:
      ValueError: from ``update``, if ``clean_grads`` is missing or not like the updates.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> stage = optax_sam.renormalize()
      >>> g, perturbed = jnp.array([0.0, 1.0]), jnp.array([3.0, 4.0])
      >>> [round(float(x), 6) for x in stage.update(perturbed, stage.init(g), clean_grads=g)[0]]
      [0.6, 0.8]

    References:
      Tan, Zhang, Liu, Wang, Hao, Stabilizing Sharpness-Aware Minimization Through a Simple
      Renormalization Strategy, JMLR 2025, arXiv 2401.07250. The authors' code adds 1e-12 to ‖g'‖.
    """

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        clean_grads: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        clean_grads = require_clean_gradients(clean_grads, updates, "renormalize")
        factor = _tree.divide_or_zero(_norms.norm(clean_grads), _norms.norm(updates))
        return _tree.scale(updates, factor), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
