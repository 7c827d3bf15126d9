"""The heads: a linear one, and one with a hidden layer."""

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, jax.Array]


def init(seed: int, head: str, features: int, hidden: int, classes: int) -> dict[str, np.ndarray]:
    """Initial parameters: He's deviation for the hidden layer, 1 / √inputs for the last one.

    Args:
      seed: the same seed gives the same parameters.
      head: ``"linear"`` or ``"mlp"``.
      features: columns of the inputs.
      hidden: units of the hidden layer.
      classes: number of classes.

    Returns:
      The parameters, drawn by NumPy: XLA takes longer to compile the drawing than to train.
    """
    random = np.random.default_rng(seed)
    params = {}
    width = features
    if head == "mlp":
        kernel = random.standard_normal((features, hidden), np.float32)
        params["hidden_kernel"] = np.float32((2 / features) ** 0.5) * kernel
        params["hidden_bias"] = np.zeros(hidden, np.float32)
        width = hidden
    kernel = random.standard_normal((width, classes), np.float32)
    params["kernel"] = np.float32(width**-0.5) * kernel
    params["bias"] = np.zeros(classes, np.float32)
    return params


def apply(
    params: Params, inputs: jax.Array, dropout: float = 0.0, key: jax.Array | None = None
) -> jax.Array:
    """Logits.

    Args:
      params: of :func:`init`.
      inputs: standardized, shape ``(batch, features)``.
      dropout: share of the last layer's inputs that is left out, in training only.
      key: which ones; None for predictions.

    Returns:
      Shape ``(batch, classes)``.
    """
    inputs = last_inputs(params, inputs)
    if dropout and key is not None:
        kept = jax.random.bernoulli(key, 1 - dropout, inputs.shape)
        inputs = jnp.where(kept, inputs / (1 - dropout), 0.0)
    return inputs @ params["kernel"] + params["bias"]


def last_inputs(params: Params, inputs: jax.Array) -> jax.Array:
    """What the last layer gets: the hidden units, or for a linear head the inputs."""
    if "hidden_kernel" in params:
        inputs = jax.nn.relu(inputs @ params["hidden_kernel"] + params["hidden_bias"])
    return inputs
