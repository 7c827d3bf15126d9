"""The tables and the figure of the steps that were compiled for pods."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compiled_text import Collective
from benchmarks.pod_networks import NETWORKS
from benchmarks.tables import markdown, number

Record = dict[str, Any]

BASE = "SAM by hand"
# Ratios to SAM by hand, and what is aimed at.
AIMS = {"flops": 1.02, "bytes": 1.02, "collectives": 1.02, "sent": 1.02, "memory": 1.05}
TITLES = {
    "flops": "FLOPs",
    "bytes": "bytes",
    "memory": "memory",
    "collectives": "collectives",
    "sent": "bytes sent",
    "roofline": "least time",
}
GRADIENT = 2**20  # bytes; smaller all-reduces are those of norms, losses and statistics
COLUMNS = {
    "all-reduces": ("all-reduce",),
    "reduce-scatters": ("reduce-scatter",),
    "gathers": ("all-gather",),
    "others": ("all-to-all", "collective-permute"),
}
MANY = (4, 16, 64, 256)


def measures(record: Record) -> dict[str, float]:
    """What the tables show of a record, as numbers."""
    found = [Collective(*one) for one in record["collectives"]]
    large = [one for one in found if one.size >= GRADIENT]
    return {
        **{key: record[key] for key in ("flops", "bytes", "memory", "sent", "roofline")},
        "collectives": sum(one.times for one in found),
        **{
            column: sum(one.times for one in large if one.kind in COLUMNS[column])
            for column in COLUMNS
        },
    }


def name_of(record: Record) -> str:
    """The step's name in the tables: that of the base optimizer for its own step."""
    is_base = record["step"] == "SGD"
    return NETWORKS[record["network"]].optimizer_name if is_base else record["step"]


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
            rows.append([name_of(record), "does not compile: " + record["error"]])
            rows[-1] += ["–"] * (len(header) - 2)
            continue
        here = compiled[record["step"]]
        ratios = [here[key] / base[key] if base and base[key] else None for key in TITLES]
        counts = [str(here[column]) for column in COLUMNS]
        rows.append(
            [name_of(record), *ratios, *counts, record["slowest"], f"{record['compile']:.0f}"]
        )
    return markdown(header, rows) + (f"\n{absolute(base)}\n" if base else "")


def absolute(base: dict[str, float]) -> str:
    """What one is, per chip."""
    return (
        f"{BASE}: {base['flops'] / 1e12:.2f} TFLOP, {base['bytes'] / 1e9:.1f} GB read and written, "
        f"{base['memory'] / 1e9:.2f} GB of memory, {base['collectives']} collectives, "
        f"{base['sent'] / 1e9:.2f} GB sent, at least {1000 * base['roofline']:.1f} ms."
    )


def aims(records: Sequence[Record]) -> str:
    """The largest ratio to SAM by hand of our methods in every layout; misses are bold."""
    rows = []
    for (network, layout, chip, chips), here in groups(
        records, "network", "layout", "chip", "chips"
    ).items():
        compiled = {r["step"]: measures(r) for r in here if "error" not in r}
        if BASE not in compiled:
            continue
        ours = {
            s: m
            for s, m in compiled.items()
            if not s.endswith(("SGD", "by hand")) and "optax." not in s
        }
        if not ours:
            continue
        cells = []
        for key, aim in AIMS.items():
            ratio = {s: m[key] / max(compiled[BASE][key], 1) for s, m in ours.items()}
            worst = max(ratio, key=lambda step: ratio[step])
            missed = [step for step in ratio if ratio[step] > aim]
            text = f"{number(ratio[worst])} {worst}"
            cells.append(f"**{text}**, {len(missed)} of {len(ours)}" if missed else text)
        rows.append([f"{network}, {layout}, {chips} {chip}", *cells])
    header = ["largest ratio to SAM by hand", *(f"{TITLES[k]} ≤ {v}" for k, v in AIMS.items())]
    return markdown(header, rows)


def figure(records: Sequence[Record]) -> Any:
    """Least time and bytes sent against the number of chips, one column for network and layout."""
    from matplotlib.figure import Figure

    from benchmarks.figures import GREY, style

    colors = ("#999999", "#000000", "#e69f00", "#0072b2", "#d55e00", "#009e73")
    steps = ("SGD", BASE, "optax.contrib.sam, opaque", "sam", "saner", "1-SAM")
    columns = {
        key: here
        for key, here in groups(
            [r for r in records if "error" not in r and r["step"] in steps],
            *("network", "layout", "chip"),
        ).items()
        if len({record["chips"] for record in here}) > 1
    }
    if not columns:
        return None
    width = max(6.5, 1 + 2.8 * len(columns))  # the legend needs that much
    drawn = Figure(figsize=(width, 5.4), layout="constrained")
    panels = drawn.subplots(2, len(columns), squeeze=False)
    for column, ((network, layout, chip), here) in enumerate(columns.items()):
        for row, (key, unit, label) in enumerate(
            [("roofline", 1e-3, "least time [ms]"), ("sent", 1e9, "sent by a chip [GB]")]
        ):
            axes = panels[row][column]
            style(axes, f"{network}, {chip}\n{layout}" if row == 0 else "")
            for step, color in zip(steps, colors, strict=True):
                points = sorted((r["chips"], r[key] / unit) for r in here if r["step"] == step)
                if points:
                    name = "base optimizer" if step == "SGD" else step
                    axes.plot(*zip(*points, strict=True), "o-", color=color, label=name, ms=4)
            axes.set_xscale("log", base=2)
            axes.set_xticks(MANY, [str(value) for value in MANY])
            axes.set_ylim(bottom=0)
            if column == 0:
                axes.set_ylabel(label, color=GREY)
            if row == 1:
                axes.set_xlabel("chips", color=GREY)
    labels: dict[str, Any] = {}
    for axes in panels.flat:
        labels |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    drawn.legend(labels.values(), labels.keys(), loc="outside lower left", ncols=3, frameon=False)
    return drawn


def write(records: Sequence[Record], output: Path) -> None:
    """``steps.md``, ``aims.md`` and ``chips.svg``."""
    if not records:
        return
    parts = groups(records, "network", "layout", "chip", "chips")
    (output / "steps.md").write_text("\n".join(map(table, parts.values())), encoding="utf-8")
    (output / "aims.md").write_text(aims(records), encoding="utf-8")
    if (drawn := figure(records)) is not None:
        drawn.savefig(output / "chips.svg")
