"""Programs that adopted the library in a few lines train as with SAM written by hand.

The recipes page shows the lines as diffs, and they are those of the programs.
"""

import importlib
import re
from pathlib import Path

import pytest

from tests.clients import by_hand

HERE = Path(__file__).parent
RECIPES = (HERE.parents[1] / "docs" / "guide" / "recipes.md").read_text(encoding="utf-8")
PROGRAMS = sorted(
    path.stem for path in HERE.glob("*.py") if path.stem not in ("by_hand", "test_clients")
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_trains_as_with_sam_by_hand(name):
    program = importlib.import_module(f"tests.clients.{name}")
    by_hand.assert_same(program.with_library(), program.with_sam_by_hand())


def diffs_of(name: str) -> list[list[str]]:
    """The lines of every diff on the page that says it is of this program."""
    found = re.findall(r"`tests/clients/(\w+)\.py`[^`]*```diff\n(.*?)```", RECIPES, re.DOTALL)
    return [diff.splitlines() for program, diff in found if program == name]


def hunks_of(diff: list[str]) -> list[tuple[list[str], list[str]]]:
    """``(old lines, new lines)`` of every part of a diff; lines of dots stand between them."""
    parts = [part.splitlines() for part in "\n".join(diff).split("\n ...\n")]
    return [
        tuple([line[1:].strip() for line in part if line[0] in signs] for signs in (" -", " +"))
        for part in parts
    ]


def places_of(lines: list[str], program: list[str]) -> list[int]:
    return [i for i in range(len(program)) if program[i : i + len(lines)] == lines]


@pytest.mark.parametrize("name", PROGRAMS)
def test_recipe_is_the_difference_that_adopts_the_library(name):
    source = (HERE / f"{name}.py").read_text(encoding="utf-8").partition('"""\n')[2]
    program = [line.partition("  # noqa")[0].strip() for line in source.splitlines()]
    diffs, original = diffs_of(name), list(program)
    assert diffs
    for diff in diffs:
        assert 1 <= sum(line.startswith("+") for line in diff) <= 3
        for old, new in hunks_of(diff):
            assert places_of(new, original), f"the program does not have these lines: {new}"
            for place in reversed(places_of(new, program)):
                program[place : place + len(new)] = old
    # Without these lines nothing of the library is left, so the diff lacks nothing.
    rest = [line for line in program if re.search("optax_sam|loss_fn=", line)]
    assert all(line.startswith("import ") for line in rest), rest
