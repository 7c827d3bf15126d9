"""The composition matrix: a part of it in every run; ``tests.composition.page`` runs all of it."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.composition import inventory
from tests.composition.by_hand import METHODS, RHO, ByHand, descend, distance, flat, steps
from tests.composition.cells import is_slow
from tests.composition.inventory import ROWS, SCHEDULES
from tests.composition.page import TABLES, cells, check, columns, text_of
from tests.composition.verdicts import BACKWARDS, NOTES, verdict

pytestmark = pytest.mark.usefixtures("x64")

# One of each kind, with every method.
REPRESENTATIVES = ("trace", "inject_hyperparams")


def failures(methods, names):
    """What is not as expected, one line each."""
    results = {cell: check(*cell) for cell in cells(methods, names)}
    return [f"{cell}: {reason}" for cell, reason in results.items() if reason]


def test_everything_that_optax_exports_is_in_the_matrix():
    """A new release of optax shows up here: give the name a row, or say that it is none."""
    assert inventory.unclassified() == []


def test_nothing_in_the_matrix_has_gone():
    exported = {*inventory.exported()}
    named = {name.split(" (")[0].split(".gradient")[0] for name in ROWS}
    assert named | {*SCHEDULES} | inventory.NOT_TRANSFORMATIONS <= exported | {*inventory.ALIASES}


def test_an_unknown_export_would_show_up(monkeypatch):
    def scale_by_something_new():
        return optax.identity()

    monkeypatch.setattr(optax, "scale_by_something_new", scale_by_something_new, raising=False)
    assert inventory.unclassified() == ["scale_by_something_new"]


@pytest.mark.parametrize("name", [name for name in ROWS if not is_slow(name)])
def test_with_saner(name):
    assert failures(["saner"], [name]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ROWS if is_slow(name)])
def test_what_loops_or_branches_with_saner(name):
    assert failures(["saner"], [name]) == []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_one_of_each_kind(method):
    assert failures([method], [*REPRESENTATIVES, "linear_schedule"]) == []


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    assert failures(["saner"], [name]) == []


def climbs(name):
    """How far what a transformation makes of the gradients points along them."""
    with jax.disable_jit(is_slow(name)):
        tx = optax.with_extra_args_support(ROWS[name].make())
        state, along = tx.init(steps()[0].params), 0.0
        for step in (steps()[0],) * 2:  # schedule_free also answers to parameters that move
            gradients = step.gradients_per_example if ROWS[name].per_example else step.gradients
            updates, state = tx.update(
                gradients,
                state,
                step.params,
                loss_fn=step.objective,
                **step.extra(ROWS[name].extra),
            )
            along += float(jnp.vdot(flat(updates), flat(step.gradients)))
    return along


@pytest.mark.parametrize(
    "name", [name for name, row in ROWS.items() if row.kind != "wrapper" and not is_slow(name)]
)
def test_backwards_is_what_turns_the_gradient_around(name):
    """Not more, and not less, than what the page warns of."""
    is_backwards = ROWS[name].kind == "optimizer" or name in BACKWARDS
    assert climbs(name) < 0 if is_backwards else climbs(name) >= 0
    assert verdict(name, "before")[0] == ("backwards" if is_backwards else "right")


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
        verdict(n, position)[1]
        for names in TABLES.values()
        for n in names
        for position in columns(n)
    }
    assert used - {None} == set(NOTES)
