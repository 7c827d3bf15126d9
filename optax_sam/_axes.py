"""Averages over mapped axes that are right under pmap, shard_map and vmap alike."""

from collections.abc import Hashable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_sam import _tree

AxisName = Hashable | tuple[Hashable, ...] | None


def check_axis_name(axis_name: Any) -> None:
    """Refuses an axis name that is no name."""
    if not isinstance(axis_name, Hashable):
        raise TypeError(
            f"axis_name must be the name of a mapped axis or a tuple of names, got {axis_name!r}. "
            "Write several names as a tuple: axis_name=('hosts', 'devices')."
        )


def names_of(axis_name: AxisName) -> tuple[Hashable, ...]:
    """The names as a tuple; none for None."""
    if axis_name is None:
        return ()
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _mapped_axes() -> tuple[Hashable, ...]:
    """The axes of a mesh that ``pmap`` or ``shard_map`` maps by hand around the current trace.

    ``vmap`` has axis names too, but no mesh.
    """
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def require_axis_name(axis_name: AxisName) -> None:
    """Refuses a mapped axis that nobody names, and a name that nobody maps.

    Without a name the devices would each follow their own perturbed gradient and drift apart.
    """
    mapped = _mapped_axes()
    if axis_name is None and mapped:
        name = repr(mapped[0]) if len(mapped) == 1 else repr(mapped)
        raise ValueError(
            f"this step runs under pmap or shard_map over the axis {name}, but the sharpness-aware "
            "method does not average its gradients over it: the devices would drift apart. Pass "
            f"axis_name={name} to the method (and to optax_sam.sometimes), or axis_name=() if each "
            "device is to go its own way."
        )
    for named in names_of(axis_name):
        try:
            jax.lax.axis_index(named)
        except NameError:
            known = f"; mapped here are {mapped}" if mapped else ""
            raise ValueError(
                f"axis_name={named!r} names no mapped axis{known}. It is the axis_name of pmap, "
                "shard_map or vmap around the training step; under jit with sharded arrays leave "
                "it out."
            ) from None


def _varying_axes(array: jax.Array) -> frozenset[Hashable]:
    """The mesh axes along which ``shard_map`` knows an array to differ."""
    kind = jax.typeof(array)
    matching = getattr(kind, "mat", None)  # jax 0.10 and later
    return frozenset((matching.varying if matching is not None else getattr(kind, "vma", ())) or ())


def to_varying(tree: Any, axis_name: AxisName) -> Any:
    """Marks every leaf as differing from device to device.

    ``shard_map`` differentiates with respect to a *replicated* parameter by summing over the
    devices; only a varying one gives the gradient of the local loss. Elsewhere this is the identity.
    """
    mapped = _mapped_axes()

    def one(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        unmarked = set(names_of(axis_name)) & set(mapped) - _varying_axes(leaf)
        marked: jax.Array = jax.lax.pcast(leaf, tuple(unmarked), to="varying") if unmarked else leaf
        return marked

    return jax.tree.map(one, tree)


def to_varying_like(tree: Any, reference: Any) -> Any:
    """Marks every leaf as differing along the axes along which any leaf of ``reference`` differs.

    Fresh zeros are replicated. Differentiating in them would sum over the devices, and a loop that
    starts from them would not accept the varying sums it produces.
    """
    axes = frozenset().union(*(_varying_axes(leaf) for leaf in jax.tree.leaves(reference)))
    return to_varying(tree, tuple(axes))


def mean(tree: Any, axis_name: AxisName, share: jax.Array | None = None) -> Any:
    """The average of the floating leaves over the axis; the tree itself without one.

    Args:
      tree: values of this device.
      axis_name: the axis.
      share: what this device counts, with a mean of 1 over the axis; None: all count the same.
    """
    if not names_of(axis_name):
        return tree

    def one(leaf: jax.Array) -> jax.Array:
        if not _tree.is_floating(leaf):
            return leaf
        if share is not None:
            leaf = (leaf.astype(share.dtype) * share).astype(leaf.dtype)
        average: jax.Array = jax.lax.pmean(  # type: ignore[no-untyped-call]
            to_varying(leaf, axis_name), names_of(axis_name)
        )
        return average

    return jax.tree.map(one, tree)


def share_of_weight(weight: jax.Array, axis_name: AxisName) -> jax.Array:
    """What a device counts beside the others: its weight over the mean weight; 1 where all are 0."""
    average = mean(weight, axis_name)
    return jnp.where(_tree.is_zero(average), 1, _tree.divide_or_zero(weight, average))


def check_averaged(loss: jax.Array, params: chex.ArrayTree, axis_name: AxisName) -> None:
    """Refuses a loss that differs along a mapped axis over which its gradients would be summed."""
    own = frozenset().union(*(_varying_axes(leaf) for leaf in jax.tree.leaves(params)))
    if averaged := (own & set(names_of(axis_name))) - _varying_axes(loss):
        names = ", ".join(repr(name) for name in sorted(map(str, averaged)))
        rest = tuple(name for name in names_of(axis_name) if name not in averaged)
        raise ValueError(
            f"the loss at the perturbed point is the same along the mapped axis {names}: loss_fn or "
            f"the evaluation averages over it, and axis_name={axis_name!r} would average its gradients "
            f"once more. Pass axis_name={rest} to the sharpness-aware transformation, or the loss of "
            "this device."
        )
    forgotten = _varying_axes(loss) - set(names_of(axis_name)) - own
    if forgotten:
        names = ", ".join(repr(name) for name in sorted(map(str, forgotten)))
        raise ValueError(
            f"the loss at the perturbed point differs along the mapped axis {names}, and "
            "differentiating it with respect to replicated parameters would sum the gradients "
            f"over the devices. Pass axis_name={names} to the sharpness-aware transformation, or "
            "average the loss over the axis inside loss_fn."
        )
