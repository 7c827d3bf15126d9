"""SANER's combination: magnify the down-weighting that SAM does."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam import _tree
from optax_sam._checks import check_parameters_given
from optax_sam._hyperparameters import Hyperparameter, check_integer, check_number
from optax_sam._masks import MaskOrFunction, resolve_mask
from optax_sam.combinations._clean_gradients import require_clean_gradients
from optax_sam.combinations._coordinates import coordinate_sets


class DownWeightingState(NamedTuple):
    """State of :func:`down_weight`.

    Attributes:
      alpha: empty, or the step count of a schedule.
      down_weighted_fraction: scalar in [0, 1], the share of coordinates in set B at the last step,
        among those that the mask lets in.
    """

    alpha: optax.OptState
    down_weighted_fraction: jax.Array


def down_weight(
    alpha: optax.ScalarOrSchedule = 0.5,
    ratio_epsilon: float | None = None,
    mask: MaskOrFunction = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Weakens the coordinates that the perturbation has made smaller: SANER.

    Per coordinate, with :math:`r = g'/g`,

    .. math:: d = (1 - \alpha \, \mathbb{1}[0 < r < 1]) \, g'

    Args:
      alpha: the paper's strength, 0 ≤ α ≤ 1; a number or a schedule of the step. α = 0 is SAM
        exactly, α = 1 drops set B. **The authors' code multiplies set B by its alpha, that is
        by 1 − α here**; the two agree only at ½.
      ratio_epsilon: None decides 0 < r < 1 without a division: same sign and ``|g'| < |g|``. ``1e-8``
        reproduces the authors' code, :math:`r = g'/(g + 10^{-8})`: the signed offset moves
        coordinates of its own size between the sets, and makes ρ = 0 differ from SGD.
      mask: pytree of bools like the parameters (or a prefix, or a function of the parameters that
        returns one): where False, d = g'. The authors' ``saner_last`` lets in the last layer only.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` on g'. Its ``update`` needs the extra argument
      ``clean_grads`` (g), and ``params`` if there is a mask; others are accepted and ignored.

    Raises:
      ValueError: if ``alpha`` is a number outside [0, 1]; from ``update``, if the mask does not match
        or lets nothing in, or if ``clean_grads`` is missing or not like the updates.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> stage = optax_sam.down_weight(alpha=0.5)
      >>> g, perturbed = jnp.array([1.0, 1.0, 1.0]), jnp.array([2.0, 0.5, -1.0])
      >>> stage.update(perturbed, stage.init(g), clean_grads=g)[0].tolist()
      [2.0, 0.25, -1.0]

    References:
      Luong et al., Understanding SAM's Robustness to Noisy Labels through Gradient Down-weighting,
      AISTATS 2026, arXiv 2411.17132, equation (6).
    """
    strength = Hyperparameter(
        "alpha",
        alpha,
        minimum=0,
        maximum=1,
        remedy="It is the paper's strength: 0 is SAM, 1 drops set B.",
    )
    if ratio_epsilon is not None:
        check_number("ratio_epsilon", ratio_epsilon, minimum=0)

    def init(params: optax.Params) -> DownWeightingState:
        return DownWeightingState(
            alpha=strength.init(),
            down_weighted_fraction=jnp.zeros([], _tree.accumulation_dtype(params)),
        )

    def update(
        updates: optax.Updates,
        state: DownWeightingState,
        params: optax.Params | None = None,
        *,
        clean_grads: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DownWeightingState]:
        del extra_args
        clean_grads = require_clean_gradients(clean_grads, updates, "down_weight")
        if mask is not None:
            check_parameters_given(
                params, "down_weight(mask=...)", "update(updates, state, params, clean_grads=grads)"
            )
        included = resolve_mask("mask", mask, updates if mask is None else params)
        if mask is not None and not any(jax.tree.leaves(included)):
            raise ValueError(
                "mask excludes every parameter, so nothing would be down-weighted. Set it to True "
                "where a leaf is to be down-weighted; for none of them leave down_weight out."
            )
        dtype = _tree.accumulation_dtype(updates)
        alpha, alpha_state = strength.read(state.alpha, dtype)

        def set_b(perturbed: jax.Array, clean: jax.Array, is_included: bool) -> jax.Array:
            if not is_included or not _tree.is_floating(perturbed):
                return jnp.zeros(jnp.shape(perturbed), bool)
            return coordinate_sets(clean, perturbed, ratio_epsilon).b

        sets = jax.tree.map(set_b, updates, clean_grads, included)
        direction = _tree.map_floating(
            lambda perturbed, b: jnp.where(b, (1 - alpha).astype(perturbed.dtype), 1) * perturbed,
            updates,
            sets,
        )
        counts = [jnp.sum(b, dtype=dtype) for b in jax.tree.leaves(sets)]
        seen = jax.tree.map(
            lambda leaf, is_included: leaf if is_included else (), updates, included
        )
        fraction = sum(counts, jnp.zeros([], dtype)) / float(max(_tree.size(seen), 1))
        return direction, DownWeightingState(alpha_state, fraction)

    return optax.GradientTransformationExtraArgs(init, update)


def linear_warmup_alpha(alpha: float, warmup_epochs: int, steps_per_epoch: int) -> optax.Schedule:
    r"""The authors' schedule for α: up in equal steps, one per epoch.

    :math:`\alpha_e = \alpha \, e / k` in epoch :math:`e = 1, 2, \dots < k`, then α. It counts the steps
    with a second gradient (in LookSAM all): with ``sam(every_k=2)`` pass half of the steps of an epoch.

    Args:
      alpha: the final strength, 0 ≤ α ≤ 1.
      warmup_epochs: k ≥ 1; the authors take 50 of 200.
      steps_per_epoch: optimizer steps in an epoch.

    Returns:
      A schedule of the step for :func:`down_weight` and :func:`optax_sam.saner`.

    Raises:
      ValueError: if ``alpha`` is outside [0, 1] or a count is below 1.

    Example:
      >>> import optax_sam
      >>> schedule = optax_sam.linear_warmup_alpha(0.5, warmup_epochs=5, steps_per_epoch=10)
      >>> [round(float(schedule(step)), 6) for step in (0, 9, 10, 39, 40, 100)]
      [0.1, 0.1, 0.2, 0.4, 0.5, 0.5]

    References:
      Luong et al., arXiv 2411.17132, section 5, and the authors' ``get_alpha``, which gives the
      multiplier 1 − α.
    """
    check_number("alpha", alpha, minimum=0, maximum=1)
    warmup_epochs = check_integer("warmup_epochs", warmup_epochs, minimum=1)
    steps_per_epoch = check_integer("steps_per_epoch", steps_per_epoch, minimum=1)

    def schedule(step: chex.Numeric) -> chex.Numeric:
        epoch = jnp.asarray(step) // steps_per_epoch + 1
        return alpha * jnp.minimum(epoch, warmup_epochs) / warmup_epochs

    return schedule
