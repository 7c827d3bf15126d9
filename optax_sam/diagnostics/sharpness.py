"""How much the loss rises where a method perturbs the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import optax

from optax_sam import _tree
from optax_sam._checks import check_leaves
from optax_sam._hyperparameters import check_integer
from optax_sam._stages import SometimesState, contains_method
from optax_sam.convolutions import inside_control_flow
from optax_sam.diagnostics._compiled import compiled_for_loss
from optax_sam.evaluations import value_and_gradients
from optax_sam.objectives import gathered, require_objective
from optax_sam.sharpness_aware import get_metrics


class Sharpness(NamedTuple):
    """The result of :func:`sharpness`: four scalars, or with ``group_size`` four arrays ``(groups,)``.

    Attributes:
      loss: L(w).
      perturbed_loss: L(w + ε); of a method with groups, the mean over the groups of their own losses at
        their own perturbed points.
      rise: the difference.
      perturbation_norm: ‖ε‖; of a method with groups, the mean of the norms.
    """

    loss: jax.Array
    perturbed_loss: jax.Array
    rise: jax.Array
    perturbation_norm: jax.Array


def sharpness(
    tx: optax.GradientTransformation,
    loss_fn: Callable[..., Any],
    params: chex.ArrayTree,
    opt_state: optax.OptState | None = None,
    *,
    group_size: int | None = None,
    **extra_args: Any,
) -> Sharpness:
    r"""The rise of the loss in the ρ-ball, by any method's own perturbation.

    .. math:: S(w) = L(w + \epsilon) - L(w)

    The method says what is measured: ``sam(rho)`` gives sharpness as SAM sees it;
    ``asam(rho, eta=0.0)`` adaptive sharpness, which re-scaling of the network does not change; and
    ``sam(rho, group_size=m)`` m-sharpness, the mean over the groups of
    :math:`L_k(w + \epsilon_k) - L_k(w)`. One gradient step gives a lower bound of the largest rise in
    the ball; ``sam(rho, ascent_steps=n)`` comes closer.

    ``group_size=m`` of this function gives the groups one by one: ``.rise.max()`` is that of the worst
    group, ``.rise.argmax()`` says which, and ``.rise.mean()`` is m-sharpness if the examples have no
    weights.

    It costs a gradient and a forward pass, also over all groups together; where the method has groups,
    up to two gradients. Compare networks at the same ρ, on the same examples and in the same mode of
    batch statistics.

    Args:
      tx: the optimizer: a method, or anything with one method inside. Keep it: another one, even if it
        is equal, is compiled anew.
      loss_fn: ``params -> loss`` or ``(loss, aux)``, or an :class:`optax_sam.Objective`, of which
        ``microbatch_size`` bounds the memory over a whole data set. A plain function is compiled anew
        in each call, an ``Objective`` or a ``jax.tree_util.Partial`` once.
      params: the parameters w.
      opt_state: of ``tx``, for methods that remember (Momentum-SAM, VaSSO); None: the initial one.
      group_size: None measures all examples at once. An integer measures consecutive groups of so many
        examples one after the other, each with its own loss and perturbation; it must divide their
        number, and ``loss_fn`` must be an :class:`optax_sam.Objective`.
      **extra_args: arrays that the optimizer needs in ``update`` besides, such as ``second_moment``;
        with ``group_size`` they are the same for all groups.

    Returns:
      :class:`Sharpness`.

    Raises:
      ValueError: if ``tx`` has no method in it, several, or one that perturbs in some steps only; or if
        ``group_size`` does not divide the number of examples.
      TypeError: if ``tx`` is no optimizer, ``loss_fn`` does not return a scalar loss, or it is no
        objective where ``group_size`` is given.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> from optax_sam.diagnostics import sharpness
      >>> result = sharpness(optax_sam.sam(rho=0.5), lambda w: jnp.sum(w**2), jnp.ones(1))
      >>> float(result.rise)
      1.25

    References:
      Foret et al., ICLR 2021, arXiv 2010.01412, sections 2 and 4.3 (m-sharpness). Kwon et al., ICML
      2021, arXiv 2102.11600, equation (4) (adaptive sharpness).
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"tx must be an optimizer with a method in it, such as optax_sam.sam(0.05), got {tx!r}."
        )
    check_leaves(params)
    state = tx.init(params) if opt_state is None else opt_state
    if not contains_method(state):
        raise ValueError(
            "tx has no sharpness-aware method in it, so nothing is perturbed: its state is "
            f"{type(state).__name__}. Pass e.g. optax_sam.sam(0.05)."
        )
    kinds = [type(leaf) for leaf in jax.tree.leaves(state, is_leaf=_is_sometimes)]
    if SometimesState in kinds:
        raise ValueError(
            "tx perturbs in some steps only (SometimesState). Leave out every_k, start_step, stop_step "
            "and when: what a step without a perturbation would tell is nothing."
        )
    if group_size is not None:
        check_integer("group_size", group_size, minimum=1)
        require_objective(loss_fn, "group_size")
    result: Sharpness = _measure(loss_fn, params, state, extra_args, tx=tx, group_size=group_size)
    return result


def _is_sometimes(leaf: Any) -> bool:
    return isinstance(leaf, SometimesState)


def _of_groups(
    loss_fn: Callable[..., Any],
    params: chex.ArrayTree,
    state: optax.OptState,
    extra_args: dict[str, Any],
    *,
    tx: optax.GradientTransformation,
    group_size: int | None,
) -> Sharpness:
    """Of all examples, or of one group after the other."""
    if group_size is None:
        return _of_method(loss_fn, params, state, extra_args, tx=tx)
    objective = gathered(require_objective(loss_fn, "group_size"))

    def one(examples: Any) -> Sharpness:
        return _of_method(objective.with_examples(examples), params, state, extra_args, tx=tx)

    examples = objective.groups(group_size).examples
    result: Sharpness = jax.lax.map(inside_control_flow(one), examples)
    return result


def _of_method(
    loss_fn: Callable[..., Any],
    params: chex.ArrayTree,
    state: optax.OptState,
    extra_args: dict[str, Any],
    *,
    tx: optax.GradientTransformation,
) -> Sharpness:
    """The whole step is traced, and ``jit`` removes what the loss at w + ε does not need."""
    value, gradients = value_and_gradients(loss_fn, params)
    loss = value[0] if isinstance(value, tuple) else value
    update = optax.with_extra_args_support(tx).update
    _, state = update(gradients, state, params, **({"loss_fn": loss_fn} | extra_args))
    metrics = get_metrics(state)
    perturbed = metrics["perturbed_loss"]
    loss = loss.astype(_tree.accumulation_dtype([perturbed, params]))
    return Sharpness(loss, perturbed, perturbed - loss, metrics["perturbation_norm"])


_measure = compiled_for_loss(_of_groups, "tx", "group_size")
