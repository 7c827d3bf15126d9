"""Loss scaling: derivatives that survive float16 and come out unscaled."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import dynamic_scale

import optax_sam
from optax_sam import Objective, loss_scaled
from tests.problems import apply_mlp, examples, mlp_parameters

RHO = 0.3
SCALE = 2.0**15
TINY = 1e-7  # of the loss: its derivatives are below float16's smallest number


def apply_half(params, inputs):
    """The network in float16 with parameters in float32, as mixed precision has it."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), (params, inputs))
    return apply_mlp(*half)


def loss(logits, labels):
    wide = logits.astype(jnp.float32)
    return TINY * optax.softmax_cross_entropy_with_integer_labels(wide, labels)


def half_objective(**options):
    return Objective(apply_half, *examples(), loss, **options)


def wide_objective(**options):
    return Objective(apply_mlp, *examples(), loss, **options)


def as_function(objective):
    return lambda params: objective(params)


def as_function_with_aux(objective):
    return lambda params: (objective(params), {"anything": objective.labels})


def assert_follows(actual, expected):
    """Equal up to the rounding of float16."""
    size = float(optax.tree.norm(expected))
    assert size > 0
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, actual, expected))
    assert float(difference) < 1e-2 * size


def is_zero(tree):
    return all(not leaf.any() for leaf in jax.tree.leaves(tree))


def direction(tx, loss_fn):
    """The method's direction from a clean gradient that is right."""
    params = mlp_parameters()
    grads = jax.grad(wide_objective())(params)
    return tx.update(grads, tx.init(params), params, loss_fn=loss_fn)[0]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "kind", [lambda o: o, as_function, as_function_with_aux], ids=["objective", "function", "aux"]
)
def test_audit_1_3_value_and_gradient(kind, traced):
    loss_fn, params = kind(half_objective()), mlp_parameters()
    has_aux = kind is as_function_with_aux
    plain = jax.grad(loss_fn, has_aux=has_aux)(params)
    assert is_zero(plain[0] if has_aux else plain)

    def scaled(scale):
        return jax.value_and_grad(loss_scaled(loss_fn, scale), has_aux=has_aux)(params)

    value, grads = jax.jit(scaled)(SCALE) if traced else scaled(SCALE)
    if has_aux:
        value, aux = value
        chex.assert_trees_all_equal(aux, {"anything": examples()[1]})
    np.testing.assert_allclose(value, wide_objective()(params), rtol=1e-2)  # not scaled
    assert_follows(grads, jax.grad(wide_objective())(params))
    chex.assert_trees_all_equal_dtypes(grads, params)


