"""Stage 3: down-weighting against a per-coordinate loop, sets, decompositions, schedules."""

from pathlib import Path

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
from tests.references.coordinates import down_weighted, set_of

GOLDEN = Path(__file__).parent / "golden" / "golden.npz"


def combine(stage, perturbed, clean, state=None):
    """One call of a combination: (g', g) to (d, state)."""
    state = stage.init(clean) if state is None else state
    return stage.update(perturbed, state, clean_grads=clean)


SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
SMALLEST_SUBNORMAL = float(np.finfo(np.float32).smallest_subnormal)
SPECIAL = (
    0.0,
    1.0,
    2.0,
    0.5,
    SMALLEST_NORMAL,
    float(np.float32(3.4e38)),
    float(np.float32(1e-30)),
    np.inf,
    np.nan,
)
special = st.sampled_from([sign * value for value in SPECIAL for sign in (1, -1)])
coordinates = st.one_of(
    special, st.floats(width=32, allow_subnormal=False), st.floats(-2, 2, width=16)
)


def pairs(elements):
    """Equally long lists of clean and perturbed coordinates."""
    return st.lists(st.tuples(elements, elements), min_size=1, max_size=12)


def as_arrays(values):
    clean, perturbed = np.array(values, np.float32).T
    return clean, perturbed


