"""Small problems that the tests share."""

import jax
import jax.numpy as jnp


def apply_mlp(params, inputs):
    """A network with one hidden layer: its Jacobian depends on the parameters."""
    hidden = jnp.tanh(inputs @ params["first"] + params["bias"])
    return hidden @ params["second"]


def apply_linear(params, inputs):
    """A linear model: its Jacobian does not depend on the parameters."""
    return inputs @ params["weight"] + params["bias"]


def mlp_parameters(seed=0, features=4, hidden=6, classes=3):
    """Random parameters for :func:`apply_mlp`, in the default float dtype."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "first": jax.random.normal(keys[0], (features, hidden)) / features**0.5,
        "bias": 0.1 * jax.random.normal(keys[1], (hidden,)),
        "second": jax.random.normal(keys[2], (hidden, classes)) / hidden**0.5,
    }


def linear_parameters(seed=0, features=4, classes=3):
    """Random parameters for :func:`apply_linear`, in the default float dtype."""
    keys = jax.random.split(jax.random.key(seed))
    return {
        "weight": jax.random.normal(keys[0], (features, classes)),
        "bias": jax.random.normal(keys[1], (classes,)),
    }


def examples(seed=0, batch_size=8, features=4, classes=3):
    """Random inputs and integer labels."""
    keys = jax.random.split(jax.random.key(100 + seed))
    inputs = jax.random.normal(keys[0], (batch_size, features))
    return inputs, jax.random.randint(keys[1], (batch_size,), 0, classes)
