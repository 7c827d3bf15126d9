"""How perturbations and methods change the gradients of right and wrong labels."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_sam import _tree
from optax_sam._checks import check_leaves, check_like
from optax_sam._hyperparameters import check_number
from optax_sam._stages import AlongPreviousState, SharpnessAwareState, SometimesState
from optax_sam.diagnostics._compiled import compiled_for_loss
from optax_sam.diagnostics.coordinates import CoordinateShares, coordinate_shares
from optax_sam.evaluations import value_and_gradients
from optax_sam.objectives import Objective, require_objective


class SharesByLabel(NamedTuple):
    """The result of :func:`shares_by_label`; without such examples all coordinates are in C.

    Attributes:
      all: :class:`CoordinateShares` of the batch's gradient.
      right: of the gradient of the correctly labelled examples.
      wrong: of the gradient of the wrongly labelled ones.
    """

    all: CoordinateShares
    right: CoordinateShares
    wrong: CoordinateShares


class Damping(NamedTuple):
    """The result of :func:`damping`: 0 is as SGD, 1 is no progress at all, below 0 is more than SGD.

    NaN where SGD itself would not lower that loss, or where there is no such example.

    Attributes:
      right: scalar, of the correctly labelled examples.
      wrong: scalar, of the wrongly labelled ones.
    """

    right: jax.Array
    wrong: jax.Array


def shares_by_label(
    objective: Objective,
    params: chex.ArrayTree,
    perturbation: chex.ArrayTree,
    wrong: ArrayLike,
    *,
    ratio_epsilon: float | None = None,
) -> SharesByLabel:
    r"""The sets A, B and C of coordinates, for the batch and for its two kinds of examples.

    The batch's gradient is the sum of those of its correctly and of its wrongly labelled examples. Each
    is taken at w and at w + ε, with the ε of the whole batch; see :func:`coordinate_shares`. Costs four
    gradients.

    Args:
      objective: the loss of the batch; its penalty is left out.
      params: the parameters w.
      perturbation: ε, a pytree like ``params``, for example of :func:`optax_sam.normalized`.
      wrong: bools, shape ``(B,)``, True where the label is wrong.
      ratio_epsilon: see :func:`optax_sam.down_weight`.

    Returns:
      :class:`SharesByLabel`.

    Raises:
      TypeError: if ``objective`` is not an ``Objective``, or ``wrong`` are not bools.
      ValueError: if ``wrong`` does not have one value per example, or ε is not like ``params``.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> from optax_sam.diagnostics import shares_by_label
      >>> objective = optax_sam.Objective(lambda w, x: x @ w, jnp.eye(2), jnp.array([0, 1]))
      >>> shares = shares_by_label(
      ...     objective, jnp.zeros((2, 2)), jnp.eye(2), jnp.array([False, True]))
      >>> float(shares.all.b), float(shares.right.b), float(shares.right.c)
      (1.0, 0.5, 0.5)

    References:
      Luong et al., arXiv 2411.17132, sections 3 and 4.
    """
    wrong = _check(objective, params, wrong)
    check_like(
        "perturbation", perturbation, params, of="params", remedy="It is the ε of the batch."
    )
    if ratio_epsilon is not None:
        check_number("ratio_epsilon", ratio_epsilon, minimum=0)
        ratio_epsilon = float(ratio_epsilon)
    result: SharesByLabel = _shares(objective, params, perturbation, wrong, ratio=ratio_epsilon)
    return result


def damping(
    method: optax.GradientTransformation,
    objective: Objective,
    params: chex.ArrayTree,
    wrong: ArrayLike,
    opt_state: optax.OptState | None = None,
    **extra_args: Any,
) -> Damping:
    r"""How much less than SGD a step of a method fits the wrong labels, and the right ones.

    .. math:: 1 - \frac{\langle d, g_k \rangle}{\langle g, g_k \rangle}, \qquad
       g = g_\mathrm{right} + g_\mathrm{wrong}

    To first order, a short step along −d lowers the loss of the examples k, right or wrong, by
    :math:`\langle d, g_k \rangle`, and one of SGD by :math:`\langle g, g_k \rangle`. A method that
    resists label noise damps the wrong ones more than the right ones; one that only shortens its step
    damps both alike. Costs a gradient more than a training step with the method.

    Args:
      method: a sharpness-aware method alone, without the optimizer behind it. Keep it: another one,
        even if it is equal, is compiled anew.
      objective: the loss of the batch; its penalty is left out.
      params: the parameters w.
      wrong: bools, shape ``(B,)``, True where the label is wrong.
      opt_state: of ``method``, if it remembers; None: the initial one.
      **extra_args: arrays that the method needs in ``update`` besides, such as ``second_moment``.

    Returns:
      :class:`Damping`.

    Raises:
      TypeError: if ``objective`` is not an ``Objective``, ``method`` no method alone, or ``wrong`` are
        not bools.
      ValueError: if ``wrong`` does not have one value per example.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> from optax_sam.diagnostics import damping
      >>> objective = optax_sam.Objective(lambda w, x: x @ w, jnp.eye(2), jnp.array([0, 1]))
      >>> result = damping(
      ...     optax_sam.sam(0.1), objective, jnp.zeros((2, 2)), jnp.array([False, True]))
      >>> round(float(result.right), 2), round(float(result.wrong), 2)  # SAM steps further here
      (-0.05, -0.05)

    References:
      Luong et al., arXiv 2411.17132, section 4, argue with which coordinates wrong labels dominate;
      the inner product is ours.
    """
    wrong = _check(objective, params, wrong)
    if not isinstance(method, optax.GradientTransformation):
        raise TypeError(f"method must be a method such as optax_sam.saner(0.05), got {method!r}.")
    state = method.init(params) if opt_state is None else opt_state
    if not isinstance(state, SharpnessAwareState | AlongPreviousState | SometimesState):
        raise TypeError(
            f"method must be a sharpness-aware method alone, but its state is {type(state).__name__}. "
            "Pass optax_sam.saner(0.05), not the optax.chain with the optimizer."
        )
    result: Damping = _damping(objective, params, wrong, state, extra_args, method=method)
    return result


def _check(objective: Any, params: Any, wrong: ArrayLike) -> jax.Array:
    batch_size = require_objective(objective, "this instrument").batch_size
    check_leaves(params)
    wrong = jnp.asarray(wrong)
    if wrong.shape != (batch_size,):
        raise ValueError(
            f"wrong must have shape ({batch_size},), one value per example, got {wrong.shape}."
        )
    if wrong.dtype != jnp.bool_:
        raise TypeError(
            f"wrong must be bools, got dtype {wrong.dtype}. Pass labels != true_labels, or "
            "wrong.astype(bool)."
        )
    return wrong


def _parts(
    objective: Objective, params: chex.ArrayTree, wrong: jax.Array
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """The gradients of both kinds of examples, which add up to the gradient of the batch."""
    weights = jnp.ones(wrong.shape) if objective.weights is None else objective.weights

    def part(chosen: jax.Array) -> chex.ArrayTree:
        chosen = chosen.reshape(*chosen.shape, *(1,) * (jnp.ndim(weights) - 1))
        some = objective.replace(weights=weights * chosen, penalty=None)
        total = objective.replace(weights=weights).total_weight
        share = _tree.divide_or_zero(some.total_weight, total)
        return _tree.scale(value_and_gradients(some, params)[1], share)

    return part(~wrong), part(wrong)


def _sum(left: chex.ArrayTree, right: chex.ArrayTree) -> chex.ArrayTree:
    return _tree.map_floating(jnp.add, left, right)


def _shares_by_label(
    objective: Objective,
    params: chex.ArrayTree,
    perturbation: chex.ArrayTree,
    wrong: jax.Array,
    *,
    ratio: float | None,
) -> SharesByLabel:
    clean = _parts(objective, params, wrong)
    perturbed = _parts(objective, _tree.add(params, perturbation), wrong)
    pairs = [(_sum(*clean), _sum(*perturbed)), *zip(clean, perturbed, strict=True)]
    return SharesByLabel(*(coordinate_shares(*pair, ratio) for pair in pairs))


def _damping_of(
    objective: Objective,
    params: chex.ArrayTree,
    wrong: jax.Array,
    state: optax.OptState,
    extra_args: dict[str, Any],
    *,
    method: optax.GradientTransformation,
) -> Damping:
    parts = _parts(objective, params, wrong)
    plain = _sum(*parts)
    without_penalty = objective.replace(penalty=None)
    update = optax.with_extra_args_support(method).update
    direction, _ = update(plain, state, params, loss_fn=without_penalty, **extra_args)

    def damped(part: chex.ArrayTree) -> jax.Array:
        by_sgd, by_method = _tree.dot(plain, part), _tree.dot(direction, part)
        return jnp.where(by_sgd > 0, 1 - _tree.divide_or_zero(by_method, by_sgd), jnp.nan)

    return Damping(*map(damped, parts))


_shares = compiled_for_loss(_shares_by_label, "ratio")
_damping = compiled_for_loss(_damping_of, "method")
