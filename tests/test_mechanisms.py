"""How SANER, J-SAM and NCSAM do what they do: the instruments, against NumPy on linear networks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from optax_sam import Objective, _cost
from optax_sam.diagnostics import (
    angle,
    compensation_geometry,
    damping,
    factor_changes,
    hessian_vector_product,
    last_layer_norms,
    shares_by_label,
)

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=(12, 4))
LABELS = np.arange(12) % 3
WRONG = np.arange(12) % 4 == 0
W = GENERATOR.normal(size=(4, 3))
EPSILON = 0.3 * GENERATOR.normal(size=(4, 3))
EQUAL = np.ones(12)
WEIGHTS = GENERATOR.uniform(0.5, 2, size=12)


def linear(params, inputs):
    return inputs @ params["w"]


def objective(**options):
    return Objective(linear, jnp.float32(INPUTS), jnp.asarray(LABELS), **options)


def as_params(w):
    return {"w": jnp.float32(w)}


def gradient(w, weights=EQUAL, labels=LABELS):
    """Of the weighted mean cross-entropy over all 12 examples, where some weights may be zero."""
    p = np.exp(INPUTS @ w)
    p /= p.sum(1, keepdims=True)
    return INPUTS.T @ (weights[:, None] * (p - np.eye(3)[labels]))


def unit(vector):
    return vector / np.linalg.norm(vector)


def by_ratio(clean, perturbed):
    r = perturbed / clean
    return np.mean(r >= 1), np.mean((r > 0) & (r < 1)), np.mean(r <= 0)


class TestSharesByLabel:
    @pytest.mark.parametrize("weights", [None, WEIGHTS])
    def test_each_kind_has_its_own_gradient_and_the_batch_their_sum(self, weights):
        v = np.ones(12) if weights is None else weights
        given = None if weights is None else jnp.float32(weights)
        found = shares_by_label(
            objective(weights=given, penalty=lambda p: 9 * jnp.sum(p["w"] ** 2)),
            as_params(W), as_params(EPSILON), WRONG,
        )  # fmt: skip
        for shares, chosen in zip(found, (np.ones(12), ~WRONG, WRONG), strict=True):
            expected = by_ratio(gradient(W, v * chosen), gradient(W + EPSILON, v * chosen))
            np.testing.assert_allclose(shares, expected, atol=1e-6)
        assert len({float(shares.b) for shares in found}) > 1

    def test_without_wrong_labels_the_right_ones_are_all(self):
        found = shares_by_label(objective(), as_params(W), as_params(EPSILON), np.zeros(12, bool))
        assert found.right == found.all
        assert found.wrong == (0, 0, 1)

    def test_the_ratio_is_a_number_of_any_kind(self):
        given = objective(), as_params(W), as_params(EPSILON), WRONG
        expected = shares_by_label(*given, ratio_epsilon=1e-8)
        assert shares_by_label(*given, ratio_epsilon=jnp.float32(1e-8)) == expected
        with pytest.raises(ValueError, match=r"ratio_epsilon must lie in \[0, inf\), got -1"):
            shares_by_label(*given, ratio_epsilon=-1)


class TestDamping:
    G = gradient(W) / 12

    def expected(self, direction):
        parts = [gradient(W, 1.0 * chosen) for chosen in (~WRONG, WRONG)]
        return [1 - np.sum(direction * part) / np.sum(self.G * part) for part in parts]

    def test_of_sam_and_of_what_drops_set_b(self):
        perturbed = gradient(W + 0.5 * unit(self.G)) / 12
        found = damping(optax_sam.sam(0.5), objective(), as_params(W), WRONG)
        np.testing.assert_allclose(found, self.expected(perturbed), rtol=1e-3, atol=1e-5)
        in_b = (np.sign(perturbed) == np.sign(self.G)) & (np.abs(perturbed) < np.abs(self.G))
        found = damping(optax_sam.saner(0.5, alpha=1.0), objective(), as_params(W), WRONG)
        np.testing.assert_allclose(found, self.expected(perturbed * ~in_b), rtol=1e-3, atol=1e-5)
        assert in_b.any()

    def test_what_else_the_method_needs(self):
        ones, given = as_params(np.ones((4, 3))), (objective(), as_params(W), WRONG)
        preconditioned = optax_sam.functional_sam(0.5, optax_sam.scale_by_second_moment())
        found = damping(preconditioned, *given, second_moment=ones)
        np.testing.assert_allclose(found, damping(optax_sam.functional_sam(0.5), *given), atol=1e-5)

    def test_is_nothing_where_no_example_is_or_where_sgd_makes_no_progress(self):
        opposite = Objective(linear, jnp.ones((3, 1)), jnp.array([0, 0, 1]))
        params, wrong = {"w": jnp.zeros((1, 2))}, np.array([False, False, True])
        found = damping(optax_sam.sam(0.1), opposite, params, wrong)
        assert (np.isnan(found.wrong), np.isnan(found.right)) == (True, False)
        none = damping(optax_sam.sam(0.1), opposite, params, np.zeros(3, bool))
        assert np.isnan(none.wrong)


class TestFactorChanges:
    def test_a_linear_network_has_a_constant_jacobian(self):
        found = factor_changes(objective(), as_params(W), as_params(EPSILON))
        assert found.jacobian == pytest.approx(0, abs=1e-5)
        g, moved = gradient(W), gradient(W + EPSILON)
        expected = np.linalg.norm(moved - g) / np.linalg.norm(g)
        assert found.full == pytest.approx(expected, rel=1e-4)
        assert found.logit_term == pytest.approx(expected, rel=1e-4)

    def test_two_linear_layers_with_a_squared_loss(self):
        """f = vᵀWx, with Jacobians vxᵀ and Wx and logit term f − y, factor by factor."""
        generator = np.random.default_rng(1)
        x, y = generator.normal(size=(5, 3)), generator.normal(size=5)
        points = [(generator.normal(size=2), generator.normal(size=(2, 3))) for _ in range(2)]
        w, epsilon = points[0], tuple(0.3 * part for part in points[1])
        moved = tuple(a + b for a, b in zip(w, epsilon, strict=True))

        def product(at, logits_at):
            (v, hidden), (v_of, hidden_of) = at, logits_at
            c = (x @ hidden_of.T @ v_of - y) / 5
            return np.append(np.outer(v, c @ x), hidden @ (c @ x))

        def apply_fn(params, inputs):
            return inputs @ params["hidden"].T @ params["v"]

        two_layers = Objective(
            apply_fn, jnp.float32(x), jnp.float32(y), lambda z, y: (z - y) ** 2 / 2
        )
        found = factor_changes(
            two_layers,
            {"v": jnp.float32(w[0]), "hidden": jnp.float32(w[1])},
            {"v": jnp.float32(epsilon[0]), "hidden": jnp.float32(epsilon[1])},
        )
        g = product(w, w)
        expected = [
            np.linalg.norm(product(at, logits_at) - g) / np.linalg.norm(g)
            for at, logits_at in ((moved, moved), (moved, w), (w, moved))
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-4)

    def test_last_layer(self):
        """Over all axes of an example; integers and half precision are measured in float32."""
        z = 300 * np.random.default_rng(2).normal(
            size=(5, 2, 3)
        )  # of which the squares are no float16
        norms = last_layer_norms(jnp.float16(z), jnp.ones((3, 3), int))
        assert norms.activations == pytest.approx(
            np.mean([np.linalg.norm(one) for one in z]), rel=1e-3
        )
        assert norms.kernel == 3


def test_costs_are_those_that_the_docstrings_name():
    """In multiplications, as multiples of a gradient and of a forward pass; nothing is computed."""

    def network(params, inputs):
        return jnp.tanh(jnp.tanh(inputs @ params["a"]) @ params["b"]) @ params["c"]

    params = {"a": jnp.ones((8, 16)), "b": jnp.ones((16, 16)), "c": jnp.ones((16, 3))}
    batch = Objective(network, jnp.ones((10, 8)), jnp.zeros(10, int))
    wrong = np.arange(10) < 3

    def cost(function):
        return _cost.multiplications(jax.make_jaxpr(function)(params, batch)).most

    gradient, forward = cost(lambda p, loss: jax.grad(loss)(p)), cost(lambda p, loss: loss(p))
    assert cost(lambda p, loss: shares_by_label(loss, p, p, wrong)) == 4 * gradient
    sam, stage = optax_sam.saner(0.1), optax_sam.add_noise_compensation(0.1, flip_ratio=0.2)
    assert cost(lambda p, loss: damping(sam, loss, p, wrong)) == 3 * gradient
    changes = cost(lambda p, loss: factor_changes(loss, p, p))
    assert 4 * gradient < changes <= 4 * gradient + 2 * forward
    geometry = cost(lambda p, loss: compensation_geometry(stage, 0.1, loss, p))
    assert geometry == 1.2 * gradient + forward
    product = cost(lambda p, loss: hessian_vector_product(loss, p, p))
    assert 2 * gradient < product < 2.5 * gradient


class TestCompensation:
    def test_angle(self):
        first = {"a": jnp.array([1.0, 0.0]), "b": jnp.zeros(1)}
        for degrees in (1e-3, 30.0, 90.0, 180.0):
            turn = np.deg2rad(degrees)
            second = {"a": 7 * jnp.float32([np.cos(turn), np.sin(turn)]), "b": jnp.zeros(1)}
            assert angle(first, second) == pytest.approx(degrees, rel=1e-5)
        # Unit vectors in half precision would be as far apart as these are.
        half = [{"a": jnp.array([3, x], jnp.bfloat16), "b": jnp.zeros(1)} for x in (1, 1.0078125)]
        apart = np.rad2deg(np.arctan(1.0078125 / 3) - np.arctan(1 / 3))
        assert angle(*half) == pytest.approx(apart, rel=1e-3)
        assert np.isnan(angle(first, {"a": jnp.zeros(2), "b": jnp.zeros(1)}))

    def test_geometry_is_that_of_both_parts(self):
        """The 6 smallest gaps, flipped to the likeliest other class; s is that of the state's step."""
        stage = optax_sam.add_noise_compensation(
            optax.linear_schedule(0.0, 1.0, 10), flip_ratio=0.5, deterministic=True
        )
        z = INPUTS @ W
        gaps = np.diff(np.sort(z)[:, -2:]).ravel()
        flipped = np.where(np.eye(3)[LABELS] == 1, -np.inf, z).argmax(1)
        chosen = np.isin(np.arange(12), np.argsort(gaps)[:6])
        added = 0.4 * gradient(W, chosen / 6, flipped)
        sam = 0.2 * unit(gradient(W))

        state = stage.init(as_params(W))
        state = state._replace(strength=state.strength._replace(count=jnp.asarray(4)))
        found = compensation_geometry(stage, 0.2, objective(), as_params(W), state)

        def degrees(a, b):
            return np.rad2deg(np.arccos(np.sum(unit(a) * unit(b))))

        expected = (
            0.2, np.linalg.norm(added), degrees(added, sam), np.linalg.norm(added + sam),
            degrees(added + sam, sam),
        )  # fmt: skip
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert compensation_geometry(stage, 0.2, objective(), as_params(W)).length == 0
