"""First stages that take the fast path for groups, and those that cannot."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_sam
from optax_sam import Objective, normalized, sharpness_aware
from optax_sam._stages import as_stage
from optax_sam.per_example import gradient
from optax_sam.per_example.multiples import NotAMultipleError, multiples_of
from tests.per_example.networks import initial
from tests.per_example.test_equality import assert_close, compile_quickly

SCHEDULE = optax.linear_schedule(0.1, 0.5, 4)


def labels(params):
    return {name: "bias" if name == "bias" else "kernels" for name in params}


def is_kernel(params):
    return {name: name != "bias" for name in params}


def per_leaf(scales):
    return optax.partition({name: optax.scale(scale) for name, scale in scales.items()}, labels)


def behind_barrier(updates, params=None):
    del params
    return jax.lax.optimization_barrier(updates)


FAST = {
    "chain": lambda: optax.chain(normalized(0.1)),
    "several links": lambda: optax.chain(optax.identity(), normalized(0.1), optax.scale(-2.0)),
    "injected": lambda: optax.inject_hyperparams(normalized)(rho=0.1),
    "injected schedule": lambda: optax.inject_hyperparams(normalized)(rho=SCHEDULE),
    "schedule": lambda: normalized(SCHEDULE),
    "scaled by a schedule": lambda: optax.chain(normalized(0.1), optax.scale_by_schedule(SCHEDULE)),
    "learning rate": lambda: optax.scale_by_learning_rate(0.05),
    "plain gradient": optax.identity,
    "project_to_ball": lambda: optax.chain(optax.scale(3.0), optax_sam.project_to_ball(0.2)),
    "loss_budget": lambda: optax_sam.loss_budget(0.05, 0.3),
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(0.3),
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(0.05),
    "normalize_by_update_norm": lambda: optax.normalize_by_update_norm(0.1),
    "contrib.normalize": lambda: optax.chain(optax.contrib.normalize(), optax.scale(0.1)),
    "partition with a norm each": lambda: optax.partition(
        {"bias": normalized(0.1), "kernels": normalized(0.3)}, labels
    ),
    "partition with one norm": lambda: optax.chain(
        normalized(1.0), per_leaf({"bias": 0.1, "kernels": 0.3})
    ),
    "partition that freezes": lambda: optax.partition(
        {"bias": optax.set_to_zero(), "kernels": normalized(0.3)}, labels
    ),
    "masked": lambda: optax.chain(normalized(0.3), optax.masked(optax.scale(0.1), is_kernel)),
    "frozen": lambda: optax.chain(
        normalized(0.3), optax.freeze({"first": True, "bias": False, "head": False})
    ),
    "smaller on some steps": lambda: optax.chain(
        normalized(0.3),
        optax.conditionally_transform(optax.scale(0.5), lambda step: step % 2 == 0),
    ),
    "on some steps, else nothing": lambda: optax.conditionally_mask(
        normalized(0.3), lambda step: step % 2 == 0
    ),
    "zero": lambda: optax.set_to_zero(),
    "behind a barrier": lambda: optax.chain(optax.stateless(behind_barrier), normalized(0.1)),
    "weights of a sum": lambda: optax.chain(optax.scale(0.5), normalized(jnp.float32(0.1))),
}

HALVED_TWICE = optax.stateless(
    lambda updates, params: jax.lax.while_loop(
        lambda carry: carry[0] < 2,
        lambda carry: (carry[0] + 1, jax.tree.map(lambda leaf: leaf / 2, carry[1])),
        (0, updates),
    )[1]
)

REFUSED = {
    "moving average": (
        lambda: optax.chain(optax_sam.moving_average(0.3), normalized(0.1)),
        "adds something to the gradient",
    ),
    "momentum": (lambda: optax.chain(optax.trace(0.9), normalized(0.1)), "adds something"),
    "its own average": (
        lambda: optax.chain(optax_sam.subtract_moving_average(0.9, 0.6), normalized(0.1)),
        "adds something",
    ),
    "halved in a loop": (lambda: optax.chain(HALVED_TWICE, normalized(0.1)), "through a loop"),
    "adaptive": (lambda: optax_sam.adaptive(0.3), "a factor of its own"),
    "noise compensation": (
        lambda: optax.chain(
            normalized(0.1),
            optax_sam.add_noise_compensation(0.1, flip_ratio=0.5),
        ),
        "evaluates the loss",
    ),
    "several steps": (lambda: optax_sam.in_steps(normalized(0.1), 2), "adds something|evaluates"),
    "half of the examples": (
        lambda: optax_sam.on_first(normalized(0.1), 0.5),
        "evaluates the loss",
    ),
    "sign": (lambda: optax.scale_by_sign(), "applies `sign` to the gradient"),
    "elementwise clip": (lambda: optax.clip(0.01), "applies `(max|min|clamp)` to the gradient"),
    "adam": (lambda: optax.scale_by_adam(), "adds something|applies `integer_pow`"),
    "weight decay": (lambda: optax.add_decayed_weights(0.1), "adds something"),
    "norms of rows": (lambda: optax.adaptive_grad_clip(0.1), "needs more of a gradient|norm"),
    "trust ratio": (optax.scale_by_trust_ratio, "chooses between the gradient and something else"),
    "flattened": (lambda: optax.flatten(normalized(0.1)), "`concatenate`"),
}


def problem(batch=6):
    def apply(params, x):
        return jnp.tanh(x @ params["first"] + params["bias"]) @ params["head"]

    params = initial({"first": (7, 5), "bias": (5,), "head": (5, 3)})
    inputs = initial({"inputs": (batch, 7)})["inputs"]
    return Objective(apply, inputs, jnp.arange(batch) % 3), params


def steps(make, group_size, fast, monkeypatch):
    """The directions of two steps, by the fast path or each group by itself."""
    objective, params = problem()
    tx = sharpness_aware(make(), group_size=group_size)
    calls = []
    with monkeypatch.context() as patch:
        engine = optax_sam._engine
        original = engine.Engine._ascend_fast

        def record(self, step):
            calls.append(1)
            return original(self, step)

        patch.setattr(engine.Engine, "_ascend_fast", record)
        if not fast:
            patch.setattr(engine.Engine, "_why_not_fast", lambda *_: engine._FASTER_BY_ITSELF)

        @compile_quickly
        def run(params, objective):
            def step(state, _):
                direction, state = tx.update(params, state, params, loss_fn=objective)
                return state, direction

            return jax.lax.scan(step, tx.init(params), length=2)

        result = run(params, objective)
    assert bool(calls) == fast
    return result


@pytest.mark.parametrize("name", FAST)
def test_takes_the_fast_path_and_equals_the_naive_form(name, x64, monkeypatch):
    fast, naive = (steps(FAST[name], 1, is_fast, monkeypatch) for is_fast in (True, False))
    assert_close(fast, naive, 1e-12)


@pytest.mark.parametrize("name", ["several links", "partition with one norm"])
def test_groups_of_two(name, x64, monkeypatch):
    fast, naive = (steps(FAST[name], 2, is_fast, monkeypatch) for is_fast in (True, False))
    assert_close(fast, naive, 1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_says_why_it_cannot(name, x64):
    make, reason = REFUSED[name]
    objective, params = problem()
    stage = optax.with_extra_args_support(make())
    with pytest.raises(NotAMultipleError, match=reason):
        multiples_of(stage, stage.init(params), params, {"loss_fn": objective})


@pytest.mark.parametrize("name", ["moving average", "adaptive", "half of the examples", "sign"])
def test_the_others_are_differentiated_by_themselves_with_a_warning(name, x64):
    make, reason = REFUSED[name]
    objective, params = problem()
    tx = sharpness_aware(make(), group_size=2)
    state = tx.init(params)

    @jax.jit
    def update(params):
        return tx.update(params, state, params, loss_fn=objective)[0]

    with pytest.warns(UserWarning, match=f"3 to 26 times as long.*the first stage.*({reason})"):
        direction = update(params)

    def of_group(start):
        group = objective.subset(slice(start, start + 2))
        plain = sharpness_aware(make())
        grads = jax.grad(group)(params)
        return plain.update(grads, plain.init(params), params, loss_fn=group)[0]

    each = [jax.jit(functools.partial(of_group, start))() for start in (0, 2, 4)]
    assert_close(direction, jax.tree.map(lambda *g: sum(g) / 3, *each), 1e-12)


def stateful(new_state):
    """A normalized perturbation that keeps something of the gradient."""
    inner = normalized(0.1)

    def update(updates, state, params=None):
        epsilon, _ = inner.update(updates, inner.init(params), params)
        return epsilon, new_state(updates, state)

    return optax.GradientTransformation(lambda params: jnp.zeros([]), update)


def test_a_state_that_depends_on_the_gradient_is_refused():
    _, params = problem()
    for new_state in (
        lambda g, state: optax.tree.norm(g),
        lambda g, state: 0.9 * state + optax.tree.norm(g),
        lambda g, state: g,
    ):
        stage = optax.with_extra_args_support(stateful(new_state))
        with pytest.raises(NotAMultipleError, match="has a state that depends on the gradients"):
            multiples_of(stage, stage.init(params), params, {})
    stage = optax.with_extra_args_support(stateful(lambda g, state: state + 1))
    _, state = multiples_of(stage, stage.init(params), params, {})
    assert state == 1


def scaled_by(argument):
    """A radius that the training step hands in, or that is read off the loss or the logits."""

    def update(updates, state, params=None, *, loss_fn, logits=None, temperature=1.0):
        factor = {
            "temperature": lambda: temperature,
            "loss": lambda: loss_fn(params),
            "logits": lambda: jnp.sum(logits),
        }[argument]()
        return optax.tree.scale(factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize("argument", ["loss", "logits"])
def test_what_differs_from_group_to_group_is_refused(argument):
    objective, params = problem()
    given = {"logits": objective.logits(params)}
    with pytest.raises(NotAMultipleError, match="evaluates the loss"):
        multiples_of(scaled_by(argument), optax.EmptyState(), params, given)


@pytest.mark.parametrize("compiled", [False, True])
def test_extra_arguments_reach_the_first_stage(compiled, x64):
    objective, params = problem()

    def direction(stage, **extra_args):
        tx = sharpness_aware(stage, group_size=1)
        return tx.update(params, tx.init(params), params, loss_fn=objective, **extra_args)[0]

    def both():
        with_argument = direction(scaled_by("temperature"), temperature=0.2)
        return with_argument, direction(optax.scale(0.2))

    ours, theirs = (jax.jit(both) if compiled else both)()
    assert_close(ours, theirs, 1e-12)


def test_two_gradients_of_one_shape_are_told_apart():
    """A perturbation along another parameter's gradient is no multiple of its own."""

    def update(updates, state, params=None):
        return {"a": updates["b"], "b": updates["a"]}, state

    stage = optax.with_extra_args_support(
        optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    )
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(NotAMultipleError, match="along the gradient of another one"):
        multiples_of(stage, optax.EmptyState(), params, {})


