"""Averages over mapped axes that are right under pmap, shard_map and vmap alike."""

from collections.abc import Hashable

import chex
import jax
import jax.numpy as jnp

from optax_sam import _tree

AxisName = Hashable | tuple[Hashable, ...] | None


def _names(axis_name: AxisName) -> tuple[Hashable, ...]:
    if axis_name is None:
        return ()
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _varying_axes(array: jax.Array) -> frozenset:
    """The mesh axes along which ``shard_map`` knows an array to differ."""
    kind = jax.typeof(array)
    matching = getattr(kind, "mat", None)  # jax 0.10 and later
    return frozenset((matching.varying if matching is not None else getattr(kind, "vma", ())) or ())


def to_varying(tree: chex.ArrayTree, axis_name: AxisName) -> chex.ArrayTree:
    """Marks every leaf as differing from device to device.

    ``shard_map`` differentiates with respect to a *replicated* parameter by summing over the
    devices; only a varying one gives the gradient of the local loss. Elsewhere this is the identity.
    """

    # vmap has axis names too, but no marks: only axes of a mesh that is mapped by hand have them.
    mapped = jax.sharding.get_abstract_mesh().manual_axes

    def one(leaf):
        leaf = jnp.asarray(leaf)
        unmarked = set(_names(axis_name)) & set(mapped) - _varying_axes(leaf)
        return jax.lax.pcast(leaf, tuple(unmarked), to="varying") if unmarked else leaf

    return jax.tree.map(one, tree)


def mean(tree: chex.ArrayTree, axis_name: AxisName) -> chex.ArrayTree:
    """The average of the floating leaves over the axis; the tree itself without one."""
    if axis_name is None:
        return tree

    def one(leaf):
        if not _tree.is_floating(leaf):
            return leaf
        return jax.lax.pmean(to_varying(leaf, axis_name), _names(axis_name))

    return jax.tree.map(one, tree)


def check_averaged(loss: jax.Array, axis_name: AxisName) -> None:
    """Refuses a loss that differs between the shards of an axis nobody averages over."""
    forgotten = _varying_axes(loss) - set(_names(axis_name))
    if forgotten:
        names = ", ".join(repr(name) for name in sorted(map(str, forgotten)))
        raise ValueError(
            f"the loss at the perturbed point differs along the mapped axis {names}, and "
            "differentiating it with respect to replicated parameters would sum the gradients over "
            f"the devices. Pass axis_name={names} to the sharpness-aware transformation, or average "
            "the loss over the axis inside loss_fn."
        )
