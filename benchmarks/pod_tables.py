"""The tables and the figure of the steps that were compiled for pods."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compiled_text import Collective
from benchmarks.pod_networks import NETWORKS
from benchmarks.pods import STEPS
from benchmarks.tables import markdown, number

Record = dict[str, Any]

BASE = "SAM by hand"
# Ratios to SAM by hand, and what is aimed at.
AIMS = {
    "flops": 1.02,
    "bytes": 1.02,
    "collectives": 1.02,
    "sent": 1.02,
    "memory": 1.05,
    "roofline": 1.3,  # of steps with groups only: of the others it follows from the rest
}
TITLES = {
    "flops": "FLOPs",
    "bytes": "bytes",
    "memory": "memory",
    "collectives": "collectives",
    "sent": "bytes sent",
    "roofline": "least time",
}
# The aims are for methods of two gradients that need no loop over the batch.
NO_AIM = ("by hand", "optax.", "two ascent steps", "ncsam", "at a time")
GRADIENT = 2**20  # bytes; smaller all-reduces are those of norms, losses and statistics
COLUMNS = {
    "all-reduces": ("all-reduce",),
    "reduce-scatters": ("reduce-scatter",),
    "gathers": ("all-gather",),
    "others": ("all-to-all", "collective-permute"),
}
MANY = (4, 16, 64, 256)
# The panels of the figure, and the tables beside it: enough to see the shapes.
SHOWN = 16  # chips
DRAWN = (
    ("ViT-B", "data parallel", "v5e"),
    ("ViT-B", "fully sharded", "v5e"),
    ("decoder", "fully sharded", "v5e"),
    ("decoder", "fully sharded × tensor parallel", "v5e"),
)


def measures(record: Record) -> dict[str, Any]:
    """What the tables show of a record, as numbers; of large collectives how many, and their bytes."""
    found = [Collective(*one) for one in record["collectives"]]
    large = [one for one in found if one.size >= GRADIENT]
    return {
        **{key: record[key] for key in ("flops", "bytes", "memory", "sent", "roofline")},
        "collectives": sum(one.times for one in found),
        **{
            column: how_much([one for one in large if one.kind in kinds])
            for column, kinds in COLUMNS.items()
        },
    }


def how_much(found: Iterable[Collective]) -> tuple[int, float]:
    """How many collectives run, and the bytes of their arrays."""
    found = list(found)
    return sum(one.times for one in found), sum(one.times * one.size for one in found)


def name_of(record: Record) -> str:
    """The step's name in the tables."""
    if record["step"] == "SGD":
        return NETWORKS[record["network"]].optimizer_name
    # Both branches are in the program: the numbers are those of a step that takes the second gradient.
    return record["step"] + (" (a step with g′)" if STEPS[record["step"]].varies else "")


