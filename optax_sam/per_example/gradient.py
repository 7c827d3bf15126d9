"""Exact sharpness-aware gradients per example or group, at about the cost of one per batch."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from optax_sam import _batches, _masks, _tree
from optax_sam._hyperparameters import check_integer
from optax_sam.convolutions import inside_control_flow
from optax_sam.objectives import Objective, require_objective
from optax_sam.per_example.ascent import ascend, clean_gradients
from optax_sam.per_example.descent import EVALUATIONS, Evaluation, descend
from optax_sam.per_example.independence import check_independence
from optax_sam.per_example.plan import Plan, make_plan
from optax_sam.per_example.trace import Trace, trace
from optax_sam.per_example.varying import to_varying_like


class PerExampleResult(NamedTuple):
    """Means over the groups of a batch.

    Attributes:
      loss: scalar, the loss at w.
      perturbed_loss: scalar, mean of the losses at w + ε_j.
      gradients: pytree like the parameters, the direction to descend along.
      clean_gradients: pytree like the parameters, the gradient of the loss at w. Free under ``jit``
        if nobody uses it.
      gradient_norm: scalar, mean of ‖g_j‖ over the perturbed leaves.
      perturbation_norm: scalar, mean of ‖ε_j‖: ρ, unless some gradients vanish.
    """

    loss: jax.Array
    perturbed_loss: jax.Array
    gradients: chex.ArrayTree
    clean_gradients: chex.ArrayTree
    gradient_norm: jax.Array
    perturbation_norm: jax.Array


def per_example_gradient(
    objective: Objective,
    params: chex.ArrayTree,
    rho: chex.Numeric,
    *,
    evaluation: Evaluation = "full",
    group_size: int = 1,
    chunk_size: int | None = None,
    mask: _masks.Mask | Callable[[chex.ArrayTree], _masks.Mask] | None = None,
) -> PerExampleResult:
    r"""The gradient of m-SAM: every group of m examples climbs along its own gradient.

    .. math::
       \epsilon_j = \rho \frac{g_j}{\|g_j\|}, \quad g_j = \nabla L_j(w), \qquad
       \frac{m}{B} \sum_j \nabla L_j(w + \epsilon_j)

    with :math:`L_j` the mean loss of group j: m consecutive examples, and with m = 1 (1-SAM) a single
    one. The result is exact: equal to differentiating every group by itself, up to rounding. What
    differs is the cost, about that of SAM with one perturbation for the batch. The loss is traced
    once; where a parameter meets the data in a matrix product, a convolution or a row lookup, its
    gradient, its norm and the perturbed output are computed by the formulas of
    :mod:`optax_sam.per_example.sites`; everywhere else by ordinary differentiation. :func:`explain`
    prints which is which.

    Randomness: a group is traced as a batch of m. A dropout key that ``apply_fn`` closes over
    therefore gives all groups the same masks (the same in both passes). For masks per example, pass
    one key per example as part of ``inputs``.

    Networks that mix the examples of a batch (BatchNorm in batch mode) have no loss per example. For
    m = 1 they are refused; :func:`optax_sam.per_example.independence.check_independence` says what
    cannot be detected. In larger groups they mix the examples of each group.

    Args:
      objective: the supervised loss.
      params: pytree of parameters w; integer leaves are passed on and get zero gradients.
      rho: ρ, the norm of every perturbation; a number or a traced scalar.
      evaluation: ``"full"`` for 1-SAM; ``"jacobian_only"`` for 1-J-SAM, the network's Jacobian at
        w + ε_j and the logit term at w; ``"logit_only"`` for 1-L-SAM, the reverse.
      group_size: m, the number of examples that share a perturbation; must divide the batch.
      chunk_size: number of examples processed at once (at least a group), which bounds the memory;
        the result does not depend on it. A last, smaller chunk takes what it does not divide. None
        chooses: about 8 for convolutional networks and where weights are copied, else the batch.
      mask: pytree of bools like the parameters (or a prefix, or a function of the parameters): where
        False, a leaf is not perturbed and does not count in ‖g_i‖.

    Returns:
      A :class:`PerExampleResult`.

    Raises:
      TypeError: if ``objective`` is not an :class:`optax_sam.Objective`.
      ValueError: if the network mixes the examples of the batch, or for an unknown ``evaluation``.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> from optax_sam.per_example import per_example_gradient
      >>> objective = optax_sam.Objective(lambda w, x: x @ w, jnp.eye(2), jnp.array([0, 1]))
      >>> result = per_example_gradient(objective, jnp.zeros((2, 2)), 0.1)
      >>> round(float(result.gradient_norm), 4), round(float(result.perturbation_norm), 4)
      (0.7071, 0.1)

    References:
      Foret et al., Sharpness-Aware Minimization, ICLR 2021, arXiv 2010.01412 (m-sharpness, m = 1).
      Baek, Kolter, Raghunathan, Why is SAM Robust to Label Noise?, ICLR 2024, arXiv 2405.03676.
    """
    objective = require_objective(objective, "a perturbation per example")
    check_integer("group_size", group_size, minimum=1)
    if evaluation not in EVALUATIONS:
        raise ValueError(f"evaluation must be one of {EVALUATIONS}, got {evaluation!r}.")
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size, minimum=1)
    flags = tuple(jax.tree.leaves(_masks.resolve_mask("mask", mask, params)))
    is_traced = any(
        isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((objective, params, rho))
    )
    # Inside a caller's jit a second boundary buys nothing.
    compute = _compute if is_traced else _compute_compiled
    return compute(objective, params, rho, evaluation, group_size, chunk_size, flags)


def is_worthwhile(
    objective: Objective, params: chex.ArrayTree, mask: _masks.Mask, group_size: int
) -> bool:
    """Whether the fast path is faster than differentiating each group by itself."""
    traced = trace(objective, params, group_size)
    plan = make_plan(traced, jax.tree.leaves(params), jax.tree.leaves(mask))
    return plan.suits_groups_of(group_size)


def _compute(objective, params, rho, evaluation, group_size, chunk_size, flags) -> PerExampleResult:
    if group_size == 1:
        check_independence(objective, params)
    means = functools.partial(
        _means,
        evaluation=evaluation,
        group_size=group_size,
        chunk_size=chunk_size,
        perturbed=flags,
    )

    @jax.custom_jvp
    def gradient(objective, params, rho):
        return means(objective, params, rho, follow=True)

    @gradient.defjvp
    def derivative(primals, tangents):
        # The fast path treats the perturbations as constants where that saves work, so it has no
        # derivative of its own; that of the plain computation is exact.
        return jax.jvp(functools.partial(means, follow=False), primals, tangents)

    return gradient(objective, params, jnp.asarray(rho))


_compute_compiled = jax.jit(_compute, static_argnums=(3, 4, 5, 6))

_SLOW = (
    "the fast path for perturbations per example or group cannot follow this network and "
    "differentiates every one by itself, which is exact but slow: "
)


def _means(
    objective: Objective,
    params: chex.ArrayTree,
    rho: jax.Array,
    *,
    evaluation: Evaluation,
    group_size: int,
    chunk_size: int | None,
    perturbed: tuple[bool, ...],
    follow: bool,
) -> PerExampleResult:
    """The result, by following the parameters through the traced loss or by plain differentiation."""
    leaves, treedef = jax.tree.flatten(params)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    traced = trace(objective, params, group_size)
    plan = make_plan(traced, leaves, perturbed)
    means_of = functools.partial(
        _means_over_batch, traced, evaluation=evaluation, chunk_size=chunk_size
    )
    if follow:
        result = _follow_or_fall_back(means_of, plan, leaves, rho)
    else:
        result = means_of(plan.without_following("not wanted"), leaves, rho)
    return result._replace(
        gradients=_restore(result.gradients, leaves, treedef),
        clean_gradients=_restore(result.clean_gradients, leaves, treedef),
    )


def _follow_or_fall_back(means_of, plan: Plan, leaves, rho) -> PerExampleResult:
    if not plan.failure:
        try:
            return means_of(plan, leaves, rho)
        except Exception as error:  # the user's own errors came up when the network was traced
            plan = plan.without_following(str(error))
    warnings.warn(_SLOW + plan.failure, stacklevel=2)
    return means_of(plan, leaves, rho)


def _restore(gradients: list[jax.Array], leaves: list[jax.Array], treedef) -> chex.ArrayTree:
    restored = [g.astype(leaf.dtype) for g, leaf in zip(gradients, leaves, strict=True)]
    return jax.tree.unflatten(treedef, restored)


def _means_over_batch(
    traced: Trace,
    plan: Plan,
    leaves: list[jax.Array],
    rho: jax.Array,
    *,
    evaluation: Evaluation,
    chunk_size: int | None,
) -> PerExampleResult:
    """The result with leaves in place of pytrees, chunk by chunk."""
    if chunk_size is None:
        size = plan.groups_at_once(traced.count, traced.group_size)
    else:
        size = min(max(1, chunk_size // traced.group_size), traced.count)
    share_of: Callable[..., PerExampleResult] = functools.partial(
        _share_of_chunk, traced, plan, evaluation
    )
    if plan.has_convolution:
        share_of = inside_control_flow(share_of)
    if size == traced.count:
        return share_of(leaves, rho, traced.groups)
    count, remainder = divmod(traced.count, size)
    cut = count * size
    chunks = _batches.interleaved(jax.tree.map(lambda leaf: leaf[:cut], traced.groups), count)
    sums = _sum_over_loop(lambda chunk: share_of(leaves, rho, chunk), chunks, (leaves, chunks))
    if not remainder:
        return sums
    rest = jax.tree.map(lambda leaf: leaf[cut:], traced.groups)
    return jax.tree.map(jnp.add, sums, share_of(leaves, rho, rest))


def _sum_over_loop(function: Callable[[Any], Any], chunks: Any, like: Any) -> Any:
    """``sum(function(chunk) for chunk in chunks)`` in one compiled loop."""
    first = jax.tree.map(lambda leaf: leaf[0], chunks)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, first)
    )

    def add(sums, chunk):
        sums = jax.tree.map(jnp.add, sums, function(chunk))
        return to_varying_like(sums, like), None

    return lax.scan(add, to_varying_like(zeros, like), chunks)[0]


def _share_of_chunk(
    traced: Trace, plan: Plan, evaluation: Evaluation, leaves, rho, groups
) -> PerExampleResult:
    """What one chunk adds to the means over the batch, in at least float32.

    The division by the number of groups is inside the differentiation, where it costs nothing; dividing
    the gradients at the end would be one more pass over all parameters.
    """
    ascent = ascend(traced, plan, leaves, groups)
    scales = _tree.divide_or_zero(rho.astype(ascent.norms.dtype), ascent.norms)
    perturbed_loss, gradients = descend(traced, plan, ascent, scales, leaves, groups, evaluation)
    share = PerExampleResult(
        loss=jnp.sum(ascent.losses) / traced.count,
        perturbed_loss=perturbed_loss,
        gradients=gradients,
        clean_gradients=clean_gradients(traced, plan, leaves, ascent),
        gradient_norm=jnp.sum(ascent.norms) / traced.count,
        perturbation_norm=jnp.sum(scales * ascent.norms) / traced.count,
    )
    dtype = _tree.accumulation_dtype(leaves)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), share)
