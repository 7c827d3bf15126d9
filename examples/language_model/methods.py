"""The optimizer: a method of the library in front of AdamW with a cosine schedule."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import optax

import optax_sam

if TYPE_CHECKING:
    from .config import Config

METHODS: dict[str, Callable[..., optax.GradientTransformationExtraArgs] | None] = {
    "adamw": None,
    "sam": optax_sam.sam,
    "functional_sam": optax_sam.functional_sam,
    "jsam": optax_sam.jsam,  # with one perturbation per batch the same
    "asam": optax_sam.asam,
    "saner": optax_sam.saner,
    "friendly_sam": optax_sam.friendly_sam,
    "gsam": optax_sam.gsam,
}


def make_optimizer(config: "Config") -> optax.GradientTransformationExtraArgs:
    """The method, then clipping and AdamW, which act on the method's gradient."""
    warmup = warmup_steps(config)
    rate = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else config.learning_rate,
        config.learning_rate,
        warmup,
        config.steps,
        end_value=0.1 * config.learning_rate,
    )
    return optax.chain(
        make_method(config),
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=config.weight_decay, mask=matrices),
    )


def make_method(config: "Config") -> optax.GradientTransformationExtraArgs:
    """What makes the gradient that AdamW is given."""
    method = METHODS[config.method]
    if method is None:
        return optax.with_extra_args_support(optax.identity())
    options: dict[str, Any] = {}
    if config.perturb == "norms":
        options["mask"] = norm_scales
    if config.every_k is not None:
        options["every_k"] = config.every_k
    if config.preconditioned:  # by the moment of the AdamW below, which the step hands to it
        options["preconditioner"] = optax_sam.scale_by_second_moment()
    if start := start_step(config):
        options["start_step"] = start
    return method(config.rho, **options)


def warmup_steps(config: "Config") -> int:
    """The steps in which the learning rate rises."""
    return round(config.warmup * config.steps)


def start_step(config: "Config") -> int:
    """The first step, counted from 0, at which the method is at work."""
    return round(config.method_starts * config.steps)


def gradients(config: "Config") -> int:
    """How many gradients a run computes: two at each step at which the method is at work."""
    if config.method == "adamw":
        return config.steps
    at_work = config.steps - start_step(config)
    return config.steps + -(-at_work // (config.every_k or 1))


def matrices(params: Any) -> Any:
    """True for what weight decay acts on: all but the scales of the normalization layers."""
    return jax.tree.map(lambda is_scale: not is_scale, norm_scales(params))


def norm_scales(params: Any) -> Any:
    """True for the scales of the normalization layers."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "scale", params)