def groups(records: Iterable[Record], *keys: str) -> dict[tuple, list[Record]]:
    """The records by the values of some keys."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record[key] for key in keys), []).append(record)
    return found


def table(records: Sequence[Record]) -> str:
    """All steps of one network, layout, chip and number of chips."""
    first = records[0]
    compiled = {record["step"]: measures(record) for record in records if "error" not in record}
    base = compiled.get(BASE)
    title = f"{first['network']}, {first['layout']}, {first['chips']} {first['chip']}"
    header = [title, *(TITLES[key] for key in TITLES)]
    header += [*COLUMNS, "bound by", "compile [s]"]
    rows = []
    for record in records:
        if "error" in record:
            rows.append([name_of(record), why_not(record["error"])])
            rows[-1] += ["–"] * (len(header) - 2)
            continue
        here = compiled[record["step"]]
        ratios = [here[key] / base[key] if base and base[key] else None for key in TITLES]
        counts = [
            f"{count}, {size / 1e9:.2g} GB" if count else "0"
            for count, size in (here[column] for column in COLUMNS)
        ]
        rows.append(
            [name_of(record), *ratios, *counts, record["slowest"], f"{record['compile']:.0f}"]
        )
    return markdown(header, rows) + (f"\n{absolute(base)}\n" if base else "")


def tables(records: Iterable[Record]) -> str:
    """A table for each network, layout, chip and number of chips."""
    parts = groups(records, "network", "layout", "chip", "chips")
    return "\n".join(map(table, parts.values()))


def why_not(error: str) -> str:
    """What the compiler says of a step that it refuses, in short where the memory is the reason."""
    sizes = re.search(r"memory required for (.+?) \((\S+)\) exceeds available HBM \((\S+)\)", error)
    if sizes is None:
        return f"does not compile: {error}"
    what, needed, there = sizes.groups()
    return f"does not fit: {what} need {needed}B of {there}B"


def absolute(base: dict[str, float]) -> str:
    """What one is, per chip."""
    return (
        f"{BASE}: {base['flops'] / 1e12:.2f} TFLOP, {base['bytes'] / 1e9:.1f} GB read and written, "
        f"{base['memory'] / 1e9:.2f} GB of memory, {base['collectives']} collectives, "
        f"{base['sent'] / 1e9:.2f} GB sent, at least {1000 * base['roofline']:.1f} ms."
    )


def aims(records: Sequence[Record]) -> str:
    """The largest ratio to SAM by hand of our methods on every number of chips; misses are bold."""
    rows = []
    for (network, layout, chip), here in groups(records, "network", "layout", "chip").items():
        ours = [ratios for part in groups(here, "chips").values() for ratios in with_aim(part)]
        if not ours:
            continue
        cells = []
        for key, aim in AIMS.items():
            found = [
                (ratio[key], step)
                for step, ratio in ours
                if key != "roofline" or STEPS[step].separates
            ]
            if not found:
                cells.append("–")
                continue
            worst, step = max(found, key=lambda one: one[0])
            missed = sum(ratio > aim for ratio, _ in found)
            text = f"{number(worst)} {step}"
            cells.append(f"**{text}**, {missed} of {len(found)}" if missed else text)
        rows.append([f"{network}, {layout}, {chip}", *cells])
    header = ["largest ratio to SAM by hand", *(f"{TITLES[k]} ≤ {v}" for k, v in AIMS.items())]
    header[-1] += ", groups"
    return markdown(header, rows)


def with_aim(records: Iterable[Record]) -> list[tuple[str, dict[str, float]]]:
    """Each step that the aims are for, with its ratios to SAM by hand; records of one table."""
    compiled = {r["step"]: measures(r) for r in records if "error" not in r}
    return [
        (step, {key: here[key] / (compiled[BASE][key] or 1) for key in AIMS})
        for step, here in compiled.items()
        if BASE in compiled and step != "SGD" and not any(part in step for part in NO_AIM)
    ]


def figure(records: Sequence[Record]) -> Any:
    """Least time and bytes sent against the number of chips, a panel each for network and layout.

    Steps that differ by less than a fiftieth in a panel are one line there.
    """
    import numpy as np
    from matplotlib.figure import Figure

    from optax_sam import plots

    steps = {"SGD": "base optimizer"} | {s: s for s in (BASE, "sam", "saner", "1-SAM")}
    columns = {
        key: here
        for key, here in groups(
            [r for r in records if "error" not in r and r["step"] in steps],
            *("network", "layout", "chip"),
        ).items()
        if key in DRAWN and len({record["chips"] for record in here}) > 1
    }
    if not columns:
        return None
    measured = (("roofline", 1e-3, "least time, ms"), ("sent", 1e9, "sent by a chip, GB"))
    panels = [
        (f"{network}, {chip}, {layout}:\n{title}", {
            name: [
                next((r[key] / unit for r in here if (r["step"], r["chips"]) == (step, many)), np.nan)
                for many in MANY
            ]
            for step, name in steps.items()
        })
        for (network, layout, chip), here in columns.items()
        for key, unit, title in measured
    ]  # fmt: skip
    drawn = Figure(figsize=(4.4, 1.9 * len(panels)), layout="constrained", facecolor="none")
    drawn.get_layout_engine().set(hspace=0.08)
    for axes, (title, lines) in zip(drawn.subplots(len(panels), 1), panels, strict=True):
        axes.set_title(title, loc="left", fontsize=9.5, color=plots.TEXT)
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1.3 * np.nanmax([*lines.values()]))
        named = {textwrap.fill(name, 15): line for name, line in merged(lines).items()}
        plots.curves(named, MANY, xlabel="chips", axes=axes)
        axes.set_xticks(MANY, [str(value) for value in MANY])
    return drawn


def merged(lines: dict[str, list[float]]) -> dict[str, list[float]]:
    """Lines that nobody can tell apart as one with all of their names; empty ones are left out."""
    found: dict[str, list[float]] = {}
    for name, values in lines.items():
        same = [key for key, line in found.items() if equal(line, values)]
        if same:
            found = {key + (f", {name}" if key in same else ""): found[key] for key in found}
        elif any(value == value for value in values):
            found[name] = values
    return found


def equal(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two lines have the same points, to a fiftieth; a missing one is NaN."""
    return all(
        (a != a and b != b) or abs(a - b) < 0.02 * a for a, b in zip(first, second, strict=True)
    )


def write(records: Sequence[Record], output: Path) -> None:
    """``aims.md``, ``chosen.md``, ``steps_NETWORK.md`` of every network, and ``chips.svg``."""
    if not records:
        return
    chosen = [r for r in records if (r["network"], r["layout"], r["chip"]) in DRAWN]
    texts = {
        "aims": aims(records),
        "chosen": tables([r for r in chosen if r["chips"] == SHOWN]),
        **{
            "steps_" + network.replace(", ", "_"): tables(here)
            for (network,), here in groups(records, "network").items()
        },
    }
    for name, text in texts.items():
        (output / f"{name}.md").write_text(text, encoding="utf-8")
    from matplotlib import rc_context

    if (drawn := figure(records)) is not None:
        with rc_context({"font.size": 9, "svg.hashsalt": "optax_sam"}):
            drawn.savefig(output / "chips.svg", metadata={"Date": None})
