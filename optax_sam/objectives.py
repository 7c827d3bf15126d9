"""The supervised mean loss that keeps its parts."""

from collections.abc import Callable, Iterator
from typing import Any, Self

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam import _axes, _batches, _microbatches, _tree
from optax_sam._batches import count_parts, largest_divisor
from optax_sam._checks import (
    call,
    check_bool,
    check_callable,
    is_array_of,
    kinds,
    known_values,
    shape_of,
    show,
)
from optax_sam._loss_checks import check_label_range, check_labels, check_losses
from optax_sam.loss_scaling import check_scale, scale_cotangents

LossPerExample = Callable[[Any, Any], jax.Array]
Penalty = Callable[[Any], jax.Array]


@jax.tree_util.register_pytree_node_class
class Objective:
    r"""A supervised mean loss that keeps its parts.

    .. math:: L(w) = \frac{\sum_i v_i \, \ell(f(w, x_i), y_i)}{\sum_i v_i} + R(w)

    Calling it gives the loss, so it goes wherever a loss function goes:
    ``jax.value_and_grad(objective)(params)``. Methods that look inside the loss ask it for the
    logits (:func:`optax_sam.jsam`, :func:`optax_sam.functional_sam`, :func:`optax_sam.lsam`), for a
    subset of the examples with other labels (NCSAM), or for groups of examples (m-SAM).

    It is a pytree: all arrays are leaves. A callable that is a pytree itself, such as
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
      weights: :math:`v_i \ge 0`, shape ``(B,)`` or any leading part of the losses' shape (one per
        token: ``(B, T)``). They are normalized over the whole batch, so that a microbatch or a group
        counts by its share of the weights. Weights that are all zero give a zero loss. None: all 1.
      penalty: ``penalty(params) -> scalar``, R: for example weight decay inside the loss. It is
        perturbed with the loss, and counts once for microbatches and groups.
      microbatch_size: examples to compute at once; must divide B. Value, gradients and logits are
        computed microbatch by microbatch, in the memory of one and with the same result. None: all
        at once. Networks that mix the examples of a batch (BatchNorm in training) are refused. What
        hangs on an example's position, such as dropout from one key, repeats in every microbatch.
      has_aux: whether ``apply_fn`` returns auxiliary output beside the logits. With microbatches,
        output per example is joined, and other floating output is averaged; it has no derivative.
      loss_scale: see :func:`optax_sam.loss_scaled`; a positive scalar that may be traced.
      spmd_axis_name: as in ``jax.vmap``: the mesh axis, or a tuple of them, over which the batch is
        sharded under ``jit``. With ``group_size`` the network is traced on the examples of one group,
        and its own sharding constraints then also say that the groups are along this axis. Where
        parameters are sharded over the same axis, XLA would send activations between the devices
        without it. None: XLA decides.

    Raises:
      TypeError: if ``apply_fn``, ``loss`` or ``penalty`` is not callable, or ``spmd_axis_name`` is no
        name; when called, if the labels do not fit the default loss.
      ValueError: if the batch axes disagree or ``microbatch_size`` does not divide B; when called, if
        the loss is not one value per example, if ``apply_fn`` returns a tuple without ``has_aux`` (and
        the reverse), or if the network mixes the examples of a microbatch.

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
        loss: LossPerExample = optax.softmax_cross_entropy_with_integer_labels,
        *,
        weights: jax.Array | None = None,
        penalty: Penalty | None = None,
        microbatch_size: int | None = None,
        has_aux: bool = False,
        loss_scale: chex.Numeric | None = None,
        spmd_axis_name: str | tuple[str, ...] | None = None,
    ):
        self.apply_fn = check_callable("apply_fn", apply_fn, _APPLY)
        if _is_linen_module(apply_fn):
            raise TypeError(f"apply_fn must be a function, got {apply_fn!r}. {_APPLY}")
        self.loss: LossPerExample = check_callable(
            "loss", loss, "Pass a function (logits, labels) -> one loss per example."
        )
        self.penalty: Penalty | None = penalty
        if penalty is not None:
            check_callable("penalty", penalty, "Pass a function params -> scalar.")
        if loss_scale is not None:
            check_scale("loss_scale", loss_scale)
        self.spmd_axis_name = _check_axis(spmd_axis_name)
        self.inputs = inputs
        self.labels = labels
        self.weights = weights
        self.microbatch_size = microbatch_size
        self.has_aux = check_bool("has_aux", has_aux)
        self.loss_scale = loss_scale
        self._check_batch()

    def _check_batch(self) -> None:
        batch = {"inputs": self.inputs, "labels": self.labels}
        if self.weights is not None:
            batch["weights"] = self.weights
            kinds = (jnp.floating, jnp.integer, jnp.bool_)
            if not hasattr(self.weights, "dtype") or not any(
                jnp.issubdtype(self.weights.dtype, kind) for kind in kinds
            ):
                raise TypeError(
                    "weights must be an array of numbers, shape (B,) or like the losses, got "
                    f"{self.weights!r}."
                )
            values = known_values(self.weights)
            if values is not None and not (values >= 0).all():  # false for NaN
                raise ValueError(
                    f"weights must be at least 0, got {values.min()}. A weight is what an example "
                    "counts; 0 leaves it out."
                )
        for name, value in batch.items():
            if isinstance(value, Iterator):
                raise TypeError(
                    f"{name} must be an array or a pytree of arrays, got {value!r}. Write "
                    f"{name}=jnp.asarray(list({name}))."
                )
        shapes = jax.tree.map(shape_of, batch)
        sizes = {shape[:1] for shape in map(shape_of, jax.tree.leaves(batch))}
        if len(sizes) != 1 or not isinstance(next(iter(sizes)), tuple) or sizes == {()}:
            raise ValueError(
                f"{', '.join(batch)} need one common leading batch axis, got shapes {shapes}. "
                "Pass arrays of B rows; make lists of numbers arrays with jnp.asarray."
            )
        if sizes == {(0,)}:
            raise ValueError(
                f"inputs and labels have no example: the batch axis has length 0, shapes {shapes}. "
                "Leave empty batches out of the training loop."
            )
        if self.microbatch_size is not None:
            count_parts(self.batch_size, self.microbatch_size, "microbatch_size")

    @property
    def batch_size(self) -> int:
        """The number of examples B."""
        return int(jnp.shape(jax.tree.leaves((self.labels, self.inputs))[0])[0])

    @property
    def examples(self) -> tuple[chex.ArrayTree, chex.ArrayTree, jax.Array | None]:
        """``(inputs, labels, weights)``: all arrays with a batch axis."""
        return self.inputs, self.labels, self.weights

    @property
    def total_weight(self) -> jax.Array:
        r""":math:`\sum_i v_i`, a scalar in JAX's default float dtype; B without weights.

        What a batch counts beside others: the mean loss over several devices is the sum of
        ``total_weight * loss`` over the sum of ``total_weight``.
        """
        if self.weights is None:
            return jnp.asarray(self.batch_size, float)
        return jnp.sum(jnp.asarray(self.weights).astype(float))

    def __call__(self, params: chex.ArrayTree) -> Any:
        """The loss at ``params``, penalty included.

        Args:
          params: pytree of parameters w.

        Returns:
          A scalar, or ``(loss, aux)`` with ``has_aux``.

        Raises:
          TypeError: if ``apply_fn``, ``loss`` or ``penalty`` returns something else than it should.
          ValueError: if labels and logits do not fit, or with ``microbatch_size`` for a network that
            mixes examples.
        """
        if self.microbatch_size is not None and self.microbatch_size < self.batch_size:
            loss, aux = _microbatches.loss_and_aux(self, params)
        else:
            scaled = scale_cotangents(params, self.loss_scale, "divide")
            logits, aux = self.logits_and_aux(scaled)
            loss = scale_cotangents(self.loss_from_logits(logits), self.loss_scale, "multiply")
        if self.penalty is not None:
            loss = loss + self.penalty_of(params)
        return (loss, aux) if self.has_aux else loss

    def penalty_of(self, params: chex.ArrayTree) -> jax.Array:
        """The penalty R.

        Args:
          params: pytree of parameters w.

        Returns:
          A scalar; 0 without a penalty.

        Raises:
          TypeError: if ``penalty`` does not return a floating scalar.
        """
        if self.penalty is None:
            return jnp.zeros([])
        value = call(
            "penalty",
            self.penalty,
            scale_cotangents(params, self.loss_scale, "divide"),
            takes="the parameters and nothing else",
            remedy="Bind the rest: penalty=lambda params: penalty(params, ...).",
        )
        if shape_of(value) != () or not _tree.is_floating(value):
            raise TypeError(
                f"penalty must return a scalar, got {kinds(value)}. Sum over all parameters "
                "inside it."
            )
        value = jnp.asarray(value)
        return scale_cotangents(value, self.loss_scale, "multiply")  # type: ignore[no-any-return]

    def logits(self, params: chex.ArrayTree) -> chex.ArrayTree:
        """The logits, without auxiliary output.

        Args:
          params: pytree of parameters w.

        Returns:
          What ``apply_fn`` returns for the whole batch, typically shape ``(B, classes)``.

        Raises:
          ValueError: if ``has_aux`` and what ``apply_fn`` returns do not agree, or with
            ``microbatch_size`` for a network that mixes examples.
        """
        if self.microbatch_size is not None and self.microbatch_size < self.batch_size:
            _microbatches.refuse_mixed_examples(self, params)
            return _microbatches.logits(self, params)
        return self.logits_and_aux(params)[0]

    def logits_and_aux(self, params: chex.ArrayTree) -> tuple[chex.ArrayTree, Any]:
        """The logits and the auxiliary output, of the batch at once.

        Args:
          params: pytree of parameters w.

        Returns:
          ``(logits, aux)``; ``aux`` is None without ``has_aux``.

        Raises:
          ValueError: if ``has_aux`` and what ``apply_fn`` returns do not agree.
        """
        output = call(
            "apply_fn",
            self.apply_fn,
            params,
            self.inputs,
            takes="(params, inputs)",
            remedy="Bind the rest: apply_fn=lambda params, inputs: ... For a model of Flax nnx or "
            "Equinox use objective(model, inputs, labels) of optax_sam.nnx or optax_sam.equinox.",
        )
        if not self.has_aux:
            if isinstance(output, tuple):
                raise ValueError(
                    f"apply_fn returned a tuple of {len(output)}. If it is (logits, aux), as with "
                    "mutable Flax collections, pass has_aux=True to Objective."
                )
            return output, None
        if not (isinstance(output, tuple) and len(output) == 2):
            raise ValueError(
                "with has_aux=True apply_fn must return (logits, aux), got "
                f"{type(output).__name__}."
            )
        return output

    def losses_from_logits(self, logits: chex.ArrayTree) -> jax.Array:
        """The loss of every example, without weights and penalty.

        Args:
          logits: as :meth:`logits` returns them.

        Returns:
          The losses, shape ``(B, ...)``: one for each example, or for each of its tokens.

        Raises:
          TypeError: if ``loss`` returns no floating array, or labels have a dtype it cannot take.
          ValueError: if logits, labels and losses do not fit in shape, or a concrete label names no
            class.
        """
        check_labels(self.loss, logits, self.labels)
        if self.weights is None:  # a label without a class may have weight 0
            check_label_range(self.loss, logits, self.labels)
        losses: jax.Array = call(
            "loss",
            self.loss,
            logits,
            self.labels,
            takes="(logits, labels)",
            remedy="Bind the rest: loss=lambda logits, labels: ...",
        )
        check_losses(losses, self.loss, logits, self.labels, self.batch_size)
        return losses

    def loss_from_logits(self, logits: chex.ArrayTree) -> jax.Array:
        """The mean loss, weighted by ``weights``, without the penalty.

        Args:
          logits: as :meth:`logits` returns them.

        Returns:
          A scalar; 0 where all weights are 0.

        Raises:
          TypeError: as :meth:`losses_from_logits`.
          ValueError: likewise, and if the weights do not fit the losses.
        """
        losses = self.losses_from_logits(logits)
        if self.weights is None:
            return jnp.mean(losses)
        weights = self._weights_like(losses)
        # Half precision would lose the sum of many weights.
        total = jnp.sum(weights)
        mean = _tree.divide_or_zero(jnp.sum(_weighted(weights, losses)), total)
        return mean.astype(losses.dtype)

    def _weights_like(self, losses: jax.Array) -> jax.Array:
        """The weights, repeated along the axes of the losses that they do not have."""
        weights = jnp.asarray(self.weights)
        if weights.shape != losses.shape[: weights.ndim]:
            raise ValueError(
                f"weights must have shape {losses.shape} like the losses, or a leading part of it "
                f"such as {losses.shape[:1]}, got {weights.shape}."
            )
        weights = weights.astype(_tree.accumulation_dtype(losses))
        weights = weights.reshape(*weights.shape, *(1,) * (losses.ndim - weights.ndim))
        return jnp.broadcast_to(weights, losses.shape)

    def logit_gradient(self, logits: chex.ArrayTree) -> chex.ArrayTree:
        r"""The logit term :math:`\partial L/\partial f`: (softmax − one-hot)/B for cross-entropy.

        Args:
          logits: as :meth:`logits` returns them.

        Returns:
          A pytree like the logits.

        Raises:
          TypeError: if the logits are not floating.
        """
        if not all(is_array_of(leaf, jnp.floating) for leaf in jax.tree.leaves(logits)):
            raise TypeError(
                "the derivative of the loss in the logits needs floating logits, got "
                f"{kinds(logits)}. Return them from apply_fn before any rounding or argmax."
            )
        return jax.grad(self.loss_from_logits)(logits)

    def with_logit_term_at(self, logits: chex.ArrayTree) -> Self:
        r"""The objective with the value of this one, whose logit term stays that of ``logits``.

        Its gradient at w is :math:`\sum_i J(w, x_i)^\top c_i` with
        :math:`c = \partial L/\partial f` at the given logits, whatever the logits at w are. It is the
        gradient of the loss :math:`\langle f(w, x_i), c_i \rangle`, so that microbatches, groups and
        sharding come from the objective, and no vector-Jacobian product is written by hand.

        Args:
          logits: at which the logit term is taken, as :meth:`logits` returns them.

        Returns:
          An objective of the same examples.

        Raises:
          TypeError: if the logits are not floating.
        """
        dtype = _tree.accumulation_dtype(logits)
        wide = jax.tree.map(lambda z: z.astype(dtype) if _tree.is_floating(z) else z, logits)
        terms = jax.tree.map(lambda c: c * self.batch_size, self.logit_gradient(wide))
        losses = jax.eval_shape(self.losses_from_logits, wide)
        ones = jnp.ones(losses.shape, _tree.accumulation_dtype(losses))
        weights = ones if self.weights is None else self._weights_like(ones)
        factors = self.batch_size * _tree.divide_or_zero(weights, jnp.sum(weights))
        return self.replace(
            labels=(terms, self.labels, factors),
            loss=_FixedLogitTerm(self.loss),
            weights=None,
        )

    def replace(self, **changes: Any) -> Self:
        """The same objective with other arguments.

        Args:
          **changes: named as in the constructor.

        Returns:
          The new objective.

        Raises:
          TypeError: for a name that the constructor does not have.
        """
        arguments = {
            "apply_fn": self.apply_fn,
            "inputs": self.inputs,
            "labels": self.labels,
            "loss": self.loss,
            "weights": self.weights,
            "penalty": self.penalty,
            "microbatch_size": self.microbatch_size,
            "has_aux": self.has_aux,
            "loss_scale": self.loss_scale,
            "spmd_axis_name": self.spmd_axis_name,
        }
        unknown = sorted(set(changes) - set(arguments))
        if unknown:
            raise TypeError(
                f"replace got an unknown argument {unknown[0]}=; an objective has "
                f"{', '.join(arguments)}."
            )
        return type(self)(**(arguments | changes))

    def with_labels(self, labels: chex.ArrayTree) -> Self:
        """The same examples with other labels.

        Args:
          labels: as in the constructor.

        Returns:
          The new objective.
        """
        return self.replace(labels=labels)

    def with_examples(
        self, examples: tuple[chex.ArrayTree, chex.ArrayTree, jax.Array | None]
    ) -> Self:
        """The same loss of other examples, in microbatches no larger than now.

        Args:
          examples: ``(inputs, labels, weights)``; the weights may be None.

        Returns:
          The new objective.

        Raises:
          TypeError: if ``examples`` is no tuple of three.
        """
        if not isinstance(examples, tuple) or len(examples) != 3:
            raise TypeError(
                f"examples must be (inputs, labels, weights), got {kinds(examples)}. Without "
                "weights write (inputs, labels, None)."
            )
        inputs, labels, weights = examples
        changed = self.replace(inputs=inputs, labels=labels, weights=weights, microbatch_size=None)
        if self.microbatch_size is not None:
            changed.microbatch_size = largest_divisor(changed.batch_size, self.microbatch_size)
        return changed

    def subset(self, indices: Any) -> Self:
        """The weighted mean loss over the chosen examples only.

        Args:
          indices: a slice, or an integer array of example indices, shape ``(m,)``.

        Returns:
          The objective of these examples.

        Raises:
          TypeError: if ``indices`` is neither.
          ValueError: if a concrete index lies outside of the batch.
        """
        _check_indices(indices, self.batch_size)
        # As JAX arrays: NumPy cannot be indexed by indices that are being traced.
        examples = _batches.gathered(jax.tree.map(jnp.asarray, self.examples))
        chosen = jax.tree.map(lambda leaf: leaf[indices], examples)
        return self.with_examples(chosen)

    def groups(self, size: int) -> Self:
        """The examples cut into consecutive groups of ``size``, for ``jax.vmap`` or ``jax.lax.map``.

        The leaves of the result have shape ``(B / size, size, ...)``: mapped over their leading
        axis, each piece is the objective of one group. The mean of the groups' losses, each weighted
        by its share of the weights, is the loss of the batch.

        Args:
          size: number of examples in a group; must divide the batch size.

        Returns:
          An objective whose examples have one more axis in front.

        Raises:
          ValueError: if ``size`` does not divide the batch size.
        """
        count = count_parts(self.batch_size, size, "group_size")
        grouped = self.replace(microbatch_size=None)
        cut = _batches.cut(self.examples, count)
        grouped.inputs, grouped.labels, grouped.weights = cut
        if self.microbatch_size is not None:
            grouped.microbatch_size = largest_divisor(size, self.microbatch_size)
        return grouped

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Splits the arrays from the static parts, as ``jax.jit`` needs it."""
        callables = [
            _split_callable(function) for function in (self.apply_fn, self.loss, self.penalty)
        ]
        leaves, static = zip(*callables, strict=True)
        arrays = (self.inputs, self.labels, self.weights, self.loss_scale)
        options = (self.microbatch_size, self.has_aux, self.spmd_axis_name)
        return (leaves, arrays), (static, *options)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], children: tuple[Any, ...]) -> Self:
        """Rebuilds the objective without checks: JAX also puts placeholders into the leaves."""
        objective = object.__new__(cls)
        leaves, arrays = children
        objective.inputs, objective.labels, objective.weights, objective.loss_scale = arrays
        functions, *options = static
        objective.microbatch_size, objective.has_aux, objective.spmd_axis_name = options
        objective.apply_fn, objective.loss, objective.penalty = (
            leaf if function is None else function
            for leaf, function in zip(leaves, functions, strict=True)
        )
        return objective

    def __repr__(self) -> str:
        return (
            f"Objective({_name(self.apply_fn)}, batch_size={self.batch_size}, "
            f"loss={_name(self.loss)}, has_aux={self.has_aux})"
        )


