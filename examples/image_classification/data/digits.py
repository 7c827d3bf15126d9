"""The 1,797 handwritten digits of scikit-learn, 8 × 8 pixels: real images that need no download."""

import numpy as np
import sklearn.datasets
from sklearn.model_selection import train_test_split

from .dataset import Dataset, as_images, as_labels, assemble

NUM_CLASSES = 10
NUM_TRAIN = 1297
NUM_TEST = 500


def read() -> Dataset:
    """The digits with a fixed stratified split, the one of the label-noise example.

    Returns:
      The data set; the pixel values go from 0 to 16.
    """
    digits = sklearn.datasets.load_digits()
    images, test_images, labels, test_labels = train_test_split(
        as_images(digits.images.astype(np.uint8), "digits"),
        as_labels(digits.target, "digits"),
        train_size=NUM_TRAIN,
        test_size=NUM_TEST,
        stratify=digits.target,
        random_state=0,
    )
    return assemble("digits", (images, labels), (test_images, test_labels), NUM_CLASSES, "digits")
