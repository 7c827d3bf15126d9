"""Every wrong call of the table gets an error of this package with argument, value and remedy."""

import inspect
import linecache
import pathlib
import re
import traceback
import types

import jax
import pytest

import optax_sam
import optax_sam.equinox
import optax_sam.linen
import optax_sam.nnx
import optax_sam.plots
from tests.bad_input import ROWS

PACKAGE = pathlib.Path(optax_sam.__file__).parent
CALLS = [
    pytest.param(row, id=f"{name}: {row.mistake}") for name, rows in ROWS.items() for row in rows
]


@pytest.fixture(autouse=True)
def whole_tracebacks():
    """JAX hides its own frames, so that its errors would seem to be ours."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


@pytest.mark.parametrize("row", CALLS)
def test_message(row):
    with pytest.raises(row.error) as caught:
        row.call()
    message = str(caught.value)
    assert re.search(rf"(?<!\w){re.escape(row.argument)}(?!\w)", message), message
    assert row.value in message
    assert row.remedy in message
    frame = traceback.extract_tb(caught.tb)[-1]
    assert PACKAGE in pathlib.Path(frame.filename).parents
    line = linecache.getline(frame.filename, frame.lineno).strip()
    assert line.startswith(("raise ", "warnings.warn(")), line


def public_callables():
    """The functions and classes that a user calls; records and protocols are made by the package."""
    top = {name: getattr(optax_sam, name) for name in optax_sam.__all__}
    modules = [value for value in top.values() if isinstance(value, types.ModuleType)]
    modules += [optax_sam.linen, optax_sam.nnx, optax_sam.equinox, optax_sam.plots]
    found = {name: value for name, value in top.items() if callable(value)}
    for module in modules:
        of_module = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", None) == module.__name__
        ]
        short = module.__name__.removeprefix("optax_sam.")
        for name in of_module:
            if callable(getattr(module, name)) and not name.startswith("_"):
                found[f"{short}.{name}"] = getattr(module, name)
    is_record = {
        name
        for name, value in found.items()
        if inspect.isclass(value)
        and any(hasattr(value, mark) for mark in ("_fields", "__total__", "_is_protocol"))
    }
    return set(found) - is_record


def test_the_table_is_complete():
    assert len(CALLS) >= 180
    assert len({call.id for call in CALLS}) == len(CALLS)
    assert {name for name, rows in ROWS.items() if rows} == public_callables()
