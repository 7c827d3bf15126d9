"""Turns several run folders into one table and two figures.

    python -m examples.image_classification.compare runs/* --output runs/comparison
    python -m examples.image_classification.compare --redraw --output runs/comparison

The second command draws points.png again, from the table.csv of the first. Runs that differ in nothing
but the seed are one line: mean ± standard deviation.
"""

import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from optax_sam import plots

from . import logs
from .config import differences
from .figures import STYLE, save
from .methods import NAMES
from .output_folder import explain, held, write_atomically

PROGRAM = "python -m examples.image_classification.compare"

COLUMNS = {
    "test, last epoch": ("last", "test_accuracy"),
    "test, best epoch": ("best", "test_accuracy"),
    "correct labels fitted": ("last", "clean_fit"),
    "wrong labels memorized": ("last", "memorized"),
}
HEADERS = (
    *("run", "seeds", "test, last\nepoch [%]", "test, best\nepoch [%]"),
    *("correct\nfitted [%]", "memorized\n[%]", "images\n/ s"),
)
"""The columns as the terminal shows them, which may be only 80 characters wide."""


OF_METHODS = {
    *("rho", "kappa", "flip_ratio", "down_weight", "down_weight_warmup"),
    *("perturbation", "method_starts"),
}
"""Settings that mean nothing to SGD."""

COLORS = (*plots.COLORS, "#8C6D31")
"""A method's, so that all can be read on white and on a dark page."""

BANDS = 5
"""Up to so many settings the curves have bands; more of them hide each other."""


class FinishedRun(NamedTuple):
    """What a run folder holds.

    Attributes:
      folder: where.
      results: ``results.json``.
      rows: ``metrics.csv``, one per epoch.
    """

    folder: Path
    results: dict[str, Any]
    rows: list[logs.Row]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Turns several run folders into one table and two figures."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of finished runs."""

    output: Path = Path("runs/comparison")
    """Folder for table.md, table.csv, curves.png and points.png."""

    redraw: bool = False
    """Draw points.png again from the table.csv in the folder. No runs are needed."""


def read_run(folder: Path) -> FinishedRun:
    """Reads a finished run.

    Raises:
      ValueError: if the folder holds none.
    """
    name = "results.json"
    try:
        results = json.loads((folder / name).read_text(encoding="utf-8"))
        config, last = results["config"], results["last"]
        if (
            not {"method", "seed"} <= config.keys()
            or not {"best", "labels_sha256"} <= results.keys()
        ):
            raise ValueError("it holds no results")
        name = "metrics.csv"
        rows = logs.read_csv(folder / name)
        if not rows or rows[-1]["epoch"] != last["epoch"]:
            raise ValueError("it ends at another epoch than results.json")
        return FinishedRun(folder, results, rows)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{folder}: {name} is damaged, or not of this program ({error}). Write it again with "
            "--resume, or leave this folder out."
        ) from None
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = "training has not finished" if (folder / "config.json").exists() else "no run"
        raise ValueError(
            f"{folder} cannot be compared ({reason}): {Path(error.filename).name} is missing. Finish "
            "it with --resume, or leave it out."
        ) from None


def setting_name(config: dict[str, Any], differing: set[str]) -> str:
    """A setting as people write it: "SAM, ρ = 0.1", "1-SAM, ρ = 0.02", "SGD"."""
    method = NAMES.get(config["method"], config["method"])
    has_groups = config["method"] != "sgd" and config.get("group_size") is not None
    if "group_size" in differing and has_groups:
        method = f"{config['group_size']}-{method}"
    parts = [method]
    for name in sorted(differing - {"method", "group_size"}):
        if config.get(name) is None or (config["method"] == "sgd" and name in OF_METHODS):
            continue
        symbol = {"rho": "ρ", "kappa": "κ", "down_weight": "α"}.get(name)
        value = f"{symbol} = {config[name]}" if symbol else f"{name} {config[name]}"
        parts.append(value)
    return ", ".join(parts)


