"""Configuration of the documentation site.

sphinx-build -W -n --keep-going -b html docs docs/_build/html
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

import optax_sam

project = "optax_sam"
author = "The optax_sam authors"
copyright = author
version = release = optax_sam.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "optax_sam_directives",
]
# A page of results is docs/results/NAME.md with a title; the folders beside it are data.
exclude_patterns = ["_build", "results/*/*"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autosummary_generate = False
autodoc_member_order = "bysource"
# optax's unions, spelled out, are unreadable; the docstrings say the types in words.
autodoc_typehints = "none"
python_maximum_signature_line_length = 80
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

html_theme = "furo"
html_title = "optax_sam"
html_static_path = ["_static"]
html_copy_source = False
html_show_sphinx = False