@jax.tree_util.register_pytree_node_class
class _FixedLogitTerm:
    r"""The loss with the value of another one, and the derivative :math:`c_i` in the logits.

    Its labels are ``(c, labels, factors)``; the factors are what each loss counts in the mean.
    """

    def __init__(self, loss: LossPerExample):
        self.loss = loss

    def __call__(self, logits: chex.ArrayTree, labels: Any) -> jax.Array:
        terms, labels, factors = labels

        def inner(z: jax.Array, c: jax.Array) -> jax.Array:
            return jnp.sum(z.astype(c.dtype) * c, axis=tuple(range(1, c.ndim)))

        products = jax.tree.leaves(jax.tree.map(inner, logits, terms))
        inner_product = sum(products[1:], products[0])
        losses = _weighted(factors, self.loss(logits, labels))
        value = jnp.sum(losses, axis=tuple(range(1, losses.ndim)))
        return inner_product + jax.lax.stop_gradient(value - inner_product)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _FixedLogitTerm) and self.loss == other.loss

    def __hash__(self) -> int:
        return hash((_FixedLogitTerm, self.loss))

    def tree_flatten(self) -> tuple[tuple[Any], tuple[Any]]:
        leaf, static = _split_callable(self.loss)
        return (leaf,), (static,)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any], children: tuple[Any]) -> "_FixedLogitTerm":
        return cls(children[0] if static[0] is None else static[0])


