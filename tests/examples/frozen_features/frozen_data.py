"""Small data for the tests: two blobs of numbers per class, some labels wrong."""

import numpy as np

from examples.frozen_features.data.features import Features, assemble


def arrays(rows=120, features=5, classes=3, wrong=0.2, seed=0):
    random = np.random.default_rng(seed)
    clean = np.arange(rows) % classes
    centers = 2.0 * random.standard_normal((classes, features))
    inputs = (centers[clean] + random.standard_normal((rows, features))).astype(np.float32)
    noisy = clean.copy()
    changed = random.permutation(rows)[: round(wrong * rows)]
    noisy[changed] = (noisy[changed] + 1) % classes
    test = (centers[clean] + random.standard_normal((rows, features))).astype(np.float32)
    return {
        "inputs": inputs,
        "labels": noisy,
        "clean_labels": clean,
        "test_inputs": test,
        "test_labels": clean.copy(),
    }


def features(**options) -> Features:
    given = arrays(**options)
    return assemble(given.pop("inputs"), given.pop("labels"), "test", **given)
