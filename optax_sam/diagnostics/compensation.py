"""NCSAM's compensation beside SAM's perturbation."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam import _norms, _tree
from optax_sam._checks import check_leaves, check_like, kinds
from optax_sam._hyperparameters import check_number
from optax_sam._stages import as_stage
from optax_sam.diagnostics._compiled import compiled_for_loss
from optax_sam.evaluations import value_and_gradients
from optax_sam.objectives import Objective, require_objective
from optax_sam.perturbations import NoiseCompensationState, normalized


class CompensationGeometry(NamedTuple):
    """The result of :func:`compensation_geometry`: lengths in units of parameters, angles in degrees.

    Attributes:
      sam_length: scalar, ‖ρ g/‖g‖‖.
      length: scalar, ‖s g*‖, the length of the compensation.
      angle: scalar, between the compensation and SAM's perturbation; NaN where one of them is zero, as
        the compensation is before ``start_step`` and where the schedule of s is 0.
      sum_length: scalar, of their sum, before it is projected to the ball.
      sum_angle: scalar, between the sum and SAM's perturbation.
    """

    sam_length: jax.Array
    length: jax.Array
    angle: jax.Array
    sum_length: jax.Array
    sum_angle: jax.Array


def angle(first: chex.ArrayTree, second: chex.ArrayTree) -> jax.Array:
    """The angle between two vectors in parameter space, such as gradients or perturbations.

    Args:
      first: a pytree of arrays.
      second: a pytree like ``first``.

    Returns:
      Degrees, a scalar in [0, 180], accurate for small angles too; NaN if one of them is zero.

    Raises:
      ValueError: if the trees are not alike.
      TypeError: if one of them has no floating leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam.diagnostics import angle
      >>> round(float(angle({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([2.0, 2.0])})), 3)
      45.0

    References:
      Kahan, How Futile are Mindless Assessments of Roundoff, 2006, section 12.
    """
    check_like("second", second, first, of="first", remedy="Both are vectors in parameter space.")
    first, second = _tree.as_arrays(first), _tree.as_arrays(second)
    for name, tree in (("first", first), ("second", second)):
        if not _tree.floating_leaves(tree):
            raise TypeError(
                f"{name} must have floating leaves, got {kinds(tree)}. Cast them first."
            )
    # In half precision unit vectors are not parallel to what they are the units of.
    dtype = _tree.accumulation_dtype([first, second])
    first, second = (
        jax.tree.map(lambda x: x.astype(dtype) if _tree.is_floating(x) else x, tree)
        for tree in (first, second)
    )
    a, b = _norms.norm(first), _norms.norm(second)
    left = _tree.scale(first, _tree.divide_or_zero(jnp.ones([], a.dtype), a))
    right = _tree.scale(second, _tree.divide_or_zero(jnp.ones([], b.dtype), b))
    apart = _norms.norm(_tree.map_floating(jnp.subtract, left, right))
    together = _norms.norm(_tree.map_floating(jnp.add, left, right))
    degrees = jnp.degrees(2 * jnp.arctan2(apart, together))
    return jnp.where((a == 0) | (b == 0), jnp.nan, degrees)


def compensation_geometry(
    compensation: optax.GradientTransformation,
    rho: float,
    objective: Objective,
    params: chex.ArrayTree,
    state: optax.OptState | None = None,
) -> CompensationGeometry:
    r"""How long NCSAM's compensation :math:`s \, g^*` is, and where it points.

    SAM's perturbation is :math:`\rho g/\lVert g \rVert`; NCSAM perturbs by the sum of both, projected
    to the ρ-ball. A compensation that is short against ρ does nothing, one that is long takes over.
    Costs a gradient, a forward pass, and the gradient of the flipped examples.

    Args:
      compensation: :func:`optax_sam.add_noise_compensation` as the method has it. Keep it: another one,
        even if it is equal, is compiled anew.
      rho: ρ ≥ 0.
      objective: the loss of the batch.
      params: the parameters w.
      state: of ``compensation``: which step it is, for a schedule of s and for the draw of the
        examples; None: the first step. There NCSAM's own schedule is 0: pass a later state. In the
        state of :func:`optax_sam.ncsam` it is the only :class:`optax_sam.NoiseCompensationState`.

    Returns:
      :class:`CompensationGeometry`.

    Raises:
      ValueError: if ``rho`` is negative, or ``flip_ratio`` chooses no example of the batch.
      TypeError: if ``objective`` is not an ``Objective``, or ``compensation`` is another stage.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> from optax_sam.diagnostics import compensation_geometry
      >>> objective = optax_sam.Objective(lambda w, x: x @ w, jnp.eye(2), jnp.array([0, 1]))
      >>> stage = optax_sam.add_noise_compensation(0.1, flip_ratio=1.0)
      >>> geometry = compensation_geometry(stage, 0.05, objective, jnp.zeros((2, 2)))
      >>> round(float(geometry.angle)), round(float(geometry.length), 4)
      (180, 0.05)

    References:
      Xu, Deng, Pang, NCSAM, arXiv 2601.19947v3, equations (10) to (18).
    """
    require_objective(objective, "compensation_geometry")
    check_leaves(params)
    check_number("rho", rho, minimum=0)
    stage = as_stage("compensation", compensation)
    state = stage.init(params) if state is None else state
    if not isinstance(state, NoiseCompensationState):
        raise TypeError(
            "compensation must be optax_sam.add_noise_compensation(...), but its state is "
            f"{type(state).__name__}. Pass this stage alone, without normalized(rho) in front of it."
        )
    result: CompensationGeometry = _geometry(
        objective, params, state, jnp.asarray(rho, float), stage=compensation
    )
    return result


def _compensation_geometry(
    objective: Objective,
    params: chex.ArrayTree,
    state: NoiseCompensationState,
    rho: jax.Array,
    *,
    stage: optax.GradientTransformation,
) -> CompensationGeometry:
    _, gradients = value_and_gradients(objective, params)
    climb = normalized(rho)
    sam, _ = climb.update(gradients, climb.init(params))
    zeros = _tree.zeros_like(gradients)
    added, _ = optax.with_extra_args_support(stage).update(zeros, state, params, loss_fn=objective)
    both = _tree.map_floating(jnp.add, sam, added)
    return CompensationGeometry(
        sam_length=_norms.norm(sam),
        length=_norms.norm(added),
        angle=angle(added, sam),
        sum_length=_norms.norm(both),
        sum_angle=angle(both, sam),
    )


_geometry = compiled_for_loss(_compensation_geometry, "stage")
