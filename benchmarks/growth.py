"""How cost and memory grow with the batch, the width, the depth and the size m of a group."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import optax_sam
from benchmarks import measure
from benchmarks.architectures import NETWORKS, Network, random_problem
from benchmarks.step_costs import divide, fits
from benchmarks.tables import markdown
from benchmarks.training_steps import ROWS, Row, grouped

Record = dict[str, Any]

# The default of a network is one of its values on every axis.
VALUES = {
    "MLP": {
        "batch": (16, 32, 64, 128, 256, 512),
        "width": (256, 512, 1024, 2048),
        "depth": (1, 2, 4, 8),
        "m": (1, 2, 4, 8, 16, 32, 64, 128),
    },
    "CNN, GroupNorm": {
        "batch": (16, 32, 64, 128),
        "width": (16, 32, 64),
        "depth": (1, 2, 3),
        "m": (1, 2, 4, 8, 16, 32, 64),
    },
}
STEPS = ("SGD", "sam", "1-SAM, naive vmap", "1-SAM")
MICROBATCHES = "sam, microbatches of 16"
GROUPS = "m-SAM"
MEASURES = {"flops": "FLOPs", "memory": "memory in all", "wall": "wall clock"}


class Point(NamedTuple):
    """One size, and what is measured there."""

    axis: str
    value: int
    network: Network
    rows: dict[str, Row]


def points(name: str) -> Iterator[Point]:
    """All sizes of a network, one axis after the other."""
    default, rows = NETWORKS[name], {step: ROWS[step] for step in STEPS}
    for axis, values in VALUES[name].items():
        for value in values:
            if axis == "m":
                several = {"SGD": ROWS["SGD"], GROUPS: grouped(optax_sam.sam, value)}
                yield Point(axis, value, default, several)
            elif axis == "batch":
                fits_microbatches = value % ROWS[MICROBATCHES].divisor == 0
                added = {MICROBATCHES: ROWS[MICROBATCHES]} if fits_microbatches else {}
                yield Point(axis, value, default._replace(batch_size=value), rows | added)
            else:
                module = default.module.clone(**{axis: value})
                yield Point(axis, value, default._replace(module=module), rows)


def measure_growth(name: str, rounds: int | None, progress: Callable[[str], None]) -> list[Record]:
    """One record per size and step.

    ``flops``, ``memory`` and ``wall`` are ratios to the SGD step of the same size, ``sgd_flops`` and so
    on those of that SGD step to the SGD step of the default size.
    """
    known: dict[Any, tuple[dict, dict]] = {}
    found = []
    for point in points(name):
        key = (point.network, GROUPS in point.rows and point.value)
        if key not in known:
            progress(f"{name}: {point.axis} {point.value}")
            known[key] = _measure_point(point, rounds)
        found.append((point, *known[key]))
    default, seconds = known[NETWORKS[name], False]
    base = default["SGD"]._asdict() | {"wall": seconds.get("SGD")}
    return [
        record
        for point, costs, seconds in found
        for record in _records(name, point, costs, seconds, base)
    ]


def _measure_point(point: Point, rounds: int | None) -> tuple[dict, dict]:
    """``(costs, seconds)`` of every row; what does not fit into the memory is not timed."""
    problem = random_problem(point.network)
    costs, calls = {}, {}
    for step, row in point.rows.items():
        costs[step], call = measure.compile_step(row, point.network, problem, quickly=not rounds)
        if fits(costs[step].memory):
            calls[step] = call
    samples = measure.interleave(calls, rounds) if rounds else {}
    # The fastest round: there are few, and what disturbs them only adds.
    return costs, {step: min(seconds) for step, seconds in samples.items()}


def _records(name: str, point: Point, costs: dict, seconds: dict, base: dict) -> Iterator[Record]:
    sgd = costs["SGD"]._asdict() | {"wall": seconds.get("SGD")}
    for step in point.rows:  # the size that several axes share was measured with all of their rows
        cost = costs[step]
        values = cost._asdict() | {"wall": seconds.get(step)}
        yield (
            {"network": name, "axis": point.axis, "value": point.value, "step": step}
            | {key: divide(values[key], sgd[key]) for key in MEASURES}
            | {f"sgd_{key}": divide(sgd[key], base[key]) for key in MEASURES}
        )


def table(records: list[Record]) -> str:
    """The growth of one network in Markdown, one column for each size."""
    text = []
    is_timed = records[0]["wall"] is not None
    for axis in dict.fromkeys(record["axis"] for record in records):
        here = [record for record in records if record["axis"] == axis]
        values = list(dict.fromkeys(record["value"] for record in here))
        rows = []
        for step in dict.fromkeys(record["step"] for record in here):
            for key, title in MEASURES.items():
                if key == "wall" and not is_timed:
                    continue
                of = {r["value"]: r for r in here if r["step"] == step}
                # SGD's own growth; of the others the ratio to SGD of the same size.
                shown = f"sgd_{key}" if step == "SGD" else key
                rows.append([f"{step}: {title}", *(of.get(v, {}).get(shown) for v in values)])
        if axis == "m":
            rows = [row for row in rows if not row[0].startswith("SGD")]
        header = [f"{records[0]['network']}: {axis}", *map(str, values)]
        text.append(markdown(header, rows))
    return "\n".join(text)
