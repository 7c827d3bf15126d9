"""What methods add to SGD along the noise rate, by the kind of noise, from the runs of the evidence.

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

from .claims import difference, little_decay
from .evidence import read_runs
from .figures import STYLE, png
from .folder import write_atomically

KINDS = {
    "symmetric": {rate: f"cifar10n_reduced_symmetric_{rate}" for rate in (20, 40, 60)},
    # Half of the classes have a similar one, so half of the rate is wrong.
    "asymmetric": {rate // 2: f"cifar10n_reduced_asymmetric_{rate}" for rate in (20, 40)},
    "by people": {
        9: "cifar10n_reduced_aggregate",
        17: "cifar10n_reduced_random1",
        40: "cifar10n_reduced_worse",
    },
}
"""Data sets that differ in their labels only, by the share of wrong labels in per cent."""

COLORS = {"SAM": "#1f77b4", "SANER": "#d1495b", "GCE": "#2f9e5b"}
MARKERS = {"SAM": "o", "SANER": "s", "GCE": "^"}


@dataclasses.dataclass(frozen=True)
class Command:
    """Settings of the figure."""

    runs: tyro.conf.Positional[Path]
    """The runs.jsonl of the evidence."""

    output: Path
    """A .png file."""


def points(rows: list[dict[str, Any]], kind: str) -> dict[str, list[tuple[float, ...]]]:
    """Per curve (rate, gain, half the interval's width); a curve with little decay has "little"."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for rate, name in KINDS[kind].items():
        level, *gained = little_decay(rows, name)
        for each, value in zip(("SAM", "SANER"), gained, strict=True):
            if math.isnan(value):
                continue
            found.setdefault(f"{each}, little", []).append((rate, value - level, 0.0))
        for each in COLORS:
            pair = difference(rows, name, each, "SGD")
            if pair is not None:
                found.setdefault(each, []).append((rate, *pair))
    return found


def draw(rows: list[dict[str, Any]]) -> Figure:
    """A column per kind of noise."""
    figure = Figure(figsize=(8.6, 5.0), layout="constrained")
    panels = figure.subplots(2, len(KINDS), squeeze=False, sharex=True, sharey="row")
    for column, kind in enumerate(KINDS):
        for curve, values in points(rows, kind).items():
            each, _, little = curve.partition(", ")
            rates, gains, halves = np.array(values).T
            axes = panels[0 if little else 1, column]
            axes.errorbar(
                rates,
                gains,
                None if little else halves,
                color=COLORS[each],
                marker=MARKERS[each],
                markersize=5,
                capsize=3,
                label=each,
            )
        for axes in panels[:, column]:
            axes.axhline(0, color="#7f7f7f", linewidth=0.8, linestyle="--")
        panels[0, column].set_title(kind, fontsize=10, loc="left")
        panels[1, column].set_xlabel("wrong labels, %")
    panels[0, 0].set_ylabel("little weight decay:\npoints above SGD")
    panels[1, 0].set_ylabel("each tuned:\npoints above tuned SGD")
    handles, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=len(COLORS))
    return figure


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    command = tyro.cli(Command, args=arguments, description=__doc__)
    try:
        with matplotlib.rc_context(STYLE):
            write_atomically(command.output, png(draw(read_runs(command.runs))))
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
