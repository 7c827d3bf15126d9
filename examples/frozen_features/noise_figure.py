"""What SAM adds to SGD along the noise rate, by the kind of noise, from the runs of the evidence.

    python -m examples.frozen_features.noise_figure docs/results/frozen_features/runs.jsonl \\
        --output docs/images/noise_rates.png

Above: the smallest weight decay, ρ = 0.4, one seed. Below: each with the setting that the held-out
noisy labels chose, five seeds, with the 95 % interval of the paired difference.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure

from optax_sam import plots

from .claims import difference, little_decay
from .data import DataError
from .evidence import read_runs
from .figures import STYLE, png
from .output_folder import write_atomically

KINDS = {
    "symmetric": {rate: f"cifar10n_reduced_symmetric_{rate}" for rate in (20, 40, 60)},
    # Half of the classes have a similar one, so half of the rate is wrong.
    "asymmetric": {rate // 2: f"cifar10n_reduced_asymmetric_{rate}" for rate in (20, 40, 60)},
    "by people": {
        9: "cifar10n_reduced_aggregate",
        17: "cifar10n_reduced_random1",
        40: "cifar10n_reduced_worse",
    },
}
"""Data sets that differ in their labels only, by the share of wrong labels in per cent."""

STYLES = {
    "symmetric": ("o", plots.COLORS[0]),
    "asymmetric": ("^", plots.COLORS[1]),
    "by people": ("s", plots.COLORS[2]),
}
TITLES = ("little weight decay, ρ = 0.4, one seed", "each tuned, five seeds")


@dataclasses.dataclass(frozen=True)
class Command:
    """Settings of the figure."""

    runs: tyro.conf.Positional[Path]
    """The runs.jsonl of the evidence."""

    output: Path
    """A .png file."""


def points(rows: list[dict[str, Any]], kind: str) -> tuple[list[tuple[float, ...]], ...]:
    """At little decay and tuned: (rate, gain, half the interval's width) of the sets that have run."""
    little, tuned = [], []
    for rate, name in KINDS[kind].items():
        level, gained, _ = little_decay(rows, name)
        if not math.isnan(gained):
            little.append((rate, gained - level, 0.0))
        pair = difference(rows, name, "SAM", "SGD")
        if pair is not None:
            tuned.append((rate, *pair))
    return little, tuned


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Both panels.

    Raises:
      DataError: where nothing has run on these data sets.
    """
    drawn = {kind: points(rows, kind) for kind in STYLES}
    if not any(values for panels in drawn.values() for values in panels):
        raise DataError("RUNS: there are no runs of SGD and SAM on CIFAR-10N. Run them.")
    figure = Figure(figsize=(4.2, 5.6), layout="constrained", facecolor="none")
    panels = figure.subplots(2, 1)
    for kind, (marker, color) in STYLES.items():
        for panel, (axes, values) in enumerate(zip(panels, drawn[kind], strict=True)):
            if values:
                style = {"color": color, "marker": marker, "capsize": 3, "label": kind}
                axes.errorbar(*np.array(values).T, **style)
                place = {"textcoords": "offset points", "va": "center", "color": color}
                # Where people's labels end on the line of zero, another line passes to the right.
                below = kind == "by people" and panel == 1
                offset, place["ha"] = ((0, -14), "right") if below else ((7, 0), "left")
                axes.annotate(kind, values[-1][:2], offset, annotation_clip=False, **place)
    for axes, title in zip(panels, TITLES, strict=True):
        axes.axhline(0, color=plots.TEXT, linewidth=0.8, linestyle="--")
        axes.set_title(title, fontsize=10, loc="left", color=plots.TEXT)
        axes.set_xlabel("wrong labels, %", color=plots.TEXT)
        axes.set_ylabel("SAM: points above SGD", color=plots.TEXT)
        axes.set_facecolor("none")
        axes.tick_params(colors=plots.TEXT)
        for spine in axes.spines.values():
            spine.set_color(plots.TEXT)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    command = tyro.cli(Command, args=arguments, description=__doc__)
    try:
        with matplotlib.rc_context(STYLE):
            write_atomically(command.output, png(draw(read_runs(command.runs))))
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
