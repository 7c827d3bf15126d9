"""The runs, read for the claims of the papers: pairs of contenders, and radius against weight decay."""

import math
from typing import Any

import numpy as np

from .sets import FAMILIES, SETS, heading
from .studies import (
    BASELINES,
    COORDINATES,
    CROSSINGS,
    DECAYS,
    METHODS,
    STUDIES,
    Contender,
)
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
    ("SAM + GCE", "GCE, twice the epochs"),
    ("SANER + SCE", "SCE"),
    ("SANER + SCE", "SCE, fine decay"),
    ("SANER + SCE", "SCE, more decay"),
    ("SANER + SCE", "SAM + SCE, fine decay"),
    ("SANER + SCE", "SAM"),
    ("SANER + SCE", "SGD, twice the epochs"),
    ("1-SANER", "1-SAM"),
    ("ELR", "GCE"),
    ("NCSAM, paper", "SAM, little decay"),
    ("NCSAM, not projected", "SAM, little decay"),
)
"""First minus second, both tuned with the same number of trials."""

SINGLE = tuple(c for c in METHODS + BASELINES if not c.knows_truth)
"""One method or one baseline: what a crossing has to be better than."""

CEILINGS = tuple(c for c in METHODS if c.knows_truth)

NOT_RUN = "-"

NOISE_COLUMNS = ("SAM", "SANER", "GCE", "SAM + GCE", "without suspects", "clean labels")

RADII = ("SAM", "SANER", "J-SAM", "L-SAM", "1-SAM", "m-SAM", "NCSAM")


def contender(name: str) -> Contender:
    """By its name in studies.py."""
    return next(c for study in STUDIES.values() for c in study if c.name == name)


def gain(rows: list[dict[str, Any]], name: str, first: str, second: str) -> str:
    """First minus second in points of test accuracy, with the 95 % interval over shared seeds."""
    pair = difference(rows, name, first, second)
    return NOT_RUN if pair is None else f"{pair[0]:+.2f} ± {pair[1]:.2f}"


def difference(
    rows: list[dict[str, Any]], name: str, first: str, second: str
) -> tuple[float, float] | None:
    """First minus second in points, and half the width of the interval; None where one has not run."""
    runs = []
    for each in (first, second):
        found = finals(rows, name, contender(each))
        runs.append({seed: 100 * reported(run, contender(each)) for seed, run in found.items()})
    shared = sorted(runs[0].keys() & runs[1].keys())
    if not shared:
        return None
    return paired(*(np.array([side[seed] for seed in shared]) for side in runs))


def pairs(rows: list[dict[str, Any]], family: str) -> str:
    """A Markdown table: a row per pair, a column per data set with runs."""
    names = _sets(rows, family)
    lines = [("first", "minus", *map(heading, names))]
    for first, second in PAIRS:
        cells = [gain(rows, name, first, second) for name in names]
        if any(cell != NOT_RUN for cell in cells):
            lines.append((first, second, *cells))
    return markdown_table(lines, left=2)


def overview(rows: list[dict[str, Any]], family: str) -> str:
    """A Markdown table: every contender minus tuned SGD, a column per data set."""
    names = _sets(rows, family)
    lines = [("contender", *map(heading, names))]
    levels = [f"{_level(rows, name, METHODS[0]):.2f} %" for name in names]
    lines.append(("SGD (test accuracy)", *levels))
    for each in (*SINGLE[1:], *CEILINGS, *CROSSINGS):
        cells = [gain(rows, name, each.name, "SGD") for name in names]
        if any(cell != NOT_RUN for cell in cells):
            lines.append((each.name, *cells))
    return markdown_table(lines, left=1)


def crossings(rows: list[dict[str, Any]], family: str) -> str:
    """A Markdown table: crossings minus the single contender with the best mean test accuracy."""
    best = {}
    for name in _sets(rows, family):
        if not any(finals(rows, name, each) for each in CROSSINGS):
            continue
        levels = {each.name: _level(rows, name, each) for each in SINGLE}
        best[name] = max(levels, key=levels.__getitem__)
    lines = [("crossing", *map(heading, best)), ("the best single one", *best.values())]
    for each in CROSSINGS:
        cells = [gain(rows, name, each.name, single) for name, single in best.items()]
        if any(cell != NOT_RUN for cell in cells):
            lines.append((each.name, *cells))
    return markdown_table(lines, left=1)


def choices(rows: list[dict[str, Any]], least: int = 10) -> str:
    """A Markdown table: which contender held-out noisy labels choose, and what it is worth.

    Data sets where fewer than ``least`` contenders have run are left out.
    """
    lines: list[tuple[str, ...]] = [
        ("data set", "among", "chosen", "its held-out noisy accuracy [%]", "minus tuned SGD")
    ]
    groups = {"SGD": SINGLE[:1], "single ones": SINGLE, "all": SINGLE + CROSSINGS}
    for name in (name for family in FAMILIES for name in _sets(rows, family)):
        if sum(bool(finals(rows, name, each)) for each in SINGLE) < least:
            continue
        for group, members in groups.items():
            held_out = {each.name: _held_out(rows, name, each) for each in members}
            first = max(held_out, key=held_out.__getitem__)
            worth = "-" if first == "SGD" else gain(rows, name, first, "SGD")
            lines.append((heading(name), group, first, f"{held_out[first]:.1f}", worth))
    return markdown_table(lines, left=3)


