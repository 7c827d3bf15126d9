r"""The second pass: the gradient of some groups, each at its own :math:`w + \epsilon_j`."""

from typing import Any, Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from optax_sam import _tree
from optax_sam.per_example.ascent import Ascent
from optax_sam.per_example.factors import Term, times_gradient
from optax_sam.per_example.places import Place
from optax_sam.per_example.plan import Arrays, Plan
from optax_sam.per_example.sites import Site, site_of
from optax_sam.per_example.trace import Trace
from optax_sam.per_example.walk import ParameterValue, resolve_all, walk

Evaluation = Literal["full", "jacobian_only", "logit_only"]
EVALUATIONS = get_args(Evaluation)


def descend(
    trace: Trace,
    plan: Plan,
    ascent: Ascent,
    factors: list[jax.Array],
    leaves: list[jax.Array],
    groups: Any,
    shares: jax.Array,
    evaluation: Evaluation,
) -> tuple[jax.Array, list[jax.Array]]:
    """The scaled loss at the groups' own w + ε_j and the gradients to descend along.

    Both are these groups' share of the mean over the whole batch, without the penalty.

    Args:
      trace: the traced network.
      plan: the plan of every leaf.
      ascent: what the first pass found.
      factors: for each leaf ε_j / g_j, one per group.
      leaves: the parameter leaves w.
      groups: their examples, leading axis the groups.
      shares: what each group counts in the mean over the batch.
      evaluation: which factors of the gradient are perturbed.
    """
    floating = [_tree.is_floating(leaf) for leaf in leaves]

    def with_constants(free: list[jax.Array]) -> list[jax.Array]:
        rest = iter(free)
        return [next(rest) if f else leaf for f, leaf in zip(floating, leaves, strict=True)]

    def perturbed(free: list[jax.Array]) -> chex.ArrayTree:
        return perturbed_logits(trace, plan, ascent, factors, with_constants(free), groups)

    def clean(free: list[jax.Array]) -> chex.ArrayTree:
        return clean_logits(trace, with_constants(free), groups)

    def total_loss(logits: chex.ArrayTree) -> jax.Array:
        losses = jax.vmap(trace.loss)(logits, groups)
        return jnp.sum(losses * shares.astype(losses.dtype))

    def logit_terms(logits: chex.ArrayTree) -> chex.ArrayTree:
        return jax.grad(total_loss)(logits)

    free = [leaf for f, leaf in zip(floating, leaves, strict=True) if f]
    if evaluation == "full":
        loss, gradients = jax.value_and_grad(lambda free: total_loss(perturbed(free)))(free)
    elif evaluation == "jacobian_only":
        logits, pull_back = jax.vjp(perturbed, free)
        loss = total_loss(logits)
        (gradients,) = pull_back(logit_terms(trace.logits(ascent.logits)))
    else:
        logits = perturbed(free)
        loss = total_loss(logits)
        _, pull_back = jax.vjp(clean, free)
        (gradients,) = pull_back(logit_terms(logits))
    found = iter(gradients)
    zeros = map(jnp.zeros_like, leaves)
    return loss, [next(found) if f else zero for f, zero in zip(floating, zeros, strict=True)]


class _Perturber:
    """Applies weights that differ from group to group.

    Attributes:
      transposed: whether the weights at a place are the transpose of the leaf's gradient.
    """

    def __init__(self, transposed: dict[Place, bool]):
        self.transposed = transposed
        self.captured: Arrays = {}

    def given(self, loop: Place) -> Arrays:
        return {}

    def branch(self, given: Arrays) -> "_Perturber":
        return self  # it captures nothing

    def at_site(
        self,
        place: Place,
        equation: Any,
        position: int,
        inputs: jax.Array,
        parameter: ParameterValue,
    ) -> jax.Array:
        site: Any = site_of(equation, position)
        parameter = parameter.settled()
        if parameter.perturbed is not None:
            return _own_weights(site, inputs, parameter.clean, parameter.perturbed)
        output = site.apply(inputs, parameter.clean)
        product: Any = times_gradient(site.rows(inputs), parameter.gradient, self.transposed[place])
        # The factor first: the gradient's part may be larger than float16 can hold.
        return jnp.asarray(output + site.from_output_matrix(parameter.factor * product))

    def resolve(self, parameter: ParameterValue, reason: str) -> jax.Array:
        return parameter.value


