"""The plan of a network as a table."""

from optax_sam.per_example import plan as plans
from optax_sam.per_example.plan import LeafPlan, Plan

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
        return float(5 + 3 * gram) / 3
    return 2.0
