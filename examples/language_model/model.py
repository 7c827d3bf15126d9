"""A decoder transformer in Flax nnx: layers in a scan, each computed again in the backward pass."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from .config import Config

BYTES = 256


class Linear(nnx.Module):
    """``x @ kernel``, with ``adapter_rank`` plus LoRA's ``x @ lora_a @ lora_b``.

    Without biases, as usual in transformers. ``lora_b`` begins as zero, so adapters change nothing at
    first (Hu et al., "LoRA", ICLR 2022).
    """

    def __init__(self, before: int, after: int, config: Config, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.precision)
        initialize = jax.nn.initializers.lecun_normal()
        self.kernel = nnx.Param(initialize(rngs.params(), (before, after)))
        rank = config.adapter_rank
        self.has_adapter = rank is not None
        if self.has_adapter:
            self.lora_a = nnx.LoRAParam(initialize(rngs.params(), (before, rank)))
            self.lora_b = nnx.LoRAParam(jnp.zeros((rank, after)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        y = x @ self.kernel.astype(self.dtype)
        if self.has_adapter:
            y += x @ self.lora_a.astype(self.dtype) @ self.lora_b.astype(self.dtype)
        return y


class RMSNorm(nnx.Module):
    """``scale * x / sqrt(mean(x²))``, in float32."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return self.scale * x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


class ClassifierParam(nnx.Param):
    """A parameter that no language model has: it is trained beside adapters too."""


class Classifier(nnx.Module):
    """``x @ kernel``: the logits of the classes, in float32."""

    def __init__(self, width: int, classes: int, rngs: nnx.Rngs):
        initialize = jax.nn.initializers.lecun_normal()
        self.kernel = ClassifierParam(initialize(rngs.params(), (width, classes)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) @ self.kernel


class Layer(nnx.Module):
    """Causal attention, then two dense layers, each behind a normalization and with a shortcut."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width = config.width
        self.heads = config.heads
        self.norm_attention, self.norm_mlp = RMSNorm(width), RMSNorm(width)
        self.query = Linear(width, width, config, rngs)
        self.key = Linear(width, width, config, rngs)
        self.value = Linear(width, width, config, rngs)
        self.output = Linear(width, width, config, rngs)
        self.up = Linear(width, 4 * width, config, rngs)
        self.down = Linear(4 * width, width, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm_attention(x)
        query, key, value = (
            linear(y).reshape(*y.shape[:2], self.heads, -1)
            for linear in (self.query, self.key, self.value)
        )
        y = jax.nn.dot_product_attention(rotated(query), rotated(key), value, is_causal=True)
        x = x + self.output(y.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm_mlp(x))))


def rotated(x: jax.Array) -> jax.Array:
    """Rotates pairs of features by angles that grow with the position (RoPE, Su et al. 2021).

    Args:
      x: queries or keys, shape ``(batch, positions, heads, features)``, an even number of features.

    Returns:
      The same shape; inner products then depend on the distance of two positions only.
    """
    half = x.shape[-1] // 2
    angles = jnp.outer(jnp.arange(x.shape[1]), 10000.0 ** (-jnp.arange(half) / half))
    cos, sin = (f(angles)[:, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    one, other = x[..., :half], x[..., half:]
    return jnp.concatenate([one * cos - other * sin, one * sin + other * cos], axis=-1)


class Transformer(nnx.Module):
    """Logits of the next byte at every position, or, with ``classes``, of a text's class.

    The layers are one module whose parameters have a leading axis of layers; a scan runs through it, so
    the program is compiled for one layer whatever their number. With rematerialization the backward
    pass keeps only the input of every layer and computes the rest again.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs, classes: int | None = None):
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def stack(rngs):
            return Layer(config, rngs)

        embed = jax.nn.initializers.normal(1.0)
        self.embedding = nnx.Param(embed(rngs.params(), (BYTES, config.width)))
        self.layers = stack(rngs)
        self.norm = RMSNorm(config.width)
        self.pooling = config.pooling
        self.classifies = classes is not None
        if self.classifies:
            self.classifier = Classifier(config.width, classes, rngs)
        else:
            self.head = Linear(config.width, BYTES, config, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits, float32, of bytes ``(batch, positions)``.

        Their shape is ``(batch, positions, 256)``, with classes ``(batch, classes)``. Bytes are then −1
        behind the end of a text, and the logits do not depend on how much of that there is.
        """

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def through_layers(x, layer):
            return by_batch(layer(x))

        x = through_layers(by_batch(self.embedding[jnp.maximum(tokens, 0)]), self.layers)
        if self.classifies:
            return self.classifier(pooled(self.norm(x), tokens >= 0, self.pooling))
        return self.head(self.norm(x)).astype(jnp.float32)


def pooled(x: jax.Array, is_text: jax.Array, pooling: str) -> jax.Array:
    """One vector for every text.

    Args:
      x: shape ``(batch, positions, features)``.
      is_text: bools, shape ``(batch, positions)``, False behind the end of a text.
      pooling: ``"mean"`` of the text's positions, or the ``"last"`` one, which has seen the whole text.

    Returns:
      Shape ``(batch, features)``.
    """
    lengths = jnp.sum(is_text, axis=1)
    if pooling == "last":
        return jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
    return jnp.einsum("bpf,bp->bf", x, is_text.astype(x.dtype)) / lengths[:, None]


def by_batch(x: jax.Array) -> jax.Array:
    """Cuts activations along the batch. Parameters, cut along "data" too, are gathered to meet them."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec("data"))


def merged(network: Any, adapters: Any) -> Any:
    """The network with its adapters added to its kernels: it then needs none.

    A classifier, which is trained beside the adapters, comes along.
    """
    if "kernel" in network:
        return {"kernel": network["kernel"] + adapters["lora_a"] @ adapters["lora_b"]}
    adapted = {
        name: merged(part, adapters[name]) if name in adapters else part
        for name, part in network.items()
    }
    return adapted | {name: part for name, part in adapters.items() if name not in network}
