"""Turns several run folders into one table and one figure.

    python -m examples.language_model.compare runs/* --output runs/comparison

Runs that differ in nothing but the seed are one line: mean ± standard deviation.
"""

import dataclasses
import json
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console

from optax_sam import plots

from . import logs
from .config import BOOKKEEPING, complete, differences
from .figures import save
from .output_folder import explain, held, write_atomically

PROGRAM = "python -m examples.language_model.compare"
IDENTITY = {
    *("config", "last", "before", "best_validation_loss", "sharpness", "gradients", "text_sha256"),
}

COLUMNS = {
    "validation loss": lambda run: run["last"]["validation_loss"],
    "earlier text": lambda run: run["last"].get("earlier_loss", np.nan),
    "forgotten": lambda run: (
        run["last"].get("earlier_loss", np.nan) - run["before"].get("earlier_loss", np.nan)
    ),
    "noisy accuracy": lambda run: run.get("all_texts", {}).get("noisy_accuracy", np.nan),
    "clean accuracy": lambda run: run.get("all_texts", {}).get("clean_accuracy", np.nan),
    "memorized": lambda run: run.get("all_texts", {}).get("memorized", np.nan),
    "rise at ε": lambda run: run["sharpness"]["rise"],
    "eigenvalue": lambda run: run["sharpness"].get("eigenvalue", np.nan),
}
"""Title of a column -> its number of a run."""

PANELS = {
    "validation_loss": "validation loss, nats per {}",
    "earlier_loss": "loss of the earlier text, nats per {}",
    "noisy_accuracy": "held out, given labels",
    "clean_accuracy": "held out, true labels",
    "memorized": "wrong labels that are predicted",
}
"""Number of a row -> what it is, for the figure."""

LINES = 5
"""So many in a panel can be told apart, each named beside its end; the first run is in every panel."""

OF_TEXT = (
    *("task", "text", "pattern", "validation_share", "context", "noise_rate"),
    *("text_column", "label_column", "clean_label_column", "answer_columns"),
)
"""Settings that decide the text: runs that agree in them learned the same, if no file has changed."""

NOT_NAMED = BOOKKEEPING | {"seed", "method", "start_from"}
"""Settings in which runs of one line may differ, and the method, which comes first."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Turns several run folders into one table and one figure."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of finished runs."""

    output: Path = Path("runs/comparison")
    """Folder for table.md, table.csv and curves.png."""


def read_run(folder: Path) -> dict[str, Any]:
    """The results of a finished run, with its ``folder`` and the rows of its metrics.csv as ``rows``.

    Raises:
      ValueError: if the folder holds none.
    """
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        rows = logs.read_csv(folder / "metrics.csv")
        if not results.keys() >= IDENTITY or rows[-1]["step"] != results["last"]["step"]:
            raise ValueError("its files do not fit together")
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} holds no finished run: {Path(error.filename).name} is missing. Finish it with "
            "--resume, or leave it out."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{folder} is damaged, or not of this program ({error}). Leave it out."
        ) from None
    return results | {"folder": str(folder), "rows": rows}


