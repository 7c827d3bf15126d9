"""The networks that are compiled for pods: ResNet-50, ViT-B and a decoder of a billion parameters.

Parameters are float32 and the arithmetic is bfloat16, as usual on TPUs. The transformers have their
layers in a scan, so that their program has one layer, however deep the network is.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

HALF = jnp.bfloat16


class Layer(nn.Module):
    """One pre-normalized transformer layer: attention and a perceptron, each with a shortcut."""

    heads: int
    is_causal: bool
    batch: NamedSharding | None = None

    @nn.compact
    def __call__(self, x, _=None):
        width = x.shape[-1]
        y = normalize(x)
        split = (*x.shape[:-1], self.heads, width // self.heads)
        query, key, value = (dense(width, name)(y).reshape(split) for name in ("q", "k", "v"))
        y = jax.nn.dot_product_attention(query, key, value, is_causal=self.is_causal)
        x = spread(x + dense(width, "out")(y.reshape(x.shape)), self.batch)
        y = nn.gelu(dense(4 * width, "up")(normalize(x)))
        return spread(x + dense(width, "down")(y), self.batch), None


def spread(x: jax.Array, batch: NamedSharding | None) -> jax.Array:
    """Says that each chip has its own examples, which the partitioner may not find out by itself.

    Under ``group_size`` a network is traced on the examples of one group. There ``batch`` says that no
    axis is cut, and the objective's ``spmd_axis_name`` that the groups lie as the batch does; without
    this, activations travel to where the parameters are cut. Some of the batch's examples (NCSAM's)
    may not be divisible.
    """
    if batch is None:
        return x
    spec = batch.spec if x.shape[0] % batch.mesh.shape["data"] == 0 else PartitionSpec()
    return jax.lax.with_sharding_constraint(x, NamedSharding(batch.mesh, spec))


def dense(width: int, name: str) -> nn.Dense:
    """A matrix product."""
    return nn.Dense(width, use_bias=False, dtype=HALF, name=name)


def normalize(x: jax.Array) -> jax.Array:
    """Layer normalization, inside a compact module."""
    return nn.LayerNorm(use_bias=False, dtype=HALF)(x)


def layers(
    depth: int, heads: int, batch: NamedSharding | None, *, is_causal: bool, remat: bool
) -> nn.Module:
    """A stack of layers in a scan."""
    layer = nn.remat(Layer, prevent_cse=False) if remat else Layer
    stack = nn.scan(layer, length=depth, variable_axes={"params": 0}, split_rngs={"params": True})
    return stack(heads, is_causal, batch, name="layers")


class Decoder(nn.Module):
    """A language model: one logit for every token of the vocabulary at every position.

    ``batch``, if given, is how the examples lie on the chips.
    """

    vocabulary: int = 32_768
    width: int = 2048
    depth: int = 18
    heads: int = 16
    batch: NamedSharding | None = None

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocabulary, self.width, dtype=HALF, name="embed")(tokens)
        x = spread(x, self.batch)
        x, _ = layers(self.depth, self.heads, self.batch, is_causal=True, remat=True)(x, None)
        return dense(self.vocabulary, "head")(normalize(x)).astype(jnp.float32)


class ViT(nn.Module):
    """A vision transformer whose tokens are averaged at the end; ``batch`` as in the decoder."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    patch: int = 16
    classes: int = 1000
    batch: NamedSharding | None = None

    @nn.compact
    def __call__(self, images):
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, "VALID", dtype=HALF, name="patches")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        positions = self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        x = spread(x + positions.astype(x.dtype), self.batch)
        x, _ = layers(self.depth, self.heads, self.batch, is_causal=False, remat=False)(x, None)
        return dense(self.classes, "head")(normalize(x).mean(1)).astype(jnp.float32)


def spread_images(x: jax.Array, batch: NamedSharding | None) -> jax.Array:
    """The same for images, whose channels the compiler may cut as the parameters are cut.

    Without this, fully sharded convolutions with a kernel for every group move activations.
    """
    if batch is None or (x.shape[0] % batch.mesh.shape["data"] and batch.spec != PartitionSpec()):
        return x
    others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    examples = batch.spec[0] if batch.spec else None
    spec = PartitionSpec(examples, *others)
    return jax.lax.with_sharding_constraint(x, NamedSharding(batch.mesh, spec))


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut."""

    norm: str
    width: int
    stride: int
    batch: NamedSharding | None = None

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.convolution(x, self.width, 1))
        y = nn.relu(self.convolution(y, self.width, 3, self.stride))
        y = self.convolution(y, 4 * self.width, 1)
        if x.shape != y.shape:
            x = self.convolution(x, 4 * self.width, 1, self.stride)
        return nn.relu(x + y)

    def convolution(self, x, width, size, stride=1):
        x = nn.Conv(width, (size, size), (stride, stride), use_bias=False, dtype=HALF)(x)
        return normalize_channels(self.norm, spread_images(x, self.batch))


def normalize_channels(norm: str, x: jax.Array) -> jax.Array:
    """GroupNorm in 32 groups, or BatchNorm with the statistics of the whole batch."""
    if norm == "group":
        return nn.GroupNorm(min(32, x.shape[-1]), dtype=HALF)(x)
    return nn.BatchNorm(use_running_average=False, momentum=0.9, dtype=HALF)(x)


class ResNet(nn.Module):
    """ResNet-50, or a smaller one of its kind; ``batch`` as in the decoder."""

    norm: str
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000
    batch: NamedSharding | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (7, 7), (2, 2), use_bias=False, dtype=HALF)(x)
        x = nn.relu(normalize_channels(self.norm, spread_images(x, self.batch)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                stride = 2 if stage and not block else 1
                x = Bottleneck(self.norm, self.width * 2**stage, stride, self.batch)(x)
        return dense(self.classes, "head")(x.mean((1, 2))).astype(jnp.float32)


class PodNetwork(NamedTuple):
    """What is compiled.

    Attributes:
      module: the network.
      optimizer: the base optimizer behind every method.
      optimizer_name: what its own step is called in the tables.
      per_chip: examples for each chip, so that the batch grows with the pod.
      shape: the shape of one input.
      dtype: the type of the inputs.
      label_shape: the shape of one example's labels.
    """

    module: nn.Module
    optimizer: optax.GradientTransformation
    optimizer_name: str
    per_chip: int
    shape: tuple[int, ...]
    dtype: Any = HALF
    label_shape: tuple[int, ...] = ()

    @property
    def mixes_examples(self) -> bool:
        """Whether the output for one example depends on the others."""
        return getattr(self.module, "norm", None) == "batch"


ADAMW = optax.adamw(3e-4, weight_decay=0.1)
MOMENTUM = optax.sgd(0.1, momentum=0.9)
LENGTH = 1024  # tokens
IMAGE = (224, 224, 3)

NETWORKS: dict[str, PodNetwork] = {
    "decoder": PodNetwork(Decoder(), ADAMW, "AdamW", 4, (LENGTH,), jnp.int32, (LENGTH,)),
    "ViT-B": PodNetwork(ViT(), ADAMW, "AdamW", 32, IMAGE),
    "ResNet-50, BatchNorm": PodNetwork(ResNet("batch"), MOMENTUM, "SGD", 32, IMAGE),
    "ResNet-50, GroupNorm": PodNetwork(ResNet("group"), MOMENTUM, "SGD", 32, IMAGE),
}
