"""A trained head in one ``.npz`` file without pickles."""

import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .data import DataError
from .folder import npz_bytes
from .train import predict, probabilities

FORMAT = "optax_sam frozen_features 1"
ARRAYS = ("hidden_kernel", "hidden_bias", "kernel", "bias")


class Model(NamedTuple):
    """A trained head.

    Attributes:
      params: of :mod:`.networks`.
      mean, deviation: of the columns that it was trained on.
      class_names: the classes.
      columns: the features' names, of a table.
    """

    params: dict[str, np.ndarray]
    mean: np.ndarray
    deviation: np.ndarray
    class_names: tuple[str, ...]
    columns: tuple[str, ...] = ()

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """Shape ``(n, classes)``."""
        if inputs.shape[1] != len(self.mean):
            raise DataError(
                f"inputs have {inputs.shape[1]:,} columns, the model was trained on "
                f"{len(self.mean):,}. Give the same features."
            )
        lanes = {name: array[None] for name, array in self.params.items()}
        logits: np.ndarray = predict(lanes, inputs, self.mean, self.deviation)[0]
        return logits

    def probabilities(self, inputs: np.ndarray) -> np.ndarray:
        """Shape ``(n, classes)``."""
        return probabilities(self.logits(inputs))

    def to_bytes(self) -> bytes:
        """The file."""
        about = {"format": FORMAT, "class_names": self.class_names, "columns": self.columns}
        return npz_bytes(
            {
                **self.params,
                "mean": self.mean,
                "deviation": self.deviation,
                "about": np.array(json.dumps(about)),
            }
        )


def load(path: Path) -> Model:
    """Reads a model that :meth:`Model.to_bytes` wrote.

    Raises:
      DataError: if it is none.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such model. Give the model.npz of a fit.")
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        about = json.loads(str(arrays["about"]))
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']!r}")
        params = {name: arrays[name] for name in ARRAYS if name in arrays}
        return Model(
            params,
            arrays["mean"],
            arrays["deviation"],
            tuple(about["class_names"]),
            tuple(about["columns"]),
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is damaged or no model of this program: {str(error).rstrip('.')}. Fit again."
        ) from error
