"""How the perturbation of each parameter leaf will be computed, and why."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from optax_sam import _tree
from optax_sam._jaxprs import CannotFollowError
from optax_sam.convolutions import has_convolution
from optax_sam.per_example.sites import Site, site_of, transposed
from optax_sam.per_example.trace import Trace
from optax_sam.per_example.walk import ParameterValue, Path, apply_path, resolve_all, walk

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
      site: where the leaf meets the data, if that is exactly one known place.
      path_to_site: the rearrangements in between.
      reason: why there is no site.
    """

    path: str
    shape: tuple[int, ...]
    method: str
    site: Any = None  # a Site, which the method asks for
    path_to_site: Path = ()
    reason: str = ""

    @property
    def copied_size(self) -> int:
        """How many numbers are kept for each group at once because of this leaf."""
        return math.prod(self.shape) if self.method in (KERNEL, GRADIENT) else 0

    @property
    def is_perturbed(self) -> bool:
        """Whether the leaf takes part in the perturbation."""
        return self.method not in (FROZEN, CONSTANT)

    def gradient_in_leaf(self, gradient: jax.Array) -> jax.Array:
        """A gradient in the shape that the weights have at the site, back in the leaf's shape."""
        if not self.path_to_site:
            return gradient
        leaf_type = self.path_to_site[0].invars[0].aval
        return transposed(lambda leaf: apply_path(self.path_to_site, leaf), leaf_type, gradient)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of the whole network.

    Attributes:
      leaves: one plan per parameter leaf.
      has_convolution: whether there is a convolution anywhere in the network.
      failure: why the traced program could not be followed; then nothing of it is walked.
    """

    leaves: tuple[LeafPlan, ...]
    has_convolution: bool
    failure: str = ""

    @property
    def copied_size(self) -> int:
        """How many numbers are kept for each group at once, in copies of weights."""
        return sum(leaf.copied_size for leaf in self.leaves)

    @property
    def is_best_left_whole(self) -> bool:
        """Whether the batch needs no cutting into microbatches.

        Convolutional networks profit from caches in small microbatches, even without copies of
        weights. A network whose plan needs next to no copies does not.
        """
        return not self.has_convolution and self.copied_size <= _SMALL_COPIES

    def suits_groups_of(self, size: int) -> bool:
        """Whether following the plan is faster than differentiating each group by itself.

        Large groups are work enough for ordinary differentiation, unless their gradients, as large as
        the weights, outweigh it.
        """
        return size <= _SMALL_MICROBATCH or self.is_best_left_whole

    def groups_at_once(self, count: int, group_size: int, microbatch_size: int | None) -> int:
        """How many of ``count`` groups to process at once; the result does not depend on it."""
        if microbatch_size is not None:
            return min(max(1, microbatch_size // group_size), count)
        if self.is_best_left_whole:
            return count
        limit = max(1, _SMALL_MICROBATCH // group_size)
        if jax.default_backend() != "cpu":  # no small caches there: as many as the memory likes
            limit = max(limit, _ACCELERATOR_COPIES // max(self.copied_size, 1))
        divisors = [size for size in range(1, limit + 1) if count % size == 0]
        # A remainder costs a second compiled program, a tiny microbatch costs speed.
        return min(count, divisors[-1] if 2 * divisors[-1] > limit else limit)

    def without_following(self, failure: str) -> "Plan":
        """The plan that works for every program: ordinary differentiation of each group."""
        leaves = tuple(
            dataclasses.replace(
                leaf,
                method=GRADIENT if leaf.is_perturbed else leaf.method,
                site=None,
                path_to_site=(),
                reason=failure if leaf.is_perturbed else leaf.reason,
            )
            for leaf in self.leaves
        )
        return Plan(leaves, self.has_convolution, failure)


_SMALL_MICROBATCH = 8  # examples
_SMALL_COPIES = 2**17  # numbers per group
_ACCELERATOR_COPIES = 2**28  # numbers per microbatch: 1 GiB in float32


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a leaf meets data: a site, or the reason why it is none."""

    site: Site | None
    path: Path | None
    reason: str


