"""The digits of scikit-learn with 40 % wrong labels, for whoever has no data at hand."""

import numpy as np
import sklearn.datasets
from sklearn.model_selection import train_test_split

from optax_sam import label_noise

from .features import Features, assemble


def load(rate: float = 0.4, seed: int = 0, kind: str = "symmetric") -> Features:
    """1,297 rows of 64 pixels with noisy labels, and 500 for the test.

    Args:
      rate: share of wrong labels, in [0, 1].
      seed: of the noise; the split is fixed.
      kind: ``"symmetric"``, any other digit, or ``"pair_flip"``, the next one.

    Returns:
      The data set, its clean labels included.
    """
    digits = sklearn.datasets.load_digits()
    inputs, test_inputs, labels, test_labels = train_test_split(
        digits.data.astype(np.uint8),
        digits.target.astype(np.int32),
        train_size=1297,
        test_size=500,
        stratify=digits.target,
        random_state=0,
    )
    corrupt = {"symmetric": label_noise.symmetric, "pair_flip": label_noise.pair_flip}[kind]
    noisy = corrupt(labels, rate, 10, seed=seed)
    return assemble(
        inputs,
        noisy.labels,
        "digits",
        clean_labels=labels,
        test_inputs=test_inputs,
        test_labels=test_labels,
        notes=(f"scikit-learn's digits, {100 * rate:g} % {kind} label noise",),
    )
