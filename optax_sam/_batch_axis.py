"""Where the batch axis of a value goes in each primitive operation.

Every function here takes an equation and the position of the batch axis in each of its inputs, and
returns its position in the outputs: ``None`` for a value that does not depend on the examples.
"""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class BatchAxis:
    """The examples lie along ``axis``, each a run of ``length`` neighbours.

    ``length`` is 1 until the batch axis is merged with a later one, as in (B, T, D) -> (B T, D).
    """

    axis: int
    length: int = 1


class ExamplesAreMixedError(Exception):
    """One example's value depends on another example."""


class UnknownError(Exception):
    """It could not be told whether the examples stay apart."""


Places = Sequence[BatchAxis | None]

# fmt: off
_ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex", "conj",
    "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "div", "eq", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma", "igammac", "imag",
    "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "log2", "logistic", "lt", "max",
    "min", "mul", "name", "ne", "neg", "nextafter", "not", "one_minus_square",
    "optimization_barrier", "or", "polygamma", "polynomial", "population_count", "pow", "real",
    "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor",
}
# fmt: on
_RESHAPES = {"reshape", "squeeze", "expand_dims"}
_WINDOWS = {"reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"}
_ALONG_ONE_AXIS = {
    "cumsum": "axis",
    "cumprod": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumlogsumexp": "axis",
    "sort": "dimension",
}


def place(equation, places: Places) -> list[BatchAxis | None]:
    """The batch axis of each output of a primitive without a program inside.

    Raises:
      ExamplesAreMixedError: if the operation combines different examples.
      UnknownError: if there is no rule for it.
    """
    name = equation.primitive.name
    if name in _ELEMENTWISE:
        result = _elementwise(equation, places)
    elif name in _RESHAPES:
        result = _reshape(equation, places[0])
    elif name in _WINDOWS:
        result = _window(equation, places[0])
    elif name in _ALONG_ONE_AXIS:
        result = _along(equation, _common(places), equation.params[_ALONG_ONE_AXIS[name]])
    elif name in _RULES:
        result = _RULES[name](equation, places)
    elif name.startswith(("reduce_", "arg")) and "axes" in equation.params:
        result = _reduce(equation, _common(places))
    else:
        raise UnknownError(f"there is no rule for `{name}`")
    return [result] * len(equation.outvars)


def _shape(equation, index: int = 0) -> tuple[int, ...]:
    return equation.invars[index].aval.shape


def _common(places: Places) -> BatchAxis:
    """The batch axis that all inputs which have one agree on."""
    found = {place for place in places if place is not None}
    if len(found) > 1:
        raise UnknownError("operands have their examples along different axes")
    return found.pop()


def _elementwise(equation, places):
    """Operands have the rank of the output, with size 1 where they are repeated, or are scalars."""
    common = _common(places)
    shape = equation.outvars[0].aval.shape
    for variable, place in zip(equation.invars, places, strict=True):
        other = variable.aval.shape
        if place is not None and (
            len(other) != len(shape) or other[common.axis] != shape[common.axis]
        ):
            raise UnknownError("operands have different shapes")
    return common


def _reshape(equation, place):
    """A reshape keeps the order of the elements: so many before each example, so many within it."""
    source, target = _shape(equation), equation.outvars[0].aval.shape
    count = source[place.axis] // place.length
    before = math.prod(source[: place.axis])
    within = place.length * math.prod(source[place.axis + 1 :])
    for axis, size in enumerate(target):
        after = math.prod(target[axis + 1 :])
        if math.prod(target[:axis]) == before and size % count == 0 and within % after == 0:
            length = size // count
            if length * after == within:
                return BatchAxis(axis, length)
    raise UnknownError("a reshape merges the batch axis with an earlier one")


def _broadcast(equation, places):
    (place,) = {place for place in places if place is not None}
    return BatchAxis(equation.params["broadcast_dimensions"][place.axis], place.length)


def _transpose(equation, places):
    return BatchAxis(equation.params["permutation"].index(places[0].axis), places[0].length)


def _reduce(equation, place):
    axes = equation.params["axes"]
    if place.axis in axes:
        raise ExamplesAreMixedError("reduces over the batch axis")
    return BatchAxis(place.axis - sum(axis < place.axis for axis in axes), place.length)


