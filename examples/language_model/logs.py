"""Where a run's numbers go: the terminal and a CSV file."""

import contextlib
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .output_folder import write_atomically

Row = dict[str, float]
"""The numbers of some steps: ``step``, ``loss``, ``validation_loss``, ..."""


def write_json(path: Path, value: Any) -> None:
    """Writes a readable JSON file."""
    write_atomically(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_csv(path: Path, rows: list[Row]) -> None:
    """Writes one line per row; a number that a row lacks is an empty cell."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    csv.writer(text).writerows(
        [columns, *([row.get(name, "") for name in columns] for row in rows)]
    )
    write_atomically(path, text.getvalue())


def read_csv(path: Path) -> list[Row]:
    """What :func:`write_csv` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: float(value) for name, value in row.items() if value != ""}
            for row in csv.DictReader(file)
        ]


class Terminal:
    """A progress bar over the steps and a line per row of numbers."""

    def __init__(self, progress: Progress, task: Any):
        self._progress, self._task = progress, task

    def step(self, done: int) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=done, description=f"step {done}")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(text, highlight=False, soft_wrap=True)

    def row(self, row: Row, steps: int) -> None:
        """Prints what some steps gave."""
        parts = [f"step {int(row['step']):>{len(str(steps))}}/{steps}", f"loss {row['loss']:.3f}"]
        names = {"validation_loss": "validation", "earlier_loss": "earlier text"}
        names |= {name: name.replace("_", " ") for name in ("noisy_accuracy", "clean_accuracy")}
        names["memorized"] = "memorized"
        parts += [f"{names[name]} {row[name]:.3f}" for name in names if name in row]
        self.say("  ".join([*parts, f"{row['bytes_per_second']:,.0f} bytes/s"]))


@contextlib.contextmanager
def terminal(total_steps: int, first_step: int, visible: bool) -> Iterator[Terminal]:
    """Shows the progress of a run, of which ``first_step`` steps are done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(quiet=not visible)
    with Progress(*columns, console=console, disable=not visible) as progress:
        task = progress.add_task("", total=total_steps, completed=first_step)
        yield Terminal(progress, task)
