"""The plan of a network, for reading."""

import chex
import jax

from optax_sam import _masks
from optax_sam._hyperparameters import check_integer
from optax_sam.objectives import Objective, require_objective
from optax_sam.per_example import plan as plans
from optax_sam.independence import check_independence
from optax_sam.per_example.plan import LeafPlan, Plan, make_plan
from optax_sam.per_example.trace import Trace, trace

_HEADER = ("parameter", "shape", "meets the data in", "method", "cost / SGD", "copies", "reason")

_BY_ITSELF = (
    "groups of this size are faster differentiated one after the other: the methods do that instead"
)


def explain(
    objective: Objective,
    params: chex.ArrayTree,
    *,
    group_size: int = 1,
    mask: _masks.Mask | None = None,
) -> str:
    """Says how :func:`per_example_gradient` will treat every parameter, and why.

    Columns: the operation in which the leaf meets the data, with its positions T per group, inputs
    K and outputs O; how its perturbation is computed; multiplications of both passes in this
    operation as a multiple of those of an SGD step (SAM: 2.0); how many numbers are kept per group
    of a chunk because of this leaf; and why a leaf has no fast form. The methods:

    * ``Gram matrices``: from T × T inner products; no copy of the weights.
    * ``own kernel``: a gradient and perturbed weights for each group of a chunk.
    * ``own gradient``: ordinary differentiation of each group. Exact for everything; cheap for small
      leaves such as biases and scales.

    A group is one example unless ``group_size`` says otherwise.

    Args:
      objective: the supervised loss.
      params: pytree of parameters.
      group_size: m, the number of examples that share a perturbation.
      mask: as in :func:`per_example_gradient`.

    Returns:
      A table to print.

    Raises:
      ValueError: if the network mixes the examples of the batch and ``group_size`` is 1, or if that
        does not divide the batch.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> from optax_sam.per_example import explain
      >>> objective = optax_sam.Objective(
      ...     lambda p, x: x @ p["w"] + p["b"], jnp.ones((4, 30)), jnp.zeros(4, jnp.int32))
      >>> table = explain(objective, {"w": jnp.ones((30, 20)), "b": jnp.ones(20)})
      >>> "dense" in table and "Gram matrices" in table
      True
    """
    objective = require_objective(objective, "a perturbation per example")
    check_integer("group_size", group_size, minimum=1)
    independence = check_independence(objective, params) if group_size == 1 else "not needed"
    flags = jax.tree.leaves(_masks.resolve_mask("mask", mask, params))
    traced = trace(objective, params, group_size)
    plan = make_plan(traced, jax.tree.leaves(params), flags)
    rows = [_HEADER, *(_row(leaf) for leaf in plan.leaves)]
    return "\n".join([_table(rows), "", *_summary(plan, traced, independence)])


def _row(leaf: LeafPlan) -> tuple[str, ...]:
    site = leaf.site
    where = f"{site.kind} (T={site.positions}, K={site.inputs}, O={site.outputs})" if site else "-"
    cost = relative_cost(leaf)
    return (
        leaf.path,
        "×".join(map(str, leaf.shape)) or "scalar",
        where,
        leaf.method,
        "-" if cost is None else f"{cost:.2f}",
        str(leaf.copied_size),
        leaf.reason,
    )


def relative_cost(leaf: LeafPlan) -> float | None:
    """Multiplications of both passes at the leaf's site, as a multiple of SGD's.

    SGD takes three products of T K O: output, derivative in the input, derivative in the weights. The
    first pass leaves out the last one, and a Gram form adds three products of T² (K + O); a kernel
    per example adds one of T K O.
    """
    site = leaf.site
    if site is None or site.kind == "embedding":
        return None
    if leaf.method == plans.GRAM:
        gram = site.positions * (site.inputs + site.outputs) / (site.inputs * site.outputs)
        return (5 + 3 * gram) / 3
    return 2.0


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _summary(plan: Plan, traced: Trace, independence: str) -> list[str]:
    at_once = plan.groups_at_once(traced.count, traced.group_size)
    return [
        f"examples at once: {at_once * traced.group_size} of {traced.objective.batch_size}",
        f"numbers kept in copies of weights: {at_once * plan.copied_size}",
        f"independence of the examples: {independence}",
        *([] if plan.suits_groups_of(traced.group_size) or plan.failure else [_BY_ITSELF]),
        *([f"the network cannot be followed: {plan.failure}"] if plan.failure else []),
    ]
