"""Cutting the leading axis of arrays, the examples, into parts.

Under explicit sharding the type of an array says how it is spread over the devices, and JAX refuses
what would tear a device's share apart. There the array is gathered first: each device gets all rows.
"""

import math

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from optax_sam._hyperparameters import check_integer


def cut(tree: chex.ArrayTree, count: int) -> chex.ArrayTree:
    """Leaves cut into parts of consecutive rows, (n, ...) -> (count, n / count, ...)."""

    def one(leaf: jax.Array) -> jax.Array:
        leaf = leaf if count % _devices(leaf) == 0 else gathered(leaf)
        shape = jnp.shape(leaf)
        return jnp.reshape(leaf, (count, shape[0] // count, *shape[1:]))

    return jax.tree.map(one, tree)


def interleaved(tree: chex.ArrayTree, count: int) -> chex.ArrayTree:
    """Leaves cut into parts, (n, ...) -> (count, n / count, ...): part k has every count-th row.

    Consecutive rows of an array that is sharded over devices lie on one device, so in a loop over
    parts of them every device would compute all parts. Such parts stay spread over the devices.
    """
    size = len(jax.tree.leaves(tree)[0]) // count
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), cut(tree, size))


def gathered(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Leaves with all rows on every device, where their types say that they are spread."""

    def one(leaf: jax.Array) -> jax.Array:
        if _devices(leaf) == 1:
            return leaf
        sharding = jax.typeof(leaf).sharding
        spec = PartitionSpec(None, *sharding.spec[1:])  # type: ignore[no-untyped-call]
        whole: jax.Array = jax.sharding.reshard(  # type: ignore[no-untyped-call]
            leaf, NamedSharding(sharding.mesh, spec)
        )
        return whole

    return jax.tree.map(one, tree)


def _devices(leaf: jax.Array) -> int:
    """Over how many devices the leading axis is spread, as far as the array's type tells."""
    sharding = jax.typeof(leaf).sharding
    names = sharding.spec[0] if sharding.spec else None
    if names is None or names is PartitionSpec.UNCONSTRAINED:
        return 1
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def count_parts(batch_size: int, size: int, name: str) -> int:
    """How many parts of ``size`` examples there are; refuses a size that leaves some out."""
    check_integer(name, size, minimum=1)
    count, remainder = divmod(batch_size, size)
    if remainder:
        drop = f", or drop the last {remainder} examples" if count else ""
        raise ValueError(
            f"{name}={size} must divide the batch of {batch_size} examples; choose a divisor such as "
            f"{largest_divisor(batch_size, size)}{drop}."
        )
    return count


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` that is at most ``most``."""
    return max(n for n in range(1, min(most, number) + 1) if number % n == 0)


def shares(weights: jax.Array | None, count: int) -> jax.Array:
    """What each of ``count`` parts counts in the mean, given the weights cut along a leading axis.

    The shares add up to 1, also where all weights are zero.
    """
    if weights is None:
        return jnp.full((count,), 1 / count)
    # float64 in its mode, whatever the weights are: the results of a float64 network are exact to it.
    dtype = jnp.result_type(float)
    totals = jnp.sum(weights.astype(dtype), axis=tuple(range(1, weights.ndim)))
    total = jnp.sum(totals)
    return jnp.where(total == 0, 1 / count, totals / jnp.where(total == 0, 1, total))
