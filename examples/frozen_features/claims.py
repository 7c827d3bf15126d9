"""The runs, read for the claims of the papers: pairs of contenders, and radius against weight decay."""

from typing import Any

import numpy as np

from .sets import SETS
from .studies import BASELINES, CROSSINGS, DECAYS, METHODS, STUDIES, Contender, trials
from .summary import candidates, chosen, finals, markdown_table, paired, reported

PAIRS = (
    ("SAM", "SGD"),
    ("SAM", "SGD, twice the epochs"),
    ("SANER", "SGD"),
    ("SANER", "SGD, twice the epochs"),
    ("SANER", "SAM"),
    ("J-SAM", "SGD"),
    ("J-SAM", "SAM"),
    ("L-SAM", "SGD"),
    ("1-SAM", "SAM"),
    ("m-SAM", "SAM"),
    ("m-SAM", "SGD, twice the epochs"),
    ("last-layer penalty", "SGD"),
    ("NCSAM", "SAM"),
    ("GCE", "SGD"),
    ("SAM", "GCE"),
    ("m-SAM", "GCE"),
    ("SAM + GCE", "GCE"),
    ("1-SANER", "1-SAM"),
    ("ELR", "GCE"),
    ("NCSAM, paper", "SAM, little decay"),
    ("NCSAM, not projected", "SAM, little decay"),
)
"""First minus second, both tuned with the same number of trials."""

SINGLE = tuple(c for c in METHODS + BASELINES if not c.clean)
"""One method or one baseline: what a crossing has to be better than."""

CEILING = next(c for c in METHODS if c.clean)

RADII = ("SAM", "SANER", "J-SAM", "L-SAM", "1-SAM", "m-SAM", "NCSAM")


def contender(name: str) -> Contender:
    """By its name in studies.py."""
    return next(c for study in STUDIES.values() for c in study if c.name == name)


def gain(rows: list[dict[str, Any]], name: str, first: str, second: str) -> str:
    """First minus second in points of test accuracy, with the 95 % interval over shared seeds."""
    runs = []
    for each in (first, second):
        found = finals(rows, name, contender(each))
        runs.append({seed: 100 * reported(run, contender(each)) for seed, run in found.items()})
    shared = sorted(runs[0].keys() & runs[1].keys())
    if not shared:
        return "not run"
    mean, half = paired(*(np.array([side[seed] for seed in shared]) for side in runs))
    return f"{mean:+.2f} ± {half:.2f}"


