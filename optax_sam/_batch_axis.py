"""Where the examples of a batch go in each primitive operation.

Every function here takes an equation and the place of the examples in each of its inputs, and returns
their place in the outputs: ``None`` for a value that does not depend on the examples.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class BatchAxis:
    """The examples lie along ``axis``, each a run of ``length`` neighbours.

    Attributes:
      axis: the axis.
      examples: which example lies where, in the order of the axis. Slices, reversals and
        concatenations change it.
      length: 1 until the batch axis is merged with a later one, as in (B, T, D) -> (B T, D).
    """

    axis: int
    examples: tuple[int, ...]
    length: int = 1

    def moved_to(self, axis: int) -> "BatchAxis":
        """The same examples along another axis."""
        return dataclasses.replace(self, axis=axis)

    @property
    def is_single(self) -> bool:
        """Whether the value depends on one example only."""
        return len(set(self.examples)) == 1


class ExamplesAreMixedError(Exception):
    """One example's value depends on another example."""


class UnknownError(Exception):
    """It could not be told whether the examples stay apart."""


Place = BatchAxis | None
Places = Sequence[Place]

# fmt: off
_ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bessel_i0e", "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz", "complex",
    "conj", "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "div", "eq", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma", "igammac", "imag",
    "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "log2", "logistic", "lt", "max",
    "min", "mul", "name", "ne", "neg", "nextafter", "not", "one_minus_square",
    "or", "polygamma", "polynomial", "population_count", "pow", "pvary", "real",
    "reduce_precision", "rem", "round", "rsqrt", "select_n", "sharding_constraint", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "threefry2x32", "xor",
}
# fmt: on
_ALONG_ONE_AXIS = {
    "cumsum": "axis",
    "cumprod": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumlogsumexp": "axis",
    "sort": "dimension",
}


def place(equation: Any, places: Places) -> list[Place]:
    """The place of the examples in each output of a primitive without a program inside.

    Raises:
      ExamplesAreMixedError: if the operation combines different examples.
      UnknownError: if there is no rule for it.
    """
    name = equation.primitive.name
    if name == "optimization_barrier":
        return list(places)
    if name == "split":
        return _split(equation, _common(places))
    if name in _RULES:
        result = _RULES[name](equation, places)
    elif name in _ELEMENTWISE:
        result = _elementwise(equation, places)
    elif name in _RULES_FOR_ONE:
        result = _RULES_FOR_ONE[name](equation, _common(places))
    elif name in _RANDOM:
        result = _common(places)
    elif name in _ALONG_ONE_AXIS:
        result = _along(_common(places), equation.params[_ALONG_ONE_AXIS[name]])
    elif name.startswith(("reduce_", "arg")) and "axes" in equation.params:
        result = _reduce(equation, _common(places))
    else:
        raise UnknownError(f"there is no rule for `{name}`")
    return [result] * len(equation.outvars)


def _shape(equation: Any, index: int = 0) -> tuple[int, ...]:
    return tuple(equation.invars[index].aval.shape)


def _output_shape(equation: Any) -> tuple[int, ...]:
    return tuple(equation.outvars[0].aval.shape)


def _common(places: Places) -> BatchAxis:
    """The place that all inputs which depend on the examples agree on."""
    found = {place for place in places if place is not None}
    if len(found) == 1:
        return found.pop()
    same_axis = len({(place.axis, place.length) for place in found}) == 1
    several = len({example for place in found for example in place.examples}) > 1
    if same_axis or (several and any(place.is_single for place in found)):
        raise ExamplesAreMixedError("combines different examples")
    raise UnknownError("operands have their examples along different axes")


def _stays_apart(place: BatchAxis, touches_examples: bool, what: str) -> BatchAxis:
    """The place, unless an operation goes over the batch axis."""
    if not touches_examples:
        return place
    if place.is_single:
        raise UnknownError("it uses one of the examples")
    raise ExamplesAreMixedError(what)


def _whole(place: BatchAxis, is_whole: bool) -> BatchAxis:
    if not is_whole:
        raise UnknownError("it takes some of the examples")
    return place