def place(run: FinishedRun) -> tuple[float, ...]:
    """Where a run stands in the table: SGD first, then by method, group size and radius."""
    config = run.results["config"]
    methods = [*NAMES]
    method = methods.index(config["method"]) if config["method"] in methods else len(methods)
    return method, -(config.get("group_size") or np.inf), config.get("rho") or 0


def group_runs(runs: list[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """The runs of each setting, named by the settings in which they differ."""
    configs = [run.results["config"] for run in runs]
    differing = {
        name for config in configs for name in differences(configs[0], config) if name != "seed"
    }
    groups: dict[str, list[FinishedRun]] = {}
    for run in sorted(runs, key=place):
        name = setting_name(run.results["config"], differing)
        groups.setdefault(name, []).append(run)
    for name, members in groups.items():
        seeds = [run.results["config"]["seed"] for run in members]
        if len(set(seeds)) != len(seeds):
            folders = ", ".join(str(run.folder) for run in members)
            raise ValueError(f"the same run ({name}) is there twice: {folders}. Leave one out.")
    return groups


def table_rows(groups: dict[str, list[FinishedRun]]) -> list[dict[str, Any]]:
    """Means and standard deviations over the seeds, in percent; the deviation of one run is NaN."""
    rows = []
    for name, members in groups.items():
        row: dict[str, Any] = {"run": name, "seeds": len(members)}
        for title, (which, measure) in COLUMNS.items():
            values = [100 * run.results[which].get(measure, np.nan) for run in members]
            row[title] = np.mean(values)
            row[f"{title}, deviation"] = np.std(values, ddof=1) if len(values) > 1 else np.nan
        # The median: the first epoch after a start has the compilation in it.
        row["images per second"] = np.mean(
            [np.median([epoch["images_per_second"] for epoch in run.rows]) for run in members]
        )
        rows.append(row)
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    texts = [row["run"], str(row["seeds"])]
    for title in COLUMNS:
        mean, deviation = row[title], row[f"{title}, deviation"]
        text = "–" if np.isnan(mean) else f"{mean:.1f}"
        texts.append(text if np.isnan(deviation) else f"{text} ± {deviation:.1f}")
    return [*texts, f"{row['images per second']:,.0f}"]


def markdown(rows: list[dict[str, Any]], notes: list[str]) -> str:
    """The table for a page."""
    header = ["run", "seeds", *COLUMNS, "images/s"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    lines += ["", "Shares in percent, mean ± standard deviation over the seeds.", *notes]
    return "\n".join(lines) + "\n"


def label_notes(groups: dict[str, list[FinishedRun]]) -> list[str]:
    """Says which seeds did not see the same labels in all settings."""
    digests: dict[int, set[str]] = {}
    for run in (run for members in groups.values() for run in members):
        digests.setdefault(run.results["config"]["seed"], set()).add(run.results["labels_sha256"])
    return [
        f"seed {seed}: the runs were trained on {len(found)} different sets of labels"
        for seed, found in sorted(digests.items())
        if len(found) > 1
    ]


def plot(groups: dict[str, list[FinishedRun]]) -> Figure:
    """Test accuracy and memorization per epoch, one line per setting."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4), layout="constrained")
        panels = figure.subplots(1, 2)
        titles = {"test_accuracy": "test accuracy, %", "memorized": "wrong labels memorized, %"}
        for axes, (measure, title) in zip(panels, titles.items(), strict=True):
            for (name, members), style in zip(groups.items(), styles([*groups]), strict=True):
                measured = [
                    {row["epoch"]: row[measure] for row in run.rows if measure in row}
                    for run in members
                ]
                epochs = sorted(set.intersection(*(set(one) for one in measured)))
                values = 100 * np.array([[one[epoch] for epoch in epochs] for one in measured])
                mean = values.mean(axis=0)
                axes.plot(epochs, mean, label=name, **style)
                if len(values) > 1 and len(groups) <= BANDS:
                    deviation = values.std(axis=0, ddof=1)
                    band = {"color": style["color"], "alpha": 0.2, "linewidth": 0}
                    axes.fill_between(epochs, mean - deviation, mean + deviation, **band)
            axes.set(xlabel="epoch", ylabel=title)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def styles(names: list[str]) -> list[dict[str, Any]]:
    """A color for each method, and another dash for each of its settings."""
    colors: dict[str, Any] = {}
    used: dict[str, int] = {}
    found = []
    for name in names:
        method = name.partition(",")[0]
        color = colors.setdefault(method, COLORS[len(colors) % len(COLORS)])
        dash = ("-", "--", ":", "-.")[used.get(method, 0) % 4]
        used[method] = used.get(method, 0) + 1
        found.append({"color": color, "linestyle": dash})
    return found


def plot_rows(rows: list[dict[str, Any]]) -> Figure:
    """The table as a picture: a line per setting, as the table has them, and a color per method."""
    titles = {
        "test, last epoch": "test accuracy,\nlast epoch, %",
        "wrong labels memorized": "wrong labels\nmemorized, %",
    }
    names = [row["run"] for row in rows]
    with matplotlib.rc_context(STYLE | {"font.size": 12}):
        width = 3.7 + 0.09 * max(map(len, names))  # the names stand beside the panels
        size = width, 1.3 + 0.32 * len(rows)
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (column, title) in zip(panels, titles.items(), strict=True):
            for height, (row, style) in enumerate(zip(rows, styles(names), strict=True)):
                deviation = np.nan_to_num(row[f"{column}, deviation"])
                look = {"fmt": "o", "color": style["color"]}
                axes.errorbar(row[column], height, xerr=deviation, **look)
            axes.set_facecolor("none")
            axes.set_xlabel(title, color=plots.TEXT)
            axes.tick_params(colors=plots.TEXT)
            axes.spines[:].set_color(plots.TEXT)
        panels[0].set_yticks(range(len(rows)), names)
        panels[0].invert_yaxis()
    return figure


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``table.csv``.

    Raises:
      ValueError: if it is none of this program.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        numbers = [*COLUMNS, *(f"{title}, deviation" for title in COLUMNS)]
        if not rows:
            raise ValueError("it has no rows")
        return [{"run": row["run"]} | {name: float(row[name]) for name in numbers} for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no table of this program ({error!r}). Compare the runs again to write it."
        ) from None


def redraw(comparison: Comparison) -> None:
    """Draws ``points.png`` from ``table.csv``."""
    if comparison.runs:
        raise ValueError(
            f"--redraw: it takes no runs, {len(comparison.runs)} are given. Leave out them or --redraw."
        )
    output = comparison.output
    rows = read_table(output / "table.csv")
    with held(output):
        save(plot_rows(rows), output / "points.png")
    Console().print(f"drawn: {output / 'points.png'}", soft_wrap=True)


def compare(comparison: Comparison) -> list[dict[str, Any]]:
    """Prints the table and writes the files."""
    # As runs/* has the last comparison too.
    folders = [
        folder for folder in comparison.runs if folder.resolve() != comparison.output.resolve()
    ]
    if not folders:
        besides = f" besides --output {comparison.output}" if comparison.runs else ""
        raise ValueError(f"no runs are given{besides}. Name the folders of finished runs.")
    groups = group_runs([read_run(folder) for folder in folders])
    with held(comparison.output):
        return _report(groups, comparison.output)


def _report(groups: dict[str, list[FinishedRun]], output: Path) -> list[dict[str, Any]]:
    rows = table_rows(groups)
    notes = label_notes(groups)

    table = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(HEADERS):
        table.add_column(name, justify="right" if index else "left", no_wrap=index > 0)
    for row in rows:
        table.add_row(*cells(row))
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note)

    write_atomically(output / "table.md", markdown(rows, notes))
    logs.write_csv(output / "table.csv", rows)
    save(plot(groups), output / "curves.png")
    save(plot_rows(rows), output / "points.png")
    console.print(f"files in {output}: table.md, table.csv, curves.png, points.png", soft_wrap=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    try:
        comparison = tyro.cli(Comparison, args=arguments, prog=PROGRAM)
        if comparison.redraw:
            redraw(comparison)
        else:
            compare(comparison)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {explain(error)}")


if __name__ == "__main__":
    main()
