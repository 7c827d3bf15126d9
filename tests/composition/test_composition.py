"""A sample of the composition matrix, against the page; ``tests.composition.page`` runs all of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.composition import inventory
from tests.composition.by_hand import METHODS, RHO, ByHand, descend, distance, flat, steps
from tests.composition.cells import evaluate, is_slow
from tests.composition.inventory import ROWS, SCHEDULES, WRAPPERS
from tests.composition.page import PAGE, TABLES, is_direction_as_said, tables, text_of
from tests.composition.verdicts import (
    BACKWARDS,
    NOTES,
    WITH_ONE_METHOD,
    columns,
    mismatch,
    notes,
)

pytestmark = pytest.mark.usefixtures("x64")

FAST = [name for name in ROWS if not is_slow(name)]
# Every wrapper, and of what a wrapper or a method cannot look into, every eighth: optimizers and
# transformations see only what stands in front of them.
SAMPLE = [
    *[name for name in FAST if name in WRAPPERS],
    *[name for name in FAST if name not in WRAPPERS][::8],
]
# What takes more arguments or a gradient per example, branches or loops: one place of each.
SINGLE_CELLS = [
    ("polyak_sgd", "behind"),
    ("contrib.differentially_private_aggregate", "before"),
    ("apply_if_finite", "around"),
    ("scale_by_backtracking_linesearch", "behind"),
]


@functools.cache
def page():
    """The committed page."""
    return PAGE.read_text(encoding="utf-8")


@functools.cache
def written():
    """The cells of the page's tables by name and position."""
    lines = [line.strip("| ").split(" | ") for line in page().split("\n")]
    rows = {line[0].strip("`"): line[1:] for line in lines if line[0].startswith("`")}
    return {
        (name, position): text
        for name in rows.keys() & (ROWS | SCHEDULES).keys()
        for position, text in zip(columns(name), rows[name], strict=True)
    }


def failures(cells):
    """What is not as the page says, one line each."""
    found = []
    for name, position, method in cells:
        result = evaluate(name, position, method)
        if result is None:
            continue
        word = written()[name, position].split(" ")[0]
        reason = mismatch(name, position, method, result)
        if method not in WITH_ONE_METHOD.get((name, position), {}):
            is_refused = result.error is not None
            if word != "undefined" and is_refused != (word == "refused"):
                reason = f"{reason}; the page says {word}"
        if reason:
            found.append(f"{name}, {position}, {method}: {reason}")
    return found


def test_everything_that_optax_exports_is_in_the_matrix():
    """A new release of optax shows up here: give the name a row, or say that it is none."""
    assert inventory.unclassified() == []


def test_everything_that_optax_exports_has_a_row_on_the_page():
    rows = {name.split(" (")[0].split(".gradient")[0] for name, _ in written()}
    others = inventory.NOT_TRANSFORMATIONS | set(inventory.ALIASES)
    assert set(inventory.exported()) - others <= rows


def test_the_page_has_the_tables_of_these_verdicts():
    """Otherwise run ``python -m tests.composition.page``."""
    assert tables() in page()


def test_nothing_in_the_matrix_has_gone():
    exported = {*inventory.exported()}
    named = {name.split(" (")[0].split(".gradient")[0] for name in ROWS}
    assert named | {*SCHEDULES} | inventory.NOT_TRANSFORMATIONS <= exported | {*inventory.ALIASES}


def test_an_unknown_export_would_show_up(monkeypatch):
    def scale_by_something_new():
        return optax.identity()

    monkeypatch.setattr(optax, "scale_by_something_new", scale_by_something_new, raising=False)
    assert inventory.unclassified() == ["scale_by_something_new"]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_of_the_page(name):
    assert failures((name, position, "saner") for position in columns(name)) == []


@pytest.mark.parametrize(("name", "position"), SINGLE_CELLS)
def test_a_cell_of_the_page(name, position):
    assert failures([(name, position, "saner")]) == []


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method):
    """A transformation in every place but behind, a wrapper around, and a schedule of the radius."""
    cells = [("trace", position) for position in ("before", "stage 1", "combination")]
    cells += [("inject_hyperparams", "around"), ("linear_schedule", "rho")]
    assert failures((*cell, method) for cell in cells) == []


def test_schedules():
    cells = [(name, "rho") for name in list(SCHEDULES)[::4]]
    cells += [("linear_schedule", position) for position in columns("linear_schedule")]
    assert failures((*cell, "saner") for cell in cells) == []


def test_what_is_an_exception_with_one_method():
    exceptions = [
        (*cell, method) for cell, methods in WITH_ONE_METHOD.items() for method in methods
    ]
    assert failures(exceptions) == []


@pytest.mark.parametrize("name", [*SAMPLE, *BACKWARDS])
def test_backwards_is_what_turns_the_gradient_around(name):
    """Not more, and not less, than what the page warns of."""
    assert is_direction_as_said(name)


def test_clean_gradients_in_place_of_what_stands_before():
    """The remedy of the page: SANER then compares with the gradient itself."""
    step = dataclasses.replace(steps()[1], params=jax.tree.map(jnp.array, steps()[1].params))
    tx = optax.chain(optax.scale(2.0), METHODS["saner"](RHO))
    arguments = {"loss_fn": step.objective, "clean_grads": step.gradients}
    actual, _ = tx.update(step.gradients, tx.init(step.params), step.params, **arguments)
    hand = ByHand("sam")
    perturbed = flat(hand.direction(step, optax.tree.scale(2.0, step.gradients)))
    ratio = perturbed / flat(step.gradients)
    expected = jnp.where((ratio > 0) & (ratio < 1), 0.5, 1.0) * perturbed
    assert jnp.allclose(flat(actual), expected, atol=1e-12)
    without, _ = tx.update(
        step.gradients, tx.init(step.params), step.params, loss_fn=step.objective
    )
    assert not jnp.allclose(flat(without), expected, atol=1e-6)


def test_what_the_page_says_to_write_for_lookahead():
    method, lookahead = METHODS["sam"](RHO), optax.lookahead(optax.sgd(0.1), 2, 0.5)
    params = optax.LookaheadParams.init_synced(steps()[0].params)
    method_state, opt_state = method.init(params.fast), lookahead.init(params)
    hand, actual, expected = ByHand("sam"), [], []
    for step in steps():
        params = optax.LookaheadParams.init_synced(jax.tree.map(jnp.array, step.params))
        direction, method_state = method.update(
            step.gradients, method_state, params.fast, loss_fn=step.objective
        )
        updates, opt_state = lookahead.update(direction, opt_state, params)
        actual.append(updates.fast)
        expected.append(descend(hand.direction(step)))
    expected[1] = jax.tree.map(lambda leaf: 0.5 * leaf, expected[1])  # synchronized at half way
    assert distance(actual, expected) < 1e-12


def test_every_cell_has_a_word_and_every_note_is_used():
    texts = [
        text_of(n, position) for names in TABLES.values() for n in names for position in columns(n)
    ]
    assert {text.split(" ")[0] for text in texts} == {
        "right",
        "refused",
        "backwards",
        "undefined",
        "–",
    }
    used = {
        key
        for names in TABLES.values()
        for n in names
        for position in columns(n)
        for key in notes(n, position)
    }
    assert used == set(NOTES)
