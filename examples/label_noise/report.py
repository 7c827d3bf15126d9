"""Progress, tables, files and the figure."""

import contextlib
import csv
import dataclasses
import io
import json
import platform
import textwrap
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax
import numpy as np
from config import Config
from data import Data
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from methods import METHODS
from output_folder import write_atomically
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from train import Epoch

MEASURES = ("loss", "test_accuracy", "clean_fit", "memorized")
COLUMNS = (
    "method",
    "test accuracy, last epoch [%]",
    "test accuracy, best epoch [%]",
    "wrong labels memorized [%]",
    "correct labels fitted [%]",
    "time / SGD",
)
HEADERS = (
    "method",
    "test, last\nepoch [%]",
    "test, best\nepoch [%]",
    "memorized\n[%]",
    "correct\nfitted [%]",
    "time\n/ SGD",
)
"""The columns as the terminal shows them, which may be only 80 characters wide."""
TEXT = "#767676"  # stands out from white paper and from a dark page
DASHES = ("-", "--", "-.", ":")
MOST_BANDS = 6
"""With more methods the bands hide each other, and are left out."""
COMPACT: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False}
"""A table without borders."""


@contextlib.contextmanager
def live_progress(config: Config) -> Iterator[Callable[[Epoch], None]]:
    """Shows one bar per method; yields the function that advances it by an epoch."""
    width = max(len(METHODS[method].label) for method in config.methods)
    progress = Progress(
        TextColumn(f"{{task.description:<{width}}}"),
        BarColumn(bar_width=8),  # all of it fits into 80 characters
        MofNCompleteColumn(),
        TextColumn("{task.fields[measures]}"),
    )
    tasks = {
        method: progress.add_task(
            METHODS[method].label, total=config.epochs, measures="compiling ..."
        )
        for method in config.methods
    }

    def show(epoch: Epoch) -> None:
        mean = {name: values.mean() for name, values in epoch.measures.items()}
        shares = {
            "test": mean["test_accuracy"],
            "clean": mean["clean_fit"],
            "memorized": mean["memorized"],
        }
        text = f"loss {mean['loss']:.3f}"
        for name, share in shares.items():
            text += f"  {name} " + ("-" if np.isnan(share) else f"{share:.0%}")
        progress.update(tasks[epoch.method], advance=1, measures=text)

    with progress:
        yield show


def summarize(config: Config, epochs: list[Epoch]) -> list[tuple[str, ...]]:
    """One row per method, as in ``COLUMNS``: mean ± standard deviation over the seeds."""
    sgd_seconds = _seconds(epochs, "sgd") if "sgd" in config.methods else None
    rows = []
    for method in config.methods:
        test = _curves(epochs, method, "test_accuracy")
        # The machine's speed drifts, and an epoch of SGD ran just before: compare epoch by epoch.
        ratio = "-"
        if sgd_seconds is not None:
            ratio = f"{np.median(_seconds(epochs, method) / sgd_seconds):.2f}"
        rows.append(
            (
                METHODS[method].label,
                mean_and_std(test[-1]),
                mean_and_std(test.max(axis=0)),
                mean_and_std(_curves(epochs, method, "memorized")[-1]),
                mean_and_std(_curves(epochs, method, "clean_fit")[-1]),
                ratio,
            )
        )
    return rows


def print_table(config: Config, epochs: list[Epoch]) -> None:
    """Prints the summary."""
    table = Table(title=_title(config), title_style="bold", title_justify="left", **COMPACT)
    for index, header in enumerate(HEADERS):
        table.add_column(header, justify="right" if index else "left", no_wrap=True)
    for row in summarize(config, epochs):
        table.add_row(*row)
    Console().print(table)


def write_results(config: Config, data: Data, epochs: list[Epoch]) -> None:
    """Writes every epoch as CSV and JSON, the table as Markdown, and the figure in two shapes."""
    wide, narrow = make_figure(config, epochs), make_figure(config, epochs, narrow=True)
    contents = {
        "epochs.csv": _csv(config, epochs).encode(),
        "results.json": _json(config, data, epochs).encode(),
        "table.md": _markdown(config, epochs).encode(),
        "label_noise.png": _image(wide, "png"),
        "label_noise.svg": _image(wide, "svg"),
        "label_noise_narrow.svg": _image(narrow, "svg"),
    }
    for name, content in contents.items():
        write_atomically(config.output / name, content)
    Console().print(f"Results in {config.output}/: {', '.join(contents)}", highlight=False)


