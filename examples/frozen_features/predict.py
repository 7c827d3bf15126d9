"""Predicts classes with a model that fit.py wrote.

    python -m examples.frozen_features.predict DIR/model.npz DATA --output predictions.csv

DATA needs features only: an .npz with ``inputs``, or a table with the columns of the training.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import tyro

from . import model
from .data import DataError, load_inputs
from .folder import npz_bytes
from .output_folder import explain, write_atomically
from .suspects import quoted


@dataclasses.dataclass(frozen=True)
class Command:
    """Settings of a prediction."""

    model: tyro.conf.Positional[Path]
    """The model.npz of a fit."""

    data: tyro.conf.Positional[Path]
    """An .npz, .csv or .parquet file."""

    output: Path
    """A .csv with class and probability per row, or an .npz with all probabilities."""

    memory_limit_gib: float = 4.0
    """Data that would take more is refused before it is read."""


def predict(command: Command) -> np.ndarray:
    """Writes the predictions and returns the probabilities, shape ``(n, classes)``."""
    if command.output.suffix.lower() not in (".csv", ".npz"):
        raise DataError(
            f"--output: {str(command.output)!r} is not valid. Name a .csv or an .npz file."
        )
    if not command.output.parent.is_dir():
        raise DataError(f"--output: the folder of {str(command.output)!r} is missing. Make it.")
    head = model.load(command.model, command.memory_limit_gib)
    p = head.probabilities(load_inputs(command.data, head.columns, command.memory_limit_gib))
    if command.output.suffix.lower() == ".npz":
        content = npz_bytes({"probabilities": p, "class_names": np.array(head.class_names)})
    else:
        names = [quoted(name) for name in head.class_names]
        best = p.argmax(axis=1)
        lines = [f"{row},{names[c]},{p[row, c]:.6f}" for row, c in enumerate(best)]
        content = ("row,class,probability\n" + "\n".join(lines) + "\n").encode()
    write_atomically(command.output, content)
    return p


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    command = tyro.cli(Command, args=arguments, description=__doc__)
    try:
        p = predict(command)
    except OSError as error:
        sys.exit(f"error: {explain(error)}")
    except DataError as error:
        sys.exit(f"error: {error}")
    print(f"{len(p):,} rows predicted, in {command.output}")


if __name__ == "__main__":
    main()