class TestDownWeight:
    @pytest.mark.usefixtures("strict_promotion")
    @hypothesis.given(pairs(coordinates), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    @hypothesis.settings(max_examples=300)
    def test_equals_the_loop_over_coordinates(self, values, alpha):
        clean, perturbed = as_arrays(values)
        direction, state = combine(optax_sam.down_weight(alpha), perturbed, clean)
        expected = np.array(down_weighted(clean, perturbed, alpha), np.float32)
        # Halving or quartering the smallest normal numbers leaves the normal range.
        np.testing.assert_allclose(direction, expected, rtol=1e-6, atol=SMALLEST_NORMAL)
        share = np.mean([set_of(c, p) == "B" for c, p in zip(clean, perturbed, strict=True)])
        np.testing.assert_allclose(state.down_weighted_fraction, share, rtol=1e-6)

    @pytest.mark.usefixtures("strict_promotion")
    @pytest.mark.parametrize("zero", [0.0, -0.0])
    def test_zeros_of_either_sign_are_never_down_weighted(self, zero):
        clean = jnp.array([zero, zero, zero, 1.0, -1.0])
        perturbed = jnp.array([1.0, -1.0, zero, zero, zero])
        direction, state = combine(optax_sam.down_weight(1.0), perturbed, clean)
        np.testing.assert_array_equal(direction, perturbed)
        assert float(state.down_weighted_fraction) == 0.0

    @pytest.mark.usefixtures("strict_promotion")
    @hypothesis.given(pairs(st.integers(-4, 4).map(lambda n: n * SMALLEST_SUBNORMAL)))
    def test_subnormal_coordinates_stay_subnormal_or_zero(self, values):
        """A processor may flush them to zero; nothing else may come of them."""
        clean, perturbed = as_arrays(values)
        direction, _ = combine(optax_sam.down_weight(0.5), perturbed, clean)
        assert (np.abs(np.asarray(direction)) <= np.abs(perturbed)).all()

    @hypothesis.given(pairs(coordinates))
    def test_alpha_zero_is_sam_bit_for_bit(self, values):
        clean, perturbed = as_arrays(values)
        direction, _ = combine(optax_sam.down_weight(0.0), perturbed, clean)
        np.testing.assert_array_equal(direction, perturbed)

    def test_alpha_one_drops_set_b(self):
        clean = jnp.array([1.0, 1.0, 1.0, -1.0, -1.0])
        perturbed = jnp.array([0.5, 1.0, -0.5, -0.5, -2.0])
        direction, state = combine(optax_sam.down_weight(1.0), perturbed, clean)
        assert direction.tolist() == [0.0, 1.0, -0.5, 0.0, -2.0]
        np.testing.assert_allclose(state.down_weighted_fraction, 2 / 5)

    def test_equal_gradients_are_left_alone(self):
        """rho = 0 is the base optimizer: r = 1 is not below 1, for both signs."""
        g = jnp.array([1.0, -1.0, 1e-8, -1e-8, 0.0])
        direction, _ = combine(optax_sam.down_weight(1.0), g, g)
        np.testing.assert_array_equal(direction, g)

    def test_the_authors_edge_cases(self, x64):
        """``ratio_epsilon=1e-8`` is the authors' code; their alpha is our 1 - alpha."""
        golden = np.load(GOLDEN)
        clean, perturbed = golden["edge/saner_ratio/g"], golden["edge/saner_ratio/gp"]
        expected = golden["edge/saner_ratio/d_alpha0.25"]
        stage = optax_sam.down_weight(0.75, ratio_epsilon=1e-8)
        direction, _ = combine(stage, jnp.asarray(perturbed), jnp.asarray(clean))
        np.testing.assert_allclose(direction, expected, rtol=1e-15)
        # The paper's own condition differs there, so the argument matters.
        paper, _ = combine(optax_sam.down_weight(0.75), jnp.asarray(perturbed), jnp.asarray(clean))
        assert (np.asarray(paper) != expected).sum() >= 5

    def test_trees_dtypes_and_leaves_without_gradient(self):
        clean = {"w": jnp.ones(3, jnp.bfloat16), "steps": jnp.array([0]), "none": None}
        perturbed = clean | {"w": jnp.array([0.5, 2.0, -1.0], jnp.bfloat16)}
        direction, state = combine(optax_sam.down_weight(0.5), perturbed, clean)
        assert direction["w"].dtype == jnp.bfloat16
        assert direction["w"].tolist() == [0.25, 2.0, -1.0]
        assert direction["steps"].tolist() == [0]
        np.testing.assert_allclose(state.down_weighted_fraction, 1 / 3, rtol=1e-6)
        direction, state = combine(optax_sam.down_weight(0.5), {}, {})
        assert direction == {}
        assert float(state.down_weighted_fraction) == 0.0

    def test_schedule(self):
        stage = optax_sam.down_weight(lambda count: jnp.array([0.0, 0.5, 1.0])[count])
        clean, perturbed = jnp.ones(1), jnp.full(1, 0.5)
        state = stage.init(clean)
        for expected in (0.5, 0.25, 0.0):
            direction, state = combine(stage, perturbed, clean, state)
            assert direction.tolist() == [expected]
        assert int(state.alpha.count) == 3

    def test_errors(self):
        for bad in (-0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got .*0 is SAM"):
                optax_sam.down_weight(bad)
        with pytest.raises(TypeError, match=r"alpha must be a number or a schedule, got '0\.5'"):
            optax_sam.down_weight("0.5")
        with pytest.raises(ValueError, match=r"ratio_epsilon must lie in \[0, inf\), got -1"):
            optax_sam.down_weight(0.5, ratio_epsilon=-1)

    def test_mask(self):
        """Down-weights where it is True, and counts its share there."""
        clean = {"body": jnp.ones(3), "head": jnp.ones(4), "steps": jnp.arange(2)}
        perturbed = {"body": jnp.full(3, 0.5), "head": jnp.array([0.5, 2.0, -1.0, 3.0])}
        perturbed["steps"] = clean["steps"]
        for mask in (
            {"body": False, "head": True, "steps": False},
            lambda params: {name: name == "head" for name in params},
        ):
            stage = optax_sam.down_weight(0.5, mask=mask)
            direction, state = stage.update(
                perturbed, stage.init(clean), clean, clean_grads=clean, anything="else"
            )
            np.testing.assert_array_equal(direction["body"], perturbed["body"])
            np.testing.assert_array_equal(direction["head"], [0.25, 2.0, -1.0, 3.0])
            np.testing.assert_array_equal(direction["steps"], perturbed["steps"])
            assert float(state.down_weighted_fraction) == 0.25

    def test_a_mask_of_all_is_none(self):
        clean, perturbed = {"a": jnp.ones(3)}, {"a": jnp.array([0.5, 2.0, -1.0])}
        stage = optax_sam.down_weight(0.5, mask={"a": True})
        masked = stage.update(perturbed, stage.init(clean), clean, clean_grads=clean)
        chex.assert_trees_all_equal(masked, combine(optax_sam.down_weight(0.5), perturbed, clean))


class TestCoordinates:
    ALL = ("", "A", "B", "C", "AB", "AC", "BC", "ABC")

    @pytest.mark.parametrize("sets", ALL)
    @hypothesis.given(pairs(coordinates))
    @hypothesis.settings(max_examples=60)
    def test_equals_the_loop_over_coordinates(self, sets, values):
        clean, perturbed = as_arrays(values)
        direction, _ = combine(optax_sam.restrict_to_coordinates(sets), perturbed, clean)
        expected = [p if set_of(c, p) in sets else c for c, p in zip(clean, perturbed, strict=True)]
        np.testing.assert_array_equal(direction, expected)

    @pytest.mark.parametrize("ratio_epsilon", [None, 1e-8])
    @hypothesis.given(pairs(coordinates))
    @hypothesis.settings(max_examples=100)
    def test_every_coordinate_is_in_exactly_one_set(self, ratio_epsilon, values):
        """SAM's gradient marked by 1 and the clean one by 0: the three shares add up to 1."""
        clean, perturbed = as_arrays(values)
        members = np.zeros(clean.shape, int)
        for letter in "ABC":
            stage = optax_sam.restrict_to_coordinates(letter, ratio_epsilon)
            # NaN marks the clean gradient's coordinates that are kept: compare bit patterns.
            direction, _ = combine(stage, perturbed, clean)
            kept = np.asarray(direction).view(np.int32) == perturbed.view(np.int32)
            ambiguous = clean.view(np.int32) == perturbed.view(np.int32)
            members += np.where(ambiguous, 0, kept)
        same = clean.view(np.int32) == perturbed.view(np.int32)
        np.testing.assert_array_equal(members, np.where(same, 0, 1))

    def test_all_sets_are_sam_and_none_is_the_base_optimizer(self):
        clean, perturbed = jnp.array([1.0, 1.0, 1.0]), jnp.array([2.0, 0.5, -1.0])
        everything, _ = combine(optax_sam.restrict_to_coordinates("ABC"), perturbed, clean)
        np.testing.assert_array_equal(everything, perturbed)
        nothing, _ = combine(optax_sam.restrict_to_coordinates(""), perturbed, clean)
        np.testing.assert_array_equal(nothing, clean)
        lower, _ = combine(optax_sam.restrict_to_coordinates("ac"), perturbed, clean)
        assert lower.tolist() == [2.0, 1.0, -1.0]

    @pytest.mark.parametrize("bad", ["D", "A,B", 3, None, ["A"]])
    def test_refuses_other_letters(self, bad):
        with pytest.raises(ValueError, match=r"sets must be letters out of 'ABC'.*got"):
            optax_sam.restrict_to_coordinates(bad)

    def test_refuses_a_negative_offset(self):
        with pytest.raises(ValueError, match=r"ratio_epsilon must lie in \[0, inf\), got -1"):
            optax_sam.restrict_to_coordinates("A", ratio_epsilon=-1)


vectors = hypothesis.extra.numpy.arrays(
    np.float32, 6, elements=st.floats(-10, 10, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
)


class TestDecomposition:
    @hypothesis.given(vectors, vectors, st.sampled_from([0.1, 0.7]))
    def test_gsam_closed_form(self, clean, perturbed, alpha):
        direction, _ = combine(optax_sam.subtract_orthogonal(alpha), perturbed, clean)
        g, h = clean.astype(np.float64), perturbed.astype(np.float64)
        orthogonal = g - (g @ h) / (h @ h) * h if h.any() else g
        np.testing.assert_allclose(direction, h - alpha * orthogonal, rtol=1e-4, atol=1e-4)

    def test_gsam_acts_on_the_global_vector(self):
        """Over two leaves the split is that of the concatenated vectors."""
        clean = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
        perturbed = {"a": jnp.array([2.0, -1.0]), "b": jnp.array([0.5])}
        tree, _ = combine(optax_sam.subtract_orthogonal(0.3), perturbed, clean)

        def flat(t):
            return jnp.concatenate([t["a"], t["b"]])

        whole, _ = combine(optax_sam.subtract_orthogonal(0.3), flat(perturbed), flat(clean))
        np.testing.assert_allclose(flat(tree), whole, rtol=1e-6)

    def test_gsam_with_alpha_zero_is_sam(self):
        direction, _ = combine(
            optax_sam.subtract_orthogonal(0.0), jnp.array([2.0, 1.0]), jnp.array([1.0, 3.0])
        )
        assert direction.tolist() == [2.0, 1.0]

    def test_looksam_closed_form(self):
        clean, perturbed = np.array([1.0, 2.0, 2.0]), np.array([2.0, 0.0, 1.0])
        stage = optax_sam.reuse_orthogonal(0.7)
        state = stage.init(jnp.zeros(3))
        direction, state = stage.update(
            jnp.asarray(perturbed, jnp.float32),
            state,
            clean_grads=jnp.asarray(clean, jnp.float32),
            is_ascent_step=True,
        )
        np.testing.assert_allclose(direction, perturbed, rtol=1e-6)  # SAM on the ascent step
        v = perturbed - (perturbed @ clean) / (clean @ clean) * clean
        np.testing.assert_allclose(state.orthogonal, v, rtol=1e-5, atol=1e-6)
        new = np.array([0.0, 3.0, 4.0])
        direction, _ = stage.update(
            jnp.asarray(new, jnp.float32),
            state,
            clean_grads=jnp.asarray(new, jnp.float32),
            is_ascent_step=False,
        )
        np.testing.assert_allclose(direction, new + 0.7 * 5 / np.linalg.norm(v) * v, rtol=1e-5)

    @pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
    @pytest.mark.parametrize(
        "stage",
        [optax_sam.subtract_orthogonal(0.3), optax_sam.reuse_orthogonal()],
        ids=["gsam", "looksam"],
    )
    def test_large_and_small_gradients_are_split_alike(self, stage, size):
        """The products of the gradients leave the range of float32, their directions do not."""
        clean, perturbed = jnp.array([1.0, 2.0, 2.0]), jnp.array([2.0, 0.0, 1.0])

        def directions(size):
            g, h = {"a": clean * size}, {"a": perturbed * size}
            first, state = stage.update(h, stage.init(g), clean_grads=g, is_ascent_step=True)
            second, _ = stage.update(g, state, clean_grads=g, is_ascent_step=False)
            return jnp.stack([first["a"], second["a"]]) / size

        np.testing.assert_allclose(directions(size), directions(1.0), rtol=1e-5)

    def test_looksam_does_not_blow_up_rounding(self):
        """Where g' is parallel to g, what is left beside g is rounding: the step between is SGD's."""
        clean = jax.random.normal(jax.random.key(0), (1000,))
        stage = optax_sam.reuse_orthogonal(0.7)
        for perturbed in (clean, 0.3 * clean, -1.7 * clean):
            _, state = stage.update(
                perturbed, stage.init(clean), clean_grads=clean, is_ascent_step=True
            )
            direction, _ = stage.update(clean, state, clean_grads=clean, is_ascent_step=False)
            np.testing.assert_array_equal(direction, clean)

    def test_looksam_does_not_blow_up_rounding_of_half_precision(self):
        clean = jax.random.normal(jax.random.key(0), (1000,), jnp.bfloat16)
        stage = optax_sam.reuse_orthogonal(0.7)
        _, state = stage.update(
            0.3 * clean, stage.init(clean), clean_grads=clean, is_ascent_step=True
        )
        direction, _ = stage.update(clean, state, clean_grads=clean, is_ascent_step=False)
        np.testing.assert_array_equal(direction, clean)

    @pytest.mark.parametrize(("dtype", "small"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-6)])
    def test_looksam_keeps_a_small_part_that_is_no_rounding(self, dtype, small):
        clean = jnp.zeros(1000, dtype).at[0].set(1.0)
        perturbed = clean.at[1].set(small)
        stage = optax_sam.reuse_orthogonal(0.7)
        _, state = stage.update(
            perturbed, stage.init(clean), clean_grads=clean, is_ascent_step=True
        )
        direction, _ = stage.update(clean, state, clean_grads=clean, is_ascent_step=False)
        expected = clean.astype(jnp.float32).at[1].set(0.7)
        rtol = 1e-5 if dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(direction.astype(jnp.float32), expected, rtol=rtol, atol=1e-3)

    def test_looksam_refuses_a_negative_alpha(self):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, inf\), got -1"):
            optax_sam.reuse_orthogonal(-1)


class TestExtrapolation:
    @hypothesis.given(vectors, vectors, st.sampled_from([0.0, 0.25, 0.5, 0.9]))
    def test_closed_form(self, clean, perturbed, gamma):
        direction, _ = combine(optax_sam.extrapolate(gamma), perturbed, clean)
        expected = clean + gamma / (1 - gamma) * (perturbed - clean)
        np.testing.assert_allclose(direction, expected, rtol=1e-4, atol=2e-4)

    @hypothesis.given(vectors, vectors)
    def test_gamma_zero_and_one_half_are_sgd_and_sam_exactly(self, clean, perturbed):
        sgd, _ = combine(optax_sam.extrapolate(0.0), perturbed, clean)
        np.testing.assert_array_equal(sgd, clean)
        sam, _ = combine(optax_sam.extrapolate(0.5), perturbed, clean)
        np.testing.assert_array_equal(sam, perturbed)

    @pytest.mark.parametrize("bad", [-0.1, 1.0, 1, 2.0])
    def test_refuses_gamma_outside_of_0_to_1(self, bad):
        with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\), got"):
            optax_sam.extrapolate(bad)


