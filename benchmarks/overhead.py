"""What ``tx.update`` costs beyond the hand-written step, in many paired rounds."""

import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks import measure
from benchmarks.architectures import CNN, MLP, Network, random_problem
from benchmarks.tables import markdown
from benchmarks.training_steps import ROWS

Record = dict[str, Any]

# Networks, and pairs of steps to time on them.
CASES = {
    "MLP 784-64-64-10, batch 32": (Network(MLP(64), (28, 28, 1), batch_size=32), 4000),
    "MLP 784-1024-1024-10, batch 128": (Network(MLP(), (28, 28, 1), batch_size=128), 400),
    "CNN, GroupNorm, batch 16": (Network(CNN("group"), (32, 32, 3), batch_size=16), 100),
}
BASE, SAME, OURS = "by hand", "by hand, a second time", "optax_sam.sam"


def measure_overhead(case: str, network: Network, rounds: int) -> list[Record]:
    """One record per step.

    A round times the hand-written step, a second compilation of the same step, and ours, in random
    order; every time is divided by that of the first in the same round. The second one says what such
    a comparison finds where there is nothing to find.
    """
    problem = random_problem(network)
    rows = {BASE: "SAM by hand", SAME: "SAM by hand", OURS: "sam"}
    costs, calls = {}, {}
    for name, step in rows.items():
        costs[name], calls[name] = measure.compile_step(ROWS[step], network, problem)
    samples = shuffled(calls, rounds)
    return [
        {"network": case, "step": name, "rounds": rounds}
        | {"flops": costs[name].flops / costs[BASE].flops}
        | compare(samples[name], samples[BASE])
        for name in (SAME, OURS)
    ]


def compare(seconds: list[float], base: list[float]) -> Record:
    """The median of the paired ratios, a 95 % interval for it, and the ratios' quartiles."""
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    low, high = median_interval(ratios)
    first, _, third = statistics.quantiles(ratios, n=4)
    return {
        "median": statistics.median(ratios),
        "interval_low": low,
        "interval_high": high,
        "quartile_low": first,
        "quartile_high": third,
    }


def shuffled(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, without pauses and in random order: neighbours matter."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(0)
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name in shuffle.sample(list(calls), len(calls)):
            started = time.perf_counter()
            calls[name]()
            samples[name].append(time.perf_counter() - started)
    return samples


def median_interval(values: list[float]) -> tuple[float, float]:
    """A 95 % interval for the median, from order statistics: it assumes no distribution."""
    ordered, count = sorted(values), len(values)
    reach = 1.96 * math.sqrt(count) / 2
    low = max(0, math.floor(count / 2 - reach))
    return ordered[low], ordered[min(count - 1, math.ceil(count / 2 + reach))]


def table(records: list[Record]) -> str:
    """The records in Markdown."""
    header = ["network", "step", "rounds", "FLOPs", "median", "95 % interval", "quartiles"]
    rows = [
        [
            r["network"],
            r["step"],
            str(r["rounds"]),
            f"{r['flops']:.3f}",
            f"{r['median']:.3f}",
            f"{r['interval_low']:.3f} – {r['interval_high']:.3f}",
            f"{r['quartile_low']:.3f} – {r['quartile_high']:.3f}",
        ]
        for r in records
    ]
    return markdown(header, rows)
