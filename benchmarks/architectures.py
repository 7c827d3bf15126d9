"""The networks that are measured, and random problems for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

import optax_sam

CLASSES = 10


class MLP(nn.Module):
    """Hidden layers of one width."""

    width: int = 1024
    depth: int = 2
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for _ in range(self.depth):
            x = self.activation(nn.Dense(self.width)(x))
        return nn.Dense(CLASSES, name="head")(x)


class CNN(nn.Module):
    """Three resolutions of ``depth`` 3 × 3 convolutions, the width doubled from one to the next."""

    norm: str
    width: int = 32
    depth: int = 2
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    pool: Callable[..., jax.Array] = nn.max_pool

    @nn.compact
    def __call__(self, x):
        for stage in range(3):
            for _ in range(self.depth):
                x = nn.Conv(self.width * 2**stage, (3, 3), use_bias=False)(x)
                x = self.activation(normalize(self.norm, x))
            x = self.pool(x, (2, 2), (2, 2))
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


class Block(nn.Module):
    """Two 3 × 3 convolutions and a shortcut."""

    norm: str
    width: int
    stride: int
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        def convolution(x, size, stride):
            x = nn.Conv(self.width, (size, size), (stride, stride), use_bias=False)(x)
            return normalize(self.norm, x)

        y = convolution(self.activation(convolution(x, 3, self.stride)), 3, 1)
        if x.shape != y.shape:
            x = convolution(x, 1, self.stride)
        return self.activation(x + y)


class ResNet18(nn.Module):
    """The ResNet-18 for 32 × 32 images."""

    norm: str
    width: int = 64
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        x = self.activation(normalize(self.norm, x))
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage and not block else 1
                x = Block(self.norm, self.width * 2**stage, stride, self.activation)(x)
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))


def normalize(norm: str, x: jax.Array) -> jax.Array:
    """GroupNorm in eight groups, or BatchNorm with the statistics of the batch."""
    if norm == "group":
        return nn.GroupNorm(8)(x)
    return nn.BatchNorm(use_running_average=False, momentum=0.9)(x)


class Network(NamedTuple):
    """What is measured.

    Attributes:
      module: the network.
      shape: the shape of one input.
      batch_size: examples in a step.
      rounds: rounds of timing; a multiple of 5, since some methods act every fifth step.
    """

    module: nn.Module
    shape: tuple[int, ...]
    batch_size: int
    rounds: int = 10

    @property
    def mixes_examples(self) -> bool:
        """Whether the output for one example depends on the others."""
        return getattr(self.module, "norm", None) == "batch"


NETWORKS = {
    "MLP": Network(MLP(), (28, 28, 1), batch_size=128, rounds=20),
    "CNN, GroupNorm": Network(CNN("group"), (32, 32, 3), batch_size=64),
    "CNN, BatchNorm": Network(CNN("batch"), (32, 32, 3), batch_size=64),
    "ResNet-18, GroupNorm": Network(ResNet18("group"), (32, 32, 3), batch_size=32, rounds=5),
    "ResNet-18, BatchNorm": Network(ResNet18("batch"), (32, 32, 3), batch_size=16, rounds=5),
}


class Problem(NamedTuple):
    """The arguments of a training step but for the optimizer's state.

    Attributes:
      params: the parameters.
      stats: the batch statistics; empty without BatchNorm.
      inputs: shape ``(B, ...)``.
      labels: integers, shape ``(B,)``.
    """

    params: Any
    stats: Any
    inputs: jax.Array
    labels: jax.Array


def random_problem(network: Network, seed: int = 0) -> Problem:
    """Random parameters, inputs and labels."""
    keys = jax.random.split(jax.random.key(seed), 3)
    inputs = jax.random.normal(keys[0], (network.batch_size, *network.shape))
    labels = jax.random.randint(keys[1], (network.batch_size,), 0, CLASSES)
    variables = jax.jit(network.module.init)(keys[2], inputs[:1])
    return Problem(variables["params"], variables.get("batch_stats", {}), inputs, labels)


def objective_of(module: nn.Module, stats: Any, inputs: Any, labels: Any) -> optax_sam.Objective:
    """The network's loss; the new batch statistics are its auxiliary output."""

    def apply_fn(params, x):
        logits, updated = module.apply(
            {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
        )
        return logits, updated.get("batch_stats", {})

    return optax_sam.Objective(apply_fn, inputs, labels, has_aux=True)