def _elementwise(equation: Any, places: Places) -> BatchAxis:
    """Operands have the rank of the output, with size 1 where they are repeated, or are scalars."""
    shape = _output_shape(equation)
    repeated = []
    for variable, place in zip(equation.invars, places, strict=True):
        if place is None:
            continue
        if len(variable.aval.shape) != len(shape):
            raise UnknownError("operands have different shapes")
        repeated.append(_repeated(place, variable.aval.shape[place.axis], shape[place.axis]))
    return _common(repeated)


def _repeated(place: BatchAxis, size: int, target: int) -> BatchAxis:
    """The place after an axis of size 1 was repeated."""
    if size == target:
        return place
    return dataclasses.replace(place, examples=place.examples * target)


def _reshape(equation: Any, place: BatchAxis) -> BatchAxis:
    """A reshape keeps the order of the elements: so many before each example, so many within it."""
    source, target = _shape(equation), _output_shape(equation)
    if 0 in target:
        raise UnknownError("a reshape makes an empty array")
    count = len(place.examples)
    before = math.prod(source[: place.axis])
    within = place.length * math.prod(source[place.axis + 1 :])
    for axis, size in enumerate(target):
        after = math.prod(target[axis + 1 :])
        if math.prod(target[:axis]) == before and size % count == 0 and within % after == 0:
            length = size // count
            if length * after == within:
                return BatchAxis(axis, place.examples, length)
    raise UnknownError("a reshape merges the batch axis with an earlier one")


def _broadcast(equation: Any, place: BatchAxis) -> BatchAxis:
    axis = equation.params["broadcast_dimensions"][place.axis]
    moved = place.moved_to(axis)
    return _repeated(moved, _shape(equation)[place.axis], _output_shape(equation)[axis])


def _transpose(equation: Any, place: BatchAxis) -> BatchAxis:
    return place.moved_to(equation.params["permutation"].index(place.axis))


def _reduce(equation: Any, place: BatchAxis) -> BatchAxis:
    axes = equation.params["axes"]
    place = _stays_apart(place, place.axis in axes, "reduces over the batch axis")
    return place.moved_to(place.axis - sum(axis < place.axis for axis in axes))


def _along(place: BatchAxis, axis: int) -> BatchAxis:
    return _stays_apart(place, place.axis == axis, "runs along the batch axis")


def _top_k(equation: Any, place: BatchAxis) -> BatchAxis:
    last = len(_shape(equation)) - 1
    return _along(place, equation.params.get("axis", last) % (last + 1))


def _window(equation: Any, place: BatchAxis) -> BatchAxis:
    size = equation.params["window_dimensions"][place.axis]
    return _stays_apart(place, size != 1, "its window covers several examples")


def _chosen(place: BatchAxis, positions: slice) -> BatchAxis:
    """Some of the positions along the batch axis."""
    _whole(place, place.length == 1)
    return dataclasses.replace(place, examples=place.examples[positions])


def _slice(equation: Any, place: BatchAxis) -> BatchAxis:
    if _output_shape(equation)[place.axis] == _shape(equation)[place.axis]:
        return place
    starts, stops = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"]
    step = 1 if strides is None else strides[place.axis]
    return _chosen(place, slice(starts[place.axis], stops[place.axis], step))


def _reverse(equation: Any, place: BatchAxis) -> BatchAxis:
    if place.axis not in equation.params["dimensions"]:
        return place
    return _chosen(place, slice(None, None, -1))


def _split(equation: Any, place: BatchAxis) -> list[Place]:
    sizes = equation.params["sizes"]
    if equation.params["axis"] != place.axis:
        return [place] * len(sizes)
    stops = list(itertools.accumulate(map(int, sizes)))
    return [_chosen(place, slice(a, b)) for a, b in itertools.pairwise([0, *stops])]


def _concatenate(equation: Any, places: Places) -> BatchAxis:
    axis = equation.params["dimension"]
    parts = [place for place in places if place is not None]
    if len(parts) == len(places) and all(p.axis == axis and p.length == 1 for p in parts):
        return BatchAxis(axis, tuple(itertools.chain.from_iterable(p.examples for p in parts)))
    place = _common(places)
    return _whole(place, place.axis != axis)


def _stack(equation: Any, places: Places) -> BatchAxis:
    place = _common(places)
    return place.moved_to(place.axis + (place.axis >= equation.params["axis"]))


