"""Where everything lives: a mesh of data × model devices, over which all parameters are cut."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

CUT = {
    **dict.fromkeys(("query", "key", "value", "up", "head"), ("data", "model")),
    **dict.fromkeys(("output", "down", "embedding"), ("model", "data")),
    "classifier": ("data", None),  # there may be any number of classes
    "lora_a": ("data", None),
    "lora_b": (None, "data"),
    "scale": ("data",),
}
"""How the last axes of a parameter are cut, by its name or its layer's name.

Heads and hidden features are divided between the devices of the model axis, which compute their own
(tensor parallelism). The other axis of every matrix is cut along the data axis, whose devices gather a
layer when they need it (fully sharded data parallelism).
"""


def make_mesh(model_devices: int, devices: list[jax.Device] | None = None) -> Mesh:
    """The devices of all processes in rows of ``model_devices``."""
    devices = jax.devices() if devices is None else devices
    if len(devices) % model_devices:
        raise ValueError(
            f"--model-devices: {model_devices} does not divide the {len(devices)} devices."
        )
    grid = np.array(devices).reshape(-1, model_devices)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """How the leaves of a training state are cut: parameters, and moments that are shaped like them.

    What has no parameter's name, such as the counts of the optimizer, is on every device.
    """

    def one(path, leaf):
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        cut = next((CUT[name] for name in reversed(names) if name in CUT), ())
        return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - len(cut)), *cut))

    return jax.tree_util.tree_map_with_path(one, tree)


def spread(batch: Any, mesh: Mesh) -> Any:
    """Cuts a batch, of which every process has all, along the data axis."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(
        lambda array: jax.make_array_from_callback(
            array.shape, sharding, lambda index: array[index]
        ),
        batch,
    )


def fetch(tree: Any) -> Any:
    """Numbers that are the same on all devices, as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)
