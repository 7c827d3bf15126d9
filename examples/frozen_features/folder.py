"""The folder of a fit or of the evidence: its settings, and the blocks that have been trained."""

import contextlib
import io
import json
import math
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .output_folder import held, write_atomically


class FolderError(Exception):
    """A folder that cannot be used; the message says why and what to do."""


class Folder:
    """A locked output folder, with the results of finished blocks for ``--resume``.

    Args:
      path: the folder; made if it is not there.
      settings: JSON of what decides the results; a resumed run must have the same.
      resume: go on from the blocks that are there; otherwise the folder must hold no run.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool):
        self.path = path
        self._settings = settings
        self._resume = resume
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "Folder":
        with contextlib.ExitStack() as stack:
            stack.enter_context(held(self.path))
            self._claim()
            self._held = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    def _claim(self) -> None:
        config = self.path / "config.json"
        if config.exists() and not self._resume:
            raise FolderError(
                f"--output: {str(self.path)!r} holds a run. Go on with --resume, or name another."
            )
        if config.exists():
            try:
                then = json.loads(config.read_text(encoding="utf-8"))
            except ValueError as error:
                raise FolderError(
                    f"--resume: {config} is damaged. Name another --output."
                ) from error
            now = json.loads(json.dumps(self._settings))
            for name in sorted(then.keys() | now.keys()):
                if then.get(name) != now.get(name):
                    raise FolderError(
                        f"--resume: {name} was {then.get(name)!r} in {str(self.path)!r} and is "
                        f"{now.get(name)!r} now. Take the same, or name another --output."
                    )
        else:
            self.write("config.json", json_bytes(self._settings))
        (self.path / "state").mkdir(exist_ok=True)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file in one step."""
        write_atomically(self.path / name, content)

    def load_block(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays of a finished block, or None; a damaged one counts as unfinished."""
        path = self.path / "state" / f"{name}.npz"
        damaged = (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError)
        with (
            contextlib.suppress(*damaged),
            open(path, "rb") as stream,  # NumPy leaves a damaged file open
            np.load(stream, allow_pickle=False) as archive,
        ):
            return {key: archive[key] for key in archive.files}
        return None

    def save_block(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Saves the arrays of a finished block."""
        write_atomically(self.path / "state" / f"{name}.npz", npz_bytes(arrays))


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """An ``.npz`` file."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def json_bytes(value: Any) -> bytes:
    """Readable JSON; what is not finite is refused."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def plain(value: Any) -> Any:
    """JSON has no NaN: what is not known is null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
