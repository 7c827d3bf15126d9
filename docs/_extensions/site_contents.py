"""What the site has beside the pages of ``docs``: the sidebar, the notebooks, files from elsewhere.

None of it is written into the pages, where GitHub would show it as code.
"""

import os
import re
from pathlib import Path

import api_pages
from docutils import nodes
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
TUTORIALS = (ROOT / "docs/tutorials/index.md").read_text(encoding="utf-8")
NOTEBOOKS = re.findall(r"notebooks/(\w+)\.ipynb", TUTORIALS)  # in the order of that page
PROGRAMS = "frozen_features image_classification language_model label_noise"
METHODS = sorted(path.stem for path in (ROOT / "docs/methods").glob("*.md") if path.stem != "index")

# The sidebar: captions and pages.
CONTENTS = {
    "index": {
        "Start": "guide/getting_started guide/which_method when_does_it_help",
        "Tutorials": "tutorials/index programs/index",
        "How-to": """guide/recipes guide/batch_norm_and_dropout guide/devices guide/precision
            guide/wrappers guide/choosing_rho guide/label_noise guide/diagnostics guide/composing
            guide/per_example guide/your_own_stage composition""",
        "Reference": "methods/index api/index results/index",
        "More": "faq related cite changelog contributing",
    },
    "tutorials/index": {"Tutorials": " ".join(NOTEBOOKS)},
    "programs/index": {"Programs": PROGRAMS},
    "methods/index": {"Methods": " ".join(METHODS)},
    "api/index": {"API": " ".join(api_pages.pages())},
    "results/index": {
        "Results": "family group_size image_classification frozen_features frozen_features_noise "
        "language_model benchmarks pods pods_steps"
    },
}

# Pages that show another file of the repository.
SHOWN = {
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "programs/index": "examples/README.md",
    **{f"programs/{name}": f"examples/{name}/README.md" for name in PROGRAMS.split()},
}
PAGE_OF = {ROOT / file: ROOT / f"docs/{page}.md" for page, file in SHOWN.items()}


def copy_notebooks(app: Sphinx) -> None:
    """Puts the notebooks where Sphinx looks for pages; git ignores the copies."""
    folder = Path(app.srcdir) / "tutorials"
    for old in folder.glob("*.ipynb"):
        if old.stem not in NOTEBOOKS:
            old.unlink()
    for name in NOTEBOOKS:
        source, copy = ROOT / "notebooks" / f"{name}.ipynb", folder / f"{name}.ipynb"
        text = site_links(source.read_text(encoding="utf-8"), source, copy)
        if not copy.exists() or copy.read_text(encoding="utf-8") != text:
            copy.write_text(text, encoding="utf-8")


def site_links(text: str, source: Path, page: Path) -> str:
    """Turns links to files of the repository into those of the site.

    Args:
      text: Markdown.
      source: the file that it is from.
      page: the file in ``docs`` that stands for its page.

    Returns:
      The text; a file that the site does not show is named without a link.
    """

    def replace(match: re.Match[str]) -> str:
        name, target, anchor = match.groups()
        file = (source.parent / target).resolve()
        if not file.exists():  # another site's, or no link but code
            return match[0]
        if file.suffix == ".ipynb":
            file = ROOT / "docs/tutorials" / file.name
        file = PAGE_OF.get(file, file)
        if not file.is_relative_to(ROOT / "docs"):
            return name
        return f"[{name}]({os.path.relpath(file, page.parent)}{anchor})"

    return re.sub(r"\[([^][]*)\]\(([^)#\s]+)((?:#[^)\s]*)?)\)", replace, text)


def complete(app: Sphinx, docname: str, source: list[str]) -> None:
    """Adds the hidden tables of contents, and turns links out of ``docs`` into those of the site."""
    page = file = ROOT / f"docs/{docname}.md"
    if docname in SHOWN:
        file = ROOT / SHOWN[docname]
        source[0] = file.read_text(encoding="utf-8")
    if page.exists():
        source[0] = site_links(source[0], file, page)
    for caption, pages in CONTENTS.get(docname, {}).items():
        lines = ["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages.split(), "```"]
        source[0] += "\n".join([*lines, ""])


def complete_head(app, pagename, templatename, context, doctree):
    """Says for search engines what the first paragraph says; leaves out what cannot be edited."""
    if doctree is None:
        return
    made = pagename.startswith(("api/", "tutorials/")) and not pagename.endswith("/index")
    if made or pagename in SHOWN:
        context["page_source_suffix"] = ""  # no link to edit what is not in docs
    first = next((node.astext() for node in doctree.findall(nodes.paragraph)), "")
    text = " ".join(first.split())
    if len(text) > 200:
        text = text[:200].rpartition(" ")[0] + " …"
    text = text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    if text:
        context["metatags"] += f'<meta name="description" content="{text}" />\n'


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the events."""
    app.connect("builder-inited", copy_notebooks)
    app.connect("source-read", complete)
    app.connect("html-page-context", complete_head)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
