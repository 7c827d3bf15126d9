"""A trained head in one ``.npz`` file without pickles."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .data import DataError, npz
from .folder import npz_bytes
from .train import predict, probabilities

FORMAT = "optax_sam frozen_features 1"
LAST, HIDDEN = ("kernel", "bias"), ("hidden_kernel", "hidden_bias")
REMEDY = "Give the model.npz of a fit."


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


def load(path: Path, memory_limit_gib: float = 4.0) -> Model:
    """Reads a model that :meth:`Model.to_bytes` wrote.

    Args:
      path: the file.
      memory_limit_gib: what would take more memory than this is refused before it is read.

    Returns:
      The model.

    Raises:
      DataError: if it is none.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such model. Give the model.npz of a fit.")
    required = (*LAST, "mean", "deviation", "about")
    limit = int(memory_limit_gib * 2**30)
    arrays = npz.read_arrays(path, required, HIDDEN, limit, REMEDY)
    try:
        about = json.loads(str(arrays.pop("about")))
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']!r}")
        mean, deviation = arrays.pop("mean"), arrays.pop("deviation")
        model = Model(arrays, mean, deviation, tuple(about["class_names"]), tuple(about["columns"]))
        _check_shapes(model)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no model of this program: {error}. {REMEDY}") from error
    return model


def _check_shapes(model: Model) -> None:
    features, classes = model.mean.size, len(model.class_names)
    width = model.params["kernel"].size // max(classes, 1)  # inputs of the last layer
    expected = {"mean": (features,), "deviation": (features,)}
    expected |= {"kernel": (width, classes), "bias": (classes,)}
    if set(HIDDEN) & set(model.params):
        expected |= {"hidden_kernel": (features, width), "hidden_bias": (width,)}
    else:
        expected["kernel"] = (features, classes)
    arrays = {"mean": model.mean, "deviation": model.deviation, **model.params}
    for name, shape in expected.items():
        found = arrays[name]
        if found.shape != shape or found.dtype.kind != "f":
            raise ValueError(f"{name} is {found.dtype} {found.shape}, not of floats {shape}")
    if len(model.columns) not in (0, features):
        raise ValueError(f"it has {features} features and {len(model.columns)} columns")
