"""The engine's public face: perturbation, evaluation and combination wired into one transformation."""

from typing import Any

import jax
import optax

from optax_sam._axes import AxisName
from optax_sam._checks import check_callable
from optax_sam._engine import Engine
from optax_sam._masks import MaskOrFunction
from optax_sam._stages import KnownLength, SharpnessAwareMetrics, SharpnessAwareState, as_stage
from optax_sam.evaluations import Evaluation, full_gradient

__all__ = ["SharpnessAwareMetrics", "SharpnessAwareState", "get_metrics", "sharpness_aware"]


def sharpness_aware(
    perturbation: optax.GradientTransformation,
    *,
    evaluation: Evaluation = full_gradient,
    combination: optax.GradientTransformation | None = None,
    mask: MaskOrFunction = None,
    group_size: int | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Perturb, evaluate, combine: every method of this package is one call of this function.

    .. math::
       \epsilon = \mathrm{perturbation}(g), \qquad
       g' = \mathrm{evaluation}(L, w, \epsilon), \qquad
       d = \mathrm{combination}(g', g)

    The incoming updates are g, the clean gradient: what stands before this transformation in an
    ``optax.chain`` changes the gradient that is climbed, and that a combination compares with (unless
    ``clean_grads`` is passed). What stands after it (clipping, weight decay, momentum, learning rate)
    acts on d. The parameters are never written, and auxiliary output of the perturbed
    pass is discarded: batch statistics and the reported loss come from the caller's own pass at w.

    Args:
      perturbation: stage 1, from gradients to ε, e.g. :func:`optax_sam.normalized`. Wrappers such as
        :func:`optax_sam.in_steps` and :func:`optax_sam.on_first` change how it is climbed.
      evaluation: stage 2, e.g. :func:`optax_sam.full_gradient`.
      combination: stage 3, e.g. :func:`optax_sam.down_weight`; None descends along g'. It receives
        the extra argument ``clean_grads``.
      mask: pytree of bools like the parameters (or a prefix, or a function of the parameters that
        returns one): where False, a leaf is never perturbed and does not count in ‖g‖. It still
        receives its gradient at w + ε. Leaves that the optimizer behind the method freezes belong
        here too: otherwise a part of ε is spent on them. Under ``optax.inject_hyperparams`` name it in
        ``static_args``.
      group_size: m, cuts the batch of an ``Objective`` into groups of m examples, each with its own ε
        from its own gradient (m-SAM; 1 is 1-SAM), by a fast path where it pays
        (:func:`optax_sam.explain` tells). m must divide the batch. The combination acts on the
        averages. The incoming g is not used, so ``jit`` removes its computation.
      axis_name: name(s) of the mapped axis under ``pmap``, ``shard_map`` or ``vmap``. Local
        gradients in: each device perturbs for its own shard (m-sharpness), and no all-reduce is
        needed for ε. Averaged gradients in: one ε for the global batch. The result is averaged in
        all cases, by the weights of the objective if it has some. Under ``jit`` with sharded arrays
        leave it out: ε is that of the global batch. ``()`` says that each device goes its own way.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose ``update`` needs ``params`` and takes

      * ``loss_fn`` (required): ``params -> loss`` or ``(loss, aux)``, or an
        :class:`optax_sam.Objective`.
      * ``logits`` (optional): the logits at w from the training step's own pass; methods that look
        inside the loss then need no second forward pass.
      * ``clean_grads`` (optional): g for the combination, where the incoming updates are not it.
      * any other keyword, which is forwarded to all stages.

    Raises:
      ValueError: if an argument is out of range; from ``update``, if ``params`` is missing, if the
        updates are not like them, or if a mapped axis is not named.
      TypeError: if a stage is not a gradient transformation; from ``update``, if ``loss_fn`` is
        missing or does not return a scalar loss, if the state is another optimizer's, or if a
        parameter is complex.

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
        length=perturbation.length if isinstance(perturbation, KnownLength) else None,
        evaluation=check_callable("evaluation", evaluation, "Pass e.g. optax_sam.full_gradient."),
        combination=None if combination is None else as_stage("combination", combination),
        mask=mask,
        group_size=group_size,
        axis_name=axis_name,
    )
    return optax.GradientTransformationExtraArgs(engine.init, engine.update)


def get_metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """Collects what the methods of this package measured at the last step with a second gradient.

    With ``every_k``, ``start_step``, ``stop_step`` and ``when`` that may be an earlier step; before the
    first one all values are 0.

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
            f"expected the state of one sharpness-aware method, found {len(states)} in opt_state, "
            f"a {type(opt_state).__name__}. Pass the opt_state of an optimizer with one method in "
            "it; with several, use optax.tree.get_all_with_path(opt_state, 'metrics')."
        )
    metrics = states[0]._asdict()
    for _, fraction in optax.tree.get_all_with_path(opt_state, "down_weighted_fraction"):
        metrics["down_weighted_fraction"] = fraction
    return {name: _value_now(number) for name, number in metrics.items()}


def _value_now(number: Any) -> Any:
    """The number; ``flax.nnx.Optimizer`` keeps it in a variable, which its next step overwrites."""
    return number.get_value() if hasattr(number, "get_value") else number
