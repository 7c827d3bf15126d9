"""The preconditioner of Functional-SAM, read from the optimizer behind the method."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam import _tree
from optax_sam._checks import check_like
from optax_sam._hyperparameters import check_number


def scale_by_second_moment(epsilon: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    r"""Divides the gradient by the root of Adam's second moment v: :math:`D^{-1} g`.

    .. math:: D = \sqrt{v} + \varepsilon

    v is that of the optimizer behind the method, handed to ``update`` as ``second_moment``, so that no
    second copy is kept; ``optax.scale_by_rms(0.999, eps_in_sqrt=False, bias_correction=True)`` keeps
    one. Before the first step v is zero, and the direction is that of the gradient. Chain
    :func:`optax_sam.normalized` behind.

    Where v is zero later, the coordinate counts as g/ε and takes nearly all of ρ: with an untied
    embedding that happens when a token appears for the first time. The transformation of Optax above
    suits such parameters: its moment includes the current g, so that no coordinate exceeds √1000.

    Args:
      epsilon: ε > 0 of Adam, added to the root.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` from gradients to preconditioned gradients, in at
      least float32. Its ``update`` needs the extra argument ``second_moment``, a pytree like the
      gradients, which a method passes on; others are accepted and ignored.

    Raises:
      ValueError: if ``epsilon`` is not positive; from ``update``, if ``second_moment`` is missing or
        not like the gradients.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> method = optax_sam.functional_sam(0.05, preconditioner=optax_sam.scale_by_second_moment())
      >>> tx = optax.chain(method, optax.adam(1e-3))
      >>> objective = optax_sam.Objective(lambda w, x: x @ w, jnp.eye(2), jnp.array([0, 1]))
      >>> w = jnp.zeros((2, 2))
      >>> state = tx.init(w)
      >>> updates, state = tx.update(
      ...     jax.grad(objective)(w), state, w, loss_fn=objective,
      ...     second_moment=optax.tree.get(state, "nu"))

    References:
      Singh, Mobahi, Agarwala, Dauphin, Avoiding Spurious Sharpness Minimization Broadens Applicability
      of SAM, ICML 2025, arXiv 2502.02407.
    """
    check_number("epsilon", epsilon, minimum=0, exclusive_minimum=True)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        second_moment: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        remedy = (
            "Pass second_moment=optax.tree.get(opt_state, 'nu') to update, where an Adam stands behind "
            "the method."
        )
        if second_moment is None:
            raise ValueError(f"scale_by_second_moment needs second_moment, got None. {remedy}")
        check_like("second_moment", second_moment, updates, of="updates", remedy=remedy)
        dtype = _tree.accumulation_dtype(updates)

        def precondition(gradient: Any, moment: Any) -> Any:
            if not _tree.is_floating(gradient):
                return gradient
            # Not in half precision, in which g / ε overflows where v is zero.
            return gradient.astype(dtype) / (jnp.sqrt(moment.astype(dtype)) + epsilon)

        return jax.tree.map(precondition, updates, second_moment), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
