"""The few lines that Flax nnx needs."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import optax
from flax import nnx

from optax_sam._checks import call as checked_call
from optax_sam._checks import check_callable
from optax_sam.objectives import Objective
from optax_sam.penalties import layer_input


def loss_function(
    model: nnx.Module, loss_fn: Callable[..., Any], *args: Any, wrt: Any = nnx.Param
) -> Callable[[Any], Any]:
    """The loss as a function of the parameters, as the extra argument ``loss_fn`` needs it.

    Call it *before* the training step's own ``nnx.value_and_grad``: it takes a snapshot of the model
    and of the arguments, so that both passes see the same random numbers and the same statistics, and
    what the perturbed pass changes is discarded.

    Args:
      model: the live model.
      loss_fn: ``loss_fn(model, *args) -> loss`` or ``(loss, aux)``, the function that the training step
        differentiates.
      *args: what else it takes: the batch, ``nnx.Rngs``, metrics, other modules.
      wrt: which of the model's variables are parameters; the same filter as in ``nnx.Optimizer``.

    Returns:
      ``loss_fn(params)``, for ``optimizer.update(model, grads, loss_fn=loss_fn)``.

    Raises:
      ValueError: from the returned function, if it draws random numbers or updates statistics and the
        live objects have not changed since the snapshot: then the clean pass came before it.

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
    check_callable("loss_fn", loss_fn, "Pass the function (model, *args) -> loss itself.")
    snapshot = _Snapshot(model, args, wrt)

    def of_parameters(params: Any) -> Any:
        return snapshot.evaluate("loss_fn", loss_fn, params)

    return of_parameters


def objective(
    model: nnx.Module,
    inputs: chex.ArrayTree,
    labels: chex.ArrayTree,
    loss: Callable[..., jax.Array] = optax.softmax_cross_entropy_with_integer_labels,
    *,
    call: Callable[..., Any] | None = None,
    args: tuple[Any, ...] = (),
    wrt: Any = nnx.Param,
    **options: Any,
) -> Objective:
    """The model's mean loss as an :class:`optax_sam.Objective` of its parameters.

    For the methods that look inside the loss (J-SAM, Functional-SAM, L-SAM, NCSAM, groups). Like
    :func:`loss_function` it takes a snapshot: call it before the training step's own pass.

    Args:
      model: the live model.
      inputs: see :class:`optax_sam.Objective`.
      labels: see :class:`optax_sam.Objective`.
      loss: see :class:`optax_sam.Objective`.
      call: ``call(model, inputs, *args) -> logits``; ``model(inputs, *args)`` by default.
      args: what the call needs beside the inputs, such as ``(rngs,)``; the snapshot includes it.
      wrt: which of the model's variables are parameters; the same filter as in ``nnx.Optimizer``.
      **options: further keywords of :class:`optax_sam.Objective`.

    Returns:
      An ``Objective`` whose parameters are ``nnx.state(model, wrt)``.

    Raises:
      ValueError: as :func:`loss_function`.

    Example:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> from flax import nnx
      >>> import optax_sam.nnx
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.1))
      >>> rngs = nnx.Rngs(dropout=1)
      >>> optimizer = nnx.Optimizer(
      ...     model, optax.chain(optax_sam.jsam(rho=0.05), optax.sgd(0.1)), wrt=nnx.Param)
      >>> def logits_of(model, x, rngs):
      ...     return model(x, rngs=rngs)
      >>> def loss_of(model, x, y, rngs):
      ...     logits = logits_of(model, x, rngs)
      ...     return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
      >>> @nnx.jit
      ... def train_step(model, optimizer, x, y, rngs):
      ...     objective = optax_sam.nnx.objective(model, x, y, call=logits_of, args=(rngs,))
      ...     loss, grads = nnx.value_and_grad(loss_of)(model, x, y, rngs)
      ...     optimizer.update(model, grads, loss_fn=objective)
      ...     return loss
      >>> loss = train_step(model, optimizer, jnp.ones((4, 2)), jnp.array([0, 1, 2, 0]), rngs)
    """
    if call is not None:
        check_callable("call", call, "Pass a function (model, inputs, *args) -> logits.")
    if not isinstance(args, tuple):
        raise TypeError(f"args must be a tuple, got {args!r}. Write args=(rngs,).")
    snapshot = _Snapshot(model, args, wrt)

    def apply_fn(params: Any, inputs: Any) -> Any:
        def logits_of(model: nnx.Module, *args: Any) -> Any:
            return model(inputs, *args) if call is None else call(model, inputs, *args)

        return snapshot.evaluate("call", logits_of, params)

    return Objective(apply_fn, inputs, labels, loss, **options)


