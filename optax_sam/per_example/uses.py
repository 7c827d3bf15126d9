"""Uses: the places where weights meet the data, in and out of loops.

A loop runs a site once in each round. If it slices a stack of weights (layers in a scan), every slice
has a gradient of its own. If it uses the same weights in all rounds (a recurrent cell), the rounds are
further positions of one site: their gradients add up.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_sam.per_example.factors import Term
from optax_sam.per_example.places import Path, Place, Sliced, apply_path, follow_axes
from optax_sam.per_example.sites import transposed


@dataclasses.dataclass(frozen=True)
class Use:
    """A site, and how the leaf comes there.

    Attributes:
      place: where it is.
      site: the operation, in one round of all loops.
      path: the way from the leaf to the site.
      leaf_type: the type of the leaf.
    """

    place: Place
    site: Any  # a Site, or a MatrixSite where the method asks for one
    path: Path
    leaf_type: Any

    @property
    def slices(self) -> tuple[bool, ...]:
        """For each loop around the site, whether it slices the weights."""
        slicing = {step.loop for step in self.path if isinstance(step, Sliced)}
        return tuple(loop in slicing for loop in range(len(self.place.rounds)))

    @property
    def layers(self) -> int:
        """How many slices of the leaf there are, each with a site of its own."""
        return math.prod(self._rounds(sliced=True))

    @property
    def repetitions(self) -> int:
        """In how many rounds the same weights are used."""
        return math.prod(self._rounds(sliced=False))

    def _rounds(self, sliced: bool) -> list[int]:
        """The rounds of the loops that do, or do not, slice the weights."""
        pairs = zip(self.place.rounds, self.slices, strict=True)
        return [rounds for rounds, is_sliced in pairs if is_sliced == sliced]

    @property
    def positions(self) -> int:
        """T, the number of positions per group at which the same weights are used."""
        return int(self.repetitions * self.site.positions)

    @property
    def recorded_size(self) -> int:
        """How many numbers are kept of the inputs and the derivatives in the outputs of one group."""
        types = (self.site.input_type, self.site.output_type)
        return math.prod(self.place.rounds) * sum(int(math.prod(t.shape)) for t in types)

    @property
    def tap_shape(self) -> tuple[int, ...]:
        """The shape of the outputs of all rounds."""
        return (*self.place.rounds, *self.site.output_type.shape)

    @property
    def leading_slices(self) -> int:
        """How many loops slice the leaf before anything else is done with it."""
        steps = itertools.takewhile(lambda step: isinstance(step, Sliced), self.path)
        return len(list(steps))

    def gradients(self, captured: jax.Array, cotangents: jax.Array, axis: int) -> jax.Array:
        """The gradient of each group, in the shape of the leaf with the groups along ``axis``.

        Args:
          captured: the inputs; axes of the loops, of the groups, of the site.
          cotangents: the derivatives in the outputs, likewise.
          axis: nothing of the size of the weights is moved if all loops slice them and are before it.
        """
        loops = len(self.slices)
        if not all(self.slices):

            def of_group(captured: jax.Array, cotangent: jax.Array) -> jax.Array:
                arrays = (jnp.expand_dims(array, loops) for array in (captured, cotangent))
                return self.summed_gradient(*arrays)

            return jax.vmap(of_group, loops, axis)(captured, cotangents)
        arrive = functools.partial(apply_path, self.path)
        to_leaf = functools.partial(transposed, arrive, self.leaf_type)
        of_layers = self._over_loops(jax.vmap(self.site.weight_gradient))
        return jax.vmap(to_leaf, loops, axis)(of_layers(captured, cotangents))

    def summed_gradient(self, captured: jax.Array, cotangents: jax.Array) -> jax.Array:
        """The sum of the gradients of several groups, one product as in an ordinary backward pass."""

        def outputs(leaf: jax.Array) -> jax.Array:
            apply = self._over_loops(jax.vmap(self.site.apply, (0, None)))
            result: jax.Array = apply(captured, apply_path(self.path, leaf))
            return result

        return transposed(outputs, self.leaf_type, cotangents)

    def _over_loops(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of two arrays of one round, for those of all rounds.

        The loops stay the leading axes, as they come out of them: moving them copies everything. The
        second array has no axis of a loop that uses the same weights in all rounds.
        """
        for sliced in reversed(self.slices):
            function = jax.vmap(function, (0, 0 if sliced else None))
        return function

    def term(self, captured: jax.Array, cotangents: jax.Array, is_transposed: bool) -> Term:
        """Each group's gradient as a product of thin matrices; leading axes are layers and groups."""
        loops = len(self.slices)
        sliced = [loop for loop in range(loops) if self.slices[loop]]
        repeated = [loop for loop in range(loops) if not self.slices[loop]]

        def merged(rows: jax.Array) -> jax.Array:
            """(loops, groups, T, ...) -> (layers, groups, repetitions T, ...)"""
            order = [*sliced, loops, *repeated, *range(loops + 1, rows.ndim)]
            leading = [rows.shape[axis] for axis in (*sliced, loops)]
            return rows.transpose(order).reshape(*leading, self.positions, *rows.shape[loops + 2 :])

        def of_all_rounds(function: Callable[..., Any], array: jax.Array) -> Any:
            for _ in range(loops + 1):
                function = jax.vmap(function)
            return jax.tree.map(merged, function(array))

        inputs = of_all_rounds(self.site.rows, captured)
        outputs = of_all_rounds(self.site.output_rows, cotangents)
        return Term(outputs, inputs) if is_transposed else Term(inputs, outputs)

    def axes(self) -> Any:
        """The axes of the leaf that loops slice, that are inputs, and that are outputs of the site."""
        found = follow_axes(self.path, self.leaf_type.shape)
        if found is None:
            return None
        inputs, outputs = (
            tuple(itertools.chain.from_iterable(found.kept[axis] for axis in axes))
            for axes in self.site.weight_axes
        )
        return found.sliced, inputs, outputs


def gram_multiplications(uses: Sequence[Use]) -> int:
    """The multiplications of one round of Gram matrices, for one layer: T² (K + O) for one use.

    Every use meets every other one. Looking up rows costs nothing: there an embedding counts as one
    input.
    """

    def width(use: Use, other: Use) -> int:
        for site in (use.site, other.site):
            if site.kind == "embedding":
                return int(1 + site.outputs)
        return int(use.site.inputs + use.site.outputs)

    return sum(
        use.positions * other.positions * width(use, other)
        for use, other in itertools.product(uses, repeat=2)
    )
