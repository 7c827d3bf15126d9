"""Checkpoints that restore the same bits or say why not; orbax does the reading and writing.

Orbax writes a checkpoint into a temporary folder and renames it when it is complete, so a run that is
killed during a save leaves the one before. It does not notice a flipped byte, and it casts a stored
array silently to the dtype that is asked for. A record beside the arrays therefore names every array
with its shape and dtype, and holds a digest of their bytes and one of itself.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from .output_folder import reserve


class CheckpointError(Exception):
    """A checkpoint that must not be resumed from; the message says why and what to do."""


class CheckpointNotSaved(CheckpointError):
    """The file system refuses a checkpoint; the run can go on from the one before."""


class Checkpoint(NamedTuple):
    """What was saved.

    Attributes:
      epoch: the last finished epoch.
      state: pytree of NumPy arrays.
      record: the JSON that was saved with it.
    """

    epoch: int
    state: Any
    record: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, one per epoch that was saved.

    Args:
      folder: where they are.
      keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder.resolve()  # orbax fails on a relative path only in the background
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # A save that is still running when the next interval begins could cost two intervals.
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, epoch: int, state: Any, record: dict[str, Any]) -> None:
        """Saves a pytree of NumPy arrays and a JSON record; complete when it returns."""
        arrays = _named_arrays(state)
        record = record | {
            "epoch": epoch,  # the folder may be renamed
            "arrays": _manifest(arrays),
            "arrays_sha256": _digest(arrays),
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            record=ocp.args.JsonSave(record | {"record_sha256": _json_digest(record)}),
        )
        try:
            # Else orbax would notice a full disk halfway, in threads that print whole tracebacks.
            reserve(self.folder, sum(array.nbytes for array in arrays.values()) + 2**16)
            saved = self._manager.save(epoch, args=items)
        except Exception as error:  # orbax and tensorstore raise whatever the file system led to
            raise self._not_saved(epoch, error) from error
        if not saved:  # orbax keeps silent where there is a later one
            raise CheckpointError(
                f"the checkpoint of epoch {epoch} was not saved in {self.folder}, which holds "
                f"{self._manager.all_steps()}. Name another --output."
            )

    def latest(self) -> Path | None:
        """The folder of the last checkpoint."""
        epoch = self._manager.latest_step()
        return None if epoch is None else self.folder / str(epoch)

    def restore(
        self, like: Any, check: Callable[[dict[str, Any]], None] | None = None
    ) -> Checkpoint | None:
        """The last checkpoint, or ``None`` if there is none.

        Args:
          like: pytree of arrays with the structure, shapes and dtypes that are expected.
          check: is given the record before any array is looked at, and raises if it is of another run.

        Returns:
          The checkpoint, checked to the last bit.

        Raises:
          CheckpointError: if it is damaged or belongs to another run.
        """
        epoch = self._manager.latest_step()
        if epoch is None:
            return None
        record = self._read(epoch, "record", ocp.args.JsonRestore())
        digest = record.pop("record_sha256", None) if isinstance(record, dict) else None
        if digest is None or digest != _json_digest(record):
            raise self._refuse(epoch, "its record is damaged: it does not match its own digest")
        if record["epoch"] != epoch:
            raise self._refuse(
                epoch, f"it is that of epoch {record['epoch']}, renamed or copied to another name"
            )
        if check is not None:
            check(record)
        expected = _named_arrays(like)
        manifest = _manifest(expected)
        if record["arrays"] != manifest:
            raise CheckpointError(
                f"the checkpoint {self.folder / str(epoch)} is refused: it has other arrays: "
                f"{_difference(record['arrays'], manifest)}. Resume with the versions that wrote it, "
                "or name another --output."
            )
        arrays = self._read(epoch, "state", ocp.args.StandardRestore(expected))
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        if _digest(arrays) != record["arrays_sha256"]:
            raise self._refuse(epoch, "its arrays are damaged: they do not match their digest")
        leaves = [arrays[name] for name in expected]
        return Checkpoint(epoch, jax.tree.unflatten(jax.tree.structure(like), leaves), record)

    def close(self) -> None:
        """Ends orbax's threads."""
        self._manager.close()

    def _read(self, epoch: int, item: str, how: Any) -> Any:
        try:
            result = self._manager.restore(epoch, args=ocp.args.Composite(**{item: how}))[item]
        except Exception as error:  # orbax and tensorstore raise whatever the damage led to
            reason = f"its {item} cannot be read ({type(error).__name__}: {str(error)[:200]})"
            raise self._refuse(epoch, reason) from error
        if result is None:
            raise self._refuse(epoch, f"it has no {item}")
        return result

    def _not_saved(self, epoch: int, error: Exception) -> CheckpointNotSaved:
        latest = self.latest()
        system = getattr(error, "strerror", None)
        reason = system or f"{type(error).__name__}: {str(error)[:200]}"
        return CheckpointNotSaved(
            f"the checkpoint of epoch {epoch} could not be written in {self.folder} ({reason}). "
            + (f"The last one, {latest}, is unharmed." if latest else "There is no earlier one.")
            + " Free some space."
        )

    def _refuse(self, epoch: int, reason: str) -> CheckpointError:
        earlier = [step for step in self._manager.all_steps() if step < epoch]
        remedy = f"go on from epoch {max(earlier)}" if earlier else "begin anew"
        return CheckpointError(
            f"the checkpoint {self.folder / str(epoch)} is refused: {reason}. Delete this folder to "
            f"{remedy}, or restore it from a copy."
        )


def _named_arrays(tree: Any) -> dict[str, np.ndarray]:
    """The leaves by their path; orbax stores a flat dictionary the same way in all versions."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in leaves
    }


def _manifest(arrays: dict[str, np.ndarray]) -> dict[str, str]:
    return {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}


def _difference(stored: dict[str, str], expected: dict[str, str]) -> str:
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            return (
                f"{name} is {stored.get(name, 'missing')} in the checkpoint and "
                f"{expected.get(name, 'unknown')} in this run"
            )
    raise AssertionError("the manifests are equal")


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _json_digest(record: dict[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
