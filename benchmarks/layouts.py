"""How parameters, states and batches lie on the chips."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

LAYOUTS = ("data parallel", "fully sharded", "fully sharded × tensor parallel")
TENSOR_WAYS = 4  # chips that share each matrix product
SMALL = 2**14  # arrays with fewer numbers stay whole on every chip: norms, biases
# The second product of a pair is cut along its input, so that nothing moves between the two.
CUT_ALONG_INPUT = ("out", "down", "embed")


def mesh_of(layout: str, devices: Any) -> Mesh:
    """The chips as an array with the axes of the layout."""
    devices = np.array(devices).ravel()
    if layout == LAYOUTS[2]:
        return Mesh(
            devices.reshape(-1, TENSOR_WAYS), ("data", "model"), axis_types=(AxisType.Auto,) * 2
        )
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def shard_parameters(layout: str, mesh: Mesh, params: Any) -> Any:
    """The parameters' shapes with their shardings."""

    def one(path: Any, leaf: Any) -> Any:
        axes = parameter_axes(layout, mesh, names(path), leaf.shape)
        return placed(leaf, mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(one, params)


def parameter_axes(
    layout: str, mesh: Mesh, path: tuple[str, ...], shape: tuple[int, ...]
) -> list[str | None]:
    """Which axis of the mesh cuts which axis of a parameter."""
    axes: list[str | None] = [None] * len(shape)
    if layout == LAYOUTS[0] or math.prod(shape) < SMALL:
        return axes
    first = 1 if "layers" in path else 0  # a scan takes one layer after the other: not cut
    free = list(range(first, len(shape)))
    if "model" in mesh.shape:
        axis = free[0] if any(name in path for name in CUT_ALONG_INPUT) else free[-1]
        if shape[axis] % mesh.shape["model"] == 0:
            axes[axis] = "model"
            free.remove(axis)
    fitting = [axis for axis in free if shape[axis] % mesh.shape["data"] == 0]
    if fitting:
        axes[max(fitting, key=lambda axis: shape[axis])] = "data"
    return axes


def shard_state(mesh: Mesh, state: Any, params: Any) -> Any:
    """The optimizer state's shapes: what is like a parameter lies as the parameter does."""
    known = {
        names(path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    shapes = {names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def one(path: Any, leaf: Any) -> Any:
        parts = names(path)
        for start in range(len(parts)):
            end = parts[start:]
            if shapes.get(end) == leaf.shape:
                return placed(leaf, mesh, known[end])
        return placed(leaf, mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, state)


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """The batch's shapes: every chip, or every group of chips that share the products, has a part."""
    return jax.tree.map(lambda leaf: placed(leaf, mesh, PartitionSpec("data")), batch)


def whole(mesh: Mesh, tree: Any) -> Any:
    """The shapes of what every chip has."""
    return jax.tree.map(lambda leaf: placed(leaf, mesh, PartitionSpec()), tree)


def placed(leaf: Any, mesh: Mesh, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    """A shape with its sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


def names(path: Any) -> tuple[str, ...]:
    """The keys on the way to a leaf."""
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
