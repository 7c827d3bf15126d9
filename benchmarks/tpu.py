"""Complete training steps, compiled for TPU pods on a machine that has none.

    python3.12 -m venv .venv-tpu && .venv-tpu/bin/pip install -e '.[tpu]'
    .venv-tpu/bin/python benchmarks/tpu.py --minutes 60
    .venv-tpu/bin/python benchmarks/tpu.py --minutes 0     # only tables and figure, of what is there

Every compiled step is one line of OUTPUT/steps.jsonl as soon as it is there, and what is there is not
compiled again: a run that was stopped goes on. The most informative steps come first. Where
neither the base optimizer nor SAM by hand fits into a chip, the methods are not tried. The compiler
has a process of its own: where a step makes it crash, the record says so, and the next one follows.
Flags choose networks, layouts, chips and steps. Nothing is executed: what the tables say of time is
estimated.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "TPU_SKIP_MDS_QUERY", "1"
)  # there is no TPU whose metadata could be asked for

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this file runs as a program

import optax_sam
from benchmarks import pod_tables
from benchmarks.apart import Aborted, Apart
from benchmarks.chips import CHIPS
from benchmarks.layouts import LAYOUTS
from benchmarks.pod_networks import NETWORKS
from benchmarks.pods import STEPS as ALL_STEPS
from benchmarks.pods import Cell, compile_cell

OUTPUT = Path(__file__).parents[1] / "docs" / "results" / "pods"
SCALING = (
    "SGD",
    "SAM by hand",
    "optax.contrib.sam, opaque",
    "sam",
    "saner",
    "1-SAM",
    "m-SAM, m = 8",
)
# What says nothing about a pod that another row does not: loops over microbatches, copies of weights.
LEFT_OUT = ("microbatches", "naive", "penalty", "transparent")
STEPS = (
    *SCALING,
    *(s for s in ALL_STEPS if s not in SCALING and not any(w in s for w in LEFT_OUT)),
)
LEVEL = "O0"  # of the published tables
# Plain data parallelism of the decoder does not fit into a v5e.
FIRST_CHIP = {"decoder": "v5p"}


def repeats(network: str, step: str) -> bool:
    """Whether BatchNorm tells it; GroupNorm is there for what BatchNorm does not allow."""
    compared = step in ("SGD", "SAM by hand", "sam")  # with the others of this network
    return network == "ResNet-50, GroupNorm" and not (compared or ALL_STEPS[step].separates)


def cells(all_sizes: bool = False) -> Iterator[Cell]:
    """All cells, the most informative ones first.

    Args:
      all_sizes: whether every method is compiled for every number of chips, and not for 16 only.
    """
    sizes = (16, 256, 64, 4)
    for first in (True, False):  # each network's first chip, and then the other one
        for network in NETWORKS:
            for size in sizes:
                for step in STEPS:
                    for layout in LAYOUTS:
                        for chip in CHIPS:
                            is_first = chip == FIRST_CHIP.get(network, "v5e")
                            scales = all_sizes or size == 16 or step in SCALING
                            if is_first == first and scales and not repeats(network, step):
                                yield Cell(network, layout, chip, size, step)


def allowed(cell: Cell) -> bool:
    """Whether the network and its batch allow the step."""
    network, row = NETWORKS[cell.network], ALL_STEPS[cell.step]
    fits = network.per_chip * cell.chips % row.divisor == 0
    flips_tokens = "ncsam" in cell.step and network.label_shape != ()
    return fits and not flips_tokens and not (row.separates and network.mixes_examples)


def devices_of(cell: Cell) -> Any:
    """The chips of the slice, which are described and not there."""
    from jax.experimental import topologies

    name = CHIPS[cell.chip].topologies[cell.chips]
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def whole_lines(path: Path) -> str:
    """The text of a file without a last line that was being written when the program was killed."""
    text = path.read_text()
    return text[: text.rfind("\n") + 1]


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, if it is there."""
    return [json.loads(line) for line in whole_lines(path).splitlines()] if path.exists() else []


def versions() -> dict[str, str]:
    """What compiled a record."""
    compilers = [name for name in ("jax", "libtpu") if importlib.util.find_spec(name)]
    return {name: metadata.version(name) for name in compilers} | {
        "optax_sam": optax_sam.__version__
    }