def test_rearranged_gradients_are_no_multiples():
    def update(updates, state, params=None):
        return (updates + updates.T) / 2, state

    stage = optax.with_extra_args_support(
        optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    )
    with pytest.raises(NotAMultipleError, match="applies `transpose`"):
        multiples_of(stage, optax.EmptyState(), jnp.ones((3, 3)), {})


def test_per_example_gradient_is_compiled_once_for_all_radii():
    objective, params = problem()
    before = gradient._compute_compiled._cache_size()
    for rho in (0.1, 0.2):
        gradient.per_example_gradient(objective, params, rho)
    assert gradient._compute_compiled._cache_size() == before + 1


@pytest.mark.parametrize("name", ["clip_by_block_rms", "partition that freezes"])
def test_nothing_is_computed_while_tracing(name, monkeypatch):
    """The mesh may be of described devices, which are not there to compute."""

    def refuse():
        raise AssertionError("computed while tracing")

    monkeypatch.setattr(jax, "ensure_compile_time_eval", refuse)
    _, params = problem()
    stage = optax.with_extra_args_support(FAST[name]())
    types = jax.eval_shape(lambda: (params, stage.init(params)))
    squares = [jnp.ones([])] * len(params)
    jax.make_jaxpr(lambda params, state: multiples_of(stage, state, params, {})[0](squares))(*types)


@pytest.mark.parametrize(("axes", "is_norm"), [((0, 1), True), ((1, 0), False)])
def test_the_trace_of_a_square_is_no_squared_norm(axes, is_norm):
    def scaled(updates, params):
        del params
        (leaf,) = updates
        return [jax.lax.dot_general(leaf, leaf, (((0, 1), axes), ((), ()))) * leaf]

    stage, params = as_stage("perturbation", optax.stateless(scaled)), [jnp.ones((2, 2))]
    if is_norm:
        multiples, _ = multiples_of(stage, stage.init(params), params, {})
        assert multiples([jnp.float32(4.0)])[0][0] == 4
    else:
        with pytest.raises(NotAMultipleError, match="needs more of a gradient than its norm"):
            multiples_of(stage, stage.init(params), params, {})
