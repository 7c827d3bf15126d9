r"""Stage 2: which gradient is taken at the perturbed point?

An evaluation is a function ``(loss_fn, params, perturbation, *, logits) -> (loss, gradients)``. For a
supervised loss the gradient of example :math:`i` is

.. math:: \nabla \ell_i(w) = J(w, x_i)^\top \, \partial_z \ell(f(w, x_i), y_i),

the network's Jacobian times the logit term. The full gradient perturbs both factors, the other two
evaluations only one of them (Baek, Kolter, Raghunathan, ICLR 2024, arXiv 2405.03676, section 4): they
are full gradients too, of the objective whose logit term is taken at the other point.
"""

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp

from optax_sam import _jaxprs, _tree
from optax_sam._checks import check_callable, check_leaves, check_like, kinds
from optax_sam._loss_checks import call_loss, split_loss_and_aux
from optax_sam.objectives import Objective, is_pytree, require_objective


class Evaluation(Protocol):
    """What the engine asks of stage 2: the loss at w + ε and the gradients to descend along."""

    def __call__(
        self,
        loss_fn: Callable[..., Any],
        params: chex.ArrayTree,
        perturbation: chex.ArrayTree,
        *,
        logits: chex.ArrayTree | None = None,
    ) -> tuple[jax.Array, chex.ArrayTree]:
        """Evaluates.

        Args:
          loss_fn: ``params -> loss`` or ``(loss, aux)``, or an :class:`optax_sam.Objective`.
          params: the parameters w.
          perturbation: the perturbation ε, a pytree like ``params``.
          logits: the logits at w, if the training step has them.

        Returns:
          The loss at ``params + perturbation``, a scalar, and the gradients, a pytree like ``params``.
        """


def perturb_then_evaluate(
    loss_fn: Callable[..., Any],
    params: chex.ArrayTree,
    perturbation: chex.ArrayTree,
) -> tuple[Any, chex.ArrayTree]:
    r"""Loss and gradients at the perturbed point: :math:`L(w + \epsilon), \nabla L(w + \epsilon)`.

    The primitive under every method, and of use on its own (sharpness measures, new methods). The
    parameters are never written: the perturbed copy exists inside the evaluation only.

    Called eagerly with a ``loss_fn`` that is a pytree (:class:`optax_sam.Objective`,
    ``jax.tree_util.Partial``) it is compiled, with the batch as an argument. Any other callable may
    close over a batch that changes from call to call, so eagerly it runs as ``jax.grad`` would.
    Inside ``jax.jit`` it simply becomes part of the caller's computation.

    Args:
      loss_fn: ``params -> loss`` or ``params -> (loss, aux)``.
      params: pytree of parameters w. Integer leaves are passed on unperturbed.
      perturbation: pytree like ``params``: the perturbation ε.

    Returns:
      ``(loss, gradients)``, or ``((loss, aux), gradients)`` if there is auxiliary output, as
      ``jax.value_and_grad`` does. The gradients have the structure and dtypes of ``params``
      (zeros for integer leaves).

    Raises:
      TypeError: if ``loss_fn`` does not return a scalar, for example because
        ``jax.value_and_grad(loss)`` was passed in place of the loss.
      ValueError: if ``perturbation`` is not like ``params``.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> loss, grads = optax_sam.perturb_then_evaluate(
      ...     lambda w: jnp.sum(w**2), jnp.ones(2), jnp.full(2, 0.5))
      >>> float(loss), grads.tolist()
      (4.5, [3.0, 3.0])

    References:
      Foret et al., Sharpness-Aware Minimization, ICLR 2021, arXiv 2010.01412, equation (3).
    """
    check_callable("loss_fn", loss_fn, "Pass the loss as a function of the parameters.")
    _check_perturbation(params, perturbation)
    # Of a plain function a compiled program would keep what it closes over, such as a batch. Inside a
    # caller's jit a second boundary buys nothing, and its cache would keep the caller's tracers alive.
    is_compiled = is_pytree(loss_fn) and not is_traced((params, perturbation, loss_fn))
    return (_evaluate_compiled if is_compiled else _evaluate)(loss_fn, params, perturbation)


