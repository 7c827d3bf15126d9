"""Exact sharpness-aware gradients per example or group, at about the cost of one per batch."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_sam import _batches, _masks, _tree
from optax_sam._axes import to_varying_like
from optax_sam._hyperparameters import check_integer, check_number
from optax_sam.convolutions import inside_control_flow
from optax_sam.independence import check_independence, warn_if_unproved
from optax_sam.objectives import Objective, require_objective
from optax_sam.per_example.ascent import ascend, clean_gradients
from optax_sam.per_example.descent import EVALUATIONS, Evaluation, descend
from optax_sam.per_example.multiples import Multiples, multiples_of
from optax_sam.per_example.plan import Plan, make_plan
from optax_sam.per_example.trace import Trace, trace
from optax_sam.perturbations.normalized import normalized


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
    mask: _masks.MaskOrFunction = None,
) -> PerExampleResult:
    r"""The gradient of m-SAM: every group of m examples climbs along its own gradient.

    .. math::
       \epsilon_j = \rho \frac{g_j}{\|g_j\|}, \quad g_j = \nabla L_j(w), \qquad
       \frac{m}{B} \sum_j \nabla L_j(w + \epsilon_j)

    with :math:`L_j` the mean loss of group j: m consecutive examples, and with m = 1 (1-SAM) a single
    one. The result is exact: equal to differentiating every group by itself, up to rounding, as long as
    the squares of the norms are numbers of their dtype: in float32, for norms between about 1e-19 and
    1e19. What differs is the cost, about that of SAM with one perturbation for the batch. The loss is
    traced once; where a parameter meets the data in a matrix product, a convolution or a row lookup,
    its gradient, its norm and the perturbed output are computed by the formulas of
    :mod:`optax_sam.per_example.sites`; everywhere else by ordinary differentiation.
    :func:`optax_sam.explain` tells which is which.

    Randomness: a group is traced as a batch of m. A dropout key that ``apply_fn`` closes over
    therefore gives all groups the same masks (the same in both passes). For masks per example, pass
    one key per example as part of ``inputs``.

    Networks that mix the examples of a batch (BatchNorm in batch mode) have no loss per example. For
    m = 1 they are refused; :func:`optax_sam.independence.check_independence` says what
    cannot be detected. In larger groups they mix the examples of each group.

    Args:
      objective: the supervised loss, without a penalty. Its ``microbatch_size`` is how many examples
        are computed at once (at least a group), which bounds the memory; without it about 8 for
        convolutional networks and where weights are copied, else as many as keep no more numbers than
        there are parameters, or as have 512 positions, though then at most half of the batch; fewer
        where something is rematerialized and 8 keep over twice as many numbers.
      params: pytree of parameters w; integer leaves are passed on and get zero gradients.
      rho: ρ, the norm of every perturbation; a number or a traced scalar.
      evaluation: ``"full"`` for 1-SAM; ``"jacobian_only"`` for 1-J-SAM, the network's Jacobian at
        w + ε_j and the logit term at w; ``"logit_only"`` for 1-L-SAM, the reverse.
      group_size: m, the number of examples that share a perturbation; must divide the batch.
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
    check_number("rho", rho, minimum=0)
    state = jnp.asarray(rho)
    result, _ = gradient_of_groups(
        objective,
        params,
        _NORMALIZED,
        state,
        evaluation=evaluation,
        group_size=group_size,
        mask=mask,
    )
    return result


def _normalized_by_state(
    updates: optax.Updates, state: jax.Array, params: optax.Params | None = None
) -> tuple[optax.Updates, jax.Array]:
    stage = normalized(state)
    return stage.update(updates, optax.EmptyState(), params)[0], state


# The normalized perturbation whose radius is its state, so that it may be traced.
_NORMALIZED = optax.with_extra_args_support(
    optax.GradientTransformation(lambda params: jnp.zeros([]), _normalized_by_state)
)


