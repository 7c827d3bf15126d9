"""Stage 1: which way and how far do we climb?

A perturbation is an ``optax.GradientTransformation`` that takes the gradients and returns the
perturbation ε, so ``optax.chain``, ``optax.partition`` and schedules all work on it.
"""

from optax_sam.perturbations.adaptive import adaptive
from optax_sam.perturbations.loss_budget import loss_budget
from optax_sam.perturbations.moving_averages import (
    MovingAverageState,
    moving_average,
    subtract_moving_average,
)
from optax_sam.perturbations.noise_compensation import (
    NoiseCompensationState,
    add_noise_compensation,
    noise_compensation_schedule,
)
from optax_sam.perturbations.normalized import normalized
from optax_sam.perturbations.preconditioning import scale_by_second_moment
from optax_sam.perturbations.projection import project_to_ball

__all__ = [
    "MovingAverageState",
    "NoiseCompensationState",
    "adaptive",
    "add_noise_compensation",
    "loss_budget",
    "moving_average",
    "noise_compensation_schedule",
    "normalized",
    "project_to_ball",
    "scale_by_second_moment",
    "subtract_moving_average",
]
