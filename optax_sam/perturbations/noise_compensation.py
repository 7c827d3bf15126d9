"""NCSAM's noise compensation: what would wrong labels do to the gradient?"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam import _axes, _batches, _tree
from optax_sam._checks import (
    call,
    check_bool,
    check_callable,
    check_like,
    check_parameters_given,
    is_array_of,
    kinds,
)
from optax_sam._hyperparameters import Hyperparameter, check_integer, check_number
from optax_sam._loss_checks import evaluating_the_loss
from optax_sam.convolutions import inside_control_flow
from optax_sam.evaluations import check_logits, value_and_gradients
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
    label_of: Callable[[Any], Any] | None = None,
    by_weights: bool = False,
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
      label_of: where ``labels`` is a pytree with several candidates, a function that picks the array
        of integer labels, shape ``(B,)``, or of soft labels, shape ``(B, classes)``; None finds it.
      by_weights: give the chosen examples the weight 1 and all others 0, in place of copying the
        chosen ones out of the batch. For batches that are sharded over devices under ``jit``: the
        copies would go to every device, and each would compute all of them. :math:`g^*` is the same,
        unless the network mixes examples (BatchNorm), for one more gradient of the batch in place of
        r of one.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` on perturbations. Its ``update`` needs ``params``
      and an :class:`optax_sam.Objective` with integer or soft labels as ``loss_fn``; with ``logits``
      (those at w) it computes no forward pass but that of the m examples. A penalty of the objective
      is left out of :math:`g^*`, and weights hold among the m examples.

    Raises:
      ValueError: if ``flip_ratio`` is outside (0, 1]; from ``update``, if it chooses no example.
      TypeError: from ``update``, if ``loss_fn`` is no ``Objective``, if its labels are neither integers
        nor soft labels, or if a wrapper such as ``optax.masked`` hides some of the parameters.

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
            f"{flip_ratio!r}. Under optax.inject_hyperparams name it in "
            "static_args=('flip_ratio',)."
        )
    check_number(
        "flip_ratio",
        flip_ratio,
        minimum=0,
        exclusive_minimum=True,
        maximum=1,
        remedy="Without flips use optax_sam.sam.",
    )
    if not is_array_of(seed, jnp.integer) or jnp.ndim(seed):  # optax.inject_hyperparams makes one
        check_integer("seed", seed, minimum=0)
    check_bool("deterministic", deterministic)
    check_bool("by_weights", by_weights)
    if label_of is not None:
        check_callable("label_of", label_of, "Pass e.g. label_of=lambda labels: labels['...'].")
    start_step = check_integer("start_step", start_step, minimum=0)

    def init(params: optax.Params) -> NoiseCompensationState:
        del params
        return NoiseCompensationState(count=jnp.zeros([], jnp.int32), strength=amount.init())

    def update(
        updates: optax.Updates,
        state: NoiseCompensationState,
        params: optax.Params | None = None,
        *,
        loss_fn: Any = None,
        logits: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, NoiseCompensationState]:
        del extra_args
        objective = require_objective(loss_fn, "the noise compensation of NCSAM").replace(
            penalty=None
        )
        check_parameters_given(
            params,
            "add_noise_compensation",
            "update(perturbation, state, params, loss_fn=objective)",
        )
        with evaluating_the_loss("add_noise_compensation", params):
            check_like(
                "updates", updates, params, of="params", remedy="Pass a perturbation of params."
            )
            if logits is not None:
                check_logits(objective, params, logits)
            key = jax.random.fold_in(jax.random.key(seed), state.count)
            dtype = _tree.accumulation_dtype(updates)
            s, strength_state = amount.read(state.strength, dtype)

            def compensate() -> optax.Updates:
                at_w = objective.logits(params) if logits is None else logits
                flipped = _with_flipped_labels(objective, at_w, label_of)
                chosen = choose_examples(at_w, flip_ratio, None if deterministic else key)
                part = _weighted(flipped, chosen) if by_weights else flipped.subset(chosen)
                _, gradient = value_and_gradients(part, params)
                return _tree.linear(jnp.ones([], dtype), updates, s, gradient)

            if start_step:
                has_started = state.count >= start_step
                branch = inside_control_flow(compensate)
                # The gradient of local examples differs from device to device.
                marks = (params, objective.examples, updates)
                compensated = jax.lax.cond(
                    has_started,
                    lambda: _axes.to_varying_like(branch(), marks),
                    lambda: _axes.to_varying_like(updates, marks),
                )
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

    def schedule(step: chex.Numeric) -> chex.Numeric:
        t = jnp.minimum(step / total_steps, 1)
        return kappa * jnp.minimum(2 * (3 - 2 * t) * t**2, 1)

    return schedule


def choose_examples(logits: jax.Array, flip_ratio: float, key: jax.Array | None) -> jax.Array:
    """Indices of the examples to flip, shape ``(floor(flip_ratio * B),)``."""
    count = math.floor(flip_ratio * logits.shape[0] + 1e-9)  # 0.2 * 5 is 1, also in floating point
    if count == 0:
        raise ValueError(
            f"flip_ratio={flip_ratio} chooses no example of a batch (or a group, with group_size) "
            f"of {logits.shape[0]}: take a larger ratio, batch or group."
        )
    if logits.shape[-1] < 2:
        raise ValueError(
            f"NCSAM flips labels between classes, but the logits of shape {logits.shape} have "
            f"{logits.shape[-1]}. Return one logit per class, also for two classes."
        )
    # Not top_k, for which logits that are sharded over devices would be gathered.
    # The gaps are gathered: one number an example.
    wide = logits.astype(_tree.accumulation_dtype(logits))
    is_largest = jnp.arange(logits.shape[-1]) == jnp.argmax(wide, axis=-1)[:, None]
    gaps = jnp.max(wide, axis=-1) - jnp.max(jnp.where(is_largest, -jnp.inf, wide), axis=-1)
    gaps = _batches.gathered(gaps)
    if key is None:
        return jnp.argsort(gaps, stable=True)[:count]
    # The largest of log p + Gumbel noise are a sample without replacement, in proportion to p.
    noise = jax.random.gumbel(key, gaps.shape, gaps.dtype)
    return jax.lax.top_k(noise - jnp.log1p(gaps), count)[1]


def flip_labels(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The likeliest class other than the observed one, in the labels' dtype as JAX has it."""
    observed = jnp.arange(logits.shape[-1]) == labels[:, None]
    likeliest = jnp.argmax(jnp.where(observed, -jnp.inf, logits), axis=-1)
    return likeliest.astype(jnp.result_type(labels))


