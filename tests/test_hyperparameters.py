"""Numbers that may be schedules: what is checked, what is counted, what is traced."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from optax_sam import _hyperparameters
from optax_sam._checks import check_callable
from optax_sam._hyperparameters import Hyperparameter, ScheduleState, check_number


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


KINDS = {
    "python": lambda value: value,
    "numpy": np.float32,
    "numpy array": lambda value: np.asarray(value, np.float64),
    "jax": jnp.float32,
    "bfloat16": lambda value: jnp.asarray(value, jnp.bfloat16),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@every_kind
def test_bounds_hold_for_every_kind_of_scalar(kind):
    check = functools.partial(check_number, "x", minimum=0, maximum=1)
    for inside in (0, 0.5, 1):
        check(kind(inside))
    for outside in (-0.5, 2, math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"x must lie in \[0, 1\], got {outside:g}"):
            check(kind(outside))
    for at, bounds, interval in [
        (0, {"exclusive_minimum": True}, r"\(0, 1\]"),
        (1, {"exclusive_maximum": True}, r"\[0, 1\)"),
    ]:
        check(kind(0.5), **bounds)
        check(kind(1 - at), **bounds)
        with pytest.raises(ValueError, match=f"x must lie in {interval}, got {at}"):
            check(kind(at), **bounds)


@every_kind
def test_numbers_without_bounds_are_finite(kind):
    check_number("sigma", kind(-3))
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"sigma must lie in \(-inf, inf\), got {value}"):
            check_number("sigma", kind(value))


@pytest.mark.parametrize(
    "value",
    [
        None,
        "0.1",
        True,
        1j,
        [0.1],
        {"rho": 0.1},
        np.True_,
        np.complex64(1),
        jnp.array(True),
        jnp.array(1j),
    ],
    ids=repr,
)
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match=re.escape(f"rho must be a number, got {value!r}")):
        check_number("rho", value)
    with pytest.raises(
        TypeError, match=re.escape(f"rho must be a number or a schedule, got {value!r}")
    ):
        Hyperparameter("rho", value)


@pytest.mark.parametrize(
    "array", [jnp.ones(3), np.ones((3, 1)), jnp.ones(1)], ids=["3", "3x1", "1"]
)
def test_arrays_are_no_scalars(array):
    message = re.escape(f"rho must be a scalar, got an array of shape {array.shape}. A remedy.")
    with pytest.raises(ValueError, match=message):
        check_number("rho", array, remedy="A remedy.")
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda rho: check_number("rho", rho, remedy="A remedy."))(array)


def test_traced_values_pass_if_they_are_numbers():
    """Under inject_hyperparams in jit the value is a tracer: Python comparisons on it would fail."""
    jax.jit(lambda rho: check_number("rho", rho, minimum=0))(-1.0)
    with pytest.raises(TypeError, match="rho must be a number"):
        jax.jit(lambda rho: check_number("rho", rho, minimum=0))(True)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_schedule_returns_a_scalar(jit):
    params, loss_fn = jnp.array([1.0, -2.0]), lambda w: jnp.sum(w**4)

    def update(schedule):
        tx = optax_sam.sam(schedule)
        return tx.update(jax.grad(loss_fn)(params), tx.init(params), params, loss_fn=loss_fn)

    def run(schedule):
        return jax.jit(lambda: update(schedule))() if jit else update(schedule)

    run(lambda count: 0.1)
    run(lambda count: 1)
    message = r"what the schedule of rho returns must be a scalar, got an array of shape \(1,\)"
    with pytest.raises(ValueError, match=message):
        run(lambda count: jnp.full(1, 0.1))
    with pytest.raises(
        TypeError, match="what the schedule of rho returns must be a number, got None"
    ):
        run(lambda count: None)


WRONG = [
    (optax_sam.sam, {"rho": -0.5}, r"rho must lie in \[0, inf\), got -0\.5"),
    (optax_sam.sam, {"rho": math.inf}, r"rho must lie in \[0, inf\), got inf"),
    (optax_sam.asam, {"rho": 0.1, "eta": -1.0}, r"eta must lie in \[0, inf\), got -1\.0"),
    (optax_sam.asam, {"rho": math.nan}, r"rho must lie in \[0, inf\), got nan"),
    (
        optax_sam.saner,
        {"rho": 0.05, "alpha": 3.0},
        r"alpha must lie in \[0, 1\], got 3\.0.*0 is SAM",
    ),
    (optax_sam.saner, {"ratio_epsilon": -1.0}, r"ratio_epsilon must lie in \[0, inf\), got -1\.0"),
    (optax_sam.gsam, {"alpha": math.inf}, r"alpha must lie in \(-inf, inf\), got inf"),
    (optax_sam.friendly_sam, {"sigma": math.nan}, r"sigma must lie in \(-inf, inf\), got nan"),
    (optax_sam.friendly_sam, {"decay": 2.0}, r"decay must lie in \[0, 1\], got 2\.0"),
    (optax_sam.vasso, {"theta": 0.0}, r"theta must lie in \(0, 1\], got 0\.0.*never change"),
    (optax_sam.wsam, {"gamma": 1.0}, r"gamma must lie in \[0, 1\), got 1\.0"),
    (
        functools.partial(optax_sam.looksam, every_k=5),
        {"norm_epsilon": -1.0},
        r"norm_epsilon must lie in \[0, inf\), got -1\.0",
    ),
    (
        functools.partial(optax_sam.looksam, every_k=5),
        {"alpha": -0.5},
        r"alpha must lie in \[0, inf\)",
    ),
    (optax_sam.msam, {"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1\.0"),
    (optax_sam.project_to_ball, {"rho": -0.5}, r"rho must lie in \[0, inf\), got -0\.5"),
    (
        optax_sam.add_noise_compensation,
        {"strength": math.inf},
        r"strength must lie in \(-inf, inf\)",
    ),
]


@every_kind
@pytest.mark.parametrize(("factory", "arguments", "message"), WRONG)
def test_ranges_of_the_methods(factory, arguments, message, kind):
    with pytest.raises(ValueError, match=message):
        factory(**{name: kind(value) for name, value in arguments.items()})


@pytest.mark.parametrize(("factory", "arguments", "message"), WRONG)
def test_ranges_under_inject_hyperparams(factory, arguments, message):
    """Eagerly the injected values are concrete JAX arrays, and a later change is seen too."""
    if isinstance(factory, functools.partial):
        # every_k would be injected, so it is bound here.
        factory = lambda norm_epsilon=0.0, alpha=0.7: optax_sam.looksam(  # noqa: E731
            0.05, every_k=5, norm_epsilon=norm_epsilon, alpha=alpha
        )
    if factory is optax_sam.add_noise_compensation:
        factory = lambda strength: optax_sam.add_noise_compensation(strength)  # noqa: E731
    tx = optax.inject_hyperparams(factory)(**arguments)
    with pytest.raises(ValueError, match=message):
        tx.init(jnp.ones(2))


def test_an_injected_value_that_is_changed_is_checked_again():
    params, loss_fn = jnp.array([1.0, -2.0]), lambda w: jnp.sum(w**4)
    tx = optax.inject_hyperparams(optax_sam.sam)(rho=0.1)
    state = tx.init(params)
    state.hyperparams["rho"] = jnp.float32(-0.5)
    with pytest.raises(ValueError, match=r"rho must lie in \[0, inf\), got -0\.5"):
        tx.update(jax.grad(loss_fn)(params), state, params, loss_fn=loss_fn)


def test_integers():
    check = _hyperparameters.check_integer
    for value in (3, np.int64(3), np.uint8(3)):
        checked = check("every_k", value, minimum=1)
        assert checked == 3
        assert type(checked) is int
    for value in (0, np.int32(0)):
        with pytest.raises(ValueError, match="every_k must be at least 1, got 0"):
            check("every_k", value, minimum=1)
    for bad in (2.0, True, "2", None, np.float32(2), np.True_, np.array(2)):
        with pytest.raises(TypeError, match=re.escape(f"every_k must be an integer, got {bad!r}")):
            check("every_k", bad, minimum=1)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["concrete", "traced"])
def test_jax_integers_are_not_static(transform):
    message = (
        r"every_k must be an integer that is known .* int\(every_k\).*static_args=\('every_k',\)"
    )
    with pytest.raises(TypeError, match=message):
        transform(lambda value: _hyperparameters.check_integer("every_k", value, minimum=1))(
            jnp.array(2)
        )


def test_callables():
    assert check_callable("loss_fn", abs, "") is abs
    with pytest.raises(TypeError, match=r"loss_fn must be callable, got 3\. Pass a loss\."):
        check_callable("loss_fn", 3, "Pass a loss.")
