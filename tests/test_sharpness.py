"""Sharpness, curvature and slices of the loss, against closed forms of quadratics and linear nets."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from optax_sam import Objective, _cost
from optax_sam.diagnostics import (
    filter_normalized,
    hessian_spectrum,
    hessian_trace,
    hessian_vector_product,
    largest_eigenvalue,
    loss_line,
    loss_plane,
    sharpness,
)

GENERATOR = np.random.default_rng(0)
PARAMS = {
    "kernel": jnp.asarray(GENERATOR.normal(size=(2, 2)), jnp.float32),
    "bias": jnp.asarray(GENERATOR.normal(size=2), jnp.float32),
}
W = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(PARAMS)]).astype(np.float64)
ROTATION = np.linalg.qr(GENERATOR.normal(size=(6, 6)))[0]


def with_eigenvalues(values):
    return (ROTATION * np.asarray(values)) @ ROTATION.T


INDEFINITE = with_eigenvalues([-9, -1, 0, 1, 2, 4])


def half_quadratic(hessian, params):
    w = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])
    return w @ hessian @ w / 2


def quadratic(hessian):
    """½ wᵀHw of a tree; H is an argument, so that all quadratics share one compilation."""
    return jax.tree_util.Partial(half_quadratic, jnp.asarray(hessian, jnp.float32))


def tree_of(vector):
    return {"bias": jnp.asarray(vector[:2]), "kernel": jnp.asarray(vector[2:]).reshape(2, 2)}


def vector_of(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_a_plain_loss_is_read_anew_and_a_pytree_compiled_once():
    """A training loop binds its batch to a name that the loss closes over."""
    traces = []

    def loss(w):
        return batch * w**2

    def of_argument(batch, w):
        traces.append("trace")
        return batch * w**2

    tx, w = optax_sam.sam(1.0), jnp.ones([])
    for batch in (1.0, 2.0):
        assert sharpness(tx, loss, w).rise == 3 * batch
        assert hessian_vector_product(loss, w, w) == 2 * batch
        assert sharpness(tx, jax.tree_util.Partial(of_argument, batch), w).rise == 3 * batch
        traces.append(batch)
    assert traces[-2:] == [1.0, 2.0]  # nothing was traced for the second batch


class TestSharpness:
    H = INDEFINITE
    G = INDEFINITE @ W

    def rise(self, epsilon):
        return epsilon @ self.G + epsilon @ self.H @ epsilon / 2

    def test_what_else_the_optimizer_needs(self):
        stage = optax.chain(optax_sam.scale_by_second_moment(), optax_sam.normalized(0.1))
        tx = optax_sam.sharpness_aware(stage)
        ones = jax.tree.map(jnp.ones_like, PARAMS)
        found = sharpness(tx, quadratic(self.H), PARAMS, second_moment=ones)
        expected = self.measured(optax_sam.sam(0.1))
        np.testing.assert_allclose(found.rise, expected.rise, rtol=1e-5)

    def measured(self, tx, opt_state=None):
        result = sharpness(tx, quadratic(self.H), PARAMS, opt_state)
        assert result.loss == pytest.approx(W @ self.H @ W / 2, rel=1e-4)
        assert result.perturbed_loss - result.loss == result.rise
        return result

    def test_of_sam(self):
        result = self.measured(optax.chain(optax_sam.saner(0.3), optax.adam(0.1)))
        epsilon = 0.3 * self.G / np.linalg.norm(self.G)
        assert result.rise == pytest.approx(self.rise(epsilon), rel=1e-4)
        assert result.perturbation_norm == pytest.approx(0.3)

    def test_of_several_steps(self):
        first = 0.15 * self.G / np.linalg.norm(self.G)
        g = self.H @ (W + first)
        epsilon = first + 0.15 * g / np.linalg.norm(g)
        result = self.measured(optax_sam.sam(0.3, ascent_steps=2))
        assert result.rise == pytest.approx(self.rise(epsilon), rel=1e-4)

    def test_of_what_the_method_remembers(self):
        """Momentum-SAM perturbs against its last direction: none at first, then −ρ v/‖v‖."""
        tx = optax_sam.msam(0.3)
        assert self.measured(tx).rise == 0
        gradient = tree_of(np.float32(self.G))
        _, state = tx.update(gradient, tx.init(PARAMS), PARAMS, loss_fn=quadratic(self.H))
        epsilon = -0.3 * self.G / np.linalg.norm(self.G)
        assert self.measured(tx, state).rise == pytest.approx(self.rise(epsilon), rel=1e-4)

    def test_adaptive_sharpness_leaves_a_rescaled_network_alone(self):
        """f = b a x: (2a, b/2) is the same network, which is sharper only for a fixed ball."""

        def loss(params):
            return jnp.sum((params["b"] * params["a"] - 2) ** 2)

        params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([0.5, 0.2])}
        rescaled = {"a": 2 * params["a"], "b": params["b"] / 2}
        for tx, is_invariant in ((optax_sam.asam(0.3, eta=0.0), True), (optax_sam.sam(0.3), False)):
            rises = [sharpness(tx, loss, p).rise for p in (params, rescaled)]
            assert (abs(rises[0] - rises[1]) < 1e-5) == is_invariant

    @pytest.mark.parametrize("weights", [None, np.array([1, 0, 2, 3, 1, 1], np.float32)])
    def test_of_groups_is_m_sharpness(self, weights):
        """Group by group: its own loss at its own perturbed point, by its share of the weights."""
        generator = np.random.default_rng(1)
        x, y = generator.normal(size=(6, 3)), generator.normal(size=6)
        w = np.array([0.5, -1.0, 2.0])
        objective = Objective(
            lambda w, x: x @ w,
            jnp.float32(x),
            jnp.float32(y),
            lambda z, y: (z - y) ** 2,
            weights=None if weights is None else jnp.asarray(weights),
        )
        v = np.ones(6) if weights is None else weights
        rises = []
        for rows in np.split(np.arange(6), 3):
            share = v[rows] / v[rows].sum()
            residual = x[rows] @ w - y[rows]
            g = 2 * (share * residual) @ x[rows]
            moved = residual + x[rows] @ (0.1 * g / np.linalg.norm(g))
            rises.append(share @ (moved**2 - residual**2) * v[rows].sum() / v.sum())
        result = sharpness(optax_sam.sam(0.1, group_size=2), objective, jnp.float32(w))
        assert result.rise == pytest.approx(sum(rises), rel=1e-4)
        each = sharpness(optax_sam.sam(0.1), objective, jnp.float32(w), group_size=2)
        own = np.array(rises) * v.sum() / v.reshape(3, 2).sum(axis=1)
        np.testing.assert_allclose(each.rise, own, rtol=1e-4)
        assert (each.rise.argmax(), each.loss.shape) == (own.argmax(), (3,))

    def test_costs_a_gradient_and_a_forward_pass(self):
        objective = Objective(
            lambda p, x: jnp.tanh(x @ p["kernel"] + p["bias"]) @ p["kernel"],
            jnp.ones((5, 2)),
            jnp.zeros(5, int),
        )

        def cost(function):
            return _cost.multiplications(jax.make_jaxpr(function)(PARAMS, objective)).most

        measured = cost(lambda p, loss: sharpness(optax_sam.saner(0.1), loss, p).rise)
        gradient, forward = cost(lambda p, loss: jax.grad(loss)(p)), cost(lambda p, loss: loss(p))
        assert measured == gradient + forward


class TestCurvature:
    def test_product_is_that_of_the_hessian(self):
        vector = np.random.default_rng(2).normal(size=6).astype(np.float32)
        params, direction = PARAMS | {"steps": jnp.arange(3)}, tree_of(vector)
        loss = lambda p: half_quadratic(jnp.float32(INDEFINITE), {k: p[k] for k in PARAMS})  # noqa: E731
        product = hessian_vector_product(loss, params, direction | {"steps": jnp.arange(3)})
        assert product.pop("steps").tolist() == [0, 0, 0]
        np.testing.assert_allclose(vector_of(product), INDEFINITE @ vector, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "eigenvalues",
        [
            [-9, -1, 0, 1, 2, 4],  # power iteration would find −9
            [-6, -5, -4, -3, -2, -0.5],
            [1e-6, 2e-6, 3e-6, 4e-6, 5e-6, 9e-6],
            [3, 3, 3, 3, 3, 3],  # the space is complete after one vector
            [0, 0, 0, 0, 0, 0],
        ],
        ids=str,
    )
    def test_largest_eigenvalue(self, eigenvalues):
        hessian = with_eigenvalues(eigenvalues)
        result = largest_eigenvalue(quadratic(hessian), PARAMS, steps=30)
        size = max(map(abs, eigenvalues))
        assert result.value == pytest.approx(eigenvalues[-1], abs=2e-6 * size)
        assert result.residual <= 1e-3 * size
        vector = vector_of(result.vector)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(hessian @ vector, result.value * vector, atol=1e-3 * size)

    def test_more_steps_than_dimensions_keep_the_first_vector(self):
        result = largest_eigenvalue(lambda w: -(w**2), jnp.ones([]), steps=30)
        assert (result.value, abs(result.vector), result.residual) == (-2, 1, 0)

    def test_linear_softmax_at_zero_in_microbatches(self):
        """H = XᵀX/B ⊗ (I/C − 11ᵀ/C²), whose largest eigenvalue is that of XᵀX/B over C."""
        inputs = jnp.asarray(np.random.default_rng(3).normal(size=(8, 4)), jnp.float32)
        objective = Objective(lambda w, x: x @ w, inputs, jnp.arange(8) % 3, microbatch_size=4)
        result = largest_eigenvalue(objective, jnp.zeros((4, 3)), steps=12)
        expected = np.linalg.eigvalsh(inputs.T @ inputs / 8)[-1] / 3
        assert result.value == pytest.approx(expected, rel=1e-4)

    def test_half_precision_parameters(self):
        result = largest_eigenvalue(
            lambda w: jnp.sum(jnp.array([1, 2], jnp.bfloat16) * w**2), jnp.ones(2, jnp.bfloat16)
        )
        assert result.value.dtype == jnp.float32
        assert result.value == pytest.approx(4, rel=1e-2)
        assert result.vector.dtype == jnp.bfloat16


def product_of_two(params):
    return params[0] * params[1]


class TestSpectrum:
    def test_trace(self):
        """Random signs are exact on a diagonal Hessian, and within their error on another one."""
        diagonal = np.diag([-9.0, -1, 0, 1, 2, 4])
        result = hessian_trace(quadratic(diagonal), PARAMS, samples=64)
        assert (result.value, result.standard_error) == (-3, 0)
        result = hessian_trace(quadratic(INDEFINITE), PARAMS, samples=64)
        assert 0 < result.standard_error < 2
        assert abs(result.value + 3) < 3 * result.standard_error

    def test_standard_error_of_two_samples(self):
        """zᵀHz is 2 or −2, so the mean of two is 0 with the error 2, or ±2 with the error 0."""
        results = [
            hessian_trace(product_of_two, jnp.ones(2), samples=2, seed=seed) for seed in range(8)
        ]
        found = {(abs(float(r.value)), round(float(r.standard_error), 5)) for r in results}
        assert found == {(0, 2), (2, 0)}

    def test_spectrum(self):
        """With as many steps as dimensions the points are the eigenvalues."""
        result = hessian_spectrum(quadratic(INDEFINITE), PARAMS, samples=64, steps=6)
        eigenvalues = np.linalg.eigvalsh(INDEFINITE)
        np.testing.assert_allclose(result.eigenvalues, np.tile(eigenvalues, (64, 1)), atol=1e-3)
        assert np.sum(result.weights) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(np.sum(result.weights, axis=0), 1 / 6, atol=0.08)

    def test_spectrum_of_a_loss_without_curvature(self):
        result = hessian_spectrum(lambda w: jnp.sum(w), jnp.ones(4), samples=2, steps=3)
        np.testing.assert_array_equal(result.eigenvalues, 0)
        np.testing.assert_allclose(result.weights.sum(), 1)

    @pytest.mark.parametrize("function", [hessian_trace, hessian_spectrum])
    def test_says_what_to_install(self, function, monkeypatch):
        monkeypatch.setitem(sys.modules, "matfree", None)
        with pytest.raises(ImportError, match=r"pip install 'optax_sam\[curvature\]'"):
            function(quadratic(INDEFINITE), PARAMS)


class TestSlices:
    @pytest.mark.parametrize("filter_axis", [-1, 0])
    def test_filters_have_the_lengths_of_the_parameters(self, filter_axis):
        w = np.float32(np.random.default_rng(4).normal(size=(3, 4, 5)))
        d = np.ones((3, 4, 5), np.float32)
        d[..., 2], d[2] = 0, 0
        result = filter_normalized(
            {"kernel": d, "scale": jnp.ones(4)},
            {"kernel": w, "scale": jnp.ones(4)},
            filter_axis=filter_axis,
        )
        assert not result["scale"].any()
        kernels = [np.moveaxis(k, filter_axis, 0) for k in (result["kernel"], d, w)]
        for found, before, own in zip(*kernels, strict=True):
            length = np.linalg.norm(before)
            expected = before * np.linalg.norm(own) / length if length else before
            np.testing.assert_allclose(found, expected, rtol=1e-5)

    def test_line_and_plane_of_a_quadratic(self):
        first, second = np.float32(np.random.default_rng(5).normal(size=(2, 6)))
        a, b = np.linspace(-1, 1, 3), np.linspace(0, 2, 4)
        points = W + a[:, None, None] * first + b[None, :, None] * second
        expected = np.einsum("abi,ij,abj->ab", points, INDEFINITE, points) / 2
        loss = quadratic(INDEFINITE)
        plane = loss_plane(loss, PARAMS, tree_of(first), tree_of(second), a, b)
        np.testing.assert_allclose(plane, expected, rtol=1e-4, atol=1e-4)
        line = loss_line(lambda p: (loss(p), {"aux": 0}), PARAMS, tree_of(first), a)
        np.testing.assert_allclose(line, expected[:, 0], rtol=1e-4, atol=1e-4)

    def test_integers_are_numbers_along_a_line(self):
        def loss(w):
            return w @ w

        w, d = jnp.ones(2), jnp.array([1, 0])
        np.testing.assert_allclose(loss_line(loss, w, d, jnp.arange(3.0)), [2, 5, 10])
        plane = loss_plane(loss, w, d, jnp.array([0, 1]), jnp.arange(2.0), jnp.arange(2.0))
        np.testing.assert_allclose(plane, [[2, 5], [5, 8]])
        kernel = jnp.array([[3.0, 0.0], [4.0, 1.0]])
        direction = filter_normalized(jnp.array([[1, 1], [0, 0]]), kernel)
        np.testing.assert_allclose(direction, [[5, 1], [0, 0]])
        # And a small direction in single precision does not vanish in half precision.
        small = filter_normalized(jnp.array([[1e-9, 1e-9], [0, 0]]), kernel.astype(jnp.float16))
        np.testing.assert_allclose(small, [[5, 1], [0, 0]], rtol=1e-3)

    def test_inside_of_a_jitted_function(self):
        scale = jax.jit(
            lambda s: loss_line(lambda w: s * w[0], jnp.ones(1), jnp.ones(1), [0.0, 1.0])
        )
        assert scale(3.0).tolist() == [3, 6]
