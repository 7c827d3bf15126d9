"""Test accuracy and memorization along weight decay, from the runs of the evidence.

    python -m examples.frozen_features.decay_figure docs/results/frozen_features/runs.jsonl \\
        --output docs/images/human_labels.png

Legible on a phone, on white and on a dark page: one panel below the other, transparent, with each name
beside its line.

Lines are trials (seed 0, without the held-out rows); the marks are five seeds of the settings that the
held-out noisy labels chose.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .claims import contender
from .data import DataError
from .evidence import read_runs
from .figures import STYLE, png
from .output_folder import write_atomically
from .sets import SETS
from .summary import candidates, finals

COLORS = {
    "SGD": "#7f7f7f",
    "SAM": "#1f77b4",
    "SANER": "#8e5bb5",
    "SCE": "#2f9e5b",
    "SANER + SCE": "#d1495b",
}
TEXT = "#767676"  # stands out from white paper and from a dark page
CHOSEN = "chosen, 5 seeds"
PANELS = (("test", "test accuracy, %"), ("memorized", "wrong labels memorized, %"))


@dataclasses.dataclass(frozen=True)
class Command:
    """Settings of the figure."""

    runs: tyro.conf.Positional[Path]
    """The runs.jsonl of the evidence."""

    output: Path
    """A .png file."""

    set: str = "cifar10n_worse"
    """Data set."""

    contenders: tuple[str, ...] = ("SGD", "SCE", "SAM", "SANER + SCE")
    """Some of SGD, SAM, SANER, SCE, SANER + SCE."""

    radii: tuple[float, ...] = (0.2,)
    """Radii that are drawn."""

    strength: float = 0.5
    """Of the loss, in the trials that are drawn."""

    rate: float = 0.02
    """Learning rate of the trials that are drawn."""


def lines(rows: list[dict[str, Any]], command: Command) -> dict[tuple[str, float], list[Any]]:
    """Per contender and radius: its trials with this learning rate, in the order of the decay."""
    found: dict[tuple[str, float], list[Any]] = {}
    for name in command.contenders:
        _, tried = candidates(rows, command.set, contender(name))
        for row in sorted(tried, key=lambda row: (row["knobs"]["rho"], row["knobs"]["decay"])):
            knobs = row["knobs"]
            drawn = (
                knobs["rate"] == command.rate
                and knobs["rho"] in (0, *command.radii)
                and knobs["strength"] in (0, command.strength)
            )
            if drawn:
                found.setdefault((name, knobs["rho"]), []).append(row)
    return found


def draw(rows: list[dict[str, Any]], command: Command) -> Figure:
    """Both panels, one below the other.

    Raises:
      DataError: where nothing has run on the data set.
    """
    found = lines(rows, command)
    if not found:
        raise DataError(f"--set: {command.set!r} has no trials of {command.contenders}.")
    figure = Figure(figsize=(4.2, 6.2), layout="constrained", facecolor="none")
    strongest = max(rho for _, rho in found) or 1.0
    for axes, (measure, title) in zip(figure.subplots(2, 1), PANELS, strict=True):
        starts = {}
        for (name, rho), trials in found.items():
            decays = [row["knobs"]["decay"] for row in trials]
            values = [100 * row[measure] for row in trials]
            style = {"alpha": 0.5 + 0.5 * rho / strongest if rho else 1.0, "marker": "."}
            axes.plot(decays, values, color=COLORS[name], linestyle="-" if rho else "--", **style)
            several = rho and len(command.radii) > 1
            starts[f"{name}, ρ = {rho:g}" if several else name] = decays[0], values[0], COLORS[name]
        for name in command.contenders:
            runs = list(finals(rows, command.set, contender(name)).values())
            if runs:
                values = 100 * np.array([run[measure] for run in runs])
                decay, spread = runs[0]["knobs"]["decay"], values.std(ddof=1)
                style = {"fmt": "D", "markersize": 5, "capsize": 4, "label": CHOSEN}
                axes.errorbar(decay, values.mean(), spread, color=COLORS[name], **style)
        _prepare(axes, title)
        _name_at_starts(axes, starts)
    notes = [f"◆ {CHOSEN}"]
    if len(command.radii) == 1:
        notes.append(f"lines: ρ = {command.radii[0]:g}")
    figure.axes[0].text(
        0.98, 0.04, "\n".join(notes), color=TEXT, ha="right", transform=figure.axes[0].transAxes
    )
    return figure


def _prepare(axes: Axes, title: str) -> None:
    axes.set_xscale("log")
    axes.set_xlim(left=4e-5)  # room for the names
    axes.set_xticks([1e-3, 1e-2], ["0.001", "0.01"])
    axes.set_xlabel("weight decay", color=TEXT)
    axes.set_title(
        title, fontsize=11, loc="left", color=TEXT, pad=14
    )  # a name may stand at the top
    axes.set_facecolor("none")
    axes.tick_params(colors=TEXT, which="both")
    for spine in axes.spines.values():
        spine.set_color(TEXT)


def _name_at_starts(axes: Axes, starts: dict[str, tuple[float, float, str]]) -> None:
    """Each name to the left of its line, moved up where it would touch the one below."""
    gap = np.ptp(axes.get_ylim()) / 15
    lowest = -np.inf
    for name, (decay, value, color) in sorted(starts.items(), key=lambda item: item[1][1]):
        lowest = max(value, lowest + gap)
        place = {"ha": "right", "va": "center", "color": color}
        axes.text(0.85 * decay, lowest, name, **place)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    command = tyro.cli(Command, args=arguments, description=__doc__)
    try:
        if command.set not in SETS:
            raise DataError(f"--set: {command.set!r} is not valid. Choose from {', '.join(SETS)}.")
        if not set(command.contenders) <= set(COLORS):
            raise DataError(f"--contenders: choose from {', '.join(COLORS)}.")
        with matplotlib.rc_context(STYLE):
            write_atomically(command.output, png(draw(read_runs(command.runs), command)))
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
