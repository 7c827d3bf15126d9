"""The ends of every range are inside: a check that is too strict would refuse a right program."""

import jax.numpy as jnp
import pytest

import optax_sam
from optax_sam import label_noise

STAGE = optax_sam.normalized(0.1)
STEPS = {"total_steps": 1, "warmup_steps": 0}
LABELS = [0, 1, 0, 1]
ONES = jnp.ones((2, 2))

ACCEPTED = {
    "rho = 0": lambda: [
        optax_sam.normalized(0.0),
        optax_sam.project_to_ball(0.0),
        optax_sam.adaptive(0.0, eta=0.0),
    ],
    "theta = 1": lambda: optax_sam.moving_average(1.0),
    "decay = 0": lambda: optax_sam.subtract_moving_average(decay=0.0),
    "decay = 1": lambda: optax_sam.subtract_moving_average(decay=1.0),
    "decay of a condition = 0": lambda: optax_sam.gradient_norm_is_large(decay=0.0),
    "flip_ratio = 1": lambda: optax_sam.add_noise_compensation(0.1, flip_ratio=1.0),
    "seed = 0": lambda: optax_sam.add_noise_compensation(0.1, seed=0, start_step=0),
    "kappa = 0": lambda: optax_sam.noise_compensation_schedule(0.0, total_steps=1),
    "total_steps = 1": lambda: optax_sam.ncsam(kappa=0.0, every_k=1, **STEPS),
    "steps = 1": lambda: optax_sam.in_steps(STAGE, steps=1),
    "ascent_steps = 1": lambda: optax_sam.sam(ascent_steps=1, ascent_fraction=1.0),
    "fraction = 1": lambda: optax_sam.on_first(STAGE, 1.0),
    "every_k = 1": lambda: optax_sam.sometimes(optax_sam.sam(), every_k=1, start_step=0),
    "stop_step = start_step": lambda: optax_sam.sometimes(
        optax_sam.sam(), start_step=3, stop_step=3
    ),
    "every_k of looksam = 1": lambda: optax_sam.looksam(every_k=1),
    "group_size = 1": lambda: optax_sam.sharpness_aware(STAGE, group_size=1),
    "microbatch_size = 1": lambda: optax_sam.Objective(
        lambda w, x: x @ w, ONES, jnp.array([0, 1]), microbatch_size=1
    ),
    "momentum = 0": lambda: optax_sam.msam(momentum=0.0),
    "gamma = 0": lambda: optax_sam.extrapolate(0.0),
    "alpha of GSAM = 0": lambda: optax_sam.subtract_orthogonal(0.0),
    "alpha and norm_epsilon = 0": lambda: optax_sam.reuse_orthogonal(0.0, 0.0),
    "alpha = 0": lambda: optax_sam.down_weight(0.0, ratio_epsilon=0.0),
    "alpha = 1": lambda: optax_sam.down_weight(1.0),
    "warmup_epochs = 1": lambda: optax_sam.linear_warmup_alpha(0.5, 1, 1),
    "coefficients = 0": lambda: optax_sam.last_layer_penalty(
        ONES, ONES, activation_coefficient=0.0, weight_coefficient=0.0
    ),
    "ratio_epsilon = 0": lambda: optax_sam.restrict_to_coordinates("A", ratio_epsilon=0.0),
    "rate = 0": lambda: label_noise.symmetric(LABELS, 0.0, 2, seed=0),
    "rate = 1": lambda: label_noise.symmetric(LABELS, 1.0, 2, seed=0),
}


@pytest.mark.parametrize("limit", ACCEPTED)
def test_the_ends_of_a_range_are_accepted(limit):
    ACCEPTED[limit]()
