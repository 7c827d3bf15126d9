"""The output folder of a run: one process at a time, checked before training, no half-written file.

This file is the same in all programs that have it, so that each can be copied as one folder.
"""

import contextlib
import errno
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LOCK = ".lock"
NEEDED = 2**20
"""Bytes that must be free before a run begins."""

_TAKEN = {errno.EAGAIN, errno.EACCES}
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Creates the folder and keeps other processes out of it.

    The operating system frees the lock when the process ends, however it ends: a killed run does not
    block the next one.

    Args:
      folder: the output folder.

    Raises:
      BlockingIOError: if another process holds it.
      OSError: if nothing can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reserve(folder, NEEDED)
        lock = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115, closed below
    except OSError as error:
        raise type(error)(
            f"--output: {folder} cannot be written to ({error.strerror}). Name a folder in which you "
            f"may create files, on a disk with at least {NEEDED / 2**20:g} MiB free."
        ) from error
    with lock, _locked(lock, folder):
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


@contextlib.contextmanager
def _locked(lock: IO[str], folder: Path) -> Iterator[None]:
    try:
        if fcntl is None:
            raise OSError(errno.ENOLCK, "no locks on this system")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            lock.seek(0)
            raise _in_use(folder, lock.read()) from None
        with _marked(folder):  # the file system has no locks
            yield
    else:
        yield


@contextlib.contextmanager
def _marked(folder: Path) -> Iterator[None]:
    """Holds the folder by a file that only one process can create."""
    mark = folder / f"{LOCK}.held"
    try:
        mark.open("x").close()
    except FileExistsError:
        remedy = f" If it has been killed, delete {mark}."
        raise _in_use(folder, (folder / LOCK).read_text(encoding="utf-8"), remedy) from None
    try:
        yield
    finally:
        mark.unlink()


def _in_use(folder: Path, holder: str, remedy: str = "") -> BlockingIOError:
    return BlockingIOError(
        f"--output: {folder} is in use by {holder or 'another process'}. Wait for its end, or name "
        f"another folder.{remedy}"
    )


def reserve(folder: Path, size: int) -> None:
    """Raises an OSError if a file of so many bytes cannot be written into the folder."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(probe.fileno(), 0, size)
        else:
            probe.write(bytes(size))
            probe.flush()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file that is there in full or not at all, also if the process is killed.

    Args:
      path: the file, in a folder that exists.
      content: bytes, or text to be written as UTF-8.

    Raises:
      OSError: with the name of the file; an earlier file of this name is then as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        try:
            with temporary.open("xb") as file:  # readable by whom the umask lets read
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error


def explain(error: OSError, command: str | None = None) -> str:
    """The message of an error; if the disk is full, with what to do and the command that follows."""
    if error.errno not in _FULL:
        return str(error)
    return (
        f"{error.filename or 'a file'} could not be written ({error.strerror}). What was written "
        "before is unharmed. Free some space." + (f" Then run:\n{command}" if command else "")
    )
