r"""Sites: the linear operations in which weights meet data.

At a site :math:`y = \mathrm{op}(x, W)`. Written as matrices it is :math:`Y = A\,W` with the inputs
:math:`A \in \mathbb{R}^{T \times K}` of one group (T positions: its examples in a dense layer, their
tokens, their pixels in the output), and with the cotangent
:math:`\Delta \in \mathbb{R}^{T \times O}` of the output the weights' gradient is
:math:`G = A^\top \Delta`, whose norm and products follow without ever forming it
(:mod:`optax_sam.per_example.factors`).
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_sam import _jaxprs
from optax_sam.per_example.factors import DenseRows, OneHotRows, Rows


class Site:
    """Any bilinear operation: a batched product, a grouped convolution. G is formed by transposition.

    Attributes:
      kind: the name shown in a plan.
      positions: T, number of positions per group.
      inputs: K, number of inputs of each output.
      outputs: O, number of outputs.
      has_gram_form: whether the formulas above hold.
    """

    kind = "bilinear"
    has_gram_form = False

    def __init__(self, equation: Any, position: int):
        self.equation = equation
        self.position = position
        self.input_type = equation.invars[1 - position].aval
        self.weight_type = equation.invars[position].aval
        self.output_type = equation.outvars[0].aval
        self.positions, self.inputs, self.outputs = self._sizes()

    def _sizes(self) -> tuple[int, int, int]:
        return 1, math.prod(self.weight_type.shape), math.prod(self.output_type.shape)

    def apply(self, x: jax.Array, weights: jax.Array) -> jax.Array:
        """The operation itself, on weights that all groups share."""
        operands = [x, weights] if self.position == 1 else [weights, x]
        (output,) = _jaxprs.bind(self.equation, operands)
        return jnp.asarray(output)

    def apply_own(self, x: jax.Array, weights: jax.Array) -> jax.Array:
        """The operation in the form that is fast when every group has its own weights."""
        return self.apply(x, weights)

    def weight_gradient(self, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        """G, in the shape of the weights."""
        return transposed(lambda w: self.apply(x, w), self.weight_type, cotangent)


class MatrixSite(Site):
    """A site that is one matrix product per group."""

    has_gram_form = True

    @property
    def weight_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of the weights that make up K, and those that make up O."""
        raise NotImplementedError

    def input_matrix(self, x: jax.Array) -> jax.Array:
        """A, shape (T, K)."""
        raise NotImplementedError

    def rows(self, x: jax.Array) -> Rows:
        """A in the form that multiplies fast."""
        return DenseRows(self.input_matrix(x))

    def output_matrix(self, y: jax.Array) -> jax.Array:
        """Y or Δ, shape (T, O)."""
        raise NotImplementedError

    def output_rows(self, y: jax.Array) -> Rows:
        """Δ, as rows."""
        return DenseRows(self.output_matrix(y))

    def from_output_matrix(self, y: jax.Array) -> jax.Array:
        """The inverse of :meth:`output_matrix`, which is a rearrangement: its transpose."""
        return transposed(self.output_matrix, self.output_type, y.astype(self.output_type.dtype))


