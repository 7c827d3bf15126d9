"""The engine's public face: perturbation, evaluation and combination wired into one transformation."""

from collections.abc import Callable
from typing import Literal

import chex
import jax
import optax

from optax_sam._ascent_schedule import AscentSchedule
from optax_sam._axes import AxisName
from optax_sam._engine import Engine, SharpnessAwareMetrics, SharpnessAwareState, as_stage
from optax_sam._hyperparameters import check_callable
from optax_sam._masks import Mask
from optax_sam.evaluations import Evaluation, full_gradient

__all__ = ["SharpnessAwareMetrics", "SharpnessAwareState", "get_metrics", "sharpness_aware"]


def sharpness_aware(
    perturbation: optax.GradientTransformation,
    *,
    evaluation: Evaluation = full_gradient,
    combination: optax.GradientTransformation | None = None,
    mask: Mask | Callable[[chex.ArrayTree], Mask] | None = None,
    axis_name: AxisName = None,
    has_aux: bool = False,
    climb: Literal["clean", "previous"] = "clean",
    ascent_steps: int | None = None,
    ascent_fraction: float | None = None,
    group_size: int | None = None,
    microbatch_size: int | None = None,
    every_k: int | None = None,
    start_step: int | None = None,
    stop_step: int | None = None,
    reuse: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Perturb, evaluate, combine: every method of this package is one call of this function.

    .. math::
       \epsilon = \mathrm{perturbation}(g), \qquad
       g' = \mathrm{evaluation}(L, w, \epsilon), \qquad
       d = \mathrm{combination}(g', g)

    The incoming updates are g, the clean gradient: what stands before this transformation in an
    ``optax.chain`` shapes the ascent only. What stands after it (clipping, weight decay, momentum,
    learning rate) acts on d. The parameters are never written, and auxiliary output of the perturbed
    pass is discarded: batch statistics and the reported loss come from the caller's own pass at w.

    Args:
      perturbation: stage 1, from gradients to ε, e.g. :func:`optax_sam.normalized`.
      evaluation: stage 2, e.g. :func:`optax_sam.full_gradient`.
      combination: stage 3, e.g. :func:`optax_sam.down_weight`; None descends along g'. It receives
        the extra argument ``clean_grads``.
      mask: pytree of bools like the parameters (or a prefix, or a function of the parameters that
        returns one): where False, a leaf is never perturbed and does not count in ‖g‖. It still
        receives its gradient at w + ε.
      axis_name: name(s) of the mapped axis under ``pmap``, ``shard_map`` or ``vmap``. Local
        gradients in: each device perturbs for its own shard (m-sharpness), and no all-reduce is
        needed for ε. Averaged gradients in: one ε for the global batch. The result is averaged in
        all cases. Under ``jit`` with sharded arrays leave it out: ε is that of the global batch.
        Gradients that the engine takes itself (``ascent_steps``, ``ascent_fraction``) are those of
        the device's own shard.
      has_aux: whether a plain ``loss_fn`` returns ``(loss, aux)``. An ``Objective`` knows.
      climb: ``"clean"`` climbs along g; ``"previous"`` along the last step's g', so that a step costs
        one gradient (the first step climbs nowhere).
      ascent_steps: n ≥ 1 climbs of an n-th of the perturbation each, with a gradient in between;
        None is one. Costs n + 1 gradients. Only the first climb advances the perturbation's state.
      ascent_fraction: 0 < q ≤ 1, takes the ascent gradient on the first ⌊q B⌋ examples of an
        ``Objective`` (at least one). If nothing else uses the incoming g (no ``combination``), ``jit``
        removes its computation, and the two gradients cost 1 + q.
      group_size: m, cuts the batch of an ``Objective`` into groups of m examples, each with its own ε
        from its own gradient (m-SAM; 1 is 1-SAM), by a fast path where it pays. m must divide the
        batch. The combination acts on the averages. The incoming g is not used, so ``jit`` removes
        its computation.
      microbatch_size: takes every pass of an ``Objective`` that is the engine's in slices of this
        many examples, in the memory of one slice and with the same result (networks that do not mix
        examples). Must divide the batch; with groups, a multiple of m. For the clean pass, which is
        the training step's, there is :func:`optax_sam.value_and_grad`.
      every_k: a second gradient only every k-th step, really skipped in between; those steps
        descend along g, or along what ``reuse`` makes of it. None is every step.
      start_step: the first step with a second gradient (late SAM); None is step 0.
      stop_step: the first step without one again; None never stops.
      reuse: what stands in for g' on skipped steps, e.g. :func:`optax_sam.reuse_orthogonal`; None
        descends along g there, and leaves the combination out.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``update`` needs ``params`` and takes

      * ``loss_fn`` (required): ``params -> loss``, or an :class:`optax_sam.Objective`.
      * ``logits`` (optional): the logits at w from the training step's own pass; methods that look
        inside the loss then need no second forward pass.
      * any other keyword, which is forwarded to all stages.

    Raises:
      ValueError: if an argument is out of range; from ``update``, if ``params`` is missing or the
        loss differs along a mapped axis that ``axis_name`` does not name.
      TypeError: if a stage is not a gradient transformation; from ``update``, if ``loss_fn`` is
        missing or is not a scalar loss, or if a parameter is complex.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> loss_fn = lambda w: jnp.sum(w**4)
      >>> tx = optax.chain(optax_sam.sharpness_aware(optax_sam.normalized(0.1)), optax.sgd(0.1))
      >>> params = jnp.ones(2)
      >>> updates, state = tx.update(
      ...     jax.grad(loss_fn)(params), tx.init(params), params, loss_fn=loss_fn)
      >>> round(float(optax.tree.get(state, "perturbation_norm")), 4)
      0.1

    References:
      Foret et al., Sharpness-Aware Minimization, ICLR 2021, arXiv 2010.01412.
    """
    engine = Engine(
        perturbation=as_stage("perturbation", perturbation),
        evaluation=check_callable("evaluation", evaluation, "Pass e.g. optax_sam.full_gradient."),
        combination=None if combination is None else as_stage("combination", combination),
        mask=mask,
        axis_name=axis_name,
        has_aux=has_aux,
        climb=climb,
        ascent_steps=ascent_steps,
        ascent_fraction=ascent_fraction,
        group_size=group_size,
        microbatch_size=microbatch_size,
        radius=getattr(perturbation, "radius", None),
        schedule=AscentSchedule(every_k, start_step, stop_step),
        reuse=None if reuse is None else as_stage("reuse", reuse),
    )
    return optax.GradientTransformationExtraArgs(engine.init, engine.update)


def get_metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """Collects what the methods of this package measured at the last step.

    Args:
      opt_state: the state of any optimizer with one sharpness-aware method in it.

    Returns:
      A dictionary of scalars: ``perturbed_loss``, ``gradient_norm``, ``perturbation_norm``, and
      with :func:`optax_sam.down_weight` also ``down_weighted_fraction``.

    Raises:
      ValueError: if there is no sharpness-aware method in the state, or several.

    Example:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> tx = optax.chain(optax_sam.saner(rho=0.05), optax.sgd(0.1))
      >>> sorted(optax_sam.get_metrics(tx.init(jnp.ones(3))))
      ['down_weighted_fraction', 'gradient_norm', 'perturbation_norm', 'perturbed_loss']
    """
    found = optax.tree.get_all_with_path(opt_state, "metrics")
    states = [value for _, value in found if isinstance(value, SharpnessAwareMetrics)]
    if len(states) != 1:
        raise ValueError(
            f"expected the state of one sharpness-aware method, found {len(states)}. With several, "
            "use optax.tree.get_all_with_path(opt_state, 'metrics')."
        )
    metrics = states[0]._asdict()
    for _, fraction in optax.tree.get_all_with_path(opt_state, "down_weighted_fraction"):
        metrics["down_weighted_fraction"] = fraction
    return metrics
