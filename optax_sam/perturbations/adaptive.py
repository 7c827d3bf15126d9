"""The perturbation of ASAM."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam import _norms, _tree
from optax_sam._checks import check_like, check_parameters_given
from optax_sam._hyperparameters import Hyperparameter, check_number
from optax_sam._masks import Mask, resolve_mask


def adaptive(
    rho: optax.ScalarOrSchedule,
    eta: float = 0.01,
    scale_mask: Mask | Callable[[chex.ArrayTree], Mask] | None = None,
) -> optax.GradientTransformation:
    r"""Climbs in units of the weights' size, which re-scaling of the network does not change.

    .. math:: \epsilon = \rho \, \frac{t^2 g}{\lVert t g \rVert}, \qquad t = |w| + \eta

    Args:
      rho: the radius ρ ≥ 0, relative to the size of the weights (about 10 times SAM's); a number or
        a schedule of the step.
      eta: η ≥ 0, in units of the parameters; keeps zero weights movable.
      scale_mask: pytree of bools like the parameters (or a prefix, or a function of the parameters
        that returns one): where False, t = 1. The authors scale only weights, not biases.

    Returns:
      An ``optax.GradientTransformation`` from gradients to ε; its ``update`` needs ``params``.

    Raises:
      ValueError: if ``rho`` or ``eta`` is a negative number; from ``update``, if ``params`` is missing,
        or ``updates`` or ``scale_mask`` does not match it.
      TypeError: from ``update``, if ``scale_mask`` is no pytree of bools.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> stage = optax_sam.adaptive(rho=0.5, eta=0.0)
      >>> w, g = jnp.array([2.0, 0.0]), jnp.array([1.0, 1.0])
      >>> stage.update(g, stage.init(w), w)[0].tolist()
      [1.0, 0.0]

    References:
      Kwon et al., ASAM, ICML 2021, arXiv 2102.11600, equation (6). The authors' code has η = 0.01 and
      t = 1 on biases; davda54, lhchau and pytorch_optimizer have η = 0 on all leaves.
    """
    radius = Hyperparameter("rho", rho, minimum=0)
    check_number("eta", eta, minimum=0)

    def init(params: optax.Params) -> optax.OptState:
        del params
        return radius.init()

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        check_parameters_given(params, "adaptive(...)", "update(updates, state, params)")
        check_like("updates", updates, params, of="params", remedy="Pass gradients in params.")
        dtype = _tree.accumulation_dtype(updates)
        scaled = resolve_mask("scale_mask", scale_mask, params)
        offset = jnp.asarray(eta).astype(dtype)

        def stretch(gradient: Any, param: jax.Array, is_scaled: bool) -> Any:
            if not is_scaled or not _tree.is_floating(gradient):
                return gradient
            return (jnp.abs(param.astype(dtype)) + offset) * gradient.astype(dtype)

        # Kept in the accumulation dtype between the two factors t: in half precision w·g underflows.
        stretched = jax.tree.map(stretch, updates, params, scaled)
        length = _norms.norm(stretched)
        rho, state = radius.read(state, length.dtype)
        factor = _tree.divide_or_zero(rho, length)
        twice = jax.tree.map(stretch, stretched, params, scaled)
        perturbation = _tree.map_floating(lambda g, t: factor * t.astype(dtype), updates, twice)
        return perturbation, state

    return optax.GradientTransformation(init, update)
