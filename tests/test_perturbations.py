"""Stage 1: closed forms of the perturbations, degenerate gradients, half precision."""

import chex
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from optax_sam.perturbations.noise_compensation import choose_examples
from tests.problems import mlp_parameters


def perturb(stage, gradients, params=None, state=None):
    """One call of a stage, from gradients to the perturbation."""
    params = gradients if params is None else params
    return stage.update(gradients, stage.init(params) if state is None else state, params)[0]


def norm(tree):
    """The global norm in NumPy float64."""
    return np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(tree)))


def adaptive_by_hand(gradients, params, rho, eta, scaled=lambda name: True):
    """ASAM's formula in NumPy float64 over flat dictionaries."""
    g = {name: np.asarray(x, np.float64) for name, x in gradients.items()}
    t = {
        name: np.abs(np.asarray(params[name], np.float64)) + eta if scaled(name) else 1.0
        for name in g
    }
    length = norm({name: t[name] * g[name] for name in g})
    return {name: rho * t[name] ** 2 * g[name] / length for name in g}


reals = hypothesis.extra.numpy.arrays(
    np.float32,
    st.integers(1, 8),
    elements=st.floats(-1e3, 1e3, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6),
)


@pytest.mark.usefixtures("strict_promotion")
class TestNormalized:
    @hypothesis.given(reals, reals, st.floats(0, 10))
    def test_closed_form_over_several_leaves(self, left, right, rho):
        gradients = {"left": left, "right": right}
        perturbation = perturb(optax_sam.normalized(rho), gradients)
        length = norm(gradients)
        factor = rho / length if length else 0.0
        expected = jax.tree.map(lambda g: factor * g, gradients)
        chex.assert_trees_all_close(perturbation, expected, rtol=1e-5, atol=1e-12)

    def test_zero_rho_is_exactly_zero(self):
        for leaf in jax.tree.leaves(perturb(optax_sam.normalized(0.0), mlp_parameters())):
            assert not leaf.any()

    @pytest.mark.parametrize("jit", [False, True])
    def test_zero_gradient_gives_zero(self, jit):
        zeros = jax.tree.map(jnp.zeros_like, mlp_parameters())
        stage = optax_sam.normalized(0.1)
        call = jax.jit(lambda g: perturb(stage, g)) if jit else lambda g: perturb(stage, g)
        chex.assert_trees_all_equal(call(zeros), zeros)

    def test_derivative_at_a_zero_gradient_is_finite(self):
        jacobian = jax.jacrev(lambda g: perturb(optax_sam.normalized(0.1), g))(jnp.zeros(3))
        assert np.isfinite(jacobian).all()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_gradient_that_is_not_finite_is_passed_on_as_nan(self, bad):
        perturbation = perturb(optax_sam.normalized(0.1), jnp.array([1.0, bad]))
        assert np.isnan(perturbation[1])

    def test_nan_reaches_every_leaf(self):
        gradients = {"bad": jnp.array([jnp.nan]), "good": jnp.ones(2)}
        perturbation = perturb(optax_sam.normalized(0.1), gradients)
        assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(perturbation))

    def test_leaves_that_cannot_be_perturbed(self):
        gradients = {
            "w": jnp.array([3.0, 4.0]),
            "steps": jnp.array([100]),
            "none": None,
            "empty": {},
        }
        perturbation = perturb(optax_sam.normalized(1.0), gradients)
        np.testing.assert_allclose(perturbation["w"], [0.6, 0.8], rtol=1e-6)
        assert perturbation["steps"].tolist() == [100]  # not floating: untouched
        assert perturbation["none"] is None
        assert perturb(optax_sam.normalized(1.0), {}) == {}

    def test_schedule(self):
        stage = optax_sam.normalized(lambda count: jnp.array([0.5, 0.25, 1.0])[count])
        g = jnp.array([3.0, 4.0])
        state = stage.init(g)
        for rho in (0.5, 0.25, 1.0):
            perturbation, state = stage.update(g, state)
            np.testing.assert_allclose(perturbation, [0.6 * rho, 0.8 * rho], rtol=1e-6)
        assert int(state.count) == 3

    def test_refuses_a_bad_radius(self):
        for bad in (-0.1, float("nan")):
            with pytest.raises(ValueError, match=r"rho must lie in \[0, inf\), got"):
                optax_sam.normalized(bad)
        for bad in (None, "0.1", True):
            with pytest.raises(TypeError, match="rho must be a number or a schedule, got"):
                optax_sam.normalized(bad)


