"""Labels, and what a network predicts, as the instruments take them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def as_labels(
    name: str, labels: Any, size: int | None = None, classes: int | None = None
) -> jax.Array:
    """The labels as an array; raises unless they are classes, as far as that can be seen."""
    # NumPy has arrays of the names of classes, which the message is about.
    array = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if size is None:
        has_shape, expected = array.ndim == 1 and array.size > 0, "(n,) with n of at least 1"
    else:
        has_shape, expected = array.shape == (size,), f"({size},)"
    if not has_shape:
        raise ValueError(
            f"{name} must have shape {expected}, got {array.shape}. For one-hot labels take their "
            "argmax; for labels of tokens flatten labels and logits to one row each."
        )
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be integers, got dtype {array.dtype}. Number the classes from 0: "
            "np.unique(labels, return_inverse=True)[1]."
        )
    if array.size and not isinstance(array, jax.core.Tracer):
        lowest, largest = int(array.min()), int(array.max())
        if lowest < 0 or (classes is not None and largest >= classes):
            end = "inf" if classes is None else classes
            raise ValueError(
                f"{name} must lie in [0, {end}), got values from {lowest} to {largest}. Leave examples "
                "without a label out, and let the network return a logit for every class."
            )
    return jnp.asarray(array)


def predicted(logits: jax.Array) -> jax.Array:
    """The class with the largest logit; -1, which is none, in a row with NaN."""
    return jnp.where(jnp.isnan(logits).any(axis=-1), -1, jnp.argmax(logits, axis=-1))
