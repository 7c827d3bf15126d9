"""The penalty that stands in for J-SAM."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_sam
from optax_sam import linen


def test_pulls_on_activations_and_last_weights_as_jsam_does():
    """In f = vᵀWx, J-SAM pulls W along -z xᵀ and v along -v; the penalty's gradient has these terms."""
    keys = jax.random.split(jax.random.key(0), 3)
    w, v = jax.random.normal(keys[0], (5, 4)), jax.random.normal(keys[1], (5,))
    x = jax.random.normal(keys[2], (3, 4))

    def penalty(w, v):
        return optax_sam.last_layer_penalty(
            x @ w.T, v, activation_coefficient=0.3, weight_coefficient=0.7
        )

    of_w, of_v = jax.grad(penalty, argnums=(0, 1))(w, v)
    expected = sum(0.3 * 2 * np.outer(w @ one, one) for one in np.asarray(x)) / 3
    np.testing.assert_allclose(of_w, expected, rtol=1e-5)
    np.testing.assert_allclose(of_v, 0.7 * 2 * v, rtol=1e-6)


def test_sums_in_float32():
    z = jnp.full((2, 4096), 1.0, jnp.bfloat16)
    value = optax_sam.last_layer_penalty(z, z[:0], activation_coefficient=1.0, weight_coefficient=0)
    assert value.dtype == jnp.float32
    assert value == 4096  # in bfloat16, ones stop adding up at 256


@pytest.mark.parametrize("name", ["activation_coefficient", "weight_coefficient"])
def test_refuses_a_negative_coefficient(name):
    coefficients = {"activation_coefficient": 0.1, "weight_coefficient": 0.1, name: -0.1}
    with pytest.raises(ValueError, match=rf"{name} .*-0\.1"):
        optax_sam.last_layer_penalty(jnp.ones((2, 3)), jnp.ones(3), **coefficients)


def test_any_linen_model_shows_its_last_activations():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.relu(nn.Dense(8)(x)))

    model, x = Network(), jax.random.normal(jax.random.key(0), (4, 5))
    variables = model.init(jax.random.key(1), x)
    logits, hidden = linen.capture_layer_input(model, "head")(variables, x)
    head = variables["params"]["head"]
    np.testing.assert_allclose(hidden @ head["kernel"] + head["bias"], logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(logits, model.apply(variables, x))
