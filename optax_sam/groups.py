"""Gradients over groups and slices of a batch: m-SAM and gradient accumulation."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_sam import _axes, _batches, _tree
from optax_sam.convolutions import inside_control_flow
from optax_sam.evaluations import value_and_gradients
from optax_sam.objectives import Objective, count_groups, gathered, require_objective


def value_and_grad(
    objective: Objective, params: chex.ArrayTree, *, microbatch_size: int
) -> tuple[jax.Array, chex.ArrayTree]:
    r"""Loss and gradients of a batch, accumulated over slices of it.

    Equal to ``jax.value_and_grad(objective)(params)`` up to rounding, in the memory of one slice. With
    ``microbatch_size`` on a method, both passes of a sharpness-aware step are accumulated, and the
    step is that of the full batch::

        loss, grads = optax_sam.value_and_grad(objective, params, microbatch_size=32)
        updates, state = tx.update(grads, state, params, loss_fn=objective)

    Args:
      objective: an :class:`optax_sam.Objective` of B examples, of a network that does not mix the
        examples of a batch. Its auxiliary output is discarded.
      params: the parameters.
      microbatch_size: examples in a slice; must divide B.

    Returns:
      ``(loss, gradients)``.

    Raises:
      ValueError: if ``microbatch_size`` does not divide B.
      TypeError: if ``objective`` is not an ``Objective``.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> objective = optax_sam.Objective(lambda w, x: x @ w, jnp.eye(4), jnp.array([0, 1, 2, 0]))
      >>> loss, grads = optax_sam.value_and_grad(objective, jnp.zeros((4, 3)), microbatch_size=2)
      >>> round(float(loss), 4)
      1.0986
    """

    def evaluate(objective, logits):
        del logits
        value, gradients = value_and_gradients(objective, params)
        return (value[0] if objective.has_aux else value), gradients

    require_objective(objective, "optax_sam.value_and_grad")
    return mean_over_slices(evaluate, objective, microbatch_size)


def gradients_in_slices(
    loss_fn: Callable[..., Any],
    params: chex.ArrayTree,
    microbatch_size: int | None,
    *,
    has_aux: bool = False,
    axis_name: _axes.AxisName = None,
) -> chex.ArrayTree:
    """The gradients of a loss; of an ``Objective``, in slices of at most ``microbatch_size``.

    Here the batch may be a part of the training step's, which the slices need not divide.
    """
    if microbatch_size is None:
        return value_and_gradients(loss_fn, params, has_aux)[1]
    objective = require_objective(loss_fn, "microbatch_size")
    size = _largest_divisor(objective.batch_size, microbatch_size)
    return mean_over_slices(
        lambda part, _: value_and_gradients(part, params)[1], objective, size, axis_name=axis_name
    )


def logits_in_slices(
    objective: Objective, params: chex.ArrayTree, microbatch_size: int | None
) -> chex.ArrayTree:
    """The logits of a batch, computed in slices of at most ``microbatch_size`` examples."""
    if microbatch_size is None or microbatch_size >= objective.batch_size:
        return objective.logits(params)

    def logits(examples):
        inputs, labels = examples
        return objective.replace(inputs=inputs, labels=labels).logits(params)

    size = _largest_divisor(objective.batch_size, microbatch_size)
    slices = _batches.interleaved(
        (objective.inputs, objective.labels), objective.batch_size // size
    )
    sliced = jax.lax.map(inside_control_flow(logits), slices)
    return jax.tree.map(lambda x: jnp.reshape(jnp.swapaxes(x, 0, 1), (-1, *x.shape[2:])), sliced)


def _largest_divisor(number: int, most: int) -> int:
    return max(n for n in range(1, min(most, number) + 1) if number % n == 0)


def mean_over_slices(
    function: Callable[[Objective, Any], chex.ArrayTree],
    objective: Objective,
    size: int,
    *,
    logits: chex.ArrayTree | None = None,
    axis_name: _axes.AxisName = None,
) -> Any:
    """The mean of ``function(slice, its logits)`` over slices of ``size`` examples, one at a time."""
    count = count_groups(objective, size)
    slices = _batches.interleaved((objective.inputs, objective.labels, logits), count)
    return _mean_over_loop(_on_part(function, objective), slices, count, axis_name)


def _on_part(function: Callable[[Objective, Any], chex.ArrayTree], objective: Objective):
    """The function of a part of the batch, given as ``(inputs, labels, logits)``."""

    def of(part):
        inputs, labels, logits = part
        return function(objective.replace(inputs=inputs, labels=labels), logits)

    return of


def mean_over_groups(
    function: Callable[[Objective, Any], chex.ArrayTree],
    objective: Objective,
    size: int,
    *,
    logits: chex.ArrayTree | None = None,
    examples_at_once: int | None = None,
    axis_name: _axes.AxisName = None,
) -> Any:
    """The mean of ``function(group, its logits)`` over consecutive groups of ``size`` examples.

    Floating results are averaged in at least float32; of others (step counts) one copy is kept, as
    they are the same for all groups. ``examples_at_once // size`` groups are evaluated side by side,
    or fewer where the batch is not a multiple of that; the result does not depend on it.
    """
    count = count_groups(objective, size)
    grouped = gathered(objective).groups(size)
    # Groups of a few examples leave a processor idle: by default about 16 examples are in work.
    most = (16 if examples_at_once is None else examples_at_once) // size
    side_by_side = _largest_divisor(count, max(1, most))

    one = _on_part(function, objective)

    def several(groups):
        results = jax.vmap(one)(groups)
        return jax.tree.map(lambda x: jnp.mean(x, 0) if _tree.is_floating(x) else x[0], results)

    groups = (grouped.inputs, grouped.labels, _batches.cut(_batches.gathered(logits), count))
    if side_by_side == 1:
        return _mean_over_loop(one, groups, count, axis_name)
    steps = count // side_by_side
    return _mean_over_loop(several, _batches.interleaved(groups, steps), steps, axis_name)


def _mean_over_loop(
    function: Callable[[Any], chex.ArrayTree],
    slices: chex.ArrayTree,
    count: int,
    axis_name: _axes.AxisName,
) -> Any:
    """The mean of a function over the leading axis, in the memory of one call."""
    if count == 1:
        return function(jax.tree.map(lambda x: x[0], slices))
    function = inside_control_flow(function)
    first = jax.tree.map(lambda x: x[0], slices)
    result = jax.eval_shape(function, first)
    leaves, treedef = jax.tree.flatten(result)
    floating = [_tree.is_floating(leaf) for leaf in leaves]

    def step(totals, group):
        outputs = jax.tree.leaves(function(group))
        chosen = [x for x, keep in zip(outputs, floating, strict=True) if keep]
        others = [x for x, keep in zip(outputs, floating, strict=True) if not keep]
        chosen = _axes.to_varying(chosen, axis_name)
        return [t + x.astype(t.dtype) for t, x in zip(totals, chosen, strict=True)], others

    zeros = [
        jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
        for leaf, keep in zip(leaves, floating, strict=True)
        if keep
    ]
    totals, others = jax.lax.scan(step, _axes.to_varying(zeros, axis_name), slices)
    means, copies = iter(totals), iter(others)
    averaged = [
        (next(means) / count).astype(leaf.dtype) if keep else next(copies)[0]
        for leaf, keep in zip(leaves, floating, strict=True)
    ]
    return jax.tree.unflatten(treedef, averaged)