METHODS = {
    "sam": optax_sam.sam,
    "jsam": optax_sam.jsam,
    "lsam": optax_sam.lsam,
    "several steps": functools.partial(optax_sam.sam, ascent_steps=2),
    "a part of the batch": functools.partial(optax_sam.sam, ascent_fraction=0.5),
    "ncsam": functools.partial(optax_sam.ncsam, kappa=0.5, flip_ratio=0.5, deterministic=True),
    "one by one": functools.partial(optax_sam.sam, group_size=1),
    "groups": functools.partial(optax_sam.sam, group_size=4),
    "jsam one by one": functools.partial(optax_sam.jsam, group_size=1),
    "lsam in groups": functools.partial(optax_sam.lsam, group_size=4),
    "groups by themselves": lambda rho: optax_sam.vasso(rho, group_size=4),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:group_size=4 differentiates")
def test_audit_1_3_every_gradient_of_a_method(name):
    """With Flax's DynamicScale and the loss as it is, g' underflowed to zeros."""
    tx = METHODS[name](RHO)
    expected = direction(tx, wide_objective())
    assert is_zero(direction(tx, half_objective()))
    assert_follows(direction(tx, loss_scaled(half_objective(), SCALE)), expected)


@pytest.mark.parametrize("kind", [as_function, as_function_with_aux], ids=["function", "aux"])
def test_functions_in_a_method(kind):
    actual = direction(optax_sam.sam(RHO), loss_scaled(kind(half_objective()), SCALE))
    assert_follows(actual, direction(optax_sam.sam(RHO), wide_objective()))


@pytest.mark.parametrize("name", ["sam", "jsam", "lsam"])
@pytest.mark.parametrize(
    "options",
    [
        {"microbatch_size": 2},
        {"weights": jnp.arange(8.0)},
        {
            "penalty": lambda p: (
                TINY * jnp.sum(p["second"].astype(jnp.float16) ** 2).astype(jnp.float32)
            )
        },
    ],
    ids=["microbatches", "weights", "penalty"],
)
def test_the_other_parts_of_an_objective(name, options):
    tx = METHODS[name](RHO)
    actual = direction(tx, loss_scaled(half_objective(**options), SCALE))
    if "penalty" in options:
        options = {"penalty": lambda p: TINY * jnp.sum(p["second"] ** 2)}
    assert_follows(actual, direction(tx, wide_objective(**options)))


def test_a_scale_that_is_no_power_of_two(x64):
    """Its reciprocal in float32 is wrong in the eighth digit."""
    grads = jax.grad(loss_scaled(lambda w: jnp.sum(w**3), 1000.0))(jnp.array([0.1, 0.7]))
    np.testing.assert_allclose(grads, [0.03, 1.47], rtol=1e-15)


def test_a_scale_of_one_changes_nothing():
    for objective in (wide_objective(), as_function(wide_objective())):
        params = mlp_parameters()
        chex.assert_trees_all_equal(
            jax.grad(loss_scaled(objective, 1))(params), jax.grad(objective)(params)
        )


def test_the_scale_is_a_leaf_of_an_objective():
    """A dynamic scale changes without a new trace."""
    traces = []

    @jax.jit
    def value(objective):
        traces.append(1)
        return objective(mlp_parameters())

    for scale in (2.0, 4.0):
        value(loss_scaled(wide_objective(), jnp.float32(scale)))
    assert len(traces) == 1


def test_audit_1_3_flax_dynamic_scale():
    """The loop of the documentation: a scale that overflows is halved, and then the steps are right."""
    tx = optax.chain(optax_sam.sam(RHO), optax.sgd(1e5))

    @jax.jit
    def step(scaler, params, state):
        objective = half_objective()
        scaler, is_finite, _, grads = scaler.value_and_grad(objective)(params)
        loss_fn = loss_scaled(objective, scaler.scale)
        updates, new_state = tx.update(grads, state, params, loss_fn=loss_fn)
        new = optax.apply_updates(params, updates)
        select = functools.partial(jnp.where, is_finite)
        params, state = jax.tree.map(select, (new, new_state), (params, state))
        return scaler, params, state, is_finite

    params = expected = mlp_parameters()
    scaler, state = dynamic_scale.DynamicScale(scale=2.0**44), tx.init(params)
    finite = []
    for _ in range(30):
        scaler, params, state, is_finite = step(scaler, params, state)
        finite.append(bool(is_finite))
    assert not finite[0]
    assert finite[-1]
    expected_state = tx.init(expected)
    for _ in range(sum(finite)):
        grads = jax.grad(wide_objective())(expected)
        updates, expected_state = tx.update(
            grads, expected_state, expected, loss_fn=wide_objective()
        )
        expected = optax.apply_updates(expected, updates)
    moved = jax.tree.map(jnp.subtract, expected, mlp_parameters())
    assert_follows(jax.tree.map(jnp.subtract, params, mlp_parameters()), moved)


def test_apply_if_finite_behind_a_method_sees_the_perturbed_gradient():
    """The clean gradient is finite here and the perturbed one is not."""

    def loss_fn(w):
        return -jnp.sum(jnp.sqrt(1.05 - w))

    w = jnp.array([1.0])
    grads = jax.grad(loss_fn)(w)
    assert jnp.isfinite(grads).all()
    tx = optax.chain(optax_sam.sam(0.1), optax.apply_if_finite(optax.sgd(0.1), 3))
    updates, state = tx.update(grads, tx.init(w), w, loss_fn=loss_fn)
    assert not state[1].last_finite
    assert updates.tolist() == [0.0]
    small = optax.chain(optax_sam.sam(0.01), optax.apply_if_finite(optax.sgd(0.1), 3))
    _, state = small.update(grads, small.init(w), w, loss_fn=loss_fn)
    assert state[1].last_finite


@pytest.mark.parametrize("scale", [0.0, -2.0, float("inf"), float("nan"), jnp.float32(0)], ids=str)
def test_scales_out_of_range(scale):
    with pytest.raises(ValueError, match=r"scale must .*got"):
        loss_scaled(wide_objective(), scale)


def test_what_is_no_scale_or_loss():
    with pytest.raises(TypeError, match="scale must be a number, got '2'"):
        loss_scaled(wide_objective(), "2")
    with pytest.raises(ValueError, match=r"scale must be a scalar, got an array of shape \(1,\)"):
        loss_scaled(wide_objective(), jnp.ones(1))
    with pytest.raises(TypeError, match=r"loss_fn must be callable, got 3\."):
        loss_scaled(3, 2.0)
