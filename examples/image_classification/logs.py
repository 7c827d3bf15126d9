"""Where a run's numbers go: the terminal, a CSV file and TensorBoard."""

import contextlib
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorboardX
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .output_folder import write_atomically

Row = dict[str, float]
"""An epoch's numbers: ``epoch``, ``loss``, ``test_accuracy``, ..."""


def write_json(path: Path, value: Any) -> None:
    """Writes a readable JSON file."""
    write_atomically(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_csv(path: Path, rows: list[Row]) -> None:
    """Writes one line per epoch; a number that an epoch lacks is an empty cell."""
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


class TensorBoard:
    """Writes the rows as TensorBoard scalars.

    Args:
      folder: of the event files.
      rows: of a resumed run. They are written again, and what earlier event files say is ignored: a
        run that was killed may have told more, or less, than its checkpoint knows.
    """

    def __init__(self, folder: Path, rows: list[Row]):
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=0)
        for row in rows:
            self.write(row)

    def write(self, row: Row) -> None:
        """One scalar for every number."""
        epoch = int(row["epoch"])
        for name, value in row.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class Terminal:
    """A progress bar over the steps and a line per finished epoch."""

    def __init__(self, progress: Progress, task: Any):
        self._progress, self._task = progress, task

    def step(self, done: int, text: str) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=done, description=text)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(text, highlight=False, soft_wrap=True)

    def epoch(self, row: Row, epochs: int) -> None:
        """Prints what an epoch gave."""
        parts = [
            f"epoch {int(row['epoch']):>{len(str(epochs))}}/{epochs}",
            f"loss {row['loss']:.3f}",
        ]
        names = {"test_accuracy": "test", "clean_fit": "clean", "memorized": "memorized"}
        parts += [f"{names[name]} {100 * row[name]:.1f} %" for name in names if name in row]
        parts.append(f"{row['images_per_second']:,.0f} images/s")
        parts.append(f"input {100 * row['input_share']:.1f} %")
        self.say("  ".join(parts))


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
