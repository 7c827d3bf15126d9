"""Masks: trees of bools, prefixes and functions, and their errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from optax_sam import Objective
from optax_sam._masks import freeze_where_not, keep_where, resolve_mask
from tests.problems import apply_mlp, examples, mlp_parameters

PARAMS = {"body": {"kernel": jnp.ones(2), "scale": jnp.ones(3)}, "head": jnp.ones(1)}
ONLY_SCALE = {"body": {"kernel": False, "scale": True}, "head": False}


def resolve(mask):
    return resolve_mask("mask", mask, PARAMS)


def test_none_is_everything():
    assert all(jax.tree.leaves(resolve(None)))
    chex.assert_trees_all_equal_structs(resolve(None), PARAMS)


@pytest.mark.parametrize(
    "mask",
    [
        ONLY_SCALE,
        lambda params: ONLY_SCALE,
        jax.tree.map(np.bool_, ONLY_SCALE),
        lambda params: jax.tree_util.tree_map_with_path(lambda p, _: "scale" in str(p), params),
    ],
    ids=["tree", "function", "numpy", "paths"],
)
def test_trees_and_functions(mask):
    assert resolve(mask) == ONLY_SCALE
    assert all(type(flag) is bool for flag in jax.tree.leaves(resolve(mask)))


def test_prefixes():
    assert resolve({"body": True, "head": False}) == {
        "body": {"kernel": True, "scale": True},
        "head": False,
    }


def test_masks_of_other_trees_are_refused():
    with pytest.raises(ValueError, match=r"mask does not match the parameters.*PyTreeDef.*prefix"):
        resolve({"body": True})
    with pytest.raises(ValueError, match="mask does not match the parameters"):
        resolve({"body": True, "head": {"more": True}})


@pytest.mark.parametrize(
    "mask",
    [False, True, np.True_, jnp.array(True), np.ones(3, bool), lambda params: True],
    ids=["False", "True", "numpy", "jax", "array", "function"],
)
def test_one_bool_for_all_is_refused(mask):
    """It is what ``inject_hyperparams`` makes of a function, which it takes for a schedule."""
    message = r"mask must be a pytree.*leave it out.*static_args=\('mask',\)"
    with pytest.raises(TypeError, match=message):
        resolve(mask)


@pytest.mark.parametrize(
    "flag", [1, 0.0, "yes", jnp.array(True)], ids=["int", "float", "str", "jax"]
)
def test_flags_must_be_bools(flag):
    with pytest.raises(TypeError, match=r"mask must be a pytree of Python bools, got a leaf"):
        resolve({"body": True, "head": flag})


def test_a_traced_mask_says_that_masks_are_static():
    with pytest.raises(TypeError, match=r"build them outside of jit"):
        jax.jit(lambda flag: resolve({"body": flag, "head": True}))(True)


def test_an_error_inside_the_function_is_not_disguised():
    def broken(params):
        raise KeyError("no such layer")

    with pytest.raises(KeyError, match="no such layer"):
        resolve(broken)


def test_keep_and_freeze():
    kept = keep_where(ONLY_SCALE, PARAMS)
    assert float(kept["body"]["kernel"].sum() + kept["head"].sum()) == 0.0
    assert kept["body"]["scale"].tolist() == [1.0] * 3

    def loss(params):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(freeze_where_not(ONLY_SCALE, params)))

    gradient = jax.grad(loss)(PARAMS)
    chex.assert_trees_all_equal(gradient, kept)
    assert float(loss(PARAMS)) == 6.0  # the value is the same


@pytest.mark.parametrize("method", [optax_sam.sam, optax_sam.asam, optax_sam.saner])
def test_masked_leaves_are_neither_perturbed_nor_counted(method):
    """Only normalization scales perturbed: epsilon has length rho on those leaves alone."""

    def loss_fn(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    tx = method(0.5, mask=ONLY_SCALE)
    gradients = jax.grad(loss_fn)(PARAMS)
    updates, state = tx.update(gradients, tx.init(PARAMS), PARAMS, loss_fn=loss_fn)
    metrics = optax_sam.get_metrics(state)
    np.testing.assert_allclose(metrics["gradient_norm"], 12**0.5, rtol=1e-6)
    # The gradient of the sum of squares is twice the point, so it shows where the loss was taken.
    moved = jax.tree.map(lambda update: float(np.abs(update / 2 - 1).max()), updates)
    assert moved["body"]["kernel"] == moved["head"] == 0.0
    assert moved["body"]["scale"] > 0.1
    # A frozen leaf still gets its gradient, at the perturbed point.
    np.testing.assert_allclose(updates["head"], 2.0)


@pytest.mark.parametrize(
    "every",
    [lambda params: jax.tree.map(lambda _: False, params), {"body": False, "head": False}],
    ids=["function", "prefix"],
)
def test_a_mask_of_nothing_is_refused(every):
    def loss_fn(params):
        return sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(params))

    tx = optax_sam.sam(0.5, mask=every)
    with pytest.raises(ValueError, match=r"mask excludes every parameter.*use the optimizer alone"):
        tx.update(jax.grad(loss_fn)(PARAMS), tx.init(PARAMS), PARAMS, loss_fn=loss_fn)


@pytest.mark.parametrize("group_size", [None, 1])
def test_a_gradient_that_is_handed_on_is_refused_on_some_leaves_only(group_size):
    """optax.masked leaves it where its mask is False; a stage that climbs by the gradient is meant."""
    params, objective = mlp_parameters(), Objective(apply_mlp, *examples())
    grads = jax.grad(objective)(params)
    only_bias = {name: name == "bias" for name in params}

    def step(stage, mask=None):
        tx = optax_sam.sharpness_aware(stage, group_size=group_size, mask=mask)
        return tx.update(grads, tx.init(params), params, loss_fn=objective)

    masked = optax.masked(optax_sam.normalized(0.1), only_bias)
    with pytest.raises(ValueError, match=r"passes on the gradient of \['first'\]"):
        step(masked)
    step(masked, only_bias)  # what is handed on is perturbed nowhere
    _, state = step(optax.identity())
    norm = float(optax.tree.norm(grads))
    climbed = float(optax_sam.get_metrics(state)["perturbation_norm"])
    assert climbed >= norm if group_size else climbed == pytest.approx(norm)
