"""Checks that a built site holds what readers look for: ``python docs/check_site.py SITE``."""

import sys
from pathlib import Path

import optax_sam


def check(site: Path) -> None:
    """Raises an ``AssertionError`` that names what is missing."""
    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    for name in optax_sam.__all__:
        target = "module-" if not callable(getattr(optax_sam, name)) else ""
        assert f'id="{target}optax_sam.{name}"' in reference, f"the API pages lack optax_sam.{name}"
    # Types, and links to their documentation; no union is spelled out.
    for text in (
        'api/transformations.html#optax.GradientTransformationExtraArgs"',
        "ScalarOrSchedule",
    ):
        assert text in reference, f"the API pages lack {text}"
    assert "collections.abc.Sequence" not in reference, "a signature spells out a union"
    for page, text in [
        (
            "guide/getting_started.html",
            'href="../api/the_engine_and_what_it_needs.html#optax_sam.Objective"',
        ),
        ("guide/getting_started.html", '<meta name="description" content="'),
        ("tutorials/quick_start.html", "SANER"),
        ("tutorials/my_features.html", "<table"),
        ("changelog.html", "Keep a Changelog"),
        # Links between files of the repository lead to their pages.
        ("programs/index.html", 'href="frozen_features.html"><span class="std std-doc">'),
        ("programs/frozen_features.html", 'href="../results/frozen_features.html#which-labels'),
    ]:
        assert text in (site / page).read_text(encoding="utf-8"), f"{page} lacks {text}"
    # The copy button leaves out output, and without a prompt the whole block counts as output.
    for file in site.rglob("*.html"):
        for block in file.read_text(encoding="utf-8").split('<div class="highlight-console')[1:]:
            assert 'class="gp"' in block.partition("</pre>")[0], (
                f"{file}: nothing to copy, use bash"
            )


if __name__ == "__main__":
    check(Path(sys.argv[1]))
