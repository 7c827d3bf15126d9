"""The fast path equals differentiating every example or group by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_sam.per_example import per_example_gradient
from optax_sam.per_example.factors import DenseRows, Term, squared_norm
from optax_sam.per_example.plan import GRAM, make_plan
from optax_sam.per_example.trace import trace
from tests.per_example.networks import NETWORKS, NOT_PROVED, initial, problem
from tests.references import per_example as reference

RHO = 0.3
NARROW = {jnp.float64: jnp.float32, jnp.int64: jnp.int32}
EVALUATIONS = ("full", "jacobian_only", "logit_only")


# The tests compile more than they compute.
compile_quickly = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


fast = compile_quickly(per_example_gradient)
naive = compile_quickly(reference.per_example_gradient)


def assert_close(left, right, tolerance=1e-10):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=tolerance), left, right)


def as_tuple(result):
    return result.loss, result.perturbed_loss, result.gradients, result.clean_gradients


def check_equality(name, evaluations, microbatch_size=None, batch=5, group_size=1):
    objective, params = problem(name, batch)
    sliced = objective.replace(microbatch_size=microbatch_size)

    @compile_quickly
    def expected(params, rho):
        return [
            reference.per_example_gradient(
                objective, params, rho, evaluation=evaluation, group_size=group_size
            )
            for evaluation in evaluations
        ]

    @compile_quickly
    def actual(params, rho):
        return [
            as_tuple(
                per_example_gradient(
                    sliced, params, rho, evaluation=evaluation, group_size=group_size
                )
            )
            for evaluation in evaluations
        ]

    assert_close(actual(params, RHO), expected(params, RHO))


# The larger ones of their kinds have all that these have.
LARGER = {"CNN with GroupNorm": "ResNet with GroupNorm", "GPT": "GPT with tied embedding"}


@pytest.mark.parametrize("name", [n for n in NETWORKS if n not in NOT_PROVED and n not in LARGER])
def test_full_gradient_equals_the_naive_form(name, x64):
    # A loop over two microbatches of three.
    check_equality(name, ["full"], microbatch_size=3, batch=6)


@pytest.mark.parametrize("name", NOT_PROVED)
def test_what_is_not_proved_is_exact_and_warns(name, x64):
    with pytest.warns(UserWarning, match="which could not be proved: `(scatter-add|while)`"):
        check_equality(name, ["full"], batch=4)


@pytest.mark.parametrize("name", ["MLP", "1-D convolution", "few positions", "sliced weights"])
def test_other_gradients_equal_the_naive_form(name, x64):
    check_equality(name, ["jacobian_only", "logit_only"])


@pytest.mark.parametrize("name", ["MLP", "1-D convolution", "few positions", "tied layers"])
def test_groups_equal_the_naive_form(name, x64):
    # Groups of two, two at once, and a remainder of one.
    check_equality(name, ["full"], microbatch_size=5, batch=10, group_size=2)


def test_other_gradients_of_groups_equal_the_naive_form(x64):
    check_equality("few positions", ["jacobian_only", "logit_only"], batch=6, group_size=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT with tied embedding"])
def test_all_gradients_at_once(name, x64):
    check_equality(name, EVALUATIONS)


@pytest.mark.parametrize(("perturbed", "size"), [("kernel", 1), ("head", 1), ("kernel", 2)])
def test_mask(perturbed, size, x64):
    objective, params = problem("1-D convolution", batch=4)
    mask = {name: name == perturbed for name in params}
    ours, theirs = (
        compile_quickly(functools.partial(function, group_size=size, mask=mask))(
            objective, params, RHO
        )
        for function in (per_example_gradient, reference.per_example_gradient)
    )
    assert_close(as_tuple(ours), theirs)


# One example, and with groups of two a whole group, counts nothing.
WEIGHTS = jnp.array([0.5, 2.0, 0.0, 0.0, 1.0, 3.0])


@pytest.mark.parametrize(
    ("evaluation", "size", "scale"),
    [
        *[
            ("full", 1, None),
            ("full", 2, None),
            ("jacobian_only", 1, None),
            ("logit_only", 2, None),
        ],
        ("full", 1, 1024.0),
        ("jacobian_only", 2, 1024.0),
    ],
)
def test_weights_and_loss_scale(evaluation, size, scale, x64):
    objective, params = problem("few positions", batch=6)
    weighted = objective.replace(
        weights=WEIGHTS.astype(jnp.float64), loss_scale=scale, microbatch_size=2
    )
    ours, theirs = (
        compile_quickly(functools.partial(function, group_size=size, evaluation=evaluation))(
            weighted, params, RHO
        )
        for function in (per_example_gradient, reference.per_example_gradient)
    )
    assert_close(as_tuple(ours), theirs)


def test_weights_per_token_and_a_traced_loss_scale(x64):
    objective, params = problem("GPT", batch=4)
    weights = jnp.asarray(np.random.default_rng(0).uniform(0, 2, (4, 4))).at[1].set(0)
    weighted = objective.replace(weights=weights)
    ours = compile_quickly(
        lambda scale: per_example_gradient(weighted.replace(loss_scale=scale), params, RHO)
    )(2.0**12)
    theirs = compile_quickly(functools.partial(reference.per_example_gradient, weighted))(
        params, RHO
    )
    assert_close(as_tuple(ours), theirs)


def test_weights_that_are_all_zero_change_nothing():
    objective, params = problem("MLP")
    result = fast(objective.replace(weights=jnp.zeros(5)), params, RHO)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(result))


def test_the_loss_scale_keeps_half_precision_alive():
    """Gradients that float16 cannot hold; scaled they reach the result, and their norm the factor."""
    objective, params = problem("MLP")
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
    loss = objective.loss
    objective = objective.replace(
        inputs=objective.inputs.astype(jnp.float16),
        loss=lambda z, y: 1e-8 * loss(z.astype(jnp.float32), y),
    )
    without = fast(objective, narrow, RHO)
    scaled = fast(objective.replace(loss_scale=2.0**20), narrow, RHO)
    assert without.perturbation_norm == 0
    np.testing.assert_allclose(scaled.perturbation_norm, RHO, rtol=1e-3)


def without_biases():
    """A network all of whose leaves are planned with Gram matrices."""

    def apply(params, x):
        x = jnp.tanh(x.reshape(x.shape[0], -1) @ params["first"])
        return jnp.tanh(x @ params["second"]) @ params["head"]

    params = initial({"first": (108, 20), "second": (20, 20), "head": (20, 5)})
    objective, _ = problem("MLP")
    objective = objective.replace(apply_fn=apply)
    plan = make_plan(trace(objective, params), jax.tree.leaves(params), [True] * 3)
    assert {leaf.method for leaf in plan.leaves} == {GRAM}
    return objective, params


def test_all_leaves_by_gram_matrices(x64):
    objective, params = without_biases()
    assert_close(as_tuple(fast(objective, params, RHO)), naive(objective, params, RHO))


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_gram_norms_in_half_precision(dtype):
    objective, params = without_biases()
    params = jax.tree.map(lambda leaf: (0.3 * leaf).astype(dtype), params)
    # Squares of the first layer's inputs are above the largest float16.
    inputs = (300 * objective.inputs).astype(dtype)
    result = fast(objective.replace(inputs=inputs), params, 0.1)
    assert result.gradient_norm.dtype == jnp.float32
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    exact = fast(objective.replace(inputs=inputs.astype(jnp.float32)), wide, 0.1)
    np.testing.assert_allclose(result.gradient_norm, exact.gradient_norm, rtol=0.1)
    np.testing.assert_allclose(result.perturbation_norm, 0.1, rtol=1e-3)


def test_gram_norms_are_not_negative():
    """Where derivatives of equal inputs cancel, rounding may leave a negative squared norm."""
    rows, outputs, positions = 40, 30, 4
    negative = 0
    for seed in range(20):
        x, delta = (
            jax.random.normal(key, (width,))
            for key, width in zip(
                jax.random.split(jax.random.key(seed)), (rows, outputs), strict=True
            )
        )
        inputs = jnp.tile(x, (positions, 1))
        cotangent = jnp.stack([0.1 * delta, 0.2 * delta, 0.7 * delta, -delta])
        plain = jnp.sum((inputs @ inputs.T) * (cotangent @ cotangent.T))
        negative += plain < 0
        term = Term(DenseRows(inputs), DenseRows(cotangent))
        assert 0 <= squared_norm((term,)) < 1e-2
    assert negative  # or the test shows nothing


def test_microbatch_size_does_not_matter(x64):
    objective, params = problem("1-D convolution", batch=6)
    results = [
        fast(objective.replace(microbatch_size=size), params, RHO) for size in (1, 3, 6, None)
    ]
    for result in results[1:]:
        assert_close(result, results[0], 1e-13)


@pytest.mark.parametrize("evaluation", ["full", "logit_only"])
def test_float32_error_is_that_of_the_naive_form(evaluation):
    # Smooth networks: at a kink the error is whatever rounding decides.
    for name in ("MLP", "1-D convolution"):
        with jax.enable_x64(True):
            objective, params = problem(name)
            exact = compile_quickly(
                lambda p, o=objective: reference.per_example_gradient(
                    o, p, 0.1, evaluation=evaluation
                )[2]
            )(params)
        narrow = jax.tree.map(
            lambda leaf: leaf.astype(NARROW[leaf.dtype.type]), (objective, params)
        )
        plain = compile_quickly(
            lambda o, p: reference.per_example_gradient(o, p, 0.1, evaluation=evaluation)[2]
        )(*narrow)
        ours = compile_quickly(
            lambda o, p: per_example_gradient(o, p, 0.1, evaluation=evaluation).gradients
        )(*narrow)

        def error(gradients, exact=exact):
            squares = jax.tree.map(
                lambda g, e: np.sum((np.asarray(g, np.float64) - np.asarray(e)) ** 2),
                gradients,
                exact,
            )
            return np.sqrt(sum(jax.tree.leaves(squares)))

        assert error(ours) <= 2 * error(plain), name


def test_weights_cast_to_half_precision():
    """The error stays near that of the naive form, whose gradients XLA may keep in float32."""

    def apply(params, x, dtype=jnp.bfloat16):
        x = jnp.tanh(x.astype(dtype) @ params["first"].astype(dtype))
        return (x.reshape(x.shape[0], -1) @ params["head"].astype(dtype)).astype(jnp.float32)

    params = initial({"first": (3, 8), "head": (6 * 6 * 8, 3)})
    objective, _ = problem("MLP")
    narrow = objective.replace(apply_fn=apply)
    wide = objective.replace(apply_fn=functools.partial(apply, dtype=jnp.float32))
    exact = naive(wide, params, 0.1)[2]
    plain = naive(narrow, params, 0.1)[2]
    ours = fast(narrow, params, 0.1).gradients
    for name in params:
        error = np.linalg.norm(ours[name] - exact[name])
        assert error <= 2 * np.linalg.norm(plain[name] - exact[name])


def test_norms(x64):
    objective, params = problem("1-D convolution")
    result = compile_quickly(functools.partial(per_example_gradient, objective))(params, RHO)
    groups = objective.groups(1)

    def norm(inputs, labels):
        gradients = jax.grad(objective.replace(inputs=inputs, labels=labels))(params)
        return jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)))

    norms = compile_quickly(jax.vmap(norm))(groups.inputs, groups.labels)
    np.testing.assert_allclose(result.gradient_norm, norms.mean(), rtol=1e-10)
    np.testing.assert_allclose(result.perturbation_norm, RHO, rtol=1e-10)


def test_perturbs_nothing_where_the_gradient_vanishes(x64):
    def apply(params, x):
        return x @ params["kernel"]

    objective, _ = problem("MLP")
    inputs = jnp.ones((4, 3)).at[1].set(0)  # the second example has no gradient
    objective = objective.replace(apply_fn=apply, inputs=inputs, labels=jnp.arange(4) % 2)
    params = {"kernel": jnp.zeros((3, 2))}
    result = fast(objective, params, RHO)
    assert_close(as_tuple(result), naive(objective, params, RHO))
    np.testing.assert_allclose(result.perturbation_norm, 0.75 * RHO)
    nothing = fast(objective.replace(inputs=0 * inputs), params, RHO)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(nothing))
    assert nothing.perturbation_norm == 0


def test_indices_outside_of_the_table(x64):
    """An index that the lookup drops or clips has no gradient of its own, or its neighbour's."""
    table = jax.random.normal(jax.random.key(0), (50, 30))
    indices = jnp.array([[1, 60, 2], [60, 60, 49], [1, 1, 70]])
    objective, _ = problem("MLP")
    for mode in ("clip", "fill"):

        def apply(params, x, mode=mode):
            rows = jnp.take(params["table"], x, axis=0, mode=mode, fill_value=0.5)
            return jnp.tanh(rows.sum(1))

        batch = objective.replace(apply_fn=apply, inputs=indices, labels=jnp.arange(3))
        assert_close(
            as_tuple(fast(batch, {"table": table}, RHO)), naive(batch, {"table": table}, RHO)
        )