def refuse_other_compilers(records: Iterable[dict[str, Any]], path: Path) -> None:
    """A step is compared with SAM by hand of the same compiler."""
    here = {name: version for name, version in versions().items() if name != "optax_sam"}
    for record in records:
        if other := {name: record.get(name) for name in here if record.get(name) != here[name]}:
            raise SystemExit(
                f"{path} was compiled by {other}, and this is {here}. Choose another --output, or "
                "begin anew without the file."
            )


def cell_of(record: dict[str, Any]) -> Cell:
    """What was compiled."""
    return Cell(*(record[key] for key in Cell._fields))


def cannot_compile(cell: Cell) -> str | None:
    """Why nothing can be compiled here, if so."""
    try:
        devices_of(cell)
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
        return str(error)
    return None


def compiled(cell: Cell, level: str) -> dict[str, Any]:
    """The record of a step, or what the compiler says where it refuses."""
    jax.config.update("jax_platforms", "cpu")  # the compiler for TPUs needs none
    jax.config.update("jax_optimization_level", level)
    return compile_cell(cell, NETWORKS[cell.network], devices_of(cell))


def record_of(cell: Cell, level: str, apart: Apart) -> dict[str, Any]:
    """The record, also where the compiler does not come back."""
    try:
        record: dict[str, Any] = apart(compiled, cell, level)
    except Aborted:
        batch = NETWORKS[cell.network].per_chip * cell.chips
        error = "the compiler crashes"
        record = cell._asdict() | {"batch": batch, "error": error}
    return record | {"level": level} | versions()


def compile_missing(
    wanted: list[Cell], path: Path, minutes: float, level: str, apart: Apart
) -> None:
    """Compiles what the file lacks at this level of optimization, until the time is over."""
    records = read(path)
    refuse_other_compilers(records, path)
    if path.exists() and len(whole := whole_lines(path)) < len(path.read_text()):
        os.truncate(path, len(whole.encode()))
    known = {cell_of(record): "error" in record for record in records if record["level"] == level}
    started = time.monotonic()
    for cell in wanted:
        # Then neither do the methods, but for those that take a part of the batch at a time.
        references_do_not_fit = all(known.get(cell._replace(step=step)) for step in SCALING[:2])
        if cell in known or (references_do_not_fit and not ALL_STEPS[cell.step].at_once):
            continue
        if time.monotonic() - started > 60 * minutes:
            return
        print(*cell, sep=", ", file=sys.stderr, flush=True)
        record = record_of(cell, level, apart)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        known[cell] = "error" in record


def main(arguments: list[str] | None = None) -> None:
    """Compiles, and writes tables and figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=[*CHIPS])
    parser.add_argument("--chips", nargs="+", type=int, default=[4, 16, 64, 256], help="how many")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=[*STEPS])
    parser.add_argument(
        "--all-sizes",
        action="store_true",
        help="every method on every number of chips, which takes days; by default the main ones",
    )
    parser.add_argument("--minutes", type=float, default=60, help="no step is begun after them")
    parser.add_argument(
        "--level",
        default=LEVEL,
        help="of XLA's optimization: O0 compiles faster, UNKNOWN is JAX's default, whose tables go to "
        "the folder OUTPUT/UNKNOWN",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    wanted = [
        cell
        for cell in cells(options.all_sizes)
        if cell.network in options.networks
        and cell.layout in options.layouts
        and cell.chip in options.chip
        and cell.chips in options.chips
        and cell.step in options.steps
        and allowed(cell)
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "steps.jsonl"
    if options.minutes > 0:
        if not wanted:
            parser.error("no step is chosen by these flags")
        with Apart() as apart:
            if reason := apart(cannot_compile, wanted[0]):
                print(f"Skipped: libtpu, which compiles for TPUs, cannot be used here ({reason}).")
                print("Install it in an environment of its own: pip install -e '.[tpu]'.")
            else:
                compile_missing(wanted, path, options.minutes, options.level, apart)
    order = {cell: number for number, cell in enumerate(cells(all_sizes=True))}
    records = sorted(
        (record for record in read(path) if record["level"] == options.level),
        key=lambda record: order.get(cell_of(record), len(order)),
    )
    folder = options.output if options.level == LEVEL else options.output / options.level
    folder.mkdir(exist_ok=True)
    pod_tables.write(records, folder)


if __name__ == "__main__":
    main()
