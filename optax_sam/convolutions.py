"""Convolutions that are fast inside loops on a CPU."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core.primitives import conv_general_dilated_p

from optax_sam import _jaxprs
from optax_sam._checks import check_callable

# Primitives whose inner program may be replaced by an equal one. The derivative rules of custom_jvp
# and custom_vjp are kept as they are.
_RECURSE = (
    _jaxprs.CALLS
    | _jaxprs.REMATERIALIZATION
    | _jaxprs.CUSTOM_DERIVATIVES
    | {"scan", "while", "cond"}
)


def canonical_convolutions(function: Callable[..., Any]) -> Callable[..., Any]:
    """Writes every convolution of a function with channels last: 30 to 50 times faster in CPU loops.

    XLA for CPUs has a fast convolution for the layout NHWC × HWIO → NHWC only. Outside of loops it
    brings every convolution into that layout by itself; inside ``lax.scan``, ``lax.while_loop``,
    ``lax.map`` and the branches of ``lax.cond`` it does not, and there the convolutions that
    differentiation produces, whose batch and channel axes are swapped, run on a slow path. This
    rewrites them with explicit transposes.

    Apply it *after* differentiation, to the body of a loop::

        step = optax_sam.canonical_convolutions(lambda w, x: jax.grad(loss)(w, x))
        total = lax.map(lambda x: step(w, x), batches)

    The values are the same up to rounding. Programs inside ``jit``, ``scan``, ``while_loop``,
    ``cond``, ``checkpoint`` and the primal of ``custom_jvp`` and ``custom_vjp`` are rewritten too;
    any other primitive with a program inside (``shard_map``, Pallas kernels) is left as it is. On
    GPUs and TPUs there is nothing to gain, and nothing to lose but the transposes.

    The result can be differentiated, batched and compiled like ``function``; convolutions that
    differentiation makes *after* the rewriting are not rewritten.

    Args:
      function: any function of pytrees of arrays (``None`` and integers included).

    Returns:
      A function with the same signature and the same results.

    Example:
      >>> import jax, jax.numpy as jnp, optax_sam
      >>> from optax_sam.convolutions import canonical_convolutions
      >>> def loss(kernel, image):
      ...     return jnp.sum(jax.lax.conv(image, kernel, (1, 1), "SAME") ** 2)
      >>> kernel, image = jnp.ones((2, 3, 3, 3)), jnp.ones((1, 3, 5, 5))
      >>> gradient = canonical_convolutions(jax.grad(loss))(kernel, image)
      >>> bool(jnp.allclose(gradient, jax.grad(loss)(kernel, image)))
      True
    """
    check_callable("function", function, "Pass the function itself, before it is called.")

    @functools.wraps(function)
    def rewritten(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs))

        def flat(leaves: list[Any]) -> Any:
            positional, named = jax.tree.unflatten(treedef, leaves)
            return function(*positional, **named)

        jaxpr, shape = jax.make_jaxpr(flat, return_shape=True)(leaves)
        outputs = _jaxprs.evaluate(jaxpr, leaves, _canonical)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return rewritten


def inside_control_flow(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it should run inside a loop or a branch of ``lax.cond``, on this backend."""
    return canonical_convolutions(function) if jax.default_backend() == "cpu" else function


def _canonical(equation: Any, values: Sequence[Any]) -> list[Any]:
    if equation.primitive is conv_general_dilated_p:
        return [_channels_last(equation, *values)]
    if equation.primitive.name in _RECURSE and _is_or_has_convolution(equation):
        equation = equation.replace(params=_rewrite_inner(equation))
    return _jaxprs.bind(equation, values)


def _rewrite_inner(equation: Any) -> dict[str, Any]:
    """The parameters of an equation with the programs inside it rewritten."""

    def rewrite(value: Any) -> Any:
        return _jaxprs.with_rule(value, _canonical)

    parameters = dict(equation.params)
    for name in {name for name, _ in _jaxprs.inner_jaxprs(equation)}:
        value = parameters[name]
        parameters[name] = (
            tuple(rewrite(branch) for branch in value)
            if isinstance(value, tuple)
            else rewrite(value)
        )
    return parameters


def has_convolution(jaxpr: Any) -> bool:
    """Whether there is a convolution in a traced program, at any depth."""
    program, _ = _jaxprs.open_and_constants(jaxpr)
    return any(_is_or_has_convolution(equation) for equation in program.eqns)


def _is_or_has_convolution(equation: Any) -> bool:
    return equation.primitive is conv_general_dilated_p or any(
        has_convolution(inner) for _, inner in _jaxprs.inner_jaxprs(equation)
    )


def _channels_last(equation: Any, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """One convolution in the layout NHWC × HWIO → NHWC, between transposes."""
    given = equation.params["dimension_numbers"]
    dimensions = inputs.ndim - 2
    spatial = tuple(range(1, dimensions + 1))
    last = lax.ConvDimensionNumbers(
        lhs_spec=(0, dimensions + 1, *spatial),
        rhs_spec=(dimensions + 1, dimensions, *range(dimensions)),
        out_spec=(0, dimensions + 1, *spatial),
    )
    batch, channels, *positions = given.lhs_spec
    inputs = inputs.transpose(batch, *positions, channels)
    features_out, features_in, *positions = given.rhs_spec
    kernel = kernel.transpose(*positions, features_in, features_out)
    canonical = equation.replace(params=equation.params | {"dimension_numbers": last})
    outputs: jax.Array = _jaxprs.bind(canonical, [inputs, kernel])[0]
    batch, channels, *positions = given.out_spec
    order = [batch, *positions, channels]
    return outputs.transpose([order.index(axis) for axis in range(outputs.ndim)])