class TestRenormalize:
    @pytest.mark.usefixtures("strict_promotion")
    @hypothesis.given(vectors, vectors)
    def test_has_the_direction_of_one_and_the_length_of_the_other(self, clean, perturbed):
        direction, _ = combine(optax_sam.renormalize(), {"a": perturbed}, {"a": clean})
        g, h = clean.astype(np.float64), perturbed.astype(np.float64)
        expected = np.linalg.norm(g) / np.linalg.norm(h) * h if h.any() else 0 * h
        np.testing.assert_allclose(direction["a"], expected, rtol=1e-5, atol=1e-30)

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_the_norms_of_half_precision_are_single(self, dtype):
        clean, perturbed = jnp.full(5000, 1e4, dtype), jnp.full(5000, 1.0, dtype)
        direction, _ = combine(optax_sam.renormalize(), perturbed, clean)
        assert direction.dtype == dtype
        np.testing.assert_allclose(np.asarray(direction, np.float32), 1e4, rtol=1e-2)

    def test_nan_is_passed_on(self):
        direction, _ = combine(
            optax_sam.renormalize(), jnp.array([jnp.nan, 1.0]), jnp.array([1.0, 1.0])
        )
        assert np.isnan(direction).all()


class TestDecouple:
    def test_closed_form_with_momentum(self):
        stage = optax_sam.decouple(optax.trace(0.5))
        state = stage.init(jnp.zeros(2))
        momentum = np.zeros(2)
        for clean, perturbed in (([1.0, 2.0], [3.0, 2.0]), ([0.0, 1.0], [-1.0, 1.0])):
            momentum = 0.5 * momentum + np.array(clean)
            direction, state = stage.update(
                jnp.array(perturbed), state, clean_grads=jnp.array(clean)
            )
            expected = momentum + np.array(perturbed) - np.array(clean)
            np.testing.assert_allclose(direction, expected, rtol=1e-6)
        assert isinstance(state, optax_sam.DecouplingState)

    def test_without_a_sharpness_term_it_is_the_base_optimizer_bit_for_bit(self):
        clean = jax.random.normal(jax.random.key(0), (100,))
        stage, adam = optax_sam.decouple(optax.scale_by_adam()), optax.scale_by_adam()
        direction, _ = combine(stage, clean, clean)
        np.testing.assert_array_equal(direction, adam.update(clean, adam.init(clean))[0])

    def test_the_base_optimizer_gets_the_parameters_and_other_arguments(self):
        def update(updates, state, params=None, *, value, **extra_args):
            assert "clean_grads" not in extra_args
            return jax.tree.map(lambda u, p: u + value * p, updates, params), state

        base = optax.GradientTransformationExtraArgs(lambda params: (), update)
        stage, g = optax_sam.decouple(base), jnp.ones(2)
        direction, _ = stage.update(g, stage.init(g), 2 * g, clean_grads=g, value=3.0)
        np.testing.assert_array_equal(direction, [7.0, 7.0])


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (optax_sam.down_weight(), "down_weight"),
        (optax_sam.restrict_to_coordinates("B"), "restrict_to_coordinates"),
        (optax_sam.subtract_orthogonal(0.1), "subtract_orthogonal"),
        (optax_sam.reuse_orthogonal(), "reuse_orthogonal"),
        (optax_sam.extrapolate(0.5), "extrapolate"),
        (optax_sam.renormalize(), "renormalize"),
        (optax_sam.decouple(optax.trace(0.9)), "decouple"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_combinations_outside_of_the_engine_say_what_they_miss(stage, name):
    with pytest.raises(ValueError, match=rf"{name} compares.*pass clean_grads="):
        stage.update(jnp.ones(2), stage.init(jnp.ones(2)))


class TestWarmupOfAlpha:
    # The authors' get_alpha for epochs 1 to 7: their multiplier of set B is 1 - alpha.
    AUTHORS = (
        (0.5, 5, [0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5]),
        (0.0, 3, [0.6666666666666667, 0.33333333333333337, 0.0, 0.0, 0.0, 0.0, 0.0]),
        (0.5, 1, [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
    )

    @pytest.mark.parametrize(("final_multiplier", "epochs", "multipliers"), AUTHORS)
    @pytest.mark.parametrize("steps_per_epoch", [1, 4])
    def test_equals_the_authors_schedule(
        self, final_multiplier, epochs, multipliers, steps_per_epoch
    ):
        schedule = optax_sam.linear_warmup_alpha(1 - final_multiplier, epochs, steps_per_epoch)
        for epoch, multiplier in enumerate(multipliers):
            for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
                np.testing.assert_allclose(1 - schedule(step), multiplier, rtol=1e-6, atol=1e-7)

    def test_works_on_traced_steps_and_in_a_method(self):
        schedule = optax_sam.linear_warmup_alpha(0.5, 5, 10)
        traced = jax.jit(jax.vmap(schedule))(jnp.arange(60))
        assert float(traced.max()) == 0.5
        assert (np.diff(traced) >= 0).all()
        clean, perturbed = jnp.ones(1), jnp.full(1, 0.5)
        direction, _ = combine(optax_sam.down_weight(schedule), perturbed, clean)
        np.testing.assert_allclose(direction, 0.9 * 0.5, rtol=1e-6)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 1\.5"):
            optax_sam.linear_warmup_alpha(1.5, 5, 10)
        with pytest.raises(ValueError, match="warmup_epochs must be at least 1, got 0"):
            optax_sam.linear_warmup_alpha(0.5, 0, 10)
        with pytest.raises(ValueError, match="steps_per_epoch must be at least 1, got -3"):
            optax_sam.linear_warmup_alpha(0.5, 5, -3)
        with pytest.raises(TypeError, match=r"warmup_epochs must be an integer, got 5\.0"):
            optax_sam.linear_warmup_alpha(0.5, 5.0, 10)


class TestNoiseCompensationSchedule:
    def test_closed_form(self):
        schedule = optax_sam.noise_compensation_schedule(0.3, total_steps=40)
        for step in range(60):
            t = min(step / 40, 1)
            np.testing.assert_allclose(
                schedule(step), 0.3 * min(1, 2 * (3 - 2 * t) * t**2), rtol=1e-6, atol=1e-7
            )
        assert float(schedule(20)) == pytest.approx(0.3)  # saturates at half of the training
        assert float(schedule(19)) < 0.3

    def test_errors(self):
        with pytest.raises(ValueError, match=r"kappa must lie in \[0, inf\), got -1"):
            optax_sam.noise_compensation_schedule(-1, 10)
        with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
            optax_sam.noise_compensation_schedule(0.1, 0)


def test_combinations_in_a_chain_see_the_same_clean_gradient():
    """GSAM + SANER: the ratio's denominator is the raw g, its numerator the decomposed g'."""
    clean, perturbed = jnp.array([1.0, 2.0, -1.0]), jnp.array([0.9, -1.0, -3.0])
    chained = optax.chain(optax_sam.subtract_orthogonal(0.3), optax_sam.down_weight(0.5))
    direction, _ = combine(chained, perturbed, clean)
    decomposed, _ = combine(optax_sam.subtract_orthogonal(0.3), perturbed, clean)
    expected = np.array(down_weighted(clean, decomposed, 0.5), np.float32)
    chex.assert_trees_all_close(direction, expected, rtol=1e-6)
    assert (np.asarray(direction) != np.asarray(decomposed)).any()