class Dense(MatrixSite):
    """``dot_general`` without batch axes on either side."""

    kind = "dense"

    def _sizes(self) -> tuple[int, int, int]:
        contracting = self.equation.params["dimension_numbers"][0][1 - self.position]
        inputs = math.prod(self.input_type.shape[axis] for axis in contracting)
        positions = math.prod(self.input_type.shape) // inputs
        return positions, inputs, math.prod(self.output_type.shape) // positions

    @property
    def weight_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        contracting = tuple(self.equation.params["dimension_numbers"][0][self.position])
        axes = range(len(self.weight_type.shape))
        return contracting, tuple(axis for axis in axes if axis not in contracting)

    def input_matrix(self, x: jax.Array) -> jax.Array:
        contracting = self.equation.params["dimension_numbers"][0][1 - self.position]
        free = [axis for axis in range(x.ndim) if axis not in contracting]
        return x.transpose(*free, *contracting).reshape(self.positions, self.inputs)

    def output_matrix(self, y: jax.Array) -> jax.Array:
        if self.position == 1:  # axes of the data first, then those of the weights
            return y.reshape(self.positions, self.outputs)
        return y.reshape(self.outputs, self.positions).T

    def weight_gradient(self, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        """One product in the order of the weights' axes: the transpose would rearrange it."""
        inputs, outputs = self.weight_axes
        matrices = self.input_matrix(x), self.output_matrix(cotangent)
        product = jnp.matmul(
            matrices[0].T,
            matrices[1],
            precision=self.equation.params["precision"],
            preferred_element_type=self.equation.params["preferred_element_type"],
        )
        shape = [self.weight_type.shape[axis] for axis in (*inputs, *outputs)]
        order = np.argsort([*inputs, *outputs])
        return product.reshape(shape).transpose(order).astype(self.weight_type.dtype)


class Embedding(MatrixSite):
    """Rows of a table: the inputs are one-hot vectors, so their products say who equals whom."""

    kind = "embedding"

    def _sizes(self) -> tuple[int, int, int]:
        positions = math.prod(self.input_type.shape[:-1])
        return positions, self.weight_type.shape[0], math.prod(self.weight_type.shape[1:])

    def output_matrix(self, y: jax.Array) -> jax.Array:
        offsets = self.equation.params["dimension_numbers"].offset_dims
        rows = [axis for axis in range(y.ndim) if axis not in offsets]
        return y.transpose(*rows, *offsets).reshape(self.positions, self.outputs)

    @property
    def weight_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (0,), tuple(range(1, len(self.weight_type.shape)))

    def rows(self, x: jax.Array) -> Rows:
        count = self.weight_type.shape[0]
        if self.equation.params["mode"] == lax.GatherScatterMode.CLIP:
            x = jnp.clip(x, 0, count - 1)
        return OneHotRows(x.reshape(self.positions), count, self.output_type.dtype)


class Convolution(MatrixSite):
    """A convolution without feature or batch groups, as a product with the matrix of its patches.

    A convolution with a kernel per group is a grouped convolution, 2.5 times slower on CPUs than
    the batched matrix product it amounts to. On TPUs it stays one: it needs a quarter of the bytes.
    """

    kind = "convolution"

    def _sizes(self) -> tuple[int, int, int]:
        numbers = self.equation.params["dimension_numbers"]
        inputs = math.prod(self.weight_type.shape) // self.weight_type.shape[numbers.rhs_spec[0]]
        outputs = self.output_type.shape[numbers.out_spec[1]]
        return math.prod(self.output_type.shape) // outputs, inputs, outputs

    @property
    def weight_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        features_out, features_in, *spatial = self.equation.params["dimension_numbers"].rhs_spec
        return (*spatial, features_in), (features_out,)

    def input_matrix(self, x: jax.Array) -> jax.Array:
        """The patches (im2col), cut out by slices: XLA's own patches are a convolution again."""
        parameters, numbers = self.equation.params, self.equation.params["dimension_numbers"]
        batch, channels, *spatial = numbers.lhs_spec
        x = x.transpose(batch, *spatial, channels)
        holes = [dilation - 1 for dilation in parameters["lhs_dilation"]]
        margins = [(*pads, hole) for pads, hole in zip(parameters["padding"], holes, strict=True)]
        x = lax.pad(x, jnp.zeros([], x.dtype), [(0, 0, 0), *margins, (0, 0, 0)])
        kernel_sizes = [self.weight_type.shape[axis] for axis in numbers.rhs_spec[2:]]
        taps = itertools.product(*(range(size) for size in kernel_sizes))
        patches = [self._shifted(x, tap) for tap in taps]
        return jnp.stack(patches, axis=-2).reshape(self.positions, self.inputs)

    def _shifted(self, x: jax.Array, tap: tuple[int, ...]) -> jax.Array:
        """What one element of the kernel sees: one pixel for every pixel of the output."""
        parameters = self.equation.params
        strides = parameters["window_strides"]
        out_spec = parameters["dimension_numbers"].out_spec
        sizes = [self.output_type.shape[axis] for axis in out_spec[2:]]
        starts = [i * d for i, d in zip(tap, parameters["rhs_dilation"], strict=True)]
        limits = [
            start + (size - 1) * stride + 1
            for start, size, stride in zip(starts, sizes, strides, strict=True)
        ]
        batch, channels = x.shape[0], x.shape[-1]
        return lax.slice(x, [0, *starts, 0], [batch, *limits, channels], [1, *strides, 1])

    def output_matrix(self, y: jax.Array) -> jax.Array:
        batch, channels, *spatial = self.equation.params["dimension_numbers"].out_spec
        return y.transpose(batch, *spatial, channels).reshape(self.positions, self.outputs)

    def weight_matrix(self, weights: jax.Array) -> jax.Array:
        """The kernel, shape (K, O), its inputs in the order of the patches."""
        features_out, features_in, *spatial = self.equation.params["dimension_numbers"].rhs_spec
        return weights.transpose(*spatial, features_in, features_out).reshape(
            self.inputs, self.outputs
        )

    def apply_own(self, x: jax.Array, weights: jax.Array) -> jax.Array:
        def of_patches(x: jax.Array, weights: jax.Array) -> jax.Array:
            outputs = self._product(self.input_matrix(x), self.weight_matrix(weights))
            return self.from_output_matrix(outputs)

        output: jax.Array = lax.platform_dependent(x, weights, tpu=self.apply, default=of_patches)
        return output

    def weight_gradient(self, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        def of_patches(x: jax.Array, cotangent: jax.Array) -> jax.Array:
            matrix = self._product(self.input_matrix(x).T, self.output_matrix(cotangent))
            return transposed(
                self.weight_matrix, self.weight_type, matrix.astype(self.weight_type.dtype)
            )

        plain = super().weight_gradient
        gradient: jax.Array = lax.platform_dependent(x, cotangent, tpu=plain, default=of_patches)
        return gradient

    def _product(self, left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(left, right, precision=self.equation.params["precision"])


def transposed(function: Callable[..., Any], like: Any, cotangent: jax.Array) -> jax.Array:
    """The transpose of a linear function of one array that is like ``like``."""
    (result,) = jax.linear_transpose(function, like)(cotangent)
    return jnp.asarray(result)


def site_of(equation: Any, position: int) -> Site:
    """The site that an equation is; see :func:`optax_sam.per_example.walk.walk`."""
    parameters = equation.params
    match equation.primitive.name:
        case "gather":
            return Embedding(equation, position)
        case "dot_general" if not any(parameters["dimension_numbers"][1]):
            return Dense(equation, position)
        case "conv_general_dilated":
            if parameters["feature_group_count"] == parameters["batch_group_count"] == 1:
                return Convolution(equation, position)
    return Site(equation, position)
