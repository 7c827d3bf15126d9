"""Configuration of the documentation site.

sphinx-build -W -n --keep-going -b html docs docs/_build/html
"""

import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "_extensions"))

import optax_sam  # noqa: E402

project = "optax_sam"
author = "The optax_sam authors"
copyright = author
version = release = optax_sam.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "api_pages",
    "name_links",
    "site_contents",
]
# A page of results is docs/results/NAME.md with a title; the folders beside it are data.
exclude_patterns = ["_build", "results/*/*"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# Notebooks are committed with their outputs, and CI executes them.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # tables that a notebook shows are tables here too

autosummary_generate = False
autodoc_member_order = "bysource"
# The signatures have the types; the docstrings say in words what they mean.
autodoc_typehints = "none"
python_maximum_signature_line_length = 60
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
# References into other projects would need their inventories from the internet at build time; those
# into this one are all checked.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!optax_sam\.).*"),
    # Names in private modules and inside of packages, which docstrings explain to readers of the code.
    (r"py:.*", r"optax_sam\._.*"),
    (r"py:.*", r"optax_sam\.\w+\.\w+\.\w+"),
    (r"py:mod", r"optax_sam\.\w+\.\w+"),
]
# The docstring of down_weight writes absolute values with bars.
rst_prolog = """
.. |g| replace:: \\|g\\|
.. |g'| replace:: \\|g'\\|
"""

# A prime in g' is not an apostrophe.
smartquotes = False

# Copied commands have no prompt, and no output.
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# For `sphinx-build -b linkcheck`, which needs the internet. GitHub makes anchors with JavaScript.
linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_anchors_ignore_for_url = [r"https://github\.com/.*"]

html_theme = "furo"
html_title = f"optax_sam {release}"
html_static_path = ["_static"]
html_extra_path = ["../llms.txt"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_show_sphinx = False

# The repository's address has one place, pyproject.toml; with it come links to edit a page.
metadata = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
if repository := metadata.get("urls", {}).get("Repository"):
    html_theme_options = {
        "source_repository": repository,
        "source_branch": "main",
        "source_directory": "docs/",
    }
