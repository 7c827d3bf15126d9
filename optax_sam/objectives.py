"""The supervised mean loss that keeps its parts."""

from collections.abc import Callable
from typing import Any, Self

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam import _batches
from optax_sam._hyperparameters import check_callable, check_integer


@jax.tree_util.register_pytree_node_class
class Objective:
    r"""A supervised mean loss, :math:`L(w) = \frac{1}{B} \sum_i \ell(f(w, x_i), y_i)`, and its parts.

    Calling it gives the loss, so it goes wherever a loss function goes:
    ``jax.value_and_grad(objective)(params)``. Methods that look inside the loss ask it for the
    logits (:func:`optax_sam.jsam`, :func:`optax_sam.lsam`), for a subset of the examples with other
    labels (NCSAM), or for groups of examples (m-SAM).

    It is a pytree: ``inputs`` and ``labels`` are leaves. A callable that is a pytree itself, such as
    ``jax.tree_util.Partial`` or a module of arrays, keeps its arrays as leaves; any other callable
    is static. Crossing a ``jax.jit`` boundary therefore traces anew only if a *static* callable
    changes; a lambda made anew each step does, ``model.apply`` and ``Partial`` do not.

    Args:
      apply_fn: ``apply_fn(params, inputs) -> logits``, for example ``model.apply`` of Flax Linen.
        With ``has_aux`` it returns ``(logits, aux)``.
      inputs: array or pytree of arrays with a leading batch axis of length B.
      labels: array or pytree of arrays with a leading batch axis of length B.
      loss: ``loss(logits, labels)``, one value per example: shape ``(B, ...)``; any further axes
        (tokens, pixels) are averaged over too.
      has_aux: whether ``apply_fn`` returns auxiliary output beside the logits.

    Raises:
      TypeError: if ``apply_fn`` or ``loss`` is not callable.
      ValueError: if the batch axes disagree, if the loss is not one value per example, or if
        ``apply_fn`` returns a tuple without ``has_aux`` (and the reverse).

    Example:
      >>> import jax, jax.numpy as jnp, optax_sam
      >>> objective = optax_sam.Objective(
      ...     lambda w, x: x @ w, jnp.ones((8, 3)), jnp.zeros(8, jnp.int32))
      >>> loss, grads = jax.value_and_grad(objective)(jnp.zeros((3, 2)))
      >>> grads.shape
      (3, 2)
    """

    def __init__(
        self,
        apply_fn: Callable[..., Any],
        inputs: chex.ArrayTree,
        labels: chex.ArrayTree,
        loss: Callable[..., jax.Array] = optax.softmax_cross_entropy_with_integer_labels,
        *,
        has_aux: bool = False,
    ):
        self.apply_fn = check_callable(
            "apply_fn", apply_fn, "Pass a function (params, inputs) -> logits, e.g. model.apply."
        )
        self.loss = check_callable(
            "loss", loss, "Pass a function (logits, labels) -> one loss per example."
        )
        self.inputs = inputs
        self.labels = labels
        self.has_aux = has_aux
        sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((inputs, labels))}
        if len(sizes) != 1 or sizes == {()}:
            shapes = jax.tree.map(jnp.shape, {"inputs": inputs, "labels": labels})
            raise ValueError(
                f"inputs and labels need one common leading batch axis, got shapes {shapes}."
            )

    @property
    def batch_size(self) -> int:
        """The number of examples B."""
        return jnp.shape(jax.tree.leaves((self.labels, self.inputs))[0])[0]

    def __call__(self, params: chex.ArrayTree) -> Any:
        """The mean loss at ``params``, or ``(loss, aux)`` with ``has_aux``."""
        logits, aux = self.logits_and_aux(params)
        loss = self.loss_from_logits(logits)
        return (loss, aux) if self.has_aux else loss

    def logits(self, params: chex.ArrayTree) -> chex.ArrayTree:
        """The logits at ``params``, without auxiliary output."""
        return self.logits_and_aux(params)[0]

    def logits_and_aux(self, params: chex.ArrayTree) -> tuple[chex.ArrayTree, Any]:
        """The logits and the auxiliary output (``None`` without ``has_aux``) at ``params``."""
        output = self.apply_fn(params, self.inputs)
        if not self.has_aux:
            if isinstance(output, tuple):
                raise ValueError(
                    f"apply_fn returned a tuple of {len(output)}. If it is (logits, aux), as with "
                    "mutable Flax collections, pass has_aux=True to Objective."
                )
            return output, None
        if not (isinstance(output, tuple) and len(output) == 2):
            raise ValueError(
                f"with has_aux=True apply_fn must return (logits, aux), got {type(output).__name__}."
            )
        return output

    def losses_from_logits(self, logits: chex.ArrayTree) -> jax.Array:
        """The loss of every example, given the logits."""
        losses = self.loss(logits, self.labels)
        if jnp.shape(losses)[:1] != (self.batch_size,):
            raise ValueError(
                "loss must return one value per example, shape "
                f"({self.batch_size}, ...), got shape {jnp.shape(losses)}. Objective takes the mean "
                "itself: pass the loss without it."
            )
        return losses

    def loss_from_logits(self, logits: chex.ArrayTree) -> jax.Array:
        """The mean loss, given the logits."""
        return jnp.mean(self.losses_from_logits(logits))

    def logit_gradient(self, logits: chex.ArrayTree) -> chex.ArrayTree:
        r"""The logit term :math:`\partial L/\partial f`: (softmax − one-hot)/B for cross-entropy."""
        return jax.grad(self.loss_from_logits)(logits)

    def replace(self, **changes: Any) -> Self:
        """The same objective with other arguments, named as in the constructor."""
        arguments = {
            "apply_fn": self.apply_fn,
            "inputs": self.inputs,
            "labels": self.labels,
            "loss": self.loss,
            "has_aux": self.has_aux,
        }
        return type(self)(**(arguments | changes))

    def with_labels(self, labels: chex.ArrayTree) -> Self:
        """The same examples with other labels."""
        return self.replace(labels=labels)

    def subset(self, indices: Any) -> Self:
        """The mean loss over the chosen examples only.

        Args:
          indices: a slice, or an integer array of example indices, shape ``(m,)``.
        """
        inputs, labels = jax.tree.map(lambda leaf: leaf[indices], (self.inputs, self.labels))
        return self.replace(inputs=inputs, labels=labels)

    def groups(self, size: int) -> Self:
        """The examples cut into consecutive groups of ``size``, for ``jax.vmap`` or ``jax.lax.map``.

        The leaves of the result have shape ``(B / size, size, ...)``: mapped over their leading
        axis, each piece is the objective of one group, and the mean of the groups' losses is the
        loss of the batch.

        Args:
          size: number of examples in a group; must divide the batch size.

        Raises:
          ValueError: if ``size`` does not divide the batch size.
        """
        count = count_groups(self, size)
        inputs, labels = _batches.cut((self.inputs, self.labels), count)
        return self.replace(inputs=inputs, labels=labels)

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Splits the arrays from the static parts, as ``jax.jit`` needs it."""
        apply_leaf, apply_static = _split_callable(self.apply_fn)
        loss_leaf, loss_static = _split_callable(self.loss)
        children = (apply_leaf, loss_leaf, self.inputs, self.labels)
        return children, (apply_static, loss_static, self.has_aux)

    @classmethod
    def tree_unflatten(cls, static: tuple, children: tuple) -> Self:
        """Rebuilds the objective without checks: JAX also puts placeholders into the leaves."""
        objective = object.__new__(cls)
        apply_leaf, loss_leaf, objective.inputs, objective.labels = children
        apply_static, loss_static, objective.has_aux = static
        objective.apply_fn = apply_leaf if apply_static is None else apply_static
        objective.loss = loss_leaf if loss_static is None else loss_static
        return objective

    def __repr__(self) -> str:
        return (
            f"Objective({_name(self.apply_fn)}, batch_size={self.batch_size}, "
            f"loss={_name(self.loss)}, has_aux={self.has_aux})"
        )


def _split_callable(function: Callable[..., Any]) -> tuple[Any, Any]:
    """``(leaf, static)``, one of them None: a callable pytree travels as leaves, others as static."""
    if is_pytree(function):
        return function, None
    return None, function


def is_pytree(function: Callable[..., Any]) -> bool:
    """Whether a callable is a registered pytree (``Objective``, ``Partial``, a module of arrays)."""
    return not jax.tree_util.treedef_is_leaf(jax.tree.structure(function))


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def with_parameters(
    loss_fn: Callable[..., Any], transform: Callable[[chex.ArrayTree], chex.ArrayTree]
) -> Callable[..., Any]:
    """The loss at ``transform(params)``; an ``Objective`` stays one."""
    inner = loss_fn.apply_fn if isinstance(loss_fn, Objective) else loss_fn

    def transformed(params, *inputs):
        return inner(transform(params), *inputs)

    return loss_fn.replace(apply_fn=transformed) if isinstance(loss_fn, Objective) else transformed


def count_groups(objective: Objective, size: int) -> int:
    """How many groups of ``size`` examples there are; refuses a size that leaves some out."""
    check_integer("size", size, minimum=1)
    count, remainder = divmod(objective.batch_size, size)
    if remainder:
        raise ValueError(
            f"groups of {size} examples do not divide a batch of {objective.batch_size}; choose a "
            "divisor, or drop the last examples."
        )
    return count


def gathered(objective: Objective) -> Objective:
    """The objective with all examples on every device, to cut groups under explicit sharding.

    A typed shard cannot be mapped over in groups. Everywhere else nothing changes.
    """
    inputs, labels = _batches.gathered((objective.inputs, objective.labels))
    return objective.replace(inputs=inputs, labels=labels)


def require_objective(loss_fn: Any, method: str) -> Objective:
    """Returns ``loss_fn`` if it is an :class:`Objective`, and says how to make one otherwise."""
    if not isinstance(loss_fn, Objective):
        raise TypeError(
            f"{method} needs to look inside the loss, but loss_fn is {loss_fn!r}. Pass "
            "loss_fn=optax_sam.Objective(apply_fn, inputs, labels), which is the mean loss "
            "and keeps the logits, the examples and the labels apart."
        )
    return loss_fn