def _weighted(weights: jax.Array, losses: jax.Array) -> jax.Array:
    """Zero where a weight is, also if the loss is NaN, as that of a label outside of the classes is."""
    return jnp.where(weights == 0, 0, weights * losses.astype(weights.dtype))


def _split_callable(function: Callable[..., Any] | None) -> tuple[Any, Any]:
    """``(leaf, static)``, one of them None: a callable pytree travels as leaves, others as static."""
    if function is not None and is_pytree(function):
        return function, None
    return None, function


def is_pytree(function: Callable[..., Any]) -> bool:
    """Whether a callable is a registered pytree (``Objective``, ``Partial``, a module of arrays)."""
    return not jax.tree_util.treedef_is_leaf(jax.tree.structure(function))


_APPLY = "Pass a function (params, inputs) -> logits, e.g. model.apply."


def _is_linen_module(function: Any) -> bool:
    """Whether it is a Flax Linen module, which can be called inside of another one only."""
    return any(
        f"{base.__module__}.{base.__name__}" == "flax.linen.module.Module"
        for base in type(function).__mro__
    )


def _check_axis(name: Any) -> str | tuple[str, ...] | None:
    """The name of an axis, or several of them."""
    names = name if isinstance(name, tuple) else (name,)
    if name is not None and not all(isinstance(one, str) for one in names):
        raise TypeError(
            f"spmd_axis_name must be the name of a mesh axis or a tuple of names, got {show(name)}. "
            "Write e.g. spmd_axis_name='data', the axis that the batch is sharded over."
        )
    return name  # type: ignore[no-any-return]


