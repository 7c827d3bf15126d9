"""Weights in loops over layers, in recurrent cells and in several places: exact, and at what cost."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import optax_sam
from optax_sam import Objective, _cost, _jaxprs
from optax_sam.per_example import per_example_gradient
from optax_sam.per_example.ascent import Recorder
from optax_sam.per_example.factors import (
    DenseRows,
    OneHotRows,
    Term,
    inner_products,
    squared_norm,
    times_gradient,
)
from optax_sam.per_example.places import Sliced, apply_path, follow_axes
from optax_sam.per_example.plan import GRAM, KERNEL, make_plan
from optax_sam.per_example.table import table
from optax_sam.per_example.trace import trace
from optax_sam.per_example.walk import ParameterValue, walk
from tests.per_example.loops import LOOPS, problem
from tests.per_example.networks import initial
from tests.per_example.test_equality import (
    RHO,
    as_tuple,
    assert_close,
    compile_quickly,
)
from tests.references import per_example as reference


def plan_of(objective, params, group_size=1):
    """The plan of each leaf, by its name."""
    leaves = jax.tree.leaves(params)
    plan = make_plan(trace(objective, params, group_size), leaves, [True] * len(leaves))
    return {leaf.path: leaf for leaf in plan.leaves}


def check_equality(objective, params, evaluation="full", group_size=1, microbatch_size=2):
    sliced = objective.replace(microbatch_size=microbatch_size)
    options = {"evaluation": evaluation, "group_size": group_size}

    @compile_quickly
    def both(params):
        ours = per_example_gradient(sliced, params, RHO, **options)
        return as_tuple(ours), reference.per_example_gradient(objective, params, RHO, **options)

    assert_close(*both(params))


# In groups below; and the same programs as others.
ELSEWHERE = ("layers, rematerialized", "layers")


@pytest.mark.parametrize("name", LOOPS)
def test_weights_in_loops_have_a_fast_form(name):
    methods = {path: leaf.method for path, leaf in plan_of(*problem(name)).items()}
    small = re.compile("bias|scale|positions")
    assert {m for path, m in methods.items() if not small.search(path)} <= {GRAM, KERNEL}
    assert all(m == GRAM for path, m in methods.items() if path.endswith("['layers']['up']"))
    assert GRAM in methods.values()


@pytest.mark.parametrize("name", [name for name in LOOPS if name not in ELSEWHERE])
def test_equals_the_naive_form(name, x64):
    check_equality(*problem(name))


def test_groups_and_another_evaluation(x64):
    check_equality(*problem("layers, rematerialized"), "logit_only", group_size=2)


def test_the_jacobian_with_weights_of_tokens(x64):
    objective, params = problem("language model")
    weights = jax.random.uniform(jax.random.key(1), objective.labels.shape).at[0, 1].set(0)
    check_equality(objective.replace(weights=weights), params, "jacobian_only")


def own_kernels(params, x):
    """Layers, and a recurrent cell, with so many positions that Gram matrices are dear."""
    x = x.reshape(x.shape[0], -1, 4)

    def layer(x, weights):
        return jnp.tanh(x @ weights), None

    x, _ = lax.scan(jax.checkpoint(layer), x, params["layers"])

    def cell(state, step):
        return jnp.tanh(state @ params["recurrent"] + step), None

    state, _ = lax.scan(cell, x[:, 0], x.swapaxes(0, 1))
    return state @ params["head"]


@pytest.mark.parametrize("steps", [1, 9])
def test_own_kernels_in_loops(steps, x64):
    params = initial({"layers": (3, 4, 4), "recurrent": (4, 4), "head": (4, 3)})
    objective, _ = problem("layers")
    inputs = objective.inputs.reshape(4, 108)[:, : 4 * steps]
    objective = objective.replace(apply_fn=own_kernels, inputs=inputs)
    plan = plan_of(objective, params)
    assert plan["['layers']"].method == plan["['recurrent']"].method == KERNEL
    check_equality(objective, params, microbatch_size=None)


class TestThinMatrices:
    """The formulas against gradients that are multiplied out."""

    def terms(self):
        generator = np.random.default_rng(0)
        dense = [
            DenseRows(jnp.asarray(generator.standard_normal(shape)))
            for shape in ((5, 7), (5, 4), (3, 7), (3, 4), (2, 4), (1, 7), (1, 4))
        ]
        # Two equal indices, and one outside of the table.
        lookup = OneHotRows(jnp.array([6, 7]), 7, jnp.dtype(float))
        again = OneHotRows(jnp.array([2, 2, -1, 6, 2]), 7, jnp.dtype(float))
        return (
            Term(dense[0], dense[1]),
            Term(dense[2], dense[3]),
            Term(lookup, dense[4]),
            Term(again, dense[1]),
            Term(dense[5], dense[6]),
        )

    def matrix(self, rows):
        if isinstance(rows, DenseRows):
            return np.asarray(rows.matrix)
        identity = np.eye(rows.count)
        inside = [0 <= index < rows.count for index in np.asarray(rows.indices)]
        return np.stack(
            [
                identity[index] if kept else np.zeros(rows.count)
                for index, kept in zip(np.asarray(rows.indices), inside, strict=True)
            ]
        )

    def gradient(self, terms):
        return sum(self.matrix(term.left).T @ self.matrix(term.right) for term in terms)

    @pytest.mark.usefixtures("strict_promotion")
    def test_half_precision_is_multiplied_in_float32(self):
        """Sums that float16 cannot hold, and a float32 factor beside rows in half precision."""
        half = DenseRows(jnp.full((2, 7), 300, jnp.float16))
        products = inner_products(half, half)
        np.testing.assert_array_equal(products, np.full((2, 2), 7 * 300.0**2, np.float32))
        np.testing.assert_array_equal(half.times(products), np.full((2, 7), 2 * 7 * 300.0**3))

    def test_squared_norm(self, x64):
        terms = self.terms()
        for chosen in (terms, terms[4:]):
            expected = np.sum(self.gradient(chosen) ** 2)
            np.testing.assert_allclose(squared_norm(chosen), expected, rtol=1e-12)

    def test_products(self, x64):
        terms = self.terms()
        for chosen in (terms, terms[4:]):
            for rows in (terms[0].left, terms[2].left, terms[4].left):
                expected = self.matrix(rows) @ self.gradient(chosen)
                actual = times_gradient(rows, chosen, False)
                np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-12)
            for rows in (terms[0].right, terms[4].right):
                expected = self.matrix(rows) @ self.gradient(chosen).T
                actual = times_gradient(rows, chosen, True)
                np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-12)


def path_of(function, shape):
    """The equations of a function of one array."""
    return tuple(jax.make_jaxpr(function)(jnp.zeros(shape)).eqns)


def test_axes_are_followed():
    shape = (2, 3, 1, 4, 5)
    first = path_of(lambda w: w.transpose(3, 1, 0, 2, 4).reshape(4, 3, 2, 5), shape)
    rearranged = path_of(lambda w: w.transpose(2, 0, 1).reshape(5, 1, 6), (3, 2, 5))
    path = (*first, Sliced(0), *rearranged)
    axes = follow_axes(path, shape)
    assert axes.sliced == ((3,),)
    assert axes.kept == ((4,), (), (1, 0))
    # What the axes say is what the path does.
    leaf = jnp.arange(120).reshape(shape)
    expected = leaf.transpose(3, 4, 2, 1, 0).reshape(4, 5, 1, 6)
    np.testing.assert_array_equal(apply_path(path, leaf), expected)
    assert follow_axes(path_of(lambda w: w.reshape(6, 2), (3, 4)), (3, 4)) is None
    assert follow_axes(path_of(lambda w: w[::-1], (3, 4)), (3, 4)) is None


def test_uses_in_different_layouts_have_a_kernel_of_their_own(x64):
    def apply(params, x):
        x = x.reshape(x.shape[0], -1)[:, :24]
        x = jnp.tanh(x @ params["weights"]).reshape(x.shape[0], 4, 6)
        return jnp.tanh(x @ params["weights"].reshape(6, 96)).mean(1)[:, :3]

    params = initial({"weights": (24, 24)})
    objective, _ = problem("layers")
    objective = objective.replace(apply_fn=apply)
    assert plan_of(objective, params)["['weights']"].method == KERNEL
    check_equality(objective, params)


def test_weights_that_a_loop_slices_and_that_are_used_as_a_whole(x64):
    def apply(params, x):
        x = jnp.tanh(x.reshape(x.shape[0], -1)[:, :24])
        x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
        return jnp.einsum("bi,lij->bj", x, params["layers"])[:, :3]

    params = initial({"layers": (2, 24, 24)})
    objective, _ = problem("layers")
    objective = objective.replace(apply_fn=apply)
    check_equality(objective, params)


def test_the_table_tells_loops_and_several_uses():
    def table_of(name):
        objective, params = problem(name)
        leaves = jax.tree.leaves(params)
        return table(make_plan(trace(objective, params), leaves, [True] * len(leaves)))

    text = table_of("language model")
    assert "embedding (T=3, K=30, O=20) + dense (T=3, K=20, O=30)  Gram matrices" in text
    assert re.search(r"2 layers of dense \(T=3, K=20, O=40\) +Gram matrices  1\.\d\d", text)
    assert "2 layers of dense (T=2, K=20, O=20)" in table_of("recurrent layers")
    assert "6 layers of dense (T=1, K=20, O=24)" in table_of("layers of layers, last one first")
    text = table_of("tied autoencoder")
    assert "dense (T=1, K=108, O=20) + dense (T=1, K=20, O=108)" in text


def test_rematerialized_networks_keep_little_also_on_accelerators(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    objective, params = problem("layers, rematerialized")
    leaves = jax.tree.leaves(params)
    plan = make_plan(trace(objective, params), leaves, [True] * len(leaves))
    assert plan.rematerializes
    assert plan.groups_at_once(1024, 1, None) < 1024
    ordinary = dataclasses.replace(plan, rematerializes=False)
    assert ordinary.groups_at_once(1024, 1, None) == 1024


def step(objective, params, **options):
    tx = optax_sam.sam(0.1, **options)
    gradients = jax.grad(objective)(params)
    return tx.update(gradients, tx.init(params), params, loss_fn=objective)[0]


def deep_stack():
    """Wide enough that the sizes are those of the weights and the activations."""
    shapes = {
        "stem": (108, 64),
        "layers": {"up": (6, 64, 64), "down": (6, 64, 64), "bias": (6, 64)},
        "head": (64, 3),
    }

    def apply(params, x):
        x = x.reshape(x.shape[0], -1, 108) @ params["stem"]
        layer = jax.checkpoint(lambda w, x: x + jnp.tanh(x @ w["up"] + w["bias"]) @ w["down"])
        x, _ = lax.scan(lambda x, w: (layer(w, x), None), x, params["layers"])
        return x.mean(1) @ params["head"]

    return apply, jax.eval_shape(lambda: initial(shapes))


def test_costs_no_more_than_sam_also_with_rematerialization():
    apply, params = deep_stack()
    inputs, labels = (
        jax.ShapeDtypeStruct((64, 8 * 108), jnp.float32),
        jax.ShapeDtypeStruct((64,), jnp.int32),
    )

    def traced(**options):
        def function(params, inputs, labels):
            return step(Objective(apply, inputs, labels), params, **options)

        return jax.jit(function).trace(params, inputs, labels)

    sam, one_sam = traced(), traced(group_size=1)
    # The compiler counts the body of a loop once; this counts the rounds.
    ratio = _cost.multiplications(one_sam.jaxpr).most / _cost.multiplications(sam.jaxpr).most
    assert ratio < 1.05

    def memory(program):
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        return program.lower().compile(options).memory_analysis().temp_size_in_bytes

    assert memory(one_sam) <= memory(sam)


def test_stacks_of_layers_are_not_moved():
    """Loops leave the layers first and the groups second: another order copies all that is kept."""
    objective, params = problem("layers, rematerialized")

    def moved(jaxpr):
        for equation in _jaxprs.open_and_constants(jaxpr)[0].eqns:
            if equation.primitive.name == "transpose":
                yield equation.outvars[0].aval.shape
            for _, inner in _jaxprs.inner_jaxprs(equation):
                yield from moved(inner)

    traced = jax.make_jaxpr(functools.partial(step, group_size=1))(objective, params)
    assert max(map(len, moved(traced))) < 4  # layers, groups, and the two axes of a site


def test_inputs_of_several_sites_are_kept_once():
    """Queries, keys and values have the same inputs, and a loop would stack them three times."""
    objective, params = problem("language model")
    traced, leaves = trace(objective, params), jax.tree.leaves(params)
    plan = make_plan(traced, leaves, [True] * len(leaves))
    taps = {use.place: jnp.zeros(use.tap_shape) for leaf in plan.leaves for use in leaf.uses}
    recorder = Recorder(taps)
    arguments = [
        ParameterValue(array, leaf=index) if leaf.uses else array
        for index, (leaf, array) in enumerate(zip(plan.leaves, leaves, strict=True))
    ]
    walk(traced.jaxpr, [*arguments, *jax.tree.leaves(traced.first_group)], recorder)
    assert len(recorder.captured) == 8
    assert len({id(array) for array in recorder.captured.values()}) == 6