def _own_weights(
    site: Site, inputs: jax.Array, clean: jax.Array, perturbed: jax.Array
) -> jax.Array:
    """``op(x, w + ε_j)``, with the derivative in w taken as that of ``op(x, w)``.

    The two derivatives are equal, since the operation is linear in the weights; but w is the same for
    all groups, so the second one is summed over the groups as it is computed. Differentiating
    through w + ε_j would form a second gradient for every group first.
    """

    @jax.custom_jvp
    def product(inputs: jax.Array, clean: jax.Array, perturbed: jax.Array) -> jax.Array:
        del clean
        return site.apply_own(inputs, perturbed)

    def derivative(primals: Any, tangents: Any) -> Any:
        inputs, clean, perturbed = primals
        inputs_tangent, clean_tangent, _ = tangents
        # The data itself, and the indices of an embedding, have no tangent.
        terms = []
        if not isinstance(inputs_tangent, SymbolicZero):
            terms.append(site.apply_own(inputs_tangent, perturbed))
        if not isinstance(clean_tangent, SymbolicZero):
            terms.append(site.apply(inputs, clean_tangent))
        outputs = product(inputs, clean, perturbed)
        return outputs, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(outputs)

    product.defjvp(derivative, symbolic_zeros=True)
    output: jax.Array = product(inputs, clean, jax.lax.stop_gradient(perturbed))
    return output


def perturbed_logits(
    trace: Trace,
    plan: Plan,
    ascent: Ascent,
    factors: list[jax.Array],
    leaves: list[jax.Array],
    groups: Any,
) -> chex.ArrayTree:
    """The logits of every group at its own w + ε_j; differentiable in ``leaves``, which is w."""

    transposed = {
        use.place: flag
        for leaf in plan.leaves
        for use, flag in zip(leaf.uses, leaf.transposed, strict=False)
    }

    def one(
        leaves: list[jax.Array],
        factors: list[jax.Array],
        gradients: dict[int, jax.Array],
        terms: dict[int, tuple[Term, ...]],
        group: Any,
    ) -> list[Any]:
        arguments: list[Any] = []
        for index, (leaf, array) in enumerate(zip(plan.leaves, leaves, strict=True)):
            if leaf.is_perturbed:
                gradient = terms[index] if index in terms else gradients[index]
                value = ParameterValue(array, gradient=gradient, factor=factors[index], leaf=index)
                # Without following it, the program has to take the sum as it is.
                arguments.append(value.value if plan.failure else value)
            else:
                arguments.append(array)
        visitor = _Perturber(transposed)
        logits = walk(trace.jaxpr, [*arguments, *jax.tree.leaves(group)], visitor)
        return resolve_all(logits, visitor, "is itself a logit")

    axes = [
        {index: plan.leaves[index].group_axis for index in found}
        for found in (ascent.gradients, ascent.terms)
    ]
    axis = trace.objective.spmd_axis_name
    of_groups = jax.vmap(one, (None, 0, *axes, 0), spmd_axis_name=axis)
    logits = of_groups(leaves, factors, ascent.gradients, ascent.terms, groups)
    return trace.logits(logits)


def clean_logits(trace: Trace, leaves: list[jax.Array], groups: Any) -> chex.ArrayTree:
    """The logits of every group at w."""

    def one(leaves: list[jax.Array], group: Any) -> list[Any]:
        return walk(trace.jaxpr, [*leaves, *jax.tree.leaves(group)], _Perturber({}))

    axis = trace.objective.spmd_axis_name
    logits = jax.vmap(one, (None, 0), spmd_axis_name=axis)(leaves, groups)
    return trace.logits(logits)