@pytest.mark.usefixtures("strict_promotion")
class TestAdaptive:
    gradients = {"weight": jnp.array([1.0, -2.0, 0.5]), "bias": jnp.array([0.3, 0.0])}  # noqa: RUF012
    params = {"weight": jnp.array([-0.5, 2.0, 0.0]), "bias": jnp.array([1.0, -1.0])}  # noqa: RUF012

    @pytest.mark.parametrize("eta", [0.0, 0.01, 1.0])
    @pytest.mark.parametrize("rho", [0.0, 0.5, 2.0])
    def test_closed_form(self, rho, eta):
        perturbation = perturb(optax_sam.adaptive(rho, eta), self.gradients, self.params)
        expected = adaptive_by_hand(self.gradients, self.params, rho, eta)
        chex.assert_trees_all_close(perturbation, expected, rtol=1e-6)

    @hypothesis.given(reals, st.integers(0, 2**32 - 1))
    def test_length_in_units_of_the_weights_is_rho(self, gradient, seed):
        """The constraint of the paper: the norm of epsilon / t is rho."""
        params = np.random.default_rng(seed).normal(size=gradient.shape).astype(np.float32)
        perturbation = perturb(optax_sam.adaptive(0.7, 0.01), gradient, params)
        length = norm(np.asarray(perturbation, np.float64) / (np.abs(params) + 0.01))
        np.testing.assert_allclose(length, 0.7 if gradient.any() else 0.0, rtol=1e-4)

    def test_rescaling_the_network_rescales_the_perturbation(self):
        """Weights c w have the gradient g / c; epsilon / w must not change (paper, section 3)."""
        first = perturb(optax_sam.adaptive(0.5, 0.0), self.gradients, self.params)
        scale = {"weight": 4.0, "bias": 0.25}
        second = perturb(
            optax_sam.adaptive(0.5, 0.0),
            {name: g / scale[name] for name, g in self.gradients.items()},
            {name: w * scale[name] for name, w in self.params.items()},
        )
        chex.assert_trees_all_close(
            second, {name: e * scale[name] for name, e in first.items()}, rtol=1e-6
        )

    @pytest.mark.parametrize(
        "mask",
        [
            {"weight": True, "bias": False},
            lambda params: {name: name == "weight" for name in params},
        ],
        ids=["tree", "function"],
    )
    def test_scale_mask(self, mask):
        """The authors' rule: t = 1 on biases, which still count in the norm."""
        perturbation = perturb(optax_sam.adaptive(0.5, 0.01, mask), self.gradients, self.params)
        expected = adaptive_by_hand(
            self.gradients, self.params, 0.5, 0.01, scaled=lambda name: name == "weight"
        )
        chex.assert_trees_all_close(perturbation, expected, rtol=1e-6)

    def test_scaling_nothing_is_sam(self):
        nothing = jax.tree.map(lambda _: False, self.params)
        stage = optax_sam.adaptive(0.5, scale_mask=nothing)
        perturbation = perturb(stage, self.gradients, self.params)
        expected = perturb(optax_sam.normalized(0.5), self.gradients)
        chex.assert_trees_all_close(perturbation, expected, rtol=1e-6)

    def test_eta_keeps_zero_weights_movable(self):
        zeros = jax.tree.map(jnp.zeros_like, self.params)
        fixed = perturb(optax_sam.adaptive(0.5, eta=0.0), self.gradients, zeros)
        assert not any(leaf.any() for leaf in jax.tree.leaves(fixed))
        moved = perturb(optax_sam.adaptive(0.5, eta=0.01), self.gradients, zeros)
        np.testing.assert_allclose(norm(moved), 0.5 * 0.01, rtol=1e-5)

    def test_zero_gradient_and_nan(self):
        zeros = jax.tree.map(jnp.zeros_like, self.gradients)
        chex.assert_trees_all_equal(perturb(optax_sam.adaptive(0.5), zeros, self.params), zeros)
        bad = self.gradients | {"bias": jnp.array([jnp.nan, 0.0])}
        perturbation = perturb(optax_sam.adaptive(0.5), bad, self.params)
        assert np.isnan(perturbation["weight"]).all()

    def test_leaves_that_cannot_be_perturbed(self):
        gradients = {"w": jnp.array([1.0]), "steps": jnp.array([5]), "none": None}
        params = {"w": jnp.array([2.0]), "steps": jnp.array([7]), "none": None}
        perturbation = perturb(optax_sam.adaptive(0.5, eta=0.0), gradients, params)
        np.testing.assert_allclose(perturbation["w"], [1.0], rtol=1e-6)
        assert perturbation["steps"].tolist() == [5]
        assert perturb(optax_sam.adaptive(0.5), {}, {}) == {}

    def test_errors(self):
        stage = optax_sam.adaptive(0.5)
        with pytest.raises(ValueError, match=r"adaptive\(\.\.\.\) needs the parameters"):
            stage.update(self.gradients, stage.init(self.params))
        with pytest.raises(ValueError, match=r"rho must lie in \[0, inf\), got -1"):
            optax_sam.adaptive(-1)
        with pytest.raises(ValueError, match=r"eta must lie in \[0, inf\), got -0\.1"):
            optax_sam.adaptive(0.5, eta=-0.1)
        stage = optax_sam.adaptive(0.5, scale_mask={"weight": True})
        with pytest.raises(ValueError, match="scale_mask does not match the parameters"):
            stage.update(self.gradients, stage.init(self.params), self.params)

    def test_a_schedule_for_eta_is_refused_at_once(self):
        """Only numbers are documented; a callable must not surface later as an array error."""
        with pytest.raises(TypeError, match="eta must be a number"):
            optax_sam.adaptive(0.5, eta=lambda count: 0.01)