class _Survey:
    """A :class:`~optax_sam.per_example.walk.Visitor` that records every use of every leaf."""

    enters_loops = False

    def __init__(self, uses: list[list[Use]]):
        self.uses = uses
        self.captured: dict[int, jax.Array] = {}

    def branch(self) -> "_Survey":
        return _Survey(self.uses)

    def at_site(
        self, equation: Any, position: int, inputs: jax.Array, parameter: ParameterValue
    ) -> jax.Array:
        site = site_of(equation, position)
        reason = "" if parameter.path is not None else f"cut or repeated before a {site.kind} site"
        self.uses[parameter.leaf].append(Use(site, parameter.path, reason))
        return site.apply(inputs, parameter.clean)

    def resolve(self, parameter: ParameterValue, reason: str) -> jax.Array:
        self.uses[parameter.leaf].append(Use(None, (), reason))
        return parameter.clean


def make_plan(trace: Trace, leaves: Sequence[jax.Array], perturbed: Sequence[bool]) -> Plan:
    """The plan of every leaf.

    Args:
      trace: the traced network.
      leaves: the parameter leaves; only their types matter.
      perturbed: the mask, one bool per leaf.
    """
    failure = ""
    uses: list[list[Use]] = [[] for _ in leaves]
    try:
        uses = _survey(trace, leaves)
    except CannotFollowError as error:
        failure = str(error)
    planned = Plan(
        tuple(map(_plan_leaf, trace.paths, leaves, perturbed, uses)), has_convolution(trace.jaxpr)
    )
    return planned.without_following(failure) if failure else planned


def _survey(trace: Trace, leaves: Sequence[jax.Array]) -> list[list[Use]]:
    """Every use of every leaf, found by an abstract walk that computes nothing."""
    uses: list[list[Use]] = [[] for _ in leaves]
    survey = _Survey(uses)

    def run(leaves: list[jax.Array], group: list[jax.Array]) -> list[Any]:
        marked: list[Any] = [
            ParameterValue(leaf, leaf=index) if _tree.is_floating(leaf) else leaf
            for index, leaf in enumerate(leaves)
        ]
        outputs = walk(trace.jaxpr, [*marked, *group], survey)
        return resolve_all(outputs, survey, "is itself a logit")

    jax.eval_shape(run, list(leaves), jax.tree.leaves(trace.first_group))
    return uses


def _plan_leaf(path: str, leaf: jax.Array, is_perturbed: bool, uses: list[Use]) -> LeafPlan:
    shape = jax.numpy.shape(leaf)
    if not _tree.is_floating(leaf):
        return LeafPlan(path, shape, CONSTANT, reason="not floating point")
    reason = _why_no_site(uses)
    site: Any = None if reason else uses[0].site
    if not is_perturbed:  # its site still serves the clean gradient
        method, note = FROZEN, "masked"
    elif site is None:
        method, note = GRADIENT, reason
    else:
        method, note = (GRAM if _gram_is_cheaper(site) else KERNEL), ""
    return LeafPlan(path, shape, method, site, (uses[0].path or ()) if site else (), note)


def _why_no_site(uses: list[Use]) -> str:
    if not uses:
        return "not used"
    if len(uses) > 1:
        return f"used {len(uses)} times"
    return uses[0].reason


def _gram_is_cheaper(site: Site) -> bool:
    """Compares multiplications: three times T² (K + O), for norm, output and its derivative, or T K O.

    Looking up rows costs nothing, so the K of an embedding does not count on the left.
    """
    if not site.has_gram_form:
        return False
    inputs = 1 if site.kind == "embedding" else site.inputs
    return 3 * site.positions * (inputs + site.outputs) <= site.inputs * site.outputs
