"""The composition matrix: every optax wrapper with every method works, or raises what is said here."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from tests.registry import METHODS, objective

RHO = 0.1
NAMED = [name for name in METHODS if hasattr(optax_sam, name)]

# Where every method would compile anew: one with a combination, one with another evaluation.
SOME = ("saner", "jsam")


def matrix(names, common):
    """Pairs of a name and a method: every method for the common names, some for the others."""
    return [(name, method) for name in names for method in (NAMED if name in common else SOME)]


def make(method, **options):
    return METHODS[method].make(RHO, **options)


@functools.cache
def batches():
    """Objectives of three batches."""
    return [objective(seed=seed)[1] for seed in range(3)]


def start():
    return objective()[0]


@functools.cache
def gradients(step):
    """Clean gradients of the first steps, all at the same parameters."""
    return jax.grad(batches()[step])(start())


@functools.cache
def directions(method):
    """What the bare method makes of the three gradients, one after the other."""
    tx, params, results = make(method), start(), []
    state = tx.init(params)
    for step in range(3):
        direction, state = tx.update(gradients(step), state, params, loss_fn=batches()[step])
        results.append(direction)
    return results


def precomputed():
    """Stands in for a method: its output is the extra argument ``direction``."""

    def update(updates, state, params=None, *, direction=None, **extra_args):
        del updates, params, extra_args
        return direction, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def updates_of(tx, method=None, steps=2, **extra):
    """The updates of some steps; with a method, its precomputed directions replace it."""
    if isinstance(tx, optax.GradientTransformation):  # MultiSteps is none
        tx = optax.with_extra_args_support(tx)
    params = start()
    state, results = tx.init(params), []
    for step in range(steps):
        arguments = {name: value(step) for name, value in extra.items()}
        arguments["loss_fn"] = batches()[step]
        if method is not None:
            arguments["direction"] = directions(method)[step]
        updates, state = tx.update(gradients(step), state, params, **arguments)
        results.append(updates)
    return results


def assert_close(left, right):
    chex.assert_trees_all_close(left, right, rtol=2e-5, atol=1e-6)


def loss_at_start(step):
    return batches()[step](start())


def value_fn(params, loss_fn, direction=None):
    """What a linesearch calls: it must take every extra argument of the chain."""
    del direction
    return loss_fn(params)


# Optimizers behind the method, with the extra arguments that they need themselves. The composition
# matrix has all of them; here are those that look at more than the direction.
BEHIND = {
    "sgd": (lambda: optax.sgd(0.1, momentum=0.9, nesterov=True), {}),
    "muon": (lambda: optax.contrib.muon(0.1), {}),
    "prodigy": (lambda: optax.contrib.prodigy(), {}),
    "masked": (
        lambda: optax.chain(
            optax.masked(
                optax.add_decayed_weights(0.1), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
            ),
            optax.sgd(0.1),
        ),
        {},
    ),
    "reduce_on_plateau": (
        lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(0.5, patience=1)),
        {"value": loss_at_start},
    ),
    "momo": (lambda: optax.contrib.momo(0.1), {"value": loss_at_start}),
    "polyak_sgd": (lambda: optax.polyak_sgd(0.1), {"value": loss_at_start}),
    "lbfgs without linesearch": (lambda: optax.lbfgs(0.1, linesearch=None), {}),
    "lbfgs": (
        lambda: optax.lbfgs(),
        {
            "value": loss_at_start,
            "grad": gradients,
            "value_fn": lambda step: value_fn,
        },
    ),
    "backtracking linesearch": (
        lambda: optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5)),
        {
            "value": loss_at_start,
            "grad": gradients,
            "value_fn": lambda step: value_fn,
        },
    ),
}


@pytest.mark.parametrize(("name", "method"), matrix(BEHIND, ()))
def test_optimizers_behind(name, method):
    """They receive the sharpness-aware direction, and their own extra arguments."""
    build, extra = BEHIND[name]
    actual = updates_of(optax.chain(make(method), build()), **extra)
    assert_close(actual, updates_of(optax.chain(precomputed(), build()), method, **extra))


@pytest.mark.parametrize(
    "behind",
    [
        optax.lbfgs,
        lambda: optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5)),
    ],
    ids=["lbfgs", "backtracking"],
)
def test_a_linesearch_refuses_arguments_that_its_function_does_not_take(behind):
    """The remedy is a ``value_fn`` with an argument ``loss_fn``, as in the table above."""
    extra = {"value": loss_at_start, "grad": gradients, "value_fn": lambda step: batches()[step]}
    with pytest.raises(TypeError, match=r"not consumed by `value_fn`: \['loss_fn'\]"):
        updates_of(optax.chain(make("sam"), behind()), **extra)


def sgd_behind(first):
    return optax.chain(first, optax.sgd(0.1, momentum=0.9))


# Wrappers around a method and its optimizer. All forward loss_fn, and act as if the method's
# direction had come from outside.
AROUND = {
    "chain": lambda first: sgd_behind(first),
    "named_chain": lambda first: optax.named_chain(("first", first), ("sgd", optax.sgd(0.1))),
    "chain of chains": lambda first: optax.chain(optax.identity(), sgd_behind(first)),
    "apply_if_finite": lambda first: optax.apply_if_finite(sgd_behind(first), 3),
    "schedule_free": lambda first: optax.contrib.schedule_free(sgd_behind(first), 0.1),
    "mechanize": lambda first: optax.contrib.mechanize(sgd_behind(first)),
    "masked by everything": lambda first: optax.masked(sgd_behind(first), True),
    "partition into one": lambda first: optax.partition(
        {"all": sgd_behind(first)}, lambda _: "all"
    ),
    "MultiSteps of one": lambda first: optax.MultiSteps(sgd_behind(first), 1),
    "conditionally_transform": lambda first: optax.conditionally_transform(
        sgd_behind(first), lambda step: step >= 0
    ),
    "conditionally_mask": lambda first: optax.conditionally_mask(
        sgd_behind(first), lambda step: step >= 0
    ),
}


@pytest.mark.parametrize(("name", "method"), matrix(AROUND, {"chain"}))
def test_wrappers_around(name, method):
    wrap = AROUND[name]
    assert_close(updates_of(wrap(make(method))), updates_of(wrap(precomputed()), method))


@pytest.mark.parametrize("method", ["sam", "asam", "jsam", "lsam", "friendly_sam", "vasso", "msam"])
def test_what_stands_before_shapes_the_ascent_only(method):
    """Scaling the gradients changes neither the direction of the ascent nor the descent."""
    tx = optax.chain(optax.scale(0.5), sgd_behind(make(method)))
    assert_close(updates_of(tx), updates_of(sgd_behind(precomputed()), method))


@pytest.mark.parametrize("method", SOME)
def test_inject_hyperparams(method):
    """Numbers become traced state, and can be set between steps."""

    @optax.inject_hyperparams
    def build(rho, learning_rate):
        return optax.chain(METHODS[method].make(rho), optax.sgd(learning_rate, momentum=0.9))

    tx = build(rho=RHO, learning_rate=0.1)
    assert_close(updates_of(tx), updates_of(sgd_behind(precomputed()), method))


def test_injected_values_can_be_changed_between_steps():
    tx = optax.inject_hyperparams(optax_sam.sam)(rho=RHO)
    params = start()
    state = tx.init(params)
    for rho in (0.1, 0.3):
        state.hyperparams["rho"] = jnp.asarray(rho)
        _, state = tx.update(gradients(0), state, params, loss_fn=batches()[0])
        norm = optax_sam.get_metrics(state)["perturbation_norm"]
        np.testing.assert_allclose(norm, rho, rtol=1e-5)


@pytest.mark.parametrize("method", SOME)
def test_accumulation_behind_the_method(method):
    """The right order: every microbatch perturbs for itself, and directions are accumulated."""
    build = lambda first: optax.chain(  # noqa: E731
        first, optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    )
    actual = updates_of(build(make(method)), steps=2)
    first, second = directions(method)[:2]
    expected = jax.tree.map(lambda a, b: -0.1 * (a + b) / 2, first, second)
    assert not any(leaf.any() for leaf in jax.tree.leaves(actual[0]))
    assert_close(actual[1], expected)


@pytest.mark.parametrize("method", ["sam", "jsam"])
def test_accumulation_around_the_method_meets_only_the_last_microbatch(method):
    """As documented by optax's contract: the mean gradient, but one loss function.

    ``Objective(..., microbatch_size=)`` accumulates both passes; see the peer bugs.
    """
    tx = optax.MultiSteps(optax.chain(make(method), optax.sgd(0.1)), 2)
    actual = updates_of(tx, steps=2)[1]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, gradients(0), gradients(1))
    bare, params = make(method), start()
    direction, _ = bare.update(mean, bare.init(params), params, loss_fn=batches()[1])
    assert_close(actual, jax.tree.map(lambda d: -0.1 * d, direction))


@pytest.mark.parametrize("method", SOME)
def test_accumulation_that_drops_the_loss_says_so(method):
    """``MultiSteps(...).gradient_transformation()`` takes no extra arguments inside a chain."""
    wrapped = optax.MultiSteps(sgd_behind(make(method)), 2).gradient_transformation()
    with pytest.raises(TypeError, match=r"loss_fn=loss_fn\).*MultiSteps.*gradient_transformation"):
        updates_of(optax.chain(wrapped, optax.identity()))


@pytest.mark.parametrize("method", SOME)
def test_a_condition_that_does_not_hold(method):
    """conditionally_transform passes the gradients on (late SAM); conditionally_mask zeroes them."""
    late = optax.conditionally_transform(make(method), lambda step: step >= 1)
    first, _ = updates_of(late)
    assert_close(first, gradients(0))
    skipped, _ = updates_of(optax.conditionally_mask(make(method), lambda step: step >= 1))
    assert not any(leaf.any() for leaf in jax.tree.leaves(skipped))


@pytest.mark.parametrize("method", SOME)
def test_a_step_with_nan_gradients_is_skipped_by_apply_if_finite(method):
    tx = optax.apply_if_finite(sgd_behind(make(method)), 3)
    params = start()
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, gradients(0))
    updates, state = tx.update(bad, tx.init(params), params, loss_fn=batches()[0])
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    updates, _ = tx.update(gradients(0), state, params, loss_fn=batches()[0])
    assert_close(updates, updates_of(sgd_behind(make(method)), steps=1)[0])


MASK = {"hidden": {"kernel": True, "bias": False}, "out": {"kernel": True}}
LABELS = {"hidden": {"kernel": "kernel", "bias": "bias"}, "out": {"kernel": "kernel"}}


@pytest.mark.parametrize("method", SOME)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, MASK),
        lambda tx: optax.partition({"kernel": tx, "bias": optax.identity()}, LABELS),
    ],
    ids=["masked", "partition"],
)
def test_a_part_of_the_parameters_is_no_argument_of_the_loss(method, wrap):
    """``masked`` and ``partition`` around a method hide parameters: the error names ``mask=``."""
    with pytest.raises(TypeError, match=r"mask="):
        updates_of(wrap(make(method)))


@pytest.mark.parametrize("method", ["sam", "saner", "jsam"])
def test_partition_inside_of_stage_1(method):
    """Where it works: one radius for kernels and another for biases."""
    evaluation = {"jsam": optax_sam.jacobian_only}.get(method, optax_sam.full_gradient)
    stage = optax.partition(
        {"kernel": optax_sam.normalized(0.3), "bias": optax_sam.normalized(0.1)}, LABELS
    )
    tx = optax_sam.sharpness_aware(stage, evaluation=evaluation)
    params = start()
    _, state = tx.update(gradients(0), tx.init(params), params, loss_fn=batches()[0])
    norm = optax_sam.get_metrics(state)["perturbation_norm"]
    np.testing.assert_allclose(norm, (0.3**2 + 0.1**2) ** 0.5, rtol=1e-5)


def test_masked_optimizers_behind_a_method_see_every_parameter_in_the_loss():
    """Training only the head: freeze behind the method, and mask the perturbation."""
    tx = optax.chain(
        make("sam", mask=MASK),
        optax.sgd(0.1),
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda keep: not keep, MASK)),
    )
    updates = updates_of(tx, steps=1)[0]
    assert not updates["hidden"]["bias"].any()
    assert updates["out"]["kernel"].any()


@pytest.mark.parametrize("method", SOME)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.contrib.split_real_and_imaginary(tx),
        lambda tx: optax.contrib.sam(optax.sgd(0.1), tx),
    ],
    ids=["split_real_and_imaginary", "contrib.sam"],
)
def test_wrappers_that_take_no_extra_arguments(method, wrap):
    with pytest.raises(TypeError, match="unexpected keyword argument 'loss_fn'"):
        wrap(make(method)).update(gradients(0), None, start(), loss_fn=batches()[0])


def test_lookahead_takes_no_extra_arguments():
    tx = optax.lookahead(sgd_behind(make("sam")), 5, 0.5)
    params = optax.LookaheadParams.init_synced(start())
    with pytest.raises(TypeError, match="unexpected keyword argument 'loss_fn'"):
        tx.update(gradients(0), tx.init(params), params, loss_fn=batches()[0])


def test_flatten_needs_a_loss_of_one_vector():
    """``flatten`` forwards the loss but hands it a vector; with a loss of a vector it works."""
    with pytest.raises(TypeError, match="string indexing"):
        updates_of(optax.flatten(make("sam")))
    flat, unravel = jax.flatten_util.ravel_pytree(start())
    tx = optax.flatten(sgd_behind(make("sam")))

    def loss_fn(vector):
        return batches()[0](unravel(vector))

    updates, _ = tx.update(jax.grad(loss_fn)(flat), tx.init(flat), flat, loss_fn=loss_fn)
    expected = updates_of(sgd_behind(make("sam")), steps=1)[0]
    assert_close(unravel(updates), expected)


@pytest.mark.parametrize(
    "stage",
    [
        optax_sam.add_noise_compensation(0.1, 0.5),
        optax_sam.in_steps(optax_sam.normalized(RHO), 2),
        optax_sam.on_first(optax_sam.normalized(RHO), 0.5),
    ],
    ids=["add_noise_compensation", "in_steps", "on_first"],
)
def test_flatten_around_a_stage_that_evaluates_the_loss(stage):
    """The error is that of the loss, and a note names the wrapper and what to write."""
    with pytest.raises(TypeError) as caught:
        updates_of(optax_sam.sharpness_aware(optax.flatten(stage)))
    notes = "\n".join(caught.value.__notes__)
    assert "one vector, float32[" in notes
    assert "optax.flatten around this stage" in notes


@pytest.mark.parametrize("method", SOME)
def test_metrics_are_found_in_every_wrapper(method):
    """``get_metrics`` looks through chains, injected hyperparameters and accumulation."""
    for wrap in (AROUND["named_chain"], AROUND["schedule_free"], AROUND["MultiSteps of one"]):
        state = wrap(make(method)).init(start())
        assert "perturbed_loss" in optax_sam.get_metrics(state)


def test_metrics_of_none_or_several_methods():
    params = start()
    with pytest.raises(ValueError, match="one sharpness-aware method, found 0"):
        optax_sam.get_metrics(optax.sgd(0.1).init(params))
    with pytest.raises(ValueError, match="one sharpness-aware method, found 2"):
        optax_sam.get_metrics(optax.chain(make("sam"), make("sam")).init(params))