@pytest.mark.usefixtures("strict_promotion")
class TestHalfPrecision:
    """Squares of float16 overflow above 256 and vanish below 2e-4: norms must not."""

    @pytest.mark.parametrize("size", [1e4, 6e4, 1.0, 1e-4, 1e-7], ids=str)
    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_normalized_has_length_rho(self, dtype, size):
        gradients = {"a": jnp.full(5000, size, dtype), "b": jnp.full((30, 7), -size, dtype)}
        perturbation = perturb(optax_sam.normalized(0.5), gradients)
        chex.assert_trees_all_equal_dtypes(perturbation, gradients)
        np.testing.assert_allclose(norm(perturbation), 0.5, rtol=5e-3)

    @pytest.mark.parametrize("size", [1e4, 1e-4, 1e-7], ids=str)
    def test_adaptive_has_length_rho(self, size):
        """With weights of 1e-3 the product t g of a small gradient is zero in float16."""
        gradients = {"a": jnp.full(5000, size, jnp.float16)}
        params = {"a": jnp.full(5000, 1e-3, jnp.float16)}
        perturbation = perturb(optax_sam.adaptive(100.0, eta=0.0), gradients, params)
        assert perturbation["a"].dtype == jnp.float16
        np.testing.assert_allclose(norm(perturbation) / 1e-3, 100, rtol=5e-3)

    def test_mixed_precision_keeps_each_leafs_dtype_and_one_global_norm(self):
        gradients = {"half": jnp.full(4, 3e4, jnp.float16), "single": jnp.full(4, 3e4)}
        perturbation = perturb(optax_sam.normalized(1.0), gradients)
        chex.assert_trees_all_equal_dtypes(perturbation, gradients)
        np.testing.assert_allclose(norm(perturbation), 1.0, rtol=1e-3)

    @pytest.mark.parametrize("method", [optax_sam.sam, optax_sam.asam, optax_sam.saner])
    def test_metrics_of_a_step_are_finite_and_single(self, method):
        params = {"w": jnp.ones(5000, jnp.float16)}
        gradients = {"w": jnp.full(5000, 1e4, jnp.float16)}
        tx = method(0.5)

        def loss_fn(p):
            return jnp.sum(p["w"].astype(jnp.float32))

        updates, state = tx.update(gradients, tx.init(params), params, loss_fn=loss_fn)
        metrics = optax_sam.get_metrics(state)
        assert updates["w"].dtype == jnp.float16
        assert metrics["perturbation_norm"].dtype == jnp.float32
        np.testing.assert_allclose(metrics["gradient_norm"], 1e4 * 5000**0.5, rtol=1e-3)
        np.testing.assert_allclose(metrics["perturbation_norm"], 0.5, rtol=2e-2)


