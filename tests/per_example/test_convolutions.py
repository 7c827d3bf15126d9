"""Canonical convolutions change the layout, not the values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import optax_sam
from optax_sam import _jaxprs
from optax_sam.convolutions import canonical_convolutions, has_convolution

GEOMETRIES = {
    "1-D": ((2, 4, 9), (6, 4, 3), {}),
    "2-D": ((2, 4, 7, 6), (6, 4, 3, 2), {}),
    "3-D": ((2, 4, 5, 4, 3), (6, 4, 2, 3, 2), {}),
    "strided": ((2, 4, 7, 6), (6, 4, 3, 2), {"window_strides": (2, 3)}),
    "dilated": ((2, 4, 7, 6), (6, 4, 3, 2), {"rhs_dilation": (2, 1), "lhs_dilation": (1, 2)}),
    "grouped": ((2, 4, 7, 6), (6, 2, 3, 2), {"feature_group_count": 2}),
}


def arrays(*shapes):
    generator = np.random.default_rng(0)
    return [jnp.asarray(generator.standard_normal(shape)) for shape in shapes]


def loss(kernel, image, **options):
    options = {"window_strides": (1,) * (image.ndim - 2), "padding": "SAME"} | options
    if "lhs_dilation" in options:
        options["padding"] = [(1, 2), (2, 0)]
    return jnp.sum(jnp.sin(lax.conv_general_dilated(image, kernel, **options)))


def layouts(function, *args):
    """The kernel layouts of all convolutions in a function, at any depth."""
    found = []

    def visit(jaxpr):
        for equation in _jaxprs.open_and_constants(jaxpr)[0].eqns:
            if equation.primitive.name == "conv_general_dilated":
                numbers = equation.params["dimension_numbers"]
                found.append((numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec))
            for _, inner in _jaxprs.inner_jaxprs(equation):
                visit(inner)

    visit(jax.make_jaxpr(function)(*args))
    return found


NHWC = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_values_and_gradients(name, x64):
    image_shape, kernel_shape, options = GEOMETRIES[name]
    image, kernel = arrays(image_shape, kernel_shape)
    function = jax.value_and_grad(functools.partial(loss, **options), argnums=(0, 1))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12),
        jax.jit(canonical_convolutions(function))(kernel, image),
        jax.jit(function)(kernel, image),
    )


@jax.custom_jvp
def custom_forward(image, kernel):
    return lax.conv(image, kernel, (1, 1), "SAME")


@custom_forward.defjvp
def _(primals, tangents):
    return custom_forward(*primals), 3 * custom_forward(tangents[0], primals[1])


@jax.custom_vjp
def custom_backward(image, kernel):
    return lax.conv(image, kernel, (1, 1), "SAME")


custom_backward.defvjp(
    lambda image, kernel: (custom_backward(image, kernel), kernel),
    lambda kernel, dy: (5 * lax.conv(dy, kernel, (1, 1), "SAME"), jnp.zeros_like(kernel)),
)


def plain(image, kernel):
    return lax.conv(image, kernel, (1, 1), "SAME")


NESTINGS = {
    "jit": lambda x, w: jax.jit(plain)(x, w),
    "scan": lambda x, w: lax.scan(lambda c, _: (jnp.tanh(plain(c, w)), None), x, None, 2)[0],
    "while": lambda x, w: lax.fori_loop(0, 2, lambda _, c: jnp.tanh(plain(c, w)), x),
    "cond": lambda x, w: lax.cond(x[0, 0, 0, 0] > 0, lambda: plain(x, w), lambda: -plain(x, w)),
    "checkpoint": lambda x, w: jax.checkpoint(lambda x: jnp.tanh(plain(x, w)))(x),
    "custom_jvp": custom_forward,
    "custom_vjp": custom_backward,
    "two levels": lambda x, w: jax.jit(
        lambda x: lax.scan(lambda c, _: (jax.checkpoint(plain)(c, w), None), x, None, 2)[0]
    )(x),
}


@pytest.mark.parametrize("name", NESTINGS)
def test_inside_other_programs(name, x64):
    image, kernel = arrays((2, 4, 5, 5), (4, 4, 3, 3))
    function = NESTINGS[name]
    canonical = canonical_convolutions(function)
    assert set(layouts(function, image, kernel)) != {NHWC}
    assert set(layouts(canonical, image, kernel)) == {NHWC}
    np.testing.assert_allclose(canonical(image, kernel), function(image, kernel), rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in NESTINGS if name != "while"])
def test_can_be_differentiated(name, x64):
    """The rules of custom_jvp and custom_vjp survive, here recognizable by a factor 3 and 5."""
    image, kernel = arrays((2, 4, 5, 5), (4, 4, 3, 3))

    def total(function, image):
        return jnp.sum(jnp.sin(function(image, kernel)))

    expected = jax.grad(functools.partial(total, NESTINGS[name]))(image)
    canonical = canonical_convolutions(NESTINGS[name])
    actual = jax.grad(functools.partial(total, canonical))(image)
    np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-12)


def test_differentiated_inside_is_rewritten_too():
    image, kernel = arrays((2, 4, 5, 5), (4, 4, 3, 3))
    gradient = jax.grad(lambda w: jnp.sum(jax.checkpoint(plain)(image, w) ** 2))
    assert len(layouts(canonical_convolutions(gradient), kernel)) >= 2
    assert set(layouts(canonical_convolutions(gradient), kernel)) == {NHWC}


def test_any_signature():
    def function(tree, count, *, nothing):
        assert nothing is None
        return {"sum": tree["x"].sum() * count, "nothing": tree["nothing"], "count": count}

    tree = {"x": jnp.ones(3), "nothing": None}
    result = canonical_convolutions(function)(tree, 2, nothing=None)
    assert result["nothing"] is None
    assert (float(result["sum"]), int(result["count"])) == (6.0, 2)


def test_has_convolution():
    image, kernel = arrays((2, 4, 5, 5), (4, 4, 3, 3))
    assert has_convolution(jax.make_jaxpr(NESTINGS["two levels"])(image, kernel))
    assert not has_convolution(jax.make_jaxpr(jax.jit(jnp.sin))(image))


def test_scan_split():
    """The one equation whose parameters are spelled differently from version to version."""

    def loop(constant, offset, rows):
        def body(carry, row):
            total, count = carry
            return (total * constant + row.sum(), count + 1), row * offset

        return lax.scan(body, (jnp.asarray(0.0), 0), rows)

    (equation,) = jax.make_jaxpr(loop)(2.0, 3.0, jnp.ones((4, 2))).jaxpr.eqns
    assert _jaxprs.scan_split(equation) == (2, 2)


@pytest.mark.parametrize("options", [{"every_k": 2}, {"start_step": 3}, {"stop_step": 3}])
def test_a_step_that_may_be_skipped_keeps_its_convolutions_fast(options):
    """A branch of ``lax.cond`` is as slow as a loop, and the whole second gradient stands in one."""
    images, kernel = arrays((2, 6, 6, 3), (3, 3, 3, 4))

    def loss_of_layer(kernel):
        return jnp.sum(
            jnp.sin(
                lax.conv_general_dilated(
                    images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            )
        )

    tx = optax_sam.sam(0.1, **options)
    state = tx.init(kernel)

    def update(grads):
        return tx.update(grads, state, kernel, loss_fn=loss_of_layer)[0]

    found = layouts(update, kernel)
    assert len(found) >= 2
    assert set(found) == {NHWC}
