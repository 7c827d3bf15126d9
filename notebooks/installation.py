"""The first cell of every notebook, and its badge: both follow from the repository's address.

The address has one place, ``Repository`` under ``[project.urls]`` in ``pyproject.toml``. While there is
none, a notebook installs from the clone that it lies in, and has no badge.
"""

import tomllib
from pathlib import Path
from typing import Any

COLAB = "https://colab.research.google.com"
NEEDED = (
    "optax_sam", "equinox", "flax", "matplotlib", "orbax", "polars", "rich", "sklearn", "tyro",
)  # fmt: skip
"""What the notebooks and the programs that they call import, beyond the dependencies of optax_sam."""


def repository() -> str | None:
    """The address of the repository, None while there is none."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    address: str | None = tomllib.loads(text)["project"].get("urls", {}).get("Repository")
    return address


def first_cell(address: str | None) -> str:
    """The source of the cell that installs.

    Args:
      address: of the repository, or None.

    Returns:
      IPython code that may run again, and does nothing in a clone where all is installed.
    """
    lines = ["# Installs what is missing, from the clone around this notebook."]
    imports, clone = ["import importlib.util"], []
    if address:
        lines += ["# Where there is none, as on Colab, makes it first."]
        imports += ["from pathlib import Path"]
        clone = [
            'if not Path("installation.py").exists():',
            '    clone = Path.home() / "optax_sam_clone"',
            "    if not clone.exists():",
            f"        !git clone --quiet --depth 1 {address} {{clone}}",
            "    %cd -q {clone}/notebooks",
        ]
    return "\n".join(
        [
            *lines,
            *imports,
            "",
            *clone,
            f'needed = "{" ".join(NEEDED)}"',
            "if not all(map(importlib.util.find_spec, needed.split())):",
            '    %pip install --quiet "..[examples,equinox]"',
        ]
    )


def badge(name: str, address: str | None) -> list[str]:
    """The lines under the title that open the notebook on Colab.

    Args:
      name: of the notebook, without the suffix.
      address: of the repository, or None.

    Returns:
      Markdown; nothing where there is no address, or one that Colab cannot open.
    """
    github = "https://github.com/"
    if not (address or "").startswith(github):
        return []
    place = f"{address.removeprefix(github).strip('/')}/blob/main/notebooks/{name}.ipynb"
    picture = f"{COLAB}/assets/colab-badge.svg"
    return ["", f"[![Open in Colab]({picture})]({COLAB}/github/{place})"]


def insert_address(notebook: Any, name: str, address: str | None) -> None:
    """Writes badge and first cell into a notebook, whatever was there before.

    Args:
      notebook: a cell with the title, then the cell that installs; changed in place.
      name: of the notebook, without the suffix.
      address: of the repository, or None.
    """
    title, _, text = notebook.cells[0].source.partition("\n")
    lines = text.strip().splitlines()
    if lines and lines[0].startswith("[![Open in Colab]"):
        lines = "\n".join(lines[1:]).strip().splitlines()
    notebook.cells[0].source = "\n".join([title, *badge(name, address), "", *lines])
    notebook.cells[1].source = first_cell(address)