@pytest.mark.usefixtures("strict_promotion")
class TestProjection:
    def test_shortens_only_what_is_longer(self):
        long, short = jnp.array([3.0, 4.0]), jnp.array([0.3, 0.4])
        np.testing.assert_allclose(perturb(optax_sam.project_to_ball(1.0), long), [0.6, 0.8])
        chex.assert_trees_all_equal(perturb(optax_sam.project_to_ball(1.0), short), short)

    @hypothesis.given(reals, st.floats(1e-3, 100))
    def test_equals_clipping_by_global_norm(self, perturbation, rho):
        actual = perturb(optax_sam.project_to_ball(rho), perturbation)
        expected = perturb(optax.clip_by_global_norm(rho), perturbation)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-30)
        assert norm(actual) <= rho * (1 + 1e-5)

    def test_zero_radius_zero_vector_and_nan(self):
        stage = optax_sam.project_to_ball(0.0)
        assert perturb(stage, jnp.array([3.0, 4.0])).tolist() == [0.0, 0.0]
        assert perturb(stage, jnp.zeros(2)).tolist() == [0.0, 0.0]
        bad = perturb(optax_sam.project_to_ball(1.0), jnp.array([jnp.nan, 1.0]))
        assert np.isnan(bad[0])

    def test_half_precision(self):
        perturbation = perturb(optax_sam.project_to_ball(1.0), jnp.full(5000, 1e4, jnp.float16))
        np.testing.assert_allclose(norm(perturbation), 1.0, rtol=5e-3)

    def test_schedule_and_error(self):
        stage = optax_sam.project_to_ball(lambda count: jnp.array([1.0, 0.5])[count])
        e = jnp.array([3.0, 4.0])
        first, state = stage.update(e, stage.init(e))
        second, _ = stage.update(e, state)
        np.testing.assert_allclose(second, first / 2)
        with pytest.raises(ValueError, match=r"rho must lie in \[0, inf\), got -1"):
            optax_sam.project_to_ball(-1)


