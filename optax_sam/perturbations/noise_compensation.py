"""NCSAM's noise compensation: what would wrong labels do to the gradient?"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import _tree
from optax_sam._hyperparameters import Hyperparameter, check_integer, check_number
from optax_sam.convolutions import inside_control_flow
from optax_sam.groups import gradients_in_slices, logits_in_slices
from optax_sam.objectives import Objective, require_objective


class NoiseCompensationState(NamedTuple):
    """State of :func:`add_noise_compensation`.

    Attributes:
      count: int32 scalar, the number of updates so far; with the seed it decides the flips.
      strength: empty, or the step count of a schedule.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name; hides tuple.count
    strength: optax.OptState


def add_noise_compensation(
    strength: optax.ScalarOrSchedule,
    flip_ratio: float = 0.2,
    *,
    seed: int = 0,
    deterministic: bool = False,
    start_step: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the estimated effect of label noise to a perturbation: :math:`\epsilon + s \, g^*`.

    :math:`g^*` is the gradient at w of the mean loss on :math:`m = \lfloor r B \rfloor` examples of the
    batch with temporarily flipped labels. Examples near the decision boundary are preferred: they
    are drawn without replacement with :math:`p_i \propto 1/(1 + \delta_i)`, where :math:`\delta_i` is
    the gap between the two largest logits. The flipped label is the likeliest class other than the
    observed one, :math:`\arg\max_{c \ne y_i} z_c`. The flips serve :math:`g^*` alone.

    Args:
      strength: s, in units of parameters per gradient; a number or a schedule of the step, such as
        :func:`noise_compensation_schedule`.
      flip_ratio: r, 0 < r ≤ 1: near the expected noise rate up to 40 %, lower above.
      seed: the same seed gives the same examples at the same step.
      deterministic: take the m smallest gaps instead of drawing.
      start_step: the first step with a compensation; before, nothing is added or computed.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` on perturbations. Its ``update`` needs ``params``
      and an :class:`optax_sam.Objective` with integer labels as ``loss_fn``; with ``logits`` (those
      at w) it computes no forward pass but that of the m examples. The engine adds
      ``microbatch_size`` and ``axis_name``, so that its passes are sliced like all others.

    Raises:
      ValueError: if ``flip_ratio`` is outside (0, 1]; from ``update``, if it chooses no example.
      TypeError: from ``update``, if ``loss_fn`` is no ``Objective`` or its labels are not integers.

    Example:
      >>> import optax, optax_sam
      >>> perturbation = optax.chain(
      ...     optax_sam.normalized(0.05),
      ...     optax_sam.add_noise_compensation(0.1, flip_ratio=0.4),
      ...     optax.clip_by_global_norm(0.05))
      >>> tx = optax.chain(optax_sam.sharpness_aware(perturbation), optax.sgd(0.1))

    References:
      Xu, Deng, Pang, NCSAM, arXiv 2601.19947v3, equations (10) to (18). The authors' released code
      flips by cluster assignments instead; see the methods page.
    """
    amount = Hyperparameter("strength", strength)
    if isinstance(flip_ratio, jax.Array):
        raise TypeError(
            "flip_ratio decides how many examples are computed, so it must be a Python number, got "
            f"{flip_ratio!r}. Under optax.inject_hyperparams name it in static_args=('flip_ratio',)."
        )
    check_number(
        "flip_ratio",
        flip_ratio,
        minimum=0,
        exclusive_minimum=True,
        maximum=1,
        remedy="Without flips use optax_sam.sam.",
    )
    if not isinstance(seed, jax.Array):  # under optax.inject_hyperparams it is one
        check_integer("seed", seed, minimum=0)
    start_step = check_integer("start_step", start_step, minimum=0)

    def init(params):
        del params
        return NoiseCompensationState(count=jnp.zeros([], jnp.int32), strength=amount.init())

    def update(
        updates,
        state,
        params=None,
        *,
        loss_fn=None,
        logits=None,
        microbatch_size=None,
        axis_name=None,
        **extra_args,
    ):
        del extra_args
        objective = require_objective(loss_fn, "the noise compensation of NCSAM")
        _check_labels(objective)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        dtype = _tree.accumulation_dtype(updates)
        s, strength_state = amount.read(state.strength, dtype)

        def compensate():
            at_w = logits
            if at_w is None:
                at_w = logits_in_slices(objective, params, microbatch_size)
            chosen = choose_examples(at_w, flip_ratio, None if deterministic else key)
            flipped = flip_labels(at_w, objective.labels)
            noisy = objective.subset(chosen).with_labels(flipped[chosen])
            gradient = gradients_in_slices(noisy, params, microbatch_size, axis_name=axis_name)
            return _tree.linear(jnp.ones([], dtype), updates, s, gradient)

        if start_step:
            has_started = state.count >= start_step
            branch = inside_control_flow(compensate)
            compensated = jax.lax.cond(has_started, branch, lambda: updates)
        else:
            compensated = compensate()
        count = optax.safe_increment(state.count)
        return compensated, NoiseCompensationState(count, strength_state)

    return optax.GradientTransformationExtraArgs(init, update)


def noise_compensation_schedule(kappa: float, total_steps: int) -> optax.Schedule:
    r"""The strength of NCSAM's compensation: :math:`s(t) = \kappa \min(1, 2 (3 - 2t) t^2)`.

    t is the progress of the training in [0, 1]; s reaches κ at t = ½ and stays there.

    Args:
      kappa: κ ≥ 0, the final strength; 0.03 to 0.4 in the paper.
      total_steps: optimizer steps of the whole training, at least 1.

    Returns:
      A schedule of the step.

    Raises:
      ValueError: if ``kappa`` is negative or ``total_steps`` is below 1.

    Example:
      >>> import optax_sam
      >>> schedule = optax_sam.noise_compensation_schedule(0.1, total_steps=100)
      >>> [round(float(schedule(step)), 4) for step in (0, 30, 50, 100)]
      [0.0, 0.0432, 0.1, 0.1]

    References:
      Xu, Deng, Pang, NCSAM, arXiv 2601.19947v3, equation (15).
    """
    check_number("kappa", kappa, minimum=0)
    total_steps = check_integer("total_steps", total_steps, minimum=1)

    def schedule(step):
        t = jnp.minimum(step / total_steps, 1)
        return kappa * jnp.minimum(2 * (3 - 2 * t) * t**2, 1)

    return schedule


def choose_examples(logits: jax.Array, flip_ratio: float, key: jax.Array | None) -> jax.Array:
    """Indices of the examples to flip, shape ``(floor(flip_ratio * B),)``."""
    count = math.floor(flip_ratio * logits.shape[0] + 1e-9)  # 0.2 * 5 is 1, also in floating point
    if count == 0:
        raise ValueError(
            f"flip_ratio={flip_ratio} chooses no example of a batch (or a group, with group_size) of "
            f"{logits.shape[0]}: take a larger ratio, batch or group."
        )
    largest, _ = jax.lax.top_k(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), 2)
    gaps = largest[:, 0] - largest[:, 1]
    if key is None:
        return jnp.argsort(gaps, stable=True)[:count]
    # The largest of log p + Gumbel noise are a sample without replacement, in proportion to p.
    noise = jax.random.gumbel(key, gaps.shape, gaps.dtype)
    return jax.lax.top_k(noise - jnp.log1p(gaps), count)[1]


def flip_labels(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The likeliest class other than the observed one, in the labels' dtype."""
    observed = jnp.arange(logits.shape[-1]) == labels[:, None]
    return jnp.argmax(jnp.where(observed, -jnp.inf, logits), axis=-1).astype(labels.dtype)


def _check_labels(objective: Objective) -> None:
    labels = objective.labels
    if not (hasattr(labels, "dtype") and jnp.issubdtype(labels.dtype, jnp.integer)) or (
        jnp.ndim(labels) != 1
    ):
        raise TypeError(
            "the noise compensation of NCSAM flips labels, so it needs integer labels of shape (B,); "
            f"got {jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), labels)}."
        )