def _check_indices(indices: Any, batch_size: int) -> None:
    if isinstance(indices, slice):
        return
    is_mask = is_array_of(indices, jnp.bool_) and not isinstance(indices, jax.core.Tracer)
    if not (is_mask or is_array_of(indices, jnp.integer)) or jnp.ndim(indices) != 1:
        raise TypeError(
            f"indices must be a slice or an integer array of shape (m,), got {show(indices)}. Write "
            "jnp.asarray([...]); a mask of bools is for outside of jit only."
        )
    values = None if is_mask else known_values(indices)
    if (
        values is not None
        and values.size
        and not (-batch_size <= values.min() and values.max() < batch_size)
    ):
        raise ValueError(
            f"indices must lie in [-{batch_size}, {batch_size}), the examples of the batch, got values "
            f"from {values.min()} to {values.max()}."
        )


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def with_parameters(
    loss_fn: Callable[..., Any], transform: Callable[[chex.ArrayTree], chex.ArrayTree]
) -> Callable[..., Any]:
    """The loss at ``transform(params)``; an ``Objective`` stays one."""
    if not isinstance(loss_fn, Objective):
        return lambda params: loss_fn(transform(params))
    apply_fn, penalty = loss_fn.apply_fn, loss_fn.penalty
    return loss_fn.replace(
        apply_fn=lambda params, inputs: apply_fn(transform(params), inputs),
        penalty=None if penalty is None else lambda params: penalty(transform(params)),
    )


