"""SAM in plain JAX, as the programs of this folder would have it without the library."""

import jax
import numpy as np
import optax

RHO = 0.1


def sam(loss_fn, params, rho=RHO):
    """``((loss, aux), gradient at w + ε)`` of a loss function that returns ``(loss, aux)``."""
    value, clean = jax.value_and_grad(loss_fn, has_aux=True)(params)
    norm = optax.tree.norm(clean)
    perturbed = jax.tree.map(lambda w, g: w + rho * g / norm, params, clean)
    return value, jax.grad(loss_fn, has_aux=True)(perturbed)[0]


def assert_same(actual, expected):
    """Parameters, losses, statistics and random state: the same trees, to 1e-6."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), (_, b) in zip(
        jax.tree_util.tree_leaves_with_path(actual),
        jax.tree_util.tree_leaves_with_path(expected),
        strict=True,
    ):
        np.testing.assert_allclose(
            np.asarray(a, np.float64),
            np.asarray(b, np.float64),
            rtol=1e-6,
            atol=1e-6,
            err_msg=jax.tree_util.keystr(path),
        )
