"""The training steps that are compared: one row for each.

A step is a function ``(params, stats, state, inputs, labels) -> (params, stats, state, loss)``: all
from the loss to the new parameters, with SGD and momentum as the base optimizer unless another is
given. A row builds it, together with the function that makes the optimizer's first state. A row whose
program loops over microbatches also takes ``microbatch_size``: with the whole batch in one there is no
loop, and its FLOPs can be counted.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import optax_sam
from benchmarks.architectures import objective_of
from optax_sam.linen import capture_layer_input

RHO = 0.05
MICROBATCH = 16  # examples
BASE = optax.sgd(0.1, momentum=0.9)  # the optimizer behind every method

Step = tuple[Callable, Callable]  # the optimizer's init, and the step


def sgd(module: nn.Module, base: optax.GradientTransformation = BASE) -> Step:
    """The plain step: what every ratio is relative to."""
    tx = base

    def step(params, stats, state, inputs, labels):
        objective = objective_of(module, stats, inputs, labels)
        (loss, stats), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state, loss

    return tx.init, step


def climb(params, grads):
    """``w + ρ g / ‖g‖``, written by hand."""
    scale = RHO / optax.tree.norm(grads)
    return jax.tree.map(lambda p, g: p + scale * g, params, grads)


def sam_by_hand(module: nn.Module, base: optax.GradientTransformation = BASE) -> Step:
    """SAM as one writes it without a library: the floor. It does not know the loss at w + ε."""
    tx = base

    def step(params, stats, state, inputs, labels):
        objective = objective_of(module, stats, inputs, labels)
        (loss, new_stats), grads = jax.value_and_grad(objective, has_aux=True)(params)
        grads = jax.grad(objective, has_aux=True)(climb(params, grads))[0]
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), new_stats, state, loss

    return tx.init, step


def sam_by_hand_with_both_losses(
    module: nn.Module, base: optax.GradientTransformation = BASE
) -> Step:
    """SAM by hand that reports the loss at w + ε as well, as ours does: what knowing it costs."""
    tx = base

    def step(params, stats, state, inputs, labels):
        objective = objective_of(module, stats, inputs, labels)
        value_and_grad = jax.value_and_grad(objective, has_aux=True)
        (loss, new_stats), grads = value_and_grad(params)
        (perturbed_loss, _), grads = value_and_grad(climb(params, grads))
        updates, state = tx.update(grads, state, params)
        losses = (loss, perturbed_loss)
        return optax.apply_updates(params, updates), new_stats, state, losses

    return tx.init, step


def saner_by_hand(module: nn.Module, base: optax.GradientTransformation = BASE) -> Step:
    """SANER without a library: what keeping the clean gradient costs."""
    tx = base

    def down_weighted(clean, perturbed):
        is_down = (clean * perturbed > 0) & (jnp.abs(perturbed) < jnp.abs(clean))
        return jnp.where(is_down, 0.5, 1.0) * perturbed

    def step(params, stats, state, inputs, labels):
        objective = objective_of(module, stats, inputs, labels)
        (loss, new_stats), clean = jax.value_and_grad(objective, has_aux=True)(params)
        perturbed = jax.grad(objective, has_aux=True)(climb(params, clean))[0]
        grads = jax.tree.map(down_weighted, clean, perturbed)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), new_stats, state, loss

    return tx.init, step


def optax_contrib(opaque: bool) -> Callable[..., Step]:
    """``optax.contrib.sam``: opaque is one call with two gradients, transparent two calls."""

    def build(module, base=BASE):
        adversary = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
        tx = optax.contrib.sam(base, adversary, sync_period=2, opaque_mode=opaque)

        def step(params, stats, state, inputs, labels):
            objective = objective_of(module, stats, inputs, labels)

            def grad_fn(p, _):
                return jax.grad(objective, has_aux=True)(p)[0]

            (loss, new_stats), grads = jax.value_and_grad(objective, has_aux=True)(params)
            if opaque:
                updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
                return optax.apply_updates(params, updates), new_stats, state, loss
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            updates, state = tx.update(grad_fn(params, None), state, params)
            return optax.apply_updates(params, updates), new_stats, state, loss

        return tx.init, step

    return build


def penalized(module: nn.Module, base: optax.GradientTransformation = BASE) -> Step:
    """SGD with the penalty that stands in for J-SAM."""
    tx = base
    apply_fn = capture_layer_input(module, "head")

    def step(params, stats, state, inputs, labels):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": stats}
            (logits, new), hidden = apply_fn(variables, inputs, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            penalty = optax_sam.last_layer_penalty(
                hidden,
                params["head"]["kernel"],
                activation_coefficient=0.01,
                weight_coefficient=0.01,
            )
            return losses.mean() + penalty, new.get("batch_stats", {})

        (loss, new_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), new_stats, state, loss

    return tx.init, step


def ours(
    method: Callable[..., optax.GradientTransformationExtraArgs],
    *arguments,
    pass_logits: bool = False,
    perturbed_loss: bool = False,
    **options,
) -> Callable[..., Step]:
    """A method of this package in front of the base optimizer.

    Args:
      method: the method.
      *arguments: its arguments.
      pass_logits: whether the step hands its logits on.
      perturbed_loss: whether the step reports the loss at w + ε, which the state has, in place of
        the loss at w, which then is not computed.
      **options: the method's keywords.
    """

    def build(module, base=BASE, **of_objective):
        tx = optax.chain(method(*arguments, **options), base)

        def step(params, stats, state, inputs, labels):
            objective = objective_of(module, stats, inputs, labels)
            objective = objective.replace(**of_objective)

            def loss_fn(params):
                logits, stats = objective.logits_and_aux(params)
                return objective.loss_from_logits(logits), (logits, stats)

            (loss, (logits, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
            extra = {"logits": logits} if pass_logits else {}
            updates, state = tx.update(grads, state, params, loss_fn=objective, **extra)
            if perturbed_loss:
                loss = optax_sam.get_metrics(state)["perturbed_loss"]
            return optax.apply_updates(params, updates), stats, state, loss

        return tx.init, step

    return build


def in_microbatches(
    method: Callable[..., optax.GradientTransformation] | None,
) -> Callable[..., Step]:
    """Every gradient accumulated over microbatches; without a method it is plain SGD."""

    def build(module, base=BASE, microbatch_size=MICROBATCH):
        first = optax.identity() if method is None else method(RHO)
        tx = optax.with_extra_args_support(optax.chain(first, base))

        def step(params, stats, state, inputs, labels):
            objective = objective_of(module, stats, inputs, labels)
            objective = objective.replace(microbatch_size=microbatch_size)
            (loss, stats), grads = jax.value_and_grad(objective, has_aux=True)(params)
            updates, state = tx.update(grads, state, params, loss_fn=objective)
            return optax.apply_updates(params, updates), stats, state, loss

        return tx.init, step

    return build


def naive_per_example(objective, params, rho, evaluation=optax_sam.full_gradient):
    """Loss at w and direction of 1-SAM with everything per example: what one writes with ``vmap``."""

    def one(inputs, labels):
        example = objective.replace(inputs=inputs, labels=labels)
        loss, grads = jax.value_and_grad(lambda p: example.loss_from_logits(example.logits(p)))(
            params
        )
        scale = rho / optax.tree.norm(grads)
        epsilon = jax.tree.map(lambda g: scale * g, grads)
        return loss, evaluation(example, params, epsilon)[1]

    groups = objective.groups(1)
    each = jax.vmap(one)(groups.inputs, groups.labels)
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), each)


def naive_1_sam(module: nn.Module, base: optax.GradientTransformation = BASE) -> Step:
    """1-SAM by ``vmap``."""
    tx = base

    def step(params, stats, state, inputs, labels):
        objective = objective_of(module, stats, inputs, labels)
        loss, grads = naive_per_example(objective, params, RHO)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state, loss

    return tx.init, step


class Row(NamedTuple):
    """One row of the tables.

    Attributes:
      build: ``(module, base optimizer) -> (init, step)``.
      separates: the examples of the batch are separated, which a network with BatchNorm forbids.
      divisor: the batch must be a multiple of it.
      varies: some steps of this row cost more than others, so that its time is a mean.
      at_once: if the row separates the examples: how many of them each chip of a pod takes at once;
        None is all of its batch.
    """

    build: Callable[..., Step]
    separates: bool = False
    divisor: int = 1
    varies: bool = False
    at_once: int | None = None


def grouped(method: Callable[..., optax.GradientTransformationExtraArgs], size: int) -> Row:
    """m-SAM. Its step needs no gradient at w, so it reports the loss at w + ε."""
    build = ours(method, RHO, group_size=size, perturbed_loss=True)
    return Row(build, separates=True, divisor=size)


ROWS = {
    "SGD": Row(sgd),
    "SAM by hand": Row(sam_by_hand),
    "optax.contrib.sam, opaque": Row(optax_contrib(opaque=True)),
    "optax.contrib.sam, transparent": Row(optax_contrib(opaque=False)),
    "sam": Row(ours(optax_sam.sam, RHO)),
    "asam": Row(ours(optax_sam.asam, 0.5)),
    "saner": Row(ours(optax_sam.saner, RHO)),
    "jsam": Row(ours(optax_sam.jsam, RHO)),
    "jsam, logits passed": Row(ours(optax_sam.jsam, RHO, pass_logits=True)),
    "lsam": Row(ours(optax_sam.lsam, RHO)),
    "ncsam, flip ratio 0.2, logits passed": Row(
        ours(optax_sam.ncsam, RHO, flip_ratio=0.2, pass_logits=True)
    ),
    "gsam": Row(ours(optax_sam.gsam, RHO)),
    "friendly_sam": Row(ours(optax_sam.friendly_sam, RHO)),
    "vasso": Row(ours(optax_sam.vasso, RHO)),
    "wsam": Row(ours(optax_sam.wsam, RHO)),
    "looksam, every 5": Row(ours(optax_sam.looksam, RHO, every_k=5), varies=True),
    "sam, every 5": Row(ours(optax_sam.sam, RHO, every_k=5), varies=True),
    "msam": Row(ours(optax_sam.msam, 1.0)),
    "msam, perturbed loss": Row(ours(optax_sam.msam, 1.0, perturbed_loss=True)),
    "sam, ascent on a quarter": Row(ours(optax_sam.sam, RHO, ascent_fraction=0.25)),
    "sam, two ascent steps": Row(ours(optax_sam.sam, RHO, ascent_steps=2)),
    "SGD, last-layer penalty": Row(penalized),
    "SGD, microbatches of 16": Row(in_microbatches(None), separates=True, divisor=MICROBATCH),
    "sam, microbatches of 16": Row(
        in_microbatches(optax_sam.sam), separates=True, divisor=MICROBATCH
    ),
    "1-SAM, naive vmap": Row(naive_1_sam, separates=True),
    "1-SAM": grouped(optax_sam.sam, 1),
    "1-J-SAM": grouped(optax_sam.jsam, 1),
    "1-L-SAM": grouped(optax_sam.lsam, 1),
    "m-SAM, m = 4": grouped(optax_sam.sam, 4),
    "m-SAM, m = 16": grouped(optax_sam.sam, 16),
}
