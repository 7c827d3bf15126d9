"""Augmentation against loops over single images, its independence of how a batch is cut, its draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.image_classification.data import (
    Draws,
    augment,
    draw,
    load,
    mean_and_deviation,
    normalize,
)
from examples.image_classification.data.augmentation import KINDS


def image_batch(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).integers(1, 256, shape).astype(dtype)


def reference(images, draws, kinds, padding):
    """Image by image and pixel by pixel: crop, then flip, then cutout."""
    height, width = images.shape[1:3]
    result = []
    for index, image in enumerate(images):
        changed = image.copy()
        if "crop" in kinds:
            top, left = np.asarray(draws.crop[index])
            for y in range(height):
                for x in range(width):
                    row, column = y + top - padding, x + left - padding
                    inside = 0 <= row < height and 0 <= column < width
                    changed[y, x] = image[row, column] if inside else 0
        if "flip" in kinds and draws.flip[index]:
            changed = np.stack([changed[:, width - 1 - x] for x in range(width)], axis=1)
        if "cutout" in kinds:
            row, column = np.asarray(draws.cutout[index])
            first, left = row - height // 4, column - width // 4
            changed[max(first, 0) : first + height // 2, max(left, 0) : left + width // 2] = 0
        result.append(changed)
    return np.stack(result)


SHAPES = [((32, 32, 3), 4), ((28, 28, 1), 4), ((8, 8, 1), 1), ((40, 36, 3), 4)]  # and the padding
ALL = ("cutout", "crop", "flip")


@pytest.mark.parametrize(
    ("kinds", "size", "padding"),
    [
        *(((kind,), *SHAPES[-1]) for kind in KINDS),
        *((ALL, *shape) for shape in SHAPES),
    ],
)
def test_augmentation_against_the_reference(kinds, size, padding):
    images = image_batch((8, *size))
    draws = draw(jax.random.key(1), 8, kinds, size[:2])

    found = augment(jnp.asarray(images), draws, kinds)

    np.testing.assert_array_equal(found, reference(images, draws, kinds, padding))
    assert not np.array_equal(found, images)


def test_cutout_is_16_by_16_pixels_and_may_reach_over_the_border():
    images = jnp.ones((3, 32, 32, 1))
    centers = jnp.array([[16, 16], [0, 0], [31, 10]])

    holes = 1 - augment(images, Draws(cutout=centers), ("cutout",))

    assert holes.sum(axis=(1, 2, 3)).tolist() == [16 * 16, 8 * 8, 9 * 16]
    np.testing.assert_array_equal(np.flatnonzero(holes[0].any(axis=(1, 2))), np.arange(8, 24))


@pytest.mark.parametrize("dtype", [np.uint8, jnp.bfloat16, np.float32])
def test_the_dtype_is_kept(dtype, strict_promotion):
    images = jnp.asarray(image_batch((4, 8, 8, 1)), dtype)
    draws = draw(jax.random.key(0), 4, KINDS, (8, 8))
    assert augment(images, draws, KINDS).dtype == dtype


def test_no_augmentation():
    images = jnp.asarray(image_batch((4, 8, 8, 1)))
    draws = draw(jax.random.key(0), 4, (), (8, 8))
    assert draws == Draws(None, None, None)
    assert augment(images, draws, ()) is images


def test_parts_of_a_batch_with_their_parts_of_the_draws():
    images = jnp.asarray(image_batch((12, 32, 32, 3)))
    draws = draw(jax.random.key(3), 12, KINDS, (32, 32))
    whole = augment(images, draws, KINDS)

    parts = [
        augment(images[part], jax.tree.map(lambda values, part=part: values[part], draws), KINDS)
        for part in (slice(0, 3), slice(3, 4), slice(4, 12))
    ]

    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_devices_augment_their_parts_without_talking_to_each_other():
    images = jnp.asarray(image_batch((12, 8, 8, 1)))
    draws = draw(jax.random.key(3), 12, KINDS, (8, 8))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shared = jax.device_put((images, draws), jax.NamedSharding(mesh, jax.P("data")))
    jitted = jax.jit(augment, static_argnums=2).lower(*shared, KINDS).compile()
    mapped = jax.shard_map(
        lambda *batch: augment(*batch, KINDS),
        mesh=mesh,
        in_specs=jax.P("data"),
        out_specs=jax.P("data"),
    )

    expected = augment(images, draws, KINDS)

    np.testing.assert_array_equal(jitted(*shared), expected)
    np.testing.assert_array_equal(jax.jit(mapped)(*shared), expected)
    assert "all-" not in jitted.as_text()
    assert "collective-" not in jitted.as_text()


def test_draws_are_those_of_the_key():
    first, same, other = (draw(jax.random.key(seed), 50, KINDS, (32, 32)) for seed in (1, 1, 2))
    for kind in KINDS:
        np.testing.assert_array_equal(getattr(first, kind), getattr(same, kind))
        assert not np.array_equal(getattr(first, kind), getattr(other, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_draws_of_one_kind_do_not_depend_on_the_others(kind):
    alone = draw(jax.random.key(1), 20, (kind,), (32, 32))
    together = draw(jax.random.key(1), 20, KINDS[::-1], (32, 32))

    np.testing.assert_array_equal(getattr(alone, kind), getattr(together, kind))
    assert [name for name in KINDS if getattr(alone, name) is not None] == [kind]


def test_every_choice_is_drawn_about_equally_often():
    draws = draw(jax.random.key(0), 9000, KINDS, (32, 28))

    for corner in draws.crop.T:  # 9 places along each axis
        assert np.all(np.abs(np.bincount(corner, minlength=9) - 1000) < 150)
        assert corner.max() == 8
    assert abs(int(draws.flip.sum()) - 4500) < 200
    for centers, side in zip(draws.cutout.T, (32, 28), strict=True):
        assert len(np.unique(centers)) == side == centers.max() + 1
        assert np.all(np.abs(np.bincount(centers) / 9000 * side - 1) < 0.3)
    for pair in (draws.crop.T, draws.cutout.T, (draws.crop[:, 0], draws.flip)):
        assert abs(np.corrcoef(*pair)[0, 1]) < 0.05


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"some of \('crop', 'flip', 'cutout'\), got \['mixup'\]"):
        draw(jax.random.key(0), 2, ("flip", "mixup"), (8, 8))
    with pytest.raises(ValueError, match=r"got \['mixup'\]"):
        augment(jnp.zeros((2, 8, 8, 1)), Draws(), ("mixup",))


def test_draws_for_other_kinds_or_images():
    draws = draw(jax.random.key(0), 4, ("flip",), (8, 8))
    with pytest.raises(ValueError, match=r"4 draws for 'crop', got none. Draw for the same kinds"):
        augment(jnp.zeros((4, 8, 8, 1)), draws, ("crop", "flip"))
    with pytest.raises(ValueError, match=r"augment needs 2 draws for 'flip', got 4"):
        augment(jnp.zeros((2, 8, 8, 1)), draws, ("flip",))


def test_mean_and_deviation_of_the_channels():
    images = image_batch((50, 9, 7, 3), np.uint8)
    images[..., 1] //= 5

    mean, deviation = mean_and_deviation(images)

    assert mean.dtype == deviation.dtype == np.float32
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(deviation, images.std(axis=(0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize("value", [0, 77, 255])
def test_a_constant_channel_is_divided_by_one(value):
    mean, deviation = mean_and_deviation(np.full((3, 4, 4, 1), value, np.uint8))
    assert (mean.tolist(), deviation.tolist()) == ([value], [1])


def test_normalized_images_have_mean_zero_and_deviation_one():
    images = load("digits").images

    normalized = np.asarray(normalize(images, *mean_and_deviation(images)))

    assert normalized.dtype == jnp.float32
    np.testing.assert_allclose(np.mean(normalized, dtype=np.float64), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(normalized, dtype=np.float64), 1, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_once(dtype, strict_promotion):
    images = jnp.asarray(image_batch((5, 8, 8, 3), np.uint8))
    mean, deviation = mean_and_deviation(np.asarray(images))

    found = normalize(images, mean, deviation, dtype)

    assert found.dtype == dtype
    np.testing.assert_array_equal(found, normalize(images, mean, deviation).astype(dtype))


def test_double_precision(x64):
    images = image_batch((5, 8, 8, 3), np.uint8)
    mean, deviation = np.array([100.0, 120, 130]) / 3, np.array([50.0, 60, 70]) / 3

    found = normalize(images, mean, deviation, jnp.float64)

    np.testing.assert_allclose(found, (images - mean) / deviation, rtol=1e-14)
