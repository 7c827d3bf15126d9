"""Progress bars and tables."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from .criteria import CRITERIA, comparable
from .grid import Setting
from .search import Progress, Result

if TYPE_CHECKING:
    from .fit import Outcome

WIDTH = 80
SHORT = {"held_out": "held-out", "canaries": "canaries", "small_loss": "losses", "gap": "gap"}
SETTING = ("head", "method", "ρ", "decay")
MEASURED = ("held-out", "fitted", "clean", "memorized")


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """One bar per round of the search and per refit."""
    bars = Bars(
        TextColumn("{task.description:<38}"),
        BarColumn(bar_width=14),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(quiet=quiet),
        disable=quiet,
    )
    tasks: dict[str, object] = {}

    def advance(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

    with bars:
        yield advance


def rows_of(results: list[Result]) -> list[tuple[Setting, list[Result]]]:
    """The best setting of every head, method and loss, by the furthest round and held-out accuracy."""
    by_setting: dict[Setting, list[Result]] = {}
    for result in results:
        by_setting.setdefault(result.setting, []).append(result)
    best: dict[tuple[str, ...], tuple[tuple[int, float], Setting, list[Result]]] = {}
    for setting, runs in by_setting.items():
        rows = runs[-1].rows
        runs = [run for run in runs if run.rows == rows]
        held_out = comparable(float(np.mean([run.measures["held_out"] for run in runs])))
        score = (runs[-1].rung, held_out)
        if setting.family not in best or score > best[setting.family][0]:
            best[setting.family] = (score, setting, runs)
    ranked = sorted(best.values(), key=lambda item: item[0], reverse=True)
    return [(setting, runs) for _, setting, runs in ranked]


def table_rows(results: list[Result]) -> list[tuple[str, ...]]:
    """As in ``columns``, the best first, with the rows and seeds that the numbers come from."""
    lines = []
    for setting, runs in rows_of(results):
        numbers = []
        for name in ("held_out", "fitted", "clean_accuracy", "memorized"):
            values = 100 * np.array([run.measures[name] for run in runs])
            numbers.append("-" if np.isnan(values).any() else f"{values.mean():.1f}")
        radius = "-" if setting.method == "sgd" else f"{setting.rho:g}"
        rate = [f"{setting.rate:g}"] if several_rates(results) else []
        cells = (setting.head, setting.name, radius, f"{setting.decay:g}", *rate)
        lines.append((*cells, *numbers, _seen(runs)))
    return lines


def columns(results: list[Result]) -> tuple[str, ...]:
    """The headings of ``table_rows``."""
    rate = ["rate"] if several_rates(results) else []
    return (*SETTING, *rate, *MEASURED, "rows × seeds")


def several_rates(results: list[Result]) -> bool:
    """Whether a setting is only known with its learning rate."""
    return len({result.setting.rate for result in results}) > 1


def _seen(runs: list[Result]) -> str:
    return f"{runs[0].rows:,} × {len({run.seed for run in runs})}"


def markdown(outcome: "Outcome") -> str:
    """The table and what is to be said of it."""
    headings = columns(outcome.results)
    lines = [headings, tuple(["---"] * 2 + ["---:"] * (len(headings) - 2))]
    lines += table_rows(outcome.results)
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + "\n" + "\n".join(sentences(outcome)) + "\n"


def sentences(outcome: "Outcome") -> list[str]:
    """The choice, how sure it is, its refit, the criteria, and the regret, a line each."""
    choice, chosen, data = outcome.choice, outcome.chosen, outcome.data
    low, high = choice.interval

    def label(setting: Setting) -> str:
        rate = f" rate={setting.rate:g}" if several_rates(outcome.results) else ""
        return setting.label + rate

    lines = [
        f"Chosen: {label(choice.setting)}.",
        f"Held-out noisy labels: {_percent(choice.accuracy)} "
        f"(95 %: {_percent(low)} to {_percent(high)}).",
    ]
    family = [r.setting for r in outcome.results if r.setting.family == choice.setting.family]
    for name, flag, field in (
        ("radius", "--radii", "rho"),
        ("decay", "--decays", "decay"),
        ("learning rate", "--learning-rates", "rate"),
    ):
        value, tried = getattr(choice.setting, field), [getattr(s, field) for s in family]
        if value > 0 and min(tried) < max(tried) and value in (min(tried), max(tried)):
            end = "largest" if value == max(tried) else "smallest"
            lines.append(f"Its {name} {value:g} is the {end} that was tried: widen {flag} there.")
    if choice.runner_up is not None:
        low, high = choice.lead_interval
        verdict = "better beyond chance" if choice.sure else "not to be told apart"
        lines.append(f"Runner-up: {label(choice.runner_up)}.")
        lines.append(
            f"Lead: {100 * choice.lead:+.2f} points "
            f"(95 %: {100 * low:+.2f} to {100 * high:+.2f}): {verdict}."
        )
    if "test_accuracy" in chosen.curves:
        line = f"Refit on all rows: test accuracy {_percent(chosen.curves['test_accuracy'][-1])}"
        if outcome.sgd is not None and outcome.sgd is not chosen:
            line += f", best SGD {_percent(outcome.sgd.curves['test_accuracy'][-1])}"
        lines.append(line + ".")
    for row in outcome.criteria:
        if row.regret is not None and row.accuracy is not None:
            correlation = "-" if row.correlation is None else f"{row.correlation:.2f}"
            lines.append(
                f"Criterion {SHORT[row.name]}: clean accuracy {_percent(row.accuracy)}, regret "
                f"{100 * row.regret:.2f}, rank correlation {correlation}."
            )
    from .fit import suspects_quality

    found = suspects_quality(chosen, data)
    if found is not None:
        line = f"Suspects: AUROC {found['auroc']:.3f}"
        if outcome.sgd is not None and outcome.sgd is not chosen:
            plain = suspects_quality(outcome.sgd, data)
            line += f" (best SGD {plain['auroc']:.3f})" if plain else ""
        lines.append(
            f"{line}, {_percent(found['precision_at_tenth'])} of the first tenth are wrong."
        )
    return lines


def show(outcome: "Outcome", seconds: float) -> None:
    """Prints the table, within 80 columns."""
    console = Console(width=min(Console().width, WIDTH))
    data = outcome.data
    title = (
        f"{len(data.labels):,} rows, {data.inputs.shape[1]:,} features, {data.num_classes} classes"
    )
    for note in data.notes:
        console.print(note, highlight=False)
    console.print("The best setting of every head, method and loss, in percent:", highlight=False)
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        padding=(0, 1, 0, 0),
    )
    for index, column in enumerate(columns(outcome.results)):
        table.add_column(column, justify="left" if index < 2 else "right")
    for row in table_rows(outcome.results):
        table.add_row(*row)
    console.print(table)
    for line in sentences(outcome):
        console.print(line, highlight=False, soft_wrap=False)
    console.print(
        f"Results in {outcome.config.output}, {seconds:.0f} s.", highlight=False, soft_wrap=True
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


assert set(SHORT) == set(CRITERIA)