class _Snapshot:
    """A model and other arguments as they are now, for evaluations that change copies only."""

    def __init__(self, model: nnx.Module, args: tuple[Any, ...], wrt: Any):
        is_parameter = nnx.filterlib.to_predicate(wrt)
        # One split of both: what the model and the arguments share, their copies share too.
        self.filter = lambda path, value: path[0] == 0 and is_parameter(path[1:], value)
        self.graphdef, self.live = self.split(model, args)
        if not nnx.split((model, args), self.filter, ...)[1]:
            raise ValueError(
                f"model has no parameters that wrt={wrt!r} selects, got {type(model).__name__}. "
                "Pass the live nnx module first, and the filter of nnx.Optimizer as wrt."
            )
        self.values = nnx.as_pure(self.live)  # the live variables change in the clean pass
        self.differentiated_by_caller = False

    def split(self, model: Any, args: Any) -> tuple[Any, Any]:
        """The structure, and the variables that are no parameters."""
        graphdef, *states = nnx.split((model, args), self.filter, ...)
        return graphdef, states[1]

    def evaluate(self, name: str, function: Callable[..., Any], params: Any) -> Any:
        """``function(model, *args)`` on copies of both, with ``params`` in the model."""
        try:
            model, args = nnx.merge(self.graphdef, nnx.State({0: params}), self.values, copy=True)
        except ValueError as error:
            raise ValueError(
                f"params must be those of the model, nnx.state(model, wrt), got a "
                f"{type(params).__name__} of {jax.tree.structure(params)}: {error}"
            ) from error
        _, rest = self.split(model, args)
        output = checked_call(
            name,
            function,
            model,
            *args,
            takes=f"(model, *args) with {len(args)} args",
            remedy="Pass what it needs beside the model: loss_function(model, loss_fn, x, y).",
        )
        changed = _changed(self.values, rest)
        # Variables come from nnx.state; what nnx.Optimizer hands to a method are bare arrays.
        if _holds_variables(params):
            self.differentiated_by_caller = True
        elif changed and not _changed(self.values, self.live):
            self._complain(changed)
        return output

    def _complain(self, changed: set[Any]) -> None:
        names = ", ".join(sorted(map(_name, changed)))
        if not self.differentiated_by_caller:
            raise ValueError(
                f"the loss changes {names}, but in the live objects the clean pass has not changed "
                "them since the snapshot of optax_sam.nnx.loss_function or objective: the "
                "perturbed pass would see other random numbers and statistics than the clean "
                "pass. Take the snapshot before nnx.value_and_grad(loss_fn)(model, ...), not "
                "after it."
            )
        if any(path[0] == 0 for path in changed):
            warnings.warn(
                f"the loss changes {names}, but the clean pass did so in copies only: the live "
                "model keeps its statistics, and draws the same random numbers at every step. "
                "Differentiate the loss of the live model, with "
                "nnx.value_and_grad(loss_fn)(model, ...).",
                stacklevel=2,
            )


def _changed(values: Any, variables: Any) -> set[Any]:
    """The paths of the variables that no longer hold the very arrays ``values``."""
    now = dict(nnx.to_flat_state(nnx.as_pure(variables)))
    return {path for path, value in nnx.to_flat_state(values) if now[path] is not value}


def _name(path: tuple[Any, ...]) -> str:
    parts = ("model", *path[1:]) if path[0] == 0 else (f"args[{path[1]}]", *path[2:])
    return ".".join(map(str, parts))


def _holds_variables(tree: Any) -> bool:
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return any(isinstance(leaf, nnx.Variable) for leaf in leaves)


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
    if not isinstance(layer, str):
        raise TypeError(f"layer must be a path such as 'head' or 'encoder.out', got {layer!r}.")
    *parents, name = layer.split(".")
    owner: Any = model
    for parent in parents:
        owner = getattr(owner, parent, None)
    original = getattr(owner, name, None)
    if not callable(original):
        names = [key for key, value in vars(model).items() if isinstance(value, nnx.Module)]
        raise ValueError(f"the model has no layer {layer!r}; its own layers are {names}.")
    captured: list[jax.Array] = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        captured.extend(layer_input(args, kwargs))
        return original(*args, **kwargs)

    # Not by setattr, which nnx records: for nnx the layer stays what and where it is.
    object.__setattr__(owner, name, recording)
    try:
        yield captured
    finally:
        object.__setattr__(owner, name, original)
