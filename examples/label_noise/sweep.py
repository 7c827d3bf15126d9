"""Sweeps the radius of every method, SANER's α and NCSAM's κ, and writes one table.

python examples/label_noise/sweep.py --seeds 0 1 --output docs/results/rho_sweep.csv
"""

import csv
import dataclasses
import io
import shlex
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from config import Config
from data import load_digits
from methods import METHODS
from output_folder import explain, held
from partial import Partial
from report import mean_and_std
from rich.progress import track
from train import compare

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
CENTERS = {name: method.rho for name, method in METHODS.items()}
CENTERS |= dict.fromkeys(("sam", "saner", "jsam", "lsam"), 0.2)
"""The radius of each method that is multiplied by the factors."""

# Further settings at that radius.
OTHERS = [
    ("saner", "alpha", 0.25),
    ("saner", "alpha", 0.75),
    ("saner", "alpha", 1.0),
    ("ncsam", "kappa", 0.03),
    ("ncsam", "kappa", 0.3),
    ("ncsam", "kappa", 1.0),
]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Settings of a sweep; one radius per method is multiplied by ¼, ½, 1, 2 and 4."""

    methods: tuple[str, ...] = tuple(name for name in METHODS if name != "sgd")
    """Methods to sweep."""

    noise: Literal["symmetric", "asymmetric", "pair_flip", "instance_dependent"] = "symmetric"
    """Kind of label noise."""

    noise_rate: float = 0.4
    """Share of wrong training labels."""

    momentum: float = 0.0
    """Momentum of SGD."""

    learning_rate: float = 0.1
    """Learning rate of SGD."""

    epochs: int = 60
    """Passes over the training set."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """One run per seed."""

    output: Path = Path("runs/rho_sweep.csv")
    """The CSV file."""

    def __post_init__(self):
        Config(**self.shared())  # refuses what is not valid

    def shared(self) -> dict:
        """The settings that all runs have."""
        settings = dataclasses.asdict(self)
        del settings["output"]
        return settings


def row_of(method: str, config: Config, data) -> dict[str, str]:
    """Trains one method at one radius: its results at the last and the best epoch."""
    measures = [epoch.measures for epoch in compare(config, data)]
    test = np.array([one["test_accuracy"] for one in measures])  # (epochs, seeds)
    return {
        "method": METHODS[method].label,
        "rho": f"{config.rho:g}",
        "alpha": f"{config.alpha:g}" if "saner" in method else "",
        "kappa": f"{config.kappa:g}" if "ncsam" in method else "",
        "test accuracy, last epoch [%]": mean_and_std(test[-1]),
        "test accuracy, best epoch [%]": mean_and_std(test.max(axis=0)),
        "wrong labels memorized [%]": mean_and_std(measures[-1]["memorized"]),
        "correct labels fitted [%]": mean_and_std(measures[-1]["clean_fit"]),
    }


def main(sweep: Sweep) -> None:
    """Runs all methods at all radii; what was stopped goes on."""
    with held(sweep.output.parent):
        _run_all(sweep)


def _run_all(sweep: Sweep) -> None:
    runs: list[tuple[str, dict]] = [("sgd", {"rho": 0.0})]
    for name in sweep.methods:
        rho = CENTERS[name]
        runs += [(name, {"rho": factor * rho}) for factor in FACTORS]
        runs += [(name, {"rho": rho, key: value}) for one, key, value in OTHERS if one == name]
    partial = Partial(sweep.output, sweep.shared() | {"runs": runs})
    data = load_digits(sweep.noise, sweep.noise_rate, sweep.seeds)
    for method, settings in track(runs[len(partial.rows) :], description="sweep"):
        config = Config(**(sweep.shared() | {"methods": (method,)} | settings))
        partial.append(row_of(method, config, data))
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(partial.rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(partial.rows)
    partial.finish(file.getvalue())


if __name__ == "__main__":
    sweep = tyro.cli(
        Sweep, prog=shlex.join(["python", sys.argv[0]]), description=__doc__.splitlines()[0]
    )
    try:
        main(sweep)
    except OSError as error:
        sys.exit(f"error: {explain(error)}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted. The same command goes on.")