@pytest.mark.usefixtures("strict_promotion")
class TestLossBudget:
    @hypothesis.given(reals, st.floats(0, 10), st.floats(0, 10))
    def test_the_loss_rises_by_sigma_or_the_radius_is_the_largest(self, gradient, sigma, rho_max):
        stage = optax_sam.loss_budget(sigma, rho_max)
        epsilon = np.asarray(perturb(stage, gradient), np.float64)
        length = norm(gradient)
        radius = min(sigma / length, rho_max) if length else 0.0
        unit = gradient / length if length else gradient
        np.testing.assert_allclose(epsilon, radius * unit, rtol=1e-4, atol=1e-12)
        known = stage.length(stage.init(gradient), jnp.float32(length))
        np.testing.assert_allclose(known, radius, rtol=1e-4, atol=1e-12)

    def test_schedules_of_both(self):
        stage = optax_sam.loss_budget(
            lambda t: jnp.array([1.0, 2.0])[t], lambda t: jnp.array([1.0, 0.1])[t]
        )
        g = jnp.array([3.0, 4.0])
        first, state = stage.update(g, stage.init(g))
        np.testing.assert_allclose(first, [0.12, 0.16], rtol=1e-6)
        np.testing.assert_allclose(stage.length(state, jnp.float32(5.0)), 0.1, rtol=1e-6)
        np.testing.assert_allclose(stage.update(g, state)[0], [0.06, 0.08], rtol=1e-6)

    def test_a_large_budget_is_sam_bit_for_bit(self):
        expected = perturb(optax_sam.normalized(0.3), mlp_parameters())
        chex.assert_trees_all_equal(
            perturb(optax_sam.loss_budget(1e6, 0.3), mlp_parameters()), expected
        )

    def test_zero_gradient_and_nan(self):
        stage = optax_sam.loss_budget(1.0, 0.5)
        assert perturb(stage, jnp.zeros(3)).tolist() == [0.0] * 3
        assert np.isnan(perturb(stage, jnp.array([jnp.nan, 1.0]))).all()


@pytest.mark.usefixtures("strict_promotion")
class TestScaleBySecondMoment:
    def test_is_the_direction_of_adam_without_momentum(self):
        gradients, moment = jnp.array([3.0, -4.0]), jnp.array([4.0, 1e-4])
        stage = optax_sam.scale_by_second_moment(epsilon=1e-3)
        scaled, _ = stage.update(
            {"w": gradients, "steps": jnp.arange(2), "none": None},
            stage.init(gradients),
            second_moment={"w": moment, "steps": jnp.zeros(2), "none": None},
            anything="else",
        )
        np.testing.assert_allclose(scaled["w"], [3 / 2.001, -4 / 0.011], rtol=1e-6)
        assert scaled["steps"].tolist() == [0, 1]

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_before_the_first_step_it_climbs_along_the_gradient(self, dtype):
        """g / ε overflows in float16."""
        gradients = jnp.array([3.0, 4.0], dtype)
        stage = optax.chain(optax_sam.scale_by_second_moment(), optax_sam.normalized(1.0))
        epsilon, _ = stage.update(
            gradients, stage.init(gradients), second_moment=jnp.zeros_like(gradients)
        )
        np.testing.assert_allclose(epsilon, [0.6, 0.8], rtol=1e-5)


class TestMovingAverages:
    gradients = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)

    def outputs(self, stage):
        state, results = stage.init(jnp.zeros(3)), []
        for gradient in self.gradients:
            result, state = stage.update(jnp.asarray(gradient), state)
            results.append(np.asarray(result))
        return results, state

    def test_vasso_average_includes_the_current_gradient(self):
        results, state = self.outputs(optax_sam.moving_average(0.3))
        m = self.gradients[0]
        for t, result in enumerate(results):
            m = m if t == 0 else 0.7 * m + 0.3 * self.gradients[t]
            np.testing.assert_allclose(result, m, rtol=1e-5)
        np.testing.assert_allclose(state.average, m, rtol=1e-5)
        assert int(state.count) == 5

    def test_vasso_with_theta_one_is_the_gradient(self):
        results, _ = self.outputs(optax_sam.moving_average(1.0))
        np.testing.assert_array_equal(results, self.gradients)

    def test_friendly_sam_subtracts_the_average_before_this_gradient(self):
        results, state = self.outputs(optax_sam.subtract_moving_average(0.5, decay=0.6))
        np.testing.assert_array_equal(results[0], self.gradients[0])  # the first step is SAM
        m = self.gradients[0]
        for t in range(1, 5):
            np.testing.assert_allclose(results[t], self.gradients[t] - 0.5 * m, rtol=1e-5)
            # The average is over the gradients, not over the differences (a bug seen elsewhere).
            m = 0.6 * m + 0.4 * self.gradients[t]
        np.testing.assert_allclose(state.average, m, rtol=1e-5)

    def test_friendly_sam_with_sigma_zero_is_the_gradient(self):
        results, _ = self.outputs(optax_sam.subtract_moving_average(0.0))
        np.testing.assert_array_equal(results, self.gradients)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"theta must lie in \(0, 1\], got 2"):
            optax_sam.moving_average(2)
        with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\], got -1"):
            optax_sam.subtract_moving_average(decay=-1)

    def test_theta_zero_is_refused_as_documented(self):
        """0 < theta: with 0 the average would never leave the first gradient."""
        with pytest.raises(ValueError, match="theta must lie in"):
            optax_sam.moving_average(0.0)


