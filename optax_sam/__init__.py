"""Sharpness-aware minimization and its label-noise descendants as optax transformations."""

from optax_sam import diagnostics, label_noise, per_example
from optax_sam._stages import AlongPreviousState, SometimesState
from optax_sam.combinations import (
    DecouplingState,
    DownWeightingState,
    ReuseOrthogonalState,
    decouple,
    down_weight,
    extrapolate,
    linear_warmup_alpha,
    renormalize,
    restrict_to_coordinates,
    reuse_orthogonal,
    subtract_orthogonal,
)
from optax_sam.convolutions import canonical_convolutions
from optax_sam.evaluations import (
    Evaluation,
    full_gradient,
    jacobian_only,
    logit_only,
    perturb_then_evaluate,
)
from optax_sam.explain import explain
from optax_sam.loss_scaling import loss_scaled
from optax_sam.methods import (
    Options,
    asam,
    friendly_sam,
    functional_sam,
    gsam,
    jsam,
    le_sam,
    looksam,
    lsam,
    msam,
    ncsam,
    sam,
    saner,
    stable_sam,
    vasso,
    wsam,
)
from optax_sam.objectives import Objective
from optax_sam.penalties import last_layer_penalty
from optax_sam.perturbations import (
    MovingAverageState,
    NoiseCompensationState,
    adaptive,
    add_noise_compensation,
    loss_budget,
    moving_average,
    noise_compensation_schedule,
    normalized,
    project_to_ball,
    scale_by_second_moment,
    subtract_moving_average,
)
from optax_sam.sharpness_aware import (
    SharpnessAwareMetrics,
    SharpnessAwareState,
    get_metrics,
    sharpness_aware,
)
from optax_sam.wrappers import (
    GradientNormState,
    OnFirstState,
    When,
    along_previous,
    gradient_norm_is_large,
    in_steps,
    on_first,
    sometimes,
)

__version__ = "0.1.0"

__all__ = [
    # Named methods
    "asam",
    "friendly_sam",
    "functional_sam",
    "gsam",
    "jsam",
    "le_sam",
    "looksam",
    "lsam",
    "msam",
    "ncsam",
    "sam",
    "saner",
    "stable_sam",
    "vasso",
    "wsam",
    "Options",
    # The engine and what it needs
    "Objective",
    "explain",
    "loss_scaled",
    "SharpnessAwareMetrics",
    "SharpnessAwareState",
    "get_metrics",
    "sharpness_aware",
    # Stage 1: perturbations
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
    # Wrappers: how ε is climbed, and when there is a second gradient
    "AlongPreviousState",
    "GradientNormState",
    "OnFirstState",
    "SometimesState",
    "When",
    "along_previous",
    "gradient_norm_is_large",
    "in_steps",
    "on_first",
    "sometimes",
    # Stage 2: evaluations
    "Evaluation",
    "full_gradient",
    "jacobian_only",
    "logit_only",
    "perturb_then_evaluate",
    # Groups and loops
    "canonical_convolutions",
    "per_example",
    # Stage 3: combinations
    "DecouplingState",
    "DownWeightingState",
    "ReuseOrthogonalState",
    "decouple",
    "down_weight",
    "extrapolate",
    "linear_warmup_alpha",
    "renormalize",
    "restrict_to_coordinates",
    "reuse_orthogonal",
    "subtract_orthogonal",
    # At the cost of SGD
    "last_layer_penalty",
    # Label noise and diagnostics
    "diagnostics",
    "label_noise",
]
