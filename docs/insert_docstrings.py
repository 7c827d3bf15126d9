"""Copies what the docstrings say about a method into its page, so that it is written once.

python docs/insert_docstrings.py

A page names a function of ``optax_sam`` in a comment; what stands between it and the next comment is
replaced by the docstring's summary, formula, arguments with their defaults, and source:

    <!-- docstring: saner -->
    **SAM that magnifies its down-weighting of noisy gradients.**
    <!-- end of the docstring -->

``<!-- methods -->`` stands for the table of all methods: the stages from the docstring of
``optax_sam.methods``, the cost from the methods' pages.
"""

import inspect
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import optax_sam  # noqa: E402
from optax_sam import methods  # noqa: E402

DOCSTRING = re.compile(r"<!-- docstring: (\w+) -->\n.*?<!-- end of the docstring -->", re.DOTALL)
TABLE = re.compile(r"<!-- methods -->\n.*?<!-- end of the methods -->", re.DOTALL)
SECTION = re.compile(r"^(Args|Returns|Raises|Example|References):\n", re.MULTILINE)


def markdown(text: str) -> str:
    """Docstring markup as Markdown: roles and double backquotes to code, arXiv numbers to links."""
    text = re.sub(r":math:`(.*?)`", r"$\1$", text)
    text = re.sub(r":\w+:`~?(?:optax_sam\.(?=\w+`))?(.*?)`", r"`\1`", text).replace("``", "`")
    text = re.sub(r"arXiv\s+(\d{4}\.\d{5}(?:v\d)?)", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return " ".join(text.split())


def sections_of(function) -> dict[str, str]:
    """The parts of a docstring by their headings; what comes first is under ``""``."""
    first, *rest = SECTION.split(inspect.getdoc(function) or "")
    return {"": first} | dict(zip(rest[::2], rest[1::2], strict=True))


def formula_of(text: str) -> str:
    """The first formula of a docstring, a row for each of its parts, so that it fits a phone."""
    if not (found := re.search(r"^\.\. math::(.*?)(?=\n\S|\Z)", text, re.DOTALL | re.MULTILINE)):
        return ""
    rows = " ".join(found[1].split()).split(r" \qquad ")
    if len(rows) > 1:
        rows = [r"\begin{gathered}", " \\\\[1ex]\n".join(rows), r"\end{gathered}"]
    return "\n".join(["", "$$", *rows, "$$", ""])


def arguments_of(function, text: str) -> list[str]:
    """The table of a method's own arguments, with their defaults."""
    parameters = inspect.signature(function).parameters
    rows = []
    for name, meaning in re.findall(r"^  (\w+): (.*?)(?=^  \S|\Z)", text, re.DOTALL | re.MULTILINE):
        default = parameters[name].default
        shown = name if default is inspect.Parameter.empty else f"{name}={default!r}"
        rows.append(f"| `{shown}` | {markdown(meaning)} |")
    return ["| argument | meaning |", "|---|---|", *rows]


def docstring_of(name: str) -> str:
    """What a page says from the docstring of one function."""
    function = getattr(optax_sam, name)
    parts = sections_of(function)
    summary = parts[""].partition("\n")[0].rpartition(": ")[2]
    lines = [
        f"**{summary[0].upper()}{summary[1:]}**",
        formula_of(parts[""]),
        *arguments_of(function, parts["Args"]),
        "",
        f"**Source.** {markdown(parts['References'])}",
    ]
    return "\n".join(lines)


def method_names() -> list[str]:
    """The named methods, in the order of the table in ``optax_sam.methods``."""
    return re.findall(r"^``(\w+)``  ", methods.__doc__ or "", re.MULTILINE)


def table_of_methods() -> str:
    """The stages and the cost of every method, linked to its page."""
    documentation = methods.__doc__ or ""
    lines = ["| method | perturbation | evaluation | combination | gradients per step |"]
    lines.append("|---|---|---|---|---|")
    for name in method_names():
        row = re.search(rf"^``{name}``.*$", documentation, re.MULTILINE)
        stages = re.split(r"\s{2,}", row[0].strip())[1:]
        page = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
        cost = re.search(r"^\*\*Cost\.\*\* ([\w +/]+?) gradients?\b", page, re.MULTILINE)[1]
        lines.append(f"| [`{name}`]({name}.md) | " + " | ".join([*stages, cost]) + " |")
    return "\n".join(lines)


def with_docstrings(page: str) -> str:
    """The text of a page with what the docstrings say now."""

    def replace(match: re.Match[str]) -> str:
        text = docstring_of(match[1])
        return f"<!-- docstring: {match[1]} -->\n\n{text}\n\n<!-- end of the docstring -->"

    table = f"<!-- methods -->\n\n{table_of_methods()}\n\n<!-- end of the methods -->"
    return TABLE.sub(lambda match: table, DOCSTRING.sub(replace, page))


if __name__ == "__main__":
    for path in sorted((DOCS / "methods").glob("*.md")):
        page = path.read_text(encoding="utf-8")
        if (new := with_docstrings(page)) != page:
            path.write_text(new, encoding="utf-8")
            print(path)
