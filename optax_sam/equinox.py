"""The few lines that Equinox needs."""

from collections.abc import Callable
from typing import Any

import chex
import equinox as eqx
import jax
import optax

from optax_sam._checks import call as checked_call
from optax_sam._checks import check_callable
from optax_sam.objectives import Objective


def loss_function(
    model: Any, loss_fn: Callable[..., Any], *args: Any, wrt: Any = eqx.is_inexact_array
) -> Callable[[Any], Any]:
    """The loss as a function of the parameters, as the extra argument ``loss_fn`` needs it.

    Args:
      model: an ``eqx.Module``, or any pytree with leaves that are no parameters.
      loss_fn: ``loss_fn(model, *args) -> loss`` or ``(loss, aux)``, the function that the training step
        gives to ``eqx.filter_value_and_grad``, without that decorator.
      *args: what else it takes: the batch, a random key, an ``eqx.nn.State``. Both passes get the same.
      wrt: which leaves are parameters; the same filter as in ``eqx.filter(model, ...)``.

    Returns:
      ``loss_fn(params)``, where ``params`` is like ``eqx.filter(model, wrt)``.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp, optax, optax_sam
      >>> from optax_sam.equinox import loss_function
      >>> model = eqx.nn.MLP(2, 3, 8, 1, key=jax.random.key(0))
      >>> optimizer = optax.chain(optax_sam.saner(rho=0.05), optax.sgd(0.1))
      >>> opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
      >>> def loss_of(model, x, y):
      ...     logits = jax.vmap(model)(x)
      ...     return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
      >>> @eqx.filter_jit
      ... def train_step(model, opt_state, x, y):
      ...     loss, grads = eqx.filter_value_and_grad(loss_of)(model, x, y)
      ...     updates, opt_state = optimizer.update(
      ...         grads, opt_state, eqx.filter(model, eqx.is_inexact_array),
      ...         loss_fn=loss_function(model, loss_of, x, y))
      ...     return eqx.apply_updates(model, updates), opt_state, loss
      >>> model, opt_state, loss = train_step(
      ...     model, opt_state, jnp.ones((4, 2)), jnp.array([0, 1, 2, 0]))
    """
    check_callable("loss_fn", loss_fn, "Pass the function (model, *args) -> loss itself.")
    _, static = eqx.partition(model, wrt)

    def of_parameters(params: Any) -> Any:
        # A copy of the arguments: an eqx.nn.State may be used once only.
        return checked_call(
            "loss_fn",
            loss_fn,
            _combined(params, static),
            *jax.tree.map(lambda leaf: leaf, args),
            takes=f"(model, *args) with {len(args)} args",
            remedy="Pass what it needs beside the model: loss_function(model, loss_fn, x, y).",
        )

    return of_parameters


def objective(
    model: Any,
    inputs: chex.ArrayTree,
    labels: chex.ArrayTree,
    loss: Callable[..., jax.Array] = optax.softmax_cross_entropy_with_integer_labels,
    *,
    call: Callable[..., Any] | None = None,
    wrt: Any = eqx.is_inexact_array,
    **options: Any,
) -> Objective:
    """The model's mean loss as an :class:`optax_sam.Objective` of its parameters.

    For the methods that look inside the loss (J-SAM, Functional-SAM, L-SAM, NCSAM, groups).

    Args:
      model: an ``eqx.Module``, or any pytree with leaves that are no parameters.
      inputs: see :class:`optax_sam.Objective`. A random key per example belongs here, so that a part
        of the batch keeps its keys: ``(x, jax.random.split(key, len(x)))``.
      labels: see :class:`optax_sam.Objective`.
      loss: see :class:`optax_sam.Objective`.
      call: ``call(model, inputs) -> logits`` of the batch; ``jax.vmap(model)(inputs)`` by default.
      wrt: which leaves are parameters; the same filter as in ``eqx.filter(model, ...)``.
      **options: further keywords of :class:`optax_sam.Objective`.

    Returns:
      An ``Objective`` whose parameters are like ``eqx.filter(model, wrt)``.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp, optax_sam, optax_sam.equinox
      >>> model = eqx.nn.MLP(2, 3, 8, 1, key=jax.random.key(0))
      >>> params = eqx.filter(model, eqx.is_inexact_array)
      >>> method = optax_sam.jsam(rho=0.05)
      >>> objective = optax_sam.equinox.objective(
      ...     model, jnp.ones((4, 2)), jnp.array([0, 1, 2, 0]))
      >>> grads, state = method.update(
      ...     jax.grad(objective)(params), method.init(params), params, loss_fn=objective)
    """
    if call is not None:
        check_callable("call", call, "Pass a function (model, inputs) -> logits.")
    _, static = eqx.partition(model, wrt)

    def apply_fn(params: Any, inputs: Any) -> Any:
        combined = _combined(params, static)
        return jax.vmap(combined)(inputs) if call is None else call(combined, inputs)

    return Objective(apply_fn, inputs, labels, loss, **options)


def _combined(params: Any, static: Any) -> Any:
    """The model of its parameters and of what is none."""
    try:
        return eqx.combine(params, static)
    except ValueError as error:
        raise ValueError(
            "params must be those of the model, eqx.filter(model, wrt), got a "
            f"{type(params).__name__} of {jax.tree.structure(params)}: {error}"
        ) from error