def full_gradient(
    loss_fn: Callable[..., Any],
    params: chex.ArrayTree,
    perturbation: chex.ArrayTree,
    *,
    logits: chex.ArrayTree | None = None,
) -> tuple[jax.Array, chex.ArrayTree]:
    r"""The gradient of the loss at the perturbed point, :math:`\nabla L(w + \epsilon)`: SAM's choice.

    Args:
      loss_fn: the loss, a plain callable or an :class:`optax_sam.Objective`. Auxiliary output is
        discarded.
      params: the parameters w.
      perturbation: the perturbation ε.
      logits: not used.

    Returns:
      The loss at w + ε and the gradients.

    Raises:
      TypeError: if ``loss_fn`` does not return a scalar.
      ValueError: if ``perturbation`` is not like ``params``.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> loss, grads = optax_sam.full_gradient(lambda w: jnp.sum(w**2), jnp.ones(1), jnp.ones(1))
      >>> float(loss), grads.tolist()
      (4.0, [4.0])
    """
    del logits
    value, gradients = perturb_then_evaluate(loss_fn, params, perturbation)
    return (value[0] if isinstance(value, tuple) else value), gradients


def jacobian_only(
    loss_fn: Callable[..., Any],
    params: chex.ArrayTree,
    perturbation: chex.ArrayTree,
    *,
    logits: chex.ArrayTree | None = None,
) -> tuple[jax.Array, chex.ArrayTree]:
    r"""Perturbs the network's Jacobian and keeps the logit term at w: J-SAM and Functional-SAM.

    .. math:: \frac{1}{B} \sum_i J(w + \epsilon, x_i)^\top \, \partial_z \ell(f(w, x_i), y_i)

    It is one vector-Jacobian product of the logits function; no Jacobian is ever formed. A penalty
    of the objective is taken at w + ε.

    Args:
      loss_fn: an :class:`optax_sam.Objective`.
      params: the parameters w.
      perturbation: the perturbation ε.
      logits: the logits at w, if the training step has them already. Without them they are computed
        here: one more forward pass, which XLA merges with the training step's own in plain networks
        but not in networks with normalization layers.

    Returns:
      The loss at w + ε and the gradients.

    Raises:
      TypeError: if ``loss_fn`` is not an ``Objective``.
      ValueError: if ``logits`` are not of the shape and dtype that the network gives, or
        ``perturbation`` is not like ``params``.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> objective = optax_sam.Objective(lambda w, x: x @ w, jnp.eye(2), jnp.array([0, 1]))
      >>> loss, grads = optax_sam.jacobian_only(objective, jnp.zeros((2, 2)), jnp.ones((2, 2)))
      >>> grads.tolist()
      [[-0.25, 0.25], [0.25, -0.25]]

    References:
      Baek, Kolter, Raghunathan, Why is SAM Robust to Label Noise?, ICLR 2024, arXiv 2405.03676,
      equation (4.2). The authors published no code.
    """
    objective = require_objective(loss_fn, "the Jacobian-only gradient (J-SAM)")
    _check_perturbation(params, perturbation)
    if logits is None:
        logits = objective.logits(params)
    else:
        check_logits(objective, params, logits)
    _warn_of_constant_logit_term(objective, logits, "J-SAM is then plain SAM")
    return full_gradient(objective.with_logit_term_at(logits), params, perturbation)


