"""A table that takes long: it is written when it is complete, and goes on where it was stopped."""

import json
from pathlib import Path
from typing import Any

from output_folder import write_atomically


class Partial:
    """The rows so far, in a file beside the table; an earlier table stays until this one is complete.

    Args:
      output: the file of the table; its folder is held, so that no other process writes beside it.
      settings: what the rows depend on, as JSON can hold it.

    Attributes:
      rows: those of an earlier start with the same settings, then the new ones.

    Raises:
      ValueError: if rows of other settings are there, or a folder of this name.
    """

    def __init__(self, output: Path, settings: dict[str, Any]):
        self.output, self.settings = output, json.loads(json.dumps(settings))
        self.path = output.with_name(f"{output.name}.partial")
        self.rows: list[dict[str, Any]] = []
        if output.is_dir():
            raise ValueError(f"--output: {str(output)!r} is a folder. Name a file in it.")
        if output.exists():
            print(f"{output} is there already. It is replaced when the new table is complete.")
        if self.path.exists():
            self.rows = self._read()
            print(f"{len(self.rows)} rows are in {self.path} already.")

    def _read(self) -> list[dict[str, Any]]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{self.path} is damaged ({error}). Delete it to begin anew."
            ) from None
        if found["settings"] != self.settings:
            raise ValueError(
                f"--output: {self.path} has rows of other settings. Take those to go on, delete it, or "
                "name another --output."
            )
        return found["rows"]

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row, which no interruption loses."""
        self.rows.append(row)
        content = {"settings": self.settings, "rows": self.rows}
        write_atomically(self.path, json.dumps(content, indent=1) + "\n")

    def finish(self, table: str) -> None:
        """Writes the complete table."""
        write_atomically(self.output, table)
        self.path.unlink(missing_ok=True)
