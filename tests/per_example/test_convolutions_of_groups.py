"""A kernel for each group: a convolution on TPUs, a matrix product elsewhere; both are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from optax_sam.per_example.sites import Site, site_of


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2, 1), "padding": ((1, 2), (0, 1))},
        {"window_strides": (1, 1), "padding": ((1, 1), (2, 2)), "rhs_dilation": (2, 1)},
        {"window_strides": (1, 2), "padding": ((0, 0), (1, 0)), "lhs_dilation": (1, 2)},
    ],
    ids=["strides", "dilated kernel", "dilated input"],
)
def test_both_forms_are_the_same(options, x64):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, 5, 6, 3)), jax.random.normal(keys[1], (3, 2, 3, 4))

    def convolve(x, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, dimension_numbers=dimensions, **options)

    (equation,) = jax.make_jaxpr(convolve)(x, kernel).eqns
    site = site_of(equation, 1)
    np.testing.assert_allclose(site.apply_own(x, kernel), convolve(x, kernel), rtol=1e-12)
    cotangent = jax.random.normal(keys[2], site.output_type.shape)
    expected = Site.weight_gradient(site, x, cotangent)
    np.testing.assert_allclose(site.weight_gradient(x, cotangent), expected, rtol=1e-12)


@pytest.mark.parametrize(("platform", "is_convolution"), [("cpu", False), ("tpu", True)])
@pytest.mark.parametrize("form", ["apply_own", "weight_gradient"])
def test_which_form_is_compiled(form, platform, is_convolution):
    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    x, kernel = jnp.ones((2, 5, 3)), jnp.ones((2, 3, 4))
    (equation,) = jax.make_jaxpr(convolve)(x, kernel).eqns
    other = kernel if form == "apply_own" else convolve(x, kernel)
    groups = [jnp.stack([array] * 3) for array in (x, other)]
    traced = jax.jit(jax.vmap(getattr(site_of(equation, 1), form))).trace(*groups)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.convolution" in text) == is_convolution
