"""The networks, for 8 × 8 images with one channel."""

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Two hidden layers of 256 units."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(256)(x))
        x = nn.relu(nn.Dense(256)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    """Two 3 × 3 convolutions with pooling, and a hidden layer of 128 units."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (32, 64):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


MODELS = {"mlp": MLP, "cnn": CNN}

LAST_LAYER = {"mlp": "Dense_2", "cnn": "Dense_1"}
"""Name of the layer that gives the logits."""
