"""Markdown and CSV."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def number(value: float | None) -> str:
    """Three digits or so; what was not measured is a dash."""
    if value is None:
        return "–"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers are aligned right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    lines += [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The records of a file, as text; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def write_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One line per record; what was not measured is empty."""
    names = dict.fromkeys(name for record in records for name in record)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        for record in records:
            writer.writerow(
                {key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in record.items()}
            )


def file_name(network: str) -> str:
    """``cnn_groupnorm`` of ``CNN, GroupNorm``."""
    return network.lower().replace(", ", "_").replace("-", "_")
