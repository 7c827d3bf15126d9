"""What a caller sees beside the numbers: refusals, plans, traces, Flax interfaces."""

import dataclasses
import functools
import re

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optax_sam
from optax_sam import Objective, _jaxprs
from optax_sam._jaxprs import CannotFollowError
from optax_sam.independence import check_independence
from optax_sam.per_example import per_example_gradient, plan, walk
from optax_sam.per_example.trace import trace
from tests.per_example import loops
from tests.per_example.networks import (
    NETWORKS,
    NOT_PROVED,
    example_inputs,
    initial,
    problem,
)
from tests.per_example.test_equality import as_tuple, assert_close, compile_quickly, fast, naive
from tests.references import per_example as reference


def explain(objective, params, **options):
    return optax_sam.explain(optax_sam.sam(0.1, **{"group_size": 1} | options), objective, params)


class BatchNormCNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(nn.relu(x).mean((1, 2)))


def batch_norm_objective(train):
    model, inputs = BatchNormCNN(), example_inputs()
    init = functools.partial(model.init, train=False)
    variables = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape), jax.eval_shape(init, jax.random.key(0), inputs)
    )

    def apply(params, x):
        return model.apply(variables | {"params": params}, x, train, mutable=["batch_stats"])

    objective = Objective(apply, inputs, jnp.arange(5) % 3, has_aux=True)
    return objective, variables["params"]


@pytest.mark.parametrize("compiled", [False, True])
def test_refuses_batch_norm(compiled):
    objective, params = batch_norm_objective(train=True)

    def run(params):
        return per_example_gradient(objective, params, 0.1)

    with pytest.raises(ValueError, match=r"not independent: `reduce_sum` at .*GroupNorm"):
        (jax.jit(run) if compiled else run)(params)
    with pytest.raises(ValueError, match="not independent"):
        explain(objective, params)


def test_batch_norm_mixes_the_examples_of_each_group(x64):
    objective, params = batch_norm_objective(train=True)
    pairs = objective.subset(slice(0, 4))
    ours, theirs = (
        compile_quickly(functools.partial(function, pairs, group_size=2))(params, 0.1)
        for function in (per_example_gradient, reference.per_example_gradient)
    )
    assert_close(as_tuple(ours), theirs)


def test_accepts_batch_norm_with_stored_statistics():
    objective, params = batch_norm_objective(train=False)
    assert check_independence(objective, params) == "proved"


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in NOT_PROVED])
def test_independence_is_proved(name):
    assert check_independence(*problem(name)) == "proved"


@pytest.mark.parametrize(("along", "answer"), [("classes", "proved"), ("examples", None)])
def test_the_largest_along_an_axis(along, answer):
    def apply(p, x):
        outputs = jax.lax.optimization_barrier((x @ p, p))[0]
        axis, count = (1, 3) if along == "classes" else (0, 4)
        return outputs - jax.lax.top_k(outputs, count, axis=axis)[0]

    objective = Objective(apply, jnp.ones((4, 2)), jnp.zeros(4, int))
    if answer:
        assert check_independence(objective, jnp.ones((2, 3))) == answer
    else:
        with pytest.raises(ValueError, match="not independent"):
            check_independence(objective, jnp.ones((2, 3)))


def zero_carry(p, x):
    """The examples enter the carry, which starts from zeros, in the first round only."""

    def body(carry, _):
        return carry - carry.mean(0) + x @ p, None

    return jax.lax.scan(body, jnp.zeros((4, 3)), None, 3)[0]


MIXERS = {
    "attention over the batch": lambda p, x: jax.nn.softmax((x @ p) @ (x @ p).T) @ x @ p,
    "mean over a merged axis": lambda p, x: (x @ p) - (x @ p).reshape(-1).mean(),
    "Fourier transform": lambda p, x: jnp.fft.fft(x @ p, axis=0).real,
    "cumulative sum": lambda p, x: jnp.cumsum(x @ p, axis=0),
    "sorting": lambda p, x: jnp.sort(x @ p, axis=0),
    "inside jit": lambda p, x: jax.jit(lambda z: z - z.mean(0))(x @ p),
    "inside remat": lambda p, x: jax.checkpoint(lambda z: z - z.mean(0))(x @ p),
    "inside scan": lambda p, x: jax.lax.scan(lambda z, _: (z - z.mean(0), None), x @ p, None, 2)[0],
    "inside scan with a zero carry": zero_carry,
    "inside custom_jvp": lambda p, x: jax.nn.relu(x @ p) / jax.nn.relu(x @ p).max(0),
    "convolution along the batch": lambda p, x: (
        jax.lax.conv_general_dilated((x @ p).T[None], jnp.ones((3, 3, 3)), (1,), "SAME")[0].T
    ),
    "mixup by roll": lambda p, x: (0.7 * x + 0.3 * jnp.roll(x, 1, axis=0)) @ p,
    "mixup by flip": lambda p, x: (0.7 * x + 0.3 * jnp.flip(x, axis=0)) @ p,
    "reversed beside the labels": lambda p, x: (x @ p)[::-1],
    "halves swapped": lambda p, x: jnp.concatenate([x[2:], x[:2]]) @ p,
    "parts of split swapped": lambda p, x: jnp.concatenate(jnp.split(x, 2)[::-1]) @ p,
    "the first example": lambda p, x: (x - x[0]) @ p,
    "the first example, kept as a row": lambda p, x: (x - x[:1]) @ p,
    "every second example": lambda p, x: (x + jnp.concatenate([x[::2]] * 2)) @ p,
}


