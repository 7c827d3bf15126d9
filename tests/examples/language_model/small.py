"""A network and a text that are as small as they can be."""

from pathlib import Path

import numpy as np

from examples.language_model.config import Config
from examples.language_model.data import Batch, cut_windows, training_batch

SETTINGS = {
    **{"layers": 2, "width": 8, "heads": 2, "context": 16, "precision": "float32"},
    **{"batch_size": 4, "learning_rate": 1e-2, "steps": 4, "evaluate_every": 1},
    **{"checkpoint_every": 1, "evaluation_windows": 6, "warmup": 0.25},
}


def config(**changes) -> Config:
    return Config(**SETTINGS | changes)


def batch() -> Batch:
    """Four windows, two of which have an end."""
    letters = np.random.default_rng(0).integers(97, 105, 60, np.uint8).tobytes()
    return training_batch(cut_windows([letters[:25], letters[25:]], 16), 4, 0, 0)


def write_text(folder: Path, seed: int = 0, files: int = 12) -> Path:
    """A folder of short files."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for number in range(files):
        length = int(generator.integers(40, 120))
        letters = generator.integers(97, 105, length, np.uint8).tobytes()
        (folder / f"{number}.txt").write_bytes(letters)
    return folder
