"""How well the wrong labels are found, beside cleanlab, with the time of each.

    python -m examples.frozen_features.compare_suspects DATA --output suspects.json

DATA must have clean labels; they serve for the comparison only. Every row but cleanlab's is one
training run that scores the rows it was trained on. cleanlab does its usual: out-of-sample
probabilities by 5-fold cross-validation of a logistic regression, then 1 − the probability of the
observed class.
"""

import dataclasses
import importlib.util
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from .config import Config
from .data import DataError, Features, load
from .folder import json_bytes, write_atomically
from .grid import Setting
from .suspects import quality
from .train import Lane, Trainer, probabilities

MEASURES = ("auroc", "precision_at_100", "precision_at_tenth", "precision_at_errors", "seconds")
HEADINGS = ("AUROC", "at 100", "at 10 %", "at errors", "seconds")


@dataclasses.dataclass(frozen=True)
class Command:
    """Settings of a comparison."""

    data: tyro.conf.Positional[Path | None] = None
    """An .npz, .csv or .parquet file with clean labels; by default noisy digits."""

    output: Path | None = None
    """A .json file for the numbers."""

    clean_label_column: str | None = None
    """Of a table: the column with correct labels."""

    label_column: str | None = None
    """Column of a table, or array, with the labels; by default label, or labels."""

    ignore_columns: tuple[str, ...] = ()
    """Of a table: columns that are no features."""

    rho: float = 0.3
    """Radius of SAM and SANER."""

    decay: float = 1e-2
    """Weight decay; SGD also runs with 5e-4."""

    epochs: int | None = None
    """Passes over the rows; by default as in fit.py."""

    seeds: tuple[int, ...] = (0,)
    """Seeds of the training runs and of cleanlab's folds."""

    cleanlab: bool = True
    """Run cleanlab too."""


def settings(rho: float, decay: float) -> dict[str, Setting]:
    """What is compared, by name."""
    points = [
        Setting("mlp", "sgd", 0.0, 5e-4, 0.02),
        Setting("mlp", "sgd", 0.0, decay, 0.02),
        Setting("mlp", "sam", rho, decay, 0.02),
        Setting("mlp", "saner", rho, decay, 0.02),
        Setting("linear", "sgd", 0.0, decay, 0.02),
    ]
    return {point.label: point for point in points}


def score_by_training(
    data: Features, setting: Setting, epochs: int | None, seed: int
) -> tuple[dict[str, np.ndarray], float]:
    """Trains once and scores every row by margin and by 1 − p(observed).

    Returns:
      The scores, higher is more suspicious, and the seconds, compilation included.
    """
    start = time.perf_counter()
    config = dataclasses.replace(Config(), epochs=epochs).fitted_to(data)
    trainer = Trainer(data, data.labels, config.batch_size or 1)
    rows = np.arange(len(data.labels))
    recipe = setting.recipe(config.hidden or 1)
    trained = trainer.epochs(recipe, [Lane(setting.knobs, seed)], rows, config.epochs or 1)
    *_, (state, _) = trained
    p = probabilities(trainer.predict(state, data.inputs)[0].astype(np.float64))
    observed = p[rows, data.labels]
    p[rows, data.labels] = -1.0
    scores = {"margin": p.max(axis=1) - observed, "1 − p": 1 - observed}
    return scores, time.perf_counter() - start


def cross_validated(data: Features, seed: int) -> np.ndarray:
    """Out-of-sample probabilities: 5-fold cross-validation of a logistic regression, its defaults.

    The regression stops after its default number of iterations, converged or not, as is usual.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    inputs = (data.inputs.astype(np.float32) - data.mean) / data.deviation
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    model = LogisticRegression()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        p: np.ndarray = cross_val_predict(
            model, inputs, data.labels, cv=folds, method="predict_proba"
        )
    return p


def score_by_cleanlab(data: Features, seed: int) -> tuple[np.ndarray, float]:
    """1 − cleanlab's label quality, and the seconds."""
    from cleanlab.rank import get_label_quality_scores

    start = time.perf_counter()
    scores = 1 - get_label_quality_scores(data.labels, cross_validated(data, seed))
    return scores, time.perf_counter() - start


def compare(command: Command, data: Features) -> list[dict[str, Any]]:
    """One row per setting, score and seed.

    Raises:
      DataError: without clean labels, or where no label is wrong.
    """
    if data.clean_labels is None:
        raise DataError("clean_labels are missing: a comparison needs them. Add them to the data.")
    wrong = data.clean_labels != data.labels
    if wrong.all() or not wrong.any():
        raise DataError(f"{wrong.sum():,} of {len(wrong):,} labels are wrong: nothing to find.")
    rows: list[dict[str, Any]] = []
    for seed in command.seeds:
        for name, setting in settings(command.rho, command.decay).items():
            scores, seconds = score_by_training(data, setting, command.epochs, seed)
            for kind, values in scores.items():
                row = {"name": name, "score": kind, "seed": seed, "seconds": seconds}
                rows.append(row | quality(values, wrong))
        if command.cleanlab:
            values, seconds = score_by_cleanlab(data, seed)
            row = {"name": "cleanlab", "score": "1 − p", "seed": seed, "seconds": seconds}
            rows.append(row | quality(values, wrong))
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the means over the seeds, within 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for index, heading in enumerate(("scored by", "score", *HEADINGS)):
        table.add_column(heading, justify="left" if index < 2 else "right")
    for name, kind in dict.fromkeys((row["name"], row["score"]) for row in rows):
        ours = [row for row in rows if (row["name"], row["score"]) == (name, kind)]
        means = [float(np.mean([row[measure] for row in ours])) for measure in MEASURES]
        cells = [
            f"{means[0]:.3f}",
            *(f"{100 * mean:.1f}" for mean in means[1:4]),
            f"{means[4]:.0f}",
        ]
        table.add_row(name.replace("decay=", ""), kind, *cells)
    Console(width=min(Console().width, 80)).print(table)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    command = tyro.cli(Command, args=arguments, description=__doc__)
    try:
        if command.cleanlab and importlib.util.find_spec("cleanlab") is None:
            raise DataError("cleanlab is not installed: pip install cleanlab, or --no-cleanlab.")
        if command.output is not None and not command.output.parent.is_dir():
            raise DataError(f"--output: the folder of {str(command.output)!r} is missing. Make it.")
        data = load(
            command.data,
            label_column=command.label_column,
            clean_label_column=command.clean_label_column,
            ignore_columns=command.ignore_columns,
        )
        rows = compare(command, data)
    except (DataError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    show(rows)
    if command.output is not None:
        write_atomically(command.output, json_bytes(json.loads(json.dumps(rows))))


if __name__ == "__main__":
    main()