def _along(equation, place, axis):
    if place.axis == axis:
        raise ExamplesAreMixedError("runs along the batch axis")
    return place


def _top_k(equation, places):
    return _along(equation, places[0], len(_shape(equation)) - 1)


def _window(equation, place):
    if equation.params["window_dimensions"][place.axis] != 1:
        raise ExamplesAreMixedError("its window covers several examples")
    return place


def _whole(equation, place, is_whole: bool):
    if not is_whole:
        raise UnknownError("it takes some of the examples")
    return place


def _slice(equation, places):
    place = places[0]
    is_whole = equation.outvars[0].aval.shape[place.axis] == _shape(equation)[place.axis]
    return _whole(equation, place, is_whole)


def _dynamic_slice(equation, places):
    if places[0] is None or any(place is not None for place in places[1:]):
        raise UnknownError("its indices depend on the examples")
    return _slice(equation, places)


def _pad(equation, places):
    place = _common(places[:1])
    return _whole(
        equation, place, tuple(equation.params["padding_config"][place.axis]) == (0, 0, 0)
    )


def _reverse(equation, places):
    return _whole(equation, places[0], places[0].axis not in equation.params["dimensions"])


def _concatenate(equation, places):
    place = _common(places)
    return _whole(equation, place, equation.params["dimension"] != place.axis)


def _split(equation, places):
    return _whole(equation, places[0], equation.params["axis"] != places[0].axis)


def _dot(equation, places):
    contracting, batch = equation.params["dimension_numbers"]
    found = []
    for side, place in enumerate(places):
        if place is None:
            continue
        if place.axis in contracting[side]:
            raise ExamplesAreMixedError("sums over the batch axis")
        found.append(_dot_output_axis(equation, side, place, contracting, batch))
    if len(found) == 2 and found[0] != found[1]:
        raise ExamplesAreMixedError("multiplies every example with every other one")
    return found[0]


def _dot_output_axis(equation, side, place, contracting, batch):
    """Output axes: those of the batch, the free ones of the left side, those of the right side."""
    if place.axis in batch[side]:
        return BatchAxis(tuple(batch[side]).index(place.axis), place.length)

    def free(side):
        used = {*contracting[side], *batch[side]}
        return [axis for axis in range(len(_shape(equation, side))) if axis not in used]

    offset = len(batch[0]) + (len(free(0)) if side == 1 else 0)
    return BatchAxis(offset + free(side).index(place.axis), place.length)


def _convolution(equation, places):
    numbers = equation.params["dimension_numbers"]
    place, kernel_place = places
    if kernel_place is not None or equation.params["batch_group_count"] != 1:
        raise UnknownError("its kernel depends on the examples")
    if place.axis != numbers.lhs_spec[0]:
        raise ExamplesAreMixedError("convolves along the batch axis")
    return BatchAxis(numbers.out_spec[0], place.length)


def _gather(equation, places):
    numbers = equation.params["dimension_numbers"]
    operand, indices = places
    rank = len(equation.outvars[0].aval.shape)
    looked_up = [axis for axis in range(rank) if axis not in numbers.offset_dims]
    found = set()
    if indices is not None:
        found.add(BatchAxis(looked_up[indices.axis], indices.length))
    if operand is not None:
        found.add(_gather_operand(equation, operand, numbers, looked_up))
    if len(found) > 1:
        raise UnknownError("table and indices both depend on the examples")
    return found.pop()


def _gather_operand(equation, place, numbers, looked_up):
    if place.axis in numbers.operand_batching_dims:
        pair = numbers.operand_batching_dims.index(place.axis)
        return BatchAxis(looked_up[numbers.start_indices_batching_dims[pair]], place.length)
    is_whole = equation.params["slice_sizes"][place.axis] == _shape(equation)[place.axis]
    if place.axis in numbers.collapsed_slice_dims or not is_whole:
        raise UnknownError("it may pick other examples")
    removed = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [axis for axis in range(len(_shape(equation))) if axis not in removed]
    return BatchAxis(numbers.offset_dims[kept.index(place.axis)], place.length)


_RULES = {
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "top_k": _top_k,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "pad": _pad,
    "rev": _reverse,
    "concatenate": _concatenate,
    "split": _split,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
}
