"""One training step on all devices, in the three ways that JAX has, and with several processes."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import jax_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
REPLICATED, BY_BATCH = PartitionSpec(), PartitionSpec(AXIS)


def start_processes(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the processes of a run, if there are several.

    Args:
      coordinator: ``address:port`` of process 0; without it a cluster's own settings are used.
      processes: how many there are.
      process: which one this is, from 0.
    """
    jax.distributed.initialize(coordinator, processes, process)


class Devices:
    """Where a run's arrays live, and how its functions are spread over the devices.

    All three modes hold a copy of parameters, optimizer state and data set on every device, and cut
    every batch into equal shares. They differ in who sees it:

    * ``jit``: one program on sharded arrays; the compiler inserts the communication.
    * ``shard_map``: the program of one device, which averages over the axis ``"data"`` itself, in one
      compiled whole.
    * ``pmap``: the same, the classic way: arrays with a leading axis, one entry per device.

    Attributes:
      axis_name: what the training step has to average over; ``None`` with ``jit``.
      count: devices of all processes.

    Args:
      mode: ``jit``, ``shard_map`` or ``pmap``.
      devices: of all processes; without it all there are.
    """

    def __init__(self, mode: str, devices: list[jax.Device] | None = None):
        devices = jax.devices() if devices is None else devices
        local = [device for device in devices if device.process_index == jax.process_index()]
        self.mode = mode
        self.axis_name = None if mode == "jit" else AXIS
        self.count = len(devices)
        self.devices, self.local_devices = devices, local
        self.mesh = _mesh(devices)
        # pmap's arrays belong to a process, so each one evaluates on its own devices.
        self.evaluation_mesh = _mesh(local) if mode == "pmap" else self.mesh

    def replicate(self, tree: Any) -> Any:
        """A copy on every device."""
        if self.mode == "pmap":
            copies = jax_utils.replicate(tree, self.local_devices)
            # In the layout of pmap's own results, or the second step would be compiled again.
            return jax.pmap(lambda copy: copy, axis_name=AXIS, devices=self.devices)(copies)
        return jax.device_put(tree, NamedSharding(self.mesh, REPLICATED))

    def fetch(self, tree: Any) -> Any:
        """One copy, as NumPy arrays."""
        return jax.tree.map(np.asarray, self._one_copy(tree))

    def _one_copy(self, tree: Any) -> Any:
        if self.mode == "pmap":
            return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)
        return jax.tree.map(lambda x: x.addressable_data(0), tree)

    def for_evaluation(self, tree: Any) -> Any:
        """The replicated copies as :meth:`evaluated` functions take them."""
        if self.mode != "pmap":
            return tree
        return jax.device_put(self._one_copy(tree), NamedSharding(self.evaluation_mesh, REPLICATED))

    def spread(self, function: Callable) -> Callable:
        """Compiles ``function(state, source, *numbers)`` for all devices; the state is donated.

        ``state`` and ``source`` are replicated, ``numbers`` plain arrays, the same in all processes.
        """
        if self.mode == "jit":
            return jax.jit(
                function,
                donate_argnums=0,
                out_shardings=NamedSharding(self.mesh, REPLICATED),
            )
        if self.mode == "shard_map":
            mapped = jax.shard_map(
                function, mesh=self.mesh, in_specs=REPLICATED, out_specs=REPLICATED
            )
            return jax.jit(mapped, donate_argnums=0)

        copies_and_numbers = (0, 0, *[None] * (len(inspect.signature(function).parameters) - 2))
        return jax.pmap(
            function,
            axis_name=AXIS,
            in_axes=copies_and_numbers,
            donate_argnums=0,
            devices=self.devices,
        )

    def share(self, batch: Any) -> Any:
        """Inside a spread function: this device's share of arrays with a leading batch axis."""
        if self.mode == "jit":
            sharding = NamedSharding(self.mesh, BY_BATCH)
            return jax.lax.with_sharding_constraint(batch, sharding)

        def one(array):
            size = array.shape[0] // self.count
            start = jax.lax.axis_index(AXIS) * size
            return jax.lax.dynamic_slice_in_dim(array, start, size)

        return jax.tree.map(one, batch)

    def evaluated(self, function: Callable) -> Callable:
        """Compiles ``function(state, images)`` with the images' first axis spread over the devices."""
        copies = NamedSharding(self.evaluation_mesh, REPLICATED)
        shares = NamedSharding(self.evaluation_mesh, BY_BATCH)
        return jax.jit(function, in_shardings=(copies, shares), out_shardings=copies)

    def spread_images(self, images: np.ndarray) -> jax.Array:
        """A chunk of images as :meth:`evaluated` functions take them; every process has all of it."""
        sharding = NamedSharding(self.evaluation_mesh, BY_BATCH)
        return jax.make_array_from_callback(images.shape, sharding, lambda index: images[index])


def to_varying(tree: Any, axis_name: str | None) -> Any:
    """Parameters whose gradient is that of this device's own loss.

    ``shard_map`` would sum the gradient with respect to replicated parameters over the devices; under
    ``pmap`` parameters are always a device's own.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    return jax.tree.map(lambda x: jax.lax.pcast(x, (axis_name,), to="varying"), tree)


def mean(tree: Any, axis_name: str | None) -> Any:
    """The average over the devices, of values that differ between them."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def _mesh(devices: list) -> Mesh:
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
