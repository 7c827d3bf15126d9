"""Checkpoints that restore the same bits or say why not; orbax does the reading and writing.

Every process writes its own pieces of the arrays, and orbax renames the folder when it is complete, so
a run that is killed during a save leaves the checkpoint before. It does not notice a flipped byte, and
it casts a stored array silently to the dtype that is asked for. A record beside the arrays therefore
names every array with its shape, its dtype and a checksum, which the devices compute where the pieces
are.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from .devices import fetch
from .output_folder import reserve


class CheckpointError(Exception):
    """A checkpoint that must not be resumed from; the message says why and what to do."""


class CheckpointNotSaved(CheckpointError):
    """The file system refuses a checkpoint; the run can go on from the one before."""


class Checkpoint(NamedTuple):
    """What was saved.

    Attributes:
      step: how many steps were done.
      state: pytree of arrays.
      record: the JSON that was saved with it.
    """

    step: int
    state: Any
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: where they are.
      keep: how many to keep.
      read_only: these may be another run's, which may be saving one: nothing is cleaned up.
    """

    def __init__(self, folder: Path, keep: int = 1, read_only: bool = False):
        self.folder = folder.resolve()  # orbax fails on a relative path only in the background
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # A save that is still running when the next interval begins could cost two intervals.
            enable_async_checkpointing=False,
            cleanup_tmp_directories=not read_only,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Saves a pytree of arrays and a JSON record; complete when it returns."""
        arrays = named(state)
        record = record | {"step": step, "arrays": _manifest(arrays), "sums": _checksums(arrays)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            record=ocp.args.JsonSave(record | {"record_sha256": _json_digest(record)}),
        )
        try:
            # Else orbax would notice a full disk halfway, in threads that print whole tracebacks.
            reserve(self.folder, _own_bytes(arrays) + 2**16)
            saved = self._manager.save(step, args=items)
        except Exception as error:  # orbax and tensorstore raise whatever the file system led to
            raise self._not_saved(step, error) from error
        if not saved:  # orbax keeps silent where there is a later one
            raise CheckpointError(
                f"the checkpoint of step {step} was not saved in {self.folder}, which holds "
                f"{self._manager.all_steps()}. Name another --output."
            )

    def latest(self) -> Path | None:
        """The folder of the last checkpoint."""
        step = self._manager.latest_step()
        return None if step is None else self.folder / str(step)

    def restore(
        self, like: Any, check: Callable[[dict[str, Any]], None] | None = None
    ) -> Checkpoint | None:
        """The last checkpoint, or ``None`` if there is none.

        Args:
          like: pytree of ``jax.ShapeDtypeStruct``: the shapes, dtypes and shardings that are expected.
            The shardings may be other ones than at the save.
          check: is given the record before any array is looked at, and raises if it is of another run.

        Returns:
          The checkpoint, checked to the last bit.

        Raises:
          CheckpointError: if it is damaged or belongs to another run.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        record = self._read(step, "record", ocp.args.JsonRestore())
        digest = record.pop("record_sha256", None) if isinstance(record, dict) else None
        if digest is None or digest != _json_digest(record):
            raise self._refuse(step, "its record is damaged: it does not match its own digest")
        if record["step"] != step:
            raise self._refuse(step, f"it is that of step {record['step']} under another name")
        if check is not None:
            check(record)
        expected = named(like)
        for name in sorted(record["arrays"].keys() | expected.keys()):
            then, now = record["arrays"].get(name), _manifest(expected).get(name)
            if then != now:
                raise CheckpointError(
                    f"the checkpoint {self.folder / str(step)} is refused: {name} is "
                    f"{then or 'missing'} in it and {now or 'unknown'} in this run. Take the "
                    "settings and the versions that wrote it."
                )
        arrays = self._read(step, "state", ocp.args.StandardRestore(expected))
        if _checksums(arrays) != record["sums"]:
            raise self._refuse(step, "its arrays are damaged: they do not match their checksums")
        leaves = [arrays[name] for name in expected]
        return Checkpoint(step, jax.tree.unflatten(jax.tree.structure(like), leaves), record)

    def close(self) -> None:
        """Ends orbax's threads."""
        self._manager.close()

    def _read(self, step: int, item: str, how: Any) -> Any:
        try:
            result = self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]
        except Exception as error:  # orbax and tensorstore raise whatever the damage led to
            reason = f"its {item} cannot be read ({type(error).__name__}: {str(error)[:200]})"
            raise self._refuse(step, reason) from error
        if result is None:
            raise self._refuse(step, f"it has no {item}")
        return result

    def _not_saved(self, step: int, error: Exception) -> CheckpointNotSaved:
        latest = self.latest()
        system = getattr(error, "strerror", None)
        reason = system or f"{type(error).__name__}: {str(error)[:200]}"
        return CheckpointNotSaved(
            f"the checkpoint of step {step} could not be written in {self.folder} ({reason}). "
            + (f"The last one, {latest}, is unharmed." if latest else "There is no earlier one.")
            + " Free some space."
        )

    def _refuse(self, step: int, reason: str) -> CheckpointError:
        earlier = [other for other in self._manager.all_steps() if other < step]
        remedy = f"go on from step {max(earlier)}" if earlier else "begin anew"
        return CheckpointError(
            f"the checkpoint {self.folder / str(step)} is refused: {reason}. Delete this folder to "
            f"{remedy}, or restore it from a copy."
        )


def named(tree: Any) -> dict[str, Any]:
    """The leaves by their path, such as ``layers.up.kernel``.

    Orbax stores a flat dictionary the same way in all versions.
    """
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _own_bytes(arrays: dict[str, jax.Array]) -> int:
    """How many bytes this process writes: of every piece, one process writes the first replica."""
    shards = (shard for array in arrays.values() for shard in array.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)


def _manifest(arrays: dict[str, Any]) -> dict[str, str]:
    return {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """The sum modulo 2^32 of all numbers' bits, each mixed with its place by MurmurHash3's last steps.

    It is the same however the array is cut, and always another one when a single number changes. One of
    64 bits is two numbers.
    """
    if array.dtype != jnp.bool_:
        bits = min(8 * array.dtype.itemsize, 32)
        array = jax.lax.bitcast_convert_type(array, f"uint{bits}")
    places = jax.lax.iota(jnp.uint32, array.size).reshape(array.shape)
    mixed = array.astype(jnp.uint32) + places * jnp.uint32(0x9E3779B9)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    return {name: int(fetch(_checksum(array))) for name, array in arrays.items()}


def _json_digest(record: dict[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
