"""Instruments to look into a training with label noise.

Which labels are suspect without a correct one (training dynamics), how much of the noise is memorized,
how sharp the loss is, and the SANER paper's sets of coordinates.
"""

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
    # Coordinates of the gradient
    "CoordinateShares",
    "coordinate_shares",
]
