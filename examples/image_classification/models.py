"""The networks: a small CNN, PreAct ResNets and WideResNets, for images of 8 to 64 pixels a side."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .config import Config

Norm = Callable[..., Any]

convolution_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class CNN(nn.Module):
    """3 × 3 convolutions with normalization and stride 2, and a hidden dense layer.

    Cheap on a CPU, where the gradient of max-pooling is slow, and with the hidden layer large enough
    to memorize wrong labels in a few epochs. ``factors`` times ``width`` are the convolutions' widths.
    """

    num_classes: int
    norm: Norm
    width: int
    dtype: Any
    factors: tuple[int, ...] = (1, 2, 4)

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        for factor in self.factors:
            x = _convolution(self.width * factor, 3, 2, self.dtype)(x)
            x = nn.relu(self.norm(training)(x))
        x = nn.relu(nn.Dense(8 * self.width, dtype=self.dtype)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes)(x.astype(jnp.float32))


class PreActBlock(nn.Module):
    """Two convolutions, each behind normalization and ReLU, and a shortcut (He et al. 2016b)."""

    width: int
    stride: int
    norm: Norm
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        y = nn.relu(self.norm(training)(x))
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.width:
            shortcut = _convolution(self.width, 1, self.stride, self.dtype)(y)
        y = _convolution(self.width, 3, self.stride, self.dtype)(y)
        y = nn.relu(self.norm(training)(y))
        return shortcut + _convolution(self.width, 3, 1, self.dtype)(y)


class PreActResNet(nn.Module):
    """Stages of PreAct blocks, each stage twice as wide and half as large as the one before.

    ``widths[0]`` is the stem's; ``widths[1:]`` and ``blocks`` are the stages'.
    """

    num_classes: int
    norm: Norm
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        x = _convolution(self.widths[0], dtype=self.dtype)(x)
        for stage, (width, count) in enumerate(zip(self.widths[1:], self.blocks, strict=True)):
            for block in range(count):
                stride = 2 if stage and not block else 1
                x = PreActBlock(width, stride, self.norm, self.dtype)(x, training)
        x = nn.relu(self.norm(training)(x))
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)).astype(jnp.float32))


def make_model(config: Config, num_classes: int, axis_name: str | None = None) -> nn.Module:
    """The network of a run; ``apply`` takes images and ``training``, and gives float32 logits.

    Args:
      config: the settings.
      num_classes: number of logits.
      axis_name: the mapped axis over which batch normalization averages; ``None`` normalizes with
        the statistics of the examples that one call sees.

    Returns:
      The Linen module.
    """
    dtype = jnp.dtype(config.precision)
    norm = functools.partial(_NORMS[config.norm], dtype, axis_name)
    width = config.width
    if config.model == "cnn":
        return CNN(num_classes, norm, width, dtype)
    if config.model == "wide_resnet":
        count = (config.depth - 4) // 6
        widths = (16, width, 2 * width, 4 * width)
        return PreActResNet(num_classes, norm, widths, (count,) * 3, dtype)
    widths = (width, width, 2 * width, 4 * width, 8 * width)
    blocks = (2, 2, 2, 2) if config.model == "preact_resnet18" else (3, 4, 6, 3)
    return PreActResNet(num_classes, norm, widths, blocks, dtype)


def _batch_norm(dtype: Any, axis_name: str | None, training: bool) -> nn.Module:
    return nn.BatchNorm(
        use_running_average=not training, momentum=0.9, dtype=dtype, axis_name=axis_name
    )


def _group_norm(dtype: Any, axis_name: str | None, training: bool) -> nn.Module:
    return nn.GroupNorm(num_groups=None, group_size=16, dtype=dtype)


def _layer_norm(dtype: Any, axis_name: str | None, training: bool) -> nn.Module:
    # Over an example's channels and pixels, which is what vision papers call layer normalization.
    return nn.GroupNorm(num_groups=1, dtype=dtype)


_NORMS = {"batch": _batch_norm, "group": _group_norm, "layer": _layer_norm}


def _convolution(width: int, size: int = 3, stride: int = 1, dtype: Any = jnp.float32) -> nn.Conv:
    return nn.Conv(
        width,
        (size, size),
        (stride, stride),
        padding=size // 2,  # on both sides, also with a stride: as the published networks do
        use_bias=False,
        dtype=dtype,
        kernel_init=convolution_init,
    )
