"""The data of the image-classification example: formats, wrong labels, augmentation."""

from .augmentation import Draws, augment, draw, mean_and_deviation, normalize
from .dataset import Dataset, subset
from .loading import load
from .noise import NoisyLabels, noisy_labels

__all__ = [
    # Data sets
    "Dataset",
    "load",
    "subset",
    # Wrong labels
    "NoisyLabels",
    "noisy_labels",
    # On the device
    "Draws",
    "augment",
    "mean_and_deviation",
    "draw",
    "normalize",
]
