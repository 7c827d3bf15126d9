"""Groups of examples that share a perturbation, each differentiated by itself: m-SAM."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_sam import _axes, _batches, _tree
from optax_sam.convolutions import inside_control_flow
from optax_sam.objectives import Objective, gathered


def mean_over_groups(
    function: Callable[[Objective, Any], Any],
    objective: Objective,
    size: int,
    params: chex.ArrayTree,
    *,
    logits: chex.ArrayTree | None = None,
) -> Any:
    """The mean of ``function(group, its logits)`` over consecutive groups of ``size`` examples.

    The results may differ along the mapped axes along which ``params`` or the examples differ.

    Each group counts by its share of the objective's weights. Floating results are averaged in at least
    float32; of others (step counts) one copy is kept, as they are the same for all groups. As many
    groups are evaluated side by side as fit into the objective's microbatch, or about 16 examples;
    the result does not depend on it.
    """
    grouped = gathered(objective).groups(size)
    count = objective.batch_size // size
    at_once = 16 if objective.microbatch_size is None else objective.microbatch_size
    side_by_side = _batches.largest_divisor(count, max(1, at_once // size))
    examples = (*grouped.examples, _batches.cut(_batches.gathered(logits), count))
    shares = _batches.shares(grouped.weights, count)

    def one(group: Any) -> Any:
        *examples, logits = group
        part = objective.with_examples(tuple(examples))
        return function(part, logits)

    def several(part: Any) -> Any:
        groups, shares = part
        of_groups = jax.vmap(one, spmd_axis_name=objective.spmd_axis_name)
        results = of_groups(groups) if side_by_side > 1 else _expand(one(_first(groups)))

        def average(x: jax.Array) -> jax.Array:
            if not _tree.is_floating(x):
                return x[0]
            wide = x.astype(_tree.accumulation_dtype(x))
            exact = jax.lax.Precision.HIGHEST  # accelerators would round the gradients
            return jnp.tensordot(shares.astype(wide.dtype), wide, 1, precision=exact)

        return jax.tree.map(average, results)

    steps = count // side_by_side
    summed = _sum_over_loop(several, _batches.interleaved((examples, shares), steps), params)
    like = jax.eval_shape(one, _first(examples))
    return jax.tree.map(lambda x, like: x.astype(like.dtype), summed, like)


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _expand(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)


def _sum_over_loop(function: Callable[[Any], Any], parts: Any, params: Any) -> Any:
    """The sum of a function over the leading axis, in the memory of one call."""
    if len(jax.tree.leaves(parts)[0]) == 1:
        return function(_first(parts))
    function = inside_control_flow(function)
    leaves, treedef = jax.tree.flatten(jax.eval_shape(function, _first(parts)))
    floating = [_tree.is_floating(leaf) for leaf in leaves]

    def split(values: list[Any], keep: bool) -> list[Any]:
        return [
            value
            for value, is_floating in zip(values, floating, strict=True)
            if is_floating == keep
        ]

    def step(totals: list[jax.Array], part: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        outputs = jax.tree.leaves(function(part))
        sums = [t + x for t, x in zip(totals, split(outputs, True), strict=True)]
        return _axes.to_varying_like(sums, (params, parts)), split(outputs, False)

    zeros = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in split(leaves, True)]
    totals, others = jax.lax.scan(step, _axes.to_varying_like(zeros, (params, parts)), parts)
    sums, copies = iter(totals), iter(others)
    merged = [next(sums) if is_floating else next(copies)[0] for is_floating in floating]
    return jax.tree.unflatten(treedef, merged)
