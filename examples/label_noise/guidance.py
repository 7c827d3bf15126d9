"""Turns the table of a sweep into a table of guidance: one line per method.

python examples/label_noise/guidance.py docs/results/rho_sweep.csv docs/results/rho_guidance.csv
"""

import csv
import io
import itertools
import shlex
import sys
from pathlib import Path

import tyro
from output_folder import explain, write_atomically

SETTINGS = ("method", "rho", "alpha", "kappa")
TEST = "test accuracy, last epoch [%]"
MEMORIZED = "wrong labels memorized [%]"
AS_GOOD = 1.5  # points of test accuracy
COLLAPSED = 10.0


def accuracy(row: dict[str, str]) -> float:
    """The mean of a cell ``mean ± deviation``."""
    return float(row[TEST].split(" ")[0])


def setting(row: dict[str, str], names: tuple[str, ...] = SETTINGS[1:]) -> str:
    """The settings of a row, ``ρ = 0.2, α = 0.5``."""
    letters = {"rho": "ρ", "alpha": "α", "kappa": "κ"}
    return ", ".join(f"{letters[name]} = {row[name]}" for name in names if row[name])


def guidance(rows: list[dict[str, str]]) -> dict[str, str]:
    """The line of one method, from its rows of the sweep."""
    best = max(rows, key=accuracy)
    # Radii are compared at one strength of the down-weighting or the compensation, the first one's.
    strength = rows[0]["alpha"], rows[0]["kappa"]
    radii = [row for row in rows if (row["alpha"], row["kappa"]) == strength]
    radii.sort(key=lambda row: float(row["rho"]))
    middle = max(range(len(radii)), key=lambda i: accuracy(radii[i]))
    top = accuracy(radii[middle])

    def is_good(row: dict[str, str]) -> bool:
        return accuracy(row) >= top - AS_GOOD

    larger = list(itertools.takewhile(is_good, radii[middle:]))
    smaller = list(itertools.takewhile(is_good, radii[middle::-1]))
    good = [smaller[-1]["rho"], larger[-1]["rho"]]
    collapsed = [row["rho"] for row in radii[middle + 1 :] if accuracy(row) < top - COLLAPSED]
    return {
        "method": best["method"],
        "best": setting(best),
        TEST: best[TEST],
        MEMORIZED: best[MEMORIZED],
        f"ρ within {AS_GOOD:g} points": " to ".join(dict.fromkeys(good)),
        f"ρ that loses {COLLAPSED:g} points": f"from {collapsed[0]}" if collapsed else "none tried",
    }


def read(sweep: Path) -> list[dict[str, str]]:
    """The rows of a sweep, without SGD, which has no radius."""
    rows = list(csv.DictReader(io.StringIO(sweep.read_text(encoding="utf-8"))))
    rows = [row for row in rows if row.get("method") != "SGD"]
    needed = (*SETTINGS, TEST, MEMORIZED)
    if not rows or any(row.get(name) is None for row in rows for name in needed):
        raise ValueError(
            f"{sweep} is not a complete table of a sweep, with the columns {', '.join(needed)}. Write "
            "it again with sweep.py."
        )
    return rows


def main(
    sweep: tyro.conf.Positional[Path],
    output: tyro.conf.Positional[Path],
) -> None:
    """Turns the table of a sweep into a table of guidance: one line per method.

    Args:
      sweep: the CSV file that sweep.py has written.
      output: the CSV file to write.
    """
    methods: dict[str, list[dict[str, str]]] = {}
    for row in read(sweep):
        methods.setdefault(row["method"], []).append(row)
    lines = [guidance(rows) for rows in methods.values()]
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(output, file.getvalue())


if __name__ == "__main__":
    try:
        tyro.cli(main, prog=shlex.join(["python", sys.argv[0]]))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {explain(error)}")
