"""Random crops, flips and cutout on the device, and the normalization before them.

The random choices of a batch are drawn first, for the whole batch, and then applied. So a batch can
be cut into parts, for several devices or for accumulation, with the same result as in one piece:
``augment`` of a slice with the slice of the draws is the slice of the augmented batch.

Call :func:`normalize` first: what a crop or cutout leaves empty is zero, then the mean color.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("crop", "flip", "cutout")
"""The augmentations, in the order in which they are applied."""

PADDING = 4
"""Pixels that a crop may shift an image by (He et al., CVPR 2016)."""


class Draws(NamedTuple):
    """The random choices for a batch of b images; None for a kind that was not asked for.

    Attributes:
      crop: int32, shape ``(b, 2)``, upper left corner of the crop in the padded image.
      flip: bool, shape ``(b,)``, whether to mirror.
      cutout: int32, shape ``(b, 2)``, center of the square.
    """

    crop: jax.Array | None = None
    flip: jax.Array | None = None
    cutout: jax.Array | None = None


def draw(
    key: jax.Array, batch_size: int, kinds: Sequence[str], image_size: tuple[int, int]
) -> Draws:
    """Draws the random choices for a batch.

    Args:
      key: a JAX random key; each kind's draws depend on it alone, not on the other kinds.
      batch_size: number of images b.
      kinds: some of ``KINDS``.
      image_size: ``(height, width)``.

    Returns:
      :class:`Draws`, a pytree whose leaves all have a leading axis of size b.

    Raises:
      ValueError: for an unknown kind.
    """
    _check_kinds(kinds)
    size = jnp.asarray(image_size, jnp.int32)
    shifts = jnp.asarray([2 * _padding(side) + 1 for side in image_size], jnp.int32)
    shape = (batch_size, 2)
    samplers = {
        "crop": lambda key: jax.random.randint(key, shape, 0, shifts, jnp.int32),
        "flip": lambda key: jax.random.bernoulli(key, 0.5, (batch_size,)),
        "cutout": lambda key: jax.random.randint(key, shape, 0, size, jnp.int32),
    }
    keys = dict(zip(KINDS, jax.random.split(key, len(KINDS)), strict=True))
    return Draws(**{kind: samplers[kind](keys[kind]) for kind in kinds})


def augment(images: jax.Array, draws: Draws, kinds: Sequence[str]) -> jax.Array:
    """Applies drawn augmentations: crop, then flip, then cutout.

    Args:
      images: shape ``(b, height, width, channels)``.
      draws: the result of :func:`draw` for these images, or the slice of it that belongs to them.
      kinds: the kinds to apply, all of them drawn.

    Returns:
      The images in the same shape and dtype.

    Raises:
      ValueError: for an unknown kind, or draws that lack it or belong to another batch size.
    """
    _check_kinds(kinds)
    for kind in kinds:
        choices = getattr(draws, kind)
        if choices is None or len(choices) != len(images):
            found = "none" if choices is None else f"{len(choices)}"
            raise ValueError(
                f"augment needs {len(images)} draws for {kind!r}, got {found}. "
                "Draw for the same kinds and slice the draws together with the images."
            )
    for kind in KINDS:
        if kind in kinds:
            images = _TRANSFORMS[kind](images, getattr(draws, kind))
    return images


def crop(images: jax.Array, corners: jax.Array) -> jax.Array:
    """Pads with zeros and cuts out a part of the original size.

    The padding is 4 pixels, or an eighth of the side (rounded up) for sides below 32.
    """
    height, width = (_padding(side) for side in images.shape[1:3])
    padded = jnp.pad(images, ((0, 0), (height, height), (width, width), (0, 0)))
    return jax.vmap(
        lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])
    )(padded, corners)


def flip(images: jax.Array, mirrored: jax.Array) -> jax.Array:
    """Mirrors the chosen images left to right."""
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def cutout(images: jax.Array, centers: jax.Array) -> jax.Array:
    """Sets a rectangle of half the height and width to zero; it may reach over the border.

    That is 16 × 16 pixels for CIFAR (DeVries and Taylor, arXiv 1708.04552).
    """
    inside = []
    for axis, side in enumerate(images.shape[1:3]):
        first = centers[:, axis, None] - side // 4
        pixels = jnp.arange(side)
        inside.append((pixels >= first) & (pixels < first + side // 2))
    rows, columns = inside
    return jnp.where(rows[:, :, None, None] & columns[:, None, :, None], 0, images)


def mean_and_deviation(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, computed on the host in exact integers.

    Args:
      images: uint8, shape ``(n, height, width, channels)``, the training images.

    Returns:
      Mean and deviation in pixel values (0 to 255), float32, shape ``(channels,)`` each. The
      deviation of a constant channel is given as 1, so that it can be divided by.
    """
    count = math.prod(images.shape[:3])
    mean = images.sum(axis=(0, 1, 2), dtype=np.uint64) / count
    square = np.einsum("nhwc,nhwc->c", images, images, dtype=np.uint64) / count
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    return mean.astype(np.float32), np.where(deviation > 0, deviation, 1).astype(np.float32)


def normalize(images: jax.Array, mean, deviation, dtype=jnp.float32) -> jax.Array:
    r"""Gives each channel mean 0 and deviation 1: :math:`(x - \text{mean}) / \text{deviation}`.

    Args:
      images: uint8, shape ``(..., channels)``.
      mean: shape ``(channels,)``, in pixel values, see :func:`mean_and_deviation`.
      deviation: shape ``(channels,)``, in pixel values.
      dtype: dtype of the result; the arithmetic is in at least float32.

    Returns:
      The images in ``dtype``.
    """
    exact = dtype if jnp.finfo(dtype).bits > 32 else jnp.float32
    mean, deviation = jnp.asarray(mean, exact), jnp.asarray(deviation, exact)
    return ((jnp.asarray(images, exact) - mean) / deviation).astype(dtype)


_TRANSFORMS = {"crop": crop, "flip": flip, "cutout": cutout}


def _padding(side: int) -> int:
    return min(PADDING, math.ceil(side / 8))


def _check_kinds(kinds: Sequence[str]) -> None:
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(
            f"kinds of augmentation must be some of {KINDS}, got {sorted(unknown)} in {kinds!r}."
        )