class TestNoiseCompensationDraws:
    """NCSAM's choice of examples: without replacement, with p in proportion to 1 / (1 + gap)."""

    gaps = jnp.array([0.0, 0.5, 1.0, 2.0, 4.0, 8.0])

    def draws(self, flip_ratio, number):
        logits = jnp.stack([self.gaps, jnp.zeros(6), jnp.full(6, -9.0)], axis=1)
        keys = jax.random.split(jax.random.key(0), number)
        draw = jax.vmap(lambda key: choose_examples(logits, flip_ratio, key))
        return np.asarray(jax.jit(draw)(keys))

    def test_the_gap_is_between_the_two_largest_logits(self):
        """Whatever their sign, and also if they are equal."""
        logits = jnp.array(
            [[-5.0, -1.0, -4.0], [-2.0, -9.0, -2.5], [3.0, 3.0, -1.0], [0.0, 2.0, -7.0]]
        )
        for count, expected in [(1, [2]), (2, [2, 1]), (3, [2, 1, 3])]:  # gaps 3, 0.5, 0, 2
            chosen = choose_examples(logits, count / 4, None)
            np.testing.assert_array_equal(chosen, expected)

    def test_frequencies_of_one_draw(self):
        number = 20_000
        first = self.draws(0.2, number)
        assert first.shape == (number, 1)
        frequencies = np.bincount(first[:, 0], minlength=6) / number
        weights = 1 / (1 + np.asarray(self.gaps))
        expected = weights / weights.sum()
        deviation = np.sqrt(expected * (1 - expected) / number)
        assert np.all(np.abs(frequencies - expected) < 4 * deviation)

    def test_draws_are_distinct(self):
        chosen = np.sort(self.draws(0.5, 200), axis=1)
        assert chosen.shape == (200, 3)
        assert np.all(np.diff(chosen, axis=1) > 0)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize(
    "stage",
    [
        optax_sam.normalized(0.1),
        optax_sam.adaptive(0.1),
        optax.chain(optax_sam.moving_average(0.5), optax_sam.normalized(0.1)),
        optax.chain(optax_sam.subtract_moving_average(), optax_sam.normalized(0.1)),
    ],
    ids=["normalized", "adaptive", "moving average", "subtracted average"],
)
def test_the_size_of_the_loss_is_no_matter(stage, size):
    """ε depends on the gradient's direction alone, over the range of float32."""
    params = {"a": jnp.array([0.5, -2.0]), "b": jnp.array([3.0])}
    gradients = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([12.0])}

    def perturbation(size):
        scaled = jax.tree.map(lambda g: g * size, gradients)
        return stage.update(scaled, stage.init(params), params)[0]

    chex.assert_trees_all_close(perturbation(size), perturbation(1.0), rtol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_the_size_of_what_is_projected_is_no_matter(size):
    perturbation = {"a": jnp.array([3.0, -4.0]) * size, "b": jnp.array([12.0]) * size}
    projected = perturb(optax_sam.project_to_ball(1.3 * size), perturbation)
    expected = jax.tree.map(lambda leaf: 0.1 * leaf, perturbation)
    chex.assert_trees_all_close(projected, expected, rtol=1e-5)