def _sets(rows: list[dict[str, Any]], family: str) -> list[str]:
    """The data sets of a family where tuned SGD has run."""
    return [name for name in FAMILIES[family] if finals(rows, name, METHODS[0])]


def noises(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: what methods add to SGD, a row per data set.

    At little decay they are trials, SAM and SANER at ρ = 0.4; tuned, each side chose its setting.
    """
    lines: list[tuple[str, ...]] = [
        ("data set", "SGD, little decay", "SAM", "SANER", "SGD, tuned", *NOISE_COLUMNS)
    ]
    for name in (name for family in FAMILIES for name in _sets(rows, family)):
        gains = [gain(rows, name, each, "SGD") for each in NOISE_COLUMNS]
        level, *little = little_decay(rows, name)
        cells = [NOT_RUN if math.isnan(value) else f"{value - level:+.1f}" for value in little]
        tuned = f"{_level(rows, name, METHODS[0]):.1f} %"
        lines.append((heading(name), f"{level:.1f} %", *cells, tuned, *gains))
    return markdown_table(lines, left=1)


def little_decay(
    rows: list[dict[str, Any]], name: str, rho: float = 0.4
) -> tuple[float, float, float]:
    """Test accuracy in per cent of SGD, SAM and SANER at the smallest decay, one seed; NaN: not run."""
    found = []
    for each, radius in (("SGD", 0.0), ("SAM", rho), ("SANER", rho)):
        _, tried = candidates(rows, name, contender(each))
        decay = round(SETS[name].decay * DECAYS[0], 6)
        knobs = {"rho": radius, "decay": decay, "rate": 0.02, "strength": 0.0}
        found.append(next((100 * row["test"] for row in tried if row["knobs"] == knobs), math.nan))
    return found[0], found[1], found[2]


def coordinates(rows: list[dict[str, Any]], name: str) -> str:
    """A Markdown table: SAM's gradient on some of the coordinates A, B and C only."""
    radii = (0.1, 0.2, 0.4, 0.8)
    results = ("chosen ρ", "test accuracy [%]", "memorized [%]", "tuned decay, test accuracy [%]")
    lines = [("SAM's gradient on", *(f"ρ = {rho:g}" for rho in radii), *results)]
    for each in (*(f"SAM on {letters}" for letters in COORDINATES), "SAM", "SANER"):
        little = contender(f"{each}, little decay")
        runs = list(finals(rows, name, little).values())
        if not runs:
            continue
        trials_by_radius = {
            row["knobs"]["rho"]: f"{100 * row['test']:.1f}"
            for row in candidates(rows, name, little)[1]
        }
        tuned = finals(rows, name, contender(each)).values()
        lines.append(
            (
                {"SAM": "ABC: SAM", "SANER": "half of B: SANER"}.get(each, each[len("SAM on ") :]),
                *(trials_by_radius[rho] for rho in radii),
                f"{runs[0]['knobs']['rho']:g}",
                _spread([100 * run["test"] for run in runs]),
                f"{100 * np.mean([run['memorized'] for run in runs]):.1f}",
                _spread([100 * run["test"] for run in tuned]),
            )
        )
    return markdown_table(lines, left=1)


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" if values else NOT_RUN


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
    return {
        (row["knobs"]["rho"], row["knobs"]["decay"]): (
            f"{100 * row['test']:.1f} / {100 * row['memorized']:.0f}"
        )
        for row in candidates(rows, name, each)[1]
        if row["knobs"]["rate"] == 0.02
    }


def readings(rows: list[dict[str, Any]], name: str) -> str:
    """A Markdown table of NCSAM's readings: their trials by ρ and κ, beside SAM's at the same ρ."""
    of_sam = [each for each in STUDIES["ncsam"] if each.trials[0].recipe.reading is None]
    yardsticks = {
        each.passes: {row["knobs"]["rho"]: row["test"] for row in candidates(rows, name, each)[1]}
        for each in of_sam
    }
    kappas = (-1.0, -0.1, -0.01, 0.01, 0.1, 1.0)
    lines = [("reading", "ρ", "SAM", *(f"κ = {kappa:g}" for kappa in kappas))]
    for each in STUDIES["ncsam"]:
        if each in of_sam:
            continue
        tests = {
            (row["knobs"]["rho"], row["knobs"]["strength"]): row["test"]
            for row in candidates(rows, name, each)[1]
        }
        for rho in sorted({rho for rho, _ in tests}):
            cells = [tests.get((rho, kappa)) for kappa in kappas]
            numbers = [yardsticks[each.passes].get(rho), *cells]
            text = ["-" if number is None else f"{100 * number:.1f}" for number in numbers]
            lines.append((each.name.removeprefix("NCSAM, "), f"{rho:g}", *text))
    return markdown_table(lines, left=1)


BY_FAMILY = (pairs, overview, crossings)
"""The tables that have a column per data set."""