@pytest.mark.parametrize("name", MIXERS)
def test_refuses_what_mixes_examples(name):
    objective = Objective(MIXERS[name], jnp.ones((4, 2)), jnp.arange(4) % 3)
    with pytest.raises(ValueError, match="not independent"):
        check_independence(objective, jnp.ones((2, 3)))


INDEPENDENT = {
    "reversed twice": lambda p, x: (x[::-1] @ p)[::-1],
    "rolled back": lambda p, x: jnp.roll(jnp.roll(x, 1, axis=0) @ p, -1, axis=0),
    "cut and joined": lambda p, x: jnp.concatenate([x[:1] @ p, x[1:] @ p]),
    "flipped features": lambda p, x: jnp.flip(x, axis=1) @ p,
    "Fourier transform of the features": lambda p, x: jnp.fft.fft(x @ p, axis=1).real,
    "stacked features": lambda p, x: jnp.stack([x, x * x]).sum(0) @ p,
    "sum over the other half of a merged axis": lambda p, x: (
        (x @ p).reshape(-1).reshape(4, 3) - (x @ p).sum(1, keepdims=True)
    ),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_proves_what_keeps_them_apart(name):
    objective = Objective(INDEPENDENT[name], jnp.ones((4, 2)), jnp.arange(4) % 3)
    assert check_independence(objective, jnp.ones((2, 3))) == "proved"


UNKNOWN = {
    "scatter": (
        "no rule for `scatter`",
        lambda p, x: jnp.zeros((len(x), 3)).at[jnp.arange(len(x))].set(x @ p),
    ),
    "permutation": ("may pick other examples", lambda p, x: x[jnp.arange(len(x))[::-1]] @ p),
    "loop over the examples": (
        "loops over the examples",
        lambda p, x: jax.lax.scan(lambda s, row: (s + row, (s + row) @ p), jnp.zeros(2), x)[1],
    ),
    "sum over the first example": ("one of the examples", lambda p, x: x[0].sum() + x @ p),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_followed_is_let_through_with_a_warning(name):
    reason, apply = UNKNOWN[name]
    objective = Objective(apply, jnp.ones((4, 2)), jnp.arange(4) % 3)
    assert reason in check_independence(objective, jnp.ones((2, 3)))
    with pytest.warns(UserWarning, match=f"group_size=1 needs examples that do not.*{reason}"):
        jax.eval_shape(lambda p: per_example_gradient(objective, p, 0.1), jnp.ones((2, 3)))


def test_the_escape_named_in_the_refusal_works():
    apply = MIXERS["cumulative sum"]
    mapped = lambda p, inputs: jax.vmap(lambda x: apply(p, x[None])[0])(inputs)  # noqa: E731
    objective = Objective(mapped, jnp.ones((4, 2)), jnp.arange(4) % 3)
    assert check_independence(objective, jnp.ones((2, 3))) == "proved"


def test_one_trace():
    objective, params = problem("MLP")
    traces = []

    def apply(params, x):
        traces.append(x.shape)
        return plain(params, x)

    plain = objective.apply_fn
    objective = objective.replace(apply_fn=apply)
    for seed in range(3):  # called eagerly, it compiles itself
        inputs = jax.random.normal(jax.random.key(seed), objective.inputs.shape)
        per_example_gradient(objective.replace(inputs=inputs), params, 0.1 + seed)
    assert len(traces) == 2  # on one example, and on the batch to see whether examples mix


@pytest.mark.parametrize("size", [1, 2])
def test_what_cannot_be_followed_falls_back_with_a_warning(size, monkeypatch, x64):
    objective, params = problem("MLP", batch=4)

    def unknown(*_):
        raise CannotFollowError("a form from the future")

    monkeypatch.setattr(walk, "_site_position", unknown)
    function = functools.partial(per_example_gradient, group_size=size)
    expected = "cannot follow this network.*3 to 26 times as long: a form from the future"
    with pytest.warns(UserWarning, match=expected):
        result = compile_quickly(function)(objective, params, 0.2)
    plain = functools.partial(reference.per_example_gradient, group_size=size)
    assert_close(as_tuple(result), compile_quickly(plain)(objective, params, 0.2))
    tx = optax_sam.sam(0.2, group_size=size)
    with pytest.warns(UserWarning, match=expected):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, loss_fn=objective), params)
    assert "not followed:    a form from the future" in explain(objective, params, group_size=size)


