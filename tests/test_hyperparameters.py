"""Numbers that may be schedules: what is checked, what is counted, what is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from optax_sam import _hyperparameters
from optax_sam._hyperparameters import Hyperparameter, ScheduleState, check_callable, check_number


def test_a_count_is_kept_only_for_a_schedule():
    for value in (0.1, 1, jnp.array(0.1), np.float32(0.1)):
        hyperparameter = Hyperparameter("rho", value)
        state = hyperparameter.init()
        assert state == optax.EmptyState()
        read, state = hyperparameter.read(state, jnp.float32)
        np.testing.assert_allclose(read, value)
        assert state == optax.EmptyState()
    hyperparameter = Hyperparameter("rho", lambda count: 0.5 * count)
    state = hyperparameter.init()
    assert isinstance(state, ScheduleState)
    assert state.count.dtype == jnp.int32
    values = []
    for _ in range(3):
        value, state = hyperparameter.read(state, jnp.float32)
        values.append(float(value))
    assert values == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("value", [0.5, 1, lambda count: 0.5, lambda count: count])
def test_values_have_the_asked_dtype(value, dtype):
    hyperparameter = Hyperparameter("rho", value)
    assert hyperparameter.read(hyperparameter.init(), dtype)[0].dtype == dtype


def test_the_count_saturates():
    hyperparameter = Hyperparameter("rho", lambda count: count)
    largest = jnp.iinfo(jnp.int32).max
    _, state = hyperparameter.read(ScheduleState(jnp.array(largest, jnp.int32)), jnp.float32)
    assert int(state.count) == largest


@pytest.mark.parametrize("value", [-0.1, -1, float("nan"), -float("inf")])
def test_numbers_below_the_minimum(value):
    with pytest.raises(ValueError, match=r"rho must lie in \[0, inf\), got .*Use a radius\."):
        check_number("rho", value, minimum=0, remedy="Use a radius.")


def test_bounds_are_inclusive_unless_asked():
    check_number("alpha", 1, minimum=0, maximum=1)
    check_number("alpha", 0.0, minimum=0, maximum=1)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 1\.01"):
        check_number("alpha", 1.01, minimum=0, maximum=1)
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\), got 1"):
        check_number("gamma", 1, minimum=0, maximum=1, exclusive_maximum=True)


@pytest.mark.parametrize("value", [None, "0.1", True])
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match=f"rho must be a number or a schedule, got {value!r}"):
        check_number("rho", value)


@pytest.mark.parametrize("value", [[0.1], {"rho": 0.1}, object()], ids=["list", "dict", "object"])
def test_containers_are_no_numbers(value):
    with pytest.raises(TypeError, match="rho must be a number or a schedule"):
        check_number("rho", value)


def test_traced_values_are_let_through():
    """Under inject_hyperparams the value is an array: Python comparisons on it would fail."""
    jax.jit(lambda rho: check_number("rho", rho, minimum=0))(-1.0)


@pytest.mark.parametrize("method", [optax_sam.sam, optax_sam.asam, optax_sam.saner])
def test_a_schedule_advances_once_per_update(method):
    radii = jnp.array([0.1, 0.2, 0.4])
    tx = method(lambda count: radii[count], mask=None)
    params, loss_fn = jnp.array([1.0, -2.0]), lambda w: jnp.sum(w**4)
    state = tx.init(params)
    norms = []
    for _ in range(3):
        _, state = tx.update(jax.grad(loss_fn)(params), state, params, loss_fn=loss_fn)
        norms.append(float(optax.tree.get(state, "perturbation_norm")))
    np.testing.assert_allclose(np.divide(norms, norms[0]), [1, 2, 4], rtol=1e-5)


def test_integers():
    check = _hyperparameters.check_integer
    check("every_k", 3, minimum=1)
    with pytest.raises(ValueError, match="every_k must be at least 1, got 0"):
        check("every_k", 0, minimum=1)
    for bad in (2.0, True, "2", None):
        with pytest.raises(TypeError, match=f"every_k must be a Python integer, got {bad!r}"):
            check("every_k", bad, minimum=1)
    with pytest.raises(TypeError, match=r"static_args=\('every_k',\)"):
        check("every_k", jnp.array(2), minimum=1)


def test_callables():
    assert check_callable("loss_fn", abs, "") is abs
    with pytest.raises(TypeError, match=r"loss_fn must be callable, got 3\. Pass a loss\."):
        check_callable("loss_fn", 3, "Pass a loss.")
