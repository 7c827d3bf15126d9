"""Chooses a radius without correct labels: cross-validation against the noisy ones.

python examples/label_noise/choose_rho.py
python examples/label_noise/choose_rho.py --method saner --alphas 0.25 0.5 0.75

Each fifth of the training set is held out once, with its wrong labels. If the noise is symmetric, of
rate p over C classes, a network with accuracy a predicts the share (1 - p) a + p (1 - a) / (C - 1) of
noisy labels, which grows with a. No label of the test set is looked at. The choice is the smallest
radius within one standard error of the best.
"""

import csv
import dataclasses
import io
import itertools
import shlex
import sys
from pathlib import Path

import numpy as np
import tyro
from config import Config
from data import Data, load_digits
from output_folder import explain, held
from partial import Partial
from rich.progress import track
from sklearn.model_selection import StratifiedKFold
from train import compare

FOLDS = 5
HELD_OUT = "held-out noisy labels predicted [%]"
ERROR = "standard error"


@dataclasses.dataclass(frozen=True)
class Choice:
    """Settings of a choice; everything else has the program's defaults."""

    method: str = "saner"
    """Method whose radius is chosen."""

    rhos: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
    """Radii to try."""

    alphas: tuple[float, ...] = (0.5,)
    """Strengths of SANER's down-weighting to try with each radius."""

    seeds: tuple[int, ...] = (10, 11, 12)
    """One run per seed and fold."""

    epochs: int = 60
    """Passes over the training set."""

    output: Path = Path("runs/rho_choice.csv")
    """The CSV file."""

    def __post_init__(self):
        if not self.rhos or not self.alphas:
            raise ValueError("--rhos and --alphas: give at least one of each.")
        try:
            for rho, alpha in itertools.product(self.rhos, self.alphas):
                self.config(rho, alpha, self.seeds)  # refuses what is not valid
        except ValueError as error:
            flag, *rest = str(error).partition(":")
            here = {"--rho": "--rhos", "--alpha": "--alphas", "--methods": "--method"}
            raise ValueError("".join([here.get(flag, flag), *rest])) from None

    def config(self, rho: float, alpha: float, seeds: tuple[int, ...]) -> Config:
        """One radius and strength; everything else has the program's defaults."""
        return Config((self.method,), rho, alpha, seeds=seeds, epochs=self.epochs)


def held_out_folds(data: Data, seed: int) -> list[Data]:
    """One data set per fold: what is tested on is the fold with its noisy labels.

    Args:
      data: the training set with the noisy labels of one seed.
      seed: of the folds.

    Returns:
      ``FOLDS`` data sets, of one size up to one example; the test set of ``data`` is in none of them.
    """
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    return [
        Data(
            data.inputs[train],
            data.labels[:, train],
            data.changed[:, train],
            data.inputs[held_out],
            data.labels[0, held_out],
        )
        for train, held_out in folds.split(data.inputs, data.labels[0])
    ]


def chosen(rows: list[dict[str, float]]) -> dict[str, float]:
    """The row with the smallest radius within one standard error of the best row."""
    best = max(rows, key=lambda row: row[HELD_OUT])
    good = [row for row in rows if row[HELD_OUT] >= best[HELD_OUT] - best[ERROR]]
    return min(good, key=lambda row: (row["rho"], -row[HELD_OUT]))


def main(choice: Choice) -> None:
    """Tries all radii, prints the choice and writes the table; what was stopped goes on."""
    with held(choice.output.parent):
        _try_all(choice)


def _try_all(choice: Choice) -> None:
    settings = dataclasses.asdict(choice)
    del settings["output"]
    partial = Partial(choice.output, settings)
    rows = partial.rows
    folds = [
        (seed, fold)
        for seed in choice.seeds
        for fold in held_out_folds(load_digits(Config.noise, Config.noise_rate, (seed,)), seed)
    ]
    tried = list(itertools.product(choice.rhos, choice.alphas))
    for rho, alpha in track(tried[len(rows) :], "choosing"):
        shares = []
        for seed, fold in folds:
            *_, last = compare(choice.config(rho, alpha, (seed,)), fold)
            shares.append(100 * last.measures["test_accuracy"][0])
        error = np.std(shares, ddof=1) / np.sqrt(len(shares))
        partial.append({"rho": rho, "alpha": alpha, HELD_OUT: np.mean(shares), ERROR: error})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", *rows[0]])
    writer.writerows(
        [choice.method, f"{rho:g}", f"{alpha:g}", f"{share:.2f}", f"{error:.2f}"]
        for rho, alpha, share, error in map(dict.values, rows)
    )
    partial.finish(file.getvalue())
    print(file.getvalue())
    best = chosen(rows)
    print(f"{choice.method}: rho = {best['rho']:g}, alpha = {best['alpha']:g}")


if __name__ == "__main__":
    choice = tyro.cli(
        Choice, prog=shlex.join(["python", sys.argv[0]]), description=__doc__.splitlines()[0]
    )
    try:
        main(choice)
    except OSError as error:
        sys.exit(f"error: {explain(error)}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted. The same command goes on.")
