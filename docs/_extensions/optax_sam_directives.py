"""The reference of the public names, and the tables of contents.

``public-api`` documents every name of ``optax_sam.__all__`` under the headings that its comments give,
and then every other public module, such as ``optax_sam.linen``. A new name or module is documented by
being public.
"""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import optax_sam


def grouped_names() -> dict[str, list[str]]:
    """The public names under the comments of ``optax_sam.__all__``."""
    source = Path(optax_sam.__file__).read_text(encoding="utf-8")
    groups: dict[str, list[str]] = {}
    title = "Other"
    for line in source.partition("__all__ = [")[2].partition("]")[0].splitlines():
        if comment := re.match(r"\s*# (.+)", line):
            title = comment[1]
        for name in re.findall(r'"(\w+)"', line):
            groups.setdefault(title, []).append(name)
    listed = [name for names in groups.values() for name in names]
    if sorted(listed) != sorted(optax_sam.__all__):
        raise ValueError("optax_sam.__all__ must be one literal list, one name to a line.")
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


def entry(module: ModuleType, name: str) -> list[str]:
    """The autodoc directive of one name."""
    value = getattr(module, name)
    if inspect.isclass(value):
        is_named_tuple = issubclass(value, tuple) and hasattr(value, "_fields")
        options = [] if is_named_tuple else ["   :members:", "   :special-members: __call__"]
        # Not for users: what JAX calls.
        options += [] if is_named_tuple else ["   :exclude-members: tree_flatten, tree_unflatten"]
        return [f".. autoclass:: {name}", *options, ""]
    kind = "function" if callable(value) else "data"
    return [f".. auto{kind}:: {name}", ""]


def section(title: str, module: ModuleType, names: list[str]) -> list[str]:
    """A heading, a summary and the entries."""
    return [
        title,
        "=" * len(title),
        "",
        f".. currentmodule:: {module.__name__}",
        "",
        ".. autosummary::",
        "   :nosignatures:",
        "",
        *(f"   {name}" for name in names),
        "",
        *(line for name in names for line in entry(module, name)),
    ]


def module_section(title: str, module: ModuleType) -> list[str]:
    """A module with its own introduction."""
    heading, underline, *rest = section(title, module, members_of(module))
    return [heading, underline, "", f".. automodule:: {module.__name__}", "   :no-members:", *rest]


def reference() -> str:
    """The whole reference as reStructuredText."""
    lines = []
    for title, names in grouped_names().items():
        modules = [name for name in names if inspect.ismodule(getattr(optax_sam, name))]
        plain = [name for name in names if name not in modules]
        if plain:
            lines += section(title, optax_sam, plain)
        for name in modules:
            lines += module_section(f"optax_sam.{name}", getattr(optax_sam, name))
    for name in other_modules():
        lines += module_section(name, importlib.import_module(name))
    return "\n".join(lines)


class PublicApi(SphinxDirective):
    """``public-api``: see the module docstring."""

    def run(self) -> list[nodes.Node]:
        """Parses the generated text in place."""
        self.env.note_dependency(optax_sam.__file__)
        return self.parse_text_to_nodes(reference(), allow_section_headings=True)


# What stands in the sidebar. It is not written into the pages, where GitHub would show it as code.
CONTENTS = {
    "index": {
        "Guide": """guide/getting_started guide/recipes guide/composing guide/per_example
            guide/batch_norm_and_dropout guide/devices guide/precision guide/label_noise
            guide/diagnostics guide/wrappers composition guide/your_own_stage guide/choosing_rho faq""",
        "Methods": "methods/index methods/label_noise methods/family",
        "Reference": "api results/index cite",
    },
    "results/index": {
        "Results": "family group_size image_classification frozen_features benchmarks"
    },
}


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """Adds the hidden tables of contents to a page that has some."""
    for caption, pages in CONTENTS.get(docname, {}).items():
        lines = [
            "",
            "```{toctree}",
            ":hidden:",
            f":caption: {caption}",
            "",
            *pages.split(),
            "```",
            "",
        ]
        source[0] += "\n".join(lines)


def resolve_public_name(app, env, node, contnode):
    """Sends a reference to where a name is defined to where it is public."""
    target = node.get("reftarget", "")
    name = target.rpartition(".")[2]
    if not (target.startswith("optax_sam.") and name in optax_sam.__all__):
        return None
    return env.get_domain("py").resolve_xref(
        env, node["refdoc"], app.builder, "obj", f"optax_sam.{name}", node, contnode
    )


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directive and the events."""
    app.add_directive("public-api", PublicApi)
    app.connect("source-read", add_contents)
    app.connect("missing-reference", resolve_public_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