def _weighted(objective: Objective, chosen: jax.Array) -> Objective:
    """The mean loss over the chosen examples, in which the others have the weight 0."""
    ones = jnp.ones(objective.batch_size) if objective.weights is None else objective.weights
    is_chosen = jnp.zeros(objective.batch_size, bool).at[chosen].set(True)
    is_chosen = is_chosen.reshape(-1, *(1,) * (jnp.ndim(ones) - 1))
    return objective.replace(weights=jnp.where(is_chosen, ones, jnp.zeros_like(ones)))


def _with_flipped_labels(
    objective: Objective, logits: Any, label_of: Callable[[Any], Any] | None
) -> Objective:
    """The objective with the labels of all examples flipped: class numbers, or soft labels."""
    if not hasattr(logits, "ndim") or logits.ndim != 2:
        raise TypeError(
            "the noise compensation of NCSAM flips one label per example, so it needs logits of "
            f"shape (B, classes), got {kinds(logits)}. For one label per token map the network "
            "over tokens, or use another method."
        )
    leaves, treedef = jax.tree.flatten(objective.labels)
    index = _label_index(leaves, objective.labels, logits, label_of)
    label = leaves[index]
    if _is_class_number(label):
        leaves[index] = flip_labels(logits, label)
    else:
        flipped = flip_labels(logits, jnp.argmax(label, axis=-1))
        leaves[index] = jax.nn.one_hot(flipped, logits.shape[-1], dtype=label.dtype)
    return objective.with_labels(jax.tree.unflatten(treedef, leaves))


def _label_index(
    leaves: list[Any], labels: Any, logits: jax.Array, label_of: Callable[[Any], Any] | None
) -> int:
    """Which leaf of the labels holds the classes: the only candidate, or the one that was named."""
    if label_of is not None:
        chosen = call(
            "label_of",
            label_of,
            labels,
            takes="the labels and nothing else",
            remedy="Pass e.g. label_of=lambda labels: labels['...'].",
        )
        found = [index for index, leaf in enumerate(leaves) if leaf is chosen]
    else:
        found = [index for index, leaf in enumerate(leaves) if _is_class_number(leaf)]
        if not found:
            found = [index for index, leaf in enumerate(leaves) if _is_soft(leaf, logits)]
    if len(found) != 1 or not (
        _is_class_number(leaves[found[0]]) or _is_soft(leaves[found[0]], logits)
    ):
        raise TypeError(
            "the noise compensation of NCSAM flips labels, so it needs one array of integer "
            f"labels of shape (B,), or of soft labels like the logits, {logits.shape}; got labels "
            f"{kinds(labels)}. Name the array with label_of=lambda labels: labels['...']."
        )
    return found[0]


def _is_class_number(leaf: Any) -> bool:
    return jnp.ndim(leaf) == 1 and bool(jnp.issubdtype(jnp.result_type(leaf), jnp.integer))


def _is_soft(leaf: Any, logits: jax.Array) -> bool:
    return jnp.shape(leaf) == logits.shape and _tree.is_floating(leaf)
