"""Combinations that split one gradient along the other: GSAM and LookSAM."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam import _norms, _tree
from optax_sam._checks import check_like
from optax_sam._hyperparameters import Hyperparameter, check_number
from optax_sam.combinations._clean_gradients import require_clean_gradients


def orthogonal_part(vector: chex.ArrayTree, direction: chex.ArrayTree) -> chex.ArrayTree:
    """The part of ``vector`` orthogonal to ``direction``; all of it where the direction is zero."""
    length = _norms.norm(direction)
    # Divided by the norm twice, not once by its square, which would vanish or overflow.
    inverse = _tree.divide_or_zero(jnp.ones_like(length), length)
    coefficient = _tree.dot(vector, direction, inverse) * inverse
    return _tree.linear(jnp.ones_like(coefficient), vector, -coefficient, direction)


def subtract_orthogonal(alpha: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""GSAM's combination: lowers the sharpness too, to first order without raising the perturbed loss.

    .. math:: d = g' - \alpha \, g_\perp, \qquad
       g_\perp = g - \frac{\langle g, g' \rangle}{\lVert g' \rVert^2} g'

    Args:
      alpha: how much α of the clean gradient's part orthogonal to g' is subtracted; a number or a
        schedule. α = 0 is SAM.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` on g'. Its ``update`` needs the extra argument
      ``clean_grads`` (g); others are accepted and ignored.

    Raises:
      TypeError: if ``alpha`` is neither a number nor a schedule.
      ValueError: from ``update``, if ``clean_grads`` is missing or not like the updates.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> stage = optax_sam.subtract_orthogonal(alpha=0.5)
      >>> g, perturbed = jnp.array([1.0, 1.0]), jnp.array([2.0, 0.0])
      >>> stage.update(perturbed, stage.init(g), clean_grads=g)[0].tolist()
      [2.0, -0.5]

    References:
      Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, ICLR 2022, arXiv
      2203.08065, algorithm 1. The public codes agree on which gradient is decomposed.
    """
    amount = Hyperparameter("alpha", alpha)

    def init(params: optax.Params) -> optax.OptState:
        del params
        return amount.init()

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        clean_grads: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        clean_grads = require_clean_gradients(clean_grads, updates, "subtract_orthogonal")
        alpha, state = amount.read(state, _tree.accumulation_dtype(updates))
        orthogonal = orthogonal_part(clean_grads, updates)
        return _tree.linear(jnp.ones_like(alpha), updates, -alpha, orthogonal), state

    return optax.GradientTransformationExtraArgs(init, update)


class ReuseOrthogonalState(NamedTuple):
    """State of :func:`reuse_orthogonal`.

    Attributes:
      orthogonal: pytree like the parameters, the part of the last g' orthogonal to its g.
      alpha: empty, or the step count of a schedule.
    """

    orthogonal: chex.ArrayTree
    alpha: optax.OptState


def reuse_orthogonal(
    alpha: optax.ScalarOrSchedule = 0.7, norm_epsilon: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM's stand-in for g' on the steps without a second gradient.

    On a step with one, :math:`v` is the part of g' orthogonal to g; in between

    .. math:: d = g + \alpha \frac{\lVert g \rVert}{\lVert v \rVert} v

    Args:
      alpha: α ≥ 0, the length of the reused part relative to the gradient; a number or a schedule.
      norm_epsilon: at least 0, added to ‖v‖; ``1e-8`` in pytorch_optimizer.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` for the argument ``otherwise`` of
      :func:`optax_sam.sometimes`. Its ``update`` needs ``clean_grads`` and ``is_ascent_step``.

    Raises:
      ValueError: if ``alpha`` or ``norm_epsilon`` is a negative number; from ``update``, if
        ``clean_grads`` is missing or not like the updates.
      TypeError: from ``update``, if ``is_ascent_step`` is missing or no Python bool.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> stage = optax_sam.reuse_orthogonal(alpha=1.0)
      >>> g = jnp.array([1.0, 0.0])
      >>> _, state = stage.update(
      ...     jnp.array([1.0, 0.5]), stage.init(g), clean_grads=g, is_ascent_step=True)
      >>> stage.update(g, state, clean_grads=g, is_ascent_step=False)[0].tolist()
      [1.0, 1.0]

    References:
      Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, CVPR 2022, arXiv
      2203.02714, algorithm 1. Norms are global as in the paper, per tensor in pytorch_optimizer.
    """
    amount = Hyperparameter("alpha", alpha, minimum=0)
    check_number("norm_epsilon", norm_epsilon, minimum=0)

    def init(params: optax.Params) -> ReuseOrthogonalState:
        return ReuseOrthogonalState(orthogonal=_tree.zeros_like(params), alpha=amount.init())

    def update(
        updates: optax.Updates,
        state: ReuseOrthogonalState,
        params: optax.Params | None = None,
        *,
        clean_grads: optax.Updates | None = None,
        is_ascent_step: bool | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ReuseOrthogonalState]:
        del params, extra_args
        clean_grads = require_clean_gradients(clean_grads, updates, "reuse_orthogonal")
        if is_ascent_step is None or isinstance(is_ascent_step, jax.core.Tracer):
            raise TypeError(
                "reuse_orthogonal must know whether this step has a second gradient, got "
                f"is_ascent_step={is_ascent_step!r}. Pass a Python bool, or use it as otherwise= "
                "of optax_sam.sometimes, which does."
            )
        check_like(
            "the orthogonal part in the state",
            state.orthogonal,
            updates,
            of="updates",
            remedy="Make the state with tx.init(params) of the same params.",
        )
        alpha, alpha_state = amount.read(state.alpha, _tree.accumulation_dtype(updates))
        if is_ascent_step:
            orthogonal = _zero_if_rounding(orthogonal_part(updates, clean_grads), updates)
            return updates, ReuseOrthogonalState(orthogonal, alpha_state)
        length = _norms.norm(state.orthogonal)
        scale = alpha * _tree.divide_or_zero(
            _norms.norm(clean_grads), jnp.where(length == 0, 0, length + norm_epsilon)
        )
        direction = _tree.linear(jnp.ones_like(scale), clean_grads, scale, state.orthogonal)
        return direction, ReuseOrthogonalState(state.orthogonal, alpha_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _zero_if_rounding(part: chex.ArrayTree, whole: chex.ArrayTree) -> chex.ArrayTree:
    """The part, or zeros if it is no longer than the rounding error of the whole.

    Where g' is parallel to g (ρ = 0, a linear loss), the orthogonal part is nothing but rounding, and
    LookSAM would scale it up to the length of the gradient.
    """
    length = _norms.norm(part)
    dtypes = {leaf.dtype for leaf in _tree.floating_leaves(whole)}
    epsilons = [jnp.finfo(dtype).eps for dtype in dtypes]  # type: ignore[no-untyped-call]
    coarsest = float(max(epsilons, default=0))
    share = max(16 * float(jnp.finfo(length.dtype).eps), coarsest)  # type: ignore[no-untyped-call]
    rounding = share * _norms.norm(whole)
    return _tree.scale(part, jnp.where(length <= rounding, 0, jnp.ones_like(length)))
