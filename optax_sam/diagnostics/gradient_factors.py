"""The two factors of a gradient along a perturbation, and the two norms that J-SAM makes smaller."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_sam import _norms, _tree
from optax_sam._checks import check_leaves, check_like
from optax_sam.diagnostics._compiled import compiled_for_loss
from optax_sam.evaluations import (
    jacobian_only,
    logit_only,
    perturb_then_evaluate,
    value_and_gradients,
)
from optax_sam.objectives import Objective, require_objective
from optax_sam.penalties import check_last_layer


class FactorChanges(NamedTuple):
    """The result of :func:`factor_changes`, scalars relative to ‖g‖; 0 where g is 0.

    Attributes:
      full: ‖g' − g‖/‖g‖, with both factors at w + ε: SAM.
      jacobian: the same with the Jacobian alone at w + ε: J-SAM.
      logit_term: the same with the logit term alone at w + ε: L-SAM.
    """

    full: jax.Array
    jacobian: jax.Array
    logit_term: jax.Array


class LastLayerNorms(NamedTuple):
    """The result of :func:`last_layer_norms`.

    Attributes:
      activations: scalar, the mean over the examples of ‖z‖.
      kernel: scalar, ‖v‖.
    """

    activations: jax.Array
    kernel: jax.Array


def factor_changes(
    objective: Objective, params: chex.ArrayTree, perturbation: chex.ArrayTree
) -> FactorChanges:
    r"""How much the gradient changes along ε because of its Jacobian, and because of its logit term.

    The gradient of an example is :math:`J(w, x_i)^\top \partial_z \ell(f(w, x_i), y_i)`. Which factor a
    perturbation changes decides, in the J-SAM paper, whether it helps against wrong labels. Costs four
    gradients and two forward passes.

    Args:
      objective: the loss of the batch; its penalty is left out.
      params: the parameters w.
      perturbation: ε, a pytree like ``params``, for example of :func:`optax_sam.normalized`.

    Returns:
      :class:`FactorChanges`.

    Raises:
      TypeError: if ``objective`` is not an ``Objective``.
      ValueError: if ε is not like ``params``.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> from optax_sam.diagnostics import factor_changes
      >>> objective = optax_sam.Objective(lambda w, x: x @ w, jnp.eye(2), jnp.array([0, 1]))
      >>> changes = factor_changes(objective, jnp.zeros((2, 2)), -jnp.eye(2))
      >>> float(changes.jacobian), bool(changes.full == changes.logit_term)
      (0.0, True)

    References:
      Baek, Kolter, Raghunathan, Why is SAM Robust to Label Noise?, ICLR 2024, arXiv 2405.03676,
      section 4.
    """
    require_objective(objective, "factor_changes")
    check_leaves(params)
    check_like(
        "perturbation", perturbation, params, of="params", remedy="It is the ε of the batch."
    )
    result: FactorChanges = _changes(objective, params, perturbation)
    return result


def last_layer_norms(activations: jax.Array, kernel: jax.Array) -> LastLayerNorms:
    """The norms of the last hidden activations and of the last layer's weights.

    SAM and J-SAM keep both small under label noise; :func:`optax_sam.last_layer_penalty` does so by a
    penalty. :func:`optax_sam.linen.capture_layer_input` and :func:`optax_sam.nnx.capture_layer_input`
    get the activations out of a Flax model.

    Args:
      activations: z, the input of the last layer, shape ``(B, ...)``.
      kernel: v, the last layer's weights, any shape.

    Returns:
      :class:`LastLayerNorms`, in at least float32.

    Raises:
      TypeError: if one of them is no array of numbers.
      ValueError: if the activations have no example.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam.diagnostics import last_layer_norms
      >>> norms = last_layer_norms(jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.ones((2, 2)))
      >>> float(norms.activations), float(norms.kernel)
      (3.0, 2.0)

    References:
      Baek, Kolter, Raghunathan, ICLR 2024, arXiv 2405.03676, section 4.3.
    """
    check_last_layer(activations, kernel)
    dtype = _tree.accumulation_dtype(activations)
    rows = activations.astype(dtype).reshape(activations.shape[0], -1)
    lengths = jnp.linalg.norm(rows, axis=1)
    return LastLayerNorms(
        jnp.mean(lengths), _norms.norm(kernel.astype(_tree.accumulation_dtype(kernel)))
    )


def _factor_changes(
    objective: Objective, params: chex.ArrayTree, perturbation: chex.ArrayTree
) -> FactorChanges:
    objective = objective.replace(penalty=None)
    _, clean = value_and_gradients(objective, params)
    length = _norms.norm(clean)

    def change(gradient: chex.ArrayTree) -> jax.Array:
        difference = _tree.map_floating(jnp.subtract, gradient, clean)
        return _tree.divide_or_zero(_norms.norm(difference), length)

    return FactorChanges(
        full=change(perturb_then_evaluate(objective, params, perturbation)[1]),
        jacobian=change(jacobian_only(objective, params, perturbation)[1]),
        logit_term=change(logit_only(objective, params, perturbation)[1]),
    )


_changes = compiled_for_loss(_factor_changes)
