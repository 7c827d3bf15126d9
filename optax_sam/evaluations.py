r"""Stage 2: which gradient is taken at the perturbed point?

An evaluation is a function ``(loss_fn, params, perturbation, *, logits, has_aux) -> (loss,
gradients)``. For a supervised loss the gradient of example :math:`i` is

.. math:: \nabla \ell_i(w) = J(w, x_i)^\top \, \partial_z \ell(f(w, x_i), y_i),

the network's Jacobian times the logit term. The full gradient perturbs both factors, the other two
evaluations only one of them (Baek, Kolter, Raghunathan, ICLR 2024, arXiv 2405.03676, section 4).
"""

from collections.abc import Callable
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_sam import _tree
from optax_sam._hyperparameters import check_callable
from optax_sam.objectives import Objective, is_pytree, require_objective


class Evaluation(Protocol):
    """What the engine asks of stage 2."""

    def __call__(
        self,
        loss_fn: Callable[..., Any],
        params: chex.ArrayTree,
        perturbation: chex.ArrayTree,
        *,
        logits: chex.ArrayTree | None = None,
        has_aux: bool = False,
    ) -> tuple[jax.Array, chex.ArrayTree]:
        """Returns the loss at ``params + perturbation`` and the gradients to descend along."""


def perturb_then_evaluate(
    loss_fn: Callable[..., Any],
    params: chex.ArrayTree,
    perturbation: chex.ArrayTree,
    *,
    has_aux: bool = False,
) -> tuple[Any, chex.ArrayTree]:
    r"""Loss and gradients at the perturbed point: :math:`L(w + \epsilon), \nabla L(w + \epsilon)`.

    The primitive under every method, and of use on its own (sharpness measures, new methods). The
    parameters are never written: the perturbed copy exists inside the evaluation only.

    Called eagerly it is compiled. A ``loss_fn`` that is a pytree (:class:`optax_sam.Objective`,
    ``jax.tree_util.Partial``) is an argument of the compiled function, so new batches trace nothing;
    any other callable is part of the compilation key, so pass the same function, not a new lambda
    per step. Inside ``jax.jit`` it simply becomes part of the caller's computation.

    Args:
      loss_fn: ``params -> loss``, or ``params -> (loss, aux)`` with ``has_aux``. An ``Objective``
        knows by itself whether it has auxiliary output.
      params: pytree of parameters w. Integer leaves are passed on unperturbed.
      perturbation: pytree like ``params``: the perturbation ε.
      has_aux: whether ``loss_fn`` returns auxiliary output.

    Returns:
      ``(loss, gradients)``, or ``((loss, aux), gradients)`` with auxiliary output, as
      ``jax.value_and_grad`` does. The gradients have the structure and dtypes of ``params``
      (zeros for integer leaves).

    Raises:
      TypeError: if ``loss_fn`` does not return a scalar, for example because
        ``jax.value_and_grad(loss)`` was passed in place of the loss.

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
    if _is_traced((params, perturbation, loss_fn)):
        # Inside a caller's jit a second boundary buys nothing, and its cache would keep a closure
        # over the caller's tracers alive.
        return _evaluate(loss_fn, params, perturbation, has_aux)
    if is_pytree(loss_fn):
        return _evaluate_pytree(loss_fn, params, perturbation, has_aux)
    return _evaluate_static(loss_fn, params, perturbation, has_aux)


def full_gradient(
    loss_fn: Callable[..., Any],
    params: chex.ArrayTree,
    perturbation: chex.ArrayTree,
    *,
    logits: chex.ArrayTree | None = None,
    has_aux: bool = False,
) -> tuple[jax.Array, chex.ArrayTree]:
    r"""The gradient of the loss at the perturbed point, :math:`\nabla L(w + \epsilon)`: SAM's choice.

    Args:
      loss_fn: the loss, a plain callable or an :class:`optax_sam.Objective`.
      params: the parameters w.
      perturbation: the perturbation ε.
      logits: not used.
      has_aux: whether ``loss_fn`` returns auxiliary output; it is discarded here.

    Returns:
      The loss at w + ε and the gradients.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> loss, grads = optax_sam.full_gradient(lambda w: jnp.sum(w**2), jnp.ones(1), jnp.ones(1))
      >>> float(loss), grads.tolist()
      (4.0, [4.0])
    """
    del logits
    if isinstance(loss_fn, Objective):
        has_aux = loss_fn.has_aux
    value, gradients = perturb_then_evaluate(loss_fn, params, perturbation, has_aux=has_aux)
    return (value[0] if has_aux else value), gradients


def jacobian_only(
    loss_fn: Callable[..., Any],
    params: chex.ArrayTree,
    perturbation: chex.ArrayTree,
    *,
    logits: chex.ArrayTree | None = None,
    has_aux: bool = False,
) -> tuple[jax.Array, chex.ArrayTree]:
    r"""Perturbs the network's Jacobian and keeps the logit term at w: J-SAM's choice.

    .. math:: \frac{1}{B} \sum_i J(w + \epsilon, x_i)^\top \, \partial_z \ell(f(w, x_i), y_i)

    It is one vector-Jacobian product of the logits function; no Jacobian is ever formed.

    Args:
      loss_fn: an :class:`optax_sam.Objective`.
      params: the parameters w.
      perturbation: the perturbation ε.
      logits: the logits at w, if the training step has them already. Without them they are computed
        here: one more forward pass, which XLA merges with the training step's own in plain networks
        but not in networks with normalization layers.
      has_aux: not used; an ``Objective`` knows.

    Returns:
      The loss at w + ε and the gradients.

    Raises:
      TypeError: if ``loss_fn`` is not an ``Objective``.

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
    del has_aux
    objective = require_objective(loss_fn, "the Jacobian-only gradient (J-SAM)")
    if logits is None:
        logits = objective.logits(params)
    perturbed_logits, pullback = _logits_and_pullback(objective, _tree.add(params, perturbation))
    _check_logits(logits, perturbed_logits, objective.batch_size)
    (gradients,) = pullback(objective.logit_gradient(logits))
    loss = objective.loss_from_logits(perturbed_logits)
    return loss, _tree.as_gradients(gradients, params)


