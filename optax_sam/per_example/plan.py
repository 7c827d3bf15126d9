"""How the perturbation of each parameter leaf will be computed, and why."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_sam import _jaxprs, _tree
from optax_sam._jaxprs import CannotFollowError
from optax_sam.convolutions import has_convolution
from optax_sam.per_example.factors import Term, squared_norm
from optax_sam.per_example.places import Place
from optax_sam.per_example.sites import site_of
from optax_sam.per_example.trace import Trace
from optax_sam.per_example.uses import Use, gram_multiplications
from optax_sam.per_example.walk import ParameterValue, resolve_all, walk

Arrays = dict[Place, jax.Array]

GRAM = "Gram matrices"
KERNEL = "own kernel"
GRADIENT = "own gradient"
FROZEN = "not perturbed"
CONSTANT = "not differentiated"


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """The plan of one leaf.

    Attributes:
      path: the leaf's name.
      shape: its shape.
      method: how its perturbation is computed.

        * ``GRAM``: norm and perturbed output from T × T Gram matrices; nothing of the size of the
          weights exists per group.
        * ``KERNEL``: gradient and perturbed weights exist for each group of a microbatch; the
          second gradient does not.
        * ``GRADIENT``: ordinary differentiation of each group, exact for everything.
        * ``FROZEN``: masked; ``CONSTANT``: integers.
      uses: where the leaf meets the data, if all of these places are sites.
      transposed: for each use, whether its weights are the transpose of those of the first one.
      reason: why there are no uses.
    """

    path: str
    shape: tuple[int, ...]
    method: str
    uses: tuple[Use, ...] = ()
    transposed: tuple[bool, ...] = ()
    reason: str = ""

    @property
    def copied_size(self) -> int:
        """How many numbers are kept for each group at once because of this leaf."""
        return math.prod(self.shape) if self.method in (KERNEL, GRADIENT) else 0

    @property
    def recorded_size(self) -> int:
        """How many numbers its sites keep for each group: their inputs and output derivatives."""
        return sum(use.recorded_size for use in self.uses)

    @property
    def is_perturbed(self) -> bool:
        """Whether the leaf takes part in the perturbation."""
        return self.method not in (FROZEN, CONSTANT)

    @property
    def group_axis(self) -> int:
        """Where the axis of the groups is in their gradients or in the terms of these.

        Behind those of the layers, as loops leave it.
        """
        if self.method == GRAM:
            return sum(self.uses[0].slices)
        if self.method == KERNEL:
            return min(use.leading_slices for use in self.uses)
        return 0

    def gradients(self, captured: Arrays, cotangents: Arrays) -> jax.Array:
        """The gradient of each group, with the groups along :attr:`group_axis`, for ``KERNEL``."""
        return functools.reduce(
            jnp.add,
            (
                use.gradients(captured[use.place], cotangents[use.place], self.group_axis)
                for use in self.uses
            ),
        )

    def summed_gradient(self, captured: Arrays, cotangents: Arrays) -> jax.Array:
        """The sum of the gradients of several groups."""
        return functools.reduce(
            jnp.add,
            (use.summed_gradient(captured[use.place], cotangents[use.place]) for use in self.uses),
        )

    def terms(self, captured: Arrays, cotangents: Arrays) -> tuple[Term, ...]:
        """The gradient of each group in thin matrices, for ``GRAM``."""
        return tuple(
            use.term(captured[use.place], cotangents[use.place], is_transposed)
            for use, is_transposed in zip(self.uses, self.transposed, strict=True)
        )

    def squared_norms(self, terms: tuple[Term, ...]) -> jax.Array:
        """‖g‖² of each group, for ``GRAM``."""
        function: Callable[..., jax.Array] = squared_norm
        for _ in range(self.group_axis + 1):
            function = jax.vmap(function)
        return jnp.sum(function(terms), axis=tuple(range(self.group_axis)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of the whole network.

    Attributes:
      leaves: one plan per parameter leaf.
      has_convolution: whether there is a convolution anywhere in the network.
      rematerializes: whether it saves memory by computing something again in the backward pass.
      failure: why the traced program could not be followed; then nothing of it is walked.
    """

    leaves: tuple[LeafPlan, ...]
    has_convolution: bool
    rematerializes: bool = False
    failure: str = ""

    @property
    def copied_size(self) -> int:
        """How many numbers are kept for each group at once, in copies of weights."""
        return sum(leaf.copied_size for leaf in self.leaves)

    @property
    def kept_size(self) -> int:
        """How many numbers are kept for each group at once, in copies and in inputs and derivatives."""
        return sum(leaf.copied_size + leaf.recorded_size for leaf in self.leaves)

    @property
    def positions(self) -> int:
        """T, the largest number of positions of a group at which the same weights are used."""
        positions = (use.positions for leaf in self.leaves for use in leaf.uses)
        return max(positions, default=1)

    @property
    def allows_large_microbatches(self) -> bool:
        """Whether the groups at once need not be few.

        Convolutional networks profit from caches in small microbatches, even without copies of
        weights. A network whose plan needs next to no copies does not.
        """
        return not self.has_convolution and self.copied_size <= _SMALL_COPIES

    def suits_groups_of(self, size: int) -> bool:
        """Whether following the plan is faster than differentiating each group by itself.

        Large groups are work enough for ordinary differentiation, unless their gradients, as large as
        the weights, outweigh it.
        """
        return size <= _SMALL_MICROBATCH or self.allows_large_microbatches

    def groups_at_once(self, count: int, group_size: int, microbatch_size: int | None) -> int:
        """How many of ``count`` groups to process at once; the result does not depend on it."""
        if microbatch_size is not None:
            return min(max(1, microbatch_size // group_size), count)
        limit = max(1, _SMALL_MICROBATCH // group_size)
        # What is kept may be as large as the parameters: SAM keeps ε.
        parameters = sum(math.prod(leaf.shape) for leaf in self.leaves)
        fitting = max(1, parameters // max(self.kept_size, 1))
        if self.allows_large_microbatches:
            limit = max(limit, fitting)
            if not self.rematerializes:  # half of the batch keeps what batch SAM keeps of the whole
                limit = max(limit, min(_ROWS // self.positions, count // 2))
        if jax.default_backend() != "cpu":  # no small caches there: as many as the memory likes
            if self.allows_large_microbatches and not self.rematerializes:
                return count  # kept are inputs and derivatives: about twice what batch SAM keeps
            limit = max(limit, _ACCELERATOR_SIZE // max(self.kept_size, 1))
        if self.rematerializes and not self.has_convolution:  # whose copies are small beside images
            # Every microbatch adds gradients as large as the parameters: a few examples share the cost.
            limit = min(limit, max(2 * parameters // max(self.kept_size, 1), _FEWEST))
        if count <= limit:
            return count
        divisors = [size for size in range(1, limit + 1) if count % size == 0]
        # A remainder costs a second compiled program, a tiny microbatch costs speed.
        return divisors[-1] if 2 * divisors[-1] > limit else limit

    def without_following(self, failure: str) -> "Plan":
        """The plan that works for every program: ordinary differentiation of each group."""
        leaves = tuple(
            dataclasses.replace(
                leaf,
                method=GRADIENT if leaf.is_perturbed else leaf.method,
                uses=(),
                transposed=(),
                reason=failure if leaf.is_perturbed else leaf.reason,
            )
            for leaf in self.leaves
        )
        return dataclasses.replace(self, leaves=leaves, failure=failure)


_SMALL_MICROBATCH = 8  # examples
_ROWS = 512  # positions of all groups at once; a product of fewer rows leaves cores idle
_FEWEST = 2  # groups at once in a rematerialized network
_SMALL_COPIES = 2**17  # numbers per group
_ACCELERATOR_SIZE = 2**28  # numbers per microbatch: 1 GiB in float32


class _Survey:
    """A :class:`~optax_sam.per_example.walk.Visitor` that records every use of every leaf.

    Attributes:
      uses: for each leaf, its sites by their place: the body of a loop may be traced twice.
      reasons: for each leaf, why its other uses are no sites.
      types: the types of the leaves.
    """

    def __init__(self, count: int):
        self.uses: list[dict[Place, Use]] = [{} for _ in range(count)]
        self.reasons: list[list[str]] = [[] for _ in range(count)]
        self.types: list[Any] = []
        self.captured: Arrays = {}

    def given(self, loop: Place) -> Arrays:
        return {}

    def branch(self, given: Arrays) -> "_Survey":
        return self  # it captures nothing

    def at_site(
        self,
        place: Place,
        equation: Any,
        position: int,
        inputs: jax.Array,
        parameter: ParameterValue,
    ) -> jax.Array:
        site, leaf = site_of(equation, position), parameter.leaf
        if parameter.path is None:
            self.reasons[leaf].append(f"cut or repeated before a {site.kind} site")
        else:
            self.uses[leaf][place] = Use(place, site, parameter.path, self.types[leaf])
        return site.apply(inputs, parameter.clean)

    def resolve(self, parameter: ParameterValue, reason: str) -> jax.Array:
        self.reasons[parameter.leaf].append(reason)
        return parameter.clean


def make_plan(trace: Trace, leaves: Sequence[jax.Array], perturbed: Sequence[bool]) -> Plan:
    """The plan of every leaf.

    Args:
      trace: the traced network.
      leaves: the parameter leaves; only their types matter.
      perturbed: the mask, one bool per leaf.
    """
    failure = ""
    survey = _Survey(len(leaves))
    try:
        _carry_out(survey, trace, leaves)
    except CannotFollowError as error:
        failure = str(error)
    plans = map(_plan_leaf, trace.paths, leaves, perturbed, survey.uses, survey.reasons)
    jaxpr = trace.jaxpr
    planned = Plan(tuple(plans), has_convolution(jaxpr), _jaxprs.rematerializes(jaxpr))
    return planned.without_following(failure) if failure else planned


def _carry_out(survey: _Survey, trace: Trace, leaves: Sequence[jax.Array]) -> None:
    """Finds every use of every leaf, by an abstract walk that computes nothing."""

    def run(leaves: list[jax.Array], group: list[jax.Array]) -> list[Any]:
        marked: list[Any] = [
            ParameterValue(leaf, leaf=index) if _tree.is_floating(leaf) else leaf
            for index, leaf in enumerate(leaves)
        ]
        survey.types = [jax.typeof(leaf) for leaf in leaves]
        outputs = walk(trace.jaxpr, [*marked, *group], survey)
        return resolve_all(outputs, survey, "is itself a logit")

    jax.eval_shape(run, list(leaves), jax.tree.leaves(trace.first_group))


def _plan_leaf(
    path: str, leaf: jax.Array, is_perturbed: bool, found: dict[Place, Use], reasons: list[str]
) -> LeafPlan:
    shape = jnp.shape(leaf)
    if not _tree.is_floating(leaf):
        return LeafPlan(path, shape, CONSTANT, reason="not floating point")
    reason = _why_no_site(found, reasons)
    uses = () if reason else tuple(found.values())
    transposed = _orientations(uses)
    if not is_perturbed:  # its sites still serve the clean gradient
        method, note = FROZEN, "masked"
    elif not uses:
        method, note = GRADIENT, reason
    else:
        method, note = (GRAM if transposed and _gram_is_cheaper(uses) else KERNEL), ""
    return LeafPlan(path, shape, method, uses, transposed, note)


def _why_no_site(uses: dict[Place, Use], reasons: list[str]) -> str:
    if reasons:
        return reasons[0]
    return "" if uses else "not used"


def _orientations(uses: Sequence[Use]) -> tuple[bool, ...]:
    """For each use, whether its weights are those of the first one transposed; () if none of both."""
    if not all(use.site.has_gram_form for use in uses):
        return ()
    if len(uses) <= 1:
        return (False,) * len(uses)
    axes = [use.axes() for use in uses]
    if None in axes:
        return ()
    sliced, inputs, outputs = axes[0]
    known = {(sliced, inputs, outputs): False, (sliced, outputs, inputs): True}
    return tuple(known[a] for a in axes) if all(a in known for a in axes) else ()


def _gram_is_cheaper(uses: Sequence[Use]) -> bool:
    """Compares multiplications: three times T² (K + O), for norm, output and its derivative, or T K O.

    Looking up rows costs nothing, so the K of an embedding does not count on the left.
    """
    products = sum(use.positions * use.site.inputs * use.site.outputs for use in uses)
    return 3 * gram_multiplications(uses) <= int(products)