def pairs(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: a row per pair, a column per data set with runs."""
    names = _sets(rows)
    lines = [("first", "minus", *names)]
    for first, second in PAIRS:
        cells = [gain(rows, name, first, second) for name in names]
        if any(cell != "not run" for cell in cells):
            lines.append((first, second, *cells))
    return markdown_table(lines, left=2)


def overview(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: every contender minus tuned SGD, a column per data set."""
    names = _sets(rows)
    lines = [("contender", *names)]
    levels = [f"{_level(rows, name, METHODS[0]):.2f} %" for name in names]
    lines.append(("SGD (test accuracy)", *levels))
    for each in (*SINGLE[1:], CEILING, *CROSSINGS):
        cells = [gain(rows, name, each.name, "SGD") for name in names]
        if any(cell != "not run" for cell in cells):
            lines.append((each.name, *cells))
    return markdown_table(lines, left=1)


def crossings(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: crossings minus the single contender with the best mean test accuracy."""
    best = {}
    for name in _sets(rows):
        levels = {each.name: _level(rows, name, each) for each in SINGLE}
        best[name] = max(levels, key=levels.__getitem__)
    lines = [("crossing", *best), ("the best single one", *best.values())]
    for each in CROSSINGS:
        cells = [gain(rows, name, each.name, single) for name, single in best.items()]
        if any(cell != "not run" for cell in cells):
            lines.append((each.name, *cells))
    return markdown_table(lines, left=1)


def choices(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: which contender held-out noisy labels choose, and what it is worth."""
    lines: list[tuple[str, ...]] = [
        ("data set", "among", "chosen", "its held-out noisy accuracy [%]", "minus tuned SGD")
    ]
    groups = {"SGD": SINGLE[:1], "single ones": SINGLE, "all": SINGLE + CROSSINGS}
    for name in _sets(rows):
        for group, members in groups.items():
            held_out = {each.name: _held_out(rows, name, each) for each in members}
            first = max(held_out, key=held_out.__getitem__)
            worth = "-" if first == "SGD" else gain(rows, name, first, "SGD")
            lines.append((name, group, first, f"{held_out[first]:.1f}", worth))
    return markdown_table(lines, left=3)


def _sets(rows: list[dict[str, Any]]) -> list[str]:
    """The data sets where tuned SGD has run."""
    return [name for name in SETS if finals(rows, name, METHODS[0])]


def _level(rows: list[dict[str, Any]], name: str, each: Contender) -> float:
    """Mean test accuracy in per cent over the seeds; -inf where a contender has not run."""
    runs = finals(rows, name, each).values()
    return float(np.mean([100 * reported(run, each) for run in runs])) if runs else -np.inf


def _held_out(rows: list[dict[str, Any]], name: str, each: Contender) -> float:
    """Held-out noisy accuracy of the chosen trial in per cent; -inf where a contender has not run."""
    if not finals(rows, name, each):
        return -np.inf
    trial = chosen(candidates(rows, name, each)[1], each)
    return 100 * float(trial["held_out_best" if each.early_stopping else "held_out"])


def radii(rows: list[dict[str, Any]], name: str) -> str:
    """A Markdown table of the trials: a row per method and radius, a column per weight decay."""
    scale = SETS[name].decay
    decays = [round(scale * decay, 6) for decay in DECAYS]
    lines = [("method", "ρ", *(f"decay {decay:g}" for decay in decays))]
    for each in ("SGD", *RADII):
        cells = trial_cells(rows, name, contender(each))
        for rho in sorted({rho for rho, _ in cells}):
            found = [cells.get((rho, decay), "-") for decay in decays]
            lines.append((each, f"{rho:g}" if rho else "-", *found))
    return markdown_table(lines, left=1)


def trial_cells(
    rows: list[dict[str, Any]], name: str, each: Contender
) -> dict[tuple[float, float], str]:
    """By radius and decay: test accuracy and memorized wrong labels of a contender's trials, in %."""
    wanted = {trial.knobs for trial in trials(each, name) if trial.knobs.rate == 0.02}
    cells = {}
    for row in rows:
        knobs = row["knobs"]
        key = tuple(knobs[field] for field in ("rho", "decay", "rate", "strength"))
        ours = row["set"] == name and row["contender"] == each.name and row["part"] == "trial"
        if ours and row["seed"] == 0 and key in wanted:
            text = f"{100 * row['test']:.1f} / {100 * row['memorized']:.0f}"
            cells[knobs["rho"], knobs["decay"]] = text
    return cells


def readings(rows: list[dict[str, Any]], name: str) -> str:
    """A Markdown table of NCSAM's readings: their trials by ρ and κ, beside SAM's at the same ρ."""
    _, sam = candidates(rows, name, STUDIES["ncsam"][0])
    yardstick = {row["knobs"]["rho"]: row["test"] for row in sam}
    kappas = (-1.0, -0.1, -0.01, 0.01, 0.1, 1.0)
    lines = [("reading", "ρ", "SAM", *(f"κ = {kappa:g}" for kappa in kappas))]
    for each in STUDIES["ncsam"][1:]:
        tests = {
            (row["knobs"]["rho"], row["knobs"]["strength"]): row["test"]
            for row in rows
            if (row["set"], row["contender"], row["part"]) == (name, each.name, "trial")
        }
        for rho in sorted({rho for rho, _ in tests}):
            cells = [tests.get((rho, kappa)) for kappa in kappas]
            numbers = [yardstick.get(rho), *cells]
            text = ["-" if number is None else f"{100 * number:.1f}" for number in numbers]
            lines.append((each.name.removeprefix("NCSAM, "), f"{rho:g}", *text))
    return markdown_table(lines, left=1)