def logit_only(
    loss_fn: Callable[..., Any],
    params: chex.ArrayTree,
    perturbation: chex.ArrayTree,
    *,
    logits: chex.ArrayTree | None = None,
    has_aux: bool = False,
) -> tuple[jax.Array, chex.ArrayTree]:
    r"""Perturbs the logit term and keeps the network's Jacobian at w: L-SAM's choice.

    .. math:: \frac{1}{B} \sum_i J(w, x_i)^\top \, \partial_z \ell(f(w + \epsilon, x_i), y_i)

    Args:
      loss_fn: an :class:`optax_sam.Objective`.
      params: the parameters w.
      perturbation: the perturbation ε.
      logits: not used.
      has_aux: not used; an ``Objective`` knows.

    Returns:
      The loss at w + ε and the gradients.

    Raises:
      TypeError: if ``loss_fn`` is not an ``Objective``.

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
    del logits, has_aux
    objective = require_objective(loss_fn, "the logit-only gradient (L-SAM)")
    perturbed_logits = objective.logits(_tree.add(params, perturbation))
    loss = objective.loss_from_logits(perturbed_logits)
    _, pullback = _logits_and_pullback(objective, params)
    (gradients,) = pullback(objective.logit_gradient(perturbed_logits))
    return loss, _tree.as_gradients(gradients, params)


def value_and_gradients(
    loss_fn: Callable[..., Any], params: chex.ArrayTree, has_aux: bool = False
) -> tuple[Any, chex.ArrayTree]:
    """``jax.value_and_grad`` with the checks of a loss function and gradients an optimizer can take."""
    if isinstance(loss_fn, Objective):
        has_aux = loss_fn.has_aux

    def checked(params):
        return check_loss(loss_fn(params), has_aux)

    value, gradients = jax.value_and_grad(checked, has_aux=has_aux, allow_int=True)(params)
    return value, _tree.as_gradients(gradients, params)


def _evaluate(loss_fn, params, perturbation, has_aux):
    return value_and_gradients(loss_fn, _tree.add(params, perturbation), has_aux)


_evaluate_pytree = jax.jit(_evaluate, static_argnums=3)
_evaluate_static = jax.jit(_evaluate, static_argnums=(0, 3))


def check_loss(output: Any, has_aux: bool) -> Any:
    """Returns what a loss function returned, or says what is wrong with it."""
    loss = output
    if has_aux:
        if not (isinstance(output, tuple) and len(output) == 2):
            raise TypeError(
                f"with has_aux=True loss_fn must return (loss, aux), got {type(output).__name__}."
            )
        loss = output[0]
    if isinstance(loss, tuple):
        raise TypeError(
            f"loss_fn must return a scalar loss, got a tuple of {len(loss)}. Pass the loss itself, not "
            "jax.value_and_grad(loss); if the tuple is (loss, aux), say has_aux=True."
        )
    if not isinstance(loss, jax.Array | np.ndarray | np.generic | float):
        raise TypeError(
            f"loss_fn must return a scalar loss, got {loss!r}. Does it return its value?"
        )
    if jnp.shape(loss) != () or not _tree.is_floating(loss):
        raise TypeError(
            f"loss_fn must return a scalar loss, got shape {jnp.shape(loss)} and dtype "
            f"{jnp.result_type(loss)}. Take the mean over the batch inside loss_fn."
        )
    return output


def _is_traced(tree: Any) -> bool:
    # The new array is a tracer inside jit, where a loss may close over tracers unseen.
    leaves = [*jax.tree.leaves(tree), jnp.zeros([])]
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def _logits_and_pullback(objective: Objective, params: chex.ArrayTree):
    leaves, treedef = jax.tree.flatten(params)
    floating = [_tree.is_floating(leaf) for leaf in leaves]

    def from_floating(chosen):
        chosen = iter(chosen)
        merged = [
            next(chosen) if is_floating else leaf
            for leaf, is_floating in zip(leaves, floating, strict=True)
        ]
        return objective.logits(jax.tree.unflatten(treedef, merged))

    logits, pullback = jax.vjp(
        from_floating, [leaf for leaf, keep in zip(leaves, floating, strict=True) if keep]
    )

    def pull(cotangents):
        gradients = iter(pullback(cotangents)[0])
        merged = [
            next(gradients) if is_floating else leaf
            for leaf, is_floating in zip(leaves, floating, strict=True)
        ]
        return (jax.tree.unflatten(treedef, merged),)

    return logits, pull


def _check_logits(logits: chex.ArrayTree, expected: chex.ArrayTree, batch_size: int) -> None:
    shapes, expected_shapes = jax.tree.map(jnp.shape, (logits, expected))
    if shapes != expected_shapes:
        raise ValueError(
            f"logits must be those of the objective's {batch_size} examples, shape {expected_shapes}, "
            f"got {shapes}. Pass the logits of the training step's own forward pass, or none."
        )


__all__ = [
    "Evaluation",
    "full_gradient",
    "jacobian_only",
    "logit_only",
    "perturb_then_evaluate",
]
