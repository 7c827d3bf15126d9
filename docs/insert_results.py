"""Copies the committed results into the pages, so that they are tables wherever the pages are read.

python docs/insert_results.py

A page names a file of ``docs/results`` in a comment; what stands between it and the next comment is
replaced by the file:

    <!-- result: label_noise/table.md -->
    | method | test accuracy |
    <!-- end of the result -->
"""

import csv
import re
from pathlib import Path

DOCS = Path(__file__).parent
# What programs read and write, as people write it.
NAMES = {"rho": "ρ", "alpha": "α", "kappa": "κ", "saner": "SANER"}
RESULT = re.compile(r"<!-- result: (\S+) -->\n.*?<!-- end of the result -->", re.DOTALL)


def readable(cell: str) -> str:
    """Numbers with a fraction to three decimals, names as people write them, all else as it is."""
    if re.fullmatch(r"-?\d+\.\d{4,}(e-?\d+)?", cell):
        return f"{float(cell):.3f}"
    return NAMES.get(cell, cell)


def text_of(path: Path) -> str:
    """A Markdown file as it is, a CSV file as a table."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8").strip()
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = [[readable(cell) for cell in row] for row in csv.reader(file)]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_results(page: str) -> str:
    """The text of a page with the results as they are committed."""

    def replace(match: re.Match[str]) -> str:
        text = text_of(DOCS / "results" / match[1])
        return f"<!-- result: {match[1]} -->\n\n{text}\n\n<!-- end of the result -->"

    return RESULT.sub(replace, page)


if __name__ == "__main__":
    for path in sorted(DOCS.rglob("*.md")):
        page = path.read_text(encoding="utf-8")
        if (new := with_results(page)) != page:
            path.write_text(new, encoding="utf-8")
            print(path)