def test_bugs_of_our_own_come_up(monkeypatch):
    def broken(*_):
        raise TypeError("a bug")

    monkeypatch.setattr(walk, "_site_position", broken)
    objective, params = problem("MLP")
    with pytest.raises(TypeError, match="a bug"):
        jax.eval_shape(lambda p: per_example_gradient(objective, p, 0.2), params)


def test_a_parameter_of_an_equation_that_jax_has_renamed():
    (equation,) = jax.make_jaxpr(jnp.sin)(1.0).eqns
    with pytest.raises(CannotFollowError, match=r"JAX .* writes `sin` in a form.*without 'ft_in'"):
        _jaxprs.parameter(equation, "ft_in")
    with pytest.raises(CannotFollowError, match="`sin` holds 0 programs"):
        _jaxprs.called(equation)


def test_explain_names_every_leaf_and_reason():
    text = explain(*problem("GPT with tied embedding"))
    assert "embedding (T=4, K=11, O=8) + dense (T=4, K=8, O=11)" in text
    assert "dense (T=4" in text
    assert "proved" in text
    text = explain(*problem("ResNet with GroupNorm"))
    assert "convolution (T=36, K=27, O=4)" in text
    assert "own kernel" in text
    text = explain(*problem("None, integers, unused"))
    assert "not differentiated" in text
    assert "not used" in text
    assert "Gram matrices" in text
    text = explain(*problem("few positions"))
    assert "convolution (T=4, K=75, O=16)  Gram matrices" in text
    assert "dense (T=2, K=32, O=16)        Gram matrices" in text
    text = explain(*problem("sliced weights"))
    assert "cut or repeated before a dense site" in text
    text = explain(*problem("few positions", batch=8), group_size=4)
    assert re.search(r"dense \(T=8, K=32, O=16\) +own kernel", text)
    assert "at once:         8 of 8" in text
    objective, params = problem("MLP")
    mask = {"Dense_0": True, "Dense_1": False}
    assert explain(objective, params, mask=mask).count("not perturbed") == 2


def test_how_many_examples_are_computed_at_once(monkeypatch):
    """On a CPU what half of the batch keeps, on an accelerator what batch SAM computes."""
    network = problem("GPT", batch=32)
    assert "at once:         16 of 32" in explain(*network)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(plan, "_ACCELERATOR_SIZE", 0)  # however large the network
    assert "at once:         32 of 32" in explain(*network)


@pytest.mark.parametrize(
    ("positions", "group_size", "expected"),
    [
        (1, 1, {8: 8, 24: 12, 1024: 512, 4096: 512}),
        (16, 1, {8: 8, 16: 8, 32: 16, 64: 32, 256: 32}),
        (16, 2, {4: 4, 64: 16}),  # groups
        (64, 1, {64: 8}),
        (256, 1, {64: 8}),
    ],
)
def test_products_of_small_examples_have_many_rows(positions, group_size, expected):
    """512 rows where the batch has as many, but at most half of it; eight examples in any case."""
    params = initial({"weights": (12, 12)})

    def made(count):
        inputs = jnp.zeros((count * group_size, positions, 12))
        labels = jnp.zeros(count * group_size, "int32")
        objective = Objective(lambda p, x: (x @ p["weights"]).mean(1), inputs, labels)
        traced = trace(objective, params, group_size)
        return plan.make_plan(traced, jax.tree.leaves(params), [True])

    found = {n: made(n).groups_at_once(n, group_size, None) for n in expected}
    assert found == expected
    for change in ({"rematerializes": True}, {"has_convolution": True}):
        changed = dataclasses.replace(made(1020), **change)  # which 9 to 12 divide as well as 8
        assert changed.groups_at_once(1020, group_size, None) <= 8


def test_the_rounds_of_a_loop_over_the_same_weights_are_rows_too():
    objective, params = loops.problem("layers repeated")
    leaves = jax.tree.leaves(params)
    assert plan.make_plan(trace(objective, params), leaves, [True] * len(leaves)).positions == 2


