"""The plan of a network as a table."""

import collections
from collections.abc import Sequence

from optax_sam.per_example import plan as plans
from optax_sam.per_example.plan import LeafPlan, Plan
from optax_sam.per_example.uses import Use, gram_multiplications

_HEADER = ("parameter", "shape", "meets the data in", "method", "cost / SGD", "copies", "reason")


def table(plan: Plan) -> str:
    """One line for each parameter; the columns are described in :func:`optax_sam.explain`."""
    rows = [_HEADER, *map(_row, plan.leaves)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _row(leaf: LeafPlan) -> tuple[str, ...]:
    cost = relative_cost(leaf)
    return (
        leaf.path,
        "×".join(map(str, leaf.shape)) or "scalar",
        _where(leaf.uses),
        leaf.method,
        "-" if cost is None else f"{cost:.2f}",
        str(leaf.copied_size),
        leaf.reason,
    )


def _where(uses: Sequence[Use]) -> str:
    """The sites; those that differ in their inputs only are told once."""
    counts = collections.Counter(map(_of_use, uses))
    several = [f"{count} × {text}" if count > 1 else text for text, count in counts.items()]
    return " + ".join(several) or "-"


def _of_use(use: Use) -> str:
    site = use.site
    text = f"{site.kind} (T={use.positions}, K={site.inputs}, O={site.outputs})"
    return text if use.layers == 1 else f"{use.layers} layers of {text}"


def relative_cost(leaf: LeafPlan) -> float | None:
    """Multiplications of both passes at the leaf's sites, as a multiple of SGD's.

    SGD takes three products of T K O: output, derivative in the input, derivative in the weights. The
    first pass leaves out the last one, and a Gram form adds three products of T² (K + O); a kernel
    per example adds one of T K O.
    """
    products = sum(
        use.positions * use.site.inputs * use.site.outputs
        for use in leaf.uses
        if use.site.kind != "embedding"  # nothing is multiplied in a lookup
    )
    if not products:
        return None
    if leaf.method != plans.GRAM:
        return 2.0
    return float(5 + 3 * gram_multiplications(leaf.uses) / products) / 3
