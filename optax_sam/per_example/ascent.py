r"""The first pass: every group's gradient :math:`g_j` at w and its norm, for some groups at once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_sam import _tree
from optax_sam._axes import to_varying_like
from optax_sam.per_example import plan as plans
from optax_sam.per_example.factors import Term
from optax_sam.per_example.places import Place
from optax_sam.per_example.plan import Arrays, LeafPlan, Plan
from optax_sam.per_example.sites import site_of
from optax_sam.per_example.trace import Trace
from optax_sam.per_example.walk import ParameterValue, walk


class Ascent(NamedTuple):
    """What the first pass knows about each group (leading axis, but in loops: the groups).

    Attributes:
      losses: the losses at w.
      logits: the logits at w, a list of leaves.
      captured: inputs of each site, by its place; the axis of the groups is behind those of the loops
        around the site.
      cotangents: derivative in the output of each site, likewise.
      gradients: g_j of the leaves whose plan is a kernel or a gradient of its own, by leaf; the axis of
        the groups is :attr:`~optax_sam.per_example.plan.LeafPlan.group_axis`.
      terms: g_j in thin matrices of the leaves whose plan is Gram matrices, by leaf; likewise.
      squared_norms: ‖g_j‖² of each leaf, zero for leaves that are not perturbed.
    """

    losses: jax.Array
    logits: list[jax.Array]
    captured: Arrays
    cotangents: Arrays
    gradients: dict[int, jax.Array]
    terms: dict[int, tuple[Term, ...]]
    squared_norms: list[jax.Array]


class Recorder:
    """Keeps each site's inputs, and adds a tap to its output.

    A tap is a zero; the derivative in the tap is the derivative in the output. No gradient of the
    weights is computed for it, which makes this pass a third cheaper than an ordinary gradient.
    """

    def __init__(self, taps: Arrays):
        self.taps = taps
        self.captured: Arrays = {}

    def given(self, loop: Place) -> Arrays:
        return {place: tap for place, tap in self.taps.items() if loop.holds(place)}

    def branch(self, given: Arrays) -> "Recorder":
        return Recorder(self.taps | given)

    def at_site(
        self,
        place: Place,
        equation: Any,
        position: int,
        inputs: jax.Array,
        parameter: ParameterValue,
    ) -> jax.Array:
        self.captured[place] = inputs
        output = site_of(equation, position).apply(inputs, parameter.clean)
        return output + self.taps[place]

    def resolve(self, parameter: ParameterValue, reason: str) -> jax.Array:
        raise AssertionError(f"leaf {parameter.leaf} was planned as a site, but it is {reason}")


def ascend(trace: Trace, plan: Plan, leaves: list[jax.Array], groups: Any) -> Ascent:
    """Every group's gradient at w, in the form that the plan asks for."""
    taps = {
        use.place: jnp.zeros(use.tap_shape, use.site.output_type.dtype)
        for leaf in plan.leaves
        for use in leaf.uses
    }
    taps = to_varying_like(taps, (leaves, groups))
    others = {
        index: leaves[index]
        for index, leaf in enumerate(plan.leaves)
        if not leaf.uses and leaf.method != plans.CONSTANT
    }

    def loss(taps: Arrays, others: dict[int, jax.Array], group: Any) -> tuple[jax.Array, Any]:
        recorder = Recorder(taps)
        arguments: list[Any] = [
            ParameterValue(array, leaf=index) if leaf.uses else others.get(index, array)
            for index, (leaf, array) in enumerate(zip(plan.leaves, leaves, strict=True))
        ]
        logits = walk(trace.jaxpr, [*arguments, *jax.tree.leaves(group)], recorder)
        value = trace.loss(trace.logits(logits), group)
        return value, (logits, recorder.captured)

    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    loops = {place: len(place.rounds) for place in taps}
    of_groups = jax.vmap(
        gradient,
        (None, None, 0),
        ((0, (0, loops)), (loops, 0)),
        spmd_axis_name=trace.objective.spmd_axis_name,
    )
    (losses, (logits, captured)), (cotangents, gradients) = of_groups(taps, others, groups)
    terms = {}
    for index, leaf in enumerate(plan.leaves):
        if leaf.method == plans.KERNEL:
            gradients[index] = leaf.gradients(captured, cotangents)
        elif leaf.method == plans.GRAM:
            terms[index] = leaf.terms(captured, cotangents)
    dtype = _tree.accumulation_dtype([*gradients.values(), *cotangents.values()])

    def squared_norms(index: int, leaf: LeafPlan) -> jax.Array:
        if leaf.method == plans.GRAM:
            return leaf.squared_norms(terms[index])
        if leaf.is_perturbed:
            return jax.vmap(lambda g: _tree.dot(g, g), leaf.group_axis)(gradients[index])
        return jnp.zeros_like(losses)

    squares = [squared_norms(index, leaf).astype(dtype) for index, leaf in enumerate(plan.leaves)]
    return Ascent(losses, logits, captured, cotangents, gradients, terms, squares)


def clean_gradients(
    plan: Plan, leaves: list[jax.Array], ascent: Ascent, shares: jax.Array
) -> list[jax.Array]:
    """The gradient at w of these groups, each counted by its share of the batch."""

    def weighted(cotangents: jax.Array, axis: int) -> jax.Array:
        weights = shares.astype(cotangents.dtype)
        return weights.reshape(-1, *(1,) * (cotangents.ndim - axis - 1)) * cotangents

    def one(index: int, leaf: LeafPlan, array: jax.Array) -> jax.Array:
        if leaf.method == plans.CONSTANT:
            return jnp.zeros_like(array)
        if index in ascent.gradients:
            gradients = ascent.gradients[index]
            weights, exact = shares.astype(gradients.dtype), jax.lax.Precision.HIGHEST
            return jnp.tensordot(weights, gradients, (0, leaf.group_axis), precision=exact)
        cotangents = {
            use.place: weighted(ascent.cotangents[use.place], len(use.place.rounds))
            for use in leaf.uses
        }
        return leaf.summed_gradient(ascent.captured, cotangents)

    return [
        one(index, leaf, array)
        for index, (leaf, array) in enumerate(zip(plan.leaves, leaves, strict=True))
    ]
