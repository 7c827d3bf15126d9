"""The digits of scikit-learn, with wrong training labels."""

import hashlib
from typing import NamedTuple

import numpy as np
import sklearn.datasets
from sklearn.model_selection import train_test_split

from optax_sam import label_noise

NUM_CLASSES = 10
NUM_TRAIN = 1297
NUM_TEST = 500

CONFUSED_DIGITS = {2: 7, 3: 8, 5: 6, 6: 5, 7: 1}
"""The usual map of asymmetric noise on handwritten digits (Patrini et al., CVPR 2017)."""

NOISE = {
    "symmetric": lambda inputs, labels, rate, seed: label_noise.symmetric(
        labels, rate, NUM_CLASSES, seed=seed
    ),
    "asymmetric": lambda inputs, labels, rate, seed: label_noise.asymmetric(
        labels, rate, CONFUSED_DIGITS, NUM_CLASSES, seed=seed
    ),
    "pair_flip": lambda inputs, labels, rate, seed: label_noise.pair_flip(
        labels, rate, NUM_CLASSES, seed=seed
    ),
    "instance_dependent": lambda inputs, labels, rate, seed: label_noise.instance_dependent(
        inputs, labels, rate, NUM_CLASSES, seed=seed
    ),
}


class Data(NamedTuple):
    """One split of the images, and one noisy training set per seed.

    Attributes:
      inputs: float32, shape ``(n, 8, 8, 1)``, standardized training images.
      labels: int32, shape ``(seeds, n)``, the noisy training labels.
      changed: bool, shape ``(seeds, n)``, True where the training label is wrong.
      test_inputs: float32, shape ``(m, 8, 8, 1)``.
      test_labels: int32, shape ``(m,)``, all correct.
    """

    inputs: np.ndarray
    labels: np.ndarray
    changed: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray

    def noise_hashes(self) -> list[str]:
        """SHA-256 of each seed's labels and mask, to tell whether two runs saw the same."""
        return [
            hashlib.sha256(labels.astype("<i4").tobytes() + np.packbits(mask).tobytes()).hexdigest()
            for labels, mask in zip(self.labels, self.changed, strict=True)
        ]


def load_digits(noise: str, rate: float, seeds: tuple[int, ...]) -> Data:
    """Loads the 1,797 digits; the stratified split is fixed, the noise is the seed's.

    Args:
      noise: kind of noise, a key of ``NOISE``.
      rate: share of wrong training labels.
      seeds: one noisy training set for each.

    Returns:
      The data; the test labels are never changed.
    """
    digits = sklearn.datasets.load_digits()
    inputs, test_inputs, labels, test_labels = train_test_split(
        digits.images[..., None].astype(np.float32),
        digits.target.astype(np.int32),
        train_size=NUM_TRAIN,
        test_size=NUM_TEST,
        stratify=digits.target,
        random_state=0,
    )
    mean, deviation = inputs.mean(), inputs.std()
    inputs, test_inputs = (inputs - mean) / deviation, (test_inputs - mean) / deviation
    noisy = [NOISE[noise](inputs, labels, rate, seed) for seed in seeds]
    return Data(
        inputs,
        np.stack([one.labels for one in noisy]),
        np.stack([one.changed for one in noisy]),
        test_inputs,
        test_labels,
    )
