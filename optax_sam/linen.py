"""The few lines that Flax Linen needs."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import chex
import flax.linen as nn
import jax
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from optax_sam.objectives import with_parameters
from optax_sam.penalties import layer_input


class TrainState(train_state.TrainState):  # type: ignore[no-untyped-call, unused-ignore]
    """Flax's ``TrainState`` whose ``apply_gradients`` hands the loss to the optimizer.

    Flax's own does not forward extra arguments to ``tx.update``. Make one with
    ``TrainState.create(apply_fn=..., params=..., tx=...)``.

    Args:
      step: int scalar, the number of updates so far; ``create`` begins at 0.
      apply_fn: ``model.apply``, kept at hand for the training step.
      params: pytree of parameters.
      tx: the optimizer, such as ``optax.chain(optax_sam.sam(0.05), optax.sgd(0.1))``.
      opt_state: its state, which ``create`` makes.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, optax_sam
      >>> from optax_sam.linen import TrainState
      >>> model, x, y = nn.Dense(3), jnp.ones((4, 2)), jnp.array([0, 1, 2, 0])
      >>> state = TrainState.create(
      ...     apply_fn=model.apply, params=model.init(jax.random.key(0), x),
      ...     tx=optax.chain(optax_sam.saner(rho=0.05), optax.sgd(0.1)))
      >>> @jax.jit
      ... def train_step(state, inputs, labels):
      ...     objective = optax_sam.Objective(state.apply_fn, inputs, labels)
      ...     loss, grads = jax.value_and_grad(objective)(state.params)
      ...     return state.apply_gradients(grads=grads, loss_fn=objective), loss
      >>> state, loss = train_step(state, x, y)
      >>> int(state.step)
      1
    """

    def apply_gradients(
        self,
        *,
        grads: chex.ArrayTree,
        loss_fn: Callable[..., Any] | None = None,
        logits: chex.ArrayTree | None = None,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Updates ``step``, ``params`` and ``opt_state``.

        Args:
          grads: gradients like ``params``.
          loss_fn: the loss as a function of ``params``, or an :class:`optax_sam.Objective`; needed if
            ``tx`` has a sharpness-aware method in it.
          logits: the logits at ``params``, for methods that can use them.
          extra_args: further keywords for ``tx.update``, such as the ``value`` that
            ``optax.contrib.reduce_on_plateau`` asks for.
          **kwargs: other fields to ``replace``, such as batch statistics.

        Returns:
          The new state. Parameters of fp8 layers (``overwrite_with_gradient``) are overwritten as Flax
          does it, and are not perturbed.

        Raises:
          TypeError: if a keyword is no field, ``extra_args`` is no dictionary, or a method in ``tx``
            misses ``loss_fn``.
        """
        if extra_args is not None and not isinstance(extra_args, Mapping):
            raise TypeError(
                f"extra_args must be a dictionary of keywords for tx.update, got {extra_args!r}. "
                "Write extra_args={'value': loss}."
            )
        fields = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(kwargs) - set(fields))
        if unknown:
            raise TypeError(
                f"apply_gradients got {unknown[0]}=, which is neither an argument nor one of the "
                f"fields {', '.join(fields)}. Pass arguments of tx.update in extra_args=."
            )
        params, overwritten = _split(self.params)
        gradients, _ = _split(grads)
        if overwritten and loss_fn is not None:
            loss_fn = with_parameters(loss_fn, lambda params: {"params": params} | overwritten)
        # Only what was given: line searches refuse what they do not know.
        candidates = {"loss_fn": loss_fn, "logits": logits}
        given = {name: value for name, value in candidates.items() if value is not None}
        # optax.MultiSteps is no GradientTransformation, and takes extra arguments by itself.
        is_link = isinstance(self.tx, optax.GradientTransformation)
        tx = optax.with_extra_args_support(self.tx) if is_link else self.tx
        updates, opt_state = tx.update(
            gradients,
            self.opt_state,
            params,
            **given,
            **({} if extra_args is None else extra_args),
        )
        params = optax.apply_updates(params, updates)
        if overwritten:
            params = {"params": params, OVERWRITE_WITH_GRADIENT: grads[OVERWRITE_WITH_GRADIENT]}
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)


def capture_layer_input(module: nn.Module, layer: str) -> Callable[..., tuple[Any, jax.Array]]:
    """Applies a module and also returns what one of its layers was given.

    With the last layer's name these are the last hidden activations, which
    :func:`optax_sam.last_layer_penalty` asks for.

    Args:
      module: any Linen module.
      layer: path of a submodule, as in the parameters: ``"Dense_2"``, ``"head"``, ``"encoder/out"``.

    Returns:
      ``apply(variables, *args, **kwargs) -> (module.apply(...), input of the layer)``.

    Raises:
      ValueError: from the returned function, if the layer is not called exactly once. A layer inside
        ``nn.scan`` or ``nn.remat`` cannot be captured.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from optax_sam.linen import capture_layer_input
      >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((4, 2)))
      >>> logits, hidden = capture_layer_input(model, "layers_2")(variables, jnp.ones((4, 2)))
      >>> logits.shape, hidden.shape
      ((4, 3), (4, 8))
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a Linen module, got {module!r}. Pass the model itself.")
    if not isinstance(layer, str):
        raise TypeError(f"layer must be a path such as 'Dense_2' or 'encoder/out', got {layer!r}.")

    def apply(variables: Any, *args: Any, **kwargs: Any) -> tuple[Any, jax.Array]:
        captured: list[jax.Array] = []
        called: set[str] = set()

        def intercept(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
            path = "/".join(context.module.path)
            if context.method_name == "__call__":
                called.add(path)
                if path == layer:
                    captured.extend(layer_input(args, kwargs))
            return next_function(*args, **kwargs)

        with nn.intercept_methods(intercept):
            output = module.apply(variables, *args, **kwargs)
        if len(captured) != 1:
            raise ValueError(
                f"layer {layer!r} was called {len(captured)} times, expected once; the module's "
                f"layers are {sorted(called - {''})}."
            )
        return output, captured[0]

    return apply


def _split(params: Any) -> tuple[Any, dict[str, Any]]:
    """The parameters that an optimizer sees, and those of fp8 layers that it does not."""
    if isinstance(params, Mapping) and OVERWRITE_WITH_GRADIENT in params:
        overwritten = {OVERWRITE_WITH_GRADIENT: params[OVERWRITE_WITH_GRADIENT]}
        return params["params"], overwritten
    return params, {}