def make_figure(config: Config, epochs: list[Epoch], *, narrow: bool = False) -> Figure:
    """Test accuracy and memorization over the epochs; the band is one standard deviation.

    ``narrow`` puts one panel below the other, so that a phone shows the words at a legible size. The
    background is transparent.
    """
    panels = {"test_accuracy": "Test accuracy"}
    if np.isfinite(epochs[0].measures["memorized"]).all():
        panels["memorized"] = "Wrong labels memorized"
    height = max(3.0 if narrow else 4.0, 0.32 * len(config.methods))  # room for a name per method
    rows, columns = (len(panels), 1) if narrow else (1, len(panels))
    size = (4.0, rows * height + 0.3) if narrow else (columns * 5.2, height)
    figure = Figure(figsize=size, layout="constrained", facecolor="none")
    figure.get_layout_engine().set(wspace=0.04, hspace=0.02)
    title = _title(config).replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    title = textwrap.fill(title, 52) if narrow else title
    figure.suptitle(title, fontsize=10, color=TEXT, x=0.01, ha="left")
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (measure, title) in zip(all_axes, panels.items(), strict=True):
        axes.set_facecolor("none")
        axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=TEXT)
        axes.set_xlabel("epoch", color=TEXT)
        axes.yaxis.set_major_formatter("{x:.0f} %")
        axes.grid(axis="y", color=TEXT, alpha=0.25, linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(TEXT)
        axes.tick_params(length=0, colors=TEXT)
        _draw_curves(axes, config, epochs, measure)
    return figure


def _draw_curves(axes: Axes, config: Config, epochs: list[Epoch], measure: str) -> None:
    number = np.arange(1, config.epochs + 1)
    ends, bounds = {}, []
    for index, method in enumerate(config.methods):
        curves = 100 * _curves(epochs, method, measure)
        mean, deviation = curves.mean(axis=1), _deviation(curves)
        low, high = np.clip([mean - deviation, mean + deviation], 0, 100)
        color = METHODS[method].color
        if len(config.methods) <= MOST_BANDS:
            axes.fill_between(number, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(number, mean, color=color, linewidth=2, linestyle=DASHES[index % len(DASHES)])
        ends[method] = mean[-1]
        bounds += [low.min(), high.max()]
    bottom, top = 10 * np.floor(min(bounds) / 10), 10 * np.ceil(max(bounds) / 10)
    top = max(top, bottom + 10)
    axes.set_ylim(bottom, top)
    axes.set_xlim(1, max(config.epochs, 2))
    heights = {method: (end - bottom) / (top - bottom) for method, end in ends.items()}
    for method, height in _spread(heights, gap=0.065).items():
        axes.annotate(
            METHODS[method].label,
            (1, height),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=METHODS[method].color,
            fontweight="bold",
        )


def _spread(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Moves labels apart until neighbors are ``gap`` away from each other."""
    order = sorted(heights, key=heights.__getitem__)
    placed = np.array([heights[method] for method in order])
    for _ in range(100):
        overlap = np.maximum(gap - np.diff(placed), 0) / 2
        placed[:-1] -= overlap
        placed[1:] += overlap
    return dict(zip(order, placed, strict=True))


def _curves(epochs: list[Epoch], method: str, measure: str) -> np.ndarray:
    """Shape ``(epochs, seeds)``."""
    return np.stack([one.measures[measure] for one in epochs if one.method == method])


def _seconds(epochs: list[Epoch], method: str) -> np.ndarray:
    return np.array([one.seconds for one in epochs if one.method == method])


def _title(config: Config) -> str:
    noise = f"{100 * config.noise_rate:g} % {config.noise.replace('_', '-')} label noise"
    count = len(config.seeds)
    spread = f"mean ± standard deviation of {count} seeds" if count > 1 else "one seed"
    momentum = f", momentum={config.momentum:g}" if config.momentum else ""
    optimizer = f"sgd({config.learning_rate:g}{momentum})"
    radii = {config.rho_of(name) for name in config.methods} - {0.0}
    rho = f", ρ = {radii.pop():g}" if len(radii) == 1 else ""
    return f"digits, {noise}, {config.model.upper()}, {optimizer}{rho}; {spread}"


def mean_and_std(shares: np.ndarray) -> str:
    """``mean ± standard deviation`` in percent, over the seeds; without a deviation for one seed."""
    if np.isnan(shares).any():
        return "-"
    mean, deviation = 100 * shares.mean(), 100 * _deviation(shares)
    return f"{mean:.1f} ± {deviation:.1f}" if shares.size > 1 else f"{mean:.1f}"


def _deviation(values: np.ndarray) -> np.ndarray:
    """Sample standard deviation over the last axis, the seeds; zero for a single seed."""
    return values.std(axis=-1, ddof=1) if values.shape[-1] > 1 else np.zeros(values.shape[:-1])


def _csv(config: Config, epochs: list[Epoch]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", "epoch", *MEASURES, "seconds_of_all_seeds"])
    for epoch in epochs:
        for index, seed in enumerate(config.seeds):
            values = [_rounded(epoch.measures[name][index]) for name in MEASURES]
            writer.writerow([epoch.method, seed, epoch.number, *values, round(epoch.seconds, 6)])
    return text.getvalue()


def _json(config: Config, data: Data, epochs: list[Epoch]) -> str:
    settings = dataclasses.asdict(config) | {"output": str(config.output)}
    packages = ("optax_sam", "jax", "flax", "optax", "numpy", "scikit-learn")
    results = {
        "config": settings | {"rho": {name: config.rho_of(name) for name in config.methods}},
        "labels_sha256": dict(zip(map(str, config.seeds), data.noise_hashes(), strict=True)),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in packages},
        "backend": jax.default_backend(),
        "summary": [dict(zip(COLUMNS, row, strict=True)) for row in summarize(config, epochs)],
        "epochs": [
            {"method": one.method, "epoch": one.number, "seconds_of_all_seeds": one.seconds}
            | {name: [_rounded(value) for value in one.measures[name]] for name in MEASURES}
            for one in epochs
        ],
    }
    return json.dumps(results, indent=1, allow_nan=False) + "\n"


def _rounded(value: float) -> float | None:
    """Six decimals; what is not a number is null in JSON and empty in CSV."""
    return round(float(value), 6) if np.isfinite(value) else None


def _markdown(config: Config, epochs: list[Epoch]) -> str:
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *summarize(config, epochs)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _image(figure: Figure, kind: str) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format=kind, dpi=200)
    return image.getvalue()
