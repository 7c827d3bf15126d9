"""What the finished runs say: the chosen settings, means over the seeds, paired intervals."""

import math
from typing import Any

import numpy as np
import scipy.stats  # type: ignore[import-untyped]
from rich import box
from rich.console import Console
from rich.table import Table

from .sets import SETS
from .studies import STUDIES, Contender, trials

BASE = "SGD"


def candidates(
    rows: list[dict[str, Any]], name: str, contender: Contender
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All runs of a contender on a data set, and its trials with seed 0, in the order of studies.py.

    Early stopping shares SGD's trials, so runs are known by what was trained, not by who asked.
    """
    wanted = [_key(trial.recipe, trial.knobs) for trial in trials(contender, name)]
    ours = [
        row
        for row in rows
        if row["set"] == name
        and _key_of(row) in wanted
        and _kind(row["contender"]) == _kind(contender.name)
    ]
    tried = {_key_of(row): row for row in ours if row["part"] == "trial" and row["seed"] == 0}
    return ours, [tried[key] for key in wanted if key in tried]


def chosen(tried: list[dict[str, Any]], contender: Contender) -> dict[str, Any]:
    """The trial with the best accuracy on held-out noisy labels; the first one of equals."""
    measure = "held_out_best" if contender.early_stopping else "held_out"
    return max(tried, key=lambda row: row[measure])


def finals(
    rows: list[dict[str, Any]], name: str, contender: Contender
) -> dict[int, dict[str, Any]]:
    """The final runs of a contender by seed; empty as long as its trials are not complete."""
    ours, tried = candidates(rows, name, contender)
    if len(tried) < len(contender.trials):
        return {}
    best = _key_of(chosen(tried, contender))
    part = "trial" if contender.early_stopping else "final"
    runs = {row["seed"]: row for row in ours if row["part"] == part and _key_of(row) == best}
    return runs if part == "final" or len(runs) > 1 else {}  # its first seed is SGD's trial


def regret(rows: list[dict[str, Any]], name: str, contender: Contender) -> float:
    """Points of test accuracy between the best trial and the one that the noisy labels chose."""
    _, tried = candidates(rows, name, contender)
    best = max(reported(row, contender) for row in tried)
    return 100 * (best - reported(chosen(tried, contender), contender))


def reported(row: dict[str, Any], contender: Contender) -> float:
    """Test accuracy of a final run: the last epoch's, but for early stopping."""
    return float(row["test_at_best" if contender.early_stopping else "test"])


def paired(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Mean difference, and half the width of its 95 % t-interval over the seeds."""
    difference = first - second
    if len(difference) < 2:
        return float(difference.mean()), math.nan
    scale = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return float(difference.mean()), float(scipy.stats.t.ppf(0.975, len(difference) - 1)) * scale


def table(rows: list[dict[str, Any]], name: str) -> list[tuple[str, ...]]:
    """Per contender: setting, test accuracy, minus tuned SGD, memorized, AUROC, regret, seconds."""
    contenders = list(dict.fromkeys(c for study in STUDIES.values() for c in study))
    base = next(c for c in contenders if c.name == BASE)
    plain = finals(rows, name, base)
    lines: list[tuple[str, ...]] = []
    for contender in contenders:
        runs = finals(rows, name, contender)
        if not runs:
            continue
        tests = 100 * np.array([reported(run, contender) for run in runs.values()])
        spread = f" ± {tests.std(ddof=1):.2f}" if len(tests) > 1 else ""
        shared = sorted(runs.keys() & plain.keys())
        gain = "-"
        if shared and contender is not base:
            mean, half = paired(
                np.array([100 * reported(runs[seed], contender) for seed in shared]),
                np.array([100 * reported(plain[seed], base) for seed in shared]),
            )
            gain = f"{mean:+.2f} ± {half:.2f}"
        measured = [
            f"{100 * np.mean([run['memorized'] for run in runs.values()]):.1f}",
            f"{np.mean([run['auroc'] for run in runs.values()]):.3f}",
        ]
        if contender.early_stopping:
            measured = ["-", "-"]  # known of the last epoch's network only
        any_run = next(iter(runs.values()))
        lines.append(
            (
                contender.name,
                _setting(any_run),
                f"{tests.mean():.2f}{spread}",
                gain,
                *measured,
                f"{regret(rows, name, contender):.2f}",
                f"{np.mean([run['seconds'] for run in runs.values()]):.0f}",
            )
        )
    return lines


HEADINGS = (
    "contender",
    "ρ, decay, rate, strength",
    "test %",
    "− SGD",
    "mem. %",
    "AUROC",
    "regret",
    "s",
)


def line(rows: list[dict[str, Any]], name: str, contender: Contender) -> str:
    """One contender that has just finished."""
    found = [cells for cells in table(rows, name) if cells[0] == contender.name]
    return f"{name}: " + "  ".join(found[0] if found else (contender.name, "unfinished"))


def markdown(lines: list[tuple[str, ...]]) -> str:
    """The table of a data set, without the seconds, which hang on what else the machine did."""
    headings = ("contender", "ρ, decay, rate, strength", "test accuracy [%]", "minus tuned SGD")
    headings += ("memorized [%]", "suspects' AUROC", "regret")
    return markdown_table([headings, *(cells[:7] for cells in lines)], left=2)


def markdown_table(lines: list[tuple[str, ...]], left: int) -> str:
    """A heading and rows in Markdown; behind the first ``left`` columns numbers are flush right."""
    width = len(lines[0])
    rule = ("---",) * left + ("---:",) * (width - left)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (lines[0], rule, *lines[1:]))


def show(rows: list[dict[str, Any]]) -> None:
    """A table per data set."""
    for name in SETS:
        lines = table(rows, name)
        if not lines:
            continue
        shown = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
        for index, heading in enumerate(HEADINGS):
            shown.add_column(heading, justify="left" if index < 2 else "right")
        for cells in lines:
            shown.add_row(*cells)
        Console().print(shown)


def _setting(row: dict[str, Any]) -> str:
    knobs = row["knobs"]
    text = f"{knobs['rho']:g}, {knobs['decay']:g}, {knobs['rate']:g}"
    return text + (f", {knobs['strength']:g}" if knobs["strength"] else "")


def _key(recipe: Any, knobs: Any) -> tuple[Any, ...]:
    default = type(recipe)()
    changed = {key: value for key, value in vars(recipe).items() if value != getattr(default, key)}
    return tuple(sorted(changed.items())), tuple(knobs)


def _key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    knobs = row["knobs"]
    return tuple(sorted(row["recipe"].items())), tuple(
        knobs[name] for name in ("rho", "decay", "rate", "strength")
    )


def _kind(name: str) -> tuple[Any, ...]:
    for study in STUDIES.values():
        for each in study:
            if each.name == name:
                return each.clean, each.drops_suspects, each.drops_wrong, each.passes
    return False, False, False, 1
