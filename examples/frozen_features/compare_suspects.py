"""How well the wrong labels are found, beside cleanlab, with the time of each.

    python -m examples.frozen_features.compare_suspects DATA --output suspects.json
    python -m examples.frozen_features.compare_suspects DIR --set news_reduced --table news.md

DATA must have clean labels; they serve for the comparison only. Every row but cleanlab's is one
training run that scores the rows it was trained on. cleanlab does its usual: out-of-sample
probabilities by 5-fold cross-validation of a logistic regression, then 1 − the probability of the
observed class. The seconds are of the processor: unlike the clock's they do not hang on what else the
machine does, and with several threads they count each. Settings of one method and head share a compiled
program, and the first of them, of the first seed, has the seconds of the compilation.
"""

import dataclasses
import importlib.util
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
from .folder import json_bytes, plain
from .grid import Setting
from .output_folder import explain, write_atomically
from .sets import SETS, fitted, load_set
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

    table: Path | None = None
    """A Markdown file for the means over the seeds."""

    set: str | None = None
    """A data set of the evidence by its name in sets.py; DATA is then the folder with its file."""

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
    data: Features, setting: Setting, config: Config, seed: int
) -> tuple[dict[str, np.ndarray], float]:
    """Trains once and scores every row by margin and by 1 − p(observed).

    Returns:
      The scores, higher is more suspicious and NaN where the network has diverged, and the
      processor's seconds.
    """
    start = time.process_time()
    trainer = Trainer(data, data.labels, config.batch_size or 1)
    rows = np.arange(len(data.labels))
    recipe = setting.recipe(config.hidden or 1)
    trained = trainer.epochs(recipe, [Lane(setting.knobs, seed)], rows, config.epochs or 1)
    *_, (state, _) = trained
    logits = trainer.predict(state, data.inputs)[0].astype(np.float64)
    p = probabilities(logits if np.isfinite(logits).all() else np.full_like(logits, np.nan))
    observed = p[rows, data.labels]
    p[rows, data.labels] = -1.0
    scores = {"margin": p.max(axis=1) - observed, "1 − p": 1 - observed}
    return scores, time.process_time() - start


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
    """1 − cleanlab's label quality, and the processor's seconds."""
    from cleanlab.rank import get_label_quality_scores

    start = time.process_time()
    scores = 1 - get_label_quality_scores(data.labels, cross_validated(data, seed))
    return scores, time.process_time() - start


def compare(command: Command, data: Features) -> list[dict[str, Any]]:
    """One row per setting, score and seed.

    Raises:
      DataError: without clean labels, where no label is wrong, and for repeated seeds.
    """
    if not command.seeds or len(set(command.seeds)) < len(command.seeds):
        raise DataError(
            f"--seeds: {command.seeds!r} is not valid. Name each one once, at least one."
        )
    if data.clean_labels is None:
        raise DataError("clean_labels are missing: a comparison needs them. Add them to the data.")
    wrong = data.clean_labels != data.labels
    if wrong.all() or not wrong.any():
        raise DataError(f"{wrong.sum():,} of {len(wrong):,} labels are wrong: nothing to find.")
    if command.set is None:
        config = Config(epochs=command.epochs).fitted_to(data)
    else:
        config = fitted(command.set, data, command.epochs)
    rows: list[dict[str, Any]] = []
    for seed in command.seeds:
        for name, setting in settings(command.rho, command.decay).items():
            scores, seconds = score_by_training(data, setting, config, seed)
            for kind, values in scores.items():
                row = {"name": name, "score": kind, "seed": seed, "seconds": seconds}
                rows.append(row | quality(values, wrong))
        if command.cleanlab:
            values, seconds = score_by_cleanlab(data, seed)
            row = {"name": "cleanlab", "score": "1 − p", "seed": seed, "seconds": seconds}
            rows.append(row | quality(values, wrong))
    return rows


def means(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Per setting and score the means over the seeds, as they are printed."""
    lines = []
    for name, kind in dict.fromkeys((row["name"], row["score"]) for row in rows):
        ours = [row for row in rows if (row["name"], row["score"]) == (name, kind)]
        auroc, *shares, seconds = (
            float(np.mean([row[measure] for row in ours])) for measure in MEASURES
        )
        percent = [f"{100 * share:.1f}" for share in shares]
        lines.append((name, kind, f"{auroc:.3f}", *percent, f"{seconds:.1f}"))
    return lines


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the means, within 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for index, heading in enumerate(("scored by", "score", *HEADINGS)):
        table.add_column(heading, justify="left" if index < 2 else "right")
    for name, *cells in means(rows):
        table.add_row(name.replace("decay=", ""), *cells)
    Console(width=min(Console().width, 80)).print(table)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The means as a Markdown table."""
    headings = ("scored by", "score", "AUROC", "wrong of the first 100 [%]")
    headings += ("of the first tenth [%]", "of as many as are wrong [%]", "processor [s]")
    lines = [headings, ("---", "---", *["---:"] * 5), *means(rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    command = tyro.cli(Command, args=arguments, description=__doc__)
    try:
        if command.cleanlab and importlib.util.find_spec("cleanlab") is None:
            raise DataError("cleanlab is not installed: pip install cleanlab, or --no-cleanlab.")
        for flag, path in (("--output", command.output), ("--table", command.table)):
            if path is not None and not path.parent.is_dir():
                raise DataError(f"{flag}: the folder of {str(path)!r} is missing. Make it.")
            if path is not None and path.is_dir():
                raise DataError(f"{flag}: {str(path)!r} is a folder. Name a file in it.")
        columns = {
            "label_column": command.label_column,
            "clean_label_column": command.clean_label_column,
            "ignore_columns": command.ignore_columns,
        }
        if command.set is None:
            data = load(command.data, **columns)
        elif any(columns.values()):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in columns)
            raise DataError(f"--set: {command.set!r} goes without {flags}. Leave them out.")
        elif command.set in SETS:
            data = load_set(command.set, command.data)
        else:
            raise DataError(f"--set: {command.set!r} is not valid. Choose from {', '.join(SETS)}.")
        rows = compare(command, data)
        show(rows)
        if command.output is not None:
            write_atomically(command.output, json_bytes(plain(rows)))
        if command.table is not None:
            write_atomically(command.table, markdown(rows))
    except OSError as error:
        sys.exit(f"error: {explain(error)}")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
