"""How a file that cannot be read is reported: by its name, with what was found and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REMEDY = "Download or write the file again."

SMALL = 2**26
EXPANSION = 100
"""Compression makes images perhaps 10 times smaller: what unpacks to more than this is no data."""


@contextmanager
def naming(path: Path, expected: str) -> Iterator[None]:
    """Turns whatever a damaged file makes a decoder raise into a ValueError that names the file.

    A decoder meets damage as almost any exception (an unpickler alone has a dozen), so all of them
    are caught. Open the file outside, so that a missing permission stays what it is.
    """
    try:
        yield
    except Exception as error:
        found = str(error) or type(error).__name__
        raise ValueError(
            f"{path} is damaged, cut short, or not {expected}: {found.rstrip('.')}. {REMEDY}"
        ) from error


def refuse_expansion(unpacked: int, stored: int) -> None:
    """Refuses contents far larger than what is stored, before they take any memory.

    Args:
      unpacked: bytes that the headers announce.
      stored: bytes of the file.

    Raises:
      ValueError: for more than ``SMALL`` bytes and more than ``EXPANSION`` times what is stored.
    """
    if unpacked > max(SMALL, EXPANSION * stored):
        raise ValueError(f"its {stored:,} bytes would unpack to {unpacked:,}")


def require_file(path: Path) -> Path:
    """Returns ``path`` if it is a file; FileNotFoundError with its folder's contents otherwise."""
    if path.is_file():
        return path
    raise FileNotFoundError(
        f"{path} is missing; its folder has {listing(path.parent)}. "
        "Extract or download the whole data set again."
    )


def listing(folder: Path) -> str:
    """The first names in a folder, for an error message."""
    if not folder.is_dir():
        return "no contents, because it does not exist"
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "no files") + more
