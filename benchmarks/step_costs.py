"""The cost of every training step of one network, as multiples of the SGD step."""

import os
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import jax

from benchmarks import measure
from benchmarks.architectures import Network, Problem, random_problem
from benchmarks.tables import markdown, number
from benchmarks.training_steps import ROWS, Row

Record = dict[str, Any]

COMPILED = ("flops", "bytes", "temporary", "memory", "compile")
TIMED = ("wall", "wall_low", "wall_high")
TITLES = {
    "flops": "FLOPs",
    "bytes": "bytes",
    "temporary": "temporary memory",
    "memory": "memory in all",
    "compile": "compile time",
    "wall": "wall clock",
}
TORCH_SGD = "PyTorch SGD"


def rows_for(network: Network) -> dict[str, Row]:
    """The rows that the network and its batch allow."""
    return {
        name: row
        for name, row in ROWS.items()
        if network.batch_size % row.divisor == 0 and not (row.separates and network.mixes_examples)
    }


def measure_network(
    name: str, network: Network, rounds: int | None, progress: Callable[[str], None]
) -> tuple[list[Record], str]:
    """One record per row, and what SGD costs in absolute numbers, for the reader.

    Args:
      name: the network's name, for the records.
      network: the network.
      rounds: rounds of timing; None leaves the wall clock out.
      progress: is told what comes next.
    """
    problem = random_problem(network)
    rows, costs, calls = rows_for(network), {}, {}
    for step, row in rows.items():
        progress(f"{name}: compiling {step}")
        costs[step], call = measure.compile_step(row, network, problem)
        if fits(costs[step].memory):
            calls[step] = call
    samples: dict[str, list[float]] = {}
    if rounds:
        calls |= torch_steps(network, problem)
        progress(f"{name}: {rounds} interleaved rounds of {len(calls)} steps")
        samples = measure.interleave(calls, rounds)
    sgd = costs["SGD"]
    records = [
        {"network": name, "batch": network.batch_size, "step": step}
        | {key: divide(getattr(cost, key), getattr(sgd, key)) for key in COMPILED}
        | timing(samples, step, rows[step].varies)
        | {"wall_torch": None}
        for step, cost in costs.items()
    ]
    records += [
        {"network": name, "batch": network.batch_size, "step": step}
        | dict.fromkeys(COMPILED)
        | timing(samples, step)
        | {"wall_torch": measure.ratio(samples[step], samples[TORCH_SGD]).typical}
        for step in samples
        if step not in rows
    ]
    return records, absolute(sgd, samples.get("SGD"))


def divide(value: float | None, base: float | None) -> float | None:
    """A ratio, if both were counted."""
    return None if value is None or base is None else value / base


def timing(samples: dict[str, list[float]], step: str, varies: bool = False) -> Record:
    """The wall clock of a step that was timed."""
    if step not in samples:
        return dict.fromkeys(TIMED)
    return dict(zip(TIMED, measure.ratio(samples[step], samples["SGD"], varies), strict=True))


def fits(memory: float) -> bool:
    """Whether a program leaves half of the free memory alone."""
    stats = jax.devices()[0].memory_stats() or {}
    free = stats.get("bytes_limit")
    if free is None:
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # only Linux tells
            return True
    return memory < free / 2


def torch_steps(network: Network, problem: Problem) -> dict[str, Callable[[], Any]]:
    """The peers in PyTorch, where it is installed."""
    try:
        from benchmarks import torch_peer
    except ImportError:
        return {}
    return torch_peer.steps(network, problem)


def absolute(sgd: measure.Cost, seconds: list[float] | None) -> str:
    """What one is, on this machine."""
    parts = [
        f"{sgd.flops / 1e9:.2f} GFLOP",
        f"{sgd.memory / 1e6:.0f} MB in all",
        f"{sgd.temporary / 1e6:.0f} MB of them temporary",
        f"compiled in {sgd.compile:.1f} s",
    ]
    if seconds:
        parts.append(f"{1000 * statistics.median(seconds):.1f} ms a step")
    return "SGD: " + ", ".join(parts) + "."


def table(records: Iterable[Record], note: str) -> str:
    """The records of one network in Markdown."""
    records = list(records)
    title = f"{records[0]['network']}, batch {records[0]['batch']}"
    is_timed = records[0]["wall"] is not None
    keys = (*COMPILED, "wall") if is_timed else COMPILED
    header = [title, *(TITLES[key] for key in keys)] + ["quartiles"] * is_timed
    own = [record for record in records if record["wall_torch"] is None]
    rows = [
        [record["step"], *(record[key] for key in keys)] + [spread(record)] * is_timed
        for record in own
    ]
    text = markdown(header, rows) + f"\n{note}\n"
    peers = [record for record in records if record["wall_torch"] is not None]
    if peers:
        rows = [[r["step"], r["wall_torch"], r["wall"], spread(r)] for r in peers]
        header = [f"{title}: wall clock", "/ PyTorch SGD", "/ SGD in JAX", "quartiles"]
        text += "\n" + markdown(header, rows)
    return text


def spread(record: Record) -> str:
    """The quartiles of the wall clock."""
    if record["wall_low"] is None:
        return "–"
    return f"{number(record['wall_low'])} – {number(record['wall_high'])}"