def logit_only(
    loss_fn: Callable[..., Any],
    params: chex.ArrayTree,
    perturbation: chex.ArrayTree,
    *,
    logits: chex.ArrayTree | None = None,
) -> tuple[jax.Array, chex.ArrayTree]:
    r"""Perturbs the logit term and keeps the network's Jacobian at w: L-SAM's choice.

    .. math:: \frac{1}{B} \sum_i J(w, x_i)^\top \, \partial_z \ell(f(w + \epsilon, x_i), y_i)

    A penalty of the objective is taken at w + ε.

    Args:
      loss_fn: an :class:`optax_sam.Objective`.
      params: the parameters w.
      perturbation: the perturbation ε.
      logits: not used.

    Returns:
      The loss at w + ε and the gradients.

    Raises:
      TypeError: if ``loss_fn`` is not an ``Objective``.
      ValueError: if ``perturbation`` is not like ``params``.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> objective = optax_sam.Objective(lambda w, x: x @ w, jnp.eye(2), jnp.array([0, 1]))
      >>> loss, grads = optax_sam.logit_only(objective, jnp.zeros((2, 2)), jnp.ones((2, 2)))
      >>> grads.tolist()
      [[-0.25, 0.25], [0.25, -0.25]]

    References:
      Baek, Kolter, Raghunathan, Why is SAM Robust to Label Noise?, ICLR 2024, arXiv 2405.03676,
      equation (4.1). The authors published no code.
    """
    del logits
    objective = require_objective(loss_fn, "the logit-only gradient (L-SAM)")
    _check_perturbation(params, perturbation)
    perturbed = _tree.add(params, perturbation)
    perturbed_logits = objective.logits(perturbed)
    _warn_of_constant_logit_term(objective, perturbed_logits, "L-SAM is then the base optimizer")
    data_only = objective.replace(penalty=None)
    _, gradients = value_and_gradients(data_only.with_logit_term_at(perturbed_logits), params)
    loss = objective.loss_from_logits(perturbed_logits)
    if objective.penalty is not None:
        value, pull = value_and_gradients(objective.penalty_of, perturbed)
        loss, gradients = loss + value, _tree.map_floating(jnp.add, gradients, pull)
    return loss, gradients


def value_and_gradients(
    loss_fn: Callable[..., Any], params: chex.ArrayTree
) -> tuple[Any, chex.ArrayTree]:
    """``jax.value_and_grad`` with the checks of a loss function and gradients an optimizer can take.

    The value is ``(loss, aux)`` if the loss function returns auxiliary output.
    """
    found = []

    def with_aux(params: chex.ArrayTree) -> tuple[jax.Array, Any]:
        loss, aux, has_aux = split_loss_and_aux(call_loss(loss_fn, params), params)
        found.append(has_aux)
        return loss, aux

    differentiate = jax.value_and_grad(with_aux, has_aux=True, allow_int=True)
    (loss, aux), gradients = differentiate(params)
    return ((loss, aux) if found[-1] else loss), _tree.as_gradients(gradients, params)


def check_logits(objective: Objective, params: chex.ArrayTree, logits: chex.ArrayTree) -> None:
    """Refuses logits that cannot be those of the objective at the parameters."""
    expected = jax.eval_shape(lambda: objective.logits_and_aux(params)[0])
    if kinds(logits) != kinds(expected):
        raise ValueError(
            f"logits must be those of the objective's {objective.batch_size} examples, "
            f"{kinds(expected)}, got {kinds(logits)}. Pass the logits of the training step's own "
            "forward pass as the network returns them, or none."
        )


def _warn_of_constant_logit_term(
    objective: Objective, logits: chex.ArrayTree, consequence: str
) -> None:
    """Warns where the derivative in the logits does not depend on them, so that no point matters."""
    jaxpr = jax.make_jaxpr(objective.logit_gradient)(logits)
    if not _jaxprs.depends_on_inputs(jaxpr, len(jax.tree.leaves(logits))):
        warnings.warn(
            "the derivative of the loss in the network's output does not depend on that output, "
            f"as with a network that ends in log_softmax. {consequence}. Let the network return "
            "logits, and put the log_softmax into the loss.",
            stacklevel=2,
        )


def _check_perturbation(params: chex.ArrayTree, perturbation: chex.ArrayTree) -> None:
    """Refuses parameters that are none, and a perturbation that is not like them."""
    check_leaves(params)
    remedy = "Where nothing is to be perturbed it has zeros."
    check_like("perturbation", perturbation, params, of="params", remedy=remedy)


def _evaluate(
    loss_fn: Callable[..., Any], params: chex.ArrayTree, perturbation: chex.ArrayTree
) -> tuple[Any, chex.ArrayTree]:
    return value_and_gradients(loss_fn, _tree.add(params, perturbation))


_Evaluate = Callable[[Callable[..., Any], Any, Any], tuple[Any, Any]]
_evaluate_compiled: _Evaluate = jax.jit(_evaluate)


def is_traced(tree: Any) -> bool:
    """Whether this runs inside of a transformation that traces, such as ``jax.jit``."""
    # The new array is a tracer inside jit, where a loss may close over tracers unseen.
    leaves = [*jax.tree.leaves(tree), jnp.zeros([])]
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


__all__ = [
    "Evaluation",
    "full_gradient",
    "jacobian_only",
    "logit_only",
    "perturb_then_evaluate",
]
