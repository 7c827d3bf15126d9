"""The notebooks are committed with the outputs of a run; ``notebooks/execute.py`` runs them.

Nothing is executed here. In CI, execution is a step of its own.
"""

import ast
import base64
import copy
import importlib.util
import inspect
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from notebooks import installation

nbformat = pytest.importorskip("nbformat", reason="needs the extra optax_sam[notebooks]")
image = pytest.importorskip("PIL.Image", reason="needs the extra optax_sam[examples]")

from notebooks import pictures, thumbnails  # noqa: E402  # need Pillow

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
def test_its_pictures_have_a_palette(name):
    for output in outputs(name):
        if "image/png" in output.get("data", {}):
            content = io.BytesIO(base64.b64decode(output.data["image/png"]))
            assert image.open(content).mode == "P"


@pytest.mark.parametrize("name", [*NOTEBOOKS, *thumbnails.PROGRAMS])
def test_its_thumbnail_is_that_of_its_picture(name):
    """After a picture has changed: python notebooks/thumbnails.py."""
    if name in NOTEBOOKS:
        picture = thumbnails.picture_of(NOTEBOOKS[name])
    else:
        picture = thumbnails.picture_of(ROOT / thumbnails.PROGRAMS[name], tag=None)
    path = thumbnails.FOLDER / f"{name}.png"
    committed = np.asarray(image.open(path).convert("RGB"), int)
    assert committed.shape[1::-1] == thumbnails.SIZE
    assert np.abs(committed - np.asarray(thumbnails.thumbnail(picture))).mean() < 2
    assert path.stat().st_size < 25_000


def test_a_palette_keeps_the_colors_and_takes_less_space():
    noise = np.random.default_rng(0).integers(0, 2, (100, 100, 3), dtype=np.uint8)
    pixels = np.kron(noise * np.uint8(200), np.ones((2, 2, 1), np.uint8))  # eight colors
    pixels[:50] = np.arange(200)[None, :, None]  # and 200 shades of gray
    content = io.BytesIO()
    image.fromarray(pixels).save(content, "PNG", optimize=True)
    small = pictures.with_palette(base64.b64encode(content.getvalue()).decode())
    new = base64.b64decode(small)
    assert len(new) < len(content.getvalue())
    shown = np.asarray(image.open(io.BytesIO(new)).convert("RGB"), int)
    assert np.abs(shown - pixels).max() < 16
    assert pictures.with_palette(small) == small


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


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """What the cell that installs does beside a clone or without one, where some modules are there."""

    def run(address, *missing, is_clone):
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        if is_clone:
            (tmp_path / "notebooks" / "installation.py").touch()
        monkeypatch.chdir(tmp_path / "notebooks")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name not in missing)
        found = []
        line = re.compile(r"^( *)([%!].*)$", re.MULTILINE)
        program = line.sub(r"\1found.append(f'''\2''')", installation.first_cell(address))
        exec(program, {"found": found})
        return [command.replace(str(tmp_path), "~") for command in found]

    return run


INSTALL = '%pip install --quiet "..[examples,equinox]"'


def test_in_a_clone_it_installs_what_is_missing(commands):
    for address in (None, ADDRESS):
        assert commands(address, is_clone=True) == []
        assert commands(address, "optax_sam", is_clone=True) == [INSTALL]
        assert commands(address, "sklearn", is_clone=True) == [INSTALL]  # without the extras


def test_elsewhere_it_makes_a_clone_once_and_goes_there_each_time(commands, tmp_path):
    clone, go = (
        f"!git clone --quiet --depth 1 {ADDRESS} ~/optax_sam_clone",
        "%cd -q ~/optax_sam_clone/notebooks",
    )
    assert commands(ADDRESS, "optax_sam", is_clone=False) == [clone, go, INSTALL]
    (tmp_path / "optax_sam_clone").mkdir()
    assert commands(ADDRESS, is_clone=False) == [go]  # a restarted runtime
    assert commands(ADDRESS, "optax_sam", is_clone=False) == [go, INSTALL]  # pip has failed


@every_notebook
def test_it_installs_what_it_imports(name):
    always = {*sys.stdlib_module_names, "IPython", "jax", "numpy", "optax", "examples"}
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0]
        for node in ast.walk(ast.parse(code(name)))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported - always <= set(installation.NEEDED)


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


@pytest.fixture
def execute(monkeypatch, tmp_path):
    """The program, with a folder that has one notebook."""
    pytest.importorskip("nbclient", reason="needs the extra optax_sam[notebooks]")
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    program = importlib.import_module("notebooks.execute")
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "one.ipynb")
    monkeypatch.setattr(program, "FOLDER", tmp_path)
    monkeypatch.setattr(program, "insert_address", lambda *args: None)
    monkeypatch.setattr("sys.argv", ["execute.py"])
    return program


def test_the_cells_of_a_notebook_share_its_time(execute, monkeypatch):
    given = {}
    client = type("Client", (), {"execute": lambda self: None})
    monkeypatch.setattr(
        execute, "NotebookClient", lambda notebook, **options: given.update(options) or client()
    )
    execute.execute(nbformat.v4.new_notebook())
    assert "timeout" not in given
    left = given["timeout_func"]
    assert 0 < left(None) <= execute.SECONDS_PER_NOTEBOOK
    end = execute.time.monotonic() + execute.SECONDS_PER_NOTEBOOK
    monkeypatch.setattr(execute.time, "monotonic", lambda: end - 7)
    assert 0 < left(None) <= 7
    monkeypatch.setattr(execute.time, "monotonic", lambda: end + 7)
    assert left(None) == 1


@pytest.mark.parametrize("name", ["CellTimeoutError", "DeadKernelError"])
def test_a_notebook_that_ends_early_has_failed(execute, name, monkeypatch, capsys):
    def fail(notebook):
        raise getattr(importlib.import_module("nbclient.exceptions"), name)("it is over")

    monkeypatch.setattr(execute, "execute", fail)
    assert execute.main() == 1
    assert "one: FAILS\nit is over" in capsys.readouterr().out


def test_a_notebook_is_written_in_full_or_not_at_all(execute, monkeypatch):
    path = execute.FOLDER / "one.ipynb"
    before = path.read_text()

    def half(notebook, file):
        Path(file).write_text("half")
        assert [found.name for found in execute.FOLDER.glob("*.ipynb")] == ["one.ipynb"]
        raise OSError("disk full")

    monkeypatch.setattr(execute, "execute", lambda notebook: None)
    with monkeypatch.context() as patch:
        patch.setattr(execute.nbformat, "write", half)
        with pytest.raises(OSError, match="disk full"):
            execute.main()
    assert path.read_text() == before
    execute.write(nbformat.v4.new_notebook(metadata={"new": 1}), path)
    assert '"new": 1' in path.read_text()
    assert [file.name for file in execute.FOLDER.iterdir()] == ["one.ipynb"]