def _dynamic_slice(equation: Any, places: Places) -> BatchAxis:
    place = places[0]
    if place is None or any(index is not None for index in places[1:]):
        raise UnknownError("its indices depend on the examples")
    return _whole(place, _output_shape(equation)[place.axis] == _shape(equation)[place.axis])


def _pad(equation: Any, places: Places) -> BatchAxis:
    place = _common(places[:1])
    return _whole(place, tuple(equation.params["padding_config"][place.axis]) == (0, 0, 0))


def _dot(equation: Any, places: Places) -> BatchAxis:
    contracting, batch = equation.params["dimension_numbers"]
    found = []
    for side, place in enumerate(places):
        if place is None:
            continue
        _stays_apart(place, place.axis in contracting[side], "sums over the batch axis")
        found.append(place.moved_to(_dot_output_axis(equation, side, place, contracting, batch)))
    if len({place.axis for place in found}) == 2:
        raise ExamplesAreMixedError("multiplies every example with every other one")
    return _common(found)


def _dot_output_axis(
    equation: Any, side: int, place: BatchAxis, contracting: Any, batch: Any
) -> int:
    """Output axes: those of the batch, the free ones of the left side, those of the right side."""
    if place.axis in batch[side]:
        return int(tuple(batch[side]).index(place.axis))

    def free(side: int) -> list[int]:
        used = {*contracting[side], *batch[side]}
        return [axis for axis in range(len(_shape(equation, side))) if axis not in used]

    offset = len(batch[0]) + (len(free(0)) if side == 1 else 0)
    return offset + free(side).index(place.axis)


def _fft(equation: Any, place: BatchAxis) -> BatchAxis:
    first = len(_shape(equation)) - len(equation.params["fft_lengths"])
    return _stays_apart(place, place.axis >= first, "transforms the batch axis")


def _convolution(equation: Any, places: Places) -> BatchAxis:
    numbers = equation.params["dimension_numbers"]
    place, kernel_place = places
    if place is None or kernel_place is not None or equation.params["batch_group_count"] != 1:
        raise UnknownError("its kernel depends on the examples")
    is_along = place.axis != numbers.lhs_spec[0]
    return _stays_apart(place, is_along, "convolves along the batch axis").moved_to(
        numbers.out_spec[0]
    )


def _gather(equation: Any, places: Places) -> BatchAxis:
    numbers = equation.params["dimension_numbers"]
    operand, indices = places
    rank = len(_output_shape(equation))
    looked_up = [axis for axis in range(rank) if axis not in numbers.offset_dims]
    found: list[Place] = []
    if indices is not None:
        found.append(indices.moved_to(looked_up[indices.axis]))
    if operand is not None:
        found.append(operand.moved_to(_gather_operand(equation, operand, numbers, looked_up)))
    return _common(found)


def _gather_operand(equation: Any, place: BatchAxis, numbers: Any, looked_up: list[int]) -> int:
    if place.axis in numbers.operand_batching_dims:
        pair = numbers.operand_batching_dims.index(place.axis)
        return looked_up[int(numbers.start_indices_batching_dims[pair])]
    is_whole = equation.params["slice_sizes"][place.axis] == _shape(equation)[place.axis]
    if place.axis in numbers.collapsed_slice_dims or not is_whole:
        raise UnknownError("it may pick other examples")
    removed = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [axis for axis in range(len(_shape(equation))) if axis not in removed]
    return int(numbers.offset_dims[kept.index(place.axis)])


_RULES: dict[str, Callable[[Any, Places], BatchAxis]] = {
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "pad": _pad,
    "stack": _stack,
}
# Of random keys, whose own axes come first.
_RANDOM = {"random_bits", "random_fold_in", "random_split", "random_unwrap", "random_wrap"}
# All inputs that depend on the examples have them in the same place.
_RULES_FOR_ONE: dict[str, Callable[[Any, BatchAxis], BatchAxis]] = {
    "broadcast_in_dim": _broadcast,
    "expand_dims": _reshape,
    "fft": _fft,
    "reduce_window": _window,
    "reduce_window_max": _window,
    "reduce_window_min": _window,
    "reduce_window_sum": _window,
    "reshape": _reshape,
    "rev": _reverse,
    "slice": _slice,
    "squeeze": _reshape,
    "top_k": _top_k,
    "transpose": _transpose,
}
