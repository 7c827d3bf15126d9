"""The pages of the site: their code runs, and what they must mention is there."""

import importlib
import inspect
import re
from pathlib import Path
from xml.etree import ElementTree

import jax.numpy as jnp
import pytest

import optax_sam
from docs import insert_docstrings, insert_results
from tests import test_golden

DOCS = Path(__file__).parent.parent / "docs"

PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
FENCE = re.compile(
    r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)


def blocks_of(page: Path) -> list[tuple[int, str]]:
    """``(line, code)`` of every Python block that is not marked ``notest``."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        code = "\n".join(line[indent:] for line in match["code"].splitlines())
        found.append((text.count("\n", 0, match.start("code")), code))
    return found


WITH_CODE = [page for page in PAGES if blocks_of(page)]


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.mark.programs
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_runs(page):
    """In one namespace, in order, with the line numbers of the page in any traceback."""
    namespace = {"__name__": page.stem}
    for line, code in blocks_of(page):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_no_block_escapes():
    """Every fence that says Python is one that runs: none is hidden by its spelling."""
    for page in PAGES:
        fences = re.findall(r"^ *```\s*(?:python|py)\b.*$", page.read_text(encoding="utf-8"), re.M)
        assert len(fences) == len(blocks_of(page)), name_of(page)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_results_are_those_that_are_committed(page):
    """After a result has changed: python docs/insert_results.py."""
    text = page.read_text(encoding="utf-8")
    assert insert_results.with_results(text) == text


def test_a_result_is_copied_into_its_place():
    page = "before\n<!-- result: rho_sweep.csv -->\nold\n<!-- end of the result -->\nafter"
    new = insert_results.with_results(page)
    assert (new[:7], new[-6:]) == ("before\n", "\nafter")
    assert "old" not in new
    assert "\n| method | " in new


def test_pages_read_well_where_no_site_is_built():
    """GitHub shows directives as code; a picture says in words what it shows."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"^```\{(result|toctree|include)\}", text, re.M), name_of(page)
        # A name in code font becomes a link by itself.
        assert not re.search(r"\{(func|class|mod|meth|data)\}`", text), name_of(page)
        for alt in re.findall(r"!\[(.*?)\]\(", text):
            assert len(alt) > 20, (name_of(page), alt)


def test_the_citation_is_of_this_version():
    """In CITATION.cff and in the page; and every method says which paper."""
    root, page = DOCS.parent, (DOCS / "cite.md").read_text(encoding="utf-8")
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {optax_sam.__version__}\n" in citation
    assert f"version = {{{optax_sam.__version__}}}" in page
    keys = set(re.findall(r"^@\w+\{(\w+),", page, re.M)) - {"optax_sam"}
    assert keys == set(re.findall(r"`(\w+\d{4}\w+)`", page))
    for name in ("sam", "saner", "jsam", "lsam", "ncsam", "asam", "gsam", "friendly_sam", "vasso"):
        assert f"`{name}`" in page


def methods_text() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "methods").glob("*.md"))


METHODS = [
    name
    for name in optax_sam.__all__
    if inspect.isfunction(getattr(optax_sam, name))
    and getattr(optax_sam, name).__module__ == "optax_sam.methods"
]


def test_the_methods_are_listed_once():
    """In the table of ``optax_sam.methods``, from which the documentation takes them."""
    assert len(METHODS) >= 12
    assert sorted(insert_docstrings.method_names()) == sorted(METHODS)


@pytest.mark.parametrize("method", [*METHODS, "last_layer_penalty"])
def test_every_method_has_a_page_with_its_sources(method):
    page = (DOCS / "methods" / f"{method}.md").read_text(encoding="utf-8")
    for part in ("$$", "**Defaults.**", "**Cost.**", "**Source.**", "**Evidence.**"):
        assert part in page, part
    assert f"optax_sam.{method}(" in page
    if method in METHODS:
        assert "**Composition.**" in page
        assert f"](../images/methods/{method}.svg)" in page