def gradient_of_groups(
    objective: Objective,
    params: chex.ArrayTree,
    stage: optax.GradientTransformationExtraArgs,
    state: optax.OptState,
    *,
    extra_args: dict[str, Any] | None = None,
    evaluation: Evaluation = "full",
    group_size: int = 1,
    mask: _masks.MaskOrFunction = None,
) -> tuple[PerExampleResult, optax.OptState]:
    """:func:`per_example_gradient` for any first stage that gives multiples of the gradient.

    Args:
      objective: the supervised loss.
      params: the parameters w.
      stage: the first stage.
      state: its state.
      extra_args: further arguments of its ``update``.
      evaluation: which factors of the gradient are perturbed.
      group_size: m, the number of examples that share a perturbation.
      mask: which leaves are perturbed.

    Returns:
      The result, and the state of the stage after the step.

    Raises:
      NotAMultipleError: if the stage's perturbation is no multiple of the gradient.
      ValueError: as :func:`per_example_gradient`.
    """
    if evaluation not in EVALUATIONS:
        raise ValueError(f"evaluation must be one of {EVALUATIONS}, got {evaluation!r}.")
    if objective.penalty is not None:
        raise ValueError(
            "per_example_gradient takes no penalty: every group would need a gradient of it at its own "
            "point. Use a method with group_size=, which differentiates every group by itself then."
        )
    check_integer("group_size", group_size, minimum=1)
    _batches.count_parts(objective.batch_size, group_size, "group_size")
    flags = tuple(jax.tree.leaves(_masks.resolve_mask("mask", mask, params)))
    arrays = (objective, params, state)
    # A stage may close over a tracer; inside a caller's jit a second boundary buys nothing anyway.
    is_traced = any(
        isinstance(leaf, jax.core.Tracer) for leaf in [*jax.tree.leaves(arrays), jnp.zeros([])]
    )
    if is_traced or extra_args:  # which may be anything, also what cannot cross a jit boundary
        stage = _with_arguments(stage, extra_args or {})
        return _compute(objective, params, state, stage, evaluation, group_size, flags)
    compiled: tuple[PerExampleResult, optax.OptState] = _compute_compiled(
        objective, params, state, stage, evaluation, group_size, flags
    )
    return compiled


def _with_arguments(
    stage: optax.GradientTransformationExtraArgs, extra_args: dict[str, Any]
) -> optax.GradientTransformationExtraArgs:
    update = functools.partial(stage.update, **extra_args)
    return optax.GradientTransformationExtraArgs(stage.init, update)


def _compute(
    objective: Objective,
    params: chex.ArrayTree,
    state: optax.OptState,
    stage: optax.GradientTransformationExtraArgs,
    evaluation: Evaluation,
    group_size: int,
    flags: tuple[bool, ...],
) -> tuple[PerExampleResult, optax.OptState]:
    if group_size == 1:
        warn_if_unproved("group_size=1", check_independence(objective, params))
    multiples, new_state = multiples_of(stage, state, params, {})
    means = functools.partial(_means, evaluation=evaluation, group_size=group_size, perturbed=flags)

    @jax.custom_jvp
    def gradient(
        objective: Objective, params: chex.ArrayTree, multiples: Multiples
    ) -> PerExampleResult:
        return means(objective, params, multiples, follow=True)

    @gradient.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        # The fast path treats the perturbations as constants where that saves work, so it has no
        # derivative of its own; that of the plain computation is exact.
        return jax.jvp(functools.partial(means, follow=False), primals, tangents)

    return gradient(objective, params, multiples), new_state


_compute_compiled = jax.jit(_compute, static_argnums=(3, 4, 5, 6))


def is_worthwhile(
    objective: Objective, params: chex.ArrayTree, mask: _masks.Mask, group_size: int
) -> bool:
    """Whether the fast path is faster than differentiating each group by itself."""
    traced = trace(objective, params, group_size)
    plan = make_plan(traced, jax.tree.leaves(params), jax.tree.leaves(mask))
    return plan.suits_groups_of(group_size)


_SLOW = (
    "the fast path for perturbations per example or group cannot follow this network, so every one is "
    "differentiated by itself, which is exact but may take 3 to 26 times as long: "
)


def _means(
    objective: Objective,
    params: chex.ArrayTree,
    multiples: Multiples,
    *,
    evaluation: Evaluation,
    group_size: int,
    perturbed: tuple[bool, ...],
    follow: bool,
) -> PerExampleResult:
    """The result, by following the parameters through the traced loss or by plain differentiation."""
    leaves, treedef = jax.tree.flatten(params)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    traced = trace(objective, params, group_size)
    plan = make_plan(traced, leaves, perturbed)
    if not follow:
        plan = plan.without_following("not wanted")
    elif plan.failure:
        warnings.warn(_SLOW + plan.failure, stacklevel=2)
    result = _means_over_batch(traced, plan, leaves, multiples, evaluation)
    return result._replace(
        gradients=_restore(result.gradients, leaves, treedef),
        clean_gradients=_restore(result.clean_gradients, leaves, treedef),
    )


