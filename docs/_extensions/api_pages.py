"""The API reference: a page per group of public names, written at build time from the library.

The groups are the comments in ``__all__``, of the package and of a public module that has some; every
other public module, such as ``optax_sam.linen``, has one page. A new name or module is documented by
being public.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path
from types import ModuleType

from sphinx.application import Sphinx

import optax_sam


def grouped_names(module: ModuleType) -> dict[str, list[str]]:
    """The public names of a module under the comments of its ``__all__``."""
    source = Path(module.__file__ or "").read_text(encoding="utf-8")
    groups: dict[str, list[str]] = {}
    title = ""
    for line in source.partition("__all__ = [")[2].partition("]")[0].splitlines():
        if comment := re.match(r"\s*# (.+)", line):
            title = comment[1]
        for name in re.findall(r'"(\w+)"', line):
            groups.setdefault(title, []).append(name)
    listed = [name for names in groups.values() for name in names]
    if sorted(listed) != sorted(getattr(module, "__all__", [])):
        raise ValueError(f"{module.__name__}.__all__ must be one literal list, one name to a line.")
    return groups


def other_modules() -> list[str]:
    """Public modules that stand for themselves, such as those that need Flax.

    A module with a name in ``optax_sam.__all__`` is where that name is implemented, and no more.
    """
    public = {id(getattr(optax_sam, name)) for name in optax_sam.__all__}
    found = []
    for info in pkgutil.iter_modules(optax_sam.__path__, "optax_sam."):
        if info.name.rpartition(".")[2].startswith("_"):
            continue
        module = importlib.import_module(info.name)
        own = members_of(module)
        if own and public.isdisjoint({id(module), *(id(getattr(module, name)) for name in own)}):
            found.append(info.name)
    return found


def members_of(module: ModuleType) -> list[str]:
    """The public names of a module, in the order of ``__all__`` or of the source."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (name.isupper() or getattr(value, "__module__", None) == module.__name__)
    ]


def is_record(value: object) -> bool:
    """A named tuple or typed dictionary: its docstring lists the fields."""
    if not inspect.isclass(value):
        return False
    return hasattr(value, "_fields") or hasattr(value, "__total__")


def entry(module: ModuleType, name: str) -> list[str]:
    """The autodoc directive of one name."""
    value = getattr(module, name)
    if inspect.isclass(value):
        options = [] if is_record(value) else ["   :members:", "   :special-members: __call__"]
        # Not for users: what JAX calls.
        options += [] if is_record(value) else ["   :exclude-members: tree_flatten, tree_unflatten"]
        return [f".. autoclass:: {name}", *options, ""]
    kind = "function" if callable(value) else "data"
    return [f".. auto{kind}:: {name}", ""]


def heading(title: str) -> list[str]:
    """A title."""
    return [title, "=" * len(title), ""]


def table(module: ModuleType, names: list[str]) -> list[str]:
    """The names of a module, with the first line of each docstring."""
    lines = [
        f".. currentmodule:: {module.__name__}",
        "",
        ".. autosummary::",
        "   :nosignatures:",
        "",
    ]
    return [*lines, *(f"   {name}" for name in names), ""]


def entries(module: ModuleType, names: list[str]) -> list[str]:
    """A table of the names and their documentation."""
    return [*table(module, names), *(line for name in names for line in entry(module, name))]


def stem_of(title: str) -> str:
    """ "Stage 1: perturbations" is perturbations, "Wrappers: how ε is climbed" is wrappers."""
    return re.sub(r"^Stage \d: ", "", title).partition(":")[0].lower().replace(" ", "_")


def module_pages(module: ModuleType) -> dict[str, list[str]]:
    """A module introduces itself; if it has groups of names, each has a page of its own."""
    short = module.__name__.rpartition(".")[2]
    first = heading(module.__name__)
    first += [f".. automodule:: {module.__name__}", "   :no-members:", ""]
    groups = grouped_names(module)
    if len(groups) < 2:
        return {short: first + entries(module, members_of(module))}
    found = {short: first}
    for title, names in groups.items():
        first += [f"**{title}**", "", *table(module, names)]
        page = heading(f"{short.capitalize()}: {title[0].lower()}{title[1:]}")
        found[f"{short}_{stem_of(title).replace('-', '')}"] = page + entries(module, names)
    return found


def pages() -> dict[str, list[str]]:
    """The pages, in the order of the sidebar: their names and their lines of reStructuredText."""
    found = {}
    modules = []
    for title, names in grouped_names(optax_sam).items():
        modules += [name for name in names if inspect.ismodule(getattr(optax_sam, name))]
        if plain := [name for name in names if name not in modules]:
            found[stem_of(title)] = heading(title) + entries(optax_sam, plain)
    for name in [f"optax_sam.{name}" for name in modules] + other_modules():
        found |= module_pages(importlib.import_module(name))
    return found


def write_pages(app: Sphinx) -> None:
    """Writes those pages that have changed, so that an unchanged one is not built again."""
    folder = Path(app.srcdir) / "api"
    wanted = pages()
    for old in folder.glob("*.rst"):
        if old.stem not in wanted:
            old.unlink()
    for name, lines in wanted.items():
        text, path = "\n".join(lines), folder / f"{name}.rst"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def source_signature(app, what, name, value, options, signature, returns):
    """The signature as the source has it: there a union of Optax's has a name, and is one line."""
    if what not in ("function", "class", "method") or signature is None:
        return None
    if is_record(value) or getattr(value, "_is_protocol", False):
        return "", ""  # nobody calls it; its docstring lists the fields
    function = inspect.unwrap(value.__init__ if inspect.isclass(value) else value)
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError):  # made by a decorator
        return None
    arguments = definition.args
    if what != "function" and arguments.args and arguments.args[0].arg in ("self", "cls"):
        del arguments.args[0]
    returned = ast.unparse(definition.returns) if definition.returns else ""
    return f"({ast.unparse(arguments)})", "" if what == "class" else returned


def readable_docstring(app, what, name, value, options, lines):
    """One part of a formula to a row, so that it fits a phone, and papers as links."""
    text = "\n".join(lines)

    def in_rows(match: re.Match[str]) -> str:
        rows = " \\\\ ".join(" ".join(row.split()) for row in match[1].split(r"\qquad"))
        return rf".. math:: \begin{{gathered}} {rows} \end{{gathered}}"

    text = re.sub(r"^\.\. math::(.*?)(?=\n\s*\n|\Z)", in_rows, text, flags=re.DOTALL | re.MULTILINE)
    number = r"\barXiv\s+(\d{4}\.\d{5}(?:v\d)?)"
    lines[:] = re.sub(number, r"`arXiv \1 <https://arxiv.org/abs/\1>`__", text).split("\n")


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the events."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-signature", source_signature)
    app.connect("autodoc-process-docstring", readable_docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
