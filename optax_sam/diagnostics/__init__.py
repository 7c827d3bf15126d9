"""Instruments to look into a training with label noise.

Which labels are suspect without a correct one (training dynamics), how much of the noise is memorized,
how sharp the loss is, and how SANER, J-SAM and NCSAM do what they do.

A plain function that an instrument gets is compiled anew in each call, as what it closes over may have
changed. One that is a pytree, such as ``optax_sam.Objective`` or ``jax.tree_util.Partial``, is an
argument of one compiled program: whatever changes must be one of its arrays.
"""

from optax_sam.diagnostics.compensation import (
    CompensationGeometry,
    angle,
    compensation_geometry,
)
from optax_sam.diagnostics.coordinates import CoordinateShares, coordinate_shares
from optax_sam.diagnostics.curvature import (
    Eigenvalue,
    hessian_vector_product,
    largest_eigenvalue,
)
from optax_sam.diagnostics.dynamics import (
    Recording,
    TrainingDynamics,
    record_batch,
    record_epoch,
    start_recording,
    training_dynamics,
)
from optax_sam.diagnostics.gradient_factors import (
    FactorChanges,
    LastLayerNorms,
    factor_changes,
    last_layer_norms,
)
from optax_sam.diagnostics.label_gradients import (
    Damping,
    SharesByLabel,
    damping,
    shares_by_label,
)
from optax_sam.diagnostics.memorization import Memorization, memorization
from optax_sam.diagnostics.sharpness import Sharpness, sharpness
from optax_sam.diagnostics.slices import filter_normalized, loss_line, loss_plane
from optax_sam.diagnostics.spectrum import Spectrum, Trace, hessian_spectrum, hessian_trace
from optax_sam.diagnostics.suspects import Suspects, auroc, rank_suspects

__all__ = [
    # Training dynamics
    "Recording",
    "TrainingDynamics",
    "record_batch",
    "record_epoch",
    "start_recording",
    "training_dynamics",
    "Suspects",
    "rank_suspects",
    "auroc",
    # Memorization
    "Memorization",
    "memorization",
    # Sharpness and curvature
    "Sharpness",
    "sharpness",
    "Eigenvalue",
    "largest_eigenvalue",
    "hessian_vector_product",
    "Trace",
    "hessian_trace",
    "Spectrum",
    "hessian_spectrum",
    "filter_normalized",
    "loss_line",
    "loss_plane",
    # How SANER works
    "CoordinateShares",
    "coordinate_shares",
    "SharesByLabel",
    "shares_by_label",
    "Damping",
    "damping",
    # How J-SAM works
    "FactorChanges",
    "factor_changes",
    "LastLayerNorms",
    "last_layer_norms",
    # How NCSAM works
    "CompensationGeometry",
    "compensation_geometry",
    "angle",
]
