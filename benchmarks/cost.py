"""What a training step costs, as a multiple of the plain SGD step.

    python benchmarks/cost.py                       # compiled FLOPs and memory of every step
    python benchmarks/cost.py --everything --output docs/results/benchmarks

The second command is the whole benchmark in one run: every step on every network with its wall clock,
PyTorch beside it where it is installed, growth with size, overhead, errors of the per-example path,
layers in loops; it writes Markdown tables, CSV files and the figures. Everything but time is
deterministic.
"""

import argparse
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this file runs as a program

from benchmarks import figures, float32_error, growth, layers, overhead, step_costs
from benchmarks.architectures import NETWORKS
from benchmarks.tables import file_name, read_csv, write_csv

PARTS = ("steps", "growth", "overhead", "float32_error", "layers")
GROWTH_ROUNDS = 3
LAYERS_ROUNDS = 7


def machine() -> str:
    """The hardware and the versions, in words."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else processor()
    versions = [f"{name} {metadata.version(name)}" for name in ("jax", "flax", "optax")]
    try:
        from benchmarks import torch_peer

        versions.append(torch_peer.versions())
    except ImportError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{kind}, {cores} processor cores, {platform.system()}, Python {platform.python_version()}, "
        + ", ".join(versions)
    )


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Report:
    """Prints what is measured, and writes it as soon as it is there."""

    def __init__(self, output: Path | None):
        self.output, self.started = output, time.perf_counter()
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)

    def progress(self, text: str) -> None:
        """Says what comes next."""
        print(f"[{time.perf_counter() - self.started:6.0f} s] {text}", file=sys.stderr, flush=True)

    def text(self, name: str, text: str) -> None:
        """A piece of Markdown."""
        print(text, flush=True)
        if self.output is not None:
            (self.output / f"{name}.md").write_text(text, encoding="utf-8")

    def records(self, name: str, records: list[dict[str, Any]]) -> None:
        """A CSV file; rows of other networks, from earlier runs, stay in it."""
        if self.output is not None:
            path = self.output / f"{name}.csv"
            measured = {record.get("network") for record in records}
            others = [r for r in read_csv(path) if r.get("network") not in measured]
            write_csv(path, others + records)

    def figures(self, records: list[dict[str, Any]], prefix: str = "") -> None:
        """A figure for each network."""
        if self.output is not None:
            figures.write(records, self.output, prefix)


def run_steps(options: argparse.Namespace, report: Report) -> None:
    """Every step on every network."""
    records = []
    for name in options.network:
        network = NETWORKS[name]
        if options.batch_size:
            network = network._replace(batch_size=options.batch_size)
        rounds = (options.rounds or network.rounds) if options.time else None
        found, note = step_costs.measure_network(name, network, rounds, report.progress)
        records += found
        report.text(file_name(name), step_costs.table(found, note))
        report.records("steps", records)
        report.figures(found)


def run_growth(options: argparse.Namespace, report: Report) -> None:
    """Batch, width, depth and m."""
    records = []
    for name in growth.VALUES:
        rounds = GROWTH_ROUNDS if options.time else None
        found = growth.measure_growth(name, rounds, report.progress)
        records += found
        report.text(f"growth_{file_name(name)}", growth.table(found))
        report.records("growth", records)
        report.figures(found, "growth_")


def run_overhead(options: argparse.Namespace, report: Report) -> None:
    """tx.update against the hand-written step."""
    records = []
    for name, (network, rounds) in overhead.CASES.items():
        report.progress(f"overhead: {name}, {rounds} rounds")
        records += overhead.measure_overhead(name, network, rounds)
    report.text("overhead", overhead.table(records))
    report.records("overhead", records)


def run_float32_error(options: argparse.Namespace, report: Report) -> None:
    """The per-example path in float32."""
    records = []
    for name, network in float32_error.CASES.items():
        report.progress(f"float32 error: {name}")
        records += float32_error.measure_errors(name, network)
    report.text("float32_error", float32_error.table(records))
    report.records("float32_error", records)


def run_layers(options: argparse.Namespace, report: Report) -> None:
    """Transformers, whose layers may be in a loop."""
    records = []
    for case in layers.CASES:
        rounds = LAYERS_ROUNDS if options.time else None
        records += layers.measure_layers(case, rounds, report.progress)
    report.text("layers", layers.table(records))
    report.records("layers", records)


RUN = dict(
    zip(PARTS, (run_steps, run_growth, run_overhead, run_float32_error, run_layers), strict=True)
)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints, and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--batch-size", type=int, help="examples in a step; default: the network's")
    parser.add_argument("--time", action="store_true", help="also measure the wall clock")
    parser.add_argument("--rounds", type=int, help="of timing, 5, 10, ...; default: the network's")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["steps"])
    parser.add_argument("--everything", action="store_true", help="all parts, with wall clock")
    parser.add_argument("--output", type=Path, help="folder for Markdown, CSV and figures")
    options = parser.parse_args(arguments)
    if options.everything:
        options.time, options.parts = True, PARTS
    if options.rounds is not None and (options.rounds < 5 or options.rounds % 5):
        parser.error(
            f"--rounds must be a multiple of 5 (some methods act every 5 steps), got {options.rounds}"
        )
    report = Report(options.output)
    print(f"{machine()}\n")
    if options.time:
        report.text("machine", f"{machine()}. Load before the run: {os.getloadavg()[0]:.1f}.\n")
    for part in options.parts:
        RUN[part](options, report)
    report.progress("done")


if __name__ == "__main__":
    main()
