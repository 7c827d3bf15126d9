r"""The first pass: every group's gradient :math:`g_j` at w and its norm, for a chunk of groups."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_sam import _tree
from optax_sam.per_example import plan as plans
from optax_sam.per_example.plan import LeafPlan, Plan
from optax_sam.per_example.sites import site_of
from optax_sam.per_example.trace import Trace
from optax_sam.per_example.varying import to_varying_like
from optax_sam.per_example.walk import ParameterValue, walk


class Ascent(NamedTuple):
    """What the first pass knows about each group of a chunk (leading axis: the groups).

    Attributes:
      losses: the losses at w.
      logits: the logits at w, a list of leaves.
      captured: inputs of each site, by leaf.
      cotangents: derivative in the output of each site, by leaf.
      gradients: g_j of the leaves whose plan is a kernel or a gradient of its own, by leaf.
      norms: ‖g_j‖ over the perturbed leaves.
    """

    losses: jax.Array
    logits: list[jax.Array]
    captured: dict[int, jax.Array]
    cotangents: dict[int, jax.Array]
    gradients: dict[int, jax.Array]
    norms: jax.Array


class _Recorder:
    """Keeps each site's inputs, and adds a tap to its output.

    A tap is a zero; the derivative in the tap is the derivative in the output. No gradient of the
    weights is computed for it, which makes this pass a third cheaper than an ordinary gradient.
    """

    enters_loops = False

    def __init__(self, taps: dict[int, jax.Array]):
        self.taps = taps
        self.captured: dict[int, jax.Array] = {}

    def branch(self):
        return _Recorder(self.taps)

    def at_site(self, equation, position, inputs, parameter):
        self.captured[parameter.leaf] = inputs
        output = site_of(equation, position).apply(inputs, parameter.clean)
        return output + self.taps[parameter.leaf]

    def resolve(self, parameter, reason):
        raise AssertionError(f"leaf {parameter.leaf} was planned as a site, but it is {reason}")


def ascend(trace: Trace, plan: Plan, leaves: list[jax.Array], groups: Any) -> Ascent:
    """Every group's gradient at w, in the form that the plan asks for."""
    sites = {index: leaf for index, leaf in enumerate(plan.leaves) if leaf.site is not None}
    taps = {
        index: jnp.zeros(leaf.site.output_type.shape, leaf.site.output_type.dtype)
        for index, leaf in sites.items()
    }
    taps = to_varying_like(taps, (leaves, groups))
    others = {
        index: leaves[index]
        for index, leaf in enumerate(plan.leaves)
        if index not in sites and leaf.method != plans.CONSTANT
    }

    def loss(taps, others, group):
        recorder = _Recorder(taps)
        arguments = [
            ParameterValue(leaf, leaf=index) if index in sites else others.get(index, leaf)
            for index, leaf in enumerate(leaves)
        ]
        logits = walk(trace.jaxpr, [*arguments, *jax.tree.leaves(group)], recorder)
        value = trace.loss(trace.logits(logits), group)
        return value, (logits, recorder.captured)

    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (losses, (logits, captured)), (cotangents, gradients) = jax.vmap(gradient, (None, None, 0))(
        taps, others, groups
    )
    for index, leaf in sites.items():
        if leaf.method == plans.KERNEL:
            kernels = jax.vmap(leaf.site.weight_gradient)(captured[index], cotangents[index])
            gradients[index] = jax.vmap(leaf.gradient_in_leaf)(kernels)
    norms = _norms(plan, captured, cotangents, gradients)
    return Ascent(losses, logits, captured, cotangents, gradients, norms)


def _norms(plan: Plan, captured, cotangents, gradients) -> jax.Array:
    dtype = _tree.accumulation_dtype(list(gradients.values()) + list(cotangents.values()))
    squares = []
    for index, leaf in enumerate(plan.leaves):
        if leaf.method == plans.GRAM:
            squares.append(jax.vmap(leaf.site.squared_norm)(captured[index], cotangents[index]))
        elif leaf.is_perturbed:
            squares.append(jax.vmap(lambda g: _tree.dot(g, g))(gradients[index]))
    return jnp.sqrt(sum(square.astype(dtype) for square in squares))


def clean_gradients(
    trace: Trace, plan: Plan, leaves: list[jax.Array], ascent: Ascent
) -> list[jax.Array]:
    """The chunk's share of the gradient at w of the mean over the whole batch."""
    share = 1 / trace.count

    def one(index, leaf, array):
        if leaf.method == plans.CONSTANT:
            return jnp.zeros_like(array)
        if index in ascent.gradients:
            return share * jnp.sum(ascent.gradients[index], axis=0)
        return _summed_gradient(leaf, ascent.captured[index], share * ascent.cotangents[index])

    return [
        one(index, leaf, array)
        for index, (leaf, array) in enumerate(zip(plan.leaves, leaves, strict=True))
    ]


def _summed_gradient(leaf: LeafPlan, captured: jax.Array, cotangents: jax.Array) -> jax.Array:
    """One product over all groups and positions, as in an ordinary backward pass."""
    site = leaf.site

    def outputs(weights):
        return jax.vmap(site.apply, (0, None))(captured, weights)

    (gradient,) = jax.linear_transpose(outputs, site.weight_type)(cotangents)
    return leaf.gradient_in_leaf(gradient)