def test_dropout_keys_as_inputs_give_masks_per_example(x64):
    def apply(params, inputs):
        x, keys = inputs
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (6,)))(keys)
        return jnp.where(kept, jnp.tanh(x @ params["first"]), 0) @ params["head"]

    params = {"first": jnp.ones((3, 6)), "head": jnp.eye(6)[:, :2]}
    inputs = (jnp.arange(12.0).reshape(4, 3), jax.random.split(jax.random.key(0), 4))
    objective = Objective(apply, inputs, jnp.array([0, 1, 0, 1]))
    assert_close(as_tuple(fast(objective, params, 0.1)), naive(objective, params, 0.1))


def test_nnx(x64):
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.convolution = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.head = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.convolution(x))).mean((1, 2)))

    graphdef, params = nnx.split(Network(nnx.Rngs(0)), nnx.Param)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    objective = Objective(
        lambda p, x: nnx.merge(graphdef, p)(x), example_inputs(), jnp.arange(5) % 3
    )
    assert_close(as_tuple(fast(objective, params, 0.1)), naive(objective, params, 0.1))


def test_equinox(x64):
    class Network(eqx.Module):
        convolution: eqx.nn.Conv2d
        norm: eqx.nn.LayerNorm
        head: eqx.nn.Linear

        def __init__(self, key):
            first, second = jax.random.split(key)
            self.convolution = eqx.nn.Conv2d(3, 4, 3, key=first)
            self.norm = eqx.nn.LayerNorm(4)
            self.head = eqx.nn.Linear(4, 3, key=second)

        def __call__(self, image):  # one example, channels first
            hidden = self.convolution(image.transpose(2, 0, 1)).mean((1, 2))
            return self.head(jax.nn.relu(self.norm(hidden)))

    params, rest = eqx.partition(Network(jax.random.key(0)), eqx.is_inexact_array)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, rest))(x)

    objective = Objective(apply, example_inputs(), jnp.arange(5) % 3)
    assert "convolution (T=" in explain(objective, params)
    assert_close(as_tuple(fast(objective, params, 0.1)), naive(objective, params, 0.1))


def test_haiku(x64):
    @hk.without_apply_rng
    @hk.transform
    def network(x):
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(hk.Conv2D(4, 3)(x))
        return hk.Linear(3)(jax.nn.relu(x).mean((1, 2)))

    params = network.init(jax.random.key(0), example_inputs())
    objective = Objective(network.apply, example_inputs(), jnp.arange(5) % 3)
    assert "convolution (T=" in explain(objective, params)
    assert_close(as_tuple(fast(objective, params, 0.1)), naive(objective, params, 0.1))


def test_derivative_through_the_result(x64):
    objective, params = problem("sliced weights")

    def of(rho, gradient):
        return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(gradient(objective, params, rho)))

    derivative = compile_quickly(jax.grad(of), static_argnums=1)
    actual = derivative(0.2, lambda *args: per_example_gradient(*args).gradients)
    expected = derivative(0.2, lambda *args: reference.per_example_gradient(*args)[2])
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_half_precision_parameters_and_norms():
    objective, params = problem("MLP")
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
    objective = objective.replace(inputs=(100 * objective.inputs).astype(jnp.float16))
    result = per_example_gradient(objective, narrow, 0.1)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.gradients)} == {jnp.dtype(jnp.float16)}
    # The squared norm of the first layer's gradient is far above the largest float16, 65504.
    assert result.gradient_norm.dtype == jnp.float32
    assert np.isfinite(result.gradient_norm)
    np.testing.assert_allclose(result.perturbation_norm, 0.1, rtol=1e-5)


def test_shard_map_gives_the_gradient_of_each_shard(x64):
    objective, params = problem("1-D convolution", batch=8)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def local(params, inputs, labels):
        params = jax.lax.pcast(params, ("data",), to="varying")
        shard = objective.replace(inputs=inputs, labels=labels, microbatch_size=2)
        gradients = per_example_gradient(shard, params, 0.1).gradients
        return jax.lax.pmean(gradients, "data")

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(spec(), spec("data"), spec("data")), out_specs=spec()
    )
    sharded = jax.jit(mapped)(params, objective.inputs, objective.labels)
    whole = jax.jit(lambda p: per_example_gradient(objective, p, 0.1).gradients)(params)
    assert_close(sharded, whole)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"evaluation": "half"}, ValueError, "evaluation must be one of"),
        ({"group_size": 0}, ValueError, "group_size must be at least 1, got 0"),
        ({"group_size": 2}, ValueError, "group_size=2 must divide the batch of 5 examples"),
        ({"mask": {"wrong": True}}, ValueError, "mask"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    objective, params = problem("MLP")
    with pytest.raises(error, match=message):
        per_example_gradient(objective, params, 0.1, **arguments)


def test_needs_an_objective():
    with pytest.raises(TypeError, match="Objective"):
        per_example_gradient(lambda w: jnp.sum(w**2), jnp.ones(2), 0.1)
