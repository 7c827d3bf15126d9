"""The few lines that Flax nnx needs."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import optax
from flax import nnx

from optax_sam.objectives import Objective


def loss_function(
    model: nnx.Module, loss_of: Callable[..., jax.Array], *args: Any, wrt: Any = nnx.Param
) -> Callable[[Any], jax.Array]:
    """The loss as a function of the parameters, as the extra argument ``loss_fn`` needs it.

    Call it *before* the training step's own ``nnx.value_and_grad``: it takes a snapshot of the random
    keys and batch statistics, so that both passes see the same dropout mask, and what the perturbed
    pass changes in them is discarded.

    Args:
      model: the live model.
      loss_of: ``loss_of(model, *args) -> loss``, the function that the training step differentiates;
        if it returns ``(loss, aux)``, say ``has_aux`` to the method.
      *args: the batch.
      wrt: which variables are parameters; the same filter as in ``nnx.Optimizer``.

    Returns:
      ``loss_fn(params)``, for ``optimizer.update(model, grads, loss_fn=loss_fn)``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> from flax import nnx
      >>> from optax_sam.nnx import loss_function
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> tx = optax.chain(optax_sam.saner(rho=0.05), optax.sgd(0.1))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> def loss_of(model, x, y):
      ...     return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()
      >>> @nnx.jit
      ... def train_step(model, optimizer, x, y):
      ...     loss_fn = loss_function(model, loss_of, x, y)
      ...     loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
      ...     optimizer.update(model, grads, loss_fn=loss_fn)
      ...     return loss
      >>> loss = train_step(model, optimizer, jnp.ones((4, 2)), jnp.array([0, 1, 2, 0]))
    """
    graphdef, *states = nnx.split(model, wrt, ...)
    rest = nnx.as_pure(
        states[1]
    )  # nnx.split aliases the live variables, which the clean pass changes

    def loss_fn(params):
        return loss_of(nnx.merge(graphdef, params, rest, copy=True), *args)

    return loss_fn


def objective(
    model: nnx.Module,
    inputs: chex.ArrayTree,
    labels: chex.ArrayTree,
    loss: Callable[..., jax.Array] = optax.softmax_cross_entropy_with_integer_labels,
    *,
    wrt: Any = nnx.Param,
) -> Objective:
    """The model's mean loss as an :class:`optax_sam.Objective` of its parameters.

    For the methods that look inside the loss (J-SAM, L-SAM, NCSAM, groups). Like
    :func:`loss_function` it takes a snapshot: call it before the training step's own pass.

    Args:
      model: the live model; ``model(inputs)`` gives the logits.
      inputs: see :class:`optax_sam.Objective`.
      labels: see :class:`optax_sam.Objective`.
      loss: see :class:`optax_sam.Objective`.
      wrt: which variables are parameters; the same filter as in ``nnx.Optimizer``.

    Returns:
      An ``Objective`` whose parameters are ``nnx.state(model, wrt)``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(
      ...     model, optax.chain(optax_sam.jsam(rho=0.05), optax.sgd(0.1)), wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x, y):
      ...     objective = optax_sam.nnx.objective(model, x, y)
      ...     loss, grads = jax.value_and_grad(objective)(nnx.state(model, nnx.Param))
      ...     optimizer.update(model, grads, loss_fn=objective)
      ...     return loss
      >>> import optax_sam.nnx
      >>> loss = train_step(model, optimizer, jnp.ones((4, 2)), jnp.array([0, 1, 2, 0]))
    """
    graphdef, *states = nnx.split(model, wrt, ...)
    rest = nnx.as_pure(states[1])

    def apply_fn(params, inputs):
        return nnx.merge(graphdef, params, rest, copy=True)(inputs)

    return Objective(apply_fn, inputs, labels, loss)


@contextlib.contextmanager
def capture_layer_input(model: nnx.Module, layer: str) -> Iterator[list[jax.Array]]:
    """Records what one of a model's layers is given.

    With the last layer's name these are the last hidden activations, which
    :func:`optax_sam.last_layer_penalty` asks for.

    Args:
      model: any nnx module.
      layer: path of a submodule, ``"head"`` or ``"encoder.out"``.

    Yields:
      A list, to which every call of the layer appends its input.

    Raises:
      ValueError: if the model has no such layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_sam.nnx import capture_layer_input
      >>> class Model(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.hidden, self.head = nnx.Linear(2, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
      ...     def __call__(self, x):
      ...         return self.head(nnx.relu(self.hidden(x)))
      >>> model = Model(nnx.Rngs(0))
      >>> with capture_layer_input(model, "head") as captured:
      ...     logits = model(jnp.ones((4, 2)))
      >>> captured[0].shape
      (4, 8)
    """
    *parents, name = layer.split(".")
    owner: Any = model
    for parent in parents:
        owner = getattr(owner, parent, None)
    original = getattr(owner, name, None)
    if original is None:
        raise ValueError(f"the model has no layer {layer!r}.")
    captured: list[jax.Array] = []

    def recording(inputs, *args, **kwargs):
        captured.append(inputs)
        return original(inputs, *args, **kwargs)

    # Past nnx's bookkeeping of attributes: the layer itself stays what and where it is.
    object.__setattr__(owner, name, recording)
    try:
        yield captured
    finally:
        object.__setattr__(owner, name, original)
