"""Where in a traced program a parameter is used, and on what way it came there from its leaf."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax

from optax_sam import _jaxprs


class Place(NamedTuple):
    """An equation of a traced program, and the loops around it.

    Attributes:
      numbers: the number of the equation in its program, after those of the equations around it.
      rounds: how often each of the loops around it runs, outermost first.
    """

    numbers: tuple[int, ...] = ()
    rounds: tuple[int, ...] = ()

    def inside(self, number: int) -> "Place":
        """The place of an equation of the program that is run here."""
        return Place((*self.numbers, number), self.rounds)

    def loop(self, rounds: int) -> "Place":
        """The place of the body of the loop that is run here."""
        return Place(self.numbers, (*self.rounds, rounds))

    def holds(self, other: "Place") -> bool:
        """Whether the other place is inside the program that is run here."""
        return other.numbers[: len(self.numbers)] == self.numbers


OUTSIDE = Place()


@dataclasses.dataclass(frozen=True)
class Sliced:
    """A step of a path: a loop takes one slice of a stack of weights in each round."""

    loop: int  # how many loops are around that loop


Path = tuple[Any, ...]  # equations that rearrange a value, and slices


def apply_path(path: Path, leaf: jax.Array) -> jax.Array:
    """What arrives at the end of a path; slices are kept along leading axes."""
    for number, step in enumerate(path, start=1):
        if isinstance(step, Sliced):
            return jax.vmap(functools.partial(apply_path, path[number:]))(leaf)
        (leaf,) = _jaxprs.bind(step, [leaf])
    return leaf


# Rearrangements that keep the order of the elements.
_KEEP_ORDER = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "copy_p",
    "expand_dims",
    "name",
    "reshape",
    "squeeze",
}


class Axes(NamedTuple):
    """The axes of a leaf, where they are at the end of a path.

    Attributes:
      sliced: those that loops have sliced, outermost loop first.
      kept: the axes of the leaf in each axis of the value.
    """

    sliced: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[int, ...], ...]


def follow_axes(path: Path, shape: tuple[int, ...]) -> Axes | None:
    """Where the axes of a leaf are at the end of a path; None if one was cut into parts."""
    sliced: list[tuple[int, ...]] = []
    kept: list[tuple[int, ...]] = [(axis,) if size != 1 else () for axis, size in enumerate(shape)]
    for step in path:
        if isinstance(step, Sliced):
            sliced.append(kept.pop(0))
        elif step.primitive.name == "transpose":
            kept = [kept[axis] for axis in step.params["permutation"]]
        elif step.primitive.name in _KEEP_ORDER:
            regrouped = _regroup(kept, shape, step.outvars[0].aval.shape)
            if regrouped is None:
                return None
            kept = regrouped
        else:
            return None
    return Axes(tuple(sliced), tuple(kept))


def _regroup(
    kept: list[tuple[int, ...]], sizes: tuple[int, ...], target: tuple[int, ...]
) -> list[tuple[int, ...]] | None:
    """The axes of the leaf, spread in their order over the axes of another shape."""
    rest = [axis for axes in kept for axis in axes]
    groups = []
    for size in target:
        group: list[int] = []
        while math.prod(sizes[axis] for axis in group) < size and rest:
            group.append(rest.pop(0))
        if math.prod(sizes[axis] for axis in group) != size:
            return None
        groups.append(tuple(group))
    return groups
