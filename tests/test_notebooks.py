"""The notebooks are committed with the outputs of a run; ``notebooks/execute.py`` runs them.

Nothing is executed here. In CI, execution is a step of its own.
"""

import ast
import copy
import importlib
import inspect
import re
from pathlib import Path

import pytest

from notebooks import installation

nbformat = pytest.importorskip("nbformat", reason="needs the extra optax_sam[notebooks]")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
ADDRESS = "https://github.com/someone/optax_sam"

every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def read(name):
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def code_cells(name):
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def code(name):
    """All code as one program, without the lines that only IPython understands."""
    lines = "\n".join(cell.source for cell in code_cells(name)).splitlines()
    return "\n".join(re.sub(r"^( *)[%!].*", r"\1pass", line) for line in lines)


def outputs(name):
    return [output for cell in code_cells(name) for output in cell.outputs]


def test_there_is_a_notebook():
    assert "quick_start" in NOTEBOOKS


@every_notebook
def test_it_was_run_from_top_to_bottom(name):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = code_cells(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs(name) if output.output_type == "error"]
    assert not [output for output in outputs(name) if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs(name))


@every_notebook
def test_it_is_small_and_knows_no_machine(name):
    text = NOTEBOOKS[name].read_text(encoding="utf-8")
    assert len(text) < 300_000
    without_pictures = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.findall(
        r"(?<![\w.:/~])/(?:home|root|tmp|usr|opt|work|Users)/\S*", without_pictures
    )


@every_notebook
def test_it_installs_from_the_address_of_the_repository(name):
    """After the address has changed: python notebooks/execute.py."""
    notebook = read(name)
    expected = copy.deepcopy(notebook)
    installation.insert_address(expected, name, installation.repository())
    assert notebook == expected


@every_notebook
def test_the_address_comes_and_goes(name):
    notebook = read(name)
    installation.insert_address(notebook, name, None)
    without = copy.deepcopy(notebook)
    assert "Colab" not in notebook.cells[0].source + notebook.cells[1].source
    for _ in range(2):  # the second time nothing is added
        installation.insert_address(notebook, name, ADDRESS)
        title = notebook.cells[0].source.splitlines()
        target = f"https://colab.research.google.com/github/someone/optax_sam/blob/main/notebooks/{name}.ipynb"
        assert title[2].endswith(f"({target})")
        assert notebook.cells[0].source.count("Open in Colab") == 1
        assert f"git clone --quiet --depth 1 {ADDRESS} " in notebook.cells[1].source
    installation.insert_address(notebook, name, "https://example.org/optax_sam")
    assert "Open in Colab" not in notebook.cells[0].source  # which opens GitHub's notebooks only
    installation.insert_address(notebook, name, None)
    assert notebook == without


@every_notebook
def test_it_is_listed_on_the_first_page(name):
    assert f"](notebooks/{name}.ipynb)" in (ROOT / "README.md").read_text(encoding="utf-8")


def public_names(module):
    """Of a module of the library: ``__all__``, or what it defines itself."""
    own = (n for n, v in vars(module).items() if inspect.getmodule(v) is module)
    return set(getattr(module, "__all__", own))


@every_notebook
def test_it_uses_public_names_only(name):
    tree = ast.parse(code(name))
    used = [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optax_sam")
        for alias in node.names
    ]
    used += [
        ("optax_sam", node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "optax_sam"
    ]
    assert used
    for module, member in used:
        assert "._" not in module
        is_module = module == "optax_sam" and (ROOT / "optax_sam" / f"{member}.py").is_file()
        assert is_module or member in public_names(importlib.import_module(module)), member