def gathered(objective: Objective) -> Objective:
    """The objective with all examples on every device, to cut groups under explicit sharding.

    A typed shard cannot be mapped over in groups. Everywhere else nothing changes.
    """
    return objective.with_examples(_batches.gathered(objective.examples))


def require_objective(loss_fn: Any, method: str) -> Objective:
    """Returns ``loss_fn`` if it is an :class:`Objective`, and says how to make one otherwise."""
    if loss_fn is None:
        raise TypeError(
            f"{method} evaluates the loss, but loss_fn is None: call update(..., "
            "loss_fn=optax_sam.Objective(apply_fn, inputs, labels)). If you did, a wrapper around "
            "this stage drops extra arguments, as optax.contrib.split_real_and_imaginary, "
            "optax.contrib.scale_by_galore and optax.MultiSteps(...).gradient_transformation() do: "
            "leave that out."
        )
    if not isinstance(loss_fn, Objective):
        raise TypeError(
            f"{method} needs to look inside the loss, but loss_fn is {loss_fn!r}. Pass "
            "loss_fn=optax_sam.Objective(apply_fn, inputs, labels), which is the mean loss "
            "and keeps the logits, the examples and the labels apart. A penalty in the loss "
            "(weight decay) goes along as Objective(..., penalty=), weights as Objective(..., "
            "weights=). Of a Flax nnx model, optax_sam.nnx.objective makes it, of an Equinox one "
            "optax_sam.equinox.objective."
        )
    return loss_fn


def device_share(loss_fn: Any, axis_name: _axes.AxisName) -> jax.Array | None:
    """What this device's part of the batch counts in the mean over a mapped axis; None if all alike."""
    if (
        not isinstance(loss_fn, Objective)
        or loss_fn.weights is None
        or not _axes.names_of(axis_name)
    ):
        return None
    return _axes.share_of_weight(loss_fn.total_weight, axis_name)
