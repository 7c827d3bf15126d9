"""Programs that adopted the library in a few lines train as with SAM written by hand."""

import importlib
from pathlib import Path

import pytest

from tests.clients import by_hand

PROGRAMS = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if path.stem not in ("by_hand", "test_clients")
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_trains_as_with_sam_by_hand(name):
    program = importlib.import_module(f"tests.clients.{name}")
    by_hand.assert_same(program.with_library(), program.with_sam_by_hand())