@pytest.mark.parametrize("page", sorted((DOCS / "methods").glob("*.md")), ids=name_of)
def test_pages_say_what_the_docstrings_say(page):
    """After a docstring has changed: python docs/insert_docstrings.py."""
    text = page.read_text(encoding="utf-8")
    assert insert_docstrings.with_docstrings(text) == text


def test_pictures_show_what_the_library_does(tmp_path):
    """One for each method; ε is that of SAM, seen from outside."""
    pytest.importorskip("matplotlib")
    pictures = importlib.import_module("docs.pictures")
    assert sorted(pictures.PICTURES) == sorted(METHODS)
    step = pictures.step_of(optax_sam.sam(pictures.RHO))
    expected = pictures.RHO * step.g / jnp.linalg.norm(step.g)
    assert jnp.allclose(step.epsilon, expected, atol=1e-6)
    assert jnp.allclose(step.d, step.perturbed, atol=1e-6)
    pictures.draw(pictures.Picture(step), tmp_path / "sam.svg")
    assert ElementTree.parse(tmp_path / "sam.svg").getroot().tag.endswith("svg")


def test_docstrings_become_markdown():
    markdown = insert_docstrings.markdown("see :func:`optax_sam.sam`, ``w``;\n  arXiv 2010.01412.")
    link = "[arXiv 2010.01412](https://arxiv.org/abs/2010.01412)"
    assert markdown == f"see `sam`, `w`; {link}."
    formula = insert_docstrings.formula_of("A.\n\n.. math::\n   a = b, \\qquad\n   c\n\nText")
    assert formula.split("\n")[2:5] == [r"\begin{gathered}", r"a = b, \\[1ex]", "c"]


def test_every_notebook_is_among_the_tutorials():
    """With a thumbnail, which notebooks/execute.py and notebooks/thumbnails.py write."""
    page = (DOCS / "tutorials" / "index.md").read_text(encoding="utf-8")
    for notebook in (DOCS.parent / "notebooks").glob("*.ipynb"):
        row = rf"\| !\[.+\]\(\.\./images/thumbnails/{notebook.stem}\.png\) \| "
        assert re.search(rf"^{row}\[.+\]\(\.\./\.\./notebooks/{notebook.name}\) \|", page, re.M)


CODE_FENCE = re.compile(r"^ *(`{3,}).*?^ *\1$", re.DOTALL | re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them: of headings, and those that are written as HTML."""
    text = page.read_text(encoding="utf-8")
    found = set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    times: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.*?) *$", CODE_FENCE.sub("", text), re.MULTILINE):
        heading = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)
        anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        times[anchor] = times.get(anchor, -1) + 1
        found.add(f"{anchor}-{times[anchor]}" if times[anchor] else anchor)
    return found


def test_links_lead_somewhere():
    """Also where no site is built: to a file of the repository, and in Markdown to a heading."""
    root = DOCS.parent
    pages = [*PAGES, *root.glob("*.md"), root / "llms.txt", *(root / "examples").rglob("*.md")]
    for page in pages:
        text = CODE_FENCE.sub("", page.read_text(encoding="utf-8"))
        for link in re.findall(r"""(?:\]\(|(?:src|srcset|href)=")([^)"\s]+)""", text):
            target, _, anchor = link.partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            file = page.parent / target if target else page
            assert file.exists(), (page, link)
            if anchor and file.suffix == ".md":
                assert anchor in anchors_of(file), (page, link)


def test_every_golden_trajectory_is_named():
    text = methods_text()
    evidence = "".join(
        re.findall(r"^\*\*Evidence\.\*\*.*?(?=\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    )
    for name in {name.split("/")[0] for name in test_golden.golden()} - {"problem", "edge"}:
        # What is not reproduced is named too, with the reason.
        assert f"`{name}`" in (evidence if name in test_golden.METHODS else text), name