def group_runs(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each setting, named by the settings in which they differ.

    Runs that start from others are one line if the folders of those differ in the number at the end
    alone, where a seed is expected: ``runs/sam_0``, ``runs/sam_1``.

    Raises:
      ValueError: if their tasks differ, or if a line would have a seed twice.
    """
    configs = [complete(run["config"]) for run in runs]
    if len(tasks := sorted({config["task"] for config in configs})) > 1:
        raise ValueError(f"the tasks of these runs are {' and '.join(tasks)}. Compare runs of one.")
    differing = {name for config in configs for name in differences(configs[0], config)} - NOT_NAMED
    groups: dict[str, list[dict[str, Any]]] = {}
    for run, config in zip(runs, configs, strict=True):
        names = [config["method"]]
        names += [
            f"{name} {config[name]}" for name in sorted(differing) if config[name] is not None
        ]
        if config["start_from"] is not None:
            names.append(f"from {re.sub('_[0-9]+$', '', config['start_from'])}")
        groups.setdefault(", ".join(names), []).append(run)
    for name, members in groups.items():
        seeds = [run["config"]["seed"] for run in members]
        if len(set(seeds)) < len(seeds):
            folders = ", ".join(run["folder"] for run in members)
            raise ValueError(
                f"a seed of one setting ({name}) is there twice: {folders}. Leave one run out."
            )
    return groups


def text_notes(groups: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Says which runs name the same text and learned different ones."""
    digests: dict[str, set[str]] = {}
    for run in (run for members in groups.values() for run in members):
        config = complete(run["config"])
        key = json.dumps([config["text"], *(config[name] for name in OF_TEXT)])
        digests.setdefault(key, set()).add(run["text_sha256"])
    return [
        f"--text {json.loads(key)[0]}: the runs have learned {len(found)} different texts of this name"
        for key, found in digests.items()
        if len(found) > 1
    ]


def cell(values: list[float]) -> str:
    """Mean and, of several values, standard deviation."""
    if np.isnan(values).any():
        return "–"
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"


def numbers_of(groups: dict[str, list[dict[str, Any]]]) -> list[logs.Row]:
    """A row per run: its line of the table, its seed, and its numbers."""
    return [
        {"run": name, "seed": run["config"]["seed"]}
        | {"steps": run["config"]["steps"], "gradients": run["gradients"]}
        | {title: number(run) for title, number in COLUMNS.items()}
        for name, runs in groups.items()
        for run in runs
    ]


def table(rows: list[logs.Row]) -> list[list[str]]:
    """The header and a line per setting; a column without any number is left out."""
    lines = [["run", "seeds", "steps", "gradients", *COLUMNS]]
    for name in dict.fromkeys(row["run"] for row in rows):
        runs = [row for row in rows if row["run"] == name]
        counts = [len(runs), runs[0]["steps"], runs[0]["gradients"]]
        cells = [cell([run[title] for run in runs]) for title in COLUMNS]
        lines.append([name, *map(str, counts), *cells])
    used = [i for i in range(len(lines[0])) if any(line[i] != "–" for line in lines[1:])]
    return [[line[i] for i in used] for line in lines]


def plot(groups: dict[str, list[dict[str, Any]]]) -> Figure:
    """What the validation gives along the training, mean of the seeds."""
    found = [name for name in PANELS if all(name in runs[0]["last"] for runs in groups.values())]
    unit = "text" if "noisy_accuracy" in found else "byte"
    first, *others = groups
    parts = range(0, max(len(others), 1), LINES - 1)
    panels = [(name, [first, *others[i : i + LINES - 1]]) for name in found for i in parts]
    lengths = {runs[0]["last"]["step"] for runs in groups.values()}
    xlabel = "step" if len(lengths) == 1 else "share of the run's steps, %"
    # One below the other, so that a phone shows the words at a legible size.
    figure = Figure(figsize=(5.2, 3.3 * len(panels)), layout="constrained", facecolor="none")
    all_axes = figure.subplots(len(panels), squeeze=False).ravel()
    for axes, (name, shown) in zip(all_axes, panels, strict=True):
        curves = {}
        for label in shown:
            length = groups[label][0]["last"]["step"]
            scale = 1 if len(lengths) == 1 else 100 / length
            runs = [
                {row["step"] * scale: row[name] for row in run["rows"]} for run in groups[label]
            ]
            unbroken = label.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
            curves[textwrap.fill(unbroken, 24)] = runs
        along = sorted({x for runs in curves.values() for x in runs[0]})
        lines = {
            label: np.mean([_values_at(along, run) for run in runs], axis=0)
            for label, runs in curves.items()
        }
        axes.set_title(PANELS[name].format(unit), loc="left", fontsize=10, color=plots.TEXT)
        axes.margins(y=0.3)  # the names beside the ends need more height than the lines
        plots.curves(lines, along, xlabel=xlabel, axes=axes)
    return figure


def _values_at(along: list[float], run: dict[float, float]) -> np.ndarray:
    """A run's numbers at these places, on straight lines between its own; NaN before and behind."""
    places = sorted(run)
    return np.interp(along, places, [run[x] for x in places], left=np.nan, right=np.nan)


def write(
    folder: Path, groups: dict[str, list[dict[str, Any]]], others: Iterable[logs.Row] = ()
) -> list[list[str]]:
    """Writes table.md, table.csv and curves.png; returns the table.

    Args:
      folder: where to.
      groups: the runs of each line.
      others: rows of runs that are not at hand, for the tables only.
    """
    rows = [*numbers_of(groups), *others]
    header, *lines = table(rows)
    rule = ["---", *["---:"] * (len(header) - 1)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))
    text = "\n\n".join([text, *text_notes(groups)])
    write_atomically(folder / "table.md", text + "\n")
    logs.write_csv(folder / "table.csv", rows)
    save(plot(groups), folder / "curves.png")
    return [header, *lines]


def compare(comparison: Comparison) -> None:
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
        write(comparison.output, groups)
    console = Console()
    text = (comparison.output / "table.md").read_text(encoding="utf-8")
    console.print(text, soft_wrap=True, highlight=False)
    console.print(f"files in {comparison.output}: table.md, table.csv, curves.png", soft_wrap=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    try:
        compare(tyro.cli(Comparison, args=arguments, prog=PROGRAM))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {explain(error)}")


if __name__ == "__main__":
    main()
