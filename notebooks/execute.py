"""Executes the notebooks from top to bottom, and keeps their outputs.

    python notebooks/execute.py                    # all, each written with fresh outputs
    python notebooks/execute.py quick_start        # one
    python notebooks/execute.py --check            # nothing is written; ends with 1 if one fails

Before a notebook is written, its first cell is made to install from the repository's address. Its
thumbnail for the list of tutorials is written with it.
"""

import argparse
import sys
import time
from pathlib import Path

import nbformat
from installation import insert_address, repository
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from pictures import shrink_pictures
from thumbnails import picture_of, write_thumbnail

FOLDER = Path(__file__).parent
SECONDS_PER_NOTEBOOK = 600


def execute(notebook: nbformat.NotebookNode) -> None:
    """Runs all cells in a fresh kernel, in the folder of the notebooks.

    Args:
      notebook: gets the outputs.

    Raises:
      CellExecutionError: of the first cell that fails.
      CellTimeoutError: if all cells together take longer than ``SECONDS_PER_NOTEBOOK``.
      DeadKernelError: if the kernel is killed.
    """
    end = time.monotonic() + SECONDS_PER_NOTEBOOK
    NotebookClient(
        notebook,
        timeout_func=lambda cell: max(end - time.monotonic(), 1),  # 0 would be no limit
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # what one cell prints is one output
        extra_arguments=["--log-level=ERROR"],  # no warning about local connections
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    notebook.metadata.language_info = {"name": "python"}  # without the version of this Python


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Writes a file that is there in full or not at all, also if the program is killed."""
    temporary = path.with_name(f".{path.name}.partial")  # if it is left, it is no notebook
    try:
        nbformat.write(notebook, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> int:
    """Executes what the command line names.

    Returns:
      How many notebooks failed.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all without; of {names}")
    parser.add_argument("--check", action="store_true", help="execute, and write nothing")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(names)):
        parser.error(f"no notebook {unknown}; there are {names}")

    failed = 0
    for name in arguments.names or names:
        path = FOLDER / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        insert_address(notebook, name, repository())
        start = time.perf_counter()
        try:
            execute(notebook)
            if not arguments.check:
                shrink_pictures(notebook)
                write(notebook, path)
                write_thumbnail(name, picture_of(path))
            outcome = "runs"
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failed += 1
            outcome = f"FAILS\n{error}"
        print(f"{name}: {outcome}, {time.perf_counter() - start:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