def _restore(gradients: Any, leaves: list[jax.Array], treedef: Any) -> chex.ArrayTree:
    restored = [g.astype(leaf.dtype) for g, leaf in zip(gradients, leaves, strict=True)]
    return jax.tree.unflatten(treedef, restored)


def _means_over_batch(
    traced: Trace, plan: Plan, leaves: list[jax.Array], multiples: Multiples, evaluation: Evaluation
) -> PerExampleResult:
    """The result with leaves in place of pytrees, microbatch by microbatch."""
    microbatch_size = traced.objective.microbatch_size
    size = plan.groups_at_once(traced.count, traced.group_size, microbatch_size)
    share_of: Callable[..., PerExampleResult] = functools.partial(
        _share_of_groups, traced, plan, multiples, evaluation
    )
    if plan.has_convolution:
        share_of = inside_control_flow(share_of)
    parts = (traced.groups, traced.shares)
    if size == traced.count:
        return share_of(leaves, *parts)
    count, remainder = divmod(traced.count, size)
    cut = count * size
    whole = _batches.interleaved(jax.tree.map(lambda leaf: leaf[:cut], parts), count)
    sums = _sum_over_loop(lambda part: share_of(leaves, *part), whole, (leaves, whole))
    if not remainder:
        return sums
    rest = jax.tree.map(lambda leaf: leaf[cut:], parts)
    total: PerExampleResult = jax.tree.map(jnp.add, sums, share_of(leaves, *rest))
    return total


def _sum_over_loop(
    function: Callable[[Any], PerExampleResult], parts: Any, like: Any
) -> PerExampleResult:
    """``sum(function(part) for part in parts)`` in one compiled loop."""
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, first)
    )

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        sums = jax.tree.map(jnp.add, sums, function(part))
        return to_varying_like(sums, like), None

    result: PerExampleResult = lax.scan(add, to_varying_like(zeros, like), parts)[0]
    return result


def _share_of_groups(
    traced: Trace,
    plan: Plan,
    multiples: Multiples,
    evaluation: Evaluation,
    leaves: list[jax.Array],
    groups: Any,
    shares: jax.Array,
) -> PerExampleResult:
    """What some groups at once add to the means over the batch, in at least float32.

    The shares are applied inside the differentiation, where they cost nothing; scaling the gradients at
    the end would be one more pass over all parameters.
    """
    ascent = ascend(traced, plan, leaves, groups)
    scale = jnp.asarray(traced.loss_scale, _tree.accumulation_dtype(leaves))
    squared_norms = [square / jnp.square(scale) for square in ascent.squared_norms]
    each: Any = jax.vmap(lambda squares: multiples(squares)[0], axis_size=len(shares))
    factors = each(squared_norms)
    norms = _norm(squared_norms, like=shares)
    squared_perturbations = [
        jnp.square(factor) * square for factor, square in zip(factors, squared_norms, strict=True)
    ]
    # The recorded gradients are scaled, ε is not.
    factors = [factor / scale for factor in factors]
    perturbed_loss, gradients = descend(
        traced, plan, ascent, factors, leaves, groups, shares, evaluation
    )
    dtype = _tree.accumulation_dtype(leaves)

    def unscaled(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: (
                leaf.astype(dtype) / scale.astype(dtype)
                if traced.objective.loss_scale is not None
                else leaf.astype(dtype)
            ),
            tree,
        )

    weights = shares.astype(norms.dtype)
    return PerExampleResult(
        loss=unscaled(jnp.sum(ascent.losses * shares.astype(ascent.losses.dtype))),
        perturbed_loss=unscaled(perturbed_loss),
        gradients=unscaled(gradients),
        clean_gradients=unscaled(clean_gradients(plan, leaves, ascent, shares)),
        gradient_norm=jnp.sum(norms * weights).astype(dtype),
        perturbation_norm=jnp.sum(_norm(squared_perturbations, like=shares) * weights).astype(
            dtype
        ),
    )


def _norm(squares: list[jax.Array], like: jax.Array) -> jax.Array:
    return jnp.sqrt(sum(squares[1:], squares[0])) if squares else jnp.zeros_like(like)
